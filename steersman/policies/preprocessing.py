"""From an observation as the environment gives it to the vector that a network reads."""

from __future__ import annotations

import equinox as eqx
import gymnasium
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman.envs.spaces import flat_size, flatten


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


class Preprocess(eqx.Module):
    """Flattens an observation and, where statistics are there, standardizes it.

    Attributes:
        space: the observation space, which says how to flatten.
        standardize: the frozen statistics, or None to pass values through.
    """

    space: gymnasium.Space = eqx.field(static=True)
    standardize: Standardize | None = None

    @property
    def size(self) -> int:
        """Length of the vector."""
        return flat_size(self.space)

    def __call__(self, observation: PyTree) -> Float[Array, " size"]:
        flat = flatten(self.space, observation)
        return flat if self.standardize is None else self.standardize(flat)
