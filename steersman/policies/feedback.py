"""Linear state feedback."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputError, require
from steersman.policies.policy import Policy


def _floating(value: Any) -> Array:
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.result_type(float))


class LinearFeedback(Policy):
    """``u = feedforward - gain (x - setpoint)``, clipped to a box where one is given.

    Attributes:
        gain: the matrix ``K`` ``[m, n]``, in units of action per unit of observation.
        setpoint: the observation to hold ``[n]``.
        feedforward: the action that holds it ``[m]``.
        low: lower bound of the action ``[m]``, or None.
        high: upper bound of the action ``[m]``, or None.
    """

    gain: Float[Array, "m n"]
    setpoint: Float[Array, " n"]
    feedforward: Float[Array, " m"]
    low: Float[Array, " m"] | None
    high: Float[Array, " m"] | None

    def __init__(self, gain: Any, setpoint: Any = None, feedforward: Any = None, low: Any = None, high: Any = None):
        """Takes anything that becomes an array; a scalar stands for all elements.

        Args:
            gain: ``K`` ``[m, n]``.
            setpoint: ``[n]``; zero unless given.
            feedforward: ``[m]``; zero unless given.
            low: ``[m]``; no lower bound unless given.
            high: ``[m]``; no upper bound unless given.

        Raises:
            InputError: shapes do not fit, or a bound lies on the wrong side of the other.
        """
        self.gain = _floating(gain)
        require(self.gain.ndim == 2, "gain", self.gain.shape, "a matrix of shape [m, n]")
        m, n = self.gain.shape
        self.setpoint = self._vector("setpoint", 0.0 if setpoint is None else setpoint, n)
        self.feedforward = self._vector("feedforward", 0.0 if feedforward is None else feedforward, m)
        self.low = None if low is None else self._vector("low", low, m)
        self.high = None if high is None else self._vector("high", high, m)
        bounds = (self.low, self.high)
        if not any(bound is None or isinstance(bound, Tracer) for bound in bounds):
            shown = (self.low.tolist(), self.high.tolist())  # pyright: ignore[reportOptionalMemberAccess]
            require(bool(jnp.all(self.low <= self.high)), "low and high", shown, "low <= high")  # pyright: ignore[reportOperatorIssue]

    def _vector(self, argument: str, value: Any, size: int) -> Array:
        array = jnp.asarray(value, self.gain.dtype)
        if array.shape not in ((), (size,)):
            raise InputError(f"{argument} has shape {array.shape}, but the gain {self.gain.shape} asks for ({size},).")
        return jnp.broadcast_to(array, (size,))

    def __call__(
        self, observation: Float[Array, " n"], carry: PyTree, key: Key[Array, ""]
    ) -> tuple[Float[Array, " m"], PyTree]:
        del key
        action = self.feedforward - self.gain @ (observation - self.setpoint)
        if self.low is not None:
            action = jnp.maximum(action, self.low)
        if self.high is not None:
            action = jnp.minimum(action, self.high)
        return action, carry
