"""Do more actions a state from a learned model make better gradients than more states? (arXiv:2210.13011)

First on a linear-quadratic task whose gradient is known: bias and variance of the estimates, with the errors that a
learned critic and model would have put in by hand. Values are those of a critic whose matrix ``P`` is 15 % too large;
the model's ``A`` misses by ``-0.01 I``, its ``B`` by a tenth. A batch has 8 trajectories of 16 steps, and every
estimate uses 8 samples a state: executed actions by generalized advantages, the others by what the arm adds. The arms:

- SA: the executed actions alone.
- QMA: 7 more actions, scored by a quadratic fitted to the batch's lambda-returns.
- MBMA: 7 more actions, scored by rollouts of 5 steps through the model, closed by the critic.
- MB-SPG: a chain of 6 simulated states after each real one, with one action each, scored likewise.

Then on the pendulum swing-up, where model, Q-network and critic are learned: PPO with each of them and 4 samples a
state. Every arm has the same grid of learning rates, and is judged at the one that earns the most over the whole run.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from steersman import returns
from steersman.control.linear_policy import LinearPolicyValue, evaluate_linear_policy
from steersman.envs import as_problem
from steersman.errors import InputError
from steersman.rl.alternatives import AlternativeSource
from steersman.rl.alternatives_from_model import ModelActions, ModelStates
from steersman.rl.alternatives_from_q import QActions
from steersman.rl.on_policy.mbma import MBMA
from steersman.studies.study import Report, Study
from steersman.studies.swing_up import SETTINGS, final_returns, swing_up
from steersman.training import Trained, train
from steersman.training.comparison import learning_curves
from steersman.training.dynamics_model import (
    EnsembleLearner,
    LinearQuadraticModel,
    ModelRollout,
    bootstrapped_return,
    quadratic_features,
    rollout_model,
)
from steersman.training.figures import Estimate, colours, interval_plot, save_figure
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.statistics import curve_interval, estimator_stats

_A, _B = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.1]])
_Q, _R = np.diag([1.0, 0.1]), np.array([[0.01]])
_GAIN = np.array([[1.0, 1.2]])
_NOISE = 1e-3 * np.eye(2)
_STD, _GAMMA, _LAM = 0.5, 0.95, 0.95
_TRAJECTORIES, _STEPS, _ACTIONS, _HORIZON, _CHAIN = 8, 16, 8, 5, 6


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("mbma", budget, seed, folder)
    if study.budget == "full":
        return _control_suite(study)
    smoke = study.budget == "smoke"
    _gradients(study, batches=20 if smoke else 1_000)
    _learning(study, smoke)
    return study.report()


class Estimates(NamedTuple):
    """Gradient of the feedback gain ``[2]`` from one batch, by each arm; the last three with what is exact."""

    sa: Float[Array, "2"]
    qma: Float[Array, "2"]
    mbma: Float[Array, "2"]
    mb_spg: Float[Array, "2"]
    exact_q: Float[Array, "2"]
    mbma_exact: Float[Array, "2"]
    mb_spg_exact: Float[Array, "2"]


def exact_value() -> LinearPolicyValue:
    """Values of the policy ``u ~ N(-K x, 0.25)``."""
    return evaluate_linear_policy(_A, _B, _Q, _R, _GAIN, action_covariance=[[_STD**2]], noise=_NOISE, discount=_GAMMA)


def exact_gradient(exact: LinearPolicyValue) -> Float[np.ndarray, "2"]:
    """The mean of every unbiased arm: the policy gradient averaged over the states of a batch, in closed form."""
    loop = _A - _B @ _GAIN
    moment, total = np.eye(2), np.zeros((2, 2))
    for _ in range(_STEPS):
        total += moment / _STEPS
        moment = loop @ moment @ loop.T + _NOISE + _STD**2 * _B @ _B.T
    return np.asarray(exact.gradient(jnp.asarray(total)))[0]


def estimate_gradients(exact: LinearPolicyValue, key: Key[Array, ""]) -> Estimates:
    """All arms on one batch, which they share."""
    gain = jnp.asarray(_GAIN)
    root = jnp.asarray(np.sqrt(_NOISE))
    right = LinearQuadraticModel.from_costs(_A, _B, _Q, _R, root)
    wrong = LinearQuadraticModel.from_costs(_A - 0.01 * np.eye(2), 0.9 * _B, _Q, _R, root)
    keys = jax.random.split(key, 8)

    def policy(x: Array, carry: Any, key: Array) -> tuple[Array, Array]:
        noise = jax.random.normal(key, (*x.shape[:-1], 1))
        return -x @ gain.T + _STD * noise, noise

    def rough_value(x: Array) -> Array:
        return -1.15 * jnp.einsum("...i,ij,...j->...", x, exact.cost, x) - exact.constant

    def score(x: Array, noise: Array) -> Array:
        """Gradient of the log-likelihood of ``-K x + s noise`` in ``K``."""
        return -noise / _STD * x

    # The batch: x [T, N, 2] with the executed actions and their noise [T, N, 1], and what followed.
    start = jax.random.normal(keys[0], (_TRAJECTORIES, 2))
    action, noise = policy(start, None, keys[1])
    batch = rollout_model(right, policy, start, action, _STEPS, keys[2], noise)
    x, following, action, noise = batch.observation[:-1], batch.observation[1:], batch.action, batch.carry
    never = jnp.zeros(batch.reward.shape, bool)

    def executed(value: Any) -> tuple[Array, Array]:
        """Advantages and lambda-returns of the executed actions."""
        return returns.gae(batch.reward, value(x), value(following), never, never, _GAMMA, _LAM)

    # The same further actions for every arm that has some: [T, N, 7, 1].
    more = _ACTIONS - 1
    beside = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], more, 2))
    tried, tried_noise = policy(beside, None, keys[3])

    def many_actions(value: Any, advantage: Array) -> Array:
        own = score(x, noise) * executed(value)[0][..., None]
        others = score(beside, tried_noise) * advantage[..., None]
        return jnp.mean((own + jnp.sum(others, axis=2)) / _ACTIONS, axis=(0, 1))

    def by_model(model: LinearQuadraticModel, value: Any, key: Array) -> Array:
        rollout = rollout_model(model, policy, beside, tried, _HORIZON, key, tried_noise)
        q_value = bootstrapped_return(rollout, value(rollout.observation[-1]), _GAMMA)
        return many_actions(value, q_value - value(beside))

    def by_regression(value: Any) -> Array:
        def features(x: Array, u: Array) -> Array:
            return quadratic_features(jnp.concatenate([x, u], axis=-1))

        design = features(x, action).reshape(-1, 10)
        weights = jnp.linalg.lstsq(design, executed(value)[1].reshape(-1))[0]
        return many_actions(value, features(beside, tried) @ weights - value(beside))

    def by_states(model: LinearQuadraticModel, value: Any, key: Array) -> Array:
        chain = rollout_model(model, policy, x, action, _CHAIN + _HORIZON, key, noise)
        total = score(x, noise) * executed(value)[0][..., None]
        for k in range(1, _CHAIN + 1):
            advantage = _window(chain, k, value) - value(chain.observation[k])
            total += score(chain.observation[k], chain.carry[k]) * advantage[..., None]
        return jnp.mean(total / (_CHAIN + 1), axis=(0, 1))

    own = score(x, noise) * (exact.q_value(x, action) - exact.value(x))[..., None]
    others = score(beside, tried_noise) * (exact.q_value(beside, tried) - exact.value(beside))[..., None]
    return Estimates(
        sa=jnp.mean(score(x, noise) * executed(rough_value)[0][..., None], axis=(0, 1)),
        qma=by_regression(rough_value),
        mbma=by_model(wrong, rough_value, keys[4]),
        mb_spg=by_states(wrong, rough_value, keys[5]),
        exact_q=jnp.mean((own + jnp.sum(others, axis=2)) / _ACTIONS, axis=(0, 1)),
        mbma_exact=by_model(right, exact.value, keys[6]),
        mb_spg_exact=by_states(right, exact.value, keys[7]),
    )


def _window(chain: ModelRollout, k: int, value: Any) -> Array:
    """Bootstrapped return of a chain's state ``k``."""
    steps, states = slice(k, k + _HORIZON), slice(k, k + _HORIZON + 1)
    part = chain._replace(reward=chain.reward[steps], alive=chain.alive[states])
    return bootstrapped_return(part, value(chain.observation[k + _HORIZON]), _GAMMA)


_NAMES = {
    "sa": "SA",
    "qma": "QMA",
    "mbma": "MBMA",
    "mb_spg": "MB-SPG",
    "exact_q": "many actions, exact Q",
    "mbma_exact": "MBMA, exact model and critic",
    "mb_spg_exact": "MB-SPG, exact model and critic",
}


def _gradients(study: Study, batches: int) -> None:
    exact = exact_value()
    truth = exact_gradient(exact)
    keys = jax.random.split(jax.random.key(study.seed), batches)
    found = jax.jit(lambda keys: jax.lax.map(lambda key: estimate_gradients(exact, key), keys, batch_size=100))(keys)
    bias, error, variance, biases, variances = {}, {}, {}, {}, {}
    for arm, name in _NAMES.items():
        statistics = estimator_stats(np.asarray(getattr(found, arm)), truth)
        bias[arm] = float(np.linalg.norm(statistics.bias))
        variance[arm] = statistics.total_variance
        error[arm] = float(np.sqrt(statistics.total_variance / batches))
        biases[name] = Estimate(bias[arm], max(0.0, bias[arm] - 1.96 * error[arm]), bias[arm] + 1.96 * error[arm])
        variances[name] = Estimate(variance[arm], *statistics.total_variance_interval)
        _row(study, part="gradient", arm=name, bias=bias[arm], bias_error=error[arm], trace_variance=variance[arm])
    study.claim(
        "Gradient: more actions from a model lower the variance.",
        expected="trace variance of MBMA at most 0.4 times SA's",
        measured=f"{variance['mbma']:.3f} against {variance['sa']:.3f}",
        holds=variance["mbma"] <= 0.4 * variance["sa"],
    )
    study.claim(
        "Gradient: more actions are less biased than more states from the same model.",
        expected="bias of MBMA at most 0.5 times MB-SPG's",
        measured=f"{bias['mbma']:.3f} against {bias['mb_spg']:.3f}",
        holds=bias["mbma"] <= 0.5 * bias["mb_spg"],
    )
    study.claim(
        "Gradient: their variance is of the same order.",
        expected="trace variance of MBMA at most 2 times MB-SPG's",
        measured=f"{variance['mbma']:.3f} against {variance['mb_spg']:.3f}",
        holds=variance["mbma"] <= 2.0 * variance["mb_spg"],
    )
    study.claim(
        "Gradient: with exact model and critic more actions leave no bias.",
        expected="bias of MBMA below 3 standard errors",
        measured=f"{bias['mbma_exact']:.4f}, {bias['mbma_exact'] / error['mbma_exact']:.1f} standard errors",
        holds=bias["mbma_exact"] < 3.0 * error["mbma_exact"],
    )
    colour = colours(_NAMES.values())
    label = f"bias of the gradient (its norm is {np.linalg.norm(truth):.2f})"
    size = (10.0, 5.0)
    save_figure(interval_plot(biases, x_label=label, colour=colour, size=size), study.figure("bias"))
    label = "trace of the gradient's covariance"
    save_figure(interval_plot(variances, x_label=label, colour=colour, size=size), study.figure("variance"))


def _row(study: Study, **cells: Any) -> None:
    columns = ("part", "arm", "bias", "bias_error", "trace_variance", "mean_return", "last_return", "model_loss")
    study.row(**{name: cells.get(name, float("nan")) for name in columns})


def _learning(study: Study, smoke: bool) -> None:
    steps, rates = (4_096, [1e-3]) if smoke else (60_000, [1e-3, 3e-3, 1e-2])
    seeds = [study.seed + i for i in range(1 if smoke else 5)]
    hidden = (8,) if smoke else (64, 64)
    learner = EnsembleLearner(hidden=hidden, activation="relu", epochs=2, batches=5 if smoke else 40)
    from_model = {"actions": 4, "horizon": 5, "capacity": 65_536, "learner": learner}
    sources: dict[str, AlternativeSource | None] = {
        "SA-PPO": None,
        "QMA-PPO": QActions(actions=4, hidden=hidden),
        "MB-PPO": ModelStates(**from_model),
        "MBMA-PPO": ModelActions(**from_model),
    }
    if smoke:  # Each arm is a program to compile, and the tests run every source.
        sources = {name: sources[name] for name in ("SA-PPO", "MBMA-PPO")}
    settings = {**SETTINGS, **({"hidden": (8,), "epochs": 2} if smoke else {})}
    problem, found, curves = swing_up(), {}, {}
    for name, source in sources.items():
        algorithm = MBMA(alternatives=source, **settings)
        trained = train(algorithm, problem, steps=steps, seeds=seeds, sweep={"learning_rate": rates})
        arms = _by_rate(trained, rates, len(seeds))
        best = max(arms, key=lambda rate: arms[rate]["mean_return"])
        found[name] = arms[best]
        first = rates.index(best) * len(seeds)
        # Two iterations to a point: in one of 128 steps no episode of 200 may end.
        samples, values = learning_curves(trained, points=15)
        curves[name] = (samples, curve_interval(values[first : first + len(seeds)]))
        for rate, numbers in arms.items():
            _row(study, part="swing-up", arm=f"{name}, rate {rate:g}", **numbers)
    many, single = found["MBMA-PPO"], found["SA-PPO"]
    states = found.get("MB-PPO", single)
    study.claim(
        "Swing-up: MBMA-PPO earns at least what PPO does over the whole run.",
        expected="mean return over the run >= that of SA-PPO",
        measured=f"{many['mean_return']:.0f} against {single['mean_return']:.0f} "
        f"(last iterations {many['last_return']:.0f} against {single['last_return']:.0f})",
        holds=many["mean_return"] >= single["mean_return"],
    )
    study.claim(
        "Swing-up: MBMA-PPO is not worse than MB-PPO.",
        expected="mean return over the run at most 60 below, 5 % of the range of 1,200",
        measured=f"{many['mean_return']:.0f} against {states['mean_return']:.0f} "
        f"(last iterations {many['last_return']:.0f} against {states['last_return']:.0f})",
        holds=many["mean_return"] >= states["mean_return"] - 60.0,
    )
    save_figure(draw_curves(curves, label="legend"), study.figure("swing-up"))


def _by_rate(trained: Trained, rates: list[float], seeds: int) -> dict[float, dict[str, float]]:
    """Numbers of each learning rate, over its seeds."""

    def split(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(rates), seeds).mean(axis=1)

    over_run = split(final_returns(trained, samples=int(trained.samples[-1])))
    last = split(final_returns(trained))
    loss = trained.metrics.get("model_holdout_loss")
    losses = np.full(len(rates), np.nan) if loss is None else split(loss[-5:].mean(axis=0))
    return {
        rate: {"mean_return": float(over_run[i]), "last_return": float(last[i]), "model_loss": float(losses[i])}
        for i, rate in enumerate(rates)
    }


_TASKS = (
    "acrobot-swingup",
    "cartpole-swingup",
    "cheetah-run",
    "finger-spin",
    "finger-turn_easy",
    "finger-turn_hard",
    "fish-swim",
    "hopper-hop",
    "hopper-stand",
    "humanoid-stand",
    "humanoid-walk",
    "quadruped-walk",
    "walker-run",
    "walker-walk",
)


def _control_suite(study: Study) -> Report:
    """The paper's own comparison: 14 tasks of the DeepMind control suite, a million steps, ten seeds."""
    try:
        gymnasium.register_envs(importlib.import_module("shimmy"))
    except ImportError:
        raise InputError("budget is 'full', but the control suite needs the package shimmy[dm-control].") from None
    steps, seeds = 1_000_000, [study.seed + i for i in range(10)]
    shared = {"num_envs": 8, "num_steps": 256, "normalize_observations": True, "normalize_rewards": True}
    from_model = {"actions": 8, "horizon": 5, "capacity": 1_000_000, "learner": EnsembleLearner(members=5)}
    sources: dict[str, AlternativeSource | None] = {
        "SA-PPO": None,
        "QMA-PPO": QActions(actions=8),
        "MB-PPO": ModelStates(**from_model),
        "MBMA-PPO": ModelActions(**from_model),
    }
    wins = {name: 0 for name in sources if name != "MBMA-PPO"}
    for task in _TASKS:
        problem, found = as_problem(f"dm_control/{task}-v0"), {}
        for name, source in sources.items():
            trained = train(MBMA(alternatives=source, **shared), problem, steps=steps, seeds=seeds)
            numbers = _by_rate(trained, [3e-4], len(seeds))[3e-4]
            _row(study, part=task, arm=name, **numbers)
            found[name] = numbers["mean_return"]
        for name in wins:
            wins[name] += found["MBMA-PPO"] > found[name]
    for name, count in wins.items():
        study.claim(
            f"MBMA-PPO earns more than {name} over the run.",
            expected=f"on more than half of {len(_TASKS)} tasks",
            measured=f"on {count}",
            holds=count > len(_TASKS) / 2,
        )
    return study.report()
