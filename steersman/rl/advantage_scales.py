"""The slot for how the advantages of a batch are brought to one scale."""

from __future__ import annotations

import abc

import equinox as eqx
from jaxtyping import Array, Float, PyTree


class AdvantageScale(eqx.Module):
    """Scales the advantages of a whole batch, remembering earlier batches if it wants to."""

    @abc.abstractmethod
    def init(self) -> PyTree:
        """What is remembered before the first batch."""

    @abc.abstractmethod
    def __call__(self, state: PyTree, advantage: Float[Array, "T N"]) -> tuple[Float[Array, "T N"], PyTree]:
        """``(scaled advantage, state)``."""
