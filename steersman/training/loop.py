"""The training loop: one function that runs every algorithm on every problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from steersman.envs import as_problem
from steersman.errors import InputError, InputTypeError, NonFiniteError, RunError, require, require_count, unknown_name
from steersman.policies import Policy
from steersman.training import prng
from steersman.training.algorithm import Algorithm, InteractiveAlgorithm, IterativeAlgorithm
from steersman.training.checkpoints import from_arrays, to_arrays, to_host
from steersman.training.collect import EpisodeStatistics
from steersman.training.progress import Progress
from steersman.training.runs import Run
from steersman.training.schedules import Schedule, as_scalar

#: Iterations that one compiled chunk can hold at most; the number it does run is an argument.
_CHUNK_CAPACITY = 512


@dataclass(frozen=True)
class Member:
    """One of the trainings that run side by side: a seed and the hyperparameters that differ."""

    seed: int
    settings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What training returns.

    Attributes:
        algorithm: what was run; with a sweep, its swept leaves carry the member axis.
        problem: what it was run on.
        members: the trainings, in the order of the member axis.
        state: the algorithm's final state; every leaf has a leading member axis ``[M]``.
        metrics: one array ``[K, M]`` per metric, over the iterations of this call and what was resumed.
        samples: samples taken up to the end of each iteration ``[K]``.
        seconds: wall time of this call.
        run: the run folder, if there is one.
    """

    algorithm: Algorithm
    problem: Any
    members: list[Member]
    state: PyTree
    metrics: dict[str, np.ndarray]
    samples: np.ndarray
    seconds: float
    run: Path | None = None

    def policy(self, member: int = 0) -> Policy:
        """The policy that one member has learned."""
        require(0 <= member < len(self.members), "member", member, f"0 to {len(self.members) - 1}")
        policies = self.policies()
        return jax.tree.map(lambda leaf: leaf[member], policies)

    def policies(self) -> PyTree:
        """All members' policies as one PyTree with a leading member axis."""
        algorithm, axes = _with_settings(self.algorithm, self.members)
        return eqx.filter_vmap(lambda a, s: a.policy(s), in_axes=(axes, 0))(algorithm, self.state)

    @property
    def returns(self) -> np.ndarray:
        """Mean return ``[K, M]`` of the episodes that ended within each iteration; NaN where none did."""
        return self.metrics["episode_return"]


def train(
    algorithm: Algorithm,
    problem: Any,
    *,
    steps: int | None = None,
    iterations: int | None = None,
    seeds: int | Sequence[int] = 1,
    sweep: Mapping[str, Sequence[float]] | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool | Progress = False,
    devices: int | None = None,
    chunk_seconds: float = 2.0,
    on_chunk: Callable[[int, PyTree], None] | None = None,
) -> Trained:
    """Runs an algorithm on a problem, several seeds and settings at once.

    Args:
        algorithm: what learns, plans or iterates.
        problem: whatever :func:`steersman.envs.as_problem` accepts, or what a non-interactive algorithm takes.
        steps: environment steps for each member, rounded up to whole iterations.
        iterations: iterations instead of steps.
        seeds: how many seeds (``0 .. seeds - 1``), or which.
        sweep: values of continuous hyperparameters by dotted name, for example
            ``{"learning_rate": [1e-4, 3e-4], "surrogate.epsilon": [0.1, 0.2]}``. Every combination is trained with
            every seed, all of them in one compiled program.
        run: folder for configuration, metrics, checkpoints and policies; None keeps everything in memory.
        resume: continue the run that `run` holds.
        config: what to write into the run's ``config.yaml`` so that it can be repeated.
        progress: show a live progress line on standard error, or the object that does.
        devices: shard the environments (or members, if that divides better) over this many devices.
        chunk_seconds: wall time between checkpoints, about.
        on_chunk: called with ``(iteration, state)`` after every chunk.

    Returns:
        The trained members.

    Raises:
        InputError, InputTypeError: an argument cannot be used.
        NonFiniteError: NaN or infinity appeared; says where, when, and which checkpoint is still good.
        RunError: the run folder cannot be used.
    """
    problem = as_problem(problem)
    if isinstance(algorithm, InteractiveAlgorithm) and callable(getattr(problem, "environment", None)):
        problem = as_problem(problem.environment())  # an explicit decision process, to be learned by interaction
    members = _members(algorithm, seeds, sweep)
    total = _iterations(algorithm, steps, iterations)
    require(chunk_seconds > 0, "chunk_seconds", chunk_seconds, "above 0")
    runner = _runner(algorithm, problem, members, devices)
    folder: Run | None = None
    done, warnings = 0, []
    rows: list[dict[str, np.ndarray]] = []
    if run is None:
        require(not resume, "resume", resume, "False where there is no run folder")
    elif resume:
        folder = Run.open(Path(run))[0]
    else:
        folder = Run.create(Path(run), {**(config or {}), "members": [vars(m) for m in members]})
    try:
        if folder is not None and resume:
            done, warnings = _restore(runner, folder, members)
            rows = _saved_rows(folder, len(members))
        else:
            runner.start()
        reporter = progress if isinstance(progress, Progress) else Progress(enabled=bool(progress))
        began = time.perf_counter()
        with reporter.running(total, done, runner.samples_per_iteration, len(members)):
            for warning in warnings:
                reporter.note(warning)
            size = 1
            while done < total:
                size = min(size, total - done, runner.capacity)
                chunk_began = time.perf_counter()
                metrics = runner.advance(size)
                elapsed = time.perf_counter() - chunk_began
                _stop_on_nonfinite(metrics, runner, done, folder)
                table = _table(metrics, done, runner.samples_per_iteration, members)
                rows.append(table)
                if folder is not None:
                    folder.write_metrics(done, table)
                done += size
                if folder is not None:
                    folder.checkpoints.save(done, runner.snapshot(), {"members": [vars(m) for m in members]})
                if on_chunk is not None:
                    on_chunk(done, runner.state)
                reporter.advance(size, metrics)
                # The first chunk compiles; sizes follow from what the ones after it take.
                size = size if size == 1 and len(rows) == 1 else max(1, math.ceil(size * chunk_seconds / elapsed))
                size = min(size, max(1, total // 8))
        state = runner.state
        trained = Trained(
            algorithm=algorithm,
            problem=problem,
            members=members,
            state=state,
            metrics=_stack(rows, len(members)),
            samples=np.arange(1, done + 1, dtype=np.int64) * runner.samples_per_iteration,
            seconds=time.perf_counter() - began,
            run=None if folder is None else folder.folder,
        )
        if folder is not None:
            _write_policies(trained, folder)
            folder.merge_metrics()
        return trained
    finally:
        runner.close()
        if folder is not None:
            folder.close()


def _members(
    algorithm: Algorithm, seeds: int | Sequence[int], sweep: Mapping[str, Sequence[float]] | None
) -> list[Member]:
    if isinstance(seeds, (int, np.integer)):
        require_count("seeds", seeds)
        seeds = range(int(seeds))
    chosen = [int(seed) for seed in seeds]
    require(len(chosen) > 0, "seeds", seeds, "at least one seed")
    require(len(set(chosen)) == len(chosen), "seeds", chosen, "all different")
    settings: list[dict[str, float]] = [{}]
    for name, values in (sweep or {}).items():
        leaf = get_hyperparameter(algorithm, name)
        if isinstance(leaf, bool) or not eqx.is_inexact_array(leaf):
            raise InputError(f"sweep names {name!r}, which is no continuous hyperparameter and cannot vary in one run.")
        require(len(list(values)) > 0, f"sweep[{name!r}]", values, "at least one value")
        settings = [{**s, name: float(v)} for s in settings for v in values]
    for setting in settings:  # The algorithm's own checks see every combination once, before anything runs.
        apply_settings(algorithm, setting)
    return [Member(seed, setting) for setting in settings for seed in chosen]


def get_hyperparameter(algorithm: Any, name: str) -> Any:
    """The hyperparameter at a dotted name.

    Raises:
        InputError: there is none, with the nearest names that there are.
    """
    value: Any = algorithm
    for part in name.split("."):
        names = {f: None for f in getattr(type(value), "__dataclass_fields__", {})}
        if part not in names:
            raise unknown_name("hyperparameter", name, hyperparameters(algorithm))
        value = getattr(value, part)
    return value


def hyperparameters(algorithm: Any, prefix: str = "") -> dict[str, Any]:
    """All hyperparameters by dotted name, with their values."""
    found: dict[str, Any] = {}
    for name in type(algorithm).__dataclass_fields__:
        value = getattr(algorithm, name)
        if isinstance(value, eqx.Module) and not isinstance(value, Schedule):
            found[prefix + name] = type(value).__name__
            found |= hyperparameters(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def apply_settings(algorithm: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of `algorithm` with hyperparameters replaced by dotted name, checked as its constructor checks them.

    All are replaced before anything is checked, so sizes that must fit each other can change together.
    """
    return _replaced(algorithm, settings, "", algorithm)


def _replaced(owner: Any, settings: Mapping[str, Any], prefix: str, root: Any) -> Any:
    fields = getattr(type(owner), "__dataclass_fields__", {})
    arguments = {f: getattr(owner, f) for f in fields if fields[f].init}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        if first not in arguments:
            raise unknown_name("hyperparameter", prefix + name, hyperparameters(root))
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            arguments[first] = value
    for first, deeper in inner.items():
        arguments[first] = _replaced(arguments[first], deeper, f"{prefix}{first}.", root)
    return type(owner)(**arguments)


def _with_settings(algorithm: Algorithm, members: list[Member]) -> tuple[Algorithm, PyTree]:
    """The algorithm with swept leaves stacked over members, and the axes to ``vmap`` it over."""
    axes = jax.tree.map(lambda _: None, algorithm)
    for name in members[0].settings:
        values = jnp.stack([as_scalar(m.settings[name]) for m in members])

        def at(tree: Any, name: str = name) -> Any:
            for part in name.split("."):
                tree = getattr(tree, part)
            return tree

        algorithm = eqx.tree_at(at, algorithm, values)
        axes = eqx.tree_at(at, axes, 0, is_leaf=lambda leaf: leaf is None)
    return algorithm, axes


def _iterations(algorithm: Algorithm, steps: int | None, iterations: int | None) -> int:
    if (steps is None) == (iterations is None):
        raise InputError(f"steps is {steps!r} and iterations is {iterations!r}, but exactly one must be given.")
    if iterations is not None:
        require_count("iterations", iterations)
        return int(iterations)
    require_count("steps", steps)
    assert steps is not None
    if not isinstance(algorithm, InteractiveAlgorithm):
        raise InputError(f"steps is {steps}, but {type(algorithm).__name__} does not interact; give iterations.")
    require(steps < 2**32, "steps", steps, "below 2^32, where the sample counter ends")
    return math.ceil(steps / algorithm.collector.samples_per_iteration)


class _Runner:
    """Runs chunks of iterations of all members; the two kinds below differ in where the environment lives."""

    samples_per_iteration: int
    capacity: int

    def __init__(self, algorithm: Algorithm, problem: Any, members: list[Member]):
        self.algorithm, self.problem, self.members = algorithm, problem, members
        self.keys = jnp.stack([prng.key(m.seed) for m in members])
        self.stacked, self.axes = _with_settings(algorithm, members)

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


class _DeviceRunner(_Runner):
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


class _HostRunner(_Runner):
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
        if collector.needs:
            raise InputError(
                f"{type(algorithm).__name__} needs an environment that can {', '.join(sorted(collector.needs))}, "
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


def _runner(algorithm: Algorithm, problem: Any, members: list[Member], devices: int | None) -> _Runner:
    if not isinstance(algorithm, (InteractiveAlgorithm, IterativeAlgorithm)):
        raise InputTypeError(f"algorithm is a {type(algorithm).__name__}, but it must be a steersman Algorithm.")
    if getattr(problem, "on_host", False):
        if devices not in (None, 1):
            raise InputError(f"devices is {devices}, but {problem.name} is stepped on the host and uses one device.")
        return _HostRunner(algorithm, problem, members)
    if isinstance(algorithm, InteractiveAlgorithm):
        missing = algorithm.collector.needs - frozenset(getattr(problem, "abilities", ()))
        if missing:
            raise InputError(
                f"{type(algorithm).__name__} needs an environment that can {', '.join(sorted(missing))}, "
                f"which {problem.name} cannot."
            )
    return _DeviceRunner(algorithm, problem, members, devices)


def _restore(runner: _Runner, folder: Run, members: list[Member]) -> tuple[int, list[str]]:
    loaded = folder.checkpoints.load()
    if loaded is None:
        folder.drop_metrics(0)
        runner.start()
        return 0, ["No checkpoint had been written yet; starting over."]
    iteration, arrays, facts, warnings = loaded
    if facts.get("members") != [vars(m) for m in members]:
        raise RunError(f"run folder {folder.folder} was trained with other seeds or settings than are asked for now.")
    runner.restore(arrays, str(folder.folder / "checkpoints" / str(iteration)))
    folder.drop_metrics(iteration)
    return iteration, warnings


def _stop_on_nonfinite(metrics: dict[str, np.ndarray], runner: _Runner, done: int, folder: Run | None) -> None:
    """Stops training on NaN or infinity, naming the quantity, the step and the last good checkpoint."""
    last = folder.checkpoints.latest() if folder is not None else None
    kept = f"the last good checkpoint is iteration {last}" if last is not None else "no checkpoint had been written"
    name_of_problem = getattr(runner.problem, "name", type(runner.problem).__name__)
    for quantity in ("observations", "rewards"):
        counts = metrics.pop(f"nonfinite_{quantity}", None)
        if counts is not None and counts.any():
            iteration, member = np.argwhere(counts)[0]
            raise NonFiniteError(
                f"{name_of_problem} returned {int(counts[iteration, member])} NaN or infinite {quantity} in iteration "
                f"{done + iteration + 1} (seed {runner.members[member].seed}); {kept}."
            )
    for name, values in metrics.items():
        if name in ("episode_return", "episode_length"):  # NaN says that no episode ended
            continue
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            iteration, member = bad[0][:2]
            raise NonFiniteError(
                f"{name} became {values[tuple(bad[0])]} in iteration {done + iteration + 1} "
                f"(step {(done + int(iteration) + 1) * runner.samples_per_iteration}, seed "
                f"{runner.members[member].seed}); {kept}."
            )
    leaves = jax.tree_util.tree_flatten_with_path(runner.state)[0]
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(leaf))):
            place = jax.tree_util.keystr(path).lstrip(".")
            raise NonFiniteError(f"{place} became NaN or infinite by iteration {done + len(values)}; {kept}.")


def _table(
    metrics: dict[str, np.ndarray], first: int, samples_per_iteration: int, members: list[Member]
) -> dict[str, np.ndarray]:
    """Metrics ``[K, M]`` in long form: one row per iteration and member."""
    size, count = next(iter(metrics.values())).shape[:2]
    iteration = np.repeat(np.arange(first + 1, first + size + 1, dtype=np.int64), count)
    table = {
        "iteration": iteration,
        "samples": iteration * samples_per_iteration,
        "seed": np.tile(np.array([m.seed for m in members], np.int64), size),
    }
    for name in members[0].settings:
        table[name] = np.tile(np.array([m.settings[name] for m in members]), size)
    for name, values in metrics.items():
        if values.ndim == 2:
            table[name] = values.reshape(-1)
        else:
            flat = values.reshape(size * count, -1)
            table |= {f"{name}.{i}": flat[:, i] for i in range(flat.shape[1])}
    return table


def _stack(rows: list[dict[str, np.ndarray]], members: int) -> dict[str, np.ndarray]:
    skipped = {"iteration", "samples", "seed"}
    names = [name for name in rows[0] if name not in skipped] if rows else []
    return {name: np.concatenate([r[name].reshape(-1, members) for r in rows]) for name in names}


def _saved_rows(folder: Run, members: int) -> list[dict[str, np.ndarray]]:
    from steersman.training.runs import read_part

    return [read_part(part) for part in folder.parts()]


def _write_policies(trained: Trained, folder: Run) -> None:
    from steersman.policies.storage import save_policy

    if jax.process_index() != 0:
        return
    for i, member in enumerate(trained.members):
        setting = "".join(f"-{name}={value:g}" for name, value in member.settings.items())
        save_policy(trained.policy(i), folder.folder / "policies" / f"seed={member.seed}{setting}")


def iterate_members(trained: Trained) -> Iterator[tuple[Member, Policy]]:
    """Each member with its policy."""
    for i, member in enumerate(trained.members):
        yield member, trained.policy(i)
