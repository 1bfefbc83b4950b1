"""Problems: environments, dynamics with costs, and bridges to the field's simulators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

from steersman.envs.bandit import Bandit, BanditTable, ContextualBandit
from steersman.envs.chunk_data import ChunkData, ChunkPairs, EpisodeChunks, ObservationData, Observations
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
    from steersman.envs.chunk_transitions import ChunkTransitions
    from steersman.envs.demonstrations import Demonstrations, Episode
    from steersman.envs.expert_recording import play_expert, record_expert
    from steersman.envs.gymnasium_bridge import GymnasiumProblem
    from steersman.envs.lerobot_datasets import read_lerobot_dataset, write_lerobot_dataset
    from steersman.envs.minari_datasets import read_minari, write_minari
    from steersman.envs.pusht import PushTExpert, make_push_t
    from steersman.envs.registry import make, names, register
    from steersman.envs.rendering import Scene, animate, animate_frames, mujoco_scene, register_scene, render_episode
    from steersman.envs.scripted_experts import demonstrate, demonstrated_tasks, register_expert
    from steersman.envs.tabletop import PickAndPlace, PickAndPlaceExpert, make_pick_and_place

# What is not needed to train on a problem at hand, or needs a library that takes long to load.
_ON_FIRST_USE = {
    "ChunkTransitions": "chunk_transitions",
    "Demonstrations": "demonstrations",
    "Episode": "demonstrations",
    "PickAndPlace": "tabletop",
    "PickAndPlaceExpert": "tabletop",
    "PushTExpert": "pusht",
    "demonstrate": "scripted_experts",
    "demonstrated_tasks": "scripted_experts",
    "make_pick_and_place": "tabletop",
    "make_push_t": "pusht",
    "play_expert": "expert_recording",
    "read_lerobot_dataset": "lerobot_datasets",
    "read_minari": "minari_datasets",
    "record_expert": "expert_recording",
    "register_expert": "scripted_experts",
    "write_lerobot_dataset": "lerobot_datasets",
    "write_minari": "minari_datasets",
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

gymnasium.register("steersman/PickAndPlace-v0", "steersman.envs.tabletop:PickAndPlace", max_episode_steps=100)

__all__ = [
    "Bandit",
    "BanditTable",
    "BraxEnvironment",
    "CartPoleBalance",
    "CartPoleSwingUp",
    "ChunkData",
    "ChunkPairs",
    "ChunkTransitions",
    "ChunkedEnvironment",
    "ContextualBandit",
    "ContinuousTimeProblem",
    "ControlEnvironment",
    "ControlProblem",
    "DeclaredPostDecision",
    "Demonstrations",
    "DetourReach",
    "DiscreteCartPole",
    "Discs",
    "DoubleIntegrator",
    "DriftingGoal",
    "Environment",
    "Episode",
    "EpisodeChunks",
    "Gate",
    "GymnasiumProblem",
    "HiddenTarget",
    "HiddenVelocity",
    "LinearGaussianProblem",
    "LotSizing",
    "ObservationData",
    "Observations",
    "ObstacleGate",
    "Pendulum",
    "PickAndPlace",
    "PickAndPlaceExpert",
    "PlanarQuadrotor",
    "PostDecisionEnvironment",
    "Problem",
    "PushTExpert",
    "Scene",
    "TwoWalls",
    "animate",
    "animate_frames",
    "as_problem",
    "best_gaussian",
    "check",
    "check_post_decision",
    "demonstrate",
    "demonstrated_tasks",
    "hidden_target_success",
    "hidden_target_value",
    "lumpy_lot_sizing",
    "make",
    "make_pick_and_place",
    "make_push_t",
    "mujoco_scene",
    "names",
    "play_expert",
    "read_lerobot_dataset",
    "read_minari",
    "record_expert",
    "register",
    "register_expert",
    "register_scene",
    "render_episode",
    "rollout",
    "trajectory_cost",
    "write_lerobot_dataset",
    "write_minari",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(f"steersman.envs.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module 'steersman.envs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
