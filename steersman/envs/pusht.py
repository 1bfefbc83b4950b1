"""Push-T, as the package gym-pusht has it, and an expert that plans its pushes in a copy of the simulator."""

from __future__ import annotations

import importlib
import math
import os
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Float

from steersman.envs.demonstrations import Demonstrations
from steersman.envs.expert_recording import record_expert
from steersman.errors import InputError, require, require_number, unknown_name

ID = "gym_pusht/PushT-v0"
OBSERVATIONS = ("state", "environment_state_agent_pos", "pixels", "pixels_agent_pos")
TASK = "Push the T onto its outline."

#: Radius of the agent's disc, and the highest coordinate that an action can name, in pixels.
RADIUS, SIDE = 15.0, 512.0

#: Where the block is to be: x, y and angle.
GOAL = np.asarray([256.0, 256.0, 0.25 * math.pi])

#: The T's outline in its own frame, counter-clockwise where y points upwards.
OUTLINE = np.asarray([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], float)


def _gym_pusht() -> Any:
    # pygame greets on standard output, which may be holding a document.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        importlib.import_module("gym_pusht")
        return importlib.import_module("gym_pusht.envs.pusht")
    except ImportError as error:
        raise InputError("Push-T needs gym-pusht: install it with pip install 'steersman[robotics]'.") from error


def make_push_t(obs_type: str = "state", **options: Any) -> gymnasium.Env:
    """The environment ``gym_pusht/PushT-v0`` (Florence et al., 2021, arXiv:2109.00137; Chi et al., 2023).

    A disc pushes a T-shaped block onto its outline. An action is where the disc shall be ``[x, y]``, in pixels from 0
    to 512; a step takes 0.1 s and an episode at most 300 of them. The reward is the covered share of the outline over
    0.95, and at 1 the episode ends as a success.

    Args:
        obs_type: ``"state"`` ``[5]``: the agent's x and y, the block's x, y and angle;
            ``"environment_state_agent_pos"``: a dict of ``agent_pos [2]`` and the block's corners
            ``environment_state [16]``; ``"pixels"``: a picture in bytes ``[96, 96, 3]``; ``"pixels_agent_pos"``: a
            dict of ``agent_pos`` and ``pixels``.
        options: further arguments of the environment.

    Raises:
        InputError: the kind of observation is unknown, or gym-pusht is missing.
    """
    if obs_type not in OBSERVATIONS:
        raise unknown_name("obs_type", obs_type, OBSERVATIONS)
    _gym_pusht()
    return gymnasium.make(ID, obs_type=obs_type, disable_env_checker=True, **options)


def push_t_state(environment: Any) -> Float[np.ndarray, "5"]:
    """What ``"state"`` observes, whatever the environment observes."""
    inner = environment.unwrapped
    agent, block = inner.agent, inner.block
    return np.asarray([*agent.position, *block.position, block.angle % (2 * math.pi)])


def outline_at(poses: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 8 2"]:
    """The T's corners where it has these poses (x, y and angle)."""
    cos, sin = np.cos(poses[:, 2:]), np.sin(poses[:, 2:])
    x, y = OUTLINE[:, 0], OUTLINE[:, 1]
    return np.stack([cos * x - sin * y + poses[:, :1], sin * x + cos * y + poses[:, 1:2]], axis=-1)


def coverage(poses: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, " N"]:
    """Share of the goal's area that the T covers, for each of its poses."""
    import shapely

    goal = shapely.Polygon(outline_at(GOAL[None])[0])
    covered = shapely.intersection(shapely.polygons(outline_at(poses)), goal)
    return np.asarray(shapely.area(covered)) / goal.area


class _Push(NamedTuple):
    """A straight push: from where the agent's centre starts, in which direction, how far, and what it leads to."""

    start: np.ndarray
    direction: np.ndarray
    length: float
    pose: np.ndarray
    value: float


class _Simulator:
    """A copy of the environment's block and walls, in which a disc moves along straight lines at constant speed.

    The block has no momentum (its velocity is damped to zero at every step), so what a push does depends on its path
    and hardly on its speed.
    """

    def __init__(self) -> None:
        pymunk: Any = importlib.import_module("pymunk")
        parts = _gym_pusht().PushTEnv
        self.space = pymunk.Space()
        self.space.damping = 0.0
        corners = [(5, 5), (506, 5), (506, 506), (5, 506)]
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            self.space.add(parts.add_segment(self.space, a, b, 2))
        self.agent = parts.add_circle(self.space, (256, 400), RADIUS)
        self.block, _ = parts.add_tee(self.space, (256, 300), 0)

    def push(self, pose: np.ndarray, start: np.ndarray, velocity: np.ndarray, steps: int) -> np.ndarray:
        """The block's poses ``[steps, 3]`` after each 0.01 s."""
        # The angle turns the block about its centre of mass, so the position is set after it.
        self.block.angle = float(pose[2])
        self.block.position = float(pose[0]), float(pose[1])
        self.block.velocity, self.block.angular_velocity = (0.0, 0.0), 0.0
        self.agent.position = float(start[0]), float(start[1])
        self.agent.velocity = float(velocity[0]), float(velocity[1])
        for body in (self.block, self.agent):
            self.space.reindex_shapes_for_body(body)
        poses = np.empty((steps, 3))
        for i in range(steps):
            self.space.step(0.01)
            poses[i] = *self.block.position, self.block.angle
        return poses


class PushTExpert:
    """Solves Push-T by a search over straight pushes, two of them ahead, in a copy of the simulator.

    A push starts beside a point of the T's outline, drawn anew for every plan, and goes against the outline there; its
    length is chosen by what the simulator says of it. Poses are judged by the distance of the T's corners from where
    they shall be and, near the goal, by coverage. Between pushes the agent takes the shortest way around the block.

    It reads ``"state"`` observations. An instance plays one episode.
    """

    #: Free space between the agent and the outline where a push starts, and on the way there, in pixels.
    _GAP, _CLEARANCE = 3.0, 6.0
    #: How far its target is ahead of the agent in pushes; in fast ones it sinks into the block, and less is as planned.
    _PUSHING, _FINISHING = 60.0, 30.0
    #: Steps of 0.01 s that a push is tried for.
    _STEPS = 60

    def __init__(self, random: np.random.Generator, *, lead: float = 80.0, spacing: float = 15.0, beam: int = 6):
        """Makes the copy of the simulator.

        Args:
            random: where pushes are tried.
            lead: how far ahead of the agent its target is at most, in pixels: the larger, the faster.
            spacing: distance of neighbouring points at which pushes are tried, in pixels.
            beam: first pushes that a second one is tried after.
        """
        require_number("lead", lead, above=0.0)
        require_number("spacing", spacing, above=0.0)
        require(beam >= 0, "beam", beam, "at least 0")
        self._random, self._lead, self._spacing, self._beam = random, float(lead), float(spacing), int(beam)
        self._simulator = _Simulator()
        self._plan: _Push | None = None
        self._path: list[np.ndarray] = []
        self._planned_at = np.zeros(3)
        self._pushing = False
        self._waited = 0

    def __call__(self, state: Float[np.ndarray, "5"]) -> Float[np.ndarray, "2"]:
        """The action ``[x, y]`` at a state: the agent's x and y, the block's x, y and angle."""
        state = np.asarray(state, np.float64)
        require(state.shape == (5,), "state's shape", state.shape, "(5,)")
        require_number("state", state)
        agent, pose = state[:2], state[2:]
        self._waited += 1
        if self._plan is not None and self._is_over(self._plan, agent, pose):
            self._plan = None
        if self._plan is None:
            self._plan = self._search(agent, pose)
            self._path = _way_around(agent, self._plan.start, pose, self._CLEARANCE)
            self._planned_at, self._pushing, self._waited = pose, False, 0
        plan = self._plan
        if not self._pushing and math.dist(agent, plan.start) < self._GAP:
            self._pushing, self._waited = True, 0
        if self._pushing:
            along = float((agent - plan.start) @ plan.direction)
            ahead = min(self._lead, self._PUSHING if plan.value > 20.0 else self._FINISHING)
            target = plan.start + plan.direction * min(plan.length, along + ahead)
        else:
            target = self._next_on_path(agent, pose)
        return np.clip(target, 0.0, SIDE)

    def _is_over(self, plan: _Push, agent: np.ndarray, pose: np.ndarray) -> bool:
        if not self._pushing:
            return self._waited > 40 or bool(np.max(np.abs(pose - self._planned_at)[:2]) > 2.0)
        left = plan.length - float((agent - plan.start) @ plan.direction)
        return self._waited > 25 or left < (0.7 if plan.value < 20.0 else 4.0)

    def _next_on_path(self, agent: np.ndarray, pose: np.ndarray) -> np.ndarray:
        import shapely

        blocked = shapely.Polygon(outline_at(pose[None])[0]).buffer(RADIUS - 0.5)
        while len(self._path) > 1 and (
            math.dist(self._path[0], agent) < 12.0 or not _length_within(agent, self._path[1], blocked) > 1.0
        ):
            self._path = self._path[1:]
        gap = self._path[0] - agent
        return agent + gap * min(1.0, self._lead / max(float(np.linalg.norm(gap)), 1e-9))

    # ---- planning

    def _search(self, agent: np.ndarray, pose: np.ndarray) -> _Push:
        now = float(_value(pose[None])[0])
        fine = now < 25.0
        starts, directions, lengths, poses, values = self._tries(pose, fine)
        # Of pushes that are worth the same, the one that is near.
        far = 0.02 * np.linalg.norm(starts - agent, axis=1)
        until = np.argmin(values, axis=1)
        scores = values[np.arange(len(starts)), until] + far
        order = np.argsort(scores)
        first = int(order[0])
        best, chosen = float(scores[first]), (first, int(until[first]))
        if best > 2.4:
            pairs = [(int(i), int(until[i])) for i in order[: self._beam]]
            if fine:
                # The way to the last pixel may lead away from it first.
                drawn = self._random.integers((0, 10), (len(starts), 40), (self._beam, 2))
                pairs += [(int(i), int(k)) for i, k in drawn]
            for i, k in pairs:
                if math.isfinite(values[i, k]):
                    following = self._tries(poses[i, k], fine)[-1]
                    score = float(following.min()) + float(far[i]) + 3.0 * min(1.0, now / 20.0)
                    if score < best:
                        best, chosen = score, (i, k)
        i, k = chosen
        return _Push(starts[i], directions[i], float(lengths[k]), poses[i, k], float(values[i, k]))

    def _tries(self, pose: np.ndarray, fine: bool) -> tuple[np.ndarray, ...]:
        """Pushes at a pose: starts, directions, lengths ``[K]``, poses after them ``[N, K, 3]``, values ``[N, K]``."""
        starts, directions = self._starts(pose)
        speed = 60.0 if fine else 200.0
        lengths = (np.arange(self._STEPS) + 1) * 0.01 * speed
        pairs = zip(starts, directions, strict=True)
        poses = np.stack([self._simulator.push(pose, s, speed * d, self._STEPS) for s, d in pairs])
        ends = starts[:, None] + directions[:, None] * lengths[:, None]
        reachable = np.all((ends > 2.0) & (ends < SIDE - 2.0), axis=-1)
        moved = np.abs(poses - pose) @ np.asarray([1.0, 1.0, 40.0]) > 0.3
        values = _value(poses.reshape(-1, 3)).reshape(reachable.shape)
        return starts, directions, lengths, poses, np.where(reachable & moved, values, np.inf)

    def _starts(self, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import shapely

        points, normals = [], []
        for a, b in zip(OUTLINE, np.roll(OUTLINE, -1, axis=0), strict=True):
            length = math.dist(a, b)
            along = (b - a) / length
            count = max(2, int(length / self._spacing))
            # Away from the corners, where a push would slip off.
            at = 4.0 + (np.arange(count) + self._random.uniform(size=count)) / count * (length - 8.0)
            points.append(a + at[:, None] * along)
            normals.append(np.tile([along[1], -along[0]], (count, 1)))
        normal = np.concatenate(normals)
        start = np.concatenate(points) + (RADIUS + self._GAP) * normal
        free = shapely.distance(shapely.points(start), shapely.Polygon(OUTLINE)) > RADIUS + 1.0
        cos, sin = math.cos(pose[2]), math.sin(pose[2])
        turn = np.asarray([[cos, sin], [-sin, cos]])
        start, normal = start[free] @ turn + pose[:2], normal[free] @ turn
        within = np.all((start > 3.0) & (start < SIDE - 3.0), axis=1)
        return start[within], -normal[within]


def _value(poses: np.ndarray) -> np.ndarray:
    """How far poses are from the goal, in pixels: 2.5 where coverage is 0.95."""
    away = outline_at(poses) - outline_at(GOAL[None])
    value = np.sqrt(np.mean(np.sum(away**2, axis=-1), axis=-1))
    near = np.flatnonzero(value < 8.0)
    if near.size:
        value[near] = 50.0 * (1.0 - coverage(poses[near]))
    return value


def _length_within(start: np.ndarray, end: np.ndarray, area: Any) -> float:
    import shapely

    return float(shapely.LineString([start, end]).intersection(area).length)


def _way_around(start: np.ndarray, end: np.ndarray, pose: np.ndarray, clearance: float) -> list[np.ndarray]:
    """Waypoints of the shortest way of the agent's centre around the block, the last of them `end`."""
    import shapely
    from scipy.sparse.csgraph import dijkstra

    block = shapely.Polygon(outline_at(pose[None])[0])
    blocked = block.buffer(RADIUS - 0.5)
    ring = np.asarray(block.buffer(RADIUS + clearance, join_style="mitre").exterior.coords[:-1])
    nodes = np.concatenate([start[None], np.clip(ring, 3.0, SIDE - 3.0), end[None]])
    count = len(nodes)
    lines = np.stack([np.repeat(nodes, count, axis=0), np.tile(nodes, (count, 1))], axis=1)
    within = shapely.length(shapely.intersection(shapely.linestrings(lines), blocked)).reshape(count, count)
    cost = np.linalg.norm(nodes[:, None] - nodes, axis=-1)
    # Through the block only where walls leave no other way.
    cost = np.where(within > 1.0, cost + 1e3 + 20.0 * within, cost) + 1e-9
    _, before = dijkstra(cost, indices=0, return_predecessors=True)
    path = [count - 1]
    while before[path[-1]] > 0:
        path.append(int(before[path[-1]]))
    return [nodes[i] for i in reversed(path)]


def demonstrations(
    episodes: int,
    seed: int,
    *,
    obs_type: str = "state",
    noise: float = 0.0,
    only_successes: bool = True,
    lead: float = 80.0,
) -> Demonstrations:
    """Episodes of :class:`PushTExpert`.

    Args:
        episodes: how many.
        seed: what all randomness comes from.
        obs_type: what is recorded, see :func:`make_push_t`.
        noise: standard deviation of what is added to actions, in pixels.
        only_successes: leave out episodes that did not reach the goal and play others in their place.
        lead: see :class:`PushTExpert`.
    """
    require_number("noise", noise, at_least=0.0)
    return record_expert(
        make_push_t(obs_type),
        lambda random: PushTExpert(random, lead=lead),
        push_t_state,
        episodes,
        seed,
        noise=noise,
        only_successes=only_successes,
        task=TASK,
    )
