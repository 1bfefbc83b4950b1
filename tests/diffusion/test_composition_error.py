"""Squared errors of combinations against closed forms, a grid and Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion import (
    DiscreteVP,
    Mixture,
    MixtureDenoiser,
)
from steersman.diffusion.combination import Combined
from steersman.diffusion.composition_error import best_weights, endpoint_error_bound, error_power, error_products
from steersman.diffusion.weight_search import simplex
from steersman.errors import InputError

PROCESS = DiscreteVP.squared_cosine(50)


def gaussian(std, process=PROCESS, shape=(1, 1)):
    """The exact denoiser of N(observation, std^2)."""
    size = shape[0] * shape[1]

    def mixture(mean):
        return Mixture(jnp.zeros(1), jnp.full((1, size), mean), jnp.full((1, size), std**2))

    return MixtureDenoiser(mixture, process, shape)


def test_error_power_is_least_where_the_closed_form_says():
    rng = np.random.default_rng(0)
    errors = rng.normal(size=(4000, 2)) @ np.array([[1.0, 0.4], [0.0, 0.7]])
    products = errors.T @ errors / len(errors)
    grid = np.linspace(0, 1, 101)
    direct = [np.mean((w * errors[:, 0] + (1 - w) * errors[:, 1]) ** 2) for w in grid]
    np.testing.assert_allclose(error_power(products, np.stack([grid, 1 - grid], axis=1)), direct, rtol=1e-9)
    assert abs(best_weights(products)[0] - grid[int(np.argmin(direct))]) <= 0.01
    closed = (products[1, 1] - products[0, 1]) / (products[0, 0] - 2 * products[0, 1] + products[1, 1])
    np.testing.assert_allclose(best_weights(products)[0], np.clip(closed, 0, 1), rtol=1e-9)
    equal = np.eye(2) * 0.6
    np.testing.assert_allclose(best_weights(equal), [0.5, 0.5])
    np.testing.assert_allclose(error_power(equal, best_weights(equal)), 0.3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_best_weights_of_three_beat_the_lattice(seed):
    factor = np.random.default_rng(seed).normal(size=(3, 3))
    products = factor @ factor.T
    best = best_weights(products)
    np.testing.assert_allclose(best.sum(), 1.0)
    assert best.min() >= 0.0
    assert error_power(products, best) <= error_power(products, simplex(3, 20)).min() + 1e-12


def test_error_products_need_no_truth_for_the_best_weights():
    """Parents that are biased by +b and -2b: w' G w is least at (2/3, 1/3), with and without the truth."""
    both = Combined((gaussian(0.5), gaussian(0.5)), [0.5, 0.5])
    rng = np.random.default_rng(1)
    clean = jnp.asarray(0.5 * rng.normal(size=(20_000, 1, 1)), jnp.float32)
    seen = (jnp.full(20_000, 0.4), jnp.full(20_000, -0.8))
    drawn = error_products(both, seen, clean, jax.random.key(0))
    exact = error_products(
        both, seen, clean, jax.random.key(0), truth=gaussian(0.5), truth_observation=jnp.zeros(20_000)
    )
    np.testing.assert_allclose(best_weights(exact), [2 / 3, 1 / 3], atol=1e-3)
    np.testing.assert_allclose(best_weights(drawn), [2 / 3, 1 / 3], atol=0.05)


def test_endpoint_bound_is_the_formula_for_constants():
    """L = 1, S = 2, kappa = 3 on [0, 1]: sqrt(4 (e^2 - 1) / 2) sqrt(9)."""
    times = np.linspace(0, 1, 2001)
    ones = np.ones_like(times)
    bound = endpoint_error_bound(times, ones, 2 * ones, 3 * ones)
    np.testing.assert_allclose(bound, 3 * np.sqrt(2 * (np.e**2 - 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: best_weights(np.full((2, 2), np.nan)), InputError, "products"),
        (lambda: endpoint_error_bound([1.0, 0.0], [0, 0], [1, 1], [1, 1]), InputError, "times"),
    ],
)
def test_bad_input_is_told(call, error, text):
    with pytest.raises(error, match=text):
        call()
