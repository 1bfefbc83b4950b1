"""Is PPO-EWMA invariant to the batch size, and does its decoupled loss bear stale data? (arXiv:2110.00641)

On a contextual bandit, where the expected reward of a policy is an exact sum and so are baselines: what is measured is
the update alone. Progress is zero for the uniform policy and one for the best.

- *Invariance*: one setting, rescaled to batches 4 and 16 times smaller by the full recipe, by the recipe without one of
  its adjustments, and as PPO without an averaged policy. Judged by the largest distance of the learning curve, over
  samples, from that at the original batch size.
- *Staleness*: actors that lag behind by up to 16 iterations, and losses that do or do not tell the policy that
  collected the data from the one that a step is measured from. Judged by the iterations until 80 % progress, those
  that the first batch is on its way included.
- *Pendulum*: the same three losses on a task with time, eight iterations late. The loss that takes stale data for its
  own must be the worst.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from steersman.envs import ContextualBandit, Problem, as_problem
from steersman.envs.bandit import BanditTable, bandit_progress
from steersman.policies import Architecture, Head, NetworkPolicy, Preprocess
from steersman.policies.network import ActorNetwork
from steersman.rl.advantage_scales import AdvantageMoments
from steersman.rl.critics import NoCritic, Outcome
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.ppo_ewma import PPOEWMA, rescale_batch
from steersman.rl.references import MovingAverageReference, Reference, UpdateStart
from steersman.rl.surrogates import Clip
from steersman.studies.study import Report, Study
from steersman.studies.swing_up import SETTINGS, final_returns, swing_up
from steersman.training import InteractiveAlgorithm, apply_settings, train
from steersman.training.averaging import decay_of
from steersman.training.comparison import learning_curves
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.figures import save_figure
from steersman.training.optimizers import Adam
from steersman.training.prng import key
from steersman.training.staleness import Stale
from steersman.training.statistics import Band, curve_interval

#: The losses for stale data: which policy weighs the data, which one the step is measured from.
REFERENCES: dict[str, Reference] = {
    "decoupled": UpdateStart(),
    "behaviour": Reference(),
    "proximal": UpdateStart(importance_weighted=False),
}


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("ppo-ewma", budget, seed, folder)
    if study.budget == "full":
        return _mujoco(study)
    problem = Problem(ContextualBandit(contexts=16, actions=4, noise=0.5, seed=seed))
    _invariance(study, problem)
    _staleness(study, problem)
    if study.budget == "cpu":
        _pendulum(study)
    return study.report()


class TableNetwork(ActorNetwork):
    """One row of outputs for each of a discrete observation's values."""

    table: Float[Array, "states out"]

    def __call__(self, features: Float[Array, "... states"], carry: Any) -> tuple[Array, Any]:
        return features @ self.table, carry


class Tabular(Architecture):
    """A table of the head's inputs, zero at first: for discrete actions, softmax from the uniform policy."""

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        return NetworkPolicy(
            preprocess=preprocess,
            network=TableNetwork(jnp.zeros((preprocess.size, head.output_size))),
            free=jnp.full(head.free_size, initial_log_std, jnp.result_type(float)),
            head=head,
        )


class ExactValue(NoCritic):
    """The exact value of the behaviour policy in each context, as a baseline."""

    table: BanditTable

    def estimate(self, network: Any, read: Any, outcome: Outcome, gamma: Any, lam: Any) -> tuple[Array, Array]:
        probability = jax.nn.softmax(outcome.experience.record.parameters)
        value = jnp.sum(probability * self.table.mean_reward[outcome.experience.observation], axis=-1)
        return outcome.reward - value, outcome.reward


class ContextMean(NoCritic):
    """The mean reward of the batch in each context, as a baseline; for data of whichever policy."""

    contexts: int = eqx.field(static=True)

    def estimate(self, network: Any, read: Any, outcome: Outcome, gamma: Any, lam: Any) -> tuple[Array, Array]:
        context = outcome.experience.observation.ravel()
        total = jnp.zeros(self.contexts).at[context].add(outcome.reward.ravel())
        count = jnp.zeros(self.contexts).at[context].add(1.0)
        value = (total / jnp.maximum(count, 1.0))[outcome.experience.observation]
        return outcome.reward - value, outcome.reward


@eqx.filter_jit
def progress_curves(
    algorithm: InteractiveAlgorithm, problem: Problem, keys: Key[Array, " S"], iterations: int
) -> Float[Array, "S iterations"]:
    """Exact progress on a bandit after every iteration, for each seed."""
    contexts = jnp.arange(problem.params.mean_reward.shape[0])

    def progress(policy: Any) -> Array:
        logits = jax.vmap(lambda context: policy.parameters(context, ())[0])(contexts)
        return bandit_progress(jax.nn.softmax(logits), problem.params)

    def one(start: Key[Array, ""]) -> Array:
        state_key, rollout_key = jax.random.split(start)
        state = algorithm.init(problem, state_key)
        rollout = algorithm.collector.init(problem, algorithm.behaviour(state), rollout_key)

        def step(running: tuple, _: None) -> tuple[tuple, Array]:
            state, rollout = running
            experience, rollout = algorithm.collector.collect(problem, algorithm.behaviour(state), rollout)[:2]
            state = algorithm.update(state, experience)[0]
            return (state, rollout), progress(algorithm.policy(state))

        return jax.lax.scan(step, (state, rollout), None, length=iterations)[1]

    return jax.vmap(one)(keys)


def invariance_arms(problem: Problem, batch: int, c: int) -> dict[str, PPOEWMA | PPO]:
    """The full recipe for a `c` times smaller batch, the recipe without each of its adjustments, and plain PPO."""
    settings: dict[str, Any] = {
        "num_envs": batch,
        "num_steps": 1,
        "minibatches": 8,
        "epochs": 1,
        "surrogate": Clip(0.1),
        "learning_rate": 0.1,
        "optimizer": Adam(epsilon=1e-8),
        "max_gradient_norm": None,
        "normalize_advantages": AdvantageMoments(0.0),
        "architecture": Tabular(),
        "critic": ExactValue(problem.params),
    }
    decay = decay_of(8.0)
    base = PPOEWMA(reference=MovingAverageReference(decay=decay), **settings)
    full, coupled = rescale_batch(base, c), rescale_batch(PPO(**settings), c)
    if c == 1:
        return {"full recipe": full}
    return {
        "full recipe": full,
        "averaged policy not rescaled": apply_settings(full, {"reference.decay": decay}),
        "learning rate not rescaled": apply_settings(full, {"learning_rate": base.learning_rate}),
        "PPO, learning rate rescaled": coupled,
    }


def _row(study: Study, part: str, arm: str, **numbers: Any) -> None:
    absent = dict.fromkeys(("batch divided by", "largest gap", "staleness", "iterations", "mean return"), float("nan"))
    study.row(part=part, arm=arm, **{**absent, **{name.replace("_", " "): n for name, n in numbers.items()}})


def _invariance(study: Study, problem: Problem) -> None:
    smoke = study.budget == "smoke"
    batch, scales = (64, (2,)) if smoke else (2048, (1, 4, 16))
    iterations = 2 if smoke else 80_000 // batch
    keys = jax.random.split(key(study.seed), 2 if smoke else 4)
    samples = np.arange(iterations + 1) * batch
    gaps: dict[str, float] = {}
    recipe, others, base = {}, {}, None
    for c in scales:
        for name, algorithm in invariance_arms(problem, batch, c).items():
            if smoke and name != "full recipe":
                continue
            every = np.asarray(progress_curves(algorithm, problem, keys, iterations * c))
            # Each curve at the same numbers of samples, from the uniform policy on.
            curves = np.pad(every[:, c - 1 :: c], ((0, 0), (1, 0)))
            base = curves if base is None else base
            gaps[name] = float(np.abs(curves.mean(axis=0) - base.mean(axis=0)).max())
            _row(study, "invariance", name, batch_divided_by=c, largest_gap=gaps[name])
            drawn = (samples, curve_interval(curves, statistic=_mean))
            if name == "full recipe":
                recipe[f"batch {batch:,}" if c == 1 else f"{batch // c:,}, full recipe"] = drawn
            elif c == scales[-1]:
                others[f"{batch // c:,}, {name}"] = drawn
    last, gap = scales[-1], gaps.pop("full recipe")
    study.claim(
        f"At a {last} times smaller batch the full recipe leaves the learning curve where it was.",
        expected="largest gap of progress at most 0.12",
        measured=f"{gap:.3f}",
        holds=gap <= 0.12,
    )
    for name, gap in gaps.items():
        study.claim(
            f"At a {last} times smaller batch it does not where something is missing: {name}.",
            expected="largest gap of progress at least 0.25",
            measured=f"{gap:.3f}",
            holds=gap >= 0.25,
        )
    # The second half adds nothing to see: every arm is near the best policy.
    half = slice(0, iterations // 2 + 1)
    shown = {name: (x[half], Band(*(part[half] for part in band))) for name, (x, band) in (recipe | others).items()}
    figure = draw_curves(shown, x_label="samples", y_label="progress", label="legend")
    save_figure(figure, study.figure("invariance"))


def _mean(values: np.ndarray, axis: Any = None) -> Any:
    return np.mean(values, axis=axis)


def _staleness(study: Study, problem: Problem) -> None:
    smoke = study.budget == "smoke"
    lags, iterations = ((2,), 3) if smoke else ((0, 4, 8, 16), 80)
    keys = jax.random.split(key(study.seed), 2 if smoke else 5)
    needed: dict[str, dict[int, float]] = {}
    curves = {}
    for name in ("decoupled",) if smoke else ("decoupled", "behaviour"):
        learner = PPO(
            num_envs=64 if smoke else 512,
            num_steps=1,
            minibatches=1,
            epochs=10,
            learning_rate=0.05,
            optimizer=Adam(epsilon=1e-8),
            max_gradient_norm=None,
            reference=REFERENCES[name],
            architecture=Tabular(),
            critic=ContextMean(problem.params.mean_reward.shape[0]),
        )
        needed[name] = {}
        for lag in lags:
            every = np.asarray(progress_curves(Stale(learner, lag), problem, keys, iterations))
            reached = np.flatnonzero(every.mean(axis=0) >= 0.8)
            # The first batch is used `lag` iterations after it was collected.
            needed[name][lag] = float(lag + reached[0] + 1) if reached.size else float("inf")
            shown = needed[name][lag] if reached.size else float("nan")
            _row(study, "staleness", name, staleness=lag, iterations=shown)
            waited = np.pad(every, ((0, 0), (lag + 1, 0)))[:, : iterations + 1]
            if lag in (lags[0], lags[-1]) and (lag or name == "decoupled"):
                label = f"{name}, {lag} iterations late" if lag else "fresh data"
                curves[label] = (np.arange(iterations + 1), curve_interval(waited, statistic=_mean))
    figure = draw_curves(curves, x_label="iterations", y_label="progress", label="legend")
    save_figure(figure, study.figure("staleness"))
    decoupled = needed["decoupled"]
    study.claim(
        "The decoupled loss loses no more to staleness than the wait for the first batch.",
        expected="80 % progress within s + 8 iterations at every staleness s",
        measured=", ".join(f"{n:.0f} (s = {lag})" for lag, n in decoupled.items()),
        holds=all(n <= lag + 8 for lag, n in decoupled.items()),
    )
    if smoke:
        return
    behaviour = needed["behaviour"]
    study.claim(
        "A clip around the policy that collected the data is slowed down.",
        expected="at s = 16 at least twice the iterations of the decoupled loss",
        measured=f"{behaviour[16]:.0f} against {decoupled[16]:.0f} ("
        + ", ".join(f"{n:.0f} at s = {lag}" for lag, n in behaviour.items() if lag != 16)
        + ")",
        holds=behaviour[16] >= 2 * decoupled[16],
    )


def _pendulum(study: Study) -> None:
    seeds, rates, staleness = [study.seed + i for i in range(3)], [3e-4, 1e-3], 8
    found, curves = {}, {}
    for name, reference, lag in [("fresh data", Reference(), 0), *((n, r, staleness) for n, r in REFERENCES.items())]:
        learner = PPO(reference=reference, learning_rate=1e-3, **{**SETTINGS, "num_steps": 64})
        trained = train(
            Stale(learner, lag), swing_up(), steps=150_000, seeds=seeds, sweep={"algorithm.learning_rate": rates}
        )
        returns = final_returns(trained).reshape(len(rates), len(seeds)).mean(axis=1)
        best = int(np.argmax(returns))
        found[name] = float(returns[best])
        for rate, mean_return in zip(rates, returns, strict=True):
            _row(study, "pendulum", f"{name}, rate {rate:g}", staleness=lag, mean_return=float(mean_return))
        samples, values = learning_curves(trained, points=30)
        curves[name] = (samples, curve_interval(values[best * len(seeds) : (best + 1) * len(seeds)], statistic=_mean))
    figure = draw_curves(curves, label="legend")
    save_figure(figure, study.figure("pendulum"))
    others = {name: found[name] for name in ("decoupled", "behaviour")}
    study.claim(
        "Taking stale data for the policy's own is the worst of the three losses on the pendulum.",
        expected="a lower mean return than both others, each at its better learning rate",
        measured=f"{found['proximal']:.0f} against "
        + ", ".join(f"{value:.0f} ({name})" for name, value in others.items())
        + f"; {found['fresh data']:.0f} on fresh data",
        holds=found["proximal"] < min(others.values()),
    )


_TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")


def _mujoco(study: Study) -> Report:
    """The paper's comparison over batch sizes a factor of four apart, on MuJoCo in place of Procgen (old Python)."""
    steps, seeds, scales = 10_000_000, [study.seed + i for i in range(3)], (1, 4, 16)
    shared: dict[str, Any] = {
        "num_envs": 64,
        "num_steps": 256,
        "normalize_observations": True,
        "normalize_rewards": True,
        "normalize_advantages": AdvantageMoments(),
    }
    gaps: dict[str, list[float]] = {}
    for task in _TASKS:
        problem = as_problem(task)
        base: np.ndarray | None = None
        for c in scales:
            full = rescale_batch(PPOEWMA(**shared), c)
            arms: dict[str, Any] = {"full recipe": full}
            if c > 1:
                arms["averaged policy not rescaled"] = apply_settings(full, {"reference.decay": 8 / 9})
                arms["learning rate not rescaled"] = apply_settings(full, {"learning_rate": 5e-4})
                plain = PPO(epochs=1, learning_rate=5e-4, max_gradient_norm=None, **shared)
                arms["PPO, learning rate rescaled"] = rescale_batch(plain, c)
            for name, algorithm in arms.items():
                trained = train(algorithm, problem, steps=steps, seeds=seeds)
                samples, values = learning_curves(trained, points=100)
                curve = np.interp(np.linspace(0.05, 1.0, 50) * steps, samples, np.nanmean(values, axis=0))
                base = curve if base is None else base
                gap = float(np.abs(curve - base).max() / np.ptp(base))
                if c == scales[-1]:
                    gaps.setdefault(name, []).append(gap)
                mean_return = float(np.mean(final_returns(trained, samples=500_000)))
                _row(study, task, name, batch_divided_by=c, largest_gap=gap, mean_return=mean_return)
    measured = {name: float(np.mean(values)) for name, values in gaps.items()}
    recipe = measured.pop("full recipe")
    study.claim(
        f"At a {scales[-1]} times smaller batch the full recipe changes learning curves least.",
        expected="a smaller largest gap, relative to the range of the curve, than every other arm",
        measured=f"{recipe:.2f} against " + ", ".join(f"{gap:.2f} ({name})" for name, gap in measured.items()),
        holds=all(recipe < gap for gap in measured.values()),
    )
    return study.report()
