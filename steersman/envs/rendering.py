"""Pictures of episodes without a display: scenes of simple shapes, painted with Pillow."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt8

from steersman.envs.control_problem import ControlEnvironment
from steersman.envs.dynamics import CartPole, DiscreteCartPole, DoubleIntegrator, Pendulum, PlanarQuadrotor
from steersman.errors import InputError, InputTypeError, require, require_count, require_number

Real = float | int
Point = tuple[Real, Real]

PAPER = "#fcfbf8"
INK = "#2c3138"
QUIET = "#8b939e"
FAINT = "#dfe2e6"
GROUND = "#ece8df"
BLUE = "#3a6ea5"
ORANGE = "#e07b39"
GREEN = "#4c9a6a"
RED = "#c44e52"
VIOLET = "#8069b0"
TRACES = (BLUE, ORANGE, GREEN, VIOLET, RED, "#8c6d46", "#4fa3b8", "#c277a4")

FORMATS = ("gif", "webp", "png")
_SUPERSAMPLE = 3
_TRANSPARENT = 255
_SIZE = (480, 300)


@dataclasses.dataclass(frozen=True)
class Line:
    """Connected straight lines through `points`; `width` in pixels."""

    points: Sequence[Point]
    color: str = INK
    width: Real = 1.5


@dataclasses.dataclass(frozen=True)
class Rod:
    """A straight bar with round ends; `radius` in world units."""

    start: Point
    end: Point
    radius: Real
    color: str = INK
    outline: str | None = None


@dataclasses.dataclass(frozen=True)
class Circle:
    """A disc; `radius` in world units, or in pixels where `pixels` says so."""

    center: Point
    radius: Real
    color: str = INK
    outline: str | None = None
    pixels: bool = False


@dataclasses.dataclass(frozen=True)
class Polygon:
    """A filled area."""

    points: Sequence[Point]
    color: str = INK
    outline: str | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """Words; `size` in pixels, `anchor` as Pillow names it (``"mm"`` is the middle)."""

    position: Point
    text: str
    size: Real = 12
    color: str = QUIET
    anchor: str = "mm"


Shape = Line | Rod | Circle | Polygon | Text


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture: shapes in world coordinates (x to the right, y upwards), later ones in front.

    Attributes:
        shapes: what is drawn.
        view: left, right, bottom and top of what must be visible, in world units; the scale is the same in both
            directions.
        captions: words in the upper left and the upper right corner.
        size: width and height of the picture, in pixels.
        ground: height of the ground, in world units; None for none.
    """

    shapes: Sequence[Shape]
    view: tuple[Real, Real, Real, Real]
    captions: tuple[str, str] = ("", "")
    size: tuple[int, int] = _SIZE
    ground: Real | None = None


#: Draws one state: ``scene(state, params, action) -> Scene``, or None for a state that it has no picture for.
SceneFunction = Callable[[Any, Any, Any], Scene | None]


def arrow(start: Point, end: Point, color: str = ORANGE, width: Real = 2.5, head: Real = 0.09) -> list[Shape]:
    """An arrow; nothing where it would be shorter than its head, which is `head` world units long."""
    length = math.dist(start, end)
    if length < 0.7 * head:
        return []
    along = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
    neck = (end[0] - head * along[0], end[1] - head * along[1])
    half = (-0.55 * head * along[1], 0.55 * head * along[0])
    tip = [end, (neck[0] + half[0], neck[1] + half[1]), (neck[0] - half[0], neck[1] - half[1])]
    return [Line([start, neck], color, width), Polygon(tip, color)]


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def paint(scene: Scene) -> Any:
    """Paints a scene, anti-aliased. Returns a Pillow image."""
    from PIL import Image, ImageDraw

    width, height = scene.size
    s = _SUPERSAMPLE
    image = Image.new("RGB", (width * s, height * s), PAPER)
    draw = ImageDraw.Draw(image)
    left, right, bottom, top = scene.view
    scale = min(width / (right - left), height / (top - bottom)) * s
    center_x, center_y = 0.5 * (left + right), 0.5 * (bottom + top)

    def place(point: Point) -> Point:
        return 0.5 * width * s + (point[0] - center_x) * scale, 0.5 * height * s - (point[1] - center_y) * scale

    def disc(at: Point, radius: Real, color: str, outline: str | None = None) -> None:
        box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
        draw.ellipse(box, fill=color, outline=outline, width=s if outline else 0)

    def bar(start: Point, end: Point, radius: Real, color: str) -> None:
        draw.line([start, end], fill=color, width=max(1, round(2 * radius)))
        disc(start, radius, color)
        disc(end, radius, color)

    if scene.ground is not None:
        level = place((0.0, scene.ground))[1]
        if level < height * s:
            draw.rectangle((0, level, width * s, height * s), fill=GROUND)
            draw.line([(0, level), (width * s, level)], fill=QUIET, width=round(1.5 * s))
    for shape in scene.shapes:
        if isinstance(shape, Line):
            points = [place(point) for point in shape.points]
            draw.line(points, fill=shape.color, width=max(1, round(shape.width * s)), joint="curve")
        elif isinstance(shape, Rod):
            start, end, radius = place(shape.start), place(shape.end), shape.radius * scale
            if shape.outline:
                bar(start, end, radius + s, shape.outline)
            bar(start, end, radius, shape.color)
        elif isinstance(shape, Circle):
            radius = shape.radius * (s if shape.pixels else scale)
            disc(place(shape.center), radius, shape.color, shape.outline)
        elif isinstance(shape, Polygon):
            points = [place(point) for point in shape.points]
            draw.polygon(points, fill=shape.color)
            if shape.outline:
                draw.line([*points, points[0]], fill=shape.outline, width=s, joint="curve")
        else:
            font = _font(round(shape.size * s))
            draw.text(place(shape.position), shape.text, fill=shape.color, font=font, anchor=shape.anchor)
    for text, x, anchor in ((scene.captions[0], 10, "la"), (scene.captions[1], width - 10, "ra")):
        draw.text((x * s, 8 * s), text, fill=QUIET, font=_font(12 * s), anchor=anchor)
    return image.reduce(s)


def animate(scenes: Sequence[Scene], fps: Real = 20.0, format: str = "gif") -> bytes:
    """An animation of scenes of one size.

    Args:
        scenes: one per frame.
        fps: frames per second.
        format: ``"gif"``, ``"webp"`` or ``"png"`` (animated too).

    Returns:
        The file's content. The last frame stays for a second before the animation repeats.
    """
    _require_frames("scenes", scenes, fps, format)
    return _encode([paint(scene) for scene in scenes], fps, format, colors=64)


def animate_frames(
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: Real = 20.0,
    format: str = "gif",
    *,
    max_frames: int = 150,
    max_bytes: int = 400_000,
) -> bytes:
    """An animation of pictures that a simulator has rendered.

    Args:
        frames: pictures ``[T, H, W, 3]`` as whole numbers from 0 to 255.
        fps: frames per second of what is given; where frames are left out, the animation keeps its pace.
        format: ``"gif"``, ``"webp"`` or ``"png"``.
        max_frames: frames that are kept, evenly spaced.
        max_bytes: size that the file is kept under, by leaving out colours, frames and pixels.

    Returns:
        The file's content.
    """
    from PIL import Image

    frames = np.asarray(frames)
    require(frames.ndim == 4 and frames.shape[-1] == 3, "frames.shape", frames.shape, "[T, H, W, 3]")
    require(frames.dtype == np.uint8, "frames.dtype", str(frames.dtype), "uint8")
    require_count("max_frames", max_frames)
    require_count("max_bytes", max_bytes)
    _require_frames("frames", frames, fps, format)
    stride = math.ceil(len(frames) / max_frames)
    images = [Image.fromarray(frame) for frame in frames[::stride]]
    width = images[0].width
    if width > _SIZE[0]:
        images = [_shrunk(image, _SIZE[0] / width) for image in images]
    return _encode_within(max_bytes, images, fps / stride, format, colors=128)


def _shrunk(image: Any, factor: Real) -> Any:
    from PIL import Image

    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.BOX)


def _encode_within(max_bytes: int, images: list[Any], fps: Real, format: str, colors: int) -> bytes:
    encoded = b""
    # The formats cannot be told a size, so it is approached from above: colours first, then frames, then pixels.
    for stride, shrink, fewer in ((1, 1.0, 1), (1, 1.0, 2), (2, 1.0, 2), (2, 0.7, 2), (3, 0.5, 4), (5, 0.35, 4)):
        kept = images[::stride]
        if shrink < 1.0:
            kept = [_shrunk(image, shrink) for image in kept]
        encoded = _encode(kept, fps / stride, format, colors // fewer)
        if len(encoded) <= max_bytes:
            break
    return encoded


def save(path: str | Path, scenes: Sequence[Scene], fps: Real = 20.0) -> Path:
    """Writes scenes to a file, in the format that its ending names; a single scene makes a still picture."""
    path = Path(path)
    path.write_bytes(animate(scenes, fps, path.suffix.lstrip(".").lower()))
    return path


def _require_frames(argument: str, frames: Any, fps: Real, format: str) -> None:
    require(len(frames) > 0, argument, [], "at least one frame")
    require_number("fps", fps, above=0.0)
    require(format in FORMATS, "format", format, "one of " + ", ".join(FORMATS))


def _encode(images: list[Any], fps: Real, format: str, colors: int) -> bytes:
    from PIL import Image

    # Browsers play a GIF frame of less than 20 ms as if it had 100 ms.
    duration = max(20, round(100 / fps) * 10)
    durations = [duration] * (len(images) - 1) + [1000]
    if format == "gif":
        # One palette for all frames, so that nothing flickers, and only what has changed since the last one.
        palette = _common_palette(images, colors)
        indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        images = [indexed[0], *map(_changes, indexed, indexed[1:])]
    options: dict[str, Any] = {
        "webp": {"quality": 80, "method": 4},
        "png": {},
        "gif": {"optimize": False, "disposal": 1},
    }[format]
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}
    buffer = io.BytesIO()
    images[0].save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


def _changes(before: Any, after: Any) -> Any:
    """`after` with what it shares with `before` left transparent, which compresses several times as well."""
    from PIL import Image

    same = np.asarray(before) == np.asarray(after)
    image = Image.fromarray(np.where(same, _TRANSPARENT, after).astype(np.uint8), "P")
    image.putpalette(after.getpalette())
    image.info["transparency"] = _TRANSPARENT
    return image


def _common_palette(images: list[Any], colors: int) -> Any:
    from PIL import Image

    sample = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images[:: max(1, len(images) // 8)]])
    packed, counts = np.unique(sample @ np.asarray([1 << 16, 1 << 8, 1]), return_counts=True)
    distinct = np.stack([packed >> 16, (packed >> 8) & 255, packed & 255], axis=-1).astype(np.uint8)
    if len(distinct) > 3000:
        return Image.fromarray(sample[None]).quantize(colors, method=Image.Quantize.MEDIANCUT)
    # A drawing: its flat colours are kept exactly, and the blends at its edges share what is left, each counted once,
    # as thin lines would get no colour beside so much background.
    order = np.argsort(-counts, kind="stable")
    kept = colors * 3 // 4
    flat, blends = distinct[order[:kept]], distinct[order[kept:]]
    entries = flat.ravel().tolist()
    if len(blends):
        shared = Image.fromarray(blends[None]).quantize(colors - len(flat), method=Image.Quantize.MEDIANCUT)
        entries += (shared.getpalette() or [])[: 3 * (colors - len(flat))]
    palette = Image.new("P", (1, 1))
    palette.putpalette(entries)
    return palette


def render_episode(
    problem: Any,
    states: PyTree,
    observations: PyTree,
    actions: PyTree,
    rewards: Any,
    *,
    format: str = "gif",
    max_frames: int = 150,
    max_bytes: int = 400_000,
) -> bytes:
    """An animation of one episode, at the pace of the problem where it has one.

    What is drawn depends on the environment: its own picture where there is one (see :func:`register_scene`), a
    grid where observations are small images, and otherwise a row of values over time for each observation, action and
    reward.

    Args:
        problem: the problem, as algorithms take it.
        states: state before each step, every leaf ``[T, ...]``; None where there is none to see.
        observations: observation before each step, every leaf ``[T, ...]``.
        actions: action of each step, every leaf ``[T, ...]``.
        rewards: reward of each step ``[T]``, or ``[T, k]``.
        format: ``"gif"``, ``"webp"`` or ``"png"``.
        max_frames: frames that are kept, evenly spaced.
        max_bytes: size that the file is kept under, by leaving out colours, frames and pixels.

    Returns:
        The file's content.

    Raises:
        InputError: the arrays are of different lengths, or hold no step.
    """
    scenes, fps = episode_scenes(problem, states, observations, actions, rewards, max_frames=max_frames)
    require_count("max_bytes", max_bytes)
    _require_frames("rewards", scenes, fps, format)
    return _encode_within(max_bytes, [paint(scene) for scene in scenes], fps, format, colors=64)


def episode_scenes(
    problem: Any, states: PyTree, observations: PyTree, actions: PyTree, rewards: Any, *, max_frames: int = 150
) -> tuple[list[Scene], float]:
    """The scenes that :func:`render_episode` animates, and how many are shown per second."""
    require_count("max_frames", max_frames)
    rewards = np.asarray(rewards)
    steps = len(rewards) if rewards.ndim else 0
    require(steps > 0, "rewards.shape", rewards.shape, "[T] with at least one step")
    for argument, tree in (("states", states), ("observations", observations), ("actions", actions)):
        for leaf in jax.tree.leaves(tree):
            length = np.shape(leaf)[0] if np.ndim(leaf) else 0
            require(length >= steps, f"length of {argument}", length, f"{steps}, the number of rewards")
    states, observations, actions = jax.tree.map(_on_host, (states, observations, actions))
    environment = getattr(problem, "environment", None)
    params = getattr(problem, "params", None)
    if getattr(problem, "batched_params", False):
        params = jax.tree.map(lambda leaf: leaf[0], params)

    stride = math.ceil(steps / max_frames)
    shown = list(range(0, steps, stride))
    draw = _scene_function(environment)
    scenes: list[Scene | None] = [None]
    if draw is not None and states is not None:
        scenes = [draw(_at(states, t), params, _at(actions, t)) for t in shown]
    if scenes[0] is None:
        scenes = [*_grid_scenes(observations, shown)] or [
            *_strip_scenes(environment, observations, actions, rewards, shown)
        ]
    drawn = [scene for scene in scenes if scene is not None]
    planar = _planar(environment) if draw is not None and states is not None else None
    if planar is not None:
        drawn = planar.with_way(environment, drawn, states, shown)
    views = np.asarray([scene.view for scene in drawn])
    low, high = views.min(axis=0), views.max(axis=0)
    view = (float(low[0]), float(high[1]), float(low[2]), float(high[3]))

    sample_time = _sample_time(environment, params)
    returns = np.cumsum(rewards.reshape(steps, -1), axis=0)
    captioned = []
    for scene, t in zip(drawn, shown, strict=True):
        time = f"step {t}" if sample_time is None else f"{t * sample_time:.2f} s"
        so_far = " ".join(f"{value:.4g}" for value in returns[t][:4])
        captioned.append(dataclasses.replace(scene, view=view, captions=(time, f"return {so_far}")))
    unknown = 1.0 / 30.0 if planar is None else planar.seconds_shown(environment)
    pace = unknown if sample_time is None else sample_time
    return captioned, 1.0 / min(0.25, max(0.03, pace * stride))


def _on_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _at(tree: PyTree, t: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[t], tree)


def _sample_time(environment: Any, params: Any) -> float | None:
    for owner, attribute in ((environment, "sample_time"), (params, "tau"), (params, "dt")):
        value = getattr(owner, attribute, None)
        if isinstance(value, (int, float)):
            return float(value)
    return None


def register_scene(name: str, function: SceneFunction) -> None:
    """Gives the environments of a name their picture.

    Args:
        name: the environment's ``name``.
        function: draws one state, ``function(state, params, action) -> Scene``.
    """
    if not callable(function):
        raise InputTypeError(f"function is a {type(function).__name__}, but it must be callable.")
    _SCENES[name] = function


def _scene_function(environment: Any) -> SceneFunction | None:
    named = _SCENES.get(str(getattr(environment, "name", "")))
    if named is not None:
        return named
    if isinstance(environment, (ControlEnvironment, DiscreteCartPole)):
        for kind, function in _CONTROL_SCENES.items():
            if isinstance(environment.problem, kind):
                return lambda state, problem, action: function(state, problem, action)
    planar = _planar(environment)
    return None if planar is None else planar.planar_scene(environment)


def _planar(environment: Any) -> Any:
    """The module that draws the planar tasks, where this is one of them. It needs the shapes of this one."""
    from steersman.envs import planar_scenes

    named = str(getattr(environment, "name", "")) in _SCENES
    return planar_scenes if planar_scenes.is_planar(environment) and not named else None


# The pictures of known environments.


def _rotated(points: Sequence[Point], angle: Real, at: Point) -> list[Point]:
    c, s = math.cos(angle), math.sin(angle)
    return [(at[0] + c * x - s * y, at[1] + s * x + c * y) for x, y in points]


def _ends(start: Point, end: Point, angle: Real, at: Point) -> tuple[Point, Point]:
    first, last = _rotated([start, end], angle, at)
    return first, last


def _box(left: Real, right: Real, bottom: Real, top: Real) -> list[Point]:
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def _double_integrator(state: Any, problem: Any, action: Any) -> Scene | None:
    x = np.asarray(state.x, float)
    n = problem.num_dimensions
    push = np.clip(np.asarray(action, float), -problem.max_force, problem.max_force)
    push = push / problem.max_force if math.isfinite(problem.max_force) else push / (1.0 + np.abs(push))
    if n == 1:
        reach = max(2.6, abs(x[0]) + 0.6)
        ticks: list[Shape] = [Line([(i, -0.06), (i, 0.0)], QUIET, 1.0) for i in range(-20, 21)]
        numbers: list[Shape] = [Text((i, -0.16), f"{i}", 11) for i in range(-20, 21)]
        target = [Polygon([(0, 0.62), (0.24, 0.54), (0, 0.46)], GREEN), Line([(0, 0), (0, 0.62)], GREEN, 2)]
        block = Polygon(_box(x[0] - 0.2, x[0] + 0.2, 0.0, 0.32), BLUE)
        side = math.copysign(0.2, push[0])
        force = arrow((x[0] + side, 0.16), (x[0] + side + 0.6 * push[0], 0.16))
        return Scene([*ticks, *numbers, *target, block, *force], (-reach, reach, -0.9, 1.5), ground=0.0)
    if n == 2:
        reach = max(2.4, abs(x[0]) + 0.5, abs(x[1]) + 0.5)
        lines = [Line([(i, -99.0), (i, 99.0)], FAINT, 1.0) for i in range(-20, 21)]
        lines += [Line([(-99.0, i), (99.0, i)], FAINT, 1.0) for i in range(-20, 21)]
        target = [Circle((0, 0), 0.16, GREEN), Circle((0, 0), 0.09, PAPER), Circle((0, 0), 0.05, GREEN)]
        at = (x[0], x[1])
        force = arrow(at, (x[0] + 0.7 * push[0], x[1] + 0.7 * push[1]), head=0.14)
        return Scene([*lines, *target, Circle(at, 0.17, BLUE), *force], (-reach, reach, -reach, reach), size=(360, 360))
    return None


def _pendulum(angle: Real, torque: Real) -> Scene:
    tip = (-math.sin(angle), math.cos(angle))
    shapes: list[Shape] = [
        Line([(0.0, 0.0), (0.0, 1.25)], FAINT, 1.5),
        Rod((0.0, 0.0), tip, 0.09, BLUE),
        Circle((0.0, 0.0), 0.045, PAPER),
    ]
    # The torque as an arc around the joint, counter-clockwise where positive, a third of a turn at the limit.
    turn = 2.1 * max(-1.0, min(1.0, torque))
    if abs(turn) > 0.15:
        radius, start = 0.34, angle + math.pi / 2 + math.copysign(0.45, turn)
        angles = np.linspace(start, start + turn, 24)
        arc = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
        along = angles[-1] + math.copysign(math.pi / 2, turn)
        head = _rotated([(0.09, 0.0), (-0.03, 0.06), (-0.03, -0.06)], along, arc[-1])
        shapes += [Line(arc, ORANGE, 2.5), Polygon(head, ORANGE)]
    return Scene(shapes, (-1.4, 1.4, -1.3, 1.4), size=(320, 320))


def _cartpole(position: Real, angle: Real, pole: Real, rail: Real, force: Real) -> Scene:
    reach = max(rail + 0.25, 1.0)
    top = 0.24
    tip = (position + pole * math.sin(angle), top + pole * math.cos(angle))
    side = math.copysign(0.25, force)
    shapes: list[Shape] = [
        Line([(-rail, 0.0), (rail, 0.0)], QUIET, 3),
        Line([(-rail, -0.07), (-rail, 0.07)], INK, 3),
        Line([(rail, -0.07), (rail, 0.07)], INK, 3),
        Line([(0.0, -0.09), (0.0, -0.03)], QUIET, 1.5),
        Circle((position - 0.14, 0.05), 0.05, INK),
        Circle((position + 0.14, 0.05), 0.05, INK),
        Polygon(_box(position - 0.25, position + 0.25, 0.06, top + 0.04), BLUE),
        Rod((position, top - 0.04), tip, 0.04, ORANGE),
        Circle((position, top - 0.04), 0.022, PAPER),
        *arrow((position + side, 0.16), (position + side + 0.5 * force, 0.16), RED),
    ]
    return Scene(shapes, (-reach, reach, -pole - 0.15, pole + 0.65))


def _own_cartpole(state: Any, problem: Any, action: Any) -> Scene:
    if np.ndim(action) == 0:
        force = 1.0 if action == 1 else -1.0
    else:
        force = float(np.clip(action[0] / problem.max_force, -1.0, 1.0))
    x = np.asarray(state.x, float)
    return _cartpole(x[0], x[2], 2.0 * float(problem.half_length), problem.max_position, force)


def _own_pendulum(state: Any, problem: Any, action: Any) -> Scene:
    return _pendulum(float(state.x[0]), float(action[0]) / problem.max_torque)


def _quadrotor(state: Any, problem: Any, action: Any) -> Scene:
    x, z, tilt = (float(value) for value in state.x[:3])
    arm, rail, ceiling = float(problem.arm), problem.max_position, problem.max_height
    at = (x, z)
    target = tuple(float(value) for value in problem.target)
    cross: list[Shape] = [
        Line([(target[0] - 0.12, target[1]), (target[0] + 0.12, target[1])], GREEN, 2),
        Line([(target[0], target[1] - 0.12), (target[0], target[1] + 0.12)], GREEN, 2),
    ]
    arena: list[Shape] = [Line([(-rail, 0.0), (-rail, ceiling), (rail, ceiling), (rail, 0.0)], FAINT, 1.5)]
    # Drawn half as large again as it is: a drone of this size is a few pixels wide in its arena.
    reach = 1.5 * arm
    thrusts = np.clip(np.asarray(action, float), 0.0, problem.max_thrust) / problem.max_thrust
    rotors: list[Shape] = []
    for side, thrust in ((-reach, thrusts[0]), (reach, thrusts[1])):
        hub, tip = _rotated([(side, 0.09), (side, 0.09 + 0.75 * thrust)], tilt, at)
        blades = _rotated([(side - 0.17, 0.09), (side + 0.17, 0.09)], tilt, at)
        rotors += [*arrow(hub, tip, ORANGE, 2.5, 0.12), Line(_rotated([(side, 0.0), (side, 0.09)], tilt, at), INK, 3)]
        rotors.append(Line(blades, QUIET, 3))
    body: list[Shape] = [
        Rod(*_ends((-reach, 0.0), (reach, 0.0), tilt, at), 0.03, INK),
        Polygon(_rotated(_box(-0.14, 0.14, -0.07, 0.07), tilt, at), BLUE),
    ]
    wind = np.asarray(problem.wind, float) / (0.2 * float(problem.mass) * float(problem.gravity))
    corner = (-rail + 0.4, ceiling - 0.35)
    blowing = arrow(corner, (corner[0] + 0.6 * wind[0], corner[1] + 0.6 * wind[1]), "#7fa8c9", 2.5, 0.12)
    shapes = [*arena, *cross, *blowing, *rotors, *body]
    return Scene(shapes, (-rail - 0.3, rail + 0.3, -0.3, ceiling + 0.45), ground=0.0)


def _gymnax_cartpole(state: Any, params: Any, action: Any) -> Scene:
    force = 1.0 if action == 1 else -1.0
    return _cartpole(float(state.x), float(state.theta), 2.0 * params.length, float(params.x_threshold), force)


def _gymnax_pendulum(state: Any, params: Any, action: Any) -> Scene:
    return _pendulum(float(state.theta), float(np.ravel(action)[0]) / float(params.max_torque))


def _gymnax_acrobot(state: Any, params: Any, action: Any) -> Scene:
    first, second = float(state.joint_angle1), float(state.joint_angle1 + state.joint_angle2)
    l1, l2 = float(params.link_length_1), float(params.link_length_2)
    elbow = (l1 * math.sin(first), -l1 * math.cos(first))
    tip = (elbow[0] + l2 * math.sin(second), elbow[1] - l2 * math.cos(second))
    torque = float(np.asarray(params.available_torque)[int(action)])
    reach = l1 + l2 + 0.3
    shapes: list[Shape] = [
        Line([(-99.0, l1), (99.0, l1)], GREEN, 1.5),
        Rod((0.0, 0.0), elbow, 0.09, BLUE),
        Rod(elbow, tip, 0.09, ORANGE),
        Circle((0.0, 0.0), 0.05, PAPER),
        Circle(elbow, 0.05, PAPER if torque == 0 else RED),
    ]
    return Scene(shapes, (-reach, reach, -reach, reach), size=(320, 320))


def _gymnax_mountain_car(state: Any, params: Any, action: Any) -> Scene:
    def height(x: float) -> float:
        return 0.45 * math.sin(3.0 * x) + 0.55

    left, right = float(params.min_position), float(params.max_position)
    xs = np.linspace(left - 0.6, right + 0.6, 160)
    hill = [(float(x), height(float(x))) for x in xs]
    goal = float(params.goal_position)
    x = float(state.position)
    slope = math.atan(1.35 * math.cos(3.0 * x))
    push = float(np.ravel(action)[0]) if np.ndim(action) else float(action) - 1.0
    at = (x, height(x))
    side = math.copysign(0.08, push)
    flag = [(goal, height(goal) + 0.2), (goal + 0.11, height(goal) + 0.165), (goal, height(goal) + 0.13)]
    shapes: list[Shape] = [
        Polygon([*hill, (float(xs[-1]), -1.0), (float(xs[0]), -1.0)], GROUND),
        Line(hill, QUIET, 2),
        Line([(goal, height(goal)), (goal, height(goal) + 0.2)], GREEN, 2),
        Polygon(flag, GREEN),
        Polygon(_rotated(_box(-0.08, 0.08, 0.025, 0.085), slope, at), BLUE),
        *(Circle(_rotated([(wheel, 0.022)], slope, at)[0], 0.024, INK) for wheel in (-0.045, 0.045)),
        *arrow(*_ends((side, 0.055), (side + 0.13 * push, 0.055), slope, at), head=0.04),
    ]
    return Scene(shapes, (left - 0.05, right + 0.05, -0.05, 1.4))


_CONTROL_SCENES: dict[type, SceneFunction] = {
    DoubleIntegrator: _double_integrator,
    Pendulum: _own_pendulum,
    CartPole: _own_cartpole,
    PlanarQuadrotor: _quadrotor,
}

_SCENES: dict[str, SceneFunction] = {
    "CartPole-v1": _gymnax_cartpole,
    "Pendulum-v1": _gymnax_pendulum,
    "Acrobot-v1": _gymnax_acrobot,
    "MountainCar-v0": _gymnax_mountain_car,
    "MountainCarContinuous-v0": _gymnax_mountain_car,
}


# The pictures of every other environment.


def _grid_scenes(observations: PyTree, shown: Sequence[int]) -> list[Scene]:
    """Small images as coloured cells: by the channel that is strongest, or by value where there is one channel."""
    leaves = jax.tree.leaves(observations)
    if len(leaves) != 1 or leaves[0].ndim not in (3, 4) or min(leaves[0].shape[1:3]) < 3:
        return []
    images = leaves[0][..., None] if leaves[0].ndim == 3 else leaves[0]
    rows, columns = images.shape[1:3]
    if max(rows, columns) > 32:
        return []
    images = images.astype(float)
    top = max(float(images.max()), 1e-9)
    single = images.shape[-1] == 1
    scenes = []
    for t in shown:
        shapes: list[Shape] = [Polygon(_box(0, columns, 0, rows), "#f1efe9", FAINT)]
        for r, c in np.argwhere(images[t].max(axis=-1) > 0):
            channel = int(images[t, r, c].argmax())
            color = _mixed(BLUE, "#f1efe9", images[t, r, c, 0] / top) if single else TRACES[channel % len(TRACES)]
            y = rows - 1 - int(r)
            shapes.append(Polygon(_box(c + 0.04, c + 0.96, y + 0.04, y + 0.96), color))
        margin = 0.1 * rows
        scenes.append(Scene(shapes, (-0.3, columns + 0.3, -0.3, rows + margin), size=(320, 320)))
    return scenes


def _mixed(color: str, other: str, share: Real) -> str:
    """`share` of a colour and the rest of another one."""
    channels = ((int(color[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in channels)


def _rows(kind: str, tree: PyTree, most: int, names: Sequence[str]) -> tuple[list[tuple[str, np.ndarray]], int]:
    rows, hidden = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or kind
        flat = leaf.reshape(len(leaf), -1).astype(float)
        named = names if len(names) == flat.shape[1] else [f"{name}[{i}]" for i in range(flat.shape[1])]
        for i in range(flat.shape[1]):
            if len(rows) < most:
                rows.append((named[i] if flat.shape[1] > 1 or names else name, flat[:, i]))
            else:
                hidden += 1
    return rows, hidden


def _strip_scenes(
    environment: Any, observations: PyTree, actions: PyTree, rewards: np.ndarray, shown: Sequence[int]
) -> list[Scene]:
    """Rows of values over time that grow with the episode, each on its own scale."""
    problem = environment.problem if isinstance(environment, ControlEnvironment) else None
    groups = (
        ("observation", observations, 8, BLUE, () if problem is None else problem.state_names),
        ("action", actions, 4, ORANGE, () if problem is None else problem.control_names),
        ("reward", rewards, 2, GREEN, ()),
    )
    rows: list[tuple[str, np.ndarray, str]] = []
    hidden = 0
    for kind, tree, most, color, names in groups:
        found, more = _rows(kind, tree, most, names)
        rows += [(name, values, color) for name, values in found]
        hidden += more if kind == "observation" else 0
    steps = len(rewards)
    lane = max(22.0, min(40.0, 260.0 / len(rows)))
    width, height = 480, math.ceil(34 + lane * len(rows) + 14)
    left, right = 112.0, 420.0
    xs = np.linspace(left, right, steps)
    # More points than pixels cannot be seen and cost time.
    thinned = np.unique(np.linspace(0, steps - 1, min(steps, 300)).astype(int))
    scenes = []
    for t in shown:
        shapes: list[Shape] = []
        for i, (name, values, color) in enumerate(rows):
            base = height - 34 - (i + 1) * lane
            finite = values[:steps][np.isfinite(values[:steps])]
            low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
            span = high - low if high > low else 1.0
            flat = high == low
            levels = base + 3 + (lane - 6) * (0.5 if flat else 1.0) * (np.nan_to_num(values[:steps]) - low) / span
            levels = levels + (0.5 * (lane - 6) if flat else 0.0)
            past = [int(k) for k in thinned if k < t] + [t]
            shapes.append(Line([(left, base), (right, base)], FAINT, 1))
            if len(past) > 1:
                shapes.append(Line([(float(xs[k]), float(levels[k])) for k in past], color, 1.5))
            at = (float(xs[t]), float(levels[t]))
            shapes.append(Circle(at, 2.6, color, pixels=True))
            shapes.append(Text((10, base + lane / 2), name[-18:], 11, QUIET, "lm"))
            shapes.append(Text((width - 10, base + lane / 2), f"{values[t]:.3g}", 11, INK, "rm"))
        if hidden:
            shapes.append(Text((width / 2, 8), f"{hidden} more observations are not shown", 10))
        scenes.append(Scene(shapes, (0, width, 0, height), size=(width, height)))
    return scenes


# MuJoCo.


def mujoco_scene(
    model: Any,
    data: Any,
    *,
    view: str | None = None,
    captions: tuple[str, str] = ("", ""),
    size: tuple[int, int] = _SIZE,
) -> Scene:
    """A MuJoCo state as flat shapes, for machines on which MuJoCo's own renderer has no OpenGL to draw with.

    Capsules, cylinders, spheres, ellipsoids and boxes are drawn as their outlines, meshes as discs; what is farther
    away is paler. The picture follows a robot that can leave its place.

    Args:
        model: the ``mujoco.MjModel``.
        data: the ``mujoco.MjData``, after a step or ``mj_forward``.
        view: ``"side"`` (x to the right, z up) or ``"top"`` (x to the right, y up). Where None, from above for
            mechanisms that only move in the horizontal plane, from the side for all others.
        captions: words in the upper left and the upper right corner.
        size: width and height of the picture, in pixels.
    """
    if view not in (None, "side", "top"):
        raise InputError(f"view is {view!r}, but it must be 'side', 'top' or None.")
    mujoco: Any = importlib.import_module("mujoco")
    joint, plane = mujoco.mjtJoint, int(mujoco.mjtGeom.mjGEOM_PLANE)
    if view is None:
        view = "top" if _moves_horizontally(model, data) else "side"
    vertical, depth, toward = (2, 1, -1.0) if view == "side" else (1, 2, 1.0)

    drawn = [g for g in range(model.ngeom) if _is_drawn(model, g) and model.geom_type[g] != plane]
    depths = [toward * float(data.geom_xpos[g][depth]) for g in drawn]
    spread = float(np.ptp(depths)) if depths else 0.0
    shapes: list[Shape] = []
    for g, distance in sorted(zip(drawn, depths, strict=True), key=lambda pair: pair[1]):
        behind = 0.45 * (max(depths) - distance) / spread if spread > 0.02 else 0.0
        color = _mixed(_geom_color(model, g), PAPER, 1.0 - behind)
        shapes.append(_geom_shape(model, data, g, vertical, color))

    free = model.jnt_type == int(joint.mjJNT_FREE)
    sliding = (model.jnt_type == int(joint.mjJNT_SLIDE)) & (model.jnt_limited == 0)
    follows = bool((free | (sliding & (np.abs(data.xaxis[:, 0]) > 0.9))).any())
    # The scale is that of the posture in which the model is written, so that it stays the same from frame to frame.
    posture = mujoco.MjData(model)
    mujoco.mj_forward(model, posture)
    measured = [g for g in drawn if model.geom_bodyid[g] > 0 or not follows]
    corners = [corner for g in measured for corner in _corners(_geom_shape(model, posture, g, vertical, INK))]
    corners = np.asarray(corners or [(-1.0, -1.0), (1.0, 1.0)])
    low, high = corners.min(axis=0), corners.max(axis=0)
    reach = max(0.5 * float((high - low).max()) * (1.7 if follows else 1.15), 1e-3)
    middle = (float(low[0] + high[0]) / 2, float(low[1] + high[1]) / 2)
    if follows:
        # From the side, only straight ahead: a gait is seen against ground that stays level.
        mass = data.subtree_com[0]
        middle = (float(mass[0]), middle[1] if view == "side" else float(mass[1]))
    planes = [g for g in range(model.ngeom) if model.geom_type[g] == plane]
    ground = None
    behind_all: list[Shape] = []
    spacing = 10.0 ** round(math.log10(0.6 * reach))
    first = math.floor((middle[0] - 4 * reach) / spacing)
    marks = [spacing * (first + i) for i in range(round(8 * reach / spacing) + 2)]
    if view == "side" and planes:
        ground = float(data.geom_xpos[planes[0]][2])
        middle = (middle[0], max(middle[1], ground + 0.72 * reach))
        for x in marks:
            behind_all.append(Line([(x, ground), (x, ground - 0.05 * reach)], QUIET, 1.2))
            behind_all.append(Text((x, ground - 0.13 * reach), f"{x:.4g}", 10))
    elif follows:
        rows = [spacing * (math.floor((middle[1] - 4 * reach) / spacing) + i) for i in range(len(marks))]
        behind_all += [Line([(x, -1e3), (x, 1e3)], FAINT, 1) for x in marks]
        behind_all += [Line([(-1e3, y), (1e3, y)], FAINT, 1) for y in rows]
    bounds = (middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach)
    return Scene([*behind_all, *shapes], bounds, captions, size, ground)


def _is_drawn(model: Any, geom: int) -> bool:
    # Groups from 3 on are hidden in MuJoCo's own viewer too: they hold shapes that only collide.
    return bool(model.geom_group[geom] < 3 and model.geom_rgba[geom][3] > 0.05)


def _geom_shape(model: Any, data: Any, geom: int, vertical: int, color: str) -> Shape:
    kinds: Any = importlib.import_module("mujoco").mjtGeom
    kind, size = int(model.geom_type[geom]), np.asarray(model.geom_size[geom])
    position, axes = np.asarray(data.geom_xpos[geom]), np.asarray(data.geom_xmat[geom]).reshape(3, 3)
    edge = _mixed(INK, color, 0.45)

    def flat(point: np.ndarray) -> Point:
        return float(point[0]), float(point[vertical])

    if kind == int(kinds.mjGEOM_CAPSULE):
        half = axes[:, 2] * size[1]
        return Rod(flat(position - half), flat(position + half), float(size[0]), color, edge)
    if kind == int(kinds.mjGEOM_SPHERE):
        return Circle(flat(position), float(size[0]), color, edge)
    around = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(around), np.sin(around)], axis=-1)
    if kind == int(kinds.mjGEOM_ELLIPSOID):
        # Its shadow is an ellipse, whose shape matrix is the projection of the ellipsoid's.
        spread = axes[[0, vertical]] * size
        outline = position[[0, vertical]] + circle @ np.linalg.cholesky(spread @ spread.T).T
        return Polygon([(float(x), float(y)) for x, y in outline], color, edge)
    if kind == int(kinds.mjGEOM_BOX):
        local = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(-1, 3) * size
    elif kind == int(kinds.mjGEOM_CYLINDER):
        rim = np.concatenate([size[0] * circle, np.zeros((len(circle), 1))], axis=-1)
        top = np.asarray([0.0, 0.0, size[1]])
        local = np.concatenate([rim + top, rim - top])
    else:
        return Circle(flat(position), float(model.geom_rbound[geom]), color, edge)
    return Polygon(_hull([flat(corner) for corner in position + local @ axes.T]), color, edge)


def _corners(shape: Shape) -> list[Point]:
    """Points whose bounding box is that of the shape."""
    if isinstance(shape, Rod):
        ends, radius = [shape.start, shape.end], shape.radius
    elif isinstance(shape, Circle):
        ends, radius = [shape.center], shape.radius
    elif isinstance(shape, (Line, Polygon)):
        ends, radius = list(shape.points), 0.0
    else:
        ends, radius = [shape.position], 0.0
    return [(x + side * radius, y + side * radius) for x, y in ends for side in (-1, 1)]


def _moves_horizontally(model: Any, data: Any) -> bool:
    joints: Any = importlib.import_module("mujoco").mjtJoint
    upright = np.abs(np.asarray(data.xaxis)[:, 2])
    hinge, slide = model.jnt_type == int(joints.mjJNT_HINGE), model.jnt_type == int(joints.mjJNT_SLIDE)
    return bool(model.njnt and np.all((hinge & (upright > 0.9)) | (slide & (upright < 0.1))) and hinge.any())


def _geom_color(model: Any, geom: int) -> str:
    rgb = np.asarray(model.geom_rgba[geom][:3], float)
    if np.ptp(rgb) < 0.05:
        # Undyed in the model: one colour per body.
        return TRACES[int(model.geom_bodyid[geom]) % len(TRACES)]
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in np.clip(rgb, 0.0, 1.0))


def _hull(points: list[Point]) -> list[Point]:
    """The convex hull, counter-clockwise (Andrew's monotone chain)."""

    def half(ordered: list[Point]) -> list[Point]:
        chain: list[Point] = []
        for p in ordered:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2:]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                    break
                chain.pop()
            chain.append(p)
        return chain[:-1]

    ordered = sorted(set(points))
    return ordered if len(ordered) < 3 else half(ordered) + half(ordered[::-1])
