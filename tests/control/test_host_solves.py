"""Host solvers inside transformations give what they give outside; failures act as chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control.host_solves import HostController, check_fallback, on_host, solve_qp
from steersman.control.planning import Plan
from steersman.control.quadratic_programs import ADMM, OSQP, PIQP, Affine, ParametricQP
from steersman.errors import InputError, InputTypeError

HORIZON = 3


def plan(control: float, status: int) -> Plan:
    controls: Any = control - np.arange(HORIZON, dtype=np.float64)[:, None]
    cost: Any = np.float64(control)
    report: Any = {"status": np.int32(status)}
    return Plan(controls, cost, np.zeros(1), report)


def solve(state: np.ndarray, last: Plan) -> Plan:
    """Plays the state, counts down, and has no answer to states above 1."""
    del last
    return plan(float(state[0]), 2 if state[0] > 1.0 else 0)


FIRST = plan(np.nan, 0)


def play(controller: HostController, states: np.ndarray) -> tuple[np.ndarray, Plan]:
    def step(carry: Plan, state: jax.Array) -> tuple[Plan, tuple]:
        control, carry = controller(state, carry, jax.random.key(0))
        return carry, (control, carry)

    key = jax.random.key(0)
    return jax.jit(jax.vmap(lambda row: jax.lax.scan(step, controller.init(key), row)[1]))(jnp.asarray(states))


def test_a_host_controller_runs_inside_scan_and_vmap_and_shifts_where_it_has_no_answer() -> None:
    states = np.array([[0.5, 2.0, 2.0, 2.0, 0.25], [2.0, 0.75, 0.0, 1.0, 2.0]])[..., None]
    controls, plans = play(HostController(solve, FIRST), states)
    # After 0.5 the plan was 0.5, -0.5, -1.5; its last control is repeated.
    np.testing.assert_allclose(controls[0, :, 0], [0.5, -0.5, -1.5, -1.5, 0.25])
    # Nothing to shift at first: not a number, rather than a control that nobody chose.
    np.testing.assert_allclose(controls[1, :, 0], [np.nan, 0.75, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(plans.report["status"], [[0, 2, 2, 2, 0], [2, 0, 0, 0, 2]])
    np.testing.assert_array_equal(plans.report["fallback"], [[0, 1, 1, 1, 0], [1, 0, 0, 0, 1]])


@pytest.mark.parametrize("fallback", [np.array([7.0]), lambda state, last: jnp.zeros_like(last.controls) + 5 + state])
def test_a_fixed_control_or_a_function_acts_where_there_is_no_answer(fallback) -> None:
    controls, plans = play(HostController(solve, FIRST, fallback), np.array([[0.5, 2.0]])[..., None])
    np.testing.assert_allclose(controls[0, :, 0], [0.5, 7.0])
    np.testing.assert_allclose(plans.controls[0, 1, :, 0], 7.0)


def test_prepared_programs_are_solved_inside_jit_as_outside() -> None:
    """The projection of p on [-1, 1]^2: clipping, and nothing for what is not a number."""
    none, identity = np.zeros((2, 2)), np.eye(2)
    program = ParametricQP(
        identity, identity, Affine(np.zeros(2), -identity), Affine(-np.ones(2), none), Affine(np.ones(2), none)
    )
    points = jnp.asarray([[0.5, 3.0], [-2.0, 0.25], [jnp.nan, 0.0]])
    for solver in (OSQP(), PIQP(), ADMM(tolerance=1e-6)):
        prepared = solver.prepare(program)

        def found(point, prepared=prepared):
            return solve_qp(prepared, point, jnp.full(2, jnp.nan), jnp.zeros(2))

        answers = jax.jit(jax.vmap(found))(points)
        np.testing.assert_allclose(answers.z[:2], np.clip(points[:2], -1.0, 1.0), atol=1e-5)
        np.testing.assert_array_equal(answers.solved[:2], True)
        assert answers.z.dtype == points.dtype
        if not isinstance(solver, ADMM):
            assert int(answers.status[2]) == 4


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"first\.report"):
        HostController(solve, FIRST._replace(report={}))
    with pytest.raises(InputError, match="fallback is 'hold'"):
        check_fallback("hold", 1)
    with pytest.raises(InputError, match=r"fallback's shape is \(2,\)"):
        check_fallback(np.zeros(2), 1)
    with pytest.raises(InputTypeError, match="fallback"):
        check_fallback(object(), 1)
    with pytest.raises(Exception, match="a shape of the answer"):
        on_host(lambda x: np.zeros(3), jnp.zeros(2))(jnp.zeros(1))
