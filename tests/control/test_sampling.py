"""One loop, many rules: what each must do, against closed forms and against each other."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.control import (
    CrossEntropy,
    ImprovedCrossEntropy,
    PathIntegral,
    PredictiveSampling,
    ProblemModel,
    RandomShooting,
    SamplingPlanner,
    Spline,
    coloured_noise,
    finite_horizon_lqr,
    look_ahead,
)
from steersman.envs import DoubleIntegrator, Pendulum, rollout, trajectory_cost
from steersman.errors import InputError

RULES = {
    "shooting": RandomShooting(),
    "predictive": PredictiveSampling(std=0.3),
    "cem": CrossEntropy(elites=8, std=0.5),
    "icem": ImprovedCrossEntropy(elites=8, std=0.5, keep=2),
    "mppi": PathIntegral(temperature=0.5, std=0.5),
    "mppi-elites": PathIntegral(temperature=0.5, std=0.5, elites=8, most_std=1.0),
}


@pytest.fixture(scope="module")
def swing() -> ProblemModel:
    return ProblemModel(Pendulum())


# Planners with the same shapes share a program: the problem's numbers are its arguments.
@eqx.filter_jit
def plan(planner, state, last, key):
    return planner.plan(state, last, key)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_improves_on_doing_nothing(swing: ProblemModel, name: str) -> None:
    planner = SamplingPlanner(swing, Spline(10, 5), RULES[name], samples=32, iterations=3, best=True)
    state = jnp.array([2.0, 0.0])
    idle = look_ahead(swing, state, jnp.zeros((10, 1))).cost
    found = plan(planner, state, planner.init(), jax.random.key(0))
    assert found.cost < idle
    assert found.controls.shape == (10, 1)
    low, high = swing.control_bounds
    assert bool(jnp.all((found.controls >= low) & (found.controls <= high)))
    # The reported cost is that of the controls that are reported, where the best candidate is played.
    np.testing.assert_allclose(look_ahead(swing, state, found.controls).cost, found.cost, rtol=1e-4)
    assert found.report["finite"] == 1.0


def test_look_ahead_is_the_problems_own_cost() -> None:
    problem = Pendulum()
    controls = 0.5 * jax.random.normal(jax.random.key(1), (12, 1))
    start = jnp.array([1.0, -0.5])
    states, applied = rollout(problem, controls, start)
    seen = look_ahead(ProblemModel(problem), start, controls)
    np.testing.assert_allclose(seen.cost, trajectory_cost(problem, states, applied), rtol=1e-5)
    np.testing.assert_allclose(seen.states, states[:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.last, states[-1], rtol=1e-5, atol=1e-6)


def test_discount_weighs_later_steps_less() -> None:
    model = ProblemModel(Pendulum())
    controls, start = jnp.zeros((3, 1)), jnp.array([1.0, 0.0])
    costs, state = [], start
    for _ in range(3):
        state, cost = model.step(state, controls[0])
        costs.append(cost)
    expected = costs[0] + 0.5 * costs[1] + 0.25 * costs[2] + 0.125 * model.terminal_cost(state)
    np.testing.assert_allclose(look_ahead(model, start, controls, discount=0.5).cost, expected, rtol=1e-5)


def test_cross_entropy_finds_the_open_loop_regulator() -> None:
    """Where no bound is active the best plan is that of the finite-horizon regulator (Riccati)."""
    problem = DoubleIntegrator(max_force=100.0, control_weight=0.1)
    planner = SamplingPlanner(
        ProblemModel(problem), Spline(8), CrossEntropy(elites=50, std=2.0, least_std=1e-4), samples=1000, iterations=30
    )
    start = jnp.array([1.0, 0.0])
    found = plan(planner, start, planner.init(), jax.random.key(2))
    A, B = problem.linearize()
    stage = np.diag([float(problem.position_weight), float(problem.velocity_weight)])
    solution = finite_horizon_lqr(A, B, stage, np.array([[0.1]]), float(problem.terminal_weight) * stage, 8)
    x, expected = np.asarray(start), []
    for gain in np.asarray(solution.gains):
        expected.append(-gain @ x)
        x = np.asarray(A) @ x + np.asarray(B) @ expected[-1]
    np.testing.assert_allclose(found.controls, np.stack(expected), atol=1e-2)


def test_path_integral_weights_are_a_softmax_that_ignores_failures_and_constants() -> None:
    rule = PathIntegral(temperature=2.0)
    costs = jnp.array([3.0, 1.0, jnp.inf, 7.0])
    expected = np.exp(-np.array([3.0, 1.0, np.inf, 7.0]) / 2.0)
    np.testing.assert_allclose(rule.weights(costs), expected / expected.sum(), rtol=1e-6)
    np.testing.assert_allclose(rule.weights(costs + 1e3), expected / expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(rule.weights(jnp.ones(5)), np.full(5, 0.2), rtol=1e-6)


def test_corrections_change_what_is_simulated_and_what_is_learned(swing: ProblemModel) -> None:
    def never_positive(state, u, step):
        return jnp.minimum(u, 0.0)

    planner = SamplingPlanner(
        swing, Spline(6), CrossEntropy(elites=4, std=1.0), samples=16, iterations=2, correct=never_positive
    )
    found = plan(planner, jnp.array([2.0, 0.0]), planner.init(), jax.random.key(3))
    assert bool(jnp.all(found.controls <= 0.0))
    assert bool(jnp.any(found.controls < 0.0))


def test_proposals_are_candidates(swing: ProblemModel) -> None:
    state = jnp.array([2.0, 0.0])
    known = jnp.ones((1, 6, 1))

    def propose(state, key):
        return known

    tiny = PredictiveSampling(std=1e-6)
    planner = SamplingPlanner(swing, Spline(6), tiny, samples=2, iterations=1, best=True, proposals=propose)
    found = plan(planner, state, planner.init(), jax.random.key(4))
    proposed, idle = look_ahead(swing, state, known[0]).cost, look_ahead(swing, state, 0.0 * known[0]).cost
    np.testing.assert_allclose(found.cost, jnp.minimum(proposed, idle), rtol=1e-4)


class Fragile(ProblemModel):
    """Costs are NaN wherever the control is positive, or everywhere."""

    everywhere: bool = eqx.field(static=True, default=False)

    def step(self, state, u):
        following, cost = super().step(state, u)
        return following, jnp.where((u[0] > 0.0) | self.everywhere, jnp.nan, cost)


@pytest.mark.parametrize("everywhere", [False, True])
def test_failed_candidates_cost_everything_and_are_counted(everywhere: bool) -> None:
    planner = SamplingPlanner(
        Fragile(Pendulum(), everywhere=everywhere), Spline(5), CrossEntropy(elites=4), samples=16, iterations=2
    )
    last = planner.init()
    found = plan(planner, jnp.array([1.0, 0.0]), last, jax.random.key(5))
    assert bool(jnp.all(jnp.isfinite(found.controls)))
    if everywhere:
        assert found.report["finite"] == 0.0
        assert jnp.isinf(found.cost)
        np.testing.assert_array_equal(found.controls, last.controls)
    else:
        assert 0.0 < found.report["finite"] < 1.0
        assert jnp.isfinite(found.cost)


def test_a_plan_is_a_policy_with_its_warm_start_in_the_memory(swing: ProblemModel) -> None:
    def angle(observation):
        return jnp.stack([jnp.arctan2(observation[1], observation[0]), observation[2]])

    model = ProblemModel(swing.problem, estimate=angle)
    policy = SamplingPlanner(model, Spline(15, 5), PredictiveSampling(std=0.8), samples=64, iterations=2).policy()
    states, controls = rollout(swing.problem, policy, jnp.array([0.25, 0.0]), key=jax.random.key(6), num_steps=60)
    # Upright is the origin: the planner holds the pendulum there, which no constant control does.
    assert float(jnp.max(jnp.abs(states[-10:, 0]))) < 0.3
    assert controls.shape == (60, 1)


@settings(max_examples=20, deadline=None)
@given(
    horizon=st.integers(2, 12),
    knots=st.integers(1, 12),
    kind=st.sampled_from(["zero", "linear", "cubic"]),
    value=st.floats(-3.0, 3.0),
)
def test_splines_of_constant_knots_are_constant_also_when_shifted(
    horizon: int, knots: int, kind: str, value: float
) -> None:
    spline = Spline(horizon, min(knots, horizon), kind)
    constant = jnp.full((spline.size, 2), value)
    np.testing.assert_allclose(spline.controls(constant), np.full((horizon, 2), value), atol=1e-4)
    np.testing.assert_allclose(spline.shift(constant), constant, atol=1e-4)
    np.testing.assert_allclose(spline.fit(spline.controls(constant)), constant, atol=1e-4)


def test_splines_interpolate() -> None:
    knots = jnp.array([[0.0], [2.0], [1.0]])
    np.testing.assert_allclose(Spline(5, 3, "linear").controls(knots)[:, 0], [0.0, 1.0, 2.0, 1.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(Spline(6, 3, "zero").controls(knots)[:, 0], [0.0, 0.0, 2.0, 2.0, 1.0, 1.0])
    # The natural cubic through (0, 0), (2, 2), (4, 1), by hand: second derivative -9/8 at the middle knot.
    np.testing.assert_allclose(Spline(5, 3, "cubic").controls(knots)[:, 0], [0, 41 / 32, 2, 57 / 32, 1], atol=1e-6)
    plan = jnp.array([[1.0], [2.0], [4.0]])
    np.testing.assert_array_equal(Spline(3).shift(plan)[:, 0], [2.0, 4.0, 4.0])


@pytest.mark.parametrize(("length", "exponent"), [(16, 2.0), (15, 1.0), (8, 0.0)])
def test_coloured_noise_has_unit_variance_and_its_spectrum(length: int, exponent: float) -> None:
    noise = np.asarray(coloured_noise(jax.random.key(7), (20_000, length, 1), exponent))[:, :, 0]
    assert noise.var() == pytest.approx(1.0, abs=0.03)
    power = np.mean(np.abs(np.fft.rfft(noise)) ** 2, axis=0)
    frequency = np.fft.rfftfreq(length)
    # Twice the frequency, 2^-exponent the power.
    assert power[4] / power[2] == pytest.approx((frequency[4] / frequency[2]) ** -exponent, rel=0.08)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: SamplingPlanner(model, Spline(3), CrossEntropy(elites=65)), "elites is 65"),
        (lambda model: SamplingPlanner(model, Spline(3), iterations=0), "iterations is 0"),
        (lambda model: SamplingPlanner(model, Spline(3), samples=0), "samples is 0"),
        (lambda model: SamplingPlanner(model, Spline(3), discount=1.5), "discount is 1.5"),
        (lambda model: Spline(0), "horizon is 0"),
        (lambda model: Spline(3, 4), "knots is 4"),
        (lambda model: Spline(3, 2, "quintic"), "kind 'quintic'"),
        (lambda model: PathIntegral(temperature=0.0), "temperature is 0"),
        (lambda model: PathIntegral(elites=0), "elites is 0"),
        (lambda model: CrossEntropy(momentum=1.0), "momentum is 1"),
        (lambda model: ImprovedCrossEntropy(elites=2, keep=3), "keep is 3"),
        (lambda model: ImprovedCrossEntropy(colour=-1.0), "colour is -1"),
        (lambda model: ProblemModel(Pendulum(), penalty=-1.0), "penalty is -1"),
        (
            lambda model: SamplingPlanner(
                ProblemModel(DoubleIntegrator(max_force=np.inf)), Spline(3), RandomShooting()
            ),
            "control_bounds are",
        ),
    ],
)
def test_bad_input_is_named(swing: ProblemModel, make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(swing)
