"""Consistency distillation: a sampler's map from noise to chunk, learned as one call of a network."""

# Annotations are evaluated here: Equinox does not recognize a stringified AbstractVar, and would make a field of it.

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt32

from steersman.diffusion.cloning import DenoiserRecipe
from steersman.diffusion.denoiser import Denoiser, NetworkDenoiser, same_process
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.predictions import Prediction
from steersman.diffusion.processes import NoiseProcess
from steersman.diffusion.samplers import Chain, OneCall, Sampler, sample
from steersman.diffusion.scaling import normalize_observation
from steersman.envs.chunk_data import ObservationData
from steersman.errors import InputError, InputTypeError, require_count, require_number, unknown_name
from steersman.policies import ChunkPolicy
from steersman.training.algorithm import IterativeAlgorithm, Metrics
from steersman.training.averaging import Average, MovingAverage
from steersman.training.optimizers import Adam, Optimizer, descend
from steersman.training.schedules import Scheduled, resolve, scalar

KINDS = ("same_noise", "consistency")


class ConsistencyDenoiser(Denoiser):
    """A denoiser that is the identity at level 0: ``C(x, k) = c_skip(k) x + c_out(k) a(x, k)``.

    ``c_skip = s^2 / ((t k)^2 + s^2)`` and ``c_out = t k / sqrt((t k)^2 + s^2)``, as latent consistency models have them
    (Luo et al., 2023, arXiv:2310.04378, with ``s = 0.5`` and ``t = 10``). Levels must not be negative.

    Attributes:
        denoiser: predicts ``a``.
        process: that of `denoiser`.
        chunk_shape: that of `denoiser`.
        data_std: ``s``.
        time_scale: ``t``.
    """

    denoiser: NetworkDenoiser
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    data_std: float = eqx.field(static=True)
    time_scale: float = eqx.field(static=True)

    def __init__(self, denoiser: NetworkDenoiser, data_std: float = 0.5, time_scale: float = 10.0):
        """Puts the boundary form around `denoiser`."""
        require_number("data_std", data_std, above=0.0)
        require_number("time_scale", time_scale, above=0.0)
        self.denoiser = denoiser
        self.process = denoiser.process
        self.chunk_shape = denoiser.chunk_shape
        self.data_std = float(data_std)
        self.time_scale = float(time_scale)

    def trainable(self) -> PyTree:
        """A PyTree of booleans like this one: what gradients may change."""
        frozen = jax.tree.map(lambda _: False, self)
        return eqx.tree_at(lambda student: student.denoiser, frozen, self.denoiser.trainable())

    def boundary(self, level: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """``(c_skip, c_out)`` at `level`."""
        time = self.time_scale * jnp.asarray(level, jnp.result_type(float))
        total = time**2 + self.data_std**2
        return self.data_std**2 / total, time / jnp.sqrt(total)

    def encode(self, observation: PyTree) -> PyTree:
        return self.denoiser.encode(observation)

    def predict(self, x: Float[Array, "H D"], level: Array, condition: PyTree) -> Prediction:
        skip, out = self.boundary(level)
        chunk = skip * x + out * self.denoiser.predict(x, level, condition).sample
        alpha, sigma = self.process.coefficients(level)
        return Prediction((x - alpha * chunk) / sigma, chunk)


class Student(NamedTuple):
    """What :class:`ConsistencyDistillation` carries.

    Attributes:
        network: the student.
        average: the running average of its learned parameters.
        optimizer: the optimizer's memory.
        updates: number of updates.
        key: randomness of what is to come.
    """

    network: ConsistencyDenoiser
    average: Average
    optimizer: PyTree
    updates: UInt32[Array, ""]
    key: Key[Array, ""]


class ConsistencyDistillation(IterativeAlgorithm):
    """Distils a diffusion or flow policy into one network call, along the teacher's own path without its noise.

    - ``"same_noise"``: ``|C(z, o) - sampler(z, o)|^2`` with one ``z`` for both.
    - ``"consistency"``: ``|C(x_k, k) - C'(x_k', k')|^2`` for two neighbouring states of the teacher's path, with the
      running average ``C'`` of the student (Song et al., 2023, arXiv:2303.01469); at the path's end the chunk itself.

    The path is that of the teacher's sampler for evaluation with every transition at its mean, so a stochastic sampler
    needs ``evaluation=DDIM(steps)`` beside it to have a path with the right spread. Needs observations, no actions and
    no environment. One iteration is one gradient step.

    Attributes:
        teacher: the policy to distil.
        student: how its network is made; the teacher's own weights where None.
        kind: one of ``KINDS``.
        learning_rate: schedules count updates.
        batch_size: observations in one step.
        optimizer: turns gradients into steps.
        average: that of ``C'``.
    """

    teacher: ChunkPolicy
    student: DenoiserRecipe | None = None
    kind: str = eqx.field(static=True, default="same_noise")
    learning_rate: Scheduled = scalar(1e-3)
    batch_size: int = eqx.field(static=True, default=256)
    optimizer: Optimizer = eqx.field(default_factory=lambda: Adam(epsilon=1e-8))
    average: MovingAverage = eqx.field(default_factory=lambda: MovingAverage(0.95))

    def __check_init__(self) -> None:
        require_count("batch_size", self.batch_size)
        if self.kind not in KINDS:
            raise unknown_name("kind", self.kind, KINDS)
        generator = getattr(self.teacher, "generator", None)
        if not isinstance(generator, ChunkGenerator):
            raise InputTypeError(
                f"teacher is a {type(self.teacher).__name__}, but it must be a ChunkPolicy with a ChunkGenerator."
            )
        process = generator.denoiser.process
        if self.student is None:
            if not isinstance(generator.denoiser, NetworkDenoiser):
                raise InputTypeError(
                    f"student is None, but the teacher's {type(generator.denoiser).__name__} has no network to start "
                    "from: give a recipe."
                )
        elif not same_process(self.student.process, process):
            raise InputError("student has another noise process than the teacher, but it must have the same.")

    @property
    def _generator(self) -> ChunkGenerator:
        generator: Any = self.teacher.generator
        return generator.mode()

    @property
    def _sampler(self) -> Sampler:
        generator = self._generator
        with jax.ensure_compile_time_eval():
            level = generator.sampler.grid(generator.denoiser.process).current[0]
            start: Any = level.item()
        return OneCall(level=start, limit=generator.sampler.limit)

    def init(self, problem: Any, key: Key[Array, ""]) -> Student:
        if not isinstance(problem, ObservationData):
            raise InputTypeError(f"problem is a {type(problem).__name__}, but distillation needs ObservationData.")
        generator, network_key = self._generator, jax.random.split(key)[0]
        denoiser: Any = generator.denoiser
        if self.student is not None:
            observation = problem.observation_batch(jnp.zeros(1, jnp.int32))
            observation = normalize_observation(generator.observation_scaling, observation)
            first = jax.tree.map(lambda leaf: leaf[0], observation)
            denoiser = self.student.make(first, denoiser.chunk_shape, network_key)
        network = ConsistencyDenoiser(denoiser)
        learned = eqx.filter(network, network.trainable())
        memory = self.optimizer.transformation().init(learned)
        updates = jnp.zeros((), jnp.uint32)
        return Student(network, self.average.init(learned), memory, updates, jax.random.split(key)[1])

    def path(self, observation: PyTree, z: Float[Array, "H D"]) -> Chain:
        """The teacher's chain from `z`, every transition at its mean; the observation in its network's units."""
        generator = self._generator
        denoiser, sampler = generator.denoiser, generator.sampler
        steps = sampler.grid(denoiser.process).steps
        still = jnp.zeros((steps, *z.shape), z.dtype)
        return sample(denoiser, sampler, denoiser.encode(observation), None, start=z, noises=still)

    def errors(
        self,
        network: ConsistencyDenoiser,
        average: ConsistencyDenoiser,
        observation: PyTree,
        chain: Chain,
        step: Array,
    ) -> Float[Array, ""]:
        """Mean squared error on one path; `step` is which pair of its states the consistency loss takes."""
        generator = self._generator
        grid = generator.sampler.grid(generator.denoiser.process)
        condition = network.encode(observation)
        if self.kind == "same_noise":
            target, step = chain.chunk, jnp.zeros_like(step)
        else:
            # The last following level is clean data, where the network is not asked.
            level = jnp.where(step + 1 < grid.steps, grid.following[step], grid.current[step])
            following = chain.states[step + 1]
            asked = average.predict(following, level, average.encode(observation)).sample
            target = jnp.where(step + 1 < grid.steps, asked, following)
        found = network.predict(chain.states[step], grid.current[step], condition).sample
        return jnp.mean((found - jax.lax.stop_gradient(target)) ** 2)

    def step(self, problem: ObservationData, state: Student) -> tuple[Student, Metrics]:
        key, index_key, z_key, step_key = jax.random.split(state.key, 4)
        generator = self._generator
        process, shape = generator.denoiser.process, generator.denoiser.chunk_shape
        index = jax.random.randint(index_key, (self.batch_size,), 0, problem.size)
        observation = normalize_observation(generator.observation_scaling, problem.observation_batch(index))
        scale = generator.sampler.start_scale(process)
        z = scale * jax.random.normal(z_key, (self.batch_size, *shape))
        steps = jax.random.randint(step_key, (self.batch_size,), 0, generator.sampler.grid(process).steps)
        chains = jax.vmap(self.path)(observation, z)
        learned, fixed = eqx.partition(state.network, state.network.trainable())
        average = eqx.combine(state.average.value, fixed)

        def loss(learned: Any) -> Array:
            network = eqx.combine(learned, fixed)
            each = jax.vmap(lambda o, chain, step: self.errors(network, average, o, chain, step))
            return jnp.mean(each(observation, chains, steps))

        rate = resolve(self.learning_rate, state.updates)
        moved = descend(self.optimizer, loss, learned, state.optimizer, rate)
        followed = self.average.update(state.average, moved.parameters)
        state = Student(eqx.combine(moved.parameters, fixed), followed, moved.memory, state.updates + 1, key)
        return state, {"loss": moved.loss}

    def policy(self, state: Student) -> ChunkPolicy:
        """The teacher's policy with the student in its place: the same windows, rows and units."""
        generator = self._generator
        scalings = generator.action_scaling, generator.observation_scaling
        student = ChunkGenerator(state.network, self._sampler, *scalings)
        return eqx.tree_at(lambda policy: policy.generator, self.teacher, student)
