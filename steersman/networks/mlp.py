"""Multilayer perceptrons in the layout that batched training wants, and orthogonal initialization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steersman.errors import require, require_count, unknown_name


def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x tanh(log(1 + exp(x)))`` (Misra, 2019, arXiv:1908.08681), with one exponential that cannot overflow."""
    # With u = exp(-|x|), tanh(log(1 + exp(x))) is (1 + 2u) / (1 + 2u + 2u^2) above zero and (u^2 + 2u) over that plus
    # two below.
    u = jnp.exp(-jnp.abs(x))
    above = x >= 0
    top = jnp.where(above, 1.0 + 2.0 * u, u * (u + 2.0))
    return x * top / (top + jnp.where(above, 2.0 * u * u, 2.0))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "mish": mish,
}


def orthogonal(key: Key[Array, ""], shape: tuple[int, int], gain: float) -> Float[Array, "rows columns"]:
    """A random matrix with orthonormal rows or columns times `gain` (Saxe et al., 2014, arXiv:1312.6120).

    The polar factor of a Gaussian matrix, by Newton-Schulz iterations ``X <- 1.5 X - 0.5 X X' X``; it is uniformly
    distributed, as the usual factor of a QR decomposition is. Products only, because batches of LAPACK calls that run
    side by side, as the layers of several members do, can block each other for good on a CPU with two threads.
    """
    wide = shape[0] <= shape[1]
    matrix = jax.random.normal(key, shape if wide else shape[::-1])
    matrix = matrix / jnp.linalg.norm(matrix)

    def improve(matrix: Array, _: None) -> tuple[Array, None]:
        # Small singular values grow by half each time and then settle at one quadratically; forty steps bring a
        # square Gaussian matrix there unless its smallest value is about a millionth of its norm.
        return 1.5 * matrix - 0.5 * (matrix @ matrix.T) @ matrix, None

    matrix, _ = jax.lax.scan(improve, matrix, None, length=40)
    return gain * (matrix if wide else matrix.T)


@jax.custom_jvp
def _materialize_gradient(x: Array) -> Array:
    return x


# Without the barrier XLA reads the incoming gradient through a transposition, and the product that gives the last
# layer's gradient takes ten times as long on CPU.
_materialize_gradient.defjvp(lambda primals, tangents: (primals[0], jax.lax.optimization_barrier(tangents[0])))


class MLP(eqx.Module):
    """Fully connected layers with one activation between them and none after the last.

    Attributes:
        weights: one matrix per layer, ``[out, in]``.
        biases: one vector per layer.
        activation: name of the nonlinearity, a key of ``ACTIVATIONS``.
    """

    weights: list[Float[Array, "out in"]]
    biases: list[Float[Array, " out"]]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        output_size: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        *,
        output_gain: float = 1.0,
        key: Key[Array, ""],
    ):
        """Draws orthogonal weights (gain ``sqrt(2)`` inside, `output_gain` at the end) and zero biases.

        Args:
            input_size: length of the input.
            output_size: length of the output.
            hidden: width of each hidden layer.
            activation: one of ``tanh``, ``relu``, ``swish``, ``gelu``, ``elu``, ``mish``.
            output_gain: scale of the last layer; 0.01 makes a policy start nearly uniform.
            key: randomness of the initialization.
        """
        require_count("input_size", input_size)
        require_count("output_size", output_size)
        for width in hidden:
            require_count("hidden", width)
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        require(math.isfinite(output_gain), "output_gain", output_gain, "a finite number")
        sizes = [input_size, *hidden, output_size]
        keys = jax.random.split(key, len(sizes) - 1)
        gains = [math.sqrt(2.0)] * len(hidden) + [output_gain]
        shapes = [(out, into) for into, out in itertools.pairwise(sizes)]
        self.weights = [orthogonal(k, s, g) for k, s, g in zip(keys, shapes, gains, strict=True)]
        self.biases = [jnp.zeros(size) for size in sizes[1:]]
        self.activation = activation

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Applies the network to one input or to a batch with any leading axes."""
        # Inside, the batch is the last axis: on CPU, gradients of the weights are then products of rows with rows,
        # which take two thirds of the time of products of columns with columns.
        hidden = x.reshape(-1, x.shape[-1]).T
        activation = ACTIVATIONS[self.activation]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = activation(weight @ hidden + bias[:, None])
        output = _materialize_gradient(self.weights[-1] @ hidden + self.biases[-1][:, None])
        return output.T.reshape(*x.shape[:-1], -1)
