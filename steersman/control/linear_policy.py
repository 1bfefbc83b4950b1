"""Exact values of linear Gaussian policies on linear-quadratic problems."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from steersman.errors import InputError, require, require_number


class LinearPolicyValue(eqx.Module):
    """Values of ``u ~ N(-K x, S)`` on ``x' = A x + B u + w``, ``w ~ N(0, W)``, with the reward ``-(x'Qx + u'Ru)``.

    ``V(x) = -(x'P x) - c``, with ``P = Q + K'RK + discount F'P F`` for the closed loop ``F = A - B K`` and
    ``c = (tr(R S) + discount tr(P (W + B S B'))) / (1 - discount)``.

    Attributes:
        A: dynamics ``[n, n]``.
        B: effect of the action ``[n, m]``.
        Q: state cost ``[n, n]``.
        R: action cost ``[m, m]``.
        gain: ``K`` ``[m, n]``.
        noise: ``W`` ``[n, n]``.
        discount: in ``[0, 1)``.
        cost: ``P`` ``[n, n]``.
        constant: ``c``.
    """

    A: Float[Array, "n n"]
    B: Float[Array, "n m"]
    Q: Float[Array, "n n"]
    R: Float[Array, "m m"]
    gain: Float[Array, "m n"]
    noise: Float[Array, "n n"]
    discount: Float[Array, ""]
    cost: Float[Array, "n n"]
    constant: Float[Array, ""]

    def value(self, x: Float[Array, "... n"]) -> Float[Array, "..."]:
        """``V(x)``."""
        return -_quadratic(x, self.cost) - self.constant

    def q_value(self, x: Float[Array, "... n"], u: Float[Array, "... m"]) -> Float[Array, "..."]:
        """``Q(x, u)``: the reward of one step, and the value of where it leads."""
        following = x @ self.A.T + u @ self.B.T
        later = _quadratic(following, self.cost) + jnp.sum(self.cost * self.noise) + self.constant
        return -_quadratic(x, self.Q) - _quadratic(u, self.R) - self.discount * later

    def gradient(self, moment: Float[Array, "n n"]) -> Float[Array, "m n"]:
        """``E grad_K log pi(u | x) Q(x, u)`` over actions of the policy and states with a second moment ``E x x'``.

        ``2 (discount B'P F - R K) E x x'``, by Stein's identity: the mean score-weighted value is minus the gradient
        of the value in the action, at the mean action, times ``x'``.
        """
        loop = self.A - self.B @ self.gain
        return 2.0 * (self.discount * self.B.T @ self.cost @ loop - self.R @ self.gain) @ moment


def _quadratic(x: Array, matrix: Array) -> Array:
    return jnp.einsum("...i,ij,...j->...", x, matrix, x)


def evaluate_linear_policy(
    A: Any, B: Any, Q: Any, R: Any, gain: Any, *, action_covariance: Any, noise: Any, discount: Any
) -> LinearPolicyValue:
    """The exact value of a linear Gaussian policy, by the discrete Lyapunov equation; computed in float64.

    Args:
        A: dynamics ``[n, n]``.
        B: effect of the action ``[n, m]``.
        Q: state cost ``[n, n]``, symmetric.
        R: action cost ``[m, m]``, symmetric.
        gain: ``K`` of the mean action ``-K x`` ``[m, n]``.
        action_covariance: ``S`` ``[m, m]``.
        noise: covariance of the disturbance ``W`` ``[n, n]``.
        discount: in ``[0, 1)``.

    Raises:
        InputError: shapes do not fit, or the discounted cost of the closed loop is infinite.
    """
    names = ("A", "B", "Q", "R", "gain", "action_covariance", "noise")
    arrays = [np.asarray(value, np.float64) for value in (A, B, Q, R, gain, action_covariance, noise)]
    require(arrays[0].ndim == 2 and arrays[1].ndim == 2, "A and B", (A, B), "matrices")
    n, m = arrays[0].shape[0], arrays[1].shape[1]
    shapes = ((n, n), (n, m), (n, n), (m, m), (m, n), (m, m), (n, n))
    for name, array, shape in zip(names, arrays, shapes, strict=True):
        require(array.shape == shape, f"{name}'s shape", array.shape, f"{shape}")
        require_number(name, array)
    require_number("discount", discount, at_least=0.0, below=1.0)
    a, b, q, r, k, spread, w = arrays
    gamma = float(discount)
    loop = a - b @ k
    radius = float(np.max(np.abs(np.linalg.eigvals(np.sqrt(gamma) * loop))))
    if radius >= 1.0:
        raise InputError(
            f"gain leaves a closed loop whose discounted growth is {radius:.6g} a step, but it must be below 1."
        )
    p = scipy.linalg.solve_discrete_lyapunov(np.sqrt(gamma) * loop.T, q + k.T @ r @ k)
    p = 0.5 * (p + p.T)
    constant = (np.sum(r * spread) + gamma * np.sum(p * (w + b @ spread @ b.T))) / (1.0 - gamma)
    return LinearPolicyValue(*map(jnp.asarray, (a, b, q, r, k, w, gamma, p, constant)))
