"""Pictures of the planar tasks: what must be passed, what must be reached, and the way so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from steersman.envs.chunked import ChunkedEnvironment
from steersman.envs.planar import DetourReach, DriftingGoal, HiddenTarget, ObstacleGate, TwoWalls
from steersman.envs.rendering import (
    BLUE,
    FAINT,
    GREEN,
    GROUND,
    ORANGE,
    QUIET,
    Circle,
    Line,
    Point,
    Polygon,
    Real,
    Scene,
    SceneFunction,
    Shape,
    Text,
    arrow,
)

_OBSTACLE, _EDGE = "#d9d5cc", "#b9b3a5"


def is_planar(environment: Any) -> bool:
    """Whether there is a picture of the environment here; also of one in chunks."""
    return isinstance(_inner(environment), (DetourReach, DriftingGoal, ObstacleGate, HiddenTarget, TwoWalls))


def seconds_shown(environment: Any) -> float:
    """How long a step is shown for; these tasks have no unit of time."""
    return 0.25 if isinstance(_inner(environment), (HiddenTarget, TwoWalls)) else 0.1


def planar_scene(environment: Any) -> SceneFunction:
    """What draws the states of a planar task.

    An arrow shows the action, of a chunk the rows one after the other.
    """
    inner = _inner(environment)
    chunked = inner is not environment
    draw = {
        DetourReach: _detour_reach,
        DriftingGoal: _drifting_goal,
        ObstacleGate: _obstacle_gate,
        HiddenTarget: _hidden_target,
        TwoWalls: _two_walls,
    }[type(inner)]

    def scene(state: Any, params: Any, action: Any) -> Scene:
        rows = np.asarray(action, float)
        return draw(inner, state, params, rows if chunked else rows[None])

    return scene


def with_way(environment: Any, scenes: Sequence[Scene], states: PyTree, shown: Sequence[int]) -> list[Scene]:
    """The scenes with the way that led there, behind all else.

    Args:
        environment: the task.
        scenes: one for each step that is shown.
        states: of all steps, leaves ``[T, ...]``.
        shown: numbers of the steps that are shown.
    """
    inner = _inner(environment)
    if isinstance(inner, HiddenTarget):
        return list(scenes)
    places = np.asarray(states.cell if isinstance(inner, TwoWalls) else states.position, float)
    way = [(float(x), float(y)) for x, y in places]
    return [
        dataclasses.replace(scene, shapes=[Line(way[: t + 1], "#9db7d2", 2), *scene.shapes]) if t else scene
        for scene, t in zip(scenes, shown, strict=True)
    ]


def _inner(environment: Any) -> Any:
    return environment.environment if isinstance(environment, ChunkedEnvironment) else environment


def _point(value: Any) -> Point:
    x, y = np.asarray(value, float)
    return float(x), float(y)


def _discs(discs: Any) -> list[Shape]:
    pairs = zip(np.asarray(discs.center, float), np.asarray(discs.radius, float), strict=True)
    return [Circle(_point(center), float(radius), _OBSTACLE, _EDGE) for center, radius in pairs]


def _view(points: Sequence[Any], margin: Real, height: Real) -> tuple[Real, Real, Real, Real]:
    corners = np.asarray(points, float)
    (left, bottom), (right, top) = corners.min(axis=0) - margin, corners.max(axis=0) + margin
    return float(left), float(right), float(min(bottom, -height)), float(max(top, height))


def _agent(place: Point, size: Real, ends: np.ndarray, head: Real) -> list[Shape]:
    """The point, and arrows from it to one end after the other."""
    shapes: list[Shape] = []
    before = place
    for end in ends:
        shapes += arrow(before, _point(end), ORANGE, 2.0, head)
        before = _point(end)
    return [*shapes, Circle(place, size, BLUE)]


def _detour_reach(environment: Any, state: Any, params: Any, actions: np.ndarray) -> Scene:
    del environment
    goal, place = _point(params.goal), _point(state.position)
    shapes: list[Shape] = [
        *_discs(params.obstacles),
        Circle(goal, float(params.goal_radius), "#cfe5d6", GREEN),
        *_agent(place, 0.035, actions, 0.07),
    ]
    return Scene(shapes, _view([params.start, goal, place], 0.3, 0.95))


def _drifting_goal(environment: Any, state: Any, params: Any, actions: np.ndarray) -> Scene:
    del environment
    goal, place, limit = _point(state.goal), _point(state.position), float(params.goal_limit)
    shapes: list[Shape] = [
        *_discs(params.obstacles),
        Line([(goal[0], -limit), (goal[0], limit)], FAINT, 1.5),
        Circle(goal, float(params.radius), "#cfe5d6", GREEN),
        *_agent(place, 0.035, actions, 0.07),
    ]
    return Scene(shapes, _view([params.start, (goal[0], limit), place], 0.3, 0.95))


def _obstacle_gate(environment: Any, state: Any, params: Any, actions: np.ndarray) -> Scene:
    del environment
    place, step = _point(state.position), float(params.step_length)
    x, middle, half = (float(value) for value in (params.gate.x, params.gate.center, params.gate.half_width))
    ends = np.asarray(place) + step * np.cumsum(np.clip(actions, -1.0, 1.0), axis=0)
    shapes: list[Shape] = [
        *_discs(params.obstacles),
        Line([(x, -9.0), (x, middle - half)], QUIET, 3),
        Line([(x, middle + half), (x, 9.0)], QUIET, 3),
        Line([(x, middle - half), (x, middle + half)], GREEN, 1.5),
        *_agent(place, 0.03, ends, 0.05),
    ]
    return Scene(shapes, _view([params.start, (x, middle), place], 0.3, 0.8))


def _hidden_target(environment: Any, state: Any, params: Any, actions: np.ndarray) -> Scene:
    offset, radius, target = (float(value) for value in (params.offset, params.radius, state.target))
    tries = int(state.tries)
    shapes: list[Shape] = [Line([(-9.0, 0.0), (9.0, 0.0)], FAINT, 1.5)]
    for place in (-offset, offset):
        true = place == target
        shapes.append(Circle((place, 0.0), radius, "#cfe5d6" if true else _OBSTACLE, GREEN if true else _EDGE))
        shapes.append(Text((place, -radius - 0.12), f"{place:g}", 12))
    reach = max(offset + radius, float(np.max(np.abs(actions)))) + 0.3
    for action in actions[:, 0]:
        shapes.append(Line([(float(action), 0.45), (float(action), 0.0)], ORANGE, 2))
        shapes.append(Circle((float(action), 0.0), 0.035, BLUE))
    shapes.append(Text((0.0, -0.62), f"try {tries + 1} of {environment.num_tries}", 12))
    return Scene(shapes, (-reach, reach, -0.85, 0.75), size=(480, 220))


def _two_walls(environment: Any, state: Any, params: Any, actions: np.ndarray) -> Scene:
    del params
    size, depth = environment.size, environment.depth
    low, high = -0.5, size - 0.5
    place = _point(state.cell)
    moves = np.cumsum(np.round(np.clip(actions, -1.0, 1.0)), axis=0)
    shapes: list[Shape] = []
    for bottom, top in ((low, low + depth), (high - depth, high)):
        shapes.append(Polygon([(low, bottom), (high, bottom), (high, top), (low, top)], "#cfe5d6", GREEN))
    shapes.append(Line([(low, low), (high, low), (high, high), (low, high), (low, low)], QUIET, 1.5))
    middle = 0.5 * (size - 1)
    shapes.append(Line([(low, middle), (high, middle)], GROUND, 1.5))
    shapes += _agent(place, 0.45, np.asarray(place) + moves, 0.6)
    margin = 0.04 * size
    return Scene(shapes, (low - margin, high + margin, low - margin, high + 2.4 * margin), size=(320, 330))
