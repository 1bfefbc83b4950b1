"""GPOMDP: per-decision policy gradients of whole episodes (Baxter and Bartlett, 2001, arXiv:1106.0665).

Arrays are time-major, ``[T, N, ...]``: every column is one episode that starts with row 0, and ``mask`` (``[T, N]``,
all rows where None) says which rows belong to it. Discounting counts from the episode's start, so that what comes out
is the gradient of the discounted return that :func:`episode_return` estimates from the same episodes, and not of
something of another scale.

Nothing here knows a policy: log-probabilities, or a function from parameters to them, are all that is asked for. A
policy whose memory is recorded (its next memory is drawn like an action) gives the joint log-probabilities of actions
and memories; one whose memory is unrolled gives those of the unrolled policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from steersman.errors import require, require_number, unknown_name
from steersman.returns.time_major import align, align_rows, backward_sum, require_rollout, require_same_shape

#: What may be subtracted from the returns that scores are weighted with.
BASELINES = ("none", "mean", "leave-one-out", "optimal")


def discount_from_start(gamma: Float[Array, "..."] | float, steps: int) -> Float[Array, " T"]:
    """``gamma^t`` of each row."""
    require_number("gamma", gamma, at_least=0.0, at_most=1.0)
    require(np.shape(gamma) == (), "gamma's shape", np.shape(gamma), "(), one number for all steps")
    return jnp.power(jnp.asarray(gamma), jnp.arange(steps))


def _discounted(reward: Any, gamma: Any, mask: Any, weight: Any = None) -> Array:
    """``gamma^t weight_t reward_t``, zero outside the episode."""
    shape = require_rollout(reward)
    value = reward * align("discount", discount_from_start(gamma, shape[0]), "reward", shape)
    if weight is not None:
        value = value * align_rows("weight", weight, shape)
    return value if mask is None else jnp.where(align_rows("mask", mask, shape), value, 0.0)


def episode_return(
    reward: Float[Array, "T ..."], gamma: Float[Array, "..."] | float, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """``sum_t gamma^t r_t`` of each episode.

    Args:
        reward: ``[T, N, ...]``.
        gamma: discount in ``[0, 1]``.
        mask: which rows belong to the episode.

    Raises:
        InputError: shapes do not line up, or `gamma` is out of range.
    """
    return jnp.sum(_discounted(reward, gamma, mask), axis=0)


def reward_to_go(
    reward: Float[Array, "T ..."],
    gamma: Float[Array, "..."] | float,
    mask: Bool[Array, "..."] | None = None,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, "T ..."]:
    """``G_t = sum_{h >= t} gamma^h w_h r_h``, discounted from the episode's start and not from `t`.

    Args:
        reward: ``[T, N, ...]``, with trailing axes for several objectives.
        gamma: discount in ``[0, 1]``.
        mask: which rows belong to the episode.
        weight: per-decision weights (:func:`cumulative_weights`); one where None.

    Raises:
        InputError: shapes do not line up, or `gamma` is out of range.
    """
    return backward_sum(_discounted(reward, gamma, mask, weight), jnp.ones(()))


def cumulative_weights(log_ratio: Float[Array, "T N"], mask: Bool[Array, "..."] | None = None) -> Float[Array, "T N"]:
    """``w_t = prod_{j <= t} pi'(a_j | s_j) / pi(a_j | s_j)``: the weight of what is earned at each step.

    After its end an episode keeps its last weight.

    Args:
        log_ratio: log-probability under the policy of interest minus that under the one that acted.
        mask: which rows belong to the episode.
    """
    inside = log_ratio if mask is None else jnp.where(align_rows("mask", mask, log_ratio.shape), log_ratio, 0.0)
    return jnp.exp(jnp.cumsum(inside, axis=0))


def time_baseline(
    to_go: Float[Array, "T ..."], mask: Bool[Array, "..."] | None = None, *, leave_one_out: bool = False
) -> Float[Array, "T ..."]:
    """Mean of `to_go` over the episodes that run at each step.

    With an episode's own return in the mean, the expected gradient shrinks by ``1 - 1 / n`` where `n` episodes run.
    Left out, the gradient stays unbiased; where no other episode runs, that baseline is zero.

    Args:
        to_go: ``[T, N, ...]``, zero outside the episodes.
        mask: which rows belong to the episode.
        leave_one_out: leave each episode's own return out.

    Raises:
        InputError: there is only one episode, or shapes do not line up.
    """
    shape = require_rollout(to_go)
    require(len(shape) >= 2 and shape[1] >= 2, "to_go's shape", shape, "[T, N, ...] with at least two episodes")
    running = jnp.ones(shape[:2], bool) if mask is None else jnp.asarray(mask, bool)
    counts = align_rows("mask", running, shape).astype(to_go.dtype)
    others = counts if leave_one_out else jnp.zeros_like(counts)
    total = jnp.sum(counts * to_go, axis=1, keepdims=True) - others * to_go
    number = jnp.sum(counts, axis=1, keepdims=True) - others
    return total / jnp.maximum(number, 1.0)


def _require_baseline(baseline: str, shape: tuple[int, ...]) -> None:
    if baseline not in BASELINES:
        raise unknown_name("baseline", baseline, BASELINES)
    if baseline != "none":
        require(shape[1] >= 2, "reward's shape", shape, f"[T, N] with at least two episodes for baseline {baseline!r}")


def gpomdp_objective(
    log_prob: Float[Array, "..."],
    reward: Float[Array, "T ..."],
    gamma: Float[Array, "..."] | float,
    mask: Bool[Array, "..."] | None = None,
    *,
    baseline: str = "mean",
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """A scalar whose gradient is the GPOMDP estimate: ``mean_i sum_t log pi(a_t | s_t) (G_t - b_t)``.

    Its value means nothing. Differentiate it in the parameters that `log_prob` was computed with.

    Args:
        log_prob: of the actions that were taken, ``[T, N]``.
        reward: ``[T, N]``.
        gamma: discount in ``[0, 1]``.
        mask: which rows belong to the episode.
        baseline: ``b_t`` is ``"none"``, the ``"mean"`` over the batch or its ``"leave-one-out"`` form
            (:func:`time_baseline`). The optimal one is no scalar's gradient: see :func:`gpomdp_gradient`.
        weight: per-decision weights of the rewards (:func:`cumulative_weights`) where another policy acted.

    Raises:
        InputError: shapes do not line up, a number is out of range, or there is no such baseline for these arrays.
    """
    shape = require_rollout(reward)
    require(len(shape) == 2, "reward's shape", shape, "[T, N]")
    require_same_shape("log_prob", log_prob, "reward", shape)
    require(baseline != "optimal", "baseline", baseline, "'none', 'mean' or 'leave-one-out' for a scalar objective")
    _require_baseline(baseline, shape)
    advantage = reward_to_go(reward, gamma, mask, weight)
    if baseline != "none":
        advantage = advantage - time_baseline(advantage, mask, leave_one_out=baseline == "leave-one-out")
    term = log_prob * jax.lax.stop_gradient(advantage)
    if mask is not None:
        term = jnp.where(align_rows("mask", mask, shape), term, 0.0)
    return jnp.sum(term) / shape[1]


def cumulative_scores(
    log_prob: Callable[[PyTree], Float[Array, "T N"]], params: PyTree, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "T N P"]:
    """``sum_{j <= t} grad log pi(a_j | s_j)`` of every step, with the parameters as one vector of length ``P``.

    Needs room for ``T N P`` numbers, so it is for policies with few parameters.

    Args:
        log_prob: from parameters to the log-probabilities of the actions that were taken.
        params: where it is differentiated, a tree of arrays of floats.
        mask: which rows belong to the episode. After its end an episode keeps its score.
    """
    flat, restore = ravel_pytree(params)

    def summed(flat: Array) -> Array:
        terms = log_prob(restore(flat))
        if mask is not None:
            terms = jnp.where(align_rows("mask", mask, terms.shape), terms, 0.0)
        return jnp.cumsum(terms, axis=0)

    rows = int(np.prod(jax.eval_shape(summed, flat).shape))
    return (jax.jacfwd if flat.size <= rows else jax.jacrev)(summed)(flat)


def optimal_baseline(score: Float[Array, "T N P"], reward: Float[Array, "T N"]) -> Float[Array, "T P"]:
    """``b_t = sum_i w_t^2 R_t / sum_i w_t^2`` with `w` the cumulative score: the least variance, for each component.

    One for each reward, as in Peters and Schaal (2008), "Reinforcement learning of motor skills with policy
    gradients". Estimated from the episodes that it is then used on, it costs a bias of order ``1 / N``.

    Args:
        score: cumulative scores (:func:`cumulative_scores`).
        reward: what was earned at each step, discounted, zero after an episode's end.
    """
    squared = score**2
    total = jnp.sum(squared, axis=1)
    return jnp.sum(squared * reward[..., None], axis=1) / jnp.where(total > 0, total, 1.0)


def gpomdp_gradient(
    log_prob: Callable[[PyTree], Float[Array, "T N"]],
    params: PyTree,
    reward: Float[Array, "T ..."],
    gamma: Float[Array, "..."] | float,
    mask: Bool[Array, "..."] | None = None,
    *,
    baseline: str = "mean",
) -> PyTree:
    """The GPOMDP estimate of the gradient of the discounted return, for any policy.

    ``mean_i sum_t grad log pi(a_t | s_t) (sum_{h >= t} gamma^h r_h - b_t)``; with the optimal baseline in the equal
    form ``mean_i sum_t w_t (gamma^t r_t - b_t)``, where ``w_t`` is the cumulative score. An episode that has ended
    keeps its score there and earns nothing: leaving it out would bias the estimate, because whether it has ended
    depends on the actions that the score is of.

    Args:
        log_prob: from parameters to the log-probabilities ``[T, N]`` of what was recorded.
        params: the parameters, a tree of arrays of floats.
        reward: ``[T, N]``.
        gamma: discount in ``[0, 1]``.
        mask: which rows belong to the episode.
        baseline: one of ``BASELINES``; ``"optimal"`` needs room for the score of every step
            (:func:`cumulative_scores`).

    Returns:
        A tree like `params`, uphill.

    Raises:
        InputError: shapes do not line up, a number is out of range, or there is no such baseline for these arrays.
    """
    if baseline != "optimal":
        return jax.grad(lambda p: gpomdp_objective(log_prob(p), reward, gamma, mask, baseline=baseline))(params)
    shape = require_rollout(reward)
    require(len(shape) == 2, "reward's shape", shape, "[T, N]")
    _require_baseline(baseline, shape)
    earned = _discounted(reward, gamma, mask)
    score = cumulative_scores(log_prob, params, mask)
    b = optimal_baseline(score, earned)
    flat = jnp.sum(score * (earned[..., None] - b[:, None, :]), axis=(0, 1)) / shape[1]
    return ravel_pytree(params)[1](flat)
