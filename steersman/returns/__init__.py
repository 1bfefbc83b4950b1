"""Returns, advantages and value targets: array functions on time-major rollouts."""

from steersman.returns.advantages import discounted_return, gae, lambda_return, n_step_return, td_error
from steersman.returns.standardization import standardize
from steersman.returns.time_major import backward_sum
from steersman.returns.vtrace import vtrace

__all__ = [
    "backward_sum",
    "discounted_return",
    "gae",
    "lambda_return",
    "n_step_return",
    "standardize",
    "td_error",
    "vtrace",
]
