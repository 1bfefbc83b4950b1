"""Does a critic of post-decision states help, and do PDPPO's two ways of using one? (arXiv:2504.05150)

On stochastic lot-sizing, small enough that the optimum is known. First the values: how much of the returns of a fixed
policy is explained before and after the decision. Then learning: PPO; half-step advantages; and three arms that learn
from Monte Carlo returns as the authors' code does, with one critic (their PPO), with twin critics, and with the paper's
pair. The paper reports higher returns than PPO's; whether they appear is reported, and what is judged is the values and
that neither way of using them breaks learning. Last a harder instance, four items on two machines with twice the spread
of demand, where a gain would be expected; there everything is reported and nothing judged.

All arms share one grid of learning rates. The rate of each is chosen on three seeds and a third of the steps; what is
judged are ten other seeds. On the harder instance each arm is shown at the better of the two higher rates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from steersman import mdp
from steersman.envs import LotSizing, Problem, lumpy_lot_sizing
from steersman.networks import MLP
from steersman.objectives import explained_variance, squared_error
from steersman.rl.critics import Critic, Examples, StateCritic
from steersman.rl.on_policy.pdppo import PDPPO
from steersman.rl.post_decision_critics import DualCritics, HalfStepCritics
from steersman.rl.surrogates import Clip
from steersman.studies.study import Report, Study
from steersman.training import Trained, train
from steersman.training.comparison import learning_curves
from steersman.training.evaluation import evaluate_members
from steersman.training.figures import Estimate, interval_plot, save_figure
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.statistics import curve_interval, stratified_bootstrap_interval

_GAMMA = 0.97
#: Eight environments, one episode of 50 steps each; all settings but the learning rate and the critic are shared.
_SETTINGS: dict[str, Any] = {
    "num_envs": 8,
    "num_steps": 50,
    "epochs": 20,
    "minibatches": 1,
    "gamma": _GAMMA,
    "lam": 0.95,
    "surrogate": Clip(0.2),
    "entropy_coefficient": 0.01,
    "max_gradient_norm": 1.0,
    "hidden": (64, 64),
    "critic_rate": 3.0,
}
_RATES = [3e-4, 1e-3, 3e-3]


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("pdppo", budget, seed, folder)
    if study.budget == "full":
        return _full(study)
    optimum = _values(study)
    _learning(study, optimum)
    return study.report()


# ---- values of a fixed policy


class Episodes(NamedTuple):
    """Steps of whole episodes under a policy that is half random, half optimal; leaves ``[T, E, ...]``."""

    vector: Float[Array, "T E D"]
    post_vector: Float[Array, "T E D"]
    decision_reward: Float[Array, "T E"]
    earned: Float[Array, "T E"]

    def rows(self) -> Episodes:
        """Steps 0 to 29 as rows, so that at least 20 more count in each return."""
        return Episodes(*(leaf[:30].reshape(-1, *leaf.shape[2:]) for leaf in self))


@eqx.filter_jit
def _mixed_episodes(
    problem: Problem, tables: mdp.PostDecisionTables, greedy: Array, key: Key[Array, ""], count: int
) -> Episodes:
    reset_key, key = jax.random.split(key)
    start = problem.reset(jax.random.split(reset_key, count))

    def step(running: tuple, keys: Key[Array, "3"]) -> tuple[tuple, tuple]:
        observation, state = running
        optimal = greedy[tables.index(observation)]
        random = jax.random.randint(keys[0], optimal.shape, 0, 3)
        action = jnp.where(jax.random.bernoulli(keys[1], 0.5, optimal.shape), random, optimal)
        following, state, reward, _, _, info = problem.step(jax.random.split(keys[2], count), state, action)
        return (following, state), (observation, info["post_decision"], info["decision_reward"], reward)

    _, (vector, post_vector, decision_reward, reward) = jax.lax.scan(step, start, jax.random.split(key, (50, 3)))

    def discount(after: Array, reward: Array) -> tuple[Array, Array]:
        earned = reward + _GAMMA * after
        return earned, earned

    _, earned = jax.lax.scan(discount, jnp.zeros(count), reward, reverse=True)
    return Episodes(vector, post_vector, decision_reward, earned)


@eqx.filter_jit
def _fitted(fit: Episodes, key: Key[Array, ""], steps: int, hidden: tuple[int, ...]) -> tuple[Any, Array, Array]:
    """The half-step critic pair, regressed on the returns of a fixed policy: networks, and the returns' mean and scale.

    The targets are those of the slot with both traces at one: the return, and the return less the decision's reward.
    """
    critic, mean, scale = HalfStepCritics(), jnp.mean(fit.earned), jnp.std(fit.earned)
    size = fit.vector.shape[-1]
    network_key, key = jax.random.split(key)
    networks = critic.init(size, lambda size, key: MLP(size, 1, hidden, key=key), network_key)
    target = (fit.earned - mean) / scale
    post_target = (fit.earned - fit.decision_reward - mean) / scale
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def descend(running: tuple, key: Key[Array, ""]) -> tuple[tuple, None]:
        networks, state = running
        some = jax.random.randint(key, (1_000,), 0, len(target))
        examples = Examples(
            (fit.vector[some], (fit.post_vector[some], fit.decision_reward[some])),
            target[some],
            (target[some], post_target[some], post_target[some]),
        )

        def loss(networks: Any) -> Array:
            return jnp.mean(critic.error(networks, examples, lambda value, _, target: squared_error(value, target)))

        updates, state = optimizer.update(jax.grad(loss)(networks), state)
        return (jax.tree.map(jnp.add, networks, updates), state), None

    running = (networks, optimizer.init(cast(Any, networks)))
    (networks, _), _ = jax.lax.scan(descend, running, jax.random.split(key, steps))
    return networks, mean, scale


def _values(study: Study) -> float:
    """Explained variance before and after the decision; returns the optimum's exact undiscounted return."""
    smoke = study.budget == "smoke"
    environment = LotSizing()
    problem = Problem(environment)
    started = np.asarray(environment.states().setup[:, 0] > 0, float)
    tables = mdp.post_decision_tables(environment, discount=_GAMMA, start=started / started.sum())
    solution = mdp.value_iteration(tables.mdp, tolerance=1e-4)
    greedy = jnp.argmax(solution.q_value, axis=-1)
    keys = jax.random.split(jax.random.key(study.seed), 3)
    count = 100 if smoke else 4_000
    fit, fresh = (_mixed_episodes(problem, tables, greedy, key, count).rows() for key in keys[:2])

    # Tables: the mean return after each state, and after each post-decision state.
    def means(index: Array, number: int, target: Array) -> Array:
        counts = jax.ops.segment_sum(jnp.ones_like(target), index, number)
        return jax.ops.segment_sum(target, index, number) / jnp.maximum(counts, 1.0)

    post_count = tables.post_observation.shape[0]
    state_table = means(tables.index(fit.vector), tables.mdp.num_states, fit.earned)
    post_table = means(tables.post_index(fit.post_vector), post_count, fit.earned - fit.decision_reward)
    by_table = (
        float(explained_variance(state_table[tables.index(fresh.vector)], fresh.earned)),
        float(
            explained_variance(fresh.decision_reward + post_table[tables.post_index(fresh.post_vector)], fresh.earned)
        ),
    )
    _value_row(study, "tables", *by_table)

    critic, found = HalfStepCritics(), []
    for key in jax.random.split(keys[2], 1 if smoke else 3):
        networks, mean, scale = _fitted(fit, key, 20 if smoke else 3_000, (8,) if smoke else (64, 64))
        value = mean + scale * critic.value(networks, fresh.vector)
        post_value = mean + scale * critic.post_value(networks, fresh.post_vector)
        found.append(
            (
                float(explained_variance(value, fresh.earned)),
                float(explained_variance(fresh.decision_reward + post_value, fresh.earned)),
            )
        )
    before, after = np.mean(found, axis=0)
    _value_row(study, "networks", before, after)
    study.claim(
        "After the decision, a value explains more of the returns than before it.",
        expected="explained variance of r_decision + V^x at least 0.01 above that of V",
        measured=f"{after:.3f} against {before:.3f} (fitted tables: {by_table[1]:.3f} against {by_table[0]:.3f})",
        holds=bool(after - before >= 0.01),
    )
    transition = mdp.policy_transition(tables.mdp, solution.policy)
    reward = jnp.sum(solution.policy * tables.mdp.reward, axis=-1)
    place, total = tables.mdp.start, 0.0
    for _ in range(50):
        total, place = total + float(place @ reward), place @ transition
    study.note(f"The optimal policy's mean return, exact: {total:.1f}; uniformly random choices reach -121.4.")
    return total


def _value_row(study: Study, arm: str, before: float, after: float) -> None:
    _row(study, "values of a fixed policy", arm, value_explains=before, post_value_explains=after)


def _row(study: Study, part: str, arm: str, **cells: Any) -> None:
    names = ("mean_return", "median_return", "worst_return", "area", "value_explains", "post_value_explains")
    study.row(part=part, arm=arm, **{name: float(cells.get(name, float("nan"))) for name in names})


# ---- learning


class Arm(NamedTuple):
    """What a way of using critics reached at its learning rate.

    Attributes:
        rate: the learning rate.
        returns: mean return of each seed's greedy policy.
        samples: environment steps of the learning curve.
        curves: training returns of each seed along it.
    """

    rate: float
    returns: np.ndarray
    samples: np.ndarray
    curves: np.ndarray


def _critics(smoke: bool) -> dict[str, Critic]:
    arms = {
        "PPO": StateCritic(),
        "PDPPO, half-step": HalfStepCritics(0.9),
        "PPO, Monte Carlo": DualCritics(("state",)),
        "PPO, twin critics": DualCritics(("state", "state")),
        "PDPPO, paper": DualCritics(),
    }
    return {name: arms[name] for name in ("PPO", "PDPPO, half-step")} if smoke else arms


def _algorithm(critic: Critic, **changes: Any) -> PDPPO:
    # The dual critics' advantages come from returns that are standardized already.
    shared = {**_SETTINGS, "normalize_advantages": not isinstance(critic, DualCritics)}
    return PDPPO(critic=critic, **{**shared, **changes})


def _judge(trained: Trained, problem: Problem, seed: int, episodes: int) -> np.ndarray:
    """Mean returns of every member's greedy policy on episodes that no training saw."""
    return evaluate_members(trained.policies(), problem, episodes=episodes, seed=seed + 10_000)


def _arm(trained: Trained, problem: Problem, rate: float, seed: int, episodes: int, members: slice) -> Arm:
    samples, curves = learning_curves(trained, points=30)
    return Arm(rate, _judge(trained, problem, seed, episodes)[members], samples, curves[members])


def _show(study: Study, part: str, name: str, arm: Arm) -> None:
    _row(
        study,
        part,
        f"{name}, rate {arm.rate:g}",
        mean_return=float(arm.returns.mean()),
        median_return=float(np.median(arm.returns)),
        worst_return=float(arm.returns.min()),
        area=float(np.nanmean(arm.curves)),
    )


def _learning(study: Study, optimum: float) -> None:
    smoke = study.budget == "smoke"
    problem = Problem(LotSizing())
    steps, episodes = (400, 20) if smoke else (60_000, 2_000)
    changes = {"hidden": (8,), "epochs": 1} if smoke else {}
    seeds = [study.seed + i for i in range(2 if smoke else 10)]
    others = [study.seed + 1_000 + i for i in range(3)]
    arms: dict[str, Arm] = {}
    for name, critic in _critics(smoke).items():
        algorithm = _algorithm(critic, **changes)
        rate = _RATES[-1]
        if not smoke:
            tried = train(algorithm, problem, steps=steps // 3, seeds=others, sweep={"learning_rate": _RATES})
            reached = _judge(tried, problem, study.seed + 1, 500).reshape(len(_RATES), -1).mean(axis=1)
            rate = _RATES[int(np.argmax(reached))]
        sweep: dict[str, list[float]] = {"learning_rate": [rate]}
        if isinstance(critic, HalfStepCritics):
            # In the sweep, so that other traces run in the same compiled program.
            sweep["critic.lam_x"] = [0.9]
        trained = train(algorithm, problem, steps=steps, seeds=seeds, sweep=sweep)
        arms[name] = _arm(trained, problem, rate, study.seed, episodes, slice(None))
        _show(study, "lot-sizing", name, arms[name])
        if isinstance(critic, HalfStepCritics) and not smoke:
            sweep["critic.lam_x"] = [0.5, 1.0]
            trained = train(algorithm, problem, steps=steps, seeds=seeds[:5], sweep=sweep)
            for i, lam_x in enumerate(sweep["critic.lam_x"]):
                members = slice(5 * i, 5 * (i + 1))
                other = _arm(trained, problem, rate, study.seed, episodes, members)
                _show(study, "lot-sizing", f"{name}, lam_x {lam_x:g}, five seeds", other)
    ppo, half = arms["PPO"].returns, arms["PDPPO, half-step"].returns
    study.claim(
        "Half-step advantages learn as well as PPO.",
        expected="mean greedy return at most 2.0 below PPO's",
        measured=f"{half.mean():.1f} against {ppo.mean():.1f}",
        holds=half.mean() >= ppo.mean() - 2.0,
    )
    study.claim(
        "Half-step advantages come near the optimum.",
        expected=f"mean greedy return within 8 of {optimum:.1f}",
        measured=f"{half.mean():.1f}",
        holds=half.mean() >= optimum - 8.0,
    )
    save_figure(_curves(arms), study.figure("learning-curves"))
    if smoke:
        return
    paper = arms["PDPPO, paper"].returns
    study.claim(
        "The paper's pair of critics learns, in the median seed.",
        expected="median greedy return at least -65",
        measured=f"{np.median(paper):.1f} (mean {paper.mean():.1f}, worst seed {paper.min():.1f})",
        holds=float(np.median(paper)) >= -65.0,
    )
    _compare(study, "lot-sizing", arms)
    estimates = {name: _estimate(arm.returns) for name, arm in arms.items()}
    save_figure(interval_plot(estimates, x_label="greedy return after 60,000 steps"), study.figure("final-returns"))
    hard, found = Problem(lumpy_lot_sizing()), {}
    for name, critic in _critics(smoke).items():
        if name != "PPO, twin critics":
            best = _best_rate(_algorithm(critic), hard, _RATES[1:], seeds[:4], steps, study.seed)
            _show(study, "harder instance", name, best)
            found[name] = best
    _compare(study, "harder instance", found)
    save_figure(_curves(found), study.figure("harder-instance"))


def _best_rate(algorithm: PDPPO, problem: Problem, rates: list[float], seeds: list[int], steps: int, seed: int) -> Arm:
    """All rates with all seeds; the arm at the rate with the highest mean return."""
    trained = train(algorithm, problem, steps=steps, seeds=seeds, sweep={"learning_rate": rates})
    reached = _judge(trained, problem, seed, 500).reshape(len(rates), -1)
    best = int(np.argmax(reached.mean(axis=1)))
    samples, curves = learning_curves(trained, points=30)
    return Arm(rates[best], reached[best], samples, curves[best * len(seeds) : (best + 1) * len(seeds)])


def _curves(arms: dict[str, Arm]) -> Any:
    return draw_curves(
        {name: (arm.samples, curve_interval(arm.curves)) for name, arm in arms.items()},
        y_label="training return",
        label="legend",
    )


def _estimate(returns: np.ndarray) -> Estimate:
    low, high = stratified_bootstrap_interval(returns, np.mean)
    return Estimate(float(returns.mean()), low, high, tuple(returns.tolist()))


def _compare(study: Study, part: str, arms: dict[str, Arm]) -> None:
    """Notes how arms do against each other, seed by seed."""
    pairs = (
        ("PDPPO, half-step", "PPO"),
        ("PDPPO, paper", "PPO"),
        ("PDPPO, paper", "PPO, Monte Carlo"),
        ("PDPPO, paper", "PPO, twin critics"),
    )
    for first, second in pairs:
        if first not in arms or second not in arms:
            continue
        difference = arms[first].returns - arms[second].returns
        low, high = stratified_bootstrap_interval(difference, np.mean)
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        study.note(
            f"{part.capitalize()}: {first} minus {second}, paired over {len(difference)} seeds: "
            f"{difference.mean():+.1f} (95 % interval {low:+.1f} to {high:+.1f}): {verdict}."
        )


def _full(study: Study) -> Report:
    """The authors' settings on instances of growing size, twenty seeds each."""
    instances = {
        "2 items, 1 machine": LotSizing(num_steps=100),
        "4 items, 2 machines, lumpy": lumpy_lot_sizing(num_steps=100),
        "15 items, 5 machines, lumpy": lumpy_lot_sizing(15, 5, num_steps=100),
        "25 items, 10 machines, lumpy": lumpy_lot_sizing(25, 10, num_steps=100),
    }
    seeds = [study.seed + i for i in range(20)]
    gains = []
    for part, environment in instances.items():
        problem, arms = Problem(environment), {}
        for name, critic in _critics(smoke=False).items():
            algorithm = PDPPO.paper(critic=critic, normalize_advantages=not isinstance(critic, DualCritics))
            arms[name] = _best_rate(algorithm, problem, _RATES, seeds, 150_000, study.seed)
            _show(study, part, name, arms[name])
        _compare(study, part, arms)
        save_figure(_curves(arms), study.figure(part.replace(", ", "-").replace(" ", "-")))
        gains.append(arms["PDPPO, paper"].returns - arms["PPO, Monte Carlo"].returns)
    low, high = stratified_bootstrap_interval(np.stack(gains, axis=1) / np.std(gains, axis=1), np.mean)
    study.claim(
        "Across instances the paper's pair of critics reaches higher returns than the authors' PPO.",
        expected="paired difference, in deviations over seeds, above zero with 95 % confidence",
        measured=f"{low:+.2f} to {high:+.2f}",
        holds=low > 0,
    )
    return study.report()
