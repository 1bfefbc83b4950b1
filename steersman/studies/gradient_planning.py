"""Does descent through a model plan better than sampling with the same number of rollouts? (arXiv:2312.17227)

Masses that a random nonlinear network couples, each pushed by its own bounded force. With the exact dynamics nothing
but planning is compared; a gradient step counts as three rollouts. With dynamics learned from random episodes, plans
are also seeded by policies trained within it, one of them far too briefly. CEM's samples, iterations, elites and width
are tuned on starts that are judged nowhere, at the same budget and for each model anew; Grad-MPC keeps the card's
numbers throughout.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from steersman.control.gradient_planning import GradientPlanner, PolicyProposals
from steersman.control.planning import Planner, PlanningModel, ProblemModel
from steersman.control.sampling import SamplingPlanner
from steersman.control.search import CrossEntropy, RandomShooting
from steersman.control.splines import Spline
from steersman.control.transition_planning import Imagined, TransitionPlanningModel
from steersman.envs.control_problem import ControlProblem, rollout
from steersman.networks import MLP
from steersman.policies import Policy
from steersman.studies.study import Report, Study
from steersman.training.dynamics_model import EnsembleLearner
from steersman.training.figures import LIGHT, colours, save_figure
from steersman.training.replay import Replay, Transition

_STEPS = 60
_HORIZON = 15
# Samples, iterations, elites: 240 rollouts each; tuned together with the width of the search.
_SETTINGS = ((48, 5, 5), (24, 10, 4), (80, 3, 8))
_WIDTHS = (0.5, 1.0)
# Starts played side by side, in tuning and in judging, so that one program does for both.
_BATCH = 5


class CoupledMasses(ControlProblem):
    """``v' = .95 v + .1 (2 u + sin(W x) - .3 x)``, ``x' = x + .1 v'``: to be held where each mass alone would not stay.

    Cost of a step: ``mean((x' - goal)^2) + .01 mean(u^2)``.

    Attributes:
        coupling: ``W`` ``[D, D]``.
        goal: ``+-0.8`` ``[D]``.
    """

    coupling: Float[Array, "D D"]
    goal: Float[Array, " D"]
    sample_time: float = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    def __init__(self, size: int, key: Key[Array, ""], horizon: int = _STEPS):
        """Draws a member of the family."""
        coupling_key, goal_key = jax.random.split(key)
        self.coupling = jax.random.normal(coupling_key, (size, size)) / np.sqrt(size)
        self.goal = 0.8 * jax.random.rademacher(goal_key, (size,), self.coupling.dtype)
        self.sample_time, self.horizon = 0.1, horizon

    @property
    def state_names(self) -> tuple[str, ...]:
        names = [f"{kind} {i + 1}" for kind in ("position", "velocity") for i in range(self.goal.shape[0])]
        return tuple(names)

    @property
    def control_names(self) -> tuple[str, ...]:
        return tuple(f"force {i + 1}" for i in range(self.goal.shape[0]))

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        size = self.goal.shape[0]
        return -np.ones(size), np.ones(size)

    def dynamics(self, x: Array, u: Array, d: Array | None = None) -> Array:
        position, velocity = jnp.split(x, 2)
        velocity = 0.95 * velocity + 0.1 * (2.0 * u + jnp.sin(self.coupling @ position) - 0.3 * position)
        return jnp.concatenate([position + 0.1 * velocity, velocity])

    def stage_cost(self, x: Array, u: Array) -> Array:
        position = jnp.split(self.dynamics(x, u), 2)[0]
        return jnp.mean((position - self.goal) ** 2) + 0.01 * jnp.mean(u**2)

    def initial_state(self, key: Key[Array, ""]) -> Array:
        position = 0.5 * jax.random.normal(key, self.goal.shape)
        return jnp.concatenate([position, jnp.zeros_like(position)])


class _Task(eqx.Module):
    """The reward, which is known: only the dynamics are learned."""

    goal: Float[Array, " D"]

    def __call__(self, observation: Array, action: Array, following: Array) -> Array:
        position = jnp.split(following, 2)[0]
        return -jnp.mean((position - self.goal) ** 2) - 0.01 * jnp.mean(action**2)


class Squashed(Policy):
    """``tanh`` of a network: forces within [-1, 1]."""

    network: MLP

    def __call__(self, observation: Array, carry: tuple, key: Array) -> tuple[Array, tuple]:
        return jnp.tanh(self.network(observation)), carry


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("gradient-planning", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("DeepMind Control from pixels, a recurrent latent world model and a GPU for hours a run")
    smoke = study.budget == "smoke"
    curves: dict[str, np.ndarray] = {}
    for size in (4,) if smoke else (8, 20):
        _exact(study, size, curves)
    _learned(study, 4 if smoke else 8)
    _draw(study, curves)
    return study.report()


@eqx.filter_jit
def _play(problem: CoupledMasses, policy: Policy, starts: Float[Array, "S n"], keys: Key[Array, " S"]) -> Array:
    """Rewards of closed-loop episodes ``[S, T]``."""

    def episode(start: Array, key: Array) -> Array:
        init_key, key = jax.random.split(key)

        def step(running: tuple, key: Array) -> tuple[tuple, Array]:
            x, memory = running
            u, memory = policy(x, memory, key)
            return (problem.dynamics(x, u), memory), -problem.stage_cost(x, u)

        return jax.lax.scan(step, (start, policy.init(init_key)), jax.random.split(key, problem.horizon))[1]

    return jax.vmap(episode)(starts, keys)


def _starts(problem: CoupledMasses, seed: int, count: int) -> tuple[Array, Array]:
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.vmap(problem.initial_state)(keys), keys


def _cem(model: PlanningModel, samples: int, iterations: int, elites: int, width: Any = 0.5) -> Planner:
    rule = CrossEntropy(elites=elites, std=width)
    return SamplingPlanner(model, Spline(_HORIZON), rule, samples=samples, iterations=iterations)


class _Arena:
    """Where planners play: problem, horizon, and disjoint starts for tuning and for judging."""

    def __init__(self, study: Study, part: str, size: int):
        self.study, self.part = study, part
        smoke = study.budget == "smoke"
        key = jax.random.fold_in(jax.random.key(study.seed), size)
        self.problem = problem = CoupledMasses(size, key, horizon=3 if smoke else _STEPS)
        self.tuning = _starts(problem, 2 * study.seed + 1_000_001, 1 if smoke else _BATCH)
        self.judged = _starts(problem, 2 * study.seed + 2_000_000, 1 if smoke else 2 * _BATCH)

    def play(self, name: str, rollouts: int, policy: Policy) -> np.ndarray:
        """Rewards on the judged starts ``[S, T]``; their returns are a row of the table."""
        starts, keys = self.judged
        batches = [slice(i, i + _BATCH) for i in range(0, len(starts), _BATCH)]
        rewards = np.concatenate([_play(self.problem, policy, starts[batch], keys[batch]) for batch in batches])
        self._row(name, rollouts, rewards.sum(axis=1))
        return rewards

    def _row(self, name: str, rollouts: int, returns: np.ndarray) -> None:
        self.study.row(
            part=self.part,
            method=name,
            rollouts=rollouts,
            starts=len(returns),
            **{"return": float(returns.mean()), "lowest": float(returns.min()), "highest": float(returns.max())},
        )

    def tune(self, model: PlanningModel) -> tuple[str, Planner]:
        """The best CEM with 240 rollouts, on the tuning starts."""
        found = []
        settings = _SETTINGS[:1] if self.study.budget == "smoke" else _SETTINGS
        for samples, iterations, elites in settings:
            for width in _WIDTHS[: 1 if self.study.budget == "smoke" else 2]:
                planner = _cem(model, samples, iterations, elites, jnp.asarray(width))
                returns = np.asarray(_play(self.problem, planner.policy(), *self.tuning)).sum(axis=1)
                name = f"CEM {samples} x {iterations}, {elites} elites, std {width}"
                self._row(f"{name} (tuning)", samples * iterations, returns)
                found.append((returns.mean(), name, planner))
        _, name, planner = max(found, key=lambda each: each[0])
        return name, planner


def _exact(study: Study, size: int, curves: dict[str, np.ndarray]) -> None:
    arena = _Arena(study, f"exact model, D = {size}", size)
    model = ProblemModel(arena.problem)
    smoke = study.budget == "smoke"
    iterations = 2 if smoke else 20
    gradient = GradientPlanner(model, _HORIZON, candidates=4, iterations=iterations)
    ours = arena.play(f"Grad-MPC, J = 4, I = {iterations}", 12 * iterations, gradient.policy())
    name, tuned = arena.tune(model)
    rewards = {"Grad-MPC, 240 rollouts": ours, "CEM, 240 rollouts": arena.play(name, 240, tuned.policy())}
    reference = [] if smoke else [(48, 5, 5), (24, 10, 4)]
    matched = [rewards["CEM, 240 rollouts"]]
    for setting in reference:
        label = "CEM {} x {}, {} elites, std 0.5".format(*setting)
        if label != name:
            matched.append(arena.play(label, 240, _cem(model, *setting, jnp.asarray(0.5)).policy()))
    if not smoke:
        big = arena.play(
            "CEM 1000 x 10, 100 elites, std 0.5", 10_000, _cem(model, 1000, 10, 100, jnp.asarray(0.5)).policy()
        )
        shooting = SamplingPlanner(model, Spline(_HORIZON), RandomShooting(), samples=240, iterations=1, best=True)
        rewards["CEM, 10,000 rollouts"] = big
        rewards["random shooting, 240 rollouts"] = arena.play("random shooting", 240, shooting.policy())
        _judge(study, f"Exact model, D = {size}: better than CEM with 40 times the rollouts.", ours, [big], 0.03)
    text = f"Exact model, D = {size}: better than tuned CEM with as many rollouts."
    _judge(study, text, ours, matched, 0.10)
    if not curves:
        curves.update(rewards)


def _judge(study: Study, text: str, ours: np.ndarray, others: list[np.ndarray], least: float) -> None:
    """Costs are positive, so that a gain is a share of the other's cost."""
    mine, best = -ours.sum(axis=1).mean(), -max(other.sum(axis=1).mean() for other in others)
    study.claim(
        text,
        expected=f"cost of an episode at least {least:.0%} lower",
        measured=f"{mine:.2f} against {best:.2f}, {1.0 - mine / best:.1%} lower",
        holds=mine <= (1.0 - least) * best,
    )


def _learned(study: Study, size: int) -> None:
    smoke = study.budget == "smoke"
    arena = _Arena(study, f"learned model, D = {size}", size)
    model, states = _learn_model(arena.problem, study.seed, episodes=4 if smoke else 80, passes=1 if smoke else 40)
    policies = {}
    for steps in (2,) if smoke else (200, 1000):
        policies[steps] = _train_policy(model, states, steps, jax.random.key(study.seed + 5))
    found: dict[str, np.ndarray] = {}
    iterations = 2 if smoke else 20
    gradient = GradientPlanner(model, _HORIZON, candidates=4, iterations=iterations)
    found["grad"] = arena.play(f"Grad-MPC, J = 4, I = {iterations}", 12 * iterations, gradient.policy())
    for steps, policy in policies.items():
        alone = arena.play(f"policy, {steps} steps", 0, policy)
        seeds = PolicyProposals(model, policy, _HORIZON, 4, std=0.3, observe=_observed)
        planner = GradientPlanner(model, _HORIZON, candidates=0, iterations=iterations // 2, proposals=seeds)
        label = f"Policy+Grad, {steps} steps, J = 4, I = {iterations // 2}"
        both = arena.play(label, 6 * iterations + 4, planner.policy())
        _judge(study, f"Learned model: Policy+Grad is better than its policy of {steps} steps.", both, [alone], 0.30)
        text = f"Learned model: Policy+Grad of {steps} steps is no worse than Grad-MPC."
        mine, other = both.sum(axis=1).mean(), found["grad"].sum(axis=1).mean()
        study.claim(
            text,
            expected="cost of an episode at most 2% higher",
            measured=f"{-mine:.2f} against {-other:.2f}",
            holds=mine >= 1.02 * other,
        )
    name, tuned = arena.tune(model)
    sampled = arena.play(name, 240, tuned.policy())
    _judge(
        study,
        "Learned model: Grad-MPC is no worse than tuned CEM with as many rollouts.",
        found["grad"],
        [sampled],
        0.0,
    )


def _observed(state: Imagined) -> Array:
    return state.observation


def _learn_model(
    problem: CoupledMasses, seed: int, episodes: int, passes: int
) -> tuple[TransitionPlanningModel, Float[Array, "rows n"]]:
    """The model that random episodes teach, and their states; a pass is a hundred steps of Adam."""
    start_key, force_key, init_key, fit_key = jax.random.split(jax.random.key(seed + 3), 4)
    starts = jax.vmap(problem.initial_state)(jax.random.split(start_key, episodes))
    size = problem.control_size
    held = jax.random.uniform(force_key, (_STEPS // 5, episodes, size), minval=-1.0, maxval=1.0)
    states, controls = rollout(problem, jnp.repeat(held, 5, axis=0), starts)
    rewards = -jax.vmap(jax.vmap(problem.stage_cost))(states[:-1], controls)
    never = jnp.zeros(rewards.shape, bool)
    rows = Transition(states[:-1], controls, rewards, states[1:], never, never)
    flat: Any = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), rows)
    learner = EnsembleLearner(hidden=(128, 128), epochs=passes, batches=100, patience=passes, batch_size=256)
    fitted, _ = eqx.filter_jit(learner.fit)(learner.init(2 * size, size, init_key), Replay.of(flat), fit_key)
    low, high = problem.control_bounds
    return TransitionPlanningModel(fitted, 2 * size, low, high, reward=_Task(problem.goal)), flat.observation


def _train_policy(model: TransitionPlanningModel, states: Float[Array, "rows n"], steps: int, key: Array) -> Squashed:
    """Adam on the imagined cost of a horizon from stored states, through the model."""
    init_key, key = jax.random.split(key)
    policy = Squashed(MLP(model.observation_size, model.control_size, (64, 64), output_gain=0.01, key=init_key))
    optimizer = optax.adam(1e-3)

    def imagined(policy: Squashed, start: Array) -> Array:
        def step(running: Imagined, _: None) -> tuple[Imagined, Array]:
            return model.step(running, jnp.tanh(policy.network(running.observation)))

        return jnp.mean(jax.lax.scan(step, model.start(start), None, length=_HORIZON)[1])

    def descend(running: tuple, key: Array) -> tuple[tuple, None]:
        policy, memory = running
        batch = states[jax.random.randint(key, (64,), 0, states.shape[0])]
        gradient = jax.grad(lambda p: jnp.mean(jax.vmap(partial(imagined, p))(batch)))(policy)
        updates, memory = optimizer.update(gradient, memory)
        return (eqx.apply_updates(policy, updates), memory), None

    start: Any = (policy, optimizer.init(eqx.filter(policy, eqx.is_array)))
    (policy, _), _ = jax.jit(lambda start, keys: jax.lax.scan(descend, start, keys))(
        start, jax.random.split(key, steps)
    )
    return policy


def _draw(study: Study, curves: dict[str, np.ndarray]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    colour = colours(curves)
    for name, rewards in curves.items():
        costs = -rewards
        seconds = 0.1 * np.arange(costs.shape[1])
        axes.plot(seconds, costs.mean(axis=0), color=colour[name], label=name)
        axes.fill_between(seconds, costs.min(axis=0), costs.max(axis=0), color=colour[name], alpha=0.12, linewidth=0)
    axes.set(xlabel="time (s)", ylabel="cost of a step", yscale="log")
    axes.grid(color=LIGHT["grid"], linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, study.figure("costs"))
