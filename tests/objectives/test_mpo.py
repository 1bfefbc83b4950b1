import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError
from steersman.objectives import temperature_loss, temperature_weights, top_half

ADVANTAGE = np.array([0.3, -1.2, 2.0, 0.7, -0.1, 1.1])


def divergence_from_uniform(weights, count):
    positive = weights[weights > 0]
    return np.sum(positive * np.log(positive * count))


@pytest.mark.parametrize(
    ("advantage", "kept"),
    [
        ([0.3, -1.2, 2.0, 0.7, -0.1, 1.1], [False, False, True, True, False, True]),
        ([1.0, 2.0, 3.0], [False, True, True]),
        ([5.0], [True]),
        ([2.0, 2.0, 2.0, 2.0], [True] * 4),
        ([[0.0, 1.0], [1.0, -3.0]], [[False, True], [True, False]]),
        ([np.nan, 0.0, 1.0], [True, False, True]),
    ],
)
def test_the_half_at_or_above_the_median(advantage, kept):
    np.testing.assert_array_equal(top_half(np.asarray(advantage)), kept)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=15), st.floats(0.05, 20.0))
def test_weights_are_a_softmax_of_the_half(values, temperature):
    advantage = np.asarray(values)
    kept = top_half(advantage)
    assert kept.sum() >= (len(values) + 1) // 2
    assert np.all(advantage[kept] >= np.median(advantage))
    weights = temperature_weights(advantage, temperature, kept)
    assert np.all(weights[~kept] == 0)
    expected = np.exp((advantage[kept] - advantage[kept].max()) / temperature)
    np.testing.assert_allclose(weights[kept], expected / expected.sum(), rtol=1e-10)


def test_limits_of_the_temperature():
    """A high temperature copies the better half, a low one its best sample."""
    kept = top_half(ADVANTAGE)
    np.testing.assert_allclose(temperature_weights(ADVANTAGE, 1e9, kept), kept / 3.0, atol=1e-8)
    np.testing.assert_array_equal(temperature_weights(ADVANTAGE, 1e-8, kept), ADVANTAGE == 2.0)
    np.testing.assert_allclose(temperature_weights(np.full(4, 3.0), 0.1), 0.25)


def test_huge_advantages_do_not_overflow():
    advantage = jnp.asarray([1e6, 1e6 - 1.0, -1e6, 0.0])
    kept = top_half(advantage)
    weights = jax.jit(temperature_weights)(advantage, 1.0, kept)
    np.testing.assert_allclose(weights, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0, 0], rtol=1e-5)
    value, slope = jax.value_and_grad(temperature_loss, argnums=1)(advantage, 1.0, 0.01, kept)
    assert np.isfinite(value)
    assert np.isfinite(slope)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.005, 0.5))
def test_at_the_minimum_the_weights_are_at_the_divergence_allowed(seed, epsilon):
    advantage = np.random.default_rng(seed).normal(size=64)
    kept = top_half(advantage)
    loss = lambda log_eta: float(temperature_loss(advantage, float(np.exp(log_eta)), epsilon, kept))  # noqa: E731
    best = scipy.optimize.minimize_scalar(loss, bounds=(-6.0, 8.0), method="bounded", options={"xatol": 1e-9})
    weights = temperature_weights(advantage, float(np.exp(best.x)), kept)
    assert divergence_from_uniform(weights, kept.sum()) == pytest.approx(epsilon, rel=1e-3)


def test_loss_is_convex_and_its_slope_is_what_is_left_of_the_divergence():
    temperatures = np.linspace(0.1, 5.0, 60)
    kept = top_half(ADVANTAGE)
    values = np.array([temperature_loss(ADVANTAGE, float(t), 0.2, kept) for t in temperatures])
    assert np.all(np.diff(values, 2) > 0)
    with jax.enable_x64(True):
        slope = jax.grad(temperature_loss, argnums=1)(jnp.asarray(ADVANTAGE), 0.8, 0.2, jnp.asarray(kept))
    weights = temperature_weights(ADVANTAGE, 0.8, kept)
    assert float(slope) == pytest.approx(0.2 - divergence_from_uniform(weights, 3), rel=1e-10)
    # By hand: 0.8 * 0.2 + 0.8 log((e^(2 / 0.8) + e^(0.7 / 0.8) + e^(1.1 / 0.8)) / 3)
    by_hand = 0.16 + 0.8 * np.log((np.exp(2.5) + np.exp(0.875) + np.exp(1.375)) / 3)
    assert float(temperature_loss(ADVANTAGE, 0.8, 0.2, kept)) == pytest.approx(by_hand, rel=1e-12)


def test_what_does_not_count_may_hold_anything_and_nothing_is_no_error():
    advantage = np.array([1.0, np.nan, 2.0, np.inf])
    counts = np.array([True, False, True, False])
    expected = temperature_weights(np.array([1.0, 2.0]), 0.5)
    np.testing.assert_allclose(temperature_weights(advantage, 0.5, counts)[counts], expected)
    same = temperature_loss(np.array([1.0, 2.0]), 0.5, 0.1)
    np.testing.assert_allclose(temperature_loss(advantage, 0.5, 0.1, counts), same)
    nothing = np.zeros(4, bool)
    np.testing.assert_array_equal(temperature_weights(advantage, 0.5, nothing), 0.0)
    np.testing.assert_allclose(temperature_loss(advantage, 0.5, 0.1, nothing), 0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_half(np.zeros((0, 3))), r"advantage has shape \(0, 3\)"),
        (lambda: temperature_weights(ADVANTAGE, 0.0), "temperature is 0"),
        (lambda: temperature_weights(ADVANTAGE, -1.0), "temperature is -1"),
        (lambda: temperature_weights(ADVANTAGE, 1.0, np.ones(5, bool)), r"included has shape \(5,\)"),
        (lambda: temperature_loss(ADVANTAGE, float("nan"), 0.1), "temperature is nan"),
        (lambda: temperature_loss(ADVANTAGE, 1.0, 0.0), "epsilon is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
