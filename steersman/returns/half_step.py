"""Generalized advantages over half-steps: a decision whose effect is known, then chance."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steersman.returns.advantages import td_error
from steersman.returns.time_major import align_ends, align_fraction, backward_sum, require_rollout, require_same_shape


class HalfStepEstimate(NamedTuple):
    """What :func:`half_step_gae` returns, all ``[T, ...]``.

    Attributes:
        advantage: advantages of the actions.
        target: of the values before the decision.
        post_target: of the values between decision and chance.
    """

    advantage: Float[Array, "T ..."]
    target: Float[Array, "T ..."]
    post_target: Float[Array, "T ..."]


def half_step_gae(
    reward: Float[Array, "T ..."],
    decision_reward: Float[Array, "..."],
    value: Float[Array, "..."],
    post_value: Float[Array, "..."],
    next_value: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    truncated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
    lam: Float[Array, "..."] | float,
    lam_x: Float[Array, "..."] | float,
) -> HalfStepEstimate:
    """Chains the errors of two half-steps, each with a trace parameter of its own.

    With ``V`` the value before a decision and ``V^x`` that after it,
    ``d_t = r_decision + V^x(s^x_t) - V(s_t)``,
    ``e_t = r_random + gamma (1 - terminated_t) V(s'_t) - V^x(s^x_t)`` and
    ``A_t = d_t + lam_x (e_t + gamma lam (1 - terminated_t) (1 - truncated_t) A_{t+1})``.

    As ``d_t + e_t`` is the ordinary temporal-difference error, ``lam_x = 1`` gives the advantages of
    :func:`~steersman.returns.gae` bit for bit, whatever ``V^x``; smaller ``lam_x`` lets less of chance into the
    advantage and leans on ``V^x`` instead. With both values exact, its mean over chance does not depend on ``lam_x``.

    Args:
        reward: whole rewards, of decision and chance together ``[T, ...]``.
        decision_reward: the part that the decision alone fixes, of `reward`'s shape.
        value: ``V`` of the state acted in, of `reward`'s shape.
        post_value: ``V^x`` of the post-decision state, of `reward`'s shape.
        next_value: ``V`` after the step, before any restart, of `reward`'s shape.
        terminated: the task ended here; leading axes of `reward`.
        truncated: the episode was cut here for another reason; leading axes of `reward`.
        gamma: discount in ``[0, 1]``, a scalar or with leading axes of `reward`.
        lam: trace through later steps, in ``[0, 1]``, a scalar or with leading axes of `reward`.
        lam_x: trace through this step's chance, in ``[0, 1]``, a scalar or with leading axes of `reward`.

    Returns:
        Advantages, the targets ``A_t + V(s_t)``, and the targets of the post-decision values,
        ``r_random + gamma (1 - terminated_t) (V(s'_t) + lam (1 - truncated_t) A_{t+1})``.

    Raises:
        InputError: shapes do not line up, or a number is out of range.
    """
    shape = require_rollout(reward)
    require_same_shape("decision_reward", decision_reward, "reward", shape)
    require_same_shape("post_value", post_value, "reward", shape)
    terminated = align_ends("terminated", terminated, shape)
    truncated = align_ends("truncated", truncated, shape)
    gamma, lam = align_fraction("gamma", gamma, shape), align_fraction("lam", lam, shape)
    lam_x = align_fraction("lam_x", lam_x, shape)
    delta = td_error(reward, value, next_value, terminated, gamma)
    decision = decision_reward + post_value - value
    decay = jnp.where(terminated | truncated, 0.0, gamma * lam)
    # d + lam_x e, written so that with lam_x = 1 the whole errors come through without a rounding.
    advantage = backward_sum(lam_x * delta + (1.0 - lam_x) * decision, decay * lam_x)
    following = jnp.concatenate([advantage[1:], jnp.zeros_like(advantage[:1])])
    chance = reward - decision_reward + jnp.where(terminated, 0.0, gamma * next_value)
    return HalfStepEstimate(advantage, advantage + value, chance + decay * following)
