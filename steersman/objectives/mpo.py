"""Weights by exponentiated advantages, and the temperature that makes them: the E-step of V-MPO.

Song et al., "V-MPO: On-Policy Maximum a Posteriori Policy Optimization for Discrete and Continuous Control", ICLR
2020 (arXiv 1909.12238), section 4.1. The M-step is :func:`~steersman.objectives.policy_gradient` with these weights in
the advantage's place, under a bound on the divergence.
"""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Bool, Float

from steersman.errors import InputError
from steersman.objectives.arguments import as_parameter, require_same_shape

Array = Float[Any, "..."]
Number = Float[Any, ""] | float


def top_half(advantage: Array) -> Bool[Any, "..."]:
    """Where advantages are at or above their median, over all elements.

    At least half of them, and at least one; all where all are equal. A NaN is kept, so that it shows.

    Args:
        advantage: of any shape, with at least one element.

    Raises:
        InputError: there are no elements.
    """
    xp = array_namespace(advantage)
    count = math.prod(advantage.shape)
    if count == 0:
        raise InputError(f"advantage has shape {tuple(advantage.shape)}, but half of it must be at least one element.")
    middle = xp.sort(xp.reshape(advantage, (-1,)))[count // 2]
    return xp.logical_not(advantage < middle)


def temperature_weights(advantage: Array, temperature: Number, included: Bool[Any, "..."] | None = None) -> Array:
    """``psi = exp(A / temperature)``, normalized to sum to one over all elements that count.

    The distribution over samples with the largest mean advantage within a divergence of the uniform one, whose radius
    the temperature stands for (:func:`temperature_loss`). A high temperature gives equal weights, a low one all weight
    to the best sample. Advantages of any size are safe: the largest is taken off before exponentiating.

    Args:
        advantage: of any shape.
        temperature: above 0.
        included: what counts, of `advantage`'s shape; everything where not given.

    Returns:
        Weights of `advantage`'s shape, zero for what does not count. In a loss they are constants: cut their gradient.

    Raises:
        InputError: the shapes differ, or a `temperature` that is a number is not above 0.
    """
    power, _, _ = _powers(advantage, temperature, included)
    xp = array_namespace(power)
    total = xp.sum(power)
    return power / xp.where(total > 0, total, 1.0)


def temperature_loss(
    advantage: Array, temperature: Number, epsilon: Number, included: Bool[Any, "..."] | None = None
) -> Float[Any, ""]:
    """``eta epsilon + eta log mean exp(A / eta)``, the dual of the weights' problem, with ``eta`` the temperature.

    Convex in the temperature; its derivative is ``epsilon - KL(psi || uniform)``, so that at its minimum the weights'
    divergence is `epsilon` (or the temperature goes to zero, where all weight on the best sample is within reach).

    Args:
        advantage: of any shape.
        temperature: above 0; the only argument that the loss is meant to be differentiated in.
        epsilon: the divergence that the weights are allowed, in nats, above 0.
        included: what counts, of `advantage`'s shape; everything where not given.

    Raises:
        InputError: the shapes differ, or a number is not above 0.
    """
    eta = as_parameter("temperature", temperature, "temperature", temperature)
    bound = as_parameter("epsilon", epsilon, "epsilon", epsilon)
    power, best, count = _powers(advantage, eta, included)
    xp = array_namespace(power)
    average = xp.sum(power) / xp.where(count > 0, count, 1.0)
    return eta * bound + best + eta * xp.log(xp.where(average > 0, average, 1.0))


def _powers(advantage: Any, temperature: Any, included: Any) -> tuple[Any, Any, Any]:
    """``exp((A - max A) / temperature)`` of what counts, ``max A``, and how many count."""
    eta = as_parameter("temperature", temperature, "temperature", temperature)
    xp = array_namespace(advantage)
    if included is None:
        included = xp.ones_like(advantage) > 0
    require_same_shape("included", included, "advantage", advantage)
    counts = xp.astype(included, advantage.dtype)
    count = xp.sum(counts)
    best = xp.max(xp.where(included, advantage, -math.inf))
    best = xp.where(count > 0, best, 0.0)
    # What does not count may hold anything, so it is replaced before the exponential and not only after.
    distance = xp.where(included, advantage - best, 0.0)
    return xp.where(included, xp.exp(distance / eta), 0.0), best, count
