"""Hyperparameters that change with the number of samples taken."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree, UInt32

from steersman.errors import require, require_number

T = TypeVar("T", bound=PyTree)


def as_scalar(value: Any) -> Any:
    """A continuous hyperparameter as an array leaf; schedules, None and arrays stay what they are."""
    if value is None or isinstance(value, (Schedule, jax.Array)) or not isinstance(value, (int, float)):
        return value
    return jnp.asarray(value, jnp.result_type(float))


def scalar(default: float | None) -> Any:
    """A field for a continuous hyperparameter: an array leaf, so that it can be varied under ``vmap``."""
    # The default goes through the converter when an instance is made, so importing touches no device.
    return eqx.field(converter=as_scalar, default=default)


#: A continuous hyperparameter: given as a number, held as an array leaf.
Continuous = Float[Array, ""] | float


class Schedule(eqx.Module):
    """A hyperparameter as a function of the environment steps (or other samples) taken so far."""

    @abc.abstractmethod
    def __call__(self, samples: UInt32[Array, ""]) -> Float[Array, ""]:
        """The value after `samples` samples."""


#: A continuous hyperparameter that may also follow a schedule.
if TYPE_CHECKING:
    # Methods read it after `resolve`, which leaves no schedule behind; a type checker cannot know that.
    Scheduled = Any
else:
    Scheduled = Continuous | Schedule


class Linear(Schedule):
    """From ``start`` to ``end`` over ``steps`` samples, constant afterwards."""

    start: Continuous = eqx.field(converter=as_scalar)
    end: Continuous = eqx.field(converter=as_scalar)
    steps: Continuous = eqx.field(converter=as_scalar)

    def __check_init__(self) -> None:
        require_number("start", self.start)
        require_number("end", self.end)
        require_number("steps", self.steps, above=0.0)

    def stays_above_zero(self) -> bool:
        """Whether no value is zero or negative; True while the ends are being traced by JAX and unknown."""
        return all(isinstance(end, Tracer) or bool(jnp.all(jnp.asarray(end) > 0)) for end in (self.start, self.end))

    def __call__(self, samples: UInt32[Array, ""]) -> Float[Array, ""]:
        fraction = jnp.clip(samples.astype(jnp.float32) / self.steps, 0.0, 1.0)
        return self.start + (self.end - self.start) * fraction


class WarmupCosine(Schedule):
    """Rises linearly from 0 to ``peak``, then falls along half a cosine to ``end``, which it keeps.

    Attributes:
        peak: the greatest value.
        steps: samples until the end, the warm-up included.
        warmup: samples until the peak.
        end: the value at the end.
    """

    peak: Continuous = eqx.field(converter=as_scalar)
    steps: Continuous = eqx.field(converter=as_scalar)
    warmup: Continuous = scalar(0.0)
    end: Continuous = scalar(0.0)

    def __check_init__(self) -> None:
        require_number("peak", self.peak, at_least=0.0)
        require_number("warmup", self.warmup, at_least=0.0)
        require_number("end", self.end, at_least=0.0)
        require_number("steps", self.steps, above=0.0)
        if not isinstance(self.warmup, Tracer) and not isinstance(self.steps, Tracer):
            require(bool(jnp.all(self.warmup < self.steps)), "warmup", float(self.warmup), "below steps")

    def __call__(self, samples: UInt32[Array, ""]) -> Float[Array, ""]:
        done = samples.astype(jnp.float32)
        # The first sample is not wasted on a value of zero.
        rising = self.peak * (done + 1.0) / jnp.maximum(self.warmup, 1.0)
        fraction = jnp.clip((done - self.warmup) / (self.steps - self.warmup), 0.0, 1.0)
        falling = self.end + 0.5 * (self.peak - self.end) * (1.0 + jnp.cos(jnp.pi * fraction))
        return jnp.where(done < self.warmup, rising, falling)


def resolve(tree: T, samples: UInt32[Array, ""]) -> T:
    """`tree` with every schedule in it replaced by its value after `samples` samples."""

    def value(leaf: Any) -> Any:
        return leaf(samples) if isinstance(leaf, Schedule) else leaf

    return jax.tree.map(value, tree, is_leaf=lambda leaf: isinstance(leaf, Schedule))
