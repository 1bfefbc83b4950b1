"""Rollouts on demand: a law is played from a fixed start, and what it led to is shown, but not why."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steersman.envs.control_problem import ControlProblem
from steersman.errors import InputTypeError, require, require_number


class Rollouts(NamedTuple):
    """What an oracle shows.

    Attributes:
        states: as they were measured ``[N, H + 1, n]``.
        controls: as they were applied ``[N, H, m]``.
    """

    states: Float[Array, "N H_plus_1 n"]
    controls: Float[Array, "N H m"]


class RolloutOracle(eqx.Module):
    """Plays a law from the same start, as often as it is asked to: a simulator that is a black box, or a machine.

    One on the host (a Gymnasium environment that can be reset to a state, a robot) calls it by ``jax.pure_callback``.

    Attributes:
        problem: sizes, sample time, and the costs, which are known and differentiated; the dynamics are not looked at.
    """

    problem: eqx.AbstractVar[ControlProblem]
    #: Tells :func:`steersman.training.train` to take it as it is.
    is_problem: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(
        self,
        controls: Float[Array, "H m"],
        gains: Float[Array, "H m n"],
        perturbations: Float[Array, "N H m"],
        key: Key[Array, ""],
    ) -> Rollouts:
        """Plays ``u_t = controls_t - gains_t x_t + perturbations_t``, once for each of ``N`` perturbations.

        Args:
            controls: feedforward.
            gains: ``K_t``.
            perturbations: of the controls; zero for the law itself.
            key: randomness of measurements and disturbances.
        """


class ProblemOracle(RolloutOracle):
    """Rollouts of a control problem whose states are measured one by one.

    Attributes:
        problem: what is simulated.
        start: the state that every rollout starts from ``[n]``.
        noisy: measure with the problem's noise, and disturb it.
    """

    problem: ControlProblem
    start: Float[Array, " n"]
    noisy: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        if not isinstance(self.problem, ControlProblem):
            raise InputTypeError(f"problem is a {type(self.problem).__name__}, but it must be a ControlProblem.")
        n = self.problem.state_size
        require(self.start.shape == (n,), "start's shape", self.start.shape, f"({n},)")
        require_number("start", self.start)
        seen = jax.eval_shape(self.problem.observe, self.start).shape
        require(seen == (n,), "problem's observation", f"of shape {seen}", f"a measurement of each of its {n} states")

    def __call__(self, controls: Array, gains: Array, perturbations: Array, key: Key[Array, ""]) -> Rollouts:
        problem = self.problem

        def rollout(perturbation: Array, key: Array) -> tuple[Array, Array]:
            def step(x: Array, inputs: tuple) -> tuple[Array, tuple]:
                feedforward, gain, extra, keys = inputs
                seen = problem.observe(x, keys[0] if self.noisy else None)
                u = problem.saturate(feedforward - gain @ seen + extra)
                d = problem.sample_disturbance(keys[1]) if self.noisy else None
                return problem.dynamics(x, u, d), (seen, u)

            last_key, key = jax.random.split(key)
            keys = jax.random.split(key, (len(controls), 2))
            end, (seen, applied) = jax.lax.scan(step, self.start, (controls, gains, perturbation, keys))
            last = problem.observe(end, last_key if self.noisy else None)
            return jnp.concatenate([seen, last[None]]), applied

        return Rollouts(*jax.vmap(rollout)(perturbations, jax.random.split(key, len(perturbations))))
