"""How a sampling planner learns from candidates: the rules that tell the family's members apart.

Every rule keeps a diagonal Gaussian over the knots of a plan, draws candidates from it and moves it towards the better
ones. Sources: random shooting; predictive sampling (Howell et al., 2022, arXiv:2212.00541); the cross-entropy method
(Rubinstein, 1999); iCEM (Pinneri et al., 2020, arXiv:2008.06389); path integrals, MPPI (Williams et al., 2017,
arXiv:1509.01149).
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import require, require_count, require_number
from steersman.training.schedules import Continuous, scalar


class Search(NamedTuple):
    """What is believed of the best plan.

    Attributes:
        mean: of the knots ``[K, m]``.
        std: of each ``[K, m]``.
        kept: candidates that are tried again ``[R, K, m]``.
    """

    mean: Float[Array, "K m"]
    std: Float[Array, "K m"]
    kept: Float[Array, "R K m"]


class SearchRule(eqx.Module):
    """How candidates are drawn and what is learned from their costs.

    Attributes:
        std: standard deviation at the start of each plan, in the controls' units; one number, or one for each control.
    """

    std: eqx.AbstractVar[Continuous]

    def init(self, mean: Float[Array, "K m"]) -> Search:
        """The search around a first guess."""
        std = jnp.broadcast_to(jnp.asarray(self.std, mean.dtype), mean.shape)
        return Search(mean, std, jnp.zeros((0, *mean.shape), mean.dtype))

    def restart(self, search: Search) -> Search:
        """The search of the next plan, from the last one's, already shifted in time: as wide as the first again."""
        return Search(search.mean, self.init(search.mean).std, search.kept)

    def draw(
        self, search: Search, bounds: tuple[Array, Array], count: int, key: Key[Array, ""]
    ) -> Float[Array, "N K m"]:
        """`count` candidates, not yet brought within bounds; the mean itself is the first of them."""
        del bounds
        noise = jax.random.normal(key, (count - 1, *search.mean.shape), search.mean.dtype)
        return jnp.concatenate([search.mean[None], search.mean + search.std * noise])

    @abc.abstractmethod
    def update(
        self, search: Search, candidates: Float[Array, "N K m"], costs: Float[Array, " N"], key: Key[Array, ""]
    ) -> Search:
        """Learns from candidates.

        Args:
            search: what was believed.
            candidates: knots as they were applied.
            costs: of each; infinite where a candidate failed.
            key: randomness.
        """

    def check(self, samples: int) -> None:
        """Refuses a number of samples that the rule cannot work with."""
        require_count("samples", samples)


def _best(candidates: Array, costs: Array, count: int) -> tuple[Array, Array]:
    """The `count` cheapest candidates and their costs."""
    negative, index = jax.lax.top_k(-costs, count)
    return candidates[index], -negative


class PredictiveSampling(SearchRule):
    """The cheapest candidate becomes the mean: the simplest rule, and hard to beat where simulation is cheap.

    Attributes:
        std: see :class:`SearchRule`.
    """

    std: Continuous = scalar(0.5)

    def update(self, search: Search, candidates: Array, costs: Array, key: Key[Array, ""]) -> Search:
        del key
        return search._replace(mean=candidates[jnp.argmin(costs)])


class RandomShooting(PredictiveSampling):
    """Candidates anywhere within the bounds, and the best of all: the baseline that needs no guess.

    Attributes:
        std: not used; bounds must be finite.
    """

    std: Continuous = scalar(1.0)

    def draw(self, search: Search, bounds: tuple[Array, Array], count: int, key: Key[Array, ""]) -> Array:
        low, high = bounds
        shape = (count - 1, *search.mean.shape)
        anywhere = low + (high - low) * jax.random.uniform(key, shape, search.mean.dtype)
        return jnp.concatenate([search.mean[None], anywhere])


class _Fitting(SearchRule):
    """Fits the Gaussian to weighted candidates.

    Attributes:
        least_std: below which no standard deviation falls.
        momentum: weight of the old mean and standard deviation, in [0, 1).
    """

    least_std: eqx.AbstractVar[Continuous]
    momentum: eqx.AbstractVar[Continuous]

    def __check_init__(self) -> None:
        require_number("least_std", self.least_std, at_least=0.0)
        require_number("momentum", self.momentum, at_least=0.0, below=1.0)

    def fitted(
        self, search: Search, candidates: Float[Array, "N K m"], weights: Float[Array, " N"]
    ) -> tuple[Float[Array, "K m"], Float[Array, "K m"]]:
        """Weighted mean and standard deviation of candidates, mixed with the old ones."""
        mean = jnp.einsum("n,nkm->km", weights, candidates)
        spread = jnp.sqrt(jnp.einsum("n,nkm->km", weights, (candidates - mean) ** 2))
        mean = self.momentum * search.mean + (1.0 - self.momentum) * mean
        std = self.momentum * search.std + (1.0 - self.momentum) * jnp.maximum(spread, self.least_std)
        return mean, std


class CrossEntropy(_Fitting):
    """The Gaussian is fitted to the cheapest candidates, again and again.

    Attributes:
        elites: how many those are.
        std: see :class:`SearchRule`.
        least_std: below which no standard deviation falls.
        momentum: weight of the old mean and standard deviation, in [0, 1).
    """

    elites: int = eqx.field(static=True, default=8)
    std: Continuous = scalar(0.5)
    least_std: Continuous = scalar(0.01)
    momentum: Continuous = scalar(0.0)

    def __check_init__(self) -> None:
        require_count("elites", self.elites)

    def check(self, samples: int) -> None:
        require_count("samples", samples)
        require(self.elites <= samples, "elites", self.elites, f"at most samples, {samples}")

    def update(self, search: Search, candidates: Array, costs: Array, key: Key[Array, ""]) -> Search:
        del key
        elites, _ = _best(candidates, costs, self.elites)
        mean, std = self.fitted(search, elites, jnp.full(self.elites, 1.0 / self.elites, elites.dtype))
        return search._replace(mean=mean, std=std)


class ImprovedCrossEntropy(CrossEntropy):
    """iCEM: noise correlated in time, and elites that are tried again in the next iteration and at the next step.

    Attributes:
        colour: exponent of the noise's power spectrum ``1 / f^colour``; 0 is white.
        keep: elites that are tried again.
    """

    colour: float = eqx.field(static=True, default=2.0)
    keep: int = eqx.field(static=True, default=3)
    momentum: Continuous = scalar(0.1)

    def __check_init__(self) -> None:
        require_number("colour", self.colour, at_least=0.0)
        require_count("keep", self.keep, minimum=0)
        require(self.keep <= self.elites, "keep", self.keep, f"at most elites, {self.elites}")

    def init(self, mean: Float[Array, "K m"]) -> Search:
        return super().init(mean)._replace(kept=jnp.broadcast_to(mean, (self.keep, *mean.shape)))

    def draw(self, search: Search, bounds: tuple[Array, Array], count: int, key: Key[Array, ""]) -> Array:
        del bounds
        noise = coloured_noise(key, (count - 1, *search.mean.shape), self.colour, search.mean.dtype)
        return jnp.concatenate([search.mean[None], search.mean + search.std * noise])

    def update(self, search: Search, candidates: Array, costs: Array, key: Key[Array, ""]) -> Search:
        search = super().update(search, candidates, costs, key)
        return search._replace(kept=_best(candidates, costs, self.keep)[0])


class PathIntegral(_Fitting):
    """MPPI: candidates count by ``exp(-cost / temperature)``.

    With `elites` only the cheapest count, and the standard deviation is fitted too, as TD-MPC plans (Hansen et al.,
    2022, arXiv:2203.04955); without, all count and it stays.

    Attributes:
        temperature: in the costs' unit.
        elites: how many candidates count; all where None.
        std: see :class:`SearchRule`.
        least_std: below which no standard deviation falls.
        most_std: above which none rises.
        momentum: weight of the old mean and standard deviation, in [0, 1).
    """

    temperature: Continuous = scalar(0.1)
    elites: int | None = eqx.field(static=True, default=None)
    std: Continuous = scalar(0.5)
    least_std: Continuous = scalar(0.01)
    momentum: Continuous = scalar(0.0)
    most_std: Continuous = scalar(np.inf)

    def __check_init__(self) -> None:
        require_number("temperature", self.temperature, above=0.0)
        if self.elites is not None:
            require_count("elites", self.elites)

    def check(self, samples: int) -> None:
        require_count("samples", samples)
        if self.elites is not None:
            require(self.elites <= samples, "elites", self.elites, f"at most samples, {samples}")

    def weights(self, costs: Float[Array, " N"]) -> Float[Array, " N"]:
        """Shares of candidates; failed ones have none."""
        return jax.nn.softmax(-(costs - jnp.min(costs)) / self.temperature)

    def update(self, search: Search, candidates: Array, costs: Array, key: Key[Array, ""]) -> Search:
        del key
        if self.elites is not None:
            candidates, costs = _best(candidates, costs, self.elites)
        mean, std = self.fitted(search, candidates, self.weights(costs))
        std = search.std if self.elites is None else jnp.minimum(std, self.most_std)
        return search._replace(mean=mean, std=std)


def coloured_noise(
    key: Key[Array, ""], shape: tuple[int, ...], exponent: float, dtype: PyTree = None
) -> Float[Array, "..."]:
    """Noise of unit variance whose power falls as ``1 / f^exponent`` along the last axis but one.

    Drawn in the frequency domain (Timmer and König, 1995); the lowest frequency stands in for the mean's, so that it
    is not infinite.

    Args:
        key: randomness.
        shape: ``[..., T, m]``.
        exponent: 0 white, 1 pink, 2 red.
        dtype: of the result.
    """
    length = shape[-2]
    if length == 1 or exponent == 0.0:
        return jax.random.normal(key, shape, dtype)
    frequency = np.fft.rfftfreq(length)
    frequency[0] = frequency[1]
    scale = frequency ** (-exponent / 2.0)
    # The variance of one number: every frequency but the first and, for even lengths, the last counts twice.
    twice = np.full(len(scale), 2.0)
    twice[0] = 1.0
    if length % 2 == 0:
        twice[-1] = 1.0
    scale = scale * length / np.sqrt(np.sum(twice * scale**2))
    real, imaginary = jax.random.normal(key, (2, *shape[:-2], len(scale), shape[-1]), dtype)
    # Frequencies that stand alone are real, those that count twice have half the variance in each part.
    alone = jnp.asarray(twice == 1.0)[:, None]
    spectrum = jnp.where(alone, real, (real + 1j * imaginary) / np.sqrt(2.0))
    return jnp.fft.irfft(spectrum * jnp.asarray(scale, real.dtype)[:, None], length, axis=-2).astype(real.dtype)
