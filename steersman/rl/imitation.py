"""The slot for a pull towards what another policy does: behaviour cloning beside the policy gradient."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputError, InputTypeError, require_number
from steersman.policies import NetworkPolicy
from steersman.training.experience import Experience
from steersman.training.schedules import Schedule, Scheduled, scalar


class Imitation(eqx.Module):
    """``-mean log pi(a' | s)``, where a teacher draws ``a'`` anew at the states of every batch.

    Keeps fine-tuning near what was learned before (the behaviour-cloning term of Ren et al., 2024, arXiv:2409.00588),
    or lets a policy start from another one. A sample is what the policy class records: actions before bounds, whole
    denoising chains, or flow samples, for which this is the loss of flow matching.

    Attributes:
        coefficient: weight of the term.
        teacher: whom to follow, a policy of the learner's class; None for the learner as it was before any update.
    """

    coefficient: Scheduled = scalar(0.1)
    teacher: NetworkPolicy | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.coefficient, Schedule):
            require_number("coefficient", self.coefficient, at_least=0.0)

    def init(self, actor: NetworkPolicy) -> PyTree:
        """What is kept from the start: the actor itself where it is its own teacher."""
        if jax.tree.leaves(jax.eval_shape(actor.init, jax.random.key(0))):
            raise InputError("imitation asks for the actor's likelihood apart from a memory, but this actor has one.")
        return actor if self.teacher is None else ()

    def draw(self, kept: PyTree, experience: Experience, key: Key[Array, ""]) -> PyTree:
        """The teacher's samples at the observations of a batch, leaves ``[T, N, ...]``.

        Raises:
            InputTypeError: they are not of the kind that the learner draws.
        """
        teacher: Any = kept if self.teacher is None else self.teacher

        def act(observation: PyTree, key: Array) -> PyTree:
            return teacher.act(observation, teacher.init(key), key)[2].action

        keys = jax.random.split(key, experience.reward.shape[:2])
        drawn = jax.vmap(jax.vmap(act))(experience.observation, keys)
        ours, theirs = (jax.tree.map(jnp.shape, sample) for sample in (experience.record.action, drawn))
        if ours != theirs:
            raise InputTypeError(f"teacher draws samples of shapes {theirs}, but they must be the learner's, {ours}.")
        return drawn

    def loss(self, actor: NetworkPolicy, rows: Any) -> Float[Array, ""]:
        """The term on some rows, before its weight."""
        sample = rows.imitated
        return -jnp.mean(actor.head.log_prob(actor.parameters_for(rows.features, rows.carry, sample), sample))
