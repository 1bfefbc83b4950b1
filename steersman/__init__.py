"""Steersman: policy optimization and control, one protocol, measured against its baselines.

A policy maps what has been observed to an action. Everything here makes, improves, combines, speeds up,
constrains or judges a policy. Rooms load on first use, so that ``import steersman`` itself stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from steersman import control, envs, mdp, networks, objectives, policies, returns, rl, studies, training
    from steersman.catalog import cite, systems
    from steersman.training import compare, evaluate, train

_ROOMS = ("control", "envs", "mdp", "networks", "objectives", "policies", "returns", "rl", "studies", "training")
_NAMES = {
    "cite": "steersman.catalog",
    "systems": "steersman.catalog",
    "compare": "steersman.training",
    "evaluate": "steersman.training",
    "train": "steersman.training",
}

__all__ = [
    "__version__",
    "cite",
    "compare",
    "control",
    "envs",
    "evaluate",
    "mdp",
    "networks",
    "objectives",
    "policies",
    "returns",
    "rl",
    "studies",
    "systems",
    "train",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"steersman.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'steersman' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
