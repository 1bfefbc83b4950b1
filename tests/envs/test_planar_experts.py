"""Experts that succeed, exact policies against sampling and linear algebra, demonstrations of known statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from steersman.envs import DetourReach, Discs, DriftingGoal, ObstacleGate
from steersman.envs.planar import DriftingGoalParams
from steersman.envs.planar_experts import (
    cloud_reading,
    detour_policy,
    detour_route,
    drifting_policy,
    drifting_route,
    gate_actions,
    gate_demonstrations,
    image_reading,
    reach_chunk,
    reach_posterior,
    reach_success,
    two_modality_demonstrations,
    two_mode_chunk,
    two_mode_demonstrations,
    two_mode_policy,
    two_mode_score,
    two_sensor_demonstrations,
    waypoint_route,
)
from steersman.errors import InputError

KEY = jax.random.key(0)
UP = jnp.asarray([0.3, 0.1])


# ---- routes


def written_out(position, waypoints, switch, step_length, rows, gain):
    route, q = [], np.asarray(position, float)
    for _ in range(rows):
        leg = sum(q[0] >= s for s in switch)
        gap = np.asarray(waypoints[leg]) - q
        length = np.linalg.norm(gap)
        reach = min(step_length, (gain if leg == len(waypoints) - 1 else 1.0) * length)
        q = q + gap / length * reach if length > 0 else q
        route.append(q)
    return np.asarray(route)


def test_routes_are_those_of_the_rules():
    start, goal = [-0.35, 0.3], [0.1, -0.3]
    np.testing.assert_allclose(
        detour_route(jnp.asarray(start), -1, 12),
        written_out(start, [[0.0, -0.8], [1.0, 0.0]], [-0.02], 0.1, 12, 1.0),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        drifting_route(jnp.asarray([-1.8, 0.0]), jnp.asarray(goal), 1, 24),
        written_out([-1.8, 0.0], [[-1.35, 0.6], goal], [-1.37], 0.12, 24, 0.25),
        atol=1e-5,
    )
    route = written_out([-0.6, 0.1], [[-0.4, 0.5], [0.3, 0.42], [1.2, 0.0]], [-0.42, 0.28], 0.09, 20, 1.0)
    actions = np.diff(np.concatenate([[[-0.6, 0.1]], route]), axis=0) / 0.1
    np.testing.assert_allclose(gate_actions(jnp.asarray([-0.6, 0.1]), 1, 20), actions, atol=1e-5)
    assert np.abs(actions).max() <= 0.9 + 1e-6
    # Past the first waypoint an expert stays on the side that it is on.
    below = gate_actions(jnp.asarray([0.0, -0.5]), 1, 2)
    np.testing.assert_allclose(below, gate_actions(jnp.asarray([0.0, -0.5]), -1, 2))
    assert np.isfinite(jax.jacobian(lambda p: detour_route(p, 1))(jnp.asarray([1.0, 0.0]))).all()


def closed_loop(environment, act, steps, copies=200):
    """A function of the environment's parameters that gives the return of each episode of a policy."""

    def episode(key, side, params):
        reset_key, key = jax.random.split(key)
        observation, state = environment.reset_env(reset_key, params)

        def step(carry, key):
            observation, state, running, total = carry
            following, state, reward, terminated, _ = environment.step_env(key, state, act(observation, side), params)
            total = total + jnp.where(running, reward, 0.0)
            return (following, state, running & ~terminated, total), None

        start = (observation, state, jnp.asarray(True), jnp.asarray(0.0))
        return jax.lax.scan(step, start, jax.random.split(key, steps))[0][3]

    sides = jnp.where(jnp.arange(copies) % 2 == 0, 1.0, -1.0)
    call = jax.jit(jax.vmap(episode, in_axes=(0, 0, None)))
    return lambda params: np.asarray(call(jax.random.split(KEY, copies), sides, params))


def test_experts_succeed():
    detour, gate = DetourReach(), ObstacleGate()
    assert closed_loop(detour, lambda o, side: detour_route(o, side, 1)[0], 50)(detour.default_params).mean() >= 0.99
    assert closed_loop(gate, lambda o, side: gate_actions(o, side, 1)[0], 36)(gate.default_params).mean() == 1.0
    hold = closed_loop(DriftingGoal(), lambda o, side: drifting_route(o[:2], o[2:], side, 1)[0], 60)
    assert hold(DriftingGoalParams(speed=0.0)).mean() >= 0.98
    # A drift of 0.04 leaves an expert that covers a quarter of the distance 0.04 / 0.25 = 0.16 behind.
    assert hold(DriftingGoalParams(speed=0.04)).mean() <= 0.4


# ---- exact policies


def test_detour_policies_have_a_mode_for_each_side():
    state = jnp.asarray([-2.2, 0.0, 0.0, 0.2])

    @jax.jit
    def policies():
        detours = jax.vmap(detour_policy)(jnp.stack([UP, -UP]))
        routes = detour_route(UP, -1, 8), drifting_route(state[:2], state[2:], 1, 6)
        return detours, drifting_policy(state, 6), two_mode_policy(jnp.asarray([0.2]), up=1.0), routes

    detours, drifting, single, routes = policies()
    mixture = jax.tree.map(lambda leaf: leaf[0], detours)
    np.testing.assert_allclose(mixture.weight, [expit(0.1 / 0.15), expit(-0.1 / 0.15)], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(mixture.mean[1]).reshape(8, 2), routes[0], rtol=1e-6)
    np.testing.assert_allclose(mixture.covariance, 0.03**2 * np.eye(16), atol=1e-9)
    assert detours.mean.shape == (2, 2, 16)
    assert detours.basis is None
    np.testing.assert_allclose(drifting.weight, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(drifting.mean[0]).reshape(6, 2), routes[1], rtol=1e-6)
    np.testing.assert_allclose(drifting.variance, 0.02**2, rtol=1e-6)
    np.testing.assert_array_equal(single.weight, [1.0, 0.0])


def goal_map(rows):
    return np.kron((np.arange(1, rows + 1) / rows)[:, None], np.eye(2))


@pytest.mark.parametrize("sensors", [0, 1, 2])
def test_posterior_against_linear_algebra(sensors):
    spread = np.asarray([[0.05, 0.5], [0.5, 0.05]])[:sensors]
    reading = np.asarray([[0.3, -0.4], [0.1, 0.2]])[:sensors]
    mixture = jax.jit(reach_posterior)(jnp.asarray(reading), jnp.asarray(spread))
    # Condition the joint Gaussian of the goal and all readings.
    stack = np.kron(np.ones((sensors, 1)), np.eye(2))
    of_readings = 0.16 * stack @ stack.T + np.diag(spread.reshape(-1) ** 2)
    gain = 0.16 * stack.T @ np.linalg.inv(of_readings)
    goal, variance = gain @ reading.reshape(-1), 0.16 * np.eye(2) - 0.16 * gain @ stack
    tau = np.arange(1, 9) / 8
    for mode, side in enumerate((1, -1)):
        line = np.stack([-2 * (1 - tau) + goal[0] * tau, goal[1] * tau + side * np.sin(np.pi * tau)], axis=1)
        np.testing.assert_allclose(mixture.mean[mode], line.reshape(-1), atol=1e-5)
    expected = goal_map(8) @ variance @ goal_map(8).T + 0.03**2 * np.eye(16)
    np.testing.assert_allclose(mixture.covariance, expected, atol=1e-6)
    np.testing.assert_allclose(mixture.basis.T @ mixture.basis, np.eye(16), atol=1e-6)
    np.testing.assert_allclose(mixture.weight, 0.5, rtol=1e-6)


def test_posterior_against_importance_sampling():
    """Moments of the chunks of a million goals from the prior, weighted by how likely they make two readings."""
    rng = np.random.default_rng(0)
    goal = 0.4 * rng.normal(size=(1_000_000, 2))
    reading, spread = np.asarray([[0.3, -0.4], [0.1, 0.2]]), np.asarray([[0.15, 0.5], [0.5, 0.15]])
    likelihood = np.exp(-0.5 * (((reading[:, None] - goal) / spread[:, None]) ** 2).sum(axis=(0, 2)))
    weight = likelihood / likelihood.sum()
    mean = weight @ goal
    second = (goal * weight[:, None]).T @ goal - np.outer(mean, mean)
    mixture = reach_posterior(jnp.asarray(reading), jnp.asarray(spread))
    np.testing.assert_allclose(mixture.mean[0].reshape(8, 2)[-1], mean, atol=2e-3)
    np.testing.assert_allclose(
        mixture.covariance, goal_map(8) @ second @ goal_map(8).T + 0.03**2 * np.eye(16), atol=2e-3
    )


def test_reaches_by_hand():
    goal = np.asarray([0.0, 0.4], np.float32)

    @jax.jit
    def reaches(goal):
        chunk, flat = reach_chunk(goal, 1), reach_chunk(goal, 1, height=0.0)
        small = Discs(jnp.asarray([[-1.0, 0.0]]), jnp.asarray([0.1]))
        cases = (chunk, goal), (chunk, goal + 0.2), (flat, goal)
        success = [reach_success(*case) for case in cases] + [reach_success(flat, goal, obstacle=small)]
        return chunk, jnp.stack(success)

    chunk, success = reaches(goal)
    np.testing.assert_allclose(chunk[3], [-1.0, 1.2], atol=1e-6)
    np.testing.assert_allclose(chunk[7], [0.0, 0.4], atol=1e-6)
    assert success.tolist() == [True, False, False, True]

    tau = np.arange(1, 5) / 4
    chunk = np.stack([tau, 0.5 * tau - 0.8 * np.sin(np.pi * tau)], axis=1).astype(np.float32)
    np.testing.assert_allclose(two_mode_chunk(jnp.asarray([0.5]), -1), chunk, atol=1e-6)
    score = jax.jit(jax.vmap(two_mode_score))(
        jnp.stack([chunk, chunk, chunk * np.asarray([1.0, 0.5])]), jnp.asarray([[0.5], [0.3], [0.25]])
    )
    # The second misses its goal, the third is between the modes.
    assert score.success.tolist() == [True, False, False]
    np.testing.assert_allclose(score.amplitude[jnp.asarray([0, 2])], [-0.8, -0.4], atol=1e-5)


# ---- sensors and demonstrations


def test_sensors_see_what_they_should():
    keys = jax.random.split(KEY, 2000)

    @jax.jit
    def read(goal):
        image = jax.vmap(lambda key: image_reading(key, goal, pixel_noise=0.0))(keys)
        cloud = jax.vmap(lambda key: cloud_reading(key, goal))(keys)
        return image, cloud

    goal = np.asarray([-0.4, 0.5])
    image, cloud = jax.device_get(read(jnp.asarray(goal)))
    further, _ = jax.device_get(read(jnp.asarray([-1.2, 0.25])))
    np.testing.assert_allclose(image, further, atol=1e-5)  # the same direction, twice as near
    looks = np.linspace(-0.6, 0.6, 24)
    centre = (image @ looks) / image.sum(axis=1)
    assert centre.mean() == pytest.approx(np.arctan2(0.5, 1.6), abs=2e-3)
    assert centre.std() == pytest.approx(0.02, rel=0.1)
    sight = (goal - [-2, 0]) / np.linalg.norm(goal - [-2, 0])
    offset = cloud - goal
    assert (offset @ sight).std() == pytest.approx(0.08, rel=0.03)
    across = offset @ [-sight[1], sight[0]]
    assert across.mean(axis=1).std() == pytest.approx(np.hypot(0.5, 0.08 / 4), rel=0.06)
    assert across.std(axis=1).mean() == pytest.approx(0.08, rel=0.05)


def test_demonstrations_of_reaches():
    spread = np.asarray([[0.05, 0.5], [0.5, 0.05]])
    data = jax.device_get(jax.jit(lambda key: two_sensor_demonstrations(key, 20_000, jnp.asarray(spread)))(KEY))
    assert data.goal.std(axis=0) == pytest.approx([0.4, 0.4], rel=0.03)
    np.testing.assert_allclose((data.observation - data.goal[:, None]).std(axis=0), spread, rtol=0.03)
    assert abs(data.side.mean()) < 4 / np.sqrt(20_000)
    tau = np.arange(1, 9) / 8
    line = np.stack([-2 * (1 - tau) + data.goal[:, :1] * tau, data.goal[:, 1:] * tau], axis=2)
    line[..., 1] += data.side[:, None] * np.sin(np.pi * tau)
    assert (data.chunk - line).std() == pytest.approx(0.03, rel=0.02)
    assert (data.chunk - line).mean() == pytest.approx(0.0, abs=1e-3)
    success = jax.jit(jax.vmap(reach_success))(data.chunk, data.goal)
    clear = (np.linalg.norm(data.chunk - [-1.0, 0.0], axis=-1) > 0.5).all(axis=1)
    np.testing.assert_array_equal(success, clear & (np.linalg.norm(data.chunk[:, -1] - data.goal, axis=-1) < 0.15))
    # Readings and chunks belong together: the exact posterior's errors have their claimed spread.
    posterior = jax.jit(jax.vmap(lambda reading: reach_posterior(reading, jnp.asarray(spread))))
    mixture = posterior(data.observation[:5000])
    covariance = (mixture.basis[0] * mixture.variance[0]) @ mixture.basis[0].T
    own = np.asarray(mixture.mean)[np.arange(5000), np.where(data.side[:5000] > 0, 0, 1)]
    error = data.chunk[:5000].reshape(5000, -1) - own
    np.testing.assert_allclose(np.cov(error.T), covariance, atol=3e-4)


def test_demonstrations_of_other_tasks():
    data = jax.eval_shape(lambda key: two_modality_demonstrations(key, 64, bearing_noise=0.4), KEY)
    assert data.observation["image"].shape == (64, 24)
    assert data.observation["point_cloud"].shape == (64, 16, 2)
    assert data.chunk.shape == (64, 8, 2)

    @jax.jit
    def demonstrate(key):
        data = two_mode_demonstrations(key, 4000, up=0.25)
        return data, jax.vmap(two_mode_score)(data.chunk, data.observation)

    data, score = jax.device_get(demonstrate(KEY))
    assert float(score.success.mean()) > 0.999
    assert float((score.amplitude > 0).mean()) == pytest.approx(0.25, abs=0.03)
    assert float(np.abs(data.goal).max()) <= 0.6


def test_demonstrations_of_the_gate_are_episodes():
    make = jax.jit(
        lambda key, noise, probability, limit: gate_demonstrations(
            key, 1000, noise=noise, noise_probability=probability, limit=limit
        )
    )
    clean = jax.device_get(make(KEY, 0.0, 1.0, 9.0))
    assert clean.success.all()
    little = jax.device_get(make(KEY, 0.25, 1.0, 9.0))
    much = jax.device_get(make(KEY, 0.6, 0.7, 1.5))
    assert 0.5 < little.success.mean() < 0.7
    assert 0.3 < much.success.mean() < 0.45
    assert np.abs(much.chunk).max() <= 1.5
    for data in (little, much):
        assert data.chunk.shape == (1000, 9, 4, 2)
        np.testing.assert_array_equal((data.reward * data.valid).sum(axis=1), data.success)
        # Decisions are valid up to the first that ends an episode, and every episode has one.
        ended = data.terminated | data.truncated
        np.testing.assert_array_equal(data.valid[:, 1:], data.valid[:, :-1] & ~ended[:, :-1])
        assert (ended & data.valid).any(axis=1).all()
        assert (data.duration[data.valid & ~ended] == 4).all()
        np.testing.assert_array_equal(
            data.observation[:, 1:][data.valid[:, 1:]], data.next_observation[:, :-1][data.valid[:, 1:]]
        )
        # What was played is what moved the point.
        position, played = data.observation.copy(), data.duration[..., None, None] > np.arange(4)[:, None]
        position = position + (0.1 * np.clip(data.chunk, -1, 1) * played).sum(axis=2)
        np.testing.assert_allclose(position[data.valid], data.next_observation[data.valid], atol=1e-5)
    noise = (much.chunk - clean.chunk)[:, 0]
    assert (np.abs(noise).max(axis=(1, 2)) > 0).mean() == pytest.approx(0.7, abs=0.06)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: waypoint_route(UP, jnp.zeros((2, 2)), jnp.zeros(1), 0.1, 0), "rows is 0"),
        (lambda: waypoint_route(UP, jnp.zeros((2, 2)), jnp.zeros(1), 0.0, 3), "step_length is"),
        (lambda: waypoint_route(UP, jnp.zeros((2, 2)), jnp.zeros(1), 0.1, 3, gain=2.0), "gain is"),
        (lambda: gate_actions(UP, 1, step_length=0.0), "step_length is"),
        (lambda: gate_actions(UP, 1, speed=float("nan")), "step_length is nan"),
        (lambda: detour_policy(UP, std=0.0), "std is"),
        (lambda: detour_policy(UP, softness=float("nan")), "softness is nan"),
        (lambda: drifting_policy(jnp.zeros(4), std=float("nan")), "std is nan"),
        (lambda: reach_chunk(UP, 1, 0), "rows is 0"),
        (lambda: reach_posterior(jnp.asarray([jnp.nan, 0.0]), jnp.ones(2)), "reading is"),
        (lambda: reach_posterior(jnp.zeros(2), jnp.zeros(2)), "sensor_std is"),
        (lambda: reach_posterior(jnp.zeros(2), jnp.ones(2), prior_std=0.0), "prior_std is"),
        (lambda: two_mode_policy(jnp.zeros(1), up=1.5), r"up is 1\.5"),
        (lambda: image_reading(KEY, UP, pixels=0), "pixels is 0"),
        (lambda: image_reading(KEY, UP, width=0.0), "width is"),
        (lambda: cloud_reading(KEY, UP, points=0), "points is 0"),
        (lambda: cloud_reading(KEY, UP, point_noise=-1.0), "point_noise is"),
        (lambda: two_sensor_demonstrations(KEY, 0, jnp.ones((1, 2))), "count is 0"),
        (lambda: two_sensor_demonstrations(KEY, 2, -jnp.ones((1, 2))), "sensor_std is"),
        (lambda: two_modality_demonstrations(KEY, 0), "count is 0"),
        (lambda: two_mode_demonstrations(KEY, 2, goal_spread=float("inf")), "goal_spread is inf"),
        (lambda: gate_demonstrations(KEY, 0), "episodes is 0"),
        (lambda: gate_demonstrations(KEY, 2, rows=0), "rows is 0"),
        (lambda: gate_demonstrations(KEY, 2, noise_probability=1.5), r"noise_probability is 1\.5"),
        (lambda: gate_demonstrations(KEY, 2, limit=0.0), "limit is"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_waypoints_without_their_switches_are_refused():
    # Annotations are checked too where tests run; either way the argument is named.
    with pytest.raises(Exception, match="switch"):
        waypoint_route(UP, jnp.zeros((2, 2)), jnp.zeros(3), 0.1, 3)


def test_readings_of_another_shape_than_their_spread_are_refused():
    # Annotations are checked too where tests run; either way the argument is named.
    with pytest.raises(Exception, match="sensor_std"):
        reach_posterior(jnp.zeros((2, 2)), jnp.ones((1, 2)))
