"""Recorded episodes: what an expert saw and did, with rewards and ends, whatever file they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import gymnasium
import jax
import numpy as np
from gymnasium.envs.registration import EnvSpec
from jaxtyping import Bool, Float, PyTree

from steersman.envs.chunk_data import EpisodeChunks
from steersman.envs.chunk_transitions import ChunkTransitions
from steersman.errors import InputError, InputTypeError, require, require_number

#: Channels that an image may have: grey, colour, colour with opacity.
CHANNELS = (1, 3, 4)


def named_leaves(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The arrays of a PyTree, each with its place: ``name['camera']``."""
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def is_image(values: np.ndarray) -> bool:
    """Whether an entry with a leading axis of time holds images: it has three axes a frame."""
    return values.ndim == 4


def check_image(name: str, values: np.ndarray) -> None:
    """Checks that images are bytes ``[T, H, W, C]`` or floats ``[T, C, H, W]`` in [0, 1].

    Args:
        name: what the error calls them.
        values: the images of an episode.

    Raises:
        InputError: another layout, or floats beyond [0, 1].
        InputTypeError: another dtype.
    """
    allowed = "images must be bytes [T, H, W, C] or floats [T, C, H, W] in [0, 1]"
    if values.dtype != np.uint8 and not np.issubdtype(values.dtype, np.floating):
        raise InputTypeError(f"{name} has dtype {values.dtype}, but {allowed}.")
    channels = values.shape[-1] if values.dtype == np.uint8 else values.shape[1]
    if channels not in CHANNELS:
        kind = "bytes" if values.dtype == np.uint8 else "floats"
        raise InputError(f"{name} has {kind} of shape {values.shape}, but {allowed}, with C one of {CHANNELS}.")
    if values.dtype != np.uint8:
        low, high = float(np.min(values)), float(np.max(values))
        if not (low >= 0.0 and high <= 1.0):
            raise InputError(f"{name} has values from {low:g} to {high:g}, but {allowed}.")


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise InputTypeError(f"{name} has dtype {array.dtype}, but it must hold numbers.")
    return array


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One recorded episode of ``T`` actions, as NumPy arrays.

    Attributes:
        observation: leaves ``[T, ...]``, what was seen before each action, or ``[T + 1, ...]`` with what was seen after
            the last. Images are bytes ``[T, H, W, C]`` or floats ``[T, C, H, W]`` in [0, 1].
        action: ``[T, D]``; ``[T]`` for discrete ones; a PyTree of such.
        reward: after each action ``[T]``; None where none was recorded.
        terminated: whether the task ended with each action ``[T]``; never where None is given.
        truncated: whether the episode was cut there ``[T]``; at its last action where None is given and it did not
            terminate.
        success: whether the task was accomplished after each action ``[T]``; None where that was not recorded.
        task: what the expert was asked to do, in words.
    """

    observation: PyTree
    action: PyTree
    reward: Any = None
    terminated: Any = None
    truncated: Any = None
    success: Any = None
    task: str = ""

    def __post_init__(self) -> None:
        def set_(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("observation", "action"):
            tree = getattr(self, name)
            # Errors tell which entry is wrong; None has no entries.
            for place, leaf in named_leaves(name, tree):
                _array(place, leaf)
            set_(name, jax.tree.map(np.asarray, tree))
        actions = named_leaves("action", self.action)
        shape = actions[0][1].shape if actions else ()
        length = shape[0] if len(shape) > 0 else 0
        require(length > 0, "action's shape", shape, "[T, ...] with T >= 1")
        for place, leaf in actions:
            require(
                leaf.shape[:1] == (length,), f"{place}'s shape", leaf.shape, f"[{length}, ...] as the other actions"
            )
        seen = named_leaves("observation", self.observation)
        if not seen:
            raise InputError("observation is empty, but it must hold at least one array.")
        for place, leaf in seen:
            if leaf.shape[:1] not in ((length,), (length + 1,)) or leaf.shape[0] != seen[0][1].shape[0]:
                raise InputError(
                    f"{place} is ragged: its shape is {leaf.shape}, but with {length} actions there must be {length} "
                    f"or {length + 1} observations, as many in every entry."
                )
        for name in ("reward", "terminated", "truncated", "success"):
            value = getattr(self, name)
            if value is not None:
                value = _array(name, value)
                require(value.shape == (length,), f"{name}'s shape", value.shape, f"({length},), one for each action")
                set_(name, value if name == "reward" else value.astype(bool))
        terminated = np.zeros(length, bool) if self.terminated is None else np.asarray(self.terminated)
        set_("terminated", terminated)
        if self.truncated is None:
            set_("truncated", (np.arange(length) == length - 1) & ~terminated[-1])

    def __len__(self) -> int:
        return int(self.terminated.shape[0])

    @property
    def has_final_observation(self) -> bool:
        """Whether what was seen after the last action is known."""
        return jax.tree.leaves(self.observation)[0].shape[0] == len(self) + 1


class Transitions(NamedTuple):
    """Steps of all episodes one after the other: what offline reinforcement learning reads.

    Attributes:
        observation: leaves ``[S, ...]``.
        action: leaves ``[S, ...]``.
        reward: ``[S]``.
        next_observation: leaves ``[S, ...]``; the observation itself where an episode terminated and its last
            observation was not recorded.
        terminated: ``[S]``.
        truncated: ``[S]``.
    """

    observation: PyTree
    action: PyTree
    reward: Float[np.ndarray, " S"]
    next_observation: PyTree
    terminated: Bool[np.ndarray, " S"]
    truncated: Bool[np.ndarray, " S"]


@dataclasses.dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes of one kind: the same entries, shapes and dtypes in each. A slice of them is such a set again.

    Attributes:
        episodes: at least one.
        fps: steps in a second; None where time has no unit.
        observation_space: of one observation; None where it is not known.
        action_space: of one action; None where it is not known.
        environment: how Gymnasium makes the environment, or its name there; None where it is not one of Gymnasium's.
    """

    episodes: tuple[Episode, ...]
    fps: float | int | None = None
    observation_space: gymnasium.Space | None = None
    action_space: gymnasium.Space | None = None
    environment: EnvSpec | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "episodes", tuple(self.episodes))
        require(len(self.episodes) > 0, "episodes", self.episodes, "at least one episode")
        if self.fps is not None:
            require_number("fps", self.fps, above=0.0)
        first = _kinds(self.episodes[0])
        for number, episode in enumerate(self.episodes):
            kinds = _kinds(episode)
            for place in [*first, *kinds]:
                if first.get(place) != kinds.get(place):
                    raise InputError(
                        f"episodes[{number}] has {_shown(place, kinds)}, but the first has {_shown(place, first)}."
                    )

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)

    @overload
    def __getitem__(self, index: int) -> Episode: ...

    @overload
    def __getitem__(self, index: slice) -> Demonstrations: ...

    def __getitem__(self, index: int | slice) -> Episode | Demonstrations:
        if isinstance(index, slice):
            return dataclasses.replace(self, episodes=self.episodes[index])
        return self.episodes[index]

    @property
    def num_steps(self) -> int:
        """Actions in all episodes."""
        return sum(len(episode) for episode in self.episodes)

    @property
    def returns(self) -> Float[np.ndarray, " E"]:
        """Sum of the rewards of each episode."""
        self._need_rewards("returns")
        return np.asarray([np.sum(episode.reward, dtype=np.float64) for episode in self.episodes])

    @property
    def successes(self) -> Bool[np.ndarray, " E"] | None:
        """Whether each episode accomplished its task at any time; None where that was not recorded."""
        if self.episodes[0].success is None:
            return None
        return np.asarray([bool(np.any(episode.success)) for episode in self.episodes])

    def chunks(self, horizon: int, observation_horizon: int = 1) -> EpisodeChunks:
        """Every observation window and chunk of actions, as chunk policies learn from them.

        Images may be bytes: batches of them are floats ``[..., C, H, W]`` in [0, 1].

        Args:
            horizon: rows of a chunk.
            observation_horizon: length of the windows.

        Raises:
            InputError: actions that are not ``[T, D]``, or images in another layout.
        """
        for number, episode in enumerate(self.episodes):
            for place, values in named_leaves(f"episodes[{number}].observation", episode.observation):
                if is_image(values):
                    check_image(place, values)
        pairs = [(episode.observation, episode.action) for episode in self.episodes]
        return EpisodeChunks.cut(pairs, horizon=horizon, observation_horizon=observation_horizon)

    def transitions(self) -> Transitions:
        """Every step with what followed it.

        An episode's last step is left out where it neither terminated nor has an observation after it: no value could
        be bootstrapped there.

        Raises:
            InputError: no rewards were recorded.
        """
        self._need_rewards("transitions")
        parts = []
        for episode in self.episodes:
            seen, steps = _completed(episode)

            def cut(tree: PyTree, start: int = 0, steps: int = steps) -> PyTree:
                return jax.tree.map(lambda leaf: leaf[start : start + steps], tree)

            ends = cut((episode.reward, episode.terminated, episode.truncated))
            parts.append((cut(seen), cut(episode.action), ends[0], cut(seen, 1), *ends[1:]))
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        if joined[2].size == 0:
            raise InputError("episodes have no transitions: each is one step without an observation after it.")
        return Transitions(*joined)

    def chunk_transitions(
        self, horizon: int, rows: int | None = None, observation_horizon: int | None = None
    ) -> ChunkTransitions:
        """Every chunk of actions with what it earned and led to, for offline learning on decisions of several actions.

        An episode's last action is left out where it neither terminated nor has an observation after it. Images that
        are bytes become floats ``[..., C, H, W]`` in [0, 1].

        Args:
            horizon: rows of a chunk.
            rows: actions of a chunk that are played; all that follow the window's past where None.
            observation_horizon: length of the windows; None for plain observations.

        Raises:
            InputError: no rewards were recorded, or no episode has such an action.
        """
        self._need_rewards("chunk_transitions")
        parts = []
        for number, episode in enumerate(self.episodes):
            seen, steps = _completed(episode)
            if steps:
                for place, values in named_leaves(f"episodes[{number}].observation", seen):
                    if is_image(values):
                        check_image(place, values)
                shown = jax.tree.map(lambda leaf, steps=steps: _as_floats(leaf[: steps + 1]), seen)
                # A PyTree of actions is refused below.
                action: Any = jax.tree.map(lambda leaf, steps=steps: leaf[:steps], episode.action)
                parts.append((shown, action, episode.reward[:steps], bool(episode.terminated[steps - 1])))
        if not parts:
            raise InputError("episodes have no transitions: each is one step without an observation after it.")
        return ChunkTransitions.cut(parts, horizon=horizon, rows=rows, observation_horizon=observation_horizon)

    def _need_rewards(self, what: str) -> None:
        if self.episodes[0].reward is None:
            raise InputError(f"episodes have no reward, which {what} needs: none was recorded.")


def _completed(episode: Episode) -> tuple[PyTree, int]:
    """Observations, and how many actions have one after them; that of a terminating action never matters."""
    if episode.has_final_observation:
        return episode.observation, len(episode)
    if not episode.terminated[-1]:
        return episode.observation, len(episode) - 1
    return jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[-1:]]), episode.observation), len(episode)


def _as_floats(values: np.ndarray) -> np.ndarray:
    if is_image(values) and values.dtype == np.uint8:
        return np.moveaxis(values, -1, 1) / np.float32(255.0)
    return values


def _kinds(episode: Episode) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of a step and dtype of every entry."""
    entries = [*named_leaves("observation", episode.observation), *named_leaves("action", episode.action)]
    entries += [(name, value) for name in ("reward", "success") if (value := getattr(episode, name)) is not None]
    return {name: (value.shape[1:], str(value.dtype)) for name, value in entries}


def _shown(place: str, kinds: dict[str, tuple[tuple[int, ...], str]]) -> str:
    if place not in kinds:
        return f"no {place}"
    shape, dtype = kinds[place]
    return f"{place} of shape {['T', *shape]} and dtype {dtype}".replace("'", "")


def choose(episodes: Sequence[int] | None, total: int) -> list[int]:
    """Numbers of the episodes to read, in the order given; all of them where None.

    Raises:
        InputError: there is no such episode, or none is chosen.
    """
    if episodes is None:
        return list(range(total))
    chosen = [int(number) for number in episodes]
    for number in chosen:
        require(0 <= number < total, "episodes", number, f"from 0 to {total - 1}")
    require(len(chosen) > 0, "episodes", chosen, "at least one number")
    return chosen
