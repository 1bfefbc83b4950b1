"""The slot for how the advantages of a batch are brought to one scale."""

from __future__ import annotations

import abc

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from steersman.errors import InputError, InputTypeError, require_number
from steersman.training.normalization import RunningMoments
from steersman.training.schedules import Continuous, scalar


class AdvantageScale(eqx.Module):
    """Scales the advantages of a whole batch, remembering earlier batches if it wants to."""

    @abc.abstractmethod
    def init(self) -> PyTree:
        """What is remembered before the first batch."""

    @abc.abstractmethod
    def __call__(self, state: PyTree, advantage: Float[Array, "T N"]) -> tuple[Float[Array, "T N"], PyTree]:
        """``(scaled advantage, state)``."""


class AdvantageMoments(AdvantageScale):
    """Standardizes by exponentially weighted moments of this batch's advantages and those before it.

    Small batches then share moments that no one of them could estimate (Hilton et al., 2022, arXiv:2110.00641).

    Attributes:
        decay: what each batch weighs relative to the next, in [0, 1); zero for the moments of each batch alone.
    """

    decay: Continuous = scalar(0.0)

    def __check_init__(self) -> None:
        require_number("decay", self.decay, at_least=0.0, below=1.0)

    def init(self) -> RunningMoments:
        return RunningMoments.zeros()

    def __call__(
        self, state: RunningMoments, advantage: Float[Array, "T N"]
    ) -> tuple[Float[Array, "T N"], RunningMoments]:
        state = state.update(advantage, self.decay)
        return (advantage - state.mean) / (jnp.sqrt(state.variance) + 1e-8), state


class ClippedAdvantages(AdvantageScale):
    """Another scale's advantages, within quantiles of the batch: single returns far from all others pull less.

    An option of DPPO's code (Ren et al., 2024, arXiv:2409.00588).

    Attributes:
        low: quantile that bounds from below, at least 0.
        high: quantile that bounds from above, at most 1.
        scale: what comes before.
    """

    low: Continuous = scalar(0.05)
    high: Continuous = scalar(0.95)
    scale: AdvantageScale = eqx.field(default_factory=AdvantageMoments)

    def __check_init__(self) -> None:
        require_number("low", self.low, at_least=0.0, at_most=1.0)
        require_number("high", self.high, at_least=0.0, at_most=1.0)
        if not isinstance(self.low, Tracer) and not isinstance(self.high, Tracer) and not self.low < self.high:
            raise InputError(f"low is {self.low}, but it must be below high, {self.high}.")
        if not isinstance(self.scale, AdvantageScale):
            raise InputTypeError(f"scale is {self.scale!r}, but it must be an AdvantageScale.")

    def init(self) -> PyTree:
        return self.scale.init()

    def __call__(self, state: PyTree, advantage: Float[Array, "T N"]) -> tuple[Float[Array, "T N"], PyTree]:
        scaled, state = self.scale(state, advantage)
        low, high = jnp.quantile(scaled, jnp.stack([jnp.asarray(self.low), jnp.asarray(self.high)]))
        return jnp.clip(scaled, low, high), state
