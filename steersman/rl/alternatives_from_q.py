"""Alternatives from a Q-network: more actions at the visited states, scored by regression on real returns."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from steersman.envs.spaces import Layout, layout
from steersman.errors import require, require_count, require_number
from steersman.networks import MLP
from steersman.policies import NetworkPolicy
from steersman.rl.alternatives import Alternatives, AlternativeSource, RewardScale
from steersman.training.experience import Experience
from steersman.training.minibatches import minibatch_epochs
from steersman.training.normalization import RunningMoments
from steersman.training.schedules import Continuous, scalar


class QState(eqx.Module):
    """What a Q-network source carries from batch to batch.

    Attributes:
        network: from features and action vector, standardized, to a standardized value.
        optimizer: state of its optimizer.
        inputs: running moments of what it reads.
        targets: running moments of what it is fitted to.
        action_layout: how an action becomes a vector.
        key: randomness of what follows.
    """

    network: MLP
    optimizer: PyTree
    inputs: RunningMoments
    targets: RunningMoments
    action_layout: Layout
    key: Key[Array, ""]


class QActions(AlternativeSource):
    """More actions at each visited state, scored by a Q-network (QMA).

    The network is fitted to the lambda-returns of the executed actions, ``A(s, a) = Q(s, a) - V(s)``. The baseline of
    :class:`~steersman.rl.alternatives_from_model.ModelActions`: it needs no model, and must tell from single returns
    what difference an action makes.

    Attributes:
        actions: samples for each visited state ``N``, the executed one among them. At 1 nothing is added or learned.
        hidden: widths of the network's hidden layers.
        activation: their nonlinearity.
        learning_rate: Adam's step size.
        epochs: passes over each batch.
        minibatches: equal parts of a pass.
    """

    actions: int = eqx.field(static=True, default=4)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(256, 256), converter=tuple)
    activation: str = eqx.field(static=True, default="swish")
    learning_rate: Continuous = scalar(1e-3)
    epochs: int = eqx.field(static=True, default=10)
    minibatches: int = eqx.field(static=True, default=8)

    def __check_init__(self) -> None:
        for name in ("actions", "epochs", "minibatches"):
            require_count(name, getattr(self, name))
        require_number("learning_rate", self.learning_rate, above=0.0)

    def init(self, problem: Any, actor: NetworkPolicy, key: Key[Array, ""]) -> PyTree:
        if self.actions == 1:
            return ()
        action_layout = layout(problem.action_space)
        size = actor.preprocess.size + action_layout.size
        network_key, key = jax.random.split(key)
        network: Any = MLP(size, 1, self.hidden, self.activation, output_gain=0.0, key=network_key)
        moments = RunningMoments.zeros((size,)), RunningMoments.zeros()
        return QState(network, self._optimizer().init(network), *moments, action_layout, key)

    @staticmethod
    def _optimizer() -> optax.GradientTransformation:
        return optax.flatten(optax.scale_by_adam())

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
        if self.actions == 1:
            return None, state, {}
        rows = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), batch)
        count, more = len(rows.advantage), self.actions - 1
        allowed = f"a divisor of the {count} rows of a batch"
        require(count % self.minibatches == 0, "alternatives.minibatches", self.minibatches, allowed)
        key, fit_key, draw_key = jax.random.split(state.key, 3)
        executed = self.sent(state, actor, rows.action)
        inputs = jnp.concatenate([rows.features.vector, executed], axis=-1)
        # The estimate that the batch's advantages are made of: the return that follows the executed action.
        target = rows.advantage + rows.value
        state = eqx.tree_at(
            lambda s: (s.inputs, s.targets), state, (state.inputs.update(inputs), state.targets.update(target))
        )
        state, loss = self.fit(state, inputs, target, fit_key)

        def beside(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf[:, None], (count, more, *leaf.shape[1:]))

        parameters = jax.tree.map(beside, rows.parameters)
        sample = actor.head.sample(parameters, draw_key)
        flat = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), sample)
        tried = self.sent(state, actor, flat).reshape(count, more, -1)
        q_value = self.q_value(state, jnp.concatenate([beside(rows.features.vector), tried], axis=-1))
        alternatives = Alternatives(
            action=sample,
            log_prob=actor.head.log_prob(parameters, sample),
            parameters=parameters,
            advantage=q_value - rows.value[:, None],
        )
        return alternatives, eqx.tree_at(lambda s: s.key, state, key), {"q_loss": loss}

    @staticmethod
    def sent(state: QState, actor: NetworkPolicy, sample: PyTree) -> Float[Array, "B m"]:
        """What the environment would be sent for samples ``[B, ...]``, as vectors."""
        return jax.vmap(state.action_layout)(actor.head.to_action(sample))

    @staticmethod
    def q_value(state: QState, inputs: Float[Array, "... size"]) -> Float[Array, "..."]:
        """The network's values, in the units of returns."""
        standardized = state.network(state.inputs.standardizer()(inputs))[..., 0]
        return state.targets.mean + jnp.sqrt(state.targets.variance) * standardized

    def fit(
        self, state: QState, inputs: Float[Array, "R size"], target: Float[Array, " R"], key: Key[Array, ""]
    ) -> tuple[QState, Float[Array, ""]]:
        """The state after some epochs on a batch, and the mean squared error in units of the targets' variance."""
        deviation = jnp.sqrt(state.targets.variance + 1e-8)
        wanted = (target - state.targets.mean) / deviation
        read = state.inputs.standardizer()(inputs)
        optimizer = self._optimizer()

        def error(network: MLP, rows: tuple[Array, Array]) -> Array:
            return jnp.mean((network(rows[0])[..., 0] - rows[1]) ** 2)

        def descend(running: tuple, rows: tuple[Array, Array]) -> tuple[tuple, None]:
            network, optimizer_state = running
            direction, optimizer_state = optimizer.update(jax.grad(error)(network, rows), optimizer_state)
            network = jax.tree.map(lambda p, d: p - self.learning_rate * d, network, direction)
            return (network, optimizer_state), None

        (network, optimizer_state), _ = minibatch_epochs(
            descend,
            (state.network, state.optimizer),
            (read, wanted),
            key,
            epochs=self.epochs,
            minibatches=self.minibatches,
        )
        state = eqx.tree_at(lambda s: (s.network, s.optimizer), state, (network, optimizer_state))
        return state, error(network, (read, wanted))
