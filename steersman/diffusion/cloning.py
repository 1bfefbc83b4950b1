"""Behaviour cloning: a denoiser learns the chunks that an expert followed observations with."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree, UInt32

from steersman.diffusion.denoiser import Flatten, NetworkDenoiser
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.losses import denoising_loss
from steersman.diffusion.predictions import check_prediction
from steersman.diffusion.processes import DiscreteVP, NoiseProcess
from steersman.diffusion.samplers import DDPM, Sampler
from steersman.diffusion.scaling import Scaling, normalize_observation
from steersman.envs.chunk_data import ChunkData
from steersman.errors import InputError, InputTypeError, require, require_count
from steersman.policies import ChunkPolicy
from steersman.training.algorithm import IterativeAlgorithm, Metrics
from steersman.training.averaging import Average, MovingAverage
from steersman.training.optimizers import AdamW, Optimizer, descend
from steersman.training.schedules import Continuous, Scheduled, as_scalar, resolve, scalar


class DenoiserRecipe(eqx.Module):
    """How a denoiser for some data is made; its networks' sizes follow from the data."""

    process: eqx.AbstractVar[NoiseProcess]

    @abc.abstractmethod
    def make(self, observation: PyTree, chunk_shape: tuple[int, int], key: Key[Array, ""]) -> NetworkDenoiser:
        """A denoiser with fresh parameters.

        Args:
            observation: one observation or window, for its shapes.
            chunk_shape: ``(H, D)``.
            key: randomness of the initialization.
        """


class MLPRecipe(DenoiserRecipe):
    """A multilayer perceptron on the noisy chunk, the time and the flattened observation.

    Attributes:
        process: the noise process.
        prediction: what the network predicts.
        hidden: width of each hidden layer.
        activation: between layers.
        time_size: number of time features.
        time_features: other features of time, for example :class:`~steersman.networks.OctaveTime`, in place of that
            number of sinusoids.
        output_scale: constant factor on the network's output.
        encoder: makes the condition of an observation; a vector of all its numbers where None.
    """

    process: NoiseProcess = eqx.field(default_factory=DiscreteVP.squared_cosine)
    prediction: str = eqx.field(static=True, default="noise")
    hidden: tuple[int, ...] = eqx.field(static=True, default=(256, 256, 256))
    activation: str = eqx.field(static=True, default="swish")
    time_size: int = eqx.field(static=True, default=16)
    time_features: Callable[[Array], Array] | None = None
    output_scale: float = eqx.field(static=True, default=1.0)
    encoder: EncoderRecipe | None = None

    def __check_init__(self) -> None:
        check_prediction(self.prediction)
        require_count("time_size", self.time_size)

    def make(self, observation: PyTree, chunk_shape: tuple[int, int], key: Key[Array, ""]) -> NetworkDenoiser:
        from steersman.networks import MLPDenoiser

        encoder_key, network_key = jax.random.split(key)
        encoder = Flatten() if self.encoder is None else self.encoder.make(observation, encoder_key)
        condition = jax.eval_shape(encoder, observation)
        # The features of time are made for numbers from 0 to the number of levels, or from 0 to 1.
        longest = float(getattr(self.process, "levels", 1))
        network = MLPDenoiser(
            chunk_shape,
            condition.shape[0],
            self.hidden,
            self.activation,
            time_size=self.time_size,
            longest_time=longest,
            time_features=self.time_features,
            key=network_key,
        )
        return NetworkDenoiser(
            network=network,
            process=self.process,
            chunk_shape=chunk_shape,
            prediction=self.prediction,
            encoder=encoder,
            output_scale=self.output_scale,
        )


class EncoderRecipe(eqx.Module):
    """How an encoder for some observations is made."""

    @abc.abstractmethod
    def make(self, observation: PyTree, key: Key[Array, ""]) -> Any:
        """An encoder: a module called with one observation that returns a vector ``[C]``."""


class Cloned(eqx.Module):
    """What :class:`Cloning` carries.

    Attributes:
        denoiser: the newest parameters.
        average: their running average.
        optimizer: the optimizer's memory.
        updates: number of updates.
        action_scaling: from the data's actions to the denoiser's units.
        observation_scaling: the same for observations.
        blank: an all-zero observation without the window's axis.
        key: randomness of what is to come.
        observation_horizon: length of the windows; None for plain observations.
    """

    denoiser: NetworkDenoiser
    average: Average
    optimizer: PyTree
    updates: UInt32[Array, ""]
    action_scaling: Scaling
    observation_scaling: PyTree
    blank: PyTree
    key: Key[Array, ""]
    observation_horizon: int | None = eqx.field(static=True)


class Cloning(IterativeAlgorithm):
    """Trains a generative policy on demonstrations: denoising score matching or flow matching, by the process.

    One iteration is one gradient step. The learned policy uses the running average of the parameters.

    Attributes:
        recipe: how the denoiser is made.
        sampler: how the policy draws chunks.
        evaluation: the sampler of the policy's ``mode()``; the same one where None.
        learning_rate: step size; schedules count updates.
        batch_size: pairs in one step.
        optimizer: turns gradients into steps.
        max_grad_norm: bound on the gradient's norm, or None.
        average: the running average of the parameters.
        action_scaling: the data's scaling of actions, see :meth:`Scaling.fit`; none where the data is in the network's
            units already.
        observation_scaling: the same for observations: one scaling, or a dictionary of them.
        action_horizon: rows that the policy plays of each chunk; all that follow the window's past where None.
    """

    recipe: DenoiserRecipe = eqx.field(default_factory=MLPRecipe)
    sampler: Sampler = eqx.field(default_factory=DDPM)
    evaluation: Sampler | None = None
    learning_rate: Scheduled = scalar(1e-3)
    batch_size: int = eqx.field(static=True, default=256)
    optimizer: Optimizer = eqx.field(default_factory=AdamW)
    max_grad_norm: Continuous | None = eqx.field(converter=as_scalar, default=None)
    average: MovingAverage = eqx.field(default_factory=MovingAverage)
    action_scaling: Scaling = eqx.field(default_factory=Scaling.identity)
    observation_scaling: PyTree = None
    action_horizon: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        require_count("batch_size", self.batch_size)

    def init(self, problem: Any, key: Key[Array, ""]) -> Cloned:
        if not isinstance(problem, ChunkData):
            raise InputTypeError(f"problem is a {type(problem).__name__}, but cloning needs ChunkData.")
        network_key, key = jax.random.split(key)
        observation, chunk = problem.batch(jnp.zeros(1, jnp.int32))
        first = jax.tree.map(lambda leaf: leaf[0], normalize_observation(self.observation_scaling, observation))
        shape = (chunk.shape[1], chunk.shape[2])
        skipped = (problem.observation_horizon or 1) - 1
        if self.action_horizon is not None:
            require_count("action_horizon", self.action_horizon)
            allowed = f"at most {shape[0] - skipped}, the rows of a chunk that follow the window's past"
            require(self.action_horizon <= shape[0] - skipped, "action_horizon", self.action_horizon, allowed)
        self._require_reachable(problem)
        denoiser = self.recipe.make(first, shape, network_key)
        learned = eqx.filter(denoiser, denoiser.trainable())
        windowed = problem.observation_horizon is not None
        blank = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0, 0] if windowed else leaf[0]), observation)
        return Cloned(
            denoiser=denoiser,
            average=self.average.init(learned),
            optimizer=self.optimizer.transformation().init(learned),
            updates=jnp.zeros((), jnp.uint32),
            action_scaling=self.action_scaling,
            observation_scaling=self.observation_scaling,
            blank=blank,
            key=key,
            observation_horizon=problem.observation_horizon,
        )

    def _require_reachable(self, problem: ChunkData) -> None:
        """One sentence for actions that the sampler could hardly ever draw, where they can be seen."""
        limit, given = self.sampler.limit, (problem.actions, self.action_scaling.offset, self.action_scaling.scale)
        if limit is None or any(isinstance(part, Tracer) for part in given):
            return
        actions, offset, scale = map(np.asarray, given)
        beyond = float(np.mean(np.abs((actions - offset) / scale) > limit))
        if beyond > 0.5:
            raise InputError(
                f"problem has actions of which {beyond:.0%} lie beyond the sampler's limit {limit} in the denoiser's "
                "units: give action_scaling, such as Scaling.fit(data.actions), or another limit."
            )

    def loss(
        self, denoiser: NetworkDenoiser, observation: PyTree, chunk: Float[Array, "B H D"], key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """The loss of one batch, observations and chunks in the network's units."""
        return jnp.mean(denoising_loss(denoiser, observation, chunk, key))

    def step(self, problem: ChunkData, state: Cloned) -> tuple[Cloned, Metrics]:
        key, index_key, loss_key = jax.random.split(state.key, 3)
        index = jax.random.randint(index_key, (self.batch_size,), 0, problem.size)
        observation, chunk = problem.batch(index)
        observation = normalize_observation(state.observation_scaling, observation)
        chunk = state.action_scaling.normalize(chunk)
        learned, fixed = eqx.partition(state.denoiser, state.denoiser.trainable())

        def loss(learned: NetworkDenoiser) -> Array:
            return self.loss(eqx.combine(learned, fixed), observation, chunk, loss_key)

        rate = resolve(self.learning_rate, state.updates)
        moved = descend(self.optimizer, loss, learned, state.optimizer, rate, self.max_grad_norm)
        learned = moved.parameters
        state = Cloned(
            denoiser=eqx.combine(learned, fixed),
            average=self.average.update(state.average, learned),
            optimizer=moved.memory,
            updates=state.updates + 1,
            action_scaling=state.action_scaling,
            observation_scaling=state.observation_scaling,
            blank=state.blank,
            key=key,
            observation_horizon=state.observation_horizon,
        )
        return state, {"loss": moved.loss, "gradient_norm": moved.gradient_norm}

    def generator(self, state: Cloned) -> ChunkGenerator:
        """What draws chunks, with the averaged parameters."""
        denoiser = eqx.combine(state.average.value, state.denoiser)
        return ChunkGenerator(denoiser, self.sampler, state.action_scaling, state.observation_scaling, self.evaluation)

    def policy(self, state: Cloned) -> ChunkPolicy:
        window = state.observation_horizon
        first = (window or 1) - 1
        rows = state.denoiser.chunk_shape[0] - first if self.action_horizon is None else self.action_horizon
        return self.generator(state).policy(rows, state.blank, observation_horizon=window)
