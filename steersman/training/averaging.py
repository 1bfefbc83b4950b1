"""Exponentially weighted averages of parameters: proximal policies, target networks, averaged iterates."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman.errors import require_number
from steersman.training.schedules import Continuous, as_scalar, scalar


class Average(NamedTuple):
    """A running average, as checkpoints keep it.

    Attributes:
        value: the average, a PyTree like what is averaged.
        weight: total weight of the iterates in it, where the newest weighs one.
    """

    value: PyTree
    weight: Float[Array, ""]


class MovingAverage(eqx.Module):
    """An exponentially weighted mean of the iterates of a PyTree, in one of two kinds.

    Both follow ``W <- decay W + 1`` and ``value <- value + (x - value) / W`` and differ in where ``W`` starts:

    - *bias-corrected*: ``W = 1``. The value is ``sum_k decay^(n-k) x_k / sum_k decay^(n-k)``; the first iterate
      counts like every other one and fades (Hilton, Cobbe and Schulman, 2022, arXiv:2110.00641). As ``decay`` goes to
      one this becomes the plain mean of all iterates. For proximal policies and averaged iterates.
    - *uncorrected*: ``W = 1 / (1 - decay)``, where the recursion rests, so that every step has the same size
      ``1 - decay``; as if the first tree had been there forever. For target networks (with ``decay = 1 - tau``).

    Only floating-point leaves are averaged. Counters, keys and what is no array are those of the newest tree.

    Attributes:
        decay: weight of an iterate relative to the next one, in [0, 1); zero keeps the newest alone.
        bias_corrected: which kind.
    """

    decay: Continuous = scalar(0.995)
    bias_corrected: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        # In the precision of the leaf that it becomes: there, 1 - 1e-9 is one.
        require_number("decay", as_scalar(self.decay), at_least=0.0, below=1.0)

    @property
    def centre_of_mass(self) -> Float[Array, ""]:
        """Mean age of the iterates in a long average, in updates: ``decay / (1 - decay)``."""
        return jnp.asarray(self.decay / (1.0 - self.decay))

    def init(self, tree: PyTree) -> Average:
        """The average of `tree` alone. Also how an average is reset."""
        decay = jnp.asarray(self.decay)
        weight = jnp.ones_like(decay) if self.bias_corrected else 1.0 / (1.0 - decay)
        return Average(tree, weight)

    def update(self, average: Average, tree: PyTree) -> Average:
        """The average with one more iterate, whose structure is that of the first."""
        weight = self.decay * average.weight + 1.0

        def move(old: Any, new: Any) -> Any:
            if not eqx.is_inexact_array(new):
                return new
            # In this form what never changes stays the same to the last bit, and without decay so does the newest.
            return new + (1.0 - 1.0 / weight).astype(jnp.finfo(new.dtype).dtype) * (old - new)

        return Average(jax.tree.map(move, average.value, tree), weight)


def decay_of(centre_of_mass: Float[Array, "..."] | float | int) -> Float[Array, "..."]:
    """The decay of an average whose iterates are `centre_of_mass` updates old in the mean, at least 0.

    Raises:
        InputError: `centre_of_mass` is negative or not finite.
    """
    require_number("centre_of_mass", centre_of_mass, at_least=0.0)
    centre = jnp.asarray(centre_of_mass, jnp.result_type(float))
    return centre / (1.0 + centre)
