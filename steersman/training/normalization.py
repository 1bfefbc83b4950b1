"""Running moments, and the observation and reward normalizers built on them."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steersman.policies.preprocessing import Standardize


class RunningMoments(eqx.Module):
    """Mean and variance of everything seen so far, updated batch by batch without losing digits.

    Batches are merged by the pairwise formula of Chan, Golub and LeVeque (1979), so the result does not depend on
    the batch size. The count is a float, which stays exact up to 2^24 and then grows only approximately: by then the
    moments no longer move.

    With a decay below one the older batches fade, and these are the exponentially weighted moments by which PPO-EWMA
    standardizes advantages (Hilton, Cobbe and Schulman, 2022, arXiv:2110.00641). For equal batches of ``n`` rows the
    count then tends to ``n / (1 - decay)``.

    Attributes:
        count: number of rows seen; where older ones fade, what they still weigh.
        mean: running mean ``[D]``.
        m2: running sum of squared deviations ``[D]``.
    """

    count: Float[Array, ""]
    mean: Float[Array, "*D"]
    m2: Float[Array, "*D"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> RunningMoments:
        """Moments of nothing yet."""
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))

    def update(
        self, batch: Float[Array, "..."] | Int[Array, "..."], decay: Float[Array, ""] | float = 1.0
    ) -> RunningMoments:
        """Merges every row of `batch` (all leading axes are rows).

        Args:
            batch: what is new.
            decay: what everything seen before weighs from now on, relative to before, in [0, 1]; at zero only `batch`
                counts.
        """
        rows = batch.reshape((-1, *self.mean.shape)).astype(jnp.float32)
        batch_count = jnp.asarray(rows.shape[0], jnp.float32)
        batch_mean = jnp.mean(rows, axis=0)
        batch_m2 = jnp.sum((rows - batch_mean) ** 2, axis=0)
        count = decay * self.count
        total = count + batch_count
        delta = batch_mean - self.mean
        mean = self.mean + delta * (batch_count / total)
        m2 = decay * self.m2 + batch_m2 + delta**2 * (count * batch_count / total)
        return RunningMoments(total, mean, m2)

    @property
    def variance(self) -> Float[Array, "*D"]:
        """Population variance; one where nothing has been seen."""
        return jnp.where(self.count > 0, self.m2 / jnp.maximum(self.count, 1.0), 1.0)

    def standardizer(self, clip: float = 10.0, epsilon: float = 1e-8) -> Standardize:
        """The frozen map ``clip((x - mean) / std)`` of these moments."""
        return Standardize(self.mean, 1.0 / jnp.sqrt(self.variance + epsilon), clip)


class RewardScaler(eqx.Module):
    """Divides rewards by the running standard deviation of the discounted return.

    Rewards are scaled and never shifted: a shift would change which policy is best wherever episodes end.

    Attributes:
        moments: moments of the discounted return.
        discounted_return: the running return of each environment ``[N]``, zero at an episode's start.
    """

    moments: RunningMoments
    discounted_return: Float[Array, " N"]

    @classmethod
    def zeros(cls, num_envs: int) -> RewardScaler:
        """A scaler that has seen nothing."""
        return cls(RunningMoments.zeros(), jnp.zeros(num_envs))

    def update(
        self, reward: Float[Array, "T N"], done: Bool[Array, "T N"], gamma: Float[Array, ""] | float
    ) -> RewardScaler:
        """Follows the discounted return through one batch of rollouts and merges its values."""

        def step(running: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            r, d = inputs
            running = running * gamma + r
            return jnp.where(d, 0.0, running), running

        last, returns = jax.lax.scan(step, self.discounted_return, (reward, done))
        return RewardScaler(self.moments.update(returns), last)

    def scale(self, reward: Float[Array, "..."], clip: float = 10.0, epsilon: float = 1e-8) -> Float[Array, "..."]:
        """Scaled rewards, clipped to ``[-clip, clip]``."""
        return jnp.clip(reward / jnp.sqrt(self.moments.variance + epsilon), -clip, clip)
