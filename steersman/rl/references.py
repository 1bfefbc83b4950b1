"""The reference slot: which policy an update is held close to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from steersman.policies import Head


class Reference(eqx.Module):
    """The policy that surrogates compare the new one with: here the behaviour policy, which collected the batch.

    Any other reference relabels a batch: with its own likelihoods and distribution parameters in place of the
    behaviour policy's, and advantages multiplied by the importance weight between the two. Every surrogate then
    works unchanged, as ``pi_reference / pi_behaviour * f(pi / pi_reference, A)``.
    """

    def init(self, learned: PyTree) -> PyTree:
        """The reference's own state, given the first trainable parameters."""
        del learned
        return ()

    def begin(self, state: PyTree, learned: PyTree) -> PyTree:
        """The state when a batch is about to be learned from."""
        del learned
        return state

    def track(self, state: PyTree, learned: PyTree) -> PyTree:
        """The state after one gradient step, given the parameters that it reached."""
        del learned
        return state

    def relabel(
        self, state: PyTree, rows: Any, learned: PyTree, parameters_of: Callable[[PyTree], PyTree], head: Head
    ) -> Any:
        """A minibatch as a surrogate should see it.

        Args:
            state: the reference's state.
            rows: the minibatch, with ``action``, ``log_prob``, ``parameters`` and ``advantage`` of each row.
            learned: the present trainable parameters.
            parameters_of: from trainable parameters to the distribution parameters at the rows.
            head: the family of distributions.
        """
        del state, learned, parameters_of, head
        return rows
