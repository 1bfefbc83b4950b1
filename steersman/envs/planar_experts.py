"""Scripted experts, exact stochastic policies and demonstrations of the planar tasks, as array functions.

Chunks are ``[H, D]``: `H` rows of `D` numbers, waypoints or actions. An exact policy is a Gaussian mixture over the
chunk as one vector ``[H D]``, row after row, so that its noised scores are known in closed form. Everything here is
for one case; callers ``vmap``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.envs.chunked import ChunkedEnvironment
from steersman.envs.planar import Discs, Number, ObstacleGate, ObstacleGateParams, Point, clip_length, distance
from steersman.errors import require, require_count, require_number

Side = Float[Array, ""] | Int[Array, ""] | float | int


class ChunkMixture(NamedTuple):
    """A mixture of Gaussians over chunks as vectors, all of the covariance ``basis diag(variance) basis'``.

    In the order in which :class:`steersman.diffusion.Mixture` takes its parts.

    Attributes:
        log_weight: logarithm of each mode's weight; the weights sum to 1 ``[M]``.
        mean: ``[M, H D]``.
        variance: along the columns of the basis ``[H D]``.
        basis: orthonormal columns ``[H D, H D]``; None for the coordinate axes.
    """

    log_weight: Float[Array, " M"]
    mean: Float[Array, "M n"]
    variance: Float[Array, " n"]
    basis: Float[Array, "n n"] | None = None

    @property
    def weight(self) -> Float[Array, " M"]:
        """Of each mode."""
        return jnp.exp(self.log_weight)

    @property
    def covariance(self) -> Float[Array, "n n"]:
        """Of every mode."""
        return jnp.diag(self.variance) if self.basis is None else (self.basis * self.variance) @ self.basis.T


# ---- routes


def waypoint_route(
    position: Float[Array, "2"],
    waypoints: Float[Array, "W 2"],
    switch: Float[Array, " W-1"],
    step_length: Number,
    rows: int,
    *,
    gain: Number = 1.0,
) -> Float[Array, "rows 2"]:
    """The next positions of a point that heads for one waypoint after the other.

    A waypoint is headed for until the point is at or beyond its switch. Steps are `step_length` long, shorter where a
    waypoint is nearer, and ``gain`` times the distance at most on the way to the last one.

    Args:
        position: where the point is; it is not part of the route.
        waypoints: what is headed for, from left to right.
        switch: abscissa from which the next waypoint is headed for, of every waypoint but the last, ascending.
        step_length: longest step.
        rows: length of the route.
        gain: how much of the distance to the last waypoint a step covers at most.
    """
    require_count("rows", rows)
    require_number("step_length", step_length, above=0.0)
    require_number("gain", gain, above=0.0, at_most=1.0)
    require(len(switch) == len(waypoints) - 1, "switch's length", len(switch), f"{len(waypoints) - 1}, one less")
    position = position.astype(jnp.result_type(position, waypoints))

    def step(position: Array, _: None) -> tuple[Array, Array]:
        leg = jnp.sum(position[0] >= switch)
        gap = waypoints[leg] - position
        gap = jnp.where(leg == len(waypoints) - 1, gain, 1.0) * gap
        position = position + clip_length(gap, step_length)
        return position, position

    return jax.lax.scan(step, position, length=rows)[1]


def _point(value: Any, like: Array) -> Array:
    return jnp.asarray(value, like.dtype)


def _mirror(side: Any, like: Array) -> Array:
    """What a point above is multiplied with to be on a side."""
    return jnp.stack([jnp.ones((), like.dtype), jnp.asarray(side, like.dtype)])


def detour_route(
    position: Float[Array, "2"],
    side: Side,
    rows: int = 8,
    *,
    waypoint: Point = (0.0, 0.8),
    goal: Point = (1.0, 0.0),
    step_length: Number = 0.1,
) -> Float[Array, "rows 2"]:
    """The next positions of the expert of :class:`~steersman.envs.DetourReach`: above its disc, or below.

    Args:
        position: where the point is.
        side: 1 for above, -1 for below.
        rows: length of the route.
        waypoint: what is passed on the way above; its mirror image is passed below.
        goal: where the route ends.
        step_length: longest step.
    """
    via = _point(waypoint, position) * _mirror(side, position)
    waypoints = jnp.stack([via, _point(goal, position)])
    return waypoint_route(position, waypoints, via[:1] - 0.02, step_length, rows)


def drifting_route(
    position: Float[Array, "2"],
    goal: Float[Array, "2"],
    side: Side,
    rows: int = 8,
    *,
    waypoint: Point = (-1.35, 0.6),
    step_length: Number = 0.12,
    gain: Number = 0.25,
) -> Float[Array, "rows 2"]:
    """The next positions of the expert of :class:`~steersman.envs.DriftingGoal`, which takes the goal to stay.

    Args:
        position: where the point is.
        goal: where the goal is.
        side: 1 for above, -1 for below.
        rows: length of the route.
        waypoint: what is passed on the way above; its mirror image is passed below.
        step_length: longest step.
        gain: how much of the distance to the goal a step covers at most.
    """
    via = _point(waypoint, position) * _mirror(side, position)
    waypoints = jnp.stack([via, goal.astype(position.dtype)])
    return waypoint_route(position, waypoints, via[:1] - 0.02, step_length, rows, gain=gain)


def gate_route(
    position: Float[Array, "2"], side: Side, rows: int = 4, *, speed: Number = 0.09
) -> Float[Array, "rows 2"]:
    """The next positions of the expert of :class:`~steersman.envs.ObstacleGate`: by (-0.4, 0.5), (0.3, 0.42), (1.2, 0).

    Args:
        position: where the point is.
        side: 1 for above, -1 for below. Beyond the first waypoint it is the side that the point is on.
        rows: length of the route.
        speed: length of a step.
    """
    waypoints = jnp.asarray([[-0.4, 0.5], [0.3, 0.42], [1.2, 0.0]], position.dtype)
    own = jnp.where(position[1] >= 0, 1.0, -1.0)
    side = jnp.where(position[0] >= waypoints[0, 0] - 0.02, own, side)
    waypoints = waypoints * _mirror(side, position)
    return waypoint_route(position, waypoints, waypoints[:2, 0] - 0.02, speed, rows)


def gate_actions(
    position: Float[Array, "2"], side: Side, rows: int = 4, *, speed: Number = 0.09, step_length: Number = 0.1
) -> Float[Array, "rows 2"]:
    """The next actions of the expert of :class:`~steersman.envs.ObstacleGate`.

    Args:
        position: where the point is.
        side: see :func:`gate_route`.
        rows: length of the chunk.
        speed: length of a step.
        step_length: move of an action of 1.
    """
    require_number("step_length", step_length, above=0.0)
    route = gate_route(position, side, rows, speed=speed)
    return jnp.diff(route, axis=0, prepend=position[None]) / step_length


# ---- exact policies of two modes


def _two_modes(favour: Array, chunks: Array, std: Number) -> ChunkMixture:
    """Weights ``sigmoid(+-favour)`` on a chunk for each side ``[2, H, D]``."""
    require_number("std", std, above=0.0)
    return _isotropic(jax.nn.log_sigmoid(jnp.stack([favour, -favour])), chunks.reshape(2, -1), std)


def _isotropic(log_weight: Array, mean: Array, std: Number) -> ChunkMixture:
    return ChunkMixture(log_weight, mean, jnp.broadcast_to(jnp.asarray(std, mean.dtype) ** 2, mean.shape[1:]))


def detour_policy(
    position: Float[Array, "2"], rows: int = 8, *, std: Number = 0.03, softness: Number = 0.15, **route: Any
) -> ChunkMixture:
    """The exact policy of the detour: a chunk of positions along either route, by the side that the point is on.

    Args:
        position: the observation of :class:`~steersman.envs.DetourReach`.
        rows: positions in a chunk.
        std: of every number of a chunk around its route.
        softness: the weight of the side ``m`` is ``sigmoid(m y / softness)``.
        route: options of :func:`detour_route`.
    """
    require_number("softness", softness, above=0.0)
    sides = jnp.asarray([1.0, -1.0], position.dtype)
    chunks = jax.vmap(lambda side: detour_route(position, side, rows, **route))(sides)
    return _two_modes(position[1] / softness, chunks, std)


def drifting_policy(
    observation: Float[Array, "4"], rows: int = 8, *, std: Number = 0.02, softness: Number = 0.15, **route: Any
) -> ChunkMixture:
    """The exact policy of the drifting goal: a chunk of positions along either route to where the goal is now.

    Args:
        observation: position and goal, as :class:`~steersman.envs.DriftingGoal` gives them.
        rows: positions in a chunk.
        std: of every number of a chunk around its route.
        softness: the weight of the side ``m`` is ``sigmoid(m y / softness)``.
        route: options of :func:`drifting_route`.
    """
    require_number("softness", softness, above=0.0)
    position, goal = observation[:2], observation[2:]
    sides = jnp.asarray([1.0, -1.0], position.dtype)
    chunks = jax.vmap(lambda side: drifting_route(position, goal, side, rows, **route))(sides)
    return _two_modes(position[1] / softness, chunks, std)


# ---- open-loop reach around a disc


def reach_times(rows: int) -> Float[Array, " rows"]:
    """When the rows of a reach are: ``tau_j = j / rows``, from ``1 / rows`` to 1."""
    require_count("rows", rows)
    return jnp.arange(1, rows + 1) / rows


def reach_chunk(
    goal: Float[Array, "2"], side: Side, rows: int = 8, *, start: Point = (-2.0, 0.0), height: Number = 1.0
) -> Float[Array, "rows 2"]:
    """A line to the goal with a bump to one side: ``(1 - tau) start + tau goal + (0, side height sin(pi tau))``.

    Args:
        goal: the last row.
        side: 1 for a bump up, -1 for one down.
        rows: waypoints.
        start: where the line begins; it is not part of the chunk.
        height: of the bump.
    """
    tau = reach_times(rows).astype(goal.dtype)[:, None]
    bump = jnp.asarray([0.0, 1.0], goal.dtype) * height * side * jnp.sin(jnp.pi * tau)
    return (1 - tau) * _point(start, goal) + tau * goal + bump


def reach_success(
    chunk: Float[Array, "rows 2"],
    goal: Float[Array, "2"],
    *,
    obstacle: Discs | None = None,
    tolerance: Number = 0.15,
) -> Bool[Array, ""]:
    """Whether a chunk stays clear of the obstacles at every row and ends at the goal.

    Args:
        chunk: waypoints.
        goal: where the last one should be.
        obstacle: what must not be entered; a disc of radius 0.5 around (-1, 0) if None.
        tolerance: distance to the goal that is allowed.
    """
    obstacle = Discs([[-1.0, 0.0]], [0.5]) if obstacle is None else obstacle
    return jnp.all(obstacle.clearance(chunk) > 0) & (distance(chunk[-1], goal) < tolerance)


def reach_posterior(
    reading: Float[Array, "*sensors 2"],
    sensor_std: Float[Array, "*sensors 2"],
    rows: int = 8,
    *,
    prior_std: Number = 0.4,
    std: Number = 0.03,
    start: Point = (-2.0, 0.0),
    height: Number = 1.0,
) -> ChunkMixture:
    """What the expert of a reach does, given noisy readings of the goal: ``p(A | o_1, .., o_S)``, exactly.

    Demonstrations are ``A = c + m u + G g + noise`` with a goal ``g ~ N(0, prior_std^2)`` and a side ``m = +-1`` of
    equal chances (see :func:`reach_chunk`). Readings ``o_s = g + N(0, diag(sensor_std_s^2))`` leave the goal Gaussian
    with the variance ``V = 1 / (1 / prior_std^2 + sum_s 1 / sensor_std_s^2)`` in each direction and the mean
    ``V sum_s o_s / sensor_std_s^2``, so the chunk has two modes of covariance ``G V G' + std^2 I``. With one reading
    this is a policy of one sensor, with several their joint policy, with none (``S = 0``) the unconditional one.

    Args:
        reading: of the goal, by each sensor.
        sensor_std: standard deviation of each reading, in each direction.
        rows: waypoints in a chunk.
        prior_std: of the goal, in each direction.
        std: of the noise on every number of a demonstration.
        start: see :func:`reach_chunk`.
        height: see :func:`reach_chunk`.
    """
    require_number("reading", reading)
    require_number("sensor_std", sensor_std, above=0.0)
    require_number("prior_std", prior_std, above=0.0)
    require_number("std", std, above=0.0)
    require(
        sensor_std.shape == reading.shape, "sensor_std's shape", sensor_std.shape, f"that of reading, {reading.shape}"
    )
    dtype = reading.dtype
    precision = (1 / sensor_std**2).reshape(-1, 2)
    variance = 1 / (1 / jnp.asarray(prior_std, dtype) ** 2 + jnp.sum(precision, axis=0))
    goal = variance * jnp.sum(precision * reading.reshape(-1, 2), axis=0)
    sides = jnp.asarray([1.0, -1.0], dtype)
    mean = jax.vmap(lambda side: reach_chunk(goal, side, rows, start=start, height=height).reshape(-1))(sides)
    tau = reach_times(rows).astype(dtype)
    # G stacks tau_j I, so G V G' has V |tau|^2 along tau in each direction and nothing across it, whatever was read.
    along = jnp.zeros((rows, 2), dtype).at[0].set(jnp.dot(tau, tau) * variance)
    basis = jnp.kron(_orthonormal_from(tau), jnp.eye(2, dtype=dtype))
    return ChunkMixture(jnp.full(2, -math.log(2), dtype), mean, along.reshape(-1) + jnp.asarray(std, dtype) ** 2, basis)


def _orthonormal_from(vector: Array) -> Array:
    """An orthonormal basis ``[n, n]`` whose first column is along a vector of positive numbers: a reflection."""
    first = jnp.zeros_like(vector).at[0].set(1.0)
    mirror = vector / jnp.linalg.norm(vector) + first
    return 2 * jnp.outer(mirror, mirror) / jnp.dot(mirror, mirror) - jnp.eye(len(vector), dtype=vector.dtype)


def two_mode_chunk(
    goal: Float[Array, "1"], side: Side, rows: int = 4, *, height: Number = 0.8
) -> Float[Array, "rows 2"]:
    """A reach from (0, 0) to (1, goal): the chunk of the one-step distillation study.

    Args:
        goal: height of the goal, the observation.
        side: 1 for a bump up, -1 for one down.
        rows: waypoints.
        height: of the bump.
    """
    end = jnp.concatenate([jnp.ones(1, goal.dtype), goal])
    return reach_chunk(end, side, rows, start=(0.0, 0.0), height=height)


def two_mode_policy(
    goal: Float[Array, "1"], rows: int = 4, *, std: Number = 0.03, height: Number = 0.8, up: Number = 0.5
) -> ChunkMixture:
    """The exact policy of :func:`two_mode_chunk`.

    Args:
        goal: height of the goal, the observation.
        rows: waypoints.
        std: of every number of a chunk around its mode.
        height: of the bump.
        up: chance of a bump up.
    """
    require_number("std", std, above=0.0)
    require_number("up", up, at_least=0.0, at_most=1.0)
    sides = jnp.asarray([1.0, -1.0], goal.dtype)
    mean = jax.vmap(lambda side: two_mode_chunk(goal, side, rows, height=height).reshape(-1))(sides)
    up = jnp.asarray(up, goal.dtype)
    return _isotropic(jnp.log(jnp.stack([up, 1 - up])), mean, std)


class TwoModeScore(NamedTuple):
    """How a chunk does at :func:`two_mode_chunk`'s task.

    Attributes:
        success: whether the bump has its height within 0.15 and the last row its goal within 0.12.
        amplitude: of the bump, its least-squares coefficient; its sign is the side, near 0 is between the modes.
    """

    success: Bool[Array, ""]
    amplitude: Float[Array, ""]


def two_mode_score(chunk: Float[Array, "rows 2"], goal: Float[Array, "1"], *, height: Number = 0.8) -> TwoModeScore:
    """Whether a chunk is one of the two that were demonstrated.

    Args:
        chunk: waypoints.
        goal: height of the goal.
        height: of the bump.
    """
    tau = reach_times(len(chunk)).astype(chunk.dtype)
    bump = jnp.sin(jnp.pi * tau)
    amplitude = jnp.dot(chunk[:, 1] - goal * tau, bump) / jnp.dot(bump, bump)
    success = (jnp.abs(jnp.abs(amplitude) - height) < 0.15) & (jnp.abs(chunk[-1, 1] - goal[0]) < 0.12)
    return TwoModeScore(success, amplitude)


# ---- sensors


def image_reading(
    key: Key[Array, ""],
    goal: Float[Array, "2"],
    *,
    start: Point = (-2.0, 0.0),
    pixels: int = 24,
    bearing_noise: Number = 0.02,
    pixel_noise: Number = 0.05,
    width: Number = 0.06,
) -> Float[Array, " pixels"]:
    """A line of pixels that sees in which direction the goal is from the start, and not how far.

    Args:
        key: randomness.
        goal: what is seen.
        start: where the camera is.
        pixels: looking from -0.6 to 0.6 radian.
        bearing_noise: standard deviation of where the goal's spot is, in radian; 0.4 is a broken camera.
        pixel_noise: standard deviation of every intensity.
        width: of the spot, in radian.
    """
    require_count("pixels", pixels)
    require_number("bearing_noise", bearing_noise, at_least=0.0)
    require_number("pixel_noise", pixel_noise, at_least=0.0)
    require_number("width", width, above=0.0)
    bearing_key, pixel_key = jax.random.split(key)
    away = goal - _point(start, goal)
    bearing = jnp.arctan2(away[1], away[0]) + bearing_noise * jax.random.normal(bearing_key, dtype=goal.dtype)
    looks = jnp.linspace(-0.6, 0.6, pixels, dtype=goal.dtype)
    spot = jnp.exp(-((looks - bearing) ** 2) / (2 * width**2))
    return spot + pixel_noise * jax.random.normal(pixel_key, (pixels,), goal.dtype)


def cloud_reading(
    key: Key[Array, ""],
    goal: Float[Array, "2"],
    *,
    start: Point = (-2.0, 0.0),
    points: int = 16,
    sideways_noise: Number = 0.5,
    point_noise: Number = 0.08,
) -> Float[Array, "points 2"]:
    """Points around the goal that tell how far it is from the start, and badly in which direction.

    Args:
        key: randomness.
        goal: what is seen.
        start: where the sensor is.
        points: number of them.
        sideways_noise: standard deviation of a shift across the line of sight, the same for all points.
        point_noise: standard deviation of every coordinate.
    """
    require_count("points", points)
    require_number("sideways_noise", sideways_noise, at_least=0.0)
    require_number("point_noise", point_noise, at_least=0.0)
    shift_key, point_key = jax.random.split(key)
    away = goal - _point(start, goal)
    sight = away / distance(away, jnp.zeros_like(away))
    across = jnp.stack([-sight[1], sight[0]])
    shift = sideways_noise * jax.random.normal(shift_key, dtype=goal.dtype)
    return goal + shift * across + point_noise * jax.random.normal(point_key, (points, 2), goal.dtype)


# ---- demonstrations


class Demonstrations(NamedTuple):
    """Chunks and what was observed before each.

    Attributes:
        observation: ``[N, ...]``.
        chunk: ``[N, H, D]``.
        goal: what the chunk was made for, which a policy may not be told ``[N, ...]``.
        side: 1 or -1 ``[N]``.
    """

    observation: PyTree
    chunk: Float[Array, "N H D"]
    goal: Float[Array, "N _"]
    side: Float[Array, " N"]


def _sides(key: Array, count: int, up: Number) -> Array:
    require_number("up", up, at_least=0.0, at_most=1.0)
    return jnp.where(jax.random.bernoulli(key, up, (count,)), 1.0, -1.0)


def _reaches(key: Array, count: int, rows: int, prior_std: Number, std: Number, start: Point, height: Number) -> tuple:
    require_number("prior_std", prior_std, above=0.0)
    require_number("std", std, at_least=0.0)
    goal_key, side_key, noise_key = jax.random.split(key, 3)
    goal = prior_std * jax.random.normal(goal_key, (count, 2))
    side = _sides(side_key, count, 0.5)
    chunk = jax.vmap(lambda goal, side: reach_chunk(goal, side, rows, start=start, height=height))(goal, side)
    return goal, side, chunk + std * jax.random.normal(noise_key, chunk.shape)


def two_sensor_demonstrations(
    key: Key[Array, ""],
    count: int,
    sensor_std: Float[Array, "S 2"],
    rows: int = 8,
    *,
    prior_std: Number = 0.4,
    std: Number = 0.03,
    start: Point = (-2.0, 0.0),
    height: Number = 1.0,
) -> Demonstrations:
    """Reaches with the readings of every sensor ``[N, S, 2]``; their exact policies are :func:`reach_posterior`.

    Args:
        key: randomness.
        count: demonstrations ``N``.
        sensor_std: standard deviation of each sensor in each direction; ((0.05, 0.5), (0.5, 0.05)) is the pair of the
            study of composed policies.
        rows: waypoints in a chunk.
        prior_std: see :func:`reach_posterior`, also for the rest.
        std: as there.
        start: as there.
        height: as there.
    """
    require_count("count", count)
    require_number("sensor_std", sensor_std, at_least=0.0)
    reach_key, sensor_key = jax.random.split(key)
    goal, side, chunk = _reaches(reach_key, count, rows, prior_std, std, start, height)
    noise = sensor_std * jax.random.normal(sensor_key, (count, *sensor_std.shape))
    return Demonstrations(goal[:, None] + noise, chunk, goal, side)


def two_modality_demonstrations(
    key: Key[Array, ""],
    count: int,
    rows: int = 8,
    *,
    prior_std: Number = 0.4,
    std: Number = 0.03,
    start: Point = (-2.0, 0.0),
    height: Number = 1.0,
    bearing_noise: Number = 0.02,
) -> Demonstrations:
    """Reaches seen by a camera and by a range sensor: ``{"image": [N, 24], "point_cloud": [N, 16, 2]}``.

    Args:
        key: randomness.
        count: demonstrations ``N``.
        rows: waypoints in a chunk.
        prior_std: standard deviation of the goal, in each direction.
        std: of the noise on every number of a chunk.
        start: see :func:`reach_chunk`.
        height: see :func:`reach_chunk`.
        bearing_noise: see :func:`image_reading`.
    """
    require_count("count", count)
    reach_key, image_key, cloud_key = jax.random.split(key, 3)
    goal, side, chunk = _reaches(reach_key, count, rows, prior_std, std, start, height)
    image = jax.vmap(lambda key, goal: image_reading(key, goal, start=start, bearing_noise=bearing_noise))
    cloud = jax.vmap(lambda key, goal: cloud_reading(key, goal, start=start))
    observation = {
        "image": image(jax.random.split(image_key, count), goal),
        "point_cloud": cloud(jax.random.split(cloud_key, count), goal),
    }
    return Demonstrations(observation, chunk, goal, side)


def two_mode_demonstrations(
    key: Key[Array, ""],
    count: int,
    rows: int = 4,
    *,
    goal_spread: Number = 0.6,
    std: Number = 0.03,
    height: Number = 0.8,
    up: Number = 0.5,
) -> Demonstrations:
    """Chunks of :func:`two_mode_chunk`, each with its goal's height as the observation ``[N, 1]``.

    Args:
        key: randomness.
        count: demonstrations ``N``.
        rows: waypoints in a chunk.
        goal_spread: goals are uniform within this distance of 0.
        std: of the noise on every number of a chunk.
        height: of the bump.
        up: chance of a bump up; 1 for demonstrations of one mode.
    """
    require_count("count", count)
    require_number("goal_spread", goal_spread, at_least=0.0)
    require_number("std", std, at_least=0.0)
    goal_key, side_key, noise_key = jax.random.split(key, 3)
    goal = goal_spread * jax.random.uniform(goal_key, (count, 1), minval=-1.0)
    side = _sides(side_key, count, up)
    chunk = jax.vmap(lambda goal, side: two_mode_chunk(goal, side, rows, height=height))(goal, side)
    return Demonstrations(goal, chunk + std * jax.random.normal(noise_key, chunk.shape), goal, side)


class GateDemonstrations(NamedTuple):
    """Episodes of :class:`~steersman.envs.ObstacleGate` in ``T`` decisions of ``H`` actions each.

    Attributes:
        observation: before each decision ``[E, T, 2]``.
        chunk: what was decided ``[E, T, H, 2]``.
        reward: sum over the actions that were played ``[E, T]``.
        next_observation: after the last of these ``[E, T, 2]``.
        terminated: whether the episode ended with the decision ``[E, T]``.
        truncated: whether it was cut there by its limit ``[E, T]``.
        duration: actions that were played ``[E, T]``.
        valid: whether the episode was running when the decision was due; what is not valid is to be left out
            ``[E, T]``.
        success: whether the episode passed the gate ``[E]``.
    """

    observation: Float[Array, "E T 2"]
    chunk: Float[Array, "E T H 2"]
    reward: Float[Array, "E T"]
    next_observation: Float[Array, "E T 2"]
    terminated: Bool[Array, "E T"]
    truncated: Bool[Array, "E T"]
    duration: Int[Array, "E T"]
    valid: Bool[Array, "E T"]
    success: Bool[Array, " E"]


def gate_demonstrations(
    key: Key[Array, ""],
    episodes: int,
    rows: int = 4,
    *,
    noise: Number = 0.25,
    noise_probability: Number = 1.0,
    limit: Number = math.inf,
    environment: ObstacleGate | None = None,
    params: ObstacleGateParams | None = None,
) -> GateDemonstrations:
    """Episodes of the expert of the gate, each on a side drawn at random, with noise on its actions.

    The expert plans a chunk at every decision. The defaults are the demonstrations of DPPO's study; those of RL-100's
    have ``noise=0.6, noise_probability=0.7, limit=1.5``.

    Args:
        key: randomness.
        episodes: number of them ``E``.
        rows: actions of a decision ``H``.
        noise: standard deviation of what is added to every number of a chunk.
        noise_probability: chance that a chunk gets noise.
        limit: actions are clipped to plus or minus this number once the noise is added.
        environment: where the expert acts; the default one if None.
        params: its parameters; its default ones if None.
    """
    require_count("episodes", episodes)
    require_count("rows", rows)
    require_number("noise", noise, at_least=0.0)
    require_number("noise_probability", noise_probability, at_least=0.0, at_most=1.0)
    if not isinstance(limit, Tracer):
        require(bool(limit > 0), "limit", limit, "above 0")
    inner = ObstacleGate() if environment is None else environment
    chunked = ChunkedEnvironment(inner, rows)
    given = chunked.default_params if params is None else params
    decisions = -(-inner.num_steps // rows)

    def episode(key: Array) -> tuple:
        start_key, side_key, key = jax.random.split(key, 3)
        observation, state = chunked.reset_env(start_key, given)
        side = jnp.where(jax.random.bernoulli(side_key), 1.0, -1.0)

        def decide(carry: tuple, key: Array) -> tuple[tuple, tuple]:
            observation, state, running = carry
            noise_key, apply_key, step_key = jax.random.split(key, 3)
            chunk = gate_actions(observation, side, rows, step_length=given.step_length)
            noisy = jax.random.bernoulli(apply_key, noise_probability)
            chunk = chunk + jnp.where(noisy, noise, 0.0) * jax.random.normal(noise_key, chunk.shape, chunk.dtype)
            chunk = jnp.clip(chunk, -limit, limit)
            seen, following, reward, terminated, info = chunked.step_env(step_key, state, chunk, given)
            truncated = chunked.is_truncated(following, given) & ~terminated
            row = (observation, chunk, reward, seen, terminated, truncated, info["duration"], running)
            return (seen, following, running & ~terminated & ~truncated), (*row, running & info["success"])

        _, (*rows_, success) = jax.lax.scan(
            decide, (observation, state, jnp.asarray(True)), jax.random.split(key, decisions)
        )
        return (*rows_, jnp.any(success))

    return GateDemonstrations(*jax.vmap(episode)(jax.random.split(key, episodes)))
