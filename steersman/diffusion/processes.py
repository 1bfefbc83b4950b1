"""Noise processes: how a clean action chunk turns into noise, level by level."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from steersman.errors import InputError, require, require_count, require_number, unknown_name
from steersman.training.schedules import Continuous, scalar


class Grid(eqx.Module):
    """The levels that a sampler visits: step ``i`` goes from ``current[i]`` to ``following[i]``.

    The two need not join up: a rule that always descends one level of the process, but skips levels between its steps,
    is a grid too.

    Attributes:
        current: where the network is asked ``[n]``.
        following: where the step ends ``[n]``.
    """

    current: Array
    following: Array

    def __check_init__(self) -> None:
        require(
            self.current.ndim == 1 and self.current.shape == self.following.shape and self.current.size > 0,
            "following.shape",
            self.following.shape,
            f"that of current, {self.current.shape}, with at least one step",
        )

    @property
    def steps(self) -> int:
        """Number of steps ``n``."""
        return self.current.shape[0]


class NoiseProcess(eqx.Module):
    """Mixes a clean chunk ``a`` with standard normal noise ``e``: ``x = alpha(level) a + sigma(level) e``.

    Everything downstream (predictions, samplers, losses, likelihoods, compositions) asks a process only for these two
    numbers, so that one sampler serves every process and policies of different processes can be combined where their
    signal-to-noise ratios agree.
    """

    @abc.abstractmethod
    def coefficients(self, level: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """``(alpha, sigma)`` at `level`."""

    @abc.abstractmethod
    def network_time(self, level: Array) -> Float[Array, "..."]:
        """What a network is told of `level`."""

    @abc.abstractmethod
    def sample_level(self, key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Array:
        """Levels as training draws them."""

    @abc.abstractmethod
    def match(self, ratio: Float[Array, "..."]) -> Array:
        """The level at which ``sigma / alpha`` is `ratio`, as near as the process has one."""

    @abc.abstractmethod
    def grid(self, steps: int) -> Grid:
        """`steps` steps from pure noise to clean data, as samplers of this process usually place them.

        Raises:
            InputError: the process has fewer levels.
        """

    @property
    @abc.abstractmethod
    def prior_scale(self) -> float:
        """Standard deviation of what a sampler starts from."""

    def noise_scale(self, level: Array) -> Float[Array, "..."]:
        """Standard deviation of a chunk at `level` behind which nothing is known yet."""
        return self.coefficients(level)[1]

    def perturb(self, clean: Float[Array, "..."], noise: Float[Array, "..."], level: Array) -> Float[Array, "..."]:
        """``alpha a + sigma e``; `level` has the leading axes of `clean`."""
        alpha, sigma = self.coefficients(level)
        extra = clean.ndim - jnp.ndim(alpha)
        alpha, sigma = (jnp.reshape(c, jnp.shape(c) + (1,) * extra) for c in (alpha, sigma))
        return alpha * clean + sigma * noise


SPACINGS = ("leading", "trailing", "linspace")


class DiscreteVP(NoiseProcess):
    """The variance-preserving process of DDPM on ``K`` levels (Ho, Jain and Abbeel, 2020, arXiv:2006.11239).

    ``alpha = sqrt(abar_k)`` and ``sigma = sqrt(1 - abar_k)`` with ``abar_k = prod_{j <= k} (1 - beta_j)``. Levels are
    whole numbers ``0 .. K-1``; ``-1`` is clean data. A level that is no whole number stands for the process between
    two levels, linear in the logarithm of the signal-to-noise ratio.

    Attributes:
        signal: ``abar`` with a leading one for clean data ``[K + 1]``.
        spacing: where fewer than ``K`` steps are placed: ``"leading"`` (0, K/n, ...; the usual one),
            ``"trailing"`` (K-1, K-1-K/n, ...) or ``"linspace"``, as Lin et al. (2023, arXiv:2305.08891) name them.
    """

    signal: Float[Array, " K1"]
    spacing: str = eqx.field(static=True, default="leading")

    def __check_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise unknown_name("spacing", self.spacing, SPACINGS)

    @classmethod
    def from_betas(cls, betas: Any, *, spacing: str = "leading") -> DiscreteVP:
        """The process with the noise rates `betas` ``[K]``.

        Raises:
            InputError: a rate is outside (0, 1).
        """
        betas = np.asarray(betas, np.float64)
        require(betas.ndim == 1 and betas.size > 0, "betas.shape", betas.shape, "[K]")
        require_number("betas", betas, above=0.0, below=1.0)
        signal = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
        return cls(jnp.asarray(signal, jnp.result_type(float)), spacing)

    @classmethod
    def squared_cosine(cls, levels: int = 100, *, largest: float = 0.999, spacing: str = "leading") -> DiscreteVP:
        """The squared-cosine schedule (Nichol and Dhariwal, 2021, arXiv:2102.09672), diffusion policy's default.

        ``beta_k = min(1 - f((k+1)/K) / f(k/K), largest)`` with ``f(u) = cos^2((u + 0.008) / 1.008 * pi / 2)``.
        """
        require_count("levels", levels)
        u = np.arange(levels + 1) / levels
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1.0 - f[1:] / f[:-1], largest), spacing=spacing)

    @classmethod
    def linear(
        cls, levels: int = 100, start: float = 1e-4, end: float = 0.02, *, spacing: str = "leading"
    ) -> DiscreteVP:
        """Rates that grow linearly from `start` to `end`."""
        require_count("levels", levels)
        return cls.from_betas(np.linspace(start, end, levels), spacing=spacing)

    @property
    def levels(self) -> int:
        """Number of levels ``K``."""
        return self.signal.shape[0] - 1

    def coefficients(self, level: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        level = jnp.asarray(level)
        if jnp.issubdtype(level.dtype, jnp.integer):
            signal = jnp.take(self.signal, level + 1, mode="clip")
            return jnp.sqrt(signal), jnp.sqrt(1.0 - signal)
        # Clean data has an infinite ratio, so a level between two others lies between two noisy ones.
        log_ratio = jnp.log(self.signal[1:]) - jnp.log1p(-self.signal[1:])
        between = jnp.interp(level, jnp.arange(self.levels), log_ratio)
        return jnp.sqrt(jax.nn.sigmoid(between)), jnp.sqrt(jax.nn.sigmoid(-between))

    def noise_scale(self, level: Array) -> Float[Array, "..."]:
        return jnp.ones_like(self.coefficients(level)[1])

    def network_time(self, level: Array) -> Float[Array, "..."]:
        return jnp.asarray(level, jnp.result_type(float))

    def sample_level(self, key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
        return jax.random.randint(key, shape, 0, self.levels)

    def match(self, ratio: Float[Array, "..."]) -> Int[Array, "..."]:
        signal = 1.0 / (1.0 + jnp.asarray(ratio) ** 2)
        return jnp.argmin(jnp.abs(self.signal[1:] - signal[..., None]), axis=-1).astype(jnp.int32)

    def match_between(self, ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        """The level between two levels at which ``sigma / alpha`` is `ratio`, for networks that take real numbers."""
        log_ratio = jnp.log(self.signal[1:]) - jnp.log1p(-self.signal[1:])
        # Interpolation wants rising abscissas.
        return jnp.interp(
            -2.0 * jnp.log(jnp.asarray(ratio)), log_ratio[::-1], jnp.arange(self.levels - 1.0, -1.0, -1.0)
        )

    def grid(self, steps: int) -> Grid:
        require_count("steps", steps)
        if steps > self.levels:
            raise InputError(f"steps is {steps}, but the schedule has only {self.levels} levels.")
        if self.spacing == "leading":
            stride = self.levels // steps
            current = (np.arange(steps) * stride)[::-1]
            following = current - stride
        elif self.spacing == "trailing":
            current = np.round(np.arange(self.levels, 0, -self.levels / steps)).astype(int)[:steps] - 1
            following = np.append(current[1:], -1)
        else:
            current = np.round(np.linspace(0, self.levels - 1, steps)).astype(int)[::-1]
            following = np.append(current[1:], -1)
        return Grid(jnp.asarray(current, jnp.int32), jnp.asarray(np.maximum(following, -1), jnp.int32))

    def single_steps(self, labels: Any) -> Grid:
        """Steps of exactly one level each, at the given levels only, as real-time iteration takes them.

        Args:
            labels: levels, strictly decreasing and ending in 0.

        Raises:
            InputError: they are not, or one is outside ``0 .. K-1``.
        """
        given = np.asarray(labels)
        good = given.ndim == 1 and given.size > 0 and np.issubdtype(given.dtype, np.integer)
        good = good and bool(np.all(np.diff(given) < 0)) and given[-1] == 0 and given[0] < self.levels
        require(
            good, "labels", given.tolist(), f"whole numbers that fall strictly to 0, from {self.levels - 1} at most"
        )
        return Grid(jnp.asarray(given, jnp.int32), jnp.asarray(given - 1, jnp.int32))

    @property
    def prior_scale(self) -> float:
        return 1.0


class ContinuousProcess(NoiseProcess):
    """A process whose levels are real numbers, so that samplers may solve its differential equation."""

    def rates(self, level: Array) -> tuple[Array, Array]:
        """``(d alpha / d level, d sigma / d level)``."""
        level = jnp.asarray(level, jnp.result_type(float))
        return jax.jvp(self.coefficients, (level,), (jnp.ones_like(level),))[1]


class RectifiedFlow(ContinuousProcess):
    """The straight line between data and noise: ``alpha = 1 - t``, ``sigma = t`` (Liu et al., 2022, arXiv:2209.03003).

    The level ``t`` runs from 0 (data) to 1 (noise). Many flow policies count time the other way.

    Attributes:
        shift: how many times larger the ratio of noise to signal is, where levels are drawn and sampled, than at even
            levels: below 1 for data whose details are fine beside its spread, above 1 for the opposite (Esser et al.,
            2024, arXiv:2403.03206, section 5.3.2). The line itself stays what it is.
    """

    shift: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        require_number("shift", self.shift, above=0.0)

    def _shifted(self, even: Float[Array, "..."]) -> Float[Array, "..."]:
        return even if self.shift == 1.0 else self.shift * even / (1.0 + (self.shift - 1.0) * even)

    def coefficients(self, level: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return 1.0 - level, jnp.asarray(level)

    def network_time(self, level: Array) -> Float[Array, "..."]:
        return jnp.asarray(level)

    def sample_level(self, key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        return self._shifted(jax.random.uniform(key, shape))

    def match(self, ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        return ratio / (1.0 + ratio)

    def grid(self, steps: int) -> Grid:
        require_count("steps", steps)
        levels = self._shifted(jnp.linspace(1.0, 0.0, steps + 1))
        return Grid(levels[:-1], levels[1:])

    @property
    def prior_scale(self) -> float:
        return 1.0


class ContinuousVP(ContinuousProcess):
    """The variance-preserving differential equation (Song et al., 2021, arXiv:2011.13456).

    ``alpha(t) = exp(-t^2 (b1 - b0) / 4 - t b0 / 2)`` and ``sigma^2 = 1 - alpha^2``, with ``t`` from 0 to 1.

    Attributes:
        beta_min: noise rate ``b0`` at ``t = 0``.
        beta_max: noise rate ``b1`` at ``t = 1``.
        smallest: the cleanest level that is trained and sampled; the score has no limit at 0.
    """

    beta_min: Continuous = scalar(0.1)
    beta_max: Continuous = scalar(20.0)
    smallest: Continuous = scalar(1e-3)

    def __check_init__(self) -> None:
        require_number("beta_min", self.beta_min, above=0.0)
        require_number("beta_max", self.beta_max, above=0.0)
        require_number("smallest", self.smallest, above=0.0, below=1.0)

    def _exponent(self, level: Array) -> Array:
        return -0.25 * level**2 * (self.beta_max - self.beta_min) - 0.5 * level * self.beta_min

    def coefficients(self, level: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        exponent = self._exponent(jnp.asarray(level, jnp.result_type(float)))
        return jnp.exp(exponent), jnp.sqrt(-jnp.expm1(2.0 * exponent))

    def noise_scale(self, level: Array) -> Float[Array, "..."]:
        return jnp.ones_like(self.coefficients(level)[1])

    def network_time(self, level: Array) -> Float[Array, "..."]:
        return jnp.asarray(level)

    def sample_level(self, key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        return jax.random.uniform(key, shape, minval=self.smallest, maxval=1.0)

    def match(self, ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        # -log(1 + ratio^2) = 2 exponent, a quadratic in t; in this form its root loses no digits near t = 0.
        spread, depth = 0.5 * (self.beta_max - self.beta_min), jnp.log1p(ratio**2)
        root = jnp.sqrt(self.beta_min**2 + 4.0 * spread * depth)
        return 2.0 * depth / (self.beta_min + root)

    def grid(self, steps: int) -> Grid:
        require_count("steps", steps)
        levels = jnp.linspace(1.0, 0.0, steps + 1)
        return Grid(jnp.maximum(levels[:-1], self.smallest), levels[1:])

    @property
    def prior_scale(self) -> float:
        return 1.0


class EDM(ContinuousProcess):
    """Noise added to unscaled data: ``alpha = 1``, ``sigma`` the level (Karras et al., 2022, arXiv:2206.00364).

    Attributes:
        smallest: cleanest level that a sampler visits before clean data.
        largest: where it starts.
        exponent: ``rho``: how much closer together the levels are near the data.
        log_mean: mean of the logarithm of the levels in training.
        log_std: standard deviation of it.
    """

    smallest: float = eqx.field(static=True, default=0.002)
    largest: float = eqx.field(static=True, default=80.0)
    exponent: float = eqx.field(static=True, default=7.0)
    log_mean: Continuous = scalar(-1.2)
    log_std: Continuous = scalar(1.2)

    def __check_init__(self) -> None:
        require_number("smallest", self.smallest, above=0.0)
        require_number("largest", self.largest, above=self.smallest)
        require_number("exponent", self.exponent, above=0.0)
        require_number("log_std", self.log_std, above=0.0)

    def coefficients(self, level: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        level = jnp.asarray(level, jnp.result_type(float))
        return jnp.ones_like(level), level

    def network_time(self, level: Array) -> Float[Array, "..."]:
        return 0.25 * jnp.log(level)

    def sample_level(self, key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        return jnp.exp(self.log_mean + self.log_std * jax.random.normal(key, shape))

    def match(self, ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        return ratio

    def grid(self, steps: int) -> Grid:
        require_count("steps", steps)
        ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
        ends = self.largest ** (1 / self.exponent), self.smallest ** (1 / self.exponent)
        levels = (ends[0] + ramp * (ends[1] - ends[0])) ** self.exponent
        visited = jnp.asarray(np.append(levels, 0.0), jnp.result_type(float))
        return Grid(visited[:-1], visited[1:])

    @property
    def prior_scale(self) -> float:
        return self.largest
