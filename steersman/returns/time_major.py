"""What the functions of this room share: how their arguments line up, and one backward recursion."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steersman.errors import InputError, require_number


def require_same_shape(argument: str, value: Any, other: str, shape: tuple[int, ...]) -> None:
    """Checks that `value` has exactly `shape`, which is that of the argument named `other`."""
    if np.shape(value) != shape:
        raise InputError(f"{argument} has shape {np.shape(value)}, but it must have {other}'s shape {shape}.")


def align(argument: str, value: Any, other: str, shape: tuple[int, ...]) -> Any:
    """Lines the axes of `value` up with the leading axes of `shape`, time first.

    NumPy lines up trailing axes, which would read an episode end ``[T, N]`` against a vector reward ``[T, N, K]`` as
    ``[N, K]``. Here the missing axes are the trailing ones. A scalar is returned as it is.
    """
    own = np.shape(value)
    if own == ():
        return value
    fits = len(own) <= len(shape) and all(a in (1, b) for a, b in zip(own, shape, strict=False))
    if not fits:
        raise InputError(
            f"{argument} has shape {own}, but its axes must be the leading axes of {other}'s shape {shape}, or of "
            "length 1."
        )
    return jnp.reshape(value, own + (1,) * (len(shape) - len(own)))


def require_rollout(reward: Any) -> tuple[int, ...]:
    """Checks that `reward` has a time axis; returns its shape."""
    shape = np.shape(reward)
    if len(shape) < 1 or shape[0] < 1:
        raise InputError(f"reward has shape {shape}, but it must have a time axis first, with at least one step.")
    return shape


def align_rows(argument: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Lines up with `reward` what must be known at every row."""
    if np.shape(value)[:1] != shape[:1]:
        raise InputError(
            f"{argument} has shape {np.shape(value)}, but its first axis must be time, as in reward's shape {shape}."
        )
    return align(argument, value, "reward", shape)


def align_ends(argument: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Lines up with `reward` the flags that say where episodes end."""
    return jnp.asarray(align_rows(argument, value, shape), bool)


def align_fraction(argument: str, value: Any, shape: tuple[int, ...]) -> Any:
    """Lines a discount or a trace parameter up with `reward`, and checks that it is within ``[0, 1]``."""
    require_number(argument, value, at_least=0.0, at_most=1.0)
    return align(argument, value, "reward", shape)


def _accumulate(following: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
    increment, decay = row
    total = increment + decay * following
    return total, total


def backward_sum(
    increment: Float[Array, "T ..."], decay: Float[Array, "..."], last: Float[Array, "..."] | None = None
) -> Float[Array, "T ..."]:
    """The recursion behind every return: ``x_t = increment_t + decay_t x_{t+1}``, from the last row backwards.

    A sequential scan, because on CPU it runs 1.5 to 6 times faster than an associative one and compiles in a fraction
    of the time.

    Args:
        increment: what each row adds ``[T, ...]``.
        decay: what each row keeps of the following one; its axes are the leading axes of `increment`. Zero where an
            episode ends.
        last: what follows the last row, of shape ``increment.shape[1:]``; zero where not given.

    Returns:
        ``x`` of `increment`'s shape.

    Raises:
        InputError: shapes do not line up.
    """
    increment = jnp.asarray(increment)
    if increment.ndim < 1:
        raise InputError("increment has shape (), but it must have a time axis first.")
    shape = increment.shape
    decay = align("decay", decay, "increment", shape)
    if last is None:
        last = jnp.zeros(shape[1:], increment.dtype)
    require_same_shape("last", last, "increment[0]", shape[1:])
    dtype = jnp.result_type(increment, decay, last)
    rows = (increment.astype(dtype), jnp.broadcast_to(jnp.asarray(decay, dtype), shape))
    return jax.lax.scan(_accumulate, jnp.asarray(last, dtype), rows, reverse=True)[1]
