"""Datasets in LeRobot's format v3.0, read and written without LeRobot: Parquet files and JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steersman.envs.demonstrations import Demonstrations, Episode, check_image, choose, is_image
from steersman.errors import InputError, InputTypeError, require, require_number

VERSION = "v3.0"
INFO, STATS, TASKS, EPISODES, DATA = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes", "data"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_IN_A_CHUNK = 1000
#: What every frame has, in this order.
BOOKKEEPING = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
BOOKKEEPING |= {"task_index": "int64"}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
#: Names that LeRobot gives to what Gymnasium's robot environments show.
USUAL_NAMES = {"agent_pos": "observation.state", "pixels": "observation.image"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


# ---- reading


def read_lerobot_dataset(folder: str | Path, *, episodes: Sequence[int] | None = None) -> Demonstrations:
    """Reads a dataset of LeRobot's format v3.0 whose images are stored as images.

    Observations are dictionaries with LeRobot's own names (``"observation.state"``), as the policies of
    :func:`~steersman.diffusion.load_lerobot` take them; images are bytes ``[T, H, W, C]``. There are as many
    observations as actions: the format has none after the last one. An episode's task is that of its first frame.
    ``next.done`` is read as termination unless ``next.truncated`` says otherwise; without either an episode was cut at
    its end. Text and what is neither observed nor done nor ``next.`` is left out.

    Args:
        folder: where ``meta`` and ``data`` are.
        episodes: numbers of the episodes to read; all of them where None.

    Raises:
        InputError: a file is missing, the version is another, a feature is a video, or the data is not what
            ``meta/info.json`` says.
    """
    folder = Path(folder)
    info = _read_info(folder)
    features = {
        name: feature
        for name, feature in info["features"].items()
        if name == "action" or (name.startswith(("observation.", "next.")) and feature["dtype"] != "string")
    }
    for name, feature in features.items():
        if feature["dtype"] == "video":
            raise InputError(
                f"{folder / INFO} has {name!r} as a video, which is not read here: store its frames as images "
                "(use_videos=False)."
            )
    if "action" not in features or not any(name.startswith("observation.") for name in features):
        raise InputError(
            f"{folder / INFO} has the features {sorted(features)}, but an action and an observation.* it must have."
        )
    tasks = _read_tasks(folder)
    lengths = _read_lengths(folder)
    chosen = choose(episodes, len(lengths))
    rows = _read_rows(folder, [*BOOKKEEPING, *features], chosen)
    owner = _numbers(rows, "episode_index", (1,), "int64", folder)[:, 0]
    frame = _numbers(rows, "frame_index", (1,), "int64", folder)[:, 0]
    task_index = _numbers(rows, "task_index", (1,), "int64", folder)[:, 0]
    columns = {name: _decoder(rows, name, feature, folder) for name, feature in features.items()}
    found = []
    for number in chosen:
        of_episode = np.flatnonzero(owner == number)
        of_episode = of_episode[np.argsort(frame[of_episode])]
        if len(of_episode) != lengths[number] or not np.array_equal(frame[of_episode], np.arange(lengths[number])):
            raise InputError(
                f"{folder / DATA} has {len(of_episode)} frames of episode {number}, but {EPISODES} says "
                f"{lengths[number]}: the dataset is not whole."
            )
        values = {name: decode(of_episode) for name, decode in columns.items()}
        first = int(task_index[of_episode[0]])
        if not 0 <= first < len(tasks):
            raise InputError(f"{folder / TASKS} has {len(tasks)} tasks, but episode {number} has task {first}.")
        found.append(_episode(values, tasks[first]))
    return Demonstrations(tuple(found), fps=info["fps"])


def _episode(values: dict[str, np.ndarray], task: str) -> Episode:
    def flag(name: str) -> np.ndarray | None:
        return values[name][:, 0].astype(bool) if name in values else None

    done, truncated = flag("next.done"), flag("next.truncated")
    if done is not None and truncated is not None:
        done = done & ~truncated
    return Episode(
        {name: value for name, value in values.items() if name.startswith("observation.")},
        values["action"],
        values["next.reward"][:, 0] if "next.reward" in values else None,
        done,
        truncated,
        flag("next.success"),
        task,
    )


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    if not path.is_file():
        raise InputError(f"folder is {str(folder)!r}, but there is no {INFO} in it: it is not a LeRobot dataset.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version, features = info["codebase_version"], dict(info["features"])
        require_number(f"{path}: fps", info["fps"], above=0.0)
        info["features"] = {
            str(name): {**feature, "dtype": str(feature["dtype"]), "shape": tuple(int(n) for n in feature["shape"])}
            for name, feature in features.items()
        }
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a dataset's description ({type(error).__name__}: {error})."
        ) from None
    if not str(version).startswith("v3."):
        raise InputError(
            f"{path} has codebase_version {version!r}, but it must be {VERSION!r}: convert the dataset with LeRobot's "
            "own script, lerobot.datasets.v30.convert_dataset_v21_to_v30."
        )
    return info


def _table(path: Path, columns: list[str] | None = None, filters: Any = None) -> Any:
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise InputError(f"{path} is missing: the dataset is not whole.")
    try:
        missing = sorted(set(columns or ()) - set(parquet.read_schema(path).names))
        if not missing:
            return parquet.read_table(path, columns=columns, filters=filters)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error}).".replace("\n", " ")) from None
    raise InputError(f"{path} lacks the columns {missing}.")


def _read_tasks(folder: Path) -> list[str]:
    table = _table(folder / TASKS)
    texts = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(texts) != 1:
        raise InputError(f"{folder / TASKS} has columns {table.column_names}, but they must be a task and task_index.")
    order = np.argsort(table["task_index"].to_numpy())
    found = table[texts[0]].to_pylist()
    return [str(found[place]) for place in order]


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise InputError(f"{folder} has no {FILE.format(chunk_index=0, file_index=0)}: the dataset is not whole.")
    return files


def _read_lengths(folder: Path) -> dict[int, int]:
    """Frames of each episode, by its number."""
    lengths: dict[int, int] = {}
    for path in _files(folder / EPISODES):
        table = _table(path, ["episode_index", "length"])
        lengths |= dict(zip(table["episode_index"].to_pylist(), table["length"].to_pylist(), strict=True))
    if not lengths:
        raise InputError(f"{folder} has no episodes: the dataset is empty.")
    if sorted(lengths) != list(range(len(lengths))):
        raise InputError(f"{folder / EPISODES} has episodes {sorted(lengths)}, but they must count from 0.")
    return lengths


def _read_rows(folder: Path, columns: list[str], episodes: list[int]) -> Any:
    import pyarrow

    tables = []
    for path in _files(folder / DATA):
        tables.append(_table(path, columns, [("episode_index", "in", episodes)]))
    # Files of one dataset differ in what their schemas say beside the types.
    return pyarrow.concat_tables([table.replace_schema_metadata(None) for table in tables])


def _numbers(rows: Any, name: str, shape: tuple[int, ...], dtype: str, folder: Path) -> np.ndarray:
    """A column as ``[N, *shape]``."""
    import pyarrow

    def mismatch(found: Any) -> InputError:
        return InputError(f"{folder / DATA} has {name!r} as {found}, but {INFO} says {list(shape)} of {dtype}.")

    array = rows[name].combine_chunks()
    array = pyarrow.concat_arrays(array.chunks) if isinstance(array, pyarrow.ChunkedArray) else array
    array = array.storage if isinstance(array, pyarrow.ExtensionArray) else array
    found: list[int] = []
    while pyarrow.types.is_list(array.type) or pyarrow.types.is_fixed_size_list(array.type):
        fixed = pyarrow.types.is_fixed_size_list(array.type)
        sizes = [array.type.list_size] if fixed else np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
        if array.null_count or len(sizes) != 1:
            raise mismatch(f"rows of {list(map(int, sizes))} numbers with {array.null_count} missing")
        found.append(int(sizes[0]))
        array = array.flatten()
    kind = array.type
    if array.null_count or not (
        pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)
    ):
        raise mismatch(f"{rows[name].type} with {array.null_count} missing")
    if tuple(found or [1]) != shape:
        raise mismatch(f"{found or [1]} of {kind}")
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        raise mismatch(f"{found or [1]} of {kind}") from None
    return array.to_numpy(zero_copy_only=False).reshape(-1, *shape).astype(wanted)


def _decoder(rows: Any, name: str, feature: dict[str, Any], folder: Path) -> Any:
    """What gives the values of a feature in some rows."""
    import pyarrow

    if feature["dtype"] != "image":
        values = _numbers(rows, name, feature["shape"], feature["dtype"], folder)
        return lambda chosen: values[chosen]
    column = rows[name]
    if not pyarrow.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise InputError(f"{folder / DATA} has {name!r} as {column.type}, but an image must be a struct with bytes.")
    place, shape = f"{folder / DATA}: {name!r}", feature["shape"]

    def images(chosen: np.ndarray) -> np.ndarray:
        frames = (column[int(row)].as_py() for row in chosen)
        return np.stack([_decoded(None if frame is None else frame["bytes"], place, shape) for frame in frames])

    return images


def _decoded(stored: bytes | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    if stored is None:
        raise InputError(f"{name} has a frame without bytes.")
    try:
        pixels = np.asarray(Image.open(io.BytesIO(stored)))
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{name} has a frame that is no image ({error}).") from None
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if pixels.dtype != np.uint8:
        raise InputError(f"{name} has images of dtype {pixels.dtype}, but they must be bytes.")
    height, width, channels = pixels.shape
    if shape not in ((height, width, channels), (channels, height, width)):
        raise InputError(f"{name} has a frame of shape {pixels.shape}, but {INFO} says {list(shape)}.")
    return pixels


# ---- writing


def check_new_folder(folder: str | Path) -> Path:
    """The folder, once it is known that nothing would be overwritten.

    Args:
        folder: where a dataset is to be written.

    Raises:
        InputError: something is there.
    """
    folder = Path(folder)
    require(not folder.exists() and not folder.is_symlink(), "folder", str(folder), "new: nothing is overwritten")
    return folder


def write_lerobot_dataset(
    folder: str | Path,
    demonstrations: Demonstrations,
    *,
    fps: float | int | None = None,
    names: Mapping[str, str] | None = None,
    robot_type: str | None = None,
    file_size_mb: float = 100.0,
) -> Path:
    """Writes a dataset of LeRobot's format v3.0, images as PNG within the Parquet files.

    An observation that is one array becomes ``observation.state`` (``observation.image`` where it is an image); an
    entry ``x`` of a dictionary becomes ``observation.x`` (``observation.images.x``), unless it has such a name already
    or is called as in Gymnasium's robot environments (``agent_pos``, ``pixels``). Floats in [0, 1] are rounded to
    bytes. Scalars become ``[1]``. ``next.done`` is set where an episode terminated or was cut, ``next.truncated`` where
    it was cut alone. The observation after an episode's last action is left out, as the format has none.

    Args:
        folder: where to write; it must not exist yet.
        demonstrations: what to write.
        fps: frames in a second, if not those of the demonstrations.
        names: LeRobot's names of entries of the observation, by their own (``"camera"``, or ``"arm.pose"`` of nested
            ones).
        robot_type: which robot it was.
        file_size_mb: a new data file is begun beyond this size.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists, the frame rate is not known, a name is not usable, images are in another layout,
            or values are not finite.
        InputTypeError: actions are not one array.
    """
    folder = check_new_folder(folder)
    rate = demonstrations.fps if fps is None else fps
    if rate is None:
        raise InputError("fps is None, but LeRobot's format needs a frame rate: give fps=.")
    require_number("fps", rate, above=0.0)
    require_number("file_size_mb", file_size_mb, above=0.0)
    given = dict(names or {})
    features = _features(_frames(demonstrations[0], given, "episodes[0]"))
    unknown = set(given) - {path for path, _ in _entries(demonstrations[0].observation)}
    if unknown:
        raise InputError(f"names has {sorted(unknown)}, but there are no such entries in the observation.")
    tasks = list(dict.fromkeys(episode.task for episode in demonstrations))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        (temporary / EPISODES).mkdir(parents=True)
        _write(temporary, demonstrations, given, features, tasks, float(rate), file_size_mb)
        total = demonstrations.num_steps
        info = {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "total_episodes": len(demonstrations),
            "total_frames": total,
            "total_tasks": len(tasks),
            "chunks_size": FILES_IN_A_CHUNK,
            "data_files_size_in_mb": max(1, round(file_size_mb)),
            "video_files_size_in_mb": 200,
            "fps": int(rate) if float(rate).is_integer() else float(rate),
            "splits": {"train": f"0:{len(demonstrations)}"},
            "data_path": f"{DATA}/{FILE}",
            "video_path": None,
            "features": features,
        }
        (temporary / INFO).write_text(json.dumps(info, indent=4, ensure_ascii=False), encoding="utf-8")
        os.rename(temporary, folder)
    except OSError as error:
        raise InputError(f"folder is {str(folder)!r}, which cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _entries(observation: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an observation with their dotted names; a lone array has none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(observation):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _feature_name(entry: str, values: np.ndarray, names: Mapping[str, str]) -> str:
    if entry in names:
        return names[entry]
    if entry.startswith("observation."):
        return entry
    if entry in USUAL_NAMES:
        return USUAL_NAMES[entry]
    if is_image(values):
        return f"observation.images.{entry.removeprefix('pixels.')}" if entry else "observation.image"
    return f"observation.{entry or 'state'}"


def _frames(episode: Episode, names: Mapping[str, str], where: str) -> dict[str, np.ndarray]:
    """What is stored of an episode, by feature: numbers ``[T, ...]``, images as bytes ``[T, H, W, C]``."""
    frames: dict[str, np.ndarray] = {}
    length = len(episode)
    for entry, values in _entries(episode.observation):
        name, place = _feature_name(entry, values, names), f"{where}.observation" + (f"[{entry!r}]" if entry else "")
        good = name.startswith("observation.") and "/" not in name and name not in frames
        require(good, f"name of {place}", name, "observation.*, without a slash, and of no other entry")
        frames[name] = _bytes(place, values[:length]) if is_image(values) else _plain(place, values[:length])
    if not isinstance(episode.action, np.ndarray):
        kind = type(episode.action).__name__
        raise InputTypeError(f"{where}.action is a {kind}, but LeRobot's format has one array of actions.")
    frames["action"] = _plain(f"{where}.action", episode.action)
    if episode.reward is not None:
        frames["next.reward"] = _plain(f"{where}.reward", episode.reward)
    frames["next.done"] = (episode.terminated | episode.truncated)[:, None]
    frames["next.truncated"] = (episode.truncated & ~episode.terminated)[:, None]
    if episode.success is not None:
        frames["next.success"] = episode.success[:, None]
    return frames


def _plain(place: str, values: np.ndarray) -> np.ndarray:
    require(values.ndim <= 6, f"{place}'s shape", values.shape, "of at most five axes a frame")
    if not np.isfinite(values).all():
        raise InputError(f"{place} has NaN or infinity, of which there are no statistics.")
    return values[:, None] if values.ndim == 1 else values


def _bytes(place: str, values: np.ndarray) -> np.ndarray:
    check_image(place, values)
    if values.dtype == np.uint8:
        return values
    return np.moveaxis(np.round(255.0 * values).astype(np.uint8), 1, -1)


def _features(frames: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, values in frames.items():
        if is_image(values) and name.startswith("observation."):
            found[name] = {"dtype": "image", "names": ["height", "width", "channels"]}
        else:
            found[name] = {"dtype": str(values.dtype), "names": None}
        found[name]["shape"] = list(values.shape[1:])
    return found | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in BOOKKEEPING.items()}


def _write(
    folder: Path,
    demonstrations: Demonstrations,
    names: Mapping[str, str],
    features: dict[str, dict[str, Any]],
    tasks: list[str],
    rate: float,
    file_size_mb: float,
) -> None:
    """Writes all but ``meta/info.json``, one episode after the other."""
    import pyarrow
    from pyarrow import parquet

    schema = _schema(features)
    everything = {name: _Summary(feature["dtype"] == "image") for name, feature in features.items()}
    rows: list[dict[str, Any]] = []
    number, start = 0, 0
    writer, path = None, folder
    with contextlib.ExitStack() as stack:
        for index, episode in enumerate(demonstrations):
            if writer is not None and path.stat().st_size >= file_size_mb * 2**20:
                writer.close()
                number, writer = number + 1, None
            chunk, file = divmod(number, FILES_IN_A_CHUNK)
            if writer is None:
                path = folder / DATA / FILE.format(chunk_index=chunk, file_index=file)
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = stack.enter_context(parquet.ParquetWriter(path, schema, compression="snappy"))
            frames = _frames(episode, names, f"episodes[{index}]")
            length = len(episode)
            frame = np.arange(length)
            frames |= {
                "timestamp": (frame / rate).astype(np.float32)[:, None],
                "frame_index": frame[:, None],
                "episode_index": np.full((length, 1), index),
                "index": (start + frame)[:, None],
                "task_index": np.full((length, 1), tasks.index(episode.task)),
            }
            columns = [_column(frames[name], schema.field(name).type) for name in features]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            row: dict[str, Any] = {
                "episode_index": index,
                "tasks": [episode.task],
                "length": length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": start,
                "dataset_to_index": start + length,
            }
            for name in features:
                summary = _Summary(features[name]["dtype"] == "image")
                for each in (summary, everything[name]):
                    each.add(frames[name])
                row |= {f"stats/{name}/{key}": value.tolist() for key, value in summary.statistics().items()}
            rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
            start += length
    table = pyarrow.Table.from_pylist(rows)
    path = folder / EPISODES / FILE.format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True)
    parquet.write_table(table, path, compression="snappy")
    whole = {
        name: {key: value.tolist() for key, value in summary.statistics().items()}
        for name, summary in everything.items()
    }
    (folder / STATS).write_text(json.dumps(whole, indent=4), encoding="utf-8")
    parquet.write_table(_task_table(tasks), folder / TASKS)


def _schema(features: dict[str, dict[str, Any]]) -> Any:
    """Arrow's types, with the note that makes Hugging Face's library decode images."""
    import pyarrow

    fields, notes = [], {}
    for name, feature in features.items():
        shape = feature["shape"]
        if feature["dtype"] == "image":
            kind: Any = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
            note: dict[str, Any] = {"_type": "Image"}
        else:
            kind = pyarrow.from_numpy_dtype(np.dtype(feature["dtype"]))
            note = {"dtype": "bool" if feature["dtype"] == "bool" else feature["dtype"], "_type": "Value"}
            if len(shape) > 1:
                note = {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}
                for _ in shape:
                    kind = pyarrow.list_(kind)
            elif shape != [1]:
                kind = pyarrow.list_(kind, shape[0])
                note = {"feature": note, "length": shape[0], "_type": "Sequence"}
        fields.append(pyarrow.field(name, kind))
        notes[name] = note
    return pyarrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": notes}})})


def _column(values: np.ndarray, kind: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        rows = [{"bytes": _png(image), "path": f"frame-{place:06d}.png"} for place, image in enumerate(values)]
        return pyarrow.array(rows, kind)
    array = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    if pyarrow.types.is_fixed_size_list(kind):
        return pyarrow.FixedSizeListArray.from_arrays(array, values.shape[1])
    if pyarrow.types.is_list(kind):
        for axis in range(values.ndim - 1, 0, -1):
            size = values.shape[axis]
            offsets = pyarrow.array(np.arange(0, len(array) + 1, size), pyarrow.int32())
            array = pyarrow.ListArray.from_arrays(offsets, array)
    return array


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, format="PNG")
    return stream.getvalue()


def _task_table(tasks: Iterable[str]) -> Any:
    """Tasks as pandas stores a table whose index they are, which is how LeRobot looks them up."""
    import pyarrow

    index = "__index_level_0__"
    tasks = list(tasks)
    number = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    text = {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"}
    note = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [{**column, "metadata": None} for column in (number, text)],
        "creator": {"library": "pyarrow", "version": pyarrow.__version__},
        "pandas_version": "2.0.0",
    }
    table = pyarrow.table({"task_index": pyarrow.array(range(len(tasks)), pyarrow.int64()), index: tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


class _Summary:
    """Statistics of a feature along its last axis, or of an image's channels, scaled to [0, 1]."""

    def __init__(self, image: bool):
        self.image = image
        self.frames = 0
        self.parts: list[np.ndarray] = []
        self.counts: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        """Takes more frames ``[T, ...]``."""
        self.frames += len(values)
        if not self.image:
            self.parts.append(values.reshape(-1, values.shape[-1]))
            return
        counts = np.stack([np.bincount(values[..., c].reshape(-1), minlength=256) for c in range(values.shape[-1])])
        self.counts = counts if self.counts is None else self.counts + counts

    def statistics(self) -> dict[str, np.ndarray]:
        """Least, largest, mean, standard deviation, number of frames, quantiles."""
        found = {"count": np.asarray([self.frames])}
        if self.counts is None:
            rows = np.concatenate(self.parts).astype(np.float64)
            found |= {"min": rows.min(axis=0), "max": rows.max(axis=0), "mean": rows.mean(axis=0)}
            found["std"] = rows.std(axis=0)
            quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
            return found | dict(zip(QUANTILES, quantiles, strict=True))
        # A histogram of bytes has everything, and never grows.
        levels = np.arange(256) / 255.0
        share = self.counts / self.counts.sum(axis=1, keepdims=True)
        cumulative = np.cumsum(share, axis=1)
        mean = share @ levels
        found["min"] = levels[np.argmax(self.counts > 0, axis=1)]
        found["max"] = levels[255 - np.argmax(self.counts[:, ::-1] > 0, axis=1)]
        found |= {"mean": mean, "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0.0))}
        for name, quantile in QUANTILES.items():
            found[name] = levels[np.argmax(cumulative >= quantile - 1e-12, axis=1)]
        return {name: value if name == "count" else value.reshape(-1, 1, 1) for name, value in found.items()}
