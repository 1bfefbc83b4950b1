"""REINFORCE (Williams, "Simple statistical gradient-following algorithms", Machine Learning 8, 1992)."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from steersman.rl.advantage_scales import AdvantageScale
from steersman.rl.critics import Critic, NoCritic
from steersman.rl.on_policy.actor_critic import ActorCriticState
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import Score, Surrogate
from steersman.training.algorithm import Metrics
from steersman.training.collect import episode_ends
from steersman.training.experience import Experience
from steersman.training.schedules import Scheduled, scalar


class REINFORCE(FirstOrder):
    """One step along ``mean_t G_t grad log pi(a_t | s_t)`` for each batch, ``G_t`` the discounted return to go.

    The policy gradient as it stands: no critic, no baseline, nothing that holds the policy back. It is here to be
    compared with, and where a critic cannot be had. States are not weighted by ``gamma^t``, as nowhere in practice.

    Returns are cut where an episode or the batch ends, so steps near the end of a batch earn too little. The metric
    ``unfinished`` is the share of steps whose episode had not ended by then: choose ``num_steps`` of several episodes,
    and distrust a run in which it is near one.

    Attributes:
        surrogate: the score function's loss.
        critic: none.
        lam: one, so that without a critic advantages are returns.
        epochs: one; after the first step the batch comes from another policy, which the loss does not know of.
        minibatches: one.
        normalize_advantages: returns are taken as they are; True standardizes them, a constant baseline.
    """

    surrogate: Surrogate = eqx.field(default_factory=Score)
    critic: Critic = eqx.field(default_factory=NoCritic)
    lam: Scheduled = scalar(1.0)
    epochs: int = eqx.field(static=True, default=1)
    minibatches: int = eqx.field(static=True, default=1)
    normalize_advantages: bool | AdvantageScale = False

    def update(self, state: ActorCriticState, experience: Experience) -> tuple[ActorCriticState, Metrics]:
        state, metrics = super().update(state, experience)
        metrics["unfinished"] = jnp.mean(unfinished(experience))
        return state, metrics


def unfinished(experience: Experience) -> Bool[Array, "T N"]:
    """The steps whose episode had not ended when the batch did."""
    ends = episode_ends(experience.terminated, experience.truncated)
    return jnp.cumsum(ends[::-1], axis=0)[::-1] == 0
