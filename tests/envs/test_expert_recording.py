"""Experts are played on the host to the episode's end, and recorded with what was seen after it."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from steersman.envs.expert_recording import play_expert, record_expert
from steersman.errors import InputError, RunError


class Line(gymnasium.Env):
    """A point on a line that shall get beyond 1; both ends of an episode come from the action."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012
    observation_space = spaces.Dict({"place": spaces.Box(-9.0, 9.0, (1,), np.float64)})
    action_space = spaces.Box(-0.5, 0.5, (1,), np.float32)
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = float(self.np_random.uniform(-0.1, 0.1)), 0
        return {"place": np.asarray([self.place])}, {}

    def step(self, action):
        self.place += float(action[0])
        self.time += 1
        success = self.place > 1.0
        return {"place": np.asarray([self.place])}, float(success), success, self.time >= 4, {"is_success": success}

    def render(self):
        return np.full((2, 3, 3), self.time, np.uint8)


def place(inner):
    return inner.place


def test_an_episode_is_recorded_to_its_end():
    played = play_expert(
        Line(), lambda state: [0.7 if state < 0.4 else 0.9], place, seed=3, draw=True, task="get there"
    )
    episode = played.episode
    # Actions are recorded as they are played: within the space.
    np.testing.assert_array_equal(episode.action, np.full((len(episode), 1), 0.5, np.float32))
    seen = episode.observation["place"][:, 0]
    np.testing.assert_allclose(np.diff(seen), 0.5, atol=1e-6)
    assert seen.dtype == np.float32
    assert len(seen) == len(episode) + 1
    assert seen[-1] > 1.0 >= seen[-2]
    assert list(episode.success) == list(episode.terminated) == [False] * (len(episode) - 1) + [True]
    assert not episode.truncated.any()
    assert [int(frame[0, 0, 0]) for frame in played.frames] == list(range(len(episode) + 1))
    assert episode.task == "get there"
    assert play_expert(Line(), lambda state: [0.5], place, seed=3).frames == []


def test_failures_are_left_out_and_replaced():
    def make(random):
        step = random.choice([0.1, 0.5])
        return lambda state: [step]

    shown = record_expert(Line(), make, place, 6, 0)
    assert shown.successes.all()
    assert len(shown) == 6
    everything = record_expert(Line(), make, place, 6, 0, only_successes=False)
    assert 0 < everything.successes.sum() < 6
    kept = [episode for episode in everything if episode.success[-1]]
    np.testing.assert_array_equal(kept[0].observation["place"], shown[0].observation["place"])
    starts = [float(episode.observation["place"][0, 0]) for episode in shown]
    assert len(set(starts)) == 6
    assert shown.fps == 5
    # A cut is not an end of the task.
    failed = next(episode for episode in everything if not episode.success[-1])
    assert (failed.truncated[-1], failed.terminated[-1]) == (True, False)


def test_noise_has_the_size_that_was_asked_for():
    shown = record_expert(Line(), lambda random: lambda state: [0.0], place, 100, 0, noise=0.1, only_successes=False)
    actions = np.concatenate([episode.action for episode in shown])
    assert actions.std() == pytest.approx(0.1, rel=0.1)
    assert abs(actions.mean()) < 0.02


def test_bad_input_is_refused_by_name():
    def make(random):
        return lambda state: [0.0]

    with pytest.raises(InputError, match="episodes is 0"):
        record_expert(Line(), make, place, 0, 0)
    with pytest.raises(InputError, match="seed is -1"):
        record_expert(Line(), make, place, 1, -1)
    with pytest.raises(InputError, match="seed is -1"):
        play_expert(Line(), make(None), place, seed=-1)
    with pytest.raises(RunError, match=r"succeeded in 0 of 20 episodes, so 2"):
        record_expert(Line(), make, place, 2, 0)
