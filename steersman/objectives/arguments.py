"""What is refused at the front of every objective.

Shapes are known while tracing, so they are always checked. Values are looked at only where they are Python or NumPy
numbers: reading an array would wait for the device, and cannot be done while tracing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import is_jax_array, is_torch_array

from steersman.errors import InputError, InputTypeError, require


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def require_fits(argument: str, value: Any, other: str, like: Any) -> None:
    """Checks that `value` has as many axes as `like`, each of the same length or of length 1.

    Broadcasting over *missing* axes is refused: ``[B]`` against ``[B, 1]`` would give ``[B, B]`` without a word.
    """
    own, shape = _shape(value), _shape(like)
    if len(own) != len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
        raise InputError(
            f"{argument} has shape {own}, but it must have {other}'s shape {shape}, or length 1 along axes where it "
            "is constant."
        )


def require_same_shape(argument: str, value: Any, other: str, like: Any) -> None:
    """Checks that `value` has exactly the shape of `like`."""
    own, shape = _shape(value), _shape(like)
    if own != shape:
        raise InputError(f"{argument} has shape {own}, but it must have {other}'s shape {shape}.")


def as_parameter(
    argument: str, value: Any, other: str, like: Any, *, above: float = 0.0, or_equal: bool = False
) -> Any:
    """A parameter of a loss: a number above `above` (infinity allowed), or an array of them that fits `like`.

    Returns:
        A Python float for a number, so that it takes on the dtype of the arrays it meets; an array as it is.
    """
    allowed = f"at least {above:g}" if or_equal else f"above {above:g}"
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "ndim")):
        raise InputTypeError(f"{argument} is {value!r}, but it must be a number {allowed}, or an array of them.")
    if isinstance(value, (int, float, np.number, np.ndarray)):
        good = value >= above if or_equal else value > above
        require(bool(np.all(good)), argument, value, allowed)
        if not isinstance(value, np.ndarray):
            return float(value)
    if value.ndim > 0:
        require_fits(argument, value, other, like)
    return value


def constant(array: Any) -> Any:
    """`array` as a constant to differentiation, which the array API has no word for."""
    if is_torch_array(array):
        return array.detach()
    if is_jax_array(array):
        import jax

        return jax.lax.stop_gradient(array)
    return array
