"""Linear MPC is the LQR where nothing is active, and CVXPY's optimum elsewhere; failures are named and survived."""

from typing import Any

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control.linear_mpc import LinearMPC
from steersman.control.lqr import lqr
from steersman.control.quadratic_programs import ADMM, OSQP, PIQP
from steersman.envs.control_problem import rollout
from steersman.envs.dynamics import DoubleIntegrator
from steersman.errors import InputError, InputTypeError

A, B = np.array([[1.0, 0.3], [0.0, 1.0]]), np.array([[0.045], [0.3]])
Q, R = np.diag([1.0, 0.1]), np.array([[0.2]])


@pytest.mark.parametrize("condensed", [False, True])
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [(OSQP(1e-9), 1e-6), (PIQP(), 1e-6), (ADMM(1e-6, 20_000), 3e-4)],
    ids=["osqp", "piqp", "admm"],
)
def test_it_is_the_regulator_where_nothing_is_active(condensed: bool, solver: Any, tolerance: float) -> None:
    mpc = LinearMPC(A, B, Q, R, 6, control_bounds=(-50.0, 50.0), condensed=condensed, solver=solver)
    with jax.enable_x64(True):
        regulator = lqr(A, B, Q, R)
        gain, value = np.asarray(regulator.gain), np.asarray(regulator.value)
    for x in (np.array([0.6, -0.2]), np.array([-0.1, 0.9])):
        found = mpc.solve(x)
        assert found.word == "solved"
        np.testing.assert_allclose(found.controls[0], -gain @ x, atol=tolerance)
        np.testing.assert_allclose(found.cost, x @ value @ x, rtol=max(tolerance, 1e-5))
        np.testing.assert_allclose(found.states[1], A @ x + B @ found.controls[0], atol=tolerance)


def reference_solution(x: Any, states: Any, controls: Any, disturbance: Any, horizon: int, price: Any) -> Any:
    """The same problem, written down once more."""
    x_, u, s = cvxpy.Variable((horizon + 1, 2)), cvxpy.Variable((horizon, 1)), cvxpy.Variable((horizon, 2), nonneg=True)
    rows: list[Any] = [x_[0] == x]
    cost: Any = 0.0
    for i in range(horizon):
        rows += [x_[i + 1] == A @ x_[i] + B @ u[i] + disturbance, cvxpy.abs(u[i]) <= 0.8]
        rows += [x_[i + 1, 1] <= 0.3 + s[i, 0], x_[i + 1, 1] >= -0.4 - s[i, 0]]
        rows += [0.5 * x_[i, 1] + u[i, 0] <= 0.7 + s[i, 1], 0.5 * x_[i, 1] + u[i, 0] >= -0.6 - s[i, 1]]
        cost += cvxpy.quad_form(x_[i] - states[i], Q) + cvxpy.quad_form(u[i] - controls[i], R)
    with jax.enable_x64(True):
        value = np.asarray(lqr(A, B, Q, R).value)
    cost += cvxpy.quad_form(x_[horizon] - states[horizon], cvxpy.psd_wrap(value))
    rows += [x_[horizon, 0] + x_[horizon, 1] <= 0.9]
    if price is None:
        rows += [s == 0.0]
    problem = cvxpy.Problem(cvxpy.Minimize(cost + (price or 0.0) * cvxpy.sum(s)), rows)
    problem.solve(solver="CLARABEL")
    assert u.value is not None
    return u.value, problem.value


@pytest.mark.parametrize("condensed", [False, True])
@pytest.mark.parametrize("price", [None, 0.15])
def test_it_is_cvxpys_optimum_where_bounds_are_active(condensed: bool, price: float | None) -> None:
    horizon, rng = 7, np.random.default_rng(0)
    mpc = LinearMPC(
        A, B, Q, R, horizon,
        control_bounds=(-0.8, 0.8),
        state_bounds=([-np.inf, -0.4], [np.inf, 0.3]),
        rows=([[0.0, 0.5]], [[1.0]], [-0.6], [0.7]),
        terminal_rows=([[1.0, 1.0]], [0.9]),
        price=price,
        condensed=condensed,
        solver=PIQP(),
    )  # fmt: skip
    for x in (np.array([-1.0, 0.1]), np.array([1.5, -0.2])):
        states, controls = 0.3 * rng.normal(size=(horizon + 1, 2)), 0.3 * rng.normal(size=(horizon, 1))
        disturbance = np.array([0.01, -0.02])
        found = mpc.solve(x, states, controls, disturbance)
        best, cost = reference_solution(x, states, controls, disturbance, horizon, price)
        np.testing.assert_allclose(found.controls, best, atol=2e-4)
        np.testing.assert_allclose(found.cost, cost, rtol=1e-6)
        assert (found.violation > 1e-3) == (price is not None)


def test_an_exact_price_keeps_bounds_that_can_be_kept_and_survives_those_that_cannot() -> None:
    box = ([-np.inf, -0.4], [np.inf, 0.4])
    hard = LinearMPC(A, B, Q, R, 6, control_bounds=(-1.0, 1.0), state_bounds=box)
    soft = LinearMPC(A, B, Q, R, 6, control_bounds=(-1.0, 1.0), state_bounds=box, price=100.0, solver=PIQP())
    x = np.array([-1.0, 0.0])
    np.testing.assert_allclose(soft.solve(x).controls, hard.solve(x).controls, atol=1e-5)
    assert soft.solve(x).violation < 1e-6
    fast = np.array([0.0, 2.0])
    refused = hard.solve(fast)
    assert refused.word == "infeasible"
    assert np.isnan(refused.controls).all()
    assert any("state 2 at step 1" in name or "control 1" in name for name in refused.blame)
    assert soft.solve(fast).word == "solved"
    # 2 - 0.3 is as slow as it can be after one step.
    np.testing.assert_allclose(soft.solve(fast).violation, 2.0 - 0.3 - 0.4, atol=1e-4)


def test_a_terminal_equality_is_met() -> None:
    mpc = LinearMPC(A, B, Q, R, 5, terminal=None, terminal_equality=True)
    target = np.array([0.5, 0.0])
    np.testing.assert_allclose(mpc.solve(np.zeros(2), target).states[-1], target, atol=1e-6)


PROBLEM = DoubleIntegrator(sample_time=0.3, max_force=0.6, max_speed=0.5)


@pytest.mark.parametrize("solver", [OSQP(), ADMM(1e-5, 5_000)], ids=["osqp", "admm"])
def test_the_policy_plays_the_host_solutions_in_a_rollout_of_many(solver: Any) -> None:
    a, b = (np.asarray(matrix, np.float64) for matrix in PROBLEM.linearize())
    mpc = LinearMPC(a, b, Q, R, 8, control_bounds=PROBLEM.control_bounds, state_bounds=PROBLEM.state_bounds,
                    solver=solver, condensed=True)  # fmt: skip
    moving = np.stack([np.linspace(0.0, 1.0, 12), np.zeros(12)], axis=1)
    starts = jnp.asarray([[1.0, 0.0], [-1.5, 0.3]])
    states, controls = rollout(PROBLEM, mpc.policy(moving), starts, key=jax.random.key(0), num_steps=6)
    assert float(jnp.abs(states[1:, :, 1]).max()) <= 0.5 + 1e-3
    exact = LinearMPC(a, b, Q, R, 8, control_bounds=PROBLEM.control_bounds, state_bounds=PROBLEM.state_bounds,
                      solver=PIQP())  # fmt: skip
    for t in (0, 5):
        ahead = moving[np.minimum(t + np.arange(9), 11)]
        for i in range(2):
            want = exact.solve(np.asarray(states[t, i]), ahead).controls[0]
            np.testing.assert_allclose(controls[t, i], want, atol=3e-3)


def play(mpc: LinearMPC, policy: Any, x: np.ndarray, disturbance: np.ndarray, steps: int) -> tuple[Any, Any, Any]:
    def step(running: tuple, _: None) -> tuple[tuple, tuple]:
        x, carry = running
        u, carry = policy(x, carry, jax.random.key(0))
        return (mpc.A.astype(x.dtype) @ x + mpc.B.astype(x.dtype) @ u + disturbance, carry), (x, u, carry.report)

    begin = jnp.asarray(x, policy.states.dtype), policy.init(jax.random.key(0))
    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[1])(begin)


def test_an_estimated_disturbance_leaves_no_offset() -> None:
    mpc = LinearMPC(A, B, Q, R, 6, control_bounds=(-1.0, 1.0), solver=PIQP())
    pushed, output = np.array([0.0, 0.03], np.float32), np.array([[1.0, 0.0]])
    final = {}
    for gain in (None, 0.5):
        policy = mpc.policy(np.array([0.4]), output=output, observer_gain=gain)
        final[gain] = play(mpc, policy, np.zeros(2), pushed, 40)[0][-1]
    # The push comes without the 0.0045 m that a control of the same size adds, which takes a lasting 0.015 m/s.
    np.testing.assert_allclose(final[0.5], [0.4, 0.015], atol=1e-4)
    assert abs(float(final[None][0]) - 0.4) > 0.02


def test_fallbacks_act_where_there_is_no_plan() -> None:
    box = ([-np.inf, -0.4], [np.inf, 0.4])
    mpc = LinearMPC(A, B, Q, R, 4, control_bounds=(-0.2, 0.2), state_bounds=box)
    states, controls, report = play(
        mpc, mpc.policy(fallback=np.array([-0.2])), np.array([0.0, 0.57]), np.zeros(2, np.float32), 6
    )
    # Braking at 0.06 m/s a step from 0.57 m/s: once one step is enough the program has answers again.
    np.testing.assert_array_equal(report["status"], [2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(report["fallback"], [1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(controls[:2, 0], -0.2)
    assert float(states[3, 1]) <= 0.4 + 1e-5
    silent = mpc.policy()
    assert np.isnan(
        np.asarray(silent(jnp.array([0.0, 0.9]), silent.init(jax.random.key(0)), jax.random.key(0))[0])
    ).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearMPC(A, B, Q, R, 0), "horizon"),
        (lambda: LinearMPC(A, B, Q, -R, 3), "R has the eigenvalue"),
        (lambda: LinearMPC(A, B, Q, R, 3, price=0.0), "price"),
        (lambda: LinearMPC(A, B, Q, R, 3, terminal="lqr"), "terminal is 'lqr'"),
        (lambda: LinearMPC(A, B, Q, R, 3, terminal=np.eye(3)), "terminal's shape"),
        (lambda: LinearMPC(A, B, Q, R, 3, control_bounds=(1.0, -1.0)), "control_bounds"),
        (lambda: LinearMPC(A, B, Q, R, 3, state_bounds=([0.0], [1.0, 2.0, 3.0])), "state_bounds"),
        (lambda: LinearMPC(A, B, Q, R, 3, rows=([[1.0]], [[1.0]], [0.0], [1.0])), "rows' E"),
        (lambda: LinearMPC(A, B, Q, R, 3, terminal_rows=([[1.0]], [0.0])), "terminal_rows' H"),
        (lambda: LinearMPC(A, B, Q, R, 3, state_names=["one"]), "state_names"),
        (lambda: LinearMPC(A, B, Q, R, 3).solve(np.array([np.nan, 0.0])), "x is"),
        (lambda: LinearMPC(A, B, Q, R, 3).solve(np.zeros(2), np.zeros(3)), "states's shape"),
        (lambda: LinearMPC(A, B, Q, R, 3).policy(np.zeros(3)), "states's shape"),
        (lambda: LinearMPC(A, B, Q, R, 3).policy(controls=np.zeros(1), output=np.eye(2)), "controls is"),
        (lambda: LinearMPC(A, B, Q, R, 3).policy(observer_gain=1.5), "observer_gain"),
        (lambda: LinearMPC(A, B, Q, R, 3).targets(np.eye(3)), "output's shape"),
        (lambda: LinearMPC(A, B, Q, R, 3).policy(fallback="hold"), "fallback"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=message):
        make()
