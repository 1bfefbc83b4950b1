"""Regulators against closed forms, SciPy's Riccati solvers, stacked least squares and simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.control import clqr, discretize, finite_horizon_lqr, lqr
from steersman.errors import InputError, InputTypeError

DOUBLE_INTEGRATOR = (np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.005], [0.1]]))


def random_system(seed):
    """A system that is stabilizable and detectable with probability one, with costs over six orders of magnitude."""
    rng = np.random.default_rng(seed)
    n, m = [(1, 1), (2, 1), (4, 2)][seed % 3]  # few shapes, so that few are compiled
    half_q, half_r = rng.normal(size=(n, n)), rng.normal(size=(m, m))
    scale = 10.0 ** rng.uniform(-3, 3)
    a, b = rng.normal(size=(n, n)), rng.normal(size=(n, m))
    return a, b, half_q @ half_q.T + 0.01 * np.eye(n), scale * (half_r @ half_r.T + 0.1 * np.eye(m))


def assert_close(found, expected, tolerance):
    assert np.max(np.abs(found - expected)) <= tolerance * max(np.max(np.abs(expected)), 1e-12)


def test_scalar_regulator_has_its_closed_form():
    # P = Q + a^2 P R / (R + b^2 P): a quadratic equation in P.
    a, b, q, r = 1.2, 0.5, 2.0, 3.0
    middle = r - a**2 * r - b**2 * q
    value = (-middle + np.sqrt(middle**2 + 4 * b**2 * q * r)) / (2 * b**2)
    with jax.enable_x64(True):
        solution = lqr([[a]], [[b]], [[q]], [[r]])
    assert float(solution.value[0, 0]) == pytest.approx(value, rel=1e-12)
    assert float(solution.gain[0, 0]) == pytest.approx(a * b * value / (r + b**2 * value), rel=1e-12)
    assert complex(solution.closed_loop_eigenvalues[0]).real == pytest.approx(a - b * float(solution.gain[0, 0]))


def test_golden_ratio():
    # a = b = q = r = 1 gives P = (1 + sqrt 5) / 2, and the scalar integrator in continuous time P = 1.
    one = np.ones((1, 1))
    assert float(lqr(one, one, one, one).value[0, 0]) == pytest.approx((1 + 5**0.5) / 2, rel=1e-6)
    assert float(clqr(0 * one, one, one, one).value[0, 0]) == pytest.approx(1.0, rel=1e-6)


def test_continuous_double_integrator_has_its_closed_form():
    # Q = I, R = 1: K = [1, sqrt 3].
    solution = clqr([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], np.eye(2), np.eye(1))
    np.testing.assert_allclose(solution.gain, [[1.0, 3**0.5]], rtol=1e-6)
    np.testing.assert_allclose(solution.value, [[3**0.5, 1.0], [1.0, 3**0.5]], rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_both_equations_are_solved_as_scipy_solves_them(seed):
    a, b, q, r = random_system(seed)
    with jax.enable_x64(True):
        assert_close(lqr(a, b, q, r).value, scipy.linalg.solve_discrete_are(a, b, q, r), 1e-7)
        assert_close(clqr(a, b, q, r).value, scipy.linalg.solve_continuous_are(a, b, q, r), 1e-7)


def test_cross_costs_are_solved_as_scipy_solves_them():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(3, 3)), rng.normal(size=(3, 2))
    half = rng.normal(size=(5, 5))
    joint = half @ half.T
    q, n, r = joint[:3, :3], joint[:3, 3:], joint[3:, 3:]
    with jax.enable_x64(True):
        discrete, continuous = lqr(a, b, q, r, N=n), clqr(a, b, q, r, N=n)
        value = scipy.linalg.solve_discrete_are(a, b, q, r, s=n)
        assert_close(discrete.value, value, 1e-8)
        assert_close(discrete.gain, np.linalg.solve(r + b.T @ value @ b, b.T @ value @ a + n.T), 1e-8)
        value = scipy.linalg.solve_continuous_are(a, b, q, r, s=n)
        assert_close(continuous.value, value, 1e-8)
        assert_close(continuous.gain, np.linalg.solve(r, b.T @ value + n.T), 1e-8)


def test_slow_and_stiff_systems():
    with jax.enable_x64(True):
        # A mode that hardly decays, barely worth an action: 2^40 steps are needed to see it.
        a, b, q, r = [[1.0]], [[1.0]], [[1e-12]], [[1.0]]
        value = (1e-12 + np.sqrt(1e-24 + 4e-12)) / 2
        assert float(lqr(a, b, q, r).value[0, 0]) == pytest.approx(value, rel=1e-6)
        stiff = np.array([[-1e4, 1.0, 0.0], [0.0, -1.0, 1.0], [0.0, 0.0, 1e-3]])
        q, r = np.diag([1.0, 1e3, 1.0]), np.eye(1)
        b = np.array([[0.0], [0.0], [1.0]])
        assert_close(clqr(stiff, b, q, r).value, scipy.linalg.solve_continuous_are(stiff, b, q, r), 1e-7)


def simulate(a, b, q, r, gain, start, steps, discount=1.0):
    total, x = 0.0, start
    for t in range(steps):
        u = -gain @ x
        total += discount**t * (x @ q @ x + u @ r @ u)
        x = a @ x + b @ u
    return total


def test_value_is_the_simulated_cost():
    a, b = DOUBLE_INTEGRATOR
    q, r, start = np.diag([1.0, 0.1]), np.eye(1) * 0.01, np.array([1.0, -0.5])
    for discount in (1.0, 0.9):
        with jax.enable_x64(True):
            solution = lqr(a, b, q, r, discount=discount)
            cost = simulate(a, b, q, r, np.asarray(solution.gain), start, 2_000, discount)
            assert float(solution.cost_to_go(jnp.asarray(start))) == pytest.approx(cost, rel=1e-10)
            # And no other gain nearby is cheaper.
            for change in ([[0.05, 0.0]], [[-0.05, 0.0]], [[0.0, 0.05]], [[0.0, -0.05]]):
                other = simulate(a, b, q, r, np.asarray(solution.gain) + change, start, 2_000, discount)
                assert other > cost


def test_continuous_value_is_the_integrated_cost():
    a, b = np.array([[0.0, 1.0], [2.0, -0.1]]), np.array([[0.0], [1.0]])
    q, r, start = np.eye(2), np.eye(1) * 0.5, np.array([0.3, 1.0])
    with jax.enable_x64(True):
        solution = clqr(a, b, q, r)
        closed, running = np.asarray(solution.closed_loop), q + np.asarray(solution.gain.T @ r @ solution.gain)
        cost = start @ scipy.linalg.solve_continuous_lyapunov(closed.T, -running) @ start
        assert float(solution.cost_to_go(jnp.asarray(start))) == pytest.approx(cost, rel=1e-10)
    assert np.all(np.asarray(solution.closed_loop_eigenvalues).real < 0)
    np.testing.assert_allclose(
        np.sort_complex(solution.closed_loop_eigenvalues), np.sort_complex(np.linalg.eigvals(closed))
    )


def test_finite_horizon_converges_to_the_infinite_one():
    a, b, q, r = random_system(5)
    with jax.enable_x64(True):
        endless = lqr(a, b, q, r)
        gains, value = finite_horizon_lqr(a, b, q, r, np.zeros_like(q), 200)
    assert gains.shape == (200, *endless.gain.shape)
    assert value.shape == (201, *endless.value.shape)
    assert_close(gains[0], endless.gain, 1e-8)
    assert_close(value[0], endless.value, 1e-8)
    np.testing.assert_array_equal(value[-1], np.zeros_like(q))


def test_time_varying_horizon_equals_stacked_least_squares():
    # The same cost as one quadratic in all actions at once, minimized by a single linear solve.
    rng = np.random.default_rng(7)
    steps, n, m = 4, 3, 2
    a, b = rng.normal(size=(steps, n, n)), rng.normal(size=(steps, n, m))
    q = np.stack([np.diag(rng.uniform(0, 2, n)) for _ in range(steps)])
    r = np.stack([np.diag(rng.uniform(0.1, 1, m)) for _ in range(steps)])
    last, start = np.diag([3.0, 0.0, 1.0]), rng.normal(size=n)
    free, forced = [np.eye(n)], [np.zeros((n, steps * m))]
    for t in range(steps):
        pick = np.zeros((m, steps * m))
        pick[:, t * m : (t + 1) * m] = np.eye(m)
        free.append(a[t] @ free[-1])
        forced.append(a[t] @ forced[-1] + b[t] @ pick)
    costs = [*q, last]
    hessian = scipy.linalg.block_diag(*r) + sum(f.T @ c @ f for f, c in zip(forced, costs, strict=True))
    linear = sum(f.T @ c @ g @ start for f, c, g in zip(forced, costs, free, strict=True))
    actions = -np.linalg.solve(hessian, linear)
    minimum = sum((g @ start) @ c @ (g @ start) for c, g in zip(costs, free, strict=True)) + linear @ actions
    with jax.enable_x64(True):
        gains, value = finite_horizon_lqr(a, b, q, r, last, steps)
        x, found = start, []
        for t in range(steps):
            found.append(-np.asarray(gains[t]) @ x)
            x = a[t] @ x + b[t] @ found[-1]
        np.testing.assert_allclose(np.concatenate(found), actions, rtol=1e-9)
        assert float(start @ np.asarray(value[0]) @ start) == pytest.approx(minimum, rel=1e-10)


def test_one_matrix_serves_all_steps():
    a, b = DOUBLE_INTEGRATOR
    q, r = np.eye(2), np.eye(1)
    once = finite_horizon_lqr(a, b, q, r, q, 5)
    repeated = finite_horizon_lqr(np.stack([a] * 5), b, np.stack([q] * 5), r, q, 5)
    np.testing.assert_array_equal(once.gains, repeated.gains)
    np.testing.assert_array_equal(once.value, repeated.value)


def test_results_come_in_jaxs_precision_but_are_computed_in_float64():
    a, b = DOUBLE_INTEGRATOR
    q, r = np.diag([1.0, 0.0]), np.eye(1) * 1e-6
    rounded = lqr(a, b, q, r)
    with jax.enable_x64(True):
        exact = lqr(a, b, q, r)
    assert (rounded.gain.dtype, exact.gain.dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_array_equal(rounded.gain, np.asarray(exact.gain, np.float32))
    # The same inside somebody's jit, where the matrices are constants.
    inside = jax.jit(lambda x: lqr(a, b, q, r).gain @ x)(jnp.eye(2))
    np.testing.assert_array_equal(inside, rounded.gain)


def test_gradients_equal_finite_differences():
    a, b = DOUBLE_INTEGRATOR
    q, r, n = np.diag([1.0, 0.1]), np.eye(1), np.array([[0.05], [0.02]])
    with jax.enable_x64(True):

        def total(solve, a, q, r):
            solution = solve(a, b, q, r, N=n)
            return jnp.sum(solution.value) + jnp.sum(solution.gain**2)

        for solve, drift in ((lqr, a), (clqr, a - np.eye(2))):
            given = [jnp.asarray(matrix) for matrix in (drift, q, r)]
            gradients = jax.jit(jax.grad(lambda *args, s=solve: total(s, *args), argnums=(0, 1, 2)))(*given)
            numbers = jax.jit(lambda *args, s=solve: total(s, *args))
            for i, gradient in enumerate(gradients):
                step = [x + 1e-6 * (j == i) for j, x in enumerate(given)]
                back = [x - 1e-6 * (j == i) for j, x in enumerate(given)]
                expected = (numbers(*step) - numbers(*back)) / 2e-6
                assert float(jnp.sum(gradient)) == pytest.approx(float(expected), rel=1e-5)


def test_many_regulators_at_once():
    a, b = DOUBLE_INTEGRATOR
    weights = jnp.asarray([0.1, 1.0, 10.0])
    solutions = jax.vmap(lambda w: lqr(a, b, w * jnp.eye(2), jnp.eye(1)))(weights)
    for i, weight in enumerate(weights):
        one = lqr(a, b, weight * np.eye(2), np.eye(1))
        np.testing.assert_allclose(solutions.gain[i], one.gain, rtol=1e-3)
    values = jax.vmap(lambda w: finite_horizon_lqr(a, b, w * jnp.eye(2), jnp.eye(1), jnp.eye(2), 3).value)(weights)
    assert values.shape == (3, 4, 2, 2)


def test_discretization():
    with jax.enable_x64(True):
        a, b = discretize([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], 0.1)
        np.testing.assert_allclose(a, [[1.0, 0.1], [0.0, 1.0]], rtol=1e-14)
        np.testing.assert_allclose(b, [[0.005], [0.1]], rtol=1e-14)
        rng = np.random.default_rng(2)
        drift, effect = rng.normal(size=(4, 4)), rng.normal(size=(4, 2))
        expected = scipy.signal.cont2discrete((drift, effect, np.eye(4), np.zeros((4, 2))), 0.3)
        for found, theirs in zip(discretize(drift, effect, 0.3), expected[:2], strict=True):
            np.testing.assert_allclose(found, theirs, rtol=1e-11, atol=1e-13)
        slope = jax.grad(lambda dt: discretize(drift, effect, dt)[0][0, 0])(0.3)
        assert float(slope) == pytest.approx((drift @ scipy.linalg.expm(0.3 * drift))[0, 0], rel=1e-8)


def test_policy_is_the_feedback_law():
    a, b = DOUBLE_INTEGRATOR
    solution = lqr(a, b, np.eye(2), np.eye(1))
    policy = solution.policy(setpoint=[1.0, 0.0], feedforward=[0.5], low=-1.0, high=1.0)
    x = jnp.asarray([0.9, 0.2])
    action, carry = policy(x, policy.init(jax.random.key(0)), jax.random.key(0))
    np.testing.assert_allclose(action, np.clip(0.5 - solution.gain @ (x - np.array([1.0, 0.0])), -1, 1), rtol=1e-6)
    assert carry == ()


ONE = np.ones((1, 1))
TWO = np.eye(2)
BAD = {
    "A's shape": lambda: lqr(np.ones((1, 2)), ONE, ONE, ONE),
    "B's shape": lambda: lqr(TWO, ONE, TWO, ONE),
    "Q's shape": lambda: lqr(ONE, ONE, TWO, ONE),
    "R's shape": lambda: lqr(ONE, ONE, ONE, TWO),
    "N's shape": lambda: lqr(ONE, ONE, ONE, ONE, N=np.ones((1, 2))),
    "Q has the eigenvalue -1": lambda: lqr(ONE, ONE, -ONE, ONE),
    "R has the eigenvalue 0": lambda: clqr(ONE, ONE, ONE, 0 * ONE),
    "Q is .* symmetric": lambda: lqr(TWO, TWO, np.array([[1.0, 0.5], [0.0, 1.0]]), TWO),
    "N makes the joint cost": lambda: lqr(ONE, ONE, ONE, ONE, N=2 * ONE),
    "discount is 1.5": lambda: lqr(ONE, ONE, ONE, ONE, discount=1.5),
    "discount is 0": lambda: lqr(ONE, ONE, ONE, ONE, discount=0.0),
    "A is .*nan": lambda: lqr(np.nan * ONE, ONE, ONE, ONE),
    "H is 0": lambda: finite_horizon_lqr(ONE, ONE, ONE, ONE, ONE, 0),
    "Qf's shape": lambda: finite_horizon_lqr(ONE, ONE, ONE, ONE, TWO, 3),
    "Qf has the eigenvalue": lambda: finite_horizon_lqr(ONE, ONE, ONE, ONE, -ONE, 3),
    "B's shape is": lambda: finite_horizon_lqr(ONE, np.ones((2, 1, 1)), ONE, ONE, ONE, 3),
    "dt is 0": lambda: discretize(ONE, ONE, 0.0),
    r"pair .* eigenvalue 1\.1": lambda: lqr(np.diag([1.1, 0.5]), [[0.0], [1.0]], TWO, ONE),
    r"B: .* eigenvalue 0.1\+1j": lambda: clqr([[0.1, 1.0], [-1.0, 0.1]], np.zeros((2, 1)), TWO, ONE),
    "Q: .* eigenvalue 2": lambda: lqr(np.diag([2.0, 0.5]), np.ones((2, 1)), np.diag([0.0, 1.0]), ONE),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input_is_named(message):
    with pytest.raises(InputError, match=message):
        BAD[message]()


def test_discounting_can_make_a_system_stabilizable():
    # The growing mode that no action reaches costs a finite sum once the discount outweighs it.
    a, b = np.diag([1.05, 1.0]), np.array([[0.0], [1.0]])
    with pytest.raises(InputError, match=r"eigenvalue 1\.05"):
        lqr(a, b, TWO, ONE)
    with jax.enable_x64(True):
        solution = lqr(a, b, TWO, ONE, discount=0.8)
    assert float(solution.value[0, 0]) == pytest.approx(1 / (1 - 0.8 * 1.05**2), rel=1e-10)


def test_what_is_not_a_matrix_is_refused():
    with pytest.raises(InputTypeError, match="A is"):
        lqr([["a"]], ONE, ONE, ONE)
