"""Linear-Gaussian problems, and the one whose velocity is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman import envs
from steersman.envs import HiddenVelocity, LinearGaussianProblem, as_problem, check
from steersman.errors import InputError

MATRICES = {"A": np.eye(2), "B": np.ones((2, 1)), "C": np.ones((1, 2)), "Q": np.eye(2), "R": np.eye(1)}
NOISES = {"process_noise": [0.1, 0.2], "measurement_noise": [0.3], "initial_spread": [1.0, 2.0]}


def test_one_step_by_hand():
    problem = HiddenVelocity()
    x, u, d = jnp.asarray([1.0, -2.0]), jnp.asarray([3.0]), jnp.asarray([1.0, -1.0])
    np.testing.assert_allclose(problem.dynamics(x, u), [0.8, -1.66], rtol=1e-6)
    np.testing.assert_allclose(problem.dynamics(x, u, d), [0.81, -1.76], rtol=1e-6)
    assert float(problem.stage_cost(x, u)) == pytest.approx(1.0 + 0.05 * 4 + 0.01 * 9)
    np.testing.assert_allclose(problem.observe(x), [1.0])


def test_moments_of_what_is_drawn():
    problem = HiddenVelocity()
    keys = jax.random.split(jax.random.key(0), 40_000)
    starts = np.asarray(jax.vmap(problem.initial_state)(keys))
    np.testing.assert_allclose(np.cov(starts.T), np.diag([1.0, 0.25]), atol=0.03)
    x = jnp.asarray([0.5, 7.0])
    seen = np.asarray(jax.vmap(lambda key: problem.observe(x, key))(keys))
    assert (seen.mean(), seen.std()) == pytest.approx((0.5, 0.1), abs=0.003)
    pushes = np.asarray(jax.vmap(problem.sample_disturbance)(keys)) @ np.asarray(problem.process_noise).T
    np.testing.assert_allclose(np.cov(pushes.T), np.diag([1e-4, 1e-2]), atol=3e-4)


def test_the_environment_hides_the_velocity_and_cuts_after_its_horizon():
    problem = envs.make("hidden-velocity")
    check(problem)
    assert problem.observation_space.shape == (1,)
    assert problem.action_space.shape == (1,)
    environment = HiddenVelocity(horizon=3).environment()
    _, state = environment.reset(jax.random.key(0))
    advance = jax.jit(lambda key, state: environment.step(key, state, jnp.zeros(1)))
    ends = []
    for step in range(3):
        _, state, _, terminated, truncated, _ = advance(jax.random.key(step), state)
        ends.append((bool(terminated), bool(truncated)))
    assert ends == [(False, False), (False, False), (False, True)]
    assert envs.make("hidden-velocity", horizon=7).environment.num_steps == 7


def test_noise_and_starts_can_be_varied_per_environment():
    problem = HiddenVelocity(sensor_noise=0.0, position_noise=0.0, velocity_noise=0.0)
    x = jnp.asarray([0.3, 0.4])
    np.testing.assert_array_equal(problem.observe(x, jax.random.key(0)), x[:1])
    heavier = problem.vary(B=[[0.0], [0.05]])
    np.testing.assert_allclose(heavier.dynamics(x, jnp.ones(1)), [0.34, 0.442], rtol=1e-6)


def test_an_own_problem_with_correlated_noise_and_a_mean():
    problem = LinearGaussianProblem(
        [[0.5, 1.0], [0.0, 1.0]], [[0.0], [1.0]], [[1.0, 0.0], [0.0, 2.0]], np.eye(2), [[1]],
        process_noise=[[1.0], [1.0]], measurement_noise=np.zeros((2, 0)), initial_spread=np.zeros((2, 0)),
        initial_mean=[1, 2], states=("a", "b"), title="own", horizon=5,
    )  # fmt: skip
    assert (problem.name, problem.state_names, problem.control_names) == ("own", ("a", "b"), ("control 1",))
    key = jax.random.key(0)
    np.testing.assert_array_equal(problem.initial_state(key), [1.0, 2.0])
    np.testing.assert_array_equal(problem.observe(problem.initial_state(key), key), [1.0, 4.0])
    moved = problem.dynamics(jnp.zeros(2), jnp.zeros(1), problem.sample_disturbance(key))
    assert moved[0] == moved[1]
    assert float(moved[0]) != 0.0
    check(as_problem(problem))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": np.ones((2, 3))}, r"A's shape is \(2, 3\)"),
        ({"A": np.ones(2)}, r"A's shape is \(2,\)"),
        ({"B": np.ones((3, 1))}, r"B's shape is \(3, 1\)"),
        ({"C": np.ones((1, 3))}, r"C's shape is \(1, 3\)"),
        ({"Q": [[1.0, 1.0], [0.0, 1.0]]}, "Q is .* symmetric"),
        ({"R": np.eye(2)}, r"R's shape is \(2, 2\)"),
        ({"A": [[np.nan, 0.0], [0.0, 1.0]]}, "A is"),
        ({"process_noise": [1.0]}, r"process_noise's shape is \(1,\)"),
        ({"measurement_noise": np.ones((2, 2))}, r"measurement_noise's shape is \(2, 2\)"),
        ({"initial_spread": np.inf * np.ones(2)}, "initial_spread is"),
        ({"initial_mean": [1.0]}, r"initial_mean's shape is \(1,\)"),
        ({"states": ("a",)}, "states is"),
        ({"controls": ("a", "b")}, "controls is"),
        ({"horizon": 0}, "horizon is 0"),
        ({"sample_time": 0.0}, "sample_time is"),
    ],
)
def test_bad_problems(changes, message):
    with pytest.raises(InputError, match=message):
        LinearGaussianProblem(**{**MATRICES, **NOISES, **changes})


@pytest.mark.parametrize("name", ["position_noise", "velocity_noise", "sensor_noise"])
def test_bad_noise(name):
    with pytest.raises(InputError, match=f"{name} is -1"):
        HiddenVelocity(**{name: -1.0})
