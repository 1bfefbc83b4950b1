"""Linear-quadratic regulators: discrete and continuous time, infinite and finite horizon.

Costs carry no factor one half: ``sum x'Qx + u'Ru + 2 x'Nu``. With plain arrays the arithmetic is done in float64,
whatever JAX's default is, and the result comes back in that default; inputs are checked. Inside ``jit``, ``vmap`` or
``grad`` the same equations run in the precision of what they are given, differentiably and without checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.core import Tracer
from jaxtyping import Array, Complex, Float

from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.policies import LinearFeedback

# Each doubling squares the closed loop: 40 of them settle loops whose slowest mode decays by 1e-10 a step.
_DOUBLINGS = 40
_TOLERANCE = 1e-9


class LQRSolution(eqx.Module):
    """An infinite-horizon regulator.

    Attributes:
        gain: ``K`` of ``u = -K x`` ``[m, n]``.
        value: ``P``, where ``x'Px`` is the cost that remains from ``x`` ``[n, n]``.
        closed_loop: ``A - B K`` ``[n, n]``.
    """

    gain: Float[Array, "m n"]
    value: Float[Array, "n n"]
    closed_loop: Float[Array, "n n"]

    @property
    def closed_loop_eigenvalues(self) -> Complex[Array, " n"]:
        """Eigenvalues of ``A - B K``: stable inside the unit circle, or left of the imaginary axis."""
        if isinstance(self.closed_loop, Tracer):
            return jnp.linalg.eigvals(self.closed_loop)
        return jnp.asarray(np.linalg.eigvals(np.asarray(self.closed_loop)).astype(complex))

    def cost_to_go(self, state: Float[Array, "... n"]) -> Float[Array, "..."]:
        """``x'Px``: the cost that remains from `state` under this regulator."""
        return jnp.einsum("...i,ij,...j->...", state, self.value, state)

    def policy(
        self, setpoint: Any = None, feedforward: Any = None, low: Any = None, high: Any = None
    ) -> LinearFeedback:
        """The regulator as a policy, about a setpoint and within bounds where they are given."""
        return LinearFeedback(self.gain, setpoint, feedforward, low, high)


class FiniteHorizonLQR(NamedTuple):
    """A regulator of ``H`` steps.

    Attributes:
        gains: ``K_t`` of ``u_t = -K_t x_t`` ``[H, m, n]``.
        value: ``P_t``, where ``x'P_t x`` is the cost that remains at step ``t`` ``[H + 1, n, n]``.
    """

    gains: Float[Array, "H m n"]
    value: Float[Array, "H_plus_1 n n"]


def lqr(
    A: Any,
    B: Any,
    Q: Any,
    R: Any,
    *,
    N: Any = None,
    discount: Any = 1.0,
) -> LQRSolution:
    """The regulator of ``x' = A x + B u`` that minimizes ``sum_t discount^t (x'Qx + u'Ru + 2 x'Nu)``.

    Solves the discrete algebraic Riccati equation ``P = Q + A'PA - (A'PB + N)(R + B'PB)^-1 (B'PA + N')`` by the
    structure-preserving doubling algorithm (Chu, Fan, Lin and Wang, 2004, Int. J. Control 77(8)).

    Args:
        A: dynamics ``[n, n]``.
        B: effect of the action ``[n, m]``.
        Q: state cost ``[n, n]``, symmetric, positive semidefinite.
        R: action cost ``[m, m]``, symmetric, positive definite.
        N: cross cost ``[n, m]``; none unless given.
        discount: in ``(0, 1]``.

    Returns:
        Gain, value and closed loop.

    Raises:
        InputError: shapes or definiteness are wrong, a mode cannot be stabilized, or an unstable mode costs nothing.
    """
    arrays = _arrays(A=A, B=B, Q=Q, R=R, N=N, discount=discount)
    if _traced(arrays):
        return _discrete(*arrays)
    _check_system(*arrays[:5])
    require_number("discount", arrays[5], above=0.0, at_most=1.0)
    scale = np.sqrt(arrays[5])
    _check_modes(scale * arrays[0], scale * arrays[1], *arrays[2:5], continuous=False)
    solution = _in_float64(_discrete, arrays)
    _check_solution(solution, bool(np.max(np.abs(np.linalg.eigvals(scale * solution[2]))) < 1.0))
    return LQRSolution(*map(jnp.asarray, solution))


def clqr(
    A: Any,
    B: Any,
    Q: Any,
    R: Any,
    *,
    N: Any = None,
) -> LQRSolution:
    """The regulator of ``dx/dt = A x + B u`` that minimizes the integral of ``x'Qx + u'Ru + 2 x'Nu``.

    Solves the continuous algebraic Riccati equation ``0 = Q + A'P + PA - (PB + N) R^-1 (B'P + N')``: a Cayley
    transform turns it into a discrete one, which doubling solves (Chu, Fan and Lin, 2005, Linear Algebra Appl. 396).

    Args:
        A: dynamics ``[n, n]``, per second.
        B: effect of the action ``[n, m]``, per second.
        Q: state cost ``[n, n]``, symmetric, positive semidefinite.
        R: action cost ``[m, m]``, symmetric, positive definite.
        N: cross cost ``[n, m]``; none unless given.

    Returns:
        Gain, value and closed loop.

    Raises:
        InputError: shapes or definiteness are wrong, a mode cannot be stabilized, or an unstable mode costs nothing.
    """
    arrays = _arrays(A=A, B=B, Q=Q, R=R, N=N)
    if _traced(arrays):
        return _continuous(*arrays)
    _check_system(*arrays)
    _check_modes(*arrays, continuous=True)
    solution = _in_float64(_continuous, arrays)
    _check_solution(solution, bool(np.max(np.linalg.eigvals(solution[2]).real) < 0.0))
    return LQRSolution(*map(jnp.asarray, solution))


def finite_horizon_lqr(
    A: Any,
    B: Any,
    Q: Any,
    R: Any,
    Qf: Any,
    H: int,
) -> FiniteHorizonLQR:
    """The regulator that minimizes ``x_H' Qf x_H + sum_{t<H} x_t'Q x_t + u_t'R u_t``, by the Riccati recursion.

    Args:
        A: dynamics ``[n, n]``, or one for each step ``[H, n, n]``; likewise the next three.
        B: effect of the action ``[n, m]``.
        Q: state cost ``[n, n]``, symmetric, positive semidefinite.
        R: action cost ``[m, m]``, symmetric, positive definite.
        Qf: cost of the last state ``[n, n]``, symmetric, positive semidefinite.
        H: number of steps.

    Returns:
        Gains and values.

    Raises:
        InputError: shapes or definiteness are wrong.
    """
    require_count("H", H)
    arrays = _arrays(A=A, B=B, Q=Q, R=R, Qf=Qf)
    for name, array in zip(("A", "B", "Q", "R"), arrays, strict=False):
        good = array.ndim == 2 or (array.ndim == 3 and array.shape[0] == H)
        require(good, f"{name}'s shape", array.shape, f"a matrix, or {H} of them")
    *system, last = arrays
    system = [array if array.ndim == 3 else jnp.broadcast_to(array, (H, *array.shape)) for array in system]
    if _traced(arrays):
        return FiniteHorizonLQR(*_backward(*system, last))
    for step in range(H if any(array.ndim == 3 for array in arrays) else 1):
        a, b, q, r = (array[step] if array.ndim == 3 else array for array in arrays[:4])
        _check_system(a, b, q, r, np.zeros(b.shape))
    _check_cost("Qf", last, arrays[0].shape[-1])
    system = [np.broadcast_to(array, (H, *array.shape[-2:])) for array in arrays[:4]]
    return FiniteHorizonLQR(*map(jnp.asarray, _in_float64(_backward, [*system, last])))


def discretize(A: Any, B: Any, dt: Any) -> tuple[Float[Array, "n n"], Float[Array, "n m"]]:
    """The exact discrete form of ``dx/dt = A x + B u`` with the action held for `dt` (zero-order hold).

    ``[[A_d, B_d], [0, I]] = exp(dt [[A, B], [0, 0]])`` (Van Loan, 1978, IEEE Trans. Autom. Control 23(3)).

    Args:
        A: dynamics ``[n, n]``, per second.
        B: effect of the action ``[n, m]``, per second.
        dt: sample time in seconds, above zero.

    Returns:
        ``(A_d [n, n], B_d [n, m])``.
    """
    arrays = _arrays(A=A, B=B, dt=dt)
    _check_shapes(arrays[0], arrays[1])
    if _traced(arrays):
        return _hold(*arrays)
    require_number("dt", arrays[2], above=0.0)
    a, b, step = arrays
    n, m = b.shape
    power = scipy.linalg.expm(step * np.block([[a, b], [np.zeros((m, n + m))]]))
    return jnp.asarray(power[:n, :n]), jnp.asarray(power[:n, n:])


def _arrays(**given: Any) -> list[Any]:
    """Arrays of what was given; NumPy float64 unless something is being traced. A missing N is zero."""
    traced = any(isinstance(value, Tracer) for value in given.values())
    if given.get("N", 0) is None:
        shape = np.shape(given["B"])
        given["N"] = jnp.zeros(shape) if traced else np.zeros(shape)
    if traced:
        return [jnp.asarray(value) for value in given.values()]
    for name, value in given.items():
        try:
            given[name] = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise InputTypeError(f"{name} is {value!r}, but it must be an array of numbers.") from None
        require_number(name, given[name])
    return list(given.values())


def _traced(arrays: list[Any]) -> bool:
    return any(isinstance(array, Tracer) for array in arrays)


def _in_float64(function: Callable[..., Any], arrays: list[Any]) -> tuple[np.ndarray, ...]:
    # Also inside someone else's jit: the inputs are known here, so the answer is computed now.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(function(*map(jnp.asarray, arrays))))


def _check_shapes(a: Any, b: Any) -> None:
    require(a.ndim == 2 and a.shape[0] == a.shape[1], "A's shape", a.shape, "square [n, n]")
    require(b.ndim == 2 and b.shape[0] == a.shape[0], "B's shape", b.shape, f"[n, m] with n = {a.shape[0]} as in A")


def _check_cost(name: str, cost: np.ndarray, size: int, *, definite: bool = False) -> None:
    require(cost.shape == (size, size), f"{name}'s shape", cost.shape, f"({size}, {size})")
    scale = max(float(np.max(np.abs(cost), initial=0.0)), np.finfo(float).tiny)
    symmetric = bool(np.max(np.abs(cost - cost.T), initial=0.0) <= _TOLERANCE * scale)
    require(symmetric, name, cost.tolist(), "symmetric")
    smallest = float(np.linalg.eigvalsh(cost)[0])
    if definite and smallest <= np.finfo(float).eps * size * scale:
        raise InputError(f"{name} has the eigenvalue {smallest:.6g}, but it must be positive definite.")
    if not definite and smallest < -_TOLERANCE * scale:
        raise InputError(f"{name} has the eigenvalue {smallest:.6g}, but it must be positive semidefinite.")


def _check_system(a: np.ndarray, b: np.ndarray, q: np.ndarray, r: np.ndarray, n: np.ndarray) -> None:
    _check_shapes(a, b)
    _check_cost("Q", q, a.shape[0])
    _check_cost("R", r, b.shape[1], definite=True)
    require(n.shape == b.shape, "N's shape", n.shape, f"{b.shape} as that of B")
    if np.any(n):
        smallest = float(np.linalg.eigvalsh(np.block([[q, n], [n.T, r]]))[0])
        if smallest < -_TOLERANCE * max(float(np.max(np.abs(q))), float(np.max(np.abs(r)))):
            raise InputError(
                f"N makes the joint cost [[Q, N], [N', R]] have the eigenvalue {smallest:.6g}, but it must be "
                "positive semidefinite."
            )


def _check_modes(
    a: np.ndarray, b: np.ndarray, q: np.ndarray, r: np.ndarray, n: np.ndarray, *, continuous: bool
) -> None:
    """Popov-Belevitch-Hautus tests: the action reaches every unstable mode, and every unstable mode costs something."""
    reduced = a - b @ np.linalg.solve(r, n.T)
    cost = q - n @ np.linalg.solve(r, n.T)
    for matrix, other, stack, problem in (
        (a, b, np.hstack, "the pair (A, B) cannot be stabilized: no action changes the mode of A with the eigenvalue"),
        (reduced, cost, np.vstack, "Q leaves an unstable mode without cost, so that the optimum would not stabilize "
         "it: the one with the eigenvalue"),
    ):  # fmt: skip
        size = max(float(np.linalg.norm(other, 2)), np.finfo(float).tiny)
        scale = max(float(np.linalg.norm(matrix, 2)), 1.0)
        for eigenvalue in np.linalg.eigvals(matrix):
            unstable = eigenvalue.real >= -_TOLERANCE if continuous else abs(eigenvalue) >= 1.0 - _TOLERANCE
            pencil = stack([eigenvalue * np.eye(len(matrix)) - matrix, other * (scale / size)])
            if unstable and np.linalg.svd(pencil, compute_uv=False)[-1] < _TOLERANCE * scale:
                shown = f"{eigenvalue.real:.6g}" if abs(eigenvalue.imag) < _TOLERANCE else f"{eigenvalue:.6g}"
                raise InputError(f"A and {'B' if stack is np.hstack else 'Q'}: {problem} {shown}.")


def _check_solution(solution: tuple[np.ndarray, ...], stable: bool) -> None:
    if not (stable and all(np.all(np.isfinite(part)) for part in solution)):
        raise InputError(
            "A, B, Q and R have no stabilizing regulator that float64 can find: a mode is too close to one that "
            "cannot be stabilized or that costs nothing."
        )


def _doubling(a: Array, g: Array, h: Array) -> Array:
    """The fixed point of ``X = h + a' X (I + g X)^-1 a``; after ``k`` rounds, the value of ``2^k`` steps."""
    identity = jnp.eye(a.shape[0], dtype=a.dtype)

    def double(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        a, g, h = state
        both = jnp.linalg.solve(identity + g @ h, jnp.concatenate([a, g], axis=1))
        through, across = both[:, : a.shape[1]], both[:, a.shape[1] :]
        g = g + a @ across @ a.T
        h = h + a.T @ h @ through
        return (a @ through, 0.5 * (g + g.T), 0.5 * (h + h.T)), None

    (_, _, h), _ = jax.lax.scan(double, (a, g, h), None, length=_DOUBLINGS)
    return h


@jax.jit
def _discrete(a: Array, b: Array, q: Array, r: Array, n: Array, discount: Array) -> LQRSolution:
    root = jnp.sqrt(discount)
    scaled_a, scaled_b = root * a, root * b
    # Completing the square in the action moves the cross cost into the dynamics and the state cost.
    shift = jnp.linalg.solve(r, n.T)
    g = scaled_b @ jnp.linalg.solve(r, scaled_b.T)
    value = _doubling(scaled_a - scaled_b @ shift, g, q - n @ shift)
    gain = jnp.linalg.solve(r + scaled_b.T @ value @ scaled_b, scaled_b.T @ value @ scaled_a + n.T)
    return LQRSolution(gain, value, a - b @ gain)


@jax.jit
def _continuous(a: Array, b: Array, q: Array, r: Array, n: Array) -> LQRSolution:
    size = a.shape[0]
    identity = jnp.eye(size, dtype=a.dtype)
    shift = jnp.linalg.solve(r, n.T)
    drift = a - b @ shift
    g = b @ jnp.linalg.solve(r, b.T)
    h = q - n @ shift
    # Scaling the value makes the two off-diagonal blocks of the Hamiltonian equally large, which keeps digits.
    norm_g, norm_h = jnp.linalg.norm(g), jnp.linalg.norm(h)
    balance = jnp.where((norm_g > 0) & (norm_h > 0), jnp.sqrt(norm_h / jnp.where(norm_g > 0, norm_g, 1.0)), 1.0)
    balance = jax.lax.stop_gradient(balance)
    g, h = balance * g, h / balance
    # A shift beyond the spectral radius keeps every matrix below invertible.
    gamma = jax.lax.stop_gradient(1.1 * jnp.sqrt(2.0 * jnp.sum(drift**2) + jnp.sum(g**2) + jnp.sum(h**2)))
    gamma = jnp.where(gamma > 0, gamma, 1.0)
    shifted = drift - gamma * identity
    inverse = jnp.linalg.inv(shifted)
    middle = jnp.linalg.inv(shifted.T + h @ inverse @ g)
    discrete_a = identity + 2.0 * gamma * jnp.linalg.inv(shifted + g @ inverse.T @ h)
    discrete_g = 2.0 * gamma * inverse @ g @ middle
    discrete_h = 2.0 * gamma * middle @ h @ inverse
    value = balance * _doubling(discrete_a, discrete_g, discrete_h)
    gain = jnp.linalg.solve(r, b.T @ value + n.T)
    return LQRSolution(gain, value, a - b @ gain)


@jax.jit
def _backward(a: Array, b: Array, q: Array, r: Array, last: Array) -> tuple[Array, Array]:
    def step(value: Array, matrices: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        a, b, q, r = matrices
        gain = jnp.linalg.solve(r + b.T @ value @ b, b.T @ value @ a)
        closed = a - b @ gain
        # Joseph's form stays symmetric and semidefinite however the gain was rounded.
        value = q + gain.T @ r @ gain + closed.T @ value @ closed
        value = 0.5 * (value + value.T)
        return value, (gain, value)

    _, (gains, values) = jax.lax.scan(step, last, (a, b, q, r), reverse=True)
    return gains, jnp.concatenate([values, last[None]])


@jax.jit
def _hold(a: Array, b: Array, dt: Array) -> tuple[Array, Array]:
    n, m = b.shape
    block = jnp.zeros((n + m, n + m), jnp.result_type(a, b, dt)).at[:n, :n].set(a).at[:n, n:].set(b)
    power = jax.scipy.linalg.expm(dt * block)
    return power[:n, :n], power[:n, n:]
