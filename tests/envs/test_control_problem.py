"""Rollouts, costs and environments of control problems."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import as_problem
from steersman.envs.control_problem import (
    ContinuousTimeProblem,
    ControlEnvironment,
    ControlProblem,
    as_parameter,
    rollout,
    trajectory_cost,
)
from steersman.envs.dynamics import CartPoleBalance, DoubleIntegrator, Pendulum, PlanarQuadrotor
from steersman.errors import InputError


class Leak(ControlProblem):
    """A tank that leaks: ``x' = leak x + u + d``, measured with noise, with a constraint and a failure."""

    leak: jax.Array = eqx.field(converter=as_parameter, default=0.5)
    sample_time: float = eqx.field(static=True, default=60.0)
    horizon: int = eqx.field(static=True, default=3)

    state_names = ("level",)
    control_names = ("inflow",)
    disturbance_names = ("rain",)
    constraint_names = ("below the brim",)
    failure_cost = 7.0

    def dynamics(self, x, u, d=None):
        return self.leak * x + u + (0.0 if d is None else d)

    def stage_cost(self, x, u):
        return x[0] ** 2 + u[0] ** 2

    def terminal_cost(self, x):
        return 10.0 * x[0] ** 2

    def initial_state(self, key):
        return jax.random.uniform(key, (1,))

    def sample_disturbance(self, key):
        return jax.random.normal(key, (1,))

    def observe(self, x, key=None):
        return x if key is None else x + 0.1 * jax.random.normal(key, (1,))

    def failed(self, x):
        return x[0] > 5.0

    def constraints(self, x, u):
        return x + u - 2.0


class Affine(eqx.Module):
    """A policy with memory: it adds up what it saw."""

    gain: jax.Array

    def init(self, key):
        return jnp.zeros(1)

    def __call__(self, observation, carry, key):
        carry = carry + observation
        return -self.gain * carry, carry


def test_rollout_of_controls_is_the_recursion():
    controls = jnp.asarray([[1.0], [2.0], [-1.0]])
    x, u = rollout(Leak(), controls, jnp.asarray([4.0]))
    np.testing.assert_allclose(x[:, 0], [4.0, 3.0, 3.5, 0.75])
    np.testing.assert_allclose(u, controls)
    cost = trajectory_cost(Leak(), x, u)
    assert float(cost) == pytest.approx(16 + 9 + 12.25 + (1 + 4 + 1) + 10 * 0.75**2)


def test_rollout_in_a_batch_takes_disturbances_time_first():
    disturbance = jnp.arange(6.0).reshape(3, 2, 1)
    x, u = rollout(Leak(), jnp.zeros((3, 1)), jnp.asarray([[0.0], [4.0]]), disturbance)
    assert x.shape == (4, 2, 1)
    assert u.shape == (3, 2, 1)
    np.testing.assert_allclose(x[:, 0, 0], [0, 0, 2, 5])
    np.testing.assert_allclose(x[:, 1, 0], [4, 3, 4.5, 7.25])
    np.testing.assert_allclose(trajectory_cost(Leak(), x, u), [0 + 0 + 4 + 250, 16 + 9 + 20.25 + 525.625])


def test_rollout_of_a_function_of_the_observation_and_of_a_policy_with_memory():
    x, u = rollout(Leak(), lambda observation: -0.5 * observation, jnp.asarray([4.0]), num_steps=2)
    np.testing.assert_allclose(x[:, 0], [4, 0, 0])
    np.testing.assert_allclose(u[:, 0], [-2, 0])
    problem = DoubleIntegrator(max_force=100.0)
    x, u = rollout(problem, lambda x: jnp.asarray([-1.0]) * x[0], jnp.ones((3, 2)))
    assert x.shape == (101, 3, 2)
    policy = Affine(jnp.asarray([0.5]))
    quiet = jnp.zeros((2, 1, 1))

    class Exact(Leak):
        def observe(self, x, key=None):
            return x

    x, u = rollout(Exact(), policy, jnp.asarray([[4.0]]), quiet, key=jax.random.key(0))
    np.testing.assert_allclose(u[:, 0, 0], [-2.0, -2.0])
    np.testing.assert_allclose(x[:, 0, 0], [4.0, 0.0, -2.0])


def test_a_key_brings_disturbances_and_no_key_brings_none():
    starts = jnp.zeros((4000, 1))
    still, _ = rollout(Leak(), jnp.zeros((2, 1)), starts)
    assert not still.any()
    shaken, _ = rollout(Leak(), jnp.zeros((2, 1)), starts, key=jax.random.key(3))
    # Variance of x[2] = leak d[0] + d[1] with unit disturbances.
    assert float(shaken[2].var()) == pytest.approx(1.25, rel=0.1)
    again, _ = rollout(Leak(), jnp.zeros((2, 1)), starts, key=jax.random.key(3))
    np.testing.assert_array_equal(shaken, again)


def test_controls_saturate_like_an_actuator_unless_told_otherwise():
    problem = DoubleIntegrator(max_force=1.0)
    _, u = rollout(problem, jnp.full((2, 1), 3.0), jnp.zeros(2))
    np.testing.assert_array_equal(u, 1.0)
    _, u = rollout(problem, jnp.full((2, 1), 3.0), jnp.zeros(2), saturate=False)
    np.testing.assert_array_equal(u, 3.0)
    thrust = PlanarQuadrotor().saturate(jnp.asarray([-1.0, 9.0]))
    np.testing.assert_array_equal(thrust, [0.0, 5.0])


def test_gradients_through_a_rollout_are_finite_differences():
    with jax.enable_x64():
        start = jnp.asarray([0.0, 0.0, 0.1, 0.0])
        controls = 0.3 * jnp.sin(jnp.arange(20.0))[:, None]

        @jax.jit
        def cost(controls, problem):
            return trajectory_cost(problem, *rollout(problem, controls, start))

        problem = CartPoleBalance()
        by_control, by_problem = jax.jit(jax.grad(cost, argnums=(0, 1)))(controls, problem)
        step = 1e-6
        for t in (0, 7, 19):
            up, down = controls.at[t].add(step), controls.at[t].add(-step)
            difference = (cost(up, problem) - cost(down, problem)) / (2 * step)
            np.testing.assert_allclose(by_control[t, 0], difference, rtol=1e-5)
        heavy, light = problem.vary(pole_mass=0.1 + step), problem.vary(pole_mass=0.1 - step)
        difference = (cost(controls, heavy) - cost(controls, light)) / (2 * step)
        np.testing.assert_allclose(by_problem.pole_mass, difference, rtol=1e-5)


def test_problems_can_be_varied_one_by_one_and_mapped_over():
    masses = jnp.asarray([0.5, 1.0, 2.0])
    problems = jax.vmap(lambda mass: DoubleIntegrator().vary(mass=mass))(masses)
    moved = jax.vmap(lambda p: p.dynamics(jnp.zeros(2), jnp.ones(1)))(problems)
    np.testing.assert_allclose(moved[:, 1], 0.1 / masses, rtol=1e-6)
    with pytest.raises(InputError, match=r"'mas'.*'mass'"):
        DoubleIntegrator().vary(mas=2.0)
    with pytest.raises(InputError, match=r"wind is .* shape \(2,\)"):
        PlanarQuadrotor().vary(wind=1.0)


def test_the_environment_of_a_problem():
    leak = Leak()
    environment = leak.environment(num_steps=2)
    assert isinstance(environment, ControlEnvironment)
    assert leak.environment().num_steps == 3
    assert environment.sample_time == 60.0
    assert environment.default_params is leak
    assert environment.action_space(leak).shape == (1,)

    class Quiet(Leak):
        def sample_disturbance(self, key):
            return jnp.zeros(1)

    quiet = Quiet()
    environment = quiet.environment(num_steps=2)
    _, state = environment.reset(jax.random.key(0))
    state = eqx.tree_at(lambda s: s.x, state, jnp.asarray([4.0]))
    observation, state, reward, terminated, truncated, info = environment.step(
        jax.random.key(1), state, jnp.asarray([1.0])
    )
    assert float(reward) == -17.0
    assert float(info["costs"]["below the brim"]) == 3.0
    assert not bool(terminated)
    assert not bool(truncated)
    np.testing.assert_allclose(observation, 3.0, atol=0.5)
    # The tank overflows: failure costs 7 on top of the step, and ends the episode without being cut.
    _, state, reward, terminated, truncated, _ = environment.step(
        jax.random.key(1), eqx.tree_at(lambda s: s.steps, state, jnp.asarray(0)), jnp.asarray([6.0])
    )
    assert (float(reward), bool(terminated), bool(truncated)) == (-9.0 - 36.0 - 7.0, True, False)
    # The parameters are an argument: another leak, the same environment.
    _, state = environment.reset(jax.random.key(0))
    state = eqx.tree_at(lambda s: s.x, state, jnp.asarray([2.0]))
    _, state, *_ = environment.step(jax.random.key(1), state, jnp.asarray([0.0]), quiet.vary(leak=1.0))
    np.testing.assert_allclose(state.x, 2.0)


def test_environments_run_with_one_set_of_parameters_per_copy():
    masses = jnp.asarray([0.5, 2.0])
    problems = jax.vmap(lambda mass: DoubleIntegrator().vary(mass=mass))(masses)
    from steersman.envs import Problem

    problem = Problem(DoubleIntegrator().environment(), problems, batched_params=True)
    keys = jax.random.split(jax.random.key(0), 2)
    _, state = problem.reset(keys)
    _, following, *_ = problem.step(keys, state, jnp.ones((2, 1)))
    np.testing.assert_allclose((following.x - state.x)[:, 1], 0.1 / masses, rtol=1e-5)


def test_a_control_problem_is_a_problem_by_itself():
    problem = as_problem(Pendulum())
    assert problem.name == "pendulum-swingup"
    assert problem.environment.num_steps == 200


def test_semi_implicit_needs_velocities():
    class Decay(ContinuousTimeProblem):
        sample_time: float = eqx.field(static=True, default=0.1)
        horizon: int = eqx.field(static=True, default=3)
        integrator: str = eqx.field(static=True, default="semi_implicit")
        substeps: int = eqx.field(static=True, default=1)
        state_names = ("level",)
        control_names = ("inflow",)

        def derivative(self, x, u, d):
            return u - x

        def stage_cost(self, x, u):
            return x[0] ** 2

        def initial_state(self, key):
            return jnp.ones(1)

    with pytest.raises(InputError, match="integrator is 'semi_implicit'"):
        Decay()
    x = Decay(integrator="rk4").dynamics(jnp.ones(1), jnp.zeros(1))
    np.testing.assert_allclose(x, np.exp(-0.1), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: rollout(Leak(), jnp.zeros((3, 1)), jnp.zeros((2, 2))), r"x0\.shape"),
        (lambda: rollout(Leak(), jnp.zeros((3, 5, 1)), jnp.zeros((2, 1))), r"controls\.shape"),
        (lambda: rollout(Leak(), jnp.zeros((3, 2)), jnp.zeros((2, 1))), r"controls\.shape"),
        (lambda: rollout(Leak(), jnp.zeros((3, 1)), jnp.zeros((2, 1)), jnp.zeros((3, 2, 4))), r"disturbance\.shape"),
        (lambda: rollout(Leak(), jnp.zeros((3, 1)), jnp.zeros((2, 1)), jnp.zeros((4, 2, 1))), "disturbance length"),
        (lambda: rollout(Leak(), jnp.zeros((3, 1)), jnp.zeros((2, 1)), num_steps=4), "num_steps"),
        (lambda: rollout(Leak(), Affine(jnp.ones(1)), jnp.zeros((2, 1))), "key is None"),
        (lambda: Leak().environment(num_steps=0), "num_steps"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    with pytest.raises(InputError, match=argument):
        call()


def test_only_control_problems_make_control_environments():
    with pytest.raises(TypeError, match="problem"):
        ControlEnvironment(1.0, 10)
