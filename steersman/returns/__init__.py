"""Returns, advantages and value targets: array functions on time-major rollouts."""

from steersman.returns.advantages import discounted_return, gae, lambda_return, n_step_return, td_error
from steersman.returns.gpomdp import (
    BASELINES,
    cumulative_scores,
    cumulative_weights,
    discount_from_start,
    episode_return,
    gpomdp_gradient,
    gpomdp_objective,
    optimal_baseline,
    reward_to_go,
    time_baseline,
)
from steersman.returns.half_step import HalfStepEstimate, half_step_gae
from steersman.returns.standardization import standardize
from steersman.returns.time_major import backward_sum
from steersman.returns.vtrace import vtrace

__all__ = [
    "BASELINES",
    "HalfStepEstimate",
    "backward_sum",
    "cumulative_scores",
    "cumulative_weights",
    "discount_from_start",
    "discounted_return",
    "episode_return",
    "gae",
    "gpomdp_gradient",
    "gpomdp_objective",
    "half_step_gae",
    "lambda_return",
    "n_step_return",
    "optimal_baseline",
    "reward_to_go",
    "standardize",
    "td_error",
    "time_baseline",
    "vtrace",
]
