"""Episodes in a batch of experience: their returns, which of them to learn from, and steps drawn from those."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from steersman.errors import require_number
from steersman.training.experience import Experience
from steersman.training.schedules import Continuous, scalar


class EpisodeReturns(NamedTuple):
    """The episodes that a batch has parts of.

    Attributes:
        number: of each step's episode, in the order of the batch put in rows ``[T N]``.
        returns: sum of the rewards that the batch has of each episode; zero for numbers that none has.
        complete: whether it ends in the batch. The first of each environment counts from where the batch begins.
    """

    number: Int[Array, " R"]
    returns: Float[Array, " E"]
    complete: Bool[Array, " E"]

    @classmethod
    def of(cls, experience: Experience) -> EpisodeReturns:
        """Those of a batch ``[T, N]``."""
        steps, envs = experience.reward.shape
        before = jnp.cumsum(experience.done, axis=0) - experience.done
        number = (before + (steps + 1) * jnp.arange(envs)).ravel()
        count = (steps + 1) * envs
        returns = jax.ops.segment_sum(experience.reward.ravel(), number, count)
        ends = jax.ops.segment_sum(experience.done.ravel().astype(jnp.int32), number, count)
        return cls(number, returns, ends > 0)

    @property
    def mean_return(self) -> Float[Array, ""]:
        """Mean return of the complete ones; zero where there is none."""
        return jnp.sum(jnp.where(self.complete, self.returns, 0.0)) / jnp.maximum(jnp.sum(self.complete), 1)


class EpisodeFilter(eqx.Module):
    """Which episodes to learn from: a share of the draws from the better ones, the rest from all.

    Attributes:
        ratio: share drawn from episodes whose return is at or above the quantile; 0 takes all episodes alike.
        quantile: of the returns, at least 0 and below 1.
    """

    ratio: Continuous = scalar(0.8)
    quantile: Continuous = scalar(0.5)

    def __check_init__(self) -> None:
        require_number("ratio", self.ratio, at_least=0.0, at_most=1.0)
        require_number("quantile", self.quantile, at_least=0.0, below=1.0)

    def __call__(
        self, returns: Float[Array, " E"], complete: Bool[Array, " E"]
    ) -> tuple[Float[Array, " E"], Int[Array, ""]]:
        """The weight of each episode, and how many are among the better ones.

        Args:
            returns: of each episode.
            complete: which of them are whole; the others have no weight.
        """
        count = jnp.sum(complete)
        ordered = jnp.sort(jnp.where(complete, returns, jnp.inf))
        place = jnp.clip(jnp.ceil(self.quantile * count).astype(jnp.int32) - 1, 0)
        least = ordered[place]
        # Sums of equal rewards in another order differ in their last digits.
        better = complete & (returns >= least - 1e-5 * (1.0 + jnp.abs(least)))
        kept = jnp.sum(better)
        share = self.ratio * better / jnp.maximum(kept, 1) + (1.0 - self.ratio) * complete / jnp.maximum(count, 1)
        return share, kept


def systematic_draw(key: Key[Array, ""], weight: Float[Array, " R"], size: int) -> Int[Array, " size"]:
    """Places drawn in proportion to their weights: one from each of `size` equal parts of the total weight.

    Args:
        key: randomness within the parts.
        weight: at least zero, with a positive sum.
        size: how many.
    """
    places = (jnp.arange(size) + jax.random.uniform(key, (size,))) / size
    total = jnp.cumsum(weight)
    return jnp.clip(jnp.searchsorted(total, places * total[-1]), 0, weight.size - 1)
