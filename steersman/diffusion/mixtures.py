"""Gaussian mixtures under noise: scores, samples and densities in closed form, the truth that networks are held to."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.diffusion.denoiser import Denoiser
from steersman.diffusion.predictions import Prediction
from steersman.diffusion.processes import NoiseProcess
from steersman.errors import require


class Mixture(eqx.Module):
    """``sum_m w_m N(mean_m, V_m)`` with ``V_m = Q_m diag(variance_m) Q_m'``.

    Attributes:
        log_weight: logarithms of the weights, up to a constant ``[M]``.
        mean: means ``[M, d]``.
        variance: variances along the columns of the basis ``[M, d]``, or what broadcasts to that.
        basis: orthonormal columns ``[d, d]`` for all components or ``[M, d, d]``; None for the coordinate axes.
    """

    log_weight: Float[Array, " M"]
    mean: Float[Array, "M d"]
    variance: Float[Array, "..."]
    basis: Float[Array, "*M d d"] | None = None

    def __check_init__(self) -> None:
        require(
            self.mean.ndim == 2 and self.mean.shape[0] == self.log_weight.shape[0],
            "mean.shape",
            self.mean.shape,
            f"[{self.log_weight.shape[0]}, d]",
        )

    @classmethod
    def from_covariance(
        cls, log_weight: Float[Array, " M"], mean: Float[Array, "M d"], covariance: Float[Array, "*M d d"]
    ) -> Mixture:
        """With covariance matrices ``[d, d]`` for all components, or ``[M, d, d]``. Not for use under ``vmap``."""
        variance, basis = jnp.linalg.eigh(covariance)
        return cls(log_weight, mean, jnp.broadcast_to(variance, mean.shape), basis)

    def _turned(self, difference: Float[Array, "M d"]) -> Float[Array, "M d"]:
        if self.basis is None:
            return difference
        return jnp.einsum("...ij,...i->...j", self.basis, difference)

    def _turned_back(self, along: Float[Array, "M d"]) -> Float[Array, "M d"]:
        if self.basis is None:
            return along
        return jnp.einsum("...ij,...j->...i", self.basis, along)

    def log_joint(
        self, x: Float[Array, " d"], alpha: Float[Array, ""] | float = 1.0, sigma: Float[Array, ""] | float = 0.0
    ) -> Float[Array, " M"]:
        """``log w_m N(x; alpha mean_m, alpha^2 V_m + sigma^2 I)``: density of ``alpha a + sigma e`` and component."""
        along = self._turned(x - alpha * self.mean)
        spread = jnp.broadcast_to(alpha**2 * self.variance + sigma**2, self.mean.shape)
        quadratic = jnp.sum(along**2 / spread + jnp.log(2.0 * jnp.pi * spread), axis=-1)
        return jax.nn.log_softmax(self.log_weight) - 0.5 * quadratic

    def log_density(
        self, x: Float[Array, " d"], alpha: Float[Array, ""] | float = 1.0, sigma: Float[Array, ""] | float = 0.0
    ) -> Float[Array, ""]:
        """Log-density of ``alpha a + sigma e`` at `x`."""
        return jax.nn.logsumexp(self.log_joint(x, alpha, sigma))

    def predict(self, x: Float[Array, " d"], alpha: Float[Array, ""], sigma: Float[Array, ""]) -> Prediction:
        """``E[e | x]`` and ``E[a | x]`` at ``x = alpha a + sigma e``."""
        share = jax.nn.softmax(self.log_joint(x, alpha, sigma))[:, None]
        along = self._turned(x - alpha * self.mean)
        spread = alpha**2 * self.variance + sigma**2
        noise = self._turned_back(sigma * along / spread)
        sample = self.mean + self._turned_back(alpha * self.variance * along / spread)
        return Prediction(jnp.sum(share * noise, axis=0), jnp.sum(share * sample, axis=0))

    def sample(self, key: Key[Array, ""]) -> tuple[Float[Array, " d"], Int[Array, ""]]:
        """One draw, and the component that it came from."""
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.log_weight)
        noise = jax.random.normal(noise_key, self.mean.shape)
        draws = self.mean + self._turned_back(jnp.sqrt(self.variance) * noise)
        return draws[component], component


class MixtureDenoiser(Denoiser):
    """The exact denoiser of a policy whose chunks are drawn from a Gaussian mixture.

    Attributes:
        mixture: makes the :class:`Mixture` over flat chunks ``[H * D]`` of an observation.
        process: the noise process.
        chunk_shape: ``(H, D)``.
    """

    mixture: Callable[[PyTree], Mixture]
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)

    def encode(self, observation: PyTree) -> Mixture:
        return self.mixture(observation)

    def predict(self, x: Float[Array, "H D"], level: Array, condition: Mixture) -> Prediction:
        alpha, sigma = self.process.coefficients(level)
        found = condition.predict(jnp.ravel(x), alpha, sigma)
        return jax.tree.map(lambda flat: flat.reshape(x.shape), found)
