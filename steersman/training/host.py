"""Rollouts and evaluation on environments that are stepped on the host, side by side for all members of a run."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.envs.gymnasium_bridge import GymnasiumProblem, HostEnvironments, Transition
from steersman.envs.gymnasium_worker import RECORDED_INFO, episode_seed
from steersman.errors import InputError, InputTypeError, require, require_count
from steersman.policies import Policy
from steersman.training.collect import EpisodeStatistics, count_nonfinite, episode_ends, where_done
from steersman.training.experience import Experience


class _Stored(NamedTuple):
    """What a half's policies write on the device as they act, ``[T, M, n, ...]``."""

    observation: PyTree
    carry: PyTree
    action: PyTree
    record: PyTree


class _Arrived(NamedTuple):
    """What a half's environments answer, on the host, ``[T, M * n, ...]``."""

    final: PyTree
    reward: Any
    terminated: Any
    truncated: Any
    extras: dict[str, Any]


def _require_members(policies: PyTree, members: int) -> None:
    for leaf in jax.tree.leaves(eqx.filter(policies, eqx.is_array)):
        if leaf.ndim == 0 or leaf.shape[0] != members:
            raise InputError(
                f"policies has a leaf of shape {leaf.shape}, but each must have a leading axis of {members}, one entry "
                "for each key."
            )


@functools.lru_cache(maxsize=64)
def _act_program(structure: Any, constants: tuple[Any, ...], between: tuple[int, int], has_memory: bool) -> Any:
    """The compiled step of one half for policies of one kind, kept for every rollout with such policies."""

    def member(arrays: list[Any], keys: Array, t: Array, observation: PyTree, restart: Any, carry: PyTree):
        policy: Policy = jax.tree.unflatten(structure, _merged(arrays, constants))
        keys = keys[t, :, between[0] : between[1]]
        if has_memory:
            carry = where_done(restart, jax.vmap(policy.init)(keys[1]), carry)
        action, next_carry, record = jax.vmap(policy.act)(observation, carry, keys[0])
        return action, next_carry, _Stored(observation, carry, action, record)

    def act(arrays: list[Any], keys: Key[Array, "M T 2 N"], observation: PyTree, restart: Any, running: tuple):
        t, carry, stored = running
        in_axes = (0, 0, None, 0, 0, 0)
        action, carry, row = jax.vmap(member, in_axes)(arrays, keys, t, observation, restart, carry)
        stored = jax.tree.map(lambda batch, leaf: batch.at[t].set(leaf), stored, row)
        return action, (t + 1, carry, stored)

    # What is stored is donated: each step writes its row in place.
    return jax.jit(act, donate_argnums=4)


def _merged(arrays: list[Any], constants: tuple[Any, ...]) -> list[Any]:
    return [constant if array is None else array for array, constant in zip(arrays, constants, strict=True)]


def _kind_of(policies: PyTree) -> tuple[list[Any], tuple[Any, tuple[Any, ...]]]:
    """The arrays of some policies, and all else about them, which programs are compiled for."""
    leaves, structure = jax.tree.flatten(policies)
    arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
    kind = (structure, tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves))
    try:
        hash(kind)
    except TypeError as error:
        raise InputTypeError(
            f"policies has a part that is neither a JAX array nor hashable ({error}), so nothing can be compiled for "
            "it; make it an array leaf."
        ) from None
    return arrays, kind


@jax.jit
def _first_keys(keys: Key[Array, " M"]) -> tuple[Array, Key[Array, " M"]]:
    pairs = jax.vmap(jax.random.split)(keys)
    return jax.vmap(jax.random.bits)(pairs[:, 0]), pairs[:, 1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _batch_keys(
    keys: Key[Array, " M"], num_steps: int, num_envs: int
) -> tuple[Key[Array, " M"], Key[Array, "M T 2 N"]]:
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], jax.vmap(lambda key: jax.random.split(key, (num_steps, 2, num_envs)))(pairs[:, 1])


@functools.partial(jax.jit, static_argnums=0)
def _assemble(
    members: int, stored: list[_Stored], arrived: list[_Arrived], episode_return: Array, episode_length: Array
) -> tuple[Experience, EpisodeStatistics, Array, Array]:
    """Joins the halves into ``[M, T, N, ...]`` and follows the episodes' returns and lengths."""

    def join(*halves: Array) -> Array:
        return jnp.moveaxis(jnp.concatenate(halves, axis=2), 1, 0)

    def join_rows(*halves: Array) -> Array:
        return join(*(half.reshape(half.shape[0], members, -1, *half.shape[2:]) for half in halves))

    kept: _Stored = jax.tree.map(join, *stored)
    came: _Arrived = jax.tree.map(join_rows, *arrived)
    experience = Experience(
        observation=kept.observation,
        next_observation=came.final,
        carry=kept.carry,
        action=kept.action,
        record=kept.record,
        reward=came.reward,
        terminated=came.terminated,
        truncated=came.truncated,
        extras=came.extras,
    )

    def follow(running: tuple[Array, Array], step: tuple[Array, Array]) -> tuple[tuple, tuple]:
        (total, length), (reward, done) = running, step
        total, length = total + reward, length + 1
        zero = jnp.zeros_like(total)
        return (where_done(done, zero, total), length * ~done), (where_done(done, total, zero), length * done)

    def statistics(experience: Experience, total: Array, length: Array) -> tuple[EpisodeStatistics, Array, Array]:
        done = episode_ends(experience.terminated, experience.truncated)
        running, (returns, lengths) = jax.lax.scan(follow, (total, length), (experience.reward, done))
        result = EpisodeStatistics(
            episodes=jnp.sum(done),
            return_sum=jnp.sum(returns, axis=(0, 1)),
            length_sum=jnp.sum(lengths).astype(jnp.float32),
            nonfinite_observations=count_nonfinite(experience.next_observation),
            nonfinite_rewards=count_nonfinite(experience.reward),
        )
        return result, *running

    return experience, *jax.vmap(statistics)(experience, episode_return, episode_length)


class HostRollout(eqx.Module):
    """``num_envs`` host environments for each of ``M`` members, ``num_steps`` steps each: :class:`Rollout`'s twin.

    The members (seeds, hyperparameter settings) share one batch of ``M * N`` environments and one call of the
    policies. The environments are divided into two halves: while one is stepped, the other's actions are computed.
    The order is fixed and the random numbers belong to the environments, so that nothing depends on timing.

    Attributes:
        num_envs: environments ``N`` of each member.
        num_steps: steps per batch ``T``.
        overlap: False steps the halves one after the other, with the same results.
    """

    num_envs: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    overlap: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        require_count("num_envs", self.num_envs)
        require_count("num_steps", self.num_steps)

    @property
    def samples_per_iteration(self) -> int:
        """Environment steps that one batch takes for each member."""
        return self.num_envs * self.num_steps

    def init(self, problem: GymnasiumProblem, policies: Policy, keys: Key[Array, " M"]) -> LiveRollout:
        """Makes and resets the environments.

        Args:
            problem: what is stepped.
            policies: a policy whose array leaves have a leading axis of members ``M``.
            keys: all randomness of each member. A member's environments do not depend on how many members there are.
        """
        return LiveRollout(self, problem, policies, keys)


class LiveRollout:
    """Running environments of all members, and where their policies stand. Made by :meth:`HostRollout.init`.

    Use as a context manager, or call :meth:`close`.

    Attributes:
        rollout: the sizes.
        environments: the live batch; its rows are ordered by half, then member, then environment.
        samples: environment steps taken so far by each member ``[M]``.
    """

    def __init__(self, rollout: HostRollout, problem: GymnasiumProblem, policies: Policy, keys: Key[Array, " M"]):
        require(keys.ndim == 1 and len(keys) > 0, "keys", keys.shape, "an array of one key for each member")
        self.rollout, self.problem = rollout, problem
        self._members = len(keys)
        _require_members(policies, self._members)
        bits, self._keys = _first_keys(keys)
        seeds = [int(seed) for seed in np.asarray(bits)]
        parts = 1 if problem.is_vector or rollout.num_envs == 1 else 2
        bounds = [rollout.num_envs * part // parts for part in range(parts + 1)]
        self._between = [(bounds[part], bounds[part + 1]) for part in range(parts)]
        self.samples = np.zeros(self._members, np.int64)
        self.environments: HostEnvironments = problem.start(rollout.num_envs, seeds, parts=parts)
        try:
            self._observation = [self._rows(self.environments.reset(part), part) for part in range(parts)]
            self._start_memory(policies)
        except BaseException:
            self.close()
            raise

    # ---- shapes

    def _rows(self, tree: PyTree, part: int) -> PyTree:
        """Rows of a half as ``[M, n, ...]``."""
        n = self._between[part][1] - self._between[part][0]
        return jax.tree.map(lambda leaf: leaf.reshape(self._members, n, *leaf.shape[1:]), tree)

    def _start_memory(self, policies: Policy) -> None:
        """Allocates, for each half, what the policies store on the device, and what arrives on the host."""
        arrays, (structure, constants) = _kind_of(policies)
        members, steps, layout = self._members, self.rollout.num_steps, self.problem._layout

        def one_act(arrays: list[Any], observation: PyTree, key: Key[Array, ""]) -> PyTree:
            policy: Policy = jax.tree.unflatten(structure, _merged(arrays, constants))
            carry = policy.init(key)
            action, _, record = policy.act(observation, carry, key)
            return carry, _Stored(observation, carry, action, record)

        def first(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

        one_observation = jax.tree.map(first, jax.tree.map(first, self._observation[0]))
        shapes = jax.eval_shape(one_act, jax.tree.map(first, arrays), one_observation, first(self._keys))
        self._has_memory = bool(jax.tree.leaves(shapes[0]))

        def zeros(lead: tuple[int, ...], shapes: PyTree) -> PyTree:
            return jax.tree.map(lambda s: jnp.array(np.zeros((*lead, *s.shape), s.dtype)), shapes)

        self._carry, self._stored, self._arrived, self._restart = [], [], [], []
        for start, stop in self._between:
            self._carry.append(zeros((members, stop - start), shapes[0]))
            self._stored.append(zeros((steps, members, stop - start), shapes[1]))
            self._restart.append(np.ones((members, stop - start), bool))
            rows = members * (stop - start)
            reward = np.zeros((steps, rows, *layout.reward.shape), layout.reward.dtype)
            flags = np.zeros((2, steps, rows), bool)
            self._arrived.append(_Arrived(None, reward, flags[0], flags[1], {}))
        self._episode_return = jnp.array(np.zeros((members, self.rollout.num_envs, *layout.reward.shape), np.float32))
        self._episode_length = jnp.array(np.zeros((members, self.rollout.num_envs), np.int32))

    # ---- collecting

    def collect(self, policies: Policy) -> tuple[Experience, EpisodeStatistics]:
        """One batch for every member: experience with leaves ``[M, T, N, ...]``, and statistics ``[M]``."""
        _require_members(policies, self._members)
        arrays, kind = _kind_of(policies)
        programs = [_act_program(*kind, between, self._has_memory) for between in self._between]
        environments, parts, steps = self.environments, len(self._between), self.rollout.num_steps
        # All keys of a batch come from one call: drawn step by step they would cost a third of acting.
        self._keys, keys = _batch_keys(self._keys, steps, self.rollout.num_envs)
        running: list[Any] = [(np.int32(0), *memory) for memory in zip(self._carry, self._stored, strict=True)]
        action: list[Any] = [None] * parts

        def act(part: int) -> None:
            restart = self._restart[part] if self._has_memory else None
            action[part], running[part] = programs[part](arrays, keys, self._observation[part], restart, running[part])

        def send(part: int) -> None:
            rows = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), action[part])
            environments.step_async(rows, part)

        def receive(part: int, t: int) -> None:
            self._keep(environments.step_wait(part), part, t)

        if parts == 1 or not self.rollout.overlap:
            for t in range(steps):
                for part in range(parts):
                    act(part)
                    send(part)
                    receive(part, t)
        elif environments.workers or environments.threads:
            # Both halves are always under way: the workers take up one where they finished the other, and its
            # actions are computed meanwhile.
            for part in range(parts):
                act(part)
                send(part)
            for t in range(steps):
                for part in range(parts):
                    receive(part, t)
                    if t + 1 < steps:
                        act(part)
                        send(part)
        else:
            # Stepping keeps this thread busy: the other half's actions are dispatched to JAX's threads before.
            for part in range(parts):
                act(part)
            send(0)
            for t in range(steps):
                for part in range(parts):
                    receive(part, t)
                    if t + 1 < steps or part == 0:
                        if t + 1 < steps:
                            act(part)
                        send(1 - part)
        for part, (_, carry, kept) in enumerate(running):
            self._carry[part], self._stored[part] = carry, kept
        experience, statistics, *follow = _assemble(
            self._members, self._stored, self._arrived, self._episode_return, self._episode_length
        )
        # The next batch overwrites what this one was assembled from.
        self._episode_return, self._episode_length = jax.block_until_ready(follow)
        jax.block_until_ready(experience)
        self.samples = self.samples + self.rollout.samples_per_iteration
        return experience, statistics

    def _keep(self, transition: Transition, part: int, t: int) -> None:
        arrived = self._arrived[part]
        final = transition.info["final_observation"]
        extras = {name: transition.info[name] for name in RECORDED_INFO if name in transition.info}
        if arrived.final is None:
            steps = self.rollout.num_steps
            fresh = jax.tree.map(lambda leaf: np.zeros((steps, *leaf.shape), leaf.dtype), (final, extras))
            arrived = self._arrived[part] = arrived._replace(final=fresh[0], extras=fresh[1])
        rows = (final, transition.reward, transition.terminated, transition.truncated, extras)
        for batch, leaf in zip(jax.tree.leaves(tuple(arrived)), jax.tree.leaves(rows), strict=True):
            batch[t] = leaf
        self._observation[part] = self._rows(transition.observation, part)
        if self._has_memory:
            self._restart[part] = self._rows(transition.terminated | transition.truncated, part)

    # ---- resuming and ending

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that is needed to continue exactly with the same policies; see :meth:`HostEnvironments.snapshot`."""
        environments = self.environments.snapshot()
        return self._own_state() | {f"environments/{name}": array for name, array in environments.items()}

    def _own_state(self) -> dict[str, np.ndarray]:
        kept = {
            "keys": np.asarray(jax.random.key_data(self._keys)),
            "episode_return": np.asarray(self._episode_return),
            "episode_length": np.asarray(self._episode_length),
            "samples": self.samples.copy(),
        }
        for part, (carry, restart) in enumerate(zip(self._carry, self._restart, strict=True)):
            kept[f"restart/{part}"] = restart.copy()
            for k, leaf in enumerate(jax.tree.leaves(carry)):
                kept[f"carry/{part}/{k}"] = np.array(leaf)
        return kept

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """Continues where `snapshot` was taken, from a rollout of the same sizes, problem and kind of policy.

        Raises:
            InputError: the snapshot is of another rollout.
            RunError: the environment is not deterministic.
        """
        present = {name: array.shape for name, array in snapshot.items() if not name.startswith("environments/")}
        own = {name: array.shape for name, array in self._own_state().items()}
        if present != own:
            wrong = sorted(name for name in {*present, *own} if present.get(name) != own.get(name))
            raise InputError(
                f"snapshot differs from this rollout in {', '.join(wrong)}, but it must be of a rollout with the same "
                "sizes, problem and kind of policy."
            )
        prefix = "environments/"
        self.environments.restore({k.removeprefix(prefix): v for k, v in snapshot.items() if k.startswith(prefix)})
        self._keys = jax.random.wrap_key_data(jnp.asarray(snapshot["keys"]), impl=jax.random.key_impl(self._keys))
        self._episode_return = jnp.array(snapshot["episode_return"])
        self._episode_length = jnp.array(snapshot["episode_length"])
        self.samples = np.array(snapshot["samples"])
        for part in range(len(self._between)):
            structure = jax.tree.structure(self._carry[part])
            leaves = [jnp.array(snapshot[f"carry/{part}/{k}"]) for k in range(structure.num_leaves)]
            self._carry[part] = jax.tree.unflatten(structure, leaves)
            self._restart[part] = np.array(snapshot[f"restart/{part}"])
            self._observation[part] = self._rows(self.environments.observation(part), part)

    def close(self) -> None:
        """Ends the environments."""
        self.environments.close()

    def __enter__(self) -> LiveRollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@eqx.filter_jit
def _act(
    policy: Policy, observation: PyTree, carry: PyTree, restart: Any, key: Key[Array, ""], t: Any
) -> tuple[PyTree, PyTree]:
    keys = jax.random.split(jax.random.fold_in(key, t), (2, len(restart)))
    if jax.tree.leaves(carry):
        carry = where_done(restart, jax.vmap(policy.init)(keys[1]), carry)
    return jax.vmap(policy)(observation, carry, keys[0])


def _memory(policy: Policy, count: int) -> PyTree:
    shapes = eqx.filter_eval_shape(policy.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)


def host_episodes(
    problem: GymnasiumProblem, policy: Policy, num_episodes: int, seed: int, max_steps: int | None = None
) -> tuple[Float[np.ndarray, "E ..."], Int[np.ndarray, " E"]]:
    """Plays whole episodes, all of them side by side.

    Args:
        problem: what is stepped.
        policy: one policy (without member axis); give its ``mode()`` to evaluate without exploration.
        num_episodes: how many episodes ``E``.
        seed: randomness of the episodes and of the policy.
        max_steps: where an episode is cut if the environment does not end it.

    Returns:
        Undiscounted returns ``[E]`` (with a trailing axis for vector rewards) and lengths ``[E]``.
    """
    require_count("num_episodes", num_episodes)
    require_count("seed", seed, 0)
    if max_steps is not None:
        require_count("max_steps", max_steps)
    batch = problem.num_vector_envs or num_episodes
    quota = (num_episodes - np.arange(batch) + batch - 1) // batch
    # A process takes longer to start than most evaluations take.
    workers = 0 if problem.workers is None else problem.workers
    key, carry = jax.random.key(seed), _memory(policy, batch)
    returns, lengths = [np.zeros(0)] * num_episodes, np.zeros(num_episodes, np.int64)
    played, length, restart = np.zeros(batch, np.int64), np.zeros(batch, np.int64), np.ones(batch, bool)
    total: Any = 0.0
    with problem.start(batch, seed, workers=workers) as environments:
        observation = environments.reset()
        t = 0
        while (played < quota).any():
            action, carry = _act(policy, observation, carry, restart, key, np.int32(t))
            observation, reward, terminated, truncated, _ = environments.step(jax.tree.map(np.asarray, action))
            total, length, t = total + reward.astype(np.float64), length + 1, t + 1
            restart = np.logical_or(terminated, truncated)
            over = np.logical_and(restart if max_steps is None else restart | (length >= max_steps), played < quota)
            for row in np.flatnonzero(over):
                episode = int(row + batch * played[row])
                returns[episode], lengths[episode] = total[row].copy(), length[row]
            played += over
            if np.any(over & ~restart & (played < quota)):
                raise InputError(
                    f"max_steps is {max_steps}, but {problem.name}, a vector environment of {batch}, cannot start "
                    f"anew before an episode has ended; ask for at most {batch} episodes."
                )
            total[restart], length[restart] = 0.0, 0
            if not problem.is_vector:
                environments.retire(played >= quota)
    return np.stack(returns), lengths


def record_host_episode(problem: GymnasiumProblem, policy: Policy, seed: int, max_steps: int = 1_000) -> dict[str, Any]:
    """Plays one episode, the first that :func:`host_episodes` would play, and keeps what a picture of it needs.

    Returns:
        ``observations``, ``actions`` and ``rewards`` with a leading time axis; ``states``, a dict of ``qpos`` and
        ``qvel`` for a MuJoCo simulation and an empty one otherwise; and ``frames``, RGB arrays of the same moments as
        the observations, or None where nothing can draw the environment. A MuJoCo simulation that finds no OpenGL is
        drawn by :func:`steersman.envs.mujoco_scene`.
    """
    require_count("seed", seed, 0)
    require_count("max_steps", max_steps)
    key, carry, restart = jax.random.key(seed), _memory(policy, 1), np.ones(1, bool)
    rows: list[tuple[PyTree, PyTree, Any, PyTree]] = []
    env = _make_drawable(problem)
    try:
        observation, _ = env.reset(seed=episode_seed(seed, 0, 0))
        draw = _drawing(env)
        frames: list[np.ndarray] | None = None if draw is None else []
        for t in range(max_steps):
            if draw is not None and frames is not None:
                frames.append(draw())
            seen, state = problem.delivered(observation), _mujoco_state(env)
            batch = jax.tree.map(lambda leaf: leaf[None], seen)
            action, carry = _act(policy, batch, carry, restart, key, np.int32(t))
            action = jax.tree.map(lambda leaf: np.asarray(leaf)[0], action)
            observation, reward, terminated, truncated, _ = env.step(problem.accepted(action))
            rows.append((seen, action, np.asarray(reward, np.float32), state))
            restart = np.zeros(1, bool)
            if terminated or truncated:
                break
    finally:
        env.close()
    seen, actions, rewards, states = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    return {"states": states, "observations": seen, "actions": actions, "rewards": rewards, "frames": frames}


def host_episode_frames(
    problem: GymnasiumProblem, policy: Policy, seed: int, max_steps: int = 1_000
) -> list[np.ndarray] | None:
    """One episode as RGB frames, or None where nothing can draw the environment."""
    return record_host_episode(problem, policy, seed, max_steps)["frames"]


def _make_drawable(problem: GymnasiumProblem) -> gymnasium.Env:
    """An environment that renders arrays if there is one; drawing is tried, since it can fail in any library."""
    if problem.spec is None or problem.spec.kwargs.get("render_mode") is not None:
        return problem.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing for drawing is not news: the answer is None
        try:
            env = problem.make(render_mode="rgb_array")
        except Exception:
            return problem.make()
        if _mujoco_state(env):
            return env
        try:
            env.reset(seed=0)
            env.render()
        except Exception:
            with contextlib.suppress(Exception):
                env.close()
            return problem.make()
    return env


def _drawing(env: gymnasium.Env) -> Callable[[], np.ndarray] | None:
    """How a picture of `env` is made, or None."""
    renders, simulation = env.render_mode == "rgb_array", _mujoco_simulation(env)
    if simulation is None or (renders and _opengl_works()):
        return (lambda: np.asarray(env.render())) if renders else None
    from steersman.envs.rendering import mujoco_scene, paint

    return lambda: np.asarray(paint(mujoco_scene(simulation.model, simulation.data)))


@functools.cache
def _opengl_works() -> bool:
    """Whether MuJoCo's own renderer can draw here.

    Asked of another process: where it cannot, MuJoCo raises an error the first time and ends the process the second.
    """
    program = (
        "import gymnasium; env = gymnasium.make('InvertedPendulum-v5', render_mode='rgb_array'); env.reset(); "
        "env.render()"
    )
    with tempfile.TemporaryDirectory() as folder:  # where MuJoCo leaves its log
        try:
            done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0


def _mujoco_simulation(env: gymnasium.Env) -> Any:
    simulation = env.unwrapped
    data = getattr(simulation, "data", None)
    return simulation if hasattr(simulation, "model") and hasattr(data, "qpos") and hasattr(data, "qvel") else None


def _mujoco_state(env: gymnasium.Env) -> dict[str, np.ndarray]:
    simulation = _mujoco_simulation(env)
    return (
        {} if simulation is None else {"qpos": np.array(simulation.data.qpos), "qvel": np.array(simulation.data.qvel)}
    )
