"""Policies of finite state sets: one row of a table for each state."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.errors import InputError, InputTypeError, require
from steersman.policies.heads import Categorical, Head
from steersman.policies.policy import Policy, StochasticPolicy


def _row(observation: Any, start: int) -> Int[Array, "..."]:
    state = jnp.asarray(observation)
    if not jnp.issubdtype(state.dtype, jnp.integer):
        raise InputTypeError(
            f"observation is {state.dtype} of shape {state.shape}, but a tabular policy reads the number of a state."
        )
    return state - start


class Tabular(Policy):
    """The action in the observed state's row.

    Attributes:
        table: one action for each of ``S`` states, ``[S]`` for discrete actions or ``[S, ...]``.
        start: the number of the first state.
    """

    table: Array = eqx.field(converter=jnp.asarray)
    start: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        require(self.table.ndim >= 1, "table", self.table, "an array with one row for each state")

    @classmethod
    def greedy(cls, values: Any, start: int = 0, first_action: int = 0) -> Tabular:
        """The action of the highest value in each state, the first of them where several are equal.

        Args:
            values: action values ``Q`` ``[S, A]``.
            start: the number of the first state.
            first_action: the number of the first action.
        """
        values = jnp.asarray(values)
        require(values.ndim == 2, "values", values.shape, "a table of shape [S, A]")
        return cls(jnp.argmax(values, axis=1) + first_action, start)

    def __call__(self, observation: Int[Array, ""], carry: PyTree, key: Key[Array, ""]) -> tuple[Array, PyTree]:
        del key
        return self.table[_row(observation, self.start)], carry


class TabularStochastic(StochasticPolicy):
    """Action probabilities in the observed state's row.

    Attributes:
        probabilities: ``pi(a | s)`` ``[S, A]``, rows sum to one.
        start: the number of the first state.
        head: categorical over the table's columns.
    """

    probabilities: Float[Array, "S A"]
    start: int = eqx.field(static=True)
    head: Head

    def __init__(self, probabilities: Any, start: int = 0, first_action: int = 0):
        """Checks that every row is a distribution.

        Args:
            probabilities: ``[S, A]``.
            start: the number of the first state.
            first_action: the number of the first action.

        Raises:
            InputError: the table has another shape, or a row is not a distribution.
        """
        table = jnp.asarray(probabilities)
        require(table.ndim == 2, "probabilities", table.shape, "a table of shape [S, A]")
        if not isinstance(table, Tracer):
            rows = np.asarray(table, np.float64)
            good = np.all(rows >= 0, axis=1) & (np.abs(rows.sum(axis=1) - 1.0) <= 1e-4)
            if not np.all(good):
                row = int(np.argmin(good))
                raise InputError(
                    f"probabilities has row {row} = {rows[row].tolist()}, but each row must be nonnegative and sum "
                    "to one."
                )
        self.probabilities = table
        self.start = start
        self.head = Categorical(table.shape[1], first_action)

    def parameters(self, observation: Int[Array, ""], carry: PyTree) -> tuple[Float[Array, " A"], PyTree]:
        """Log-probabilities of the state's row."""
        return jnp.log(self.probabilities[_row(observation, self.start)]), carry
