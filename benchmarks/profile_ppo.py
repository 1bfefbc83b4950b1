"""Where the time of one PPO iteration goes, with the benchmark's settings (worker.py).

Two views that check each other: the parts of an iteration, each compiled alone and timed; and a trace of whole
iterations by JAX's profiler, whose operations are put to the parts by the source lines that the compiler remembers.
Both go to standard output and into docs/benchmarks.md.

    .venv/bin/python benchmarks/profile_ppo.py
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import page
import run_steersman
import worker

from steersman.returns import standardize
from steersman.rl.on_policy.actor_critic import in_rows
from steersman.training import minibatch_epochs, prng

ROLLOUT = "rollout"
ESTIMATE = "values and advantages"
SHUFFLE = "shuffling and standardizing"
GRADIENT = "minibatch gradients"
OPTIMIZER = "optimizer"
REST = "metrics, loops and the rest"
PARTS = (ROLLOUT, ESTIMATE, SHUFFLE, GRADIENT, OPTIMIZER, REST)

#: The part that an operation belongs to, by the first of these functions on the way to its source line.
_FUNCTIONS = (
    ("Rollout.collect", ROLLOUT),
    (".estimate", ESTIMATE),
    ("shuffled", SHUFFLE),
    (".arrange", SHUFFLE),
    (".prepare", SHUFFLE),
    (".descend.<locals>", GRADIENT),
    (".descend", OPTIMIZER),
    ("minibatch_epochs", SHUFFLE),
)


class Bench:
    """The pieces of one task's iteration, with a state and a batch from a short training.

    Attributes:
        timed: for each part, a function without arguments that runs its compiled program.
    """

    def __init__(self, name: str):
        self.problem, self.algorithm = run_steersman.problem_and_algorithm(name)
        algorithm, problem = self.algorithm, self.problem
        state_key, rollout_key = jax.random.split(prng.key(0))
        state = algorithm.init(problem, state_key)
        carry = (state, algorithm.collector.init(problem, algorithm.behaviour(state), rollout_key))
        arrays, self.fixed = eqx.partition(carry, eqx.is_array)
        self.many = jax.jit(self._many).lower(jnp.asarray(1), arrays).compile()
        self.arrays = self.many(jnp.asarray(20), arrays)
        state, rollout = eqx.combine(self.arrays, self.fixed)
        experience = eqx.filter_jit(lambda s, r: self._collect(s, r)[0])(state, rollout)
        batch = eqx.filter_jit(lambda s, e: algorithm.estimate(s, e)[0])(state, experience)
        rows, optimizer = in_rows(state.actor, batch), algorithm._optimizer()
        count = worker.EPOCHS * worker.MINIBATCHES
        minibatches = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf] * worker.EPOCHS).reshape((count, -1, *leaf.shape[1:])), rows
        )

        def shuffle(rows: Any, key: Any) -> Any:
            def pick(state: Any, minibatch: Any) -> tuple[Any, Any]:
                return state, minibatch

            def prepare(minibatch: Any) -> Any:
                return minibatch._replace(advantage=standardize(minibatch.advantage))

            return minibatch_epochs(
                pick,
                jnp.zeros(()),
                rows,
                key,
                epochs=worker.EPOCHS,
                minibatches=worker.MINIBATCHES,
                prepare=prepare,
            )[1]

        def gradients(state: Any, minibatches: Any, rate: Any) -> Any:
            def step(learned: Any, minibatch: Any) -> tuple[Any, None]:
                gradient = jax.grad(lambda learned: algorithm.loss(learned, state, minibatch, ())[0])(learned)
                # The next gradient must depend on this one, or both would be computed side by side.
                return jax.tree.map(lambda p, g: p - rate * g, learned, gradient), None

            return jax.lax.scan(step, state.learned, minibatches)[0]

        def optimize(state: Any, rate: Any) -> Any:
            def step(running: Any, _: None) -> tuple[Any, None]:
                learned, optimizer_state = running
                change, optimizer_state = optimizer.update(learned, optimizer_state)
                learned = jax.tree.map(lambda p, c: p - rate * c, learned, change)
                return (learned, optimizer_state), None

            return jax.lax.scan(step, (state.learned, state.optimizer), None, length=count)[0]

        rate = jnp.asarray(1e-3)
        self.timed: dict[str, Callable[[], Any]] = {
            ROLLOUT: _compiled(self._collect, state, rollout),
            ESTIMATE: _compiled(algorithm.estimate, state, experience),
            SHUFFLE: _compiled(shuffle, rows, prng.key(1)),
            GRADIENT: _compiled(gradients, state, minibatches, rate),
            OPTIMIZER: _compiled(optimize, state, rate),
        }

    def _collect(self, state: Any, rollout: Any) -> Any:
        return self.algorithm.collector.collect(self.problem, self.algorithm.behaviour(state), rollout)

    def _many(self, iterations: Any, arrays: Any) -> Any:
        """So many iterations as one program, as ``steersman.train`` runs them."""

        def iteration(_: Any, arrays: Any) -> Any:
            state, rollout = eqx.combine(arrays, self.fixed)
            experience, rollout, statistics = self._collect(state, rollout)
            state, metrics = self.algorithm.update(state, experience)
            # What is not used would not be computed.
            total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves((statistics, metrics)))
            rollout = eqx.tree_at(lambda r: r.episode_return, rollout, rollout.episode_return + 0.0 * total)
            return eqx.filter((state, rollout), eqx.is_array)

        return jax.lax.fori_loop(0, iterations, iteration, arrays)


def _compiled(function: Callable, *arguments: Any) -> Callable[[], Any]:
    arrays, fixed = eqx.partition(arguments, eqx.is_array)

    def on_arrays(arrays: Any) -> Any:
        return eqx.filter(function(*eqx.combine(arrays, fixed)), eqx.is_array)

    program = jax.jit(on_arrays).lower(arrays).compile()
    return lambda: program(arrays)


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time of one call."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Operation(NamedTuple):
    """An operation of the compiled program: its part, its kind, and the source line it comes from."""

    part: str
    kind: str
    source: str


def operations(program: str | None) -> dict[str, Operation]:
    """The operations of a compiled program, by name, from its text."""
    if program is None:
        return {}
    tables = {name: _table(program, name) for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")}

    def frames(index: int) -> Iterable[tuple[str, str]]:
        """Function and place of each call, innermost first."""
        while index:
            frame = _numbers(tables["StackFrames"][index])
            place = _numbers(tables["FileLocations"][frame["file_location_id"]])
            function = tables["FunctionNames"][place["function_name_id"]].strip('"')
            path = tables["FileNames"][place["file_name_id"]].strip('"')
            yield function, f"{path}:{place['line']}"
            # Parents are written one too high, so that the outermost call, which has none, says 1.
            index = frame.get("parent_frame_id", 1) - 1

    found: dict[str, Operation] = {}
    unknown: list[str] = []
    # What the compiler has put in by itself (copies, mostly) is counted to the loop it stands in.
    for computation in re.split(r"\n(?=\S)", program):
        parts: collections.Counter[str] = collections.Counter()
        for line in computation.splitlines():
            named = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
            if named is None:
                continue
            metadata = re.search(r'metadata=\{op_name="([^"]*)"(?: stack_frame_id=(\d+))?', line)
            if metadata is None or metadata[2] is None:
                unknown.append(named[1])
                continue
            calls, kind = list(frames(int(metadata[2]))), _kind(metadata[1])
            if not metadata[1].startswith("jit(") or kind == "while":
                # A function that JAX traced once and used in several places remembers only one of them.
                part = REST if kind == "while" else ""
            else:
                part = _part([function for function, _ in calls])
                parts[part] += 1
            ours = next((place for _, place in calls if "/steersman/" in place or "/benchmarks/" in place), "")
            source = ours.rpartition("/steersman/")[2] if "/steersman/" in ours else Path(ours).name
            found[named[1]] = Operation(part, kind, source)
            if not part:
                unknown.append(named[1])
        usual = parts.most_common(1)[0][0] if parts else REST
        found |= {name: found.get(name, Operation("", "", ""))._replace(part=usual) for name in unknown}
        unknown.clear()
    return found


def _part(functions: list[str]) -> str:
    for pattern, part in _FUNCTIONS:
        if any(pattern in function for function in functions):
            return part
    return REST


def _kind(path: str) -> str:
    """The primitive, and whether it is of a backward pass."""
    primitive = path.rpartition("/")[2]
    return primitive + (", backward" if "transpose(" in path else "")


def _table(program: str, name: str) -> dict[int, str]:
    rows = re.search(rf"^{name}\n((?:\d+ .*\n)*)", program, flags=re.MULTILINE)
    lines = rows[1].splitlines() if rows else []
    return {int(number): content for number, _, content in (line.partition(" ") for line in lines)}


def _numbers(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


def traced(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds that each operation took itself, without what it called, summed over threads."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    totals: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        jax.block_until_ready(run())
        jax.profiler.stop_trace()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    _add_own_times(line.events, totals)
    return {name: nanoseconds * 1e-9 for name, nanoseconds in totals.items()}


def _add_own_times(events: Iterable[Any], totals: collections.Counter[str]) -> None:
    """Adds each operation's time less that of the operations inside it, for the events of one thread."""
    running: list[tuple[str, float]] = []  # names and ends
    timed = [(e.start_ns, e.duration_ns, e.name) for e in events if any(key == "hlo_op" for key, _ in e.stats)]
    for start, duration, name in sorted(timed, key=lambda event: (event[0], -event[1])):
        while running and running[-1][1] <= start:
            running.pop()
        if running:
            totals[running[-1][0]] -= duration
        totals[name] += duration
        running.append((name, start + duration))


def profile(name: str, repeats: int, iterations: int, count: int) -> tuple[dict[str, float], float, str, list[str]]:
    """One task's parts and longest operations.

    Args:
        name: the task.
        repeats: calls of each part.
        iterations: how many are traced.
        count: operations in the table.

    Returns:
        ``(seconds of each part, seconds of an iteration, table of operations, share of each part in the trace)``.
    """
    bench = Bench(name)
    whole = seconds(lambda: bench.many(jnp.asarray(10), bench.arrays), max(3, repeats // 10)) / 10
    parts = {part: seconds(run, repeats) for part, run in bench.timed.items()}
    parts[REST] = whole - sum(parts.values())
    known = operations(bench.many.as_text())
    times = traced(lambda: bench.many(jnp.asarray(iterations), bench.arrays))
    total = sum(times.values())
    by_part: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for operation, spent in times.items():
        by_part[known[operation].part if operation in known else REST] += spent
    longest = sorted(times.items(), key=lambda item: -item[1])[:count]
    rows = []
    for operation, spent in longest:
        part, kind, source = known.get(operation, Operation(REST, "", ""))
        shown = [f"{1e6 * spent / iterations:.0f} µs", f"{100 * spent / total:.1f} %"]
        rows.append([f"`{operation}`", kind, part, f"`{source}`" if source else "", *shown])
    header = ["operation", "primitive", "part", "source", "per iteration", "share"]
    shares = [f"{100 * by_part[part] / total:.0f} %" for part in PARTS]
    return parts, whole, page.table(header, rows), shares


def block(tasks: list[str], repeats: int, iterations: int, count: int) -> str:
    """The block of the page."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    columns, tables = [], []
    for name in tasks:
        parts, whole, longest, shares = profile(name, repeats, iterations, count)
        columns.append((parts, whole, shares))
        tables.append(f"Longest operations, {name}:\n\n{longest}")
    rows = []
    for i, part in enumerate(PARTS):
        row = [part]
        for parts, whole, shares in columns:
            row += [f"{1e3 * parts[part]:.2f} ms", f"{100 * parts[part] / whole:.0f} %", shares[i]]
        rows.append(row)
    rows.append(["whole iteration"])
    for _, whole, _ in columns:
        rows[-1] += [f"{1e3 * whole:.2f} ms", "", f"{worker.BATCH / whole / 1e3:.0f}k steps/s"]
    header = ["part"]
    for name in tasks:
        header += [f"{name}, alone", "share", "share in the trace"]
    return "\n\n".join(
        [
            "### Where an iteration's time goes",
            f"One iteration of Steersman's PPO with the settings above: {worker.BATCH:,} environment steps, "
            f"{worker.EPOCHS * worker.MINIBATCHES} gradient steps. *Alone* is a part as a program of its own (median "
            f"of {repeats} calls), and the last part what the others leave of the whole; the trace sums the time of "
            f"all threads over {iterations} iterations, and its last part holds what loops cost by themselves.",
            page.table(header, rows),
            *tables,
            f"{page.machine()}; {page.today()}; jax {jax.__version__}; load average before the run {load:.1f}; "
            "`.venv/bin/python benchmarks/profile_ppo.py`.",
        ]
    )


def main() -> int:
    """Profiles, prints, and writes the page."""
    parser = argparse.ArgumentParser(description="Where the time of one PPO iteration goes.")
    parser.add_argument("--quick", action="store_true", help="a tiny version that only checks that everything runs")
    parser.add_argument("--tasks", nargs="+", choices=worker.TASKS, metavar="TASK", help=", ".join(worker.TASKS))
    parser.add_argument("--operations", type=int, default=12, metavar="N", help="length of the list of operations")
    chosen = parser.parse_args()
    if chosen.operations < 1:
        parser.error(f"--operations is {chosen.operations}, but it must be at least 1.")
    jax.config.update("jax_platforms", "cpu")
    tasks = chosen.tasks or (list(worker.TASKS)[:1] if chosen.quick else list(worker.TASKS))
    text = block(tasks, 5 if chosen.quick else 100, 4 if chosen.quick else 40, chosen.operations)
    print(text)
    if not chosen.quick and set(tasks) == set(worker.TASKS):
        page.rewrite("profile", text)
        print(f"Wrote {page.PAGE.relative_to(page.ROOT)}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
