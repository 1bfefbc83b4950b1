"""Stochastic stateful policy gradients (Al-Hafez, Zhao, Peters, Tateo, ICLR 2024, arXiv:2311.04082)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from steersman.errors import InputError, InputTypeError
from steersman.policies import Architecture, NetworkPolicy
from steersman.policies.sampled_memory import LinearMemory, SampledMemory
from steersman.rl.on_policy.actor_critic import ActorCriticState, Batch
from steersman.rl.on_policy.policy_gradient import GradientEstimate, PolicyGradient
from steersman.rl.on_policy.ppo import PPO
from steersman.training.collect import episode_ends
from steersman.training.experience import Experience
from steersman.training.normalization import RewardScaler


class S2PG(PPO):
    """PPO for policies whose next memory is sampled like an action.

    The ratio is that of action and memory together, and is clipped once; the critic sees observation, memory and last
    action. Minibatches are single transitions, as without a memory: nothing is unrolled, nothing is truncated, and a
    gradient step costs the same however far back the memory reaches. The price is noise in the memory, which the
    policy learns to turn down. Worth choosing over backpropagation through time where horizons are long, updates
    must be fast, or the cell is expensive to differentiate through; a window or backpropagation remembers more
    precisely.

    Attributes:
        architecture: what makes the policy: a cell, layers around it, the size of the memory and its noise.
    """

    architecture: Architecture | None = eqx.field(default_factory=lambda: SampledMemory(64))

    def __check_init__(self) -> None:
        _check_architecture(self)

    def estimate(self, state: ActorCriticState, experience: Experience) -> tuple[Batch, RewardScaler | None]:
        check_memory(state.actor, experience)
        return super().estimate(state, experience)


class EpisodicS2PG(PolicyGradient):
    """GPOMDP for policies whose next memory is sampled like an action; no critic.

    The score is that of action and memory together. For small policies and short episodes: the estimator of the
    paper's variance bounds, unbiased but for the baseline.

    Attributes:
        architecture: what makes the policy; a linear-Gaussian kernel with one number of memory unless given.
        baseline: for each parameter the one of least variance, as in the authors' code.
    """

    architecture: Architecture | None = eqx.field(default_factory=lambda: LinearMemory(1))
    baseline: str = eqx.field(static=True, default="optimal")

    def __check_init__(self) -> None:
        _check_architecture(self)

    def estimate(self, policy: NetworkPolicy, experience: Experience) -> GradientEstimate:
        check_memory(policy, experience, experience.extras.get("mask"))
        return super().estimate(policy, experience)


def _check_architecture(algorithm: Any) -> None:
    if algorithm.memory:
        raise InputError(
            f"memory is {algorithm.memory}, but it must be 0: the architecture has a sampled memory of its own size."
        )
    if algorithm.architecture is None or algorithm.architecture.unrolled:
        found = None if algorithm.architecture is None else type(algorithm.architecture).__name__
        raise InputTypeError(
            f"architecture is {found}, but it must be one that samples its memory, such as SampledMemory(64)."
        )


def check_memory(policy: NetworkPolicy, experience: Experience, mask: Array | None = None) -> None:
    """Checks that experience holds the memories that a policy acted with, reset where episodes ended.

    What is being traced by JAX cannot be looked at and passes: collectors record and reset memories themselves.

    Args:
        policy: the policy that acted.
        experience: ``[T, N]``.
        mask: rows that count ``[T, N]``; all unless given.

    Raises:
        InputError: a memory is missing, has another shape, is not finite, or goes on from one episode into the next.
    """
    start = jax.eval_shape(policy.init, jax.random.key(0))
    ends = jnp.shape(experience.truncated)
    expected = [(*ends, *leaf.shape) for leaf in jax.tree.leaves(start)]
    found = [tuple(leaf.shape) for leaf in jax.tree.leaves(experience.carry)]
    if found != expected:
        raise InputError(
            f"experience.carry has arrays of shapes {found}, but it must hold the memory before every step: {expected}."
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((experience.carry, experience.truncated, policy))):
        return
    counted = np.ones(ends, bool) if mask is None else np.asarray(mask)
    done = np.asarray(episode_ends(experience.terminated, experience.truncated))
    begins = np.zeros_like(done)
    begins[1:] = done[:-1]
    for leaf, fresh in zip(jax.tree.leaves(experience.carry), _leaves(policy.init(jax.random.key(0))), strict=True):
        memory = np.asarray(leaf, np.float64)
        if not np.all(np.isfinite(memory[counted])):
            step, column = np.argwhere(~np.isfinite(memory).all(axis=-1) & counted)[0].tolist()
            raise InputError(
                f"experience.carry is NaN or infinite at step {step} of environment {column}, but a memory must be "
                "finite."
            )
        kept = (begins & counted) & np.any(memory != fresh, axis=-1)
        if kept.any():
            step, column = np.argwhere(kept)[0].tolist()
            raise InputError(
                f"experience.carry is {memory[step, column].tolist()} at step {step} of environment {column}, but it "
                f"must be {fresh.tolist()} there, as an episode begins."
            )


def _leaves(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
