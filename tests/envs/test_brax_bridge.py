"""Environments in Brax's shape, with their limits kept apart from their endings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman.envs import Problem
from steersman.envs.brax_bridge import BraxEnvironment, is_brax_like
from steersman.errors import InputError, InputTypeError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    position: Any
    obs: Any
    reward: Any
    done: Any
    metrics: Any
    info: Any

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class Walk:
    """A point that is pushed along a line and falls off beyond 1; it starts at a random place in [0, 0.1)."""

    action_size = 1
    dt = jnp.float32(0.04)

    def reset(self, rng):
        rng, start_key = jax.random.split(rng)
        position = 0.1 * jax.random.uniform(start_key)
        metrics = {"speed": jnp.zeros(())}
        return State(position, self._observe(position), jnp.zeros(()), jnp.zeros(()), metrics, {"rng": rng})

    def step(self, state, action):
        position = state.position + action[0]
        done = jnp.where(jnp.abs(position) > 1.0, 1.0, 0.0)
        metrics = {"speed": action[0]}
        info = {**state.info, "rng": jax.random.split(state.info["rng"])[0]}
        return State(position, self._observe(position), -position, done, metrics, info)

    def _observe(self, position):
        return jnp.stack([position, position**2])


class DictWalk(Walk):
    """Observations as a dict, and a cost beside the reward."""

    def reset(self, rng):
        state = super().reset(rng)
        return state.replace(info={**state.info, "cost": jnp.zeros(())})

    def step(self, state, action):
        following = super().step(state, action)
        return following.replace(info={**following.info, "cost": jnp.abs(action[0])})

    def _observe(self, position):
        return {"state": jnp.stack([position]), "pixels": jnp.zeros((2, 2), jnp.uint8)}


class Wrapped:
    """The part of Brax's EpisodeWrapper that matters here; like the original it writes into the state's dict."""

    def __init__(self, env, episode_length):
        self.env, self.episode_length = env, episode_length

    def __getattr__(self, name):
        return getattr(self.env, name)

    @property
    def action_size(self):
        return self.env.action_size

    def reset(self, rng):
        state = self.env.reset(rng)
        state.info["steps"] = jnp.zeros(rng.shape[:-1])
        state.info["truncation"] = jnp.zeros(rng.shape[:-1])
        return state

    def step(self, state, action):
        steps = state.info["steps"] + 1
        state = self.env.step(state, action)
        over = steps >= self.episode_length
        state.info["steps"] = steps
        state.info["truncation"] = jnp.where(over, 1 - state.done, 0.0)
        return state.replace(done=jnp.where(over, 1.0, state.done))


def play(environment, actions, seed=0):
    """Everything that one environment answers to a sequence of scalar actions."""
    problem = Problem(environment)
    observation, state = problem.reset(jax.random.split(jax.random.key(seed), 1))

    def step(running, action):
        observation, state, key = running
        key, step_key = jax.random.split(key)
        batch = jnp.full((1, 1), action)
        following, state, reward, terminated, truncated, info = problem.step(step_key[None], state, batch)
        row = (observation, info["final_observation"], following, reward, terminated, truncated)
        return (following, state, key), jax.tree.map(lambda leaf: leaf[0], row)

    return jax.lax.scan(step, (observation, state, jax.random.key(seed + 1)), jnp.asarray(actions))[1]


@pytest.mark.parametrize("wrap", [False, True])
def test_a_limit_truncates_and_a_fall_terminates(wrap):
    environment = BraxEnvironment(Wrapped(Walk(), 4)) if wrap else BraxEnvironment(Walk(), episode_length=4)
    # Four small steps reach the limit; then 0.6 and 0.6 fall off; then four steps again.
    actions = [0.01] * 4 + [0.6, 0.6] + [0.01] * 4
    observation, final, following, reward, terminated, truncated = play(environment, actions)
    assert np.flatnonzero(terminated).tolist() == [5]
    assert np.flatnonzero(truncated).tolist() == [3, 9]
    position = np.asarray(observation[:, 0])
    np.testing.assert_allclose(final[:, 0], position + np.array(actions, np.float32), rtol=1e-6)
    np.testing.assert_allclose(reward, -final[:, 0])
    ended = np.asarray(terminated | truncated)
    np.testing.assert_array_equal(following[~ended], final[~ended])
    assert np.all((following[ended, 0] >= 0) & (following[ended, 0] < 0.1))
    assert len(set(np.asarray(following)[ended, 0].tolist())) == 3  # each start is drawn anew
    np.testing.assert_array_equal(observation[1:], following[:-1])


def test_falling_at_the_limit_is_terminated_in_both_and_truncated_only_by_our_own_limit():
    inside = play(BraxEnvironment(Wrapped(Walk(), 2)), [0.6, 0.6])
    outside = play(BraxEnvironment(Walk(), episode_length=2), [0.6, 0.6])
    assert inside[4].tolist() == outside[4].tolist() == [False, True]
    assert inside[5].tolist() == [False, False]  # Brax's convention
    assert outside[5].tolist() == [False, True]


def test_what_the_problem_says_of_itself():
    environment = BraxEnvironment(Walk())
    problem = Problem(environment)
    assert problem.name == "Walk"
    assert environment.sample_time == 0.04
    assert environment.episode_length == 1_000
    assert problem.observation_space == spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert problem.action_space == spaces.Box(-1.0, 1.0, (1,), np.float32)
    assert BraxEnvironment(Wrapped(Walk(), 7)).episode_length is None
    configured = Walk()
    configured._config = type("Config", (), {"episode_length": 30})()
    assert BraxEnvironment(configured).episode_length == 30


def test_dict_observations_and_costs():
    environment = BraxEnvironment(DictWalk())
    space = environment.observation_space(())
    assert space["state"].shape == (1,)
    assert space["pixels"] == spaces.Box(0, 255, (2, 2), np.uint8)
    observation, state = environment.reset(jax.random.key(0))
    assert set(observation) == {"state", "pixels"}
    *_, info = environment.step(jax.random.key(1), state, jnp.array([-0.25]))
    assert float(info["costs"]["cost"]) == 0.25
    assert float(info["metrics"]["speed"]) == -0.25


def test_a_step_leaves_the_state_that_it_was_given():
    environment = BraxEnvironment(Wrapped(Walk(), 3))
    _, state = environment.reset(jax.random.key(0))
    first = environment.step_env(jax.random.key(1), state, jnp.array([0.1]), ())
    second = environment.step_env(jax.random.key(1), state, jnp.array([0.1]), ())
    assert float(state.inner.info["steps"]) == 0
    assert float(first[1].inner.info["steps"]) == float(second[1].inner.info["steps"]) == 1


def test_keys_of_another_kind_are_converted():
    environment = BraxEnvironment(Walk())
    starts = [float(environment.reset(jax.random.key(seed, impl="rbg"))[0][0]) for seed in range(4)]
    assert len(set(starts)) == 4


def test_is_brax_like_tells_shapes_apart():
    import gymnasium

    from steersman.envs import Pendulum

    assert is_brax_like(Walk())
    assert is_brax_like(Wrapped(Walk(), 3))
    assert not is_brax_like(Pendulum())
    assert not is_brax_like(gymnasium.make("CartPole-v1"))
    assert not is_brax_like(lambda: None)

    class Expensive(Walk):
        @property
        def action_size(self):
            raise RuntimeError("sizes are not to be computed to recognise an environment")

    assert is_brax_like(Expensive())


class Restarting(Walk):
    def reset(self, rng):
        state = super().reset(rng)
        return state.replace(info={**state.info, "first_obs": state.obs})


class Vectorized(Walk):
    def reset(self, rng):
        return jax.vmap(super().reset)(jax.random.split(rng, 3))


class Failing(Walk):
    def reset(self, rng):
        raise KeyError("nothing")


class Changing(Walk):
    def step(self, state, action):
        following = super().step(state, action)
        return following.replace(info={**following.info, "extra": following.reward})


class Stateless(Walk):
    def reset(self, rng):
        return super().reset(rng).obs


@pytest.mark.parametrize(
    ("env", "options", "error", "message"),
    [
        (3, {}, InputTypeError, r"env is a int, but it must have reset\(rng\)"),
        (Restarting(), {}, InputError, "env is a Restarting that restarts itself.*without AutoResetWrapper"),
        (Vectorized(), {}, InputTypeError, r"env is a Vectorized with done of shape \(3,\).*without VmapWrapper"),
        (Failing(), {}, InputTypeError, "env is a Failing that cannot be reset with one key .KeyError"),
        (Stateless(), {}, InputTypeError, "env is a Stateless whose reset returns a ShapeDtypeStruct without obs"),
        (Walk(), {"episode_length": 0}, InputError, "episode_length is 0, but it must be at least 1"),
    ],
)
def test_unusable_environments_are_refused(env, options, error, message):
    with pytest.raises(error, match=message):
        BraxEnvironment(env, **options)


def test_a_changing_state_is_named():
    environment = BraxEnvironment(Changing())
    _, state = environment.reset(jax.random.key(0))
    with pytest.raises(InputTypeError, match="Changing returns a state of another structure from step"):
        environment.step(jax.random.key(1), state, jnp.zeros(1))


PENDULUM = """
<mujoco>
  <option timestep="0.01" integrator="Euler" iterations="1"/>
  <worldbody>
    <body>
      <joint name="hinge" axis="0 1 0" damping="0"/>
      <geom type="capsule" fromto="0 0 0 0 0 -1" size="0.02" mass="1" contype="0" conaffinity="0"/>
    </body>
  </worldbody>
  <actuator><motor joint="hinge" gear="1"/></actuator>
</mujoco>
"""


@pytest.mark.slow
def test_an_mjx_simulation_agrees_with_mujoco():
    mujoco = pytest.importorskip("mujoco")
    mjx = pytest.importorskip("mujoco.mjx")
    model = mujoco.MjModel.from_xml_string(PENDULUM)

    class Hinge:
        action_size = 1
        mjx_model = mjx.put_model(model)

        def reset(self, rng):
            angle = jax.random.uniform(rng, (1,), minval=-1.0, maxval=1.0)
            data = mjx.make_data(model).replace(qpos=angle)
            return State(data, self._observe(data), jnp.zeros(()), jnp.zeros(()), {}, {})

        def step(self, state, action):
            data = mjx.step(self.mjx_model, state.position.replace(ctrl=action))
            return State(data, self._observe(data), -jnp.sum(action**2), jnp.zeros(()), {}, {})

        def _observe(self, data):
            return jnp.concatenate([data.qpos, data.qvel])

    environment = BraxEnvironment(Hinge(), episode_length=5)
    actions = np.array([0.5, -1.0, 0.25, 0.0, 1.0, 0.3, 0.1], np.float32)
    observation, final, following, _, terminated, truncated = play(environment, actions)
    assert not terminated.any()
    assert np.flatnonzero(truncated).tolist() == [4]
    data = mujoco.MjData(model)
    for t, action in enumerate(actions):
        if t in (0, 5):
            mujoco.mj_resetData(model, data)
            data.qpos[0] = observation[t, 0]
        data.ctrl[0] = action
        mujoco.mj_step(model, data)
        np.testing.assert_allclose(final[t], [data.qpos[0], data.qvel[0]], atol=2e-5)
    assert following[4, 0] != final[4, 0]
