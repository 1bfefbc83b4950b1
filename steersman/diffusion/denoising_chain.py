"""Denoising chains as stochastic policies: every step of a sampler is a Gaussian action with a likelihood."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.diffusion.denoiser import Denoiser, NetworkDenoiser
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.predictions import Prediction
from steersman.diffusion.processes import Grid, NoiseProcess
from steersman.diffusion.samplers import DDIM, StochasticSampler, limited, transition_log_prob
from steersman.diffusion.scaling import Scaling
from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.policies import Architecture, Head, NetworkPolicy, Policy, Preprocess, Record
from steersman.policies.heads import DiagonalGaussian
from steersman.policies.preprocessing import Features
from steersman.training.schedules import Continuous, scalar


class Transitions(NamedTuple):
    """The Gaussians that the steps of a chain are drawn from.

    Attributes:
        mean: ``[..., K, H, D]``.
        std: standard deviations as likelihoods take them ``[..., K]``.
    """

    mean: Float[Array, "... K H D"]
    std: Float[Array, "... K"]


class ChainHead(Head):
    """Likelihoods of denoising chains, one for each step: ``[..., K]``.

    An action is a chain ``[..., K + 1, H, D]`` from its first state to the chunk, its parameters are
    :class:`Transitions`. Only the rows that are played count.

    Attributes:
        scaling: from the task's actions to the denoiser's units.
        rows: rows of a chunk that are played.
        first_row: rows skipped before them.
        low: lower bound of each played number, flattened, or None.
        high: upper bound of each.
        average: take the mean over rows and action dimensions, as DPPO does, instead of the joint density. All
            quantities are then per number: ratios of long chunks stay near one.
        log_prob_bounds: bounds on the log-density of each number, or None.
    """

    scaling: Scaling
    rows: int = eqx.field(static=True)
    first_row: int = eqx.field(static=True, default=0)
    low: tuple[float, ...] | None = eqx.field(static=True, default=None)
    high: tuple[float, ...] | None = eqx.field(static=True, default=None)
    average: bool = eqx.field(static=True, default=True)
    log_prob_bounds: tuple[float, float] | None = eqx.field(static=True, default=(-5.0, 2.0))

    def _played(self, chunk: Float[Array, "... H D"]) -> Float[Array, "... h D"]:
        return chunk[..., self.first_row : self.first_row + self.rows, :]

    def _total(self, parts: Float[Array, "... h D"]) -> Float[Array, "..."]:
        return jnp.mean(parts, axis=(-2, -1)) if self.average else jnp.sum(parts, axis=(-2, -1))

    def log_prob(self, parameters: Transitions, action: Float[Array, "... K1 H D"]) -> Float[Array, "... K"]:
        steps = parameters.mean.shape[-3]
        if action.shape[-3] != steps + 1:
            raise InputError(
                f"action has a chain of {action.shape[-3]} states, but it must be of {steps + 1}: the one before the "
                f"first of {steps} steps, and what each step led to."
            )
        parts = transition_log_prob(self._played(action[..., 1:, :, :]), self._played(parameters.mean), parameters.std)
        return self._total(parts if self.log_prob_bounds is None else jnp.clip(parts, *self.log_prob_bounds))

    def entropy(self, parameters: Transitions) -> Float[Array, "... K"]:
        of_each = jnp.log(parameters.std) + 0.5 * math.log(2.0 * math.pi * math.e)
        return self._total(jnp.broadcast_to(of_each[..., None, None], self._played(parameters.mean).shape))

    def kl(self, old: Transitions, new: Transitions) -> Float[Array, "... K"]:
        old_std, new_std = old.std[..., None, None], new.std[..., None, None]
        apart = self._played(old.mean - new.mean) / new_std
        ratio = old_std / new_std
        return self._total(0.5 * (apart**2 + ratio**2 - 1.0) - jnp.log(ratio))

    def fisher_product(self, parameters: Transitions, tangent: Transitions) -> Transitions:
        played = jnp.zeros_like(parameters.mean).at[..., self.first_row : self.first_row + self.rows, :].set(1.0)
        numbers = self.rows * parameters.mean.shape[-1]
        share = 1.0 / numbers if self.average else 1.0
        precision = share / parameters.std**2
        mean = precision[..., None, None] * played * tangent.mean
        return Transitions(mean, 2.0 * numbers * precision * tangent.std)

    def to_action(self, sample: Float[Array, "... K1 H D"]) -> Float[Array, "... h D"]:
        return self.play(self.scaling.restore(sample[..., -1, :, :]))

    def play(self, chunk: Float[Array, "... H D"]) -> Float[Array, "... h D"]:
        """What is sent to the environment of a chunk in the task's units."""
        action = self._played(chunk)
        if self.low is None or self.high is None:
            return action
        low, high = (np.asarray(bound, action.dtype).reshape(action.shape[-2:]) for bound in (self.low, self.high))
        return jnp.clip(action, low, high)

    @property
    def output_size(self) -> int:
        raise _refused("output of one network")

    def from_output(self, output: Array, free: Array) -> PyTree:
        raise _refused("parameters apart from a chain")

    def sample(self, parameters: PyTree, key: Key[Array, ""]) -> PyTree:
        raise _refused("parameters to sample a chain from")

    def mode(self, parameters: PyTree) -> PyTree:
        raise _refused("mode in closed form")

    def distribution(self, parameters: PyTree) -> Any:
        raise _refused("distribution of chunks that NumPyro knows")


def _refused(what: str) -> InputTypeError:
    return InputTypeError(f"A denoising chain has no {what}: its steps are drawn one after the other.")


class TunedFrom(Denoiser):
    """A denoiser that was fine-tuned at the levels of a chain's last steps, with the original before them.

    Attributes:
        tuned: asked at noise-to-signal ratios up to `ratio`.
        original: asked at greater ones.
        ratio: ``sigma / alpha`` at the first fine-tuned step.
        process: that of both.
        chunk_shape: that of both.
    """

    tuned: Denoiser
    original: Denoiser
    ratio: Float[Array, ""]
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)

    def __init__(self, tuned: Denoiser, original: Denoiser, first: Array):
        """Two denoisers of one process; `first` is the level of the first fine-tuned step."""
        alpha, sigma = original.process.coefficients(first)
        self.tuned = tuned
        self.original = original
        self.ratio = sigma / alpha
        self.process = original.process
        self.chunk_shape = original.chunk_shape

    def encode(self, observation: PyTree) -> tuple[PyTree, PyTree]:
        return self.tuned.encode(observation), self.original.encode(observation)

    def predict(self, x: Float[Array, "H D"], level: Array, condition: tuple[PyTree, PyTree]) -> Prediction:
        alpha, sigma = self.process.coefficients(level)
        # Compared as products, because pure noise may have no signal at all.
        return jax.lax.cond(
            sigma <= self.ratio * alpha * (1.0 + 1e-5),
            lambda: self.tuned.predict(x, level, condition[0]),
            lambda: self.original.predict(x, level, condition[1]),
        )


class KeepObservation(Preprocess):
    """Beside the vector that a critic reads, the observation itself, which a denoiser encodes in its own way."""

    def __call__(self, observation: PyTree) -> Features:
        return super().__call__(observation)._replace(observation=observation)


class ChainPolicy(NetworkPolicy):
    """Draws a chunk step by step and records the chain, whose likelihood any parameters can be asked for again.

    The last `steps` steps are drawn with the trainable copy of the denoiser and recorded; the steps before them keep
    the original, and count as part of the environment (Ren et al., 2024, arXiv:2409.00588).

    Attributes:
        network: the trainable numbers of the denoiser, None in the place of all others.
        source: the original generator: scalings, sampler, and the frozen denoiser.
        exploration_std: least standard deviation that a step draws with, in the denoiser's units.
        likelihood_std: least standard deviation in likelihoods.
        steps: trainable steps ``K``, counted from the chunk.
        noise_limit: bound on the magnitude of the normal numbers drawn, or None.
        eta_bounds: between which the sampler's eta is learned, a logit in `free`; None for the sampler's own.
    """

    network: Any
    source: ChunkGenerator
    exploration_std: Float[Array, ""]
    likelihood_std: Float[Array, ""]
    steps: int = eqx.field(static=True)
    noise_limit: float | None = eqx.field(static=True)
    eta_bounds: tuple[float, float] | None = eqx.field(static=True, default=None)

    @property
    def eta(self) -> Float[Array, ""] | None:
        """The learned eta of the recorded steps, or None."""
        if self.eta_bounds is None:
            return None
        low, high = self.eta_bounds
        return low + (high - low) * jax.nn.sigmoid(self.free[0])

    @property
    def unrolled(self) -> bool:
        return False

    @property
    def _sampler(self) -> Any:
        return self.source.sampler

    @property
    def _process(self) -> NoiseProcess:
        return self.source.denoiser.process

    @property
    def _grid(self) -> Grid:
        return self._sampler.grid(self._process)

    def tuned(self) -> ChunkGenerator:
        """The generator whose denoiser is the trainable copy, at every step."""
        return eqx.tree_at(
            lambda generator: generator.denoiser, self.source, eqx.combine(self.network, self.source.denoiser)
        )

    def generator(self) -> ChunkGenerator:
        """What was learned, for any sampler, composition or guidance: without the exploration's standard deviation."""
        tuned, grid = self.tuned(), self._grid
        if self.steps == grid.steps:
            return tuned
        denoiser = TunedFrom(tuned.denoiser, self.source.denoiser, grid.current[-self.steps])
        return eqx.tree_at(lambda generator: generator.denoiser, self.source, denoiser)

    def init(self, key: Key[Array, ""]) -> PyTree:
        del key
        return ()

    def remember(self, features: Features, carry: PyTree, sample: PyTree) -> PyTree:
        return carry

    def from_features(self, features: Features, carry: PyTree) -> tuple[PyTree, PyTree]:
        raise _refused("parameters apart from a chain")

    def _transition(
        self, denoiser: Denoiser, condition: PyTree, eta: Array | None, x: Array, current: Array, following: Array
    ) -> tuple:
        """Mean and the sampler's own standard deviation of one step, or those with another eta."""

        def ask(x: Array, level: Array) -> Prediction:
            return denoiser.predict(x, level, condition)

        sampler = self._sampler
        given = (limited(ask, sampler.limit), self._process, x, current, following)
        mean, std = sampler.transition(*given) if eta is None else sampler.transition_with(eta, *given)
        return mean, sampler.bounded(std)

    def draw(self, observation: PyTree, key: Key[Array, ""]) -> tuple[Float[Array, "K1 H D"], Transitions]:
        """A chain from its first recorded state to the chunk, and the Gaussians of its steps."""
        grid, process = self._grid, self._process
        shape = self.source.denoiser.chunk_shape
        start_key, noise_key = jax.random.split(key)
        x = self._sampler.start_scale(process) * jax.random.normal(start_key, shape)
        noise = jax.random.normal(noise_key, (grid.steps, *shape), x.dtype)
        if self.noise_limit is not None:
            noise = jnp.clip(noise, -self.noise_limit, self.noise_limit)

        def run(
            generator: ChunkGenerator, eta: Array | None, x: Array, part: slice
        ) -> tuple[Array, tuple[Array, Array, Array]]:
            condition = generator.encode(observation)

            def step(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
                current, following, noise = inputs
                mean, std = self._transition(generator.denoiser, condition, eta, x, current, following)
                x = mean + jnp.maximum(std, self.exploration_std) * noise
                return x, (x, mean, jnp.maximum(std, self.likelihood_std))

            return jax.lax.scan(step, x, (grid.current[part], grid.following[part], noise[part]))

        frozen = grid.steps - self.steps
        if frozen:
            x, _ = run(self.source, None, x, slice(0, frozen))
        _, (states, mean, std) = run(self.tuned(), self.eta, x, slice(frozen, None))
        return jnp.concatenate([x[None], states]), Transitions(mean, std)

    def parameters_for(self, features: Features, carry: PyTree, sample: Float[Array, "... K1 H D"]) -> Transitions:
        """The Gaussians that each step of a recorded chain would be drawn from."""
        del carry
        grid, generator = self._grid, self.tuned()
        current, following = grid.current[-self.steps :], grid.following[-self.steps :]
        require(
            sample.ndim >= 3 and sample.shape[-3] == self.steps + 1,
            "sample.shape",
            sample.shape,
            f"[..., {self.steps + 1}, H, D], a chain with the state before its first step",
        )

        def one(observation: PyTree, states: Array) -> Transitions:
            condition = generator.encode(observation)

            def step(x: Array, current: Array, following: Array) -> tuple[Array, Array]:
                return self._transition(generator.denoiser, condition, self.eta, x, current, following)

            mean, std = jax.vmap(step)(states[:-1], current, following)
            return Transitions(mean, jnp.maximum(std, self.likelihood_std))

        for _ in range(sample.ndim - 3):
            one = jax.vmap(one)
        return one(features.observation, sample)

    def step_log_prob(
        self, observation: PyTree, states: Float[Array, "K1 H D"], step: Int[Array, ""] | int
    ) -> Float[Array, ""]:
        """Log-density of one step of a recorded chain, by one call of the network.

        Args:
            observation: what the chain was drawn for.
            states: the whole chain.
            step: which of the trainable steps, 0 for the noisiest.
        """
        grid, generator = self._grid, self.tuned()
        place = grid.steps - self.steps + step
        around = jnp.stack([states[step], states[step + 1]])
        condition = generator.encode(observation)
        levels = grid.current[place], grid.following[place]
        mean, std = self._transition(generator.denoiser, condition, self.eta, around[0], *levels)
        taken = Transitions(mean[None], jnp.maximum(std, self.likelihood_std)[None])
        return self.head.log_prob(taken, around)[0]

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, Record]:
        states, transitions = self.draw(observation, key)
        record = Record(states, self.head.log_prob(transitions, states), transitions)
        return self.head.to_action(states), carry, record

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        return self.head.to_action(self.draw(observation, key)[0]), carry

    def mode(self) -> Policy:
        """Chunks of :meth:`generator`, with its sampler for evaluation."""
        return WholeChunks(self.generator().mode(), self.head)


class WholeChunks(Policy):
    """Acts with whole chunks, for environments whose actions they are.

    Attributes:
        generator: draws them.
        head: a :class:`ChainHead`, for the rows that are played and their bounds.
    """

    generator: ChunkGenerator
    head: Any

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        return self.head.play(self.generator(observation, key)), carry


class DenoisingChains(Architecture):
    """Fine-tunes a generator through its own sampler: the policy class of any loop that takes an architecture.

    The environment takes chunks (:class:`~steersman.envs.ChunkedEnvironment`) and observes what the denoiser encodes.

    Attributes:
        generator: the pre-trained policy; its sampler must be stochastic, or become so by `exploration_std`.
        steps: how many of the sampler's last steps are fine-tuned ``K'``; all where None.
        exploration_std: least standard deviation of every step while learning, the last one's included, in the
            denoiser's units; above 0, because a step without noise has no likelihood.
        likelihood_std: least standard deviation in likelihoods. Smaller ones make ratios more sensitive.
        noise_limit: bound on the magnitude of the normal numbers drawn, or None.
        first_row: rows of a chunk skipped before those that are played.
        average: see :class:`ChainHead`.
        log_prob_bounds: see :class:`ChainHead`.
        eta_bounds: learn DDIM's eta between these, one number for all states and steps, beginning with the sampler's
            own; None keeps that. How a step explores is then learned where it is above `exploration_std`.
    """

    generator: ChunkGenerator
    steps: int | None = eqx.field(static=True, default=None)
    exploration_std: Continuous = scalar(0.1)
    likelihood_std: Continuous = scalar(0.1)
    noise_limit: float | None = eqx.field(static=True, default=3.0)
    first_row: int = eqx.field(static=True, default=0)
    average: bool = eqx.field(static=True, default=True)
    log_prob_bounds: tuple[float, float] | None = eqx.field(static=True, default=(-5.0, 2.0))
    eta_bounds: tuple[float, float] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        generator = self.generator
        if not isinstance(generator, ChunkGenerator):
            raise InputTypeError(f"generator is a {type(generator).__name__}, but it must be a ChunkGenerator.")
        if not isinstance(generator.sampler, StochasticSampler):
            raise InputTypeError(
                f"generator.sampler is a {type(generator.sampler).__name__}, but its steps must be Gaussians: use DDPM "
                "or DDIM."
            )
        if not isinstance(generator.denoiser, NetworkDenoiser):
            raise InputTypeError(
                f"generator.denoiser is a {type(generator.denoiser).__name__}, but only a NetworkDenoiser has "
                "parameters to fine-tune."
            )
        available = generator.sampler.grid(generator.denoiser.process).steps
        if self.steps is not None:
            require_count("steps", self.steps)
            require(self.steps <= available, "steps", self.steps, f"at most the sampler's {available}")
        require_number("exploration_std", self.exploration_std, above=0.0)
        require_number("likelihood_std", self.likelihood_std, above=0.0)
        if self.noise_limit is not None:
            require_number("noise_limit", self.noise_limit, above=0.0)
        require_count("first_row", self.first_row, minimum=0)
        if self.log_prob_bounds is not None:
            low, high = self.log_prob_bounds
            require(low < high, "log_prob_bounds", self.log_prob_bounds, "(low, high) with low < high")
        if self.eta_bounds is not None:
            if not isinstance(generator.sampler, DDIM):
                kind = type(generator.sampler).__name__
                raise InputTypeError(f"generator.sampler is a {kind}, but only DDIM has an eta to learn.")
            low, high = self.eta_bounds
            allowed = f"(low, high) with 0 <= low < {generator.sampler.eta} < high <= 1 around the sampler's eta"
            require(0.0 <= low < generator.sampler.eta < high <= 1.0, "eta_bounds", self.eta_bounds, allowed)

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> ChainPolicy:
        del initial_log_std, key
        generator: Any = self.generator
        rows, width = generator.denoiser.chunk_shape
        shape = head.shape if isinstance(head, DiagonalGaussian) else None
        if shape is None or len(shape) != 2 or shape[1] != width or self.first_row + shape[0] > rows:
            raise InputError(
                f"actions are of shape {shape}, but they must be a box of at most {rows - self.first_row} rows of "
                f"{width}, which are played of a chunk: wrap the environment in ChunkedEnvironment."
            )
        low, high = (head.low, head.high) if isinstance(head, DiagonalGaussian) else (None, None)
        steps = self.steps or generator.sampler.grid(generator.denoiser.process).steps
        free = jnp.zeros(0)
        if self.eta_bounds is not None:
            least, most = self.eta_bounds
            eta = generator.sampler.eta
            free = jnp.log(jnp.asarray([(eta - least) / (most - eta)]))
        return ChainPolicy(
            preprocess=KeepObservation(preprocess.layout, preprocess.standardize),
            network=eqx.filter(generator.denoiser, generator.denoiser.trainable()),
            free=free,
            head=ChainHead(
                generator.action_scaling, shape[0], self.first_row, low, high, self.average, self.log_prob_bounds
            ),
            source=generator,
            exploration_std=jnp.asarray(self.exploration_std),
            likelihood_std=jnp.asarray(self.likelihood_std),
            steps=steps,
            noise_limit=self.noise_limit,
            eta_bounds=self.eta_bounds,
        )
