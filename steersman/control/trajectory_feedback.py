"""Feedback around a trajectory, whose gains change from step to step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from steersman.errors import require
from steersman.policies import Policy


class TrajectoryFeedback(Policy):
    """``u_t = controls_t - gains_t (x - states_t)``; after the last step its control is held, without feedback.

    Its memory counts steps from the start of the trajectory.

    Attributes:
        controls: of the trajectory ``[H, m]``.
        states: of the trajectory before each step ``[H, n]``.
        gains: ``K_t`` ``[H, m, n]``, with the sign of :class:`~steersman.policies.LinearFeedback`.
    """

    controls: Float[Array, "H m"]
    states: Float[Array, "H n"]
    gains: Float[Array, "H m n"]

    def __init__(self, controls: Any, states: Any, gains: Any):
        """Takes anything that becomes an array; a state after the last step is left out.

        Args:
            controls: ``[H, m]``.
            states: ``[H, n]`` or ``[H + 1, n]``.
            gains: ``[H, m, n]``.

        Raises:
            InputError: shapes do not fit together.
        """
        self.controls, self.gains = jnp.asarray(controls), jnp.asarray(gains)
        require(self.controls.ndim == 2, "controls' shape", self.controls.shape, "[H, m]")
        steps, m = self.controls.shape
        good = self.gains.ndim == 3 and self.gains.shape[:2] == (steps, m)
        require(good, "gains' shape", self.gains.shape, f"[{steps}, {m}, n]")
        given, n = jnp.asarray(states), self.gains.shape[2]
        good = given.ndim == 2 and given.shape[0] in (steps, steps + 1) and given.shape[1] == n
        require(good, "states' shape", given.shape, f"[{steps}, {n}] or [{steps + 1}, {n}]")
        self.states = given[:steps]

    def init(self, key: Key[Array, ""]) -> Int[Array, ""]:
        del key
        return jnp.zeros((), jnp.int32)

    def __call__(
        self, observation: Float[Array, " n"], carry: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Float[Array, " m"], Int[Array, ""]]:
        del key
        last = self.controls.shape[0] - 1
        t = jnp.minimum(carry, last)
        correction = self.gains[t] @ (observation - self.states[t])
        return self.controls[t] - jnp.where(carry > last, 0.0, correction), carry + 1
