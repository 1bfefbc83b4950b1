"""Iterative LQR and differential dynamic programming, with control bounds.

Sources: iLQR (Li and Todorov, 2004); DDP (Jacobson and Mayne, 1970); regularization, line search and control bounds
(Tassa, Erez and Todorov, 2012; Tassa, Mansard and Todorov, 2014, "Control-limited differential dynamic programming").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.control.planning import Plan, Planner, PlanningModel
from steersman.control.trajectory_feedback import TrajectoryFeedback
from steersman.errors import InputTypeError, require, require_count, require_number
from steersman.training.schedules import Continuous, scalar

# Halvings of a step that are tried, all side by side.
_STEPS = 0.5 ** np.arange(11)
# Regularization, in units of the largest entry of the controls' curvature: the least that is not zero, what a failure
# multiplies it by and a success divides it by, and where the search gives up.
_LEAST, _FACTOR, _MOST = 1e-6, 8.0, 1e8


class Trajectory(NamedTuple):
    """What iLQR found.

    Attributes:
        controls: ``[H, m]``.
        states: flat, ``[H + 1, n]``.
        gains: ``K_t`` of ``u_t - K_t (x - x_t)`` ``[H, m, n]``; zero for a control that a bound holds.
        cost: of the trajectory.
        costs: before the first iteration and after each ``[iterations + 1]``; never rising.
        iterations: that were made.
        converged: whether the model of the cost promised no further decrease.
        regularization: at the end; large where no step helped.
    """

    controls: Float[Array, "H m"]
    states: Float[Array, "H_plus_1 n"]
    gains: Float[Array, "H m n"]
    cost: Float[Array, ""]
    costs: Float[Array, " iterations_plus_1"]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    regularization: Float[Array, ""]

    def policy(self) -> TrajectoryFeedback:
        """The time-varying feedback around the trajectory, for observations that are flat states."""
        return TrajectoryFeedback(self.controls, self.states, self.gains)


class ILQR(Planner):
    """Newton-like descent on a whole trajectory: a Riccati sweep backward, a line search with feedback forward.

    ::

        repeat: F, l, L <- derivatives of dynamics and cost along the trajectory
                backward: Q = L + F'VF (+ sum_i v_i d2f_i), q = l + F'v; k minimizes q'k + k'Qk/2 within bounds
                forward: u + a k - K (x - x_t) for a = 1, 1/2, 1/4, ... side by side; keep the cheapest
                no improvement: more regularization; improvement: less

    The model must be smooth, its states arrays of floats. Linear dynamics, quadratic cost, no bounds: one iteration.

    Attributes:
        model: what is differentiated and followed.
        horizon: steps ``H`` of a plan.
        iterations: at most so many for each plan.
        second_order: curvature of the dynamics too: DDP, whose steps converge quadratically and cost more.
        tolerance: the promised decrease, relative to the cost, below which a plan is done.
        discount: see :func:`~steersman.control.planning.look_ahead`.
    """

    model: PlanningModel
    horizon: int = eqx.field(static=True)
    iterations: int = eqx.field(static=True, default=50)
    second_order: bool = eqx.field(static=True, default=False)
    tolerance: Continuous = scalar(1e-6)
    discount: Continuous = scalar(1.0)

    def __check_init__(self) -> None:
        if not isinstance(self.model, PlanningModel):
            raise InputTypeError(f"model is a {type(self.model).__name__}, but it must be a PlanningModel.")
        require_count("horizon", self.horizon)
        require_count("iterations", self.iterations)
        require_number("tolerance", self.tolerance, at_least=0.0)
        require_number("discount", self.discount, above=0.0, at_most=1.0)

    def init(self) -> Plan:
        low, high = self.model.control_bounds
        controls = jnp.clip(jnp.zeros((self.horizon, self.model.control_size)), jnp.asarray(low), jnp.asarray(high))
        controls = controls.astype(jnp.result_type(float))
        none = jnp.zeros((), jnp.int32)
        report = {"iterations": none, "converged": none == 1, "regularization": jnp.zeros((), controls.dtype)}
        return Plan(controls, jnp.full((), jnp.nan, controls.dtype), (), report)

    def plan(self, state: PyTree, last: Plan, key: Key[Array, ""]) -> Plan:
        """Starts from the last plan, shifted by a step; the search draws no random numbers."""
        del key
        found = self.solve(state, jnp.concatenate([last.controls[1:], last.controls[-1:]]))
        report = {name: getattr(found, name) for name in last.report}
        new = Plan(found.controls, found.cost, (), report)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), new, last)

    def solve(self, state: PyTree, controls: Any) -> Trajectory:
        """Improves controls from a state; to be called under ``jit``.

        Args:
            state: where the trajectory starts.
            controls: first guess ``[H, m]``, brought within the model's bounds.

        Raises:
            InputError: the guess has another shape.
        """
        x0, unravel = ravel_pytree(state)
        require(jnp.issubdtype(x0.dtype, jnp.floating), "state's dtype", x0.dtype, "a floating one")
        shape = (self.horizon, self.model.control_size)
        require(jnp.shape(controls) == shape, "controls' shape", jnp.shape(controls), f"{shape}")
        low, high = (jnp.asarray(bound, x0.dtype) for bound in self.model.control_bounds)
        bounded = bool(np.any(np.isfinite(np.concatenate(self.model.control_bounds))))
        n, m = x0.shape[0], shape[1]

        def dynamics(z: Array) -> Array:
            return ravel_pytree(self.model.step(unravel(z[:n]), z[n:])[0])[0].astype(x0.dtype)

        def cost(z: Array) -> Array:
            return self.model.step(unravel(z[:n]), z[n:])[1].astype(x0.dtype)

        def terminal(x: Array) -> Array:
            return self.model.terminal_cost(unravel(x)).astype(x0.dtype)

        def forward(u: Array, x: Array, change: Array, gains: Array, size: Array) -> tuple[Array, Array, Array]:
            def step(running: tuple, inputs: tuple) -> tuple[tuple, tuple]:
                now, weight, total = running
                old, x, change, gain = inputs
                u = jnp.clip(old + size * change - gain @ (now - x), low, high)
                z = jnp.concatenate([now, u])
                return (dynamics(z), weight * self.discount, total + weight * cost(z)), (u, now)

            one, zero = jnp.ones((), x0.dtype), jnp.zeros((), x0.dtype)
            (end, weight, total), (u, states) = jax.lax.scan(step, (x0, one, zero), (u, x, change, gains))
            total = total + weight * terminal(end)
            return u, jnp.concatenate([states, end[None]]), jnp.where(jnp.isnan(total), jnp.inf, total)

        def backward(u: Array, x: Array, regularization: Array) -> tuple[Array, Array, Array]:
            def step(value: tuple, inputs: tuple) -> tuple[tuple, tuple]:
                slope, curvature = value
                z, jacobian, gradient, hessian = inputs
                if self.second_order:
                    # One Hessian of the Lagrangian takes the place of one for each state.
                    hessian = jax.hessian(lambda z: cost(z) + self.discount * slope @ dynamics(z))(z)
                hessian = hessian + self.discount * jacobian.T @ curvature @ jacobian
                gradient = gradient + self.discount * jacobian.T @ slope
                quu, qux, qxx = hessian[n:, n:], hessian[n:, :n], hessian[:n, :n]
                damped = quu + regularization * jnp.max(jnp.abs(quu)) * jnp.eye(m, dtype=quu.dtype)
                change, free = -jnp.linalg.solve(damped, gradient[n:]), jnp.ones(m, bool)
                if bounded:
                    change, free = box_minimum(damped, gradient[n:], low - z[n:], high - z[n:])
                gain = jnp.linalg.solve(_freed(damped, free), free[:, None] * qux)
                slope = gradient[:n] - gain.T @ gradient[n:] + (qux.T - gain.T @ quu) @ change
                curvature = qxx - gain.T @ qux - qux.T @ gain + gain.T @ quu @ gain
                promised = -(gradient[n:] @ change + 0.5 * change @ damped @ change)
                definite = jnp.linalg.eigvalsh(damped)[0] > 0.0
                return (slope, 0.5 * (curvature + curvature.T)), (change, gain, promised, definite)

            z = jnp.concatenate([x[:-1], u], axis=1)
            derivatives = jax.vmap(lambda z: (jax.jacfwd(dynamics)(z), jax.grad(cost)(z), jax.hessian(cost)(z)))(z)
            last = jax.grad(terminal)(x[-1]), jax.hessian(terminal)(x[-1])
            _, (change, gains, promised, definite) = jax.lax.scan(step, last, (z, *derivatives), reverse=True)
            weights = self.discount ** jnp.arange(self.horizon)
            # A sweep that is not a descent promises NaN, which no comparison accepts.
            return change, gains, jnp.where(jnp.all(definite), jnp.sum(weights * promised), jnp.nan)

        def improve(running: tuple) -> tuple:
            u, x, gains, best, costs, regularization, count, _ = running
            change, found, promised = backward(u, x, regularization)
            tried = jax.vmap(lambda size: forward(u, x[:-1], change, found, size))(jnp.asarray(_STEPS, x0.dtype))
            cheapest = jnp.argmin(tried[2])
            new_u, new_x, new = (part[cheapest] for part in tried)
            better = jnp.isfinite(promised) & (new < best)
            # NaN compares false. The root of the least number stands for zero where the cost is.
            flat = promised <= self.tolerance * jnp.abs(best) + np.sqrt(float(jnp.finfo(x0.dtype).tiny))
            flat = flat & jnp.isfinite(best)
            done = flat & (regularization <= _LEAST)
            u, x, best = (jnp.where(better, a, b) for a, b in ((new_u, u), (new_x, x), (new, best)))
            gains = jnp.where(better | done, found, gains)
            less = jnp.where(regularization > _LEAST, regularization / _FACTOR, 0.0)
            more = jnp.maximum(regularization * _FACTOR, _LEAST)
            # At a minimum rounding lets no step help: less regularization is tried until the test above ends it.
            regularization = jnp.where(better | flat, less, more)
            costs = jnp.where(jnp.arange(len(costs)) > count, best, costs)
            return u, x, gains, best, costs, regularization, count + 1, done

        def unfinished(running: tuple) -> Array:
            regularization, count, done = running[-3:]
            return (count < self.iterations) & ~done & (regularization <= _MOST)

        zero = jnp.zeros((*shape, n), x0.dtype)
        u, x, best = forward(jnp.asarray(controls, x0.dtype), zero[:, 0], zero[:, :, 0], zero, jnp.zeros((), x0.dtype))
        start = u, x, zero, best, jnp.full(self.iterations + 1, best), jnp.zeros((), x0.dtype)
        start = (*start, jnp.zeros((), jnp.int32), jnp.asarray(False))
        u, x, gains, best, costs, regularization, count, done = jax.lax.while_loop(unfinished, improve, start)
        return Trajectory(u, x, gains, best, costs, count, done, regularization)


def _freed(hessian: Array, free: Array) -> Array:
    """The Hessian of the free entries, with ones for the others."""
    return jnp.where(free[:, None] & free[None], hessian, jnp.eye(len(free), dtype=hessian.dtype))


def box_minimum(
    hessian: Float[Array, "m m"], gradient: Float[Array, " m"], low: Float[Array, " m"], high: Float[Array, " m"]
) -> tuple[Float[Array, " m"], Bool[Array, " m"]]:
    """The minimizer of ``g'x + x'Hx/2`` within a box that contains the origin, and which entries no bound holds.

    Primal active set (Nocedal and Wright, 2006, algorithm 16.3): a Newton step in the free entries, up to the first
    bound in its way, which then holds; at a minimum of the free ones the bound that pulls most lets go.

    Args:
        hessian: ``H``, positive definite.
        gradient: ``g``.
        low: of the box; may be infinite.
        high: likewise.
    """
    m = gradient.shape[0]
    rounding = 10.0 * jnp.finfo(gradient.dtype).eps * jnp.max(jnp.abs(gradient))

    def improve(running: tuple) -> tuple:
        x, held, count, _ = running
        step = -jnp.linalg.solve(_freed(hessian, ~held), ~held * (gradient + hessian @ x))
        ahead = jnp.where(step > 0.0, high, low)
        room = jnp.where(held | (step == 0.0), jnp.inf, (ahead - x) / jnp.where(step == 0.0, 1.0, step))
        first = jnp.arange(m) == jnp.argmin(room)
        blocks = first & (room < 1.0)
        x = jnp.where(blocks, ahead, x + jnp.minimum(jnp.min(room), 1.0) * step)
        slope = gradient + hessian @ x
        pull = jnp.where(held & (low < high), jnp.where(x <= low, -slope, slope), -jnp.inf)
        release = (jnp.arange(m) == jnp.argmax(pull)) & (pull > rounding) & ~jnp.any(blocks)
        return x, (held | blocks) & ~release, count + 1, jnp.any(blocks | release)

    start = jnp.zeros(m, gradient.dtype), jnp.zeros(m, bool), 0, jnp.asarray(True)
    x, held, _, _ = jax.lax.while_loop(lambda running: running[3] & (running[2] < 10 * m), improve, start)
    return x, ~held
