"""Controllers from a model: regulators, planners and motion policies."""

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

__all__ = [
    "FiniteHorizonLQR",
    "KalmanFilter",
    "LQGSolution",
    "LQRSolution",
    "LinearController",
    "clqr",
    "controller_cost",
    "discretize",
    "finite_horizon_lqr",
    "kalman_filter",
    "least_cost",
    "lqg",
    "lqr",
]
