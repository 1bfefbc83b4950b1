"""Problems: environments, dynamics with costs, and bridges to the field's simulators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from steersman.envs.bandit import Bandit, BanditTable, ContextualBandit
from steersman.envs.chunked import ChunkedEnvironment
from steersman.envs.control_problem import (
    ContinuousTimeProblem,
    ControlEnvironment,
    ControlProblem,
    rollout,
    trajectory_cost,
)
from steersman.envs.dynamics import (
    CartPoleBalance,
    CartPoleSwingUp,
    DiscreteCartPole,
    DoubleIntegrator,
    Pendulum,
    PlanarQuadrotor,
)
from steersman.envs.environment import Environment, Problem, as_problem
from steersman.envs.hidden_velocity import HiddenVelocity
from steersman.envs.linear_gaussian import LinearGaussianProblem
from steersman.envs.lot_sizing import LotSizing, lumpy_lot_sizing
from steersman.envs.planar import (
    DetourReach,
    Discs,
    DriftingGoal,
    Gate,
    HiddenTarget,
    ObstacleGate,
    TwoWalls,
    best_gaussian,
    hidden_target_success,
    hidden_target_value,
)
from steersman.envs.post_decision import DeclaredPostDecision, PostDecisionEnvironment, check_post_decision

if TYPE_CHECKING:
    from steersman.envs.brax_bridge import BraxEnvironment
    from steersman.envs.checker import check
    from steersman.envs.gymnasium_bridge import GymnasiumProblem
    from steersman.envs.registry import make, names, register
    from steersman.envs.rendering import Scene, animate, animate_frames, mujoco_scene, register_scene, render_episode

# What is not needed to train on a problem at hand, or needs a library that takes long to load.
_ON_FIRST_USE = {
    "BraxEnvironment": "brax_bridge",
    "GymnasiumProblem": "gymnasium_bridge",
    "Scene": "rendering",
    "animate": "rendering",
    "animate_frames": "rendering",
    "check": "checker",
    "make": "registry",
    "mujoco_scene": "rendering",
    "names": "registry",
    "register": "registry",
    "register_scene": "rendering",
    "render_episode": "rendering",
}

__all__ = [
    "Bandit",
    "BanditTable",
    "BraxEnvironment",
    "CartPoleBalance",
    "CartPoleSwingUp",
    "ChunkedEnvironment",
    "ContextualBandit",
    "ContinuousTimeProblem",
    "ControlEnvironment",
    "ControlProblem",
    "DeclaredPostDecision",
    "DetourReach",
    "DiscreteCartPole",
    "Discs",
    "DoubleIntegrator",
    "DriftingGoal",
    "Environment",
    "Gate",
    "GymnasiumProblem",
    "HiddenTarget",
    "HiddenVelocity",
    "LinearGaussianProblem",
    "LotSizing",
    "ObstacleGate",
    "Pendulum",
    "PlanarQuadrotor",
    "PostDecisionEnvironment",
    "Problem",
    "Scene",
    "TwoWalls",
    "animate",
    "animate_frames",
    "as_problem",
    "best_gaussian",
    "check",
    "check_post_decision",
    "hidden_target_success",
    "hidden_target_value",
    "lumpy_lot_sizing",
    "make",
    "mujoco_scene",
    "names",
    "register",
    "register_scene",
    "render_episode",
    "rollout",
    "trajectory_cost",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(f"steersman.envs.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module 'steersman.envs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
