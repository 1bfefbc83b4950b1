"""Controllers from a model: regulators, planners and motion policies."""

from steersman.control.lqr import FiniteHorizonLQR, LQRSolution, clqr, discretize, finite_horizon_lqr, lqr

__all__ = ["FiniteHorizonLQR", "LQRSolution", "clqr", "discretize", "finite_horizon_lqr", "lqr"]
