"""Superposition: chains that keep the log-densities of several denoisers equal (AND) or follow the larger one (OR)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steersman.diffusion.combination import CombinedPrediction
from steersman.diffusion.processes import NoiseProcess
from steersman.diffusion.samplers import Predict, Sampler, Step
from steersman.errors import InputTypeError, require, require_number, unknown_name
from steersman.training.schedules import Continuous, scalar


class SuperpositionMemory(eqx.Module):
    """What a superposition carries.

    Attributes:
        log_density: of the chunk under each denoiser, but for a common constant ``[M]``.
        share: weights ``kappa`` of the last step ``[M]``.
        largest_gap: largest difference between two log-densities after any step.
    """

    log_density: Float[Array, " M"]
    share: Float[Array, " M"]
    largest_gap: Float[Array, ""]


class Superposition(Sampler):
    """Euler-Maruyama on the reverse stochastic equation of several denoisers at once (Skreta et al., 2024).

    The equations are those of "The Superposition of Diffusion Models Using the Ito Density Estimator"
    (arXiv:2412.17762). From one level to the next let ``b`` be the variance that the noise process adds between them
    once the signal is shrunk by ``c = alpha / alpha'`` (``beta_k`` of DDPM), and ``f = (c^2 - 1) / 2`` its drift. Then

        dx   = -f x + b sum_i kappa_i s_i + sqrt(b) z            (z = 0 in a step that ends in clean data)
        dl_i = <dx, s_i> + f d + <f x, s_i> - b/2 |s_i|^2

    with scores ``s_i`` and trackers ``l_i`` of the log-densities. ``"or"`` takes ``kappa = softmax(T l + bias)``, which
    draws from the sum of the densities. ``"and"`` solves for the ``kappa``, with sum 1 and unbounded, that makes all
    ``l_i`` equal after the step: chunks that are equally likely under all denoisers. Takes any denoiser whose
    predictions have parts, :class:`~steersman.diffusion.Combined` above all; its weights do not count.

    Attributes:
        op: ``"and"`` or ``"or"``.
        count: number of denoisers ``M``.
        steps: how many; None for all levels of a discrete process.
        limit: bound on the combined sample; with one, ``"and"`` holds only where it does not bind.
        temperature: ``T`` of ``"or"``.
        bias: logits added by ``"or"``, one for all or one for each denoiser.
    """

    op: str = eqx.field(static=True, default="and")
    count: int = eqx.field(static=True, default=2)
    steps: int | None = eqx.field(static=True, default=None)
    limit: float | None = eqx.field(static=True, default=None)
    temperature: Continuous = scalar(1.0)
    bias: Any = eqx.field(converter=jnp.asarray, default=0.0)

    def __check_init__(self) -> None:
        if self.op not in ("and", "or"):
            raise unknown_name("op", self.op, ("and", "or"))
        require(self.count >= 2, "count", self.count, "at least 2")
        require_number("temperature", self.temperature, at_least=0.0)
        require_number("bias", self.bias)

    @property
    def draws(self) -> bool:
        return True

    def init(self, x: Float[Array, "H D"]) -> SuperpositionMemory:
        zeros = jnp.zeros(self.count, x.dtype)
        return SuperpositionMemory(zeros, zeros, jnp.zeros((), x.dtype))

    def shares(
        self,
        scores: Float[Array, "M d"],
        log_density: Float[Array, " M"],
        added: Float[Array, ""],
        noise: Float[Array, " d"],
    ) -> Float[Array, " M"]:
        """The weights ``kappa`` of one step.

        Args:
            scores: of each denoiser.
            log_density: the trackers before the step.
            added: the variance ``b``.
            noise: the step's ``sqrt(b) z``.
        """
        if self.op == "or":
            return jax.nn.softmax(self.temperature * log_density + self.bias)
        # Differences to the last denoiser turn "all equal" into M - 1 equations; in deviations from equal shares they
        # are B delta = B (1/2 - 1/M) + ..., so that equal scores leave the shares equal.
        count = scores.shape[0]
        apart = scores[:-1] - scores[-1]
        products = apart @ apart.T
        ahead = (log_density[-1] - log_density[:-1]) / added
        right = 0.5 * jnp.diagonal(products) - products.sum(axis=1) / count - apart @ noise / added + ahead
        ridge = 1e-9 + count * jnp.finfo(products.dtype).eps * jnp.trace(products)
        change = jnp.linalg.solve(products + ridge * jnp.eye(count - 1), right)
        return 1.0 / count + jnp.append(change, -jnp.sum(change))

    def step(
        self,
        predict: Predict,
        process: NoiseProcess,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
        noise: Float[Array, "H D"],
        memory: SuperpositionMemory,
    ) -> Step:
        alpha, sigma = process.coefficients(current)
        alpha_next, sigma_next = process.coefficients(following)
        kept = alpha / alpha_next
        added = sigma**2 - kept**2 * sigma_next**2
        drift = 0.5 * (kept**2 - 1.0)
        found = predict(x, current)
        if not isinstance(found, CombinedPrediction) or found.parts is None:
            raise InputTypeError(
                "denoiser gives one prediction, but a Superposition needs those of several: a Combined of denoisers "
                "with equally long chunks."
            )
        count = found.parts.noise.shape[0]
        require(count == self.count, "count", self.count, f"{count}, the number of denoisers")
        scores = -found.parts.noise.reshape(count, x.size) / sigma
        std = jnp.where(sigma_next > 0.0, jnp.sqrt(added), 0.0)
        random = std * noise.ravel()
        shares = self.shares(scores, memory.log_density, added, random)
        toward = shares @ scores
        if self.limit is not None:
            sample = jnp.clip((x.ravel() + sigma**2 * toward) / alpha, -self.limit, self.limit)
            toward = (alpha * sample - x.ravel()) / sigma**2
        change = -drift * x.ravel() + added * toward + random
        squares = jnp.sum(scores**2, axis=1)
        gained = scores @ (change + drift * x.ravel()) + drift * x.size - 0.5 * added * squares
        reached = memory.log_density + gained
        gap = jnp.maximum(memory.largest_gap, jnp.max(reached) - jnp.min(reached))
        end = x + change.reshape(x.shape)
        return Step(end, end - random.reshape(x.shape), std, SuperpositionMemory(reached, shares, gap))
