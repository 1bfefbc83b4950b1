"""Surrogate losses of policy optimization: ``surrogate(log_ratio, advantage, ...) -> loss per element``.

``log_ratio`` is the log-probability under the policy that is being trained minus that under the policy that the data
came from, of an action, a token or a whole sequence; the ratio ``r`` is its exponential. Every loss is to be
*minimized*, has `log_ratio`'s shape, and is aggregated elsewhere (:func:`~steersman.objectives.aggregate`). What a
method adds beyond the two arrays is bound with ``functools.partial``, which leaves the slot that algorithms take,
:class:`Surrogate`.

No gradient is stopped unless a loss says so: advantages are to be constants. Nor is anything clamped: a log-ratio that
is not finite (often an action outside the policy's support) makes the loss so, and training stops there.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float

from steersman.errors import require
from steersman.objectives.arguments import as_parameter, constant, require_fits, require_same_shape

Array = Float[Any, "..."]


class Surrogate(Protocol):
    """What an algorithm takes in its surrogate slot."""

    def __call__(self, log_ratio: Array, advantage: Array, /) -> Array:
        """Losses per element, to be minimized."""
        ...


def policy_gradient(log_prob: Array, advantage: Array) -> Array:
    """``-log_prob A``, whose gradient is the policy gradient (REINFORCE, A2C); for data of the current policy.

    Args:
        log_prob: log-probability of what was done.
        advantage: of `log_prob`'s shape, or of length 1 along axes where it is constant.

    Raises:
        InputError: the shapes do not fit.
    """
    require_fits("advantage", advantage, "log_prob", log_prob)
    return -log_prob * advantage


def unclipped(log_ratio: Array, advantage: Array) -> Array:
    """``-r A``: importance weighting alone, with nothing that keeps the policy near the data.

    Args:
        log_ratio: of any shape.
        advantage: of `log_ratio`'s shape, or of length 1 along axes where it is constant.

    Raises:
        InputError: the shapes do not fit.
    """
    require_fits("advantage", advantage, "log_ratio", log_ratio)
    return -array_namespace(log_ratio).exp(log_ratio) * advantage


def log_clip_interval(
    clip_low: Any, clip_high: Any, like: Array, argument: str = "clip_low", other: str = "log_ratio"
) -> tuple[Any, Any]:
    """Logarithms of ``1 - clip_low`` (minus infinity from ``clip_low = 1``) and ``1 + clip_high``."""
    low = as_parameter(argument, clip_low, other, like)
    high = low if clip_high is None else as_parameter("clip_high", clip_high, other, like)
    if isinstance(low, float):
        floor: Any = math.log1p(-low) if low < 1.0 else -math.inf
    else:
        xp = array_namespace(low)
        floor = xp.where(low < 1.0, xp.log1p(-xp.where(low < 1.0, low, 0.0)), -math.inf)
    ceiling: Any = math.log1p(high) if isinstance(high, float) else array_namespace(high).log1p(high)
    return floor, ceiling


def _clipped_log_ratio(log_ratio: Array, advantage: Array, floor: Any, ceiling: Any) -> Array:
    # Selections on the log-ratio rather than a minimum over products: exp never overflows where it is clipped (its
    # gradient would be 0 * inf there), and at a tie the gradient is one-sided in every array library.
    xp = array_namespace(log_ratio)
    raised = xp.where(log_ratio < floor, floor, log_ratio)
    lowered = xp.where(log_ratio > ceiling, ceiling, log_ratio)
    return xp.where(advantage < 0, raised, lowered)


def clipped(
    log_ratio: Array, advantage: Array, clip_low: Array | float, clip_high: Array | float | None = None
) -> Array:
    """PPO's ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (Schulman et al., 2017, arXiv 1707.06347, eq. 7).

    The gradient is zero exactly where ``A > 0`` and ``r > 1 + clip_high``, or ``A < 0`` and ``r < 1 - clip_low``;
    elsewhere it is that of :func:`unclipped`. The ratio itself is not bounded.

    Args:
        log_ratio: of any shape.
        advantage: of `log_ratio`'s shape, or of length 1 along axes where it is constant.
        clip_low: above 0; from 1 on there is no lower clip. A number, or an array that fits `log_ratio` (one clip per
            token, say).
        clip_high: above 0, infinity for no upper clip; `clip_low` where not given.

    Raises:
        InputError: the shapes do not fit, or a clip that is a number is not above 0.
    """
    require_fits("advantage", advantage, "log_ratio", log_ratio)
    floor, ceiling = log_clip_interval(clip_low, clip_high, log_ratio)
    return -array_namespace(log_ratio).exp(_clipped_log_ratio(log_ratio, advantage, floor, ceiling)) * advantage


def dual_clipped(
    log_ratio: Array,
    advantage: Array,
    clip_low: Array | float,
    clip_high: Array | float | None = None,
    dual_clip: Array | float = 3.0,
) -> Array:
    """PPO's clip with a second bound for negative advantages (Ye et al., 2020, arXiv 1912.09729, eq. 5).

    Where ``A < 0`` the loss is at most ``-dual_clip A``: a ratio that has exploded, as on stale data, neither
    dominates the batch nor has a gradient.

    Args:
        log_ratio: of any shape.
        advantage: of `log_ratio`'s shape, or of length 1 along axes where it is constant.
        clip_low: as in :func:`clipped`.
        clip_high: as in :func:`clipped`.
        dual_clip: above 1, a number or an array that fits `log_ratio`.

    Raises:
        InputError: the shapes do not fit, or a parameter that is a number is out of range.
    """
    require_fits("advantage", advantage, "log_ratio", log_ratio)
    floor, ceiling = log_clip_interval(clip_low, clip_high, log_ratio)
    dual = as_parameter("dual_clip", dual_clip, "log_ratio", log_ratio, above=1.0)
    top: Any = math.log(dual) if isinstance(dual, float) else array_namespace(dual).log(dual)
    xp = array_namespace(log_ratio)
    bounded = _clipped_log_ratio(log_ratio, advantage, floor, ceiling)
    bounded = xp.where((advantage < 0) & (bounded > top), top, bounded)
    return -xp.exp(bounded) * advantage


def decoupled_clipped(
    log_prob: Array,
    behaviour_log_prob: Array,
    proximal_log_prob: Array,
    advantage: Array,
    epsilon: Array | float,
    max_ratio: Array | float = math.inf,
) -> Array:
    """PPO's clip around one policy, importance weights from another (Hilton et al., 2022, arXiv 2110.00641).

    ``-min(r A, clip(p, 1 - epsilon, 1 + epsilon) (r / p) A)`` with the importance weight ``r = pi / pi_behaviour`` and
    the distance from the *proximal* policy ``p = pi / pi_proximal``. Data may be older than the policy that a step is
    measured from. Where the two are one policy this is :func:`clipped`.

    It needs three log-probabilities, so it is not for the slot; there, clip the ratio to the proximal policy and
    multiply the advantage by ``pi_proximal / pi_behaviour``, which is the same.

    Args:
        log_prob: under the policy that is trained, of any shape.
        behaviour_log_prob: under the policy that the data came from, of the same shape. Minus infinity says that this
            policy could not have taken the action: the loss is not finite, whatever `max_ratio` is.
        proximal_log_prob: under the policy that the step is measured from, of the same shape; a constant.
        advantage: of `log_prob`'s shape, or of length 1 along axes where it is constant.
        epsilon: between 0 and 1, or infinity for no clip. A number, or an array that fits `log_prob`.
        max_ratio: bound on ``r``, above 0; the gradient is that of the bounded weight times ``log_prob``, as in
            V-trace, so a sample beyond it still counts.

    Raises:
        InputError: the shapes do not fit, or a parameter that is a number is out of range.
    """
    require_same_shape("behaviour_log_prob", behaviour_log_prob, "log_prob", log_prob)
    require_same_shape("proximal_log_prob", proximal_log_prob, "log_prob", log_prob)
    require_fits("advantage", advantage, "log_prob", log_prob)
    floor, ceiling = log_clip_interval(epsilon, None, log_prob, "epsilon", "log_prob")
    if isinstance(epsilon, (int, float, np.number, np.ndarray)):
        numbers = np.asarray(epsilon, np.float64)
        allowed = "above 0 and below 1, or infinity for no clip"
        require(np.all((numbers < 1) | (numbers == np.inf)), "epsilon", epsilon, allowed)
    bound = as_parameter("max_ratio", max_ratio, "log_prob", log_prob)
    xp = array_namespace(log_prob)
    behaviour = behaviour_log_prob
    if not (isinstance(bound, float) and math.isinf(bound)):
        top: Any = math.log(bound) if isinstance(bound, float) else xp.log(bound)
        nearest = constant(log_prob) - top
        behaviour = xp.where((behaviour < nearest) & xp.isfinite(behaviour), nearest, behaviour)
    step = _clipped_log_ratio(log_prob - proximal_log_prob, advantage, floor, ceiling)
    return -xp.exp(step + (proximal_log_prob - behaviour)) * advantage


def spo(log_ratio: Array, advantage: Array, epsilon: Array | float) -> Array:
    """Simple Policy Optimization: ``-(r A - |A| (r - 1)^2 / (2 epsilon))`` (Xie et al., 2025, arXiv 2401.16025).

    Convex in the ratio with its minimum at ``1 + sign(A) epsilon``: a sample that overshot is pulled back, where
    PPO's clip only lets go of it.

    Args:
        log_ratio: of any shape.
        advantage: of `log_ratio`'s shape, or of length 1 along axes where it is constant.
        epsilon: above 0, a number or an array that fits `log_ratio`; infinity gives :func:`unclipped`.

    Raises:
        InputError: the shapes do not fit, or an `epsilon` that is a number is not above 0.
    """
    require_fits("advantage", advantage, "log_ratio", log_ratio)
    width = as_parameter("epsilon", epsilon, "log_ratio", log_ratio)
    xp = array_namespace(log_ratio)
    deviation = xp.expm1(log_ratio)
    return xp.abs(advantage) * deviation**2 / (2.0 * width) - xp.exp(log_ratio) * advantage


def kl_penalized(log_ratio: Array, advantage: Array, kl: Array, beta: Array | float) -> Array:
    """``-r A + beta KL(old || new)`` (Schulman et al., 2017, arXiv 1707.06347, eq. 8).

    Args:
        log_ratio: of any shape.
        advantage: of `log_ratio`'s shape, or of length 1 along axes where it is constant.
        kl: divergence at each element's observation in nats, exact or estimated, with its gradient; fits `log_ratio`.
        beta: its weight, at least 0; see :func:`~steersman.objectives.adaptive_kl`.

    Raises:
        InputError: the shapes do not fit, or a `beta` that is a number is negative.
    """
    require_fits("kl", kl, "log_ratio", log_ratio)
    weight = as_parameter("beta", beta, "log_ratio", log_ratio, or_equal=True)
    return unclipped(log_ratio, advantage) + weight * kl
