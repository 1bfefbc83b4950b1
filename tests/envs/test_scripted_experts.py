import numpy as np
import pytest

from steersman.envs import scripted_experts
from steersman.envs.demonstrations import Demonstrations, Episode
from steersman.envs.scripted_experts import demonstrate, demonstrated_tasks, register_expert
from steersman.errors import InputError


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(scripted_experts, "_SOURCES", dict(scripted_experts._SOURCES))


@pytest.fixture(scope="module")
def gate():
    return demonstrate("obstacle-gate", 60, seed=1)


def test_episodes_are_what_the_gate_does_with_their_actions(gate):
    for episode in gate:
        seen, action = episode.observation, episode.action
        # Nothing but the start is random, so that the recording can be played by hand.
        np.testing.assert_allclose(seen[1:], seen[:-1] + 0.1 * np.clip(action, -1, 1), atol=1e-6)
        np.testing.assert_allclose(seen[0, 0], -1.0)
        assert abs(seen[0, 1]) < 0.1
        # An episode ends at the line, in a disc, or where it is cut; before that, never.
        ended = episode.terminated | episode.truncated
        assert ended[-1]
        assert not ended[:-1].any()
        (x, y), (next_x, next_y) = seen[-2:]
        passed = next_x >= 1.0 and abs(y + (1.0 - x) / (next_x - x) * (next_y - y)) < 0.1
        assert bool(episode.success[-1]) == passed
        np.testing.assert_array_equal(episode.reward, episode.success)


def test_both_ways_are_taken(gate):
    heights = np.asarray([episode.observation[len(episode) // 2, 1] for episode in gate])
    assert 0.2 < np.mean(heights > 0) < 0.8
    above = demonstrate("obstacle-gate", 60, seed=1, up=1.0)
    assert all(episode.observation[len(episode) // 2, 1] > 0 for episode in above)
    assert gate.successes.mean() > 0.6


def test_a_set_knows_its_spaces_and_repeats_with_its_seed(gate):
    assert (len(gate), gate.fps, gate.environment) == (60, 10, None)
    assert gate[0].task == "pass the two discs and cross the line in the gate"
    for episode in gate:
        assert all(action in gate.action_space for action in episode.action)
        assert all(seen in gate.observation_space for seen in episode.observation)
    again, other = demonstrate("obstacle-gate", 60, seed=1), demonstrate("obstacle-gate", 60, seed=2)
    np.testing.assert_array_equal(again[7].observation, gate[7].observation)
    assert not np.array_equal(other[7].observation[0], gate[7].observation[0])


def test_the_other_planar_experts_reach_their_goals():
    detour = demonstrate("detour-reach", 20)
    assert detour.successes.all()
    for episode in detour:
        assert np.linalg.norm(episode.observation[-1] - [1.0, 0.0]) < 0.1
        assert np.linalg.norm(episode.observation, axis=1).min() > 0.4
    drifting = demonstrate("drifting-goal", 20)
    assert {len(episode) for episode in drifting} == {60}
    assert drifting.returns.mean() > 0.5


def test_an_expert_is_registered_by_function_or_by_place(registry):
    def still(episodes, seed, *, length=2):
        return Demonstrations(tuple(Episode(np.zeros((length, 1)), np.zeros((length, 1))) for _ in range(episodes)))

    register_expert("still", still)
    assert demonstrate("still", 3, length=4).num_steps == 12
    register_expert("gate-again", "steersman.envs.scripted_experts:obstacle_gate")
    assert {"still", "gate-again", "push-t", "pick-and-place"} <= set(demonstrated_tasks())
    with pytest.raises(InputError, match="source is 'nowhere'"):
        register_expert("other", "nowhere")
    for name in ("", "still"):
        with pytest.raises(InputError, match=f"name is '{name}', but it must be new"):
            register_expert(name, still)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("detour-reech", {"episodes": 1}, "Unknown task 'detour-reech': did you mean 'detour-reach'"),
        ("detour-reach", {"episodes": 0}, "episodes is 0"),
        ("detour-reach", {"episodes": 1, "seed": -1}, "seed is -1"),
        (
            "detour-reach",
            {"episodes": 1, "noize": 1.0},
            "Unknown setting of detour-reach 'noize': did you mean 'noise'",
        ),
        ("detour-reach", {"episodes": 1, "noise": -1.0}, "noise is -1.0"),
        ("detour-reach", {"episodes": 1, "up": 2.0}, "up is 2.0"),
        ("detour-reach", {"episodes": 1, "num_steps": 0}, "num_steps is 0"),
    ],
)
def test_bad_input_is_told(task, arguments, message):
    with pytest.raises(InputError, match=message):
        demonstrate(task, **arguments)
