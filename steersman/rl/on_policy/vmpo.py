"""V-MPO (Song et al., "V-MPO: On-policy maximum a posteriori policy optimization for discrete and continuous
control", ICLR 2020, arXiv:1909.12238).
"""

from __future__ import annotations

import equinox as eqx

from steersman.rl.mpo_surrogate import WeightedLikelihood
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import Surrogate


class VMPO(FirstOrder):
    """Weighted maximum likelihood of the better half of each minibatch, within bounds on the divergence.

    No importance ratios and no clip: the policy is pulled towards the actions that turned out better than the median,
    the best of them most, while multipliers keep its divergence from the collecting policy near a bound. Worth
    choosing over PPO where ratios are badly behaved (many action dimensions), and over TRPO where a bound that holds
    on average is enough. The bounds are soft: see :class:`~steersman.rl.mpo_surrogate.WeightedLikelihood`.

    Metrics: those of the loop, the ``temperature``, and the multipliers.

    Attributes:
        surrogate: the weighted likelihood.
    """

    surrogate: Surrogate = eqx.field(default_factory=WeightedLikelihood)
