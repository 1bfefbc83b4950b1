"""Exact denoisers of Gaussians, and what sampling from compositions of them must give."""

import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import DDPM, ChunkGenerator, DiscreteVP, Mixture, MixtureDenoiser

PROCESS = DiscreteVP.squared_cosine(50)


def _gaussian(std, process=PROCESS, shape=(1, 1)):
    size = shape[0] * shape[1]

    def mixture(mean):
        return Mixture(jnp.zeros(1), jnp.full((1, size), mean), jnp.full((1, size), std**2))

    return MixtureDenoiser(mixture, process, shape)


def _generator(std=0.2, sampler=None, process=PROCESS, shape=(1, 1)):
    return ChunkGenerator(_gaussian(std, process, shape), DDPM(limit=None) if sampler is None else sampler)


def _affine_recursion(means, stds, weights, eta):
    f = [np.cos((k / 50 + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(51)]
    signal = np.cumprod([1 - min(1 - f[k + 1] / f[k], 0.999) for k in range(50)])
    m, v = 0.0, 1.0
    for k in reversed(range(50)):
        here, before = signal[k], signal[k - 1] if k else 1.0
        slopes = [np.sqrt(1 - here) / (here * s**2 + 1 - here) for s in stds]
        slope = np.dot(weights, slopes)
        offset = -np.sqrt(here) * np.dot(weights, np.multiply(slopes, means))
        s2 = eta**2 * (1 - before) / (1 - here) * (1 - here / before)
        of_x = np.sqrt(before / here) * (1 - slope * np.sqrt(1 - here)) + np.sqrt(1 - before - s2) * slope
        m = of_x * m + offset * (np.sqrt(1 - before - s2) - np.sqrt(before / here) * np.sqrt(1 - here))
        v = of_x**2 * v + s2
    return m, np.sqrt(v)


@pytest.fixture(scope="session")
def gaussian():
    """The exact denoiser of N(observation, std^2), on 50 levels unless another process is given."""
    return _gaussian


@pytest.fixture(scope="session")
def generator():
    """Chunks of that denoiser, drawn by DDPM unless another sampler is given."""
    return _generator


@pytest.fixture(scope="session")
def affine_recursion():
    """Mean and deviation of a composition's chain on those levels, in float64, straight from the definitions."""
    return _affine_recursion
