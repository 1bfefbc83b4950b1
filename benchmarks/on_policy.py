"""The on-policy family side by side: what each reaches on common tasks, and how fast each steps.

``python benchmarks/on_policy.py compare`` trains what is missing of docs/results/on-policy.json and may be stopped and
started again; ``speed`` measures throughput relative to PPO; ``page`` writes the tables and figures into the docs.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from steersman import catalog, envs, training
from steersman.cli import build
from steersman.training import figures
from steersman.training.comparison import judge
from steersman.training.report import ComparisonResult, SystemResult
from steersman.training.runs import versions
from steersman.training.statistics import curve_interval, hold_last, interquartile_mean

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "results" / "on-policy.json"
SPEED = DOCS / "results" / "on-policy-speed.json"
SEEDS = 10
EPISODES = 32
FAMILY = ("ppo", "spo", "trpo", "fixpo", "ppo-ewma", "policy-gradients-guide", "s2pg", "mbma", "polyak-pg")
#: Tasks, and what cannot be trained there: many-action gradients need continuous actions; episodic gradients, an
#: environment whose episodes can be started together.
TASKS = {
    "CartPole-v1": {"left_out": ("mbma",), "steps": {}},
    "Pendulum-v1": {"left_out": (), "steps": {"*": 200_000}},
    "InvertedPendulum-v5": {"left_out": ("polyak-pg",), "steps": {"*": 60_000}},
}
LABELS = {"policy-gradients-guide": "v-mpo"}


def label(slug: str) -> str:
    return LABELS.get(slug, slug)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(content.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def prepared(slug: str, task: str) -> tuple[Any, int]:
    """The system with its preset for a task, and for how many steps."""
    system = catalog.get(slug)
    settings = system.preset(task)
    steps = TASKS[task]["steps"].get("*", int(settings.pop("steps", 300_000)))
    settings.pop("steps", None)
    # Schedules end with this training, not with the preset's.
    settings = {
        name: ":".join([*value.split(":")[:3], str(steps)]) if str(value).startswith("linear:") else value
        for name, value in settings.items()
    }
    return build(system, settings, steps), steps


def compare(only: list[str]) -> None:
    found = load(RESULTS)
    for task, options in TASKS.items():
        for slug in FAMILY:
            key = f"{task}/{slug}"
            if slug in options["left_out"] or key in found or (only and slug not in only and task not in only):
                continue
            algorithm, steps = prepared(slug, task)
            began = time.perf_counter()
            trained = training.train(algorithm, envs.make(task), steps=steps, seeds=SEEDS, progress=True)
            result = judge(label(slug), trained, episodes=EPISODES, title=catalog.get(slug).title, render_episode=False)
            x, y = figures.decimate(result.curve_samples, hold_last(result.curve_returns), 60)
            found = load(RESULTS)
            found[key] = {
                "returns": [round(float(value), 3) for value in result.returns],
                "steps": int(trained.samples[-1]),
                "seconds": round(time.perf_counter() - began, 1),
                "curve_samples": [int(value) for value in x],
                "curve_returns": [[None if math.isnan(v) else round(float(v), 2) for v in row] for row in y],
            }
            save(RESULTS, found)
            print(f"{key}: {found[key]['seconds']} s, {found[key]['returns']}", flush=True)


def result_of(task: str) -> ComparisonResult:
    found, systems = load(RESULTS), {}
    for slug in FAMILY:
        entry = found.get(f"{task}/{slug}")
        if entry is not None:
            rows = np.array([[math.nan if v is None else v for v in row] for row in entry["curve_returns"]])
            systems[label(slug)] = SystemResult(
                name=label(slug),
                title=catalog.get(slug).title,
                returns=np.array(entry["returns"]),
                curve_samples=np.array(entry["curve_samples"]),
                curve_returns=rows,
                config={},
                seconds=entry["seconds"],
            )
    return ComparisonResult(environment=task, systems=systems, versions=versions(), command="", resamples=2000)


#: Equal batches, networks and epochs for all, on the pendulum; lot sizing where a post-decision state is needed. The
#: rest is each system's preset.
SPEED_SETTINGS = {"num_envs": 16, "num_steps": 128, "epochs": 10, "minibatches": 8}
SPEED_TASKS = {slug: "pendulum-swingup" for slug in FAMILY if slug != "ppo"} | {"pdppo": "lot-sizing"}


def contestant(slug: str, task: str) -> Any:
    system = catalog.get(slug)
    fields = system.load().__dataclass_fields__
    settings = {**system.preset(task), **{name: value for name, value in SPEED_SETTINGS.items() if name in fields}}
    settings.pop("steps", None)
    return build(system, settings, 1_000_000)


def speed(only: list[str]) -> None:
    found = load(SPEED)
    for slug, task in SPEED_TASKS.items():
        if only and slug not in only:
            continue
        ours, ppo = contestant(slug, task), contestant("ppo", task)
        problem = envs.make(task)
        first, rates, ratios = {}, {"ppo": [], slug: []}, []
        for stretch in range(6):
            pair = {}
            for name, algorithm in (("ppo", ppo), (slug, ours)):
                iterations = 1 if stretch == 0 else 40
                began = time.perf_counter()
                trained = training.train(algorithm, problem, iterations=iterations, seeds=[stretch], chunk_seconds=60.0)
                elapsed = time.perf_counter() - began
                if stretch == 0:
                    first[name] = elapsed
                else:
                    pair[name] = float(trained.samples[-1]) / elapsed
                    rates[name].append(pair[name])
            if pair:
                ratios.append(pair[slug] / pair["ppo"])
        found[slug] = {
            "task": task,
            "rate": statistics.median(rates[slug]),
            "ppo": statistics.median(rates["ppo"]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "first": first[slug],
            "first_ppo": first["ppo"],
        }
        save(SPEED, found)
        print(slug, found[slug], flush=True)


def replace_block(page: Path, name: str, content: str) -> None:
    text = page.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n\n{content.strip()}\n\n{end}{tail}")


#: Returns that count as having learned a task.
MARKS = {"CartPole-v1": 450.0, "Pendulum-v1": -250.0, "InvertedPendulum-v5": 900.0}


def write_soon() -> None:
    """Environment steps until the interquartile mean of the training return first passes each task's mark."""
    lines = [
        "| system | " + " | ".join(f"{task}, {mark:g}" for task, mark in MARKS.items()) + " |",
        "|---|" + "---:|" * len(MARKS),
    ]
    results = {task: result_of(task).systems for task in MARKS}
    for name in map(label, FAMILY):
        cells = []
        for task, mark in MARKS.items():
            system = results[task].get(name)
            if system is None:
                cells.append("")
                continue
            # Before a seed's first episode has ended there is no number yet.
            middle = np.array(
                [float(interquartile_mean(c)) if np.isfinite(c).all() else -np.inf for c in system.curve_returns.T]
            )
            passed = np.flatnonzero(middle >= mark)
            cells.append(f"{int(system.curve_samples[passed[0]]):,}" if passed.size else "not reached")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    replace_block(DOCS / "results" / "which-on-policy-method.md", "soon", "\n".join(lines))


def page() -> None:
    save(RESULTS, load(RESULTS))
    for task in TASKS:
        result = result_of(task)
        if not result.systems:
            continue
        slug = task.lower().replace("-", "")
        colour = figures.colours([label(s) for s in FAMILY])
        curves = {}
        for name, system in result.systems.items():
            curves[name] = (system.curve_samples, curve_interval(system.curve_returns, interquartile_mean, 1000, 0.95))
        figure = figures.learning_curves(curves, y_label="training return", label="legend", colour=colour)
        figures.save_figure(figure, DOCS / "assets" / f"results-on-policy-{slug}-curves.png")
        figure = figures.interval_plot(result.interquartile_means, colour=colour)
        figures.save_figure(figure, DOCS / "assets" / f"results-on-policy-{slug}.png")
        lines = [
            "| system | interquartile mean | 95 % interval | lowest seed | highest seed | steps of each seed |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        found = load(RESULTS)
        slugs = {label(s): s for s in FAMILY}
        for name in result.ranking:
            estimate, entry = result.interquartile_means[name], found[f"{task}/{slugs[name]}"]
            low, high = min(entry["returns"]), max(entry["returns"])
            interval = f"{estimate.low:.1f} to {estimate.high:.1f}"
            lines.append(
                f"| {name} | {estimate.value:.1f} | {interval} | {low:.1f} | {high:.1f} | {entry['steps']:,} |"
            )
        better = [
            f"{a} over {b}: {result.improvements[a, b].value:.2f}"
            for a in result.ranking
            for b in ("ppo",)
            if a != b and (a, b) in result.improvements
        ]
        content = "\n".join(lines)
        content += "\n\nProbability that a run is better than a run of PPO: " + "; ".join(better).replace(
            " over ppo", ""
        )
        content += f".\n\n![Returns on {task}](../assets/results-on-policy-{slug}.png)\n\n"
        content += f"![Learning curves on {task}](../assets/results-on-policy-{slug}-curves.png)"
        replace_block(DOCS / "results" / "on-policy.md", f"results:{task}", content)
    write_soon()
    rates = load(SPEED)
    lines = [
        "| system | task | steps per second | PPO there | ratio | range of pairs | first call | PPO's |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for slug, row in sorted(rates.items(), key=lambda item: -item[1]["ratio"]):
        lines.append(
            f"| {label(slug)} | {row['task']} | {row['rate'] / 1e3:.0f}k | {row['ppo'] / 1e3:.0f}k "
            f"| {row['ratio']:.2f} "
            f"| {row['lowest']:.2f} to {row['highest']:.2f} | {row['first']:.1f} s | {row['first_ppo']:.1f} s |"
        )
    if rates:
        replace_block(DOCS / "benchmarks.md", "bench:on-policy", "\n".join(lines))


if __name__ == "__main__":
    chosen, rest = sys.argv[1], sys.argv[2:]
    {"compare": lambda: compare(rest), "speed": lambda: speed(rest), "page": page}[chosen]()
