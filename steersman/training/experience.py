"""What a collector hands to an algorithm."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree


class Experience(eqx.Module):
    """Rollouts of ``N`` environments over ``T`` steps, time first.

    Attributes:
        observation: what was observed before acting, leaves ``[T, N, ...]``.
        next_observation: what was observed after the step, *before* any restart. At an episode's end this is its
            final observation, never the next episode's first.
        carry: the policy's memory before acting.
        action: what was sent to the environment.
        record: what the policy knew (log-probability, distribution parameters; see
            :class:`~steersman.policies.Record`); empty for policies without a likelihood.
        reward: ``[T, N]``, with a trailing axis for several objectives or agents.
        terminated: the task ended here: nothing is earned afterwards.
        truncated: the episode was cut here for another reason: what would have been earned is bootstrapped.
        extras: named side information from the environment (``costs``, ``duration``, ...).
    """

    observation: PyTree
    next_observation: PyTree
    carry: PyTree
    action: PyTree
    record: PyTree
    reward: Float[Array, "..."]
    terminated: Bool[Array, "..."]
    truncated: Bool[Array, "..."]
    extras: dict[str, Any]

    @property
    def done(self) -> Bool[Array, "..."]:
        """Where an episode ended, for whichever reason."""
        return jnp.logical_or(self.terminated, self.truncated)
