"""Do learned locally linear models with gains reach the optimum of an unstable plant? (arXiv:2305.09619)

A pole that leans and falls, ``x1' = x2``, ``x2' = 4 sin x1 + u``, from a fixed start over 1 to 4 seconds; deviations
grow as ``exp(2 t)``. The same first guess, inputs recorded under a hand-made feedback, is improved with gains and
without, the latter with twice as many iterations for about as many rollouts; step sizes are tuned over the same six
values for each. The gap is that of the cost of the last iterate, played open loop and without noise, to the optimum
of iLQR on the exact model; three seeds. Beside it iLQR on networks fitted to 500, 2,000 and 8,000 transitions.
Everything but the networks is in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from steersman.control.ilqr import ILQR, Trajectory
from steersman.control.learned_locally_linear import LearnedLocallyLinear, LocalPolicy
from steersman.control.local_models import LeastSquares, perturbed_response
from steersman.control.planning import PlanningModel, ProblemModel
from steersman.control.rollout_oracles import ProblemOracle
from steersman.envs.control_problem import ContinuousTimeProblem, rollout, trajectory_cost
from steersman.networks import MLP
from steersman.studies.study import Report, Study
from steersman.training.figures import LIGHT, colours, save_figure

_STEP_SIZES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
_HAND = (7.0, 1.5)
_START = (1.0, 0.0)


class LeaningPole(ContinuousTimeProblem):
    """``x1' = x2``, ``x2' = 4 sin x1 + u``: unstable upright, with the rate 2 per second.

    Costs ``x1^2 + 0.1 x2^2 + 0.5 u^2`` per second and ``10 x1^2 + x2^2`` at the end.
    """

    horizon: int = eqx.field(static=True, default=40)
    sample_time: float = eqx.field(static=True, default=0.05)
    integrator: str = eqx.field(static=True, default="rk4")
    substeps: int = eqx.field(static=True, default=2)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("angle", "angular velocity")

    @property
    def control_names(self) -> tuple[str, ...]:
        return ("torque",)

    def derivative(self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"]) -> Float[Array, " n"]:
        return jnp.stack([x[1], 4.0 * jnp.sin(x[0]) + u[0]])

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        return self.sample_time * (x[0] ** 2 + 0.1 * x[1] ** 2 + 0.5 * u[0] ** 2)

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return 10.0 * x[0] ** 2 + x[1] ** 2

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        return jnp.asarray(_START)


class LearnedPole(PlanningModel):
    """The costs of the pole with a network's dynamics, ``x' = x + f(x, u)``.

    Attributes:
        network: ``f``, from and to normalized numbers.
        sizes: of its inputs and outputs, ``[3]`` and ``[2]``.
    """

    network: MLP
    sizes: tuple[Array, ...]
    problem: LeaningPole

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.problem.control_bounds

    def step(self, state: Float[Array, " n"], u: Float[Array, " m"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        change = self.sizes[1] * self.network(jnp.concatenate([state, u]) / self.sizes[0])
        return state + change, self.problem.stage_cost(state, u)

    def terminal_cost(self, state: Float[Array, " n"]) -> Float[Array, ""]:
        return self.problem.terminal_cost(state)


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("learned-locally-linear", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("hours for receding-horizon pendulum and quadrotor tasks and their deep baselines, on a GPU")
    smoke = study.budget == "smoke"
    horizons = (8,) if smoke else (20, 40, 60, 80)
    iterations, seeds = (2, [seed]) if smoke else (30, [seed, seed + 1, seed + 2])
    with jax.enable_x64(True):
        found = {steps: _horizon(study, steps, iterations, seeds) for steps in horizons}
        _judge(study, found)
        _draw_gaps(study, found)
        if not smoke:
            _draw_response(study, horizons[-1], found[horizons[-1]]["optimum"])
            few = _few_rollouts(40, iterations, seeds, found[40])
            with jax.enable_x64(False):
                networks = _networks(study, seeds, found[40])
            _draw_data(study, found[40], few, networks)
    return study.report()


@eqx.filter_jit
def _solve(planner: ILQR, state: Array, controls: Array) -> Trajectory:
    return planner.solve(state, controls)


@eqx.filter_jit
def _improve(algorithm: LearnedLocallyLinear, oracle: ProblemOracle, sizes: Array, keys: Array, iterations: int) -> Any:
    """Costs ``[E, S, iterations + 1]`` of the iterates, cost of the one selected ``[E, S]``, transitions used."""

    def one(size: Array, key: Array) -> tuple[Array, Array, Array]:
        each = eqx.tree_at(lambda algorithm: algorithm.step_size, algorithm, size)
        state, metrics = jax.lax.scan(
            lambda state, _: each.step(oracle, state), each.init(oracle, key), None, length=iterations + 1
        )
        chosen = state.best
        samples = jnp.concatenate([jnp.zeros(1, metrics["samples"].dtype), metrics["samples"][:-1]])
        return metrics["cost"], trajectory_cost(oracle.problem, chosen.states, chosen.controls), samples

    return jax.vmap(lambda size: jax.vmap(lambda key: one(size, key))(keys))(sizes)


def _first_guess(steps: int, **options: Any) -> LearnedLocallyLinear:
    gains = jnp.broadcast_to(jnp.asarray(_HAND), (steps, 1, 2))
    return LearnedLocallyLinear(jnp.zeros((steps, 1)), gains, **options)


@eqx.filter_jit
def _recorded(oracle: ProblemOracle, steps: int) -> Array:
    """The controls of the first guess."""
    return _first_guess(steps).init(oracle, jax.random.key(0)).current.controls


@eqx.filter_jit
def _effect(oracle: ProblemOracle, policy: LocalPolicy, key: Array) -> Array:
    """Size of ``Psi_{j,0}`` for each ``j > 0``."""
    response = perturbed_response(oracle, LeastSquares(), *policy, rollouts=20, perturbation=1e-3, key=key)
    return jnp.linalg.norm(response.markov()[1:, 0], axis=(1, 2))


def _keys(seeds: list[int]) -> Array:
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def _horizon(study: Study, steps: int, iterations: int, seeds: list[int]) -> dict[str, Any]:
    """Gaps ``[E, S, iterations + 1]`` with gains and without, over one horizon."""
    problem = LeaningPole(horizon=steps)
    oracle = ProblemOracle(problem, jnp.asarray(_START))
    guess = _recorded(oracle, steps)
    optimum = _solve(ILQR(ProblemModel(problem), steps, tolerance=1e-13), oracle.start, guess)
    sizes = jnp.asarray(_STEP_SIZES[-2:] if study.budget == "smoke" else _STEP_SIZES)
    found: dict[str, Any] = {"optimum": optimum, "sizes": np.asarray(sizes)}
    for arm, feedback, count in (("gains", True, iterations), ("no gains", False, 2 * iterations)):
        algorithm = _first_guess(steps, feedback=feedback)
        costs, chosen, samples = _improve(algorithm, oracle, sizes, _keys(seeds), count)
        gaps = np.asarray(costs / optimum.cost - 1.0)
        # A diverging iterate may be NaN or infinite; either is as bad as can be.
        found[arm] = gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        found[arm + ", samples"] = np.asarray(samples)
        selected = np.asarray(chosen / optimum.cost - 1.0)
        for i, size in enumerate(found["sizes"]):
            study.row(
                part="methods",
                horizon=steps * problem.sample_time,
                arm=arm,
                step_size=float(size),
                transitions=int(samples[i, 0, -1]),
                first=float(gaps[i, 0, 0]),
                gap=float(gaps[i, :, -1].mean()),
                worst=float(gaps[i, :, -1].max()),
                selected=float(selected[i].mean()),
                open_loop=None,
            )
        found[arm + ", selected"] = selected.mean(axis=1)
    return found


def _judge(study: Study, found: dict[int, dict[str, Any]]) -> None:
    worst = np.max([each["gains"][:, :, -1].max(axis=1) for each in found.values()], axis=0)
    one = int(np.argmin(worst))
    sizes = next(iter(found.values()))["sizes"]
    study.claim(
        "With gains one step size reaches the optimum over every horizon.",
        expected="relative gap < 1e-4 at every horizon with one step size",
        measured=f"at most {worst[one]:.1e}, with {sizes[one]:g}",
        holds=worst[one] < 1e-4,
    )
    best = [float(each["no gains"][:, :, -1].mean(axis=1).min()) for each in found.values()]
    seconds = [steps * 0.05 for steps in found]
    shown = ", ".join(f"{gap:.2g} ({s:g} s)" for gap, s in zip(best, seconds, strict=True))
    study.claim(
        "Without gains the gap grows with the horizon, at the best step size for each.",
        expected="growing; > 0.2 at 2 s, > 1 at 3 s",
        measured=shown,
        holds=len(best) > 2 and bool(np.all(np.diff(best) > 0.0)) and best[1] > 0.2 and best[2] > 1.0,
    )
    chosen = ", ".join(f"{each['no gains, selected'].min():.2g}" for each in found.values())
    study.note(
        "Judged is the last iterate. Selected by the smallest estimated gradient instead, as the algorithm's policy "
        f"is, the gaps without gains are {chosen}: over long horizons it then keeps an early iterate."
    )
    wild = max(float(each["gains"].max() / each["gains"][0, 0, 0]) for each in found.values())
    study.note(f"With gains no iterate at any step size was worse than {wild:.2f} times the first gap.")


def _few_rollouts(
    steps: int, iterations: int, seeds: list[int], found: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps ``[S, iterations + 1]`` and transitions with 8 rollouts instead of 20, over 2 seconds."""
    oracle = ProblemOracle(LeaningPole(horizon=steps), jnp.asarray(_START))
    algorithm = _first_guess(steps, rollouts=8)
    costs, _, samples = _improve(algorithm, oracle, jnp.ones(1), _keys(seeds), iterations)
    return np.asarray(costs[0] / found["optimum"].cost - 1.0), np.asarray(samples[0])


def _networks(study: Study, seeds: list[int], found: dict[str, Any]) -> list[dict[str, Any]]:
    """ILQR on networks, fitted to random rollouts or to noisy optimal ones; two sizes of noise each."""
    problem = LeaningPole()
    optimum = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), found["optimum"])
    start = jnp.asarray(_START)
    follow = optimum.policy()

    def recorded(key: Array, noise: Array, expert: Array) -> tuple[Array, Array]:
        """200 rollouts of 40 steps: inputs ``[8000, 3]`` and changes ``[8000, 2]``."""

        def step(x: Array, inputs: tuple) -> tuple[Array, tuple]:
            t, e = inputs
            u = noise * e + jnp.where(expert, follow(x, t, key)[0], 0.0)
            following = problem.dynamics(x, u)
            return following, (jnp.concatenate([x, u]), following - x)

        draws = jax.random.normal(key, (200, 40, 1))
        seen = jax.vmap(lambda e: jax.lax.scan(step, start, (jnp.arange(40), e))[1])(draws)
        return jax.tree.map(lambda part: part.reshape(8000, -1), seen)

    def fitted(key: Array, noise: Array, expert: Array, count: Array) -> LearnedPole:
        data_key, network_key, key = jax.random.split(key, 3)
        inputs, targets = recorded(data_key, noise, expert)
        used = (jnp.arange(8000) < count)[:, None]
        sizes = tuple(jnp.sqrt(jnp.sum(used * part**2, axis=0) / count) for part in (inputs, targets))
        network = MLP(3, 2, (64, 64, 64), "swish", output_gain=0.01, key=network_key)
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 3000))

        def update(running: tuple, key: Array) -> tuple[tuple, None]:
            network, memory = running
            rows = jax.random.randint(key, (128,), 0, count)
            x, y = inputs[rows] / sizes[0], targets[rows] / sizes[1]
            gradient = jax.grad(lambda network: jnp.mean((network(x) - y) ** 2))(network)
            change, memory = optimizer.update(gradient, memory)
            return (eqx.apply_updates(network, change), memory), None

        begun = network, optimizer.init(eqx.filter(network, eqx.is_array))
        (network, _), _ = jax.lax.scan(update, begun, jax.random.split(key, 3000))
        return LearnedPole(network, sizes, problem)

    @eqx.filter_jit
    def judged(key: Array, noise: Array, expert: Array, count: Array) -> tuple[Array, Array]:
        """Gaps of iLQR's controls on the true plant, open loop and with iLQR's gains."""

        def one(key: Array, noise: Array, expert: Array) -> tuple[Array, Array]:
            model = fitted(key, noise, expert, count)
            plan = ILQR(model, 40, tolerance=1e-5).solve(start, follow.controls * 0.0)
            alone = rollout(problem, plan.controls, start)
            held = rollout(problem, plan.policy(), start, key=key, num_steps=40)
            costs = [trajectory_cost(problem, *played) for played in (alone, held)]
            return costs[0] / optimum.cost - 1.0, costs[1] / optimum.cost - 1.0

        return jax.vmap(one)(key, noise, expert)

    arms = [(expert, noise) for expert, noises in ((False, (1.0, 3.0)), (True, (0.3, 1.0))) for noise in noises]
    keys = jnp.repeat(_keys(seeds), len(arms))
    noise = jnp.tile(jnp.asarray([noise for _, noise in arms]), len(seeds))
    expert = jnp.tile(jnp.asarray([expert for expert, _ in arms]), len(seeds))
    rows = []
    for count in (500, 2000, 8000):
        alone, held = (
            np.asarray(part).reshape(-1, len(arms)) for part in judged(keys, noise, expert, jnp.asarray(count))
        )
        for i, (optimal, size) in enumerate(arms):
            name = f"network, {'noisy optimal' if optimal else 'random'} rollouts, noise {size:g}"
            gap, worst, open_loop = float(held[:, i].mean()), float(held[:, i].max()), float(alone[:, i].mean())
            rows.append({"optimal": optimal, "transitions": count, "gap": gap})
            cells = {"gap": gap, "worst": worst, "selected": None, "open_loop": open_loop}
            study.row(part="networks", horizon=2.0, arm=name, step_size=None, transitions=count, first=None, **cells)
    return rows


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _draw_gaps(study: Study, found: dict[int, dict[str, Any]]) -> None:
    figure = _figure((9.0, 3.8))
    panels = figure.subplots(1, 2, sharey=True)
    colour = colours([f"{steps * 0.05:g} s" for steps in found])
    for axes, arm in zip(panels, ("gains", "no gains"), strict=True):
        for each, name in zip(found.values(), colour, strict=True):
            means = each[arm].mean(axis=1)
            best = int(np.argmin(means[:, -1]))
            shown = np.clip(means[best], 1e-10, 1e4)
            axes.semilogy(shown, color=colour[name], label=f"{name}, step size {each['sizes'][best]:g}")
        axes.set_title("with gains" if arm == "gains" else "without, twice the iterations", fontsize=10)
        axes.set_xlabel("iteration")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("relative gap to the optimum")
    save_figure(figure, study.figure("gaps"))


def _draw_response(study: Study, steps: int, optimum: Trajectory) -> None:
    """How an input at the start still acts later, estimated from 20 rollouts."""
    problem = LeaningPole(horizon=steps)
    oracle = ProblemOracle(problem, jnp.asarray(_START))
    figure = _figure((5.3, 3.8))
    axes = figure.subplots()
    colour = colours(["with gains", "without"])
    time = problem.sample_time * np.arange(1, steps + 1)
    for name, gains in (("with gains", optimum.gains), ("without", jnp.zeros_like(optimum.gains))):
        policy = LocalPolicy(optimum.controls, optimum.states, gains)
        size = np.asarray(_effect(oracle, policy, jax.random.key(study.seed)))
        axes.semilogy(time, size, color=colour[name], label=name)
    axes.semilogy(time, size[0] * np.exp(2.0 * time), color=LIGHT["muted"], linestyle=":", label="growth with rate 2/s")
    axes.set_xlabel("seconds after an input at the start")
    axes.set_ylabel("size of its effect on the state")
    axes.legend(fontsize=8)
    save_figure(figure, study.figure("response"))


def _draw_data(study: Study, found: dict[str, Any], few: Any, networks: list[dict[str, Any]]) -> None:
    figure = _figure((5.8, 4.4))
    axes = figure.subplots()
    names = ["locally linear, 20 rollouts", "locally linear, 8 rollouts"]
    names += ["network, random rollouts", "network, noisy optimal rollouts"]
    colour = colours(names)
    for name, gaps, samples in (
        (names[0], found["gains"][-1], found["gains, samples"][-1]),
        (names[1], *few),
    ):
        axes.loglog(samples[0, 1:], np.maximum(gaps.mean(axis=0)[1:], 1e-8), color=colour[name], label=name)
    for name, optimal in ((names[2], False), (names[3], True)):
        rows = [row for row in networks if row["optimal"] is optimal]
        counts = sorted({row["transitions"] for row in rows})
        gaps = [min(row["gap"] for row in rows if row["transitions"] == count) for count in counts]
        axes.loglog(counts, gaps, color=colour[name], marker="o", label=name)
    axes.set_xlabel("transitions used")
    axes.set_ylabel("relative gap to the optimum, 2 s")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, study.figure("transitions"))
