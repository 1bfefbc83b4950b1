"""The five prominent policy gradient methods side by side, on equal footing (Lehmann, 2024, arXiv:2401.13662)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman import returns
from steersman.errors import require_count, unknown_name
from steersman.policies import (
    Architecture,
    DiagonalGaussian,
    GaussianParameters,
    Head,
    NetworkPolicy,
    Preprocess,
    TanhGaussian,
    make_policy,
)
from steersman.rl.critics import Outcome, StateCritic
from steersman.rl.mpo_surrogate import WeightedLikelihood
from steersman.rl.on_policy.a2c import A2C
from steersman.rl.on_policy.actor_critic import ActorCritic
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.reinforce import REINFORCE
from steersman.rl.on_policy.trpo import TRPO
from steersman.rl.on_policy.vmpo import VMPO
from steersman.training.collect import episode_ends
from steersman.training.comparison import compare
from steersman.training.hyperparameters import apply_settings
from steersman.training.report import ComparisonResult
from steersman.training.schedules import Linear


class SoftplusTanhGaussian(TanhGaussian):
    """A :class:`~steersman.policies.TanhGaussian` whose deviation is ``softplus(output) + 0.001`` at each state."""

    def from_output(self, output: Float[Array, "... out"], free: Float[Array, " free"]) -> GaussianParameters:
        del free
        mean, raw = jnp.split(output, 2, axis=-1)
        return GaussianParameters(mean, jnp.log(jax.nn.softplus(raw) + 0.001))


class SquashedActor(Architecture):
    """A feed-forward actor with layers of its own; on a bounded box a Gaussian squashed onto it.

    Other action spaces keep their usual head. The start of the deviation is ``softplus(0) + 0.001``, whatever
    ``initial_log_std`` is.

    Attributes:
        hidden: widths of the hidden layers.
        activation: the nonlinearity.
    """

    hidden: tuple[int, ...] = eqx.field(static=True, default=(32, 32, 32, 32), converter=tuple)
    activation: str = eqx.field(static=True, default="swish")

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        if isinstance(head, DiagonalGaussian) and np.all(np.isfinite([head.low or np.inf, head.high or np.inf])):
            head = SoftplusTanhGaussian(head.shape, head.low, head.high, state_dependent_std=True)
        policy = make_policy(preprocess, head, hidden=self.hidden, activation=self.activation, key=key)
        return eqx.tree_at(lambda p: p.free, policy, policy.free + initial_log_std)


class NextTargetCritic(StateCritic):
    """Advantages from one step and the *target* of the next state, ``r + gamma V_target(s') - V(s)``.

    ``delta_t + gamma A_{t+1}`` where the generalized estimate has ``delta_t + gamma lam A_{t+1}``: as in Brax and in
    the guide's code. Longer traces in the first step, so less bias and more variance than the estimate of the same
    ``lam``; the critic's own targets are the same.
    """

    def estimate(
        self,
        network: PyTree,
        read: PyTree,
        outcome: Outcome,
        gamma: Float[Array, ""] | float,
        lam: Float[Array, ""] | float,
    ) -> tuple[Float[Array, "T N"], PyTree]:
        _, target = super().estimate(network, read, outcome, gamma, lam)
        following = jnp.concatenate([target[1:], outcome.next_value[-1:]])
        # Where the episode was cut, the next row belongs to another one.
        following = jnp.where(episode_ends(outcome.terminated, outcome.truncated), outcome.next_value, following)
        advantage = returns.td_error(outcome.reward, outcome.value, following, outcome.terminated, gamma)
        return advantage, target


def guide_algorithms(steps: int) -> dict[str, ActorCritic]:
    """The five methods as the guide's code configures them for MuJoCo's tasks, by name.

    Its loss of a critic carries a factor one half, which is part of ``value_coefficient`` here. What the guide's code
    does that its papers do not is left out: one trust-region step for each minibatch, steps taken although the line
    search failed, a divergence of V-MPO's policy from itself.

    Args:
        steps: environment steps of the whole training, over which step sizes fall to a hundredth.
    """
    require_count("steps", steps)
    shared: dict[str, Any] = {
        "num_envs": 8,
        "num_steps": 2048,
        "gamma": 0.99,
        "lam": 0.95,
        "hidden": (256,) * 5,
        "activation": "swish",
        "architecture": SquashedActor(),
        "normalize_observations": True,
        "normalize_rewards": True,
    }
    rate = Linear(3e-4, 3e-6, steps)
    first_order = {**shared, "learning_rate": rate, "minibatches": 8, "max_gradient_norm": 0.5}
    alone = {**first_order, "num_envs": 1, "minibatches": 1, "lam": 1.0}
    trust_region = {**shared, "critic_learning_rate": rate, "critic_epochs": 10, "critic_minibatches": 8}
    return {
        "reinforce": REINFORCE(**alone),
        "a2c": A2C(**first_order, value_coefficient=0.25, entropy_coefficient=0.1),
        "trpo": TRPO(**trust_region, target_kl=0.01, damping=0.1, cg_iterations=10),
        "ppo": PPO(**first_order, value_coefficient=0.25, epochs=10),
        "vmpo": VMPO(
            **first_order,
            surrogate=WeightedLikelihood(dual_learning_rate=rate),
            value_coefficient=0.5,
            epochs=10,
            normalize_advantages=False,
        ),
    }


def suite(
    problem: Any,
    *,
    steps: int,
    seeds: int = 5,
    shared: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    episodes: int = 10,
    report: str | Path | None = None,
    progress: bool = False,
) -> ComparisonResult:
    """Trains REINFORCE, A2C, TRPO, PPO and V-MPO with the same seeds and networks, and compares what they learned.

    Args:
        problem: whatever :func:`steersman.envs.as_problem` accepts.
        steps: environment steps of each seed of each method.
        seeds: seeds of each method.
        shared: hyperparameters of all five, by dotted name, in place of :func:`guide_algorithms`'s: other networks for
            a small task, say.
        settings: hyperparameters of single methods, by the method's name; they go before shared ones. Where batches
            are made short, give ``reinforce`` ones that hold whole episodes.
        episodes: evaluation episodes of each trained policy, played by the most likely action.
        report: where to write a self-contained ``report.html``.
        progress: show progress lines on standard error.

    Returns:
        Final returns of every seed, learning curves, intervals and probabilities of improvement.

    Raises:
        InputError: a method or hyperparameter of that name does not exist, or a value cannot be used.
    """
    algorithms = guide_algorithms(steps)
    for name in settings or {}:
        if name not in algorithms:
            raise unknown_name("method", name, algorithms)
    chosen = {
        name: apply_settings(algorithm, {**(shared or {}), **(settings or {}).get(name, {})})
        for name, algorithm in algorithms.items()
    }
    return compare(
        chosen,
        problem,
        steps=steps,
        seeds=seeds,
        episodes=episodes,
        report=report,
        progress=progress,
        render_episodes=report is not None,
    )
