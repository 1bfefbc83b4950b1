"""Contextual bandits: one decision an episode, so that everything about a policy can be computed exactly."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.envs.environment import Environment
from steersman.errors import require_count, require_number


class Bandit(Environment):
    """A context is drawn, one action is taken, one reward is paid, and the episode ends.

    The state is the context. A subclass says where contexts come from, what is observed of them, and what is paid;
    contexts and actions may be discrete or continuous.
    """

    @abc.abstractmethod
    def draw_context(self, key: Key[Array, ""], params: PyTree) -> PyTree:
        """A fresh context."""

    @abc.abstractmethod
    def draw_reward(self, key: Key[Array, ""], context: PyTree, action: PyTree, params: PyTree) -> Float[Array, ""]:
        """The reward of an action in a context, noise included."""

    def observe(self, context: PyTree, params: PyTree) -> PyTree:
        """What is seen of a context: all of it, unless a subclass says otherwise."""
        del params
        return context

    def reset_env(self, key: Key[Array, ""], params: PyTree) -> tuple[PyTree, PyTree]:
        context = self.draw_context(key, params)
        return self.observe(context, params), context

    def step_env(
        self, key: Key[Array, ""], state: PyTree, action: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        reward = self.draw_reward(key, state, action, params)
        return self.observe(state, params), state, reward, jnp.asarray(True), {}


class BanditTable(eqx.Module):
    """Parameters of a :class:`ContextualBandit`.

    Attributes:
        mean_reward: of every action in every context ``[C, A]``.
        noise: standard deviation of the Gaussian noise on every reward.
    """

    mean_reward: Float[Array, "C A"] = eqx.field(converter=jnp.asarray)
    noise: Float[Array, ""] = eqx.field(converter=lambda x: jnp.asarray(x, jnp.result_type(float)), default=0.0)

    def __check_init__(self) -> None:
        require_number("mean_reward", self.mean_reward)
        require_number("noise", self.noise, at_least=0.0)


class ContextualBandit(Bandit):
    """Finitely many contexts, equally likely, and finitely many actions with Gaussian rewards.

    Both spaces are those of the parameters, a :class:`BanditTable`; the fields say how the default one is drawn, with
    mean rewards from a standard normal. Another table is given as ``Problem(ContextualBandit(), BanditTable(...))``.

    Attributes:
        contexts: number of contexts ``C``.
        actions: number of actions ``A``.
        noise: standard deviation of a reward around its mean.
        seed: which table is drawn.
    """

    contexts: int = eqx.field(static=True, default=16)
    actions: int = eqx.field(static=True, default=4)
    noise: float = eqx.field(static=True, default=0.5)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        require_count("contexts", self.contexts)
        require_count("actions", self.actions)
        require_number("noise", self.noise, at_least=0.0)
        require_count("seed", self.seed, minimum=0)

    @property
    def name(self) -> str:
        return "contextual-bandit"

    @property
    def default_params(self) -> BanditTable:
        return BanditTable(jax.random.normal(jax.random.key(self.seed), (self.contexts, self.actions)), self.noise)

    def observation_space(self, params: BanditTable) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(params.mean_reward.shape[0])

    def action_space(self, params: BanditTable) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(params.mean_reward.shape[1])

    def draw_context(self, key: Key[Array, ""], params: BanditTable) -> Int[Array, ""]:
        return jax.random.randint(key, (), 0, params.mean_reward.shape[0])

    def draw_reward(
        self, key: Key[Array, ""], context: Int[Array, ""], action: Int[Array, ""], params: BanditTable
    ) -> Float[Array, ""]:
        mean = params.mean_reward[context, action]
        return mean + params.noise.astype(mean.dtype) * jax.random.normal(key, dtype=mean.dtype)


def expected_reward(probability: Float[Array, "*batch C A"], table: BanditTable) -> Float[Array, "*batch"]:
    """Exact expected reward of policies given as tables of action probabilities."""
    return jnp.mean(jnp.sum(probability * table.mean_reward, axis=-1), axis=-1)


def bandit_progress(probability: Float[Array, "*batch C A"], table: BanditTable) -> Float[Array, "*batch"]:
    """How far policies are from the uniform one (0) to the best one (1) in expected reward, exactly."""
    uniform = jnp.mean(table.mean_reward)
    best = jnp.mean(jnp.max(table.mean_reward, axis=-1))
    return (expected_reward(probability, table) - uniform) / (best - uniform)
