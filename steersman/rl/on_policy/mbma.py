"""Model-based many-actions policy gradient (Nauman and Cygan, ICML 2023, arXiv:2210.13011)."""

from __future__ import annotations

import equinox as eqx

from steersman.rl.alternatives import AlternativeSource
from steersman.rl.alternatives_from_model import ModelActions
from steersman.rl.on_policy.ppo import PPO


class MBMA(PPO):
    """PPO with more actions at every visited state, scored by short rollouts of a learned model; no further steps.

    Each state's samples are averaged first, then states, and advantages are standardized over all samples of a
    minibatch. The critic learns from real data alone. With ``alternatives.actions`` of 1 this is PPO, bit for bit. Any
    first-order method here takes the same slot, ``alternatives=ModelActions(...)``.

    Attributes:
        alternatives: :class:`~steersman.rl.alternatives_from_model.ModelActions`; with
            :class:`~steersman.rl.alternatives_from_q.QActions` this is QMA, with
            :class:`~steersman.rl.alternatives_from_model.ModelStates` MB-SPG.
    """

    alternatives: AlternativeSource | None = eqx.field(default_factory=ModelActions)
