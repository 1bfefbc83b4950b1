import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from steersman.errors import InputError
from steersman.objectives import clamped_entropy, entropy, k1_kl, k2_kl, k3_kl

sum_gradient = jax.jit(jax.grad(lambda logits, allowed=None: jnp.sum(entropy(logits, allowed))))
clamped_gradient = jax.jit(jax.grad(lambda logits: clamped_entropy(logits, 0.4)))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 1e3), shift=st.floats(-1e3, 1e3))
def test_entropy_is_scipys(seed, scale, shift):
    logits = scale * np.random.default_rng(seed).normal(size=(3, 7)) + shift
    expected = scipy.stats.entropy(scipy.special.softmax(logits, axis=-1), axis=-1)
    np.testing.assert_allclose(entropy(logits), expected, rtol=1e-9, atol=1e-12)


def test_ruled_out_choices_do_not_exist():
    logits = np.array([[1.0, -np.inf, 0.5, 2.0]])
    expected = entropy(logits[:, [0, 2, 3]])
    np.testing.assert_allclose(entropy(logits), expected, rtol=1e-14)
    allowed = np.array([[True, False, True, True]])
    for anything in (0.0, 1e9, np.nan, np.inf):
        filled = np.where(allowed, logits, anything)
        np.testing.assert_allclose(entropy(filled, allowed), expected, rtol=1e-14)
        gradient = sum_gradient(jnp.asarray(filled), jnp.asarray(allowed))
        assert np.all(np.isfinite(gradient))
        assert gradient[0, 1] == 0.0


def test_entropy_of_one_choice_and_of_none_is_zero_with_zero_gradient():
    logits = jnp.asarray([[3.0, -jnp.inf], [-jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(entropy(logits), [0.0, 0.0])
    np.testing.assert_array_equal(sum_gradient(logits), np.zeros((2, 2)))


def test_a_nan_logit_shows():
    assert np.isnan(entropy(np.array([0.0, np.nan])))


def test_entropy_gradient_is_the_closed_form():
    logits = np.random.default_rng(0).normal(size=6)
    pi = scipy.special.softmax(logits)
    with jax.enable_x64(True):
        gradient = sum_gradient(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, -pi * (np.log(pi) + scipy.stats.entropy(pi)), rtol=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.19, 0.2, 0.5, 0.99])
def test_clamped_entropy_is_that_of_the_kept_logits(share):
    logits = np.random.default_rng(0).normal(size=(4, 10))
    kept = 10 - int(np.floor(share * 10))
    np.testing.assert_allclose(clamped_entropy(logits, share), entropy(np.sort(logits)[:, -kept:]), rtol=1e-12)


def test_clamped_entropy_has_the_gradient_of_the_paper():
    logits = np.array([0.3, -1.0, 2.0, 0.9, -0.5])
    kept = np.array([True, False, True, True, False])
    pi = np.where(kept, np.exp(logits), 0.0)
    pi /= pi.sum()
    with jax.enable_x64(True):
        gradient = clamped_gradient(jnp.asarray(logits))
    value = -np.sum(pi[kept] * np.log(pi[kept]))
    expected = np.zeros(5)
    expected[kept] = -pi[kept] * (np.log(pi[kept]) + value)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


def test_clamped_entropy_removes_equal_logits_in_index_order():
    gradient = clamped_gradient(jnp.asarray([1.0, 0.0, 1.0, 1.0, 3.0]))
    # Two of five go: the 0, and the first of the three ones.
    np.testing.assert_array_equal(np.asarray(gradient) != 0, [False, False, True, True, True])


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(1)
    return rng.normal(size=5), rng.normal(size=5)


def test_divergence_estimates_have_the_right_expectation_and_gradient(pair):
    logits, reference = pair
    p, q = scipy.special.softmax(logits), scipy.special.softmax(reference)
    log_p, log_q = np.log(p), np.log(q)
    divergence = p @ (log_p - log_q)
    assert p @ k1_kl(log_p, log_q) == pytest.approx(divergence, rel=1e-12)
    assert p @ k3_kl(log_p, log_q) == pytest.approx(divergence, rel=1e-12)
    assert p @ k2_kl(log_p, log_q) == pytest.approx(0.5 * p @ (log_p - log_q) ** 2, rel=1e-12)
    assert np.all(k2_kl(log_p, log_q) >= 0)
    assert np.all(k3_kl(log_p, log_q) >= 0)

    def expected_gradient(estimate):
        # The samples are fixed, as in a loss: only the integrand is differentiated.
        return jax.jit(jax.grad(lambda z: jnp.asarray(p) @ estimate(jax.nn.log_softmax(z), jnp.asarray(log_q))))

    with jax.enable_x64(True):
        z = jnp.asarray(logits)
        k1, k2, k3 = (expected_gradient(estimate)(z) for estimate in (k1_kl, k2_kl, k3_kl))
    np.testing.assert_allclose(k1, np.zeros(5), atol=1e-12)
    np.testing.assert_allclose(k2, p * (log_p - log_q - divergence), rtol=1e-9)  # of KL(p || q)
    np.testing.assert_allclose(k3, p - q, rtol=1e-9)  # of KL(q || p)


def test_bad_input_is_named():
    for estimate in (k1_kl, k2_kl, k3_kl):
        with pytest.raises(InputError, match=r"^reference_log_prob has shape \(4, 1\)"):
            estimate(np.zeros(4), np.zeros((4, 1)))
    with pytest.raises(InputError, match=r"^allowed has shape"):
        entropy(np.zeros((2, 3)), np.ones(3, bool))
    with pytest.raises((InputError, TypeError), match="logits"):
        entropy(np.zeros(()))
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"^share is"):
            clamped_entropy(np.zeros(4), share)
