"""Runners: how iterations of all members are carried out, on devices or with an environment on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from steersman.errors import InputError, InputTypeError, require, require_count
from steersman.training import prng
from steersman.training.algorithm import Algorithm, InteractiveAlgorithm, IterativeAlgorithm
from steersman.training.checkpoints import from_arrays, to_arrays, to_host
from steersman.training.collect import EpisodeStatistics
from steersman.training.hyperparameters import Member, with_settings

#: Iterations that one compiled chunk can hold at most; the number it does run is an argument.
_CHUNK_CAPACITY = 512


class Runner:
    """Runs chunks of iterations of all members; the two kinds below differ in where the environment lives."""

    samples_per_iteration: int
    capacity: int

    def __init__(self, algorithm: Algorithm, problem: Any, members: list[Member]):
        self.algorithm, self.problem, self.members = algorithm, problem, members
        self.keys = jnp.stack([prng.key(m.seed) for m in members])
        self.stacked, self.axes = with_settings(algorithm, members)

    state: PyTree

    def start(self) -> None:
        raise NotImplementedError

    def advance(self, size: int) -> dict[str, np.ndarray]:
        """Runs `size` iterations; metrics ``[size, M]``."""
        raise NotImplementedError

    def snapshot(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def restore(self, arrays: dict[str, np.ndarray], source: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def summarize(statistics: EpisodeStatistics) -> dict[str, Array]:
    """Episode statistics as metrics; means are NaN where no episode ended."""
    episodes = statistics.episodes
    return {
        "episodes": episodes,
        "episode_return": jnp.sum(statistics.return_sum / episodes, axis=tuple(range(1, statistics.return_sum.ndim)))
        if statistics.return_sum.ndim
        else statistics.return_sum / episodes,
        "episode_length": statistics.length_sum / episodes,
        "nonfinite_observations": statistics.nonfinite_observations,
        "nonfinite_rewards": statistics.nonfinite_rewards,
    }


def _over_members(function: Callable, algorithm: Algorithm, axes: PyTree, *arguments: PyTree) -> PyTree:
    """``function(algorithm, *arguments)`` for each member, whose axis leads every argument and output."""
    # A single member runs without that axis: a batch of one costs CPU matrix products a third.
    if jax.tree.leaves(arguments)[0].shape[0] == 1:
        algorithm = jax.tree.map(lambda leaf, axis: leaf[0] if axis == 0 else leaf, algorithm, axes)
        outputs = function(algorithm, *jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], outputs)
    return eqx.filter_vmap(function, in_axes=(axes, *(0 for _ in arguments)))(algorithm, *arguments)


# Both functions live at module level and take all they use as arguments, so that what was compiled for one call of
# `train` serves every later one whose shapes and static hyperparameters are the same.
@eqx.filter_jit
def _first_carry(algorithm: Algorithm, axes: PyTree, problem: Any, keys: Key[Array, " M"]) -> PyTree:
    def one(algorithm: Any, key: Key[Array, ""]) -> PyTree:
        if not isinstance(algorithm, InteractiveAlgorithm):
            return algorithm.init(problem, key)
        state_key, rollout_key = jax.random.split(key)
        state = algorithm.init(problem, state_key)
        return state, algorithm.collector.init(problem, algorithm.behaviour(state), rollout_key)

    return _over_members(one, algorithm, axes, keys)


@eqx.filter_jit(donate="all-except-first")
def _run_chunk(fixed: tuple[Algorithm, PyTree, Any, Array], carry: PyTree) -> tuple[PyTree, dict[str, Array]]:
    algorithm, axes, problem, size = fixed

    def one(algorithm: Any, carry: PyTree) -> tuple[PyTree, dict[str, Array]]:
        if not isinstance(algorithm, InteractiveAlgorithm):
            return algorithm.step(problem, carry)
        state, rollout = carry
        experience, rollout, statistics = algorithm.collector.collect(problem, algorithm.behaviour(state), rollout)
        state, metrics = algorithm.update(state, experience)
        return (state, rollout), {**summarize(statistics), **metrics}

    def iteration(carry: PyTree) -> tuple[PyTree, dict[str, Array]]:
        return _over_members(one, algorithm, axes, carry)

    shapes = jax.eval_shape(iteration, carry)[1]
    buffers = jax.tree.map(lambda s: jnp.zeros((_CHUNK_CAPACITY, *s.shape), s.dtype), shapes)

    def body(i: Array, running: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        carry, buffers = running
        carry, metrics = iteration(carry)
        return carry, jax.tree.map(lambda b, m: b.at[i].set(m), buffers, metrics)

    # The number of iterations is data, so one compiled program serves chunks of every size, and where chunks begin
    # and end cannot change a single bit of the result.
    return jax.lax.fori_loop(0, size, body, (carry, buffers))


class DeviceRunner(Runner):
    """Everything, the environment included, runs inside one compiled chunk."""

    capacity = _CHUNK_CAPACITY

    def __init__(self, algorithm: Algorithm, problem: Any, members: list[Member], devices: int | None):
        super().__init__(algorithm, problem, members)
        interactive = isinstance(algorithm, InteractiveAlgorithm)
        self.samples_per_iteration = algorithm.collector.samples_per_iteration if interactive else 1
        self._place = _placement(algorithm, len(members), devices)

    @property
    def state(self) -> PyTree:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._carry[0] if isinstance(self.algorithm, InteractiveAlgorithm) else self._carry

    def start(self) -> None:
        self._carry = self._place(_first_carry(self.stacked, self.axes, self.problem, self.keys))

    def advance(self, size: int) -> dict[str, np.ndarray]:
        fixed = (self.stacked, self.axes, self.problem, jnp.asarray(size, jnp.int32))
        self._carry, buffers = _run_chunk(fixed, self._carry)
        return {name: to_host(value)[:size] for name, value in buffers.items()}

    def snapshot(self) -> dict[str, np.ndarray]:
        return to_arrays(self._carry)

    def restore(self, arrays: dict[str, np.ndarray], source: str) -> None:
        template = eqx.filter_eval_shape(_first_carry, self.stacked, self.axes, self.problem, self.keys)
        self._carry = self._place(from_arrays(template, arrays, source))


def _placement(algorithm: Algorithm, members: int, devices: int | None) -> Callable[[PyTree], PyTree]:
    """A function that lays a carry out over several devices."""
    if devices is None or devices == 1:
        return lambda carry: carry
    require_count("devices", devices)
    available = jax.device_count()
    require(devices <= available, "devices", devices, f"at most the {available} devices that JAX sees")
    grid = np.asarray(jax.devices()[:devices])
    mesh = Mesh(grid, ("data",), axis_types=(AxisType.Auto,))
    by_member = members % devices == 0
    if not by_member:
        if not isinstance(algorithm, InteractiveAlgorithm):
            raise InputError(f"devices is {devices}, but {members} members cannot be divided among them.")
        num_envs = getattr(algorithm, "num_envs", None)
        if num_envs is None or num_envs % devices:
            raise InputError(
                f"devices is {devices}, but it must divide num_envs = {num_envs} or the number of members = {members}."
            )

    def spec(leaf: Array, is_rollout: bool) -> PartitionSpec:
        if by_member:
            return PartitionSpec("data")
        per_environment = is_rollout and leaf.ndim >= 2 and leaf.shape[1] == algorithm.num_envs  # pyright: ignore
        return PartitionSpec(None, "data") if per_environment else PartitionSpec()

    def place(carry: PyTree) -> PyTree:
        def put(is_rollout: bool) -> Callable[[Array], Array]:
            return lambda leaf: _spread(leaf, NamedSharding(mesh, spec(leaf, is_rollout)))

        if not isinstance(algorithm, InteractiveAlgorithm):
            return jax.tree.map(put(False), carry)
        return jax.tree.map(put(False), carry[0]), jax.tree.map(put(True), carry[1])

    return place


def _spread(array: Array, sharding: NamedSharding) -> Array:
    """An array that every process holds in full, laid out over the devices of all of them."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        words = _spread(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


class HostRunner(Runner):
    """The environment lives on the host; acting and updating are compiled, stepping happens between them."""

    capacity = 64

    def __init__(self, algorithm: Algorithm, problem: Any, members: list[Member]):
        from steersman.training.host import HostRollout

        super().__init__(algorithm, problem, members)
        if not isinstance(algorithm, InteractiveAlgorithm):
            raise InputTypeError(
                f"{type(algorithm).__name__} needs an explicit problem, but {problem.name} is a simulator."
            )
        collector = algorithm.collector
        missing = collector.needs - frozenset(getattr(problem, "abilities", ()))
        if missing:
            raise InputError(
                f"{type(algorithm).__name__} needs an environment that can {', '.join(sorted(missing))}, "
                f"which {problem.name} on the host cannot."
            )
        self.samples_per_iteration = collector.samples_per_iteration
        self._rollout = HostRollout(collector.num_envs, collector.num_steps)  # pyright: ignore
        vmap = eqx.filter_vmap
        self._init = eqx.filter_jit(vmap(lambda a, k: a.init(problem, k), in_axes=(self.axes, 0)))
        self._behaviour = eqx.filter_jit(vmap(lambda a, s: a.behaviour(s), in_axes=(self.axes, 0)))
        self._update = eqx.filter_jit(vmap(lambda a, s, e: a.update(s, e), in_axes=(self.axes, 0, 0)))
        self._collection: Any = None

    def _split(self) -> tuple[Array, Array]:
        pairs = jax.vmap(jax.random.split)(self.keys)
        return pairs[:, 0], pairs[:, 1]

    def start(self) -> None:
        state_keys, rollout_keys = self._split()
        self.state = self._init(self.stacked, state_keys)
        self._collection = self._rollout.init(self.problem, self._behaviour(self.stacked, self.state), rollout_keys)

    def advance(self, size: int) -> dict[str, np.ndarray]:
        collected = []
        for _ in range(size):
            experience, statistics = self._collection.collect(self._behaviour(self.stacked, self.state))
            self.state, metrics = self._update(self.stacked, self.state, experience)
            collected.append({**jax.vmap(summarize)(statistics), **metrics})
        return {name: np.stack([np.asarray(m[name]) for m in collected]) for name in collected[0]}

    def snapshot(self) -> dict[str, np.ndarray]:
        arrays = {f"state-{name}": array for name, array in to_arrays(self.state).items()}
        return arrays | {f"rollout-{name}": array for name, array in self._collection.snapshot().items()}

    def restore(self, arrays: dict[str, np.ndarray], source: str) -> None:
        state_keys, _ = self._split()
        template = eqx.filter_eval_shape(self._init, self.stacked, state_keys)
        parts: dict[str, dict[str, np.ndarray]] = {"state": {}, "rollout": {}}
        for name, array in arrays.items():
            kind, _, rest = name.partition("-")
            parts[kind][rest] = array
        self.start()
        self.state = from_arrays(template, parts["state"], source)
        self._collection.restore(parts["rollout"])

    def close(self) -> None:
        if self._collection is not None:
            self._collection.close()


def make_runner(algorithm: Algorithm, problem: Any, members: list[Member], devices: int | None) -> Runner:
    """The runner for an algorithm on a problem.

    Raises:
        InputError, InputTypeError: the problem cannot give what the algorithm needs, or the devices do not fit.
    """
    if not isinstance(algorithm, (InteractiveAlgorithm, IterativeAlgorithm)):
        raise InputTypeError(f"algorithm is a {type(algorithm).__name__}, but it must be a steersman Algorithm.")
    if getattr(problem, "on_host", False):
        if devices not in (None, 1):
            raise InputError(f"devices is {devices}, but {problem.name} is stepped on the host and uses one device.")
        return HostRunner(algorithm, problem, members)
    if isinstance(algorithm, InteractiveAlgorithm):
        missing = algorithm.collector.needs - frozenset(getattr(problem, "abilities", ()))
        if missing:
            raise InputError(
                f"{type(algorithm).__name__} needs an environment that can {', '.join(sorted(missing))}, "
                f"which {problem.name} cannot."
            )
    return DeviceRunner(algorithm, problem, members, devices)
