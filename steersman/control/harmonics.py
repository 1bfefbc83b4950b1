"""Sinusoids that a linear plant can follow: evaluation, rotation, the equations they satisfy, fits to a reference."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from steersman.errors import require, require_number


class Harmonic(NamedTuple):
    """``z_j = constant + sine sin(w j) + cosine cos(w j)``, ``j`` counted from now.

    Attributes:
        constant: ``[d]``.
        sine: ``[d]``.
        cosine: ``[d]``.
    """

    constant: Float[Any, " d"]
    sine: Float[Any, " d"]
    cosine: Float[Any, " d"]

    @property
    def amplitude(self) -> Float[Any, " d"]:
        """The largest distance from the constant, over all phases ``[d]``."""
        return np.hypot(self.sine, self.cosine)

    def values(self, frequency: float, steps: Any) -> Float[np.ndarray, "L d"]:
        """The signal at some steps, which need not be whole.

        Args:
            frequency: ``w`` in rad a step.
            steps: ``[L]``, or how many from now on.
        """
        phase = frequency * np.asarray(np.arange(steps) if np.ndim(steps) == 0 else steps, np.float64)[:, None]
        return self.constant + self.sine * np.sin(phase) + self.cosine * np.cos(phase)

    def rotated(self, angle: float) -> Harmonic:
        """The same signal seen ``angle = w k`` later, ``k`` steps."""
        c, s = np.cos(angle), np.sin(angle)
        return Harmonic(self.constant, self.sine * c - self.cosine * s, self.sine * s + self.cosine * c)

    def through(self, matrix: Float[Any, "o d"]) -> Harmonic:
        """The harmonic of ``matrix z``."""
        return Harmonic(*(matrix @ part for part in self))


class HarmonicPlant:
    """The harmonics ``(x, u)`` of one frequency that ``x' = A x + B u`` follows without transient.

    ``c = A c + B d`` for the constants; ``s cos w - c sin w = A s + B p`` and ``s sin w + c cos w = A c + B q`` for the
    sine's and cosine's parts ``(s, p)`` and ``(c, q)``. Constants and sinusoids each have as many degrees of freedom as
    there are controls, ``3 m`` in all, unless a mode at 1 or at ``exp(i w)`` is out of the controls' reach.

    Args:
        A: dynamics ``[n, n]``.
        B: effect of the control ``[n, m]``.
        frequency: ``w`` in rad a step, between 0 and pi.

    Raises:
        InputError: shapes or the frequency are wrong.
    """

    def __init__(self, A: Any, B: Any, frequency: float) -> None:
        self.A, self.B = np.asarray(A, np.float64), np.asarray(B, np.float64)
        require(self.A.ndim == 2 and self.A.shape[0] == self.A.shape[1], "A's shape", self.A.shape, "[n, n]")
        require(self.B.ndim == 2 and len(self.B) == len(self.A), "B's shape", self.B.shape, f"({len(self.A)}, m)")
        require_number("A", self.A)
        require_number("B", self.B)
        require_number("frequency", frequency, above=0.0, below=float(np.pi))
        self.frequency = float(frequency)
        n, m = self.B.shape
        one, c, s = np.eye(n), np.cos(self.frequency) * np.eye(n), np.sin(self.frequency) * np.eye(n)
        none, quiet = np.zeros((n, n)), np.zeros((n, m))
        # Columns as in a stacked harmonic: (x, u) of the constant, of the sine, of the cosine.
        self.equations = np.block(
            [
                [one - self.A, -self.B, none, quiet, none, quiet],
                [none, quiet, c - self.A, -self.B, -s, quiet],
                [none, quiet, s, quiet, c - self.A, -self.B],
            ]
        )
        self.basis = scipy.linalg.null_space(self.equations, rcond=1e-10)
        if self.basis.shape[1] > 3 * m:
            warnings.warn(
                f"A and B have {self.basis.shape[1]} independent harmonics of frequency {self.frequency:g} where "
                f"{3 * m} are expected: a mode resonates out of the controls' reach, and fits are of least norm.",
                stacklevel=2,
            )

    def defect(self, harmonic: Harmonic) -> Float[np.ndarray, " r"]:
        """By how much the plant's equations are violated ``[3 n]``."""
        return self.equations @ np.concatenate([np.asarray(part, np.float64) for part in harmonic])

    def complete(self, output: Any, wanted: Harmonic) -> Harmonic:
        """The harmonic whose output ``C x`` is nearest to one that is wanted, by least squares.

        Args:
            output: ``C`` ``[o, n]``.
            wanted: of the outputs ``[o]``.
        """
        full = np.kron(np.eye(3), self._output(output))
        target = np.concatenate([np.broadcast_to(part, (len(full) // 3,)) for part in wanted])
        return self._of(np.linalg.lstsq(full @ self.basis, target, rcond=None)[0])

    def fit(self, output: Any, window: Any, ridge: float = 1e-9) -> Harmonic:
        """The harmonic whose outputs are nearest to a reference over a window, by least squares.

        Args:
            output: ``C`` ``[o, n]``.
            window: the reference ``[L, o]`` from now on.
            ridge: weight of the squared coefficients; with 0 the least of all best fits.
        """
        full, window = self._output(output), np.asarray(window, np.float64)
        require(window.ndim == 2 and window.shape[1] == len(full), "window's shape", window.shape, f"[L, {len(full)}]")
        require_number("window", window)
        require_number("ridge", ridge, at_least=0.0)
        phase = self.frequency * np.arange(len(window))
        waves = np.stack([np.ones(len(window)), np.sin(phase), np.cos(phase)], axis=1)
        seen = np.kron(waves, full) @ self.basis
        count = seen.shape[1]
        rows = np.concatenate([seen, np.sqrt(ridge) * np.eye(count)])
        return self._of(np.linalg.lstsq(rows, np.concatenate([window.ravel(), np.zeros(count)]), rcond=1e-10)[0])

    def _output(self, output: Any) -> np.ndarray:
        output = np.atleast_2d(np.asarray(output, np.float64))
        n, m = self.B.shape
        require(output.shape[1] == n, "output's shape", output.shape, f"[o, {n}]")
        return np.concatenate([output, np.zeros((len(output), m))], axis=1)

    def _of(self, coefficients: np.ndarray) -> Harmonic:
        return Harmonic(*np.split(self.basis @ coefficients, 3))
