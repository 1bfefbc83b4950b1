"""Steps Gymnasium environments into flat arrays, in this process or as the program of a worker process.

Nothing here imports JAX, so that a worker process starts as fast as Gymnasium can be imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

#: Entries of a step's ``info`` that are stored with the experience. ``cost``, as safety benchmarks spell it, becomes
#: ``costs``.
RECORDED_INFO = ("costs", "duration", "params", "post_decision", "decision_reward")


class Leaf(NamedTuple):
    """Shape and type of one array of a batch, without the axis of environments."""

    shape: tuple[int, ...]
    dtype: str


class Layout(NamedTuple):
    """What is exchanged for one environment: the arrays of its observations, actions, rewards and side information."""

    observation: tuple[Leaf, ...]
    action: tuple[Leaf, ...]
    reward: Leaf
    recorded: tuple[Leaf, ...]


class Arrays(NamedTuple):
    """The exchanged arrays, each with a leading axis of environments; all of them lie in one block of memory.

    Attributes:
        observation: what each environment will be acted on next, one array per leaf of its space.
        final: what was observed after the last step, before any restart.
        action: what each environment is to be stepped with.
        reward: of the last step.
        terminated: whether the task ended there.
        truncated: whether the episode was cut there.
        recorded: side information of the last step.
        active: whether an environment is stepped at all.
    """

    observation: list[np.ndarray]
    final: list[np.ndarray]
    action: list[np.ndarray]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    recorded: list[np.ndarray]
    active: np.ndarray


def arrays_size(layout: Layout, num_envs: int) -> int:
    """Bytes that :func:`make_arrays` needs."""
    return _place(layout, num_envs, None)[1]


def make_arrays(layout: Layout, num_envs: int, memory: Any = None) -> Arrays:
    """Views of `memory` (any writable buffer), or of fresh memory, for `num_envs` environments."""
    if memory is None:
        memory = bytearray(arrays_size(layout, num_envs))
    return _place(layout, num_envs, memory)[0]


def _place(layout: Layout, num_envs: int, memory: Any) -> tuple[Any, int]:
    offset = 0

    def place(leaf: Leaf) -> Any:
        nonlocal offset
        dtype = np.dtype(leaf.dtype)
        count = num_envs * int(np.prod(leaf.shape, dtype=np.int64))
        start = offset
        offset += -(-count * dtype.itemsize // 64) * 64  # whole cache lines: no two arrays share one
        if memory is None:
            return None
        return np.frombuffer(memory, dtype, count, start).reshape(num_envs, *leaf.shape)

    flag = Leaf((), "bool")
    arrays = Arrays(
        observation=[place(leaf) for leaf in layout.observation],
        final=[place(leaf) for leaf in layout.observation],
        action=[place(leaf) for leaf in layout.action],
        reward=place(layout.reward),
        terminated=place(flag),
        truncated=place(flag),
        recorded=[place(leaf) for leaf in layout.recorded],
        active=place(flag),
    )
    return arrays, max(offset, 1)


def leaf_spaces(space: gymnasium.Space) -> list[gymnasium.Space]:
    """The spaces at the leaves of nested dict and tuple spaces."""
    if isinstance(space, spaces.Dict):
        return [leaf for part in space.spaces.values() for leaf in leaf_spaces(part)]
    if isinstance(space, spaces.Tuple):
        return [leaf for part in space.spaces for leaf in leaf_spaces(part)]
    return [space]


def leaves_of(space: gymnasium.Space, element: Any) -> list[Any]:
    """The leaves of one element of `space`, in the order of :func:`leaf_spaces`."""
    if isinstance(space, spaces.Dict):
        return [leaf for name, part in space.spaces.items() for leaf in leaves_of(part, element[name])]
    if isinstance(space, spaces.Tuple):
        return [leaf for part, e in zip(space.spaces, element, strict=True) for leaf in leaves_of(part, e)]
    return [element]


def from_leaves(space: gymnasium.Space, leaves: Iterator[Any]) -> Any:
    """The inverse of :func:`leaves_of`."""
    if isinstance(space, spaces.Dict):
        return {name: from_leaves(part, leaves) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(from_leaves(part, leaves) for part in space.spaces)
    return next(leaves)


def recorded_leaves(info: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """The entries of `info` that are passed on, as ``(path, value)``."""

    def walk(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(value, Mapping):
            for name in sorted(value):
                if not name.startswith("_"):  # a vector environment's masks
                    yield from walk((*path, name), value[name])
        else:
            yield path, value

    found = [leaf for name in RECORDED_INFO if name in info for leaf in walk((name,), info[name])]
    if "cost" in info and "costs" not in info:
        found += walk(("costs", "cost"), info["cost"])
    return found


def episode_seed(seed: int, number: int, episode: int) -> int:
    """The seed of one episode's reset, in ``[0, 2^31)``, which every simulator accepts."""
    return int(np.random.SeedSequence((seed, number, episode)).generate_state(1)[0] >> 1)


def digest(leaves: Sequence[Any]) -> np.uint64:
    """A fingerprint of an observation's exact bits."""
    hashed = hashlib.blake2b(digest_size=8)
    for leaf in leaves:
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return np.frombuffer(hashed.digest(), np.uint64)[0]


@contextlib.contextmanager
def quiet_mujoco(entry_point: Any) -> Iterator[None]:
    """While models are compiled, MuJoCo's warnings go to ``warnings`` (shown once) instead of a log file per run."""
    if "mujoco" not in sys.modules and "mujoco" in str(entry_point):
        with contextlib.suppress(ImportError):
            import mujoco
    mujoco = sys.modules.get("mujoco")
    if mujoco is None or getattr(mujoco, "get_mju_user_warning", lambda: True)() is not None:
        yield
        return
    mujoco.set_mju_user_warning(lambda text: warnings.warn(str(text), stacklevel=2))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


def make_environment(maker: EnvSpec | Callable[[], Any]) -> Any:
    """One environment from its specification, or whatever a function makes."""
    if isinstance(maker, EnvSpec):
        with quiet_mujoco(maker.entry_point):
            return gymnasium.make(maker, disable_env_checker=True)
    with quiet_mujoco(None):
        return maker()


class Episodes(NamedTuple):
    """Where each environment stands: the identity of its randomness, and what it was stepped with since its reset.

    Attributes:
        seed: the user's seed ``[E]``.
        number: of the environment among those with this seed ``[E]``.
        episode: number of the running episode ``[E]``.
        length: steps taken in it ``[E]``.
        action: those steps' actions, environment after environment, one array per leaf ``[sum(length), ...]``.
    """

    seed: np.ndarray
    number: np.ndarray
    episode: np.ndarray
    length: np.ndarray
    action: list[np.ndarray]


class SteppedOneByOne:
    """Single environments, stepped one after another, that occupy some rows of the exchanged arrays."""

    def __init__(
        self,
        maker: Any,
        arrays: Arrays,
        rows: Sequence[int],
        seed: np.ndarray,
        number: np.ndarray,
        recorded: Sequence[tuple[str, ...]],
    ):
        self.arrays = arrays
        self.seed, self.number = seed, number
        self.episode = np.zeros(len(seed), np.int64)
        self.recorded = list(recorded)
        self.rows = list(rows)
        self.envs: dict[int, gymnasium.Env] = {}
        try:
            for row in self.rows:
                self.envs[row] = make_environment(maker)
        except BaseException:
            self.close()
            raise
        first = self.envs[self.rows[0]]
        self.observation_space, self.action_space = first.observation_space, first.action_space
        self.nested = isinstance(self.observation_space, (spaces.Dict, spaces.Tuple))
        self.last: dict[int, Any] = {}

    def reset(self, rows: range) -> None:
        """Starts episode 0 in `rows`."""
        for row in rows:
            self.episode[row] = 0
            self._start(row)

    def step(self, rows: range) -> None:
        """Takes the actions of `rows` from the arrays and writes what follows; ended episodes are restarted."""
        arrays, envs, last, nested = self.arrays, self.envs, self.last, self.nested
        between = slice(rows.start, rows.stop)
        # Fresh copies: an environment may keep the action that it was given.
        parts = [np.array(array[between]) for array in arrays.action]
        actions: Any = parts[0]
        if isinstance(self.action_space, (spaces.Dict, spaces.Tuple)):
            space = self.action_space
            actions = [from_leaves(space, iter([part[i] for part in parts])) for i in range(len(rows))]
        first, reward, terminated, truncated = arrays.final[0], arrays.reward, arrays.terminated, arrays.truncated
        everyone = bool(arrays.active[between].all())
        ended = []
        for row, action in zip(rows, actions, strict=True):
            if not everyone and not arrays.active[row]:
                continue
            observation, reward[row], over, cut, info = envs[row].step(action)
            last[row] = observation
            if nested:
                self._write(arrays.final, row, observation)
            else:
                first[row] = observation
            terminated[row] = over
            truncated[row] = cut
            if over or cut:
                ended.append(row)
            if self.recorded:
                values = dict(recorded_leaves(info))
                for path, array in zip(self.recorded, arrays.recorded, strict=True):
                    array[row] = values[path]
        for current, final in zip(arrays.observation, arrays.final, strict=True):
            current[between] = final[between]
        for row in ended:
            self.episode[row] += 1
            self._start(row)

    def _start(self, row: int) -> None:
        seed = episode_seed(int(self.seed[row]), int(self.number[row]), int(self.episode[row]))
        observation, _ = self.envs[row].reset(seed=seed)
        self.last[row] = observation
        self._write(self.arrays.observation, row, observation)

    def _write(self, arrays: list[np.ndarray], row: int, observation: Any) -> None:
        for array, leaf in zip(arrays, leaves_of(self.observation_space, observation), strict=True):
            array[row] = leaf

    def digests(self) -> np.ndarray:
        """Fingerprints of the last observations, before their conversion to JAX's types."""
        return np.array([digest(leaves_of(self.observation_space, self.last[row])) for row in self.rows], np.uint64)

    def replay(self, episodes: Episodes) -> np.ndarray:
        """Resets as `episodes` says, repeats its actions, and returns the fingerprints that are reached."""
        self.seed, self.number = episodes.seed.copy(), episodes.number.copy()
        self.episode = episodes.episode.copy()
        start = np.cumsum(episodes.length) - episodes.length
        nested = isinstance(self.action_space, (spaces.Dict, spaces.Tuple))
        for row in self.rows:
            self._start(row)
            over = False
            for t in range(start[row], start[row] + episodes.length[row]):
                if over:
                    # The episode that is being repeated did not end here: whatever was reached is not its observation.
                    return np.zeros(len(self.rows), np.uint64)
                parts = [np.array(leaf[t : t + 1])[0] for leaf in episodes.action]
                action = from_leaves(self.action_space, iter(parts)) if nested else parts[0]
                self.last[row], _, terminated, truncated, _ = self.envs[row].step(action)
                over = terminated or truncated
            self._write(self.arrays.observation, row, self.last[row])
        return self.digests()

    def close(self) -> None:
        """Closes every environment."""
        for env in self.envs.values():
            with contextlib.suppress(Exception):
                env.close()
        self.envs = {}


class SteppedTogether:
    """One vector environment that leaves restarting to its caller, in all rows of the exchanged arrays."""

    def __init__(
        self,
        env: gymnasium.vector.VectorEnv,
        arrays: Arrays,
        seed: np.ndarray,
        number: np.ndarray,
        recorded: Sequence[tuple[str, ...]],
    ):
        self.env: Any = env  # seeds of single environments are lists, which its annotation lacks
        self.arrays = arrays
        self.seed, self.number = seed, number
        self.episode = np.zeros(len(seed), np.int64)
        self.recorded = list(recorded)
        self.rows = list(range(len(seed)))
        self.last: list[Any] = []

    def _seeds(self) -> list[int]:
        identities = zip(self.seed, self.number, self.episode, strict=True)
        return [episode_seed(int(s), int(i), int(e)) for s, i, e in identities]

    def _restart(self, mask: np.ndarray) -> None:
        # Environments outside the mask do not read their seed.
        observation, _ = self.env.reset(seed=self._seeds(), options={"reset_mask": mask.copy()})
        self._keep(observation)

    def _keep(self, observation: Any) -> None:
        self.last = [np.array(leaf) for leaf in leaves_of(self.env.observation_space, observation)]

    def _publish(self, arrays: list[np.ndarray]) -> None:
        for array, leaf in zip(arrays, self.last, strict=True):
            array[:] = leaf

    def reset(self, rows: range) -> None:
        """Starts episode 0 everywhere."""
        del rows
        self.episode[:] = 0
        self._keep(self.env.reset(seed=self._seeds())[0])
        self._publish(self.arrays.observation)

    def step(self, rows: range) -> None:
        """Takes the actions from the arrays and writes what follows; ended episodes are restarted."""
        del rows
        arrays = self.arrays
        parts = iter([np.array(array) for array in arrays.action])
        observation, reward, terminated, truncated, info = self.env.step(from_leaves(self.env.action_space, parts))
        self._keep(observation)
        self._publish(arrays.final)
        arrays.reward[:], arrays.terminated[:], arrays.truncated[:] = reward, terminated, truncated
        values = dict(recorded_leaves(info)) if self.recorded else {}
        for path, array in zip(self.recorded, arrays.recorded, strict=True):
            array[:] = values[path]
        ended = np.logical_or(terminated, truncated)
        if ended.any():
            self.episode[ended] += 1
            self._restart(ended)
        self._publish(arrays.observation)

    def digests(self) -> np.ndarray:
        """Fingerprints of the last observations, before their conversion to JAX's types."""
        return np.array([digest([leaf[row] for leaf in self.last]) for row in self.rows], np.uint64)

    def replay(self, episodes: Episodes) -> np.ndarray:
        """Resets as `episodes` says, repeats its actions, and returns the fingerprints that are reached.

        All episodes are replayed towards the same end: the longest starts first, and an environment whose turn has
        not come is stepped with its first action and thrown away.
        """
        self.seed, self.number = episodes.seed.copy(), episodes.number.copy()
        self.episode = episodes.episode.copy()
        longest = int(episodes.length.max())
        start = np.cumsum(episodes.length) - episodes.length
        self._keep(self.env.reset(seed=self._seeds())[0])
        # A row that is waiting, or that has no action of its own, borrows the batch's first.
        last = max(len(episodes.action[0]) - 1, 0)
        for t in range(longest):
            age = t - (longest - episodes.length)
            which = np.minimum(start + np.maximum(age, 0), last)
            parts = iter([leaf[which] for leaf in episodes.action])
            observation, _, terminated, truncated, _ = self.env.step(from_leaves(self.env.action_space, parts))
            self._keep(observation)
            ended = np.logical_or(terminated, truncated)
            if np.any(ended & (age >= 0)):
                # An episode that is being repeated did not end here: what was reached is not its observation.
                return np.zeros(len(self.rows), np.uint64)
            begins = (age == -1) | (ended & (age < -1))
            if begins.any():
                self._restart(begins)
        self._publish(self.arrays.observation)
        return self.digests()

    def close(self) -> None:
        """Leaves the environment open: it is the caller's."""


def serve(connection: Any, memory: Any, program: bytes) -> None:
    """A worker's life: makes its environments, then does what it is told until the connection closes.

    Requests are one byte for the verb and one for the part. An answer is empty, a pickled result, or starts with
    ``!`` and says in text what went wrong. Nothing that is sent refers to a class of this package by its name, as
    looking it up would import the package, and JAX with it.
    """
    import pickle

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which closes the connection
    try:
        import cloudpickle

        maker, leaves, num_envs, parts, seed, number, recorded = cloudpickle.loads(program)
        observation, action, reward, side = ([Leaf(*leaf) for leaf in group] for group in leaves)
        layout = Layout(tuple(observation), tuple(action), reward[0], tuple(side))
    except Exception as error:
        connection.send_bytes(f"!{type(error).__name__}: {error}".encode())
        return
    envs = None
    try:
        rows = [row for part in parts for row in part]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parent made one too, and has shown what there is to say
            envs = SteppedOneByOne(maker, make_arrays(layout, num_envs, memory), rows, seed, number, recorded)
        connection.send_bytes(b"")
        while (request := _next_request(connection)) is not None:
            verb, part = request[:1], parts[request[1]]
            answer = b""
            if verb == b"s":
                envs.step(part)
            elif verb == b"r":
                envs.reset(part)
            elif verb == b"d":
                answer = pickle.dumps((envs.rows, envs.digests()))
            elif verb == b"p":
                answer = pickle.dumps((envs.rows, envs.replay(Episodes(*pickle.loads(request[2:])))))
            connection.send_bytes(answer)
    except BaseException as error:
        text = f"!{type(error).__name__}: {error}\n{traceback.format_exc()}"
        with contextlib.suppress(OSError):
            connection.send_bytes(text.encode())
    finally:
        if envs is not None:
            envs.close()


def _next_request(connection: Any) -> bytes | None:
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None  # the parent is gone, or has closed us


if __name__ == "steersman_worker":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an environment that uses JAX must not take the accelerator
    serve(**globals()["ASSIGNMENT"])
