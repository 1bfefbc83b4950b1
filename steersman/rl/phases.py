"""The phase slot: what happens to a policy after an epoch over its batch."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from steersman.rl.surrogates import Surrogate


class Running(NamedTuple):
    """Where learning from a batch stands.

    Attributes:
        learned: the trainable parameters.
        optimizer: state of the optimizer.
        surrogate: state of the surrogate.
        reference: state of the reference policy.
        phase: what the phase itself carries over the epochs of one batch.
    """

    learned: PyTree
    optimizer: PyTree
    surrogate: PyTree
    reference: PyTree
    phase: PyTree


class PhaseTools(NamedTuple):
    """What a phase works with.

    Attributes:
        rows: the whole batch.
        old: the trainable parameters that it was collected with.
        surrogate: the policy loss.
        samples: from trainable parameters and rows to the arguments of the surrogate, against the behaviour policy
            (:class:`~steersman.rl.on_policy.actor_critic.Samples`).
        step: from gradient, optimizer state and parameters to ``(parameters, optimizer state)``.
    """

    rows: Any
    old: PyTree
    surrogate: Surrogate
    samples: Callable[[PyTree, Any], Any]
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class Phase(eqx.Module):
    """Runs after the epochs over a batch."""

    #: Whether it runs after every epoch, or after the last one only.
    every_epoch: bool = eqx.field(static=True, default=True)

    @abc.abstractmethod
    def init(self) -> PyTree:
        """What the phase carries over the epochs of one batch (counters), before the first."""

    @abc.abstractmethod
    def __call__(self, running: Running, tools: PhaseTools) -> Running:
        """Where learning stands afterwards."""

    @abc.abstractmethod
    def metrics(self, state: PyTree) -> dict[str, Float[Array, ""]]:
        """What is worth watching of a finished batch."""
