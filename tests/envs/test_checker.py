"""The checker finds each fault that it promises to find, and nothing in environments that are sound."""

import itertools
import time

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Environment, Problem
from steersman.envs.checker import check
from steersman.envs.dynamics import DiscreteCartPole, DoubleIntegrator, Pendulum
from steersman.errors import InputError, InputTypeError

COUNTER = itertools.count()


class Walk:
    """A sound environment: a point that is moved by its action, ends beyond 5 and is cut after 20 steps."""

    default_params = ()

    def observation_space(self, params):
        return gymnasium.spaces.Box(-10, 10, (2,), np.float32)

    def action_space(self, params):
        return gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def start(self, key):
        return {"x": jax.random.uniform(key), "steps": jnp.asarray(0)}

    def observe(self, state):
        return jnp.stack([state["x"], state["x"] ** 2 / 4])

    def reset_env(self, key, params):
        state = self.start(key)
        return self.observe(state), state

    def reset(self, key, params=None):
        return self.reset_env(key, params)

    def move(self, key, state, action):
        return {"x": state["x"] + action[0], "steps": state["steps"] + 1}

    def reward(self, state, action):
        return -(state["x"] ** 2)

    def terminated(self, state):
        return jnp.abs(state["x"]) > 5.0

    def truncated(self, state):
        return state["steps"] >= 20

    def step_env(self, key, state, action, params):
        following = self.move(key, state, action)
        return self.observe(following), following, self.reward(state, action), self.terminated(following), {}

    def step(self, key, state, action, params=None):
        step_key, reset_key = jax.random.split(key)
        final, following, reward, terminated, info = self.step_env(step_key, state, action, params)
        truncated = self.truncated(following)
        done = terminated | truncated
        observation, start = self.reset_env(reset_key, params)
        choose = lambda first, second: jax.tree.map(lambda a, b: jnp.where(done, a, b), first, second)  # noqa: E731
        info = {**info, "final_observation": final}
        return choose(observation, final), choose(start, following), reward, terminated, truncated, info


class NoAutoReset(Walk):
    """What most faults below are injected into: the step's parts are passed on as they are."""

    def step(self, key, state, action, params=None):
        observation, following, reward, terminated, info = self.step_env(key, state, action, params)
        info = {**info, "final_observation": observation}
        return observation, following, reward, terminated, self.truncated(following), info


class NoSpace(Walk):
    observation_space = None


class NoParams(Walk):
    @property
    def default_params(self):
        raise AttributeError


class SpaceRaises(Walk):
    def action_space(self, params):
        raise KeyError("max_torque")


class StrangeSpace(Walk):
    def action_space(self, params):
        return gymnasium.spaces.Text(3)


class ResetReturnsObservationOnly(Walk):
    def reset(self, key, params=None):
        return self.reset_env(key, params)[0]


class ResetRaises(Walk):
    def reset(self, key, params=None):
        raise ZeroDivisionError("no start")


class BranchesOnAValue(NoAutoReset):
    def reward(self, state, action):
        return jnp.asarray(1.0) if state["x"] > 0 else jnp.asarray(0.0)


class WantsTwoActions(NoAutoReset):
    def move(self, key, state, action):
        return {"x": state["x"] + jnp.dot(action, jnp.ones(2)), "steps": state["steps"] + 1}


class FiveValues(Walk):
    def step(self, key, state, action, params=None):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return observation, state, reward, terminated | truncated, info


class VectorReward(NoAutoReset):
    def reward(self, state, action):
        return -(action**2)


class IntegerReward(NoAutoReset):
    def reward(self, state, action):
        return jnp.asarray(1)


class FloatTermination(NoAutoReset):
    def terminated(self, state):
        return (jnp.abs(state["x"]) > 5.0).astype(jnp.float32)


class VectorTermination(NoAutoReset):
    def terminated(self, state):
        return jnp.zeros(1, bool)


class IntegerTruncation(NoAutoReset):
    def truncated(self, state):
        return jnp.asarray(0)


class InfoIsATuple(NoAutoReset):
    def step(self, key, state, action, params=None):
        return (*super().step(key, state, action, params)[:5], ())


class NoFinalObservation(NoAutoReset):
    def step(self, key, state, action, params=None):
        return (*super().step(key, state, action, params)[:5], {})


class FinalObservationIsAState(Walk):
    def step(self, key, state, action, params=None):
        *rest, _ = super().step(key, state, action, params)
        return (*rest, {"final_observation": rest[1]})


class FinalObservationIsOld(Walk):
    def step(self, key, state, action, params=None):
        *rest, _ = super().step(key, state, action, params)
        return (*rest, {"final_observation": self.observe(state)})


class OtherShape(Walk):
    def observe(self, state):
        return state["x"]


class OtherDtype(Walk):
    def observe(self, state):
        return jnp.zeros(2, jnp.int32)


class KeysMissing(Walk):
    def observation_space(self, params):
        return gymnasium.spaces.Dict({"place": super().observation_space(params)})


class Outside(Walk):
    def observation_space(self, params):
        return gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float32)


class IntegerBecomesFloat(NoAutoReset):
    """The classical one: a counter that starts as an integer and grows by a float."""

    def move(self, key, state, action):
        return {"x": state["x"] + action[0], "steps": state["steps"] + 1.0}


class StateGrows(NoAutoReset):
    def move(self, key, state, action):
        return {**super().move(key, state, action), "last": action[0]}


class StateChangesShape(NoAutoReset):
    def move(self, key, state, action):
        return {"x": state["x"] + action, "steps": state["steps"] + 1}

    def observe(self, state):
        return jnp.ones(2) * state["x"]

    def reward(self, state, action):
        return jnp.sum(state["x"])

    def terminated(self, state):
        return jnp.any(state["x"] > 5.0)


class DivergingObservation(Walk):
    def observe(self, state):
        return jnp.stack([state["x"], jnp.where(state["steps"] > 3, jnp.nan, 0.0)])


class InfiniteReward(Walk):
    def reward(self, state, action):
        return 1.0 / jnp.asarray(0.0) + state["x"]


class HostRandomness(NoAutoReset):
    def move(self, key, state, action):
        return {"x": state["x"] + np.random.default_rng().uniform(), "steps": state["steps"] + 1}


class HostRandomReset(Walk):
    def start(self, key):
        return {"x": jnp.asarray(float(next(COUNTER))), "steps": jnp.asarray(0)}


class CallbackRandomness(NoAutoReset):
    def move(self, key, state, action):
        draw = jax.pure_callback(
            lambda: np.float32(next(COUNTER) % 7 / 10), jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential"
        )
        return {"x": draw, "steps": state["steps"] + 1}


class NotVmappable(NoAutoReset):
    def move(self, key, state, action):
        x = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), state["x"])
        return {"x": x, "steps": state["steps"] + 1}


class Merged(Walk):
    """A time limit that is reported as a termination and as a truncation alike."""

    def step(self, key, state, action, params=None):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        done = terminated | truncated
        return observation, state, reward, done, done, info


class MergedInsideJit(Merged):
    def step(self, key, state, action, params=None):
        return jax.jit(super().step)(key, state, action, params)


FAULTS = [
    (NoSpace, "no method observation_space"),
    (NoParams, "no default_params"),
    (SpaceRaises, r"action_space\(params\) failed with KeyError: 'max_torque'"),
    (StrangeSpace, "action_space is a Text"),
    (ResetReturnsObservationOnly, r"reset.* must return \(observation, state\), but it returned a ShapeDtypeStruct"),
    (ResetRaises, "reset.* failed with ZeroDivisionError: no start"),
    (BranchesOnAValue, r"step\(.* cannot be compiled by jax.jit.*TracerBoolConversionError"),
    (WantsTwoActions, r"step\(.* with a sample of action_space, Box of shape \(1,\), failed with TypeError"),
    (FiveValues, "6 values .* but it returned 5 values, as Gym's old interface .* stay apart"),
    (VectorReward, r"reward must be a scalar .* shape \(1,\)"),
    (IntegerReward, "reward must be a floating-point number, but it is int32"),
    (FloatTermination, "terminated must be boolean, but it is float32"),
    (VectorTermination, r"terminated must be a scalar, but it has shape \(1,\)"),
    (IntegerTruncation, "truncated must be boolean, but it is int32"),
    (InfoIsATuple, "info must be a dict, but step returned a tuple"),
    (NoFinalObservation, r'info\["final_observation"\] is missing'),
    (FinalObservationIsAState, r'info\["final_observation"\] must have the structure of the observation'),
    (FinalObservationIsOld, r'info\["final_observation"\] must equal the observation wherever'),
    (OtherShape, r"reset's observation must have the shape that observation_space says, \(2,\), but has \(\)"),
    (OtherDtype, "reset's observation must have the dtype that observation_space says, float32, but has int32"),
    (KeysMissing, "reset's observation must be a dict with the keys of observation_space, 'place'"),
    (Outside, "observation is outside observation_space"),
    (IntegerBecomesFloat, r"step's state\['steps'\] must have the dtype .* int32, but it has float32"),
    (StateGrows, "step's state must have the structure of the state that reset returned"),
    (StateChangesShape, r"step's state\['x'\] must have the shape .* \(\), but it has \(1,\)"),
    (DivergingObservation, "step's observation is not finite after 4 random steps"),
    (InfiniteReward, "reward is not finite after 1 random steps"),
    (HostRandomness, r"step\(.* is not deterministic for equal keys"),
    (HostRandomReset, r"reset\(.* is not deterministic for equal keys"),
    (CallbackRandomness, "two rollouts with equal keys differ"),
    (NotVmappable, r"step\(.* cannot be mapped by jax.vmap"),
    (Merged, "terminated and truncated are one and the same value"),
    (MergedInsideJit, "terminated and truncated are one and the same value"),
]


@pytest.mark.parametrize(("fault", "sentence"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_each_fault_is_told_in_one_sentence(fault, sentence):
    with pytest.raises((InputError, InputTypeError), match=sentence) as caught:
        check(fault())
    assert fault.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_of_structure_are_found_without_compiling():
    started = time.perf_counter()
    with pytest.raises(InputError):
        check(FiveValues())
    assert time.perf_counter() - started < 1.0


class TwoGoals(Walk):
    def reward(self, state, action):
        return jnp.stack([-(state["x"] ** 2), -(action[0] ** 2)])


class Team(Environment):
    """Two agents that share a state, one of which may leave: observations, actions, rewards with an agent axis."""

    num_agents: int = 2

    def reset_env(self, key, params):
        state = jax.random.uniform(key, (2,))
        return state[:, None], state

    def step_env(self, key, state, action, params):
        state = jnp.clip(state + action[0], -5, 5)
        return state[:, None], state, -(state**2), jnp.any(jnp.abs(state) >= 5), {}

    def observation_space(self, params):
        return gymnasium.spaces.Box(-5, 5, (1,), np.float32)

    def action_space(self, params):
        return gymnasium.spaces.Box(-1, 1, (1,), np.float32)


class Nested(Walk):
    """Dict observations with a discrete part and a mask, Dict actions."""

    def observation_space(self, params):
        return gymnasium.spaces.Dict(
            {
                "place": gymnasium.spaces.Tuple([super().observation_space(params), gymnasium.spaces.Discrete(3)]),
                "action_mask": gymnasium.spaces.MultiBinary(2),
            }
        )

    def action_space(self, params):
        return gymnasium.spaces.Dict({"push": super().action_space(params), "mode": gymnasium.spaces.Discrete(2)})

    def observe(self, state):
        place = super().observe(state), (state["steps"] % 3).astype(jnp.int32)
        return {"place": place, "action_mask": jnp.ones(2, jnp.int8)}

    def move(self, key, state, action):
        return super().move(key, state, action["push"])

    def reward(self, state, action):
        return -(state["x"] ** 2)


@pytest.mark.parametrize(
    "sound",
    [
        Walk(),
        TwoGoals(),
        Nested(),
        Team(),
        DiscreteCartPole(),
        Pendulum(),
        Problem(Walk(), ()),
        (Walk(), None),
    ],
    ids=lambda sound: type(sound).__name__,
)
def test_sound_environments_pass_in_silence(sound):
    assert check(sound) is None


def test_batched_parameters_are_checked_one_by_one():
    masses = jax.vmap(lambda mass: DoubleIntegrator().vary(mass=mass))(jnp.asarray([0.5, 1.0, 2.0]))
    check(Problem(DoubleIntegrator().environment(), masses, batched_params=True))


def test_gymnax_environments_pass_or_have_a_true_fault():
    import gymnax

    # Its space is declared with integers, its observations are floats.
    with pytest.raises(InputError, match=r"Catch-bsuite: reset's observation must have the dtype .* int32, .* float32"):
        check(gymnax.make("Catch-bsuite")[0])
    # Ends and cuts an episode at the same step, but for two reasons: not merged.
    check(gymnax.make("DeepSea-bsuite"))


def test_host_environments_are_sent_to_their_own_checker():
    with pytest.raises(InputTypeError, match=r"gymnasium\.utils\.env_checker"):
        check(gymnasium.make("CartPole-v1"))


def test_an_object_that_is_no_environment_is_told_what_it_lacks():
    with pytest.raises(InputTypeError, match="object has no method reset"):
        check(object())
