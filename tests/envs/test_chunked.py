"""Chunks against the same actions played one by one."""

from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman.envs import ChunkedEnvironment, DetourReach, Environment, HiddenTarget, ObstacleGate, Problem, check
from steersman.envs.planar_experts import gate_actions
from steersman.errors import InputError, InputTypeError
from steersman.policies import ChunkPolicy

KEY = jax.random.key(0)


class Counter(Environment):
    """Counts: its reward is the count, its cost the action, its duration 1 or 2; ends at 5, is cut at `limit` steps."""

    limit: int = eqx.field(static=True, default=100)
    abilities = frozenset()

    def observation_space(self, params):
        return spaces.Dict({"count": spaces.Box(0.0, np.inf, (), np.float32)})

    def action_space(self, params):
        return spaces.Dict({"wait": spaces.Discrete(2), "pay": spaces.Box(0.0, 1.0, (2,), np.float32)})

    def reset_env(self, key, params):
        return {"count": jnp.asarray(0.0)}, (jnp.asarray(0.0), jnp.asarray(0))

    def step_env(self, key, state, action, params):
        count, steps = state[0] + 1.0, state[1] + 1
        info = {"costs": {"pay": action["pay"].sum()}, "duration": 1 + action["wait"], "noise": jax.random.uniform(key)}
        return {"count": count}, (count, steps), jnp.stack([count, -count]), count >= 5, info

    def is_truncated(self, state, params):
        return state[1] >= self.limit


class Team(Environment):
    """Two agents, each paid what it does."""

    num_agents: int = eqx.field(static=True, default=2, kw_only=True)

    def observation_space(self, params) -> gymnasium.Space:
        return spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def action_space(self, params) -> gymnasium.Space:
        return spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset_env(self, key, params):
        return jnp.zeros((2, 1)), jnp.zeros((2, 1))

    def step_env(self, key, state, action, params):
        state = state + action
        return state, state, action[:, 0], jnp.asarray(False), {}


class Masked(Team):
    num_agents: int = eqx.field(static=True, default=0, kw_only=True)

    def observation_space(self, params) -> gymnasium.Space:
        return spaces.Dict({"action_mask": spaces.MultiBinary(3)})


def test_keeps_the_contract():
    check(ChunkedEnvironment(ObstacleGate(), 4))
    check(ChunkedEnvironment(Counter(limit=7), 3))


def test_same_as_actions_played_one_by_one():
    inner = DetourReach()
    params = inner.default_params
    # By the upper waypoint to the goal, which takes about 18 steps.
    actions = jnp.asarray([[0.0, 0.8]] * 9 + [[1.0, 0.0]] * 15)
    reset_key, step_key = jax.random.split(KEY)
    play_one = jax.jit(lambda key, state, action: inner.step_env(key, state, action, params))
    for rows, discount in ((24, 0.9), (5, 1.0)):
        chunked = ChunkedEnvironment(inner, rows, discount=discount)
        start, state = inner.reset_env(reset_key, params)
        observation, reached, reward, terminated, info = jax.jit(chunked.step_env)(
            step_key, state, actions[:rows], params
        )
        total, played, ended, seen = 0.0, 0, False, start
        for key, action in zip(jax.random.split(step_key, rows), actions, strict=False):
            seen, state, paid, ended, _ = play_one(key, state, action)
            total, played = total + discount**played * float(paid), played + 1
            if ended:
                break
        np.testing.assert_allclose(observation, seen, rtol=1e-6)
        np.testing.assert_allclose(reached.position, state.position, rtol=1e-6)
        assert int(reached.time) == played == int(info["duration"])
        assert float(reward) == pytest.approx(total)
        assert bool(terminated) == bool(ended) == bool(info["success"])
        assert bool(ended) == (rows == 24)  # one that ends before its last row, one that does not end


@pytest.mark.parametrize(
    ("limit", "played", "terminated", "truncated"), [(100, 5, True, False), (3, 3, False, True), (5, 5, True, True)]
)
def test_rewards_costs_and_durations_until_the_end(limit, played, terminated, truncated):
    chunked = ChunkedEnvironment(Counter(limit=limit), 6, discount=0.5)
    wait = np.asarray([0, 1, 1, 0, 0, 1])
    pay = np.linspace(0.0, 1.0, 12).reshape(6, 2).astype(np.float32)
    action = {"wait": jnp.asarray(wait), "pay": jnp.asarray(pay)}
    _, state = chunked.reset_env(KEY, ())
    observation, state, reward, ended, info = eqx.filter_jit(chunked.step_env)(KEY, state, action, ())
    weight = 0.5 ** np.concatenate([[0], np.cumsum(1 + wait)[:-1]])[:played]
    expected = weight @ np.arange(1, played + 1)
    np.testing.assert_allclose(reward, [expected, -expected], rtol=1e-6)
    assert float(info["costs"]["pay"]) == pytest.approx(weight @ pay[:played].sum(axis=1), rel=1e-5)
    assert int(info["duration"]) == np.sum(1 + wait[:played])
    assert float(observation["count"]) == played
    # What else is in the information is that of the last row played.
    assert float(info["noise"]) == float(jax.random.uniform(jax.random.split(KEY, 6)[played - 1]))
    assert bool(ended) == terminated
    assert bool(chunked.is_truncated(state, ())) == truncated


def test_agrees_with_a_policy_that_plays_chunks_out():
    def generator(observation, key):
        return gate_actions(observation, jnp.where(observation[1] > 0, 1.0, -1.0), 4)

    inner, chunked = Problem(ObstacleGate()), Problem(ChunkedEnvironment(ObstacleGate(), 4))
    policy = ChunkPolicy(generator, 4, inner.observation_space)
    keys = jax.random.split(KEY, 3)
    start, state = inner.reset(keys)

    @jax.jit
    def one_by_one(observation, state):
        def step(carry, _):
            observation, state, memory = carry
            action, memory = jax.vmap(policy)(observation, memory, keys)
            observation, state, reward, terminated, _, info = inner.step(keys, state, action)
            return (observation, state, memory), (info["final_observation"], reward, terminated)

        return jax.lax.scan(step, (observation, state, jax.vmap(policy.init)(keys)), length=28)[1]

    @jax.jit
    def in_chunks(observation, state):
        def step(carry, _):
            observation, state = carry
            action = jax.vmap(generator)(observation, keys)
            observation, state, reward, terminated, _, info = chunked.step(keys, state, action)
            return (observation, state), (info["final_observation"], reward, terminated)

        return jax.lax.scan(step, (observation, state), length=7)[1]

    seen, reward, terminated = one_by_one(start, state)
    of_chunk, chunk_reward, chunk_terminated = in_chunks(start, state)
    ends = np.asarray(terminated).argmax(axis=0)
    for copy, end in enumerate(ends):
        assert terminated[end, copy]
        for chunk in range(end // 4):
            np.testing.assert_allclose(of_chunk[chunk, copy], seen[4 * chunk + 3, copy], rtol=1e-5)
        np.testing.assert_allclose(of_chunk[end // 4, copy], seen[end, copy], rtol=1e-5)
        assert chunk_terminated[end // 4, copy]
        assert float(chunk_reward[: end // 4 + 1, copy].sum()) == float(reward[: end + 1, copy].sum())


def test_agents_have_chunks_of_their_own():
    chunked = ChunkedEnvironment(Team(), 3)
    assert chunked.num_agents == 2
    chunk = jnp.asarray([[[1.0], [2.0], [3.0]], [[10.0], [20.0], [30.0]]])
    observation, _, reward, _, info = chunked.step_env(KEY, jnp.zeros((2, 1)), chunk, ())
    np.testing.assert_allclose(reward, [6.0, 60.0])
    np.testing.assert_allclose(observation, [[6.0], [60.0]])
    assert int(info["duration"]) == 3


def test_spaces_and_names():
    chunked = ChunkedEnvironment(HiddenTarget(), 5)
    assert chunked.name == "hidden-target in chunks of 5"
    assert chunked.action_space(chunked.default_params).shape == (5, 1)
    space: Any = ChunkedEnvironment(Counter(), 3).action_space(())
    assert space["wait"] == spaces.MultiDiscrete([2, 2, 2])
    assert space["pay"].shape == (3, 2)
    assert ChunkedEnvironment(Counter(), 3).observation_space(()) == Counter().observation_space(())
    box: Any = ChunkedEnvironment(ObstacleGate(), 2).action_space(ObstacleGate().default_params)
    np.testing.assert_array_equal(box.low, -np.ones((2, 2)))


def test_other_spaces_get_rows():
    class Odd(Team):
        space: gymnasium.Space = eqx.field(static=True)

        def action_space(self, params) -> gymnasium.Space:
            return self.space

    for space, expected in [
        (
            spaces.MultiDiscrete([2, 3], start=[1, 0]),
            spaces.MultiDiscrete(np.asarray([[2, 3]] * 4), start=np.asarray([[1, 0]] * 4)),
        ),
        (spaces.MultiBinary(3), spaces.MultiBinary((4, 3))),
        (spaces.Tuple([spaces.Discrete(3, start=2)]), spaces.Tuple([spaces.MultiDiscrete([3] * 4, start=[2] * 4)])),
    ]:
        assert ChunkedEnvironment(Odd(space=space), 4).action_space(()) == expected
    with pytest.raises(InputTypeError, match="environment's action space is a Text"):
        ChunkedEnvironment(Odd(space=spaces.Text(3)), 4).action_space(())


def test_bad_input():
    with pytest.raises(InputError, match="rows is 0"):
        ChunkedEnvironment(ObstacleGate(), 0)
    with pytest.raises((InputTypeError, TypeError), match="rows"):
        ChunkedEnvironment(ObstacleGate(), 2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"discount is 1\.5"):
        ChunkedEnvironment(ObstacleGate(), 2, discount=1.5)
    with pytest.raises(InputError, match="discount is nan"):
        ChunkedEnvironment(ObstacleGate(), 2, discount=float("nan"))
    with pytest.raises(InputTypeError, match="environment is a int"):
        ChunkedEnvironment(3, 2)
    with pytest.raises(InputError, match="environment observes an action_mask"):
        ChunkedEnvironment(Masked(), 2).action_space(())
    chunked = ChunkedEnvironment(ObstacleGate(), 4)
    params = chunked.default_params
    _, state = chunked.reset(KEY)
    for shape in ((2,), (3, 2), ()):
        with pytest.raises(InputError, match=r"action's shape is .*4 rows"):
            chunked.step(KEY, state, jnp.zeros(shape), params)
