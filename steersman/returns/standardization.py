"""Advantages brought to zero mean and unit standard deviation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from steersman.errors import require_number
from steersman.returns.time_major import align


def standardize(
    x: Shaped[Array, "..."],
    mask: Shaped[Array, "..."] | None = None,
    epsilon: float = 1e-8,
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """Shifts `x` to zero mean and scales it to unit (population) standard deviation.

    Where the deviation is zero, `x` is only centred. It counts as zero when it is at most `epsilon`, or at most eight
    machine epsilons of the largest magnitude, which is what rounding leaves of a constant: dividing by such a number
    would turn noise into advantages of order one. Nothing is added to the deviation otherwise, so the scale is exact.

    Args:
        x: of any shape.
        mask: true (or nonzero) where an entry counts; its axes are the leading axes of `x`. Entries that do not count
            come out as zero, and may hold anything.
        epsilon: the deviation that counts as zero, in `x`'s unit.
        axis: axes over which moments are taken; all of them where not given. ``axis=(0, 1)`` treats the columns of
            ``[T, N, K]`` apart.

    Raises:
        InputError: the mask does not line up with `x`, or `epsilon` is negative.
    """
    require_number("epsilon", epsilon, at_least=0.0)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(float)
    if mask is None:
        included = jnp.ones(x.shape, bool)
    else:
        included = jnp.broadcast_to(jnp.asarray(align("mask", mask, "x", x.shape), bool), x.shape)
    count = jnp.maximum(jnp.sum(included, axis=axis, keepdims=True), 1).astype(x.dtype)
    x = jnp.where(included, x, 0.0)
    centred = jnp.where(included, x - jnp.sum(x, axis=axis, keepdims=True) / count, 0.0)
    variance = jnp.sum(centred**2, axis=axis, keepdims=True) / count
    magnitude = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    smallest = jnp.maximum(epsilon, 8 * float(jnp.finfo(x.dtype).eps) * magnitude)
    varies = variance > smallest**2
    # The square root is taken of a safe number in both branches, so that its gradient is finite in both.
    return centred / jnp.sqrt(jnp.where(varies, variance, 1.0))
