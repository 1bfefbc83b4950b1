"""Known equations against Gymnasium, the matrix exponential, conserved energy and hand-derived Jacobians."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs import as_problem
from steersman.envs.control_problem import ControlState, rollout
from steersman.envs.dynamics import (
    CartPoleBalance,
    CartPoleSwingUp,
    DiscreteCartPole,
    DoubleIntegrator,
    Pendulum,
    PlanarQuadrotor,
    wrap_angle,
)
from steersman.errors import InputError

ALL = [DoubleIntegrator, Pendulum, CartPoleBalance, CartPoleSwingUp, PlanarQuadrotor]
NUMBERS = np.random.default_rng(0)


def test_pendulum_steps_like_gymnasium():
    theirs = gymnasium.make("Pendulum-v1").unwrapped
    states = NUMBERS.uniform([-10, -8], [10, 8], (300, 2))
    actions = NUMBERS.uniform(-3, 3, (300, 1))
    next_states, observations, rewards = [], [], []
    for state, action in zip(states, actions, strict=True):
        theirs.state, theirs.last_u = state, None
        observation, reward, *_ = theirs.step(action)
        next_states.append(theirs.state)
        observations.append(observation)
        rewards.append(reward)
    with jax.enable_x64():
        environment = Pendulum().environment()
        start = ControlState(jnp.asarray(states), jnp.zeros(300, jnp.int32))
        step = jax.vmap(environment.step_env, in_axes=(None, 0, 0, None))
        observation, state, reward, terminated, _ = jax.jit(step)(
            jax.random.key(0), start, jnp.asarray(actions), environment.default_params
        )
    np.testing.assert_allclose(state.x, next_states, atol=1e-9)
    np.testing.assert_allclose(observation, observations, atol=1e-6)
    np.testing.assert_allclose(reward, rewards, atol=1e-9)
    assert not terminated.any()


def test_pendulum_environment_starts_and_ends_like_gymnasium():
    spec = gymnasium.spec("Pendulum-v1")
    theirs = gymnasium.make("Pendulum-v1")
    environment = Pendulum().environment()
    problem = as_problem(environment)
    assert environment.num_steps == spec.max_episode_steps == 200
    assert problem.action_space == theirs.action_space
    assert problem.observation_space == theirs.observation_space
    keys = jax.random.split(jax.random.key(1), 2000)
    _, state = problem.reset(keys)
    assert jnp.all(jnp.abs(state.x) <= jnp.asarray([np.pi, 1.0]))
    # Uniform: mean zero and standard deviation width / sqrt(12), within four standard errors.
    np.testing.assert_allclose(state.x.mean(0), 0.0, atol=4 * np.pi / np.sqrt(3 * 2000))
    np.testing.assert_allclose(state.x.std(0), np.asarray([np.pi, 1.0]) / np.sqrt(3), rtol=0.05)
    late = ControlState(jnp.zeros((1, 2)), jnp.asarray([199], jnp.int32))
    _, state, _, terminated, truncated, info = problem.step(keys[:1], late, jnp.zeros((1, 1)))
    assert bool(truncated[0])
    assert not bool(terminated[0])
    assert int(state.steps[0]) == 0
    np.testing.assert_allclose(info["final_observation"][0], [1.0, 0.0, 0.0])


def gymnasium_cartpole_steps(states, actions):
    theirs = gymnasium.make("CartPole-v1").unwrapped
    theirs.reset(seed=0)
    results = []
    for state, action in zip(states, actions, strict=True):
        theirs.state, theirs.steps_beyond_terminated = state, None
        _, reward, terminated, _, _ = theirs.step(int(action))
        results.append((theirs.state, reward, terminated))
    return [np.asarray(column) for column in zip(*results, strict=True)]


def test_cartpole_steps_like_gymnasium():
    states = NUMBERS.uniform([-2.5, -3, -0.25, -3], [2.5, 3, 0.25, 3], (400, 4))
    actions = NUMBERS.integers(0, 2, 400)
    next_states, rewards, terminations = gymnasium_cartpole_steps(states, actions)
    assert 0.05 < terminations.mean() < 0.95
    with jax.enable_x64():
        environment = DiscreteCartPole()
        start = ControlState(jnp.asarray(states), jnp.zeros(400, jnp.int32))
        step = jax.vmap(environment.step_env, in_axes=(None, 0, 0, None))
        observation, state, reward, terminated, _ = jax.jit(step)(
            jax.random.key(0), start, jnp.asarray(actions), environment.default_params
        )
        forces = jnp.where(jnp.asarray(actions) == 1, 10.0, -10.0)[:, None]
        continuous = jax.vmap(CartPoleBalance().dynamics)(jnp.asarray(states), forces)
    np.testing.assert_allclose(state.x, next_states, atol=1e-9)
    np.testing.assert_allclose(observation, next_states, atol=1e-9)
    np.testing.assert_allclose(continuous, next_states, atol=1e-9)
    np.testing.assert_array_equal(terminated, terminations)
    np.testing.assert_array_equal(reward, rewards)


def test_discrete_cartpole_is_cut_at_200_steps_without_being_terminated():
    environment = DiscreteCartPole()
    assert environment.action_space(environment.default_params) == gymnasium.spaces.Discrete(2)
    assert environment.observation_space(environment.default_params) == gymnasium.make("CartPole-v1").observation_space
    upright = ControlState(jnp.zeros(4), jnp.asarray(199, jnp.int32))
    _, _, reward, terminated, truncated, _ = environment.step(jax.random.key(0), upright, jnp.asarray(0))
    assert (float(reward), bool(terminated), bool(truncated)) == (1.0, False, True)


@settings(max_examples=10, deadline=None)
@given(
    mass=st.floats(0.1, 10),
    sample_time=st.floats(0.001, 2),
    force=st.floats(-5, 5),
    disturbance=st.floats(-5, 5),
    position=st.floats(-5, 5),
    velocity=st.floats(-5, 5),
)
def test_double_integrator_is_the_matrix_exponential(mass, sample_time, force, disturbance, position, velocity):
    generator = np.zeros((3, 3))
    generator[0, 1] = 1.0
    generator[1, 2] = 1.0 / mass
    exact = scipy.linalg.expm(generator * sample_time) @ [position, velocity, force + disturbance]
    with jax.enable_x64():
        problem = DoubleIntegrator(mass=mass, sample_time=sample_time)
        x = problem.dynamics(jnp.asarray([position, velocity]), jnp.asarray([force]), jnp.asarray([disturbance]))
    np.testing.assert_allclose(x, exact[:2], atol=1e-9)


def test_double_integrator_in_two_dimensions_has_the_costs_that_it_states():
    problem = DoubleIntegrator(num_dimensions=2, position_weight=2.0, velocity_weight=3.0, control_weight=5.0)
    x, u = jnp.asarray([1.0, 2.0, 3.0, 4.0]), jnp.asarray([0.5, 1.0])
    assert float(problem.stage_cost(x, u)) == pytest.approx(2 * 5 + 3 * 25 + 5 * 1.25)
    assert float(problem.terminal_cost(x)) == pytest.approx(10 * (2 * 5 + 3 * 25))
    assert problem.state_names == ("position 1", "position 2", "velocity 1", "velocity 2")
    assert problem.control_size == 2


def pendulum_energy(x, gravity=10.0, mass=1.3, length=0.8):
    return 0.5 * mass * length**2 / 3 * x[..., 1] ** 2 + mass * gravity * length / 2 * np.cos(x[..., 0])


def cartpole_energy(x, gravity=9.8, cart=1.0, pole=0.1, half=0.5):
    _, v, angle, w = np.moveaxis(x, -1, 0)
    kinetic = 0.5 * (cart + pole) * v**2 + pole * half * np.cos(angle) * v * w + 0.5 * pole * half**2 * 4 / 3 * w**2
    return kinetic + pole * gravity * half * np.cos(angle)


def test_energy_is_conserved_without_friction_and_without_force():
    with jax.enable_x64():
        swinging = Pendulum(mass=1.3, length=0.8, max_speed=np.inf, integrator="rk4", sample_time=0.01, horizon=500)
        x, _ = rollout(swinging, jnp.zeros((500, 1)), jnp.asarray([2.0, 1.0]))
        energy = pendulum_energy(np.asarray(x))
        np.testing.assert_allclose(energy, energy[0], rtol=1e-6)
        assert np.ptp(np.asarray(x)[:, 0]) > 1.0
        falling = CartPoleSwingUp(sample_time=0.01)
        x, _ = rollout(falling, jnp.zeros((500, 1)), jnp.asarray([0.0, 0.3, 0.5, 0.0]))
        energy = cartpole_energy(np.asarray(x))
        np.testing.assert_allclose(energy, energy[0], atol=1e-6)
        momentum = 1.1 * np.asarray(x)[:, 1] + 0.05 * np.cos(np.asarray(x)[:, 2]) * np.asarray(x)[:, 3]
        np.testing.assert_allclose(momentum, momentum[0], atol=1e-6)


def test_damping_takes_energy_away():
    damped = Pendulum(damping=0.2, max_speed=np.inf, integrator="rk4")
    x, _ = rollout(damped, jnp.zeros((50, 1)), jnp.asarray([2.0, 1.0]))
    assert np.all(np.diff(pendulum_energy(np.asarray(x), mass=1.0, length=1.0)) < 0)


def test_cartpole_linearizes_to_the_matrices_that_the_literature_prints():
    a, b = CartPoleBalance().linearize()
    expected = [[1, 0.02, 0, 0], [0, 1, -0.01434, 0], [0, 0, 1, 0.02], [0, 0, 0.31555, 1]]
    np.testing.assert_allclose(a, expected, atol=5e-5)
    np.testing.assert_allclose(b[:, 0], [0, 0.01951, 0, -0.02927], atol=5e-6)


def test_quadrotor_hovers_and_linearizes_as_derived_by_hand():
    problem = PlanarQuadrotor(integrator="euler", sample_time=0.02)
    x, u = problem.equilibrium
    np.testing.assert_allclose(problem.dynamics(x, u), x, atol=1e-7)
    assert float(problem.stage_cost(x, u)) == 0.0
    # From the equations of motion, at zero tilt with u1 + u2 = m g: x'' = -g tilt, z'' = (du1 + du2) / m,
    # tilt'' = arm (du2 - du1) / inertia.
    g, m, arm, inertia, h = 9.81, 0.486, 0.25, 0.00383, 0.02
    a, b = np.eye(6), np.zeros((6, 2))
    a[0, 3] = a[1, 4] = a[2, 5] = h
    a[3, 2] = -g * h
    b[4] = h / m
    b[5] = np.asarray([-1, 1]) * arm / inertia * h
    computed_a, computed_b = problem.linearize()
    np.testing.assert_allclose(computed_a, a, atol=1e-6)
    np.testing.assert_allclose(computed_b, b, atol=1e-5)


def test_quadrotor_drifts_with_the_wind_and_fails_on_the_ground():
    calm, windy = PlanarQuadrotor(), PlanarQuadrotor(wind=(0.486, 0.0), gust=0.1)
    x, u = calm.equilibrium
    drift, _ = rollout(windy, jnp.broadcast_to(u, (25, 2)), x, jnp.broadcast_to(windy.wind, (25, 2)))
    # One second under a force of one newton per kilogram, without turning: half a metre.
    np.testing.assert_allclose(drift[-1, :2], [0.5, 1.5], atol=1e-5)
    draws = jax.vmap(windy.sample_disturbance)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draws.mean(0), [0.486, 0.0], atol=0.01)
    np.testing.assert_allclose(draws.std(0), 0.1, rtol=0.05)
    assert not bool(calm.failed(x))
    for crash in ([0.0, -0.01], [0.0, 3.01], [3.01, 1.0], [-3.01, 1.0]):
        assert bool(calm.failed(x.at[:2].set(jnp.asarray(crash))))


def test_substeps_approach_the_exact_flow():
    with jax.enable_x64():
        x, u = jnp.asarray([2.5, 0.5]), jnp.asarray([1.0])
        exact = Pendulum(integrator="rk4", substeps=64, sample_time=0.2).dynamics(x, u)
        for integrator, order in (("euler", 1), ("semi_implicit", 1), ("rk4", 4)):
            errors = [
                float(
                    jnp.abs(Pendulum(integrator=integrator, substeps=n, sample_time=0.2).dynamics(x, u) - exact).max()
                )
                for n in (4, 8)
            ]
            assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1000, 1000))
def test_wrapped_angles_are_the_same_angle(angle):
    with jax.enable_x64():
        wrapped = float(wrap_angle(jnp.asarray(angle)))
    assert -np.pi <= wrapped < np.pi
    np.testing.assert_allclose([np.cos(wrapped), np.sin(wrapped)], [np.cos(angle), np.sin(angle)], atol=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_names_units_and_bounds_have_the_sizes_of_the_problem(kind):
    problem = kind()
    x, u = problem.equilibrium
    low, high = problem.control_bounds
    assert x.shape == (problem.state_size,) == problem.dynamics(x, u).shape == problem.state_bounds[0].shape
    assert u.shape == (problem.control_size,) == low.shape == high.shape
    assert len(problem.state_units) == problem.state_size
    assert len(problem.control_units) == problem.control_size
    assert problem.observe(x).shape == problem.observation_bounds[0].shape
    assert np.all(low <= u)
    assert np.all(u <= high)
    np.testing.assert_allclose(problem.dynamics(x, u), x, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: DoubleIntegrator(mass=0.0), "mass"),
        (lambda: DoubleIntegrator(num_dimensions=0), "num_dimensions"),
        (lambda: DoubleIntegrator(control_weight=-1.0), "control_weight"),
        (lambda: DoubleIntegrator(noise=-1.0), "noise"),
        (lambda: Pendulum(length=-1.0), "length"),
        (lambda: Pendulum(damping=-0.1), "damping"),
        (lambda: Pendulum(sample_time=0.0), "sample_time"),
        (lambda: Pendulum(horizon=0), "horizon"),
        (lambda: Pendulum(substeps=0), "substeps"),
        (lambda: Pendulum(integrator="rk5"), "integrator"),
        (lambda: CartPoleBalance(pole_mass=float("nan")), "pole_mass"),
        (lambda: CartPoleBalance(max_angle=0.0), "max_angle"),
        (lambda: CartPoleSwingUp(max_position=-1.0), "max_position"),
        (lambda: PlanarQuadrotor(inertia=0.0), "inertia"),
        (lambda: PlanarQuadrotor(gust=-1.0), "gust"),
        (lambda: DiscreteCartPole(num_steps=0), "num_steps"),
    ],
)
def test_bad_constants_are_refused_by_name(build, argument):
    with pytest.raises(InputError, match=argument):
        build()
