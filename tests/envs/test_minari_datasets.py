import json
import os
import sys

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces

from steersman.envs.demonstrations import Demonstrations, Episode
from steersman.envs.minari_datasets import read_minari, write_minari
from steersman.errors import InputError, InputTypeError

# What Minari itself warns of concerns datasets that are to be published.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SPACE = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (40, 48, 3), np.uint8),
        "robot": spaces.Dict({"pose": spaces.Box(-5.0, 5.0, (3,), np.float64)}),
        "touch": spaces.Discrete(3),
    }
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Where Minari keeps its datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def recorded(lengths=(3, 5), **fields):
    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(lengths):
        seen = {
            "camera": rng.integers(0, 256, (length + 1, 40, 48, 3), np.uint8),
            "robot": {"pose": rng.uniform(-4, 4, (length + 1, 3))},
            "touch": rng.integers(0, 3, length + 1),
        }
        ended = np.arange(length) == length - 1
        episodes.append(
            Episode(
                seen,
                rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                rng.normal(size=length),
                ended & (number == 0),
                ended & (number == 1),
                ended,
                f"task {number}",
            )
        )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    return Demonstrations(
        tuple(episodes), **{"fps": 20, "observation_space": SPACE, "action_space": action_space} | fields
    )


def flat(episode):
    parts = {name: getattr(episode, name) for name in ("action", "reward", "terminated", "truncated", "success")}
    seen = episode.observation
    return parts | {"camera": seen["camera"], "pose": seen["robot"]["pose"], "touch": seen["touch"]}


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_the_round_trip_is_exact(data_format, root):
    given = recorded()
    folder = write_minari("robot/camera-v1", given, data_format=data_format)
    assert folder == root / "robot" / "camera-v1"
    for source in ("robot/camera-v1", folder, folder / "data", str(folder)):
        found = read_minari(source)
        assert (found.fps, found.environment) == (20, None)
        assert (found.observation_space, found.action_space) == (given.observation_space, given.action_space)
        for before, after in zip(given, found, strict=True):
            assert after.task == before.task
            for name, values in flat(before).items():
                np.testing.assert_array_equal(flat(after)[name], values, err_msg=name)
                assert flat(after)[name].dtype == values.dtype, name
    some = read_minari("robot/camera-v1", episodes=[1])
    np.testing.assert_array_equal(some[0].action, given[1].action)


def test_minari_opens_what_is_written():
    given = recorded()
    write_minari(
        "robot/camera-v1",
        given,
        algorithm="script",
        author="A",
        author_email="a@b.org",
        code_permalink="https://example.org/code",
        description="Two episodes.",
    )
    dataset = minari.load_dataset("robot/camera-v1")
    assert (dataset.total_episodes, dataset.total_steps) == (2, 8)
    assert (dataset.spec.namespace, dataset.spec.dataset_name, dataset.spec.version) == ("robot", "camera", 1)
    metadata = dataset.storage.metadata
    assert (metadata["algorithm_name"], metadata["author"]) == ("script", {"A"})
    assert (metadata["author_email"], metadata["description"]) == ({"a@b.org"}, "Two episodes.")
    assert metadata["code_permalink"] == "https://example.org/code"
    for number, episode in enumerate(dataset):
        assert len(episode) == len(given[number])
        np.testing.assert_array_equal(episode.observations["camera"], given[number].observation["camera"])
        np.testing.assert_array_equal(episode.infos["success"], [False, *given[number].success])
        assert all(
            {"camera": c, "robot": {"pose": p}, "touch": t} in dataset.observation_space
            for c, p, t in zip(
                episode.observations["camera"],
                episode.observations["robot"]["pose"],
                episode.observations["touch"],
                strict=True,
            )
        )
    assert "robot/camera-v1" in minari.list_local_datasets()


def test_what_minari_recorded_is_read():
    """Minari's own collector and a Gymnasium environment are the truth."""
    environment = minari.DataCollector(gymnasium.make("CartPole-v1", max_episode_steps=12))
    rows = []
    for seed in (1, 2):
        seen, _ = environment.reset(seed=seed)
        episode, over, step = [seen], False, 0
        while not over:
            action = (step + seed) % 2
            seen, reward, terminated, truncated, _ = environment.step(action)
            episode.append((action, seen, reward, terminated, truncated))
            over, step = terminated or truncated, step + 1
        rows.append(episode)
    environment.create_dataset("cartpole/test-v0")
    found = read_minari("cartpole/test-v0")
    assert found.environment.id == "CartPole-v1"
    assert found.environment.max_episode_steps == 12
    assert found.action_space == spaces.Discrete(2)
    for (start, *steps), episode in zip(rows, found, strict=True):
        np.testing.assert_array_equal(episode.observation, [start, *(row[1] for row in steps)])
        for place, name in enumerate(("action", "observation", "reward", "terminated", "truncated")):
            if name != "observation":
                np.testing.assert_array_equal(getattr(episode, name), [row[place] for row in steps])
    # And back again, with the environment that made it.
    write_minari("cartpole/copy-v0", found)
    copy = minari.load_dataset("cartpole/copy-v0")
    assert copy.env_spec.id == "CartPole-v1"
    assert copy.recover_environment().spec.max_episode_steps == 12
    np.testing.assert_array_equal(read_minari("cartpole/copy-v0")[1].observation, found[1].observation)
    steps = found.transitions()
    assert len(steps.reward) == found.num_steps


def test_spaces_are_taken_from_the_data():
    given = recorded(observation_space=None, action_space=None)
    with pytest.raises(InputError, match=r"observation_space is None, but observation\['touch'\] is discrete"):
        write_minari("robot/camera-v1", given)
    bare = [Episode(e.observation["camera"], e.action, e.reward) for e in given]
    write_minari("robot/camera-v1", Demonstrations(tuple(bare)))
    found = read_minari("robot/camera-v1")
    assert found.observation_space == spaces.Box(0, 255, (40, 48, 3), np.uint8)
    assert found.action_space == spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert (found.fps, found[0].task, found[0].success) == (None, "", None)


def test_an_episode_without_a_last_observation():
    short = [Episode(e.observation["robot"]["pose"][:-1], e.action, e.reward) for e in recorded()]
    every = Demonstrations(tuple(short))
    with pytest.raises(InputError, match=r"episodes\[0\] has as many observations as actions"):
        write_minari("robot/pose-v0", every)
    write_minari("robot/pose-v0", every, repeat_final=True)
    seen = read_minari("robot/pose-v0")[1].observation
    np.testing.assert_array_equal(seen[:-1], short[1].observation)
    np.testing.assert_array_equal(seen[-1], seen[-2])


def test_nothing_is_overwritten_and_nothing_half_written_is_left(root):
    write_minari("robot/camera-v1", recorded())
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="name is 'robot/camera-v1', but it must be new"):
        write_minari("robot/camera-v1", recorded((4,)))
    with pytest.raises(InputError, match="environment is 'Nowhere-v0', which Gymnasium cannot make"):
        write_minari("robot/other-v1", recorded(environment="Nowhere-v0"))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    assert not (root / "robot" / "other-v1").exists()


def test_a_root_of_ones_own_is_used_for_the_call_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.chdir(tmp_path)
    write_minari("robot/pose-v0", recorded(), root="elsewhere")
    assert (tmp_path / "elsewhere" / "robot" / "pose-v0" / "data" / "main_data.hdf5").is_file()
    assert len(read_minari("robot/pose-v0", root="elsewhere")) == 2
    assert len(read_minari("elsewhere/robot/pose-v0")) == 2
    assert "MINARI_DATASETS_PATH" not in os.environ
    monkeypatch.setenv("MINARI_DATASETS_PATH", "elsewhere")
    write_minari("robot/pose-v1", recorded())
    assert len(read_minari("robot/pose-v1")) == 2
    assert os.environ["MINARI_DATASETS_PATH"] == "elsewhere"


def test_bad_input_is_told(root, monkeypatch):
    given = recorded()
    for name in ("camera", "robot/camera", "../camera-v0", "robot camera-v0"):
        with pytest.raises(InputError, match=f"name is '{name}', but it must be"):
            write_minari(name, given)
    with pytest.raises(InputError, match=r"episodes\[0\].reward is None"):
        write_minari("a-v0", Demonstrations((Episode(np.zeros((3, 1)), np.zeros((2, 1))),)))
    narrow = spaces.Box(-0.1, 0.1, (2,), np.float32)
    with pytest.raises(InputError, match=r"episodes\[0\].action has the value .* outside of its space"):
        write_minari("a-v0", recorded(action_space=narrow))
    with pytest.raises(InputError, match=r"episodes\[0\].action's shape is \(3, 2\), but it must be \[T, 3\]"):
        write_minari("a-v0", recorded(action_space=spaces.Box(-1, 1, (3,), np.float32)))
    with pytest.raises(InputError, match=r"episodes\[0\].observation is .*a dictionary with \['camera'\]"):
        write_minari("a-v0", recorded(observation_space=spaces.Dict({"camera": SPACE["camera"]})))
    with pytest.raises(InputTypeError, match="action_space is a Text"):
        write_minari("a-v0", recorded(action_space=spaces.Text(3)))
    assert list(root.iterdir()) == []

    write_minari("robot/camera-v1", given)
    with pytest.raises(InputError, match="Unknown Minari dataset 'robot/camra-v1': did you mean 'robot/camera-v1'"):
        read_minari("robot/camra-v1")
    with pytest.raises(InputError, match="dataset is 'nothing here', but it must be a folder"):
        read_minari("nothing here")
    with pytest.raises(InputError, match="episodes is 2, but it must be from 0 to 1"):
        read_minari("robot/camera-v1", episodes=[2])
    minari.create_dataset_from_buffers("empty-v0", [], observation_space=SPACE, action_space=SPACE)
    with pytest.raises(InputError, match="dataset is 'empty-v0', but it must be one with episodes"):
        read_minari("empty-v0")
    metadata = root / "empty-v0" / "data" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"minari_version": "0.0.1"}))
    with pytest.raises(InputError, match="which Minari cannot open"):
        read_minari("empty-v0")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"package h5py: install it with pip install 'steersman\[robotics\]'"):
        read_minari("robot/camera-v1")
