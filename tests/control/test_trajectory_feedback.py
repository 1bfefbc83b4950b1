"""Feedback around a trajectory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control.trajectory_feedback import TrajectoryFeedback
from steersman.errors import InputError


def test_each_step_has_its_gain_and_the_last_control_is_held() -> None:
    policy = TrajectoryFeedback(np.array([[1.0], [2.0]]), np.zeros((3, 2)), np.array([[[1.0, 0.0]], [[0.0, 3.0]]]))
    key, carry, seen = jax.random.key(0), policy.init(jax.random.key(0)), []
    for _ in range(4):
        action, carry = policy(jnp.array([10.0, 1.0]), carry, key)
        seen.append(float(action[0]))
    # 1 - 10, 2 - 3, and then 2 without feedback.
    assert seen == [-9.0, -1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("controls", "states", "gains", "message"),
    [
        ((2,), (2, 2), (2, 1, 2), "controls' shape"),
        ((2, 1), (2, 2), (2, 2, 2), "gains' shape"),
        ((2, 1), (4, 2), (2, 1, 2), "states' shape"),
    ],
)
def test_bad_input_is_named(controls, states, gains, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrajectoryFeedback(np.zeros(controls), np.zeros(states), np.zeros(gains))
