"""The slot for how the advantages of a batch are brought to one scale."""

from __future__ import annotations

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman.errors import require_number
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
