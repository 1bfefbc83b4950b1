"""Linear feedback against the written-out law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.policies import LinearFeedback

KEY = jax.random.key(0)


def test_the_law_by_hand():
    policy = LinearFeedback([[1, 2], [0, -1]], setpoint=[1.0, 0.0], feedforward=[0.5, 0.0])
    action, carry = jax.jit(lambda x: policy(x, (), KEY))(jnp.asarray([2.0, 3.0]))
    # u = [0.5, 0] - K ([2, 3] - [1, 0]) = [0.5 - 7, 3]
    np.testing.assert_allclose(action, [-6.5, 3.0])
    assert carry == ()
    at_rest, _ = policy(jnp.asarray([1.0, 0.0]), (), KEY)
    np.testing.assert_allclose(at_rest, [0.5, 0.0])


def test_bounds_clip_on_either_side():
    for low, high, expected in ((-5.0, 2.0, [-5.0, 2.0]), (None, [9.0, 1.0], [-6.5, 1.0]), (-1.0, None, [-1.0, 3.0])):
        policy = LinearFeedback([[1, 2], [0, -1]], [1.0, 0.0], [0.5, 0.0], low, high)
        np.testing.assert_allclose(policy(jnp.asarray([2.0, 3.0]), (), KEY)[0], expected)


def test_scalars_stand_for_all_elements_and_precision_follows_the_gain():
    policy = LinearFeedback(jnp.eye(3, dtype=jnp.bfloat16), setpoint=1.0)
    assert policy.setpoint.shape == (3,)
    assert policy(jnp.ones(3, jnp.bfloat16), (), KEY)[0].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert LinearFeedback(np.eye(2)).feedforward.dtype == jnp.float64


def test_gains_can_be_learned_and_stacked():
    def squared(gain, x):
        return jnp.sum(LinearFeedback(gain)(x, (), KEY)[0] ** 2)

    x = jnp.asarray([1.0, 2.0])
    np.testing.assert_allclose(jax.grad(squared)(jnp.asarray([[3.0, 1.0]]), x), [[10.0, 20.0]])
    gains = jnp.asarray([[[1.0, 0.0]], [[0.0, 1.0]]])
    many = jax.vmap(LinearFeedback)(gains)
    actions = jax.vmap(lambda policy: policy(x, (), KEY)[0])(many)
    np.testing.assert_allclose(actions, [[-1.0], [-2.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0],), "gain is"),
        (([[1.0, 2.0]], [0.0, 0.0, 0.0]), "setpoint has shape"),
        (([[1.0, 2.0]], None, [1.0, 2.0]), "feedforward has shape"),
        (([[1.0]], None, None, [1.0, 2.0]), "low has shape"),
        (([[1.0]], None, None, 1.0, -1.0), "low and high"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        LinearFeedback(*arguments)
