"""What to watch while a policy trains. Each is one number; a mask leaves elements out."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Float, Shaped

from steersman.objectives.aggregation import mean
from steersman.objectives.arguments import require_same_shape
from steersman.objectives.surrogates import log_clip_interval

Array = Float[Any, "..."]
Mask = Shaped[Any, "..."]


def approximate_kl(log_ratio: Array, mask: Mask | None = None) -> Float[Any, ""]:
    """Mean of ``(r - 1) - log r``, which estimates ``KL(old || new)`` from the old policy's samples; never negative.

    Args:
        log_ratio: new minus old log-probability, of any shape.
        mask: what counts, of the same shape.
    """
    return mean(array_namespace(log_ratio).expm1(log_ratio) - log_ratio, mask)


def ratio_deviation(log_ratio: Array, mask: Mask | None = None) -> Float[Any, ""]:
    """Mean of ``|r - 1|``, which estimates twice the total variation between the old policy and the new.

    Args:
        log_ratio: new minus old log-probability, of any shape.
        mask: what counts, of the same shape.
    """
    xp = array_namespace(log_ratio)
    return mean(xp.abs(xp.expm1(log_ratio)), mask)


def clip_fraction(
    log_ratio: Array,
    clip_low: Array | float,
    clip_high: Array | float | None = None,
    mask: Mask | None = None,
) -> Float[Any, ""]:
    """Share of ratios outside ``[1 - clip_low, 1 + clip_high]``, whichever sign their advantage has.

    Args:
        log_ratio: new minus old log-probability, of any shape.
        clip_low: above 0, a number or an array that fits `log_ratio`.
        clip_high: likewise; `clip_low` where not given.
        mask: what counts, of `log_ratio`'s shape.
    """
    floor, ceiling = log_clip_interval(clip_low, clip_high, log_ratio)
    outside = (log_ratio < floor) | (log_ratio > ceiling)
    return mean(array_namespace(log_ratio).astype(outside, log_ratio.dtype), mask)


def explained_variance(value: Array, target: Array, mask: Mask | None = None) -> Float[Any, ""]:
    """``1 - Var(target - value) / Var(target)``: 1 for a perfect critic, 0 for a constant one, negative for worse.

    Where the targets do not vary there is nothing to explain: 1 if the errors do not vary either, 0 otherwise.

    Args:
        value: what the critic says, of any shape.
        target: what it should say, of the same shape.
        mask: what counts, of the same shape.

    Raises:
        InputError: the shapes differ.
    """
    require_same_shape("target", target, "value", value)
    xp = array_namespace(value)

    def variance(x: Any) -> Any:
        return mean((x - mean(x, mask)) ** 2, mask)

    unexplained, total = variance(target - value), variance(target)
    varies = total > 0
    share = 1.0 - unexplained / xp.where(varies, total, 1.0)
    return xp.where(varies, share, xp.astype(unexplained == 0, value.dtype))
