"""Replay: a ring of transitions that learning from old experience draws from."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.errors import InputError, require, require_count
from steersman.training.experience import Experience


class Transition(NamedTuple):
    """One step of one environment, or rows of them.

    Attributes:
        observation: what was observed before acting.
        action: what was sent to the environment.
        reward: what was earned; with a trailing axis for several objectives or agents.
        next_observation: what was observed after the step and before any restart.
        terminated: the task ended here: nothing is earned afterwards.
        truncated: the episode was cut here for another reason. The transition is as good as any other.
        side: what else is known of the step (the environment's true parameters, costs); empty by default.
    """

    observation: PyTree
    action: PyTree
    reward: Float[Array, "..."]
    next_observation: PyTree
    terminated: Bool[Array, "..."]
    truncated: Bool[Array, "..."]
    side: PyTree = ()


def transitions(experience: Experience, side: PyTree = ()) -> Transition:
    """The transitions of a batch of rollouts, as rows ``[T N, ...]``.

    None of them leads across an episode's end, because an experience keeps what was observed before the restart.

    Args:
        experience: rollouts ``[T, N]``.
        side: what is kept beside each transition, leaves ``[T, N, ...]``.

    Raises:
        InputError: `next_observation` holds the first observations of the following episodes, which is seen where
            arrays are known and observations are floats.
    """
    if not _traced(experience):
        _require_whole_episodes(experience)
    rows = Transition(
        experience.observation,
        experience.action,
        experience.reward,
        experience.next_observation,
        experience.terminated,
        experience.truncated,
        side,
    )
    leading = experience.truncated.ndim
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[leading:])), rows)


def _traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _require_whole_episodes(experience: Experience) -> None:
    """Refuses experience whose final observations were overwritten by a restart."""
    truncated = np.asarray(experience.truncated)
    ended = np.asarray(experience.terminated).reshape((*truncated.shape, -1)).any(axis=-1) | truncated
    ended = ended[:-1]
    following = jax.tree.map(lambda leaf: np.asarray(leaf)[1:], experience.observation)
    recorded = jax.tree.map(lambda leaf: np.asarray(leaf)[:-1], experience.next_observation)
    pairs = [
        (first, last)
        for first, last in zip(jax.tree.leaves(following), jax.tree.leaves(recorded), strict=True)
        # Whole numbers may repeat by chance, and an observation that never changes says nothing.
        if np.issubdtype(first.dtype, np.floating) and first.size and np.ptp(first) > 0
    ]
    if not ended.any() or not pairs:
        return
    restarted = all(np.array_equal(first[ended], last[ended]) for first, last in pairs)
    require(
        not restarted,
        "next_observation",
        "the next episode's first observation wherever an episode ended",
        "what was observed before the restart (info['final_observation'])",
    )


class Replay(eqx.Module):
    """A ring of rows: the newest overwrite the oldest once it is full.

    A row is any PyTree, usually a :class:`Transition`. Everything runs inside ``jit``; the shapes never change.

    Attributes:
        rows: what is stored, leaves ``[C, ...]``; zeros where nothing has been.
        position: where the next row goes.
        size: how many rows are stored; they fill the first places.
    """

    rows: PyTree
    position: Int[Array, ""]
    size: Int[Array, ""]

    @classmethod
    def zeros(cls, row: PyTree, capacity: int) -> Replay:
        """An empty ring.

        Args:
            row: one row, or its shapes: arrays or ``jax.ShapeDtypeStruct``.
            capacity: rows that it holds, ``C``.
        """
        require_count("capacity", capacity)

        def blank(leaf: Any) -> Array:
            leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
            return jnp.zeros((capacity, *leaf.shape), leaf.dtype)

        return cls(jax.tree.map(blank, row), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    @classmethod
    def of(cls, rows: PyTree) -> Replay:
        """A full ring of given rows, leaves ``[C, ...]``: a fixed dataset."""
        count = _count(rows)
        require_count("rows", count)
        return cls(jax.tree.map(jnp.asarray, rows), jnp.zeros((), jnp.int32), jnp.asarray(count, jnp.int32))

    @property
    def capacity(self) -> int:
        """How many rows it holds at most."""
        return _count(self.rows)

    @property
    def valid(self) -> Bool[Array, " C"]:
        """Which places hold a row."""
        return jnp.arange(self.capacity) < self.size

    def add(self, rows: PyTree, keep: Bool[Array, " B"] | None = None) -> Replay:
        """The ring with rows added, in their order; of more than it holds, the last.

        Args:
            rows: leaves ``[B, ...]``.
            keep: which of them to add; all unless given.

        Raises:
            InputError: the rows differ from those stored in structure or shape.
        """
        self._require_alike(rows)
        count, capacity = _count(rows), self.capacity
        if keep is None:
            if count > capacity:
                rows = jax.tree.map(lambda leaf: leaf[-capacity:], rows)
            # Where a row goes does not depend on how many came before it, so that what is dropped leaves no trace.
            place = (self.position + jnp.arange(max(0, count - capacity), count)) % capacity
            added = jnp.asarray(count, jnp.int32)
        else:
            require(keep.shape == (count,), "keep's shape", keep.shape, f"({count},), one flag for each row")
            rank = jnp.cumsum(keep) - 1
            added = jnp.sum(keep, dtype=jnp.int32)
            written = keep & (rank >= added - capacity)
            place = jnp.where(written, (self.position + rank) % capacity, capacity)

        def write(stored: Array, new: Array) -> Array:
            return stored.at[place].set(new.astype(stored.dtype), mode="drop", unique_indices=keep is None)

        return Replay(
            jax.tree.map(write, self.rows, rows),
            (self.position + added) % capacity,
            jnp.minimum(self.size + added, capacity),
        )

    def sample(self, key: Key[Array, ""], count: int) -> PyTree:
        """Rows drawn uniformly with replacement, leaves ``[count, ...]``.

        Inside ``jit`` an empty ring gives rows of zeros; :attr:`size` says so.

        Raises:
            InputError: the ring is known to be empty.
        """
        require_count("count", count)
        self.require_rows()
        place = jax.random.randint(key, (count,), 0, jnp.maximum(self.size, 1))
        return jax.tree.map(lambda leaf: jnp.take(leaf, place, axis=0, mode="clip"), self.rows)

    def require_rows(self, minimum: int = 1) -> None:
        """Raises :class:`InputError` where it is known that fewer than `minimum` rows are stored."""
        if not isinstance(self.size, Tracer):
            require(int(self.size) >= minimum, "replay's size", int(self.size), f"at least {minimum}: add rows first")

    def _require_alike(self, rows: PyTree) -> None:
        expected, given = jax.tree.structure(self.rows), jax.tree.structure(rows)
        require(expected == given, "rows", given, f"of the structure that is stored, {expected}")
        for stored, new in zip(jax.tree.leaves(self.rows), jax.tree.leaves(rows), strict=True):
            if stored.shape[1:] != new.shape[1:]:
                raise InputError(
                    f"rows has a leaf of shape {new.shape[1:]} per row, but it must be {stored.shape[1:]} as stored."
                )


def _count(rows: PyTree) -> int:
    leaves = jax.tree.leaves(rows)
    require(len(leaves) > 0, "rows", rows, "a PyTree with at least one array")
    counts = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    require(len(counts) == 1, "numbers of rows in rows", sorted(counts), "equal")
    return int(counts.pop())
