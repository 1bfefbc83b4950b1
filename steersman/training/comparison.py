"""Side-by-side comparison: every system with the same seeds on the same problem, judged by the same episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steersman.envs import as_problem
from steersman.errors import InputError, require_count
from steersman.training.algorithm import Algorithm
from steersman.training.evaluation import evaluate_members, record_episode, render
from steersman.training.loop import Trained, hyperparameters, train
from steersman.training.progress import Progress
from steersman.training.report import ComparisonResult, SystemResult, write_report
from steersman.training.runs import versions
from steersman.training.schedules import Schedule


def compare(
    algorithms: Mapping[str, Algorithm],
    problem: Any,
    *,
    steps: int | Mapping[str, int],
    seeds: int = 5,
    episodes: int = 32,
    titles: Mapping[str, str] | None = None,
    report: str | Path | None = None,
    progress: bool = False,
    command: str = "",
    render_episodes: bool = True,
) -> ComparisonResult:
    """Trains every algorithm with the same seeds and judges the trained policies by whole evaluation episodes.

    Args:
        algorithms: what to compare, by name.
        problem: whatever :func:`steersman.envs.as_problem` accepts.
        steps: environment steps for each seed; one number for all, or one for each name.
        seeds: seeds of each algorithm.
        episodes: evaluation episodes of each trained policy; all policies start from the same states.
        titles: a line about each algorithm, for the report.
        report: where to write a self-contained ``report.html``.
        progress: show progress lines on standard error.
        command: how to repeat the comparison, for the report.
        render_episodes: play and draw one episode of each algorithm's median seed.

    Returns:
        Final returns of every seed, learning curves, intervals and probabilities of improvement.
    """
    if not algorithms:
        raise InputError("algorithms is empty, but a comparison needs at least one.")
    require_count("seeds", seeds)
    problem = as_problem(problem)
    results = {}
    for name, algorithm in algorithms.items():
        count = steps[name] if isinstance(steps, Mapping) else steps
        line = Progress(enabled=progress, title=f"{name:>8}")
        trained = train(algorithm, problem, steps=count, seeds=seeds, progress=line)
        title = (titles or {}).get(name, type(algorithm).__name__)
        results[name] = judge(name, trained, episodes=episodes, title=title, render_episode=render_episodes)
    comparison = ComparisonResult(environment=problem.name, systems=results, versions=versions(), command=command)
    if report is not None:
        write_report(comparison, Path(report))
    return comparison


def judge(
    name: str, trained: Trained, *, episodes: int = 32, title: str = "", render_episode: bool = True
) -> SystemResult:
    """Evaluates what was trained, and draws an episode of the member whose return is the median."""
    policies = trained.policies()
    returns = evaluate_members(policies, trained.problem, episodes=episodes, seed=1_000_003)
    samples, curves = learning_curves(trained)
    picture, caption = None, ""
    if render_episode:
        median = int(np.argsort(returns)[(len(returns) - 1) // 2])
        episode = record_episode(trained.policy(median), trained.problem, seed=7)
        picture = render(episode, trained.problem)
        total = float(np.sum(episode.rewards))
        caption = f"seed {trained.members[median].seed}, return {total:.1f} in {len(episode.rewards)} steps"
    return SystemResult(
        name=name,
        title=title,
        returns=returns,
        curve_samples=samples,
        curve_returns=curves,
        config=describe(trained.algorithm),
        seconds=trained.seconds,
        episode=picture,
        episode_caption=caption,
    )


def learning_curves(trained: Trained, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Returns of training episodes, averaged over equal stretches of training: samples ``[P]``, returns ``[M, P]``."""
    samples, counts = trained.samples, trained.metrics["episodes"]
    sums = np.nan_to_num(trained.returns) * counts
    width = max(1, math.ceil(len(samples) / points))
    edges = np.arange(0, len(samples), width)
    total = np.add.reduceat(sums, edges, axis=0)
    count = np.add.reduceat(counts, edges, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        curves = np.where(count > 0, total / count, np.nan)
    last = np.minimum(edges + width, len(samples)) - 1
    return samples[last], curves.T


def describe(algorithm: Algorithm) -> dict[str, Any]:
    """Hyperparameters by dotted name, as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Schedule):
            return repr(value)
        if hasattr(value, "ndim"):
            array = np.asarray(value)
            return round(float(array), 10) if array.ndim == 0 else [round(float(v), 10) for v in array.ravel()]
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in hyperparameters(algorithm).items()}
