"""The protocol's own parts: stochastic policies, their mode, wrappers, empty memories."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman.errors import InputTypeError
from steersman.policies import (
    Categorical,
    DiagonalGaussian,
    GaussianParameters,
    Head,
    Mode,
    Policy,
    StochasticPolicy,
    Wrapper,
)
from steersman.policies.policy import zero_element


class Linear(StochasticPolicy):
    """A Gaussian about a linear map, with a count of calls as its memory."""

    weight: jax.Array
    head: Head = DiagonalGaussian((2,), (-1.0, -1.0), (1.0, 3.0))

    def init(self, key):
        return jnp.asarray(0)

    def parameters(self, observation, carry):
        return GaussianParameters(self.weight @ observation, jnp.zeros(2)), carry + 1


class Echo(Policy):
    """No leaves at all."""

    size: int = eqx.field(static=True)

    def __call__(self, observation, carry, key):
        return observation[: self.size], carry


class Doubled(Wrapper):
    def act(self, observation, carry, key):
        action, carry, record = self.policy.act(observation, carry, key)
        return 2 * action, carry, record


POLICY = Linear(0.1 * jnp.asarray([[1.0, 2.0], [3.0, 4.0]]))
OBSERVATION = jnp.asarray([0.5, -1.0])


def test_the_abstract_head_is_no_field_of_its_own():
    # A stringified AbstractVar would put `head` first, and shift every positional argument of every subclass.
    assert [field.name for field in dataclasses.fields(Linear)] == ["weight", "head"]
    assert dataclasses.fields(StochasticPolicy) == ()

    class Headless(StochasticPolicy):
        def parameters(self, observation, carry):
            return (), carry

    with pytest.raises(TypeError, match="head"):
        Headless()


def test_record_holds_what_the_policy_knew():
    action, carry, record = POLICY.act(OBSERVATION, POLICY.init(jax.random.key(0)), jax.random.key(1))
    assert carry == 1
    np.testing.assert_array_equal(record.parameters.mean, POLICY.weight @ OBSERVATION)
    np.testing.assert_allclose(
        record.log_prob, POLICY.distribution(OBSERVATION, jnp.asarray(0)).log_prob(record.action), rtol=1e-6
    )
    np.testing.assert_allclose(action, np.clip(record.action, -1, 1) * np.array([1, 2]) + np.array([0, 1]), rtol=1e-6)
    assert not np.allclose(action, record.action)


def test_call_and_act_agree_for_the_same_key():
    key = jax.random.key(3)
    called = POLICY(OBSERVATION, jnp.asarray(0), key)
    acted = POLICY.act(OBSERVATION, jnp.asarray(0), key)
    np.testing.assert_array_equal(called[0], acted[0])
    assert called[1] == acted[1] == 1


def test_mode_is_the_mean_whatever_the_key():
    mode = POLICY.mode()
    assert isinstance(mode, Mode)
    expected = np.clip(POLICY.weight @ OBSERVATION, -1, 1) * np.array([1, 2]) + np.array([0, 1])
    for seed in range(2):
        action, carry, record = mode.act(OBSERVATION, mode.init(jax.random.key(0)), jax.random.key(seed))
        np.testing.assert_allclose(action, expected, rtol=1e-6)
        assert (carry, record) == (1, ())
    assert mode.mode() is mode


def test_a_wrapper_passes_on_what_it_does_not_change():
    wrapped = Doubled(POLICY)
    key = jax.random.key(2)
    inner, outer = (policy.act(OBSERVATION, policy.init(key), key) for policy in (POLICY, wrapped))
    np.testing.assert_array_equal(outer[0], 2 * inner[0])
    jax.tree.map(np.testing.assert_array_equal, outer[1:], inner[1:])
    np.testing.assert_array_equal(wrapped(OBSERVATION, jnp.asarray(0), key)[0], outer[0])
    quiet = wrapped.mode()
    assert isinstance(quiet, Doubled)
    assert isinstance(quiet.policy, Mode)


def test_mode_goes_through_wrappers_and_policies_without_arrays():
    mode = Doubled(Doubled(Echo(1))).mode()
    np.testing.assert_array_equal(mode(OBSERVATION, (), jax.random.key(0))[0], [2.0])
    assert mode.policy.policy == Echo(1)


def test_a_policy_is_a_pytree():
    @jax.jit
    def loss(policy, observation):
        return policy.act(observation, policy.init(jax.random.key(0)), jax.random.key(0))[2].log_prob

    gradient = jax.grad(loss)(POLICY, OBSERVATION)
    assert isinstance(gradient, Linear)
    assert gradient.weight.shape == (2, 2)
    many = jax.vmap(loss, in_axes=(None, 0))(POLICY, jnp.ones((3, 2)))
    assert many.shape == (3,)


def test_zero_elements_belong_to_memories():
    space = spaces.Dict(
        {"a": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float64)]), "b": spaces.MultiBinary(2)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: pytest.fail(f"warned: {args}"))
        zero = zero_element(space)
    assert zero["a"][0].shape == ()
    assert zero["a"][1].dtype == jnp.float32
    assert zero["b"].dtype == jnp.int8
    with pytest.raises(InputTypeError, match="space is a Text"):
        zero_element(spaces.Text(3))
    assert isinstance(Categorical(2), Head)
