"""Network policies: feed-forward and recurrent, on every kind of observation, with masks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman.envs import spaces as flat_spaces
from steersman.policies import NetworkPolicy, Preprocess, Recurrent, Standardize, head_for, make_policy

OBSERVATIONS = {
    "box": (spaces.Box(-1, 1, (2, 2)), jnp.asarray([[0.1, 0.2], [0.3, 0.4]]), [0.1, 0.2, 0.3, 0.4]),
    "image": (spaces.Box(0, 255, (2,), np.uint8), jnp.asarray([3, 200], jnp.uint8), [3.0, 200.0]),
    "discrete": (spaces.Discrete(3, start=2), jnp.asarray(3), [0.0, 1.0, 0.0]),
    "multi": (spaces.MultiDiscrete([2, 3]), jnp.asarray([1, 0]), [0, 1, 1, 0, 0]),
    "dict": (
        spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(-1, 1, (1,))}),
        {"a": jnp.asarray([0.5]), "b": jnp.asarray(1)},
        [0.5, 0.0, 1.0],
    ),
    "tuple": (spaces.Tuple([spaces.MultiBinary(2), spaces.Box(-1, 1, ())]), (jnp.asarray([1, 0]), 0.25), [1, 0, 0.25]),
}


def build(observation_space, action_space, **options):
    preprocess = Preprocess(flat_spaces.layout(observation_space))
    return make_policy(preprocess, head_for(action_space), key=jax.random.key(0), **{"hidden": (8,), **options})


@pytest.mark.parametrize("name", list(OBSERVATIONS))
def test_preprocessing_makes_the_vector_that_the_space_says(name):
    space, observation, expected = OBSERVATIONS[name]
    preprocess = Preprocess(flat_spaces.layout(space))
    assert preprocess.size == len(expected)
    np.testing.assert_allclose(preprocess(observation).vector, expected, rtol=1e-6)
    scaled = Preprocess(preprocess.layout, Standardize(jnp.ones(preprocess.size), 2 * jnp.ones(preprocess.size), 1.5))
    np.testing.assert_allclose(
        scaled(observation).vector, np.clip((np.asarray(expected) - 1) * 2, -1.5, 1.5), rtol=1e-5, atol=1e-6
    )


def test_feed_forward_network_is_the_written_out_product():
    policy = build(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), activation="relu", initial_log_std=-0.5)
    x = np.array([0.3, -0.2, 0.9])
    (first, last), (one, two) = policy.network.trunk.weights, policy.network.trunk.biases
    expected = np.asarray(last) @ np.maximum(np.asarray(first) @ x + one, 0) + two
    parameters, carry = policy.parameters(jnp.asarray(x), policy.init(jax.random.key(0)))
    np.testing.assert_allclose(parameters.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(parameters.log_std, [-0.5, -0.5])
    assert carry == ()


def test_fields_are_where_their_names_say():
    policy = build(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    assert isinstance(policy, NetworkPolicy)
    assert isinstance(policy.preprocess, Preprocess)
    assert policy.head.num_actions == 2
    # A weakly typed leaf would change its type at the first update, and compile everything twice.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(build(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))))


def test_recurrent_network_is_a_gated_unit_written_out():
    policy = build(spaces.Box(-1, 1, (2,)), spaces.Discrete(3), memory=4)
    cell = policy.network.cell
    weights = {name: np.asarray(getattr(cell, name)) for name in ("weight_ih", "weight_hh", "bias", "bias_n")}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    carry = policy.init(jax.random.key(0))
    hidden = np.zeros(4)
    for x in ([0.5, -0.1], [1.0, 0.3], [0.0, 0.0]):
        reset_in, update_in, new_in = np.split(weights["weight_ih"] @ np.array(x) + weights["bias"], 3)
        reset_h, update_h, new_h = np.split(weights["weight_hh"] @ hidden, 3)
        reset, update = sigmoid(reset_in + reset_h), sigmoid(update_in + update_h)
        new = np.tanh(new_in + reset * (new_h + weights["bias_n"]))
        hidden = new + update * (hidden - new)
        logits, carry = policy.parameters(jnp.asarray(x), carry)
        np.testing.assert_allclose(carry, hidden, rtol=1e-4, atol=1e-6)
        expected = hidden @ np.asarray(policy.network.readout) + policy.network.bias
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)


def test_memory_matters_and_resets():
    policy = build(spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), memory=8)
    # The readout starts small; made larger here so that the memory shows.
    policy = eqx.tree_at(lambda p: p.network.readout, policy, 100 * policy.network.readout)
    assert isinstance(policy.network, Recurrent)

    @jax.jit
    def run(observations):
        def step(carry, observation):
            parameters, carry = policy.parameters(observation, carry)
            return carry, parameters.mean

        return jax.lax.scan(step, policy.init(jax.random.key(0)), observations)[1]

    late = jnp.zeros((5, 1)).at[4].set(0.5)
    early = late.at[0].set(1.0)
    assert not np.allclose(run(late)[4], run(early)[4])
    np.testing.assert_array_equal(run(late)[:4], run(jnp.zeros((5, 1)))[:4])


def test_an_action_mask_in_the_observation_is_obeyed():
    observation_space = spaces.Dict({"x": spaces.Box(-1, 1, (2,)), "action_mask": spaces.MultiBinary(4)})
    policy = build(observation_space, spaces.Discrete(4, start=1))
    assert policy.preprocess.size == 2
    observation = {"x": jnp.ones(2), "action_mask": jnp.asarray([0, 1, 0, 1], jnp.int8)}
    act = jax.jit(jax.vmap(lambda key: policy.act(observation, (), key)))
    action, _, record = act(jax.random.split(jax.random.key(0), 100))
    assert set(np.asarray(action).tolist()) == {2, 4}
    assert set(np.asarray(record.action).tolist()) == {1, 3}
    np.testing.assert_array_equal(np.isneginf(record.parameters[0]), [True, False, True, False])
    # The same likelihood from preprocessed features, which is what an update sees.
    features = policy.preprocess(observation)
    parameters, _ = policy.from_features(features, ())
    np.testing.assert_array_equal(policy.head.log_prob(parameters, record.action[0]), record.log_prob[0])


def test_batches_need_no_vmap_without_memory():
    policy = build(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    x = jax.random.normal(jax.random.key(1), (6, 3))
    batched, _ = policy.from_features(jax.vmap(policy.preprocess)(x), ())
    mapped = jax.vmap(lambda x: policy.parameters(x, ())[0])(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), batched, mapped)


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("name", list(OBSERVATIONS))
def test_every_observation_and_action_space_can_be_acted_on(name, memory):
    space, _, _ = OBSERVATIONS[name]
    for action_space in (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.Box(-2, 2, (2,))):
        policy = build(space, action_space, memory=memory)

        def act(key, policy=policy):
            observation = flat_spaces.sample(space, key)
            return policy.act(observation, policy.init(key), key)[0]

        shape = jax.eval_shape(act, jax.random.key(0)).shape
        assert shape == action_space.shape
