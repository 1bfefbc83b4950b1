"""Linear combinations of denoisers against closed forms of Gaussian policies."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion import (
    DiscreteVP,
    Mixture,
    MixtureDenoiser,
    RectifiedFlow,
)
from steersman.diffusion.combination import Combined, UnderConditions
from steersman.errors import InputError

PROCESS = DiscreteVP.squared_cosine(50)


def gaussian(std, process=PROCESS, shape=(1, 1)):
    """The exact denoiser of N(observation, std^2)."""
    size = shape[0] * shape[1]

    def mixture(mean):
        return Mixture(jnp.zeros(1), jnp.full((1, size), mean), jnp.full((1, size), std**2))

    return MixtureDenoiser(mixture, process, shape)


def affine_recursion(means, stds, weights, eta):
    """Mean and deviation of the composed chain, in float64, straight from the definitions."""
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


@settings(max_examples=10, deadline=None)
@given(w=st.floats(0, 1), eta=st.sampled_from([0.0, 1.0]))
def test_equal_gaussians_compose_to_the_gaussian_between(w, eta):
    """Noise predictions of equal slope: the composition's is that of N(sum w m, s^2), whatever the sampler."""
    m, s = affine_recursion((0.5, -0.3), (0.2, 0.2), (w, 1 - w), eta)
    truth = affine_recursion((w * 0.5 - (1 - w) * 0.3,), (0.2,), (1.0,), eta)
    np.testing.assert_allclose((m, s), truth, atol=1e-12)
    denoiser = Combined((gaussian(0.2), gaussian(0.2)), [w, 1 - w])
    between = gaussian(0.2)
    x, level = jnp.full((1, 1), 0.7), jnp.asarray(30)
    mean = jnp.asarray(w * 0.5 - (1 - w) * 0.3)
    found = denoiser.predict(x, level, denoiser.encode((jnp.asarray(0.5), jnp.asarray(-0.3))))
    want = between.predict(x, level, between.encode(mean))
    np.testing.assert_allclose([found.noise, found.sample], [want.noise, want.sample], atol=2e-5)


def test_shorter_chunks_fill_the_first_rows():
    long, short = gaussian(0.2, shape=(3, 1)), gaussian(0.2, shape=(2, 1))
    conditions = (jnp.asarray(1.0), jnp.asarray(-1.0))
    x, level = jnp.zeros((3, 1)), jnp.asarray(20)

    def noise(weights):
        both = Combined((long, short), weights)
        return both.predict(x, level, both.encode(conditions)).noise[:, 0]

    alone = float(long.predict(x, level, long.encode(conditions[0])).noise[2, 0])
    np.testing.assert_allclose(noise([0.5, 0.5]), [0.0, 0.0, alone], atol=1e-6)
    np.testing.assert_allclose(noise([0.0, 1.0]), [-alone, -alone, alone], rtol=1e-6)


def test_conditions_in_one_batch_are_the_combination_one_by_one():
    """Guidance weights: 3 e(x, c) - 2 e(x, c0)."""
    denoiser = gaussian(0.2)
    batched, single = UnderConditions(denoiser, [3.0, -2.0]), Combined((denoiser, denoiser), [3.0, -2.0])
    x, level = jnp.full((1, 1), 0.3), jnp.asarray(20)
    alpha, sigma = (float(c) for c in PROCESS.coefficients(level))
    found = batched.predict(x, level, batched.encode(jnp.asarray([0.4, 0.1])))
    other = single.predict(x, level, single.encode((jnp.asarray(0.4), jnp.asarray(0.1))))
    truth = sigma * (0.3 - alpha * (3 * 0.4 - 2 * 0.1)) / (alpha**2 * 0.04 + sigma**2)
    np.testing.assert_allclose([found.noise[0, 0], other.noise[0, 0]], truth, rtol=1e-4)
    np.testing.assert_allclose(alpha * found.sample + sigma * found.noise, x, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Combined((), [1.0]), InputError, "denoisers"),
        (
            lambda: Combined((gaussian(0.2), gaussian(0.2, RectifiedFlow())), [0.5, 0.5]),
            InputError,
            "different processes",
        ),
        (lambda: UnderConditions(gaussian(0.2), [1.0, 0.5]), InputError, "sum to 1"),
        (
            lambda: UnderConditions(gaussian(0.2), [2.0, -1.0]).encode(jnp.zeros(3)),
            InputError,
            "leading axis of 2",
        ),
    ],
)
def test_bad_input_is_told(call, error, text):
    with pytest.raises(error, match=text):
        call()
