import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.objectives import aggregate, mean, sequence_mean, sequence_sum_mean, token_mean

# Two sequences, of one token and of three, in a batch that is four tokens wide.
LOSS = np.array([[6.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 9.0]])
MASK = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)


@pytest.mark.parametrize("mask", [MASK, MASK.astype(float), MASK.astype(int)], ids=["bool", "float", "int"])
def test_by_hand(mask):
    assert mean(LOSS, mask) == pytest.approx(12 / 4)
    assert token_mean(LOSS, mask) == pytest.approx(12 / 4)
    assert token_mean(LOSS, mask, budget=8) == pytest.approx(12 / 8)
    assert sequence_mean(LOSS, mask) == pytest.approx((6 + 2) / 2)
    assert sequence_sum_mean(LOSS, mask) == pytest.approx((6 + 6) / 2)
    assert sequence_sum_mean(LOSS, mask, budget=16) == pytest.approx((6 + 6) / 2 / 16)
    assert mean(LOSS) == pytest.approx(48 / 8)


def test_modes_by_hand():
    assert aggregate(LOSS, MASK, "mean") == pytest.approx(3)
    assert aggregate(LOSS, MASK, "bnpo") == pytest.approx(3)
    assert aggregate(LOSS, MASK, "dapo") == pytest.approx(3)
    assert aggregate(LOSS, MASK, "dapo", budget=6.0) == pytest.approx(2)
    assert aggregate(LOSS, MASK, "grpo") == pytest.approx(4)
    assert aggregate(LOSS, MASK, "dr_grpo", budget=16) == pytest.approx(6 / 16)
    # Weights multiply losses and enter no divisor.
    assert aggregate(LOSS, MASK, "dapo", np.array([2.0, 1.0])) == pytest.approx(18 / 4)
    assert aggregate(LOSS, MASK, "grpo", np.array([[2.0], [1.0]])) == pytest.approx((12 + 2) / 2)
    assert aggregate(LOSS, MASK, "dr_grpo", np.where(LOSS == 3, 2.0, 1.0), budget=1) == pytest.approx(15 / 2)
    assert aggregate(LOSS[:, 0], None, "mean", np.array([2.0, 1.0])) == pytest.approx(13 / 2)


def test_length_weights_of_a_constant_sum_are_reachable():
    # Delta-L: sum_i w_i S_i / M with w_i proportional to length^-alpha, as weights 2 w_i of Dr. GRPO's mean.
    length, sums = MASK.sum(1), (LOSS * MASK).sum(1)
    weight = length**-0.75 / np.sum(length**-0.75)
    expected = np.sum(weight * sums) / 32
    assert aggregate(LOSS, MASK, "dr_grpo", 2 * weight, budget=32) == pytest.approx(expected)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**31), extra=st.integers(1, 5))
def test_padding_changes_nothing(seed, extra):
    rng = np.random.default_rng(seed)
    loss, mask = rng.normal(size=(4, 5)), rng.uniform(size=(4, 5)) < 0.6
    wide = np.concatenate([loss, np.full((4, extra), np.nan)], axis=1), np.pad(mask, ((0, 0), (0, extra)))
    for mode, budget in (("mean", None), ("grpo", None), ("bnpo", None), ("dapo", 7.0), ("dr_grpo", 9.0)):
        expected = aggregate(loss, mask, mode, budget=budget)
        np.testing.assert_allclose(aggregate(*wide, mode, budget=budget), expected, rtol=1e-12, atol=1e-15)
    # Rows of padding alone are left out of means of means, and are zeros to a constant divisor.
    tall = np.concatenate([loss, np.full((extra, 5), np.nan)]), np.pad(mask, ((0, extra), (0, 0)))
    np.testing.assert_allclose(sequence_mean(*tall), sequence_mean(loss, mask), rtol=1e-12, atol=1e-15)
    shrunk = sequence_sum_mean(loss, mask) * 4 / (4 + extra)
    np.testing.assert_allclose(sequence_sum_mean(*tall), shrunk, rtol=1e-12, atol=1e-15)


def test_modes_are_one_where_lengths_are_equal():
    loss = np.random.default_rng(0).normal(size=(3, 5))
    everything = [aggregate(loss, None, mode) for mode in ("mean", "grpo", "bnpo", "dapo")]
    everything.append(aggregate(loss, None, "dr_grpo", budget=5))
    np.testing.assert_allclose(everything, loss.mean(), rtol=1e-12)


def test_parts_of_a_batch_add_up():
    total = aggregate(LOSS, MASK, "dapo")
    parts = [aggregate(LOSS[i : i + 1], MASK[i : i + 1], "dapo", budget=float(MASK.sum())) for i in range(2)]
    assert sum(parts) == pytest.approx(total)


@pytest.mark.parametrize("mode", ["mean", "grpo", "bnpo", "dapo", "dr_grpo"])
def test_nothing_to_average_is_zero_with_zero_gradient(mode):
    budget = 4.0 if mode == "dr_grpo" else None
    loss, nothing = jnp.asarray(LOSS), jnp.zeros(LOSS.shape, bool)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: aggregate(x, nothing, mode, budget=budget)))(loss)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(LOSS))
    assert aggregate(np.zeros((0, 3)), None, mode, budget=budget) == 0.0


def test_what_is_masked_may_be_anything():
    spoiled = jnp.where(jnp.asarray(MASK), jnp.asarray(LOSS), jnp.nan)
    function = jax.jit(jax.value_and_grad(aggregate), static_argnums=2)
    for mode in ("mean", "grpo", "bnpo", "dapo"):
        value, gradient = function(spoiled, jnp.asarray(MASK), mode)
        assert value == pytest.approx(aggregate(LOSS, MASK, mode))
        assert np.all(np.isfinite(gradient))
    weights = jnp.asarray([1.0, 2.0])
    assert np.isfinite(aggregate(spoiled, jnp.asarray(MASK), "grpo", weights))


def test_bad_input_is_named():
    for function in (mean, token_mean, sequence_mean, sequence_sum_mean):
        with pytest.raises(InputError, match=r"^mask has shape \(2, 1\)"):
            function(LOSS, MASK[:, :1])
    for function in (token_mean, sequence_mean, sequence_sum_mean):
        with pytest.raises((InputError, TypeError), match="loss"):
            function(np.zeros(()))
    with pytest.raises(InputError, match=r"^Unknown mode 'dr_gpro': did you mean 'dr_grpo'"):
        aggregate(LOSS, MASK, "dr_gpro")
    with pytest.raises(InputError, match=r"^budget is None"):
        aggregate(LOSS, MASK, "dr_grpo")
    with pytest.raises(InputError, match=r"^budget is 3.0"):
        aggregate(LOSS, MASK, "grpo", budget=3.0)
    with pytest.raises((InputError, TypeError), match=r"budget"):
        aggregate(LOSS, MASK, "dapo", budget=np.ones((2, 4)))
    for bad in (0.0, float("nan")):
        with pytest.raises(InputError, match=r"^budget is"):
            aggregate(LOSS, MASK, "dr_grpo", budget=bad)
    with pytest.raises(InputError, match=r"^weights has shape \(4,\)"):
        aggregate(LOSS, MASK, "grpo", np.ones(4))
