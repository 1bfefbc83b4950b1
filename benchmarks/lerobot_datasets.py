"""Steersman's datasets in LeRobot's format, held to LeRobot itself.

``python benchmarks/lerobot_datasets.py make FOLDER``, in Steersman's environment, writes a dataset and, beside it, what
its frames are. ``... check FOLDER``, in an environment with LeRobot (see requirements-lerobot.txt), opens it as a
``LeRobotDataset``, compares every frame, episode and statistic, and prints the largest differences; it fails where one
is too large. ``... write`` lets LeRobot's own writer make ``tests/data/lerobot_dataset``, which the tests of the reader
read.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "lerobot_dataset"
LENGTHS = (5, 4, 7)
TASKS = ("push the block", "lift the block", "push the block")


def own_frames(length: int, episode: int) -> dict[str, np.ndarray]:
    """What LeRobot's writer is given: formulas, so that a test can repeat them."""
    step = np.arange(length)
    picture = np.arange(6 * 8 * 3).reshape(6, 8, 3)
    return {
        "observation.state": np.stack([step, np.sin(step + episode), np.full(length, 0.5)], 1).astype(np.float32),
        "observation.images.top": ((picture * 7)[None] + 31 * (step + 10 * episode)[:, None, None, None]) % 256,
        "observation.points": (np.arange(8).reshape(4, 2) + 0.1 * step[:, None, None]).astype(np.float32),
        "action": np.stack([np.cos(step), -step - episode], 1).astype(np.float32),
        "next.reward": (0.25 * step).astype(np.float32)[:, None],
        "next.done": (step == length - 1)[:, None],
        "next.success": ((step == length - 1) & (episode != 1))[:, None],
    }


def write() -> None:
    """LeRobot's writer."""
    from datasets.features.features import Value
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # The datasets library calls float() on arrays of one number, which NumPy does not take any more.
    encode = Value.encode_example
    Value.encode_example = lambda kind, value: encode(kind, np.asarray(value).item())
    shutil.rmtree(DATA, ignore_errors=True)
    features = {}
    for name, values in own_frames(1, 0).items():
        image = "images" in name
        features[name] = {
            "dtype": "image" if image else str(values.dtype),
            "shape": values.shape[1:],
            "names": ["height", "width", "channels"] if image else None,
        }
    dataset = LeRobotDataset.create("steersman/test", 10, features, root=DATA, use_videos=False)
    for episode, length in enumerate(LENGTHS):
        frames = own_frames(length, episode)
        for step in range(length):
            frame = {name: values[step] for name, values in frames.items()}
            frame["observation.images.top"] = frame["observation.images.top"].astype(np.uint8)
            dataset.add_frame(frame | {"task": TASKS[episode]})
        dataset.save_episode()
    dataset.finalize()
    shutil.rmtree(DATA / "images", ignore_errors=True)
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(DATA.relative_to(Path.cwd())), "bytes": size}))


def make(folder: str) -> None:
    """Steersman's writer: several files, every kind of feature, floats and bytes as images."""
    from steersman.envs.demonstrations import Demonstrations, Episode
    from steersman.envs.lerobot_datasets import write_lerobot_dataset

    rng = np.random.default_rng(0)
    episodes, kept = [], {}
    for number, length in enumerate(LENGTHS):
        observation = {
            "agent_pos": rng.normal(size=(length + 1, 3)).astype(np.float32),
            "environment_state": rng.normal(size=(length + 1, 2)),
            "points": rng.normal(size=(length + 1, 4, 3)).astype(np.float32),
            "count": rng.integers(0, 9, length + 1),
            "pixels": {
                "top": rng.integers(0, 256, (length + 1, 40, 48, 3), np.uint8),
                "side": rng.uniform(size=(length + 1, 3, 24, 20)).astype(np.float32),
            },
        }
        ended = np.arange(length) == length - 1
        episode = Episode(
            observation,
            rng.normal(size=(length, 2)).astype(np.float32),
            rng.normal(size=length).astype(np.float32),
            ended & (number != 1),
            ended & (number == 1),
            ended & (number == 0),
            TASKS[number],
        )
        episodes.append(episode)
        kept |= {
            f"{number}/observation.state": observation["agent_pos"][:-1],
            f"{number}/observation.environment_state": observation["environment_state"][:-1],
            f"{number}/observation.points": observation["points"][:-1],
            f"{number}/observation.count": observation["count"][:-1, None],
            f"{number}/observation.images.top": np.moveaxis(observation["pixels"]["top"][:-1], -1, 1) / 255.0,
            f"{number}/observation.images.side": observation["pixels"]["side"][:-1],
            f"{number}/action": episode.action,
            f"{number}/next.reward": episode.reward[:, None],
            f"{number}/next.done": ended[:, None],
            f"{number}/next.truncated": episode.truncated[:, None],
            f"{number}/next.success": episode.success[:, None],
        }
    shutil.rmtree(folder, ignore_errors=True)
    # Every episode fills a file.
    write_lerobot_dataset(Path(folder) / "dataset", Demonstrations(tuple(episodes), fps=10), file_size_mb=0.01)
    np.savez(Path(folder) / "frames.npz", **kept)  # pyright: ignore[reportArgumentType]


def check(folder: str) -> None:
    """LeRobot's reader."""
    from lerobot.datasets.compute_stats import aggregate_stats, get_feature_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.utils import dataset_to_policy_features

    dataset = LeRobotDataset("steersman/test", root=Path(folder) / "dataset")
    kept = dict(np.load(Path(folder) / "frames.npz"))
    names = sorted({name.split("/", 1)[1] for name in kept})
    assert len(dataset) == sum(LENGTHS)
    assert dataset.num_episodes == len(LENGTHS)
    assert dataset.fps == 10
    assert len(list((Path(folder) / "dataset" / "data").rglob("*.parquet"))) == len(LENGTHS)
    differences: dict[str, Any] = dict.fromkeys(names, 0.0)
    start = 0
    for number, length in enumerate(LENGTHS):
        bounds = dataset.meta.episodes[number]
        assert (bounds["dataset_from_index"], bounds["dataset_to_index"]) == (start, start + length)
        assert (bounds["length"], bounds["tasks"]) == (length, [TASKS[number]])
        for step in range(length):
            item = dataset[start + step]
            assert item["task"] == TASKS[number]
            assert (int(item["episode_index"]), int(item["frame_index"]), int(item["index"])) == (
                number,
                step,
                start + step,
            )
            assert abs(float(item["timestamp"]) - step / 10) < 1e-6
            for name in names:
                value, wanted = np.asarray(item[name]), kept[f"{number}/{name}"][step]
                value = value.reshape(wanted.shape)
                # It reads double precision in single precision.
                kind = np.float32 if wanted.dtype == np.float64 else wanted.dtype
                assert value.dtype == kind, name
                wanted = wanted.astype(kind)
                gap = np.abs(value.astype(np.float64) - wanted.astype(np.float64)).max()
                differences[name] = max(differences[name], float(gap))
        start += length
    # A window over an episode's start, with the padding that LeRobot gives it.
    windows = LeRobotDataset(
        "steersman/test", root=Path(folder) / "dataset", delta_timestamps={"action": [-0.1, 0.0, 0.1]}
    )
    padded = windows[LENGTHS[0]]["action_is_pad"].tolist()
    assert padded == [True, False, False], padded
    # Statistics of the episodes and of all, by LeRobot's own functions. They square bytes as bytes, so the numbers of
    # images are given to them as floats.
    per_episode = []
    for number in range(len(LENGTHS)):
        found = {}
        for name in names:
            values = kept[f"{number}/{name}"]
            image = "images" in name
            values = np.round(255.0 * values) if image else values
            stats = get_feature_stats(values.astype(np.float64), (0, 2, 3) if image else 0, image)
            found[name] = {k: v if k == "count" or not image else v[0] / 255.0 for k, v in stats.items()}
        per_episode.append(found)
    whole = aggregate_stats(per_episode)
    quantiles, moments = 0.0, 0.0
    for name in names:
        spread = np.maximum(whole[name]["max"] - whole[name]["min"], 1e-12)
        assert set(dataset.meta.stats[name]) == set(whole[name]), name
        for key, wanted in whole[name].items():
            found = dataset.meta.stats[name][key]
            assert found.shape == wanted.shape, (name, key, found.shape, wanted.shape)
            gap = float(np.max(np.abs(found - wanted) / (1.0 if key == "count" else spread)))
            if key.startswith("q"):
                quantiles = max(quantiles, gap)
            else:
                moments = max(moments, gap)
    policy = dataset_to_policy_features(dataset.meta.features)
    assert policy["observation.images.top"].shape == (3, 40, 48)
    assert policy["observation.state"].type.name == "STATE"
    print(json.dumps({"frames": differences, "moments": moments, "quantiles, of the range": quantiles}, indent=2))
    # Floats were rounded to bytes.
    exact = [value for name, value in differences.items() if name != "observation.images.side"]
    assert max(exact) < 1e-7
    assert differences["observation.images.side"] < 0.5 / 255 + 1e-6
    assert moments < 1e-9


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "make":
        make(sys.argv[2])
    elif command in ("check", "write"):
        from lerobot_reference import start_lerobot

        start_lerobot()
        check(sys.argv[2]) if command == "check" else write()
    else:
        sys.exit(__doc__)
