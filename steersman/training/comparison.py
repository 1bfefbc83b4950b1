"""Side-by-side comparison: every system with the same seeds on the same problem, judged by the same episodes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steersman.envs import as_problem
from steersman.errors import InputError, require_count
from steersman.policies import Policy
from steersman.training.algorithm import Algorithm
from steersman.training.evaluation import evaluate, evaluate_members, record_episode, render
from steersman.training.hyperparameters import hyperparameters
from steersman.training.loop import Trained, train
from steersman.training.progress import Progress
from steersman.training.report import ComparisonResult, SystemResult, check_report_path, write_report
from steersman.training.runs import versions
from steersman.training.schedules import Schedule


def compare(
    contestants: Mapping[str, Algorithm | Policy],
    problem: Any,
    *,
    steps: int | Mapping[str, int] | None = None,
    seeds: int = 5,
    episodes: int = 32,
    titles: Mapping[str, str] | None = None,
    report: str | Path | None = None,
    progress: bool = False,
    command: str = "",
    render_episodes: bool = True,
) -> ComparisonResult:
    """Trains every algorithm with the same seeds and judges all policies by whole evaluation episodes.

    Args:
        contestants: what to compare, by name: algorithms, which are trained, and policies, which are taken as they
            are (a controller, a table, a loaded policy).
        problem: whatever :func:`steersman.envs.as_problem` accepts.
        steps: environment steps for each seed of an algorithm; one number for all, or one for each name.
        seeds: seeds of each algorithm; a policy plays as many groups of episodes, each from other starts.
        episodes: evaluation episodes of each trained policy; all policies start from the same states.
        titles: a line about each algorithm, for the report.
        report: where to write a self-contained ``report.html``.
        progress: show progress lines on standard error.
        command: how to repeat the comparison, for the report.
        render_episodes: play and draw one episode of each algorithm's median seed.

    Returns:
        Final returns of every seed, learning curves, intervals and probabilities of improvement.
    """
    if not contestants:
        raise InputError("contestants is empty, but a comparison needs at least one.")
    require_count("seeds", seeds)
    if report is not None:
        check_report_path(report, "report")
    problem = as_problem(problem)
    results = {}
    for name, contestant in contestants.items():
        title = (titles or {}).get(name, type(contestant).__name__)
        if isinstance(contestant, Policy):
            results[name] = judge_policy(name, contestant, problem, seeds, episodes, title, render_episodes)
            continue
        count = steps[name] if isinstance(steps, Mapping) else steps
        line = Progress(enabled=progress, title=f"{name:>8}")
        trained = train(contestant, problem, steps=count, seeds=seeds, progress=line)
        results[name] = judge(name, trained, episodes=episodes, title=title, render_episode=render_episodes)
    comparison = ComparisonResult(
        environment=problem.name,
        systems=results,
        versions=versions(),
        command=command,
        evaluation=f"mean of {episodes} episodes, most likely action",
    )
    if report is not None:
        write_report(comparison, Path(report))
    return comparison


#: Seed of the evaluation episodes; no training seed comes near it.
_EVALUATION_SEED = 1_000_003


def judge_policy(
    name: str, policy: Policy, problem: Any, groups: int, episodes: int, title: str, render_episode: bool
) -> SystemResult:
    """Evaluates a policy as it is, on several groups of episodes that start from different states."""
    began = time.perf_counter()
    returns = [evaluate(policy, problem, episodes=episodes, seed=_EVALUATION_SEED + i).mean for i in range(groups)]
    picture, caption = draw(policy, problem) if render_episode else (None, "")
    return SystemResult(
        name=name,
        title=title,
        returns=np.array(returns),
        curve_samples=np.zeros(0),
        curve_returns=np.zeros((groups, 0)),
        config={},
        seconds=time.perf_counter() - began,
        episode=picture,
        episode_caption=caption,
    )


def draw(policy: Policy, problem: Any) -> tuple[bytes, str]:
    """An animated episode and a line about it."""
    episode = record_episode(policy, problem, seed=7)
    total = float(np.sum(episode.rewards))
    return render(episode, problem), f"return {total:.1f} in {len(episode.rewards)} steps"


def judge(
    name: str, trained: Trained, *, episodes: int = 32, title: str = "", render_episode: bool = True
) -> SystemResult:
    """Evaluates what was trained, and draws an episode of the member whose return is the median."""
    policies = trained.policies()
    returns = evaluate_members(policies, trained.problem, episodes=episodes, seed=_EVALUATION_SEED)
    samples, curves = learning_curves(trained)
    picture, caption = None, ""
    if render_episode:
        median = int(np.argsort(returns)[(len(returns) - 1) // 2])
        picture, caption = draw(trained.policy(median), trained.problem)
        caption = f"seed {trained.members[median].seed}: {caption}"
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
