"""Entropies from logits, and divergence estimates from log-probabilities."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Bool, Float

from steersman.errors import InputError
from steersman.objectives.arguments import require_fits, require_same_shape

Array = Float[Any, "..."]


def entropy(logits: Float[Any, "... V"], allowed: Bool[Any, "..."] | None = None) -> Array:
    """Entropy in nats of the categorical distributions that `logits` define. A bonus: losses subtract it.

    Args:
        logits: ``[..., V]``, not normalized. Minus infinity rules a choice out.
        allowed: choices that are not ruled out, of `logits`' shape or of length 1 along axes where it is constant.

    Returns:
        ``[...]``. Zero, with zero gradient, where no choice is left (a padded row).

    Raises:
        InputError: there is no last axis of choices, or the mask does not fit.
    """
    _require_choices(logits)
    xp = array_namespace(logits)
    possible = logits > -math.inf
    # A NaN is not above anything: it stays in, so that it shows.
    possible = possible | xp.isnan(logits)
    if allowed is not None:
        require_fits("allowed", allowed, "logits", logits)
        possible = possible & allowed
    # What is ruled out is replaced before every function whose gradient it would spoil.
    highest = xp.max(xp.where(possible, logits, -math.inf), axis=-1, keepdims=True)
    highest = xp.where(highest == -math.inf, 0.0, highest)
    shifted = xp.where(possible, logits, highest) - highest
    weight = xp.where(possible, xp.exp(shifted), 0.0)
    total = xp.sum(weight, axis=-1)
    total = xp.where(total == 0.0, 1.0, total)
    return xp.log(total) - xp.sum(weight * shifted, axis=-1) / total


def clamped_entropy(logits: Float[Any, "... V"], share: float) -> Array:
    """Entropy of the likely part of a large vocabulary (AEnt; Shen, 2025, arXiv 2509.03493).

    The ``floor(share V)`` choices with the smallest logits are removed (of equal ones, those that come first), the
    rest is renormalized. Which choices are removed has no gradient.

    Args:
        logits: ``[..., V]``, not normalized.
        share: of the vocabulary that is removed, at least 0 and below 1.

    Returns:
        ``[...]``, at most ``log(V - floor(share V))``.

    Raises:
        InputError: there is no last axis of choices, or `share` is out of range.
    """
    _require_choices(logits)
    if not 0.0 <= share < 1.0:
        raise InputError(f"share is {share!r}, but it must be at least 0 and below 1.")
    removed = math.floor(share * logits.shape[-1])
    if removed == 0:
        return entropy(logits)
    xp = array_namespace(logits)
    smallest_kept = xp.sort(logits, axis=-1)[..., removed : removed + 1]
    below = logits < smallest_kept
    tied = logits == smallest_kept
    ties_to_remove = removed - xp.sum(xp.astype(below, xp.int32), axis=-1, keepdims=True)
    first_ties = xp.cumulative_sum(xp.astype(tied, xp.int32), axis=-1) <= ties_to_remove
    return entropy(logits, ~(below | (tied & first_ties)))


def k1_kl(log_prob: Array, reference_log_prob: Array) -> Array:
    """``log p - log q`` at samples of ``p``: unbiased for ``KL(p || q)``, of either sign.

    Its gradient is the score ``grad log p``, which is zero in expectation: put it into rewards, not into losses.

    Args:
        log_prob: log-probability under ``p``, the policy that drew the samples.
        reference_log_prob: log-probability under ``q``, of the same shape.

    Raises:
        InputError: the shapes differ.
    """
    require_same_shape("reference_log_prob", reference_log_prob, "log_prob", log_prob)
    return log_prob - reference_log_prob


def k2_kl(log_prob: Array, reference_log_prob: Array) -> Array:
    """``(log p - log q)^2 / 2`` at samples of ``p``: never negative, biased, and its gradient is unbiased.

    Arguments and errors as in :func:`k1_kl`. The estimators' names are those of Schulman, "Approximating KL
    Divergence" (2020).
    """
    return 0.5 * k1_kl(log_prob, reference_log_prob) ** 2


def k3_kl(log_prob: Array, reference_log_prob: Array) -> Array:
    """``q / p - 1 - log(q / p)`` at samples of ``p``: unbiased for ``KL(p || q)`` and never negative.

    Arguments and errors as in :func:`k1_kl`. It is what GRPO adds to its loss (Shao et al., 2024, arXiv 2402.03300,
    eq. 4); there the gradient is, in expectation, that of ``KL(q || p)``.
    """
    log_ratio = -k1_kl(log_prob, reference_log_prob)
    return array_namespace(log_ratio).expm1(log_ratio) - log_ratio


def _require_choices(logits: Any) -> None:
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise InputError(f"logits has shape {tuple(logits.shape)}, but it must have a last axis of choices.")
