"""MPC for tracking periodic references (Limon et al., 2016, doi:10.1109/TAC.2015.2461811).

As :mod:`~steersman.control.hmpc`, with an artificial trajectory of one whole period ``T`` instead of a harmonic: any
shape, at ``n + m`` variables a sample of the period. With ``T = 1`` it is MPC for tracking set-points.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from steersman.control.conic_programs import ConicProgram
from steersman.control.quadratic_programs import HostAnswer
from steersman.control.tracking_programs import check_rows, root
from steersman.errors import require, require_count, require_number


@dataclasses.dataclass(frozen=True, eq=False)
class PeriodicAnswer(HostAnswer):
    """One solve.

    Attributes:
        controls: ``[N, m]``; NaN where there is no answer.
        artificial: states and controls of one period that the plan ends on ``[T, n + m]``.
        cost: the optimal value; infinite where infeasible.
        status: index into :data:`~steersman.control.quadratic_programs.STATUSES`.
        seconds: of the solver by itself.
    """

    controls: Float[np.ndarray, "N m"]
    artificial: Float[np.ndarray, "T d"]
    cost: float
    status: int
    seconds: float


class PeriodicMPCT:
    """The program, compiled once.

    Args:
        A: dynamics ``[n, n]``.
        B: effect of the control ``[n, m]``.
        Q: cost of the distance from the artificial states ``[n, n]``, positive semidefinite.
        R: of the distance from its controls ``[m, m]``, positive definite.
        rows: ``(E [c, n], F [c, m], low [c], high [c])``: bounds on ``E x + F u``, infinite for none.
        Te: offset cost of the artificial states, summed over the period ``[n, n]``, positive semidefinite.
        Se: of its controls ``[m, m]``, positive definite.
        period: samples ``T`` of one period.
        horizon: steps ``N``.
        sigma: how far inside its bounds the artificial trajectory stays, above 0.

    Raises:
        InputError: shapes, definiteness or bounds are wrong.
    """

    def __init__(
        self,
        A: Any,
        B: Any,
        Q: Any,
        R: Any,
        rows: tuple[Any, Any, Any, Any],
        Te: Any,
        Se: Any,
        *,
        period: int,
        horizon: int = 5,
        sigma: float = 1e-4,
    ) -> None:
        import cvxpy

        require_count("period", period)
        require_count("horizon", horizon)
        require_number("sigma", sigma, above=0.0)
        A, B = np.asarray(A, np.float64), np.asarray(B, np.float64)
        require(A.ndim == 2 and A.shape[0] == A.shape[1], "A's shape", A.shape, "[n, n]")
        require(B.ndim == 2 and len(B) == len(A), "B's shape", B.shape, f"({len(A)}, m)")
        self.A, self.B, self.period, self.horizon = A, B, period, horizon
        n, m = B.shape
        E, F, low, high = check_rows(rows, n, m, sigma)
        q, te, r, se = root("Q", Q, n, False), root("Te", Te, n, False), root("R", R, m, True), root("Se", Se, m, True)
        x, u = cvxpy.Variable((horizon + 1, n), name="x"), cvxpy.Variable((horizon, m), name="u")
        xa, ua = cvxpy.Variable((period, n), name="xa"), cvxpy.Variable((period, m), name="ua")
        start = cvxpy.Parameter(n, name="start")
        xr, ur = cvxpy.Parameter((period, n), name="xr"), cvxpy.Parameter((period, m), name="ur")
        pick = np.eye(period)[np.arange(horizon + 1) % period]
        cost = cvxpy.sum_squares((x[:-1] - pick[:-1] @ xa) @ q) + cvxpy.sum_squares((u - pick[:-1] @ ua) @ r)
        cost += cvxpy.sum_squares((xa - xr) @ te) + cvxpy.sum_squares((ua - ur) @ se)
        y, ya = x[:-1] @ E.T + u @ F.T, xa @ E.T + ua @ F.T
        bounds = [
            x[0] == start,
            x[1:] == x[:-1] @ A.T + u @ B.T,
            x[horizon] == pick[horizon] @ xa,
            np.roll(np.eye(period), 1, axis=1) @ xa == xa @ A.T + ua @ B.T,
        ]
        for sign, bound in ((1.0, high), (-1.0, -low)):
            kept = np.flatnonzero(np.isfinite(bound))
            if len(kept):
                bounds += [sign * y[:, kept] <= np.ones((horizon, 1)) @ bound[None, kept]]
                bounds += [sign * ya[:, kept] <= np.ones((period, 1)) @ bound[None, kept] - sigma]
        self.program = ConicProgram(cvxpy.Problem(cvxpy.Minimize(cost), bounds))

    @property
    def variables(self) -> int:
        """Number of scalar variables: ``(N + 1) n + N m + T (n + m)``."""
        return sum(variable.size for variable in self.program.problem.variables())

    def solve(self, x: Any, states: Any, controls: Any) -> PeriodicAnswer:
        """Solves at one state, on the host.

        Args:
            x: the state ``[n]``.
            states: reference of one period, from now on ``[T, n]``.
            controls: likewise ``[T, m]``.
        """
        n, m = self.B.shape
        given: dict[str, Any] = {"x": x, "states": states, "controls": controls}
        shapes = {"x": (n,), "states": (self.period, n), "controls": (self.period, m)}
        for name, shape in shapes.items():
            require_number(name, given[name])
            require(np.shape(given[name]) == shape, f"{name}'s shape", np.shape(given[name]), f"{shape}")
        found = self.program.solve(start=x, xr=states, ur=controls)
        if not found.solved:
            plan, path = np.full((self.horizon, m), np.nan), np.full((self.period, n + m), np.nan)
            cost = np.inf if found.status == 2 else np.nan
            return PeriodicAnswer(plan, path, cost, found.status, found.solver_seconds)
        v = found.variables
        artificial = np.concatenate([v["xa"], v["ua"]], axis=1)
        return PeriodicAnswer(v["u"], artificial, found.objective, found.status, found.solver_seconds)
