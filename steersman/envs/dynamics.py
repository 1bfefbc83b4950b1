"""Control problems with known equations: double integrator, pendulum, cart-pole, planar quadrotor."""

from __future__ import annotations

import abc
import math
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from steersman.envs.control_problem import ContinuousTimeProblem, ControlProblem, ControlState, as_parameter
from steersman.envs.environment import Environment
from steersman.errors import require_count, require_number


def wrap_angle(angle: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same angle within ``[-pi, pi)``."""
    return (angle + math.pi) % (2.0 * math.pi) - math.pi


def _optional_parameter(value: Any) -> Array | None:
    return None if value is None else as_parameter(value)


def _symmetric(*bounds: float) -> tuple[np.ndarray, np.ndarray]:
    return -np.asarray(bounds), np.asarray(bounds)


class DoubleIntegrator(ControlProblem):
    """A mass without friction, pushed by bounded forces: the smallest linear-quadratic problem.

    ``mass * q'' = u + d`` in each of ``num_dimensions`` directions, discretized exactly for forces held constant over
    a step. State: positions, then velocities. Cost of a step: ``position_weight |q|^2 + velocity_weight |v|^2 +
    control_weight |u|^2``; the terminal cost is ``terminal_weight`` times that of a step without control.

    Attributes:
        num_dimensions: directions.
        mass: in kg.
        position_weight: per m^2.
        velocity_weight: per (m/s)^2.
        control_weight: per N^2.
        terminal_weight: without unit.
        noise: standard deviation of a random force drawn anew at each step, in N; None for none.
        max_force: bound on each control, in N.
        max_position: bound on each position that a planner keeps, in m.
        max_speed: bound on each velocity that a planner keeps, in m/s.
    """

    num_dimensions: int = eqx.field(static=True, default=1)
    mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    position_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    velocity_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.1)
    control_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.01)
    terminal_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=10.0)
    noise: Float[Array, ""] | None = eqx.field(converter=_optional_parameter, default=None)
    max_force: float = eqx.field(static=True, default=1.0)
    max_position: float = eqx.field(static=True, default=math.inf)
    max_speed: float = eqx.field(static=True, default=math.inf)
    sample_time: float = eqx.field(static=True, default=0.1)
    horizon: int = eqx.field(static=True, default=100)

    def __check_init__(self) -> None:
        require_count("num_dimensions", self.num_dimensions)
        require_number("mass", self.mass, above=0.0)
        for weight in ("position_weight", "velocity_weight", "control_weight", "terminal_weight"):
            require_number(weight, getattr(self, weight), at_least=0.0)
        if self.noise is not None:
            require_number("noise", self.noise, at_least=0.0)

    @property
    def name(self) -> str:
        return "double-integrator"

    @property
    def state_names(self) -> tuple[str, ...]:
        return self._numbered("position") + self._numbered("velocity")

    @property
    def state_units(self) -> tuple[str, ...]:
        return ("m",) * self.num_dimensions + ("m/s",) * self.num_dimensions

    @property
    def control_names(self) -> tuple[str, ...]:
        return self._numbered("force")

    @property
    def control_units(self) -> tuple[str, ...]:
        return ("N",) * self.num_dimensions

    @property
    def disturbance_names(self) -> tuple[str, ...]:
        return self._numbered("pushing force")

    def _numbered(self, name: str) -> tuple[str, ...]:
        return (name,) if self.num_dimensions == 1 else tuple(f"{name} {i + 1}" for i in range(self.num_dimensions))

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(*[self.max_force] * self.num_dimensions)

    @property
    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(*[self.max_position] * self.num_dimensions, *[self.max_speed] * self.num_dimensions)

    def dynamics(
        self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"] | None = None
    ) -> Float[Array, " n"]:
        position, velocity = jnp.split(x, 2)
        acceleration = (u if d is None else u + d) / self.mass
        h = self.sample_time
        moved = position + h * velocity + 0.5 * h**2 * acceleration
        return jnp.concatenate([moved, velocity + h * acceleration]).astype(x.dtype)

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        position, velocity = jnp.split(x, 2)
        cost = self.position_weight * jnp.sum(position**2) + self.velocity_weight * jnp.sum(velocity**2)
        return cost + self.control_weight * jnp.sum(u**2)

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return self.terminal_weight * self.stage_cost(x, jnp.zeros(self.num_dimensions, x.dtype))

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        """Positions within 2 m of the target, velocities up to 0.5 m/s, uniformly."""
        high = jnp.repeat(jnp.asarray([2.0, 0.5]), self.num_dimensions)
        return jax.random.uniform(key, high.shape, minval=-high, maxval=high)

    def sample_disturbance(self, key: Key[Array, ""]) -> Float[Array, " k"]:
        if self.noise is None:
            return jnp.zeros(self.num_dimensions)
        return self.noise * jax.random.normal(key, (self.num_dimensions,))


class Pendulum(ContinuousTimeProblem):
    """Swing a rod up with a torque too weak to lift it directly.

    With the default integrator a step, its cost and its observation are those of Gymnasium's Pendulum-v1. State:
    angle (0 is upright, counter-clockwise positive, never wrapped) and rate; observation: cosine, sine, rate.
    ``w' = (3 gravity / (2 length)) sin(angle) + 3 / (mass length^2) (u + d - damping w)``; cost of a step:
    ``angle_weight wrap(angle)^2 + rate_weight w^2 + control_weight u^2``.

    Attributes:
        gravity: in m/s^2.
        mass: of the rod, in kg.
        length: of the rod, in m.
        damping: of the joint, in N m s.
        angle_weight: per rad^2.
        rate_weight: per (rad/s)^2.
        control_weight: per (N m)^2.
        max_torque: bound on the control, in N m.
        max_speed: where the rate stops growing, in rad/s.
    """

    gravity: Float[Array, ""] = eqx.field(converter=as_parameter, default=10.0)
    mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    length: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    damping: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.0)
    angle_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    rate_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.1)
    control_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.001)
    max_torque: float = eqx.field(static=True, default=2.0)
    max_speed: float = eqx.field(static=True, default=8.0)
    sample_time: float = eqx.field(static=True, default=0.05)
    horizon: int = eqx.field(static=True, default=200)
    integrator: str = eqx.field(static=True, default="semi_implicit")
    substeps: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        require_number("mass", self.mass, above=0.0)
        require_number("length", self.length, above=0.0)
        require_number("damping", self.damping, at_least=0.0)

    @property
    def name(self) -> str:
        return "pendulum-swingup"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("angle", "rate")

    @property
    def state_units(self) -> tuple[str, ...]:
        return ("rad", "rad/s")

    @property
    def control_names(self) -> tuple[str, ...]:
        return ("torque",)

    @property
    def control_units(self) -> tuple[str, ...]:
        return ("N m",)

    @property
    def disturbance_names(self) -> tuple[str, ...]:
        return ("disturbing torque",)

    @property
    def velocities(self) -> tuple[bool, ...]:
        return (False, True)

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(self.max_torque)

    @property
    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(math.inf, self.max_speed)

    @property
    def observation_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(1.0, 1.0, self.max_speed)

    def derivative(self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"]) -> Float[Array, " n"]:
        angle, rate = x
        fall = 1.5 * self.gravity / self.length * jnp.sin(angle)
        push = 3.0 / (self.mass * self.length**2) * (u[0] + d[0] - self.damping * rate)
        return jnp.stack([rate, fall + push])

    def limit_state(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.stack([x[0], jnp.clip(x[1], -self.max_speed, self.max_speed)])

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        return self.terminal_cost(x) + self.control_weight * u[0] ** 2

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return self.angle_weight * wrap_angle(x[0]) ** 2 + self.rate_weight * x[1] ** 2

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        """Any angle, rates up to 1 rad/s, uniformly."""
        high = jnp.asarray([math.pi, 1.0])
        return jax.random.uniform(key, (2,), minval=-high, maxval=high)

    def observe(self, x: Float[Array, " n"], key: Key[Array, ""] | None = None) -> Float[Array, " o"]:
        del key
        return jnp.stack([jnp.cos(x[0]), jnp.sin(x[0]), x[1]])


class CartPole(ContinuousTimeProblem):
    """A cart on a rail with a pole hinged to it, pushed by a bounded force: what the tasks below have in common.

    State: position, velocity, angle (0 is upright, positive leans towards positive positions, never wrapped), rate.
    The pole is a uniform rod; equations of Barto, Sutton and Anderson (1983) without friction, as in Gymnasium's
    CartPole-v1. The episode fails where the cart leaves its rail. The disturbance is a force on the cart.
    """

    gravity: eqx.AbstractVar[Float[Array, ""]]
    cart_mass: eqx.AbstractVar[Float[Array, ""]]
    pole_mass: eqx.AbstractVar[Float[Array, ""]]
    half_length: eqx.AbstractVar[Float[Array, ""]]
    max_force: eqx.AbstractVar[float]
    max_position: eqx.AbstractVar[float]

    def __check_init__(self) -> None:
        for constant in ("cart_mass", "pole_mass", "half_length"):
            require_number(constant, getattr(self, constant), above=0.0)
        require_number("max_position", self.max_position, above=0.0)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("position", "velocity", "angle", "rate")

    @property
    def state_units(self) -> tuple[str, ...]:
        return ("m", "m/s", "rad", "rad/s")

    @property
    def control_names(self) -> tuple[str, ...]:
        return ("force",)

    @property
    def control_units(self) -> tuple[str, ...]:
        return ("N",)

    @property
    def disturbance_names(self) -> tuple[str, ...]:
        return ("disturbing force",)

    @property
    def velocities(self) -> tuple[bool, ...]:
        return (False, True, False, True)

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(self.max_force)

    @property
    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(self.max_position, math.inf, math.inf, math.inf)

    @property
    @abc.abstractmethod
    def failure_cost(self) -> float: ...

    def derivative(self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"]) -> Float[Array, " n"]:
        _, velocity, angle, rate = x
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        total_mass = self.cart_mass + self.pole_mass
        moment = self.pole_mass * self.half_length
        push = (u[0] + d[0] + moment * rate**2 * sine) / total_mass
        inertia = self.half_length * (4.0 / 3.0 - self.pole_mass * cosine**2 / total_mass)
        turn = (self.gravity * sine - cosine * push) / inertia
        return jnp.stack([velocity, push - moment * turn * cosine / total_mass, rate, turn])

    def failed(self, x: Float[Array, " n"]) -> Bool[Array, ""]:
        return jnp.abs(x[0]) > self.max_position


class CartPoleBalance(CartPole):
    """Keep the pole of a cart upright with a continuous force, cheaply.

    Cost of a step: ``weights . x^2 + control_weight u^2``. The episode fails where the cart leaves its rail or the
    pole leans by more than ``max_angle``. At the equilibrium, the Jacobians are those of the linearized cart-pole
    with ``dt = 0.02`` that several of the systems here are stated on.

    Attributes:
        gravity: in m/s^2.
        cart_mass: in kg.
        pole_mass: in kg.
        half_length: of the pole, in m.
        weights: cost of squared position, velocity, angle and rate ``[4]``.
        control_weight: per N^2.
        max_force: bound on the control, in N.
        max_position: half the length of the rail, in m.
        max_angle: where the pole counts as fallen, in rad.
    """

    gravity: Float[Array, ""] = eqx.field(converter=as_parameter, default=9.8)
    cart_mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    pole_mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.1)
    half_length: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.5)
    weights: Float[Array, " 4"] = eqx.field(converter=as_parameter, default=(0.05, 0.05, 5.0, 0.5))
    control_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.02)
    max_force: float = eqx.field(static=True, default=10.0)
    max_position: float = eqx.field(static=True, default=2.4)
    max_angle: float = eqx.field(static=True, default=12 * 2 * math.pi / 360)
    sample_time: float = eqx.field(static=True, default=0.02)
    horizon: int = eqx.field(static=True, default=500)
    integrator: str = eqx.field(static=True, default="euler")
    substeps: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        require_number("max_angle", self.max_angle, above=0.0)

    @property
    def name(self) -> str:
        return "cartpole-balance"

    @property
    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _symmetric(self.max_position, math.inf, self.max_angle, math.inf)

    @property
    def failure_cost(self) -> float:
        return 100.0

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        return jnp.sum(self.weights * x**2) + self.control_weight * u[0] ** 2

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return 10.0 * jnp.sum(self.weights * x**2)

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        """Every state within 0.05 of zero, uniformly."""
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    def failed(self, x: Float[Array, " n"]) -> Bool[Array, ""]:
        return jnp.logical_or(super().failed(x), jnp.abs(x[2]) > self.max_angle)


class CartPoleSwingUp(CartPole):
    """Swing the pole of a cart up from hanging and keep it upright near the middle of the rail.

    Cost of a step: ``(1 - cos(angle)) / 2 + position_weight position^2 + velocity_weight velocity^2 +
    rate_weight rate^2 + control_weight u^2``, about one while the pole hangs. Observation: position, velocity, cosine
    and sine of the angle, rate.

    Attributes:
        gravity: in m/s^2.
        cart_mass: in kg.
        pole_mass: in kg.
        half_length: of the pole, in m.
        position_weight: per m^2.
        velocity_weight: per (m/s)^2.
        rate_weight: per (rad/s)^2.
        control_weight: per N^2.
        max_force: bound on the control, in N.
        max_position: half the length of the rail, in m.
    """

    gravity: Float[Array, ""] = eqx.field(converter=as_parameter, default=9.8)
    cart_mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=1.0)
    pole_mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.1)
    half_length: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.5)
    position_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.05)
    velocity_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.001)
    rate_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.001)
    control_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.0005)
    max_force: float = eqx.field(static=True, default=10.0)
    max_position: float = eqx.field(static=True, default=2.4)
    sample_time: float = eqx.field(static=True, default=0.04)
    horizon: int = eqx.field(static=True, default=200)
    integrator: str = eqx.field(static=True, default="rk4")
    substeps: int = eqx.field(static=True, default=1)

    @property
    def name(self) -> str:
        return "cartpole-swingup"

    @property
    def failure_cost(self) -> float:
        # Hanging forever costs as much at a discount of 0.99, so leaving the rail never pays.
        return 100.0

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        cost = 0.5 * (1.0 - jnp.cos(x[2])) + self.position_weight * x[0] ** 2 + self.velocity_weight * x[1] ** 2
        return cost + self.rate_weight * x[3] ** 2 + self.control_weight * u[0] ** 2

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return 10.0 * self.stage_cost(x, jnp.zeros(1, x.dtype))

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        """Hanging, every state within 0.1 of rest, uniformly."""
        rest = jnp.asarray([0.0, 0.0, math.pi, 0.0])
        return rest + jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)

    def observe(self, x: Float[Array, " n"], key: Key[Array, ""] | None = None) -> Float[Array, " o"]:
        del key
        return jnp.stack([x[0], x[1], jnp.cos(x[2]), jnp.sin(x[2]), x[3]])


class DiscreteCartPole(Environment):
    """Balance a pole by pushing the cart left or right with full force: reward 1 per step until it falls.

    Gymnasium's CartPole with a cap on the episode (200 steps, as in CartPole-v0, unless given). Its parameters are
    the :class:`CartPoleBalance` whose physics and limits it has.

    Attributes:
        problem: physics and limits.
        num_steps: steps after which an episode is truncated.
    """

    problem: CartPoleBalance = eqx.field(default_factory=CartPoleBalance)
    num_steps: int = eqx.field(static=True, default=200)

    def __check_init__(self) -> None:
        require_count("num_steps", self.num_steps)

    @property
    def name(self) -> str:
        return "cartpole-discrete"

    @property
    def default_params(self) -> CartPoleBalance:
        return self.problem

    @property
    def sample_time(self) -> float:
        return self.problem.sample_time

    def reset_env(self, key: Key[Array, ""], params: CartPoleBalance) -> tuple[Array, ControlState]:
        x = params.initial_state(key)
        return params.observe(x), ControlState(x, jnp.zeros((), jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: ControlState, action: Int[Array, ""], params: CartPoleBalance
    ) -> tuple[Array, ControlState, Array, Bool[Array, ""], dict[str, Any]]:
        force = jnp.where(action == 1, params.max_force, -params.max_force).astype(state.x.dtype)
        x = params.dynamics(state.x, force[None], params.sample_disturbance(key))
        return params.observe(x), ControlState(x, state.steps + 1), jnp.ones((), x.dtype), params.failed(x), {}

    def is_truncated(self, state: ControlState, params: CartPoleBalance) -> Bool[Array, ""]:
        del params
        return state.steps >= self.num_steps

    def observation_space(self, params: CartPoleBalance) -> gymnasium.spaces.Box:
        # Twice the limits, so that the observation of a failure lies inside, as in Gymnasium.
        high = np.asarray([2 * params.max_position, np.inf, 2 * params.max_angle, np.inf], np.float32)
        return gymnasium.spaces.Box(-high, high, dtype=np.float32)

    def action_space(self, params: CartPoleBalance) -> gymnasium.spaces.Discrete:
        del params
        return gymnasium.spaces.Discrete(2)


class PlanarQuadrotor(ContinuousTimeProblem):
    """A drone with two rotors in a vertical plane, to be brought to a point and held there, possibly in wind.

    State: horizontal position, height, tilt (counter-clockwise positive), and their rates; controls: thrust of the
    left and of the right rotor. ``mass x'' = -(u1 + u2) sin(tilt) + d1``, ``mass z'' = (u1 + u2) cos(tilt) - mass
    gravity + d2``, ``inertia tilt'' = arm (u2 - u1)``. Constants of the planar example in R. Tedrake, *Underactuated
    Robotics*. Cost of a step: ``weights . (x - target)^2 + control_weight |u - hover|^2``. The episode fails on the
    ground or outside the arena.

    Attributes:
        gravity: in m/s^2.
        mass: in kg.
        inertia: in kg m^2.
        arm: distance of each rotor from the centre of mass, in m.
        wind: mean force of the wind, horizontal and vertical ``[2]``, in N.
        gust: standard deviation of the wind's force, drawn anew at each step, in N; None for steady wind.
        target: horizontal position and height to be held ``[2]``, in m.
        weights: cost of the squared distance of each state from its target ``[6]``.
        control_weight: per N^2.
        max_thrust: bound on the thrust of each rotor, in N; none pulls downwards.
        max_position: half the width of the arena, in m.
        max_height: height of the arena, in m.
    """

    gravity: Float[Array, ""] = eqx.field(converter=as_parameter, default=9.81)
    mass: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.486)
    inertia: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.00383)
    arm: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.25)
    wind: Float[Array, " 2"] = eqx.field(converter=as_parameter, default=(0.0, 0.0))
    gust: Float[Array, ""] | None = eqx.field(converter=_optional_parameter, default=None)
    target: Float[Array, " 2"] = eqx.field(converter=as_parameter, default=(0.0, 1.5))
    weights: Float[Array, " 6"] = eqx.field(converter=as_parameter, default=(1.0, 1.0, 0.2, 0.1, 0.1, 0.01))
    control_weight: Float[Array, ""] = eqx.field(converter=as_parameter, default=0.01)
    max_thrust: float = eqx.field(static=True, default=5.0)
    max_position: float = eqx.field(static=True, default=3.0)
    max_height: float = eqx.field(static=True, default=3.0)
    sample_time: float = eqx.field(static=True, default=0.04)
    horizon: int = eqx.field(static=True, default=150)
    integrator: str = eqx.field(static=True, default="rk4")
    substeps: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        for constant in ("mass", "inertia", "arm"):
            require_number(constant, getattr(self, constant), above=0.0)
        if self.gust is not None:
            require_number("gust", self.gust, at_least=0.0)

    @property
    def name(self) -> str:
        return "planar-quadrotor"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("position", "height", "tilt", "velocity", "climb rate", "tilt rate")

    @property
    def state_units(self) -> tuple[str, ...]:
        return ("m", "m", "rad", "m/s", "m/s", "rad/s")

    @property
    def control_names(self) -> tuple[str, ...]:
        return ("left thrust", "right thrust")

    @property
    def control_units(self) -> tuple[str, ...]:
        return ("N", "N")

    @property
    def disturbance_names(self) -> tuple[str, ...]:
        return ("horizontal wind force", "vertical wind force")

    @property
    def velocities(self) -> tuple[bool, ...]:
        return (False, False, False, True, True, True)

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(2), np.full(2, self.max_thrust)

    @property
    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = _symmetric(self.max_position, self.max_height, *[math.inf] * 4)
        low[1] = 0.0
        return low, high

    @property
    def equilibrium(self) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """Hovering at the target in still air."""
        hover = 0.5 * self.mass * self.gravity
        return jnp.concatenate([self.target, jnp.zeros(4, self.target.dtype)]), jnp.stack([hover, hover])

    @property
    def failure_cost(self) -> float:
        # What hovering in a corner of the arena forever costs, roughly, at a discount of 0.99.
        return 1000.0

    def derivative(self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"]) -> Float[Array, " n"]:
        _, _, tilt, velocity, climb, rate = x
        thrust = u[0] + u[1]
        forward = (-thrust * jnp.sin(tilt) + d[0]) / self.mass
        upward = (thrust * jnp.cos(tilt) + d[1]) / self.mass - self.gravity
        return jnp.stack([velocity, climb, rate, forward, upward, self.arm * (u[1] - u[0]) / self.inertia])

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        held_x, held_u = self.equilibrium
        return jnp.sum(self.weights * (x - held_x) ** 2) + self.control_weight * jnp.sum((u - held_u) ** 2)

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return 10.0 * jnp.sum(self.weights * (x - self.equilibrium[0]) ** 2)

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        """Within 1.5 m beside and 0.7 m above or below the target, tilted up to 0.3 rad, rates up to 0.5, uniformly."""
        high = jnp.asarray([1.5, 0.7, 0.3, 0.5, 0.5, 0.5])
        start = self.equilibrium[0]
        return start + jax.random.uniform(key, (6,), minval=-high, maxval=high)

    def sample_disturbance(self, key: Key[Array, ""]) -> Float[Array, " k"]:
        return self.wind if self.gust is None else self.wind + self.gust * jax.random.normal(key, (2,))

    def failed(self, x: Float[Array, " n"]) -> Bool[Array, ""]:
        beside = jnp.abs(x[0]) > self.max_position
        return beside | (x[1] < 0.0) | (x[1] > self.max_height)
