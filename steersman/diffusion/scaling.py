"""Scalings between the units of a task and those that a network works in."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from steersman.errors import InputError, require, unknown_name

SCALINGS = ("min_max", "standard")


class Scaling(eqx.Module):
    """``normalized = (value - offset) / scale``, along the last axes.

    Attributes:
        offset: what becomes 0.
        scale: what becomes a distance of 1; never zero.
    """

    offset: Float[Array, "*D"]
    scale: Float[Array, "*D"]

    @classmethod
    def fit(cls, data: Any, kind: str = "min_max", *, name: str = "data") -> Scaling:
        """From data ``[N, ..., D]``, for each entry of the last axis.

        Args:
            data: all values.
            kind: ``"min_max"`` maps the range to [-1, 1], ``"standard"`` to mean 0 and variance 1.
            name: what errors call the data.

        Raises:
            InputError: the data is empty or not finite, or an entry never changes, so that it has no scale.
        """
        if kind not in SCALINGS:
            raise unknown_name("scaling", kind, SCALINGS)
        rows = np.asarray(data, np.float64)
        require(rows.size > 0 and rows.ndim >= 1, f"{name}.shape", rows.shape, "[N, ..., D] with something in it")
        rows = rows.reshape(-1, rows.shape[-1])
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=0))
        if bad.size:
            raise InputError(f"{name} has NaN or infinity in entries {bad.tolist()} of its last axis.")
        if kind == "min_max":
            low, high = rows.min(axis=0), rows.max(axis=0)
            offset, scale = 0.5 * (high + low), 0.5 * (high - low)
        else:
            offset, scale = rows.mean(axis=0), rows.std(axis=0)
        still = np.flatnonzero(scale <= 1e-8 * np.maximum(1.0, np.abs(offset)))
        if still.size:
            raise InputError(
                f"{name} never changes in entries {still.tolist()} of its last axis, so they have no scale: leave them "
                "out, or give a Scaling of your own."
            )
        return cls(jnp.asarray(offset, jnp.result_type(float)), jnp.asarray(scale, jnp.result_type(float)))

    @classmethod
    def identity(cls) -> Scaling:
        """Changes nothing."""
        return cls(jnp.zeros(()), jnp.ones(()))

    def normalize(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """From the task's units to the network's."""
        return (value - self.offset) / self.scale

    def restore(self, normalized: Float[Array, "..."]) -> Float[Array, "..."]:
        """From the network's units to the task's."""
        return normalized * self.scale + self.offset


def standard_scaling(observation: PyTree) -> PyTree:
    """Scalings to mean 0 and variance 1 of an array ``[N, ...]``, or of each entry of a dictionary; traceable.

    What never changes has no scale and is left at zero.
    """
    if isinstance(observation, dict):
        return {name: standard_scaling(part) for name, part in observation.items()}
    rows = jnp.asarray(observation, jnp.result_type(float))
    std = jnp.std(rows, axis=0)
    return Scaling(jnp.mean(rows, axis=0), jnp.where(std > 1e-6, std, 1.0))


def normalize_observation(scaling: PyTree, observation: PyTree) -> PyTree:
    """Applies one scaling to an array, or a dictionary of them to the entries of the same names.

    What has no scaling (None, or no entry of its name) passes unchanged.
    """
    if scaling is None:
        return observation
    if isinstance(scaling, Scaling):
        return scaling.normalize(observation)
    return {name: normalize_observation(scaling.get(name), part) for name, part in observation.items()}
