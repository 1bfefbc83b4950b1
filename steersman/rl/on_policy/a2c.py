"""Advantage actor-critic (Mnih et al., "Asynchronous methods for deep reinforcement learning", arXiv:1602.01783)."""

from __future__ import annotations

import equinox as eqx

from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import Score, Surrogate


class A2C(FirstOrder):
    """One pass over each batch along ``A grad log pi``, with generalized advantages from a learned critic.

    The synchronous form. Nothing holds the policy back, so each sample is used once; PPO's loop with one epoch and no
    clip, whose gradient is the same where a batch is one minibatch. Worth choosing over PPO where samples are cheap
    and the gradient step is what costs.

    Attributes:
        surrogate: the score function's loss.
        epochs: one.
        minibatches: parts of the batch that are stepped on in turn; the classical method has one, and a short rollout.
    """

    surrogate: Surrogate = eqx.field(default_factory=Score)
    epochs: int = eqx.field(static=True, default=1)
