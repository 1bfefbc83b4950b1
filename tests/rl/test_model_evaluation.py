"""Evaluation in a model on a chain worked out by hand, and the sequence of a gate's decisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.rl.model_evaluation import ImprovementGate, ModelRolloutValue
from steersman.training.dynamics_model import Prediction, TransitionModel


class Chain(TransitionModel):
    """States 0, 1, 2: each step goes one to the right; the step into 2 ends the task."""

    def __call__(self, observation, action, key):
        following = jnp.minimum(observation + 1.0, 2.0)
        return Prediction(following, jnp.zeros(observation.shape[:-1]), (following[..., 0] >= 2.0).astype(jnp.float32))


def act(observation, carry, key):
    return 10.0 * observation, carry + 1


def action_value(observation, action):
    # Q(0, .) = 5, Q(1, .) = 7, Q(2, .) = 100, plus the action.
    return jnp.asarray([5.0, 7.0, 100.0])[observation[..., 0].astype(int)] + action[..., 0]


@pytest.mark.parametrize(
    ("horizon", "survival", "expected"),
    [
        (1, True, [5.0, 17.0]),
        (2, True, [5.0 + 17.0, 17.0]),
        (4, True, [5.0 + 17.0, 17.0]),  # the end contributes nothing
        (3, False, [5.0 + 17.0 + 120.0, 17.0 + 120.0 + 120.0]),
    ],
)
def test_sums_of_action_values_along_a_known_chain(horizon, survival, expected):
    evaluation = ModelRolloutValue(horizon, survival)
    starts = jnp.asarray([[0.0], [1.0]])
    found = evaluation(Chain(), act, action_value, starts, jax.random.key(0), jnp.zeros((), jnp.int32))
    np.testing.assert_allclose(found, expected)


def test_a_gate_accepts_only_what_is_better_by_its_margin():
    gate = ImprovementGate(0.05)
    last = gate.init({"w": jnp.asarray(0.0)}, 10.0)
    seen = []
    for number, value in enumerate((10.4, 10.5, 11.0, 11.03, float("nan")), start=1):
        last, good = gate(last, {"w": jnp.asarray(float(number))}, value)
        seen.append((bool(good), float(last.kept["w"])))
    assert seen == [(False, 0.0), (True, 2.0), (False, 2.0), (True, 4.0), (False, 4.0)]
    assert float(last.value) == pytest.approx(11.03)
    assert (int(last.accepted), int(last.judged)) == (2, 5)


def test_the_margin_of_a_negative_value_is_upwards_too():
    gate = ImprovementGate(0.05)
    last = gate.init(jnp.zeros(2), -2.0)
    assert not bool(gate(last, jnp.ones(2), -1.91)[1])
    assert bool(gate(last, jnp.ones(2), -1.9)[1])


def test_bad_input():
    with pytest.raises(InputError, match="margin is -0"):
        ImprovementGate(-0.1)
    with pytest.raises(InputError, match="horizon is 0"):
        ModelRolloutValue(0)
