"""Linear systems with Gaussian noise, partial observations and quadratic cost, as control problems."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from steersman.envs.control_problem import ControlProblem
from steersman.errors import InputError, require, require_number


class LinearGaussianProblem(ControlProblem):
    """``x' = A x + B u + G d``, observed as ``y = C x + H e``, at a cost of ``x'Qx + u'Ru`` a step.

    Disturbance ``d``, measurement noise ``e`` and start ``x_0 = m + S s`` are made of independent standard normal
    numbers, so that covariances are ``G G'``, ``H H'`` and ``S S'``. Controls have no bounds. The observation is all
    that a policy sees: where ``C`` leaves states out, it needs a memory. :mod:`steersman.control.lqg` has the exact
    optimum of such a problem, and the exact cost of every linear controller on it.

    Attributes:
        A: dynamics ``[n, n]``.
        B: effect of the control ``[n, m]``.
        C: what is observed ``[o, n]``.
        Q: state cost ``[n, n]``.
        R: control cost ``[m, m]``.
        process_noise: ``G`` ``[n, k]``.
        measurement_noise: ``H`` ``[o, l]``.
        initial_spread: ``S`` ``[n, j]``.
        initial_mean: mean of the start ``[n]``.
        states: what each state is called.
        controls: what each control is called.
        title: the name shown in reports.
        sample_time: seconds per step.
        horizon: steps of one task.
    """

    A: Float[Array, "n n"]
    B: Float[Array, "n m"]
    C: Float[Array, "o n"]
    Q: Float[Array, "n n"]
    R: Float[Array, "m m"]
    process_noise: Float[Array, "n k"]
    measurement_noise: Float[Array, "o l"]
    initial_spread: Float[Array, "n j"]
    initial_mean: Float[Array, " n"]
    states: tuple[str, ...] = eqx.field(static=True)
    controls: tuple[str, ...] = eqx.field(static=True)
    title: str = eqx.field(static=True)
    sample_time: float = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    def __init__(
        self,
        A: Any,
        B: Any,
        C: Any,
        Q: Any,
        R: Any,
        *,
        process_noise: Any,
        measurement_noise: Any,
        initial_spread: Any,
        initial_mean: Any = None,
        states: tuple[str, ...] | None = None,
        controls: tuple[str, ...] | None = None,
        title: str = "linear-gaussian",
        sample_time: float = 1.0,
        horizon: int = 100,
    ):
        """Takes anything that becomes an array, and checks that shapes fit together.

        Args:
            A: dynamics ``[n, n]``.
            B: effect of the control ``[n, m]``.
            C: what is observed ``[o, n]``.
            Q: state cost ``[n, n]``, symmetric.
            R: control cost ``[m, m]``, symmetric.
            process_noise: ``G`` ``[n, k]``; standard deviations ``[n]`` stand for a diagonal matrix.
            measurement_noise: ``H`` ``[o, l]``, likewise.
            initial_spread: ``S`` ``[n, j]``, likewise.
            initial_mean: ``[n]``; zero unless given.
            states: what each state is called; numbered unless given.
            controls: what each control is called; numbered unless given.
            title: the name shown in reports.
            sample_time: seconds per step.
            horizon: steps of one task.

        Raises:
            InputError: shapes do not fit, a cost is not symmetric, or a number is not finite.
        """
        self.A, self.B, self.C = (_matrix(name, value) for name, value in (("A", A), ("B", B), ("C", C)))
        self.Q, self.R = _matrix("Q", Q), _matrix("R", R)
        n, m, o = self.A.shape[0], self.B.shape[1], self.C.shape[0]
        shapes = {"A": (n, n), "B": (n, m), "C": (o, n), "Q": (n, n), "R": (m, m)}
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            require(found == shape, f"{name}'s shape", found, f"{shape}, with A {self.A.shape}, B {self.B.shape}")
        for name in ("Q", "R"):
            _check_symmetric(name, getattr(self, name))
        self.process_noise = _spread("process_noise", process_noise, n)
        self.measurement_noise = _spread("measurement_noise", measurement_noise, o)
        self.initial_spread = _spread("initial_spread", initial_spread, n)
        mean = jnp.zeros(n) if initial_mean is None else jnp.asarray(initial_mean, jnp.result_type(float))
        require(mean.shape == (n,), "initial_mean's shape", mean.shape, f"({n},)")
        require_number("initial_mean", mean)
        self.initial_mean = mean
        self.states = tuple(f"state {i + 1}" for i in range(n)) if states is None else tuple(states)
        self.controls = tuple(f"control {i + 1}" for i in range(m)) if controls is None else tuple(controls)
        require(len(self.states) == n, "states", self.states, f"{n} names")
        require(len(self.controls) == m, "controls", self.controls, f"{m} names")
        self.title = title
        self.sample_time = sample_time
        self.horizon = horizon

    @property
    def name(self) -> str:
        return self.title

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.states

    @property
    def control_names(self) -> tuple[str, ...]:
        return self.controls

    @property
    def disturbance_names(self) -> tuple[str, ...]:
        return tuple(f"disturbance {i + 1}" for i in range(self.process_noise.shape[1]))

    def dynamics(
        self, x: Float[Array, " n"], u: Float[Array, " m"], d: Float[Array, " k"] | None = None
    ) -> Float[Array, " n"]:
        following = self.A @ x + self.B @ u
        return (following if d is None else following + self.process_noise @ d).astype(x.dtype)

    def stage_cost(self, x: Float[Array, " n"], u: Float[Array, " m"]) -> Float[Array, ""]:
        return x @ self.Q @ x + u @ self.R @ u

    def initial_state(self, key: Key[Array, ""]) -> Float[Array, " n"]:
        return self.initial_mean + self.initial_spread @ jax.random.normal(key, self.initial_spread.shape[1:])

    def sample_disturbance(self, key: Key[Array, ""]) -> Float[Array, " k"]:
        return jax.random.normal(key, self.process_noise.shape[1:])

    def observe(self, x: Float[Array, " n"], key: Key[Array, ""] | None = None) -> Float[Array, " o"]:
        seen = self.C @ x
        if key is None:
            return seen
        return seen + self.measurement_noise @ jax.random.normal(key, self.measurement_noise.shape[1:])


def _matrix(name: str, value: Any) -> Array:
    matrix = jnp.asarray(value)
    matrix = matrix if jnp.issubdtype(matrix.dtype, jnp.floating) else matrix.astype(jnp.result_type(float))
    require(matrix.ndim == 2, f"{name}'s shape", matrix.shape, "a matrix's")
    require_number(name, matrix)
    return matrix


def _spread(name: str, value: Any, size: int) -> Array:
    given = jnp.asarray(value)
    if given.ndim == 1:
        require(given.shape == (size,), f"{name}'s shape", given.shape, f"({size},) or [{size}, k]")
        given = jnp.diag(given)
    matrix = _matrix(name, given)
    require(matrix.shape[0] == size, f"{name}'s shape", matrix.shape, f"({size},) or [{size}, k]")
    return matrix


def _check_symmetric(name: str, matrix: Array) -> None:
    if isinstance(matrix, Tracer):
        return
    array = np.asarray(matrix)
    if not np.allclose(array, array.T, atol=1e-6 * max(float(np.abs(array).max(initial=0.0)), 1e-30)):
        raise InputError(f"{name} is {array.tolist()}, but it must be symmetric.")
