"""Pick and place in MuJoCo: a gantry gripper, a cube, a target, and an expert that shows how it is done."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from steersman.envs.demonstrations import Demonstrations
from steersman.envs.expert_recording import record_expert
from steersman.errors import InputError, InputTypeError, require, require_count, require_number, unknown_name

ID = "steersman/PickAndPlace-v0"
TASK = "Put the cube on the target."

#: What an observation may be made of; the names are those of Push-T.
OBSERVATIONS = ("state", "environment_state_agent_pos", "pixels_agent_pos")

#: Bounds of an action in metres and radians: x, y and height of the grip, its turn, the gap between the fingers.
LOWEST = np.asarray([-0.2, -0.2, 0.01, -1.7, 0.0])
HIGHEST = np.asarray([0.2, 0.2, 0.25, 1.7, 0.08])

#: How far from where the gripper is its servos are sent at most, in one step: the grip's point, its turn, the gap.
REACH, TURN, GAP = 0.03, 0.25, 0.03

#: Half of the cube's edge, in metres.
CUBE = 0.02

MODEL = f"""
<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0 0 0"/>
    <global offwidth="640" offheight="640"/>
    <quality shadowsize="512"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="flat" rgb1="0.99 0.98 0.97" rgb2="0.99 0.98 0.97"
      width="16" height="96"/>
  </asset>
  <worldbody>
    <light pos="0.3 -0.6 1.2" dir="-0.3 0.5 -1" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
    <camera name="front" pos="0 -0.64 0.52" xyaxes="1 0 0 0 0.6 0.8" fovy="45"/>
    <camera name="top" pos="0 0 0.8" xyaxes="1 0 0 0 1 0" fovy="45"/>
    <geom name="table" type="box" size="0.3 0.3 0.02" pos="0 0 -0.02" rgba="0.86 0.84 0.79 1"/>
    <site name="target" type="cylinder" size="0.03 0.0005" pos="0 0 0.0005" rgba="0.30 0.60 0.42 1"/>
    <body name="cube" pos="0 0 {CUBE}">
      <freejoint name="cube"/>
      <geom name="cube" type="box" size="{CUBE} {CUBE} {CUBE}" mass="0.06" rgba="0.88 0.48 0.22 1" condim="4"
        friction="1 0.01 0.001"/>
    </body>
    <body name="hand" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0" range="{LOWEST[0] - 0.02} {HIGHEST[0] + 0.02}"/>
      <joint name="y" type="slide" axis="0 1 0" range="{LOWEST[1] - 0.02} {HIGHEST[1] + 0.02}"/>
      <joint name="z" type="slide" axis="0 0 1" range="0 {HIGHEST[2] + 0.02}"/>
      <joint name="turn" type="hinge" axis="0 0 1" range="-1.8 1.8" armature="0.005"/>
      <geom name="palm" type="box" size="0.06 0.015 0.012" pos="0 0 0.072" mass="0.3" rgba="0.23 0.43 0.65 1"/>
      <geom name="wrist" type="cylinder" size="0.012 0.04" pos="0 0 0.122" mass="0.1" rgba="0.17 0.19 0.22 1"/>
      <body name="left finger" pos="0.007 0 0.03" gravcomp="1">
        <joint name="left" type="slide" axis="1 0 0" range="0 0.042"/>
        <geom name="left finger" type="box" size="0.007 0.012 0.03" mass="0.05" rgba="0.55 0.58 0.62 1" condim="4"
          friction="1 0.01 0.001"/>
      </body>
      <body name="right finger" pos="-0.007 0 0.03" gravcomp="1">
        <joint name="right" type="slide" axis="-1 0 0" range="0 0.042"/>
        <geom name="right finger" type="box" size="0.007 0.012 0.03" mass="0.05" rgba="0.55 0.58 0.62 1" condim="4"
          friction="1 0.01 0.001"/>
      </body>
    </body>
  </worldbody>
  <contact>
    <exclude body1="left finger" body2="right finger"/>
  </contact>
  <equality>
    <joint joint1="left" joint2="right"/>
  </equality>
  <actuator>
    <position name="x" joint="x" kp="500" kv="32"/>
    <position name="y" joint="y" kp="500" kv="32"/>
    <position name="z" joint="z" kp="500" kv="32"/>
    <position name="turn" joint="turn" kp="5" kv="0.33"/>
    <position name="left" joint="left" kp="300" kv="8" forcerange="-5 5"/>
    <position name="right" joint="right" kp="300" kv="8" forcerange="-5 5"/>
  </actuator>
</mujoco>
"""


class PickAndPlace(gymnasium.Env):
    """Lift a cube and put it down on a target: one reward, at the very end.

    An action is where the gripper shall be, ``[x, y, height, turn, gap]`` in metres and radians: the point between the
    fingertips, the turn about the vertical axis and the gap between the fingers. The servos are sent there, but no
    farther than 3 cm, 0.25 rad and a gap of 3 cm from where they are. A step takes 0.05 s. The cube has an edge of 4 cm
    and is turned by up to 45 degrees, so that it can be gripped by either pair of its faces.

    The reward is 1, and the episode ends, when the cube, once lifted by 2 cm, lies within `tolerance` of the target and
    is let go of; to push it there does not count. ``info`` has ``is_success``, ``lifted`` (now or before) and
    ``distance`` (of the cube from the target, in metres). ``reset`` takes the options ``cube`` (x, y and turn) and
    ``target`` (x and y).

    Observations, by `obs_type`:

    - ``"state"``: ``[14]``, the gripper as in an action, the cube's position and quaternion, the target's x and y;
    - ``"environment_state_agent_pos"``: the same in a dict, ``agent_pos [5]`` and ``environment_state [9]``;
    - ``"pixels_agent_pos"``: ``agent_pos`` and a picture ``pixels [height, width, 3]`` in bytes, which needs OpenGL.

    Registered with Gymnasium as ``steersman/PickAndPlace-v0``, with a limit of 100 steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        obs_type: str = "state",
        render_mode: str | None = None,
        *,
        tolerance: float = 0.025,
        normalized_actions: bool = False,
        observation_width: int = 96,
        observation_height: int = 96,
        visualization_width: int = 480,
        visualization_height: int = 360,
    ):
        """Compiles the model.

        Args:
            obs_type: see the class.
            render_mode: ``"rgb_array"`` where :meth:`render` is called.
            tolerance: distance from the target that counts, in metres.
            normalized_actions: let -1 and 1 stand for the bounds of each number of an action.
            observation_width: of pictures that are observed, in pixels.
            observation_height: likewise.
            visualization_width: of pictures that :meth:`render` makes.
            visualization_height: likewise.

        Raises:
            InputError: an argument is out of its range, or MuJoCo is missing.
        """
        if obs_type not in OBSERVATIONS:
            raise unknown_name("obs_type", obs_type, OBSERVATIONS)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(f"render_mode is {render_mode!r}, but it must be 'rgb_array' or None.")
        require_number("tolerance", tolerance, above=0.0)
        for name, pixels in (
            ("observation_width", observation_width),
            ("observation_height", observation_height),
            ("visualization_width", visualization_width),
            ("visualization_height", visualization_height),
        ):
            require_count(name, pixels)
            require(pixels <= 640, name, pixels, "at most 640")
        self.obs_type = obs_type
        self.render_mode = render_mode
        self.tolerance = float(tolerance)
        self.normalized_actions = bool(normalized_actions)
        self._observed = (observation_height, observation_width)
        self._shown = (visualization_height, visualization_width)
        self._mujoco = _mujoco()
        self.model = self._mujoco.MjModel.from_xml_string(MODEL)
        self.data = self._mujoco.MjData(self.model)
        self._lifted = False
        self._substeps = round(1.0 / (self.metadata["render_fps"] * self.model.opt.timestep))

        low, high = (-np.ones(5), np.ones(5)) if self.normalized_actions else (LOWEST, HIGHEST)
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        agent = spaces.Box(-np.inf, np.inf, (5,), np.float32)
        if obs_type == "state":
            self.observation_space = spaces.Box(-np.inf, np.inf, (14,), np.float32)
        elif obs_type == "environment_state_agent_pos":
            world = spaces.Box(-np.inf, np.inf, (9,), np.float32)
            self.observation_space = spaces.Dict({"agent_pos": agent, "environment_state": world})
        else:
            picture = spaces.Box(0, 255, (*self._observed, 3), np.uint8)
            self.observation_space = spaces.Dict({"agent_pos": agent, "pixels": picture})

    @property
    def gripper(self) -> Float[np.ndarray, "5"]:
        """Where the gripper is, in the order of an action."""
        x, y, z, turn, left, right = self.data.qpos[7:13]
        return np.asarray([x, y, z, turn, left + right])

    @property
    def cube(self) -> Float[np.ndarray, "7"]:
        """The cube's position, and its quaternion with a real part that is not negative."""
        position, quaternion = self.data.qpos[:3], self.data.qpos[3:7]
        return np.concatenate([position, quaternion if quaternion[0] >= 0 else -quaternion])

    @property
    def target(self) -> Float[np.ndarray, "2"]:
        """Where the cube is to lie."""
        return self.model.site_pos[0, :2].copy()

    @property
    def state(self) -> Float[np.ndarray, "14"]:
        """What ``"state"`` observes, whatever this environment observes."""
        return np.concatenate([self.gripper, self.cube, self.target])

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        given = dict(options or {})
        for name in given:
            if name not in ("cube", "target"):
                raise unknown_name("option of reset", name, ("cube", "target"))
        random = self.np_random
        gripper = random.uniform([-0.05, -0.05, 0.13], [0.05, 0.05, 0.18])
        cube = random.uniform([-0.15, -0.15, -math.pi / 4], [0.15, 0.15, math.pi / 4])
        target = random.uniform(-0.15, 0.15, 2)
        cube = _numbers("cube", given.get("cube", cube), 3)
        if "target" in given:
            target = _numbers("target", given["target"], 2)
        else:
            while math.dist(target, cube[:2]) < 0.1:
                target = random.uniform(-0.15, 0.15, 2)
        for name, place in (("cube", cube[:2]), ("target", target)):
            require_number(name, place, at_least=-0.18, at_most=0.18)
        self._mujoco.mj_resetData(self.model, self.data)
        self.model.site_pos[0, :2] = target
        self.data.qpos[:7] = [*cube[:2], CUBE, math.cos(0.5 * cube[2]), 0.0, 0.0, math.sin(0.5 * cube[2])]
        self.data.qpos[7:13] = [*gripper, 0.0, 0.035, 0.035]
        self._lifted = False
        self._mujoco.mj_forward(self.model, self.data)
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        action = _numbers("action", action, 5)
        if self.normalized_actions:
            action = LOWEST + 0.5 * (np.clip(action, -1.0, 1.0) + 1.0) * (HIGHEST - LOWEST)
        action = np.clip(action, LOWEST, HIGHEST)
        now = self.gripper
        move = action[:3] - now[:3]
        move *= min(1.0, REACH / max(float(np.linalg.norm(move)), 1e-9))
        turn = now[3] + np.clip(action[3] - now[3], -TURN, TURN)
        gap = now[4] + np.clip(action[4] - now[4], -GAP, GAP)
        self.data.ctrl[:] = [*(now[:3] + move), turn, 0.5 * gap, 0.5 * gap]
        self._mujoco.mj_step(self.model, self.data, self._substeps)
        info = self._info()
        success = info["is_success"]
        return self._observe(), float(success), success, False, info

    def render(self) -> Any:
        """A picture of the table ``[height, width, 3]``."""
        if self.render_mode is None:
            raise InputError("render_mode is None, but it must be 'rgb_array' for the environment to be drawn.")
        return self._picture(self._shown)

    def _info(self) -> dict[str, Any]:
        cube, gap = self.cube, self.gripper[4]
        away = math.dist(cube[:2], self.target)
        down = abs(cube[2] - CUBE) < 0.004
        # Wider apart than the cube's diagonal, the fingers hold nothing.
        self._lifted = self._lifted or bool(cube[2] > CUBE + 0.02)
        success = bool(self._lifted and away < self.tolerance and down and gap > 2.9 * CUBE)
        return {"is_success": success, "lifted": self._lifted, "distance": away}

    def _observe(self) -> Any:
        agent = self.gripper.astype(np.float32)
        if self.obs_type == "pixels_agent_pos":
            return {"agent_pos": agent, "pixels": self._picture(self._observed)}
        world = np.concatenate([self.cube, self.target]).astype(np.float32)
        if self.obs_type == "state":
            return np.concatenate([agent, world])
        return {"agent_pos": agent, "environment_state": world}

    def _picture(self, size: tuple[int, int]) -> np.ndarray:
        renderer = _renderer(*size)
        renderer.update_scene(self.data, camera="front")
        return np.array(renderer.render())


def _mujoco() -> Any:
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise InputError("Pick and place needs MuJoCo: install it with pip install 'steersman[mujoco]'.") from error


_NO_OPENGL = (
    "MuJoCo finds no OpenGL to draw with here; where there is a driver without a screen, start Python with the "
    "environment variable MUJOCO_GL set to 'egl' or 'osmesa'."
)


class _Renderers(threading.local):
    """One for each size, shared by all environments of a thread: each holds a context of OpenGL and its memory."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], Any] = {}


_renderers = _Renderers()
_opengl_failed = False


def _renderer(height: int, width: int) -> Any:
    # Where OpenGL is missing MuJoCo raises an error the first time, and may end the process the second.
    global _opengl_failed
    if _opengl_failed:
        raise InputError(_NO_OPENGL)
    if (height, width) not in _renderers.made:
        mujoco = _mujoco()
        try:
            # Environments differ in their data alone.
            renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string(MODEL), height, width)
        except Exception as error:
            _opengl_failed = True
            raise InputError(_NO_OPENGL) from error
        _renderers.made[height, width] = renderer
    return _renderers.made[height, width]


def _numbers(name: str, value: Any, count: int) -> np.ndarray:
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise InputTypeError(f"{name} is {value!r}, but it must be {count} numbers.") from None
    require(numbers.shape == (count,), f"{name}'s shape", numbers.shape, f"({count},)")
    require_number(name, numbers)
    return numbers


class PickAndPlaceExpert:
    """Goes above the cube, down, grips it by two of its faces, lifts, carries, lowers and lets go.

    It reads ``"state"`` observations, notices a cube that has slipped out, and starts over. An instance plays one
    episode.
    """

    def __init__(self, side: int, *, height: float = 0.1):
        """Chooses the way.

        Args:
            side: which pair of faces is gripped: 0 for the one that needs the smaller turn, 1 for the other.
            height: above the table, at which the gripper travels, in metres.
        """
        require(side in (0, 1), "side", side, "0 or 1")
        require_number("height", height, at_least=0.07, at_most=float(HIGHEST[2]))
        self.side = int(side)
        self.height = float(height)
        self._phase = "approach"
        self._turn: float | None = None
        self._waited = 0

    def __call__(self, state: Float[np.ndarray, "14"]) -> Float[np.ndarray, "5"]:
        """The action ``[5]``, in metres and radians, at an observation."""
        state = np.asarray(state, np.float64)
        require(state.shape == (14,), "state's shape", state.shape, "(14,)")
        gripper, cube, quaternion, target = state[:5], state[5:8], state[8:12], state[12:]
        if self._turn is None:
            self._turn = _grip_turn(quaternion, self.side)
        self._advance(gripper, cube, target)
        place = cube if self._phase in ("approach", "descend", "close") else None
        x, y = gripper[:2] if place is None else place[:2]
        if self._phase in ("carry", "lower"):
            # What is carried may sit beside the grip's middle.
            x, y = gripper[:2] + target - cube[:2]
        z = {"approach": self.height, "lift": self.height, "carry": self.height, "retreat": self.height}
        gap = {"close": 0.0, "lift": 0.0, "carry": 0.0, "lower": 0.0}
        goal = np.asarray([x, y, z.get(self._phase, 0.016), self._turn, gap.get(self._phase, 0.07)])
        move = goal[:3] - gripper[:3]
        # Nearer waypoints make smoother demonstrations than corners do.
        move *= min(1.0, REACH / max(float(np.linalg.norm(move)), 1e-9))
        turn = gripper[3] + np.clip(goal[3] - gripper[3], -TURN, TURN)
        return np.clip([*(gripper[:3] + move), turn, goal[4]], LOWEST, HIGHEST)

    def _advance(self, gripper: np.ndarray, cube: np.ndarray, target: np.ndarray) -> None:
        self._waited += 1
        beside = math.dist(gripper[:2], cube[:2])
        dropped = cube[2] < 0.03 and gripper[2] > 0.06
        assert self._turn is not None
        phase = self._phase
        if phase == "approach" and beside < 0.006 and abs(gripper[3] - self._turn) < 0.06:
            phase = "descend"
        elif phase == "descend" and gripper[2] < 0.02:
            phase = "close"
        elif phase == "close" and self._waited >= 5:
            phase = "lift"
        elif (phase == "lift" and self._waited >= 6 and dropped) or (phase == "carry" and dropped):
            phase = "approach"
        elif phase == "lift" and gripper[2] > self.height - 0.015:
            phase = "carry"
        elif phase == "carry" and math.dist(cube[:2], target) < 0.006:
            phase = "lower"
        elif phase == "lower" and cube[2] < CUBE + 0.003:
            phase = "open"
        elif phase == "open" and self._waited >= 6:
            phase = "retreat"
        elif phase == "retreat" and self._waited >= 8:
            phase = "approach"
        if phase != self._phase:
            self._phase, self._waited = phase, 0


def _grip_turn(quaternion: np.ndarray, side: int) -> float:
    """The turn that aligns the fingers with a pair of the cube's faces: the smaller one, or the other one."""
    w, x, y, z = quaternion
    turn = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    nearest = (turn + math.pi / 4) % (math.pi / 2) - math.pi / 4
    return nearest if side == 0 else nearest - math.copysign(math.pi / 2, nearest)


def make_pick_and_place(obs_type: str = "state", *, num_steps: int = 100, **options: Any) -> gymnasium.Env:
    """:class:`PickAndPlace` with a limit on the length of its episodes.

    Args:
        obs_type: see :class:`PickAndPlace`.
        num_steps: steps after which an episode is truncated.
        options: further arguments of :class:`PickAndPlace`.
    """
    require_count("num_steps", num_steps)
    return gymnasium.make(ID, max_episode_steps=num_steps, disable_env_checker=True, obs_type=obs_type, **options)


def demonstrations(
    episodes: int,
    seed: int,
    *,
    obs_type: str = "state",
    noise: float = 0.0,
    side: int | None = None,
    only_successes: bool = True,
) -> Demonstrations:
    """Episodes of :class:`PickAndPlaceExpert`.

    Args:
        episodes: how many.
        seed: what all randomness comes from.
        obs_type: what is recorded, see :class:`PickAndPlace`.
        noise: standard deviation of what is added to where the grip is sent, in metres in each direction.
        side: which pair of faces is gripped, see :class:`PickAndPlaceExpert`; drawn for each episode where None.
        only_successes: leave out episodes without success and play others in their place.
    """
    require_number("noise", noise, at_least=0.0)
    require(side in (None, 0, 1), "side", side, "0, 1 or None")
    return record_expert(
        make_pick_and_place(obs_type),
        lambda random: PickAndPlaceExpert(int(random.integers(2)) if side is None else side),
        lambda environment: environment.unwrapped.state,
        episodes,
        seed,
        noise=np.asarray([noise, noise, noise, 0.0, 0.0]),
        only_successes=only_successes,
        task=TASK,
    )
