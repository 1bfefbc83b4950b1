"""Multipliers and temperatures: non-negative numbers with a gradient, an Adam and a step size of their own."""

from __future__ import annotations

from typing import cast

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from steersman.errors import require, require_number

_ADAM = optax.scale_by_adam()


class Dual(eqx.Module):
    """A dual variable: a number, or an array of independent ones, that is kept at or above a minimum.

    It has its own moments because its step size has nothing to do with a network's: one number moves by about the
    step size whenever its gradient keeps its sign, whatever the gradient's scale. A multiplier of the constraint
    ``c <= bound`` in a loss ``f + multiplier * (c - bound)`` *ascends*: give it ``bound - c``, the gradient of
    ``multiplier * (bound - c)``, which is to be minimized.

    It is a small PyTree: a state's part, under ``jit``, in a ``scan``, and with a leading axis under ``vmap``.

    Attributes:
        value: the present value, of any shape.
        moments: Adam's state.
    """

    value: Float[Array, "*shape"]
    moments: PyTree

    @classmethod
    def init(cls, value: Float[Array, "*shape"] | float) -> Dual:
        """A variable that has not moved yet.

        Args:
            value: where it starts, at least 0.

        Raises:
            InputError: the value is negative or not finite.
        """
        require_number("value", value, at_least=0.0)
        start = jnp.asarray(value, jnp.result_type(float)) if not hasattr(value, "dtype") else jnp.asarray(value)
        return cls(start, _ADAM.init(start))

    def step(
        self,
        gradient: Float[Array, "*shape"],
        learning_rate: Float[Array, ""] | float,
        minimum: Float[Array, ""] | float = 0.0,
    ) -> Dual:
        """The variable after one descent step, projected: ``max(value - learning_rate * adam(gradient), minimum)``.

        Args:
            gradient: derivative of what is minimized by the variable, of the value's shape.
            learning_rate: Adam's step size.
            minimum: the smallest value allowed; above zero for a temperature, which something is divided by.

        Raises:
            InputError: the shapes differ, or the step size or minimum is a number out of range.
        """
        require(jnp.shape(gradient) == self.value.shape, "gradient's shape", jnp.shape(gradient), f"{self.value.shape}")
        require_number("learning_rate", learning_rate, at_least=0.0)
        require_number("minimum", minimum, at_least=0.0)
        direction, moments = _ADAM.update(jnp.asarray(gradient, self.value.dtype), self.moments)
        moved = self.value - learning_rate * cast(Array, direction)
        return Dual(jnp.maximum(moved, minimum).astype(self.value.dtype), moments)
