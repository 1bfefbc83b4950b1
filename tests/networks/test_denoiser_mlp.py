import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.networks import MLPDenoiser, OctaveTime


def affine(layer, x):
    return np.asarray(layer.weights[0]) @ x + np.asarray(layer.biases[0])


def swish(x):
    return x / (1.0 + np.exp(-x))


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


X = np.asarray(jax.random.normal(jax.random.key(1), (3, 2)))
CONDITION = np.array([0.5, -1.0], np.float32)


@eqx.filter_jit
def call(network, x, time, condition):
    return network(x, time, condition)


def test_plain_layers_by_hand():
    network = MLPDenoiser((3, 2), 2, (5, 4), time_size=4, longest_time=10.0, key=jax.random.key(0))
    # Frequencies of 100 / 10 and 1 / 10, at time 2.
    told = np.concatenate([np.sin([20.0, 0.2]), np.cos([20.0, 0.2])])
    hidden = np.concatenate([X.ravel(), told, CONDITION])
    for place, (weight, bias) in enumerate(zip(network.entry.weights, network.entry.biases, strict=True)):
        hidden = np.asarray(weight) @ hidden + np.asarray(bias)
        hidden = swish(hidden) if place < 2 else hidden
    out = call(network, jnp.asarray(X), jnp.asarray(2.0), jnp.asarray(CONDITION))
    np.testing.assert_allclose(out, hidden.reshape(3, 2), atol=1e-5)


def test_residual_blocks_by_hand():
    network = MLPDenoiser((3, 2), 2, (6, 6), "mish", residual=True, time_features=OctaveTime(2), key=jax.random.key(0))
    told = np.concatenate([np.cos([0.5, 1.0]), np.sin([0.5, 1.0])])
    hidden = affine(network.entry, np.concatenate([X.ravel(), told, CONDITION]))
    (block,) = network.blocks
    inner = mish(affine(block, mish(hidden)))
    hidden = hidden + np.asarray(block.weights[1]) @ inner + np.asarray(block.biases[1])
    want = affine(network.exit, mish(hidden))
    out = call(network, jnp.asarray(X), jnp.asarray(0.5), jnp.asarray(CONDITION))
    np.testing.assert_allclose(out, want.reshape(3, 2), atol=1e-5)


def test_mish_far_out():
    """Neither overflow nor lost digits, nor in the slope."""
    from steersman.networks import mish as ours

    x = jnp.asarray([-200.0, -30.0, -1.0, 0.0, 1.0, 30.0, 200.0])
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(ours(x), exact * np.tanh(np.logaddexp(0.0, exact)), rtol=1e-6, atol=1e-30)
    slope = jax.vmap(jax.grad(ours))(x)
    step = 1e-4
    numeric = (mish_exact(exact + step) - mish_exact(exact - step)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, atol=1e-6)


def mish_exact(x):
    return x * np.tanh(np.logaddexp(0.0, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_shape": (0, 2)}, r"chunk_shape\[0\] is 0"),
        ({"condition_size": -1}, "condition_size is -1"),
        ({"activation": "misch"}, "Unknown activation 'misch': did you mean 'mish'"),
        ({"longest_time": 0.0}, "longest_time is 0.0"),
        ({"time_size": 5}, "size is 5"),
        ({"hidden": (4, 5), "residual": True}, r"hidden is \(4, 5\), but residual blocks"),
        ({"hidden": (), "residual": True}, r"hidden is \(\), but residual blocks"),
    ],
)
def test_bad_sizes(options, message):
    settings = {"chunk_shape": (3, 2), "condition_size": 1, "hidden": (4,), **options}
    with pytest.raises(InputError, match=message):
        MLPDenoiser(key=jax.random.key(0), **settings)


def test_bad_inputs():
    network = MLPDenoiser((3, 2), 2, (4,), key=jax.random.key(0))
    with pytest.raises(InputError, match=r"x\.shape is \(4, 2\)"):
        network(jnp.zeros((4, 2)), jnp.asarray(0.0), jnp.zeros(2))
    with pytest.raises(InputError, match=r"condition\.shape is \(3,\)"):
        network(jnp.zeros((3, 2)), jnp.asarray(0.0), jnp.zeros(3))
