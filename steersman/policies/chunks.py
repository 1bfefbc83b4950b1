"""Policies that plan several actions at once and play them out before they plan again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from steersman.envs.spaces import as_gymnasium_space
from steersman.errors import InputError, require_count
from steersman.policies.policy import Policy, zero_element
from steersman.policies.windows import Seen, Window


class ChunkCarry(eqx.Module):
    """The memory of a :class:`ChunkPolicy`.

    Attributes:
        queue: the rows being played out ``[action_horizon, ...]``.
        played: how many of them have been; ``action_horizon`` where the next call must plan.
        seen: the window of observations.
    """

    queue: PyTree
    played: Int[Array, ""]
    seen: Seen


def _is_observation(given: Any) -> bool:
    leaves = jax.tree.leaves(given)
    return bool(leaves) and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)


class ChunkPolicy(Policy):
    """Plays out `action_horizon` rows of a generated chunk, then asks the generator again.

    The receding-horizon execution of diffusion policies (Chi et al., 2023, arXiv:2303.04137) and of action chunking
    (Zhao et al., 2023, arXiv:2304.13705). The queue is in the carry. Under ``vmap`` copies may be at different rows of
    their chunks, so the generator then runs at every step and its result is used only where it is due.

    Attributes:
        generator: an ``equinox.Module`` called with ``(observation, key)``, or with ``(history, key)`` where
            `observation_horizon` is set; returns a chunk, a PyTree of actions with a leading axis of ``H`` rows.
        blank: an all-zero observation, which gives the memory its shapes.
        action_horizon: rows played out of each chunk.
        observation_horizon: length of the history that the generator reads, or None for the newest observation alone.
            Before an episode has as many, its first observation stands in for the missing ones.
        first_row: rows skipped at each chunk's start. A diffusion policy whose chunks begin at the oldest observation
            skips ``observation_horizon - 1``.
    """

    generator: Callable[[PyTree, Key[Array, ""]], PyTree]
    blank: PyTree
    action_horizon: int = eqx.field(static=True)
    observation_horizon: int | None = eqx.field(static=True)
    first_row: int = eqx.field(static=True)

    def __init__(
        self,
        generator: Callable[[PyTree, Key[Array, ""]], PyTree],
        action_horizon: int,
        observation_space: Any,
        *,
        observation_horizon: int | None = None,
        first_row: int = 0,
    ):
        """Checks the generator against the space, without running it.

        Args:
            generator: makes chunks.
            action_horizon: rows played out of each chunk.
            observation_space: the Gymnasium or gymnax space of one observation, or an observation like all others.
            observation_horizon: length of the history, or None for none.
            first_row: rows skipped at each chunk's start.

        Raises:
            InputError: the generator's chunks have fewer than ``first_row + action_horizon`` rows.
        """
        require_count("action_horizon", action_horizon)
        require_count("first_row", first_row, minimum=0)
        if observation_horizon is not None:
            require_count("observation_horizon", observation_horizon)
        self.generator = generator
        if _is_observation(observation_space):
            self.blank = jax.tree.map(jnp.zeros_like, observation_space)
        else:
            self.blank = zero_element(as_gymnasium_space(observation_space))
        self.action_horizon = action_horizon
        self.observation_horizon = observation_horizon
        self.first_row = first_row
        for leaf in jax.tree.leaves(self._chunk_shapes()):
            rows = leaf.shape[0] if leaf.shape else 0
            if rows < first_row + action_horizon:
                raise InputError(
                    f"action_horizon is {action_horizon} from first_row {first_row}, but the generator's chunks have "
                    f"only {rows} rows."
                )

    def window(self, lookback: int = 0) -> Window:
        """What the generator reads, and what it read `lookback` steps ago."""
        return Window(self.blank, self.observation_horizon, lookback)

    def _chunk_shapes(self) -> PyTree:
        window = self.window()
        read = window.now(window.init())
        return jax.eval_shape(lambda seen, key: self.generator(seen, key), read, jax.random.key(0))

    def init(self, key: Key[Array, ""]) -> ChunkCarry:
        del key
        rows = self.action_horizon
        queue = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), self._chunk_shapes())
        return ChunkCarry(queue, jnp.asarray(rows, jnp.int32), self.window().init())

    def __call__(self, observation: PyTree, carry: ChunkCarry, key: Key[Array, ""]) -> tuple[PyTree, ChunkCarry]:
        window = self.window()
        seen = window.push(carry.seen, observation)
        read = window.now(seen)
        rows = slice(self.first_row, self.first_row + self.action_horizon)

        def plan() -> tuple[PyTree, Array]:
            chunk = self.generator(read, key)
            queue = jax.tree.map(lambda new, old: new[rows].astype(old.dtype), chunk, carry.queue)
            return queue, jnp.zeros_like(carry.played)

        def keep() -> tuple[PyTree, Array]:
            return carry.queue, carry.played

        queue, played = jax.lax.cond(carry.played >= self.action_horizon, plan, keep)
        action = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, played, keepdims=False), queue)
        return action, ChunkCarry(queue, played + 1, seen)

    def mode(self) -> Policy:
        """With the generator's own ``mode()`` inside, where it has one."""
        mode = getattr(self.generator, "mode", None)
        return self if mode is None else eqx.tree_at(lambda policy: policy.generator, self, mode())
