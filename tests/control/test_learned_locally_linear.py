"""Learned locally linear models against differences, regulators and the exact gradient."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control import ProblemModel, finite_horizon_lqr
from steersman.control.learned_locally_linear import LearnedLocallyLinear, LocalPolicy, response_gradient
from steersman.control.local_models import LeastSquares, perturbed_response
from steersman.control.locally_linear_planner import LocallyLinearPlanner
from steersman.control.rollout_oracles import ProblemOracle
from steersman.envs import DoubleIntegrator, rollout, trajectory_cost
from steersman.errors import InputError
from steersman.studies.learned_locally_linear import LeaningPole
from steersman.training import train

H = 12
HAND = jnp.broadcast_to(jnp.array([7.0, 1.5]), (H, 1, 2))


def linear(start: tuple[float, float] = (1.0, 0.0)) -> ProblemOracle:
    problem = DoubleIntegrator(max_force=np.inf, sample_time=0.2, control_weight=0.3)
    return ProblemOracle(problem, jnp.asarray(start))


def pole(start: tuple[float, float] = (1.0, 0.0), steps: int = H) -> ProblemOracle:
    return ProblemOracle(LeaningPole(horizon=steps), jnp.asarray(start))


@eqx.filter_jit
def iterate(algorithm, oracle, count):
    begun = algorithm.init(oracle, jax.random.key(0))
    return begun, *jax.lax.scan(lambda state, _: algorithm.step(oracle, state), begun, None, length=count)


@eqx.filter_jit
def play(oracle, gains, pushes):
    """States, controls and costs under ``-K x`` and pushes ``[N, H, 1]``."""
    states, controls = oracle(jnp.zeros((H, 1)), gains, pushes, jax.random.key(0))
    return states, controls, jax.vmap(lambda x, u: trajectory_cost(oracle.problem, x, u))(states, controls)


@eqx.filter_jit
def respond(oracle, policy):
    response = perturbed_response(
        oracle, LeastSquares(), *policy, rollouts=20, perturbation=1e-3, key=jax.random.key(1)
    )
    return response_gradient(oracle, policy, response), response.markov()


def test_the_gradient_is_that_of_the_closed_loop() -> None:
    with jax.enable_x64(True):
        oracle = pole()
        gains = jnp.asarray(HAND, float)
        # The law itself, and central differences of its cost: the nominal state does not move with the controls.
        pushes = 1e-5 * np.concatenate([np.eye(H), -np.eye(H), np.zeros((1, H))])[:, :, None]
        states, controls, cost = play(oracle, gains, jnp.asarray(pushes))
        found, _ = respond(oracle, LocalPolicy(controls[-1], states[-1], gains))
        expected = np.asarray(cost[:H] - cost[H:-1]) / 2e-5
        assert np.linalg.norm(found[:, 0] - expected) < 1e-3 * np.linalg.norm(expected)


def test_linear_quadratic_problems_are_solved_and_without_gains_the_gradient_is_the_adjoint_one() -> None:
    with jax.enable_x64(True):
        oracle = linear()
        problem = oracle.problem
        algorithm = LearnedLocallyLinear(
            jnp.zeros((H, 1)), state_cost=jnp.diag(jnp.array([1.0, 0.1])) / 0.2, control_cost=0.3 / 0.2, step_size=0.04
        )
        _, state, metrics = iterate(algorithm, oracle, 150)
        A, B = problem.linearize()
        stage = np.diag([1.0, 0.1])
        truth = finite_horizon_lqr(A, B, stage, np.array([[0.3]]), 10.0 * stage, H)
        best = float(truth.value[0][0, 0])
        assert float(metrics["cost"][-1]) == pytest.approx(best, rel=1e-6)
        assert float(state.score) == pytest.approx(float(jnp.min(metrics["gradient"])))
        still = state.current._replace(gains=jnp.zeros((H, 1, 2)), controls=jnp.ones((H, 1)))
        states, _ = rollout(problem, still.controls, oracle.start)
        found, _ = respond(oracle, still._replace(states=states))
        adjoint = jax.grad(lambda u: trajectory_cost(problem, *rollout(problem, u, oracle.start)))(still.controls)
        np.testing.assert_allclose(found, adjoint, rtol=1e-4, atol=1e-6)


def test_without_a_step_the_controls_stay_and_the_gains_follow_the_riccati_recursion() -> None:
    with jax.enable_x64(True):
        oracle = pole()
        begun, state, metrics = iterate(LearnedLocallyLinear(jnp.zeros((H, 1)), HAND, step_size=0.0), oracle, 2)
        current = state.current
        np.testing.assert_allclose(current.controls, begun.current.controls, atol=1e-9)
        np.testing.assert_allclose(current.states, begun.current.states, atol=1e-9)
        tau, value = 0.05, np.eye(2)
        for t in reversed(range(3, H)):
            A, B = (np.asarray(part) for part in oracle.problem.linearize(current.states[t], current.controls[t]))
            gain = np.linalg.solve(tau * 0.05 * np.eye(1) + B.T @ value @ B, B.T @ value @ A)
            closed = A - B @ gain
            value = tau * np.eye(2) + closed.T @ value @ closed + tau * 0.05 * gain.T @ gain
            np.testing.assert_allclose(current.gains[t], gain, rtol=2e-3)
        assert float(metrics["deficient"][-1]) == 0.0
        # One nominal rollout and two estimates an iteration, and the first guess.
        assert int(state.samples) == H + 2 * 41 * H


def test_gains_keep_the_response_bounded_where_it_grows_without() -> None:
    with jax.enable_x64(True):
        steps = 80
        oracle = pole((0.0, 0.0), steps)
        still = LocalPolicy(jnp.zeros((steps, 1)), jnp.zeros((steps + 1, 2)), jnp.zeros((steps, 1, 2)))
        held = still._replace(gains=jnp.broadcast_to(jnp.array([7.0, 1.5]), (steps, 1, 2)))
        size = [np.linalg.norm(respond(oracle, policy)[1][1:, 10], axis=(1, 2)) for policy in (still, held)]
        rate = np.log(size[0][70] / size[0][30]) / (40 * 0.05)
        assert rate == pytest.approx(2.0, rel=0.02)
        later = np.arange(10, steps)
        # x2' = -3 x1 - 1.5 x2: the slowest mode decays with 0.75 per second.
        assert np.all(size[1][later] <= 4.0 * size[1][10] * np.exp(-0.75 * (later - 10) * 0.05))


def test_the_training_loop_runs_it_and_the_policy_plays() -> None:
    oracle = pole()
    trained = train(LearnedLocallyLinear(jnp.zeros((H, 1)), HAND), oracle, iterations=6)
    policy = trained.policy()
    played = rollout(oracle.problem, policy, oracle.start, key=jax.random.key(0), num_steps=H)
    first = rollout(oracle.problem, lambda x: -HAND[0] @ x, oracle.start, num_steps=H)
    cost, before = (trajectory_cost(oracle.problem, *each) for each in (played, first))
    assert float(cost) < 0.99 * float(before)


class Fragile(LeaningPole):
    """Nothing is finite far away."""

    def dynamics(self, x, u, d=None):
        return jnp.where(jnp.abs(u[0]) > 50.0, jnp.nan, super().dynamics(x, u, d))


def test_a_step_that_diverges_is_not_taken_and_halves_the_next() -> None:
    oracle = ProblemOracle(Fragile(), jnp.array([1.0, 0.0]))
    begun, state, metrics = iterate(LearnedLocallyLinear(jnp.zeros((H, 1)), HAND, step_size=1e4), oracle, 2)
    np.testing.assert_array_equal(metrics["halved"], 1.0)
    assert float(state.scale) == 0.25
    for now, before in zip(state.current, begun.current, strict=True):
        np.testing.assert_array_equal(now, before)


def test_in_receding_horizon_it_holds_the_pole() -> None:
    problem = LeaningPole()
    planner = LocallyLinearPlanner(
        ProblemModel(problem), LearnedLocallyLinear(jnp.zeros((H, 1)), HAND, rollouts=4), iterations=2
    )
    states, _ = rollout(problem, planner.policy(), jnp.array([0.5, 0.0]), key=jax.random.key(0), num_steps=80)
    assert float(jnp.max(jnp.abs(states[-5:]))) < 0.1


ZERO = jnp.zeros((H, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedLocallyLinear(ZERO, rollouts=2).init(pole(), jax.random.key(0)), "rollouts is 2"),
        (lambda: LearnedLocallyLinear(ZERO, window=1).init(pole(), jax.random.key(0)), "window is 1"),
        (lambda: LearnedLocallyLinear(ZERO, perturbation=0.0), "perturbation is 0"),
        (lambda: LearnedLocallyLinear(ZERO, HAND, perturbation=1e-8).init(pole(), jax.random.key(0)), 
         "perturbation is"),
        (lambda: LearnedLocallyLinear(ZERO, window=11), "controls is '12 steps'"),
        (lambda: LearnedLocallyLinear(ZERO, window=0), "window is 0"),
        (lambda: LearnedLocallyLinear(ZERO, step_size=-1.0), "step_size is -1"),
        (lambda: LearnedLocallyLinear(ZERO, nominal_rollouts=0), "nominal_rollouts is 0"),
        (lambda: LearnedLocallyLinear(ZERO, select="best"), "select 'best'"),
        (lambda: LearnedLocallyLinear(ZERO, jnp.zeros((H, 1, 3))).init(pole(), jax.random.key(0)), "gains' shape"),
        (lambda: LearnedLocallyLinear(jnp.zeros((H, 2))).init(pole(), jax.random.key(0)), "controls' sh"),
        (lambda: LearnedLocallyLinear(100.0 + ZERO).init(ProblemOracle(Fragile(), jnp.zeros(2)), jax.random.key(0)),
         "controls is 'a first guess'"),
        (lambda: LocallyLinearPlanner(ProblemModel(LeaningPole()), LearnedLocallyLinear(ZERO), 0), 
         "iterations is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
