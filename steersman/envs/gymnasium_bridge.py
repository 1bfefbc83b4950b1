"""Gymnasium environments as problems: batches that are stepped on the host, restarted at once, and resumed exactly."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import runpy
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from jaxtyping import Bool, Float, PyTree

from steersman.envs import gymnasium_worker
from steersman.envs.gymnasium_worker import Episodes, Layout, Leaf, from_leaves, leaf_spaces, leaves_of
from steersman.envs.post_decision import ABILITY as POST_DECISION
from steersman.errors import InputError, InputTypeError, RunError, require, require_count, unknown_name

#: Batches that take longer than this to step by one are given to worker processes, unless the user says otherwise.
WORTH_A_PROCESS = 1e-3


class GymnasiumProblem:
    """A Gymnasium environment as a problem that is stepped on the host.

    Attributes:
        name: the name shown in reports.
        observation_space: of one environment, with the types that are delivered: those that JAX computes in (under
            its defaults, float64 becomes float32 and int64 becomes int32).
        action_space: of one environment, likewise.
        num_agents: 0, a single agent.
        abilities: what it can do beyond ``reset`` and ``step``: give its post-decision state, if its steps' ``info``
            has ``post_decision`` (what would be observed) and ``decision_reward``.
        spec: the specification that environments are made from, or None.
        workers: as given.
        step_seconds: wall time that one step took when it was tried.
    """

    on_host = True
    num_agents = 0

    def __init__(
        self,
        source: str | gymnasium.Env | gymnasium.vector.VectorEnv | Callable[[], gymnasium.Env],
        *,
        workers: int | None = None,
        make_options: dict[str, Any] | None = None,
    ):
        """Makes one environment to look at: it is reset and stepped for some milliseconds (a vector environment, once).

        Args:
            source: a registered id, a function that makes an environment, an environment with a specification (which
                copies are made of), or a vector environment with ``AutoresetMode.DISABLED``.
            workers: processes that share the environments of a batch; 0 steps them in this process. By default, as
                many as there are cores where stepping a batch takes longer than a millisecond, and none otherwise.
                The numbers do not depend on it.
            make_options: keyword arguments for ``gymnasium.make``.

        Raises:
            InputError: nothing is registered under this id, or it cannot be made with these options.
            InputTypeError: the source is of another kind, or has spaces that cannot be put into arrays.
        """
        if workers is not None:
            require_count("workers", workers, 0)
        self.workers = workers
        self.spec: EnvSpec | None = None
        self._vector: gymnasium.vector.VectorEnv | None = None
        self._maker: EnvSpec | Callable[[], gymnasium.Env] | None = None
        options = dict(make_options or {})
        if isinstance(source, gymnasium.vector.VectorEnv):
            self._check_autoreset(source)
            self._vector = source
        elif isinstance(source, str):
            self.spec = self._maker = _specification(_find_spec(source), options)
        elif isinstance(source, gymnasium.Env):
            if source.spec is None:
                raise InputTypeError(
                    f"source is a {type(source.unwrapped).__name__} without a spec, so no copies of it can be made; "
                    "it must be an id, an environment from gymnasium.make, or a function that makes an environment."
                )
            self.spec = self._maker = _specification(source.spec, options)
        elif callable(source):
            self._maker = source
        else:
            raise InputTypeError(
                f"source is a {type(source).__name__}, but it must be a Gymnasium id, an environment, a vector "
                "environment or a function that makes an environment."
            )
        if options and self.spec is None:
            raise InputError(
                f"make_options is {options!r}, but it must be empty unless the source is an id or an environment with "
                "a spec."
            )
        self._look()

    @staticmethod
    def _check_autoreset(env: gymnasium.vector.VectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            shown = mode.value if isinstance(mode, AutoresetMode) else mode
            raise InputError(
                f"source is a vector environment with autoreset mode {shown!r}, but it must be 'Disabled', as in "
                "gymnasium.make_vec(id, num_envs, 'sync', vector_kwargs={'autoreset_mode': 'Disabled'})."
            )

    def _look(self) -> None:
        """Reads the spaces and steps a little, to learn what rewards and side information look like, and the time."""
        batch = self._vector
        env: Any = batch if batch is not None else self._make_checked()
        try:
            single_observation = batch.single_observation_space if batch is not None else env.observation_space
            single_action = batch.single_action_space if batch is not None else env.action_space
            self._host_observation, self._host_action = single_observation, single_action
            self.observation_space = _delivered("observation", single_observation)
            self.action_space = _delivered("action", single_action)
            # A vector environment made from functions knows of its parts what it can ask them.
            spec = env.spec if batch is None else getattr(getattr(batch, "envs", [batch])[0], "spec", None)
            self.name = spec.id if spec is not None else type(env.unwrapped).__name__
            env.action_space.seed(0)
            env.reset(seed=0)
            began = time.perf_counter()
            steps, seconds, reward, info = 0, 0.0, 0.0, {}
            while steps < 50 and seconds < 0.02:
                _, reward, terminated, truncated, info = env.step(env.action_space.sample())
                steps += 1
                seconds = time.perf_counter() - began
                if batch is not None or terminated or truncated:
                    break
        except (InputError, InputTypeError):
            raise
        except Exception as error:
            raise RunError(f"{type(env).__name__} failed while it was tried: {_described(error)}") from error
        finally:
            if batch is None:
                env.close()
        self.step_seconds = seconds / steps
        recorded = gymnasium_worker.recorded_leaves(info)
        self._recorded = [path for path, _ in recorded]
        halves = {"post_decision", "decision_reward"} <= {path[0] for path in self._recorded}
        self.abilities = frozenset({POST_DECISION}) if halves else frozenset()
        axes = 0 if batch is None else 1
        self._layout = Layout(
            observation=tuple(_leaf(space) for space in leaf_spaces(self.observation_space)),
            # Actions are exchanged in the environment's own types.
            action=tuple(_leaf(space) for space in leaf_spaces(single_action)),
            reward=Leaf(np.shape(reward)[axes:], _jax_dtype(np.float64).name),
            recorded=tuple(_number_leaf(path, value, axes) for path, value in recorded),
        )

    def _make_checked(self) -> gymnasium.Env:
        assert self._maker is not None
        try:
            env = gymnasium_worker.make_environment(self._maker)
        except gymnasium.error.DependencyNotInstalled as error:
            raise InputError(f"source is {self._shown}, but what it needs is not installed: {error}") from error
        except (TypeError, ValueError) as error:
            if self.spec is None or isinstance(error, InputError):
                raise
            raise InputError(f"make_options is {self.spec.kwargs!r}, but {self._shown} says: {error}") from error
        if not isinstance(env, gymnasium.Env):
            raise InputTypeError(
                f"source is a function that makes a {type(env).__name__}, but it must make a gymnasium.Env."
            )
        return env

    @property
    def _shown(self) -> str:
        return repr(self.spec.id) if self.spec is not None else repr(self._maker)

    def make(self, **options: Any) -> gymnasium.Env:
        """One environment of its own; `options` go to ``gymnasium.make`` where there is a specification."""
        if self._maker is None:
            raise InputTypeError(
                f"problem is {self.name} as a vector environment, but it must be an id, an environment or a function "
                "for a single environment to be made."
            )
        if self.spec is not None and options:
            return gymnasium_worker.make_environment(_specification(self.spec, options))
        return self._make_checked()

    @property
    def num_vector_envs(self) -> int:
        """How many environments the vector environment holds that this is; 0 if any number can be made."""
        return self._vector.num_envs if self._vector is not None else 0

    @property
    def is_vector(self) -> bool:
        """Whether the environments came as one vector environment, which steps them all at once."""
        return self._vector is not None

    def delivered(self, observation: Any) -> PyTree:
        """One observation as the environment gave it, with the types of :attr:`observation_space`."""
        leaves = zip(leaves_of(self._host_observation, observation), self._layout.observation, strict=True)
        return from_leaves(self._host_observation, iter([np.array(leaf, kind.dtype) for leaf, kind in leaves]))

    def accepted(self, action: PyTree) -> Any:
        """One action as a policy gave it, with the environment's own types."""
        leaves = zip(leaves_of(self._host_action, action), self._layout.action, strict=True)
        return from_leaves(self._host_action, iter([np.array(leaf, kind.dtype)[()] for leaf, kind in leaves]))

    def start(
        self, num_envs: int, seed: int | Sequence[int], *, parts: int = 1, workers: int | None = None
    ) -> HostEnvironments:
        """Makes a batch of environments, all to be reset before their first step.

        Args:
            num_envs: how many environments ``N``, for each seed.
            seed: what the randomness of every episode comes from; several seeds make a batch of ``M * N``, in which
                the environments of one seed do exactly what they would do alone.
            parts: into how many parts, each of which is stepped on its own, the ``N`` are divided.
            workers: instead of the problem's own setting.
        """
        require_count("num_envs", num_envs)
        require_count("parts", parts)
        require(parts <= num_envs, "parts", parts, f"at most num_envs, which is {num_envs}")
        seeds = [seed] if isinstance(seed, (int, np.integer)) else list(seed)
        require(len(seeds) > 0, "seed", seed, "one whole number, or at least one of them")
        for one in seeds:
            require_count("seed", one, 0)
        total = num_envs * len(seeds)
        if self._vector is not None:
            held = self._vector.num_envs
            require(total == held, "num_envs", total, f"{held}, the number that the vector environment holds")
            require(parts == 1, "parts", parts, "1 for a vector environment")
        requested = self.workers if workers is None else workers
        return HostEnvironments(self, num_envs, seeds, parts, self._choose_workers(requested, total))

    def _choose_workers(self, requested: int | None, total: int) -> int:
        if self._vector is not None or multiprocessing.current_process().daemon:
            return 0
        if requested is not None:
            require_count("workers", requested, 0)
            return min(requested, total)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, total) if cores > 1 and total * self.step_seconds > WORTH_A_PROCESS else 0

    def __repr__(self) -> str:
        return f"GymnasiumProblem({self.name!r}, workers={self.workers})"


class Transition(NamedTuple):
    """What a step of a batch returns.

    Attributes:
        observation: what is acted on next; the next episode's first where one ended.
        reward: ``[N]``, with a trailing axis for several objectives.
        terminated: the task ended.
        truncated: the episode was cut.
        info: ``final_observation``, what was observed after the step and before any restart; and the environment's
            ``costs``, ``duration`` and ``params`` where it has them.
    """

    observation: PyTree
    reward: Float[np.ndarray, "N ..."]
    terminated: Bool[np.ndarray, " N"]
    truncated: Bool[np.ndarray, " N"]
    info: dict[str, Any]


class HostEnvironments:
    """A live batch of environments. Finished episodes are restarted within the step that finishes them.

    Every reset is seeded by (seed, number of the environment, number of its episode), so that all that happens is a
    function of the seed and the actions. Rows are ordered by part, then seed, then environment; with one part and
    one seed, row ``i`` is environment ``i``.

    Use as a context manager, or call :meth:`close`.

    Attributes:
        num_envs: rows ``N`` of the whole batch.
        workers: how many processes step them; 0 means this one.
        threads: how many threads of this process step them, where worker processes were asked for and cannot be had.
    """

    def __init__(self, problem: GymnasiumProblem, num_envs: int, seeds: Sequence[int], parts: int, workers: int):
        self.problem = problem
        self.num_envs = num_envs * len(seeds)
        bounds = [num_envs * part // parts for part in range(parts + 1)]
        numbers = [(s, n) for p in range(parts) for s in seeds for n in range(bounds[p], bounds[p + 1])]
        self._seed = np.array([s for s, _ in numbers], np.uint64)
        self._number = np.array([n for _, n in numbers], np.int64)
        edges = [bound * len(seeds) for bound in bounds]
        self._rows = [range(edges[p], edges[p + 1]) for p in range(parts)]
        self._episode = np.zeros(self.num_envs, np.int64)
        #: Of each part, the actions of its last steps, as far back as its oldest running episode goes.
        self._past: list[collections.deque[list[np.ndarray]]] = [collections.deque() for _ in range(parts)]
        self._steps = [0] * parts
        self._begun = np.zeros(self.num_envs, np.int64)
        self._pending = [False] * parts
        self._started = [False] * parts
        self._arrays: Any = None
        self._backend: Any = None
        self.workers = self.threads = 0
        if workers > 0:
            self._start_workers(workers)
        if self._backend is None:
            self._start_here()

    # ---- starting and ending

    def _start_here(self) -> None:
        problem = self.problem
        self._arrays = gymnasium_worker.make_arrays(problem._layout, self.num_envs)
        self._arrays.active[:] = True
        identity = (self._seed, self._number, problem._recorded)
        if problem._vector is not None:
            envs: Any = gymnasium_worker.SteppedTogether(problem._vector, self._arrays, *identity)
        else:
            rows = range(self.num_envs)
            envs = gymnasium_worker.SteppedOneByOne(problem._maker, self._arrays, rows, *identity)
        self._backend = _Threads(envs, self._rows, self.threads) if self.threads else _Here(envs)

    def _start_workers(self, workers: int) -> None:
        problem = self.problem
        try:
            backend = _Workers(self, workers)
        except _CannotShareError as error:
            # The environment could be made here, so it is the way to another process that is barred: a function
            # that closes over something that cannot be sent, a module that only this process can import.
            self.threads = workers
            if problem.workers is not None:
                warnings.warn(
                    f"{problem.name} is stepped by {workers} threads of this process instead of worker processes, "
                    f"because it could not be made there: {error}",
                    stacklevel=4,
                )
            return
        self._arrays = gymnasium_worker.make_arrays(problem._layout, self.num_envs, backend.memory)
        self._arrays.active[:] = True
        self._backend, self.workers = backend, workers

    def close(self) -> None:
        """Ends the worker processes and closes the environments. Closing twice is allowed."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> HostEnvironments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- stepping

    def reset(self, part: int = 0) -> PyTree:
        """Starts episode 0 everywhere in `part` and returns the observations ``[N, ...]``."""
        rows = self._check(part)
        self._do("r", part)
        self._episode[rows.start : rows.stop] = 0
        self._begun[rows.start : rows.stop] = 0
        self._steps[part] = 0
        self._past[part].clear()
        self._started[part] = True
        return self.observation(part)

    def step(self, action: PyTree, part: int = 0) -> Transition:
        """Steps every environment of `part` once; see :class:`Transition`."""
        self.step_async(action, part)
        return self.step_wait(part)

    def step_async(self, action: PyTree, part: int = 0) -> None:
        """Sends the actions ``[N, ...]``; the environments step while the caller does something else.

        Without worker processes the steps are taken by :meth:`step_wait`: that overlaps with whatever the caller has
        dispatched to JAX before, and a thread of its own would only compete for the interpreter.
        """
        rows = self._check(part)
        require(self._started[part], "part", part, "one that was reset before its first step")
        parts = self._action_leaves(action, len(rows))
        between = slice(rows.start, rows.stop)
        for array, leaf in zip(self._arrays.action, parts, strict=True):
            array[between] = leaf
        self._past[part].append([array[between].copy() for array in self._arrays.action])
        self._steps[part] += 1
        self._send("s", part)
        self._pending[part] = True

    def step_wait(self, part: int = 0) -> Transition:
        """Waits for the step that :meth:`step_async` began."""
        self._open()
        require(0 <= part < len(self._rows), "part", part, f"one of 0 to {len(self._rows) - 1}")
        require(self._pending[part], "part", part, "one that step_async was called for")
        self._pending[part] = False
        self._wait(part)
        rows, arrays = self._rows[part], self._arrays
        between = slice(rows.start, rows.stop)
        terminated, truncated = arrays.terminated[between].copy(), arrays.truncated[between].copy()
        ended = np.logical_or(terminated, truncated)
        if ended.any():
            self._episode[between] += ended
            self._begun[between][ended] = self._steps[part]
            past = self._past[part]
            for _ in range(len(past) - int(self._steps[part] - self._begun[between].min())):
                past.popleft()
        info: dict[str, Any] = {"final_observation": self._batch(arrays.final, between)}
        for path, array in zip(self.problem._recorded, arrays.recorded, strict=True):
            _put(info, path, array[between].copy())
        observation = self._batch(arrays.observation, between)
        return Transition(observation, arrays.reward[between].copy(), terminated, truncated, info)

    def observation(self, part: int = 0) -> PyTree:
        """What the environments of `part` are about to be acted on ``[N, ...]``."""
        rows = self._check(part)
        return self._batch(self._arrays.observation, slice(rows.start, rows.stop))

    def retire(self, rows: Bool[np.ndarray, " N"]) -> None:
        """Stops stepping these rows: their values stay as they are. A batch with retired rows has no snapshot."""
        self._open()
        self._arrays.active[np.asarray(rows)] = False

    # ---- resuming

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that is needed to continue exactly: of each environment, its seed and its actions since its reset."""
        self._idle()
        require(bool(self._arrays.active.all()), "retired", int((~self._arrays.active).sum()), "0 for a snapshot")
        length = np.zeros(self.num_envs, np.int64)
        chunks: list[list[np.ndarray]] = [[] for _ in self._arrays.action]
        for part, rows in enumerate(self._rows):
            past = list(self._past[part])
            between = slice(rows.start, rows.stop)
            length[between] = self._steps[part] - self._begun[between]
            stacked = [np.stack([step[k] for step in past]) if past else None for k in range(len(chunks))]
            for row in rows:
                for chunk, leaf in zip(chunks, stacked, strict=True):
                    if leaf is not None:
                        chunk.append(leaf[len(past) - length[row] :, row - rows.start])
        kept = {
            "seed": self._seed.copy(),
            "number": self._number.copy(),
            "episode": self._episode.copy(),
            "length": length,
            "digest": self._collect_digests(),
        }
        for k, (chunk, array) in enumerate(zip(chunks, self._arrays.action, strict=True)):
            # One more row than there are steps, since checkpoints hold no empty arrays.
            kept[f"action/{k}"] = np.concatenate([*chunk, np.zeros_like(array[:1])])
        return kept

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """Brings every environment to where it stood, by resetting it and repeating its actions.

        Raises:
            InputError: the snapshot is of another batch.
            RunError: an environment did not arrive at the same observation.
        """
        self._idle()
        expected = {"seed", "number", "episode", "length", "digest"}
        expected |= {f"action/{k}" for k in range(len(self._arrays.action))}
        require(expected <= set(snapshot), "snapshot", sorted(snapshot), f"a dict with the entries {sorted(expected)}")
        rows = len(snapshot["seed"])
        require(rows == self.num_envs, "snapshot", f"of {rows} environments", f"of {self.num_envs} environments")
        action = [np.asarray(snapshot[f"action/{k}"])[:-1] for k in range(len(self._arrays.action))]
        for leaf, array in zip(action, self._arrays.action, strict=True):
            good = leaf.shape == (int(np.sum(snapshot["length"])), *array.shape[1:]) and leaf.dtype == array.dtype
            require(good, "snapshot", "with other actions", f"one of {self.problem.name}")
        seed, number, episode, length = (np.array(snapshot[k]) for k in ("seed", "number", "episode", "length"))
        episodes = Episodes(seed, number, episode, length, action)
        reached = self._replay(episodes)
        wrong = int(np.sum(reached != snapshot["digest"]))
        if wrong:
            raise RunError(
                f"{self.problem.name} is not deterministic ({wrong} of {rows} environments did not come back to the "
                "same observation under the same seed and actions), so the run cannot be continued exactly."
            )
        self._seed, self._number, self._episode = episodes.seed, episodes.number, episodes.episode
        start = np.cumsum(episodes.length) - episodes.length
        for part, rows in enumerate(self._rows):
            between = slice(rows.start, rows.stop)
            longest = int(episodes.length[between].max())
            past = [[np.zeros_like(array[between]) for array in self._arrays.action] for _ in range(longest)]
            for i, row in enumerate(rows):
                count = int(episodes.length[row])
                for t in range(count):
                    for k, leaf in enumerate(action):
                        past[longest - count + t][k][i] = leaf[start[row] + t]
            self._past[part] = collections.deque(past)
            self._steps[part] = longest
            self._begun[between] = longest - episodes.length[between]
            self._started[part] = True

    # ---- inside

    def _open(self) -> None:
        if self._backend is None:
            raise RunError(f"{self.problem.name} was closed.")

    def _check(self, part: int) -> range:
        self._open()
        require(0 <= part < len(self._rows), "part", part, f"one of 0 to {len(self._rows) - 1}")
        require(not self._pending[part], "part", part, "one whose last step was waited for")
        return self._rows[part]

    def _idle(self) -> None:
        for part in range(len(self._rows)):
            self._check(part)

    def _action_leaves(self, action: PyTree, count: int) -> list[np.ndarray]:
        space = self.problem._host_action
        try:
            leaves = [np.asarray(leaf) for leaf in leaves_of(space, action)]
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputTypeError(f"action is a {type(action).__name__}, but it must be a batch of {space}.") from None
        for leaf, array in zip(leaves, self._arrays.action, strict=True):
            allowed = (count, *array.shape[1:])
            if leaf.shape != allowed:
                raise InputError(
                    f"action has shape {leaf.shape}, but it must be {allowed}: one action for each environment."
                )
        return leaves

    def _batch(self, arrays: list[np.ndarray], between: slice) -> PyTree:
        return from_leaves(self.problem._host_observation, iter([array[between].copy() for array in arrays]))

    @contextlib.contextmanager
    def _closing_on_error(self) -> Any:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _do(self, verb: str, part: int) -> None:
        self._send(verb, part)
        self._wait(part)

    def _send(self, verb: str, part: int) -> None:
        with self._closing_on_error():
            self._backend.send(verb, part, self._rows[part])

    def _wait(self, part: int) -> None:
        with self._closing_on_error():
            self._backend.wait(part, self.problem.name)

    def _collect_digests(self) -> np.ndarray:
        with self._closing_on_error():
            return self._backend.digests(self.num_envs, self.problem.name)

    def _replay(self, episodes: Episodes) -> np.ndarray:
        with self._closing_on_error():
            return self._backend.replay(episodes, self.problem.name)


class _Here:
    """Steps in this process, when the result is asked for."""

    def __init__(self, envs: gymnasium_worker.SteppedOneByOne | gymnasium_worker.SteppedTogether):
        self.envs = envs
        self.requests: dict[int, tuple[str, range]] = {}

    def send(self, verb: str, part: int, rows: range) -> None:
        self.requests[part] = (verb, rows)

    def wait(self, part: int, name: str) -> None:
        verb, rows = self.requests.pop(part)
        with _named(name):
            (self.envs.step if verb == "s" else self.envs.reset)(rows)

    def digests(self, count: int, name: str) -> np.ndarray:
        del count
        with _named(name):
            return self.envs.digests()

    def replay(self, episodes: Episodes, name: str) -> np.ndarray:
        with _named(name):
            return self.envs.replay(episodes)

    def close(self) -> None:
        self.envs.close()


class _Threads(_Here):
    """Steps in threads of this process, which helps where a simulator releases the interpreter, as MuJoCo does."""

    def __init__(self, envs: gymnasium_worker.SteppedOneByOne, parts: list[range], threads: int):
        super().__init__(envs)
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.shares = [[_share(rows, worker, threads) for worker in range(threads)] for rows in parts]
        self.running: dict[int, list[concurrent.futures.Future[None]]] = {}

    def send(self, verb: str, part: int, rows: range) -> None:
        call = self.envs.step if verb == "s" else self.envs.reset
        self.running[part] = [self.pool.submit(call, share) for share in self.shares[part] if share]

    def wait(self, part: int, name: str) -> None:
        running = self.running.pop(part)
        concurrent.futures.wait(running)
        with _named(name):
            for share in running:
                share.result()

    def close(self) -> None:
        self.pool.shutdown()
        super().close()


class _CannotShareError(Exception):
    """The environments cannot be made in another process."""


_starting = threading.Lock()


class _Workers:
    """Worker processes, each with an equal share of every part, that exchange arrays through shared memory."""

    def __init__(self, batch: HostEnvironments, workers: int):
        import cloudpickle

        problem = batch.problem
        context = multiprocessing.get_context("spawn")
        self.connections: list[Any] = []
        self.processes: list[Any] = []
        self.shares: list[list[range]] = []
        self._finalizer = weakref.finalize(self, _end, self.connections, self.processes)
        try:
            layout = problem._layout
            self.memory = context.RawArray("b", gymnasium_worker.arrays_size(layout, batch.num_envs))
            groups = (layout.observation, layout.action, (layout.reward,), layout.recorded)
            leaves = [[tuple(leaf) for leaf in group] for group in groups]
            for worker in range(workers):
                share = [_share(rows, worker, workers) for rows in batch._rows]
                program = cloudpickle.dumps(
                    (problem._maker, leaves, batch.num_envs, share, batch._seed, batch._number, problem._recorded)
                )
                here, there = context.Pipe()
                assignment = {"connection": there, "memory": self.memory, "program": program}
                process = context.Process(
                    target=runpy.run_path,
                    args=(str(Path(gymnasium_worker.__file__)), {"ASSIGNMENT": assignment}, "steersman_worker"),
                    daemon=True,
                    name=f"{problem.name} {worker}",
                )
                with _without_main():
                    process.start()
                there.close()
                self.shares.append(share)
                self.connections.append(here)
                self.processes.append(process)
            for worker in range(workers):
                self._receive(worker, problem.name)
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                raise _CannotShareError(_described(error)) from error
            raise

    def send(self, verb: str, part: int, rows: range) -> None:
        del rows
        request = bytes([ord(verb), part])
        for connection, share in zip(self.connections, self.shares, strict=True):
            if share[part]:
                # A dead worker is noticed, with its exit status, where its answer is waited for.
                with contextlib.suppress(OSError):
                    connection.send_bytes(request)

    def wait(self, part: int, name: str) -> None:
        for worker, share in enumerate(self.shares):
            if share[part]:
                self._receive(worker, name)

    def _receive(self, worker: int, name: str) -> bytes:
        try:
            answer = self.connections[worker].recv_bytes()
        except (EOFError, OSError):
            process = self.processes[worker]
            process.join(1.0)
            raise RunError(
                f"A worker process of {name} died (exit status {process.exitcode}) and took its environments with it; "
                "workers=0 steps them in this process."
            ) from None
        if answer[:1] == b"!":
            summary, _, trace = answer[1:].decode(errors="replace").partition("\n")
            error = RunError(f"{name} failed in a worker process: {summary}")
            if trace:
                error.add_note(trace)
            raise error
        return answer

    def _gather(self, request: bytes, count: int, name: str) -> np.ndarray:
        gathered = np.zeros(count, np.uint64)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(request)
        for worker in range(len(self.connections)):
            rows, values = pickle.loads(self._receive(worker, name))
            gathered[rows] = values
        return gathered

    def digests(self, count: int, name: str) -> np.ndarray:
        return self._gather(b"d\0", count, name)

    def replay(self, episodes: Episodes, name: str) -> np.ndarray:
        return self._gather(b"p\0" + pickle.dumps(tuple(episodes)), len(episodes.seed), name)

    def close(self) -> None:
        self._finalizer()


def _end(connections: list[Any], processes: list[Any]) -> None:
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + 2.0
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
        process.close()
    connections.clear()
    processes.clear()


@contextlib.contextmanager
def _without_main() -> Any:
    """Hides the user's script while a process is started, which would otherwise run it a second time.

    ``multiprocessing`` imports the parent's main script into every spawned process, and a script without an
    ``if __name__ == "__main__"`` would train there again. Workers need nothing of it: what an environment is made
    from is sent by value.
    """
    with _starting:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@contextlib.contextmanager
def _named(name: str) -> Any:
    try:
        yield
    except Exception as error:
        raise RunError(f"{name} failed: {_described(error)}") from error


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, RunError) else str(error)


def _share(rows: range, worker: int, workers: int) -> range:
    count = len(rows)
    return range(rows.start + count * worker // workers, rows.start + count * (worker + 1) // workers)


#: Packages whose tasks Gymnasium makes once they are imported: their ids, and what brings them.
NAMESPACES = {"gym_pusht": (("gym_pusht/PushT-v0",), "pip install 'steersman[robotics]'")}


def import_namespace(name: str) -> None:
    """Imports the package that registers ``"package/Task-v0"``, where Gymnasium does not know that id yet.

    Packages of tasks register them when they are imported, and name the namespace of their ids after themselves. Where
    there is no such package nothing happens: the id then is an unknown one.

    Raises:
        InputError: the package cannot be imported, or is a known one that is not installed.
    """
    package, _, task = name.partition("/")
    if not task or not package.isidentifier() or name in gymnasium.registry:
        return
    if importlib.util.find_spec(package) is None:
        if package in NAMESPACES:
            raise InputError(f"{name} needs the package {package}: install it with {NAMESPACES[package][1]}.")
        return
    # pygame, which draws some of these tasks, greets on standard output, which may be holding a document.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"source is {name!r}, but {package} cannot be imported: {error}") from error


def _find_spec(name: str) -> EnvSpec:
    module, _, task = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"source is {name!r}, but {module} cannot be imported: {error}") from error
    else:
        import_namespace(task)
    try:
        return gymnasium.spec(task)
    except gymnasium.error.UnregisteredEnv:
        raise unknown_name("Gymnasium environment", task, gymnasium.registry) from None
    except gymnasium.error.Error as error:
        raise InputError(f"source is {name!r}, but Gymnasium says: {error}") from error


def _specification(spec: EnvSpec, options: dict[str, Any]) -> EnvSpec:
    """A copy of `spec` with `options`, without the checks that cost time at every step."""
    spec = copy.deepcopy(spec)
    options = dict(options)
    if "max_episode_steps" in options:
        spec.max_episode_steps = options.pop("max_episode_steps")
    spec.kwargs = {**spec.kwargs, **options}
    spec.order_enforce = False
    spec.disable_env_checker = True
    return spec


def _jax_dtype(dtype: Any) -> np.dtype:
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def _delivered(kind: str, space: gymnasium.Space) -> gymnasium.Space:
    """`space` with the types that JAX computes in."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _delivered(kind, part) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_delivered(kind, part) for part in space.spaces])
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise InputTypeError(
            f"The {kind} space is a {type(space).__name__}, but it must be made of Box, Discrete, MultiDiscrete and "
            "MultiBinary spaces."
        )
    dtype = _jax_dtype(space.dtype)
    if dtype == space.dtype:
        return space
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
        if np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            low, high = np.clip(low, limits.min, limits.max), np.clip(high, limits.min, limits.max)
        with np.errstate(over="ignore"):
            return spaces.Box(low.astype(dtype), high.astype(dtype), space.shape, dtype.type)
    space = copy.copy(space)
    space.dtype = dtype
    return space


def _leaf(space: gymnasium.Space) -> Leaf:
    assert space.shape is not None
    return Leaf(space.shape, np.dtype(space.dtype).name)


def _number_leaf(path: tuple[str, ...], value: Any, axes: int) -> Leaf:
    value = np.asarray(value)
    if value.dtype.kind not in "fiub":
        raise InputTypeError(f"info entry {'/'.join(path)} is {value!r}, but it must be made of numbers.")
    return Leaf(value.shape[axes:], _jax_dtype(value.dtype).name)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
