"""Transition models as planners' models, against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control import look_ahead
from steersman.control.transition_planning import TransitionPlanningModel
from steersman.errors import InputError
from steersman.training.dynamics_model import LinearQuadraticModel, Prediction, TransitionModel


class Decaying(TransitionModel):
    """``x' = x + u + noise``, ``r = x``, and the task ends with a fixed probability; believed within [-1, 1]."""

    ends: float = 0.0
    noise: float = 0.0

    def __call__(self, observation, action, key):
        drawn = self.noise * jax.random.normal(key, observation.shape)
        reward = jnp.sum(observation, axis=-1)
        return Prediction(observation + action + drawn, reward, jnp.full_like(reward, self.ends))

    def limits(self):
        return -jnp.ones(1), jnp.ones(1)


def test_costs_are_those_of_the_linear_quadratic_model() -> None:
    generator = np.random.default_rng(0)
    A, B = 0.5 * generator.normal(size=(3, 3)), generator.normal(size=(3, 2))
    Q, R = np.diag([1.0, 2.0, 0.5]), np.diag([0.1, 0.3])
    model = TransitionPlanningModel(LinearQuadraticModel.from_costs(A, B, Q, R), 3, -np.ones(2), np.ones(2))
    controls = generator.uniform(-1.0, 1.0, (5, 2))
    x, expected = np.array([1.0, -1.0, 0.5]), 0.0
    seen = look_ahead(model, model.start(jnp.asarray(x)), jnp.asarray(controls))
    for u in controls:
        expected += x @ Q @ x + u @ R @ u
        x = A @ x + B @ u
    np.testing.assert_allclose(seen.cost, expected, rtol=1e-5)
    np.testing.assert_allclose(seen.last.observation, x, rtol=1e-4, atol=1e-5)


def test_what_comes_after_an_end_earns_nothing() -> None:
    model = TransitionPlanningModel(Decaying(ends=0.25), 1, [-0.5], [0.5], value=lambda x: 10.0 * x[0])
    # States 0.2, 0.7, then 1.2, which is brought back to 1.
    seen = look_ahead(model, model.start(jnp.array([0.2])), jnp.full((2, 1), 0.5))
    np.testing.assert_allclose(seen.cost, -(0.2 + 0.75 * 0.7 + 0.75**2 * 10.0), rtol=1e-6)


def test_a_known_reward_takes_the_models_place() -> None:
    model = TransitionPlanningModel(Decaying(), 1, [-0.5], [0.5], reward=lambda x, u, y: (100 * x + 10 * u + y)[0])
    cost = model.step(model.start(jnp.array([0.2])), jnp.array([0.3]))[1]
    np.testing.assert_allclose(cost, -(20.0 + 3.0 + 0.5), rtol=1e-6)


def test_a_model_that_draws_draws_the_same_in_every_plan() -> None:
    controls, start = jnp.zeros((4, 1)), jnp.zeros(1)

    def cost(seed: int) -> float:
        model = TransitionPlanningModel(Decaying(noise=0.1), 1, [-1.0], [1.0], seed=seed)
        seen = look_ahead(model, model.start(start), controls)
        # Steps draw apart from each other.
        assert len(np.unique(np.diff(np.asarray(seen.states.observation)[:, 0]))) == 3
        return float(seen.cost)

    assert cost(0) == cost(0)
    assert cost(0) != cost(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TransitionPlanningModel(Decaying(), 0, [-1.0], [1.0]), InputError, "observation_size is 0"),
        (lambda: TransitionPlanningModel(Decaying(), 1, [-1.0], [1.0, 1.0]), InputError, "high is"),
        (lambda: TransitionPlanningModel(Decaying(), 1, [1.0], [1.0]), InputError, "low and high is"),
        (lambda: TransitionPlanningModel(Decaying(), 1, [float("nan")], [1.0]), InputError, "low and high is"),
        (
            lambda: TransitionPlanningModel(Decaying(), 1, [-1.0], [1.0]).start(jnp.zeros(2)),
            InputError,
            r"observation\.shape is \(2,\)",
        ),
    ],
)
def test_bad_input_is_named(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
