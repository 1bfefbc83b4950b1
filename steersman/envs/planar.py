"""Small tasks in the plane, with two equally good ways around: where policies of a single mode fall short.

Discs and gates are parts with parameters as leaves. A disc is entered where a step ends inside of it, whatever the way
there; a gate is passed where the straight line of a step crosses it. The scripted experts and the exact policies of
these tasks are in :mod:`steersman.envs.planar_experts`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jaxtyping import Array, Bool, Float, Int, Key

from steersman.envs.environment import Environment
from steersman.errors import InputError, require, require_count, require_number

Number = Float[Array, ""] | float | int
Point = Float[Array, "2"] | tuple[float, float]


def _real(value: Any) -> Array:
    return jnp.asarray(value, jnp.result_type(float))


# ---- geometry


def distance(a: Float[Array, "*#batch 2"], b: Float[Array, "*#batch 2"]) -> Float[Array, "..."]:
    """Euclidean distance of points, with a gradient of zero where they meet; leading axes broadcast."""
    squared = jnp.sum((a - b) ** 2, axis=-1)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(squared.dtype).tiny))


def clip_length(vector: Float[Array, "*batch n"], limit: Number) -> Float[Array, "*batch n"]:
    """Vectors along the last axis, shortened to a length of at most `limit`."""
    squared = jnp.sum(vector**2, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.maximum(squared, jnp.finfo(squared.dtype).tiny))
    return vector * jnp.minimum(1.0, limit / length)


class Discs(eqx.Module):
    """Round obstacles.

    Attributes:
        center: of each ``[M, 2]``.
        radius: of each ``[M]``.
    """

    center: Float[Array, "M 2"] = eqx.field(converter=_real)
    radius: Float[Array, " M"] = eqx.field(converter=_real)

    def __check_init__(self) -> None:
        require_number("center", self.center)
        require_number("radius", self.radius, above=0.0)
        require(len(self.radius) == len(self.center), "radius's length", len(self.radius), f"{len(self.center)}")

    def clearance(self, point: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
        """Distance of points to the nearest rim, negative inside; infinite where there is no disc."""
        free = distance(point[..., None, :], self.center) - self.radius
        return jnp.min(free, axis=-1, initial=jnp.inf)

    def contains(self, point: Float[Array, "*batch 2"]) -> Bool[Array, "*batch"]:
        """Whether points are inside of a disc."""
        return self.clearance(point) < 0


class Gate(eqx.Module):
    """An opening in the vertical line at ``x``, which is crossed from left to right.

    Attributes:
        x: where the line is.
        center: height of the opening's middle.
        half_width: half of the opening's width.
    """

    x: Float[Array, ""] = eqx.field(converter=_real)
    center: Float[Array, ""] = eqx.field(converter=_real)
    half_width: Float[Array, ""] = eqx.field(converter=_real)

    def __check_init__(self) -> None:
        require_number("x", self.x)
        require_number("center", self.center)
        require_number("half_width", self.half_width, above=0.0)

    def cross(
        self, before: Float[Array, "*batch 2"], after: Float[Array, "*batch 2"]
    ) -> tuple[Bool[Array, "*batch"], Bool[Array, "*batch"]]:
        """Whether a straight move crosses the line, and whether it does so through the opening."""
        crossed = (before[..., 0] < self.x) & (after[..., 0] >= self.x)
        run = jnp.where(crossed, after[..., 0] - before[..., 0], 1.0)
        height = before[..., 1] + (self.x - before[..., 0]) / run * (after[..., 1] - before[..., 1])
        return crossed, crossed & (jnp.abs(height - self.center) < self.half_width)


# ---- detour and reach


class PlanarState(NamedTuple):
    """Where a point is, and for how long the episode runs.

    Attributes:
        position: ``[2]``.
        time: steps taken.
    """

    position: Float[Array, "2"]
    time: Int[Array, ""]


class DetourReachParams(eqx.Module):
    """What may vary from copy to copy of :class:`DetourReach`.

    Attributes:
        start: mean of the first position ``[2]``.
        start_noise: standard deviation of its height.
        goal: ``[2]``.
        goal_radius: distance that counts as reached.
        obstacles: discs that must not be entered.
        max_step: longest move of a step.
        noise: standard deviation of what is added to a move, in each direction.
    """

    start: Float[Array, "2"] = eqx.field(converter=_real, default=(-1.0, 0.0))
    start_noise: Float[Array, ""] = eqx.field(converter=_real, default=0.02)
    goal: Float[Array, "2"] = eqx.field(converter=_real, default=(1.0, 0.0))
    goal_radius: Float[Array, ""] = eqx.field(converter=_real, default=0.1)
    obstacles: Discs = eqx.field(default_factory=lambda: Discs([[0.0, 0.0]], [0.4]))
    max_step: Float[Array, ""] = eqx.field(converter=_real, default=0.15)
    noise: Float[Array, ""] = eqx.field(converter=_real, default=0.02)

    def __check_init__(self) -> None:
        require_number("start", self.start)
        require_number("goal", self.goal)
        for name in ("start_noise", "noise"):
            require_number(name, getattr(self, name), at_least=0.0)
        for name in ("goal_radius", "max_step"):
            require_number(name, getattr(self, name), above=0.0)


class DetourReach(Environment):
    """Reach a point behind a disc, on either side of it; to enter the disc fails.

    Actions are absolute positions, observations the current one: ``p' = p + clip(a - p, max_step) + noise``, clipped
    in length. An episode ends with 1 at the goal and with 0 in the disc, and is truncated after `num_steps`.

    Attributes:
        noise: see :class:`DetourReachParams`.
        num_steps: steps after which an episode is truncated.
    """

    noise: float = eqx.field(static=True, default=0.02)
    num_steps: int = eqx.field(static=True, default=50)

    def __check_init__(self) -> None:
        require_number("noise", self.noise, at_least=0.0)
        require_count("num_steps", self.num_steps)

    @property
    def name(self) -> str:
        return "detour-reach"

    @property
    def default_params(self) -> DetourReachParams:
        return DetourReachParams(noise=self.noise)

    def observation_space(self, params: DetourReachParams) -> spaces.Box:
        del params
        return spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, params: DetourReachParams) -> spaces.Box:
        del params
        return spaces.Box(-1.5, 1.5, (2,), np.float32)

    def reset_env(self, key: Key[Array, ""], params: DetourReachParams) -> tuple[Array, PlanarState]:
        position = _start(key, params.start, params.start_noise)
        return position, PlanarState(position, jnp.asarray(0, jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: PlanarState, action: Float[Array, "2"], params: DetourReachParams
    ) -> tuple[Array, PlanarState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        position = _move_to(key, state.position, action, params.max_step, params.noise)
        collision = params.obstacles.contains(position)
        success = ~collision & (distance(position, params.goal) < params.goal_radius)
        info = {"success": success, "collision": collision}
        reward = success.astype(position.dtype)
        return position, PlanarState(position, state.time + 1), reward, success | collision, info

    def is_truncated(self, state: PlanarState, params: DetourReachParams) -> Bool[Array, ""]:
        del params
        return state.time >= self.num_steps


def _start(key: Array, start: Array, noise: Array) -> Array:
    return start + jnp.asarray([0.0, 1.0], start.dtype) * noise * jax.random.normal(key, dtype=start.dtype)


def _move_to(key: Array, position: Array, action: Array, max_step: Array, noise: Array) -> Array:
    require(action.shape == (2,), "action's shape", action.shape, "(2,)")
    action = jnp.asarray(action, position.dtype)
    return position + clip_length(action - position, max_step) + noise * jax.random.normal(key, (2,), position.dtype)


# ---- detour, then hold a drifting goal


class DriftingGoalState(NamedTuple):
    """A point, its goal, and how the episode stands.

    Attributes:
        position: ``[2]``.
        goal: ``[2]``.
        direction: 1 where the goal moves up, -1 where it moves down.
        collided: whether the obstacle was ever entered.
        score: reward so far.
        time: steps taken.
    """

    position: Float[Array, "2"]
    goal: Float[Array, "2"]
    direction: Float[Array, ""]
    collided: Bool[Array, ""]
    score: Float[Array, ""]
    time: Int[Array, ""]


class DriftingGoalParams(eqx.Module):
    """What may vary from copy to copy of :class:`DriftingGoal`.

    Attributes:
        start: mean of the first position ``[2]``.
        start_noise: standard deviation of its height.
        goal_x: where the line is on which the goal moves.
        goal_spread: the goal starts within this distance of height 0.
        goal_limit: height at which the goal turns back.
        speed: of the goal, per step.
        radius: distance that counts as held.
        obstacles: discs that must not be entered.
        max_step: longest move of a step.
        noise: standard deviation of what is added to a move, in each direction.
    """

    start: Float[Array, "2"] = eqx.field(converter=_real, default=(-2.2, 0.0))
    start_noise: Float[Array, ""] = eqx.field(converter=_real, default=0.02)
    goal_x: Float[Array, ""] = eqx.field(converter=_real, default=0.0)
    goal_spread: Float[Array, ""] = eqx.field(converter=_real, default=0.3)
    goal_limit: Float[Array, ""] = eqx.field(converter=_real, default=0.4)
    speed: Float[Array, ""] = eqx.field(converter=_real, default=0.02)
    radius: Float[Array, ""] = eqx.field(converter=_real, default=0.1)
    obstacles: Discs = eqx.field(default_factory=lambda: Discs([[-1.35, 0.0]], [0.35]))
    max_step: Float[Array, ""] = eqx.field(converter=_real, default=0.2)
    noise: Float[Array, ""] = eqx.field(converter=_real, default=0.01)

    def __check_init__(self) -> None:
        require_number("start", self.start)
        require_number("goal_x", self.goal_x)
        for name in ("start_noise", "goal_spread", "speed", "noise"):
            require_number(name, getattr(self, name), at_least=0.0)
        for name in ("goal_limit", "radius", "max_step"):
            require_number(name, getattr(self, name), above=0.0)


class DriftingGoal(Environment):
    """Get around a disc on either side, then hold a goal that drifts up and down and turns at its limits.

    Actions are absolute positions, as in :class:`DetourReach`; the observation is the position and the goal ``[4]``.
    The task is `num_steps` long. An episode's return is its score: the fraction of the last `scored_steps` at whose
    end the goal is within `radius`, and zero if the obstacle was ever entered (what had been paid is taken back).

    ``info`` has ``tracking`` (the goal is within `radius`), ``scored`` (this step counts) and ``collision`` (the
    obstacle was entered, now or before), so that tracking alone can be scored too.

    Attributes:
        speed: see :class:`DriftingGoalParams`.
        radius: see :class:`DriftingGoalParams`.
        num_steps: length of the task.
        scored_steps: how many steps count, the last ones.
    """

    speed: float = eqx.field(static=True, default=0.02)
    radius: float = eqx.field(static=True, default=0.1)
    num_steps: int = eqx.field(static=True, default=60)
    scored_steps: int = eqx.field(static=True, default=20)

    def __check_init__(self) -> None:
        require_number("speed", self.speed, at_least=0.0)
        require_number("radius", self.radius, above=0.0)
        require_count("num_steps", self.num_steps)
        require_count("scored_steps", self.scored_steps)
        require(
            self.scored_steps <= self.num_steps, "scored_steps", self.scored_steps, f"at most {self.num_steps} steps"
        )

    @property
    def name(self) -> str:
        return "drifting-goal"

    @property
    def default_params(self) -> DriftingGoalParams:
        return DriftingGoalParams(speed=self.speed, radius=self.radius)

    def observation_space(self, params: DriftingGoalParams) -> spaces.Box:
        del params
        return spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def action_space(self, params: DriftingGoalParams) -> spaces.Box:
        del params
        return spaces.Box(-2.5, 2.5, (2,), np.float32)

    def reset_env(self, key: Key[Array, ""], params: DriftingGoalParams) -> tuple[Array, DriftingGoalState]:
        start_key, goal_key, direction_key = jax.random.split(key, 3)
        position = _start(start_key, params.start, params.start_noise)
        height = params.goal_spread * jax.random.uniform(goal_key, dtype=position.dtype, minval=-1.0)
        goal = jnp.stack([params.goal_x, height])
        direction = jax.random.rademacher(direction_key, (), position.dtype)
        zero = jnp.zeros((), position.dtype)
        state = DriftingGoalState(position, goal, direction, jnp.asarray(False), zero, jnp.asarray(0, jnp.int32))
        return jnp.concatenate([position, goal]), state

    def step_env(
        self, key: Key[Array, ""], state: DriftingGoalState, action: Float[Array, "2"], params: DriftingGoalParams
    ) -> tuple[Array, DriftingGoalState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        position = _move_to(key, state.position, action, params.max_step, params.noise)
        height = state.goal[1] + state.direction * params.speed
        beyond = jnp.abs(height) > params.goal_limit
        height = jnp.where(beyond, jnp.sign(height) * 2 * params.goal_limit - height, height)
        goal = jnp.stack([state.goal[0], height])
        direction = jnp.where(beyond, -state.direction, state.direction)
        time = state.time + 1
        collided = state.collided | params.obstacles.contains(position)
        tracking = distance(position, goal) < params.radius
        scored = time > self.num_steps - self.scored_steps
        score = state.score + (tracking & scored) / jnp.asarray(self.scored_steps, position.dtype)
        score = jnp.where(collided, 0.0, score)
        following = DriftingGoalState(position, goal, direction, collided, score, time)
        info = {"tracking": tracking, "scored": scored, "collision": collided}
        observation = jnp.concatenate([position, goal])
        return observation, following, score - state.score, time >= self.num_steps, info


# ---- two obstacles and a gate


class ObstacleGateParams(eqx.Module):
    """What may vary from copy to copy of :class:`ObstacleGate`.

    Attributes:
        start: mean of the first position ``[2]``.
        start_noise: standard deviation of its height.
        step_length: move of an action of 1, in each direction.
        obstacles: discs that must not be entered.
        gate: what must be crossed.
    """

    start: Float[Array, "2"] = eqx.field(converter=_real, default=(-1.0, 0.0))
    start_noise: Float[Array, ""] = eqx.field(converter=_real, default=0.02)
    step_length: Float[Array, ""] = eqx.field(converter=_real, default=0.1)
    obstacles: Discs = eqx.field(default_factory=lambda: Discs([[-0.4, 0.0], [0.3, 0.0]], [0.3, 0.25]))
    gate: Gate = eqx.field(default_factory=lambda: Gate(1.0, 0.0, 0.1))

    def __check_init__(self) -> None:
        require_number("start", self.start)
        require_number("start_noise", self.start_noise, at_least=0.0)
        require_number("step_length", self.step_length, above=0.0)


class ObstacleGate(Environment):
    """Pass two discs and cross a line through a narrow gate: one reward, at the very end.

    ``p' = p + 0.1 clip(a, -1, 1)``; the observation is the position. Entering a disc or crossing the line beside the
    gate ends an episode with 0, crossing it in the gate with 1. Nothing but the start is random. For policies of
    action chunks see :class:`~steersman.envs.ChunkedEnvironment`: nine chunks of four actions fill an episode.

    Attributes:
        num_steps: steps after which an episode is truncated.
    """

    num_steps: int = eqx.field(static=True, default=36)

    def __check_init__(self) -> None:
        require_count("num_steps", self.num_steps)

    @property
    def name(self) -> str:
        return "obstacle-gate"

    @property
    def default_params(self) -> ObstacleGateParams:
        return ObstacleGateParams()

    def observation_space(self, params: ObstacleGateParams) -> spaces.Box:
        del params
        return spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, params: ObstacleGateParams) -> spaces.Box:
        del params
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset_env(self, key: Key[Array, ""], params: ObstacleGateParams) -> tuple[Array, PlanarState]:
        position = _start(key, params.start, params.start_noise)
        return position, PlanarState(position, jnp.asarray(0, jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: PlanarState, action: Float[Array, "2"], params: ObstacleGateParams
    ) -> tuple[Array, PlanarState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        del key
        require(action.shape == (2,), "action's shape", action.shape, "(2,)")
        action = jnp.asarray(action, state.position.dtype)
        position = state.position + params.step_length * jnp.clip(action, -1.0, 1.0)
        collision = params.obstacles.contains(position)
        crossed, through = params.gate.cross(state.position, position)
        success = through & ~collision
        info = {"success": success, "collision": collision}
        reward = success.astype(position.dtype)
        return position, PlanarState(position, state.time + 1), reward, collision | crossed, info

    def is_truncated(self, state: PlanarState, params: ObstacleGateParams) -> Bool[Array, ""]:
        del params
        return state.time >= self.num_steps


# ---- a hidden target


class HiddenTargetState(NamedTuple):
    """What a policy without memory cannot know.

    Attributes:
        target: 1 or -1, times the distance of the targets.
        tries: how often it has been tried.
    """

    target: Float[Array, ""]
    tries: Int[Array, ""]


class HiddenTargetParams(eqx.Module):
    """What may vary from copy to copy of :class:`HiddenTarget`.

    Attributes:
        offset: the target is at plus or minus this number.
        radius: distance to the target that counts as a hit.
        cost: of every try.
    """

    offset: Float[Array, ""] = eqx.field(converter=_real, default=1.0)
    radius: Float[Array, ""] = eqx.field(converter=_real, default=0.2)
    cost: Float[Array, ""] = eqx.field(converter=_real, default=0.0)

    def __check_init__(self) -> None:
        require_number("offset", self.offset, at_least=0.0)
        require_number("radius", self.radius, above=0.0)
        require_number("cost", self.cost, at_least=0.0)


class HiddenTarget(Environment):
    """Hit one of two targets without being told which, nor what was tried: the best policy has two modes.

    The target, ``+1`` or ``-1`` with equal chances, stays the same for up to `num_tries`; the observation is always 1.
    An action within `radius` pays 1 and ends the episode, as does the last try; every try costs `cost`. A policy
    without memory is described in full by its two hit probabilities: see :func:`hidden_target_success` and
    :func:`hidden_target_value` for its exact scores, :func:`best_gaussian` for the best of one mode.

    Attributes:
        num_tries: tries in an episode.
        radius: see :class:`HiddenTargetParams`.
        cost: see :class:`HiddenTargetParams`.
    """

    num_tries: int = eqx.field(static=True, default=10)
    radius: float = eqx.field(static=True, default=0.2)
    cost: float = eqx.field(static=True, default=0.0)

    def __check_init__(self) -> None:
        require_count("num_tries", self.num_tries)
        require_number("radius", self.radius, above=0.0)
        require_number("cost", self.cost, at_least=0.0)

    @property
    def name(self) -> str:
        return "hidden-target"

    @property
    def default_params(self) -> HiddenTargetParams:
        return HiddenTargetParams(radius=self.radius, cost=self.cost)

    def observation_space(self, params: HiddenTargetParams) -> spaces.Box:
        del params
        return spaces.Box(1.0, 1.0, (1,), np.float32)

    def action_space(self, params: HiddenTargetParams) -> spaces.Box:
        del params
        return spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def reset_env(self, key: Key[Array, ""], params: HiddenTargetParams) -> tuple[Array, HiddenTargetState]:
        target = params.offset * jax.random.rademacher(key, (), params.offset.dtype)
        return jnp.ones(1, target.dtype), HiddenTargetState(target, jnp.asarray(0, jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: HiddenTargetState, action: Float[Array, "1"], params: HiddenTargetParams
    ) -> tuple[Array, HiddenTargetState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        del key
        require(action.shape == (1,), "action's shape", action.shape, "(1,)")
        hit = jnp.abs(action[0] - state.target) < params.radius
        reward = hit.astype(state.target.dtype) - params.cost
        tries = state.tries + 1
        terminated = hit | (tries >= self.num_tries)
        following = HiddenTargetState(state.target, tries)
        return jnp.ones(1, state.target.dtype), following, reward, terminated, {"success": hit}


def hidden_target_success(
    hit_probability: Float[Array, "*batch 2"] | Float[np.ndarray, "*batch 2"], num_tries: int = 10
) -> Float[Array, "*batch"] | Float[np.ndarray, "*batch"] | np.floating:
    """Exact chance that a policy without memory hits within `num_tries`: ``mean_h [1 - (1 - q_h)^T]``.

    Args:
        hit_probability: chance ``q`` of hitting each of the two targets with one action, if it is the true one.
        num_tries: tries ``T`` in an episode.
    """
    require_count("num_tries", num_tries)
    require_number("hit_probability", hit_probability, at_least=0.0, at_most=1.0)
    return (1 - (1 - hit_probability) ** num_tries).mean(axis=-1)


def hidden_target_value(
    hit_probability: Float[Array, "*batch 2"] | Float[np.ndarray, "*batch 2"],
    num_tries: int = 10,
    *,
    discount: Number = 1.0,
    cost: Number = 0.0,
) -> Float[Array, "*batch"] | Float[np.ndarray, "*batch"] | np.floating:
    """Exact expected discounted return: ``mean_h sum_{t<T} (discount (1 - q_h))^t (q_h - cost)``.

    Args:
        hit_probability: chance ``q`` of hitting each of the two targets with one action, if it is the true one.
        num_tries: tries ``T`` in an episode.
        discount: per try.
        cost: of every try.
    """
    require_count("num_tries", num_tries)
    require_number("hit_probability", hit_probability, at_least=0.0, at_most=1.0)
    require_number("discount", discount, at_least=0.0, at_most=1.0)
    require_number("cost", cost, at_least=0.0)
    alive = (discount * (1 - hit_probability))[..., None] ** np.arange(num_tries)
    return (alive.sum(axis=-1) * (hit_probability - cost)).mean(axis=-1)


class BestGaussian(NamedTuple):
    """The best policy of one mode for a hidden target.

    Attributes:
        score: its success, or its value.
        mean: of its actions.
        std: standard deviation of its actions; at the search's lower end where the best policy is deterministic.
    """

    score: float
    mean: float
    std: float


def best_gaussian(
    num_tries: int = 10,
    *,
    radius: float = 0.2,
    discount: float = 1.0,
    cost: float = 0.0,
    objective: str = "success",
) -> BestGaussian:
    """The Gaussian policy with the highest exact score on :class:`HiddenTarget`, by search over mean and spread.

    A grid finds the basin, a simplex search the maximum in it; both in double precision.

    Args:
        num_tries: tries in an episode.
        radius: distance to the target, at plus or minus 1, that counts as a hit.
        discount: per try.
        cost: of every try.
        objective: ``"success"`` (discount and cost do not matter) or ``"value"``.
    """
    from scipy.optimize import minimize
    from scipy.special import ndtr

    require_number("radius", radius, above=0.0)
    if objective not in ("success", "value"):
        raise InputError(f"objective is {objective!r}, but it must be 'success' or 'value'.")
    least = np.log(1e-3)

    def score(mean: Any, log_std: Any) -> Any:
        target = np.asarray([1.0, -1.0])
        std = np.exp(np.clip(log_std, least, 5.0))[..., None]
        gap = target - np.asarray(mean)[..., None]
        hit = np.clip(ndtr((gap + radius) / std) - ndtr((gap - radius) / std), 0.0, 1.0)
        if objective == "success":
            return hidden_target_success(hit, num_tries)
        return hidden_target_value(hit, num_tries, discount=discount, cost=cost)

    means, log_stds = np.meshgrid(np.linspace(0.0, 1.5, 61), np.linspace(least, np.log(4.0), 81), indexing="ij")
    grid = np.asarray(score(means, log_stds))
    start = np.unravel_index(np.argmax(grid), grid.shape)
    found = minimize(
        lambda x: -float(score(x[0], x[1])),
        np.asarray([means[start], log_stds[start]]),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-13, "maxiter": 2000},
    )
    mean, std = float(found.x[0]), float(np.exp(np.clip(found.x[1], least, 5.0)))
    return BestGaussian(float(-found.fun), abs(mean), std)


# ---- a grid with two walls


class TwoWallsState(NamedTuple):
    """A cell, and for how long the episode runs.

    Attributes:
        cell: column and row ``[2]``.
        time: steps taken.
    """

    cell: Int[Array, "2"]
    time: Int[Array, ""]


class TwoWallsParams(eqx.Module):
    """What may vary from copy to copy of :class:`TwoWalls`.

    Attributes:
        reward: for reaching one of the walls.
    """

    reward: Float[Array, ""] = eqx.field(converter=_real, default=20.0)

    def __check_init__(self) -> None:
        require_number("reward", self.reward)


class TwoWalls(Environment):
    """Walk a square grid to its lowest or highest rows: from the middle, up and down are equally good.

    The grid world of Flow Matching Policy Gradients (McAllister et al., 2025, arXiv:2507.21053). The observation is
    the cell, scaled to -1 .. 1; an action is clipped to -1 .. 1 and rounded to a neighbouring cell. The `depth` lowest
    and the `depth` highest rows pay 20 and end the episode; starts are uniform over the other cells.

    Attributes:
        size: rows and columns; an odd number, so that there is a middle.
        depth: rows of each wall.
        num_steps: steps after which an episode is truncated.
    """

    size: int = eqx.field(static=True, default=25)
    depth: int = eqx.field(static=True, default=2)
    num_steps: int = eqx.field(static=True, default=100)

    def __check_init__(self) -> None:
        for name in ("size", "depth", "num_steps"):
            require_count(name, getattr(self, name))
        require(self.size % 2 == 1 and self.size > 2 * self.depth, "size", self.size, f"odd and above {2 * self.depth}")

    @property
    def name(self) -> str:
        return "two-walls"

    @property
    def default_params(self) -> TwoWallsParams:
        return TwoWallsParams()

    def observation_space(self, params: TwoWallsParams) -> spaces.Box:
        del params
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    def action_space(self, params: TwoWallsParams) -> spaces.Box:
        del params
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    def observe(self, cell: Int[Array, "*batch 2"], params: TwoWallsParams) -> Float[Array, "*batch 2"]:
        """Cells as coordinates from -1 to 1, the middle at 0."""
        half = (self.size - 1) // 2
        return (cell - half).astype(params.reward.dtype) / half

    def reset_env(self, key: Key[Array, ""], params: TwoWallsParams) -> tuple[Array, TwoWallsState]:
        lowest = jnp.asarray([0, self.depth])
        cell = jax.random.randint(key, (2,), lowest, self.size - lowest, jnp.int32)
        return self.observe(cell, params), TwoWallsState(cell, jnp.asarray(0, jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: TwoWallsState, action: Float[Array, "2"], params: TwoWallsParams
    ) -> tuple[Array, TwoWallsState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        del key
        require(action.shape == (2,), "action's shape", action.shape, "(2,)")
        move = jnp.round(jnp.clip(action, -1.0, 1.0)).astype(jnp.int32)
        cell = jnp.clip(state.cell + move, 0, self.size - 1)
        success = (cell[1] < self.depth) | (cell[1] >= self.size - self.depth)
        reward = jnp.where(success, params.reward, 0.0)
        return self.observe(cell, params), TwoWallsState(cell, state.time + 1), reward, success, {"success": success}

    def is_truncated(self, state: TwoWallsState, params: TwoWallsParams) -> Bool[Array, ""]:
        del params
        return state.time >= self.num_steps
