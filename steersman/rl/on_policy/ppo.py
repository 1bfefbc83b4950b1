"""Proximal policy optimization (Schulman, Wolski, Dhariwal, Radford, Klimov, 2017, arXiv:1707.06347)."""

from __future__ import annotations

import equinox as eqx

from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import Clip, Surrogate


class PPO(FirstOrder):
    """Reuses each on-policy batch for several epochs of minibatch Adam, while a surrogate holds the policy back.

    The surrogate is a slot: with :class:`~steersman.rl.surrogates.Clip` this is PPO-clip, with
    :class:`~steersman.rl.surrogates.AdaptiveKL` PPO-penalty; any other fits. The loss is the paper's equation 9.
    """

    surrogate: Surrogate = eqx.field(default_factory=Clip)
