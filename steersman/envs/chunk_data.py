"""Demonstrations cut into what a chunk policy learns from: observation windows and the chunks that followed."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from steersman.errors import InputError, require, require_count


def _leading(name: str, tree: PyTree) -> int:
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(tree)}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size:
        raise InputError(
            f"{name} must hold arrays with one common leading axis of at least 1, but it has {sizes or size}."
        )
    return size


def _on_device(tree: Any) -> Any:
    """Converter: NumPy arrays may be given."""
    return jax.tree.map(jnp.asarray, tree)


class ObservationData(eqx.Module):
    """Observations (or windows of them) to learn at, as distillation does, which needs no actions."""

    is_problem: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of observations ``N``."""

    @abc.abstractmethod
    def observation_batch(self, index: Int[Array, " B"]) -> PyTree:
        """The observations `index`."""


class Observations(ObservationData):
    """Observations that are given as such.

    Attributes:
        observation: leaves ``[N, ...]``.
    """

    observation: PyTree

    def __check_init__(self) -> None:
        _leading("observation", self.observation)

    @property
    def size(self) -> int:
        return _leading("observation", self.observation)

    def observation_batch(self, index: Int[Array, " B"]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[index], self.observation)


class ChunkData(ObservationData):
    """Pairs of an observation (or a window of them) and the chunk of actions that an expert followed it with."""

    def observation_batch(self, index: Int[Array, " B"]) -> PyTree:
        return self.batch(index)[0]

    @abc.abstractmethod
    def batch(self, index: Int[Array, " B"]) -> tuple[PyTree, Float[Array, "B H D"]]:
        """The observations and chunks of the pairs `index`."""

    @property
    @abc.abstractmethod
    def actions(self) -> Float[Array, "... D"]:
        """Every action once, for statistics."""

    @property
    @abc.abstractmethod
    def observations(self) -> PyTree:
        """Every observation once, for statistics."""

    @property
    def observation_horizon(self) -> int | None:
        """Length ``To`` of the windows; None where a pair has one observation without that axis."""
        return None


class ChunkPairs(ChunkData):
    """Pairs that are given as such.

    Attributes:
        observation: leaves ``[N, ...]``.
        chunk: ``[N, H, D]``.
    """

    observation: PyTree = eqx.field(converter=_on_device)
    chunk: Float[Array, "N H D"] = eqx.field(converter=_on_device)

    def __check_init__(self) -> None:
        size = _leading("observation", self.observation)
        require(
            self.chunk.ndim == 3 and self.chunk.shape[0] == size, "chunk.shape", self.chunk.shape, f"[{size}, H, D]"
        )

    @property
    def size(self) -> int:
        return self.chunk.shape[0]

    @property
    def actions(self) -> Float[Array, "N H D"]:
        return self.chunk

    @property
    def observations(self) -> PyTree:
        return self.observation

    def batch(self, index: Int[Array, " B"]) -> tuple[PyTree, Float[Array, "B H D"]]:
        return jax.tree.map(lambda leaf: leaf[index], self.observation), self.chunk[index]


class EpisodeChunks(ChunkData):
    """Every window and chunk of a set of episodes, cut when they are asked for.

    A chunk's first row is the action at the *oldest* observation of its window, as diffusion policy has it (Chi et al.,
    2023, arXiv:2303.04137): policies skip ``To - 1`` rows. Before an episode's start its first observation and action
    are repeated, after its end its last ones. Images may be bytes ``[S, H, W, C]``, which take a quarter of the memory:
    batches of them are floats ``[B, To, C, H, W]`` in [0, 1], as encoders take images.

    Attributes:
        observation: observations of all episodes, one after the other, leaves ``[S, ...]``.
        action: their actions ``[S, D]``.
        window: for each pair, which observations it sees ``[N, To]``.
        rows: for each pair, which actions are its chunk ``[N, H]``.
    """

    observation: PyTree
    action: Float[Array, "S D"]
    window: Int[Array, "N To"]
    rows: Int[Array, "N H"]

    @classmethod
    def cut(
        cls, episodes: Sequence[tuple[PyTree, Any]], *, horizon: int, observation_horizon: int = 1
    ) -> EpisodeChunks:
        """Cuts episodes.

        Args:
            episodes: ``(observations, actions)`` of each, with the leading axis of time; a last observation beyond the
                last action is left out.
            horizon: rows ``H`` of a chunk.
            observation_horizon: length ``To`` of the windows, at most `horizon`.

        Raises:
            InputError: no episodes, an empty one, or one whose observations and actions do not fit together.
        """
        require_count("horizon", horizon)
        require_count("observation_horizon", observation_horizon)
        require(
            observation_horizon <= horizon, "observation_horizon", observation_horizon, f"at most horizon, {horizon}"
        )
        require(len(episodes) > 0, "episodes", episodes, "at least one episode")
        observations, actions, windows, chunks, offset = [], [], [], [], 0
        for number, (seen, done) in enumerate(episodes):
            done = np.asarray(done)
            length = done.shape[0] if done.ndim == 2 else 0
            if length == 0:
                raise InputError(
                    f"episodes[{number}] has actions of shape {done.shape}, but they must be [T, D] with T >= 1."
                )
            seen_length = _leading(f"episodes[{number}]", seen)
            if seen_length not in (length, length + 1):
                raise InputError(
                    f"episodes[{number}] is ragged: {seen_length} observations but {length} actions; there must be as "
                    "many, or one observation more."
                )
            if actions and done.shape[1] != actions[0].shape[1]:
                raise InputError(
                    f"episodes[{number}] has actions of {done.shape[1]} dimensions, but the first has "
                    f"{actions[0].shape[1]}."
                )
            now = np.arange(length)[:, None]
            windows.append(offset + np.maximum(now + np.arange(1 - observation_horizon, 1), 0))
            ahead = now + np.arange(1 - observation_horizon, horizon + 1 - observation_horizon)
            chunks.append(offset + np.clip(ahead, 0, length - 1))
            observations.append(jax.tree.map(lambda leaf, length=length: np.asarray(leaf)[:length], seen))
            actions.append(done)
            offset += length
        return cls(
            jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *observations),
            jnp.asarray(np.concatenate(actions)),
            jnp.asarray(np.concatenate(windows), jnp.int32),
            jnp.asarray(np.concatenate(chunks), jnp.int32),
        )

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    @property
    def observation_horizon(self) -> int:
        return self.window.shape[1]

    @property
    def actions(self) -> Float[Array, "S D"]:
        return self.action

    @property
    def observations(self) -> PyTree:
        return self.observation

    def batch(self, index: Int[Array, " B"]) -> tuple[PyTree, Float[Array, "B H D"]]:
        window = self.window[index]

        def seen(leaf: Array) -> Array:
            if leaf.dtype == jnp.uint8 and leaf.ndim == 4:
                return jnp.moveaxis(leaf[window], -1, -3) / jnp.asarray(255.0, jnp.result_type(float))
            return leaf[window]

        return jax.tree.map(seen, self.observation), self.action[self.rows[index]]
