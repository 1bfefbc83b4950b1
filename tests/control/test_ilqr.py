"""iLQR and DDP against the linear-quadratic regulator, a bounded optimizer, enumeration and gradients."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.control import ProblemModel, finite_horizon_lqr, look_ahead
from steersman.control.ilqr import ILQR, box_minimum
from steersman.envs import DoubleIntegrator, Pendulum
from steersman.errors import InputError

HORIZON = 12


@eqx.filter_jit
def solve(planner, state, controls):
    return planner.solve(state, controls)


@pytest.fixture(scope="module")
def swing() -> ProblemModel:
    return ProblemModel(Pendulum())


def test_one_iteration_is_the_regulator() -> None:
    problem = DoubleIntegrator(max_force=np.inf)
    start = jnp.array([2.0, -0.3])
    found = solve(ILQR(ProblemModel(problem), HORIZON), start, jnp.ones((HORIZON, 1)))
    A, B = problem.linearize()
    stage = np.diag([1.0, 0.1])
    truth = finite_horizon_lqr(A, B, stage, np.array([[0.01]]), 10.0 * stage, HORIZON)
    best = np.asarray(start) @ np.asarray(truth.value[0]) @ np.asarray(start)
    np.testing.assert_allclose(found.costs[1], best, rtol=1e-5)
    np.testing.assert_allclose(found.gains, truth.gains, atol=2e-4)
    assert bool(found.converged)
    assert int(found.iterations) <= 3
    np.testing.assert_array_equal(found.costs[int(found.iterations) :], found.cost)


def test_bounded_controls_are_those_of_a_bounded_optimizer() -> None:
    problem = DoubleIntegrator(max_force=1.0)
    start = jnp.array([0.5, 0.3])
    found = solve(ILQR(ProblemModel(problem), HORIZON), start, jnp.zeros((HORIZON, 1)))

    def cost(controls):
        h, total, (q, v) = problem.sample_time, 0.0, np.asarray(start, np.float64)
        for u in controls:
            total += q**2 + 0.1 * v**2 + 0.01 * u**2
            q, v = q + h * v + 0.5 * h**2 * u, v + h * u
        return total + 10.0 * (q**2 + 0.1 * v**2)

    best = scipy.optimize.minimize(cost, np.zeros(HORIZON), bounds=[(-1.0, 1.0)] * HORIZON, tol=1e-12)
    assert 0 < np.sum(np.abs(best.x) > 1.0 - 1e-6) < HORIZON
    np.testing.assert_allclose(found.cost, best.fun, rtol=1e-5)
    np.testing.assert_allclose(found.controls[:, 0], best.x, atol=5e-3)
    # Where a bound holds the control there is no feedback.
    assert float(jnp.max(jnp.abs(jnp.where(jnp.abs(found.controls[:, :, None]) >= 1.0, found.gains, 0.0)))) == 0.0


@settings(max_examples=10, deadline=None)
@given(angle=st.floats(-3.0, 3.0), speed=st.floats(-4.0, 4.0), second=st.booleans())
def test_costs_never_rise_and_the_end_is_stationary(angle: float, speed: float, second: bool) -> None:
    model = ProblemModel(Pendulum())
    start = jnp.array([angle, speed])
    found = solve(ILQR(model, HORIZON, second_order=second), start, jnp.zeros((HORIZON, 1)))
    assert bool(jnp.all(jnp.diff(found.costs) <= 0.0))
    np.testing.assert_allclose(look_ahead(model, start, found.controls).cost, found.cost, rtol=1e-5)
    assert bool(found.converged)
    slope = gradient(model, start, found.controls)
    low, high = model.control_bounds
    moved = found.controls - jnp.clip(found.controls - 0.05 * slope, low, high)
    assert float(jnp.max(jnp.abs(moved))) < 0.02


@eqx.filter_jit
def gradient(model, start, controls):
    return jax.grad(lambda u: look_ahead(model, start, u).cost)(controls)


def test_a_plan_starts_from_the_last_one(swing: ProblemModel) -> None:
    planner = ILQR(swing, HORIZON)
    plan = eqx.filter_jit(lambda last, state: planner.plan(state, last, jax.random.key(0)))
    first = plan(planner.init(), jnp.array([0.5, 0.0]))
    again = plan(first, swing.problem.dynamics(jnp.array([0.5, 0.0]), first.controls[0]))
    assert int(again.report["iterations"]) <= int(first.report["iterations"])
    assert jax.tree.structure(again) == jax.tree.structure(planner.init())


class Wall(ProblemModel):
    """Nothing is finite beyond an angle."""

    def step(self, state, u):
        following, cost = super().step(state, u)
        return following, jnp.where(jnp.abs(state[0]) > 1.0, jnp.inf, cost)


def test_an_infinite_cost_is_an_answer() -> None:
    found = solve(ILQR(Wall(Pendulum()), HORIZON), jnp.array([2.0, 0.0]), jnp.zeros((HORIZON, 1)))
    assert not bool(found.converged)
    assert bool(jnp.isinf(found.cost))
    np.testing.assert_array_equal(found.controls, 0.0)


boxed = jax.jit(box_minimum)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_box_minimum_is_the_best_of_all_active_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3))
    H, g = root @ root.T + 0.1 * np.eye(3), 3.0 * rng.normal(size=3)
    low, high = -rng.uniform(0.1, 1.0, 3), rng.uniform(0.1, 1.0, 3)
    best, least = np.zeros(3), np.inf
    for held in itertools.product((-1, 0, 1), repeat=3):
        held = np.asarray(held)
        x, free = np.where(held < 0, low, np.where(held > 0, high, 0.0)), held == 0
        x[free] = np.linalg.solve(H[np.ix_(free, free)], -(g + H @ x)[free])
        value = g @ x + 0.5 * x @ H @ x
        if np.all(x >= low - 1e-12) and np.all(x <= high + 1e-12) and value < least:
            best, least = x, value
    found, free = boxed(*(jnp.asarray(part, jnp.float32) for part in (H, g, low, high)))
    np.testing.assert_allclose(found, best, atol=3e-3)
    assert bool(jnp.all(free | (found == low.astype(np.float32)) | (found == high.astype(np.float32))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: ILQR(model, 0), "horizon is 0"),
        (lambda model: ILQR(model, 3, 0), "iterations is 0"),
        (lambda model: ILQR(model, 3, tolerance=-1.0), "tolerance is -1"),
        (lambda model: ILQR(model, 3, discount=0.0), "discount is 0"),
        (lambda model: ILQR(model, 3).solve(jnp.zeros(2), jnp.zeros((4, 1))), "controls' shape"),
        (lambda model: ILQR(model, 3).solve(jnp.zeros(2, int), jnp.zeros((3, 1))), "state's dtype"),
    ],
)
def test_bad_input_is_named(swing: ProblemModel, make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(swing)
