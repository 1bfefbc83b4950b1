"""Episodes become pictures that show what happened, small and without a display."""

import dataclasses
import io
import subprocess
import sys
from types import SimpleNamespace

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from steersman.envs import ControlProblem, Problem, rendering
from steersman.envs.control_problem import ControlState
from steersman.envs.dynamics import (
    CartPoleBalance,
    CartPoleSwingUp,
    DiscreteCartPole,
    DoubleIntegrator,
    Pendulum,
    PlanarQuadrotor,
)
from steersman.envs.rendering import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    Circle,
    Polygon,
    Rod,
    Scene,
    Text,
    animate,
    animate_frames,
    arrow,
    episode_scenes,
    mujoco_scene,
    paint,
    register_scene,
    render_episode,
    save,
)
from steersman.errors import InputError


def rgb(color):
    return np.asarray([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def middle_of(scene, color):
    """Where the pixels of a colour are on average, from the middle of the picture, upwards positive."""
    pixels = np.asarray(paint(scene)).astype(int)
    found = np.argwhere(np.abs(pixels - rgb(color)).max(axis=-1) < 12)
    assert len(found), f"nothing has the colour {color}"
    row, column = found.mean(axis=0)
    return column - (scene.size[0] - 1) / 2, (scene.size[1] - 1) / 2 - row


def opened(data):
    image = Image.open(io.BytesIO(data))
    frames, durations = [], []
    for i in range(image.n_frames):
        image.seek(i)
        frames.append(np.asarray(image.convert("RGB")).astype(int))
        durations.append(image.info.get("duration"))
    return frames, durations


def states_of(x):
    """What a collector brings to the host: arrays of NumPy where there were arrays of JAX."""
    return jax.device_get(ControlState(jnp.asarray(x, jnp.float32), jnp.arange(len(x))))


def single(problem, x, action):
    problem = Problem(problem.environment() if isinstance(problem, ControlProblem) else problem)
    scenes, _ = episode_scenes(problem, states_of([x]), np.asarray([x]), np.asarray([action]), [0.0])
    return scenes[0]


def test_paint_puts_shapes_where_they_are():
    scene = Scene([Circle((1.0, 0.5), 0.25, RED)], (-2, 2, -1, 1), size=(200, 100))
    np.testing.assert_allclose(middle_of(scene, RED), (50, 25), atol=0.6)
    area = np.sum(np.abs(np.asarray(paint(scene)).astype(int) - rgb(RED)).max(axis=-1) < 12)
    assert area == pytest.approx(np.pi * (0.25 * 50) ** 2, rel=0.12)
    # The scale is the same in both directions: a picture of another shape shows more, nothing is stretched.
    wide = dataclasses.replace(scene, size=(400, 100))
    np.testing.assert_allclose(middle_of(wide, RED), (50, 25), atol=0.6)
    square = Polygon([(-1, -1), (0, -1), (0, 0), (-1, 0)], BLUE)
    np.testing.assert_allclose(middle_of(dataclasses.replace(scene, shapes=[square]), BLUE), (-25, -25), atol=0.6)
    bar = Rod((-1, 0.5), (1, 0.5), 0.1, GREEN)
    np.testing.assert_allclose(middle_of(dataclasses.replace(scene, shapes=[bar]), GREEN), (0, 25), atol=0.6)
    below = dataclasses.replace(scene, shapes=[], ground=-0.5)
    assert tuple(np.asarray(paint(below))[95, 5]) == tuple(rgb(rendering.GROUND))
    words = Text((0, 0), "words", 20, INK)
    np.testing.assert_allclose(middle_of(dataclasses.replace(scene, shapes=[words]), INK), (0, 0), atol=5)


def test_arrows_end_where_they_point_and_vanish_when_short():
    line, head = arrow((0.0, 0.0), (1.0, 0.0))
    assert max(x for x, _ in head.points) == 1.0
    assert line.points[0] == (0.0, 0.0)
    assert arrow((0.0, 0.0), (0.01, 0.0)) == []


def test_the_pendulum_turns_counter_clockwise_and_is_upright_at_zero():
    upright, left, hanging = (middle_of(single(Pendulum(), [a, 0.0], [0.0]), BLUE) for a in (0, np.pi / 2, np.pi))
    assert upright[1] > 30
    assert abs(upright[0]) < 3
    assert left[0] < -30
    assert hanging[1] < -30
    turning = single(Pendulum(), [np.pi, 0.0], [2.0])
    # From a hanging rod a positive torque starts its arc to the right.
    assert middle_of(turning, ORANGE)[0] > 5


@pytest.mark.parametrize(
    ("problem", "push"),
    [(CartPoleBalance(), [10.0]), (CartPoleSwingUp(), [10.0]), (DiscreteCartPole(), 1)],
    ids=["balance", "swingup", "discrete"],
)
def test_the_pole_of_a_cart_leans_towards_positive_positions(problem, push):
    scene = single(problem, [0.5, 0.0, 0.4, 0.0], push)
    cart, pole, force = (middle_of(scene, color) for color in (BLUE, ORANGE, RED))
    assert pole[0] > cart[0] > 10
    assert pole[1] > cart[1]
    assert force[0] > cart[0]


def test_the_quadrotor_tilts_counter_clockwise_and_hovers_at_its_height():
    problem = PlanarQuadrotor()
    level = single(problem, [0.0, 1.5, 0.0, 0, 0, 0], [2.4, 2.4])
    tilted = single(problem, [1.0, 2.0, 0.5, 0, 0, 0], [2.4, 0.0])
    assert middle_of(tilted, BLUE)[0] > middle_of(level, BLUE)[0] + 20
    assert middle_of(tilted, BLUE)[1] > middle_of(level, BLUE)[1] + 10
    beam = next(shape for shape in tilted.shapes if isinstance(shape, Rod))
    assert beam.end[1] > beam.start[1]
    # Only the left rotor pushes: its arrow is left of the body, and leans left with it.
    assert middle_of(tilted, ORANGE)[0] < middle_of(tilted, BLUE)[0]
    assert tilted.ground == 0.0


def test_double_integrators_of_one_and_two_dimensions_and_rows_for_more():
    line = single(DoubleIntegrator(), [1.0, 0.0], [-1.0])
    assert middle_of(line, ORANGE)[0] < middle_of(line, BLUE)[0]
    assert middle_of(line, BLUE)[0] > 30
    plane = single(DoubleIntegrator(num_dimensions=2), [1.0, -1.0, 0, 0], [0.0, 1.0])
    x, y = middle_of(plane, BLUE)
    assert x > 30
    assert y < -30
    rows = single(DoubleIntegrator(num_dimensions=3), np.zeros(6), np.zeros(3))
    words = [shape.text for shape in rows.shapes if isinstance(shape, Text)]
    assert {"position 1", "velocity 3", "force 2", "reward"} <= set(words)


def gymnax_scene(name, state, action):
    import gymnax

    environment, params = gymnax.make(name)
    states = SimpleNamespace(**{key: np.asarray(value) for key, value in state.items()})
    return rendering._SCENES[environment.name](states, params, np.asarray(action))


def test_gymnax_states_have_pictures():
    pole = gymnax_scene("CartPole-v1", {"x": -1.0, "theta": -0.3}, 0)
    assert middle_of(pole, ORANGE)[0] < middle_of(pole, BLUE)[0] < -20
    assert middle_of(pole, RED)[0] < middle_of(pole, BLUE)[0]
    rod = gymnax_scene("Pendulum-v1", {"theta": np.pi / 2}, [0.0])
    assert middle_of(rod, BLUE)[0] < -30
    hanging = gymnax_scene("Acrobot-v1", {"joint_angle1": 0.0, "joint_angle2": 0.0}, 1)
    raised = gymnax_scene("Acrobot-v1", {"joint_angle1": np.pi, "joint_angle2": 0.0}, 1)
    assert middle_of(hanging, ORANGE)[1] < middle_of(hanging, BLUE)[1] < 0 < middle_of(raised, BLUE)[1]
    assert middle_of(gymnax_scene("Acrobot-v1", {"joint_angle1": 0.5, "joint_angle2": 0.0}, 1), BLUE)[0] > 5
    for name, forward in (("MountainCar-v0", 2), ("MountainCarContinuous-v0", [1.0])):
        valley = gymnax_scene(name, {"position": -np.pi / 6}, forward)
        hill = gymnax_scene(name, {"position": 0.4}, forward)
        assert middle_of(hill, BLUE)[1] > middle_of(valley, BLUE)[1] + 60
        assert middle_of(hill, ORANGE)[0] > middle_of(hill, BLUE)[0]
        assert middle_of(hill, GREEN)[0] > middle_of(hill, BLUE)[0]


def swinging(steps):
    angle = np.pi + 2.0 * np.sin(np.arange(steps) * 0.1)
    x = np.stack([angle, np.cos(angle)], axis=-1).astype(np.float32)
    return states_of(x), x, 2.0 * np.sin(np.arange(steps))[:, None], -np.ones(steps)


def test_an_animation_shows_the_scenes_that_went_in():
    problem = Problem(Pendulum().environment())
    episode = swinging(12)
    scenes, fps = episode_scenes(problem, *episode)
    assert fps == pytest.approx(20.0)
    assert scenes[4].captions == ("0.20 s", "return -5")
    frames, durations = opened(render_episode(problem, *episode))
    assert len(frames) == 12
    assert durations == [50] * 11 + [1000]
    for frame, scene in zip(frames, scenes, strict=True):
        wrong = np.abs(frame - np.asarray(paint(scene)).astype(int)).max(axis=-1) > 48
        assert wrong.mean() < 0.002


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_other_formats(kind):
    data = animate([Scene([Circle((i, 0), 1, RED)], (-5, 5, -5, 5), size=(60, 60)) for i in range(3)], 10, kind)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.n_frames) == (kind.upper(), 3)


def test_long_episodes_are_thinned_and_keep_their_pace_and_size():
    problem = Problem(Pendulum().environment())
    data = render_episode(problem, *swinging(700))
    frames, durations = opened(data)
    assert len(frames) == 140
    assert durations[0] == 250
    assert len(data) < 400_000
    assert len(opened(render_episode(problem, *swinging(40), max_frames=10))[0]) == 10
    small = render_episode(problem, *swinging(60), max_bytes=30_000)
    assert len(small) <= 30_000


def test_what_has_no_picture_is_shown_as_rows_of_values():
    rng = np.random.default_rng(0)

    class Tank(ControlProblem):
        level_weight: jnp.ndarray = eqx.field(converter=jnp.asarray, default=1.0)
        sample_time: float = eqx.field(static=True, default=60.0)
        horizon: int = eqx.field(static=True, default=3)
        state_names = ("level", "salt")
        control_names = ("inflow",)

        def dynamics(self, x, u, d=None):
            return x

        def stage_cost(self, x, u):
            return x[0]

        def initial_state(self, key):
            return jnp.zeros(2)

    x = rng.normal(size=(40, 2))
    problem = Problem(Tank().environment())
    scenes, fps = episode_scenes(problem, states_of(x), x, x[:, :1], x[:, 0])
    words = [shape.text for shape in scenes[7].shapes if isinstance(shape, Text)]
    assert words[::2] == ["level", "salt", "inflow", "reward"]
    assert words[1] == f"{x[7, 0]:.3g}"
    assert scenes[7].captions[0] == "420.00 s"
    # Slower than four frames a second is no animation, so a slow problem is shown faster than it is.
    assert fps == 4.0
    observation = {"camera": rng.normal(size=(40, 7)), "touch": rng.integers(0, 2, (40, 4))}
    host = SimpleNamespace(name="Robot-v0", on_host=True)
    scenes, _ = episode_scenes(host, None, observation, rng.integers(0, 3, 40), np.ones((40, 2)))
    words = [shape.text for shape in scenes[0].shapes if isinstance(shape, Text)]
    assert words[:16:2] == [*(f"camera[{i}]" for i in range(7)), "touch[0]"]
    assert "3 more observations are not shown" in words
    assert scenes[0].captions == ("step 0", "return 1 1")


def test_small_images_are_shown_as_cells():
    board = np.zeros((3, 5, 4, 2), bool)
    board[:, 0, 3, 1] = True
    scenes, _ = episode_scenes(SimpleNamespace(name="Board"), None, board, np.zeros(3), np.zeros(3))
    x, y = middle_of(scenes[0], ORANGE)
    assert x > 40
    assert y > 80


def test_a_picture_can_be_registered_for_an_environment(monkeypatch):
    monkeypatch.setattr(rendering, "_SCENES", dict(rendering._SCENES))
    register_scene("pendulum-swingup", lambda state, params, action: Scene([Circle((0, 0), 1, RED)], (-2, 2, -2, 2)))
    assert middle_of(single(Pendulum(), [0.0, 0.0], [0.0]), RED) == pytest.approx((0, 0), abs=0.6)


def test_views_cover_the_whole_episode():
    x = np.asarray([[0.0, 0.0], [5.0, 0.0]])
    problem = Problem(DoubleIntegrator().environment())
    scenes, _ = episode_scenes(problem, states_of(x), x, np.zeros((2, 1)), np.zeros(2))
    assert scenes[0].view == scenes[1].view
    assert scenes[0].view[1] > 5.0


def test_pictures_of_a_simulator_are_kept_small():
    noise = np.random.default_rng(0).integers(0, 256, (60, 120, 160, 3)).astype(np.uint8)
    data = animate_frames(noise, 20.0)
    frames, durations = opened(data)
    assert len(data) < 400_000
    # Whatever was left out, it plays for as long.
    assert sum(durations[:-1]) + durations[0] == pytest.approx(60 * 50, rel=0.15)
    still = np.full((3, 20, 30, 3), 90, np.uint8)
    still[1, :10] = 200
    frames, _ = opened(animate_frames(still))
    assert [frame.shape for frame in frames] == [(20, 30, 3)] * 3
    assert np.abs(frames[1] - still[1]).max() < 8
    assert np.abs(frames[2] - still[2]).max() < 8
    assert opened(animate_frames(np.zeros((2, 100, 960, 3), np.uint8)))[0][0].shape == (50, 480, 3)


def test_save_takes_the_format_from_the_ending(tmp_path):
    path = save(tmp_path / "still.png", [Scene([], (-1, 1, -1, 1), size=(40, 30))])
    assert Image.open(path).size == (40, 30)


MODEL = """
<mujoco>
  <worldbody>
    <geom type="plane" size="5 5 1"/>
    <body pos="0.5 0 1">
      {joint}
      <geom type="sphere" size="0.2" rgba="1 0 0 1"/>
      <geom type="capsule" fromto="0 0 0 1 0 0" size="0.05" rgba="0 1 0 1"/>
      <geom type="box" pos="0 0 0.6" size="0.1 0.2 0.3" rgba="0 0 1 1"/>
      <geom type="cylinder" pos="0 0 -0.5" size="0.1 0.2" euler="90 0 0" rgba="1 1 0 1"/>
      <geom type="ellipsoid" pos="0 0 -0.8" size="0.3 0.2 0.1" euler="0 90 0" rgba="0 1 1 1"/>
      <geom type="sphere" size="3" group="3"/>
    </body>
  </worldbody>
</mujoco>
"""


def mujoco_state(joint):
    import mujoco

    model = mujoco.MjModel.from_xml_string(MODEL.format(joint=joint))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def box_of(shape):
    points = np.asarray(rendering._corners(shape))
    return np.stack([points.min(axis=0), points.max(axis=0)]).ravel()


def test_mujoco_geoms_have_their_outlines():
    model, data = mujoco_state('<freejoint name="free"/>')
    scene = mujoco_scene(model, data)
    assert scene.ground == 0.0
    shapes = {shape.color: shape for shape in scene.shapes if getattr(shape, "outline", None)}
    assert len(shapes) == 5
    boxes = {color: box_of(shape) for color, shape in shapes.items()}
    np.testing.assert_allclose(boxes["#ff0000"], [0.3, 0.8, 0.7, 1.2], atol=1e-9)
    np.testing.assert_allclose(boxes["#00ff00"], [0.45, 0.95, 1.55, 1.05], atol=1e-9)
    np.testing.assert_allclose(boxes["#0000ff"], [0.4, 1.3, 0.6, 1.9], atol=1e-9)
    # The cylinder lies along y, so a disc of it is seen; the ellipsoid stands on its end.
    np.testing.assert_allclose(boxes["#ffff00"], [0.4, 0.4, 0.6, 0.6], atol=2e-3)
    np.testing.assert_allclose(boxes["#00ffff"], [0.4, -0.1, 0.6, 0.5], atol=2e-3)
    # A body that is free to leave is followed.
    data.qpos[0] = 20.0
    import mujoco

    mujoco.mj_forward(model, data)
    moved = mujoco_scene(model, data, captions=("1 s", ""))
    assert moved.view[0] == pytest.approx(scene.view[0] + 19.5)
    assert moved.view[2:] == scene.view[2:]
    assert moved.captions == ("1 s", "")
    assert len(animate([scene, moved])) > 1000


def test_mujoco_mechanisms_in_the_horizontal_plane_are_seen_from_above():
    flat = mujoco_scene(*mujoco_state('<joint type="hinge" axis="0 0 1"/>'))
    assert flat.ground is None
    shapes = {shape.color: shape for shape in flat.shapes if getattr(shape, "outline", None)}
    box = next(shape for color, shape in shapes.items() if isinstance(shape, Polygon) and color == "#0000ff")
    np.testing.assert_allclose(box_of(box), [0.4, -0.2, 0.6, 0.2], atol=1e-9)
    side = mujoco_scene(*mujoco_state('<joint type="hinge" axis="0 0 1"/>'), view="side")
    assert side.ground == 0.0
    upright = mujoco_scene(*mujoco_state('<joint type="hinge" axis="0 1 0"/>'))
    assert upright.ground == 0.0


def test_a_mujoco_episode_is_a_small_animation():
    environment = gymnasium.make("Hopper-v5").unwrapped
    environment.reset(seed=0)
    environment.action_space.seed(0)
    scenes = []
    for _ in range(30):
        environment.step(environment.action_space.sample())
        scenes.append(mujoco_scene(environment.model, environment.data))
    data = animate(scenes, 25)
    assert opened(data)[0][0].shape == (300, 480, 3)
    assert len(data) < 100_000


def test_pictures_need_neither_plotting_nor_a_simulator():
    program = (
        "import sys; from steersman.envs.rendering import Circle, Scene, animate;"
        "animate([Scene([Circle((0, 0), 1)], (-2, 2, -2, 2), ('a', 'b'))] * 2);"
        "assert not {'matplotlib', 'pygame', 'mujoco', 'gymnax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: animate([]), "scenes"),
        (lambda: animate([Scene([], (0, 1, 0, 1))], 0.0), "fps"),
        (lambda: animate([Scene([], (0, 1, 0, 1))], 10.0, "mp4"), "format is 'mp4'"),
        (lambda: animate_frames(np.zeros((3, 4, 5), np.uint8)), "frames"),
        (lambda: animate_frames(np.zeros((3, 4, 5, 3))), "frames"),
        (lambda: animate_frames(np.zeros((3, 4, 5, 3), np.uint8), max_frames=0), "max_frames"),
        (lambda: animate_frames(np.zeros((3, 4, 5, 3), np.uint8), max_bytes=0), "max_bytes"),
        (lambda: save("film.mov", [Scene([], (0, 1, 0, 1))]), "format is 'mov'"),
        (lambda: render_episode(None, None, np.zeros((3, 2)), np.zeros(3), []), r"rewards\.shape"),
        (lambda: render_episode(None, None, np.zeros((2, 2)), np.zeros(3), np.zeros(3)), "length of observations is 2"),
        (lambda: render_episode(None, {"x": 1.0}, np.zeros((3, 2)), np.zeros(3), np.zeros(3)), "length of states is 0"),
        (lambda: mujoco_scene(None, None, view="front"), "view is 'front'"),
        (lambda: register_scene("x", 3), "function"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    # Shapes and kinds of arguments are refused by the type checker before the library sees them, where it is on.
    with pytest.raises((InputError, TypeError), match=argument):
        call()
