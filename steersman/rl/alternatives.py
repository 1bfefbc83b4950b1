"""The slot for more actions than the one that was taken: what else could have been done at a visited state."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Float, Key, PyTree

from steersman.policies import NetworkPolicy
from steersman.policies.preprocessing import Features
from steersman.training.experience import Experience

#: Turns rewards as the environment gives them into the units of values and advantages.
RewardScale = Callable[[Array], Array]


class Alternatives(NamedTuple):
    """``K`` further samples beside each row of a batch, leaves ``[R, K, ...]``.

    Attributes:
        action: actions before bounds, drawn from the behaviour policy.
        log_prob: their log-probability under it.
        parameters: its distribution parameters where they were drawn.
        advantage: estimates of their advantage, in the units of the batch's.
        features: where they were drawn; None where that is the row's own state.
    """

    action: PyTree
    log_prob: Float[Array, "R K"]
    parameters: PyTree
    advantage: Float[Array, "R K"]
    features: Features | None = None


class AlternativeSource(eqx.Module):
    """Where alternatives come from: a learned model, a Q-network."""

    @abc.abstractmethod
    def init(self, problem: Any, actor: NetworkPolicy, key: Key[Array, ""]) -> PyTree:
        """The source's own state (networks, a replay buffer). Raises for a problem that it cannot work on."""

    @abc.abstractmethod
    def propose(
        self,
        state: PyTree,
        experience: Experience,
        batch: Any,
        actor: NetworkPolicy,
        algorithm: Any,
        critic: PyTree,
        scale: RewardScale,
    ) -> tuple[Alternatives | None, PyTree, dict[str, Array]]:
        """``(alternatives, state, metrics)`` for one batch; None for the alternatives adds nothing.

        Args:
            state: the source's state, which holds its own key where it draws.
            experience: the batch as it was collected ``[T, N, ...]``.
            batch: the same with features, advantages and targets, ``[T, N, ...]``
                (:class:`~steersman.rl.on_policy.actor_critic.Batch`).
            actor: the behaviour policy.
            algorithm: the method's hyperparameters at their present values; ``algorithm.critic.value(critic, vector)``
                are values, ``algorithm.gamma`` is the discount.
            critic: the critic's networks.
            scale: turns rewards as the environment gives them into the units of values and advantages.

        Rows are in the order ``[T, N]`` flattened.
        """
