"""Coefficients that adapt between updates."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float

from steersman.errors import require

Array = Float[Any, "..."]


def adaptive_kl(
    beta: Array | float,
    kl: Array | float,
    target: Array | float,
    factor: Array | float = 1.5,
    multiplier: Array | float = 2.0,
) -> Array:
    """The weight of a divergence penalty for the next update (Schulman et al., 2017, arXiv 1707.06347, section 4).

    Divided by `multiplier` where ``kl < target / factor``, multiplied by it where ``kl > factor target``, unchanged
    in between and on the borders.

    Args:
        beta: the weight that was used; any shape, one weight per agent, say.
        kl: the mean divergence in nats that the update came to, of the same shape or a scalar.
        target: the divergence that is aimed at, above 0.
        factor: half-width of the dead band as a ratio, at least 1.
        multiplier: above 1.

    Returns:
        The next weight.

    Raises:
        InputError: a number is out of range.
    """
    for argument, value, ok, allowed in (
        ("beta", beta, lambda v: v > 0, "above 0"),
        ("target", target, lambda v: v > 0, "above 0"),
        ("factor", factor, lambda v: v >= 1, "at least 1"),
        ("multiplier", multiplier, lambda v: v > 1, "above 1"),
    ):
        if isinstance(value, (int, float, np.number)):
            require(bool(ok(value)), argument, value, allowed)
    arrays = [a for a in (kl, beta, target, factor, multiplier) if not isinstance(a, (int, float, np.number))]
    xp: Any = array_namespace(arrays[0]) if arrays else np
    # Numbers become arrays here, because where() of numbers alone would not take on the arrays' dtype.
    reached: Any = xp.asarray(kl)
    weight: Any = xp.asarray(beta, dtype=reached.dtype) if isinstance(beta, (int, float, np.number)) else beta
    larger = xp.where(reached > factor * target, weight * multiplier, weight)
    return xp.where(reached < target / factor, weight / multiplier, larger)
