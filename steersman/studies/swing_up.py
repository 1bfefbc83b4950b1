"""The pendulum swing-up on which the on-policy studies compare surrogates."""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.envs import Problem
from steersman.envs.dynamics import Pendulum
from steersman.training import Trained

#: Sixteen environments, iterations of 2,048 steps; discount and trace both 0.95, rewards times 0.1.
SETTINGS: dict[str, Any] = {
    "num_envs": 16,
    "num_steps": 128,
    "gamma": 0.95,
    "lam": 0.95,
    "reward_scale": 0.1,
    "initial_log_std": -0.5,
    "max_gradient_norm": 0.5,
}


def swing_up() -> Problem:
    """Gymnasium's Pendulum-v1, natively: torque of at most 2 N m, episodes cut after 200 steps of 0.05 s."""
    return Problem(Pendulum().environment())


def final_returns(trained: Trained, samples: int = 5 * 2048) -> np.ndarray:
    """Mean undiscounted return ``[M]`` of the training episodes that ended within the last `samples` steps."""
    recent = trained.samples > trained.samples[-1] - samples
    counts = trained.metrics["episodes"][recent]
    totals = np.nan_to_num(trained.returns[recent]) * counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals.sum(axis=0) / counts.sum(axis=0)
