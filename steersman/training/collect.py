"""Collectors: they step environments with a policy and gather what an algorithm learns from."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt32

from steersman.envs import Problem
from steersman.envs.gymnasium_worker import RECORDED_INFO
from steersman.errors import InputError, require_count
from steersman.policies import Policy
from steersman.training.experience import Experience


class EpisodeStatistics(eqx.Module):
    """Sums over the episodes that ended within one batch; means are taken where they are shown."""

    episodes: Int[Array, ""]
    return_sum: Float[Array, "..."]
    length_sum: Float[Array, ""]
    nonfinite_observations: Int[Array, ""]
    nonfinite_rewards: Int[Array, ""]


class RolloutState(eqx.Module):
    """Where a rollout stands between batches.

    Attributes:
        env_state: state of each environment ``[N, ...]``.
        observation: what each is about to act on ``[N, ...]``.
        carry: memory of each policy copy ``[N, ...]``.
        episode_return: undiscounted return so far in each running episode ``[N, ...]``.
        episode_length: steps so far in each running episode ``[N]``.
        samples: environment steps taken since the start of training.
        key: randomness of everything that follows.
    """

    env_state: PyTree
    observation: PyTree
    carry: PyTree
    episode_return: Float[Array, "N ..."]
    episode_length: Int[Array, " N"]
    samples: UInt32[Array, ""]
    key: Key[Array, ""]


class Collector(eqx.Module):
    """Gathers the experience of one iteration. Implementations name what they need of an environment."""

    @property
    def needs(self) -> frozenset[str]:
        """Abilities that the environment must have beyond ``reset`` and ``step``, as verbs."""
        return frozenset()

    @property
    @abc.abstractmethod
    def samples_per_iteration(self) -> int:
        """Environment steps that one batch takes."""

    @abc.abstractmethod
    def init(self, problem: Problem, policy: Policy, key: Key[Array, ""]) -> Any:
        """The collector's state before the first batch."""

    @abc.abstractmethod
    def collect(self, problem: Problem, policy: Policy, state: Any) -> tuple[PyTree, Any, EpisodeStatistics]:
        """One batch: ``(experience, state, statistics)``."""


def count_nonfinite(tree: PyTree) -> Int[Array, ""]:
    """Number of NaN or infinite elements in the floating-point leaves of `tree`."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    counts = [jnp.sum(~jnp.isfinite(leaf)) for leaf in leaves]
    return sum(counts, jnp.asarray(0))


def where_done(done: Bool[Array, " N"], start: PyTree, following: PyTree) -> PyTree:
    """Leaf by leaf, `start` for the environments that are done and `following` for the others."""

    def choose(s: Array, f: Array) -> Array:
        return jnp.where(done.reshape(done.shape + (1,) * (f.ndim - done.ndim)), s, f)

    return jax.tree.map(choose, start, following)


def episode_ends(terminated: Bool[Array, "..."], truncated: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """Where an environment started a new episode: truncated, or terminated for any of its agents."""
    return jnp.logical_or(terminated.reshape((*truncated.shape, -1)).any(axis=-1), truncated)


class Rollout(Collector):
    """``num_envs`` copies of a JAX environment, ``num_steps`` steps each, under one ``scan``.

    Attributes:
        num_envs: parallel copies ``N``.
        num_steps: steps per batch ``T``.
        required: abilities that the environment must have because of what is learned from the batch.
    """

    num_envs: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    required: frozenset[str] = eqx.field(static=True, default=frozenset())

    def __check_init__(self) -> None:
        require_count("num_envs", self.num_envs)
        require_count("num_steps", self.num_steps)

    @property
    def needs(self) -> frozenset[str]:
        return self.required

    @property
    def samples_per_iteration(self) -> int:
        return self.num_envs * self.num_steps

    def init(self, problem: Problem, policy: Policy, key: Key[Array, ""]) -> RolloutState:
        reset_key, carry_key, key = jax.random.split(key, 3)
        observation, env_state = problem.reset(jax.random.split(reset_key, self.num_envs))
        carry = jax.vmap(policy.init)(jax.random.split(carry_key, self.num_envs))
        reward = reward_shape(problem, policy, env_state, observation, carry)
        return RolloutState(
            env_state=env_state,
            observation=observation,
            carry=carry,
            episode_return=jnp.zeros((self.num_envs, *reward.shape[1:])),
            episode_length=jnp.zeros(self.num_envs, jnp.int32),
            samples=jnp.zeros((), jnp.uint32),
            key=key,
        )

    def collect(
        self, problem: Problem, policy: Policy, state: RolloutState
    ) -> tuple[Experience, RolloutState, EpisodeStatistics]:
        key, rollout_key = jax.random.split(state.key)
        # All keys of a batch come from one call: drawn step by step they would cost a third of the rollout.
        keys = jax.random.split(rollout_key, (self.num_steps, 2, self.num_envs))
        has_memory = bool(jax.tree.leaves(state.carry))

        def step(running: tuple, keys: Key[Array, "2 N"]) -> tuple[tuple, tuple]:
            env_state, observation, carry, episode_return, episode_length = running
            action, next_carry, record = jax.vmap(policy.act)(observation, carry, keys[0])
            following, env_state, reward, terminated, truncated, info = problem.step(keys[1], env_state, action)
            if "final_observation" not in info:
                raise InputError(
                    f"{problem.name} gives no info['final_observation'], so values cannot be bootstrapped where an "
                    "episode is truncated; return the observation from before the restart under that name."
                )
            reward = jnp.asarray(reward, jnp.result_type(float))  # integer rewards would overflow in sums
            done = episode_ends(terminated, truncated)
            episode_return = episode_return + reward
            episode_length = episode_length + 1
            experience = Experience(
                observation=observation,
                next_observation=info["final_observation"],
                carry=carry,
                action=action,
                record=record,
                reward=reward,
                terminated=terminated,
                truncated=truncated,
                extras={name: info[name] for name in RECORDED_INFO if name in info},
            )
            ended = (done, where_done(done, episode_return, jnp.zeros_like(episode_return)), episode_length * done)
            if has_memory:
                next_carry = where_done(done, jax.vmap(policy.init)(keys[1]), next_carry)
            episode_return = where_done(done, jnp.zeros_like(episode_return), episode_return)
            running = (env_state, following, next_carry, episode_return, jnp.where(done, 0, episode_length))
            return running, (experience, ended)

        running = (state.env_state, state.observation, state.carry, state.episode_return, state.episode_length)
        running, (experience, (done, returns, lengths)) = jax.lax.scan(step, running, keys)
        statistics = EpisodeStatistics(
            episodes=jnp.sum(done),
            return_sum=jnp.sum(returns, axis=(0, 1)),
            length_sum=jnp.sum(lengths).astype(jnp.float32),
            nonfinite_observations=count_nonfinite(experience.next_observation),
            nonfinite_rewards=count_nonfinite(experience.reward),
        )
        samples = state.samples + jnp.uint32(self.samples_per_iteration)
        return experience, RolloutState(*running, samples=samples, key=key), statistics


def reward_shape(problem: Problem, policy: Policy, env_state: PyTree, observation: PyTree, carry: PyTree) -> Any:
    """Shape of a batch of rewards (``[N]``, or more for vector rewards), found without running anything."""

    def one_step() -> Array:
        n = jax.tree.leaves(observation)[0].shape[0]
        keys = jax.random.split(jax.random.key(0), n)
        action, _, _ = jax.vmap(policy.act)(observation, carry, keys)
        return jnp.asarray(problem.step(keys, env_state, action)[2])

    return jax.eval_shape(one_step)
