"""Wrappers know nothing of what is inside, and change only what they say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gymnasium import spaces

from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError
from steersman.policies import (
    ActionFilter,
    ClipToBox,
    DiagonalGaussian,
    LinearFeedback,
    Mode,
    ObservationFilter,
    ObservationNoise,
    Policy,
    Preprocess,
    make_policy,
)


class Echo(Policy):
    """Acts with what it sees, and counts."""

    def init(self, key):
        return jnp.asarray(0)

    def __call__(self, observation, carry, key):
        return observation, carry + 1


class RateLimit(eqx.Module):
    """A safety filter of the kind that users write: the last entry of the observation is the actuator's position."""

    rate: jax.Array

    def __call__(self, observation, action):
        return jnp.clip(action, observation[-1] - self.rate, observation[-1] + self.rate)


class Select(eqx.Module):
    name: str = eqx.field(static=True)

    def __call__(self, observation):
        return observation[self.name]


KEY = jax.random.key(0)


def gaussian_policy(size=2):
    return make_policy(
        Preprocess(layout(spaces.Box(-1, 1, (size,)))), DiagonalGaussian((1,)), hidden=(4,), memory=3, key=KEY
    )


def test_noise_has_the_distribution_it_says():
    policy = ObservationNoise(Echo(), 0.3)
    keys = jax.random.split(KEY, 4000)
    seen = jax.jit(jax.vmap(lambda key: policy(jnp.asarray([1.0, -2.0]), policy.init(key), key)[0]))(keys)
    for i, mean in enumerate((1.0, -2.0)):
        assert scipy.stats.kstest(np.asarray(seen[:, i]), "norm", (mean, 0.3)).pvalue > 1e-3
    assert abs(np.corrcoef(seen.T)[0, 1]) < 0.06


def test_noise_goes_to_floating_leaves_only_and_never_to_a_mask():
    observation = {
        "x": jnp.zeros(3),
        "half": jnp.zeros(2, jnp.bfloat16),
        "count": jnp.asarray(4),
        "pixels": jnp.ones((2, 2), jnp.uint8),
        "flag": jnp.asarray(True),
        "action_mask": jnp.asarray([1.0, 0.0]),
        "nested": (jnp.zeros(2), jnp.asarray(1)),
    }
    seen, carry = ObservationNoise(Echo(), 1.0)(observation, jnp.asarray(0), KEY)
    assert carry == 1
    for name in ("count", "pixels", "flag", "action_mask"):
        np.testing.assert_array_equal(seen[name], observation[name])
    assert jax.tree.map(lambda leaf: leaf.dtype, seen) == jax.tree.map(lambda leaf: leaf.dtype, observation)
    assert np.all(np.asarray(seen["x"]) != 0)
    assert np.all(np.asarray(seen["nested"][0]) != 0)
    # Every leaf has its own noise.
    assert not np.isclose(seen["x"][:2], seen["nested"][0]).any()


def test_noise_may_differ_between_parts():
    policy = ObservationNoise(Echo(), {"a": 0.0, "b": jnp.asarray([0.0, 2.0])})
    seen, _ = policy({"a": (jnp.ones(3), jnp.ones(2)), "b": jnp.zeros(2)}, jnp.asarray(0), KEY)
    np.testing.assert_array_equal(seen["a"][0], 1)
    np.testing.assert_array_equal(seen["a"][1], 1)
    assert seen["b"][0] == 0 != seen["b"][1]


def test_noise_is_a_disturbance_and_stays_in_the_mode():
    policy = ObservationNoise(gaussian_policy(), 0.5).mode()
    assert isinstance(policy, ObservationNoise)
    assert isinstance(policy.policy, Mode)
    carry = policy.init(KEY)
    first, second = (policy(jnp.zeros(2), carry, jax.random.key(i))[0] for i in range(2))
    assert not np.allclose(first, second)
    still = eqx.tree_at(lambda p: p.standard_deviation, policy, jnp.asarray(0.0))
    first, second = (still(jnp.zeros(2), carry, jax.random.key(i))[0] for i in range(2))
    np.testing.assert_array_equal(first, second)


def test_filters_keep_the_record_and_the_memory():
    inner = gaussian_policy()
    policy = ActionFilter(ObservationFilter(inner, Select("x")), ClipToBox(-0.1, 0.1))
    observation = {"x": jnp.asarray([0.4, 0.2]), "unused": jnp.ones(7)}
    carry = policy.init(KEY)
    np.testing.assert_array_equal(carry, inner.init(KEY))
    action, following, record = policy.act(observation, carry, KEY)
    bare, expected, known = inner.act(observation["x"], carry, KEY)
    np.testing.assert_allclose(action, np.clip(bare, -0.1, 0.1))
    np.testing.assert_array_equal(following, expected)
    jax.tree.map(np.testing.assert_array_equal, record, known)


def test_filters_see_the_observation():
    policy = ActionFilter(LinearFeedback([[-10.0, 0.0]]), RateLimit(jnp.asarray(0.5)))
    action, _ = policy(jnp.asarray([1.0, 3.0]), (), KEY)
    np.testing.assert_allclose(action, [3.5])


def test_clipping_keeps_dtypes_and_follows_spaces():
    box = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, np.inf], np.float32))
    clip = ClipToBox.from_space(box)
    action = clip(None, jnp.asarray([-3.0, 9.0], jnp.bfloat16))
    np.testing.assert_array_equal(action.astype(float), [-1.0, 9.0])
    assert action.dtype == jnp.bfloat16
    both = spaces.Dict({"a": box, "b": spaces.Tuple([spaces.Box(0, 3, (1,), np.int32)])})
    action = ClipToBox.from_space(both)(None, {"a": jnp.asarray([2.0, -1.0]), "b": (jnp.asarray([7]),)})
    np.testing.assert_array_equal(action["a"], [1.0, 0.0])
    np.testing.assert_array_equal(action["b"][0], [3])


def test_wrappers_batch_and_differentiate():
    policy = ActionFilter(ObservationNoise(LinearFeedback([[1.0, 2.0]]), 0.1), ClipToBox(-1.0, 1.0))

    @jax.jit
    def total(policy, keys):
        actions = jax.vmap(lambda key: policy(jnp.asarray([0.1, 0.1]), (), key)[0])(keys)
        return jnp.sum(actions)

    gradient = jax.grad(total)(policy, jax.random.split(KEY, 5))
    assert np.all(np.asarray(gradient.policy.policy.gain) != 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ObservationNoise(Echo(), -0.1), "standard_deviation is -0.1"),
        (lambda: ObservationNoise(Echo(), {"a": np.nan}), "standard_deviation is nan"),
        (lambda: ClipToBox(1.0, 0.0), "low and high"),
        (lambda: ClipToBox({"a": 1.0}, 2.0), "high is"),
    ],
)
def test_bad_wrappers_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_a_space_without_bounds_cannot_be_clipped_to():
    with pytest.raises(InputTypeError, match="space is a Discrete"):
        ClipToBox.from_space(spaces.Discrete(3))
