"""Convex programs whose data are affine in a few parameters: written in CVXPY, compiled once, solved repeatedly."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman.control.quadratic_programs import HostAnswer
from steersman.errors import InputError, require, require_number

_STATUS = {"optimal": 0, "optimal_inaccurate": 1, "infeasible": 2, "infeasible_inaccurate": 2, "unbounded": 3}


@dataclasses.dataclass(frozen=True, eq=False)
class ConicSolution(HostAnswer):
    """A solver's answer.

    Attributes:
        variables: by name; empty where there is no solution.
        duals: multipliers of the named constraints.
        status: index into :data:`~steersman.control.quadratic_programs.STATUSES`.
        objective: its value; infinite where infeasible.
        seconds: of compilation, solver and all between, measured outside.
        solver_seconds: of the solver by itself.
        iterations: of the solver.
    """

    variables: dict[str, np.ndarray]
    duals: dict[str, Any]
    status: int
    objective: float
    seconds: float
    solver_seconds: float
    iterations: int


class ConicProgram:
    """A CVXPY problem with named parameters and variables.

    Write it so that it is affine in its parameters ("DPP"): constant matrices times parameters, never parameters inside
    ``quad_form``. Then only the first solve compiles it.

    Args:
        problem: a ``cvxpy.Problem`` whose parameters and variables have names.
        constraints: constraints by name, whose multipliers are wanted.
        solver: a CVXPY solver's name.
        options: given to that solver.

    Raises:
        InputError: the problem is not convex, or not affine in its parameters.
    """

    def __init__(
        self, problem: Any, constraints: Mapping[str, Any] | None = None, *, solver: str = "CLARABEL", **options: Any
    ) -> None:
        if not problem.is_dcp():
            raise InputError("problem is not convex by CVXPY's rules, but it must be.")
        if not problem.is_dcp(dpp=True):
            raise InputError(
                "problem is not affine in its parameters by CVXPY's rules (DPP), so that it would be compiled again at "
                "each solve: multiply parameters with constants only, and put residuals inside sum_squares."
            )
        self.problem, self.solver, self.options = problem, solver, options
        self._parameters = {parameter.name(): parameter for parameter in problem.parameters()}
        self._variables = {variable.name(): variable for variable in problem.variables()}
        self._constraints = dict(constraints or {})

    def solve(self, **parameters: Any) -> ConicSolution:
        """Solves the program.

        Args:
            **parameters: all of them, by name.

        Raises:
            InputError: a name is missing or unknown, a shape is wrong, or a value is not finite.
        """
        import cvxpy

        unknown, missing = set(parameters) - set(self._parameters), set(self._parameters) - set(parameters)
        require(not unknown, "parameters", sorted(unknown), f"among {sorted(self._parameters)}")
        require(not missing, "parameters", sorted(parameters), f"complete; missing are {sorted(missing)}")
        for name, value in parameters.items():
            require_number(name, value)
            value, wanted = np.asarray(value, np.float64), self._parameters[name].shape
            require(value.shape == wanted, f"{name}.shape", value.shape, f"{wanted}")
            self._parameters[name].value = value
        began = time.perf_counter()
        try:
            self.problem.solve(solver=self.solver, enforce_dpp=True, **self.options)
            word = self.problem.status
        except cvxpy.SolverError:
            word = "failed"
        seconds = time.perf_counter() - began
        status = _STATUS.get(word, 4)
        stats = self.problem.solver_stats if word != "failed" else None
        solved = status <= 1
        return ConicSolution(
            {name: np.asarray(variable.value) for name, variable in self._variables.items()} if solved else {},
            {name: constraint.dual_value for name, constraint in self._constraints.items()} if solved else {},
            status,
            float(self.problem.value) if word != "failed" and self.problem.value is not None else float("nan"),
            seconds,
            float(getattr(stats, "solve_time", None) or float("nan")),
            int(getattr(stats, "num_iters", None) or 0),
        )
