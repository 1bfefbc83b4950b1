"""OneDP: a diffusion policy distilled into one network call (Wang et al., 2025, arXiv:2410.21257)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt32

from steersman.diffusion.denoiser import NetworkDenoiser
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.losses import prediction_errors
from steersman.diffusion.processes import DiscreteVP
from steersman.diffusion.samplers import OneCall
from steersman.diffusion.scaling import normalize_observation
from steersman.envs.chunk_data import ObservationData
from steersman.errors import InputError, InputTypeError, require, require_count
from steersman.policies import ChunkPolicy
from steersman.training.algorithm import IterativeAlgorithm, Metrics
from steersman.training.optimizers import Adam, Optimizer, descend
from steersman.training.schedules import Scheduled, resolve, scalar


def reverse_kl_surrogate(
    noisy: Float[Array, "H D"],
    teacher_noise: Float[Array, "H D"],
    generator_noise: Float[Array, "H D"],
    sigma: Float[Array, ""],
) -> Float[Array, ""]:
    """A scalar whose gradient is that of ``sigma^2 KL(p_G || p_teacher)`` at one level.

    Equation 5 of the paper: with scores ``-e / sigma``, the gradient with respect to the noisy chunk is
    ``sigma (e_teacher - e_generator)``. The value means nothing.

    Args:
        noisy: the generator's chunk under noise, through which the gradient flows.
        teacher_noise: what the teacher takes for noise in it.
        generator_noise: what a denoiser of the generator's own chunks takes for noise in it.
        sigma: scale of the noise.
    """
    return jnp.sum(jax.lax.stop_gradient(sigma * (teacher_noise - generator_noise)) * noisy)


class Distilled(eqx.Module):
    """What :class:`OneDP` carries.

    Attributes:
        student: the generator's network, asked at one level.
        score: the denoiser of the generator's own chunks; None where these are single points.
        optimizer: memory of the student's optimizer.
        score_optimizer: that of the other's.
        updates: number of updates of the student.
        key: randomness of what is to come.
    """

    student: NetworkDenoiser
    score: NetworkDenoiser | None
    optimizer: PyTree
    score_optimizer: PyTree
    updates: UInt32[Array, ""]
    key: Key[Array, ""]


class OneDP(IterativeAlgorithm):
    """Distils a diffusion policy into a generator that makes a chunk in one call.

    Minimizes the reverse Kullback-Leibler divergence between the generator's chunks and the teacher's, both under
    noise, summed over levels. Each iteration draws chunks ``G(z, o)``, lets a second denoiser learn their noise, and
    moves the generator along the difference of the two denoisers. Needs observations, no actions and no environment.

    With `deterministic` chunks the generator's noise is known exactly and no second denoiser is needed (OneDP-D). That
    is for teachers with one mode: between two modes it settles at neither.

    Attributes:
        teacher: the policy to distil; its denoiser is a network.
        start_level: where the generator's network is asked.
        levels: least and greatest level at which the two are compared; where None, as the process draws them in
            training.
        deterministic: whether the generator takes no noise.
        learning_rate: the generator's; schedules count updates.
        score_learning_rate: the second denoiser's.
        score_updates: its steps for each of the generator's.
        batch_size: observations in one step.
        optimizer: of both.
    """

    teacher: ChunkPolicy
    start_level: float | int = eqx.field(static=True, default=65)
    levels: tuple[int, int] | None = eqx.field(static=True, default=(2, 95))
    deterministic: bool = eqx.field(static=True, default=False)
    learning_rate: Scheduled = scalar(1e-6)
    score_learning_rate: Scheduled = scalar(2e-5)
    score_updates: int = eqx.field(static=True, default=1)
    batch_size: int = eqx.field(static=True, default=256)
    # Without momentum: the two networks chase each other.
    optimizer: Optimizer = eqx.field(default_factory=lambda: Adam(beta1=0.0, beta2=0.999, epsilon=1e-8))

    def __check_init__(self) -> None:
        require_count("batch_size", self.batch_size)
        require_count("score_updates", self.score_updates)
        generator = getattr(self.teacher, "generator", None)
        if not isinstance(generator, ChunkGenerator) or not isinstance(generator.denoiser, NetworkDenoiser):
            raise InputTypeError(
                f"teacher is a {type(self.teacher).__name__}, but it must be a ChunkPolicy whose generator has a "
                "NetworkDenoiser: its weights are where the student starts."
            )
        process = generator.denoiser.process
        if isinstance(process, DiscreteVP):
            last = process.levels - 1
            require(
                isinstance(self.start_level, int) and 0 <= self.start_level <= last,
                "start_level",
                self.start_level,
                f"a level of the teacher's schedule, 0 to {last}",
            )
            low, high = (0, last) if self.levels is None else self.levels
            require(0 <= low <= high <= last, "levels", self.levels, f"(low, high) within 0 to {last}")
        elif self.levels is not None:
            raise InputError(
                f"levels is {self.levels}, but the teacher's {type(process).__name__} has no numbered levels: use "
                "None, which draws them as in training."
            )

    @property
    def _generator(self) -> ChunkGenerator:
        generator: Any = self.teacher.generator
        return generator

    @property
    def _sampler(self) -> OneCall:
        return OneCall(level=self.start_level, deterministic=self.deterministic, limit=self._generator.sampler.limit)

    def init(self, problem: Any, key: Key[Array, ""]) -> Distilled:
        if not isinstance(problem, ObservationData):
            raise InputTypeError(f"problem is a {type(problem).__name__}, but distillation needs ObservationData.")
        denoiser: Any = self._generator.denoiser
        memory = self.optimizer.transformation().init(eqx.filter(denoiser, denoiser.trainable()))
        score = None if self.deterministic else denoiser
        return Distilled(
            student=denoiser,
            score=score,
            optimizer=memory,
            score_optimizer=() if score is None else memory,
            updates=jnp.zeros((), jnp.uint32),
            key=key,
        )

    def generate(self, student: NetworkDenoiser, observation: PyTree, z: Float[Array, "H D"]) -> Float[Array, "H D"]:
        """``G(z, o)`` in the network's units, without the limit that the finished policy has."""
        level = self._sampler.grid(student.process).current[0]
        return student.predict(z, level, student.encode(observation)).sample

    def _draw_levels(self, key: Key[Array, ""]) -> Array:
        process = self._generator.denoiser.process
        if self.levels is None:
            return process.sample_level(key, (self.batch_size,))
        return jax.random.randint(key, (self.batch_size,), self.levels[0], self.levels[1] + 1)

    def _learn_score(
        self, score: NetworkDenoiser, memory: PyTree, observation: PyTree, chunk: Array, rate: Array, key: Array
    ) -> tuple[NetworkDenoiser, PyTree, Array]:
        """One step of the denoiser of the generator's chunks, at fresh levels and noise."""
        level_key, noise_key = jax.random.split(key)
        levels = self._draw_levels(level_key)
        noises = jax.random.normal(noise_key, chunk.shape)

        def loss(score: NetworkDenoiser) -> Array:
            def one(o: PyTree, a: Array, level: Array, e: Array) -> Array:
                return jnp.mean(prediction_errors(score, a, score.encode(o), level, e))

            return jnp.mean(jax.vmap(one)(observation, chunk, levels, noises))

        return self._descend(loss, score, memory, rate)

    def _descend(self, loss: Any, network: NetworkDenoiser, memory: PyTree, rate: Array) -> tuple[Any, PyTree, Array]:
        learned, fixed = eqx.partition(network, network.trainable())
        moved = descend(self.optimizer, lambda p: loss(eqx.combine(p, fixed)), learned, memory, rate)
        return eqx.combine(moved.parameters, fixed), moved.memory, moved.loss

    def step(self, problem: ObservationData, state: Distilled) -> tuple[Distilled, Metrics]:
        key, index_key, z_key, score_key, level_key, noise_key = jax.random.split(state.key, 6)
        generator = self._generator
        teacher = generator.denoiser
        process = teacher.process
        index = jax.random.randint(index_key, (self.batch_size,), 0, problem.size)
        observation = normalize_observation(generator.observation_scaling, problem.observation_batch(index))
        shape = (self.batch_size, *teacher.chunk_shape)
        z = self._sampler.start_scale(process) * jax.random.normal(z_key, shape)

        # 1. The second denoiser follows the generator.
        score, score_memory, score_loss = state.score, state.score_optimizer, jnp.zeros(())
        if score is not None:
            chunk = jax.vmap(lambda o, z: self.generate(state.student, o, z))(observation, z)
            rate = resolve(self.score_learning_rate, state.updates)
            for update_key in jax.random.split(score_key, self.score_updates):
                score, score_memory, score_loss = self._learn_score(
                    score, score_memory, observation, chunk, rate, update_key
                )

        # 2. The generator follows the difference of the two denoisers.
        levels = self._draw_levels(level_key)
        noises = jax.random.normal(noise_key, shape)

        def loss(student: NetworkDenoiser) -> Array:
            def one(o: PyTree, z: Array, level: Array, e: Array) -> Array:
                alpha, sigma = process.coefficients(level)
                noisy = alpha * self.generate(student, o, z) + sigma * e
                held = jax.lax.stop_gradient(noisy)
                known = teacher.predict(held, level, teacher.encode(o)).noise
                own = e if score is None else score.predict(held, level, score.encode(o)).noise
                return reverse_kl_surrogate(noisy, known, own, sigma)

            return jnp.mean(jax.vmap(one)(observation, z, levels, noises))

        rate = resolve(self.learning_rate, state.updates)
        student, memory, _ = self._descend(loss, state.student, state.optimizer, rate)
        state = Distilled(
            student=student,
            score=score,
            optimizer=memory,
            score_optimizer=score_memory,
            updates=state.updates + 1,
            key=key,
        )
        return state, {"score_loss": score_loss}

    def policy(self, state: Distilled) -> ChunkPolicy:
        """The teacher's policy with the student in its place: the same windows, rows and units."""
        generator = self._generator
        student = ChunkGenerator(state.student, self._sampler, generator.action_scaling, generator.observation_scaling)
        return eqx.tree_at(lambda policy: policy.generator, self.teacher, student)
