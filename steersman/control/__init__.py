"""Controllers from a model: regulators, planners and motion policies."""

from steersman.control.conic_programs import ConicProgram, ConicSolution
from steersman.control.gradient_planning import GradientPlanner, PolicyProposals, Refined
from steersman.control.harmonics import Harmonic, HarmonicPlant
from steersman.control.hmpc import HMPC, HMPCAnswer, HMPCMemory
from steersman.control.host_solves import HostController, check_fallback, fall_back, on_host, solve_qp
from steersman.control.ilqr import ILQR, Trajectory, box_minimum
from steersman.control.learned_locally_linear import LearnedLocallyLinear, LocalPolicy, LocalState, response_gradient
from steersman.control.linear_mpc import LinearMPC, LinearMPCPolicy, MPCAnswer, MPCMemory
from steersman.control.local_models import (
    Estimator,
    LeastSquares,
    LocalGains,
    LocalModels,
    MarkovParameters,
    Moments,
    Response,
    local_gains,
    perturbed_response,
)
from steersman.control.locally_linear_planner import LocallyLinearPlanner
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
from steersman.control.periodic_mpct import PeriodicAnswer, PeriodicMPCT
from steersman.control.planning import Lookahead, Plan, Planner, PlannerPolicy, PlanningModel, ProblemModel, look_ahead
from steersman.control.quadratic_programs import ADMM, OSQP, PIQP, STATUSES, Affine, ParametricQP, QPSolution, QPSolver
from steersman.control.rollout_oracles import ProblemOracle, RolloutOracle, Rollouts
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
from steersman.control.stochastic_mpc import StochasticAnswer, StochasticMPC
from steersman.control.tightening import BoundedNoise, ResetSchedule, Tightening
from steersman.control.trajectory_feedback import TrajectoryFeedback
from steersman.control.transition_planning import Imagined, TransitionPlanningModel

__all__ = [
    "ADMM",
    "HMPC",
    "ILQR",
    "OSQP",
    "PIQP",
    "STATUSES",
    "Affine",
    "BoundedNoise",
    "ConicProgram",
    "ConicSolution",
    "CrossEntropy",
    "Estimator",
    "FiniteHorizonLQR",
    "GradientPlanner",
    "HMPCAnswer",
    "HMPCMemory",
    "Harmonic",
    "HarmonicPlant",
    "HostController",
    "Imagined",
    "ImprovedCrossEntropy",
    "KalmanFilter",
    "LQGSolution",
    "LQRSolution",
    "LearnedLocallyLinear",
    "LeastSquares",
    "LinearController",
    "LinearMPC",
    "LinearMPCPolicy",
    "LocalGains",
    "LocalModels",
    "LocalPolicy",
    "LocalState",
    "LocallyLinearPlanner",
    "Lookahead",
    "MPCAnswer",
    "MPCMemory",
    "MarkovParameters",
    "Moments",
    "ParametricQP",
    "PathIntegral",
    "PeriodicAnswer",
    "PeriodicMPCT",
    "Plan",
    "Planner",
    "PlannerPolicy",
    "PlanningModel",
    "PolicyProposals",
    "PredictiveSampling",
    "ProblemModel",
    "ProblemOracle",
    "QPSolution",
    "QPSolver",
    "RandomShooting",
    "Refined",
    "ResetSchedule",
    "Response",
    "RolloutOracle",
    "Rollouts",
    "SamplingPlanner",
    "Search",
    "SearchRule",
    "Spline",
    "StochasticAnswer",
    "StochasticMPC",
    "Tightening",
    "Trajectory",
    "TrajectoryFeedback",
    "TransitionPlanningModel",
    "box_minimum",
    "check_fallback",
    "clqr",
    "coloured_noise",
    "controller_cost",
    "discretize",
    "fall_back",
    "finite_horizon_lqr",
    "kalman_filter",
    "least_cost",
    "local_gains",
    "look_ahead",
    "lqg",
    "lqr",
    "on_host",
    "perturbed_response",
    "response_gradient",
    "solve_qp",
]
