"""From an observation as the environment gives it to the vector that a network reads."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman.envs.spaces import Layout


class Standardize(eqx.Module):
    """``clip((x - mean) * inverse_std, -clip, clip)``, with statistics that no longer change.

    Attributes:
        mean: subtracted, ``[D]``.
        inverse_std: multiplied, ``[D]``.
        clip: bound of the result's magnitude.
    """

    mean: Float[Array, " D"]
    inverse_std: Float[Array, " D"]
    clip: float = eqx.field(static=True, default=10.0)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return jnp.clip((x - self.mean) * self.inverse_std, -self.clip, self.clip)


class Features(NamedTuple):
    """What a network reads.

    Attributes:
        vector: the flattened, standardized observation.
        allowed: which discrete actions may be taken, or None where the observation carries no action mask.
        observation: the observation itself, for networks that read its parts in their own way; empty for all others.
    """

    vector: Float[Array, "... size"]
    allowed: PyTree = None
    observation: PyTree = ()


class Preprocess(eqx.Module):
    """Flattens an observation and, where statistics are there, standardizes it.

    Attributes:
        layout: how an observation becomes a vector (:func:`steersman.envs.spaces.layout`).
        standardize: the frozen statistics, or None to pass values through.
    """

    layout: Layout
    standardize: Standardize | None = None

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.layout.size

    def __call__(self, observation: PyTree) -> Features:
        flat = self.layout(observation)
        vector = flat if self.standardize is None else self.standardize(flat)
        return Features(vector, observation["action_mask"] if self.layout.allowed else None)
