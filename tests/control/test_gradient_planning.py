"""Descent on plans, against the regulator, the adjoint equations, a loop by hand, and what must not change."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steersman.control import ProblemModel, finite_horizon_lqr, look_ahead
from steersman.control.gradient_planning import GradientPlanner, PolicyProposals
from steersman.control.transition_planning import TransitionPlanningModel
from steersman.envs import DoubleIntegrator, Pendulum
from steersman.errors import InputError, InputTypeError
from steersman.policies import LinearFeedback
from steersman.training.dynamics_model import EnsembleModel
from steersman.training.optimizers import SGD
from steersman.training.schedules import WarmupCosine

START = jnp.array([1.0, 0.0])


# Planners of the same shapes share a program: the problem's numbers are its arguments.
@eqx.filter_jit
def plan(planner, state, last, key):
    return planner.plan(state, last, key)


@eqx.filter_jit
def refine(planner, state, candidates):
    return planner.refine(state, candidates)


def swing(**options) -> GradientPlanner:
    settings: dict[str, Any] = {"horizon": 6, "iterations": 5} | options
    return GradientPlanner(ProblemModel(Pendulum()), **settings)


def regulator() -> tuple[DoubleIntegrator, tuple[np.ndarray, ...]]:
    problem = DoubleIntegrator(max_force=np.inf, control_weight=0.1)
    A, B = (np.asarray(each, float) for each in problem.linearize())
    stage = np.diag([float(problem.position_weight), float(problem.velocity_weight)])
    return problem, (A, B, stage, np.array([[0.1]]), float(problem.terminal_weight) * stage)


def test_without_bounds_the_plan_is_the_regulators() -> None:
    problem, (A, B, Q, R, last) = regulator()
    planner = GradientPlanner(
        ProblemModel(problem), 8, candidates=1, iterations=500, learning_rate=WarmupCosine(0.3, 500)
    )
    with jax.enable_x64(True):
        found = refine(planner, jnp.asarray(START, float), jnp.zeros((1, 8, 1)))
    x, expected = np.asarray(START), []
    for gain in np.asarray(finite_horizon_lqr(A, B, Q, R, last, 8).gains):
        expected.append(-gain @ x)
        x = A @ x + B @ expected[-1]
    np.testing.assert_allclose(found.controls[0], np.stack(expected), atol=1e-4)


def test_the_gradient_is_that_of_the_adjoint_equations() -> None:
    problem, (A, B, Q, R, last) = regulator()
    rate = 1e-3
    planner = GradientPlanner(ProblemModel(problem), 8, iterations=1, learning_rate=rate, optimizer=SGD())
    with jax.enable_x64(True):
        controls = np.random.default_rng(0).normal(size=(8, 1))
        moved = planner.refine(jnp.asarray(START, float), jnp.asarray(controls)[None])
        taken = (controls - np.asarray(moved.controls[0])) / rate
    states = [np.asarray(START, float)]
    for u in controls:
        states.append(A @ states[-1] + B @ u)
    adjoint, gradient = 2.0 * last @ states[-1], []
    for x, u in zip(states[-2::-1], controls[::-1], strict=True):
        gradient.append(2.0 * R @ u + B.T @ adjoint)
        adjoint = 2.0 * Q @ x + A.T @ adjoint
    np.testing.assert_allclose(taken, np.stack(gradient[::-1]), rtol=1e-5)
    np.testing.assert_allclose(moved.gradient[0], np.linalg.norm(gradient), rtol=1e-5)

    def cost(plan: np.ndarray) -> float:
        x, total = np.asarray(START, float), 0.0
        for u in plan:
            total += x @ Q @ x + u @ R @ u
            x = A @ x + B @ u
        return float(total + x @ last @ x)

    for step in (0, 5):
        shift = np.zeros_like(controls)
        shift[step] = 1e-5
        difference = (cost(controls + shift) - cost(controls - shift)) / 2e-5
        np.testing.assert_allclose(taken[step, 0], difference, rtol=1e-5)


def test_descent_is_adam_from_the_same_state_at_every_iteration() -> None:
    planner = swing()
    state = jnp.array([2.0, 0.0])
    candidates = planner.propose(state, planner.init(), jax.random.key(1))
    together = refine(planner, state, candidates)
    np.testing.assert_array_equal(refine(planner, state, candidates).controls, together.controls)
    low, high = planner.model.control_bounds
    cost_of = jax.jit(jax.value_and_grad(lambda u: look_ahead(planner.model, state, u).cost))
    for candidate, found, cost in zip(candidates, together.controls, together.cost, strict=True):
        # One candidate at a time, by hand; inside the bounds, where this gradient is right.
        controls, adam = 0.5 * candidate, optax.adam(0.1)
        alone = refine(planner, state, controls[None])
        memory, seen = adam.init(controls), []
        for _ in range(5):
            value, gradient = cost_of(controls)
            seen.append((float(value), controls))
            updates, memory = adam.update(gradient, memory)
            controls = jnp.clip(controls + jnp.asarray(updates), low, high)
        seen.append((float(cost_of(controls)[0]), controls))
        least, best = min(seen, key=lambda each: each[0])
        np.testing.assert_allclose(alone.cost[0], least, rtol=1e-5)
        np.testing.assert_allclose(alone.controls[0], best, atol=1e-4)
        np.testing.assert_allclose(look_ahead(planner.model, state, found).cost, cost, rtol=1e-5)


def test_batched_candidates_are_those_of_a_loop() -> None:
    planner = swing()
    state = jnp.array([2.0, 0.0])
    candidates = planner.propose(state, planner.init(), jax.random.key(2))
    together = refine(planner, state, candidates)
    for i in range(4):
        alone = refine(planner, state, candidates[i : i + 1])
        np.testing.assert_allclose(together.controls[i], alone.controls[0], atol=1e-5)
        np.testing.assert_allclose(together.cost[i], alone.cost[0], rtol=1e-5)


def test_more_candidates_are_never_worse_nor_is_any_plan_than_the_last() -> None:
    state, key = jnp.array([2.0, 0.5]), jax.random.key(3)
    # A step so large that descent goes wrong.
    planners = [swing(candidates=count, learning_rate=2.0) for count in (1, 3)]
    last = planners[0].init()._replace(controls=jnp.linspace(-1.0, 1.0, 6)[:, None])
    drawn = [planner.propose(state, last, key) for planner in planners]
    np.testing.assert_array_equal(drawn[1][:1], drawn[0])
    costs = [float(plan(planner, state, last, key).cost) for planner in planners]
    assert costs[0] >= costs[1]
    shifted = jnp.concatenate([last.controls[1:], last.controls[-1:]])
    assert costs[0] <= float(look_ahead(planners[0].model, state, shifted).cost) * (1.0 + 1e-6)


def test_without_iterations_it_is_the_best_candidate_or_the_policy() -> None:
    state, key = jnp.array([1.0, -0.5]), jax.random.key(4)
    planner = swing(iterations=0)
    found = plan(planner, state, planner.init(), key)
    candidates = planner.propose(state, planner.init(), key)
    costs = [float(look_ahead(planner.model, state, each).cost) for each in candidates]
    np.testing.assert_array_equal(found.controls, candidates[int(np.argmin(costs))])
    np.testing.assert_allclose(found.cost, min(costs), rtol=1e-6)
    assert found.report["gradient"] == 0.0

    policy = LinearFeedback(jnp.array([[4.0, 1.0]]), low=-2.0, high=2.0)
    seeds = PolicyProposals(planner.model, policy, 6, 1)
    found = swing(iterations=0, candidates=0, proposals=seeds).policy()
    action, _ = found(state, found.init(key), key)
    np.testing.assert_array_equal(action, policy(state, (), key)[0])


def test_a_policys_proposals_are_its_rollouts_and_refining_them_helps() -> None:
    problem, state, key = Pendulum(), jnp.array([1.0, 0.0]), jax.random.key(5)
    policy = LinearFeedback(jnp.array([[0.5, 0.1]]))
    seeds = PolicyProposals(ProblemModel(problem), policy, 6, 3, std=0.2)
    proposed = seeds(state, key)
    x, by_hand = state, []
    for _ in range(6):
        u = jnp.clip(-0.5 * x[:1] - 0.1 * x[1:], -2.0, 2.0)
        by_hand.append(u)
        x = problem.dynamics(x, u)
    np.testing.assert_allclose(proposed[0], jnp.stack(by_hand), atol=1e-5)
    assert float(jnp.max(jnp.abs(proposed[1] - proposed[0]))) > 0.05
    assert float(jnp.max(jnp.abs(proposed[1] - proposed[2]))) > 0.05
    planner = swing(candidates=0, proposals=seeds)
    found = plan(planner, state, planner.init(), key)
    assert found.cost < found.report["initial_cost"]


def test_at_a_bound_the_gradient_is_the_models() -> None:
    problem = DoubleIntegrator(max_force=1.0)
    planner = GradientPlanner(ProblemModel(problem), 4, iterations=1, learning_rate=1e-3, optimizer=SGD())
    bound = jnp.ones((1, 4, 1))
    at_bound = refine(planner, START, bound)
    free = GradientPlanner(
        ProblemModel(DoubleIntegrator(max_force=2.0)), 4, iterations=1, learning_rate=1e-3, optimizer=SGD()
    )
    np.testing.assert_allclose(at_bound.gradient, refine(free, START, bound).gradient, rtol=1e-6)
    assert bool(jnp.all(at_bound.controls < 1.0))


def test_a_learned_model_is_planned_with_and_left_as_it_is() -> None:
    learned = EnsembleModel(2, 1, hidden=(8,), key=jax.random.key(6))
    learned = eqx.tree_at(lambda m: m.networks.weights[-1], learned, jnp.ones_like(learned.networks.weights[-1]))
    model = TransitionPlanningModel(learned, 2, [-1.0], [1.0])
    before = [np.array(leaf) for leaf in jax.tree.leaves(eqx.filter(learned, eqx.is_array))]
    planner = GradientPlanner(model, 6, iterations=5)
    found = plan(planner, model.start(START), planner.init(), jax.random.key(7))
    assert found.cost < found.report["initial_cost"]
    after = jax.tree.leaves(eqx.filter(planner.model, eqx.is_array))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


class Fragile(ProblemModel):
    """Costs are NaN wherever the first control of a step is above a limit."""

    limit: float = eqx.field(static=True, default=0.0)

    def step(self, state, u):
        following, cost = super().step(state, u)
        return following, jnp.where(u[0] > self.limit, jnp.nan, cost)


@pytest.mark.parametrize("limit", [0.0, -9.0])
def test_failed_candidates_are_dropped(limit: float) -> None:
    planner = GradientPlanner(Fragile(Pendulum(), limit=limit), 5, candidates=8, iterations=3)
    last = planner.init()
    found = plan(planner, START, last, jax.random.key(8))
    assert bool(jnp.all(jnp.isfinite(found.controls)))
    if limit == 0.0:
        assert 0.0 < found.report["finite"] < 1.0
        assert jnp.isfinite(found.cost)
    else:
        assert found.report["finite"] == 0.0
        assert jnp.isinf(found.cost)
        np.testing.assert_array_equal(found.controls, last.controls)
        with pytest.raises(InputError, match="no finite cost"):
            planner.check(START)


class Indicator(ProblemModel):
    """Costs nothing but a step function."""

    def step(self, state, u):
        return super().step(state, u)[0], jnp.where(state[0] > 0.5, 1.0, 0.0)

    def terminal_cost(self, state):
        return jnp.zeros(())


class OnHost(ProblemModel):
    """Computed where no gradient is."""

    def step(self, state, u):
        shapes = jax.ShapeDtypeStruct(state.shape, state.dtype), jax.ShapeDtypeStruct((), state.dtype)
        return jax.pure_callback(lambda x, u: (x, x[0]), shapes, state, u)


def test_models_without_gradients_are_refused() -> None:
    with pytest.raises(InputTypeError, match=r"Indicator whose cost cannot be descended .* CrossEntropy"):
        GradientPlanner(Indicator(Pendulum()), 3).check(START)
    on_host = GradientPlanner(OnHost(Pendulum()), 3, iterations=1)
    with pytest.raises(InputTypeError, match=r"OnHost whose cost cannot be descended .* CrossEntropy"):
        on_host.plan(START, on_host.init(), jax.random.key(0))
    swing(horizon=3).check(jnp.array([1.0, 0.0]))


class Backwards(ProblemModel):
    @property
    def control_bounds(self):
        return np.ones(1), -np.ones(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: swing(horizon=0), InputError, "horizon is 0"),
        (lambda: swing(candidates=0), InputError, "candidates is 0"),
        (lambda: swing(iterations=-1), InputError, "iterations is -1"),
        (lambda: swing(learning_rate=0.0), InputError, "learning_rate is 0"),
        (lambda: swing(std=-1.0), InputError, "std is -1"),
        (lambda: swing(discount=0.0), InputError, "discount is 0"),
        (lambda: GradientPlanner(Backwards(Pendulum())), InputError, "control_bounds is"),
        (
            lambda: PolicyProposals(ProblemModel(Pendulum()), LinearFeedback(jnp.ones((1, 2))), count=0),
            InputError,
            "count is 0",
        ),
        (
            lambda: PolicyProposals(ProblemModel(Pendulum()), LinearFeedback(jnp.ones((1, 2))), horizon=0),
            InputError,
            "horizon is 0",
        ),
        (
            lambda: PolicyProposals(ProblemModel(Pendulum()), LinearFeedback(jnp.ones((1, 2))), std=-1.0),
            InputError,
            "std is -1",
        ),
    ],
)
def test_bad_input_is_named(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
