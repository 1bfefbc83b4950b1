"""Off-policy corrected value targets and advantages."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from steersman.errors import require
from steersman.returns.advantages import td_error
from steersman.returns.time_major import align_ends, align_fraction, align_rows, backward_sum, require_rollout


def vtrace(
    reward: Float[Array, "T ..."],
    value: Float[Array, "..."],
    next_value: Float[Array, "..."],
    log_ratio: Float[Array, "..."],
    terminated: Bool[Array, "..."],
    truncated: Bool[Array, "..."],
    gamma: Float[Array, "..."] | float,
    lam: Float[Array, "..."] | float = 1.0,
    rho_clip: Float[Array, ""] | float = 1.0,
    c_clip: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, "T ..."], Float[Array, "T ..."]]:
    """V-trace targets and policy-gradient advantages (Espeholt et al., 2018, arXiv 1802.01561, section 4).

    With ``rho_t = min(rho_clip, ratio_t)`` and ``c_t = lam min(c_clip, ratio_t)``, and ``delta_t`` the one-step error
    of :func:`~steersman.returns.td_error`,
    ``v_t = V(s_t) + rho_t delta_t + gamma c_t (v_{t+1} - V(s_{t+1}))``, cut where an episode ends. The advantage is
    ``rho_t (r_t + gamma ((1 - lam) V(s'_t) + lam v_{t+1}) - V(s_t))``, which is the paper's for ``lam = 1``. When both
    policies are the same these are the targets and advantages of :func:`~steersman.returns.gae`.

    `rho_clip` decides which policy the fixed point values, between the behaviour (near 0) and the target (infinity);
    `c_clip` only how fast it is reached.

    Args:
        reward: ``[T, ...]``.
        value: of the observation acted on, of `reward`'s shape.
        next_value: of the observation after the step, before any restart, of `reward`'s shape.
        log_ratio: log-probability of the action under the target policy minus that under the behaviour policy;
            leading axes of `reward`.
        terminated: the task ended here; leading axes of `reward`.
        truncated: the episode was cut here for another reason; leading axes of `reward`.
        gamma: discount in ``[0, 1]``, a scalar or with leading axes of `reward`.
        lam: in ``[0, 1]``, a scalar or with leading axes of `reward`.
        rho_clip: positive; infinity for no clipping.
        c_clip: positive; infinity for no clipping.

    Returns:
        The value targets and the advantages, both of `reward`'s shape.

    Raises:
        InputError: shapes do not line up, or a number is out of range.
    """
    for argument, clip in (("rho_clip", rho_clip), ("c_clip", c_clip)):
        if isinstance(clip, (int, float, np.number)):
            require(bool(clip > 0), argument, clip, "above 0 (infinity for no clipping)")
    shape = require_rollout(reward)
    log_ratio = align_rows("log_ratio", log_ratio, shape)
    terminated = align_ends("terminated", terminated, shape)
    truncated = align_ends("truncated", truncated, shape)
    gamma, lam = align_fraction("gamma", gamma, shape), align_fraction("lam", lam, shape)

    rho = jnp.exp(jnp.minimum(log_ratio, jnp.log(rho_clip)))
    c = lam * jnp.exp(jnp.minimum(log_ratio, jnp.log(c_clip)))
    end = terminated | truncated
    delta = td_error(reward, value, next_value, terminated, gamma)
    correction = backward_sum(rho * delta, jnp.where(end, 0.0, gamma * c))
    following = jnp.concatenate([correction[1:], jnp.zeros_like(correction[:1])])
    advantage = rho * (delta + jnp.where(end, 0.0, gamma * lam * following))
    return value + correction, advantage
