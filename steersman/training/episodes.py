"""Collectors of whole episodes: every batch starts anew, and what comes after an episode's end does not count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Key, UInt32

from steersman.envs import Problem
from steersman.errors import InputError, require, require_count
from steersman.policies import Policy
from steersman.training.collect import Collector, EpisodeStatistics, Rollout, count_nonfinite, episode_ends
from steersman.training.experience import Experience


class EpisodesState(eqx.Module):
    """What is left between batches of whole episodes.

    Attributes:
        samples: environment steps simulated since the start of training.
        key: randomness of everything that follows; one for each member of a population.
    """

    samples: UInt32[Array, ""]
    key: Key[Array, "..."]


def _inside(mask: Bool[Array, "T N"], leaf: Array) -> Array:
    """The mask with as many axes as `leaf`."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def running(terminated: Bool[Array, "T N ..."], truncated: Bool[Array, "T N"]) -> Bool[Array, "T N"]:
    """Which rows belong to the episode that each column starts with: all up to and including its first end."""
    done = episode_ends(terminated, truncated)
    before = jnp.concatenate([jnp.zeros_like(done[:1]), done[:-1]])
    return jnp.cumsum(before, axis=0) == 0


class Episodes(Collector):
    """``num_episodes`` fresh episodes of a JAX environment, side by side, each ``horizon`` steps long at most.

    The experience is ``[T, N]`` with ``T = horizon``: one episode a column, starting with row 0.
    ``extras["mask"]`` says which rows belong to it. After its end, rewards are zero and no further end is marked;
    observations and actions there are those of an episode that does not count. An episode that reaches the horizon is
    truncated there.

    Every batch starts anew, which simulators on the host are not asked for here: those are refused.

    Attributes:
        num_episodes: episodes ``N``.
        horizon: most steps of an episode ``T``. All are simulated and counted, also where an episode ends earlier.
    """

    num_episodes: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        require_count("num_episodes", self.num_episodes)
        require_count("horizon", self.horizon)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"start from any state"})

    @property
    def samples_per_iteration(self) -> int:
        return self.num_episodes * self.horizon

    def init(self, problem: Problem, policy: Policy, key: Key[Array, ""]) -> EpisodesState:
        del problem, policy
        return EpisodesState(jnp.zeros((), jnp.uint32), key)

    def collect(
        self, problem: Problem, policy: Policy, state: EpisodesState
    ) -> tuple[Experience, EpisodesState, EpisodeStatistics]:
        key, batch_key = jax.random.split(state.key)
        experience, statistics = self.play(problem, policy, batch_key)
        samples = state.samples + jnp.uint32(self.samples_per_iteration)
        return experience, EpisodesState(samples, key), statistics

    def play(self, problem: Problem, policy: Policy, key: Key[Array, ""]) -> tuple[Experience, EpisodeStatistics]:
        """One batch of episodes, all of whose randomness is `key`."""
        rollout = Rollout(self.num_episodes, self.horizon)
        experience, _, _ = rollout.collect(problem, policy, rollout.init(problem, policy, key))
        mask = running(experience.terminated, experience.truncated)
        reward = jnp.where(_inside(mask, experience.reward), experience.reward, 0.0)
        terminated = experience.terminated & _inside(mask, experience.terminated)
        # What still runs at the horizon is cut there, for a reason outside the task.
        ended = terminated.reshape((*mask.shape, -1)).any(axis=-1)
        last = jnp.zeros_like(mask).at[-1].set(True)
        truncated = mask & (experience.truncated | (last & ~ended))
        observed = jax.tree.map(
            lambda leaf: jnp.where(_inside(mask, leaf), leaf, jnp.zeros_like(leaf)), experience.next_observation
        )
        statistics = EpisodeStatistics(
            episodes=jnp.asarray(self.num_episodes),
            return_sum=jnp.sum(reward, axis=(0, 1)),
            length_sum=jnp.sum(mask).astype(jnp.float32),
            nonfinite_observations=count_nonfinite(observed),
            nonfinite_rewards=count_nonfinite(reward),
        )
        extras = {**experience.extras, "mask": mask}
        changes: dict[str, Any] = {"reward": reward, "terminated": terminated, "truncated": truncated, "extras": extras}
        return replace(experience, **changes), statistics


class PopulationEpisodes(Collector):
    """Whole episodes of several policies at once, each with its own episodes and its own randomness.

    The policy is one whose array leaves have a leading axis of members ``M``, which leads every leaf of the
    experience too: ``[M, T, N]``. Statistics are sums over all members.

    Attributes:
        members: policies ``M``.
        num_episodes: episodes of each ``N``.
        horizon: most steps of an episode ``T``.
    """

    members: int = eqx.field(static=True)
    num_episodes: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        require_count("members", self.members)
        require_count("num_episodes", self.num_episodes)
        require_count("horizon", self.horizon)

    @property
    def each(self) -> Episodes:
        """The collector of one member."""
        return Episodes(self.num_episodes, self.horizon)

    @property
    def needs(self) -> frozenset[str]:
        return self.each.needs

    @property
    def samples_per_iteration(self) -> int:
        return self.members * self.each.samples_per_iteration

    def init(self, problem: Problem, policy: Policy, key: Key[Array, "..."]) -> EpisodesState:
        """The state before the first batch.

        Args:
            problem: what is stepped.
            policy: the members' policies.
            key: one key, from which each member gets its own, or one for each ``[M]``.

        Raises:
            InputError: two members share a key, so that their episodes would be the same draws; or there are not as
                many policies or keys as members.
        """
        for leaf in jax.tree.leaves(eqx.filter(policy, eqx.is_array)):
            if leaf.ndim == 0 or leaf.shape[0] != self.members:
                raise InputError(
                    f"policy has a leaf of shape {leaf.shape}, but each must have a leading axis of {self.members} "
                    "members."
                )
        keys = jax.random.split(key, self.members) if key.ndim == 0 else key
        require(keys.shape == (self.members,), "key's shape", keys.shape, f"() or ({self.members},)")
        if not isinstance(keys, Tracer):
            words = np.asarray(jax.random.key_data(keys))
            require(len(np.unique(words, axis=0)) == self.members, "key", words.tolist(), "different for every member")
        return EpisodesState(jnp.zeros((), jnp.uint32), keys)

    def collect(
        self, problem: Problem, policy: Policy, state: EpisodesState
    ) -> tuple[Experience, EpisodesState, EpisodeStatistics]:
        pairs = jax.vmap(jax.random.split)(state.key)

        def play(policy: Policy, key: Key[Array, ""]) -> tuple[Experience, EpisodeStatistics]:
            return self.each.play(problem, policy, key)

        experience, statistics = eqx.filter_vmap(play)(policy, pairs[:, 1])
        samples = state.samples + jnp.uint32(self.samples_per_iteration)
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), statistics)
        return experience, EpisodesState(samples, pairs[:, 0]), total
