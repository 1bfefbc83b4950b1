"""The training loop: one function that runs every algorithm on every problem."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from steersman.envs import Problem, as_problem, check
from steersman.errors import InputError, NonFiniteError, RunError, SteersmanError, require, require_count
from steersman.policies import Policy
from steersman.training.algorithm import Algorithm, InteractiveAlgorithm
from steersman.training.hyperparameters import Member, apply_settings, get_hyperparameter, with_settings
from steersman.training.progress import Progress
from steersman.training.runners import Runner, make_runner
from steersman.training.runs import Run, read_part


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
        algorithm, axes = with_settings(self.algorithm, self.members)
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
    runner = make_runner(algorithm, problem, members, devices)
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
            rows = [read_part(part) for part in folder.parts()]
        else:
            with _explained(problem):
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
                with _explained(problem):
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


@contextlib.contextmanager
def _explained(problem: Any) -> Iterator[None]:
    """Lets an environment's defect be told in one sentence where JAX only sees that types or shapes do not fit."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if not isinstance(error, SteersmanError) and isinstance(problem, Problem):
            check(problem)
        raise


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


def _restore(runner: Runner, folder: Run, members: list[Member]) -> tuple[int, list[str]]:
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


def _stop_on_nonfinite(metrics: dict[str, np.ndarray], runner: Runner, done: int, folder: Run | None) -> None:
    """Stops training on NaN or infinity, naming the quantity, the step and the last good checkpoint."""
    last = folder.checkpoints.latest() if folder is not None else None
    kept = f"the last good checkpoint is iteration {last}" if last is not None else "no checkpoint had been written"
    size = len(next(iter(metrics.values())))
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
            raise NonFiniteError(f"{place} became NaN or infinite by iteration {done + size}; {kept}.")


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


def _write_policies(trained: Trained, folder: Run) -> None:
    from steersman.policies.storage import save_policy

    if jax.process_index() != 0:
        return
    for i, member in enumerate(trained.members):
        setting = "".join(f"-{name}={value:g}" for name, value in member.settings.items())
        save_policy(trained.policy(i), folder.folder / "policies" / f"seed={member.seed}{setting}")
