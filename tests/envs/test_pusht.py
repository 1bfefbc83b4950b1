"""Push-T: the expert's geometry is the environment's, and it solves the task."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import as_problem, make, names
from steersman.envs.scripted_experts import demonstrate
from steersman.errors import InputError, RunError
from steersman.policies import ChunkPolicy
from steersman.training import evaluate
from steersman.training.host import record_host_episode

pytest.importorskip("gym_pusht", reason="gym-pusht is not installed")

from steersman.envs import pusht
from steersman.envs.expert_recording import play_expert


@pytest.fixture(scope="module")
def environment():
    env = pusht.make_push_t()
    yield env
    env.close()


def placed(environment, agent, pose):
    """The environment with its bodies at exactly these places."""
    environment.reset(seed=0)
    inner = environment.unwrapped
    inner.block.angle, inner.block.position = float(pose[2]), (float(pose[0]), float(pose[1]))
    inner.agent.position, inner.agent.velocity = (float(agent[0]), float(agent[1])), (0.0, 0.0)
    for body in (inner.block, inner.agent):
        inner.space.reindex_shapes_for_body(body)
    return inner


def test_coverage_is_the_environments(environment):
    random = np.random.default_rng(0)
    poses = pusht.GOAL + random.normal(size=(8, 3)) * [20.0, 20.0, 0.5]
    theirs = [placed(environment, (20, 20), pose)._get_coverage() for pose in poses]
    np.testing.assert_allclose(pusht.coverage(poses), theirs, atol=1e-9)
    assert pusht.coverage(pusht.GOAL[None])[0] == pytest.approx(1.0)
    corners = pusht.outline_at(poses[-1:])[0]
    keypoints = environment.unwrapped.get_keypoints(environment.unwrapped._block_shapes)
    for corner in corners:
        assert np.min(np.linalg.norm(keypoints - corner, axis=1)) < 1e-6


def test_a_push_does_in_the_copy_what_it_does_in_the_environment(environment):
    pose = np.asarray([256.0, 200.0, 0.3])
    direction = np.asarray([-np.sin(0.3), np.cos(0.3)])
    # Against the bar's long side, off its middle: the block turns while it moves.
    start = pose[:2] + np.asarray([np.cos(0.3), np.sin(0.3)]) * 35.0 - 18.0 * direction
    predicted = pusht._Simulator().push(pose, start, 60.0 * direction, 60)[-1]
    inner = placed(environment, start, pose)
    for length in [*np.linspace(4.0, 36.0, 12), *[36.0] * 8]:
        environment.step(start + length * direction)
    found = np.asarray([*inner.block.position, inner.block.angle])
    assert np.linalg.norm(predicted[:2] - pose[:2]) > 5.0
    assert abs(predicted[2] - pose[2]) > 0.1
    np.testing.assert_allclose(found[:2], predicted[:2], atol=1.0)
    assert found[2] == pytest.approx(predicted[2], abs=0.03)


def test_the_way_around_the_block_is_free():
    import shapely

    random = np.random.default_rng(1)
    for _ in range(5):
        pose = np.asarray([*random.uniform(180, 330, 2), random.uniform(-3, 3)])
        block = shapely.Polygon(pusht.outline_at(pose[None])[0])
        start, end = random.uniform(20, 490, (2, 2))
        if block.distance(shapely.Point(start)) < 16 or block.distance(shapely.Point(end)) < 16:
            continue
        way = pusht._way_around(start, end, pose, 6.0)
        np.testing.assert_array_equal(way[-1], end)
        # The agent's centre stays a radius away, but for half a pixel and what a corner of the ring may cut.
        assert shapely.LineString([start, *way]).distance(block) > pusht.RADIUS - 1.0


def test_the_expert_solves_the_task(environment):
    for seed in (3, 7):
        expert = pusht.PushTExpert(np.random.default_rng(seed))
        played = play_expert(environment, expert, pusht.push_t_state, seed=seed)
        episode = played.episode
        assert episode.success[-1]
        assert not episode.success[:-1].any()
        assert played.infos[-1]["coverage"] > 0.95
        assert episode.reward[-1] == 1.0
        assert episode.observation.shape == (len(episode) + 1, 5)


def test_demonstrations_are_repeatable_whatever_is_observed():
    shown = pusht.demonstrations(1, 5, obs_type="environment_state_agent_pos")
    again = demonstrate("push-t", 1, 5)
    np.testing.assert_array_equal(shown[0].action, again[0].action)
    assert shown[0].observation["environment_state"].shape == (len(shown[0]) + 1, 16)
    np.testing.assert_array_equal(shown[0].observation["agent_pos"], again[0].observation[:, :2])
    assert shown.fps == 10
    assert shown.environment.id == pusht.ID
    assert list(shown.successes) == [True]


class Steps(eqx.Module):
    """A chunk that moves away from where the agent was at the window's beginning."""

    def __call__(self, window, key):
        return window["agent_pos"][0] + jnp.arange(6.0)[:, None]


def test_a_policy_of_chunks_acts_through_the_bridge():
    problem = make("push-t", obs_type="environment_state_agent_pos")
    policy = ChunkPolicy(Steps(), 4, problem.observation_space, observation_horizon=2, first_row=1)
    played = record_host_episode(problem, policy, seed=0, max_steps=8)
    seen = played["observations"]["agent_pos"]
    first = seen[0] + np.arange(1.0, 5.0)[:, None]
    second = seen[3] + np.arange(1.0, 5.0)[:, None]
    np.testing.assert_allclose(played["actions"], np.concatenate([first, second]), atol=1e-4)
    assert played["frames"][0].ndim == 3
    judged = evaluate(policy, problem, episodes=1, max_steps=3)
    assert judged.lengths == [3]


def test_the_id_is_known_before_its_package_is_imported(monkeypatch):
    assert pusht.ID in names()
    problem = as_problem(pusht.ID)
    assert problem.observation_space.shape == (5,)
    assert make("PushT").spec.id == pusht.ID
    pixels = make("gymnasium:" + pusht.ID, obs_type="pixels_agent_pos").observation_space
    assert pixels["pixels"].shape == (96, 96, 3)
    assert pixels["pixels"].dtype == np.uint8
    with pytest.raises(InputError, match="obs_type': 'touch'"):
        make(pusht.ID, obs_type="touch")
    with pytest.raises(InputError, match="did you mean 'gym_pusht/PushT-v0'"):
        make("gym_pusht/PushT-v9")
    import gymnasium

    monkeypatch.delitem(gymnasium.registry, pusht.ID)
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"steersman\[robotics\]"):
        make(pusht.ID)
    with pytest.raises(InputError, match=r"steersman\[robotics\]"):
        pusht.make_push_t()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: pusht.make_push_t("touch"), "obs_type 'touch'"),
        (lambda: pusht.demonstrations(1, 0, obs_type="touch"), "obs_type 'touch'"),
        (lambda: pusht.demonstrations(1, 0, noise=-1.0), "noise is -1"),
        (lambda: pusht.demonstrations(0, 0), "episodes is 0"),
        (lambda: pusht.demonstrations(1, -1), "seed is -1"),
        (lambda: pusht.demonstrations(1, 0, lead=0.0), "lead is 0"),
        (lambda: pusht.PushTExpert(np.random.default_rng(0), spacing=-1.0), "spacing is -1"),
        (lambda: pusht.PushTExpert(np.random.default_rng(0), beam=-1), "beam is -1"),
        (lambda: pusht.PushTExpert(np.random.default_rng(0))(np.zeros(4)), "state"),
        (lambda: pusht.PushTExpert(np.random.default_rng(0))(np.full(5, np.nan)), "state is"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    # Shapes and kinds of arguments are refused by the type checker before the library sees them, where it is on.
    with pytest.raises((InputError, TypeError), match=argument):
        call()


def test_an_expert_that_hardly_ever_succeeds_is_told(monkeypatch):
    monkeypatch.setattr(pusht, "PushTExpert", lambda random, lead: lambda state: state[:2])
    make_whole = pusht.make_push_t

    def make_short(obs_type):
        env = make_whole(obs_type)
        env._max_episode_steps = 2
        return env

    monkeypatch.setattr(pusht, "make_push_t", make_short)
    with pytest.raises(RunError, match=r"0 of 10 episodes.*lower the noise"):
        pusht.demonstrations(1, 0)
    kept = pusht.demonstrations(2, 0, only_successes=False)
    assert [len(episode) for episode in kept] == [2, 2]
    assert all(episode.truncated[-1] for episode in kept)
    assert jax.tree.all(jax.tree.map(lambda leaf: np.isfinite(leaf).all(), kept[0].observation))
