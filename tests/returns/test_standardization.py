import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.returns import standardize

standardize_jit = jax.jit(standardize, static_argnames=("epsilon", "axis"))


def test_by_hand():
    # Mean 4; squared deviations 9, 1, 0, 4, 4 sum to 18.
    got = standardize(jnp.asarray([1.0, 3.0, 4.0, 6.0, 6.0]))
    np.testing.assert_allclose(got, np.array([-3, -1, 0, 2, 2]) / np.sqrt(18 / 5), rtol=1e-6)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1e3), share=st.floats(0.3, 1)
)
def test_moments_of_what_counts_and_invariance_to_units(seed, shift, scale, share):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(8, 5)), rng.uniform(size=(8, 5)) < share
    hypothesis.assume(mask.sum() > 2)
    with jax.enable_x64(True):
        got = np.asarray(standardize_jit(jnp.asarray(x), jnp.asarray(mask)))
        other = standardize_jit(jnp.asarray(shift + scale * np.where(mask, x, np.nan)), jnp.asarray(mask))
    assert abs(got[mask].mean()) < 1e-12
    assert abs(got[mask].std() - 1) < 1e-12
    assert np.all(got[~mask] == 0)
    np.testing.assert_allclose(other, got, atol=1e-8)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-12, -1234.567, 1e6])
@pytest.mark.parametrize("size", [1, 3, 4096])
def test_a_constant_is_centred_and_never_amplified(constant, size):
    for function in (standardize, standardize_jit):
        got = np.asarray(function(jnp.full((size,), constant, jnp.float32)))
        assert np.all(np.isfinite(got))
        assert np.max(np.abs(got)) <= 1e-6 * abs(constant)


def test_rounding_on_a_large_mean_is_not_taken_for_signal():
    # Neighbouring float32 numbers around 1e4 are 1e-3 apart: this is one step of rounding, and only centred.
    x = np.full(64, 1e4, np.float32)
    x[::2] = np.nextafter(np.float32(1e4), np.float32(2e4))
    assert np.max(np.abs(np.asarray(standardize_jit(x)))) < 1e-3
    # The same spread around zero is signal.
    assert np.asarray(standardize_jit(x - np.float32(1e4))).std() == pytest.approx(1.0, rel=1e-5)


def test_epsilon_is_the_deviation_that_counts_as_zero():
    x = jnp.asarray([-1e-3, 1e-3])
    np.testing.assert_allclose(standardize(x, epsilon=0.9e-3), [-1.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(standardize(x, epsilon=1.1e-3), x, rtol=1e-6)


def test_nothing_counted_gives_zeros():
    np.testing.assert_array_equal(standardize(jnp.arange(3.0), jnp.zeros(3, bool)), np.zeros(3))


def test_columns_are_apart_and_the_mask_serves_them_all():
    rng = np.random.default_rng(0)
    x, alive = rng.normal(size=(6, 2, 2)) * np.array([1.0, 100.0]), rng.uniform(size=(6, 2)) < 0.7
    got = standardize(jnp.asarray(x), jnp.asarray(alive), axis=(0, 1))
    for k in range(2):
        np.testing.assert_allclose(got[..., k], standardize(jnp.asarray(x[..., k]), jnp.asarray(alive)), rtol=1e-5)


def test_gradients_are_finite_where_nothing_varies():
    gradient = jax.grad(lambda x: jnp.sum(standardize(x) * jnp.arange(4.0)))(jnp.ones(4))
    np.testing.assert_allclose(gradient, np.arange(4.0) - 1.5, atol=1e-6)


def test_integers_and_half_precision():
    np.testing.assert_allclose(standardize(jnp.asarray([1, 3])), [-1.0, 1.0])
    assert standardize(jnp.asarray([1, 3], jnp.bfloat16)).dtype == jnp.bfloat16


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"^mask has shape"):
        standardize(jnp.zeros((4, 3)), jnp.ones(3, bool))
    with pytest.raises(InputError, match=r"^epsilon is -1.0"):
        standardize(jnp.zeros(4), epsilon=-1.0)
