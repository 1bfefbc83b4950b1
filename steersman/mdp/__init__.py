"""Explicit Markov decision processes, and exact and sample-based solvers for them."""

from steersman.mdp.evaluation import (
    OptimalSolution,
    advantage,
    expected_return,
    occupancy,
    performance_difference,
    policy_evaluation,
    policy_gradient,
    policy_transition,
    value_iteration,
)
from steersman.mdp.model import MDP, TabularEnvironment, garnet, random_mdp
from steersman.mdp.monotone_improvement import (
    ImprovementBound,
    MonotoneImprovement,
    improvement_bound,
    kl_ball_maximizer,
    penalized_maximizer,
)

__all__ = [
    "MDP",
    "ImprovementBound",
    "MonotoneImprovement",
    "OptimalSolution",
    "TabularEnvironment",
    "advantage",
    "expected_return",
    "garnet",
    "improvement_bound",
    "kl_ball_maximizer",
    "occupancy",
    "penalized_maximizer",
    "performance_difference",
    "policy_evaluation",
    "policy_gradient",
    "policy_transition",
    "random_mdp",
    "value_iteration",
]
