"""Does Polyak's step size spare the tuning of a learning rate, whatever the scale of the reward? (arXiv:2404.07525)

A pole is balanced by a logistic policy of five weights, from 2,400 episodes in batches of 20 for each copy: the twin,
the known optimum with a tight and with a loose cap, and Adam and plain gradient ascent over grids of learning rates.
Policies are judged by 50 fresh episodes that they play by sampling. Then rewards are multiplied by 1000 and by 0.001,
with the entropy's weight scaled along; the twin then has no cap, and for comparison its usual one, whose unit changes
with the reward's. Last, softmax tables of random models climb with exact gradients to exactly known optima.

A tuned Adam is as good or better; what is judged is what happens without tuning.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.envs import Problem, as_problem
from steersman.envs.dynamics import DiscreteCartPole
from steersman.mdp import MDP, expected_return, policy_gradient, random_mdp, softmax_policy_gradient, value_iteration
from steersman.policies import ActorNetwork, Architecture, Head, NetworkPolicy, Preprocess, Standardize
from steersman.rl.on_policy.policy_gradient import PolicyGradient
from steersman.rl.on_policy.polyak_pg import PolyakPG
from steersman.studies.study import Report, Study
from steersman.training import Trained, apply_settings, evaluate_members, train
from steersman.training.algorithm import InteractiveAlgorithm
from steersman.training.episodes import Episodes
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.figures import save_figure
from steersman.training.optimizers import SGD, Adam
from steersman.training.statistics import Band, curve_interval
from steersman.training.step_sizes import polyak_sps

_HORIZON, _GAMMA, _EPISODES = 200, 0.99, 20
_OPTIMUM = (1 - _GAMMA**_HORIZON) / (1 - _GAMMA)
_TAU = 0.01
_ADAM = [1e-3, 1e-2, 1e-1, 1.0]
_CHECKPOINTS = [400, 800, 1600, 2400]
_SGD = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("polyak-pg", budget, seed, folder)
    if study.budget == "full":
        return _classic_control(study)
    smoke = study.budget == "smoke"
    seeds = [seed + i for i in range(2 if smoke else 10)]
    episodes = _CHECKPOINTS[:1] if smoke else _CHECKPOINTS
    # Each arm is a program of its own to compile; the twin comes in the second part too.
    balance = _balance(seeds, episodes, ["SGD"] if smoke else list(arms()))
    scales = _scales(seeds, episodes[-1], double=not smoke)
    # All policies play in one program.
    returns = fresh_returns(balance.policies | scales)
    _judge_balance(study, balance, returns, episodes)
    _judge_scales(study, scales, returns)
    _exact(study, instances=2 if smoke else 20, steps=20 if smoke else 400)
    return study.report()


class LogisticNetwork(ActorNetwork):
    """Logits zero and ``weight . (features, 1)`` of two actions."""

    weight: Float[Array, " D_plus_1"]

    def __call__(self, features: Float[Array, "... D"], carry: PyTree) -> tuple[Array, PyTree]:
        right = features @ self.weight[:-1] + self.weight[-1]
        return jnp.stack([jnp.zeros_like(right), right], axis=-1), carry


class Logistic(Architecture):
    """A logistic policy of scaled observations, with weights drawn from a normal distribution.

    Attributes:
        scale: what each component of the observation is multiplied by.
        deviation: standard deviation of the weights.
    """

    scale: tuple[float, ...] = eqx.field(static=True, default=(1 / 2.4, 1 / 2, 5.0, 1 / 2))
    deviation: float = eqx.field(static=True, default=0.1)

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        del initial_log_std
        scale = jnp.asarray(self.scale)
        preprocess = Preprocess(preprocess.layout, Standardize(jnp.zeros_like(scale), scale))
        weight = self.deviation * jax.random.normal(key, (preprocess.size + 1,))
        return NetworkPolicy(preprocess=preprocess, network=LogisticNetwork(weight), free=jnp.zeros(0), head=head)


class ScaledCartPole(DiscreteCartPole):
    """The balancing task with its reward multiplied by a constant.

    Attributes:
        factor: the constant. It is data, so that one compiled program serves all scales.
    """

    factor: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=1.0)

    def step_env(self, key: Key[Array, ""], state: Any, action: Any, params: Any) -> tuple:
        observation, state, reward, terminated, info = super().step_env(key, state, action, params)
        return observation, state, self.factor * reward, terminated, info


class Arm(NamedTuple):
    """A method with the settings that it is tried with.

    Attributes:
        name: what it is called.
        algorithm: what is trained.
        setting: the hyperparameter that varies.
        values: its values.
    """

    name: str
    algorithm: InteractiveAlgorithm
    setting: str
    values: Sequence[float]

    @property
    def copies(self) -> int:
        """Policies that each member trains."""
        return getattr(self.algorithm, "copies", 1)

    @property
    def labels(self) -> list[str]:
        """A name for each value."""
        return [f"{self.name}, {self.setting.replace('_', ' ')} {value:g}" for value in self.values]

    def learn(self, problem: Problem, seeds: Sequence[int], episodes: int) -> Trained:
        """All values with all seeds, so many episodes each."""
        batches = episodes // (self.copies * _EPISODES)
        return train(self.algorithm, problem, iterations=batches, seeds=seeds, sweep={self.setting: list(self.values)})

    def policies(self, trained: Trained) -> list[PyTree]:
        """The learned policies of each value, with a leading axis of seeds."""
        return [self.part(trained.policies(), i) for i in range(len(self.values))]

    def part(self, tree: PyTree, i: int) -> PyTree:
        """What belongs to the i-th value, of a tree with a leading axis of members."""

        def cut(leaf: Any) -> Any:
            count = leaf.shape[0] // len(self.values)
            return leaf[i * count : (i + 1) * count]

        return jax.tree.map(cut, tree)


def arms(factor: float = 1.0) -> dict[str, Arm]:
    """The methods, for rewards multiplied by `factor`."""
    shared: dict[str, Any] = {
        "num_episodes": _EPISODES,
        "horizon": _HORIZON,
        "gamma": _GAMMA,
        "architecture": Logistic(),
        "entropy_coefficient": _TAU * factor,
    }
    tried = [
        Arm("twin", PolyakPG(**shared), "c", [1.0, 2.0]),
        Arm("known optimum", PolyakPG(**shared, cap=1.0, target=_OPTIMUM * factor), "cap", [1.0, 100.0]),
        Arm("Adam", PolicyGradient(**shared, optimizer=Adam()), "learning_rate", _ADAM),
        Arm("SGD", PolicyGradient(**shared, optimizer=SGD()), "learning_rate", _SGD),
    ]
    return {arm.name: arm for arm in tried}


@eqx.filter_jit
def _play(policies: PyTree, key: Key[Array, ""], collector: Episodes) -> Float[Array, " M"]:
    problem = Problem(ScaledCartPole())
    # The same episodes for all: equal policies have equal returns.
    experience, _ = eqx.filter_vmap(lambda policy: collector.play(problem, policy, key))(policies)
    return jnp.mean(jnp.sum(experience.reward, axis=1), axis=1)


def fresh_returns(policies: Mapping[str, PyTree], episodes: int = 50) -> dict[str, np.ndarray]:
    """Mean undiscounted return of every policy over the same fresh episodes, its actions sampled.

    Args:
        policies: for each name, policies with a leading axis of seeds.
        episodes: how many each of them plays.
    """

    def single(leaf: Array) -> Array:
        return jnp.asarray(np.asarray(leaf), jnp.float32)

    together = jax.tree.map(lambda *leaves: jnp.concatenate([single(leaf) for leaf in leaves]), *policies.values())
    counts = [jax.tree.leaves(each)[0].shape[0] for each in policies.values()]
    returns = _play(together, jax.random.key(2_000_003), Episodes(episodes, _HORIZON))
    return dict(zip(policies, np.split(np.asarray(returns), np.cumsum(counts)[:-1]), strict=True))


def _row(study: Study, part: str, arm: str, **numbers: Any) -> None:
    """A row with every column of the table, NaN where a number has no meaning."""
    columns = [
        *(f"after_{count}" for count in _CHECKPOINTS[:-1]),
        "final",
        "worst_seed",
        "largest_step",
        "steps_to_optimum",
    ]
    study.row(part=part, arm=arm, **{column: float(numbers.get(column, float("nan"))) for column in columns})


class Balance(NamedTuple):
    """What was learned on the balancing task.

    Attributes:
        policies: policies of each arm and number of episodes, by ``"label @ count"``.
        curves: returns of training episodes.
        largest: largest step that was taken, NaN where steps have no size.
    """

    policies: dict[str, PyTree]
    curves: dict[str, tuple[np.ndarray, Band]]
    largest: dict[str, float]


def _balance(seeds: list[int], episodes: Sequence[int], names: Sequence[str]) -> Balance:
    problem, found = Problem(ScaledCartPole()), Balance({}, {}, {})
    for arm in (arms()[name] for name in names):
        # The seeds fix everything, so a shorter run is the beginning of a longer one.
        for count in episodes:
            trained = arm.learn(problem, seeds, count)
            found.policies.update({f"{k} @ {count}": p for k, p in zip(arm.labels, arm.policies(trained), strict=True)})
            if count < episodes[-1]:
                continue
            spent = np.arange(1, len(trained.samples) + 1) * arm.copies * _EPISODES
            progress = trained.metrics.get("best_return", trained.returns)
            steps = trained.metrics.get("step_size", np.full_like(progress, np.nan))
            for i, label in enumerate(arm.labels):
                found.curves[label] = (spent, curve_interval(arm.part(progress.T, i)))
                found.largest[label] = float(arm.part(steps.T, i).max())
    return found


def _judge_balance(study: Study, balance: Balance, returns: Mapping[str, np.ndarray], episodes: Sequence[int]) -> None:
    final = {label: np.full(1, np.nan) for arm in arms().values() for label in arm.labels}
    for label in balance.curves:
        final[label] = returns[f"{label} @ {episodes[-1]}"]
        reached = {f"after_{count}": returns[f"{label} @ {count}"].mean() for count in episodes[:-1]}
        numbers = {"final": final[label].mean(), "worst_seed": final[label].min()}
        _row(study, "balance", label, **reached, **numbers, largest_step=balance.largest[label])
    twin, cautious = final["twin, c 1"].mean(), final["twin, c 2"].mean()
    adam = {rate: float(final[f"Adam, learning rate {rate:g}"].mean()) for rate in _ADAM}
    grid = float(np.mean(list(adam.values())))
    tight, loose = final["known optimum, cap 1"], final["known optimum, cap 100"]
    study.claim(
        "The twin balances the pole without any tuning.",
        expected="mean return with c = 1 at least 170",
        measured=f"{twin:.0f} (c = 2: {cautious:.0f})",
        holds=bool(twin >= 170),
    )
    study.claim(
        "The untuned twin beats an Adam whose rate is drawn from a grid of four decades.",
        expected="at least 25 above the mean over the grid",
        measured=f"{twin:.0f} against {grid:.0f} (" + ", ".join(f"{r:.0f} at {k:g}" for k, r in adam.items()) + ")",
        holds=bool(twin - grid >= 25),
    )
    study.claim(
        "With the optimum known and a cap of 1 the pole is balanced.",
        expected="mean return at least 185",
        measured=f"{tight.mean():.0f}",
        holds=bool(tight.mean() >= 185),
    )
    explosion = balance.largest.get("known optimum, cap 100", float("nan"))
    study.claim(
        "With a cap of 100 steps explode, and the worst seed pays for it.",
        expected="a step above 10, and a worst seed below that of cap 1",
        measured=f"largest step {explosion:.3g}; worst seed {loose.min():.0f} against {tight.min():.0f}",
        holds=bool(explosion > 10 and loose.min() < tight.min()),
    )
    shown = {k: curve for k, curve in balance.curves.items() if not k.startswith("SGD") and k != "twin, c 2"}
    figure = draw_curves(
        shown or balance.curves,
        x_label="episodes, of all copies together",
        y_label="return of training episodes",
        label="legend",
    )
    save_figure(figure, study.figure("balance"))


_FACTORS = (1.0, 1000.0, 0.001)


def _scales(seeds: list[int], episodes: int, double: bool) -> dict[str, PyTree]:
    """Policies learned from rewards on three scales, by ``"label x factor"``."""
    found: dict[str, PyTree] = {}
    for factor in _FACTORS:
        # In double precision, so that rounding does not let episodes part by a different draw of an action.
        with jax.enable_x64(True) if double else contextlib.nullcontext():
            twin = arms(factor)["twin"]._replace(setting="cap", values=[math.inf, 100.0])
            twin = twin._replace(algorithm=apply_settings(twin.algorithm, {"cap": math.inf}))
            policies = twin.policies(twin.learn(Problem(ScaledCartPole(factor=factor)), seeds, episodes))
            found |= {f"{label} x {factor:g}": each for label, each in zip(twin.labels, policies, strict=True)}
        sgd = arms(factor)["SGD"]
        policies = sgd.policies(sgd.learn(Problem(ScaledCartPole(factor=factor)), seeds, episodes))
        found |= {f"{label} x {factor:g}": each for label, each in zip(sgd.labels, policies, strict=True)}
    return found


def _judge_scales(study: Study, policies: Mapping[str, PyTree], returns: Mapping[str, np.ndarray]) -> None:
    weights = [np.asarray(policies[f"twin, cap inf x {factor:g}"].network.weight) for factor in _FACTORS]
    spread = max(float(np.max(np.abs(w - weights[0])) / np.max(np.abs(weights[0]))) for w in weights)
    best: dict[float, float] = {}
    same = np.repeat(returns["twin, cap inf x 1"][:, None], len(_SGD), axis=1)
    curves = {"twin without a cap, every scale": (np.log10(_SGD), curve_interval(same))}
    labels = arms()["SGD"].labels
    for factor in _FACTORS:
        part = f"rewards x {factor:g}"
        for label in ["twin, cap inf", "twin, cap 100", *labels]:
            of_seeds = returns[f"{label} x {factor:g}"]
            _row(study, part, label, final=of_seeds.mean(), worst_seed=of_seeds.min())
        grid = np.stack([returns[f"{label} x {factor:g}"] for label in labels])
        best[factor] = _SGD[int(np.argmax(grid.mean(axis=1)))]
        curves[f"SGD, {part}"] = (np.log10(_SGD), curve_interval(grid.T))
    shift = float(np.log10(max(best.values()) / min(best.values())))
    study.claim(
        "Rewards times 1000 or 0.001 change nothing about a twin without a cap.",
        expected="the same weights from the same keys, to 1e-5",
        measured=f"largest relative difference {spread:.1g}",
        holds=bool(spread <= 1e-5),
    )
    study.claim(
        "The best rate of plain gradient ascent shifts with the scale of the reward.",
        expected="by two decades or more within the grid",
        measured=f"{shift:.0f} decades: " + ", ".join(f"{best[f]:g} at rewards x {f:g}" for f in _FACTORS),
        holds=bool(shift >= 2),
    )
    figure = draw_curves(
        curves, x_label="learning rate of plain gradient ascent", y_label="final return", label="legend"
    )
    axes = figure.axes[0]
    axes.set_xlim(np.log10(_SGD[0]), np.log10(_SGD[-1]))
    axes.set_xticks(np.log10(_SGD), [f"{rate:g}" for rate in _SGD])
    save_figure(figure, study.figure("scales"))


def polyak_ascent(mdp: MDP, optimum: Float[Array, ""], c: Float[Array, ""], steps: int) -> Float[Array, " steps"]:
    """Suboptimality of a softmax table before each exact Polyak step without a cap, starting from zeros."""
    rule = polyak_sps(c)
    logits = jnp.zeros((mdp.num_states, mdp.num_actions), mdp.transition.dtype)

    def step(running: tuple, _: None) -> tuple[tuple, Array]:
        logits, state = running
        value = expected_return(mdp, jax.nn.softmax(logits, axis=-1))
        change, state = rule.update(-policy_gradient(mdp, logits), state, logits, value=-value, target=-optimum)
        return (logits + cast(Array, change), state), optimum - value

    return jax.lax.scan(step, (logits, rule.init(logits)), None, length=steps)[1]


def _exact(study: Study, instances: int, steps: int) -> None:
    """Random models of ten states and four actions, all together in one program."""
    constants = [0.1, 1.0, 10.0, 100.0]
    accuracy = 1e-6

    def gaps(key: Key[Array, ""]) -> tuple[Array, Array]:
        mdp = random_mdp(key, 10, 4, discount=0.9)
        optimum = jnp.dot(mdp.start, value_iteration(mdp, tolerance=1e-13).value)
        polyak = jax.vmap(lambda c: polyak_ascent(mdp, optimum, c, steps + 1))(jnp.asarray([1.0, 2.0]))
        constant = jax.vmap(lambda rate: softmax_policy_gradient(mdp, rate, steps).returns)(jnp.asarray(constants))
        return polyak, optimum - constant

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(study.seed), instances)
        polyak, constant = jax.jit(jax.vmap(gaps))(keys)
        found = {f"Polyak, c {c}": np.asarray(polyak[:, i]) for i, c in enumerate((1, 2))}
        found |= {f"constant step {rate:g}": np.asarray(constant[:, i]) for i, rate in enumerate(constants)}
    # The first number of steps after which the gap is closed; one more than were taken where it never is.
    needed = {
        name: np.where((gap <= accuracy).any(axis=1), np.argmax(gap <= accuracy, axis=1), steps + 1)
        for name, gap in found.items()
    }
    for name, counts in needed.items():
        # NaN where at least half of the models are never solved.
        median = float(np.median(counts))
        _row(study, "exact", name, steps_to_optimum=median if median <= steps else float("nan"))
    first, second = needed["Polyak, c 1"], needed["Polyak, c 2"]
    slowest = min(int(needed[f"constant step {rate:g}"].min()) for rate in constants)
    study.claim(
        "With exact gradients and the exact optimum, 1e-6 is reached within a few dozen steps on every model.",
        expected=f"at most 25 steps (c = 1) and 45 (c = 2) on all of {instances}",
        measured=f"{first.min()} to {first.max()} and {second.min()} to {second.max()}",
        holds=bool(first.max() <= 25 and second.max() <= 45),
    )
    study.claim(
        "No constant step gets there on any model in ten times as many.",
        expected="more than 200 steps with each of 0.1, 1, 10 and 100",
        measured=f"fewest {slowest}" if slowest <= steps else f"none within {steps}",
        holds=bool(slowest > 200),
    )
    curves = {}
    for name, gap in found.items():
        clipped = np.maximum(gap, 1e-13)
        curves[name] = (
            np.arange(steps + 1),
            Band(np.median(clipped, axis=0), clipped.min(axis=0), clipped.max(axis=0)),
        )
    figure = draw_curves(curves, x_label="exact gradient steps", y_label="distance to the optimum", label="legend")
    axes = figure.axes[0]
    axes.set_yscale("log")
    axes.set_ylim(1e-9, None)
    axes.set_xlim(0, min(steps, 100))
    save_figure(figure, study.figure("exact"))


def _classic_control(study: Study) -> Report:
    """Two tasks with networks, against Adam over its grid; simulators on the host cannot start all episodes anew."""
    seeds = [study.seed + i for i in range(10)]
    for task, horizon, optimum in (("CartPole-v1", 500, (1 - _GAMMA**500) / (1 - _GAMMA)), ("Acrobot-v1", 500, None)):
        problem = as_problem(f"gymnax:{task}")
        shared: dict[str, Any] = {"num_episodes": _EPISODES, "horizon": horizon, "gamma": _GAMMA, "hidden": (64,)}
        tried = [
            Arm("twin", PolyakPG(**shared), "c", [1.0, 2.0]),
            Arm("Adam", PolicyGradient(**shared, entropy_coefficient=_TAU), "learning_rate", _ADAM),
        ]
        if optimum is not None:
            tried.append(Arm("known optimum", PolyakPG(**shared, cap=1.0, target=optimum), "cap", [1.0, 10.0]))
        final: dict[str, np.ndarray] = {}
        for arm in tried:
            returns = evaluate_members(arm.learn(problem, seeds, 10_000).policies(), problem, episodes=50)
            for i, label in enumerate(arm.labels):
                final[label] = arm.part(returns, i)
                _row(study, task, label, final=final[label].mean(), worst_seed=final[label].min())
        twin = final["twin, c 1"].mean()
        grid = float(np.mean([final[f"Adam, learning rate {rate:g}"].mean() for rate in _ADAM]))
        study.claim(
            f"{task}: the untuned twin beats an Adam whose rate is drawn from its grid.",
            expected="above the mean over the grid after 10,000 episodes",
            measured=f"{twin:.0f} against {grid:.0f}",
            holds=bool(twin > grid),
        )
    return study.report()
