"""Evaluation of any policy on any problem: returns of whole episodes, and what one looked like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.envs import Problem, as_problem
from steersman.errors import require_count
from steersman.policies import Policy
from steersman.policies.storage import check_policy
from steersman.training import prng
from steersman.training.collect import episode_ends, reward_shape, where_done
from steersman.training.statistics import stratified_bootstrap_interval

#: Where an environment has no limit of its own, an episode is cut here.
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns of whole episodes.

    Attributes:
        returns: one per episode ``[E]``, with a trailing axis for vector rewards.
        lengths: steps of each episode ``[E]``.
    """

    returns: np.ndarray
    lengths: np.ndarray

    @property
    def mean(self) -> float:
        """Mean return over episodes (and summed over a vector reward's entries)."""
        return float(np.mean(np.sum(self.returns.reshape(len(self.returns), -1), axis=1)))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the mean return."""
        scores = np.sum(self.returns.reshape(len(self.returns), -1), axis=1)
        return stratified_bootstrap_interval(scores, np.mean, confidence=confidence)


@dataclass(frozen=True)
class Episode:
    """One recorded episode, as host arrays with a leading time axis; ``frames`` where the simulator draws itself."""

    states: PyTree
    observations: PyTree
    actions: PyTree
    rewards: np.ndarray
    frames: list[np.ndarray] | None = None


def evaluate(
    policy: Policy,
    problem: Any,
    *,
    episodes: int = 32,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    deterministic: bool = True,
) -> Evaluation:
    """Plays whole episodes, all of them side by side.

    Args:
        policy: any policy.
        problem: whatever :func:`steersman.envs.as_problem` accepts.
        episodes: how many.
        seed: randomness of starts, environment and policy.
        max_steps: where an episode is cut if the environment does not do so.
        deterministic: play :meth:`~steersman.policies.Policy.mode` instead of sampling.

    Raises:
        InputError: the policy does not fit the problem's spaces.
    """
    problem = as_problem(problem)
    require_count("episodes", episodes)
    require_count("max_steps", max_steps)
    policy = policy.mode() if deterministic else policy
    check_policy(policy, problem)
    if problem.on_host:
        from steersman.training.host import host_episodes

        returns, lengths = host_episodes(problem, policy, episodes, seed, max_steps)
        return Evaluation(np.asarray(returns), np.asarray(lengths))
    returns, lengths = _play(policy, problem, prng.key(seed), episodes, jnp.asarray(max_steps))
    return Evaluation(np.asarray(returns), np.asarray(lengths))


def evaluate_members(policies: PyTree, problem: Any, *, episodes: int = 32, seed: int = 0) -> np.ndarray:
    """Mean returns ``[M]`` of policies with a leading member axis, each over the same starts."""
    problem = as_problem(problem)
    count = jax.tree.leaves(policies)[0].shape[0]
    if problem.on_host:
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], policies) for i in range(count)]
        return np.array([evaluate(p, problem, episodes=episodes, seed=seed).mean for p in each])
    modes = policies.mode()
    key, limit = prng.key(seed), jnp.asarray(MAX_STEPS)
    returns, _ = eqx.filter_vmap(lambda p: _play(p, problem, key, episodes, limit))(modes)
    return np.asarray(jnp.mean(jnp.sum(returns.reshape(count, episodes, -1), axis=-1), axis=1))


@eqx.filter_jit
def _play(
    policy: Policy, problem: Problem, key: Key[Array, ""], episodes: int, max_steps: Int[Array, ""]
) -> tuple[Float[Array, "E ..."], Int[Array, " E"]]:
    reset_key, carry_key, key = jax.random.split(key, 3)
    observation, env_state = problem.reset(jax.random.split(reset_key, episodes))
    carry = jax.vmap(policy.init)(jax.random.split(carry_key, episodes))
    shape = reward_shape(problem, policy, env_state, observation, carry).shape

    def unfinished(running: tuple) -> Array:
        return jnp.logical_and(~jnp.all(running[4]), running[5] < max_steps)

    def step(running: tuple) -> tuple:
        observation, env_state, carry, total, over, t, length = running
        policy_key, env_key = jax.random.split(jax.random.fold_in(key, t))
        action, carry = jax.vmap(policy)(observation, carry, jax.random.split(policy_key, episodes))
        env_keys = jax.random.split(env_key, episodes)
        observation, env_state, reward, terminated, truncated, _ = problem.step(env_keys, env_state, action)
        total = total + where_done(over, jnp.zeros_like(reward), reward)
        length = length + ~over
        over = jnp.logical_or(over, episode_ends(terminated, truncated))
        return observation, env_state, carry, total, over, t + 1, length

    zeros = jnp.zeros(episodes, jnp.int32)
    start = (observation, env_state, carry, jnp.zeros(shape), zeros > 0, jnp.asarray(0), zeros)
    final = jax.lax.while_loop(unfinished, step, start)
    return final[3], final[6]


def record_episode(
    policy: Policy, problem: Any, *, seed: int = 0, max_steps: int = 1_000, deterministic: bool = True
) -> Episode:
    """Plays one episode and keeps everything that a picture of it needs."""
    problem = as_problem(problem)
    require_count("max_steps", max_steps)
    policy = policy.mode() if deterministic else policy
    check_policy(policy, problem)
    if problem.on_host:
        from steersman.training.host import record_host_episode

        return Episode(**record_host_episode(problem, policy, seed, max_steps))
    states, observations, actions, rewards, over = _record(policy, problem, prng.key(seed), max_steps)
    over = np.asarray(over)
    length = int(np.argmax(over)) + 1 if over.any() else max_steps

    def cut(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:length], tree)

    return Episode(cut(states), cut(observations), cut(actions), np.asarray(rewards)[:length])


@eqx.filter_jit
def _record(policy: Policy, problem: Problem, key: Key[Array, ""], max_steps: int) -> tuple:
    keys = jax.random.split(key, max_steps + 2)
    observation, env_state = problem.reset(keys[:1])
    carry = policy.init(keys[1])

    def step(running: tuple, key: Key[Array, ""]) -> tuple[tuple, tuple]:
        observation, env_state, carry = running
        policy_key, env_key = jax.random.split(key)
        action, carry = policy(jax.tree.map(lambda leaf: leaf[0], observation), carry, policy_key)
        batched = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], action)
        following, next_state, reward, terminated, truncated, _ = problem.step(env_key[None], env_state, batched)
        over = episode_ends(terminated, truncated)[0]
        row = jax.tree.map(lambda leaf: leaf[0], (env_state, observation))
        return (following, next_state, carry), (*row, action, reward[0], over)

    return jax.lax.scan(step, (observation, env_state, carry), keys[2:])[1]


def render(episode: Episode, problem: Any) -> bytes:
    """One recorded episode as an animated GIF."""
    from steersman.envs import rendering

    if episode.frames:
        return rendering.animate_frames(np.stack(episode.frames))
    problem = as_problem(problem)
    return rendering.render_episode(problem, episode.states, episode.observations, episode.actions, episode.rewards)
