"""How far bounds move inwards under noise: quantiles of what accumulates, and what the worst of it can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Float

from steersman.errors import InputError, require, require_count, require_number


class BoundedNoise(NamedTuple):
    """Independent noise of known distribution within a bounded set ``W``.

    Attributes:
        sample: ``(generator, count) -> [count, n]``.
        support: ``max over W of d' w`` for a direction ``d`` ``[n]``.
    """

    sample: Callable[[np.random.Generator, int], np.ndarray]
    support: Callable[[np.ndarray], float]

    @classmethod
    def truncated_normal(cls, std: Any, bound: Any) -> BoundedNoise:
        """Normal in each axis, given that it is within ``+-bound``.

        Args:
            std: before truncation ``[n]``; 0 for an axis without noise.
            bound: ``[n]``.
        """
        require_number("std", std, at_least=0.0)
        require_number("bound", bound, at_least=0.0)
        std, bound = np.broadcast_arrays(np.atleast_1d(np.asarray(std, float)), np.asarray(bound, float))
        safe = np.where(std > 0.0, std, 1.0)
        edge = scipy.stats.norm.cdf(bound / safe)

        def sample(generator: np.random.Generator, count: int) -> np.ndarray:
            uniform = generator.uniform(1.0 - edge, edge, (count, len(std)))
            return np.where(std > 0.0, np.clip(safe * scipy.special.ndtri(uniform), -bound, bound), 0.0)

        reach = np.where(std > 0.0, bound, 0.0)
        return cls(sample, lambda direction: float(np.abs(direction) @ reach))


class Tightening:
    """Tightenings of rows ``g' e`` for the error ``e' = F e + w``, ``e = 0`` at first.

    Args:
        loop: ``F`` ``[n, n]``, with all modes inside the unit circle.
        rows: ``g`` ``[c, n]``.
        probability: with which each row must hold, in (0.5, 1].
        noise: ``w``.
        samples: from which quantiles are estimated.
        seed: of them.

    Raises:
        InputError: the loop is unstable, a sample is outside of the noise's set, or a number is out of range.
    """

    def __init__(
        self, loop: Any, rows: Any, probability: float, noise: BoundedNoise, samples: int = 400_000, seed: int = 0
    ) -> None:
        loop, rows = np.asarray(loop, np.float64), np.atleast_2d(np.asarray(rows, np.float64))
        require_number("probability", probability, above=0.5, at_most=1.0)
        require_count("samples", samples)
        radius = float(np.max(np.abs(np.linalg.eigvals(loop))))
        require(radius < 1.0, "the closed loop's spectral radius", round(radius, 6), "below 1")
        reach: list[np.ndarray] = []
        through = rows
        # Until what is still to come is negligible beside what has been.
        while not reach or np.abs(through).max() > 1e-10 * np.abs(rows).max():
            reach.append(np.array([noise.support(row) for row in through]))
            if not np.all(np.isfinite(reach[-1])):
                raise InputError("noise.support is not finite, but the set of the noise must be bounded.")
            through = through @ loop
        self.worst = np.concatenate([np.zeros((1, len(rows))), np.cumsum(reach, axis=0)])
        self.quantiles = self.worst
        if probability < 1.0:
            generator, error, found = np.random.default_rng(seed), np.zeros((samples, len(loop))), [np.zeros(len(rows))]
            for _ in range(len(reach)):
                drawn = noise.sample(generator, samples)
                for row, most in zip(rows, reach[0], strict=True):
                    good = float(np.max(drawn @ row)) <= most + 1e-9
                    require(good, "noise.sample", "beyond noise.support", "within the noise's set")
                error = error @ loop.T + drawn
                found.append(np.quantile(error @ rows.T, probability, axis=0))
            self.quantiles = np.asarray(found)

    def quantile(self, steps: int) -> Float[np.ndarray, " c"]:
        """``q(s)``: what the errors of `steps` steps do not exceed with the probability, for each row."""
        return self.quantiles[min(steps, len(self.quantiles) - 1)]

    def between(self, first: int, last: int) -> Float[np.ndarray, " c"]:
        """``rho(a, b) = sum_{a <= j < b} max over W of g' F^j w``: the worst of the noise `a` to `b` steps ago."""
        end = len(self.worst) - 1
        return self.worst[min(last, end)] - self.worst[min(first, end)]


class ResetSchedule:
    """Tightenings of predicted bounds where the nominal state is reset to the measured one every few steps.

    With ``r`` the last reset at or before a time ``k`` and ``q_t`` the last one before ``t > k``: up to ``r + M`` the
    nominal trajectory is tightened by ``q(t - r)``, later the mean by ``q(t - q_t) + rho(t - q_t, t - k)``.

    Args:
        tightening: of the rows.
        every: steps ``M`` between resets, of which the first is at time 0; None for no others.
    """

    def __init__(self, tightening: Tightening, every: int | None) -> None:
        if every is not None:
            require_count("reset_every", every)
        self.tightening, self.every = tightening, every

    def last(self, step: int) -> int:
        """The last reset at or before a time."""
        return 0 if self.every is None else step - step % self.every

    @property
    def steady(self) -> Float[np.ndarray, " c"]:
        """The largest tightening that is ever in force: ``max_{1 <= s <= M} q(s) + rho(s, inf)``, or ``max q``."""
        if self.every is None:
            return np.max(self.tightening.quantiles, axis=0)
        end = len(self.tightening.worst)
        phases = range(1, min(self.every, end) + 1)
        return np.max([self.tightening.quantile(s) + self.tightening.between(s, end) for s in phases], axis=0)

    def tightenings(self, step: int, count: int) -> Float[np.ndarray, "I two c"]:
        """Tightenings on the nominal trajectory and on the mean, 1 to `count` steps after a time.

        Args:
            step: the time.
            count: how many steps ahead.

        Returns:
            Minus infinity where no bound is due.
        """
        reset = self.last(step)
        found = np.full((count, 2, self.tightening.worst.shape[1]), -np.inf)
        for i in range(1, count + 1):
            t = step + i
            if self.every is None or t <= reset + self.every:
                found[i - 1, 0] = self.tightening.quantile(t - reset)
            else:
                since = (t - 1 - reset) % self.every + 1
                found[i - 1, 1] = self.tightening.quantile(since) + self.tightening.between(since, i)
        return found
