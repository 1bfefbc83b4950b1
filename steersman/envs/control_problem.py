"""Control problems: dynamics with costs, bounds and units, which planners take and environments are made of."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.envs.environment import Environment
from steersman.errors import InputError, InputTypeError, require, require_count, require_number, unknown_name


def as_parameter(value: Any) -> Array:
    """Converter for fields that hold physical constants and cost weights: an array, so that it can be varied."""
    return jnp.asarray(value)


class ControlProblem(eqx.Module):
    """A model, what it should do, and within which limits: ``x[t+1] = f(x[t], u[t], d[t])`` with additive cost.

    The problem is its own set of parameters: every constant that a method may want to vary (a mass, a cost weight, a
    learned network) is an array leaf of the module, everything else is static. So ``jax.grad`` and ``vmap`` go over
    problems, :meth:`vary` makes another one, and :meth:`environment` hands the problem to its environment as the
    environment's parameters.

    An author of a discrete-time problem writes :meth:`dynamics`, :meth:`stage_cost`, :meth:`initial_state` and the
    names and units; one whose model is a differential equation subclasses :class:`ContinuousTimeProblem`. The rest
    has defaults. States, controls and disturbances are vectors. Costs are charged per step. What depends on time
    carries a clock (and a moving target its phase) in the state.

    Attributes:
        sample_time: seconds per step.
        horizon: steps of one task; where an environment cuts episodes and how far a planner looks unless told.
    """

    sample_time: eqx.AbstractVar[float]
    horizon: eqx.AbstractVar[int]

    def __check_init__(self) -> None:
        require_number("sample_time", self.sample_time, above=0.0)
        require_count("horizon", self.horizon)

    @property
    def name(self) -> str:
        """The name shown in reports."""
        return type(self).__name__

    @property
    @abc.abstractmethod
    def state_names(self) -> tuple[str, ...]:
        """What each state is called; their number is the size of the state."""

    @property
    @abc.abstractmethod
    def control_names(self) -> tuple[str, ...]:
        """What each control is called; their number is the size of the control."""

    @property
    def disturbance_names(self) -> tuple[str, ...]:
        """What each disturbance is called; empty for a model without."""
        return ()

    @property
    def state_units(self) -> tuple[str, ...]:
        """Unit of each state; ``""`` where there is none."""
        return ("",) * self.state_size

    @property
    def control_units(self) -> tuple[str, ...]:
        """Unit of each control; ``""`` where there is none."""
        return ("",) * self.control_size

    @property
    def state_size(self) -> int:
        """Number of states ``n``."""
        return len(self.state_names)

    @property
    def control_size(self) -> int:
        """Number of controls ``m``."""
        return len(self.control_names)

    @property
    def disturbance_size(self) -> int:
        """Number of disturbances ``k``."""
        return len(self.disturbance_names)

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest control, ``[m]`` each; infinite where there is no bound."""
        return np.full(self.control_size, -np.inf), np.full(self.control_size, np.inf)

    @property
    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest state that a planner may visit, ``[n]`` each; infinite where there is no bound."""
        return np.full(self.state_size, -np.inf), np.full(self.state_size, np.inf)

    @property
    def observation_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest value that each observation can take; infinite where there is no bound."""
        shape = jax.eval_shape(self.observe, jax.ShapeDtypeStruct((self.state_size,), jnp.result_type(float))).shape
        return np.full(shape, -np.inf), np.full(shape, np.inf)

    @property
    def equilibrium(self) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """The state to be held and the control that holds it; the origin unless a problem says otherwise."""
        return jnp.zeros(self.state_size), jnp.zeros(self.control_size)

    @property
    def failure_cost(self) -> float:
        """Cost of an episode that ends by failure, on top of its stage costs.

        Where stage costs are positive it must outweigh what failing early saves, or failing is optimal.
        """
        return 0.0

    @abc.abstractmethod
    def dynamics(
        self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"] | None = None
    ) -> Float[Array, " n"]:
        """The state one sample time later, under a control and a disturbance (none: zero) held constant."""

    @abc.abstractmethod
    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        """Cost of one step that starts at `x` and applies `u`."""

    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """Cost of ending a horizon at `x`: what a planner charges for everything after it. Zero by default."""
        return jnp.zeros((), x.dtype)

    @abc.abstractmethod
    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        """Draws a start."""

    def sample_disturbance(self, key: Key[Array, ""]) -> Float[Array, " k"]:
        """Draws the disturbance of one step; zero by default."""
        del key
        return jnp.zeros(self.disturbance_size)

    def observe(self, x: Float[Array, " n"], key: Key[Array, ""] | None = None) -> Float[Array, " o"]:
        """What a policy is shown of the state; without a key, free of measurement noise. All of it by default."""
        del key
        return x

    def failed(self, x: Float[Array, " n"]) -> Bool[Array, ""]:
        """Whether the task ends at `x` without a future, as by a crash. Never by default."""
        del x
        return jnp.asarray(False)

    @property
    def constraint_names(self) -> tuple[str, ...]:
        """What each entry of :meth:`constraints` is called."""
        return ()

    def constraints(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, " c"]:
        """Constraint functions beyond the bounds, feasible where none is above zero. None by default."""
        del u
        return jnp.zeros(0, x.dtype)

    def terminal_constraints(self, x: Float[Array, " n"]) -> Float[Array, " c"]:
        """Constraint functions on the last state, feasible where none is above zero. None by default."""
        return jnp.zeros(0, x.dtype)

    def saturate(self, u: Float[Array, " m"]) -> Float[Array, " m"]:
        """The nearest control within the bounds."""
        low, high = self.control_bounds
        return jnp.clip(u, jnp.asarray(low, u.dtype), jnp.asarray(high, u.dtype))

    def linearize(
        self, x: Float[Array, " n"] | None = None, u: Float[Array, " m"] | None = None
    ) -> tuple[Float[Array, "n n"], Float[Array, "n m"]]:
        """The discrete-time Jacobians ``A = df/dx`` and ``B = df/du``, at the equilibrium where no point is given."""
        held_x, held_u = self.equilibrium
        x = held_x if x is None else x
        u = held_u if u is None else u
        return _jacobians(self, x, u)

    def vary(self, **values: Any) -> Any:
        """This problem with other values of some parameters, for example ``problem.vary(mass=2.0)``.

        Raises:
            InputError: no parameter has that name, or the value has another shape.
        """
        known = [name for name, leaf in vars(self).items() if eqx.is_array(leaf)]
        problem = self
        for name, value in values.items():
            if name not in known:
                raise unknown_name(f"parameter of {self.name}", name, known)
            old = getattr(self, name)
            new = jnp.asarray(value, old.dtype)
            require(new.shape == old.shape, name, value, f"of shape {old.shape}")
            problem = eqx.tree_at(lambda p, name=name: getattr(p, name), problem, new)
        return problem

    def environment(self, num_steps: int | None = None) -> ControlEnvironment:
        """The environment of this problem: rewards are negative costs, episodes end after `num_steps`.

        Args:
            num_steps: steps after which an episode is truncated; :attr:`horizon` where None.
        """
        return ControlEnvironment(self, self.horizon if num_steps is None else num_steps)


class ContinuousTimeProblem(ControlProblem):
    """A problem whose model is a differential equation ``dx/dt = f(x, u, d)``, integrated over each sample time.

    Controls and disturbances are held constant within a step. Integrators: ``"euler"`` (explicit),
    ``"semi_implicit"`` (velocities first, then positions with the new velocities: as cheap as Euler and
    stable for oscillators, Hairer, Lubich and Wanner, 2006, section I.1.2) and ``"rk4"`` (classical, fourth order).

    Attributes:
        integrator: which of them.
        substeps: integration steps within one sample time.
    """

    integrator: eqx.AbstractVar[str]
    substeps: eqx.AbstractVar[int]

    def __check_init__(self) -> None:
        if self.integrator not in INTEGRATORS:
            raise unknown_name("integrator", self.integrator, INTEGRATORS)
        require_count("substeps", self.substeps)
        velocities = self.velocities
        require(
            self.integrator != "semi_implicit" or any(velocities),
            "integrator",
            self.integrator,
            "one that needs no velocities, as this problem names none",
        )

    @property
    def velocities(self) -> tuple[bool, ...]:
        """Which states are velocities, for the semi-implicit integrator."""
        return (False,) * self.state_size

    @abc.abstractmethod
    def derivative(self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"]) -> Float[Array, " n"]:
        """``dx/dt``, per second."""

    def limit_state(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """Brings a state back within mechanical stops after each integration step; unchanged by default."""
        return x

    def dynamics(
        self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"] | None = None
    ) -> Float[Array, " n"]:
        d = jnp.zeros(self.disturbance_size, x.dtype) if d is None else d
        integrate = INTEGRATORS[self.integrator]
        interval = self.sample_time / self.substeps
        if self.substeps == 1:
            return integrate(self, x, u, d, interval).astype(x.dtype)

        def substep(state: Array, _: None) -> tuple[Array, None]:
            return integrate(self, state, u, d, interval).astype(x.dtype), None

        return jax.lax.scan(substep, x, None, length=self.substeps)[0]


def _euler(problem: ContinuousTimeProblem, x: Array, u: Array, d: Array, h: float) -> Array:
    return problem.limit_state(x + h * problem.derivative(x, u, d))


def _semi_implicit(problem: ContinuousTimeProblem, x: Array, u: Array, d: Array, h: float) -> Array:
    velocities = problem.velocities

    def moved(state: Array, which: bool) -> Array:
        # Element by element, so that the compiler drops the half of each derivative that is not used.
        slope = problem.derivative(state, u, d)
        parts = [state[i] + h * slope[i] if moves is which else state[i] for i, moves in enumerate(velocities)]
        return problem.limit_state(jnp.stack(parts))

    # The stops act on the new velocities before these move the positions, as Gymnasium's Pendulum-v1 does it.
    return moved(moved(x, True), False)


def _rk4(problem: ContinuousTimeProblem, x: Array, u: Array, d: Array, h: float) -> Array:
    k1 = problem.derivative(x, u, d)
    k2 = problem.derivative(x + 0.5 * h * k1, u, d)
    k3 = problem.derivative(x + 0.5 * h * k2, u, d)
    k4 = problem.derivative(x + h * k3, u, d)
    return problem.limit_state(x + (h / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4))


#: The integrators by name: ``integrate(problem, x, u, d, interval) -> x``.
INTEGRATORS: dict[str, Callable[..., Array]] = {"euler": _euler, "semi_implicit": _semi_implicit, "rk4": _rk4}


# Folded into a key for measurement noise; far from the small numbers that splitting uses. Unlike a split it costs
# nothing where a problem measures without noise, and every environment step resets.
_MEASUREMENT = 0x6D656173


class ControlState(eqx.Module):
    """State of a :class:`ControlEnvironment`.

    Attributes:
        x: state of the problem.
        steps: steps since the start of the episode.
    """

    x: Float[Array, "*B n"]
    steps: Int[Array, "*B"]


class ControlEnvironment(Environment):
    """A control problem as an environment. Its parameters are the problem itself.

    The reward is the negative stage cost, and on failure also the negative failure cost; the terminal cost is a
    planner's and is not charged. An action is saturated to the control bounds. Violations of the problem's constraint
    functions are reported as ``info["costs"]``.

    Attributes:
        problem: the problem, and the default parameters.
        num_steps: steps after which an episode is truncated.
    """

    problem: ControlProblem
    num_steps: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not isinstance(self.problem, ControlProblem):
            raise InputTypeError(f"problem is a {type(self.problem).__name__}, but it must be a ControlProblem.")
        require_count("num_steps", self.num_steps)

    @property
    def name(self) -> str:
        return self.problem.name

    @property
    def default_params(self) -> ControlProblem:
        return self.problem

    @property
    def sample_time(self) -> float:
        return self.problem.sample_time

    def reset_env(self, key: Key[Array, ""], params: ControlProblem) -> tuple[Array, ControlState]:
        x = params.initial_state(key)
        return params.observe(x, jax.random.fold_in(key, _MEASUREMENT)), ControlState(x, jnp.zeros((), jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: ControlState, action: Float[Array, " m"], params: ControlProblem
    ) -> tuple[Array, ControlState, Array, Bool[Array, ""], dict[str, Any]]:
        disturbance_key, noise_key = jax.random.split(key)
        u = params.saturate(action)
        x = params.dynamics(state.x, u, params.sample_disturbance(disturbance_key))
        failed = params.failed(x)
        reward = -params.stage_cost(state.x, u) - params.failure_cost * failed
        info = {}
        if params.constraint_names:
            violations = jnp.maximum(params.constraints(state.x, u), 0.0)
            info["costs"] = {name: violations[i] for i, name in enumerate(params.constraint_names)}
        return params.observe(x, noise_key), ControlState(x, state.steps + 1), reward, failed, info

    def is_truncated(self, state: ControlState, params: ControlProblem) -> Bool[Array, ""]:
        del params
        return state.steps >= self.num_steps

    def observation_space(self, params: ControlProblem) -> gymnasium.spaces.Box:
        low, high = params.observation_bounds
        return gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    def action_space(self, params: ControlProblem) -> gymnasium.spaces.Box:
        low, high = params.control_bounds
        return gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def rollout(
    problem: ControlProblem,
    controls: Any,
    x0: Float[Array, "*B n"],
    disturbance: Float[Array, "T *B k"] | None = None,
    key: Key[Array, ""] | None = None,
    *,
    num_steps: int | None = None,
    saturate: bool = True,
) -> tuple[Float[Array, "T1 *B n"], Float[Array, "T *B m"]]:
    """Simulates trajectories under controls or a policy; scanned, differentiable in everything.

    Failure ends nothing here: trajectories keep the shape that a gradient needs.

    Args:
        problem: the problem.
        controls: controls ``[T, B, m]``, or ``[T, m]`` for all trajectories alike; or a policy; or a function of one
            observation that returns one control.
        x0: starts ``[B, n]``, or one start ``[n]``.
        disturbance: disturbances ``[T, B, k]``. Where None they are drawn from the problem with `key`, and are zero
            without one.
        key: randomness of disturbances, measurements and the policy. Without it there is none, which a policy object
            does not accept.
        num_steps: ``T`` where `controls` and `disturbance` do not say it; the problem's horizon where None.
        saturate: whether controls are clipped to their bounds, as an actuator does.

    Returns:
        States ``[T+1, B, n]`` and the controls that were applied ``[T, B, m]``, both without ``B`` for one start.

    Raises:
        InputError: shapes that do not fit together, or a policy without a key.
    """
    x0 = jnp.asarray(x0)
    single = x0.ndim == 1
    starts = x0[None] if single else x0
    require(
        starts.ndim == 2 and starts.shape[1] == problem.state_size,
        "x0.shape",
        x0.shape,
        f"[B, {problem.state_size}] or [{problem.state_size}]",
    )
    batch = starts.shape[0]
    policy: Any = controls if callable(controls) else None
    planned = None
    if policy is None:
        planned = given = jnp.asarray(controls)
        if planned.ndim == 2:
            planned = jnp.broadcast_to(planned[:, None], (planned.shape[0], batch, planned.shape[1]))
        require(
            planned.ndim == 3 and planned.shape[1:] == (batch, problem.control_size),
            "controls.shape",
            given.shape,
            f"[T, {batch}, {problem.control_size}] or [T, {problem.control_size}]",
        )
    elif hasattr(policy, "init") and key is None:
        raise InputError("key is None, but it must be a key, as a policy may draw from it.")
    if disturbance is not None:
        given = jnp.asarray(disturbance)
        disturbance = given[:, None] if single and given.ndim == 2 else given
        require(
            disturbance.ndim == 3 and disturbance.shape[1:] == (batch, problem.disturbance_size),
            "disturbance.shape",
            given.shape,
            f"[T, {batch}, {problem.disturbance_size}]",
        )
    lengths = [len(array) for array in (planned, disturbance) if array is not None]
    length = lengths[0] if lengths else (problem.horizon if num_steps is None else num_steps)
    require_count("num_steps", length)
    for given_length in lengths:
        require(given_length == length, "disturbance length", given_length, f"{length}, the steps of the controls")
    require(num_steps is None or num_steps == length, "num_steps", num_steps, f"{length}, the steps that are given")

    carry_key, rollout_key = (None, None) if key is None else jax.random.split(key)
    carry = ()
    if policy is not None and hasattr(policy, "init"):
        assert carry_key is not None
        carry = jax.vmap(policy.init)(jax.random.split(carry_key, batch))
    keys = None if rollout_key is None else jax.random.split(rollout_key, (length, batch, 3))

    states, applied = _simulate(problem, policy, starts, carry, (planned, disturbance, keys), length, saturate)
    return (states[:, 0], applied[:, 0]) if single else (states, applied)


@eqx.filter_jit
def _jacobians(problem: ControlProblem, x: Array, u: Array) -> tuple[Array, Array]:
    return jax.jacfwd(problem.dynamics, argnums=(0, 1))(x, u)


# Compiled here and not only by the caller: an eager scan would be compiled again at each call.
@eqx.filter_jit
def _simulate(
    problem: ControlProblem, policy: Any, x0: Array, carry: PyTree, inputs: tuple, length: int, saturate: bool
) -> tuple[Array, Array]:
    def control(x: Array, carry: PyTree, planned: Any, keys: Any) -> tuple[Array, PyTree]:
        if policy is None:
            return planned, carry
        measurement_key, policy_key = (None, None) if keys is None else (keys[0], keys[1])
        observation = problem.observe(x, measurement_key)
        return policy(observation, carry, policy_key) if hasattr(policy, "init") else (policy(observation), carry)

    def advance(x: Array, carry: PyTree, planned: Any, d: Any, keys: Any) -> tuple[Array, Array, PyTree]:
        u, carry = control(x, carry, planned, keys)
        u = problem.saturate(u) if saturate else u
        if d is None and keys is not None:
            d = problem.sample_disturbance(keys[2])
        return problem.dynamics(x, u, d), u, carry

    def step(running: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        x, u, carry = jax.vmap(advance)(*running, *inputs)
        return (x, carry), (x, u)

    _, (states, controls) = jax.lax.scan(step, (x0, carry), inputs, length=length)
    return jnp.concatenate([x0[None], states]), controls


@eqx.filter_jit
def trajectory_cost(
    problem: ControlProblem, states: Float[Array, "T1 *B n"], controls: Float[Array, "T *B m"]
) -> Float[Array, "*B"]:
    """Stage costs of a trajectory summed, plus the terminal cost of its last state.

    Args:
        problem: the problem.
        states: states ``[T+1, B, n]`` or ``[T+1, n]``, as :func:`rollout` returns them.
        controls: controls ``[T, B, m]`` or ``[T, m]``.
    """
    stage, terminal = jax.vmap(problem.stage_cost), problem.terminal_cost
    if states.ndim == 3:
        stage, terminal = jax.vmap(stage), jax.vmap(terminal)
    return jnp.sum(stage(states[:-1], controls), axis=0) + terminal(states[-1])
