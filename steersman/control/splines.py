"""Controls as curves through a few knots, so that a search has fewer numbers to find and plans are smooth."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steersman.errors import require, require_count, unknown_name

KINDS = ("zero", "linear", "cubic")


class Spline(eqx.Module):
    """A plan of ``H`` controls as a linear function of ``K`` knots, evenly spaced from the first control to the last.

    Attributes:
        horizon: number of controls ``H``.
        knots: number of knots ``K``; as many as controls where None, and then the knots are the controls.
        kind: ``"zero"`` holds each knot until the next, ``"linear"`` joins them, ``"cubic"`` is the natural spline.
    """

    horizon: int = eqx.field(static=True)
    knots: int | None = eqx.field(static=True, default=None)
    kind: str = eqx.field(static=True, default="linear")

    def __check_init__(self) -> None:
        require_count("horizon", self.horizon)
        if self.knots is not None:
            require_count("knots", self.knots)
            require(self.knots <= self.horizon, "knots", self.knots, f"at most horizon, {self.horizon}")
        if self.kind not in KINDS:
            raise unknown_name("kind", self.kind, KINDS)

    @property
    def size(self) -> int:
        """Number of knots ``K``."""
        return self.horizon if self.knots is None else self.knots

    def _weights(self, times: np.ndarray) -> np.ndarray:
        """How much each knot counts at some times, ``[T, K]``; beyond the last knot it is held."""
        count = self.size
        if count == 1:
            return np.ones((len(times), 1))
        if self.kind == "zero":
            # Each knot is held for an equal share of the controls.
            index = np.minimum(times * count // self.horizon, count - 1).astype(int)
            return np.eye(count)[index]
        grid = np.linspace(0.0, self.horizon - 1.0, count)
        times = np.minimum(times, grid[-1])
        if self.kind == "linear":
            return np.stack([np.interp(times, grid, row) for row in np.eye(count)], axis=1)
        from scipy.interpolate import CubicSpline

        return CubicSpline(grid, np.eye(count), bc_type="natural")(times)

    @property
    def matrix(self) -> Float[np.ndarray, "H K"]:
        """Controls of knots."""
        return np.eye(self.horizon) if self.size == self.horizon else self._weights(np.arange(float(self.horizon)))

    def controls(self, knots: Float[Array, "*B K m"]) -> Float[Array, "*B H m"]:
        """The controls of some knots."""
        return knots if self.size == self.horizon else jnp.asarray(self.matrix, knots.dtype) @ knots

    def fit(self, controls: Float[Array, "*B H m"]) -> Float[Array, "*B K m"]:
        """The knots whose curve is nearest to some controls, in the least-squares sense."""
        if self.size == self.horizon:
            return controls
        return jnp.asarray(np.linalg.pinv(self.matrix), controls.dtype) @ controls

    def shift(self, knots: Float[Array, "*B K m"]) -> Float[Array, "*B K m"]:
        """The knots of the plan that is left one step later, its last control held."""
        count = self.size
        if count == self.horizon:
            return jnp.concatenate([knots[..., 1:, :], knots[..., -1:, :]], axis=-2)
        later = np.minimum(np.arange(self.horizon) + 1, self.horizon - 1)
        return jnp.asarray(np.linalg.pinv(self.matrix) @ self.matrix[later], knots.dtype) @ knots
