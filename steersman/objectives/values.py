"""Errors of a critic, per element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Float

from steersman.errors import require
from steersman.objectives.arguments import as_parameter, require_same_shape

Array = Float[Any, "..."]


def squared_error(value: Array, target: Array) -> Array:
    """``(value - target)^2``, without the factor one half that some implementations carry.

    Args:
        value: what the critic says.
        target: what it should say, of the same shape.

    Raises:
        InputError: the shapes differ.
    """
    require_same_shape("target", target, "value", value)
    return (value - target) ** 2


def huber(value: Array, target: Array, delta: Array | float = 1.0) -> Array:
    """``e^2 / 2`` for errors up to `delta`, ``delta (|e| - delta / 2)`` beyond, so that no gradient exceeds `delta`.

    Args:
        value: what the critic says.
        target: what it should say, of the same shape.
        delta: above 0, in the values' unit; infinity gives half the squared error.

    Raises:
        InputError: the shapes differ, or a `delta` that is a number is not above 0.
    """
    require_same_shape("target", target, "value", value)
    delta = as_parameter("delta", delta, "value", value)
    xp = array_namespace(value)
    size = xp.abs(value - target)
    within = xp.where(size > delta, delta, size)
    # Equal to both cases: the square of the part within delta, and the rest at slope delta.
    return 0.5 * within**2 + xp.where(size > delta, delta, 0.0) * (size - within)


def expectile_error(value: Array, target: Array, expectile: Array | float) -> Array:
    """``|expectile - 1(target < value)| (target - value)^2``, whose mean is least at that expectile of the targets.

    At one half it is half the squared error, and towards one its minimum tends to the largest target: implicit
    Q-learning's way to a maximum over actions that the data has (Kostrikov, Nair and Levine, 2022, arXiv:2110.06169,
    equation 5).

    Args:
        value: what the critic says.
        target: what it should say, of the same shape.
        expectile: in (0, 1).

    Raises:
        InputError: the shapes differ, or an `expectile` that is a number is not in (0, 1).
    """
    require_same_shape("target", target, "value", value)
    expectile = as_parameter("expectile", expectile, "value", value)
    require(not isinstance(expectile, float) or expectile < 1.0, "expectile", expectile, "above 0 and below 1")
    xp = array_namespace(value)
    error = target - value
    # A choice between arrays: between two numbers, PyTorch would answer in single precision.
    return xp.where(error < 0, (1.0 - expectile) * error**2, expectile * error**2)


def clipped_value_error(
    value: Array,
    old_value: Array,
    target: Array,
    clip: Array | float,
    error: Callable[[Array, Array], Array] = squared_error,
) -> Array:
    """The larger of the errors of `value` and of `value` kept within `clip` of `old_value`.

    PPO's value clipping, as implementations have it (the paper does not): where the clipped error is the larger one,
    the value has left the interval and has no gradient.

    Args:
        value: what the critic says.
        old_value: what it said when the data were collected, of the same shape.
        target: what it should say, of the same shape.
        clip: above 0, in the values' unit.
        error: of a value and a target, per element; ``functools.partial(huber, delta=10.0)`` gives MAPPO's.

    Raises:
        InputError: the shapes differ, or a `clip` that is a number is not above 0.
    """
    require_same_shape("old_value", old_value, "value", value)
    clip = as_parameter("clip", clip, "value", value)
    xp = array_namespace(value)
    change = value - old_value
    # The value itself within the interval, not old_value + change: rounding would decide between two equal errors.
    kept_near = xp.where(change > clip, old_value + clip, xp.where(change < -clip, old_value - clip, value))
    plain, bounded = error(value, target), error(kept_near, target)
    return xp.where(bounded > plain, bounded, plain)
