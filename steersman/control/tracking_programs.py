"""What programs with an artificial reference check: rows of bounds, and weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.errors import InputError, require, require_number


def check_rows(rows: tuple[Any, Any, Any, Any], n: int, m: int, sigma: float) -> tuple[np.ndarray, ...]:
    """Rows ``(E, F, low, high)`` of the right shapes, with room between the bounds."""
    E, F, low, high = (np.asarray(part, np.float64) for part in rows)
    require(E.ndim == 2 and E.shape[1] == n, "E's shape", E.shape, f"[c, {n}]")
    require(F.shape == (len(E), m), "F's shape", F.shape, f"({len(E)}, {m})")
    for name, bound in (("low", low), ("high", high)):
        require(bound.shape == (len(E),), f"{name}'s shape", bound.shape, f"({len(E)},)")
        require(not np.isnan(bound).any(), name, bound.tolist(), "free of NaN")
    if np.any(low >= high - 2.0 * sigma):
        raise InputError(f"low and high are {low.tolist()} and {high.tolist()}, but they must leave room of 2 sigma.")
    return E, F, low, high


def root(name: str, weight: Any, size: int, definite: bool) -> np.ndarray:
    """The symmetric root of a weight, or an error that names it."""
    weight = np.asarray(weight, np.float64)
    require(weight.shape == (size, size), f"{name}'s shape", weight.shape, f"({size}, {size})")
    require_number(name, weight)
    require(np.allclose(weight, weight.T), name, weight.tolist(), "symmetric")
    values, vectors = np.linalg.eigh(weight)
    good = values[0] > 0.0 if definite else values[0] >= -1e-9 * max(1.0, values[-1])
    require(good, name, weight.tolist(), f"positive {'definite' if definite else 'semidefinite'}")
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def one_weight(name: str, weight: Any) -> np.ndarray:
    """The one weight of sine and cosine, which may be given twice."""
    weight = np.asarray(weight, np.float64)
    if weight.ndim == 3:
        require(
            len(weight) == 2 and np.array_equal(weight[0], weight[1]), name, weight.tolist(), "equal for both parts"
        )
        return weight[0]
    return weight
