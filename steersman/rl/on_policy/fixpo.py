"""FixPO: guaranteed trust region optimization by a penalty and a fix-up (Zentner et al., 2023, arXiv:2312.05405)."""

from __future__ import annotations

import equinox as eqx

from steersman.errors import InputError
from steersman.rl.fix_up import FixUp
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.phases import Phase
from steersman.rl.surrogates import LearnedKL, Surrogate
from steersman.training.schedules import Linear, Schedule


class FixPO(FirstOrder):
    """First-order learning in which every update keeps ``KL(old || new)`` below a bound at every state of its batch.

    Two phases. Minibatch steps on ``-r A + beta KL``, with a weight ``beta`` that follows the largest divergence,
    keep the policy near the bound but not surely within it; after every epoch, steps on the divergence alone mend
    what exceeds it. Worth choosing over TRPO where the policy is large, recurrent or has actions of several kinds
    (no Fisher products, no conjugate gradient), and over PPO where the bound must hold in every update.

    The bound is on the states of the batch. With ``normalize_observations`` the statistics that the policy acts under
    move after the update, which no bound covers.

    Attributes:
        surrogate: the penalized loss, with the bound.
        phase: the fix-up; None leaves the penalty alone.
    """

    surrogate: Surrogate = eqx.field(default_factory=LearnedKL)
    phase: Phase | None = eqx.field(default_factory=FixUp)

    def __check_init__(self) -> None:
        rate = self.learning_rate
        if self.phase is None or not isinstance(rate, Schedule):
            return
        if isinstance(rate, Linear) and not rate.stays_above_zero():
            raise InputError(
                "learning_rate is a schedule that reaches 0, but it must stay above 0 while the fix-up is on: "
                "steps of size 0 mend nothing."
            )
