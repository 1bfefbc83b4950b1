"""The planar tasks' pictures show what the tasks are made of, where it is."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from steersman.envs import (
    ChunkedEnvironment,
    DetourReach,
    Discs,
    DriftingGoal,
    HiddenTarget,
    ObstacleGate,
    Problem,
    TwoWalls,
    render_episode,
)
from steersman.envs.planar import DetourReachParams, DriftingGoalState, HiddenTargetState, PlanarState, TwoWallsState
from steersman.envs.rendering import BLUE, GREEN, ORANGE, Circle, Line, Polygon, Text, episode_scenes


def of(scene, kind, color=None):
    return [shape for shape in scene.shapes if isinstance(shape, kind) and color in (None, shape.color)]


def times(count):
    return np.arange(count, dtype=np.int32)


def test_detour_shows_discs_goal_and_way():
    params = DetourReachParams(obstacles=Discs([[0.0, 0.0], [0.5, 0.6]], [0.4, 0.1]), goal=(0.9, 0.1))
    places = np.asarray([[-1.0, 0.0], [-0.9, 0.1], [-0.8, 0.2]], np.float32)
    actions = np.asarray([[-0.5, 0.0], [-0.5, 0.5], [-0.7, 0.9]], np.float32)
    problem = Problem(DetourReach(), params)
    scenes, fps = episode_scenes(problem, PlanarState(places, times(3)), places, actions, np.asarray([0.0, 0.0, 1.0]))
    assert fps == pytest.approx(10.0)
    last = scenes[-1]
    discs = [(shape.center, pytest.approx(shape.radius)) for shape in of(last, Circle)]
    expected = [((0.0, 0.0), 0.4), ((0.5, 0.6), 0.1), ((0.9, 0.1), 0.1), ((-0.8, 0.2), 0.035)]
    for (center, radius), (theirs, size) in zip(discs, expected, strict=True):
        assert center == pytest.approx(theirs, abs=1e-6)
        assert size == radius
    assert of(last, Circle)[2].outline == GREEN
    assert of(last, Circle)[3].color == BLUE
    # The way leads from the first place to the newest one, behind all else.
    way = last.shapes[0]
    assert isinstance(way, Line)
    np.testing.assert_allclose(way.points, places, atol=1e-6)
    np.testing.assert_allclose(of(last, Polygon, ORANGE)[0].points[0], actions[2], atol=1e-6)
    assert last.captions == ("step 2", "return 1")
    assert all(scene.view == last.view for scene in scenes)
    assert not isinstance(scenes[0].shapes[0], Line)


def test_drifting_goal_moves():
    goals = np.asarray([[0.0, 0.1], [0.0, 0.12]], np.float32)
    places = np.asarray([[-2.2, 0.0], [-2.1, 0.1]], np.float32)
    zeros = np.zeros(2, np.float32)
    state = DriftingGoalState(places, goals, zeros + 1, zeros > 0, zeros, times(2))
    scenes, _ = episode_scenes(Problem(DriftingGoal()), state, places, places, zeros)
    shown = [next(shape for shape in of(scene, Circle) if shape.outline == GREEN) for scene in scenes]
    np.testing.assert_allclose([shape.center for shape in shown], goals, atol=1e-6)
    assert shown[0].radius == pytest.approx(0.1)


def test_gate_is_open_where_it_is_crossed():
    places = np.asarray([[-1.0, 0.0]], np.float32)
    scenes, _ = episode_scenes(
        Problem(ObstacleGate()), PlanarState(places, times(1)), places, np.asarray([[1.0, 9.0]]), np.zeros(1)
    )
    walls = [shape for shape in of(scenes[0], Line) if shape.width == 3]
    assert [wall.points[0][0] for wall in walls] == [1.0, 1.0]
    assert walls[0].points[1] == pytest.approx((1.0, -0.1))
    assert walls[1].points[0] == pytest.approx((1.0, 0.1))
    # Actions are clipped, so the arrow ends a step up and a step to the right.
    np.testing.assert_allclose(of(scenes[0], Polygon, ORANGE)[0].points[0], [-0.9, 0.1], atol=1e-6)


def test_chunks_are_arrows_one_after_the_other():
    problem = Problem(ChunkedEnvironment(ObstacleGate(), rows=3))
    places = np.asarray([[-1.0, 0.0]], np.float32)
    chunk = np.asarray([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]], np.float32)
    scenes, _ = episode_scenes(problem, PlanarState(places, times(1)), places, chunk, np.zeros(1))
    tips = [shape.points[0] for shape in of(scenes[0], Polygon, ORANGE)]
    np.testing.assert_allclose(tips, [[-0.9, 0.0], [-0.8, 0.1], [-0.8, 0.2]], atol=1e-6)


def test_the_true_target_is_marked():
    state = HiddenTargetState(np.asarray([-1.0, -1.0], np.float32), times(2))
    actions = np.asarray([[1.0], [-1.1]], np.float32)
    ones = np.ones((2, 1), np.float32)
    scenes, fps = episode_scenes(Problem(HiddenTarget(num_tries=7)), state, ones, actions, np.zeros(2))
    assert fps == pytest.approx(4.0)
    marked = [shape for shape in of(scenes[1], Circle) if shape.outline == GREEN]
    assert [shape.center for shape in marked] == [(-1.0, 0.0)]
    assert marked[0].radius == pytest.approx(0.2)
    assert of(scenes[1], Circle, BLUE)[0].center == pytest.approx((-1.1, 0.0))
    assert "try 2 of 7" in [shape.text for shape in of(scenes[1], Text)]


def test_walls_are_as_deep_as_they_are():
    state = TwoWallsState(np.asarray([[3, 4], [3, 5]], np.int32), times(2))
    seen = np.zeros((2, 2), np.float32)
    actions = np.asarray([[0.0, 1.0], [0.2, 0.9]], np.float32)
    scenes, _ = episode_scenes(Problem(TwoWalls(size=9, depth=2)), state, seen, actions, np.zeros(2))
    low, high = of(scenes[1], Polygon, "#cfe5d6")
    assert [np.asarray(wall.points)[:, 1].min() for wall in (low, high)] == [-0.5, 6.5]
    assert [np.asarray(wall.points)[:, 1].max() for wall in (low, high)] == [1.5, 8.5]
    assert of(scenes[1], Circle, BLUE)[0].center == (3.0, 5.0)
    # Rounded to a neighbouring cell.
    assert of(scenes[1], Polygon, ORANGE)[0].points[0] == (3.0, 6.0)
    data = render_episode(Problem(TwoWalls(size=9, depth=2)), state, seen, actions, np.zeros(2))
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert len(data) < 20_000


def test_without_states_the_values_are_shown_over_time():
    places = jnp.zeros((4, 2))
    scenes, _ = episode_scenes(Problem(DetourReach()), None, places, places, np.zeros(4))
    assert "observation[1]" in [shape.text for shape in of(scenes[0], Text)]
