"""LeRobot's own reader is held to these files by benchmarks/lerobot_datasets.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from steersman.envs.demonstrations import Demonstrations, Episode
from steersman.envs.lerobot_datasets import read_lerobot_dataset, write_lerobot_dataset
from steersman.errors import InputError, InputTypeError

#: Written by LeRobot 0.4.4.
THEIRS = Path(__file__).parents[1] / "data" / "lerobot_dataset"


def recorded(lengths=(3, 5, 4), **fields):
    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(lengths):
        seen = {
            "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
            "observation.environment_state": rng.normal(size=(length, 1)),
            "observation.images.top": rng.integers(0, 256, (length, 6, 8, 3), np.uint8),
            "observation.images.depth": rng.integers(0, 256, (length, 4, 5, 1), np.uint8),
            "observation.points": rng.normal(size=(length, 4, 3)).astype(np.float32),
            "observation.touch": rng.integers(0, 2, (length, 2)).astype(bool),
        }
        ended = np.arange(length) == length - 1
        action = rng.normal(size=(length, 2)).astype(np.float32)
        reward = rng.normal(size=length).astype(np.float32)
        task = ("push", "lift", "push")[number]
        episodes.append(Episode(seen, action, reward, ended & (number != 1), ended & (number == 1), ended, task))
    return Demonstrations(tuple(episodes), **{"fps": 20} | fields)


def assert_same(found, wanted):
    for name in ("action", "reward", "terminated", "truncated", "success"):
        before, after = getattr(wanted, name), getattr(found, name)
        if before is None:
            assert after is None
            continue
        np.testing.assert_array_equal(after, before, err_msg=name)
        assert after.dtype == before.dtype, name
    assert set(found.observation) == set(wanted.observation)
    for name, values in wanted.observation.items():
        np.testing.assert_array_equal(found.observation[name], values, err_msg=name)
        assert found.observation[name].dtype == values.dtype, name
    assert found.task == wanted.task


def test_what_lerobot_wrote_is_read():
    """The formulas of benchmarks/lerobot_datasets.py."""
    found = read_lerobot_dataset(THEIRS)
    assert (found.fps, [len(episode) for episode in found]) == (10, [5, 4, 7])
    assert [episode.task for episode in found] == ["push the block", "lift the block", "push the block"]
    for number, episode in enumerate(found):
        length = len(episode)
        step = np.arange(length)
        seen = episode.observation
        assert set(seen) == {"observation.state", "observation.images.top", "observation.points"}
        np.testing.assert_array_equal(seen["observation.state"][:, 1], np.sin(step + number).astype(np.float32))
        pixels = np.arange(6 * 8 * 3).reshape(6, 8, 3) * 7 + 31 * (step + 10 * number)[:, None, None, None]
        np.testing.assert_array_equal(seen["observation.images.top"], pixels % 256)
        assert seen["observation.images.top"].dtype == np.uint8
        points = np.arange(8).reshape(4, 2) + 0.1 * step[:, None, None]
        np.testing.assert_array_equal(seen["observation.points"], points.astype(np.float32))
        np.testing.assert_array_equal(episode.action[:, 1], -step - number)
        np.testing.assert_array_equal(episode.reward, 0.25 * step)
        ended = step == length - 1
        np.testing.assert_array_equal(episode.terminated, ended)
        np.testing.assert_array_equal(episode.success, ended & (number != 1))
        assert not episode.truncated.any()
    chosen = read_lerobot_dataset(THEIRS, episodes=[2, 0])
    assert_same(chosen[0], found[2])
    assert_same(chosen[1], found[0])


def test_lerobots_own_dataset_is_written_again_as_it_was(tmp_path):
    """The same files as LeRobot's: schemas, rows, descriptions and, but for its quantiles, statistics."""
    write_lerobot_dataset(tmp_path / "ours", read_lerobot_dataset(THEIRS))
    info, wanted = (json.loads((root / "meta/info.json").read_text()) for root in (tmp_path / "ours", THEIRS))
    # It knows no truncation.
    assert info["features"].pop("next.truncated") == {"dtype": "bool", "names": None, "shape": [1]}
    assert info == wanted
    for file in ("meta/tasks.parquet", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        ours, theirs = parquet.read_table(tmp_path / "ours" / file), parquet.read_table(THEIRS / file)
        same = {name for name in theirs.column_names if not name.startswith("stats/")} - {"observation.images.top"}
        extra = set(ours.column_names) - set(theirs.column_names)
        assert all("next.truncated" in name for name in extra), extra
        assert set(theirs.column_names) <= set(ours.column_names)
        if "tasks" in file:
            assert sorted(ours["__index_level_0__"].to_pylist()) == sorted(theirs["__index_level_0__"].to_pylist())
            continue
        for name in same:
            if name != "task_index":
                assert ours[name].to_pylist() == theirs[name].to_pylist(), name
    ours, theirs = (json.loads((root / "meta/stats.json").read_text()) for root in (tmp_path / "ours", THEIRS))
    for name, statistics in theirs.items():
        assert set(ours[name]) == set(statistics)
        for key in ("min", "max", "mean", "std", "count"):
            # It squares bytes as bytes, and sums floats in single precision.
            if (name, key) != ("observation.images.top", "std") and name != "task_index":
                np.testing.assert_allclose(ours[name][key], statistics[key], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("file_size_mb", [100.0, 0.001], ids=["one file", "a file an episode"])
def test_the_round_trip_is_exact(tmp_path, file_size_mb):
    given = recorded()
    folder = write_lerobot_dataset(tmp_path / "data" / "set", given, file_size_mb=file_size_mb, robot_type="arm")
    assert len(list((folder / "data").rglob("*.parquet"))) == (1 if file_size_mb == 100.0 else 3)
    found = read_lerobot_dataset(folder)
    assert (found.fps, len(found)) == (20, 3)
    for before, after in zip(given, found, strict=True):
        assert_same(after, before)
    assert [path.name for path in folder.parent.iterdir()] == ["set"]
    info = json.loads((folder / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 3, 12)
    assert (info["total_tasks"], info["splits"], info["robot_type"]) == (2, {"train": "0:3"}, "arm")
    assert info["features"]["observation.images.top"]["names"] == ["height", "width", "channels"]
    rows = parquet.read_table(folder / "meta/episodes")
    assert rows["dataset_to_index"].to_pylist() == [3, 8, 12]
    assert rows["tasks"].to_pylist() == [["push"], ["lift"], ["push"]]


def test_names_and_ends(tmp_path):
    length = 4
    seen = {
        "agent_pos": np.ones((length + 1, 2), np.float32),
        "pixels": {"top": np.zeros((length + 1, 2, 3, 3), np.uint8)},
        "wrist": np.zeros((length + 1, 3, 2, 2), np.float32),
        "force": np.arange(length + 1.0),
    }
    given = Demonstrations((Episode(seen, np.zeros(length, np.int64)),))
    with pytest.raises(InputError, match="fps is None"):
        write_lerobot_dataset(tmp_path / "set", given)
    write_lerobot_dataset(tmp_path / "set", given, fps=12.5, names={"force": "observation.effort"})
    found = read_lerobot_dataset(tmp_path / "set")
    shapes = {name: values.shape for name, values in found[0].observation.items()}
    assert shapes == {
        "observation.state": (4, 2),
        "observation.images.top": (4, 2, 3, 3),
        "observation.images.wrist": (4, 2, 2, 3),
        "observation.effort": (4, 1),
    }
    np.testing.assert_array_equal(found[0].observation["observation.effort"][:, 0], np.arange(4.0))
    assert (found.fps, found[0].reward, found[0].success, found[0].action.shape) == (12.5, None, None, (4, 1))
    # Nothing was said of the end, so it was a cut.
    assert (found[0].terminated.any(), found[0].truncated.tolist()) == (False, [False, False, False, True])
    alone = Demonstrations((Episode(np.ones((3, 2)), np.ones((3, 1))),), fps=5)
    write_lerobot_dataset(tmp_path / "alone", alone)
    assert set(read_lerobot_dataset(tmp_path / "alone")[0].observation) == {"observation.state"}


def test_floats_are_rounded_to_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    floats = np.moveaxis(pixels, -1, 1) / np.float32(255.0)
    write_lerobot_dataset(tmp_path / "set", Demonstrations((Episode(floats, np.zeros((2, 1))),), fps=5))
    np.testing.assert_array_equal(read_lerobot_dataset(tmp_path / "set")[0].observation["observation.image"], pixels)


def test_statistics_are_those_of_the_frames(tmp_path):
    given = recorded()
    write_lerobot_dataset(tmp_path / "set", given)
    found = json.loads((tmp_path / "set/meta/stats.json").read_text())
    state = np.concatenate([e.observation["observation.state"] for e in given]).astype(np.float64)
    pixels = np.concatenate([e.observation["observation.images.top"] for e in given]) / 255.0
    for values, name, axes, shape in (
        (state, "observation.state", 0, (3,)),
        (pixels, "observation.images.top", (0, 1, 2), (3, 1, 1)),
    ):
        for key in ("min", "max", "mean", "std"):
            wanted = getattr(values, key)(axis=axes).reshape(shape)
            np.testing.assert_allclose(found[name][key], wanted, rtol=1e-12, atol=1e-12, err_msg=f"{name} {key}")
        assert found[name]["count"] == [12]
        assert (
            found[name]["min"] <= found[name]["q01"] <= found[name]["q50"] <= found[name]["q99"] <= found[name]["max"]
        )
    np.testing.assert_allclose(found["observation.state"]["q50"], np.median(state, axis=0))
    rows = parquet.read_table(tmp_path / "set/meta/episodes")
    first = given[1].observation["observation.state"].astype(np.float64)
    np.testing.assert_allclose(rows["stats/observation.state/mean"].to_pylist()[1], first.mean(axis=0))


def test_what_never_changes_has_a_range_of_zero_and_finite_statistics(tmp_path):
    still = np.full((4, 2), 3.0, np.float32)
    black = np.zeros((4, 3, 3, 3), np.uint8)
    seen = {"state": still, "camera": black}
    write_lerobot_dataset(tmp_path / "set", Demonstrations((Episode(seen, still),), fps=5))
    found = json.loads((tmp_path / "set/meta/stats.json").read_text())
    for name, value in (("action", [3.0, 3.0]), ("observation.images.camera", [[[0.0]], [[0.0]], [[0.0]]])):
        assert found[name]["min"] == found[name]["max"] == found[name]["mean"] == found[name]["q01"] == value
        assert not np.any(found[name]["std"])


# ---- bad input


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match=r"folder is .*set', but it must be new: nothing is overwritten"):
        write_lerobot_dataset(tmp_path / "set", recorded())
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"folder is .*which cannot be written"):
        write_lerobot_dataset(tmp_path / "file" / "set", recorded())


GOOD = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("observation", "action", "options", "message"),
    [
        ({"camera": np.zeros((3, 3, 4, 6), np.uint8)}, GOOD, {}, r"\['camera'\] has bytes of shape \(3, 3, 4, 6\)"),
        ({"camera": np.zeros((3, 5, 6, 3))}, GOOD, {}, r"has floats of shape \(3, 5, 6, 3\)"),
        ({"camera": np.full((3, 3, 4, 6), 200.0)}, GOOD, {}, "has values from 200 to 200"),
        ({"camera": np.zeros((3, 4, 6, 3), np.int32)}, GOOD, {}, "has dtype int32"),
        (np.full((3, 2), np.nan), GOOD, {}, "observation has NaN or infinity"),
        (GOOD, np.full((3, 2), np.inf), {}, "action has NaN or infinity"),
        (GOOD, {"arm": GOOD}, {}, "action is a dict"),
        (GOOD, GOOD, {"fps": 0}, "fps is 0"),
        (GOOD, GOOD, {"file_size_mb": 0.0}, "file_size_mb is 0.0"),
        ({"a/b": GOOD}, GOOD, {}, "name of .* is 'observation.a/b', but it must be"),
        ({"a": GOOD, "b": GOOD}, GOOD, {"names": {"a": "observation.b"}}, "is 'observation.b', but it must be"),
        ({"a": GOOD}, GOOD, {"names": {"a": "action"}}, "is 'action', but it must be"),
        ({"a": GOOD}, GOOD, {"names": {"c": "observation.c"}}, r"names has \['c'\]"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path, observation, action, options, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        write_lerobot_dataset(tmp_path / "set", Demonstrations((Episode(observation, action),), fps=5), **options)
    assert list(tmp_path.iterdir()) == []


def edit_info(folder, change):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(folder, file, change):
    parquet.write_table(change(parquet.read_table(folder / file)), folder / file)


def drop(folder, file):
    (folder / file).unlink()


def feature(name, **fields):
    return lambda folder: edit_info(folder, lambda info: info["features"][name].update(fields))


FRAMES, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
LATIN = pyarrow.array([["a"] * 2] * 12)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: drop(f, "meta/info.json"), "there is no meta/info.json in it: it is not a LeRobot dataset"),
        (lambda f: drop(f, "meta/tasks.parquet"), "tasks.parquet is missing"),
        (lambda f: drop(f, EPISODES), "meta/episodes has no chunk-000/file-000.parquet"),
        (lambda f: drop(f, FRAMES), "data has no chunk-000/file-000.parquet"),
        (lambda f: (f / "meta/info.json").write_text("{"), "info.json cannot be read as a dataset's description"),
        (lambda f: (f / "meta/info.json").write_text("[]"), "info.json cannot be read as a dataset's description"),
        (lambda f: edit_info(f, lambda info: info.pop("fps")), "cannot be read .*KeyError: 'fps'"),
        (lambda f: edit_info(f, lambda info: info.update(fps=0)), "info.json: fps is 0"),
        (lambda f: edit_info(f, lambda info: info.update(codebase_version="v2.1")), "codebase_version 'v2.1', but"),
        (feature("observation.images.top", dtype="video"), "has 'observation.images.top' as a video"),
        (feature("action", shape=[3]), r"has 'action' as \[2\] of float, but meta/info.json says \[3\]"),
        (feature("action", dtype="nonsense"), "has 'action' as .* of nonsense"),
        (feature("observation.points", shape=[3, 4]), r"as \[4, 3\] of float, but .* says \[3, 4\]"),
        (feature("observation.images.top", shape=[8, 8, 3]), r"frame of shape \(6, 8, 3\), but .* says \[8, 8, 3\]"),
        (feature("observation.state", dtype="image"), "'observation.state' as .*an image must be a struct with bytes"),
        (
            lambda f: edit_info(f, lambda info: info["features"].update(action2=info["features"].pop("action"))),
            "but an action and an observation",
        ),
        (lambda f: edit_table(f, FRAMES, lambda t: t.drop_columns("action")), r"lacks the columns \['action'\]"),
        (lambda f: edit_table(f, FRAMES, lambda t: t.slice(0, 10)), "has 2 frames of episode 2, but .* says 4"),
        (lambda f: edit_table(f, EPISODES, lambda t: t.slice(0, 0)), "the dataset is empty"),
        (lambda f: edit_table(f, EPISODES, lambda t: t.slice(1)), "they must count from 0"),
        (lambda f: edit_table(f, EPISODES, lambda t: t.drop_columns("length")), r"lacks the columns \['length'\]"),
        (
            lambda f: edit_table(f, "meta/tasks.parquet", lambda t: t.slice(0, 1)),
            "has 1 tasks, but episode 1 has task 1",
        ),
        (lambda f: (f / FRAMES).write_bytes(b"no"), "cannot be read as Parquet"),
        (
            lambda f: edit_table(f, FRAMES, lambda t: t.set_column(t.column_names.index("action"), "action", LATIN)),
            "has 'action' as .*string",
        ),
    ],
)
def test_a_damaged_dataset_is_told(tmp_path, damage, message):
    folder = write_lerobot_dataset(tmp_path / "set", recorded())
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_lerobot_dataset(folder)


def test_bad_pictures_are_told(tmp_path):
    folder = write_lerobot_dataset(tmp_path / "set", recorded())
    for stored, message in ((b"no picture", "has a frame that is no image"), (None, "has a frame without bytes")):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)

        def spoil(table, stored=stored):
            rows = table["observation.images.top"].to_pylist()
            rows[4] = {"bytes": stored, "path": "frame-000001.png"}
            place = table.column_names.index("observation.images.top")
            kind = table.schema.field(place).type
            return table.set_column(place, "observation.images.top", pyarrow.array(rows, kind))

        edit_table(copy, FRAMES, spoil)
        with pytest.raises(InputError, match=message):
            read_lerobot_dataset(copy)
        assert len(read_lerobot_dataset(copy, episodes=[0])) == 1


def test_bad_choices_are_told():
    with pytest.raises(InputError, match="folder is 'nowhere'"):
        read_lerobot_dataset("nowhere")
    for chosen, message in (([3], "episodes is 3, but it must be from 0 to 2"), ([], "episodes is \\[\\]")):
        with pytest.raises(InputError, match=message):
            read_lerobot_dataset(THEIRS, episodes=chosen)
