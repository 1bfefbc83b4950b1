"""GoRL: a latent policy learned by any algorithm, under a generative decoder (Zhang et al., 2025, arXiv:2512.02581)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.diffusion.cloning import Cloning, MLPRecipe
from steersman.diffusion.latent_actions import (
    Decoder,
    GenerativeDecoder,
    LatentActions,
    LatentParams,
    LatentPolicy,
    Unchanged,
)
from steersman.diffusion.processes import RectifiedFlow
from steersman.diffusion.samplers import FlowSolver
from steersman.diffusion.scaling import Scaling
from steersman.envs import Problem
from steersman.envs.chunk_data import ChunkPairs
from steersman.errors import InputError, InputTypeError, require_count, require_number
from steersman.networks import OctaveTime
from steersman.policies import Head, Policy
from steersman.rl.on_policy.actor_critic import ActorCriticState, Batch, Learned, Samples, likelihood
from steersman.rl.on_policy.ppo import PPO
from steersman.training.algorithm import InteractiveAlgorithm, IterativeAlgorithm, Metrics
from steersman.training.collect import Rollout
from steersman.training.experience import Experience
from steersman.training.schedules import Continuous, Scheduled, scalar


class LatentPPO(PPO):
    """PPO with the penalty ``lambda (mean mu^2 + mean sigma^2)``, which keeps a latent Gaussian near the prior.

    Attributes:
        latent_penalty: weight ``lambda``.
    """

    latent_penalty: Scheduled = scalar(1e-3)
    value_coefficient: Scheduled = scalar(0.25)
    max_gradient_norm: Continuous | None = scalar(1.0)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(32,) * 4, converter=tuple)
    activation: str = eqx.field(static=True, default="swish")

    def loss(
        self, learned: Learned, state: ActorCriticState, rows: Batch, surrogate: PyTree
    ) -> tuple[Float[Array, ""], tuple[Samples, Metrics]]:
        value, (drawn, shown) = super().loss(learned, state, rows, surrogate)
        latent = likelihood(state.with_learned(learned).actor, rows)
        size = jnp.mean(latent.mean**2) + jnp.mean(jnp.exp(2.0 * latent.log_std))
        return value + self.latent_penalty * size, (drawn, {**shown, "latent_size": size})


class EpisodeFilter(eqx.Module):
    """Which episodes a decoder is refitted to: a share of them from the better ones, the rest from all.

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
    """Flow matching as GoRL refits its decoder; `options` are those of :class:`~steersman.diffusion.Cloning`."""
    recipe = MLPRecipe(RectifiedFlow(), "flow", (64, 64, 64, 64), time_features=OctaveTime(4))
    return Cloning(**{"recipe": recipe, "sampler": FlowSolver(10), "learning_rate": 3e-4, **options})


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
        key, agent_key, collect_key, refit_key = jax.random.split(state.key, 4)
        agent: Any = self.agent
        if self.first is not None:
            start = state.number == 0
            agent = jax.tree.map(lambda a, b: jnp.where(start, a, b), self.first, self.agent)
        latent = self._latent(problem, state.decoder)
        encoder, best = self._learn(agent, latent, agent_key)
        data, metrics = self._collect(latent, encoder, collect_key)
        decoder, loss = self._refit(data, refit_key)
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
        return after, {**metrics, "best_return": best, "refit_loss": loss, "samples": after.samples.astype(jnp.float32)}

    def _learn(self, agent: Any, latent: Problem, key: Key[Array, ""]) -> tuple[Policy, Array]:
        """The best latent policy that a fresh agent comes by, and the mean return that it was chosen for."""
        init_key, rollout_key = jax.random.split(key)
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

    def _collect(self, latent: Problem, encoder: Policy, key: Key[Array, ""]) -> tuple[ChunkPairs, Metrics]:
        """Pairs of observations and actions of the latent policy, of the episodes that the filter keeps."""
        rollout_key, key = jax.random.split(key)
        collector = Rollout(self.collect_envs, self.collect_steps)
        found: Experience = collector.collect(latent, encoder, collector.init(latent, encoder, rollout_key))[0]
        # Every episode of every environment gets a number of its own.
        before = jnp.cumsum(found.done, axis=0) - found.done
        episode = (before + (self.collect_steps + 1) * jnp.arange(self.collect_envs)).ravel()
        count = (self.collect_steps + 1) * self.collect_envs
        returns = jax.ops.segment_sum(found.reward.ravel(), episode, count)
        complete = jax.ops.segment_sum(found.done.ravel().astype(jnp.int32), episode, count) > 0
        whole = jnp.maximum(jnp.sum(complete), 1)
        mean = jnp.sum(jnp.where(complete, returns, 0.0)) / whole
        weight, kept = jnp.ones_like(found.reward).ravel(), jnp.sum(complete)
        if self.filter is not None:
            share, kept = self.filter(returns, complete)
            weight = share[episode]
            weight = eqx.error_if(
                weight,
                kept < self.decoder.batch_size,
                "filter keeps fewer episodes than a batch of the decoder's training: collect more, or lower quantile.",
            )
        weight = eqx.error_if(weight, ~jnp.all(jnp.isfinite(returns)), "returns have NaN or infinity among them.")
        size = min(self.max_samples, episode.size)
        # One draw from each of `size` equal parts of the total weight.
        places = (jnp.arange(size) + jax.random.uniform(key, (size,))) / size
        total = jnp.cumsum(weight)
        index = jnp.clip(jnp.searchsorted(total, places * total[-1]), 0, episode.size - 1)

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
        return data, {"stage_return": mean, "kept_episodes": kept.astype(jnp.float32)}

    def _refit(self, data: ChunkPairs, key: Key[Array, ""]) -> tuple[GenerativeDecoder, Array]:
        """A decoder that is trained from scratch."""
        cloning = _standardizing(self.decoder, data)
        state, losses = jax.lax.scan(
            lambda state, _: _with_loss(*cloning.step(data, state)),
            cloning.init(data, key),
            None,
            length=self.refit_steps,
        )
        return GenerativeDecoder(cloning.generator(state)), jnp.mean(losses[-max(1, self.refit_steps // 10) :])

    def policy(self, state: Stage) -> LatentPolicy:
        return LatentPolicy(state.encoder, state.played, state.bounds)


def _with_loss(state: PyTree, metrics: Metrics) -> tuple[PyTree, Array]:
    return state, metrics["loss"]


def _standardizing(cloning: Cloning, data: ChunkPairs) -> Cloning:
    """`cloning` with observations standardized by the data's own statistics, where it scales none itself."""
    if cloning.observation_scaling is not None:
        return cloning

    def fit(leaf: Array) -> Scaling:
        leaf = jnp.asarray(leaf, jnp.result_type(float))
        std = jnp.std(leaf, axis=0)
        # What never changes has no scale and is left at zero.
        return Scaling(jnp.mean(leaf, axis=0), jnp.where(std > 1e-6, std, 1.0))

    parts = data.observation
    scaling = {k: fit(v) for k, v in parts.items()} if isinstance(parts, dict) else fit(parts)
    return eqx.tree_at(lambda c: c.observation_scaling, cloning, scaling, is_leaf=lambda x: x is None)
