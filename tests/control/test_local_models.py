"""Estimated responses against the known ones of a linear plant."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control import finite_horizon_lqr
from steersman.control.local_models import (
    LeastSquares,
    LocalModels,
    MarkovParameters,
    Moments,
    local_gains,
    perturbed_response,
)
from steersman.control.rollout_oracles import ProblemOracle
from steersman.envs import LinearGaussianProblem, Pendulum
from steersman.errors import InputError

H = 7
A = np.array([[1.1, 0.2], [0.0, 0.9]])
B = np.array([[0.0], [0.5]])
GAIN = np.array([[0.4, 0.7]])


def oracle(noise: float = 0.0, noisy: bool = False) -> ProblemOracle:
    problem = LinearGaussianProblem(
        A, B, np.eye(2), np.eye(2), np.eye(1), process_noise=np.zeros(2), measurement_noise=np.full(2, noise),
        initial_spread=np.zeros(2),
    )  # fmt: skip
    return ProblemOracle(problem, jnp.array([1.0, -0.5]), noisy)


def exact(gain: np.ndarray = GAIN) -> np.ndarray:
    """``Psi_{j,k} = (A - B K)^(j-k-1) B``."""
    psi = np.zeros((H + 1, H, 2, 1))
    for k in range(H):
        for j in range(k + 1, H + 1):
            psi[j, k] = np.linalg.matrix_power(A - B @ gain, j - k - 1) @ B
    return psi


@eqx.filter_jit
def respond(oracle, estimator, key, count):
    gains = jnp.broadcast_to(jnp.asarray(GAIN), (H, 1, 2))
    flat = jnp.zeros((H, 1))
    played = oracle(flat, gains, jnp.zeros((1, H, 1)), key)
    states, controls = played.states[0], played.controls[0]
    return perturbed_response(oracle, estimator, controls, states, gains, rollouts=count, perturbation=1e-2, key=key)


def test_least_squares_recovers_a_linear_plant_and_its_regulator() -> None:
    with jax.enable_x64(True):
        found = respond(oracle(), LeastSquares(ridge=0.0), jax.random.key(0), 6)
        assert isinstance(found, LocalModels)
        # The first state is fixed and the second moves in one direction: only what is reached is known.
        np.testing.assert_allclose(found.A[2:], np.broadcast_to(A - B @ GAIN, (H - 2, 2, 2)), atol=1e-8)
        np.testing.assert_allclose(found.B, np.broadcast_to(B, (H, 2, 1)), atol=1e-8)
        np.testing.assert_allclose(found.markov(), exact(), atol=1e-8)
        old = jnp.broadcast_to(jnp.asarray(GAIN), (H, 1, 2))
        q, r = jnp.diag(jnp.array([0.3, 0.1])), jnp.array([[0.05]])
        truth = finite_horizon_lqr(A, B, q, r, np.eye(2), H)
        for response in (found, MarkovParameters(jnp.asarray(exact()))):
            gains = local_gains(response, old, window=3, state_cost=q, control_cost=r)
            np.testing.assert_allclose(gains.A[3:], np.broadcast_to(A, (H - 3, 2, 2)), atol=1e-7)
            np.testing.assert_allclose(gains.gains[3:], truth.gains[3:], atol=1e-7)
            np.testing.assert_array_equal(gains.gains[:3], 0.0)
            assert float(gains.deficient) == 0.0


def test_the_default_ridge_hardly_matters_at_any_size_of_perturbation() -> None:
    with jax.enable_x64(True):
        found = respond(oracle(), LeastSquares(), jax.random.key(0), 6)
        np.testing.assert_allclose(found.markov(), exact(), atol=1e-4)


def test_both_forms_of_a_response_agree() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(H, 2, 2)), rng.normal(size=(H, 2, 1))
    psi = np.zeros((H + 1, H, 2, 1))
    for k in range(H):
        psi[k + 1, k] = b[k]
        for j in range(k + 1, H):
            psi[j + 1, k] = a[j] @ psi[j, k]
    models, table = LocalModels(jnp.asarray(a), jnp.asarray(b)), MarkovParameters(jnp.asarray(psi, jnp.float32))
    slopes = jnp.asarray(rng.normal(size=(H + 1, 2)), jnp.float32)
    views = eqx.filter_jit(lambda response, slopes: (response.markov(), response.adjoint(slopes), response.windows(3)))
    (markov, adjoint, windows), (_, other_adjoint, others) = views(models, slopes), views(table, slopes)
    np.testing.assert_allclose(markov, psi, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adjoint, other_adjoint, rtol=1e-3, atol=1e-4)
    for one, other in zip(windows, others, strict=True):
        late = slice(3, None) if one.ndim == 4 else slice(None)
        np.testing.assert_allclose(one[late], other[late], rtol=1e-4, atol=1e-5)


def test_moments_are_unbiased_and_their_variance_falls_with_the_rollouts() -> None:
    variances = []
    for count in (8, 32):
        draws = jax.vmap(lambda key, count=count: respond(oracle(), Moments(), key, count).markov())(
            jax.random.split(jax.random.key(1), 2000)
        )
        draws = np.asarray(draws, np.float64)
        error = draws.std(axis=0) / np.sqrt(len(draws))
        # Rounding of states near one against perturbations of 0.01 is not chance.
        assert np.all(np.abs(draws.mean(axis=0) - exact()) <= 3.0 * error + 2e-5)
        variances.append(draws.var(axis=0).sum())
    assert variances[0] / variances[1] == pytest.approx(4.0, rel=0.1)


def test_directions_that_are_not_reached_are_said() -> None:
    psi = np.zeros((H + 1, H, 2, 1))
    for k in range(H):
        psi[k + 1 :, k, 0] = 1.0
    gains, one = jnp.zeros((H, 1, 2)), jnp.eye(2)
    with pytest.warns(UserWarning, match="do not reach every direction"):
        found = local_gains(
            MarkovParameters(jnp.asarray(psi)), gains, window=3, state_cost=one, control_cost=jnp.eye(1)
        )
    assert float(found.deficient) == 1.0
    assert bool(jnp.all(jnp.isfinite(found.gains)))


def test_an_oracle_measures_with_noise_where_it_is_asked_to() -> None:
    key, zero = jax.random.key(3), jnp.zeros((200, H, 1))
    quiet = oracle(0.1)(zero[0], jnp.zeros((H, 1, 2)), zero, key)
    loud = oracle(0.1, True)(zero[0], jnp.zeros((H, 1, 2)), zero, key)
    assert float(jnp.max(jnp.std(quiet.states, axis=0))) < 1e-6
    np.testing.assert_allclose(jnp.std(loud.states, axis=0), 0.1, rtol=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProblemOracle(oracle().problem, jnp.zeros(3)), "start's shape"),
        (lambda: ProblemOracle(oracle().problem, jnp.array([0.0, jnp.nan])), "start is"),
        (lambda: ProblemOracle(Pendulum(), jnp.zeros(2)), "problem's observation"),
        (lambda: LeastSquares(ridge=-1.0), "ridge is -1"),
        (lambda: LeastSquares().check(2, 2, 1), "rollouts is 2"),
        (lambda: Moments().check(0, 2, 1), "rollouts is 0"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
