"""Samplers: from noise to an action chunk, all of them on one scanned loop."""

# Annotations are evaluated here: Equinox does not recognize a stringified AbstractVar, and would make a field of it.

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.denoiser import Denoiser
from steersman.diffusion.predictions import Prediction
from steersman.diffusion.processes import ContinuousProcess, Grid, NoiseProcess
from steersman.errors import InputError, InputTypeError, require, require_count, require_number

#: Asks the denoiser at ``(x, level)``, with whatever guidance and limits are in force.
Predict = Callable[[Array, Array], Prediction]


class Step(eqx.Module):
    """One step of a sampler.

    Attributes:
        next: the chunk at the following level ``[H, D]``.
        mean: the mean of the Gaussian it was drawn from.
        std: its standard deviation; zero where the step is deterministic.
        memory: what the sampler carries on.
    """

    next: Float[Array, "H D"]
    mean: Float[Array, "H D"]
    std: Float[Array, ""]
    memory: PyTree


class Chain(eqx.Module):
    """All that one run of a sampler went through.

    Attributes:
        states: the chunks from the first noise to the result ``[n + 1, H, D]``.
        mean: mean of each transition ``[n, H, D]``.
        std: standard deviation of each transition ``[n]``.
        memory: the sampler's memory after the last step.
    """

    states: Float[Array, "n1 H D"]
    mean: Float[Array, "n H D"]
    std: Float[Array, " n"]
    memory: PyTree

    @property
    def chunk(self) -> Float[Array, "H D"]:
        """The result."""
        return self.states[-1]


class Sampler(eqx.Module):
    """A rule for one step between two levels, and where to place the steps.

    Attributes:
        steps: how many; None for all levels of a discrete process.
        limit: bound on the magnitude of every predicted sample, in normalised units; None for no bound.
    """

    steps: eqx.AbstractVar[int | None]
    limit: eqx.AbstractVar[float | None]

    def __check_init__(self) -> None:
        if self.steps is not None:
            require_count("steps", self.steps)
        if self.limit is not None:
            require_number("limit", self.limit, above=0.0)

    @property
    def draws(self) -> bool:
        """Whether a step draws noise."""
        return False

    def check(self, process: NoiseProcess) -> None:
        """Raises InputTypeError if this rule cannot step through `process`."""
        del process

    def grid(self, process: NoiseProcess) -> Grid:
        """The levels visited."""
        if self.steps is not None:
            return process.grid(self.steps)
        levels = getattr(process, "levels", None)
        if levels is None:
            raise InputError(
                f"steps is None, which means all levels of the process, but a {type(process).__name__} has a continuum."
            )
        return process.grid(levels)

    def start_scale(self, process: NoiseProcess) -> Float[Array, ""] | float:
        """Standard deviation of the noise that it starts from."""
        return process.prior_scale

    def init(self, x: Float[Array, "H D"]) -> PyTree:
        """The memory before the first step; empty unless a rule has one."""
        del x
        return ()

    @abc.abstractmethod
    def step(
        self,
        predict: Predict,
        process: NoiseProcess,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
        noise: Float[Array, "H D"],
        memory: PyTree,
    ) -> Step:
        """One step from level `current` to level `following`.

        Args:
            predict: the denoiser with everything else decided.
            process: the noise process.
            x: the chunk at `current`.
            current: where it is.
            following: where to go.
            noise: standard normal, or zeros where :attr:`draws` is False.
            memory: from the last step.
        """


def posterior(
    process: NoiseProcess, current: Array, following: Array
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """``q(x' | x, a)`` between two levels of any process: ``(of_x, of_a, std)``, mean ``of_x x + of_a a``.

    With ``x = (alpha / alpha') x' + s e`` and ``s^2 = sigma^2 - (alpha / alpha')^2 sigma'^2``, Bayes' rule gives
    ``of_x = (alpha / alpha') sigma'^2 / sigma^2``, ``of_a = alpha' s^2 / sigma^2`` and ``std = sigma' s / sigma``.
    For variance-preserving processes these are equations 6 and 7 of Ho, Jain and Abbeel (2020, arXiv:2006.11239).
    """
    alpha, sigma = process.coefficients(current)
    alpha_next, sigma_next = process.coefficients(following)
    kept = alpha / alpha_next
    added = jnp.maximum(sigma**2 - kept**2 * sigma_next**2, 0.0)
    return kept * sigma_next**2 / sigma**2, alpha_next * added / sigma**2, sigma_next * jnp.sqrt(added) / sigma


class StochasticSampler(Sampler):
    """A sampler whose transitions are Gaussians, so that chains have likelihoods.

    Attributes:
        std_bounds: bounds on the standard deviation of every transition, the last included, or None. Fine-tuning by
            policy gradients explores with a lower bound (Ren et al., 2024, arXiv:2409.00588).
        noise_limit: bound on the magnitude of the normal numbers drawn; None for no bound.
    """

    std_bounds: eqx.AbstractVar[tuple[float, float] | None]
    noise_limit: eqx.AbstractVar[float | None]

    def __check_init__(self) -> None:
        if self.std_bounds is not None:
            low, high = self.std_bounds
            require(0.0 <= low <= high, "std_bounds", self.std_bounds, "(low, high) with 0 <= low <= high")
        if self.noise_limit is not None:
            require_number("noise_limit", self.noise_limit, above=0.0)

    @property
    def draws(self) -> bool:
        return True

    @abc.abstractmethod
    def transition(
        self, predict: Predict, process: NoiseProcess, x: Float[Array, "H D"], current: Array, following: Array
    ) -> tuple[Float[Array, "H D"], Float[Array, ""]]:
        """Mean and standard deviation of the next chunk, before bounds on the latter."""

    def bounded(self, std: Float[Array, "..."]) -> Float[Array, "..."]:
        """A standard deviation within :attr:`std_bounds`."""
        return std if self.std_bounds is None else jnp.clip(std, *self.std_bounds)

    def step(
        self,
        predict: Predict,
        process: NoiseProcess,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
        noise: Float[Array, "H D"],
        memory: PyTree,
    ) -> Step:
        mean, std = self.transition(predict, process, x, current, following)
        std = self.bounded(std)
        if self.noise_limit is not None:
            noise = jnp.clip(noise, -self.noise_limit, self.noise_limit)
        return Step(mean + std * noise, mean, std, memory)


class DDPM(StochasticSampler):
    """Ancestral sampling: each step draws from ``q(x' | x, a)`` at the predicted sample (Ho et al., 2020).

    With fewer steps than levels it draws from the posterior between the two levels of a step. Works on every process.
    """

    steps: int | None = eqx.field(static=True, default=None)
    limit: float | None = eqx.field(static=True, default=1.0)
    std_bounds: tuple[float, float] | None = eqx.field(static=True, default=None)
    noise_limit: float | None = eqx.field(static=True, default=None)

    def transition(
        self, predict: Predict, process: NoiseProcess, x: Float[Array, "H D"], current: Array, following: Array
    ) -> tuple[Float[Array, "H D"], Float[Array, ""]]:
        of_x, of_a, std = posterior(process, current, following)
        return of_x * x + of_a * predict(x, current).sample, std


class DDIM(StochasticSampler):
    """Implicit sampling (Song, Meng and Ermon, 2021, arXiv:2010.02502).

    ``x' = alpha' a + sqrt(sigma'^2 - s^2) e + s z``, where ``s`` is `eta` times the standard deviation of DDPM's step.
    At 0 the map from noise to chunk is deterministic, and on :class:`~steersman.diffusion.RectifiedFlow` it is Euler's
    method.

    Attributes:
        eta: how stochastic, from 0 to 1 (DDPM).
        limited_noise: whether the noise is read off the limited sample again, as policy-gradient fine-tuning does; the
            network's own otherwise.
    """

    steps: int | None = eqx.field(static=True, default=None)
    eta: float = eqx.field(static=True, default=0.0)
    limit: float | None = eqx.field(static=True, default=1.0)
    std_bounds: tuple[float, float] | None = eqx.field(static=True, default=None)
    noise_limit: float | None = eqx.field(static=True, default=None)
    limited_noise: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        require_number("eta", self.eta, at_least=0.0, at_most=1.0)

    @property
    def draws(self) -> bool:
        return self.eta > 0.0 or self.std_bounds is not None

    def transition(
        self, predict: Predict, process: NoiseProcess, x: Float[Array, "H D"], current: Array, following: Array
    ) -> tuple[Float[Array, "H D"], Float[Array, ""]]:
        return self.transition_with(self.eta, predict, process, x, current, following)

    def transition_with(
        self,
        eta: Float[Array, ""] | float,
        predict: Predict,
        process: NoiseProcess,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
    ) -> tuple[Float[Array, "H D"], Float[Array, ""]]:
        """:meth:`transition` with another eta, which may be one that is learned."""
        alpha, sigma = process.coefficients(current)
        alpha_next, sigma_next = process.coefficients(following)
        found = predict(x, current)
        noise = (x - alpha * found.sample) / sigma if self.limited_noise else found.noise
        std = jnp.zeros_like(sigma_next)
        if not isinstance(eta, float) or eta > 0.0:
            std = eta * posterior(process, current, following)[2]
        # Bounds on the standard deviation apply to what is drawn; the mean keeps the schedule's own. The last step has
        # nothing left, and a root of zero has no derivative.
        left = sigma_next**2 - std**2
        kept = jnp.where(left > 0.0, jnp.sqrt(jnp.where(left > 0.0, left, 1.0)), 0.0)
        return alpha_next * found.sample + kept * noise, std


class OneCall(Sampler):
    """The sample that is predicted at one fixed level: one call of the network, for denoisers distilled to that.

    Attributes:
        level: where the network is asked.
        deterministic: whether it starts from zero instead of noise.
    """

    level: float | int = eqx.field(static=True)
    deterministic: bool = eqx.field(static=True, default=False)
    steps: int | None = eqx.field(static=True, default=1)
    limit: float | None = eqx.field(static=True, default=1.0)

    def grid(self, process: NoiseProcess) -> Grid:
        clean = process.grid(1).following
        return Grid(jnp.asarray([self.level], clean.dtype), clean)

    def start_scale(self, process: NoiseProcess) -> Float[Array, ""] | float:
        return 0.0 if self.deterministic else process.noise_scale(self.grid(process).current[0])

    def step(
        self,
        predict: Predict,
        process: NoiseProcess,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
        noise: Float[Array, "H D"],
        memory: PyTree,
    ) -> Step:
        del process, following, noise
        chunk = predict(x, current).sample
        return Step(chunk, chunk, jnp.zeros((), x.dtype), memory)


class SolverMemory(eqx.Module):
    """What a two-step solver remembers.

    Attributes:
        sample: the sample predicted in the last step.
        step: the last step's length in the logarithm of the signal-to-noise ratio; zero before the first.
    """

    sample: Float[Array, "H D"]
    step: Float[Array, ""]


class DPMSolver(Sampler):
    """DPM-Solver++ of second order with two steps' memory, "2M" (Lu et al., 2022, arXiv:2211.01095).

    With ``lambda = log(alpha / sigma)`` and ``h`` its increase, ``x' = sigma'/sigma x - alpha' (exp(-h) - 1) D``, where
    ``D = (1 + 1/(2r)) a - 1/(2r) a_last`` and ``r = h_last / h``. The first step, and one that ends in clean data, are
    of first order. Deterministic; accurate with 10 to 20 steps.
    """

    steps: int | None = eqx.field(static=True, default=10)
    limit: float | None = eqx.field(static=True, default=1.0)

    def init(self, x: Float[Array, "H D"]) -> SolverMemory:
        return SolverMemory(jnp.zeros_like(x), jnp.zeros((), x.dtype))

    def step(
        self,
        predict: Predict,
        process: NoiseProcess,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
        noise: Float[Array, "H D"],
        memory: SolverMemory,
    ) -> Step:
        del noise
        alpha, sigma = process.coefficients(current)
        alpha_next, sigma_next = process.coefficients(following)
        sample = predict(x, current).sample
        clean = sigma_next <= 0.0
        # exp(-h) is written as a ratio, which has a value where h is infinite: from pure noise, or to clean data.
        shrink = sigma_next * alpha / (alpha_next * sigma)
        h = -jnp.log(jnp.where(shrink > 0.0, shrink, 1.0))
        first = clean | (memory.step <= 0.0) | (shrink <= 0.0)
        weight = jnp.where(first, 0.0, 0.5 * h / jnp.where(first, 1.0, memory.step))
        direction = sample + weight * (sample - memory.sample)
        mean = sigma_next / sigma * x + alpha_next * (1.0 - shrink) * direction
        return Step(mean, mean, jnp.zeros_like(sigma_next), SolverMemory(sample, jnp.asarray(h, x.dtype)))


class FlowSolver(Sampler):
    """Solves ``dx / d level = alpha' a + sigma' e``, the flow of a continuous process.

    Attributes:
        order: 1 for Euler's method, one call a step; 2 for Heun's, two calls a step (the last step, which ends where
            the noise cannot be asked for, is Euler's: Karras et al., 2022, arXiv:2206.00364, algorithm 1).
    """

    steps: int | None = eqx.field(static=True, default=10)
    order: int = eqx.field(static=True, default=1)
    limit: float | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        require(self.order in (1, 2), "order", self.order, "1 (Euler) or 2 (Heun)")

    def check(self, process: NoiseProcess) -> None:
        if not isinstance(process, ContinuousProcess):
            raise InputTypeError(
                f"process is a {type(process).__name__}, but a FlowSolver needs levels that are real numbers: use DDIM "
                "or DPMSolver, or train on a continuous process."
            )

    def step(
        self,
        predict: Predict,
        process: Any,
        x: Float[Array, "H D"],
        current: Array,
        following: Array,
        noise: Float[Array, "H D"],
        memory: PyTree,
    ) -> Step:
        del noise

        def slope(x: Array, level: Array) -> Array:
            alpha_rate, sigma_rate = process.rates(level)
            found = predict(x, level)
            return alpha_rate * found.sample + sigma_rate * found.noise

        h = following - current
        first = slope(x, current)
        mean = x + h * first
        if self.order == 2:
            last = process.coefficients(following)[1] <= 0.0
            second = slope(mean, jnp.where(last, current, following))
            mean = jnp.where(last, mean, x + 0.5 * h * (first + second))
        return Step(mean, mean, jnp.zeros((), x.dtype), memory)


def limited(predict: Predict, limit: float | None) -> Predict:
    """`predict` with its sample kept within ``[-limit, limit]``, after everything else has been decided."""
    if limit is None:
        return predict

    def bounded(x: Array, level: Array) -> Prediction:
        found = predict(x, level)
        # Whatever else a kind of prediction carries is kept.
        return eqx.tree_at(lambda each: each.sample, found, jnp.clip(found.sample, -limit, limit))

    return bounded


def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    condition: PyTree,
    key: Key[Array, ""] | None,
    *,
    start: Float[Array, "H D"] | None = None,
    noises: Float[Array, "n H D"] | None = None,
    grid: Grid | None = None,
    project: Callable[[Array, Array], Array] | None = None,
) -> Chain:
    """Runs a sampler.

    Args:
        denoiser: what says noise from action.
        sampler: the rule.
        condition: what the denoiser's ``encode`` made of the observation.
        key: randomness of the start and of the steps; None where both are given or not needed.
        start: the first state: noise that was drawn elsewhere, or a warm start; drawn where None.
        noises: standard normal numbers for the steps; drawn where None.
        grid: the levels to visit; the sampler's own where None.
        project: called as ``project(x, level)`` before the denoiser is asked, and once on the result with the last
            level: overwrites known entries, or keeps chunks feasible.

    Returns:
        The whole chain; ``.chunk`` is its end. What is not used costs nothing under ``jit``.

    Raises:
        InputError: no key where one is needed, or a start of another shape.
    """
    process = denoiser.process
    sampler.check(process)
    grid = sampler.grid(process) if grid is None else grid
    if key is None and (start is None or (noises is None and sampler.draws)):
        raise InputError("key is None, but the start or the steps are to be drawn.")
    if start is not None:
        require(jnp.shape(start) == denoiser.chunk_shape, "start.shape", jnp.shape(start), f"{denoiser.chunk_shape}")
    start_key, noise_key = (None, None) if key is None else jax.random.split(key)
    if start is None:
        assert start_key is not None
        start = sampler.start_scale(process) * jax.random.normal(start_key, denoiser.chunk_shape)
    x = jnp.asarray(start)
    if noises is None:
        noises = jnp.zeros((grid.steps, *x.shape), x.dtype)
        if sampler.draws and noise_key is not None:
            noises = jax.random.normal(noise_key, (grid.steps, *x.shape), x.dtype)
    require(noises.shape[0] == grid.steps, "noises.shape", noises.shape, f"[{grid.steps}, H, D]")

    def ask(x: Array, level: Array) -> Prediction:
        return denoiser.predict(x, level, condition)

    predict = limited(ask, sampler.limit)

    def body(carry: tuple[Array, PyTree], step: tuple[Array, Array, Array]) -> tuple[tuple[Array, PyTree], tuple]:
        x, memory = carry
        current, following, noise = step
        if project is not None:
            x = project(x, current)
        taken = sampler.step(predict, process, x, current, following, noise, memory)
        return (taken.next, taken.memory), (x, taken.mean, taken.std)

    memory = sampler.init(x)
    (x, memory), (states, mean, std) = jax.lax.scan(body, (x, memory), (grid.current, grid.following, noises))
    if project is not None:
        x = project(x, grid.following[-1])
    return Chain(jnp.concatenate([states, x[None]]), mean, std, memory)


def transition_log_prob(
    following: Float[Array, "... H D"], mean: Float[Array, "... H D"], std: Float[Array, "..."]
) -> Float[Array, "... H D"]:
    """Log-density of each coordinate of the next chunk under the Gaussian transition.

    Args:
        following: the next chunk.
        mean: mean of the transition.
        std: its standard deviation, above zero, without the axes of the chunk.
    """
    std = jnp.asarray(std)[..., None, None]
    return -0.5 * ((following - mean) / std) ** 2 - jnp.log(std) - 0.5 * jnp.log(2.0 * jnp.pi)
