"""Policies around any policy: disturbed observations, filtered observations, filtered actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from gymnasium import spaces
from jax.core import Tracer
from jaxtyping import Array, Key, PyTree

from steersman.envs.spaces import as_gymnasium_space
from steersman.errors import InputTypeError, require, require_number
from steersman.policies.policy import Policy, Wrapper


def _as_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


class ObservationNoise(Wrapper):
    """Adds Gaussian noise to what the inner policy sees: a robustness test, or a sensor model.

    Noise goes to floating-point leaves; whole numbers, booleans and an ``"action_mask"`` pass unchanged. It is a
    disturbance and not exploration, so :meth:`mode` keeps it.

    Attributes:
        policy: the policy inside.
        standard_deviation: in the observation's units. One number for everything, or a PyTree whose leaves stand for
            the parts of the observation below them and broadcast against those.
    """

    policy: Policy
    standard_deviation: PyTree = eqx.field(converter=_as_arrays)

    def __check_init__(self) -> None:
        for leaf in jax.tree.leaves(self.standard_deviation):
            require_number("standard_deviation", leaf, at_least=0.0)

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, PyTree]:
        noise_key, policy_key = jax.random.split(key)
        leaves, structure = jax.tree_util.tree_flatten_with_path(observation)
        spreads = jax.tree.leaves(jax.tree.broadcast(self.standard_deviation, observation))
        keys = jax.random.split(noise_key, max(len(leaves), 1))
        noisy = []
        for (path, leaf), spread, leaf_key in zip(leaves, spreads, keys, strict=False):
            is_mask = any(getattr(part, "key", None) == "action_mask" for part in path)
            value = jnp.asarray(leaf)
            if not is_mask and jnp.issubdtype(value.dtype, jnp.floating):
                noise = jax.random.normal(leaf_key, value.shape, value.dtype)
                value = value + spread.astype(value.dtype) * noise
            noisy.append(value)
        return self.policy.act(jax.tree.unflatten(structure, noisy), carry, policy_key)


class ObservationFilter(Wrapper):
    """Changes what the inner policy sees: a mask on sensors, a change of coordinates, a selection.

    Attributes:
        policy: the policy inside.
        filter: an ``equinox.Module`` called with the observation, returning the one that the inner policy gets.
    """

    policy: Policy
    filter: Callable[[PyTree], PyTree]

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, PyTree]:
        return self.policy.act(self.filter(observation), carry, key)


class ActionFilter(Wrapper):
    """Changes what the inner policy sends: clipping, limits on rates, safety filters.

    The inner policy's record is kept, so likelihoods stay those of the action before the filter.

    Attributes:
        policy: the policy inside.
        filter: an ``equinox.Module`` called with ``(observation, action)``, returning the action to send.
    """

    policy: Policy
    filter: Callable[[PyTree, PyTree], PyTree]

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, PyTree]:
        action, carry, record = self.policy.act(observation, carry, key)
        return self.filter(observation, action), carry, record


class ClipToBox(eqx.Module):
    """An action filter: the nearest action within bounds, element by element.

    Attributes:
        low: lower bounds, broadcast against the action; a PyTree where actions are one.
        high: upper bounds, likewise.
    """

    low: PyTree = eqx.field(converter=_as_arrays)
    high: PyTree = eqx.field(converter=_as_arrays)

    def __check_init__(self) -> None:
        structures = jax.tree.structure(self.low), jax.tree.structure(self.high)
        require(structures[0] == structures[1], "high", self.high, "a PyTree of the same structure as low")
        for low, high in zip(jax.tree.leaves(self.low), jax.tree.leaves(self.high), strict=True):
            if not isinstance(low, Tracer) and not isinstance(high, Tracer):
                require(bool(jnp.all(low <= high)), "low and high", (low.tolist(), high.tolist()), "low <= high")

    @classmethod
    def from_space(cls, space: gymnasium.Space | Any) -> ClipToBox:
        """The bounds of a Box, or of a Dict or Tuple of them.

        Raises:
            InputTypeError: a part of the space has no bounds to clip to.
        """
        space = as_gymnasium_space(space)
        return cls(_bounds(space, "low"), _bounds(space, "high"))

    def __call__(self, observation: PyTree, action: PyTree) -> PyTree:
        """The clipped action, in its own dtype."""
        del observation

        def clip(value: Any, low: Array, high: Array) -> Array:
            value = jnp.asarray(value)
            return jnp.clip(value, low.astype(value.dtype), high.astype(value.dtype))

        return jax.tree.map(clip, action, self.low, self.high)


def _bounds(space: gymnasium.Space, side: str) -> PyTree:
    if isinstance(space, spaces.Box):
        return getattr(space, side)
    if isinstance(space, spaces.Dict):
        return {name: _bounds(part, side) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_bounds(part, side) for part in space.spaces)
    raise InputTypeError(f"space is a {type(space).__name__}, but only a Box (or a Dict or Tuple of them) has bounds.")
