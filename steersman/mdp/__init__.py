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
from steersman.mdp.policy_gradients import (
    Ascent,
    monotone_step_size,
    natural_gradient_bound,
    natural_policy_gradient,
    softmax_policy_gradient,
)
from steersman.mdp.post_decision import PostDecisionTables, post_decision_tables

__all__ = [
    "MDP",
    "Ascent",
    "ImprovementBound",
    "MonotoneImprovement",
    "OptimalSolution",
    "PostDecisionTables",
    "TabularEnvironment",
    "advantage",
    "expected_return",
    "garnet",
    "improvement_bound",
    "kl_ball_maximizer",
    "monotone_step_size",
    "natural_gradient_bound",
    "natural_policy_gradient",
    "occupancy",
    "penalized_maximizer",
    "performance_difference",
    "policy_evaluation",
    "policy_gradient",
    "policy_transition",
    "post_decision_tables",
    "random_mdp",
    "softmax_policy_gradient",
    "value_iteration",
]
