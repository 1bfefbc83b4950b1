"""Chunks and what they led to: data for offline reinforcement learning on decisions of several actions each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from steersman.envs.chunk_data import ChunkPairs
from steersman.errors import InputError, require, require_count


class ChunkTransitions(ChunkPairs):
    """Pairs of observation and chunk, with what was earned and seen once the chunk had been played.

    Attributes:
        observation: leaves ``[N, ...]``, with an axis of `window` observations after the first where that is given.
        chunk: ``[N, H, D]``, in the task's units.
        reward: sum over the actions that were played ``[N]``.
        next_observation: after the last of these, like `observation`.
        terminated: whether the task ended with the chunk ``[N]``.
        truncated: whether the episode was cut there for another reason ``[N]``.
        first: whether the chunk was its episode's first ``[N]``.
        rows: actions of a chunk that are played; all that follow the window's past where None.
        window: observations in a window, whose oldest is where the chunk's first row belongs; None for plain ones.
    """

    reward: Float[Array, " N"]
    next_observation: PyTree
    terminated: Bool[Array, " N"]
    truncated: Bool[Array, " N"]
    first: Bool[Array, " N"]
    rows: int | None = eqx.field(static=True, default=None)
    window: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        size = self.chunk.shape[0]
        for name in ("reward", "terminated", "truncated", "first"):
            shape = jnp.shape(getattr(self, name))
            require(shape == (size,), f"{name}.shape", shape, f"[{size}], one for each chunk")
        shapes = [jax.tree.map(jnp.shape, part) for part in (self.observation, self.next_observation)]
        require(shapes[0] == shapes[1], "next_observation's shapes", shapes[1], f"those of observation, {shapes[0]}")
        if self.rows is not None:
            require_count("rows", self.rows)
            available = self.chunk.shape[1] - self.first_row
            require(self.rows <= available, "rows", self.rows, f"at most {available}, the rows from now on")
        for name in ("observation", "chunk", "reward", "next_observation"):
            for leaf in jax.tree.leaves(getattr(self, name)):
                known = not isinstance(leaf, Tracer) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
                if known and not np.isfinite(np.asarray(leaf)).all():
                    raise InputError(f"{name} has NaN or infinity, but all of it must be finite.")

    @property
    def observation_horizon(self) -> int | None:
        return self.window

    @property
    def first_row(self) -> int:
        """Rows of a chunk that belong to the window's past."""
        return (self.window or 1) - 1

    @property
    def played_rows(self) -> int:
        """How many rows of a chunk are played."""
        return self.chunk.shape[1] - self.first_row if self.rows is None else self.rows

    def select(self, index: Int[Array, " B"] | np.ndarray) -> ChunkTransitions:
        """Some of the rows."""
        return cast(ChunkTransitions, jax.tree.map(lambda leaf: leaf[index], self))

    @classmethod
    def join(cls, *parts: ChunkTransitions) -> ChunkTransitions:
        """All rows of several data sets with one kind of decision.

        Raises:
            InputError: none are given, or they differ in the shapes of their chunks, windows or played rows.
        """
        require(len(parts) > 0, "parts", parts, "at least one data set")
        kinds = [(part.chunk.shape[1:], part.window, part.played_rows) for part in parts]
        if len(set(kinds)) > 1:
            raise InputError(f"parts have chunks, windows and played rows {kinds}, but they must be the same in all.")
        alike = [dataclasses.replace(part, rows=part.played_rows) for part in parts]
        return cast(ChunkTransitions, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alike))

    @classmethod
    def cut(
        cls,
        episodes: Sequence[tuple[PyTree, Any, Any, bool]],
        *,
        horizon: int,
        rows: int | None = None,
        observation_horizon: int | None = None,
    ) -> ChunkTransitions:
        """The chunk that starts at every step of every episode, of which `rows` actions are played.

        Windows and chunks are padded as in :class:`~steersman.envs.chunk_data.EpisodeChunks`; the windows of all steps
        are kept in memory.

        Args:
            episodes: ``(observations [T + 1, ...], actions [T, D], rewards [T], terminated)`` of each; the last says
                whether the task ended there, or the episode was cut.
            horizon: rows ``H`` of a chunk.
            rows: see the class.
            observation_horizon: length of the windows; None for plain observations.

        Raises:
            InputError: no episodes, or one whose parts do not fit together.
        """
        require_count("horizon", horizon)
        past = 0
        if observation_horizon is not None:
            require_count("observation_horizon", observation_horizon)
            past = observation_horizon - 1
        played = horizon - past if rows is None else rows
        require(1 <= played <= horizon - past, "rows", rows, f"1 to {horizon - past}, the rows from now on")
        require(len(episodes) > 0, "episodes", episodes, "at least one episode")
        parts = []
        for number, (seen, action, reward, ended) in enumerate(episodes):
            action, reward = np.asarray(action), np.asarray(reward)
            length = action.shape[0] if action.ndim == 2 else 0
            lengths = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(seen)}
            if length == 0 or reward.shape != (length,) or lengths != {length + 1}:
                raise InputError(
                    f"episodes[{number}] has {sorted(lengths)} observations, actions of shape {action.shape} and "
                    f"rewards of shape {reward.shape}, but they must be [T + 1, ...], [T, D] and [T]."
                )
            now = np.arange(length)
            after = np.minimum(now + played, length)
            chunk = action[np.clip(now[:, None] + np.arange(-past, horizon - past), 0, length - 1)]
            total = np.concatenate([np.zeros(1, reward.dtype), np.cumsum(reward)])

            def looked(at: np.ndarray, seen: PyTree = seen) -> PyTree:
                if observation_horizon is not None:
                    at = np.maximum(at[:, None] + np.arange(-past, 1), 0)
                return jax.tree.map(lambda whole, at=at: jnp.asarray(np.asarray(whole)[at]), seen)

            final = after == length
            parts.append(
                cls(
                    observation=looked(now),
                    chunk=jnp.asarray(chunk),
                    reward=jnp.asarray(total[after] - total[now], jnp.result_type(float)),
                    next_observation=looked(after),
                    terminated=jnp.asarray(final & bool(ended)),
                    truncated=jnp.asarray(final & (not ended)),
                    first=jnp.asarray(now == 0),
                    rows=rows,
                    window=observation_horizon,
                )
            )
        return cls.join(*parts)
