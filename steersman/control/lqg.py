"""Linear-quadratic-Gaussian control: filters, optimal output feedback, and exact costs of linear controllers.

Everything here is exact and concerns a :class:`~steersman.envs.LinearGaussianProblem`. With plain arrays the arithmetic
is done in float64, whatever JAX's default is, and the result comes back in that default; inside ``jit``, ``vmap`` or
``grad`` the same equations run in the precision of what they are given, differentiably and without checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from steersman.control.lqr import LQRSolution, lqr
from steersman.envs.linear_gaussian import LinearGaussianProblem
from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.policies import Policy

# Steps after which a filter that starts from the prior is taken to be stationary in a discounted sum.
_TRANSIENT = 2000


class LinearController(Policy):
    """Linear output feedback with an internal state: ``u = C z + D y``, ``z' = A z + B y``.

    Attributes:
        A: the state's own dynamics ``[d, d]``.
        B: what the state takes from the observation ``[d, o]``.
        C: what the action takes from the state ``[m, d]``.
        D: what the action takes from the observation ``[m, o]``.
        start: the state before the first observation ``[d]``.
    """

    A: Float[Array, "d d"]
    B: Float[Array, "d o"]
    C: Float[Array, "m d"]
    D: Float[Array, "m o"]
    start: Float[Array, " d"]

    def __init__(self, A: Any, B: Any, C: Any, D: Any, start: Any = None):
        """Checks that shapes fit together.

        Args:
            A: ``[d, d]``; ``[0, 0]`` for feedback without a state.
            B: ``[d, o]``.
            C: ``[m, d]``.
            D: ``[m, o]``.
            start: ``[d]``; zero unless given.

        Raises:
            InputError: shapes do not fit.
        """
        matrices = {"A": jnp.asarray(A), "B": jnp.asarray(B), "C": jnp.asarray(C), "D": jnp.asarray(D)}
        for name, matrix in matrices.items():
            require(matrix.ndim == 2, f"{name}'s shape", matrix.shape, "a matrix's")
        d, (m, o) = matrices["A"].shape[0], matrices["D"].shape
        shapes = {"A": (d, d), "B": (d, o), "C": (m, d)}
        for name, shape in shapes.items():
            found = matrices[name].shape
            require(found == shape, f"{name}'s shape", found, f"{shape}, with A {(d, d)} and D {(m, o)}")
        self.A, self.B, self.C, self.D = matrices.values()
        self.start = jnp.zeros(d, self.A.dtype) if start is None else jnp.asarray(start)
        require(self.start.shape == (d,), "start's shape", self.start.shape, f"({d},)")

    @classmethod
    def static(cls, D: Any) -> LinearController:
        """Feedback of the observation alone, ``u = D y``."""
        D = jnp.asarray(D)
        require(D.ndim == 2, "D's shape", D.shape, "a matrix's")
        m, o = D.shape
        return cls(jnp.zeros((0, 0)), jnp.zeros((0, o)), jnp.zeros((m, 0)), D)

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        del key
        return self.start

    def __call__(
        self, observation: Float[Array, " o"], carry: Float[Array, " d"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " m"], Float[Array, " d"]]:
        del key
        return self.C @ carry + self.D @ observation, self.A @ carry + self.B @ observation


class KalmanFilter(NamedTuple):
    """A stationary Kalman filter that sees the present observation.

    Attributes:
        gain: ``L`` of ``x_filtered = x_predicted + L (y - C x_predicted)`` ``[n, o]``.
        predicted: covariance of the error before the observation ``[n, n]``.
        filtered: covariance of the error after it ``[n, n]``.
    """

    gain: Float[Array, "n o"]
    predicted: Float[Array, "n n"]
    filtered: Float[Array, "n n"]


class LQGSolution(NamedTuple):
    """The optimal output feedback of an infinite horizon.

    Attributes:
        regulator: the regulator that would act on the state.
        filter: the filter that estimates it.
        controller: both as one linear controller, whose state is the predicted estimate. Its filter is stationary
            from the first step; where the prior is much wider than what the filter settles at, it is well above the
            least cost at first.
        cost: the least expected discounted cost, that of the filter which starts from the prior.
    """

    regulator: LQRSolution
    filter: KalmanFilter
    controller: LinearController
    cost: Float[Array, ""]


def kalman_filter(problem: LinearGaussianProblem | Any) -> KalmanFilter:
    """The stationary filter of a problem, from the Riccati equation that is dual to a regulator's.

    Raises:
        InputError: the measurement noise is singular, or an unstable mode is neither seen nor disturbed.
    """
    _require_problem(problem)
    system = _system(problem)
    try:
        predicted = lqr(system.A.T, system.C.T, system.W, system.V).value
    except InputError as error:
        raise InputError(
            f"problem has no stationary Kalman filter: in the dual regulator (A', C', process and measurement "
            f"covariance), {error}"
        ) from None
    return KalmanFilter(*map(jnp.asarray, _evaluate(_correct, system, predicted)))


def lqg(problem: LinearGaussianProblem | Any, discount: Any) -> LQGSolution:
    """The optimal controller of a problem that sees observations, over an infinite horizon.

    Estimating and regulating separate: the action is the regulator's at the filtered estimate, and the cost is the
    regulator's plus what errors of the estimate cost (Astrom, 1970, "Introduction to Stochastic Control Theory",
    chapter 8).

    Args:
        problem: the problem.
        discount: above 0 and below 1.

    Raises:
        InputError: there is no stabilizing regulator or no stationary filter, or the discount is out of range.
    """
    _require_problem(problem)
    require_number("discount", discount, above=0.0, below=1.0)
    system = _system(problem)
    regulator = lqr(system.A, system.B, system.Q, system.R, discount=discount)
    stationary = kalman_filter(problem)
    cost, *matrices = _evaluate(_stationary_lqg, system, regulator.value, regulator.gain, stationary, discount)
    controller = LinearController(*map(jnp.asarray, matrices), start=problem.initial_mean)
    return LQGSolution(regulator, stationary, controller, jnp.asarray(cost))


def least_cost(
    problem: LinearGaussianProblem | Any, discount: Any = 1.0, *, horizon: int | None = None, state_seen: bool = False
) -> Float[Array, ""]:
    """The least expected discounted cost that any controller reaches.

    Args:
        problem: the problem.
        discount: in ``(0, 1]``; below 1 without a horizon.
        horizon: number of steps; infinitely many unless given.
        state_seen: whether the controller sees the state instead of the observations.

    Raises:
        InputError: an argument is out of range, or there is no stabilizing regulator or stationary filter.
    """
    _require_problem(problem)
    _check_discount(discount, horizon)
    system = _system(problem)
    if horizon is not None:
        return jnp.asarray(_evaluate(_finite_least_cost(horizon, state_seen), system, discount))
    if not state_seen:
        return lqg(problem, discount).cost
    value = lqr(system.A, system.B, system.Q, system.R, discount=discount).value
    return jnp.asarray(_evaluate(_state_cost, system, value, discount))


def controller_cost(
    problem: LinearGaussianProblem | Any,
    controller: LinearController | Any,
    discount: Any = 1.0,
    *,
    horizon: int | None = None,
    action_noise: Any = 0.0,
    memory_noise: Any = 0.0,
) -> Float[Array, ""]:
    """The expected discounted cost of a linear controller: the second moments of state and memory, step by step.

    Args:
        problem: the problem.
        controller: the controller.
        discount: in ``(0, 1]``; below 1 without a horizon.
        horizon: number of steps; infinitely many unless given.
        action_noise: standard deviation of noise added to every action.
        memory_noise: standard deviation of noise added to every next memory.

    Returns:
        The cost; infinite where it grows beyond every bound over an infinite horizon.

    Raises:
        InputError: shapes do not fit, or a number is out of range.
    """
    _require_problem(problem)
    if not isinstance(controller, LinearController):
        raise InputTypeError(f"controller is a {type(controller).__name__}, but it must be a LinearController.")
    expected = (problem.B.shape[1], problem.C.shape[0])
    require(controller.D.shape == expected, "controller.D's shape", controller.D.shape, f"{expected}, as the problem's")
    _check_discount(discount, horizon)
    require_number("action_noise", action_noise, at_least=0.0)
    require_number("memory_noise", memory_noise, at_least=0.0)
    system = _system(problem)
    return jnp.asarray(
        _evaluate(_controller_cost(horizon), system, _numbers(controller), discount, action_noise, memory_noise)
    )


class _System(NamedTuple):
    """The matrices of a problem with covariances in place of factors."""

    A: Any
    B: Any
    C: Any
    Q: Any
    R: Any
    W: Any
    V: Any
    covariance: Any
    mean: Any


def _numbers(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Tracer) else np.asarray(leaf, np.float64), tree)


def _system(problem: LinearGaussianProblem) -> _System:
    g, h, s = (_numbers(x) for x in (problem.process_noise, problem.measurement_noise, problem.initial_spread))
    a, b, c, q, r = _numbers((problem.A, problem.B, problem.C, problem.Q, problem.R))
    return _System(a, b, c, q, r, g @ g.T, h @ h.T, s @ s.T, _numbers(problem.initial_mean))


def _evaluate(function: Callable[..., Any], *arguments: Any) -> Any:
    leaves = jax.tree.leaves(arguments)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return function(*jax.tree.map(jnp.asarray, arguments))
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), arguments)
        return jax.tree.map(np.asarray, _compiled(function)(*exact))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return eqx.filter_jit(function)


def _require_problem(problem: Any) -> None:
    if not isinstance(problem, LinearGaussianProblem):
        raise InputTypeError(f"problem is a {type(problem).__name__}, but it must be a LinearGaussianProblem.")


def _check_discount(discount: Any, horizon: int | None) -> None:
    if horizon is not None:
        require_count("horizon", horizon)
        require_number("discount", discount, above=0.0, at_most=1.0)
    else:
        require_number("discount", discount, above=0.0, below=1.0)


def _second_moment(system: _System) -> Array:
    return system.covariance + jnp.outer(system.mean, system.mean)


def _correct(system: _System, predicted: Array) -> KalmanFilter:
    cross = predicted @ system.C.T
    gain = jnp.linalg.solve(system.C @ cross + system.V, cross.T).T
    filtered = predicted - gain @ cross.T
    return KalmanFilter(gain, predicted, 0.5 * (filtered + filtered.T))


def _filtered_covariances(system: _System, steps: int) -> Array:
    """Covariance of the estimate's error after each observation, from the prior on ``[steps, n, n]``."""

    def step(predicted: Array, _: None) -> tuple[Array, Array]:
        filtered = _correct(system, predicted).filtered
        return system.A @ filtered @ system.A.T + system.W, filtered

    return jax.lax.scan(step, system.covariance, None, length=steps)[1]


def _state_cost(system: _System, value: Array, discount: Array) -> Array:
    return jnp.trace(value @ _second_moment(system)) + discount / (1.0 - discount) * jnp.trace(value @ system.W)


def _stationary_lqg(
    system: _System, value: Array, gain: Array, stationary: KalmanFilter, discount: Array
) -> tuple[Array, ...]:
    # What an error of the estimate costs: the action is off by the gain times it.
    weight = gain.T @ (system.R + discount * system.B.T @ value @ system.B) @ gain
    errors = jnp.einsum("ij,tji->t", weight, _filtered_covariances(system, _TRANSIENT))
    powers = discount ** jnp.arange(_TRANSIENT)
    rest = discount**_TRANSIENT / (1.0 - discount) * jnp.trace(weight @ stationary.filtered)
    cost = _state_cost(system, value, discount) + powers @ errors + rest
    keep = jnp.eye(system.A.shape[0]) - stationary.gain @ system.C
    closed = system.A - system.B @ gain
    return cost, closed @ keep, closed @ stationary.gain, -gain @ keep, -gain @ stationary.gain


@functools.cache
def _finite_least_cost(horizon: int, state_seen: bool) -> Callable[[_System, Array], Array]:
    def cost(system: _System, discount: Array) -> Array:
        def backward(value: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            curvature = system.R + discount * system.B.T @ value @ system.B
            gain = jnp.linalg.solve(curvature, discount * system.B.T @ value @ system.A)
            noise = discount * jnp.trace(value @ system.W)
            earlier = system.Q + discount * system.A.T @ value @ (system.A - system.B @ gain)
            return 0.5 * (earlier + earlier.T), (noise, gain.T @ curvature @ gain)

        start = jnp.zeros_like(system.Q)
        value, (noise, weight) = jax.lax.scan(backward, start, None, length=horizon, reverse=True)
        if not state_seen:
            noise = noise + jnp.einsum("tij,tji->t", weight, _filtered_covariances(system, horizon))
        return jnp.trace(value @ _second_moment(system)) + discount ** jnp.arange(horizon) @ noise

    return cost


@functools.cache
def _controller_cost(horizon: int | None) -> Callable[..., Array]:
    def cost(system: _System, controller: LinearController, discount: Array, action: Array, memory: Array) -> Array:
        n, d = system.A.shape[0], controller.A.shape[0]
        # State and memory together, and what every step adds to their second moment.
        act = jnp.concatenate([controller.D @ system.C, controller.C], axis=1)
        loop = jnp.block(
            [[system.A + system.B @ act[:, :n], system.B @ act[:, n:]], [controller.B @ system.C, controller.A]]
        )
        sensed = jnp.concatenate([system.B @ controller.D, controller.B])
        pushed = jnp.concatenate([system.B, jnp.zeros((d, system.B.shape[1]))])
        noise = sensed @ system.V @ sensed.T + action**2 * pushed @ pushed.T
        noise = noise.at[:n, :n].add(system.W).at[n:, n:].add(memory**2 * jnp.eye(d))
        weight = act.T @ system.R @ act
        weight = weight.at[:n, :n].add(system.Q)
        constant = jnp.trace(system.R @ (controller.D @ system.V @ controller.D.T))
        constant = constant + action**2 * jnp.trace(system.R)
        mean = jnp.concatenate([system.mean, controller.start])
        moment = jnp.outer(mean, mean).at[:n, :n].add(system.covariance)
        if horizon is not None:

            def step(moment: Array, _: None) -> tuple[Array, Array]:
                return loop @ moment @ loop.T + noise, jnp.sum(weight * moment) + constant

            costs = jax.lax.scan(step, moment, None, length=horizon)[1]
            return discount ** jnp.arange(horizon) @ costs
        # The discounted sum of moments solves X = M + discount loop X loop' with M the start and all that is added;
        # doubling sums 2^40 terms of the series, which is infinite unless sqrt(discount) * loop is stable.
        total = moment + discount / (1.0 - discount) * noise

        def double(running: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            power, total = running
            return (power @ power, total + power @ total @ power.T), None

        (_, total), _ = jax.lax.scan(double, (jnp.sqrt(discount) * loop, total), None, length=40)
        summed = jnp.sum(weight * total) + constant / (1.0 - discount)
        return jnp.where(jnp.isfinite(summed), summed, jnp.inf)

    return cost
