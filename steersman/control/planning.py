"""Receding-horizon planning: what a planner looks ahead with, what it answers, and the policy that it is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.envs.control_problem import ControlProblem
from steersman.errors import InputError, InputTypeError, require, require_number
from steersman.policies import Policy
from steersman.training.schedules import Continuous, scalar


class PlanningModel(eqx.Module):
    """What a planner looks ahead with: steps from a state under a control, and what each costs.

    Learned world models, simulators and written-down dynamics are one. A state is any PyTree (a latent, a simulator's
    data); everything is unbatched, planners ``vmap``.
    """

    @property
    @abc.abstractmethod
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest control, ``[m]`` each; infinite where there is no bound."""

    @abc.abstractmethod
    def step(self, state: PyTree, u: Float[Array, " m"]) -> tuple[PyTree, Float[Array, ""]]:
        """The state after a step, and the step's cost."""

    def terminal_cost(self, state: PyTree) -> Float[Array, ""]:
        """What is charged for everything after the horizon; nothing by default."""
        del state
        return jnp.zeros(())

    def start(self, observation: PyTree) -> PyTree:
        """The state that an observation is planned from; the observation itself by default."""
        return observation

    @property
    def control_size(self) -> int:
        """Number of controls ``m``."""
        return len(self.control_bounds[0])


class ProblemModel(PlanningModel):
    """A control problem, seen in full, as a planner's model.

    Attributes:
        problem: dynamics, costs and bounds. Controls are held within their bounds by the planner.
        penalty: cost of each unit by which a constraint function, or a bound on the next state, is violated. A planner
            that cannot hold constraints otherwise trades them for cost at this price.
        estimate: the state of an observation, where a problem does not show its state as it is.
    """

    problem: ControlProblem
    penalty: Continuous = scalar(0.0)
    estimate: Callable[[PyTree], Array] | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.problem, ControlProblem):
            raise InputTypeError(f"problem is a {type(self.problem).__name__}, but it must be a ControlProblem.")
        require_number("penalty", self.penalty, at_least=0.0)

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.problem.control_bounds

    def step(self, state: Float[Array, " n"], u: Float[Array, " m"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        problem = self.problem
        following, cost = problem.dynamics(state, u), problem.stage_cost(state, u)
        excess = jnp.zeros((), cost.dtype)
        low, high = problem.state_bounds
        # What cannot be violated is not traced: it would double what a planner compiles.
        if np.any(np.isfinite(low)) or np.any(np.isfinite(high)):
            above, below = following - jnp.asarray(high, cost.dtype), jnp.asarray(low, cost.dtype) - following
            excess += jnp.sum(jnp.maximum(above, 0.0) + jnp.maximum(below, 0.0))
        if problem.constraint_names:
            excess += jnp.sum(jnp.maximum(problem.constraints(state, u), 0.0))
        return following, cost + self.penalty * excess

    def terminal_cost(self, state: Float[Array, " n"]) -> Float[Array, ""]:
        return self.problem.terminal_cost(state)

    def start(self, observation: PyTree) -> Float[Array, " n"]:
        return observation if self.estimate is None else self.estimate(observation)


#: Changes a control before it is applied, ``(state, u, step) -> u``: a shield, a safety filter, feedback around a plan.
Correction = Callable[[PyTree, Array, Array], Array]


class Lookahead(NamedTuple):
    """A simulated plan.

    Attributes:
        cost: discounted stage costs and terminal cost.
        controls: what was applied, after bounds and correction ``[H, m]``.
        states: before each step, leaves ``[H, ...]``.
        last: the state after the last step.
    """

    cost: Float[Array, ""]
    controls: Float[Array, "H m"]
    states: PyTree
    last: PyTree


def look_ahead(
    model: PlanningModel,
    state: PyTree,
    controls: Float[Array, "H m"],
    *,
    discount: Float[Array, ""] | float = 1.0,
    correct: Correction | None = None,
) -> Lookahead:
    """Follows a model under a plan; differentiable in everything. What is not used costs nothing under ``jit``.

    ``J = sum_{h<H} discount^h c(x_h, u_h) + discount^H V(x_H)``.

    Args:
        model: what is followed.
        state: ``x_0``.
        controls: the plan; brought within the model's bounds.
        discount: weight of a step's cost relative to that of the step before.
        correct: changes each control at the state where it is applied; the result is brought within bounds again.
    """
    low, high = (jnp.asarray(bound, controls.dtype) for bound in model.control_bounds)

    def step(running: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        x, weight, total = running
        u, h = inputs
        u = jnp.clip(u, low, high)
        if correct is not None:
            u = jnp.clip(correct(x, u, h), low, high)
        following, cost = model.step(x, u)
        return (following, weight * discount, total + weight * cost), (u, x)

    one, zero = jnp.ones((), controls.dtype), jnp.zeros((), controls.dtype)
    inputs = controls, jnp.arange(controls.shape[0])
    (last, weight, total), (applied, states) = jax.lax.scan(step, (state, one, zero), inputs)
    return Lookahead(total + weight * model.terminal_cost(last), applied, states, last)


class Plan(NamedTuple):
    """A planner's answer, and what the next one starts from.

    Attributes:
        controls: from now on ``[H, m]``.
        cost: predicted for them; NaN before the first plan.
        memory: what else the planner remembers.
        report: named numbers about the search or solve: failed candidates, status, iterations, violations.
    """

    controls: Float[Array, "H m"]
    cost: Float[Array, ""]
    memory: PyTree
    report: dict[str, Array]


class Planner(eqx.Module):
    """Finds controls for a state with a model. :meth:`policy` plays the first control of each plan and plans again."""

    model: eqx.AbstractVar[PlanningModel]

    @abc.abstractmethod
    def init(self) -> Plan:
        """What stands for the last plan before the first one."""

    @abc.abstractmethod
    def plan(self, state: PyTree, last: Plan, key: Key[Array, ""]) -> Plan:
        """Plans.

        Args:
            state: where the model starts, as its ``start`` makes it of an observation.
            last: the plan of one step ago, or of :meth:`init`.
            key: randomness of the search.
        """

    def policy(self) -> PlannerPolicy:
        """The policy that plans at each step and plays the first control."""
        return PlannerPolicy(self)


class PlannerPolicy(Policy):
    """Plans at every step and plays the first control. Its memory is the last plan, with the planner's report.

    Attributes:
        planner: what plans.
    """

    planner: Planner

    def init(self, key: Key[Array, ""]) -> Plan:
        del key
        return self.planner.init()

    def __call__(self, observation: PyTree, carry: Plan, key: Key[Array, ""]) -> tuple[Float[Array, " m"], Plan]:
        plan = self.planner.plan(self.planner.model.start(observation), carry, key)
        return plan.controls[0], plan


def finite_bounds(model: PlanningModel, why: str) -> tuple[np.ndarray, np.ndarray]:
    """The model's bounds, where they must be finite.

    Raises:
        InputError: one of them is not, or they are not in order.
    """
    low, high = model.control_bounds
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
        raise InputError(f"model.control_bounds are {low} and {high}, but they must be finite {why}.")
    require(bool(np.all(low < high)), "model.control_bounds", (low, high), "low < high in each control")
    return low, high
