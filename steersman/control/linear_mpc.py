"""Linear model predictive control: one quadratic program, whose parameters are the state and the reference.

``min sum_{i<N} |x_i - r_i|_Q^2 + |u_i - v_i|_R^2 + |x_N - r_N|_P^2 + price sum_i sum(s_i)`` over predictions
``x_{i+1} = A x_i + B u_i + d`` within bounds (Rawlings, Mayne and Diehl, 2017, Model Predictive Control, chapters 1-2).
With the Riccati equation's ``P`` the law is the LQR's wherever no bound is active.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int, Key

from steersman.control.host_solves import Fallback, check_fallback, fall_back, solve_qp
from steersman.control.lqr import lqr
from steersman.control.planning import Plan
from steersman.control.quadratic_programs import OSQP, Affine, HostAnswer, ParametricQP, QPSolver
from steersman.errors import InputTypeError, require, require_count, require_number
from steersman.policies import Policy


@dataclasses.dataclass(frozen=True, eq=False)
class MPCAnswer(HostAnswer):
    """One solve on the host.

    Attributes:
        controls: ``[N, m]``; NaN where there is no answer.
        states: predicted for them ``[N + 1, n]``.
        cost: the objective; infinite where infeasible.
        violation: the largest slack of a soft bound.
        status: index into :data:`~steersman.control.quadratic_programs.STATUSES`.
        iterations: of the solver.
        blame: rows that cannot be satisfied together, by name; empty where there is an answer.
    """

    controls: Float[np.ndarray, "N m"]
    states: Float[np.ndarray, "N_plus_1 n"]
    cost: float
    violation: float
    status: int
    iterations: int
    blame: list[str]


class LinearMPC:
    """The program of a linear MPC, in a solver's memory.

    Args:
        A: dynamics ``[n, n]``.
        B: effect of the control ``[n, m]``.
        Q: state cost ``[n, n]``, symmetric, positive semidefinite.
        R: control cost ``[m, m]``, symmetric, positive definite.
        horizon: steps ``N``.
        terminal: ``"riccati"``, a matrix ``P`` ``[n, n]``, or None for no terminal cost.
        control_bounds: ``(low [m], high [m])`` at steps 0..N-1; a number stands for all, infinite for none.
        state_bounds: ``(low [n], high [n])`` at steps 1..N, likewise.
        rows: ``(E, F, low, high)``: ``low <= E x_i + F u_i <= high`` at steps 0..N-1.
        price: None for hard bounds; else the cost of each unit by which a state bound or a row is violated. Bounds are
            kept exactly where that is possible if the price exceeds their multipliers.
        terminal_equality: whether ``x_N = r_N``.
        terminal_rows: ``(H, h)``: ``H x_N <= h``.
        condensed: whether states are eliminated: ``N m`` variables and dense matrices, for short horizons and plants
            that are not too unstable.
        solver: the backend; :class:`~steersman.control.OSQP` unless given.
        state_names: what states are called where infeasibility is explained.
        control_names: likewise.

    Raises:
        InputError: shapes, definiteness or bounds are wrong.
    """

    def __init__(
        self,
        A: Any,
        B: Any,
        Q: Any,
        R: Any,
        horizon: int,
        *,
        terminal: Any = "riccati",
        control_bounds: tuple[Any, Any] | None = None,
        state_bounds: tuple[Any, Any] | None = None,
        rows: tuple[Any, Any, Any, Any] | None = None,
        price: float | None = None,
        terminal_equality: bool = False,
        terminal_rows: tuple[Any, Any] | None = None,
        condensed: bool = False,
        solver: QPSolver | None = None,
        state_names: Sequence[str] | None = None,
        control_names: Sequence[str] | None = None,
    ) -> None:
        require_count("horizon", horizon)
        if price is not None:
            require_number("price", price, above=0.0)
        with jax.enable_x64(True):
            value = np.asarray(lqr(A, B, Q, R).value, np.float64)
        self.A, self.B, self.Q, self.R = (np.asarray(matrix, np.float64) for matrix in (A, B, Q, R))
        n, m = self.B.shape
        self.horizon, self.price, self.condensed = horizon, price, condensed
        self.P = value if isinstance(terminal, str) else np.zeros((n, n)) if terminal is None else np.asarray(terminal)
        require(not isinstance(terminal, str) or terminal == "riccati", "terminal", terminal, "'riccati' or a matrix")
        require(self.P.shape == (n, n), "terminal's shape", self.P.shape, f"({n}, {n})")
        control_box, state_box = _box("control_bounds", control_bounds, m), _box("state_bounds", state_bounds, n)
        names = [f"state {i + 1}" for i in range(n)] if state_names is None else list(state_names)
        labels = [f"control {i + 1}" for i in range(m)] if control_names is None else list(control_names)
        require(len(names) == n, "state_names", names, f"{n} names")
        require(len(labels) == m, "control_names", labels, f"{m} names")
        bounded = np.isfinite(state_box[0]) | np.isfinite(state_box[1])
        row_count = 0 if rows is None else len(np.atleast_1d(rows[2]))
        slacks = 0 if price is None else int(bounded.sum()) + row_count
        self.sizes = n * (horizon + 1), m * horizon, slacks * horizon

        variables = scipy.sparse.eye_array(sum(self.sizes), format="csr")
        states, controls, slack = _split(variables, self.sizes, (n, m, slacks), horizon)
        # Parameters: the state, references of states and controls, the disturbance.
        self.counts = n, n * (horizon + 1), m * horizon, n
        parameters = np.eye(sum(self.counts))
        start, wanted, held, disturbance = np.split(parameters, np.cumsum(self.counts)[:-1])
        weight = scipy.sparse.block_diag(
            [self.Q] * horizon + [self.P] + [self.R] * horizon + [np.zeros((1, 1))] * self.sizes[2], format="csc"
        )
        pull = -2.0 * weight @ np.concatenate([wanted, held, np.zeros((self.sizes[2], len(parameters)))])
        prices = np.concatenate([np.zeros(sum(self.sizes[:2])), np.full(self.sizes[2], price or 0.0)])

        found = _Rows(len(parameters))
        found.add(states[0], start, start, [f"start of {name}" for name in names])
        for i in range(horizon):
            rolled = states[i + 1] - self.A @ states[i] - self.B @ controls[i]
            found.add(rolled, disturbance, disturbance, [f"dynamics of {name} at step {i + 1}" for name in names])
        for i in range(horizon):
            found.add(controls[i], control_box[0], control_box[1], [f"{label} at step {i}" for label in labels])
            low, high = (bound[bounded] for bound in state_box)
            called = [f"{name} at step {i + 1}" for name, here in zip(names, bounded, strict=True) if here]
            found.add(states[i + 1][bounded], low, high, called, None if price is None else slack[i][: bounded.sum()])
            if rows is not None:
                E, F, low, high = (np.atleast_1d(np.asarray(part, np.float64)) for part in rows)
                require(E.shape == (row_count, n), "rows' E", E.shape, f"of shape ({row_count}, {n})")
                require(F.shape == (row_count, m), "rows' F", F.shape, f"of shape ({row_count}, {m})")
                low, high = _box("rows' bounds", (low, high), row_count)
                called = [f"row {r + 1} at step {i}" for r in range(row_count)]
                mixed = E @ states[i] + F @ controls[i]
                found.add(mixed, low, high, called, None if price is None else slack[i][bounded.sum() :])
            if slacks:
                found.add(slack[i], np.zeros(slacks), np.full(slacks, np.inf), [f"slack at step {i}"] * slacks)
        if terminal_equality:
            target = wanted[-n:]
            found.add(states[-1], target, target, [f"terminal {name}" for name in names])
        if terminal_rows is not None:
            H, h = np.atleast_2d(np.asarray(terminal_rows[0], np.float64)), np.atleast_1d(terminal_rows[1])
            require(H.shape == (len(h), n), "terminal_rows' H", H.shape, f"of shape ({len(h)}, {n})")
            called = [f"terminal row {r + 1}" for r in range(len(h))]
            found.add(H @ states[-1], np.full(len(h), -np.inf), np.asarray(h, np.float64), called)

        matrix, low, high, called = found.stacked()
        q = Affine(prices, np.asarray(pull))
        self._lift = np.eye(sum(self.sizes)), np.zeros((sum(self.sizes), len(parameters)))
        if condensed:
            self._lift = through, offset = self._predictions()
            keep = slice(n * (horizon + 1), None)
            low, high = (Affine(b.constant, b.matrix - matrix @ offset) for b in (low, high))
            q = Affine(through.T @ prices, through.T @ (q.matrix + 2.0 * weight @ offset))
            matrix, weight, called = (matrix @ through)[keep], through.T @ (weight @ through), called[keep]
            weight = 0.5 * (weight + weight.T)
            low, high = (Affine(b.constant[keep], b.matrix[keep]) for b in (low, high))
        self.program = ParametricQP(2.0 * weight, matrix, q, low, high, called)
        self.prepared = (OSQP() if solver is None else solver).prepare(self.program)

    def solve(self, x: Any, states: Any = None, controls: Any = None, disturbance: Any = None) -> MPCAnswer:
        """Solves at one state, on the host.

        Args:
            x: the state ``[n]``.
            states: reference ``[N + 1, n]``, or one state ``[n]``; the origin unless given.
            controls: reference ``[N, m]``, or one control ``[m]``, likewise.
            disturbance: ``d`` ``[n]``; none unless given.
        """
        n, m = self.B.shape
        given = []
        for name, value, shape in (
            ("x", x, (n,)),
            ("states", states, (self.horizon + 1, n)),
            ("controls", controls, (self.horizon, m)),
            ("disturbance", disturbance, (n,)),
        ):
            value = np.zeros(shape[-1]) if value is None else np.asarray(value, np.float64)
            require_number(name, value)
            require(value.shape in (shape, shape[-1:]), f"{name}'s shape", value.shape, f"{shape} or {shape[-1:]}")
            given.append(np.broadcast_to(value, shape))
        x, states, controls, disturbance = given
        parameters = np.concatenate([x, states.ravel(), controls.ravel(), disturbance])
        found = self.prepared.solve(parameters)
        status = int(found.status)
        plan, path, slack, cost = self.read(np.asarray(found.z, np.float64), parameters)
        if status > 1:
            plan, path, cost = np.full_like(plan, np.nan), np.full_like(path, np.nan), np.inf
        blame = self.program.blame(found.dual) if status == 2 else []
        worst = float(np.max(slack, initial=0.0))
        return MPCAnswer(plan, path, float(cost), worst, status, int(found.iterations), blame)

    def read(self, z: Any, parameters: Any) -> tuple[Any, Any, Any, Any]:
        """Controls, states, slack and objective of the program's variables; traceable."""
        n, m = self.B.shape
        through, offset = (np.asarray(part, z.dtype) for part in self._lift)
        lifted = through @ z + offset @ parameters if self.condensed else z
        ends = np.cumsum(self.sizes)
        path, plan, slack = lifted[: ends[0]], lifted[ends[0] : ends[1]], lifted[ends[1] :]
        path, plan = path.reshape(-1, n), plan.reshape(-1, m)
        _, wanted, held, _ = (parameters[e - c : e] for c, e in zip(self.counts, np.cumsum(self.counts), strict=True))
        away, effort = path - wanted.reshape(path.shape), plan - held.reshape(plan.shape)
        Q, R, P = (np.asarray(weight, z.dtype) for weight in (self.Q, self.R, self.P))
        cost = ((away[:-1] @ Q) * away[:-1]).sum() + ((effort @ R) * effort).sum() + away[-1] @ P @ away[-1]
        return plan, path, slack, cost + (self.price or 0.0) * slack.sum()

    def shifted(self, z: Any) -> Any:
        """Variables one step later, the last ones repeated: where the next solve starts."""
        parts, sizes = [], self.sizes[1:] if self.condensed else self.sizes
        widths = [size // (self.horizon + (len(sizes) == 3 and i == 0)) for i, size in enumerate(sizes)]
        for size, width in zip(sizes, widths, strict=True):
            part, z = z[:size], z[size:]
            parts += [part[width:], part[len(part) - width :]]
        return jnp.concatenate(parts)

    def targets(self, output: Any) -> tuple[Float[np.ndarray, "n_plus_m o"], Float[np.ndarray, "n_plus_m n"]]:
        """Where to rest: ``(x, u) = first @ y + second @ d`` holds ``C x = y`` against a disturbance ``d``.

        ``x = A x + B u + d`` and ``C x = y`` in the least-squares sense, of least norm.

        Args:
            output: ``C`` ``[o, n]``.
        """
        C = np.atleast_2d(np.asarray(output, np.float64))
        n, m = self.B.shape
        require(C.shape[1] == n, "output's shape", C.shape, f"[o, {n}]")
        rest = np.block([[self.A - np.eye(n), self.B], [C, np.zeros((len(C), m))]])
        inverse = np.linalg.pinv(rest)
        return inverse[:, n:], -inverse[:, :n]

    def policy(
        self,
        states: Any = None,
        controls: Any = None,
        *,
        fallback: Fallback = "shift",
        output: Any = None,
        observer_gain: float | None = None,
    ) -> LinearMPCPolicy:
        """The controller as a policy.

        Args:
            states: reference ``[T, n]``, of which each plan sees the next ``N + 1`` and the last holds on; or one
                state ``[n]``; the origin unless given. With `output`, outputs ``[T, o]`` or ``[o]``.
            controls: reference ``[T, m]`` or ``[m]``, likewise; not with `output`, which determines it.
            fallback: what acts where there is no answer; see :data:`~steersman.control.host_solves.Fallback`. Before
                the first plan there is nothing to shift, and the control is NaN.
            output: ``C`` ``[o, n]``: references are outputs, and each plan aims at the states that hold them.
            observer_gain: in (0, 1], for offset-free control: how much of each prediction error is taken to be a
                lasting disturbance, against which the plan and its targets are made. None: no such estimate.
        """
        return LinearMPCPolicy(self, states, controls, fallback, output, observer_gain)

    def _predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """All variables as ``first @ (controls, slack) + second @ parameters``."""
        n, m = self.B.shape
        state_size, control_size, slack_size = self.sizes
        through = np.zeros((sum(self.sizes), control_size + slack_size))
        offset = np.zeros((len(through), sum(self.counts)))
        through[state_size:] = np.eye(control_size + slack_size)
        offset[:n, :n] = np.eye(n)
        for i in range(self.horizon):
            now, after = slice(n * i, n * (i + 1)), slice(n * (i + 1), n * (i + 2))
            through[after] = self.A @ through[now]
            through[after, m * i : m * (i + 1)] += self.B
            offset[after] = self.A @ offset[now]
            offset[after, -n:] += np.eye(n)
        return through, offset


class MPCMemory(NamedTuple):
    """What the policy remembers beside its controls.

    Attributes:
        z: the program's variables, shifted.
        dual: its multipliers.
        step: number of calls.
        predicted: the state that was to be measured next, without disturbance.
        disturbance: the estimate.
    """

    z: Float[Array, " v"]
    dual: Float[Array, " c"]
    step: Int[Array, ""]
    predicted: Float[Array, " n"]
    disturbance: Float[Array, " n"]


class LinearMPCPolicy(Policy):
    """A linear MPC as a policy of the state, with any backend, inside ``jit``, ``vmap`` and ``scan``.

    Its memory is the last :class:`~steersman.control.Plan`; the report has ``status``, ``iterations``, ``violation``
    and ``fallback``.

    Attributes:
        mpc: the program.
        states: reference ``[T, n]``, or ``[T, o]`` with targets.
        controls: reference ``[T, m]``.
        fallback: what acts where there is no answer.
        target: where to rest for an output, see :meth:`LinearMPC.targets`; None without outputs.
        observer_gain: of the disturbance's estimate; None without.
    """

    mpc: LinearMPC = eqx.field(static=True)
    states: Float[Array, "T o"]
    controls: Float[Array, "T_ m"]
    fallback: Fallback
    target: tuple[Float[Array, "n_plus_m o"], Float[Array, "n_plus_m n"]] | None
    observer_gain: float | None = eqx.field(static=True)

    def __init__(
        self, mpc: LinearMPC, states: Any, controls: Any, fallback: Fallback, output: Any, observer_gain: float | None
    ) -> None:
        if not isinstance(mpc, LinearMPC):
            raise InputTypeError(f"mpc is a {type(mpc).__name__}, but it must be a LinearMPC.")
        n, m = mpc.B.shape
        self.mpc, self.fallback, self.observer_gain = mpc, check_fallback(fallback, m), observer_gain
        self.target = None
        if output is not None:
            require(controls is None, "controls", controls, "None with an output, which determines them")
            first, second = mpc.targets(output)
            self.target = jnp.asarray(first), jnp.asarray(second)
        if observer_gain is not None:
            require_number("observer_gain", observer_gain, above=0.0, at_most=1.0)
        width = n if self.target is None else self.target[0].shape[1]
        self.states, self.controls = _table("states", states, width), _table("controls", controls, m)

    def init(self, key: Key[Array, ""]) -> Plan:
        del key
        kind, (n, m) = self.states.dtype, self.mpc.B.shape
        program, whole = self.mpc.program, jnp.zeros((), jnp.int32)
        z, dual, rest = (jnp.zeros(size, kind) for size in (program.size, len(program.row_names), n))
        memory = MPCMemory(z, dual, whole, rest, rest)
        report = {"status": whole, "iterations": whole, "violation": jnp.zeros((), kind), "fallback": whole}
        return Plan(jnp.full((self.mpc.horizon, m), jnp.nan, kind), jnp.full((), jnp.nan, kind), memory, report)

    def __call__(
        self, observation: Float[Array, " n"], carry: Plan, key: Key[Array, ""]
    ) -> tuple[Float[Array, " m"], Plan]:
        del key
        mpc, memory, kind = self.mpc, carry.memory, self.states.dtype
        x = observation.astype(kind)
        disturbance = memory.disturbance
        if self.observer_gain is not None:
            missed = jnp.where(memory.step > 0, x - memory.predicted - disturbance, 0.0)
            disturbance = disturbance + self.observer_gain * missed
        steps = memory.step + jnp.arange(mpc.horizon + 1)
        states = self.states[jnp.minimum(steps, len(self.states) - 1)]
        controls = self.controls[jnp.minimum(steps[:-1], len(self.controls) - 1)]
        if self.target is not None:
            both = states @ self.target[0].T + self.target[1] @ disturbance
            states, controls = both[:, : x.size], both[:-1, x.size :]
        parameters = jnp.concatenate([x, states.ravel(), controls.ravel(), disturbance])
        found = solve_qp(mpc.prepared, parameters, memory.z, memory.dual)
        failed = found.status > 1
        plan, _, slack, cost = mpc.read(found.z, parameters)
        plan = jnp.where(failed, fall_back(self.fallback, observation, carry), plan)
        z = jnp.where(failed, memory.z, found.z)
        dual = jnp.where(failed, memory.dual, found.dual)
        predicted = jnp.asarray(mpc.A, kind) @ x + jnp.asarray(mpc.B, kind) @ plan[0]
        report = {
            "status": found.status.astype(jnp.int32),
            "iterations": found.iterations.astype(jnp.int32),
            "violation": jnp.max(slack, initial=0.0),
            "fallback": failed.astype(jnp.int32),
        }
        memory = MPCMemory(mpc.shifted(z), dual, memory.step + 1, predicted, disturbance)
        return plan[0], Plan(plan, jnp.where(failed, jnp.inf, cost), memory, report)


class _Rows:
    """Rows of a program while they are gathered; bounds are constants ``[r]`` or matrices of the parameters."""

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters
        self.matrices: list[Any] = []
        self.low: list[Affine] = []
        self.high: list[Affine] = []
        self.names: list[str] = []

    def add(self, matrix: Any, low: np.ndarray, high: np.ndarray, names: list[str], slack: Any = None) -> None:
        if slack is not None:
            none = np.full(len(low), np.inf)
            self.add(matrix - slack, -none, high, names)
            self.add(matrix + slack, low, none, names)
            return
        keep = np.ones(len(low), bool) if low.ndim == 2 else np.isfinite(low) | np.isfinite(high)
        self.matrices.append(scipy.sparse.csr_matrix(matrix)[keep])
        self.low.append(self._affine(low, keep))
        self.high.append(self._affine(high, keep))
        self.names += [name for name, here in zip(names, keep, strict=True) if here]

    def _affine(self, bound: np.ndarray, keep: np.ndarray) -> Affine:
        rows = int(keep.sum())
        if bound.ndim == 2:
            return Affine(np.zeros(rows), bound[keep])
        return Affine(bound[keep], np.zeros((rows, self.parameters)))

    def stacked(self) -> tuple[Any, Affine, Affine, list[str]]:
        low, high = (
            Affine(np.concatenate([b.constant for b in side]), np.concatenate([b.matrix for b in side]))
            for side in (self.low, self.high)
        )
        return scipy.sparse.vstack(self.matrices, format="csr"), low, high, self.names


def _split(variables: Any, sizes: tuple[int, int, int], widths: tuple[int, int, int], horizon: int) -> list[Any]:
    """Rows that pick the states, controls and slacks of each step."""
    parts, begin = [], 0
    for size, width, count in zip(sizes, widths, (horizon + 1, horizon, horizon), strict=True):
        parts.append([variables[begin + width * i : begin + width * (i + 1)] for i in range(count)])
        begin += size
    return parts


def _box(name: str, bounds: tuple[Any, Any] | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    arrays = []
    for bound in (low, high):
        array = np.asarray(bound, np.float64)
        require(array.shape in ((), (size,)) and not np.isnan(array).any(), name, bound, f"numbers of shape ({size},)")
        arrays.append(np.broadcast_to(array, (size,)))
    require(bool(np.all(arrays[0] <= arrays[1])), name, (low, high), "low <= high")
    return arrays[0], arrays[1]


def _table(name: str, value: Any, width: int) -> Array:
    table = jnp.zeros(width) if value is None else jnp.asarray(value, jnp.result_type(float))
    table = table[None] if table.ndim == 1 else table
    shape = f"[T, {width}] or [{width}]"
    require(table.ndim == 2 and table.shape[0] > 0 and table.shape[1] == width, f"{name}'s shape", table.shape, shape)
    require_number(name, table)
    return table
