import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control import lqr
from steersman.control.linear_policy import evaluate_linear_policy
from steersman.errors import InputError

A = np.array([[1.0, 0.1], [0.0, 1.0]])
B = np.array([[0.0], [0.1]])
Q, R = np.diag([1.0, 0.1]), np.array([[0.01]])
K = np.array([[1.0, 1.2]])


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        yield evaluate_linear_policy(A, B, Q, R, K, action_covariance=[[0.25]], noise=1e-3 * np.eye(2), discount=0.95)


def test_value_is_the_sum_of_expected_rewards(exact):
    """Mean and covariance of the state, propagated for 600 steps."""
    x = np.array([0.7, -1.1])
    mean, spread, total, loop = x.copy(), np.zeros((2, 2)), 0.0, A - B @ K
    for t in range(600):
        moment = np.outer(mean, mean) + spread
        total -= 0.95**t * (np.sum((Q + K.T @ R @ K) * moment) + 0.01 * 0.25)
        mean, spread = loop @ mean, loop @ spread @ loop.T + 1e-3 * np.eye(2) + 0.25 * B @ B.T
    assert float(exact.value(jnp.asarray(x))) == pytest.approx(total, rel=1e-9)


def test_values_are_means_of_action_values(exact):
    """Gauss-Hermite quadrature is exact for quadratics; the gradient is that of the same sum, by the score."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    x = jnp.asarray([[0.3, 0.9], [-1.0, 0.4]])
    u = -x @ K.T + 0.5 * nodes
    q_value = exact.q_value(x[:, None], u[..., None])
    np.testing.assert_allclose(q_value @ weights, exact.value(x), rtol=1e-10)
    score = -(nodes / 0.5)[None, :, None] * np.asarray(x)[:, None, :]
    found = np.einsum("bn,bnd,n->d", q_value, score, weights) / 2
    np.testing.assert_allclose(exact.gradient(x.T @ x / 2)[0], found, rtol=1e-9)


def test_the_regulator_has_the_riccati_value():
    best = lqr(A, B, Q, R, discount=0.95)
    found = evaluate_linear_policy(
        A, B, Q, R, best.gain, action_covariance=[[0.0]], noise=np.zeros((2, 2)), discount=0.95
    )
    np.testing.assert_allclose(found.cost, best.value, rtol=1e-4)
    np.testing.assert_allclose(found.gradient(jnp.eye(2)), 0.0, atol=1e-4)


def test_bad_input():
    good = {"action_covariance": [[0.25]], "noise": np.zeros((2, 2)), "discount": 0.95}
    with pytest.raises(InputError, match=r"discount is 1\.0"):
        evaluate_linear_policy(A, B, Q, R, K, **{**good, "discount": 1.0})
    with pytest.raises(InputError, match="gain's shape"):
        evaluate_linear_policy(A, B, Q, R, K.T, **good)
    with pytest.raises(InputError, match="gain leaves a closed loop whose discounted growth is"):
        evaluate_linear_policy(2 * A, B, Q, R, K, **good)
    with pytest.raises(InputError, match="noise is"):
        evaluate_linear_policy(A, B, Q, R, K, **{**good, "noise": np.full((2, 2), np.nan)})
