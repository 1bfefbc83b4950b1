"""Linear combinations of denoisers against closed forms of Gaussian policies."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion import (
    DiscreteVP,
    RectifiedFlow,
)
from steersman.diffusion.combination import Combined, UnderConditions
from steersman.errors import InputError

PROCESS = DiscreteVP.squared_cosine(50)


@settings(max_examples=10, deadline=None)
@given(w=st.floats(0, 1), eta=st.sampled_from([0.0, 1.0]))
def test_equal_gaussians_compose_to_the_gaussian_between(w, eta, gaussian, affine_recursion):
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


def test_shorter_chunks_fill_the_first_rows(gaussian):
    long, short = gaussian(0.2, shape=(3, 1)), gaussian(0.2, shape=(2, 1))
    conditions = (jnp.asarray(1.0), jnp.asarray(-1.0))
    x, level = jnp.zeros((3, 1)), jnp.asarray(20)

    def noise(weights):
        both = Combined((long, short), weights)
        return both.predict(x, level, both.encode(conditions)).noise[:, 0]

    alone = float(long.predict(x, level, long.encode(conditions[0])).noise[2, 0])
    np.testing.assert_allclose(noise([0.5, 0.5]), [0.0, 0.0, alone], atol=1e-6)
    np.testing.assert_allclose(noise([0.0, 1.0]), [-alone, -alone, alone], rtol=1e-6)


def test_conditions_in_one_batch_are_the_combination_one_by_one(gaussian):
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
        (lambda gaussian: Combined((), [1.0]), InputError, "denoisers"),
        (
            lambda gaussian: Combined((gaussian(0.2), gaussian(0.2, RectifiedFlow())), [0.5, 0.5]),
            InputError,
            "different processes",
        ),
        (lambda gaussian: UnderConditions(gaussian(0.2), [1.0, 0.5]), InputError, "sum to 1"),
        (
            lambda gaussian: UnderConditions(gaussian(0.2), [2.0, -1.0]).encode(jnp.zeros(3)),
            InputError,
            "leading axis of 2",
        ),
    ],
)
def test_bad_input_is_told(call, error, text, gaussian):
    with pytest.raises(error, match=text):
        call(gaussian)
