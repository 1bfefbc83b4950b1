"""Learned locally linear models in receding horizon (Pfrommer et al., 2023, arXiv:2305.09619)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from steersman.control.learned_locally_linear import LearnedLocallyLinear, LocalPolicy
from steersman.control.planning import Plan, Planner, PlanningModel, ProblemModel
from steersman.control.rollout_oracles import ProblemOracle
from steersman.envs.control_problem import ControlProblem, trajectory_cost
from steersman.errors import InputTypeError, require_count


class LocallyLinearPlanner(Planner):
    """The same in receding horizon: each plan starts from the last one, shifted, with its gains.

    The model is only ever asked for rollouts and derivatives of its costs: it stands for a simulator that can be reset
    to the present state.

    Attributes:
        model: the problem.
        algorithm: how a plan is improved; its ``controls`` are the first plan, and set the horizon.
        iterations: of each plan.
    """

    model: PlanningModel
    algorithm: LearnedLocallyLinear
    iterations: int = eqx.field(static=True, default=3)

    def __check_init__(self) -> None:
        if not isinstance(self.model, ProblemModel):
            raise InputTypeError(f"model is a {type(self.model).__name__}, but it must be a ProblemModel.")
        require_count("iterations", self.iterations)

    @property
    def problem(self) -> ControlProblem:
        """The model's problem."""
        assert isinstance(self.model, ProblemModel)
        return self.model.problem

    def init(self) -> Plan:
        controls, n = self.algorithm.controls, self.problem.state_size
        zero = jnp.zeros((), controls.dtype)
        gains = self.algorithm.gains
        gains = jnp.zeros((*controls.shape, n), controls.dtype) if gains is None else gains
        memory = LocalPolicy(controls, jnp.zeros((len(controls) + 1, n), controls.dtype), gains)
        return Plan(controls, jnp.full_like(zero, jnp.nan), memory, dict.fromkeys(("gradient", "halved"), zero))

    def plan(self, state: PyTree, last: Plan, key: Key[Array, ""]) -> Plan:
        oracle = ProblemOracle(self.problem, state)
        shifted = LocalPolicy(*(jnp.concatenate([part[1:], part[-1:]]) for part in last.memory))
        feedforward = shifted.controls + jnp.einsum("hmn,hn->hm", shifted.gains, shifted.states[:-1])
        algorithm = eqx.tree_at(
            lambda each: (each.controls, each.gains),
            self.algorithm,
            (feedforward, shifted.gains),
            is_leaf=lambda leaf: leaf is None,
        )
        begun = algorithm.init(oracle, key)
        found, metrics = jax.lax.scan(
            lambda state, _: algorithm.step(oracle, state), begun, None, length=self.iterations
        )
        chosen = found.current
        cost = trajectory_cost(self.problem, chosen.states, chosen.controls)
        report = {"gradient": metrics["gradient"][-1], "halved": jnp.sum(metrics["halved"])}
        report = {name: value.astype(cost.dtype) for name, value in report.items()}
        return Plan(chosen.controls, cost, chosen, report)
