"""Averages of parameters against explicit weighted sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError, InputTypeError
from steersman.training.averaging import MovingAverage, decay_of


def run(average, iterates):
    state = average.init(jax.tree.map(lambda leaf: leaf[0], iterates))

    def step(state, tree):
        state = average.update(state, tree)
        return state, state

    return jax.lax.scan(step, state, jax.tree.map(lambda leaf: leaf[1:], iterates))[1]


@settings(max_examples=15, deadline=None)
@given(decay=st.floats(0.0, 0.999), seed=st.integers(0, 1000))
def test_the_corrected_average_is_the_normalized_weighted_sum(decay, seed):
    x = np.random.default_rng(seed).normal(size=(12, 3))
    found = run(MovingAverage(decay), {"w": jnp.asarray(x, jnp.float32)})
    for n in range(1, 12):
        weights = decay ** np.arange(n, -1, -1.0)
        np.testing.assert_allclose(found.value["w"][n - 1], weights @ x[: n + 1] / weights.sum(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.weight[n - 1], weights.sum(), rtol=1e-5)


def test_without_decay_it_is_the_newest_and_with_almost_none_the_plain_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
    np.testing.assert_array_equal(run(MovingAverage(0.0), x).value, x[1:])
    means = np.cumsum(x, axis=0) / np.arange(1, 10)[:, None]
    np.testing.assert_allclose(run(MovingAverage(1 - 1e-6), x).value, means[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias_corrected", [True, False])
@pytest.mark.parametrize("centre", [1.0, 8.0, 32.0])
def test_the_lag_behind_a_ramp_is_the_centre_of_mass(centre, bias_corrected):
    average = MovingAverage(decay_of(centre), bias_corrected)
    assert float(average.centre_of_mass) == pytest.approx(centre, rel=1e-5)
    ramp = jnp.arange(800.0)
    np.testing.assert_allclose(ramp[-1] - run(average, ramp).value[-1], centre, rtol=1e-3)


def test_the_uncorrected_average_is_polyaks():
    x = np.random.default_rng(1).normal(size=(30, 2))
    target, expected = x[0], []
    for k in range(1, 30):
        target = 0.95 * target + 0.05 * x[k]
        expected.append(target)
    found = run(MovingAverage(0.95, bias_corrected=False), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found.value, expected, rtol=1e-4, atol=1e-5)
    # As if the first tree had been seen forever: the weight is where the recursion rests.
    np.testing.assert_allclose(found.weight, 20.0, rtol=1e-4)


def test_only_floats_are_averaged():
    def tree(x, count, key):
        half = jnp.asarray(x, jnp.bfloat16)
        return {
            "x": jnp.asarray(x),
            "half": half,
            "count": jnp.asarray(count),
            "key": jax.random.key(key),
            "none": None,
        }

    average = MovingAverage(0.5)
    found = average.update(average.init(tree(0.0, 1, 1)), tree(3.0, 7, 2)).value
    assert float(found["x"]) == pytest.approx(2.0)
    assert found["half"].dtype == jnp.bfloat16
    assert int(found["count"]) == 7
    assert found["key"] == jax.random.key(2)


def test_reset_forgets():
    average = MovingAverage(0.9)
    state = average.update(average.init(jnp.asarray(5.0)), jnp.asarray(1.0))
    state = average.init(jnp.asarray(1.0))
    assert float(state.weight) == 1.0
    assert float(average.update(state, jnp.asarray(1.0)).value) == pytest.approx(1.0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1 - 1e-12, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(InputError, match="decay"):
        MovingAverage(decay)


def test_bad_arguments():
    with pytest.raises(InputTypeError, match="decay"):
        MovingAverage("slow")
    with pytest.raises(InputError, match="centre_of_mass"):
        decay_of(-1.0)
