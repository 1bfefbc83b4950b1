"""PPO side by side: Steersman, rejax, a loop in the style of PureJaxRL, and Stable-Baselines3.

Each contestant trains in a process of its own, in its own environment, with the same networks, batches, epochs and
tasks (worker.py). Two things are measured:

- environment steps per second after compilation: the processes stay alive and take turns, so that a busy minute of
  the machine hits all of them;
- learning: in a fresh process for each seed, the wall time from asking to the first evaluation at a threshold,
  compilation and evaluations included; the environment steps that took; and the return after equally many updates.

The tables go to standard output and, after a complete run, into docs/benchmarks.md with a figure beside them.

    .venv/bin/python benchmarks/ppo.py             # about ten minutes on a quiet machine
    .venv/bin/python benchmarks/ppo.py --quick     # does everything run?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import page
import worker
from contestants import Contestant, Failed, Process, say

from steersman.training import figures

HERE = Path(__file__).resolve().parent
RESULTS = page.ROOT / "reports" / "bench-ppo.json"
FIGURE = page.ROOT / "docs" / "assets" / "bench-ppo.png"


OURS, PEERS = page.ROOT / ".venv", HERE / ".venv-peers"
CONTESTANTS = {
    "steersman": Contestant("Steersman", "run_steersman.py", OURS),
    "rejax": Contestant("rejax", "run_rejax.py", PEERS),
    "purejaxrl": Contestant("PureJaxRL style", "run_purejaxrl.py", PEERS),
    "sb3": Contestant("Stable-Baselines3", "run_sb3.py", PEERS, jax=False),
}


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        repeats: timed stretches of each contestant and task.
        iterations: of one stretch of a JAX contestant.
        slow_iterations: of one stretch of Stable-Baselines3.
        seeds: fresh processes that learn each task.
        interval: iterations between evaluations.
        at_least: iterations of learning that every seed does, and after which returns are compared.
        at_most: iterations after which a threshold counts as not reached.
        patience: seconds that an answer may take.
    """

    repeats: int
    iterations: int
    slow_iterations: int
    seeds: int
    interval: int
    at_least: int
    at_most: int
    patience: float


FULL = Size(
    repeats=7, iterations=245, slow_iterations=20, seeds=3, interval=10, at_least=50, at_most=150, patience=600.0
)
QUICK = Size(repeats=2, iterations=3, slow_iterations=1, seeds=1, interval=1, at_least=1, at_most=2, patience=120.0)


def measure(names: Sequence[str], tasks: Sequence[str], size: Size, quick: bool) -> dict[str, Any]:
    """Everything that is measured, as a JSON document."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    if load > 0.5 * (os.cpu_count() or 1):
        say(f"The machine is busy (load average {load:.1f} on {os.cpu_count()} cores); expect noise.")
    results: dict[str, Any] = {
        "machine": page.machine(),
        "date": page.today(),
        "load": load,
        "command": " ".join([".venv/bin/python benchmarks/ppo.py", *sys.argv[1:]]),
        "size": size._asdict(),
        "versions": {},
        "start_seconds": {name: [] for name in names},
        "stretches": {task: {name: {} for name in names} for task in tasks},
        "learning": {task: {name: [] for name in names} for task in tasks},
    }
    began = time.perf_counter()
    _time_stretches(names, tasks, size, quick, results)
    _watch_learning(names, tasks, size, quick, results)
    results["minutes"] = (time.perf_counter() - began) / 60.0
    return results


def _start(name: str, size: Size, quick: bool, results: dict[str, Any]) -> Process:
    process = Process(CONTESTANTS[name], size.patience, quick)
    results["versions"][name] = process.versions
    results["start_seconds"][name].append(process.start_seconds)
    return process


def _time_stretches(
    names: Sequence[str], tasks: Sequence[str], size: Size, quick: bool, results: dict[str, Any]
) -> None:
    running: dict[str, Process] = {}
    with contextlib.ExitStack() as ends:

        def stretch(name: str, task: str, number: int) -> dict[str, Any]:
            if name not in running:
                running[name] = _start(name, size, quick, results)
                ends.callback(running[name].close)
            iterations = size.iterations if CONTESTANTS[name].jax else size.slow_iterations
            return running[name].ask(do="stretch", task=task, iterations=iterations, seed=number)

        for task in tasks:
            timed: dict[str, Any] = results["stretches"][task]
            # Round 0 compiles and is kept apart.
            for number in range(size.repeats + 1):
                for name in names:
                    if "failed" in timed[name]:
                        continue
                    what = f"{task}  {CONTESTANTS[name].title}, "
                    what += f"stretch {number} of {size.repeats}" if number else "with compilation"
                    try:
                        answer = stretch(name, task, number)
                    except Failed as failure:
                        timed[name] = {"failed": str(failure)}
                        say(f"{what}: failed: {failure}")
                        if name in running:  # the next task starts it anew
                            running.pop(name).close()
                        continue
                    timed[name].setdefault("stretches" if number else "first", []).append(answer)
                    rate = figures.format_count(answer["steps"] / answer["seconds"])
                    say(f"{what}: {answer['seconds']:.2f} s, {rate} steps/s")


def _watch_learning(
    names: Sequence[str], tasks: Sequence[str], size: Size, quick: bool, results: dict[str, Any]
) -> None:
    limits = {"interval": size.interval, "at_least": size.at_least, "at_most": size.at_most}
    for task in tasks:
        for seed in range(size.seeds):
            for name in names:
                runs: list[dict[str, Any]] = results["learning"][task][name]
                if any("failed" in run for run in runs):
                    continue
                try:
                    with contextlib.closing(_start(name, size, quick, results)) as process:
                        runs.append(process.ask(do="learn", task=task, seed=seed, **limits))
                except Failed as failure:
                    runs.append({"failed": str(failure)})
                outcome = _outcome(runs[-1], worker.TASKS[task].threshold)
                say(f"{task}  {CONTESTANTS[name].title}, seed {seed}: {outcome}")


def _outcome(run: dict[str, Any], threshold: float) -> str:
    if "failed" in run:
        return f"failed: {run['failed']}"
    reached = _reached(run, threshold)
    if reached is None:
        return f"did not reach {threshold:g} (last {run['evaluations'][-1][2]:.0f})"
    return f"{threshold:g} after {reached[1]:.1f} s and {reached[0]:,} steps"


def _reached(run: dict[str, Any], threshold: float) -> tuple[int, float] | None:
    """Environment steps and seconds at the first evaluation at the threshold."""
    for steps, seconds, value in run["evaluations"]:
        if value >= threshold:
            return steps, seconds
    return None


def rates(timed: dict[str, Any]) -> list[float]:
    """Environment steps per second of each stretch."""
    return [stretch["steps"] / stretch["seconds"] for stretch in timed.get("stretches", [])]


def ratios(timed: dict[str, Any], name: str) -> list[float]:
    """Steersman's rate over a peer's, for each pair of stretches that followed each other."""
    if name == "steersman" or "steersman" not in timed or name not in timed:
        return []
    ours, theirs = rates(timed["steersman"]), rates(timed[name])
    return [a / b for a, b in zip(ours, theirs, strict=False)]


def title(name: str, results: dict[str, Any]) -> str:
    """A contestant's name, with the version of a peer that has one."""
    package = {"rejax": "rejax", "sb3": "stable-baselines3", "steersman": "steersman"}.get(name)
    version = results["versions"].get(name, {}).get(package)
    return CONTESTANTS[name].title + (f" {version}" if version else "")


def speed_table(task: str, results: dict[str, Any]) -> str:
    """Environment steps per second after compilation."""
    timed = results["stretches"][task]
    count, rows = figures.format_count, []
    for name, contestant in timed.items():
        if "failed" in contestant:
            rows.append([title(name, results), "failed: " + contestant["failed"], "", "", "", "", ""])
            continue
        speed, relative = rates(contestant), ratios(timed, name)
        work = [s["processor_seconds"] / s["steps"] * 1e6 for s in contestant["stretches"]]
        first = contestant["first"][0]
        compilation = first["seconds"] - first["steps"] / statistics.median(speed)
        rows.append(
            [
                title(name, results),
                count(statistics.median(speed)),
                f"{count(min(speed))} to {count(max(speed))}",
                f"{statistics.median(relative):.3g}" if relative else "",
                f"{min(relative):.3g} to {max(relative):.3g}" if relative else "",
                f"{statistics.median(work):.3g} s",
                f"{compilation:.1f} s" if CONTESTANTS[name].jax else "",
            ]
        )
    header = [
        task,
        "steps per second",
        "range",
        "Steersman / peer",
        "range of pairs",
        "processor time per million steps",
        "compilation",
    ]
    return page.table(header, rows)


def learning_table(task: str, results: dict[str, Any]) -> str:
    """Time and samples to the threshold, and the return after equally many updates."""
    threshold = worker.TASKS[task].threshold
    size = Size(**results["size"])
    updates = size.at_least * worker.EPOCHS * worker.MINIBATCHES
    limit = size.at_most * worker.BATCH
    rows = []
    for name, runs in results["learning"][task].items():
        failure = next((run["failed"] for run in runs if "failed" in run), None)
        if failure is not None:
            rows.append([title(name, results), "failed: " + failure, "", "", "", ""])
            continue
        reached = [_reached(run, threshold) for run in runs]
        rows.append(
            [
                title(name, results),
                _middle([None if r is None else r[1] for r in reached], "{:.1f} s"),
                ", ".join("never" if r is None else f"{r[1]:.1f}" for r in reached),
                _middle([None if r is None else float(r[0]) for r in reached], "{:,.0f}"),
                ", ".join(f"over {limit:,}" if r is None else f"{r[0]:,}" for r in reached),
                ", ".join(figures.format_count(round(_value_at(run, size.at_least))) for run in runs),
            ]
        )
    header = [
        task,
        f"time to {threshold:g}".replace("-", "\N{MINUS SIGN}"),
        "each seed",
        "environment steps",
        "each seed",
        f"return after {updates:,} updates, each seed",
    ]
    return page.table(header, rows)


def _middle(values: Sequence[float | None], form: str) -> str:
    """The median, where a seed that never got there counts as the slowest."""
    middle = statistics.median(float("inf") if v is None else v for v in values)
    return form.format(middle) if middle < float("inf") else "never"


def _value_at(run: dict[str, Any], iterations: int) -> float:
    return next(value for steps, _, value in run["evaluations"] if steps == iterations * worker.BATCH)


def verdicts(results: dict[str, Any]) -> list[str]:
    """Sentences that hold the ratios against what the library aims at."""
    sentences = []
    for task, timed in results["stretches"].items():
        medians = {n: statistics.median(r) for n in timed if n != "steersman" and (r := rates(timed[n]))}
        jax_peers = {n: v for n, v in medians.items() if CONTESTANTS[n].jax}
        if not rates(timed.get("steersman", {})):
            continue
        aims = [(max(jax_peers, key=jax_peers.__getitem__), 1.5)] if jax_peers else []
        aims += [("sb3", 20.0)] if "sb3" in medians else []
        parts = []
        for name, aim in aims:
            ratio = statistics.median(ratios(timed, name))
            kind = CONTESTANTS[name].title
            kind = f"{kind}, the fastest JAX peer" if CONTESTANTS[name].jax else kind
            state = "reached" if ratio >= aim else "not reached"
            parts.append(f"{ratio:.3g} times the steps per second of {kind} (aim: {aim:g}; {state})")
        if parts:
            sentences.append(f"{task}: Steersman takes " + " and ".join(parts) + ".")
    return sentences


def noise(results: dict[str, Any]) -> str:
    """How far stretches of one contestant lay apart."""
    spread = {
        (task, name): max(r) / min(r) - 1.0
        for task, timed in results["stretches"].items()
        for name in timed
        if len(r := rates(timed[name])) > 1
    }
    if not spread:
        return ""
    (task, name), worst = max(spread.items(), key=lambda item: item[1])
    typical = statistics.median(spread.values())
    load = results["load"]
    return (
        f"Noise: the fastest stretch of a contestant was {100 * typical:.0f} % faster than its slowest in the median, "
        f"and {100 * worst:.0f} % at most ({CONTESTANTS[name].title}, {task}). Contestants take turns and ratios are "
        "taken pair by pair, so slow changes of the machine cancel in the ratios but not in the rates. The load "
        f"average before the run was {load:.1f}. So few seeds do not rank contestants by samples: they show that all "
        "of them learn."
    )


def block(results: dict[str, Any]) -> str:
    """The block of the page."""
    size = Size(**results["size"])
    tasks = list(results["stretches"])
    steps, slow = size.iterations * worker.BATCH, size.slow_iterations * worker.BATCH
    versions = []
    for name, found in results["versions"].items():
        listed = ", ".join(f"{package} {version}" for package, version in found.items())
        versions.append(f"- {CONTESTANTS[name].title}: {listed}")
    starts = ", ".join(
        f"{CONTESTANTS[name].title} {statistics.median(seconds):.1f} s"
        for name, seconds in results["start_seconds"].items()
        if seconds
    )
    parts = [
        "### PPO, speed after compilation",
        f"{worker.NUM_ENVS} environments, {worker.NUM_STEPS} steps each, two separate 64-64 tanh networks, "
        f"{worker.EPOCHS} epochs of {worker.MINIBATCHES} minibatches of {worker.BATCH // worker.MINIBATCHES}, Adam at "
        f"{worker.LEARNING_RATE:g}. {size.repeats} stretches each, in turn, of {steps:,} environment steps "
        f"(Stable-Baselines3: {slow:,}); medians. A ratio is that of two stretches that followed each other.",
        "![Environment steps per second of each contestant](assets/bench-ppo.png)",
        *(speed_table(task, results) for task in tasks),
        "\n".join(f"- {sentence}" for sentence in verdicts(results)),
        "Processor time is that of all threads. Compilation is the first stretch less the time of a later one.",
        "### PPO, time to learn",
        f"Wall time from asking until the mean return of {worker.EVALUATION_EPISODES} episodes, played every "
        f"{size.interval * worker.BATCH:,} environment steps with the policy's mode, first reaches the "
        f"threshold. Compilation and evaluations are included. Seeds: {size.seeds}, each in a fresh process; medians. "
        f"Starting Python and importing come before that ({starts}).",
        *(learning_table(task, results) for task in tasks),
        "### What is not equal",
        _DIFFERENCES,
        "### Where it was measured",
        f"{results['machine']}; {results['date']}; `{results['command']}`, {results['minutes']:.0f} minutes. "
        + noise(results),
        "\n".join(versions),
    ]
    return "\n\n".join(part for part in parts if part)


_DIFFERENCES = """\
- rejax bounds each element of a gradient at 0.5 instead of the norm, leaves Adam's epsilon at 1e-8, and clips the
  critic's steps at 0.2; none of the three is a setting. Its value coefficient is 1, as it halves the squared error.
  It keeps Flax's initialization of the weights; the others draw orthogonal ones.
- rejax and the loop in PureJaxRL's style take a time limit for a termination, as gymnax before 1.0 does. Steersman
  and Stable-Baselines3 bootstrap through it.
- The loop in PureJaxRL's style was written for this comparison from the published idea.
- Pendulum's rewards are multiplied by 0.1 while learning: by a setting in Steersman, in the loop in PureJaxRL's
  style within the rollout, by a wrapper of the environment for rejax and Stable-Baselines3.
- Pendulum's policies start with a standard deviation of 1 N m everywhere. Steersman's network puts out torque in
  units of 2 N m, the peers' in N m.
- Steersman's rates are those of whole calls of `steersman.train`, with its metrics of every update and its checks
  for NaN; while learning, it is called back after each iteration, as it has no fixed distance between evaluations.
- Stable-Baselines3 steps Gymnasium's environments one after another (`DummyVecEnv`), with one thread for PyTorch:
  with two it is no faster here on a quiet machine, and many times slower on a busy one."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Steps per second of each contestant and task: medians, ranges, and single stretches."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    tasks = [task for task, timed in results["stretches"].items() if any(rates(t) for t in timed.values())]
    if not tasks:
        return
    names = [n for n in CONTESTANTS if any(rates(results["stretches"][task].get(n, {})) for task in tasks)]
    colour = figures.colours(names)
    every = [rate for timed in results["stretches"].values() for name in names for rate in rates(timed.get(name, {}))]
    subs = (1.0, 2.0, 5.0) if math.log10(max(every) / min(every)) < 2.5 else (1.0,)
    figure = Figure(figsize=(5.6 * len(tasks) + 0.8, 1.5 + 0.6 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
    for task, axes in zip(tasks, panels, strict=True):
        for row, name in enumerate(names):
            speed = rates(results["stretches"][task].get(name, {}))
            if not speed:
                continue
            middle = statistics.median(speed)
            axes.plot([min(speed), max(speed)], [row, row], color=colour[name], linewidth=4.0, alpha=0.45)
            axes.scatter(speed, [row + 0.22] * len(speed), s=14, color=colour[name], alpha=0.5, linewidths=0)
            axes.plot([middle], [row], "o", color=colour[name], markersize=9, markeredgecolor=figures.LIGHT["paper"])
            axes.annotate(
                figures.format_count(middle),
                (middle, row),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=11.5,
                color=figures.LIGHT["ink"],
            )
        axes.set_title(task, fontsize=13, color=figures.LIGHT["ink"], loc="left")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FuncFormatter(figures.format_count))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("environment steps per second", fontsize=12, color=figures.LIGHT["ink"])
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=figures.LIGHT["grid"], linewidth=0.8)
        axes.tick_params(colors=figures.LIGHT["muted"], length=0)
        axes.tick_params(axis="y", labelcolor=figures.LIGHT["ink"], labelsize=12.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(figures.LIGHT["muted"])
        axes.margins(x=0.08)
    panels[0].set_yticks(range(len(names)), labels=[CONTESTANTS[name].title for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.65)
    figures.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="PPO side by side: Steersman and its peers.")
    parser.add_argument("--quick", action="store_true", help="a tiny version that only checks that everything runs")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    parser.add_argument("--tasks", nargs="+", choices=worker.TASKS, metavar="TASK", help=", ".join(worker.TASKS))
    parser.add_argument("--repeats", type=int, metavar="N", help=f"timed stretches (default {FULL.repeats})")
    parser.add_argument("--render", action="store_true", help="writes page and figure anew from the last complete run")
    chosen = parser.parse_args()
    if chosen.repeats is not None and chosen.repeats < 1:
        parser.error(f"--repeats is {chosen.repeats}, but it must be at least 1.")
    return chosen


def main() -> int:
    """Measures, prints, and writes the page; the status is 1 if a contestant failed and 2 if nothing could run."""
    chosen = arguments()
    if chosen.render:
        if not RESULTS.exists():
            say(f"{RESULTS.relative_to(page.ROOT)} is missing: a complete run of benchmarks/ppo.py writes it.")
            return 2
        publish(json.loads(RESULTS.read_text(encoding="utf-8")))
        return 0
    names = [name for name in CONTESTANTS if chosen.only is None or name in chosen.only]
    tasks = [task for task in worker.TASKS if chosen.tasks is None or task in chosen.tasks]
    for name in names:
        if not python_of(CONTESTANTS[name].environment).exists():
            say(f"{CONTESTANTS[name].environment.relative_to(page.ROOT)} is missing: `make bench` makes it.")
            return 2
    size = QUICK if chosen.quick else FULL
    if chosen.quick:
        say("A quick run shows that everything runs; with the compiler's optimizations off, its rates mean nothing.")
        tasks = tasks if chosen.tasks else tasks[:1]
    size = size._replace(repeats=chosen.repeats or size.repeats)
    results = measure(names, tasks, size, chosen.quick)
    print(block(results))
    complete = not chosen.quick and set(names) == set(CONTESTANTS) and set(tasks) == set(worker.TASKS)
    if complete:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")
        publish(results)
    else:
        partial = RESULTS.with_name("bench-ppo-partial.png")
        draw(results, partial)
        say(f"Not a complete run: the figure is {partial.relative_to(page.ROOT)}, and the page is left as it is.")
    everything = [t for timed in results["stretches"].values() for t in timed.values()]
    everything += [run for runs in results["learning"].values() for each in runs.values() for run in each]
    return 1 if any("failed" in outcome for outcome in everything) else 0


def publish(results: dict[str, Any]) -> None:
    """Writes the figure and the page."""
    draw(results, FIGURE)
    page.rewrite("ppo", block(results))
    say(f"Wrote {page.PAGE.relative_to(page.ROOT)} and {FIGURE.relative_to(page.ROOT)}.")


if __name__ == "__main__":
    sys.exit(main())
