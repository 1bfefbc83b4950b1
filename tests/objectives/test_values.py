import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from steersman.errors import InputError
from steersman.objectives import clipped_value_error, huber, squared_error
from steersman.objectives.values import expectile_error


def test_squared_error_and_huber_by_hand():
    value, target = np.array([0.0, 3.0, -1.0]), np.array([12.0, 2.0, -1.0])
    np.testing.assert_allclose(squared_error(value, target), [144.0, 1.0, 0.0])
    np.testing.assert_allclose(huber(value, target, 10.0), [10 * (12 - 5), 0.5, 0.0])
    np.testing.assert_allclose(huber(value, target, 12.0), [72.0, 0.5, 0.0])
    np.testing.assert_allclose(huber(value, target, float("inf")), 0.5 * squared_error(value, target))


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.95])
def test_the_least_expectile_error_is_at_scipys_expectile(expectile):
    targets = np.random.default_rng(0).gamma(2.0, size=50)
    found = optimize.minimize_scalar(lambda v: expectile_error(np.full(50, v), targets, expectile).mean())
    assert found.x == pytest.approx(stats.expectile(targets, expectile), abs=1e-5)


def test_expectile_error_by_hand_and_what_it_refuses():
    value, target = np.array([0.0, 3.0]), np.array([2.0, 1.0])
    np.testing.assert_allclose(expectile_error(value, target, 0.7), [0.7 * 4, 0.3 * 4])
    np.testing.assert_allclose(expectile_error(value, target, 0.5), 0.5 * squared_error(value, target))
    for wrong in (0.0, 1.0, -0.5):
        with pytest.raises(InputError, match="expectile is"):
            expectile_error(value, target, wrong)
    with pytest.raises(InputError, match="target has shape"):
        expectile_error(value, target[:1], 0.7)


def test_clipped_value_error_by_hand():
    # V_old = 0, V = 1, target 2, clip 0.2: half squares are 0.5, and 0.5 * 1.8^2 = 1.62 for the value kept at 0.2.
    one, zero, two = np.ones(1), np.zeros(1), np.full(1, 2.0)
    assert clipped_value_error(one, zero, two, 0.2)[0] == pytest.approx(2 * 1.62)
    assert clipped_value_error(one, zero, two, 0.2, functools.partial(huber, delta=10.0))[0] == pytest.approx(1.62)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (1.0, 0.0, 2.0, 0.0),  # it has moved beyond the clip towards the target: no gradient
        (-1.0, 0.0, -2.0, 0.0),  # the same downwards
        (-1.0, 0.0, 2.0, -6.0),  # it has moved beyond the clip away from the target: the plain gradient
        (0.1, 0.0, 2.0, -3.8),  # within the clip: the plain gradient
        (0.0, 0.0, 2.0, -4.0),  # where both errors are equal
    ],
)
def test_gradient_of_the_clipped_error(value, old, target, expected):
    def loss(v):
        return clipped_value_error(v, jnp.full(1, old), jnp.full(1, target), 0.2)[0]

    assert jax.jit(jax.grad(loss))(jnp.full(1, value))[0] == pytest.approx(expected, rel=1e-6)


def test_clipped_error_is_the_larger_one():
    rng = np.random.default_rng(0)
    value, old, target = rng.normal(size=(3, 200))
    bounded = np.clip(value, old - 0.3, old + 0.3)
    expected = np.maximum((value - target) ** 2, (bounded - target) ** 2)
    np.testing.assert_allclose(clipped_value_error(value, old, target, 0.3), expected, rtol=1e-12)


def test_a_wide_clip_changes_nothing():
    rng = np.random.default_rng(0)
    value, old, target = rng.normal(size=(3, 20))
    np.testing.assert_array_equal(clipped_value_error(value, old, target, float("inf")), squared_error(value, target))
    assert np.all(clipped_value_error(value, old, target, 0.1) >= squared_error(value, target))


def test_bad_input_is_named():
    row = np.zeros(4)
    for call in (squared_error, huber, lambda v, t: clipped_value_error(v, row, t, 0.2)):
        with pytest.raises(InputError, match=r"^target has shape \(4, 1\)"):
            call(row, np.zeros((4, 1)))
    with pytest.raises(InputError, match=r"^old_value has shape"):
        clipped_value_error(row, np.zeros(1), row, 0.2)
    with pytest.raises(InputError, match=r"^clip is 0.0"):
        clipped_value_error(row, row, row, 0.0)
    with pytest.raises(InputError, match=r"^delta is nan"):
        huber(row, row, float("nan"))
