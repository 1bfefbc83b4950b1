"""Features of the time that a denoising network is told."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steersman.errors import require, require_count, require_number


class SinusoidalTime(eqx.Module):
    """``[sin(w_i t)..., cos(w_i t)...]`` with angular frequencies that fall geometrically from `fastest` to `slowest`.

    The position features of Vaswani et al. (2017, arXiv:1706.03762) as diffusion policy uses them: with the default
    frequencies ``w_i = 10000^(-i / (size / 2 - 1))``, made for times that are whole numbers.

    Attributes:
        size: number of features, even.
        fastest: largest angular frequency, in radians per unit of time.
        slowest: smallest one.
    """

    size: int = eqx.field(static=True)
    fastest: float = eqx.field(static=True, default=1.0)
    slowest: float = eqx.field(static=True, default=1e-4)

    def __check_init__(self) -> None:
        require_count("size", self.size, minimum=4)
        require(self.size % 2 == 0, "size", self.size, "even: half of the features are sines, half cosines")
        require_number("slowest", self.slowest, above=0.0)
        require_number("fastest", self.fastest, at_least=self.slowest)

    def __call__(self, time: Float[Array, ""]) -> Float[Array, " size"]:
        """The features of one time."""
        fall = np.log(self.fastest / self.slowest) / (self.size // 2 - 1)
        frequencies = np.float32(self.fastest) * np.exp(np.arange(self.size // 2, dtype=np.float32) * np.float32(-fall))
        angles = time * jnp.asarray(frequencies, time.dtype)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class OctaveTime(eqx.Module):
    """``[cos(2^i t)..., sin(2^i t)...]`` for ``i = 0 .. octaves - 1``: features of times in [0, 1].

    Flow policies trained online use them (McAllister et al., 2025, arXiv:2507.21053).

    Attributes:
        octaves: number of frequencies; half the number of features.
    """

    octaves: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        require_count("octaves", self.octaves)
        require(self.octaves <= 24, "octaves", self.octaves, "at most 24: a float32 has no more binary digits")

    @property
    def size(self) -> int:
        """Number of features."""
        return 2 * self.octaves

    def __call__(self, time: Float[Array, ""]) -> Float[Array, " size"]:
        """The features of one time."""
        angles = time * jnp.asarray(2.0 ** np.arange(self.octaves), time.dtype)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])
