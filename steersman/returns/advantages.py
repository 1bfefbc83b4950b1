"""Returns and advantages of rollouts, with termination and truncation kept apart.

Arrays are time-major, ``[T, ...]`` with any trailing axes (environments, agents, objectives). ``value`` is that of
the observation acted on and ``next_value`` that of the observation after the step, *before* any restart, at every
row. What came after a terminated row is worth nothing; what came after a truncated row is worth ``next_value``; no
sum runs across either. The rows that the batch's end cuts are bootstrapped as truncated ones are.

Episode ends, discounts and trace parameters are lined up with the *leading* axes of the reward, so that ends
``[T, N]`` serve rewards ``[T, N, K]``; a discount per row, ``gamma ** duration``, serves semi-Markov steps.

No gradient is stopped here: apply these functions to values that are meant to be constants.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steersman.errors import require_count
from steersman.returns.time_major import align_ends, align_fraction, backward_sum, require_rollout, require_same_shape


def td_error(
    reward: Float[Array, "T ..."],
    value: Float[Array, "..."],
    next_value: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
) -> Float[Array, "T ..."]:
    """One-step temporal-difference errors, ``r + gamma (1 - terminated) V(s') - V(s)``.

    Truncation does not enter: a truncated row is bootstrapped as any other.

    Args:
        reward: ``[T, ...]``.
        value: of the observation acted on, of `reward`'s shape.
        next_value: of the observation after the step, of `reward`'s shape.
        terminated: the task ended here; leading axes of `reward`.
        gamma: discount in ``[0, 1]``, a scalar or with leading axes of `reward`.

    Raises:
        InputError: shapes do not line up, or `gamma` is out of range.
    """
    shape = require_rollout(reward)
    require_same_shape("value", value, "reward", shape)
    require_same_shape("next_value", next_value, "reward", shape)
    terminated = align_ends("terminated", terminated, shape)
    gamma = align_fraction("gamma", gamma, shape)
    return reward + jnp.where(terminated, 0.0, gamma * next_value) - value


def gae(
    reward: Float[Array, "T ..."],
    value: Float[Array, "..."],
    next_value: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    truncated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
    lam: Float[Array, "..."] | float,
) -> tuple[Float[Array, "T ..."], Float[Array, "T ..."]]:
    """Generalized advantage estimates (Schulman et al., 2016, arXiv 1506.02438).

    ``delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)`` and
    ``A_t = delta_t + gamma lam (1 - terminated_t) (1 - truncated_t) A_{t+1}``.

    Args:
        reward: ``[T, ...]``.
        value: of the observation acted on, of `reward`'s shape.
        next_value: of the observation after the step, before any restart, of `reward`'s shape.
        terminated: the task ended here; leading axes of `reward`.
        truncated: the episode was cut here for another reason; leading axes of `reward`.
        gamma: discount in ``[0, 1]``, a scalar or with leading axes of `reward`.
        lam: from 0 (one-step errors) to 1 (discounted returns), a scalar or with leading axes of `reward`.

    Returns:
        The advantages and the value targets ``A_t + V(s_t)``, both of `reward`'s shape.

    Raises:
        InputError: shapes do not line up, or a number is out of range.
    """
    shape = require_rollout(reward)
    terminated = align_ends("terminated", terminated, shape)
    truncated = align_ends("truncated", truncated, shape)
    gamma, lam = align_fraction("gamma", gamma, shape), align_fraction("lam", lam, shape)
    delta = td_error(reward, value, next_value, terminated, gamma)
    advantage = backward_sum(delta, jnp.where(terminated | truncated, 0.0, gamma * lam))
    return advantage, advantage + value


def lambda_return(
    reward: Float[Array, "T ..."],
    next_value: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    truncated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
    lam: Float[Array, "..."] | float,
) -> Float[Array, "T ..."]:
    """TD(lambda) targets ``G_t = r_t + gamma ((1 - lam) V(s'_t) + lam G_{t+1})`` (Sutton and Barto, 2018, eq. 12.18).

    Where an episode or the batch ends, ``G_{t+1}`` is ``V(s'_t)``, and nothing follows a termination. Equal to the
    targets of :func:`gae` wherever ``next_value[t]`` is ``value[t + 1]``.

    Args:
        reward: ``[T, ...]``.
        next_value: of the observation after the step, before any restart, of `reward`'s shape.
        terminated: the task ended here; leading axes of `reward`.
        truncated: the episode was cut here for another reason; leading axes of `reward`.
        gamma: discount in ``[0, 1]``, a scalar or with leading axes of `reward`.
        lam: in ``[0, 1]``, a scalar or with leading axes of `reward`.

    Raises:
        InputError: shapes do not line up, or a number is out of range.
    """
    shape = require_rollout(reward)
    require_same_shape("next_value", next_value, "reward", shape)
    terminated = align_ends("terminated", terminated, shape)
    truncated = align_ends("truncated", truncated, shape)
    gamma, lam = align_fraction("gamma", gamma, shape), align_fraction("lam", lam, shape)
    # Past the batch's end the return is the bootstrap itself: the same as a truncation at the last row.
    end = (terminated | truncated).at[-1].set(True)
    bootstrap = jnp.where(end, next_value, (1.0 - lam) * next_value)
    increment = reward + jnp.where(terminated, 0.0, gamma * bootstrap)
    return backward_sum(increment, jnp.where(end, 0.0, gamma * lam))


def discounted_return(
    reward: Float[Array, "T ..."],
    next_value: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    truncated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
) -> Float[Array, "T ..."]:
    """Discounted sums of rewards to the episode's end, bootstrapped where it was cut.

    :func:`lambda_return` with ``lam = 1``; arguments and errors are the same. With ``next_value`` zero these are
    plain Monte Carlo returns, which count nothing beyond a cut.
    """
    return lambda_return(reward, next_value, terminated, truncated, gamma, 1.0)


def n_step_return(
    reward: Float[Array, "T ..."],
    next_value: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    truncated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
    n: int,
) -> Float[Array, "T ..."]:
    """Discounted sums of the next `n` rewards plus the discounted value of what follows them.

    Where the episode or the batch ends within the `n` steps, the sum stops there: with the value of the final
    observation where it was cut, with nothing where it terminated. The work grows with ``T n``.

    Args:
        reward: ``[T, ...]``.
        next_value: of the observation after the step, before any restart, of `reward`'s shape.
        terminated: the task ended here; leading axes of `reward`.
        truncated: the episode was cut here for another reason; leading axes of `reward`.
        gamma: discount in ``[0, 1]``, a scalar or with leading axes of `reward`.
        n: number of rewards, at least 1; 1 gives one-step targets, `T` and more :func:`discounted_return`.

    Raises:
        InputError: shapes do not line up, or a number is out of range.
    """
    require_count("n", n)
    shape = require_rollout(reward)
    require_same_shape("next_value", next_value, "reward", shape)
    terminated = align_ends("terminated", terminated, shape)
    truncated = align_ends("truncated", truncated, shape)
    gamma = align_fraction("gamma", gamma, shape)
    end = (terminated | truncated).at[-1].set(True)
    one_step = reward + jnp.where(terminated, 0.0, gamma * next_value)

    # The return over k + 1 steps is a reward and the return over k steps of the following row.
    def lengthen(shorter: Array, _: Any) -> tuple[Array, None]:
        following = jnp.concatenate([shorter[1:], shorter[-1:]])
        return jnp.where(end, one_step, reward + gamma * following), None

    return jax.lax.scan(lengthen, one_step, length=min(n, shape[0]) - 1)[0]
