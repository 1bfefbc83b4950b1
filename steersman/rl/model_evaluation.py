"""Judging a policy by a learned model before it is tried, and keeping it only where it is judged better."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.errors import require_count, require_number
from steersman.training.dynamics_model import ModelPolicy, TransitionModel, rollout_model
from steersman.training.schedules import Continuous, scalar


class ModelRolloutValue(eqx.Module):
    """``J(pi) = E[sum_{h<H} alive_h Q(x_h, u_h)]`` along rollouts of a policy in a model, "AM-Q".

    From Uni-O4 (Lei et al., 2024, arXiv:2311.03351), where ``alive`` is one. Without it values behind a predicted end
    count, and a policy is rewarded for leaving the data through an obstacle. As good as the values are: where they
    are wrong about actions that no data has, so is this.

    Attributes:
        horizon: steps ``H``.
        survival: whether each value counts with the predicted probability that the task has not ended.
    """

    horizon: int = eqx.field(static=True, default=5)
    survival: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        require_count("horizon", self.horizon)

    def __call__(
        self,
        model: TransitionModel,
        policy: ModelPolicy,
        action_value: Callable[[Array, Array], Array],
        observation: Float[Array, "... n"],
        key: Key[Array, ""],
        carry: PyTree = (),
    ) -> Float[Array, "..."]:
        """The sum along one rollout from each state; their mean estimates ``J``.

        Args:
            model: what is followed.
            policy: called with ``(observation, carry, key)`` for a whole batch at once.
            action_value: ``Q``, which broadcasts over leading axes.
            observation: where the rollouts start.
            key: randomness; the same key compares two policies under the same noise.
            carry: the policy's memory at the start.
        """
        first_key, rollout_key = jax.random.split(key)
        action, carry = policy(observation, carry, first_key)
        rollout = rollout_model(model, policy, observation, action, self.horizon, rollout_key, carry)
        value = action_value(rollout.observation[:-1], rollout.action)
        return jnp.sum(rollout.alive[:-1] * value if self.survival else value, axis=0)


class Accepted(NamedTuple):
    """What a gate has let through last.

    Attributes:
        kept: the parameters.
        value: how they were judged.
        accepted: candidates let through so far.
        judged: candidates judged so far.
    """

    kept: PyTree
    value: Float[Array, ""]
    accepted: Int[Array, ""]
    judged: Int[Array, ""]


class ImprovementGate(eqx.Module):
    """Accepts a candidate that is judged better by a margin, ``J_new - J >= margin |J|``; else the last one stays.

    Attributes:
        margin: share of the present value's magnitude, at least 0.
    """

    margin: Continuous = scalar(0.05)

    def __check_init__(self) -> None:
        require_number("margin", self.margin, at_least=0.0)

    def init(self, kept: PyTree, value: Float[Array, ""] | float) -> Accepted:
        """Before the first candidate."""
        none = jnp.zeros((), jnp.int32)
        return Accepted(kept, jnp.asarray(value, jnp.result_type(float)), none, none)

    def __call__(
        self, last: Accepted, candidate: PyTree, value: Float[Array, ""] | float
    ) -> tuple[Accepted, Bool[Array, ""]]:
        """What is kept from now on, and whether that is the candidate.

        Args:
            last: what was kept until now.
            candidate: a PyTree of arrays like it.
            value: how the candidate is judged; NaN is refused.
        """
        value = jnp.asarray(value, last.value.dtype)
        good = value - last.value >= self.margin * jnp.abs(last.value)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), candidate, last.kept)
        counts = last.accepted + good.astype(jnp.int32), last.judged + 1
        return Accepted(kept, jnp.where(good, value, last.value), *counts), good
