"""Backpropagation through time over pieces of a rollout: the usual way to train a policy with a memory."""

from __future__ import annotations

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from steersman.errors import require, require_count
from steersman.rl.on_policy.actor_critic import ActorCriticState, Batch
from steersman.rl.on_policy.ppo import PPO
from steersman.training.experience import Experience
from steersman.training.normalization import RewardScaler


class TruncatedBPTT(PPO):
    """PPO whose recurrent actor is unrolled over ``truncation`` steps at a time, from the memory recorded there.

    Advantages and values are those of whole rollouts; only gradients end where a piece begins, which biases them
    towards what a memory is good for within a piece. Minibatches are made of pieces. The actor is recurrent:
    ``memory`` above zero, or an architecture whose memory is unrolled.

    Attributes:
        truncation: steps of a piece ``L``, a divisor of ``num_steps``.
    """

    truncation: int = eqx.field(static=True, default=16)

    def __check_init__(self) -> None:
        require_count("truncation", self.truncation)
        allowed = f"a divisor of num_steps = {self.num_steps}"
        require(self.num_steps % self.truncation == 0, "truncation", self.truncation, allowed)
        allowed = "one whose memory is unrolled through time, or None with memory above 0"
        require(self.unrolled, "architecture", self.architecture, allowed)

    def estimate(self, state: ActorCriticState, experience: Experience) -> tuple[Batch, RewardScaler | None]:
        batch, scaler = super().estimate(state, experience)
        return pieces(batch, self.truncation), scaler


def pieces(batch: PyTree, length: int) -> PyTree:
    """Rollouts ``[T, N, ...]`` as pieces beside each other, ``[length, T / length * N, ...]``."""

    def cut(leaf: Array) -> Array:
        steps, columns, *rest = leaf.shape
        parts = leaf.reshape((steps // length, length, columns, *rest)).swapaxes(0, 1)
        return parts.reshape((length, steps // length * columns, *rest))

    return jax.tree.map(cut, batch)
