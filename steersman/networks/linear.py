"""Linear layers, and the drawing of a whole network's parameters at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

Network = TypeVar("Network")

#: Called as ``draw(shape, inputs)``: an array uniform within ``1 / sqrt(inputs)``, PyTorch's initialization of weights
#: and biases of linear layers and convolutions.
Draw = Callable[[tuple[int, ...], int], Array]


def draw_parameters(build: Callable[[Draw], Network], key: Key[Array, ""]) -> Network:
    """What `build` makes, with all its random numbers from one draw.

    Compiling one generator for each of a hundred arrays takes half a minute, compiling one takes none.

    Args:
        build: makes a network with a :data:`Draw`; called twice.
        key: randomness of the initialization.
    """
    sizes: list[int] = []

    def count(shape: tuple[int, ...], inputs: int) -> Array:
        del inputs
        sizes.append(math.prod(shape))
        return jnp.zeros(shape)

    eqx.filter_eval_shape(build, count)
    numbers = jax.random.uniform(key, (sum(sizes),), minval=-1.0)
    # Outside of jit each slice would be compiled; NumPy takes them for nothing.
    source = numbers if isinstance(numbers, Tracer) else np.asarray(numbers)
    position = 0

    def draw(shape: tuple[int, ...], inputs: int) -> Array:
        nonlocal position
        start, position = position, position + math.prod(shape)
        bound = np.asarray(1.0 / math.sqrt(inputs), source.dtype)
        return jnp.asarray(bound * source[start:position].reshape(shape))

    return build(draw)


class Linear(eqx.Module):
    """``weight x + bias``.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, inputs: int, outputs: int, draw: Draw):
        """Draws weights and biases.

        Args:
            inputs: length of the input.
            outputs: length of the output.
            draw: where random numbers come from.
        """
        self.weight = draw((outputs, inputs), inputs)
        self.bias = draw((outputs,), inputs)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """Applies the layer to one vector."""
        return self.weight @ x + self.bias
