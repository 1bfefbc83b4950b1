"""Implicit Q-learning: critics from fixed data that are never asked about actions which the data does not have."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt32

from steersman.errors import require_count, require_number
from steersman.networks import MLP
from steersman.objectives.values import expectile_error, squared_error
from steersman.training.averaging import Average, MovingAverage
from steersman.training.optimizers import Adam, Optimizer, descend
from steersman.training.replay import Replay, Transition
from steersman.training.schedules import Continuous, scalar


class ImplicitQ(eqx.Module):
    """Action values and state values, and what their learning remembers. Calls broadcast over leading axes.

    Attributes:
        q: networks of action values, stacked ``[J, ...]``.
        target: their slow average, of which state values are an expectile.
        v: network of state values.
        optimizer: the optimizer's memory.
        updates: number of updates.
    """

    q: MLP
    target: Average
    v: MLP
    optimizer: PyTree
    updates: UInt32[Array, ""]

    def action_value(self, observation: Float[Array, "... n"], action: Float[Array, "... m"]) -> Float[Array, "..."]:
        """The least of the ``J`` values of an action."""
        return jnp.min(_each(self.q, observation, action), axis=0)

    def value(self, observation: Float[Array, "... n"]) -> Float[Array, "..."]:
        """The value of a state."""
        return self.v(observation)[..., 0]

    def advantage(self, observation: Float[Array, "... n"], action: Float[Array, "... m"]) -> Float[Array, "..."]:
        """``min_j Q_j(x, u) - V(x)``."""
        return self.action_value(observation, action) - self.value(observation)


def _each(networks: MLP, observation: Array, action: Array) -> Float[Array, "J ..."]:
    inputs = jnp.concatenate([observation, action], axis=-1)
    return eqx.filter_vmap(lambda network: network(inputs)[..., 0])(networks)


class ImplicitQLearning(eqx.Module):
    """Fits :class:`ImplicitQ` to transitions (Kostrikov, Nair and Levine, 2022, arXiv:2110.06169).

    ``V`` follows an expectile of ``min_j Qbar_j(x, u)`` over the data's actions, and every ``Q_j`` follows
    ``r + discount (1 - terminated) V(x')``. Observations and actions are vectors; policies that are judged must act in
    the same units.

    Attributes:
        expectile: ``omega`` in (0, 1): one half values the data's policy, more the best that the data did.
        critics: number of action values ``J``.
        hidden: widths of the hidden layers of every network.
        activation: their nonlinearity.
        learning_rate: step size of all.
        optimizer: turns gradients into steps.
        average: how the targets follow the action values.
        target_every: updates between two steps of the targets.
        batch_size: transitions in one update of :meth:`fit`.
        updates: updates of one :meth:`fit`.
    """

    expectile: Continuous = scalar(0.7)
    critics: int = eqx.field(static=True, default=2)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(512, 512), converter=tuple)
    activation: str = eqx.field(static=True, default="relu")
    learning_rate: Continuous = scalar(1.4e-4)
    optimizer: Optimizer = eqx.field(default_factory=lambda: Adam(epsilon=1e-8))
    average: MovingAverage = eqx.field(default_factory=lambda: MovingAverage(0.995, bias_corrected=False))
    target_every: int = eqx.field(static=True, default=1)
    batch_size: int = eqx.field(static=True, default=256)
    updates: int = eqx.field(static=True, default=10_000)

    def __check_init__(self) -> None:
        require_number("expectile", self.expectile, above=0.0, below=1.0)
        require_number("learning_rate", self.learning_rate, above=0.0)
        for name in ("critics", "target_every", "batch_size", "updates"):
            require_count(name, getattr(self, name))

    def init(self, observation_size: int, action_size: int, key: Key[Array, ""]) -> ImplicitQ:
        """Fresh critics for vectors of these sizes."""
        require_count("observation_size", observation_size)
        require_count("action_size", action_size)
        q_key, v_key = jax.random.split(key)

        def make(key: Array) -> MLP:
            return MLP(observation_size + action_size, 1, self.hidden, self.activation, key=key)

        q = eqx.filter_vmap(make)(jax.random.split(q_key, self.critics))
        v = MLP(observation_size, 1, self.hidden, self.activation, key=v_key)
        networks: Any = (q, v)
        memory = self.optimizer.transformation().init(networks)
        return ImplicitQ(q, self.average.init(q), v, memory, jnp.zeros((), jnp.uint32))

    def losses(
        self, networks: tuple[MLP, MLP], critics: ImplicitQ, rows: Transition, discount: Float[Array, "..."] | float
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The losses of ``(Q, V)``; targets are those of `critics`, and have no gradient."""
        q, v = networks
        lowest = jnp.min(_each(critics.target.value, rows.observation, rows.action), axis=0)
        value_loss = jnp.mean(expectile_error(v(rows.observation)[..., 0], lowest, self.expectile))
        goes_on = jnp.logical_not(rows.terminated)
        target = rows.reward + discount * jnp.where(goes_on, critics.value(rows.next_observation), 0.0)
        values = _each(q, rows.observation, rows.action)
        q_loss = jnp.mean(squared_error(values, jnp.broadcast_to(target, values.shape)))
        return q_loss, value_loss

    def step(
        self, critics: ImplicitQ, rows: Transition, discount: Float[Array, "..."] | float
    ) -> tuple[ImplicitQ, Float[Array, ""]]:
        """One update, and the sum of the losses before it.

        Args:
            critics: the present ones.
            rows: transitions ``[B, ...]``.
            discount: from a transition to the next: one number, or one for each row where they last unequally long.
        """

        def loss(networks: Any) -> Array:
            q_loss, value_loss = self.losses(networks, critics, rows, discount)
            # Each network's own mean, as if they were trained apart.
            return value_loss + self.critics * q_loss

        moved = descend(self.optimizer, loss, (critics.q, critics.v), critics.optimizer, self.learning_rate)
        q, v = moved.parameters
        updates = critics.updates + 1
        target = self.average.update(critics.target, q)
        if self.target_every > 1:
            due = updates % self.target_every == 0
            target = jax.tree.map(lambda new, old: jnp.where(due, new, old), target, critics.target)
        return ImplicitQ(q, target, v, moved.memory, updates), moved.loss

    def fit(
        self, critics: ImplicitQ, replay: Replay, discount: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> tuple[ImplicitQ, Float[Array, ""]]:
        """:attr:`updates` updates on stored transitions, pure and jittable, and the mean loss of the last tenth.

        Args:
            critics: the present ones.
            replay: :class:`~steersman.training.replay.Transition` rows with vectors as observations and actions.
            discount: from a transition to the next.
            key: randomness.
        """
        replay.require_rows()

        def update(critics: ImplicitQ, key: Array) -> tuple[ImplicitQ, Array]:
            return self.step(critics, replay.sample(key, self.batch_size), discount)

        critics, losses = jax.lax.scan(update, critics, jax.random.split(key, self.updates))
        return critics, jnp.mean(losses[-max(1, self.updates // 10) :])
