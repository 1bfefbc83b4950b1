"""Trajectory optimization with learned locally linear models (Pfrommer et al., 2023, arXiv:2305.09619).

No model of the dynamics is fitted beyond the present trajectory: rollouts with small perturbations give the response
of the loop there, the response gives the gradient of the cost and the next gains. Without gains the response of an
unstable system grows exponentially with the horizon, and with it the error of the gradient and the curvature of the
cost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from steersman.control.local_models import (
    Estimator,
    LeastSquares,
    Response,
    local_gains,
    perturbed_response,
)
from steersman.control.rollout_oracles import RolloutOracle
from steersman.control.trajectory_feedback import TrajectoryFeedback
from steersman.envs.control_problem import trajectory_cost
from steersman.errors import InputTypeError, require, require_count, require_number, unknown_name
from steersman.training.algorithm import IterativeAlgorithm, Metrics
from steersman.training.schedules import Continuous, scalar

SELECT = ("gradient", "cost", "last")


class LocalPolicy(NamedTuple):
    """A trajectory with feedback around it.

    Attributes:
        controls: ``[H, m]``.
        states: that they lead to, as measured ``[H + 1, n]``.
        gains: ``[H, m, n]``.
    """

    controls: Float[Array, "H m"]
    states: Float[Array, "H_plus_1 n"]
    gains: Float[Array, "H m n"]


class LocalState(NamedTuple):
    """State of :class:`LearnedLocallyLinear`.

    Attributes:
        current: the policy that is being improved.
        best: the one with the smallest score so far.
        score: its estimated ``|g|^2 / tau``, or its cost.
        scale: of the step size; halved where rollouts diverged.
        samples: transitions asked of the oracle.
        key: of the next iteration.
    """

    current: LocalPolicy
    best: LocalPolicy
    score: Float[Array, ""]
    scale: Float[Array, ""]
    samples: Int[Array, ""]
    key: Key[Array, ""]


def response_gradient(oracle: RolloutOracle, policy: LocalPolicy, response: Response) -> Float[Array, "H m"]:
    """``g_k = c_u + sum_{j>k} Psi_{j,k}' (c_x - K_j' c_u) + Psi_{H,k}' V_x``, with feedback on.

    Equal to the gradient of the cost with respect to the controls where the response is exact.
    """
    problem, (controls, states, gains) = oracle.problem, policy
    c_x, c_u = jax.vmap(jax.grad(problem.stage_cost, argnums=(0, 1)))(states[:-1], controls)
    slopes = c_x - jnp.einsum("hmn,hm->hn", gains, c_u)
    last = jax.grad(problem.terminal_cost)(states[-1])
    return c_u + response.adjoint(jnp.concatenate([slopes, last[None]]))


class LearnedLocallyLinear(IterativeAlgorithm):
    """Gradient descent on a trajectory, in closed loop. The problem of :meth:`init` is a rollout oracle.

    ::

        Psi <- EstMarkov(u, K);  g <- gradient from Psi and the derivatives of the cost
        play u - (eta / tau) g - K (x - xhat);  u, xhat <- what was applied and seen
        Psi <- EstMarkov(u, K);  K <- EstGains(Psi)
        keep the policy with the smallest gradient

    A step whose rollouts are not finite is not taken, and the next is half as long.

    Attributes:
        controls: first guess, played as ``controls - gains x`` ``[H, m]``; sets the horizon.
        gains: of the first guess, which should stabilize ``[H, m, n]``; where None, zero at first and then estimated.
        rollouts: ``N`` with perturbations, of each estimate.
        nominal_rollouts: without, averaged; more than one where measurements are noisy.
        perturbation: ``sigma``, in the controls' units.
        step_size: ``eta``, divided by the sample time.
        window: ``k0``, controls that reach every direction of the state, and two more.
        state_cost: of the gains' Riccati recursion, per second; a number or ``[n, n]``.
        control_cost: likewise, or ``[m, m]``.
        feedback: without it all gains are zero: the ablation.
        estimator: of the response.
        select: what picks the policy: the smallest ``"gradient"``, the smallest ``"cost"``, or the ``"last"``.
    """

    controls: Float[Array, "H m"]
    gains: Float[Array, "H m n"] | None = None
    rollouts: int = eqx.field(static=True, default=20)
    nominal_rollouts: int = eqx.field(static=True, default=1)
    perturbation: Continuous = scalar(1e-3)
    step_size: Continuous = scalar(1.0)
    window: int = eqx.field(static=True, default=3)
    state_cost: Float[Array, "..."] | float = scalar(1.0)
    control_cost: Float[Array, "..."] | float = scalar(0.05)
    feedback: bool = eqx.field(static=True, default=True)
    estimator: Estimator = eqx.field(default_factory=LeastSquares)
    select: str = eqx.field(static=True, default="gradient")

    def __check_init__(self) -> None:
        require(self.controls.ndim == 2, "controls' shape", self.controls.shape, "[H, m]")
        require_count("nominal_rollouts", self.nominal_rollouts)
        require_number("perturbation", self.perturbation, above=0.0)
        require_number("step_size", self.step_size, at_least=0.0)
        require_number("state_cost", self.state_cost, at_least=0.0)
        require_number("control_cost", self.control_cost)
        require_count("window", self.window)
        horizon = len(self.controls)
        allowed = f"of at least window + 2, {self.window + 2}, steps"
        require(horizon >= self.window + 2, "controls", f"{horizon} steps", allowed)
        if self.select not in SELECT:
            raise unknown_name("select", self.select, SELECT)

    def _check(self, oracle: RolloutOracle) -> None:
        if not isinstance(oracle, RolloutOracle):
            raise InputTypeError(f"problem is a {type(oracle).__name__}, but it must be a RolloutOracle.")
        n, m = oracle.problem.state_size, oracle.problem.control_size
        require(self.controls.shape[1] == m, "controls' shape", self.controls.shape, f"[H, {m}]")
        shape = (*self.controls.shape, n)
        if self.gains is not None:
            require(self.gains.shape == shape, "gains' shape", self.gains.shape, f"{shape}")
        allowed = f"at least {-(-n // m)}, so that window times {m} controls reach {n} states"
        require(self.window * m >= n, "window", self.window, allowed)
        self.estimator.check(self.rollouts, n, m)

    def init(self, problem: RolloutOracle, key: Key[Array, ""]) -> LocalState:
        """Plays the first guess.

        Raises:
            InputError: sizes that do not fit, a first guess that diverges, or a perturbation that drowns in rounding.
        """
        self._check(problem)
        play_key, gain_key, key = jax.random.split(key, 3)
        n = problem.problem.state_size
        gains = jnp.zeros((*self.controls.shape, n)) if self.gains is None else self.gains
        gains = gains.astype(self.controls.dtype)
        controls, states = self._play(problem, self.controls, gains, play_key)
        largest = jnp.max(jnp.abs(states))
        if not isinstance(largest, Tracer):
            require(bool(jnp.isfinite(largest)), "controls", "a first guess", "one whose rollout is finite")
            least = max(1e-7, 100.0 * float(jnp.finfo(states.dtype).eps)) * float(largest)
            require_number("perturbation", self.perturbation, at_least=least)
        samples = self.nominal_rollouts * len(controls)
        current = LocalPolicy(controls, states, gains if self.feedback else jnp.zeros_like(gains))
        if self.feedback and self.gains is None:
            current = current._replace(gains=self._gains(problem, current, gain_key)[0])
            samples += self.rollouts * len(controls)
        one = jnp.ones((), controls.dtype)
        return LocalState(current, current, jnp.inf * one, one, jnp.asarray(samples), key)

    def _play(self, oracle: RolloutOracle, controls: Array, gains: Array, key: Array) -> tuple[Array, Array]:
        """What the law applies and leads to, averaged over the nominal rollouts."""
        played = oracle(controls, gains, jnp.zeros((self.nominal_rollouts, *controls.shape), controls.dtype), key)
        return jnp.mean(played.controls, axis=0), jnp.mean(played.states, axis=0)

    def _response(self, oracle: RolloutOracle, policy: LocalPolicy, key: Array) -> Response:
        counts = {"rollouts": self.rollouts, "perturbation": self.perturbation}
        return perturbed_response(oracle, self.estimator, *policy, **counts, key=key)

    def _gains(self, oracle: RolloutOracle, policy: LocalPolicy, key: Array) -> tuple[Array, Array]:
        """EstGains, and the share of steps that are not reached."""
        _, m, n = policy.gains.shape
        tau, dtype = oracle.problem.sample_time, policy.gains.dtype
        costs = [_matrix(cost, k, dtype) * tau for cost, k in ((self.state_cost, n), (self.control_cost, m))]
        response = self._response(oracle, policy, key)
        found = local_gains(response, policy.gains, window=self.window, state_cost=costs[0], control_cost=costs[1])
        return found.gains, found.deficient

    def step(self, problem: RolloutOracle, state: LocalState) -> tuple[LocalState, Metrics]:
        gradient_key, play_key, gain_key, key = jax.random.split(state.key, 4)
        tau, current = problem.problem.sample_time, state.current
        gradient = response_gradient(problem, current, self._response(problem, current, gradient_key))
        norm = jnp.sum(gradient**2) / tau
        cost = trajectory_cost(problem.problem, current.states, current.controls)
        score = {"gradient": norm, "cost": cost, "last": -jnp.ones_like(norm)}[self.select]
        better = (score < state.score) if self.select != "last" else jnp.asarray(True)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), current, state.best)

        centre = jnp.einsum("hmn,hn->hm", current.gains, current.states[:-1])
        target = current.controls - state.scale * self.step_size / tau * gradient
        controls, states = self._play(problem, target + centre, current.gains, play_key)
        new = LocalPolicy(controls, states, current.gains)
        deficient = jnp.zeros_like(norm)
        if self.feedback:
            gains, deficient = self._gains(problem, new, gain_key)
            new = new._replace(gains=gains)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in new]))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, current)
        rollouts = self.nominal_rollouts + self.rollouts * (2 if self.feedback else 1)
        samples = state.samples + rollouts * len(controls)
        following = LocalState(
            new, best, jnp.where(better, score, state.score), state.scale * jnp.where(finite, 1.0, 0.5), samples, key
        )
        metrics = {"gradient": norm, "cost": cost, "deficient": deficient, "halved": 1.0 - finite, "samples": samples}
        return following, metrics

    def policy(self, state: LocalState) -> TrajectoryFeedback:
        """The selected trajectory with its gains; its memory counts steps from the start."""
        chosen = state.current if self.select == "last" else state.best
        return TrajectoryFeedback(*chosen)


def _matrix(cost: Any, size: int, dtype: Any) -> Array:
    given = jnp.asarray(cost, dtype)
    return given if given.ndim == 2 else given * jnp.eye(size, dtype=dtype)
