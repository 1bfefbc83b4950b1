"""Transition models, known or learned, as what planners look ahead with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steersman.control.planning import PlanningModel
from steersman.errors import InputTypeError, require, require_count
from steersman.training.dynamics_model import TransitionModel


def _bounds(value: Any) -> tuple[float, ...]:
    return tuple(float(bound) for bound in np.atleast_1d(np.asarray(value, float)))


class Imagined(NamedTuple):
    """Where a plan has come to.

    Attributes:
        observation: predicted ``[n]``.
        alive: probability that the task has not ended before.
        steps: taken since the start.
    """

    observation: Float[Array, " n"]
    alive: Float[Array, ""]
    steps: Int[Array, ""]


class TransitionPlanningModel(PlanningModel):
    """A model of transitions as a planner's model: ``cost = -alive reward``, and ``-alive V`` after the horizon.

    Predictions are brought back into the box within which the model is to be believed, as in
    :func:`~steersman.training.dynamics_model.rollout_model`. A model that draws its outcomes draws the same ones in
    every plan, so that plans are compared under equal luck and the cost is a smooth function of the controls. Costs
    that are not finite stay so: planners drop such candidates.

    Attributes:
        model: predicts next observation, reward and termination.
        observation_size: numbers in an observation.
        low: least control ``[m]``.
        high: greatest ``[m]``.
        reward: ``(observation, action, next observation) -> reward``, where it is known and only the dynamics are
            learned; the model's own where None.
        value: of an observation at the horizon's end, as a critic gives it; none where None.
        seed: of the outcomes' draws.
    """

    model: TransitionModel
    observation_size: int = eqx.field(static=True)
    low: tuple[float, ...] = eqx.field(static=True, converter=_bounds)
    high: tuple[float, ...] = eqx.field(static=True, converter=_bounds)
    reward: Callable[[Array, Array, Array], Array] | None = None
    value: Callable[[Array], Array] | None = None
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        if not isinstance(self.model, TransitionModel):
            raise InputTypeError(f"model is a {type(self.model).__name__}, but it must be a TransitionModel.")
        require_count("observation_size", self.observation_size)
        require(len(self.low) == len(self.high), "high", self.high, f"of {len(self.low)} numbers, as low")
        ordered = all(low < high for low, high in zip(self.low, self.high, strict=True))
        require(ordered, "low and high", (self.low, self.high), "low < high in each control")

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.low), np.asarray(self.high)

    def start(self, observation: Float[Array, " n"]) -> Imagined:
        require(
            observation.shape == (self.observation_size,),
            "observation.shape",
            observation.shape,
            f"({self.observation_size},), as the model's",
        )
        return Imagined(observation, jnp.ones((), observation.dtype), jnp.zeros((), jnp.int32))

    def step(self, state: Imagined, u: Float[Array, " m"]) -> tuple[Imagined, Float[Array, ""]]:
        key = jax.random.fold_in(jax.random.key(self.seed), state.steps)
        predicted = self.model(state.observation, u, key)
        following, limits = predicted.next_observation, self.model.limits()
        if limits is not None:
            following = jnp.clip(following, *limits)
        alive = state.alive * (1.0 - predicted.terminated)
        moved = Imagined(following.astype(state.observation.dtype), alive.astype(state.alive.dtype), state.steps + 1)
        known = self.reward
        reward = predicted.reward if known is None else known(state.observation, u, moved.observation)
        return moved, -state.alive * reward

    def terminal_cost(self, state: Imagined) -> Float[Array, ""]:
        if self.value is None:
            return jnp.zeros((), state.alive.dtype)
        return -state.alive * self.value(state.observation)
