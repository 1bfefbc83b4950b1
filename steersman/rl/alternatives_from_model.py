"""Alternatives from a learned dynamics model: more actions at the visited states, or more states.

Nauman and Cygan, "On Many-Actions Policy Gradient", ICML 2023 (arXiv:2210.13011).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.envs.spaces import Layout, layout
from steersman.errors import InputError, InputTypeError, require_count
from steersman.policies import NetworkPolicy
from steersman.policies.preprocessing import Features
from steersman.rl.alternatives import Alternatives, AlternativeSource, RewardScale
from steersman.training.dynamics_model import (
    EnsembleLearner,
    ModelLearner,
    ModelRollout,
    TransitionModel,
    bootstrapped_return,
    rollout_model,
)
from steersman.training.experience import Experience
from steersman.training.replay import Replay, Transition, transitions


class ModelState(eqx.Module):
    """What a model-based source carries from batch to batch.

    Attributes:
        model: as fitted to the last batch and those before.
        replay: the transitions that it is fitted to, as vectors.
        action_layout: how an action becomes a vector.
        key: randomness of what follows.
    """

    model: TransitionModel
    replay: Replay
    action_layout: Layout
    key: Key[Array, ""]


class ModelBased(AlternativeSource):
    """What sources with a learned model share: transitions into a ring, the model fitted to it, rollouts under it.

    The model reads and predicts observations as vectors in their own units; the policy and the critic standardize
    those as they standardize real ones. It is told the action that the environment would be sent, within its bounds.

    Attributes:
        actions: samples for each visited state ``N``, the executed one among them. At 1 nothing is added or learned.
        horizon: steps of a rollout before the critic's value stands in ``H``.
        capacity: transitions that are kept for fitting.
        learner: the model, and how it is fitted.
    """

    actions: int = eqx.field(static=True, default=4)
    horizon: int = eqx.field(static=True, default=5)
    capacity: int = eqx.field(static=True, default=100_000)
    learner: ModelLearner = eqx.field(default_factory=EnsembleLearner)

    def __check_init__(self) -> None:
        for name in ("actions", "horizon", "capacity"):
            require_count(name, getattr(self, name))
        if not isinstance(self.learner, ModelLearner):
            raise InputTypeError(f"learner is {self.learner!r}, but it must be a ModelLearner such as EnsembleLearner.")

    def init(self, problem: Any, actor: NetworkPolicy, key: Key[Array, ""]) -> PyTree:
        if self.actions == 1:
            return ()
        if actor.preprocess.layout.allowed:
            raise InputError(
                "the observation space has an action_mask, but a model does not predict which actions are allowed."
            )
        action_layout = layout(problem.action_space)
        model_key, key = jax.random.split(key)
        model = self.learner.init(actor.preprocess.size, action_layout.size, model_key)
        seen, done, flag = jnp.zeros(actor.preprocess.size), jnp.zeros(action_layout.size), jnp.asarray(False)
        replay = Replay.zeros(Transition(seen, done, jnp.zeros(()), seen, flag, flag), self.capacity)
        return ModelState(model, replay, action_layout, key)

    def learn(
        self, state: ModelState, experience: Experience, actor: NetworkPolicy, key: Key[Array, ""]
    ) -> tuple[ModelState, Transition, dict[str, Array]]:
        """The state with a batch taken in, the batch as rows of vectors, and what the fit reports."""
        rows = transitions(experience)
        as_vector = jax.vmap(actor.preprocess.layout)
        rows = rows._replace(
            observation=as_vector(rows.observation),
            next_observation=as_vector(rows.next_observation),
            action=jax.vmap(state.action_layout)(rows.action),
        )
        replay = state.replay.add(rows)
        model, metrics = self.learner.fit(state.model, replay, key)
        return ModelState(model, replay, state.action_layout, state.key), rows, metrics

    def rollout(
        self,
        state: ModelState,
        actor: NetworkPolicy,
        observation: Float[Array, "B n"],
        sample: PyTree,
        horizon: int,
        key: Key[Array, ""],
    ) -> ModelRollout:
        """Rollouts from states and first samples; the memory in it are the samples, before bounds ``[H, B, ...]``."""

        def act(x: Array, _: PyTree, key: Array) -> tuple[Array, PyTree]:
            drawn = actor.head.sample(actor.from_features(features_of(actor, x), ())[0], key)
            return self.sent(state, actor, drawn), drawn

        first = self.sent(state, actor, sample)
        return rollout_model(state.model, act, observation, first, horizon, key, sample)

    @staticmethod
    def sent(state: ModelState, actor: NetworkPolicy, sample: PyTree) -> Float[Array, "B m"]:
        """What the environment would be sent for samples ``[B, ...]``, as vectors."""
        return jax.vmap(state.action_layout)(actor.head.to_action(sample))


def features_of(actor: NetworkPolicy, x: Float[Array, "... n"]) -> Features:
    """What actor and critic read of observation vectors in their own units."""
    standardize = actor.preprocess.standardize
    return Features(x if standardize is None else standardize(x))


class ModelActions(ModelBased):
    """More actions at each visited state, scored by short rollouts of a model (MBMA).

    ``A(s, a) = sum_{h<H} gamma^h r_h + gamma^H V(x_H) - V(s)`` with ``x_0 = s``, ``u_0 = a`` and later actions from the
    policy. The executed action keeps its estimate from real rewards. States are real, so only the model's error over
    ``H`` steps and the critic's bias the gradient.
    """

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
        key, fit_key, draw_key, rollout_key = jax.random.split(state.key, 4)
        state, rows, metrics = self.learn(state, experience, actor, fit_key)
        count, more = len(rows.reward), self.actions - 1

        def beside(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf[:, None], (count, more, *leaf.shape[1:]))

        def flat(leaf: Array) -> Array:
            return leaf.reshape((-1, *leaf.shape[2:]))

        parameters = jax.tree.map(lambda leaf: beside(flat(leaf)), batch.parameters)
        sample = actor.head.sample(parameters, draw_key)
        start = flat(beside(rows.observation))
        rollout = self.rollout(state, actor, start, jax.tree.map(flat, sample), self.horizon, rollout_key)
        last = algorithm.critic.value(critic, features_of(actor, rollout.observation[-1]).vector)
        q_value = bootstrapped_return(rollout._replace(reward=scale(rollout.reward)), last, algorithm.gamma)
        alternatives = Alternatives(
            action=sample,
            log_prob=actor.head.log_prob(parameters, sample),
            parameters=parameters,
            advantage=q_value.reshape(count, more) - flat(batch.value)[:, None],
        )
        metrics["model_clipped_share"] = rollout.clipped_share
        return alternatives, eqx.tree_at(lambda s: s.key, state, key), metrics


class ModelStates(ModelBased):
    """More states: the model carries on from each visited state, one action at each (MB-SPG).

    From every real state and its executed action a chain of ``N - 1`` simulated states follows; each has an action of
    the policy and the advantage of :class:`ModelActions` from the next ``H`` steps of the chain. Besides through
    values, the gradient is biased by states that the environment would not have visited so often.
    """

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
        key, fit_key, rollout_key = jax.random.split(state.key, 3)
        state, rows, metrics = self.learn(state, experience, actor, fit_key)
        more = self.actions - 1
        executed = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), batch.action)
        chain = self.rollout(state, actor, rows.observation, executed, more + self.horizon, rollout_key)
        chain = chain._replace(reward=scale(chain.reward))
        features = features_of(actor, chain.observation[1:])
        values = algorithm.critic.value(critic, features.vector)

        def advantage(k: int) -> Array:
            """Of the chain's state ``k``, weighted by the probability that it is reached before the task ends."""
            steps, states = slice(k, k + self.horizon), slice(k, k + self.horizon + 1)
            part = chain._replace(reward=chain.reward[steps], alive=chain.alive[states])
            q_value = bootstrapped_return(part, values[k + self.horizon - 1], algorithm.gamma)
            return q_value - chain.alive[k] * values[k - 1]

        def first(leaf: Array) -> Array:
            return jnp.swapaxes(leaf[:more], 0, 1)

        own = Features(first(features.vector))
        parameters = actor.from_features(own, ())[0]
        sample = jax.tree.map(lambda leaf: first(leaf[1:]), chain.carry)
        alternatives = Alternatives(
            action=sample,
            log_prob=actor.head.log_prob(parameters, sample),
            parameters=parameters,
            advantage=jnp.stack([advantage(k) for k in range(1, self.actions)], axis=1),
            features=own,
        )
        metrics["model_clipped_share"] = chain.clipped_share
        return alternatives, eqx.tree_at(lambda s: s.key, state, key), metrics
