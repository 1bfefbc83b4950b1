"""Does holding the policy back make several epochs over one batch safe, and does that pay? (arXiv:1707.06347)

The paper compares surrogates on seven MuJoCo tasks: its clipped ratio and its adaptive divergence penalty do well,
the bare importance-weighted objective fails, and A2C, which uses each batch once, learns more slowly. Here the same
arms swing up a pendulum with equal networks, batches and numbers of samples; the unclipped objective and A2C get
grids of their own settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steersman.envs import as_problem
from steersman.rl.on_policy import PPO
from steersman.rl.surrogates import AdaptiveKL, Clip, FixedKL, Surrogate, Unclipped
from steersman.studies.study import Report, Study
from steersman.studies.swing_up import SETTINGS, final_returns, swing_up
from steersman.training import Linear, Trained, train
from steersman.training.comparison import learning_curves
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.figures import save_figure
from steersman.training.statistics import curve_interval

_RATES = [1e-4, 3e-4, 1e-3]
_A2C_RATES = [3e-4, 1e-3, 3e-3]


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("ppo", budget, seed, folder)
    if study.budget == "full":
        return _mujoco(study)
    smoke = study.budget == "smoke"
    steps = 4_096 if smoke else 200_000
    seeds = [seed + i for i in range(1 if smoke else 5)]
    problem = swing_up()
    shared = {**SETTINGS, "hidden": (8,)} if smoke else SETTINGS

    def arm(surrogate: Surrogate, sweep: dict[str, list[float]], rate: float = 1e-3, **changes: Any) -> Trained:
        settings = {"epochs": 10, "minibatches": 8, "learning_rate": Linear(rate, 0.0, steps), **shared, **changes}
        return train(PPO(surrogate=surrogate, **settings), problem, steps=steps, seeds=seeds, sweep=sweep)

    arms: dict[str, Trained] = {
        "clip": arm(Clip(), {"surrogate.epsilon": [0.1, 0.2, 0.3]}),
        "adaptive KL": arm(AdaptiveKL(), {"surrogate.target": [0.003, 0.01, 0.03]}),
    }
    for epochs in (3,) if smoke else (3, 10):
        arms[f"unclipped, K={epochs}"] = arm(Unclipped(), {"learning_rate.start": _RATES}, epochs=epochs)
    for length in (128,) if smoke else (8, 16, 128):
        once = {"epochs": 1, "minibatches": 1, "num_steps": length}
        arms[f"A2C, T={length}"] = arm(Unclipped(), {"learning_rate.start": _A2C_RATES}, **once)

    results: dict[tuple[str, float], tuple[np.ndarray, float]] = {}
    for name, trained in arms.items():
        returns = final_returns(trained).reshape(-1, len(seeds))
        reach = trained.metrics["max_kl"].max(axis=0).reshape(-1, len(seeds)).max(axis=1)
        values = [next(iter(m.settings.values())) for m in trained.members[:: len(seeds)]]
        for value, row, kl in zip(values, returns, reach, strict=True):
            results[name, value] = row, float(kl)
    random_return = float(np.mean(final_returns_of_untrained(arms["clip"])))
    best = max(float(np.mean(row)) for row, _ in results.values())
    for (name, value), (row, kl) in results.items():
        score = (np.mean(row) - random_return) / (best - random_return)
        study.row(
            arm=name,
            setting=f"{value:g}",
            mean_return=float(np.mean(row)),
            lowest_seed=float(np.min(row)),
            normalized_score=float(score),
            max_kl=kl,
        )

    def mean(name: str, value: float) -> float:
        return float(np.mean(results[name, value][0]))

    def best_of(prefix: str) -> float:
        return max(float(np.mean(row)) for (name, _), (row, _) in results.items() if name.startswith(prefix))

    clip, penalty = mean("clip", 0.2), mean("adaptive KL", 0.01)
    matched = mean("unclipped, K=3" if smoke else "unclipped, K=10", 1e-3)
    study.claim(
        "PPO with a clipped ratio (epsilon 0.2) learns the task.",
        expected="mean return >= -250",
        measured=f"{clip:.0f}",
        holds=clip >= -250,
    )
    study.claim(
        "PPO with an adaptive divergence penalty (target 0.01) learns the task.",
        expected="mean return >= -300",
        measured=f"{penalty:.0f}",
        holds=penalty >= -300,
    )
    study.claim(
        "Without clip or penalty, the same epochs at the same step size do harm.",
        expected="at least 250 below the clipped ratio",
        measured=f"{clip - matched:.0f} below ({matched:.0f}; best of its own grid {best_of('unclipped'):.0f})",
        holds=clip - matched >= 250,
    )
    study.claim(
        "A2C, which uses each batch once, learns less from the same samples, at its best setting too.",
        expected="best of the grid at least 150 below the clipped ratio",
        measured=f"{clip - best_of('A2C'):.0f} below ({best_of('A2C'):.0f})",
        holds=clip - best_of("A2C") >= 150,
    )
    _draw(study, arms, len(seeds))
    return study.report()


def final_returns_of_untrained(trained: Trained) -> np.ndarray:
    """Returns of the first episodes that ended, which an untrained policy played nearly alone."""
    first = np.argmax(trained.metrics["episodes"].min(axis=1) > 0)
    return trained.returns[first]


def _draw(study: Study, arms: dict[str, Trained], seeds: int) -> None:
    unclipped = "unclipped, K=10" if "unclipped, K=10" in arms else "unclipped, K=3"
    chosen = {
        "clip 0.2": ("clip", 1),
        "adaptive KL 0.01": ("adaptive KL", 1),
        f"{unclipped}, 1e-3": (unclipped, 2),
        "A2C, T=128, 1e-3": ("A2C, T=128", 1),
    }
    curves = {}
    for label, (name, setting) in chosen.items():
        samples, values = learning_curves(arms[name], points=50)
        curves[label] = (samples, curve_interval(values[setting * seeds : (setting + 1) * seeds]))
    save_figure(draw_curves(curves, label="legend"), study.figure("learning-curves"))


_TASKS = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)


def _mujoco(study: Study) -> Report:
    """The paper's own comparison (its table 1): seven tasks, a million steps, three seeds, one actor."""
    arms: dict[str, Surrogate] = {
        "no clip or penalty": Unclipped(),
        **{f"clip {e}": Clip(e) for e in (0.1, 0.2, 0.3)},
        **{f"adaptive KL {t}": AdaptiveKL(t) for t in (0.003, 0.01, 0.03)},
        **{f"fixed KL {b}": FixedKL(b) for b in (0.3, 1.0, 3.0, 10.0)},
    }
    settings = {"num_envs": 1, "num_steps": 2048, "epochs": 10, "minibatches": 32, "normalize_observations": True}
    seeds = [study.seed + i for i in range(3)]
    scores: dict[str, list[float]] = {name: [] for name in arms}
    for task in _TASKS:
        problem = as_problem(task)
        returns, untrained = {}, []
        for name, surrogate in arms.items():
            trained = train(PPO(surrogate=surrogate, **settings), problem, steps=1_000_000, seeds=seeds)
            # The paper scores the mean of the last hundred episodes.
            counts = np.cumsum(trained.metrics["episodes"][::-1].min(axis=1))
            last = slice(-(int(np.searchsorted(counts, 100)) + 1), None)
            returns[name] = float(np.nanmean(trained.returns[last]))
            untrained.append(float(np.mean(final_returns_of_untrained(trained))))
        best = max(returns.values())
        floor = float(np.mean(untrained))
        for name, value in returns.items():
            scores[name].append((value - floor) / (best - floor))
            study.row(task=task, arm=name, mean_return=value, normalized_score=scores[name][-1])
    average = {name: float(np.mean(values)) for name, values in scores.items()}
    for name, value in average.items():
        study.row(task="all", arm=name, mean_return=float("nan"), normalized_score=value)
    study.claim(
        "Clipping at 0.2 scores highest over the seven tasks.",
        expected="the highest average normalized score (0.82 in the paper)",
        measured=f"{average['clip 0.2']:.2f}; the highest is {max(average, key=average.__getitem__)}",
        holds=average["clip 0.2"] >= max(average.values()),
    )
    study.claim(
        "Without clip or penalty, learning fails.",
        expected="the lowest average normalized score (-0.39 in the paper)",
        measured=f"{average['no clip or penalty']:.2f}",
        holds=average["no clip or penalty"] <= min(average.values()),
    )
    return study.report()
