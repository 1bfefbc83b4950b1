"""GoRL: a latent policy learned by any algorithm, under a generative decoder (Zhang et al., 2025, arXiv:2512.02581)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.diffusion.cloning import Cloned, Cloning, MLPRecipe
from steersman.diffusion.latent_actions import (
    Decoder,
    GenerativeDecoder,
    LatentActions,
    LatentParams,
    LatentPolicy,
    LatentPPO,
    Unchanged,
)
from steersman.diffusion.processes import RectifiedFlow
from steersman.diffusion.samplers import FlowSolver
from steersman.diffusion.scaling import standard_scaling
from steersman.envs import Problem
from steersman.envs.chunk_data import ChunkPairs
from steersman.errors import InputError, InputTypeError, require_count
from steersman.networks import OctaveTime
from steersman.policies import Head, Policy
from steersman.training.algorithm import InteractiveAlgorithm, IterativeAlgorithm, Metrics
from steersman.training.collect import Rollout
from steersman.training.episode_filter import EpisodeFilter, EpisodeReturns, systematic_draw
from steersman.training.experience import Experience


class Stage(eqx.Module):
    """Where :class:`StageLoop` stands between two stages.

    Attributes:
        decoder: of the next stage.
        encoder: the best latent policy of the last stage.
        played: the decoder that `encoder` was learned under.
        bounds: takes decoded actions to the environment.
        number: stages done.
        samples: environment steps taken.
        key: randomness of what follows.
    """

    decoder: GenerativeDecoder
    encoder: Policy
    played: GenerativeDecoder
    bounds: Head
    number: Int[Array, ""]
    samples: Array
    key: Key[Array, ""]


def flow_cloning(**options: Any) -> Cloning:
    """Flow matching as GoRL refits its decoder; `options` are those of :class:`~steersman.diffusion.Cloning`.

    Ten steps of Heun's method in the place of Euler's, which shrinks what it generates, and more so with every stage.
    """
    recipe = MLPRecipe(RectifiedFlow(), "flow", (64, 64, 64, 64), time_features=OctaveTime(4))
    return Cloning(**{"recipe": recipe, "sampler": FlowSolver(10, order=2), "learning_rate": 3e-4, **options})


class StageLoop(IterativeAlgorithm):
    """Learns a latent policy with a frozen decoder, refits the decoder to what the two did, and starts anew.

    One iteration is one stage. Any algorithm that interacts can be the agent: what it sees is :class:`LatentActions`.
    It starts afresh in every stage, so nothing that it remembers (replayed latent vectors, say) outlives the decoder
    that gave it its meaning. Within a stage the policy is kept that earned the highest mean return while it collected.

    The decoder is refitted from scratch with noise that is independent of the latent vectors which led to the actions.
    A standard normal latent policy then acts as the last stage did.

    Attributes:
        agent: learns latent policies.
        first: takes its place in stage 0, with other numbers; None for the same.
        decoder: refits the decoder, from an untrained one that changes nothing.
        filter: which episodes it is refitted to; None for every step.
        iterations: of the agent in a stage.
        collect_envs: parallel environments that the data for the decoder come from.
        collect_steps: steps of each.
        max_samples: most pairs kept of them.
        refit_steps: gradient steps of the decoder.
        squash: see :class:`LatentActions`.
    """

    agent: InteractiveAlgorithm = eqx.field(default_factory=LatentPPO)
    first: InteractiveAlgorithm | None = None
    decoder: Cloning = eqx.field(default_factory=flow_cloning)
    filter: EpisodeFilter | None = None
    iterations: int = eqx.field(static=True, default=100)
    collect_envs: int = eqx.field(static=True, default=256)
    collect_steps: int = eqx.field(static=True, default=256)
    max_samples: int = eqx.field(static=True, default=65_536)
    refit_steps: int = eqx.field(static=True, default=2000)
    squash: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        for name in ("iterations", "collect_envs", "collect_steps", "max_samples", "refit_steps"):
            require_count(name, getattr(self, name))
        if not isinstance(self.agent, InteractiveAlgorithm):
            raise InputTypeError(f"agent is {self.agent!r}, but it must be an InteractiveAlgorithm such as PPO().")
        if self.first is not None and jax.tree.structure(self.first) != jax.tree.structure(self.agent):
            raise InputError("first is of another kind or size than agent, but the two may differ in numbers alone.")

    def _latent(self, problem: Any, decoder: Decoder) -> Problem:
        if not isinstance(problem, Problem) or problem.batched_params:
            raise InputTypeError(
                f"problem is a {type(problem).__name__}, but the stages need an environment that runs in JAX, with one "
                "set of parameters."
            )
        return Problem(LatentActions(problem.environment, self.squash), LatentParams(problem.params, decoder))

    def pairs(self, observation: PyTree, latent: Float[Array, "M D"], action: Float[Array, "M H A"]) -> ChunkPairs:
        """What the decoder is refitted to; the latent vectors are left out, so its noise is independent of them."""
        del latent
        return ChunkPairs(observation, action)

    def init(self, problem: Any, key: Key[Array, ""]) -> Stage:
        decoder_key, agent_key, key = jax.random.split(key, 3)
        plain = self._latent(problem, Unchanged())
        observation, _ = plain.reset(agent_key[None])
        bounds = plain.environment.bounds(plain.params)
        shape = bounds.shape if len(bounds.shape) == 2 else (1, bounds.dimension)
        blank = self.pairs(observation, jnp.zeros((1, bounds.dimension)), jnp.zeros((1, *shape)))
        cloning = _standardizing(self.decoder, blank)
        decoder = GenerativeDecoder(cloning.generator(cloning.init(blank, decoder_key)))
        decoder = decoder.identity(jax.tree.map(lambda leaf: leaf[0], observation))
        encoder = self.agent.policy(self.agent.init(self._latent(problem, decoder), agent_key))
        return Stage(
            decoder=decoder,
            encoder=encoder,
            played=decoder,
            bounds=bounds,
            number=jnp.zeros((), jnp.int32),
            samples=jnp.zeros((), jnp.uint32),
            key=key,
        )

    def step(self, problem: Any, state: Stage) -> tuple[Stage, Metrics]:
        encoder, best = self.learn(problem, state)
        after, metrics = self.advance(problem, state, encoder)
        return after, {**metrics, "best_return": best}

    def learn(self, problem: Any, state: Stage) -> tuple[Policy, Float[Array, ""]]:
        """The first half of a stage: the best latent policy that a fresh agent comes by, and its mean return then."""
        agent: Any = self.agent
        if self.first is not None:
            start = state.number == 0
            agent = jax.tree.map(lambda a, b: jnp.where(start, a, b), self.first, self.agent)
        latent = self._latent(problem, state.decoder)
        init_key, rollout_key = jax.random.split(jax.random.split(state.key, 4)[1])
        learner = agent.init(latent, init_key)
        rollout = agent.collector.init(latent, agent.behaviour(learner), rollout_key)

        def iteration(running: Any, _: None) -> tuple[Any, None]:
            learner, rollout, best, best_return = running
            experience, rollout, statistics = agent.collector.collect(latent, agent.behaviour(learner), rollout)
            earned = statistics.return_sum / jnp.maximum(statistics.episodes, 1)
            earned = jnp.where(statistics.episodes > 0, earned, -jnp.inf)
            better = earned >= best_return
            newest = agent.policy(learner)
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), newest, best)
            return (agent.update(learner, experience)[0], rollout, best, jnp.maximum(earned, best_return)), None

        running = (learner, rollout, agent.policy(learner), -jnp.asarray(jnp.inf))
        running, _ = jax.lax.scan(iteration, running, None, length=self.iterations)
        return running[2], running[3]

    def advance(self, problem: Any, state: Stage, encoder: Policy) -> tuple[Stage, Metrics]:
        """The second half: the decoder of the next stage, refitted to what `encoder` does in this one."""
        key, _, collect_key, refit_key = jax.random.split(state.key, 4)
        data, metrics = self._collect(self._latent(problem, state.decoder), encoder, collect_key)
        decoder, loss = self._refit(data, refit_key)
        agent: Any = self.agent
        taken = self.iterations * agent.collector.samples_per_iteration + self.collect_envs * self.collect_steps
        after = Stage(
            decoder=decoder,
            encoder=encoder,
            played=state.decoder,
            bounds=state.bounds,
            number=state.number + 1,
            samples=state.samples + jnp.uint32(taken),
            key=key,
        )
        return after, {**metrics, "refit_loss": loss, "samples": after.samples.astype(jnp.float32)}

    def _collect(self, latent: Problem, encoder: Policy, key: Key[Array, ""]) -> tuple[ChunkPairs, Metrics]:
        """Pairs of observations and actions of the latent policy, of the episodes that the filter keeps."""
        rollout_key, key = jax.random.split(key)
        collector = Rollout(self.collect_envs, self.collect_steps)
        found: Experience = collector.collect(latent, encoder, collector.init(latent, encoder, rollout_key))[0]
        episodes = EpisodeReturns.of(found)
        weight, kept = jnp.ones_like(found.reward).ravel(), jnp.sum(episodes.complete)
        if self.filter is not None:
            share, kept = self.filter(episodes.returns, episodes.complete)
            weight = eqx.error_if(
                share[episodes.number],
                kept < self.decoder.batch_size,
                "filter keeps fewer episodes than a batch of the decoder's training: collect more, or lower quantile.",
            )
        finite = jnp.all(jnp.isfinite(episodes.returns))
        weight = eqx.error_if(weight, ~finite, "returns have NaN or infinity among them.")
        index = systematic_draw(key, weight, min(self.max_samples, weight.size))

        def rows(leaf: Array) -> Array:
            return leaf.reshape(-1, *leaf.shape[2:])[index]

        observation, drawn = jax.tree.map(rows, (found.observation, found.action))
        action = jax.vmap(lambda o, z: latent.environment.decode(o, z, latent.params))(observation, drawn)
        action = eqx.error_if(
            action,
            jnp.max(jnp.std(action, axis=0)) < 1e-4,
            "encoder is deterministic, but a decoder can be refitted only to actions that vary.",
        )
        shape = latent.params.decoder.generator.denoiser.chunk_shape
        data = self.pairs(observation, drawn, action.reshape(-1, *shape))
        return data, {"stage_return": episodes.mean_return, "kept_episodes": kept.astype(jnp.float32)}

    def _refit(self, data: ChunkPairs, key: Key[Array, ""]) -> tuple[GenerativeDecoder, Array]:
        """A decoder that is trained from scratch."""
        cloning = _standardizing(self.decoder, data)

        def step(state: Cloned, _: None) -> tuple[Cloned, Array]:
            state, metrics = cloning.step(data, state)
            return state, metrics["loss"]

        state, losses = jax.lax.scan(step, cloning.init(data, key), None, length=self.refit_steps)
        return GenerativeDecoder(cloning.generator(state)), jnp.mean(losses[-max(1, self.refit_steps // 10) :])

    def policy(self, state: Stage) -> LatentPolicy:
        return LatentPolicy(state.encoder, state.played, state.bounds)


def _standardizing(cloning: Cloning, data: ChunkPairs) -> Cloning:
    """`cloning` with observations standardized by the data's own statistics, where it scales none itself."""
    if cloning.observation_scaling is not None:
        return cloning
    scaling = standard_scaling(data.observation)
    return eqx.tree_at(lambda c: c.observation_scaling, cloning, scaling, is_leaf=lambda x: x is None)
