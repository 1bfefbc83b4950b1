"""Simple policy optimization (Xie, Zhang, Yang, Hutter, Xu, ICML 2025, arXiv:2401.16025)."""

from __future__ import annotations

import equinox as eqx

from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import QuadraticRatio, Surrogate
from steersman.training.schedules import Continuous, scalar


class SPO(FirstOrder):
    """PPO's loop with a surrogate that pulls probability ratios back instead of only letting go of them.

    The loss ``-(r A - |A| (r - 1)^2 / (2 epsilon))`` is smooth and has its one optimum at
    ``r = 1 + sign(A) epsilon``; a sample that overshot is pushed back, where PPO's clip gives it no gradient. Worth
    choosing over PPO when the network is deep or many epochs are run over each batch.

    Attributes:
        surrogate: the quadratic-ratio loss.
        value_clip: as in the paper's code, a value may move by ``epsilon`` before its loss stops pulling.
    """

    surrogate: Surrogate = eqx.field(default_factory=QuadraticRatio)
    value_clip: Continuous | None = scalar(0.2)
