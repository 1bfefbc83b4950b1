"""From losses per element to one number.

A mask says which elements count; it is boolean, or 0 and 1. What it leaves out may hold anything, also NaN, without
reaching the result, but what *produced* those losses must be finite for gradients to be so. A mean over nothing is
zero, with zero gradient.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Float, Shaped

from steersman.errors import InputError, unknown_name
from steersman.objectives.arguments import as_parameter, require_fits, require_same_shape

Array = Float[Any, "..."]
Mask = Shaped[Any, "..."]

#: What :func:`aggregate` knows: a plain mean, and the loss types of TRL's GRPO trainer that differ in aggregation.
MODES = ("mean", "grpo", "bnpo", "dapo", "dr_grpo")


def _select(loss: Any, mask: Any) -> tuple[Any, Any]:
    """The losses with zeros where they do not count, and ones where they do."""
    xp = array_namespace(loss)
    if mask is None:
        return loss, xp.ones_like(loss)
    require_same_shape("mask", mask, "loss", loss)
    included = mask != 0
    return xp.where(included, loss, 0.0), xp.astype(included, loss.dtype)


def _require_tokens(loss: Any) -> None:
    if loss.ndim < 1:
        raise InputError("loss has shape (), but its last axis must be the tokens of a sequence.")


def _budget(budget: Any) -> Any:
    if getattr(budget, "ndim", 0) > 0:
        raise InputError(f"budget has shape {tuple(budget.shape)}, but it must be one number.")
    return as_parameter("budget", budget, "budget", budget)


def _over(total: Any, count: Any) -> Any:
    return total / array_namespace(count).where(count > 0, count, 1.0)


def mean(loss: Array, mask: Mask | None = None) -> Float[Any, ""]:
    """The mean over every element that counts.

    Args:
        loss: of any shape.
        mask: what counts, of `loss`'s shape; everything where not given.

    Raises:
        InputError: the shapes differ.
    """
    loss, included = _select(loss, mask)
    xp = array_namespace(loss)
    return _over(xp.sum(loss), xp.sum(included))


def token_mean(
    loss: Float[Any, "... T"], mask: Mask | None = None, budget: Float[Any, ""] | float | int | None = None
) -> Float[Any, ""]:
    """The mean over tokens, whichever sequence they are in, so that long sequences weigh more (DAPO, BNPO).

    Args:
        loss: ``[..., T]``, tokens last.
        mask: tokens that count, of `loss`'s shape.
        budget: what the sum is divided by instead of the number of tokens here; the number of tokens in a whole batch
            where `loss` is one part of it, so that the parts' results add up.

    Raises:
        InputError: the shapes differ, or a `budget` that is a number is not above 0.
    """
    _require_tokens(loss)
    if budget is None:
        return mean(loss, mask)
    loss, _ = _select(loss, mask)
    return array_namespace(loss).sum(loss) / _budget(budget)


def sequence_mean(loss: Float[Any, "... T"], mask: Mask | None = None) -> Float[Any, ""]:
    """The mean over sequences of each one's mean over tokens, so that sequences weigh the same (GRPO).

    A sequence without a token that counts has no mean, and is left out.

    Args:
        loss: ``[..., T]``, tokens last.
        mask: tokens that count, of `loss`'s shape.

    Raises:
        InputError: the shapes differ.
    """
    _require_tokens(loss)
    loss, included = _select(loss, mask)
    xp = array_namespace(loss)
    count = xp.sum(included, axis=-1)
    per_sequence = _over(xp.sum(loss, axis=-1), count)
    return _over(xp.sum(per_sequence), xp.sum(xp.astype(count > 0, loss.dtype)))


def sequence_sum_mean(
    loss: Float[Any, "... T"], mask: Mask | None = None, budget: Float[Any, ""] | float | int = 1.0
) -> Float[Any, ""]:
    """The mean over sequences of each one's sum over tokens, divided by a constant (Dr. GRPO).

    Neither divisor depends on the lengths, which is what keeps the gradient unbiased; so a sequence without a token
    that counts is one whose sum is zero.

    Args:
        loss: ``[..., T]``, tokens last.
        mask: tokens that count, of `loss`'s shape.
        budget: the constant, usually the longest length that generation allows (never the width of a padded batch).

    Raises:
        InputError: the shapes differ, or a `budget` that is a number is not above 0.
    """
    _require_tokens(loss)
    loss, _ = _select(loss, mask)
    xp = array_namespace(loss)
    sequences = 1
    for length in loss.shape[:-1]:
        sequences *= length
    return xp.sum(loss) / max(sequences, 1) / _budget(budget)


def aggregate(
    loss: Array,
    mask: Mask | None,
    mode: str,
    weights: Array | None = None,
    budget: Float[Any, ""] | float | int | None = None,
) -> Float[Any, ""]:
    """Aggregates losses in a way that is chosen by name.

    ==========  =================================================================================================
    mode        result
    ==========  =================================================================================================
    `mean`      :func:`mean` over all elements, for losses of any shape
    `grpo`      :func:`sequence_mean` (Shao et al., 2024, arXiv 2402.03300)
    `bnpo`      :func:`token_mean` over this batch
    `dapo`      :func:`token_mean`; `budget` counts the tokens of the whole batch (Yu et al., 2025, arXiv 2503.14476)
    `dr_grpo`   :func:`sequence_sum_mean`; `budget` is the constant (Liu et al., 2025, arXiv 2503.20783)
    ==========  =================================================================================================

    Args:
        loss: per element; ``[..., T]``, tokens last, except for `mean`.
        mask: what counts, of `loss`'s shape; None for everything.
        mode: one of the above.
        weights: what each loss is multiplied with, constants: one per sequence ``[...]``, or of `loss`'s shape, or of
            length 1 along its axes. They do not enter any divisor.
        budget: a divisor above 0, where the table says so.

    Raises:
        InputError: the mode is unknown, a budget is missing or has no meaning in this mode, or shapes do not fit.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    if mode == "dr_grpo" and budget is None:
        raise InputError("budget is None, but mode 'dr_grpo' divides by it: it must be a number above 0.")
    if mode not in ("dapo", "dr_grpo") and budget is not None:
        raise InputError(f"budget is {budget!r}, but it must be None in mode {mode!r}, which does not divide by it.")
    if weights is not None:
        xp = array_namespace(loss)
        if loss.ndim > 0 and tuple(weights.shape) == tuple(loss.shape[:-1]):
            weights = xp.expand_dims(weights, axis=-1)
        require_fits("weights", weights, "loss", loss)
        loss = loss * weights
    if mode == "mean":
        return mean(loss, mask)
    if mode == "grpo":
        return sequence_mean(loss, mask)
    if mode == "dr_grpo":
        return sequence_sum_mean(loss, mask, budget)
    return token_mean(loss, mask, budget)
