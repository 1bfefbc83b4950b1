import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.networks import MLP, orthogonal


@pytest.mark.parametrize("shape", [(64, 64), (4, 64), (64, 4), (1, 64), (64, 1), (1, 1)])
def test_orthogonal_rows_or_columns(shape):
    matrices = jax.vmap(lambda k: orthogonal(k, shape, 2.0))(jax.random.split(jax.random.key(0), 20))
    for matrix in np.asarray(matrices, np.float64):
        gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
        np.testing.assert_allclose(gram, 4.0 * np.eye(min(shape)), atol=2e-3)


def test_orthogonal_is_uniform():
    """Entries of a uniformly distributed orthogonal matrix have mean zero and variance one over its size."""
    matrices = np.asarray(jax.vmap(lambda k: orthogonal(k, (8, 8), 1.0))(jax.random.split(jax.random.key(1), 4000)))
    np.testing.assert_allclose(matrices.mean(0), 0.0, atol=0.03)
    np.testing.assert_allclose(matrices.var(0), 1 / 8, atol=0.015)
    assert abs((np.linalg.det(matrices) > 0).mean() - 0.5) < 0.05


def test_value_and_gradients_are_those_of_plain_layers():
    network = MLP(3, 2, (5, 4), "tanh", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (7, 3))

    def plain(weights, biases, x):
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = np.tanh(x @ np.asarray(weight).T + np.asarray(bias))
        return x @ np.asarray(weights[-1]).T + np.asarray(biases[-1])

    expected = plain(network.weights, network.biases, np.asarray(x))
    np.testing.assert_allclose(network(x), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(network)(x), expected, atol=1e-5)
    np.testing.assert_allclose(network(x.reshape(7, 1, 3)), expected[:, None], atol=1e-5)
    direction = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 0.1, network)

    def loss(network):
        return jnp.sum(jnp.sin(network(x)))

    gradient = jax.grad(loss)(network)
    along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    forward = jax.jvp(loss, (network,), (direction,))[1]
    assert float(along) == pytest.approx(float(forward), rel=1e-4)
    shifted = [jax.tree.map(lambda p, d, s=s: p + s * d, network, direction) for s in (1e-2, -1e-2)]
    assert float(along) == pytest.approx(float(loss(shifted[0]) - loss(shifted[1])) / 2e-2, rel=2e-2)


def test_bad_sizes():
    with pytest.raises(InputError, match="input_size is 0"):
        MLP(0, 1, key=jax.random.key(0))
    with pytest.raises(InputError, match="hidden is 0"):
        MLP(1, 1, (0,), key=jax.random.key(0))
    with pytest.raises(InputError, match="Unknown activation 'relo': did you mean 'relu'"):
        MLP(1, 1, (2,), "relo", key=jax.random.key(0))
