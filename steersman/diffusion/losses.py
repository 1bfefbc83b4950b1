"""Losses that denoisers are trained on, one element at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.denoiser import NetworkDenoiser
from steersman.diffusion.predictions import check_prediction, write_prediction


def prediction_errors(
    denoiser: NetworkDenoiser,
    clean: Float[Array, "H D"],
    condition: PyTree,
    level: Array,
    noise: Float[Array, "H D"],
    *,
    supervise: str | None = None,
) -> Float[Array, "H D"]:
    """Squared error of every element of the prediction at ``x = alpha a + sigma e``.

    Denoising score matching (Vincent, 2011) where the network predicts noise, flow matching (Lipman et al., 2023,
    arXiv:2210.02747) where it predicts a flow; the others weight the levels differently.

    Args:
        denoiser: the network with its process.
        clean: the chunk ``a``.
        condition: the encoded observation.
        level: a level.
        noise: standard normal ``e``.
        supervise: which prediction is compared with its truth; the network's own kind where None. Another kind is read
            off the network's output first, which weights its error by the level.
    """
    alpha, sigma = denoiser.process.coefficients(level)
    x = alpha * clean + sigma * noise
    kind = denoiser.prediction if supervise is None else supervise
    if kind == denoiser.prediction:
        return (denoiser.output(x, level, condition) - write_prediction(kind, clean, noise, alpha, sigma)) ** 2
    check_prediction(kind)
    found = denoiser.predict(x, level, condition)
    predicted = write_prediction(kind, found.sample, found.noise, alpha, sigma)
    return (predicted - write_prediction(kind, clean, noise, alpha, sigma)) ** 2


def denoising_loss(
    denoiser: NetworkDenoiser, observation: PyTree, clean: Float[Array, "B H D"], key: Key[Array, ""]
) -> Float[Array, " B"]:
    """Mean squared error of each chunk at a level of its own, drawn as the process draws them.

    Args:
        denoiser: the network, encoder included.
        observation: observations with a leading batch axis.
        clean: their chunks.
        key: randomness of levels and noise, and of an encoder that draws while it learns.
    """
    level_key, noise_key = jax.random.split(key)
    levels = denoiser.process.sample_level(level_key, clean.shape[:1])
    noises = jax.random.normal(noise_key, clean.shape, clean.dtype)

    seen_keys = jax.random.split(jax.random.fold_in(key, 0), clean.shape[0])

    def one(observation: PyTree, chunk: Array, level: Array, noise: Array, key: Array) -> Array:
        return jnp.mean(prediction_errors(denoiser, chunk, denoiser.encode(observation, key), level, noise))

    return jax.vmap(one)(observation, clean, levels, noises, seen_keys)
