"""Controllers from a model: regulators, planners and motion policies."""

from steersman.control.conic_programs import ConicProgram, ConicSolution
from steersman.control.lqg import (
    KalmanFilter,
    LinearController,
    LQGSolution,
    controller_cost,
    kalman_filter,
    least_cost,
    lqg,
)
from steersman.control.lqr import FiniteHorizonLQR, LQRSolution, clqr, discretize, finite_horizon_lqr, lqr
from steersman.control.planning import Lookahead, Plan, Planner, PlannerPolicy, PlanningModel, ProblemModel, look_ahead
from steersman.control.quadratic_programs import ADMM, OSQP, PIQP, STATUSES, Affine, ParametricQP, QPSolution, QPSolver
from steersman.control.sampling import SamplingPlanner
from steersman.control.search import (
    CrossEntropy,
    ImprovedCrossEntropy,
    PathIntegral,
    PredictiveSampling,
    RandomShooting,
    Search,
    SearchRule,
    coloured_noise,
)
from steersman.control.splines import Spline

__all__ = [
    "ADMM",
    "OSQP",
    "PIQP",
    "STATUSES",
    "Affine",
    "ConicProgram",
    "ConicSolution",
    "CrossEntropy",
    "FiniteHorizonLQR",
    "ImprovedCrossEntropy",
    "KalmanFilter",
    "LQGSolution",
    "LQRSolution",
    "LinearController",
    "Lookahead",
    "ParametricQP",
    "PathIntegral",
    "Plan",
    "Planner",
    "PlannerPolicy",
    "PlanningModel",
    "PredictiveSampling",
    "ProblemModel",
    "QPSolution",
    "QPSolver",
    "RandomShooting",
    "SamplingPlanner",
    "Search",
    "SearchRule",
    "Spline",
    "clqr",
    "coloured_noise",
    "controller_cost",
    "discretize",
    "finite_horizon_lqr",
    "kalman_filter",
    "least_cost",
    "look_ahead",
    "lqg",
    "lqr",
]
