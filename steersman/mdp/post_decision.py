"""Exact tables of environments with post-decision states: half-steps, values of both kinds of state, the whole MDP."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steersman.envs import Problem
from steersman.envs.spaces import layout
from steersman.errors import InputTypeError
from steersman.mdp.model import MDP


class PostDecisionTables(eqx.Module):
    """A finite problem as its two half-steps, ``X`` post-decision states between ``S`` states.

    Attributes:
        successor: ``f(s, a)`` as the number of a post-decision state ``[S, A]``.
        decision_reward: what the decision earns for certain ``[S, A]``.
        chance: ``P(s' | s^x)``, ``[X, S]``.
        random_reward: what chance earns on average ``[X]``.
        mdp: the problem as a whole.
        observation: what is observed in each state, as a vector ``[S, D]``.
        post_observation: what is observed in each post-decision state ``[X, D]``.
    """

    successor: Int[Array, "S A"]
    decision_reward: Float[Array, "S A"]
    chance: Float[Array, "X S"]
    random_reward: Float[Array, " X"]
    mdp: MDP
    observation: Float[Array, "S D"]
    post_observation: Float[Array, "X D"]

    def post_decision_value(self, value: Float[Array, " S"]) -> Float[Array, " X"]:
        """``V^x(s^x) = E[r_random + discount V(s')]``, the value of each post-decision state under state values."""
        return self.random_reward + self.mdp.discount * (self.chance @ value)

    def action_value(self, post_value: Float[Array, " X"]) -> Float[Array, "S A"]:
        """``Q(s, a) = r_decision(s, a) + V^x(f(s, a))``."""
        return self.decision_reward + post_value[self.successor]

    def index(self, observation: Float[Array, "... D"]) -> Int[Array, "..."]:
        """Numbers of the states that are observed so."""
        return _nearest(observation, self.observation)

    def post_index(self, observation: Float[Array, "... D"]) -> Int[Array, "..."]:
        """Numbers of the post-decision states that are observed so."""
        return _nearest(observation, self.post_observation)


def _nearest(rows: Array, known: Array) -> Array:
    # |x - k|^2 without the x^2 that all share: one product instead of a table of differences.
    known = known.astype(rows.dtype)
    return jnp.argmin(jnp.sum(known**2, axis=-1) - 2.0 * rows @ known.T, axis=-1)


def post_decision_tables(
    environment: Any, params: Any = None, *, discount: float, start: Any = None
) -> PostDecisionTables:
    """Enumerates a finite environment with post-decision states.

    Args:
        environment: a :class:`~steersman.envs.PostDecisionEnvironment` that also has ``states() -> [S, ...]``, every
            state (with its clock at zero); ``outcomes(params) -> (noise [W, ...], probability [W])``; and
            ``respond(post_state, noise, params) -> (state, random_reward)``, which its ``exogenous`` applies to a draw
            of the noise. States that are observed alike are taken as one; episodes do not terminate.
        params: its parameters; the default ones if None.
        discount: discount factor in ``[0, 1)``.
        start: distribution of the first state ``[S]``; uniform where none is given.

    Returns:
        The tables, in JAX's present precision: exact work wants ``with jax.enable_x64(True):``.

    Raises:
        InputTypeError: the environment lacks one of these methods, or its actions cannot be counted.
    """
    for method in ("post_decision", "observe", "states", "outcomes", "respond"):
        if not callable(getattr(environment, method, None)):
            raise InputTypeError(f"environment is a {type(environment).__name__}, but it must have a method {method}.")
    problem = Problem(environment, params)
    params = problem.params
    actions = _every_action(problem.action_space)
    vector = layout(problem.observation_space)

    def seen(state: Any) -> Array:
        return vector(environment.observe(state, params))

    states = environment.states()
    noise, probability = environment.outcomes(params)
    observation = np.asarray(jax.vmap(seen)(states), np.float64)

    def decide(state: Any, action: Array) -> tuple[Any, Array, Array]:
        post_state, reward = environment.post_decision(state, action, params)
        return post_state, reward, seen(post_state)

    over_actions = jax.vmap(decide, in_axes=(None, 0))
    post_states, decision_reward, post_seen = jax.jit(jax.vmap(over_actions, in_axes=(0, None)))(states, actions)
    pairs = decision_reward.shape
    post_seen = np.asarray(post_seen, np.float64).reshape(pairs[0] * pairs[1], -1)
    post_observation, first, successor = np.unique(post_seen, axis=0, return_index=True, return_inverse=True)
    post_states = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:]))[first], post_states)

    def follow(post_state: Any, noise: Array) -> tuple[Array, Array]:
        state, reward = environment.respond(post_state, noise, params)
        return reward, seen(state)

    over_noise = jax.vmap(follow, in_axes=(None, 0))
    random_reward, following = jax.jit(jax.vmap(over_noise, in_axes=(0, None)))(post_states, noise)
    following = np.asarray(following, np.float64)
    count, outcomes = following.shape[:2]
    number = {row.tobytes(): i for i, row in enumerate(observation)}
    reached = np.asarray([number[row.tobytes()] for row in following.reshape(count * outcomes, -1)])
    chance = np.zeros((count, len(observation)))
    places = (np.repeat(np.arange(count), outcomes), reached)
    np.add.at(chance, places, np.tile(np.asarray(probability), count))
    expected = np.asarray(random_reward, np.float64) @ np.asarray(probability)
    successor = successor.reshape(pairs)
    decision_reward = np.asarray(decision_reward, np.float64)
    mdp = MDP(chance[successor], decision_reward + expected[successor], discount, start)
    numbers = (decision_reward, chance, expected, observation, post_observation)
    decision_reward, chance, expected, observation, post_observation = (jnp.asarray(n, float) for n in numbers)
    return PostDecisionTables(
        jnp.asarray(successor), decision_reward, chance, expected, mdp, observation, post_observation
    )


def _every_action(space: Any) -> Int[Array, "A ..."]:
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return jnp.arange(int(space.start), int(space.start + space.n))
    if isinstance(space, spaces.MultiDiscrete) and len(space.shape) == 1:
        ranges = [np.arange(start, start + n) for start, n in zip(space.start, space.nvec, strict=True)]
        return jnp.asarray(np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, len(ranges)))
    raise InputTypeError(f"action space is {space}, but it must be Discrete or MultiDiscrete with one axis.")
