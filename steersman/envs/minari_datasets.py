"""Minari's datasets, read and written through Minari itself."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium
import jax
import numpy as np
from gymnasium import spaces

from steersman.envs.demonstrations import Demonstrations, Episode, choose, named_leaves
from steersman.errors import InputError, InputTypeError, require, unknown_name

#: A dataset's name: ``(namespace/)name-v(version)``.
NAME = re.compile(r"(?:[-\w][-\w/]*[-\w]/)?[-\w]+-v\d+")
ROOT = "MINARI_DATASETS_PATH"


def _minari() -> Any:
    try:
        import h5py
        import minari
    except ImportError as error:
        raise InputError(
            f"Minari's datasets need the package {error.name}: install it with pip install 'steersman[robotics]'."
        ) from None
    del h5py  # Minari looks for it only when it opens a file.
    return minari


@contextlib.contextmanager
def _below(root: str | Path | None) -> Iterator[None]:
    """Lets Minari keep its datasets in a folder, which it takes from the environment alone."""
    before = os.environ.get(ROOT)
    root = before if root is None else root
    if root is not None:
        # Minari cannot write below a relative path.
        os.environ[ROOT] = str(Path(root).absolute())
    try:
        yield
    finally:
        if before is not None:
            os.environ[ROOT] = before
        elif root is not None:
            del os.environ[ROOT]


def read_minari(
    dataset: str | Path,
    *,
    root: str | Path | None = None,
    episodes: Sequence[int] | None = None,
    download: bool = False,
) -> Demonstrations:
    """Reads a dataset of Minari's, with its spaces and the description of its environment.

    Whether the task was accomplished is read from ``infos["success"]``, where that was recorded; other infos are left
    out.

    Args:
        dataset: its name (``"D4RL/door/human-v2"``), or the folder that it is in.
        root: where Minari keeps its datasets; where it usually does if None.
        episodes: numbers of the episodes to read; all of them where None.
        download: whether to fetch a dataset that is not there.

    Raises:
        InputError: there is no such dataset, it is empty, or Minari is not installed.
        InputTypeError: it holds text, which is no array.
    """
    minari = _minari()
    with _below(root):
        opened = _opened(minari, dataset, download)
    total = opened.total_episodes
    require(total > 0, "dataset", str(dataset), "one with episodes: it is empty")
    for name in ("observation_space", "action_space"):
        _check_kind(name, getattr(opened, name))
    chosen = choose(episodes, total)
    numbers = [int(opened.episode_indices[number]) for number in chosen]
    notes = list(opened.storage.get_episode_metadata(numbers))
    found = []
    for episode, note in zip(opened.iterate_episodes(numbers), notes, strict=True):
        success = (episode.infos or {}).get("success")
        length = len(episode.rewards)
        # An info is given at the reset too.
        if success is not None and np.shape(success) != (length + 1,):
            success = None
        found.append(
            Episode(
                episode.observations,
                episode.actions,
                episode.rewards,
                episode.terminations,
                episode.truncations,
                None if success is None else np.asarray(success)[1:],
                str(note.get("task", "")),
            )
        )
    return Demonstrations(
        tuple(found),
        fps=opened.storage.metadata.get("fps"),
        observation_space=opened.observation_space,
        action_space=opened.action_space,
        environment=opened.env_spec,
    )


def _opened(minari: Any, dataset: str | Path, download: bool) -> Any:
    folder = Path(dataset)
    for place in (folder / "data", folder):
        if (place / "metadata.json").is_file():
            return _told(minari.MinariDataset, place)
    name = str(dataset)
    if NAME.fullmatch(name) is None:
        raise InputError(
            f"dataset is {name!r}, but it must be a folder with data/metadata.json, or a name such as 'door/human-v2'."
        )
    try:
        return _told(minari.load_dataset, name, download)
    except FileNotFoundError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other datasets
            known = list(minari.list_local_datasets())
        raise unknown_name("Minari dataset", name, known) from None


def _told(call: Any, dataset: str | Path, *arguments: Any) -> Any:
    """The dataset that a call opens, or one sentence."""
    try:
        return call(dataset, *arguments)
    except (ValueError, KeyError, AssertionError, NotImplementedError, gymnasium.error.Error) as error:
        raise InputError(f"dataset is {str(dataset)!r}, which Minari cannot open: {error}.") from None


def _check_kind(name: str, space: gymnasium.Space) -> None:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            _check_kind(f"{name}[{key!r}]", part)
    elif isinstance(space, spaces.Tuple):
        for place, part in enumerate(space.spaces):
            _check_kind(f"{name}[{place}]", part)
    elif not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise InputTypeError(f"{name} is a {type(space).__name__}, which has no array form.")


def check_new_dataset(name: str, root: str | Path | None = None) -> Path:
    """The folder that a dataset would be written to, before anything is made to be written there.

    Args:
        name: ``(namespace/)name-v(version)``.
        root: where Minari keeps its datasets; where it usually does if None.

    Raises:
        InputError: the name is malformed or taken, or Minari is not installed.
    """
    minari = _minari()
    require(NAME.fullmatch(name) is not None, "name", name, "(namespace/)name-v(version), such as 'detour/expert-v0'")
    with _below(root):
        folder = Path(minari.storage.get_dataset_path(name))
    require(not folder.exists(), "name", name, f"new: {folder} exists, and nothing is overwritten")
    return folder


def write_minari(
    name: str,
    demonstrations: Demonstrations,
    *,
    root: str | Path | None = None,
    repeat_final: bool = False,
    algorithm: str | None = None,
    author: str | None = None,
    author_email: str | None = None,
    code_permalink: str | None = None,
    description: str | None = None,
    data_format: Literal["hdf5", "arrow", "parquet"] = "hdf5",
) -> Path:
    """Writes a dataset that ``minari.load_dataset(name)`` opens. Images are stored without loss.

    Values are stored in the dtypes of the spaces. Where the demonstrations know no space, it is taken from the data:
    unbounded numbers, bytes from 0 to 255. Tasks become metadata of the episodes, the frame rate metadata of the
    dataset, success an info.

    Args:
        name: ``(namespace/)name-v(version)``.
        demonstrations: what to write.
        root: where Minari keeps its datasets; where it usually does if None.
        repeat_final: whether to repeat the last observation of an episode that has none after its last action.
        algorithm: metadata: what the expert was, for example.
        author: metadata.
        author_email: metadata.
        code_permalink: metadata: where the code is that recorded it.
        description: metadata.
        data_format: how Minari stores arrays.

    Returns:
        The dataset's folder.

    Raises:
        InputError: the name is malformed or taken, no rewards or no final observations were recorded, values are
            outside of their space, discrete actions have no space, or Minari is not installed.
    """
    folder = check_new_dataset(name, root)
    minari = _minari()
    from minari.data_collector import EpisodeBuffer

    observation_space = _space("observation", demonstrations.observation_space, demonstrations[0])
    action_space = _space("action", demonstrations.action_space, demonstrations[0])
    buffers = []
    for number, episode in enumerate(demonstrations):
        where = f"episodes[{number}]"
        if episode.reward is None:
            raise InputError(f"{where}.reward is None, but Minari stores rewards.")
        seen = episode.observation
        if not episode.has_final_observation:
            if not repeat_final:
                raise InputError(
                    f"{where} has as many observations as actions, but Minari stores one more, after the last action: "
                    "give it, or repeat_final=True."
                )
            seen = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[-1:]]), seen)
        # A list: Minari's Arrow files take no arrays of scalars here.
        success = None if episode.success is None else [False, *episode.success.tolist()]
        buffers.append(
            EpisodeBuffer(
                observations=_stored(f"{where}.observation", observation_space, seen),
                actions=_stored(f"{where}.action", action_space, episode.action),
                rewards=episode.reward,  # pyright: ignore[reportArgumentType]
                terminations=episode.terminated,
                truncations=episode.truncated,
                infos=None if success is None else {"success": success},
            )
        )
    notes = {"algorithm_name": algorithm, "author": author, "author_email": author_email}
    notes |= {"code_permalink": code_permalink, "description": description}
    with _below(root), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about metadata that is not given
        try:
            dataset = minari.create_dataset_from_buffers(
                name,
                buffers,
                env=demonstrations.environment,
                observation_space=observation_space,
                action_space=action_space,
                data_format=data_format,
                jpeg_encoding=False,
                **notes,
            )
            if demonstrations.fps is not None:
                dataset.storage.update_metadata({"fps": demonstrations.fps})
            tasks = [{"task": episode.task} for episode in demonstrations]
            dataset.storage.update_episode_metadata(tasks, range(len(tasks)))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, gymnasium.error.Error):
                raise InputError(
                    f"environment is {demonstrations.environment!r}, which Gymnasium cannot make: {error}"
                ) from None
            raise
    return folder


def _space(kind: str, given: gymnasium.Space | None, episode: Episode) -> gymnasium.Space:
    """The space that is given, or the one that holds everything of an episode's shapes and dtypes."""
    if given is not None:
        _check_kind(f"{kind}_space", given)
        return given

    def of(name: str, tree: Any) -> gymnasium.Space:
        if isinstance(tree, dict):
            return spaces.Dict({key: of(f"{name}[{key!r}]", part) for key, part in tree.items()})
        if isinstance(tree, (list, tuple)):
            return spaces.Tuple([of(f"{name}[{place}]", part) for place, part in enumerate(tree)])
        shape, dtype = tree.shape[1:], tree.dtype
        if np.issubdtype(dtype, np.bool_):
            return spaces.MultiBinary(shape)
        if np.issubdtype(dtype, np.integer):
            if not shape:
                raise InputError(f"{kind}_space is None, but {name} is discrete: how many there are must be given.")
            limits = np.iinfo(dtype)
            return spaces.Box(limits.min, limits.max, shape, dtype.type)
        return spaces.Box(-np.inf, np.inf, shape, dtype.type)

    return of(kind, getattr(episode, kind))


def _stored(name: str, space: gymnasium.Space, tree: Any) -> Any:
    """Values in the form and dtype of a space, once they are known to be elements of it."""
    if isinstance(space, spaces.Dict):
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        require(found == sorted(space.spaces), name, found, f"a dictionary with {sorted(space.spaces)}")
        return {key: _stored(f"{name}[{key!r}]", part, tree[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        good = isinstance(tree, (list, tuple)) and len(tree) == len(space.spaces)
        require(good, name, type(tree).__name__, f"a tuple of {len(space.spaces)}")
        return tuple(_stored(f"{name}[{place}]", part, tree[place]) for place, part in enumerate(space.spaces))
    if not isinstance(tree, np.ndarray):
        raise InputError(f"{name} has {[place for place, _ in named_leaves(name, tree)]}, but its space is {space}.")
    shape = space.shape or ()
    require(tree.shape[1:] == shape, f"{name}'s shape", tree.shape, f"{['T', *shape]}".replace("'", ""))
    values = tree.astype(space.dtype)
    low, high = _bounds(space)
    outside = ~((values >= low) & (values <= high))
    if outside.any():
        raise InputError(f"{name} has the value {values[outside][0]}, which is outside of its space {space}.")
    return values


def _bounds(space: gymnasium.Space) -> tuple[Any, Any]:
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return 0, 1
