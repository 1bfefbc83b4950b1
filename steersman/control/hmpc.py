"""Harmonic MPC for tracking (Krupa, Limon, Bemporad and Alamo, 2023, arXiv:2310.16723).

Besides the plan of ``N`` steps the program chooses an artificial harmonic ``xh, uh`` of the plant, near the reference
and within the bounds at every phase, which the plan must reach:

``min sum_{j<N} |x_j - xh_j|_Q^2 + |u_j - uh_j|_R^2 + |xh^e - xr^e|_Te^2 + |uh^e - ur^e|_Se^2
      + sum_{i in s, c} |xh^i - xr^i|_Th^2 + |uh^i - ur^i|_Sh^2``
``s.t. x_0 = x, x_{j+1} = A x_j + B u_j, low <= E x_j + F u_j <= high, x_N = xh_N, the plant's harmonic equations,
      hypot(y^s, y^c) <= min(high - y^e, y^e - low) - sigma``

The reference enters only the cost: whatever it does, a program that was feasible remains so. The offset cost has one
weight for sines and cosines, so that it does not change as reference and harmonic turn with time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from steersman.control.conic_programs import ConicProgram
from steersman.control.harmonics import Harmonic, HarmonicPlant
from steersman.control.host_solves import Fallback, HostController
from steersman.control.planning import Plan
from steersman.control.quadratic_programs import HostAnswer
from steersman.control.tracking_programs import check_rows, one_weight, root
from steersman.errors import require, require_count, require_number


@dataclasses.dataclass(frozen=True, eq=False)
class HMPCAnswer(HostAnswer):
    """One solve.

    Attributes:
        controls: ``[N, m]``; NaN where there is no answer.
        states: predicted for them ``[N + 1, n]``.
        artificial: the harmonic ``(x, u)`` that the plan ends on.
        cost: the optimal value; infinite where infeasible.
        status: index into :data:`~steersman.control.quadratic_programs.STATUSES`.
        iterations: of the solver.
        seconds: of the solver by itself.
        blame: why there is no answer, in words; empty where there is one.
    """

    controls: Float[np.ndarray, "N m"]
    states: Float[np.ndarray, "N_plus_1 n"]
    artificial: Harmonic
    cost: float
    status: int
    iterations: int
    seconds: float
    blame: str


class HMPCMemory(NamedTuple):
    """What the policy remembers beside its controls.

    Attributes:
        step: number of calls.
        reference: the harmonic aimed at in the last call, as rows constant, sine, cosine ``[3, n + m]``.
        artificial: the harmonic that the last plan ended on, likewise.
    """

    step: Any
    reference: Any
    artificial: Any


class HMPC:
    """The program of harmonic MPC, compiled once.

    Args:
        plant: dynamics and the base frequency.
        Q: cost of the distance from the artificial states ``[n, n]``, positive semidefinite.
        R: of the distance from its controls ``[m, m]``, positive definite.
        rows: ``(E [c, n], F [c, m], low [c], high [c])``: bounds on ``E x + F u``, infinite for none.
        Te: offset cost of the constant state ``[n, n]``, positive semidefinite.
        Se: of the constant control ``[m, m]``, positive definite.
        Th: of the state's sine and cosine; `Te` unless given. Two matrices ``[2, n, n]`` must be equal.
        Sh: of the control's; `Se` unless given.
        horizon: steps ``N``.
        sigma: how far inside its bounds the artificial harmonic stays, above 0.
        artificial: ``"harmonic"``, or ``"equilibrium"`` for MPC for tracking (Limon et al., 2008,
            doi:10.1016/j.automatica.2008.01.023): no sines and cosines.

    Raises:
        InputError: shapes, definiteness or bounds are wrong.
    """

    def __init__(
        self,
        plant: HarmonicPlant,
        Q: Any,
        R: Any,
        rows: tuple[Any, Any, Any, Any],
        Te: Any,
        Se: Any,
        *,
        Th: Any = None,
        Sh: Any = None,
        horizon: int = 5,
        sigma: float = 1e-4,
        artificial: str = "harmonic",
    ) -> None:
        import cvxpy

        require_count("horizon", horizon)
        require_number("sigma", sigma, above=0.0)
        require(artificial in ("harmonic", "equilibrium"), "artificial", artificial, "'harmonic' or 'equilibrium'")
        n, m = plant.B.shape
        self.plant, self.horizon = plant, horizon
        self.rows = E, F, low, high = check_rows(rows, n, m, sigma)
        Th, Sh = one_weight("Th", Te if Th is None else Th), one_weight("Sh", Se if Sh is None else Sh)
        q, te, th = (root(name, w, n, False) for name, w in (("Q", Q), ("Te", Te), ("Th", Th)))
        r, se, sh = (root(name, w, m, True) for name, w in (("R", R), ("Se", Se), ("Sh", Sh)))

        x, u = cvxpy.Variable((horizon + 1, n), name="x"), cvxpy.Variable((horizon, m), name="u")
        xh, uh = cvxpy.Variable((3, n), name="xh"), cvxpy.Variable((3, m), name="uh")
        start = cvxpy.Parameter(n, name="start")
        xr, ur = cvxpy.Parameter((3, n), name="xr"), cvxpy.Parameter((3, m), name="ur")
        phase = plant.frequency * np.arange(horizon + 1)
        waves = np.stack([np.ones(horizon + 1), np.sin(phase), np.cos(phase)], axis=1)
        squares = [
            cvxpy.sum_squares((x[:-1] - waves[:-1] @ xh) @ q), cvxpy.sum_squares((u - waves[:-1] @ uh) @ r),
            cvxpy.sum_squares((xh[0] - xr[0]) @ te), cvxpy.sum_squares((uh[0] - ur[0]) @ se),
            cvxpy.sum_squares((xh[1:] - xr[1:]) @ th), cvxpy.sum_squares((uh[1:] - ur[1:]) @ sh),
        ]  # fmt: skip
        y, yh = x[:-1] @ E.T + u @ F.T, xh @ E.T + uh @ F.T
        up, down = np.flatnonzero(np.isfinite(high)), np.flatnonzero(np.isfinite(low))
        every = np.ones((horizon, 1))
        swing = cvxpy.norm(yh[1:], axis=0)
        bounds = [
            x[0] == start,
            x[1:] == x[:-1] @ plant.A.T + u @ plant.B.T,
            x[horizon] == waves[horizon] @ xh,
            plant.equations @ cvxpy.hstack([part for i in range(3) for part in (xh[i], uh[i])]) == 0.0,
        ]
        if len(up):
            bounds += [y[:, up] <= every @ high[None, up], swing[up] <= high[up] - sigma - yh[0, up]]
        if len(down):
            bounds += [y[:, down] >= every @ low[None, down], swing[down] <= yh[0, down] - low[down] - sigma]
        if artificial == "equilibrium":
            bounds += [xh[1:] == 0.0, uh[1:] == 0.0]
        self.program = ConicProgram(cvxpy.Problem(cvxpy.Minimize(sum(squares)), bounds))

    @property
    def variables(self) -> int:
        """Number of scalar variables: ``(N + 1) n + N m + 3 (n + m)``, whatever the reference's period."""
        return sum(variable.size for variable in self.program.problem.variables())

    def solve(self, x: Any, reference: Harmonic) -> HMPCAnswer:
        """Solves at one state, on the host.

        Args:
            x: the state ``[n]``.
            reference: of ``(x, u)`` ``[n + m]``, counted from now; it need not be a harmonic of the plant, nor
                admissible.
        """
        n, m = self.plant.B.shape
        x, wanted = np.asarray(x, np.float64), np.stack([np.asarray(part, np.float64) for part in reference])
        require(x.shape == (n,), "x's shape", x.shape, f"({n},)")
        require(wanted.shape == (3, n + m), "reference's shape", wanted.shape, f"3 vectors of {n + m}")
        require_number("x", x)
        require_number("reference", wanted)
        found = self.program.solve(start=x, xr=wanted[:, :n], ur=wanted[:, n:])
        seconds, iterations = found.solver_seconds, found.iterations
        if not found.solved:
            plan, path = np.full((self.horizon, m), np.nan), np.full((self.horizon + 1, n), np.nan)
            nothing = Harmonic(*np.full((3, n + m), np.nan))
            cost, blame = (np.inf, self._blame(x)) if found.status == 2 else (np.nan, "the solver failed")
            return HMPCAnswer(plan, path, nothing, cost, found.status, iterations, seconds, blame)
        v = found.variables
        artificial = Harmonic(*np.concatenate([v["xh"], v["uh"]], axis=1))
        return HMPCAnswer(v["u"], v["x"], artificial, found.objective, found.status, iterations, seconds, "")

    def policy(
        self, reference: Harmonic | None = None, *, outputs: Any = None, output: Any = None, window: int = 10,
        fallback: Fallback = "shift",
    ) -> HostController:  # fmt: skip
        """The controller as a policy of the state; its memory's ``memory`` is an :class:`HMPCMemory`.

        Args:
            reference: a harmonic ``(x, u)``, counted from the first call, and turned with time.
            outputs: or any reference of the outputs ``[T, o]``: at each step a harmonic is fitted to the next rows, of
                which the last holds on.
            output: ``C`` ``[o, n]`` of those outputs.
            window: rows of each fit.
            fallback: what acts where there is no answer; see :data:`~steersman.control.host_solves.Fallback`. Before
                the first plan there is nothing to shift, and the control is NaN.
        """
        n, m = self.plant.B.shape
        require((reference is None) != (outputs is None), "reference and outputs", (reference, outputs), "one of both")
        require_count("window", window)
        table = None if outputs is None else np.asarray(outputs, np.float64)
        if table is not None:
            require(output is not None, "output", output, "given with outputs")
            self.plant.fit(output, table[:1])

        def solve(state: Any, last: Plan) -> Plan:
            step = int(last.memory.step)
            if table is None:
                assert reference is not None
                wanted = reference.rotated(self.plant.frequency * step)
            else:
                ahead = table[np.minimum(step + np.arange(window), len(table) - 1)]
                wanted = self.plant.fit(output, ahead)
            memory: Any = HMPCMemory(step + 1, np.stack(wanted), np.asarray(last.memory.artificial))
            nothing: Any = np.full((self.horizon, m), np.nan)
            cost: Any = np.inf
            report: Any = {"status": 4, "iterations": 0}
            if not np.all(np.isfinite(state)):
                return Plan(nothing, cost, memory, report)
            found = self.solve(state, wanted)
            if found.solved:
                memory = memory._replace(artificial=np.stack(found.artificial))
            controls: Any = found.controls
            cost = found.cost
            report = {"status": found.status, "iterations": found.iterations}
            return Plan(controls, cost, memory, report)

        whole: Any = np.zeros((), np.int32)
        memory: Any = HMPCMemory(whole, np.zeros((3, n + m)), np.full((3, n + m), np.nan))
        controls: Any = np.full((self.horizon, m), np.nan)
        return HostController(
            solve, Plan(controls, controls[0, 0], memory, {"status": whole, "iterations": whole}), fallback
        )

    def _blame(self, x: np.ndarray) -> str:
        E, F, low, high = self.rows
        stuck = ~np.any(F, axis=1) & ((E @ x > high) | (E @ x < low))
        if np.any(stuck):
            rows = ", ".join(str(i + 1) for i in np.flatnonzero(stuck))
            return f"the state {x.tolist()} is beyond the bounds of row {rows}"
        return (
            f"no admissible harmonic can be reached from the state {x.tolist()} in {self.horizon} steps within bounds"
        )
