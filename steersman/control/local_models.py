"""Linear models along a trajectory, estimated from perturbed rollouts; gradients and gains that follow from them.

Source: EstMarkov and EstGains of Pfrommer, Simchowitz, Westenbroek, Matni and Tu (2023, arXiv:2305.09619). Gains have
the sign of the rest of this library, ``u = ... - K x``; the paper's are their negatives.
"""

from __future__ import annotations

import abc
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from steersman.control.lqr import finite_horizon_lqr
from steersman.control.rollout_oracles import RolloutOracle
from steersman.errors import require, require_count, require_number
from steersman.training.schedules import Continuous, scalar

# Share of the largest singular value below which a direction counts as not reached by earlier controls.
_RANK = 1e-4


class Response(eqx.Module):
    """How a closed loop answers to its controls: ``Psi_{j,k} = d x_j / d u_k`` with feedback on, ``[n, m]``."""

    @abc.abstractmethod
    def adjoint(self, slopes: Float[Array, "H_plus_1 n"]) -> Float[Array, "H m"]:
        """``sum_{j > k} Psi_{j,k}' p_j`` for slopes ``p_j`` of a cost in the states."""

    @abc.abstractmethod
    def windows(self, length: int) -> tuple[Float[Array, "H L n m"], Float[Array, "H L n m"], Float[Array, "H n m"]]:
        """``Psi_{k,k-i}`` and ``Psi_{k+1,k-i}`` for ``i = 1 .. L`` (right for ``k >= L`` only), and ``Psi_{k+1,k}``."""

    @abc.abstractmethod
    def markov(self) -> Float[Array, "H_plus_1 H n m"]:
        """All ``Psi_{j,k}``, zero where ``j <= k``; memory grows with the square of the horizon."""


class LocalModels(Response):
    """``x_{k+1} - xhat_{k+1} = A_k (x_k - xhat_k) + B_k w_k``: the response in a form linear in the horizon.

    Attributes:
        A: of the closed loop ``[H, n, n]``.
        B: ``[H, n, m]``.
    """

    A: Float[Array, "H n n"]
    B: Float[Array, "H n m"]

    def adjoint(self, slopes: Array) -> Array:
        def step(costate: Array, inputs: tuple) -> tuple[Array, Array]:
            a, b, slope = inputs
            return slope + a.T @ costate, b.T @ costate

        return jax.lax.scan(step, slopes[-1], (self.A, self.B, slopes[:-1]), reverse=True)[1]

    def windows(self, length: int) -> tuple[Array, Array, Array]:
        def step(window: Array, inputs: tuple) -> tuple[Array, tuple]:
            a, b = inputs
            moved = a @ window
            return jnp.concatenate([b[None], moved[:-1]]), (window, moved)

        start = jnp.zeros((length, *self.B.shape[1:]), self.B.dtype)
        return (*jax.lax.scan(step, start, (self.A, self.B))[1], self.B)

    def markov(self) -> Array:
        earlier, moved, _ = self.windows(self.B.shape[0])
        now = jnp.concatenate([earlier, jnp.concatenate([self.B[-1][None], moved[-1, :-1]])[None]])
        back = jnp.arange(len(now))[:, None] - jnp.arange(len(self.B)) - 1
        found = jnp.take_along_axis(now, jnp.maximum(back, 0)[..., None, None], axis=1)
        return jnp.where((back >= 0)[..., None, None], found, 0.0)


class MarkovParameters(Response):
    """All of ``Psi``.

    Attributes:
        psi: ``Psi_{j,k}``, zero where ``j <= k`` ``[H + 1, H, n, m]``.
    """

    psi: Float[Array, "H_plus_1 H n m"]

    def adjoint(self, slopes: Array) -> Array:
        return jnp.einsum("jknm,jn->km", self.psi, slopes)

    def windows(self, length: int) -> tuple[Array, Array, Array]:
        now = jnp.arange(self.psi.shape[1])
        earlier = jnp.maximum(now[:, None] - 1 - jnp.arange(length), 0)
        return self.psi[now[:, None], earlier], self.psi[now[:, None] + 1, earlier], self.psi[now + 1, now]

    def markov(self) -> Array:
        return self.psi


class Estimator(eqx.Module):
    """How the response is estimated from perturbed rollouts."""

    def check(self, rollouts: int, state_size: int, control_size: int) -> None:
        """Refuses too few rollouts."""
        del state_size, control_size
        require_count("rollouts", rollouts)

    @abc.abstractmethod
    def __call__(self, deviations: Float[Array, "N H_plus_1 n"], perturbations: Float[Array, "N H m"]) -> Response:
        """The response.

        Args:
            deviations: of the states from those without perturbation.
            perturbations: independent signs times one size.
        """


class LeastSquares(Estimator):
    """Regresses each state on the one before and the perturbation; what the paper's experiments use.

    Attributes:
        ridge: relative to the mean diagonal of each block of the Gram matrix; an absolute one would shrink everything
            where perturbations are small.
    """

    ridge: Continuous = scalar(1e-6)

    def __check_init__(self) -> None:
        require_number("ridge", self.ridge, at_least=0.0)

    def check(self, rollouts: int, state_size: int, control_size: int) -> None:
        require_count("rollouts", rollouts)
        least = state_size + control_size
        require(rollouts >= least, "rollouts", rollouts, f"at least {least}, states and controls, for least squares")

    def __call__(self, deviations: Array, perturbations: Array) -> LocalModels:
        n = deviations.shape[-1]

        def one(before: Array, after: Array, w: Array) -> tuple[Array, Array]:
            # Columns in units of their block's size, so that one ridge and one rank tolerance serve all; a block of
            # zeros (the fixed start) gets zero coefficients.
            sizes = [jnp.sqrt(jnp.mean(jnp.sum(block**2, axis=0))) for block in (before, w)]
            sizes = [jnp.where(size > 0.0, size, 1.0) for size in sizes]
            features = jnp.concatenate([before / sizes[0], w / sizes[1]], axis=1)
            left, values, right = jnp.linalg.svd(features, full_matrices=False)
            tolerance = 10.0 * len(w) * jnp.finfo(values.dtype).eps * values[0]
            inverse = jnp.where(values > tolerance, values / (values**2 + self.ridge), 0.0)
            solution = right.T @ (inverse[:, None] * (left.T @ after))
            return solution[:n].T / sizes[0], solution[n:].T / sizes[1]

        return LocalModels(*jax.vmap(one, in_axes=1)(deviations[:, :-1], deviations[:, 1:], perturbations))


class Moments(Estimator):
    """``Psi_{j,k} = mean_i (y_j - xhat_j) w_k' / sigma^2``: unbiased on linear plants; what the paper analyses."""

    def __call__(self, deviations: Array, perturbations: Array) -> MarkovParameters:
        count, horizon = perturbations.shape[:2]
        psi = jnp.einsum("ijn,ikm->jknm", deviations, perturbations) / (count * jnp.mean(perturbations**2))
        later = jnp.arange(horizon + 1)[:, None] > jnp.arange(horizon)
        return MarkovParameters(jnp.where(later[..., None, None], psi, 0.0))


def perturbed_response(
    oracle: RolloutOracle,
    estimator: Estimator,
    controls: Float[Array, "H m"],
    states: Float[Array, "H_plus_1 n"],
    gains: Float[Array, "H m n"],
    *,
    rollouts: int,
    perturbation: Any,
    key: Key[Array, ""],
) -> Response:
    """EstMarkov: the response of ``controls - gains (x - states)``, from rollouts with random signs on the controls.

    Args:
        oracle: what is played on.
        estimator: how.
        controls: nominal.
        states: that they lead to.
        gains: feedback around them.
        rollouts: ``N``.
        perturbation: size of the signs, in the controls' units; a number, or one for each control.
        key: randomness.
    """
    sign_key, key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (rollouts, *controls.shape), controls.dtype)
    w = signs * jnp.asarray(perturbation, controls.dtype)
    played = oracle(controls + jnp.einsum("hmn,hn->hm", gains, states[:-1]), gains, w, key)
    return estimator(played.states - states, w)


class LocalGains(NamedTuple):
    """Gains from estimated models.

    Attributes:
        gains: ``K_t``, zero for ``t < window`` ``[H, m, n]``.
        A: estimated dynamics without feedback, meaningless for ``t < window`` ``[H, n, n]``.
        B: likewise ``[H, n, m]``.
        deficient: share of the steps at which earlier controls did not reach every direction of the state.
    """

    gains: Float[Array, "H m n"]
    A: Float[Array, "H n n"]
    B: Float[Array, "H n m"]
    deficient: Float[Array, ""]


def local_gains(
    response: Response,
    gains: Float[Array, "H m n"],
    *,
    window: int,
    state_cost: Float[Array, "n n"],
    control_cost: Float[Array, "m m"],
) -> LocalGains:
    """EstGains: dynamics from the response to the last ``window`` controls, and their regulator.

    ``A_cl = C_out pinv(C_in)``, ``A = A_cl + B K``; then the Riccati recursion from the identity. Outside ``jit``
    directions that are not reached raise a warning.

    Args:
        response: of the loop with the present gains.
        gains: those.
        window: ``k0``, how many earlier controls.
        state_cost: of a step.
        control_cost: of a step.
    """
    horizon, m, n = gains.shape
    before, after, b = response.windows(window)
    c_in, c_out = (jnp.moveaxis(part, 1, 2).reshape(horizon, n, window * m) for part in (before, after))
    values = jnp.linalg.svd(c_in, compute_uv=False)[window:]
    deficient = jnp.mean(values[:, -1] <= _RANK * values[:, 0], dtype=b.dtype)
    if not isinstance(deficient, Tracer) and deficient > 0:
        share = f"{float(deficient):.0%} of the steps"
        warnings.warn(f"response: earlier controls do not reach every direction of the state at {share}.", stacklevel=2)
    a = c_out @ jnp.linalg.pinv(c_in, rtol=_RANK) + b @ gains
    found = finite_horizon_lqr(a, b, state_cost, control_cost, jnp.eye(n, dtype=a.dtype), horizon)
    late = (jnp.arange(horizon) >= window)[:, None, None]
    return LocalGains(jnp.where(late, found.gains, 0.0), a, b, deficient)
