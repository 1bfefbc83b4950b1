"""Stochastic MPC from robust-stochastic to indirect-feedback (Koehler, Geuss, Zeilinger, 2023, arXiv:2304.00069).

``x' = A x + B u + w`` with independent bounded ``w`` of known distribution, and ``P(E x + F u <= high) >= p``. From
the same inputs ``v`` two trajectories are predicted: ``z``, which the controller carries, and the mean ``xbar`` from
the measured state with ``ubar = v + K (xbar - z)``; ``ubar_0`` is applied and the cost is the mean's. Every ``M`` steps
``z`` is reset to the state. A bound at a time ``t`` up to the next reset is tightened by the quantile of the errors
since the last one, on ``z``; a later one, on ``xbar``, by the quantile of the errors since the last reset before ``t``
and by the worst of those before it. ``M = 1`` is robust-stochastic MPC: bounds hold with probability ``p`` from every
state. Without resets it is indirect-feedback MPC (Hewing, Wabersich and Zeilinger, 2020,
doi:10.1016/j.automatica.2020.109095): they hold with probability ``p`` from the first state. The schedule between both
is derived here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from steersman.control.host_solves import Fallback, HostController
from steersman.control.lqr import lqr
from steersman.control.planning import Plan
from steersman.control.quadratic_programs import OSQP, PIQP, Affine, HostAnswer, ParametricQP, QPSolver
from steersman.control.tightening import BoundedNoise, ResetSchedule, Tightening
from steersman.errors import InputError, require, require_count, require_number


@dataclasses.dataclass(frozen=True, eq=False)
class StochasticAnswer(HostAnswer):
    """One solve.

    Attributes:
        control: what is applied ``[m]``; NaN where there is no answer.
        nominal: ``z`` of the next step, unless that is a reset ``[n]``.
        inputs: ``v`` ``[N, m]``.
        steady: state and input ``(z_s, v_s)`` that the plan ends at ``[n + m]``.
        status: index into :data:`~steersman.control.quadratic_programs.STATUSES`.
        iterations: of the solver.
        blame: rows that cannot be satisfied together; empty where there is an answer.
    """

    control: Float[np.ndarray, " m"]
    nominal: Float[np.ndarray, " n"]
    inputs: Float[np.ndarray, "N m"]
    steady: Float[np.ndarray, " n_plus_m"]
    status: int
    iterations: int
    blame: list[str]


class StochasticMPC:
    """The program, in a solver's memory.

    Args:
        A: dynamics ``[n, n]``.
        B: effect of the control ``[n, m]``.
        Q: cost of the distance from the target ``[n, n]``; with R it gives the feedback and the terminal cost.
        R: control cost ``[m, m]``.
        rows: ``(E [c, n], F [c, m], high [c])``, held at all steps after the present one.
        noise: ``w``.
        probability: ``p``, in (0.5, 1]; with 1 it is robust MPC.
        reset_every: ``M``; None for never.
        target: state ``[n]``, which need not be admissible; the origin unless given.
        steady_weight: cost of the steady state's distance from the target ``[n, n]``; none unless given.
        steady_state: ``(z_s, v_s)`` where that is not to be chosen.
        horizon: steps ``N``.
        tail: steps after them at which bounds are imposed under ``v_s + K (z - z_s)``; the steady state itself keeps
            the bounds of all later ones.
        tightening: of these rows under this feedback, where it has been computed before.
        solver: the backend; :class:`~steersman.control.PIQP` unless given.

    Raises:
        InputError: shapes or ranges are wrong, a row is zero, or no steady state satisfies the tightened bounds.
    """

    def __init__(
        self,
        A: Any,
        B: Any,
        Q: Any,
        R: Any,
        rows: tuple[Any, Any, Any],
        noise: BoundedNoise,
        *,
        probability: float = 0.9,
        reset_every: int | None = None,
        target: Any = None,
        steady_weight: Any = None,
        steady_state: tuple[Any, Any] | None = None,
        horizon: int = 10,
        tail: int = 25,
        tightening: Tightening | None = None,
        solver: QPSolver | None = None,
    ) -> None:
        require_count("horizon", horizon)
        require_count("tail", tail)
        with jax.enable_x64(True):
            regulator = lqr(A, B, Q, R)
            self.gain, P = -np.asarray(regulator.gain), np.asarray(regulator.value)
        A, B, Q, R = self.A, self.B, self.Q, self.R = tuple(np.asarray(part, np.float64) for part in (A, B, Q, R))
        n, m = B.shape
        E, F, high = (np.asarray(part, np.float64) for part in rows)
        count = len(np.atleast_1d(high))
        for name, part, shape in (("E", E, (count, n)), ("F", F, (count, m)), ("high", high, (count,))):
            require(part.shape == shape, f"{name}'s shape", part.shape, f"{shape}")
            require_number(name, part)
        require(bool(np.all(np.any(np.concatenate([E, F], axis=1), axis=1))), "E and F", (E, F), "without a zero row")
        self.horizon, self.tail, self.high = horizon, tail, high
        found = tightening or Tightening(A + B @ self.gain, E + F @ self.gain, probability, noise)
        self.schedule = ResetSchedule(found, reset_every)
        target = np.zeros(n) if target is None else np.asarray(target, np.float64)
        require(target.shape == (n,), "target's shape", target.shape, f"({n},)")

        # Everything is affine in (v, z_s, v_s | x, z, 1).
        size, known = horizon * m + n + m, 2 * n
        one = np.eye(size + known + 1)
        inputs = [one[m * i : m * (i + 1)] for i in range(horizon)]
        steady, held = one[size - n - m : size - m], one[size - m : size]
        xbar, z = one[size : size + n], one[size + n : size + known]
        goal = np.outer(target, one[-1])
        cost = np.zeros((len(one), len(one)))
        bounded: list[tuple[np.ndarray, np.ndarray]] = []
        for i in range(horizon + tail + 1):
            v = inputs[i] if i < horizon else held + self.gain @ (z - steady)
            ubar = v + self.gain @ (xbar - z)
            if i:
                bounded.append((E @ z + F @ v, E @ xbar + F @ ubar))
            if i < horizon:
                cost += (xbar - goal).T @ Q @ (xbar - goal) + ubar.T @ R @ ubar
            if i == horizon:
                cost += (xbar - goal).T @ P @ (xbar - goal)
            xbar, z = A @ xbar + B @ ubar, A @ z + B @ v
        if steady_weight is not None:
            weight = np.asarray(steady_weight, np.float64)
            require(weight.shape == (n, n), "steady_weight's shape", weight.shape, f"({n}, {n})")
            cost += (steady - goal).T @ weight @ (steady - goal)
        rest, limit = steady - A @ steady - B @ held, E @ steady + F @ held
        both = np.concatenate([part for pair in bounded for part in pair])
        matrices = [rest, limit, both]
        names = ["the steady state"] * n + [f"row {r + 1} at the steady state" for r in range(count)]
        for i in range(1, horizon + tail + 1):
            names += [f"row {r + 1} after {i} steps" for r in range(count)] * 2
        fixed = np.zeros(0)
        if steady_state is not None:
            fixed = np.concatenate([np.asarray(part, np.float64) for part in steady_state])
            require(fixed.shape == (n + m,), "steady_state's shape", fixed.shape, f"({n + m},) together")
            matrices.append(np.concatenate([steady, held]))
            names += ["the fixed steady state"] * (n + m)
        rows_ = np.concatenate(matrices)
        # Parameters: x, z, and the bounds of both kinds of rows at each step.
        moving = np.zeros((len(rows_), known + len(both)))
        moving[:, :known] = -rows_[:, size:-1]
        upper = moving.copy()
        upper[n + count : n + count + len(both), known:] = np.eye(len(both))
        most = high - self.schedule.steady - 1e-6
        low = np.concatenate([np.zeros(n), np.full(count + len(both), -np.inf), fixed])
        top = np.concatenate([np.zeros(n), most, np.zeros(len(both)), fixed])
        linear = np.concatenate([2.0 * cost[:size, size:-1], np.zeros((size, len(both)))], axis=1)
        self.program = ParametricQP(
            cost[:size, :size] + cost[:size, :size].T,
            rows_[:, :size],
            Affine(2.0 * cost[:size, -1], linear),
            Affine(low, moving),
            Affine(top, upper),
            names,
        )
        self.prepared = (PIQP(sparse=False) if solver is None else solver).prepare(self.program)
        self._check_steady(rest[:, :size], limit[:, :size], most)

    def solve(self, x: Any, nominal: Any, step: int) -> StochasticAnswer:
        """Solves at one state, on the host.

        Args:
            x: the state ``[n]``.
            nominal: ``z`` ``[n]``; at a reset it is ignored.
            step: the time, counted from the start, which is a reset.
        """
        n, m = self.B.shape
        x, nominal = np.asarray(x, np.float64), np.asarray(nominal, np.float64)
        for name, value in (("x", x), ("nominal", nominal)):
            require(value.shape == (n,), f"{name}'s shape", value.shape, f"({n},)")
            require_number(name, value)
        require_count("step", step, 0)
        if self.schedule.last(step) == step:
            nominal = x
        tightened = self.high - self.schedule.tightenings(step, self.horizon + self.tail)
        # Where no bound is due, one far away: a solver's parameters must be finite.
        tightened = np.where(np.isfinite(tightened), tightened, 1e4 * (1.0 + np.abs(self.high)))
        parameters = np.concatenate([x, nominal, tightened.ravel()])
        found = self.prepared.solve(parameters)
        if int(found.status) == 4:
            # Interior points may fail where there is no answer; a splitting ends with a certificate.
            found = OSQP().prepare(self.program).solve(parameters)
        status, z = int(found.status), np.asarray(found.z, np.float64)
        if status > 1:
            blame, z = self.program.blame(found.dual) if status == 2 else [], np.full(self.program.size, np.nan)
        else:
            blame = []
        inputs, steady = z[: self.horizon * m].reshape(-1, m), z[self.horizon * m :]
        control = inputs[0] + self.gain @ (x - nominal)
        following = self.A @ nominal + self.B @ inputs[0]
        return StochasticAnswer(control, following, inputs, steady, status, int(found.iterations), blame)

    def policy(self, fallback: Fallback = "shift") -> HostController:
        """The controller as a policy of the state; its memory's ``memory`` is ``(z, step)``.

        Args:
            fallback: what acts where there is no answer; see :data:`~steersman.control.host_solves.Fallback`.
        """
        n, m = self.B.shape

        def solve(state: Any, last: Plan) -> Plan:
            nominal, step = last.memory
            step = int(step)
            cost: Any = np.nan
            if not (np.all(np.isfinite(state)) and np.all(np.isfinite(nominal))):
                report: Any = {"status": 4, "iterations": 0}
                nothing: Any = np.full((self.horizon, m), np.nan)
                return Plan(nothing, cost, (nominal, step + 1), report)
            found = self.solve(state, nominal, step)
            report = {"status": found.status, "iterations": found.iterations}
            controls: Any = np.concatenate([found.control[None], found.inputs[1:]])
            return Plan(controls, cost, (found.nominal if found.solved else nominal, step + 1), report)

        whole: Any = np.zeros((), np.int32)
        controls: Any = np.full((self.horizon, m), np.nan)
        first = Plan(controls, controls[0, 0], (np.zeros(n), whole), {"status": whole, "iterations": whole})
        return HostController(solve, first, fallback)

    def _check_steady(self, rest: np.ndarray, limit: np.ndarray, most: np.ndarray) -> None:
        from scipy.optimize import linprog

        found = linprog(np.zeros(rest.shape[1]), limit, most, rest, np.zeros(len(rest)), bounds=(None, None))
        if found.status == 2:
            raise InputError(
                f"high is {self.high.tolist()}, but it must leave room for a steady state: noise takes "
                f"{self.schedule.steady.round(6).tolist()} of it."
            )
