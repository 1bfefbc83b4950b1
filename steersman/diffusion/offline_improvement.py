"""RL-100: imitation, gated offline improvement, online fine-tuning, one-step distillation (Lei et al., 2025,
arXiv:2510.14830).
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman import objectives
from steersman.diffusion.denoiser import Flatten, NetworkDenoiser
from steersman.diffusion.denoising_chain import ChainPolicy, DenoisingChains
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.processes import DiscreteVP
from steersman.diffusion.samplers import StochasticSampler
from steersman.envs.chunk_transitions import ChunkTransitions
from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.policies import ChunkPolicy, Preprocess, head_for
from steersman.returns import standardize
from steersman.rl.implicit_q import ImplicitQ, ImplicitQLearning
from steersman.rl.model_evaluation import Accepted, ImprovementGate, ModelRolloutValue
from steersman.training.algorithm import IterativeAlgorithm, Metrics
from steersman.training.dynamics_model import EnsembleLearner, ModelLearner, TransitionModel
from steersman.training.optimizers import Adam, Optimizer, descend
from steersman.training.replay import Replay, Transition
from steersman.training.schedules import Continuous, scalar


def exploring_chains(policy: ChunkPolicy) -> DenoisingChains:
    """A policy's sampler as a sequence of Gaussian actions, with the joint density of the rows that are played.

    The least deviation, in drawing as in likelihoods, is the lower of the sampler's ``std_bounds``.

    Raises:
        InputError, InputTypeError: the policy has no network, its sampler no noise in some step, or steps that do not
            divide the levels of its process.
    """
    generator: Any = getattr(policy, "generator", None)
    if not isinstance(generator, ChunkGenerator) or not isinstance(generator.denoiser, NetworkDenoiser):
        raise InputTypeError(
            f"policy is a {type(policy).__name__}, but it must be a ChunkPolicy whose generator has a NetworkDenoiser."
        )
    process = generator.denoiser.process
    sampler: Any = generator.sampler
    bounds = sampler.std_bounds if isinstance(sampler, StochasticSampler) else None
    if bounds is None or bounds[0] <= 0.0:
        raise InputError(
            f"policy's sampler has std_bounds {bounds}, but every step must draw noise: use for example "
            "DDIM(10, eta=1.0, std_bounds=(0.0067, 0.1))."
        )
    if isinstance(process, DiscreteVP) and sampler.steps is not None and process.levels % sampler.steps:
        raise InputError(f"steps is {sampler.steps}, but it must divide the {process.levels} levels of the process.")
    return DenoisingChains(
        generator,
        exploration_std=bounds[0],
        likelihood_std=bounds[0],
        noise_limit=sampler.noise_limit,
        first_row=policy.first_row,
        average=False,
        log_prob_bounds=None,
    )


def generator_of(policy: ChunkPolicy) -> Any:
    """What a policy plays out."""
    return policy.generator


def with_generator(policy: ChunkPolicy, generator: ChunkGenerator) -> ChunkPolicy:
    """A policy with another generator: the same windows and rows."""
    return eqx.tree_at(lambda p: p.generator, policy, generator)


class Improved(NamedTuple):
    """What :class:`OfflineImprovement` carries.

    Attributes:
        accepted: the behaviour policy's parameters, and how they are judged.
        optimizer: the optimizer's memory.
        critics: values of what the data did.
        model: dynamics of the features.
        features: what the encoder makes of the data's observations ``[N, C]``.
        starts: how many episodes have begun up to each row ``[N]``.
        judge_key: randomness of every evaluation, the same for all of them.
        key: randomness of what is to come.
    """

    accepted: Accepted
    optimizer: PyTree
    critics: ImplicitQ
    model: TransitionModel
    features: Float[Array, "N C"]
    starts: Int[Array, " N"]
    judge_key: Key[Array, ""]
    key: Key[Array, ""]


class OfflineImprovement(IterativeAlgorithm):
    """Improves a cloned policy from fixed data: clipped policy gradients on its own chains, judged in a model.

    :meth:`init` fits critics and dynamics to the data, as its encoder sees it, which is frozen. One iteration is one
    block of updates from a fixed behaviour policy, and one decision whether their result becomes the next.

    Attributes:
        start: the cloned policy.
        critics: how values are learned.
        model: how dynamics are learned; must predict terminations where the data has any.
        evaluation: how a policy is judged.
        gate: which candidates are accepted; every one where None.
        gamma: discount of one action; that of a decision is its power.
        clip: bound ``e`` on the ratio of each step.
        learning_rate: of the policy.
        updates: batches in one block, ``K`` gradient steps each.
        batch_size: observations in a batch.
        rollouts: model rollouts of one evaluation.
        from_starts: judge from the first observations of episodes, else from all.
        max_gradient_norm: bound of the gradient norm.
        optimizer: turns gradients into steps.
    """

    start: ChunkPolicy
    critics: ImplicitQLearning = eqx.field(default_factory=lambda: ImplicitQLearning(target_every=2))
    model: ModelLearner = eqx.field(
        default_factory=lambda: EnsembleLearner(hidden=(400,) * 4, members=7, terminates=True, epochs=100, batches=100)
    )
    evaluation: ModelRolloutValue = eqx.field(default_factory=ModelRolloutValue)
    gate: ImprovementGate | None = eqx.field(default_factory=ImprovementGate)
    gamma: Continuous = scalar(0.99)
    clip: Continuous = scalar(0.25)
    learning_rate: Continuous = scalar(1e-5)
    updates: int = eqx.field(static=True, default=50)
    batch_size: int = eqx.field(static=True, default=512)
    rollouts: int = eqx.field(static=True, default=512)
    from_starts: bool = eqx.field(static=True, default=False)
    max_gradient_norm: Continuous = scalar(0.5)
    optimizer: Optimizer = eqx.field(default_factory=lambda: Adam(epsilon=1e-8))

    def __check_init__(self) -> None:
        exploring_chains(self.start)
        require_number("gamma", self.gamma, at_least=0.0, at_most=1.0)
        for name in ("clip", "learning_rate", "max_gradient_norm"):
            require_number(name, getattr(self, name), above=0.0)
        for name in ("updates", "batch_size", "rollouts"):
            require_count(name, getattr(self, name))

    def check(self, problem: Any) -> None:
        """Refuses data that does not fit the policy; its values are looked at where they are known.

        Raises:
            InputError, InputTypeError: no rewards, chunks of another shape, in other units, or with terminations that
                the model does not predict. Warns where all rewards are equal.
        """
        generator, limit = generator_of(self.start), generator_of(self.start).sampler.limit
        if not isinstance(problem, ChunkTransitions):
            raise InputTypeError(
                f"problem is a {type(problem).__name__}, but offline improvement needs ChunkTransitions: chunks with "
                "rewards and terminations."
            )
        shape, expected = problem.chunk.shape[1:], generator.denoiser.chunk_shape
        require(shape == expected, "problem.chunk's shape", shape, f"{expected}, as the policy's chunks")
        rows, played = problem.played_rows, self.start.action_horizon
        require(rows == played, "problem.played_rows", rows, f"{played}, the action horizon of the policy")
        if isinstance(problem.reward, Tracer):
            return
        if bool(jnp.any(problem.terminated)) and not getattr(self.model, "terminates", True):
            raise InputError("model.terminates is False, but the data has terminations, which it must predict.")
        if float(jnp.ptp(problem.reward)) == 0.0:
            warnings.warn("problem.reward is the same everywhere: no chunk has an advantage to learn.", stacklevel=3)
        largest = float(jnp.max(jnp.abs(generator.action_scaling.normalize(problem.chunk))))
        if limit is not None and largest > 2.0 * limit:
            raise InputError(
                f"problem.chunk reaches {largest:.3g} in the policy's units, but its sampler draws nothing beyond "
                f"{limit:g}: give data in the task's units, and the policy its action_scaling."
            )

    def _actor(self, features: Array) -> ChainPolicy:
        """The policy on encoded observations, with actions in the network's units."""
        source = generator_of(self.start)
        denoiser = dataclasses.replace(source.denoiser, encoder=Flatten())
        policy = with_generator(self.start, ChunkGenerator(denoiser, source.sampler))
        seen = layout(spaces.Box(-np.inf, np.inf, features.shape[1:]))
        acted = head_for(spaces.Box(-np.inf, np.inf, (self.start.action_horizon, denoiser.chunk_shape[1])))
        return exploring_chains(policy).make(Preprocess(seen), acted, initial_log_std=0.0, key=jax.random.key(0))

    def _played(self, actor: ChainPolicy, features: Array, key: Array) -> tuple[Array, Array, Array]:
        """Chains for a batch of features, their log-densities, and what is played of them as vectors."""
        states, gaussians = jax.vmap(actor.draw)(features, jax.random.split(key, features.shape[0]))
        action = jax.vmap(lambda chain: jnp.ravel(actor.head.to_action(chain)))(states)
        return states, actor.head.log_prob(gaussians, states), action

    def _value(self, network: PyTree, state: Improved) -> Array:
        """``J`` of a policy: the mean over model rollouts, under the same randomness every time."""
        actor = eqx.tree_at(lambda a: a.network, self._actor(state.features), network)
        start_key, key = jax.random.split(state.judge_key)
        if self.from_starts:
            begun = jax.random.randint(start_key, (self.rollouts,), 1, state.starts[-1] + 1)
            index = jnp.searchsorted(state.starts, begun)
        else:
            index = jax.random.randint(start_key, (self.rollouts,), 0, state.features.shape[0])

        def act(features: Array, carry: PyTree, key: Array) -> tuple[Array, PyTree]:
            return self._played(actor, features, key)[2], carry

        return jnp.mean(self.evaluation(state.model, act, state.critics.action_value, state.features[index], key))

    def init(self, problem: Any, key: Key[Array, ""]) -> Improved:
        self.check(problem)
        critic_key, model_key, fit_key, judge_key, key = jax.random.split(key, 5)
        generator, rows = generator_of(self.start), self.start.action_horizon
        features, following = (
            jax.lax.map(generator.encode, seen, batch_size=256)
            for seen in (problem.observation, problem.next_observation)
        )
        chunk = generator.action_scaling.normalize(problem.chunk)[:, self.start.first_row :][:, :rows]
        action = chunk.reshape(problem.size, -1)
        data = Replay.of(Transition(features, action, problem.reward, following, problem.terminated, problem.truncated))
        sizes = features.shape[1], action.shape[1]
        critics = self.critics.init(*sizes, critic_key)
        critics, _ = self.critics.fit(critics, data, self.gamma**rows, critic_key)
        model, _ = self.model.fit(self.model.init(*sizes, model_key), data, fit_key)
        network = self._actor(features).network
        none = Accepted(network, jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        starts = jnp.cumsum(problem.first.astype(jnp.int32))
        state = Improved(
            none, self.optimizer.transformation().init(network), critics, model, features, starts, judge_key, key
        )
        return state._replace(accepted=none._replace(value=self._value(network, state)))

    def step(self, problem: Any, state: Improved) -> tuple[Improved, Metrics]:
        key, block_key = jax.random.split(state.key)
        behaviour = eqx.tree_at(lambda a: a.network, self._actor(state.features), state.accepted.kept)

        def update(running: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], Array]:
            index_key, draw_key = jax.random.split(key)
            index = jax.random.randint(index_key, (self.batch_size,), 0, state.features.shape[0])
            features = state.features[index]
            # The behaviour's own actions, not those of the data.
            states, old, action = self._played(behaviour, features, draw_key)
            advantage = standardize(state.critics.advantage(features, action))

            def inner(running: tuple[PyTree, PyTree], i: Array) -> tuple[tuple[PyTree, PyTree], Array]:
                network, memory = running

                def log_prob(network: PyTree) -> Array:
                    actor = eqx.tree_at(lambda a: a.network, behaviour, network)
                    return jax.vmap(lambda o, chain: actor.step_log_prob(o, chain, i))(features, states)

                def loss(network: PyTree) -> Array:
                    return jnp.mean(objectives.clipped(log_prob(network) - old[:, i], advantage, self.clip))

                moved = descend(self.optimizer, loss, network, memory, self.learning_rate, self.max_gradient_norm)
                return (moved.parameters, moved.memory), moved.loss

            return jax.lax.scan(inner, running, jnp.arange(behaviour.steps))

        start = (state.accepted.kept, state.optimizer)
        (network, memory), losses = jax.lax.scan(update, start, jax.random.split(block_key, self.updates))
        value = self._value(network, state)
        if self.gate is None:
            last = state.accepted
            accepted, good = Accepted(network, value, last.accepted + 1, last.judged + 1), jnp.asarray(True)
        else:
            accepted, good = self.gate(state.accepted, network, value)
            # What was learned on the way to a refused policy goes with it.
            fresh = self.optimizer.transformation().init(accepted.kept)
            memory = jax.tree.map(lambda new, old: jnp.where(good, new, old), memory, fresh)
        shown = {"value": value, "accepted": good.astype(value.dtype), "loss": jnp.mean(losses)}
        return state._replace(accepted=accepted, optimizer=memory, key=key), shown

    def policy(self, state: Improved) -> ChunkPolicy:
        """The last accepted policy."""
        actor = eqx.tree_at(lambda a: a.network, self._actor(state.features), state.accepted.kept)
        source, learned = generator_of(self.start), actor.tuned().denoiser
        denoiser = dataclasses.replace(source.denoiser, network=learned.network)
        return with_generator(self.start, dataclasses.replace(source, denoiser=denoiser))
