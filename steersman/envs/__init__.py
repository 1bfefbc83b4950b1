"""Problems: environments, dynamics with costs, and bridges to the field's simulators."""

from steersman.envs.environment import Environment, Problem, as_problem

__all__ = ["Environment", "Problem", "as_problem"]
