"""Geometry by hand, episodes against rules written out in NumPy, and exact scores against enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Problem, check, make
from steersman.envs.planar import (
    DetourReach,
    DetourReachParams,
    Discs,
    DriftingGoal,
    DriftingGoalParams,
    DriftingGoalState,
    Gate,
    HiddenTarget,
    HiddenTargetParams,
    ObstacleGate,
    PlanarState,
    TwoWalls,
    TwoWallsParams,
    TwoWallsState,
    best_gaussian,
    clip_length,
    distance,
    hidden_target_success,
    hidden_target_value,
)
from steersman.errors import InputError, InputTypeError

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", ["detour-reach", "drifting-goal", "obstacle-gate", "hidden-target", "two-walls"])
def test_keeps_the_contract(name):
    check(name)


def test_options_reach_the_parameters():
    assert float(make("drifting-goal", speed=0.04, radius=0.08).params.speed) == pytest.approx(0.04)
    assert float(make("hidden-target", cost=0.02).params.cost) == pytest.approx(0.02)
    assert float(make("detour-reach", noise=0.0).params.noise) == 0.0


# ---- geometry


def test_discs_by_hand():
    discs = Discs([[0.0, 0.0], [3.0, 4.0]], [1.0, 2.0])
    points = jnp.asarray([[0.0, 0.0], [2.0, 0.0], [3.0, 3.0], [0.6, 0.8]])
    # The last lies on the first rim, up to rounding.
    np.testing.assert_allclose(discs.clearance(points), [-1.0, 1.0, -1.0, 0.0], atol=1e-6)
    assert discs.contains(points)[:3].tolist() == [True, False, True]
    none = Discs(np.zeros((0, 2)), np.zeros(0))
    assert np.isinf(none.clearance(points)).all()
    assert np.isfinite(jax.grad(discs.clearance)(jnp.zeros(2))).all()


def test_gate_by_hand():
    gate = Gate(1.0, 0.0, 0.1)
    before = jnp.asarray([[0.95, 0.0], [0.95, 0.12], [0.9, 0.05], [0.8, 0.0], [1.05, 0.0], [0.9, 0.2]])
    after = jnp.asarray([[1.05, 0.0], [1.05, 0.06], [1.1, 0.25], [0.9, 0.0], [0.9, 0.0], [1.1, -0.2]])
    crossed, through = gate.cross(before, after)
    # At the line the heights are 0, 0.09, 0.15, -, - and 0: what counts is where it is crossed, not the end.
    assert crossed.tolist() == [True, True, True, False, False, True]
    assert through.tolist() == [True, True, False, False, False, True]
    assert jax.tree.leaves(gate)[2] == pytest.approx(0.1)


def test_lengths_by_hand():
    @jax.jit
    def lengths(vectors, a, b):
        slope = jax.jacobian(lambda v: clip_length(v, 1.0))(jnp.zeros(2))
        return clip_length(vectors, 1.0), slope, distance(a, b), jax.grad(distance)(a, a)

    vectors = np.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    clipped, slope, apart, gradient = lengths(vectors, np.ones(2, np.float32), np.asarray([4.0, 5.0], np.float32))
    np.testing.assert_allclose(clipped, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], rtol=1e-6)
    assert np.isfinite(slope).all()
    assert float(apart) == pytest.approx(5.0)
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


# ---- detour, drift, gate


def test_detour_by_hand():
    environment = DetourReach(noise=0.0)
    params = environment.default_params

    @jax.jit
    def step(position, action, time):
        state = PlanarState(position, time)
        return *environment.step_env(KEY, state, action, params)[:4], environment.is_truncated(state, params)

    def play(position, action, time=3):
        return step(jnp.asarray(position), jnp.asarray(action), jnp.asarray(time, jnp.int32))

    position, state, reward, ended, truncated = play([-1.0, 0.0], [1.0, 0.0])
    np.testing.assert_allclose(position, [-0.85, 0.0], rtol=1e-6)
    assert (int(state.time), float(reward), bool(ended), bool(truncated)) == (4, 0.0, False, False)
    np.testing.assert_allclose(play([-1.0, 0.0], [-0.95, 0.1])[0], [-0.95, 0.1], rtol=1e-6)  # near enough
    position, _, reward, ended, _ = play([-0.5, 0.0], [0.0, 0.0])
    np.testing.assert_allclose(position, [-0.35, 0.0], rtol=1e-5)
    assert (float(reward), bool(ended)) == (0.0, True)
    _, _, reward, ended, _ = play([0.8, 0.0], [1.0, 0.0])
    assert (float(reward), bool(ended)) == (1.0, True)
    assert bool(play([0.0, 1.0], [0.0, 1.0], 50)[4])


def test_noise_and_starts_have_their_spread():
    environment = DetourReach()
    params = environment.default_params

    @jax.jit
    @jax.vmap
    def draw(key):
        position, state = environment.reset_env(key, params)
        return position, environment.step_env(key, state, jnp.asarray([-1.0, 0.5]), params)[0]

    start, following = draw(jax.random.split(KEY, 20_000))
    np.testing.assert_array_equal(start[:, 0], -1.0)
    assert float(start[:, 1].std()) == pytest.approx(0.02, rel=0.03)
    assert float(following[:, 0].std()) == pytest.approx(0.02, rel=0.03)
    assert float(following[:, 1].mean()) == pytest.approx(0.15, abs=1e-3)


def drifting_episodes(environment, params, head_for, count):
    """Episodes of a policy that first goes to `head_for` and after 20 steps to the goal."""

    def episode(key, via):
        reset_key, key = jax.random.split(key)
        observation, state = environment.reset_env(reset_key, params)

        def step(carry, inputs):
            observation, state = carry
            key, time = inputs
            action = jnp.where(time < 20, via, observation[2:])
            observation, state, reward, terminated, info = environment.step_env(key, state, action, params)
            return (observation, state), (observation, reward, terminated, info)

        times = jnp.arange(environment.num_steps)
        return observation, jax.lax.scan(step, (observation, state), (jax.random.split(key, len(times)), times))[1]

    keys = jax.random.split(jax.random.key(1), count)
    return jax.device_get(jax.jit(jax.vmap(episode))(keys, jnp.asarray(head_for)))


def test_drifting_goals_return_is_the_score():
    environment = DriftingGoal(speed=0.04, radius=0.045)
    # Around the disc, and straight through it.
    via = np.repeat([[-1.35, 0.6], [-1.0, 0.0]], 32, axis=0).astype(np.float32)
    start, (observation, reward, terminated, info) = drifting_episodes(
        environment, environment.default_params, via, len(via)
    )
    position, goal = observation[..., :2], observation[..., 2:]
    near = np.linalg.norm(position - goal, axis=-1) < 0.045
    entered = (np.linalg.norm(position - [-1.35, 0.0], axis=-1) < 0.35).any(axis=1)
    assert not entered[:32].any()
    assert entered[32:].all()
    assert 0.3 < near[:32, -20:].mean() < 1.0
    np.testing.assert_allclose(reward.sum(axis=1), np.where(entered, 0.0, near[:, -20:].mean(axis=1)), atol=1e-5)
    np.testing.assert_array_equal(info["tracking"], near)
    np.testing.assert_array_equal(info["scored"][0], np.arange(60) >= 40)
    np.testing.assert_array_equal(info["collision"][:, -1], entered)
    assert terminated[:, -1].all()
    assert not terminated[:, :-1].any()
    # The goal moves by 0.04 up or down and is mirrored at +-0.4.
    heights = np.concatenate([start[:, None, 3], goal[..., 1]], axis=1)
    assert np.abs(start[:, 3]).max() <= 0.3
    assert np.abs(heights).max() <= 0.4 + 1e-6
    unfolded = np.where(heights[:, 1:2] > heights[:, :1], 1.0, -1.0) * 0.04 * np.arange(61) + heights[:, :1]
    mirrored = np.abs((unfolded - 0.4) % 1.6 - 0.8) - 0.4
    np.testing.assert_allclose(heights, mirrored, atol=1e-5)


def test_late_collisions_take_back_what_was_paid():
    environment = DriftingGoal(speed=0.0)
    params = DriftingGoalParams(speed=0.0)

    @jax.jit
    def step():
        position, goal = jnp.asarray([-1.75, 0.0]), jnp.asarray([0.0, 0.1])
        time = jnp.asarray(57, jnp.int32)
        state = DriftingGoalState(position, goal, jnp.asarray(1.0), jnp.asarray(False), jnp.asarray(0.85), time)
        return environment.step_env(KEY, state, goal, params)

    _, following, reward, _, info = step()
    assert bool(following.collided)
    assert bool(info["collision"])
    assert float(reward) == pytest.approx(-0.85)


def test_gate_episodes_by_hand():
    environment = ObstacleGate()
    params = environment.default_params
    step = jax.jit(
        lambda position, action: environment.step_env(
            KEY, PlanarState(position, jnp.asarray(0, jnp.int32)), action, params
        )
    )
    cases = [
        ([0.95, 0.05], [5.0, 0.0], [1.05, 0.05], 1.0, True),  # through, with the action clipped
        ([0.95, 0.12], [1.0, 0.0], [1.05, 0.12], 0.0, True),  # beside the gate
        ([-0.8, 0.0], [1.0, 1.0], [-0.7, 0.1], 0.0, False),  # 0.316 from the centre of a disc of 0.3
        ([-0.75, 0.0], [1.0, 1.0], [-0.65, 0.1], 0.0, True),  # 0.269 from it
        ([0.5, 0.2], [0.0, -1.0], [0.5, 0.1], 0.0, True),  # 0.224 from the centre of the disc of 0.25
    ]
    for before, action, after, reward, ended in cases:
        position, _, paid, terminated, info = step(jnp.asarray(before), jnp.asarray(action))
        np.testing.assert_allclose(position, after, atol=1e-6)
        assert (float(paid), bool(terminated)) == (reward, ended)
        assert bool(info["success"]) == (reward > 0)
    assert bool(environment.is_truncated(PlanarState(jnp.zeros(2), jnp.asarray(36, jnp.int32)), params))


def test_copies_may_have_obstacles_of_their_own():
    environment = DetourReach(noise=0.0)
    sizes = [0.1, 0.3, 0.5]
    each = [DetourReachParams(noise=0.0, obstacles=Discs([[0.0, 0.0]], [size])) for size in sizes]
    problem = Problem(environment, jax.tree.map(lambda *leaves: np.stack(leaves), *each), batched_params=True)
    state = PlanarState(jnp.asarray([[-0.4, 0.0]] * 3), jnp.zeros(3, jnp.int32))
    keys = jax.random.split(KEY, 3)
    terminated = jax.jit(lambda state: problem.step(keys, state, state.position)[3])(state)
    assert terminated.tolist() == [False, False, True]


# ---- hidden target


def enumerated(hit, num_tries, discount, cost):
    """Success and value by adding up every sequence of hits and misses, target by target."""
    success = value = 0.0
    for q in hit:
        for missed in range(num_tries + 1):
            hits = missed < num_tries
            chance = (1 - q) ** missed * (q if hits else 1.0)
            tries = missed + hits
            paid = sum(-cost * discount**t for t in range(tries)) + (discount**missed if hits else 0.0)
            success += chance * hits / 2
            value += chance * paid / 2
    return success, value


def test_hidden_target_scores_by_enumeration():
    for hit, num_tries, discount, cost in itertools.product(
        ([0.5, 0.5], [0.1, 0.7], [0.0, 1.0]), (1, 4), (1.0, 0.9), (0.0, 0.02)
    ):
        success, value = enumerated(hit, num_tries, discount, cost)
        exact = hidden_target_success(np.asarray(hit), num_tries)
        assert exact == pytest.approx(success, abs=1e-12)
        exact = hidden_target_value(np.asarray(hit), num_tries, discount=discount, cost=cost)
        assert exact == pytest.approx(value, abs=1e-12)
    # The numbers of the two-point policy at ten tries; arrays of either library, with leading axes.
    two_point = jnp.full((3, 2), 0.5)
    np.testing.assert_allclose(hidden_target_success(two_point), 0.99902, atol=1e-5)
    np.testing.assert_allclose(hidden_target_value(two_point, discount=0.9), 0.90878, atol=1e-5)
    np.testing.assert_allclose(hidden_target_value(two_point, cost=0.02), 0.959, atol=1e-3)


def test_hidden_target_scores_by_simulation():
    environment = HiddenTarget(num_tries=4, cost=0.02)
    params = environment.default_params

    def episode(key):
        key, reset_key = jax.random.split(key)
        _, state = environment.reset_env(reset_key, params)

        def step(carry, key):
            state, running = carry
            action = jnp.where(jax.random.bernoulli(key, 0.7), 1.1, -1.1)[None]
            _, state, reward, terminated, info = environment.step_env(key, state, action, params)
            return (state, running & ~terminated), (running * reward, running & info["success"])

        (_, running), (reward, success) = jax.lax.scan(step, (state, jnp.asarray(True)), jax.random.split(key, 6))
        return reward.sum(), success.sum(), running

    reward, success, running = jax.jit(jax.vmap(episode))(jax.random.split(KEY, 20_000))
    hit = np.asarray([0.7, 0.3])
    assert not running.any()
    tolerance = 4 * 0.5 / math.sqrt(20_000)
    assert float(success.mean()) == pytest.approx(hidden_target_success(hit, 4), abs=tolerance)
    assert float(reward.mean()) == pytest.approx(hidden_target_value(hit, 4, cost=0.02), abs=tolerance)


def test_best_gaussian():
    # At mean 0 the chance of a hit is largest where 1.2 phi(1.2 / s) = 0.8 phi(0.8 / s).
    std = math.sqrt((1.2**2 - 0.8**2) / (2 * math.log(1.5)))
    best = best_gaussian()
    assert best.mean == pytest.approx(0.0, abs=1e-4)
    assert best.std == pytest.approx(std, rel=1e-4)
    assert best.score == pytest.approx(0.639, abs=5e-4)
    assert best_gaussian(cost=0.02, objective="value").score == pytest.approx(0.506, abs=1e-3)
    # With a discount, always hitting one target at once is best, and its value is one half.
    best = best_gaussian(discount=0.9, objective="value")
    assert best.score == pytest.approx(0.5, abs=1e-6)
    assert 0.8 < best.mean < 1.2


# ---- two walls


def test_two_walls_by_hand():
    environment = TwoWalls()
    params = environment.default_params
    start, state = jax.jit(jax.vmap(lambda key: environment.reset_env(key, params)))(jax.random.split(KEY, 20_000))
    count = np.zeros((25, 25))
    np.add.at(count, tuple(np.asarray(state.cell).T), 1)
    assert (count[:, [0, 1, 23, 24]] == 0).all()
    inside = count[:, 2:23]
    assert ((inside - 20_000 / 525) ** 2 / (20_000 / 525)).sum() < 525 + 5 * math.sqrt(2 * 525)
    np.testing.assert_allclose(start, (np.asarray(state.cell) - 12) / 12, rtol=1e-6)
    step = jax.jit(
        lambda cell, action: environment.step_env(KEY, TwoWallsState(cell, jnp.asarray(0, jnp.int32)), action, params)
    )
    for cell, action, following, reward in [
        ((12, 12), (0.4, 3.0), (12, 13), 0.0),
        ((0, 12), (-1.0, 0.6), (0, 13), 0.0),
        ((24, 21), (0.9, 1.0), (24, 22), 0.0),
        ((5, 22), (0.0, 1.0), (5, 23), 20.0),
        ((5, 2), (0.51, -0.51), (6, 1), 20.0),
    ]:
        _, state, paid, terminated, _ = step(jnp.asarray(cell, jnp.int32), jnp.asarray(action))
        assert tuple(state.cell.tolist()) == following
        assert (float(paid), bool(terminated)) == (reward, reward > 0)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Discs([[0.0, float("nan")]], [1.0]), "center is"),
        (lambda: Discs([[0.0, 0.0]], [0.0]), "radius is"),
        (lambda: Gate(0.0, 0.0, -1.0), "half_width is"),
        (lambda: Gate(float("nan"), 0.0, 1.0), "x is nan"),
        (lambda: DetourReachParams(noise=float("nan")), "noise is nan"),
        (lambda: DetourReachParams(goal=(float("inf"), 0.0)), "goal is"),
        (lambda: DetourReachParams(max_step=0.0), "max_step is"),
        (lambda: DriftingGoalParams(speed=-0.1), "speed is"),
        (lambda: HiddenTargetParams(radius=0.0), "radius is"),
        (lambda: TwoWallsParams(float("nan")), "reward is nan"),
        (lambda: DetourReach(num_steps=0), "num_steps is 0"),
        (lambda: DetourReach(noise=-1.0), "noise is"),
        (lambda: DriftingGoal(scored_steps=61), "scored_steps is 61.*at most 60"),
        (lambda: DriftingGoal(speed=float("nan")), "speed is nan"),
        (lambda: ObstacleGate(num_steps=-1), "num_steps is -1"),
        (lambda: HiddenTarget(num_tries=0), "num_tries is 0"),
        (lambda: HiddenTarget(cost=-1.0), "cost is"),
        (lambda: TwoWalls(size=24), "size is 24.*odd"),
        (lambda: hidden_target_success(np.asarray([0.5, 1.5])), "hit_probability is"),
        (lambda: hidden_target_value(np.asarray([0.5, 0.5]), discount=1.5), r"discount is 1\.5"),
        (lambda: best_gaussian(objective="return"), "objective is 'return'"),
        (lambda: best_gaussian(radius=0.0), "radius is"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bad_kinds():
    with pytest.raises((InputTypeError, TypeError), match="num_steps"):
        ObstacleGate(num_steps=2.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("environment", [DetourReach(), DriftingGoal(), ObstacleGate(), HiddenTarget(), TwoWalls()])
def test_actions_of_another_shape_are_refused(environment):
    params = environment.default_params
    state = jax.eval_shape(environment.reset_env, KEY, params)[1]
    # Annotations are checked too where tests run; either way the action is named.
    with pytest.raises(Exception, match="action"):
        jax.eval_shape(environment.step_env, KEY, state, jnp.zeros(3), params)
