"""What do resets of the nominal state trade? Robust-stochastic against indirect-feedback MPC (arXiv:2304.00069).

A double integrator with truncated normal noise is drawn to a target beyond the bound on its position, which must hold
with probability 0.9. All controllers have the same cost, horizon and feedback, and meet the same noise. What is
measured: cost, violations over runs, and the probability of a violation at the next step given the visited state,
exactly but for the 400,000 draws behind it. Robust MPC and MPC that ignores the noise are the extremes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steersman.control.stochastic_mpc import StochasticMPC
from steersman.control.tightening import BoundedNoise, Tightening
from steersman.studies.study import Report, Study
from steersman.training.figures import LIGHT, colours, save_figure

_A, _B = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[0.5], [1.0]])
_Q, _R = np.diag([1.0, 0.1]), np.eye(1)
_ROWS = (np.array([[1.0, 0.0]]), np.zeros((1, 1)), np.array([1.0]))
_TARGET = np.array([2.0, 0.0])
_STEADY = np.diag([5.0, 0.0])
_STEPS, _SETTLED = 25, 8


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("stochastic-mpc", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("the plants of the paper with 10,000 realizations of several noises")
    smoke = study.budget == "smoke"
    runs, samples = (2, 2_000) if smoke else (64, 400_000)
    found = {bound: _play(study, bound, runs, samples) for bound in ((0.1,) if smoke else (0.1, 0.2))}
    _judge(study, found, runs)
    _judge_steady(study, samples)
    _draw(study, found)
    return study.report()


def _tightening(noise: BoundedNoise, probability: float, samples: int, seed: int) -> Tightening:
    gain = StochasticMPC(_A, _B, _Q, _R, _ROWS, noise, probability=1.0).gain
    return Tightening(_A + _B @ gain, _ROWS[0], probability, noise, samples, seed)


def _controller(noise: BoundedNoise, tightening: Tightening, resets: int | None, **fixed: Any) -> StochasticMPC:
    return StochasticMPC(
        _A, _B, _Q, _R, _ROWS, noise, reset_every=resets, target=_TARGET, steady_weight=_STEADY,
        tightening=tightening, **fixed,
    )  # fmt: skip


def _play(study: Study, bound: float, runs: int, samples: int) -> dict[str, dict[str, Any]]:
    """Closed loops of all controllers under the same noise."""
    noise = BoundedNoise.truncated_normal(np.full(2, 0.05), bound)
    likely = _tightening(noise, 0.9, samples, study.seed)
    still = BoundedNoise.truncated_normal(np.zeros(2), 0.0)
    arms: dict[str, StochasticMPC] = {}
    for resets in (1, None) if study.budget == "smoke" else (1, 2, 4, 8, None):
        arms["no resets" if resets is None else f"M = {resets}"] = _controller(noise, likely, resets)
    arms["robust"] = _controller(noise, _tightening(noise, 1.0, samples, study.seed), 1)
    arms["certainty-equivalent"] = _controller(still, _tightening(still, 1.0, samples, study.seed), 1)
    generator = np.random.default_rng(study.seed + 1)
    drawn = noise.sample(generator, runs * _STEPS).reshape(runs, _STEPS, 2)
    pushes = np.sort(noise.sample(generator, samples)[:, 0])
    found = {}
    for name, controller in arms.items():
        states, costs = np.zeros((runs, _STEPS + 1, 2)), np.zeros((runs, _STEPS))
        conditional, infeasible = np.zeros((runs, _STEPS)), 0
        for i in range(runs):
            x = nominal = np.zeros(2)
            for step in range(_STEPS):
                answer = controller.solve(x, nominal, step)
                infeasible += not answer.solved
                u, nominal = answer.control, answer.nominal
                costs[i, step] = (x - _TARGET) @ _Q @ (x - _TARGET) + u @ _R @ u
                mean = _A @ x + _B @ u
                conditional[i, step] = 1.0 - np.searchsorted(pushes, 1.0 - mean[0], side="right") / samples
                x = mean + drawn[i, step]
                states[i, step + 1] = x
        violated = states[:, 1:, 0] > 1.0
        found[name] = {
            "cost": float(costs.mean()),
            "conditional": float(conditional.max()),
            "marginal": float(violated[:, _SETTLED - 1 :].mean(axis=0).max()),
            "overall": float(violated[:, _SETTLED - 1 :].mean()),
            "infeasible": infeasible,
            "states": states,
        }
        study.row(noise=bound, arm=name, cost=found[name]["cost"], largest_conditional=found[name]["conditional"],
                  largest_marginal=found[name]["marginal"], mean_marginal=found[name]["overall"],
                  infeasible=infeasible)  # fmt: skip
    q = likely
    end = len(q.worst)
    q1, last = float(q.quantile(1)[0]), float(q.quantile(end)[0])
    study.note(
        f"Tightenings with noise up to {bound}: q(1) = {q1:.4f}, q(inf) = {last:.4f}, rho(0, inf) = "
        f"{q.worst[-1, 0]:.4f}, robust-stochastic in all {q1 + float(q.between(1, end)[0]):.4f}."
    )
    return found


def _judge(study: Study, found: dict[float, dict[str, dict[str, Any]]], runs: int) -> None:
    chosen = [name for name in ("M = 1", "M = 4", "no resets") if name in next(iter(found.values()))]
    shown = "; ".join(f"{b}: " + ", ".join(f"{arms[name]['cost']:.3f}" for name in chosen) for b, arms in found.items())
    gaps = [arms["M = 1"]["cost"] - arms["no resets"]["cost"] for arms in found.values()]
    falls = all(np.all(np.diff([arms[name]["cost"] for name in chosen]) < 0.0) for arms in found.values())
    study.claim(
        "Rarer resets cost less, the more so the wider the noise may reach.",
        expected="cost(M = 1) > cost(4) > cost(no resets) for both noises, with a larger gap for 0.2",
        measured=f"{shown}; gaps " + ", ".join(f"{gap:.3f}" for gap in gaps),
        holds=falls and gaps[-1] > gaps[0],
    )
    lost = sum(arm["infeasible"] for arms in found.values() for arm in arms.values())
    study.claim(
        "No program is ever without an answer.",
        expected="0 infeasible",
        measured=f"{lost} infeasible",
        holds=lost == 0,
    )
    slack = 3.0 * float(np.sqrt(0.09 / runs))
    strict = max(arms["M = 1"]["conditional"] for arms in found.values())
    loose = min(arms["no resets"]["conditional"] for arms in found.values())
    study.claim(
        "With M = 1 the bound holds with its probability from every state; without resets from the first one only.",
        expected="largest conditional violation: M = 1 <= 0.10 + 3 s.e. of 400,000 draws; no resets > 0.5 somewhere",
        measured=f"M = 1 at most {strict:.4f}; no resets at least {loose:.3f} for each noise",
        holds=strict <= 0.1 + 3.0 * np.sqrt(2.0 * 0.09 / 400_000) and loose > 0.5,
    )
    worst = max(arms[name]["marginal"] for arms in found.values() for name in chosen)
    mean = max(arms[name]["overall"] for arms in found.values() for name in chosen)
    study.claim(
        "Over runs, every one of them violates the bound no more often than it may.",
        expected=f"largest share of violations at a step from {_SETTLED} on <= 0.10 + 3 s.e. of {runs} runs",
        measured=f"{worst:.3f} at a step (allowed {0.1 + slack:.3f}), at most {mean:.3f} over steps",
        holds=worst <= 0.1 + slack,
    )


def _judge_steady(study: Study, samples: int) -> None:
    """Wide noise: where robust-stochastic MPC can rest at all."""
    noise = BoundedNoise.truncated_normal(np.full(2, 0.05), 0.4)
    likely = _tightening(noise, 0.9, samples, study.seed)
    origin: Any = (np.zeros(2), np.zeros(1))
    most, words = {}, {}
    for name, resets in {"M = 1": 1, "no resets": None}.items():
        controller = _controller(noise, likely, resets, steady_state=origin)
        most[name] = 1.0 - float(controller.schedule.steady[0])
        words[name] = controller.solve(np.zeros(2), np.zeros(2), 0).word
    study.claim(
        "Where noise may reach far but seldom does, robust-stochastic MPC cannot even stay at the origin.",
        expected="largest steady position, noise up to 0.4: about -0.006 (M = 1, origin infeasible), 0.906 (no resets)",
        measured=", ".join(f"{name}: {most[name]:.4f}, origin {words[name]}" for name in most),
        holds=abs(most["M = 1"] + 0.006) <= 0.005 and abs(most["no resets"] - 0.906) <= 0.005
        and words == {"M = 1": "infeasible", "no resets": "solved"},
    )  # fmt: skip


def _draw(study: Study, found: dict[float, dict[str, dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    bound = max(found)
    arms = found[bound]
    names = [name for name in ("M = 1", "M = 4", "no resets", "robust", "certainty-equivalent") if name in arms]
    colour = colours(names)
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        axes.plot(arms[name]["states"][:, :, 0].T, color=colour[name], alpha=0.25, linewidth=0.8)
        axes.axhline(1.0, color=LIGHT["ink"], linestyle=":", linewidth=1.0)
        text = f"{name}: cost {arms[name]['cost']:.2f}, conditional violation up to {arms[name]['conditional']:.2f}"
        axes.set_title(text, fontsize=9)
        axes.set(ylabel="position", xlim=(0, _STEPS), ylim=(0.0, 1.3))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    save_figure(figure, study.figure("runs"))

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    colour = colours([str(b) for b in found])
    for axes, (key, label) in zip(
        figure.subplots(1, 2),
        {"cost": "mean cost of a step", "conditional": "largest conditional violation"}.items(),
        strict=True,
    ):
        for b, arms in found.items():
            swept = [name for name in arms if name.startswith("M") or name == "no resets"]
            axes.plot(
                swept, [arms[name][key] for name in swept], marker="o", color=colour[str(b)], label=f"noise +-{b}"
            )
        axes.set(ylabel=label, ylim=(0.0, 1.0) if key == "conditional" else None)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.axes[1].axhline(0.1, color=LIGHT["muted"], linestyle=":", linewidth=1.0)
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, study.figure("trade"))
