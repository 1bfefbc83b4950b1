"""Quadratic programs whose data are affine in a few parameters: built once, then solved again and again.

``min 1/2 z'P z + q'z  subject to  low <= A z <= high`` with ``q``, ``low`` and ``high`` affine in parameters ``p`` (the
state, a reference). Backends fill one slot: OSQP (Stellato et al., 2020, doi:10.1007/s12532-020-00179-2), PIQP (Schwan
et al., 2023, arXiv:2304.00290), and :class:`ADMM`, the operator splitting of OSQP written in JAX, for controllers that
run inside ``jit`` and ``vmap``.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

from steersman.errors import InputError, require, require_count, require_number

#: What a solver says: the numbers are those of :attr:`QPSolution.status`.
STATUSES = ("solved", "inaccurate", "infeasible", "unbounded", "failed")


class Affine(NamedTuple):
    """A vector that is affine in the parameters, ``constant + matrix p``.

    Attributes:
        constant: ``[c]``.
        matrix: ``[c, k]``.
    """

    constant: Float[np.ndarray, " c"]
    matrix: Float[np.ndarray, "c k"]

    def __call__(self, parameters: Any) -> Any:
        """The vector at some parameters ``[k]``."""
        return self.constant + self.matrix @ parameters


class QPSolution(NamedTuple):
    """A solver's answer.

    Attributes:
        z: the variables ``[n]``; where `status` is not 0 or 1 only a guess.
        dual: multipliers of the rows, positive where `high` holds ``z`` back, negative where `low` does ``[c]``. For an
            infeasible program a certificate: no ``z`` satisfies the rows where it is not zero.
        status: index into :data:`STATUSES`.
        iterations: of the solver.
        seconds: of the solver by itself, where it is known.
        objective: value at ``z``.
    """

    z: Float[Any, " n"]
    dual: Float[Any, " c"]
    status: Int[Any, ""]
    iterations: Int[Any, ""]
    seconds: Float[Any, ""]
    objective: Float[Any, ""]

    @property
    def solved(self) -> Any:
        """Whether ``z`` can be used."""
        return self.status <= 1


class HostAnswer:
    """What the answers of programs solved on the host have in common.

    Attributes:
        status: index into :data:`STATUSES`.
    """

    status: int

    @property
    def solved(self) -> bool:
        """Whether the answer can be used."""
        return self.status <= 1

    @property
    def word(self) -> str:
        """The status in a word."""
        return STATUSES[self.status]


class ParametricQP:
    """A family of quadratic programs.

    Args:
        P: ``[n, n]``, symmetric, positive semidefinite.
        A: ``[c, n]``.
        q: affine in the parameters.
        low: likewise; ``-inf`` where a row has no lower bound.
        high: likewise.
        row_names: what each row is called where infeasibility is explained.

    Raises:
        InputError: shapes or definiteness are wrong, or a number is NaN.
    """

    def __init__(
        self, P: Any, A: Any, q: Affine, low: Affine, high: Affine, row_names: Sequence[str] | None = None
    ) -> None:
        # SciPy's sparse matrices have no types that say what they can do.
        self.P: Any = scipy.sparse.csc_matrix(P, dtype=np.float64)
        self.A: Any = scipy.sparse.csc_matrix(A, dtype=np.float64)
        size, rows = self.P.shape[0], self.A.shape[0]
        require(self.P.shape == (size, size), "P.shape", self.P.shape, "square")
        require(self.A.shape[1] == size, "A.shape", self.A.shape, f"[c, {size}]")
        for name, given, length in (("q", q, size), ("low", low, rows), ("high", high, rows)):
            require(given.constant.shape == (length,), f"{name}.constant.shape", given.constant.shape, f"[{length}]")
            count = q.matrix.shape[1]
            shape = given.matrix.shape
            require(shape == (length, count), f"{name}.matrix.shape", shape, f"[{length}, {count}]")
            if np.isnan(given.constant).any() or not np.isfinite(given.matrix).all():
                raise InputError(f"{name} has entries that are not numbers, but all must be.")
        difference = abs(self.P - self.P.T)
        scale = max(1.0, float(abs(self.P).max()))
        require(difference.max() <= 1e-9 * scale, "P", "not symmetric", "symmetric")
        least = float(np.linalg.eigvalsh(self.P.toarray()).min())
        require(least >= -1e-8 * scale, "P", f"of least eigenvalue {least:.3g}", "positive semidefinite")
        self.q, self.low, self.high = q, low, high
        names = [f"row {i}" for i in range(rows)] if row_names is None else list(row_names)
        require(len(names) == rows, "row_names", f"of {len(names)}", f"of {rows}, one for each row")
        self.row_names = names

    @property
    def size(self) -> int:
        """Number of variables ``n``."""
        return self.P.shape[0]

    @property
    def parameters(self) -> int:
        """Number of parameters ``k``."""
        return self.q.matrix.shape[1]

    def data(self, parameters: Any) -> tuple[Any, Any, Any]:
        """``q``, ``low`` and ``high`` at some parameters."""
        return self.q(parameters), self.low(parameters), self.high(parameters)

    def blame(self, dual: Any, count: int = 3) -> list[str]:
        """The rows that an infeasible program's certificate rests on most, by name."""
        weight = np.abs(np.asarray(dual))
        order = np.argsort(-weight)
        found: list[str] = []
        for index in order:
            if weight[index] <= 1e-3 * max(float(weight[order[0]]), 1e-12) or len(found) == count:
                break
            if self.row_names[index] not in found:
                found.append(self.row_names[index])
        return found


@runtime_checkable
class PreparedQP(Protocol):
    """A family of programs in a solver's memory."""

    def solve(self, parameters: Any, start: Any = None, dual: Any = None) -> QPSolution:
        """Solves the program at some parameters.

        Args:
            parameters: ``[k]``.
            start: a guess of ``z``, for solvers that use one.
            dual: a guess of the multipliers.
        """
        ...


class QPSolver(abc.ABC):
    """The slot that backends fill."""

    @abc.abstractmethod
    def prepare(self, program: ParametricQP) -> PreparedQP:
        """Factorizes and allocates what does not depend on the parameters."""


class OSQP(QPSolver):
    """Operator splitting with OSQP: robust, warm-started, certificates of infeasibility.

    Args:
        tolerance: absolute and relative.
        max_iterations: after which the answer is ``"inaccurate"`` at best.
        polish: whether a solved program's active rows are solved once more exactly.
    """

    def __init__(self, tolerance: float = 1e-6, max_iterations: int = 20_000, polish: bool = True) -> None:
        require_number("tolerance", tolerance, above=0.0)
        require_count("max_iterations", max_iterations)
        self.settings = {
            "eps_abs": tolerance,
            "eps_rel": tolerance,
            "max_iter": max_iterations,
            "polishing": polish,
            "verbose": False,
        }

    def prepare(self, program: ParametricQP) -> PreparedQP:
        return _PreparedOSQP(program, self.settings)


class _PreparedOSQP:
    def __init__(self, program: ParametricQP, settings: dict[str, Any]) -> None:
        import osqp

        self.program = program
        self._solver = osqp.OSQP()
        zero = np.zeros(program.parameters)
        q, low, high = program.data(zero)
        # Bounds may cross at the zero parameters, which the set-up refuses; the first solve replaces them.
        high = np.maximum(low, high)
        upper = scipy.sparse.triu(program.P, format="csc")
        self._solver.setup(upper, q, program.A, low, high, **settings)

    def solve(self, parameters: Any, start: Any = None, dual: Any = None) -> QPSolution:
        q, low, high = self.program.data(np.asarray(parameters, np.float64))
        if np.any(low > high):
            return _crossed(self.program, low, high)
        self._solver.update(q=q, l=low, u=high)
        if start is not None:
            self._solver.warm_start(x=np.asarray(start, np.float64), y=None if dual is None else np.asarray(dual))
        found = self._solver.solve(raise_error=False)
        word = str(found.info.status).lower()
        status = 4
        if word == "solved":
            status = 0
        elif "dual infeasible" in word:
            status = 3
        elif "primal infeasible" in word:
            status = 2
        elif "inaccurate" in word or "maximum iterations" in word:
            status = 1
        multipliers = found.prim_inf_cert if status == 2 else found.y
        return QPSolution(
            np.asarray(found.x),
            np.asarray(multipliers),
            np.int32(status),
            np.int32(found.info.iter),
            np.float64(found.info.run_time),
            np.float64(found.info.obj_val),
        )


def _crossed(program: ParametricQP, low: np.ndarray, high: np.ndarray) -> QPSolution:
    """The answer where a row's own bounds exclude each other."""
    certificate = np.where(low > high, low - high, 0.0)
    nothing = np.full(program.size, np.nan)
    return QPSolution(nothing, certificate, np.int32(2), np.int32(0), np.float64(0.0), np.float64(np.inf))


class PIQP(QPSolver):
    """Interior points with PIQP: few iterations and high accuracy, without warm start.

    Args:
        tolerance: absolute and relative.
        sparse: whether matrices are stored sparse; dense is faster for a few dozen variables.
    """

    def __init__(self, tolerance: float = 1e-8, sparse: bool = True) -> None:
        require_number("tolerance", tolerance, above=0.0)
        self.tolerance, self.sparse = tolerance, sparse

    def prepare(self, program: ParametricQP) -> PreparedQP:
        return _PreparedPIQP(program, self)


class _PreparedPIQP:
    def __init__(self, program: ParametricQP, settings: PIQP) -> None:
        import piqp

        self.program = program
        self._solver: Any = piqp.SparseSolver() if settings.sparse else piqp.DenseSolver()
        self._solver.settings.eps_abs = self._solver.settings.eps_rel = settings.tolerance
        q, low, high = program.data(np.zeros(program.parameters))
        # Rows whose bounds are the same at all parameters are equations, which the solver takes apart.
        same = (program.low.constant == program.high.constant) & np.all(
            program.low.matrix == program.high.matrix, axis=1
        )
        self._equal, self._between = np.flatnonzero(same), np.flatnonzero(~same)
        low, high = low.copy(), np.maximum(low, high)
        shape = (lambda m: m) if settings.sparse else (lambda m: m.toarray())
        self._solver.setup(
            shape(program.P),
            q,
            shape(program.A[self._equal]),
            low[self._equal],
            shape(program.A[self._between]),
            low[self._between],
            high[self._between],
        )

    def solve(self, parameters: Any, start: Any = None, dual: Any = None) -> QPSolution:
        del start, dual
        q, low, high = self.program.data(np.asarray(parameters, np.float64))
        if np.any(low > high):
            return _crossed(self.program, low, high)
        self._solver.update(c=q, b=low[self._equal], h_l=low[self._between], h_u=high[self._between])
        began = time.perf_counter()
        word = str(self._solver.solve()).lower()
        seconds = time.perf_counter() - began
        status = 4
        # Where it runs out of iterations its numbers may be anything.
        for number, text in ((2, "primal_infeasible"), (3, "dual_infeasible"), (4, "max_iter"), (0, "solved")):
            if text in word:
                status = number
                break
        result = self._solver.result
        multipliers = np.zeros(len(self.program.row_names))
        multipliers[self._equal] = result.y
        multipliers[self._between] = np.asarray(result.z_u) - np.asarray(result.z_l)
        return QPSolution(
            np.asarray(result.x),
            multipliers,
            np.int32(status),
            np.int32(result.info.iter),
            np.float64(seconds),
            np.float64(result.info.primal_obj),
        )


class ADMM(QPSolver):
    """OSQP's operator splitting in JAX, for ``jit`` and ``vmap``: one matrix product an iteration.

    The system of each iteration does not depend on the parameters, so its inverse is formed once, in float64. Fixed
    step sizes: where the program is badly scaled it needs many iterations, and the answer is then ``"inaccurate"``.
    Infeasibility shows as a dual that grows without end, along a certificate.

    Args:
        tolerance: absolute and relative; single precision reaches about 1e-5.
        max_iterations: at most.
        rho: step size of inequality rows; equations have a hundred times as much.
        sigma: weight that keeps the system definite.
        relaxation: over-relaxation, in (0, 2).
        check_every: iterations between looks at the residuals.
    """

    def __init__(
        self,
        tolerance: float = 1e-4,
        max_iterations: int = 2_000,
        rho: float = 0.1,
        sigma: float = 1e-6,
        relaxation: float = 1.6,
        check_every: int = 25,
    ) -> None:
        require_number("tolerance", tolerance, above=0.0)
        require_count("max_iterations", max_iterations)
        require_count("check_every", check_every)
        require_number("rho", rho, above=0.0)
        require_number("sigma", sigma, above=0.0)
        require_number("relaxation", relaxation, above=0.0, below=2.0)
        self.tolerance, self.max_iterations, self.check_every = tolerance, max_iterations, check_every
        self.rho, self.sigma, self.relaxation = rho, sigma, relaxation

    def prepare(self, program: ParametricQP) -> PreparedADMM:
        return PreparedADMM.of(program, self)


class PreparedADMM(eqx.Module):
    """A family of programs in matrices that :meth:`solve` multiplies with.

    The rows and the objective are scaled (Ruiz) before, and answers scaled back.

    Attributes:
        inverse: ``(P + sigma I + A' diag(rho) A)^-1`` of the scaled program ``[n, n]``.
        P: scaled ``[n, n]``.
        A: scaled ``[c, n]``.
        rho: of each row ``[c]``.
        columns: scale of the variables ``[n]``.
        rows: scale of the rows ``[c]``.
        cost: scale of the objective.
        vectors: the constants and matrices of ``q``, ``low`` and ``high``.
        settings: ``(tolerance, max_iterations, check_every, sigma, relaxation)``.
    """

    inverse: Float[Array, "n n"]
    P: Float[Array, "n n"]
    A: Float[Array, "c n"]
    rho: Float[Array, " c"]
    columns: Float[Array, " n"]
    rows: Float[Array, " c"]
    cost: Float[Array, ""]
    vectors: tuple[tuple[Array, Array], ...]
    settings: tuple[float, int, int, float, float] = eqx.field(static=True)

    @classmethod
    def of(cls, program: ParametricQP, solver: ADMM) -> PreparedADMM:
        """Scales and inverts, in float64 on the host."""
        P, A = program.P.toarray(), program.A.toarray()
        columns, rows = np.ones(len(P)), np.ones(len(A))
        for _ in range(10):
            scaled, taps = columns[:, None] * P * columns, rows[:, None] * A * columns
            column = np.maximum(np.abs(scaled).max(axis=0), np.abs(taps).max(axis=0, initial=0.0))
            row = np.abs(taps).max(axis=1, initial=0.0)
            columns /= np.sqrt(np.where(column > 0.0, column, 1.0))
            rows /= np.sqrt(np.where(row > 0.0, row, 1.0))
        P, A = columns[:, None] * P * columns, rows[:, None] * A * columns
        size = max(float(np.abs(P).max(axis=0, initial=0.0).mean()), 1e-6)
        P, cost = P / size, 1.0 / size
        equal = (program.low.constant == program.high.constant) & np.all(
            program.low.matrix == program.high.matrix, axis=1
        )
        rho = np.where(equal, 1e2 * solver.rho, solver.rho)
        inverse = np.linalg.inv(P + solver.sigma * np.eye(len(P)) + A.T @ (rho[:, None] * A))
        return cls(
            inverse=jnp.asarray(inverse),
            P=jnp.asarray(P),
            A=jnp.asarray(A),
            rho=jnp.asarray(rho),
            columns=jnp.asarray(columns),
            rows=jnp.asarray(rows),
            cost=jnp.asarray(cost),
            vectors=tuple((jnp.asarray(v[0]), jnp.asarray(v[1])) for v in (program.q, program.low, program.high)),
            settings=(solver.tolerance, solver.max_iterations, solver.check_every, solver.sigma, solver.relaxation),
        )

    def solve(self, parameters: Any, start: Any = None, dual: Any = None) -> QPSolution:
        """As :meth:`PreparedQP.solve`, traceable."""
        tolerance, limit, every, sigma, relaxation = self.settings
        parameters = jnp.asarray(parameters, self.P.dtype)
        q, low, high = (constant + matrix @ parameters for constant, matrix in self.vectors)
        q, low, high = self.cost * self.columns * q, self.rows * low, self.rows * high
        x = jnp.zeros_like(q) if start is None else jnp.asarray(start, q.dtype) / self.columns
        y = jnp.zeros_like(low) if dual is None else self.cost * jnp.asarray(dual, q.dtype) / self.rows
        z = jnp.clip(self.A @ x, low, high)

        def iterate(_: Any, running: tuple) -> tuple:
            x, z, y, _ = running
            right = sigma * x - q + self.A.T @ (self.rho * z - y)
            solved = self.inverse @ right
            image = self.A @ solved
            x = relaxation * solved + (1.0 - relaxation) * x
            mixed = relaxation * image + (1.0 - relaxation) * z
            following = jnp.clip(mixed + y / self.rho, low, high)
            step = self.rho * (mixed - following)
            return x, following, y + step, step

        def residuals(x: Array, z: Array, y: Array) -> Array:
            image, slope, pull = self.A @ x, self.P @ x, self.A.T @ y
            primal = jnp.max(jnp.abs(image - z) / self.rows, initial=0.0)
            primal_size = jnp.maximum(jnp.max(jnp.abs(image / self.rows)), jnp.max(jnp.abs(z / self.rows)))
            dual = jnp.max(jnp.abs((slope + q + pull) / self.columns)) / self.cost
            parts = [jnp.max(jnp.abs(part / self.columns)) for part in (slope, q, pull)]
            dual_size = jnp.max(jnp.stack(parts)) / self.cost
            return (primal <= tolerance * (1.0 + primal_size)) & (dual <= tolerance * (1.0 + dual_size))

        def infeasible(step: Array) -> Array:
            size = jnp.max(jnp.abs(step), initial=0.0)
            direction = step / jnp.maximum(size, 1e-12)
            support = jnp.where(direction > 0.0, high, 0.0) * jnp.maximum(direction, 0.0)
            support += jnp.where(direction < 0.0, low, 0.0) * jnp.minimum(direction, 0.0)
            total = jnp.sum(jnp.where(direction == 0.0, 0.0, support))
            flat = jnp.max(jnp.abs(self.A.T @ direction)) <= tolerance
            return (size > tolerance) & flat & (total < -tolerance)

        def block(running: tuple) -> tuple:
            count, state, _, _ = running
            state = jax.lax.fori_loop(0, every, iterate, state)
            x, z, y, step = state
            return count + every, state, residuals(x, z, y), infeasible(step)

        def going(running: tuple) -> Array:
            count, _, done, impossible = running
            return (count < limit) & ~done & ~impossible

        nothing = jnp.asarray(False)
        begin = (jnp.zeros((), jnp.int32), (x, z, y, jnp.zeros_like(y)), nothing, nothing)
        count, (x, _, y, step), done, impossible = jax.lax.while_loop(going, block, begin)
        impossible = impossible | jnp.any(low > high)
        status = jnp.where(impossible, 2, jnp.where(done, 0, 1)).astype(jnp.int32)
        found = self.columns * x
        multipliers = self.rows * jnp.where(impossible, step, y) / self.cost
        objective = (0.5 * x @ (self.P @ x) + q @ x) / self.cost
        return QPSolution(found, multipliers, status, count, jnp.full((), jnp.nan), objective)
