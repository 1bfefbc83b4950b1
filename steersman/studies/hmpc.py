"""Does harmonic MPC with five steps start where others cannot, and follow what moves? (arXiv:2310.16723)

One axis of a ball on a plate, linearized and sampled at 0.2 s, with bounds on the ball's velocity, the plate's angle
and its acceleration. Every controller has the same weights, bounds and solver. Domains of attraction are counted on a
grid of velocities and angles; a sinusoid, one too large for the bounds, and a sum of two sinusoids of other frequencies
are followed from rest; sizes and times are compared with MPC that has an artificial trajectory of a whole period.
Nothing is random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from steersman.control.harmonics import Harmonic, HarmonicPlant
from steersman.control.hmpc import HMPC
from steersman.control.lqr import discretize
from steersman.control.periodic_mpct import PeriodicMPCT
from steersman.studies.study import Report, Study
from steersman.training.figures import LIGHT, colours, save_figure

_FREQUENCY = 0.3254
_POSITION = np.array([[1.0, 0.0, 0.0, 0.0]])
#: Bounds on the velocity in m/s, the angle in rad and the angular acceleration in rad/s^2.
_BOUNDS = np.array([0.5, np.pi / 4.0, 0.4])
_ROWS = (np.eye(4)[[1, 2, 0]] * [[1.0], [1.0], [0.0]], np.array([[0.0], [0.0], [1.0]]), -_BOUNDS, _BOUNDS)
_WEIGHTS = (np.diag([10.0, 0.05, 0.05, 0.05]), np.array([[0.5]]))
_OFFSETS = (np.diag([600.0, 50.0, 50.0, 50.0]), np.array([[0.3]]))


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("hmpc", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("the nonlinear ball and plate with two axes and solvers compiled for each formulation")
    smoke = study.budget == "smoke"
    domains = _domains(study, 3 if smoke else 9, [5] if smoke else [5, 8])
    followed = {amplitude: _follow(study, amplitude, 4 if smoke else 120) for amplitude in (0.25, 0.6)}
    arbitrary = _arbitrary(study, 4 if smoke else 100)
    _sizes(study, [20] if smoke else [20, 50, 200], 2 if smoke else 40)
    _draw_domains(study, domains)
    _draw_following(study, followed, arbitrary)
    return study.report()


def axis() -> tuple[np.ndarray, np.ndarray]:
    """Position, velocity, angle and angular velocity after 0.2 s of a constant angular acceleration."""
    A, B = np.diag([1.0, 5.0 / 7.0 * 9.81, 1.0], 1), np.eye(4)[:, 3:]
    with jax.enable_x64(True):
        a, b = discretize(A, B, 0.2)
        return np.asarray(a), np.asarray(b)


def _controller(horizon: int = 5, artificial: Any = "harmonic") -> HMPC:
    plant = HarmonicPlant(*axis(), _FREQUENCY)
    return HMPC(plant, *_WEIGHTS, _ROWS, *_OFFSETS, horizon=horizon, artificial=artificial)


def _domains(study: Study, count: int, horizons: list[int]) -> dict[int, dict[str, np.ndarray]]:
    """Which starts each formulation has an answer for; the reference plays no part in it."""
    velocities, angles = np.linspace(-0.45, 0.45, count), np.linspace(-0.3, 0.3, count)
    rest = Harmonic(*np.zeros((3, 5)))
    found: dict[int, dict[str, np.ndarray]] = {}
    for horizon in horizons:
        found[horizon] = {}
        for name, artificial in (("HMPC", "harmonic"), ("MPCT", "equilibrium")):
            controller = _controller(horizon, artificial)
            grid = [[controller.solve(np.array([0.0, v, a, 0.0]), rest).solved for a in angles] for v in velocities]
            found[horizon][name] = np.asarray(grid)
            study.row(part="domain", arm=name, case=f"N = {horizon}", feasible=int(np.sum(grid)), of=count**2,
                      error=None, largest_rise=None, artificial_amplitude=None, variables=controller.variables,
                      solver_ms=None)  # fmt: skip
    wanted = {5: (29, 1), 8: (31, 13)}
    counts = {n: tuple(int(grid.sum()) for grid in both.values()) for n, both in found.items()}
    inside = all(not np.any(both["MPCT"] & ~both["HMPC"]) for both in found.values())
    study.claim(
        "With five steps it starts where MPC for tracking a set-point has no answer.",
        expected="feasible of 81, HMPC and MPCT: 29 and 1 (N = 5), 31 and 13 (N = 8), +-2; MPCT's within HMPC's",
        measured="; ".join(f"{h} and {m} (N = {n})" for n, (h, m) in counts.items()) + f"; within: {inside}",
        holds=inside and all(abs(a - b) <= 2 for n in counts for a, b in zip(counts[n], wanted[n], strict=True)),
    )
    return found


def _follow(study: Study, amplitude: float, steps: int) -> dict[str, np.ndarray]:
    """From rest after a sinusoid of the base frequency."""
    controller = _controller()
    plant = controller.plant
    reference = plant.complete(_POSITION, Harmonic(np.zeros(1), np.array([amplitude]), np.zeros(1)))
    x, path, values, radii, seconds, infeasible = np.zeros(4), [], [], [], [], 0
    wanted = reference.values(_FREQUENCY, steps)[:, 0]
    for step in range(steps):
        found = controller.solve(x, reference.rotated(_FREQUENCY * step))
        infeasible += not found.solved
        path.append(x[0])
        values.append(found.cost)
        radii.append(float(found.artificial.amplitude[0]))
        seconds.append(found.seconds)
        x = plant.A @ x + plant.B @ found.controls[0]
    path, values = np.asarray(path), np.asarray(values)
    error = float(np.max(np.abs(path - wanted)[-24:]))
    rise = float(np.max(np.diff(values)))
    milliseconds = 1e3 * float(np.median(seconds))
    study.row(part="sinusoid", arm="HMPC", case=f"{amplitude} m", feasible=steps - infeasible, of=steps, error=error,
              largest_rise=rise, artificial_amplitude=radii[-1], variables=controller.variables,
              solver_ms=milliseconds)  # fmt: skip
    if amplitude < 0.3:
        study.claim(
            "An admissible sinusoid is followed without error, and the optimal value never rises.",
            expected="largest error of the last 24 steps < 1e-4 m; largest rise <= 1e-6 of the first value",
            measured=f"{error:.1e} m; largest rise {rise / values[0]:.1e} of the first value",
            holds=error < 1e-4 and rise <= 1e-6 * values[0],
        )
    else:
        study.claim(
            "One too large becomes the largest that the bounds allow, and no step is without an answer.",
            expected="artificial amplitude 0.3072 +- 0.0005 m; 0 infeasible",
            measured=f"{radii[-1]:.5f} m; {infeasible} infeasible",
            holds=abs(radii[-1] - 0.3072) <= 5e-4 and infeasible == 0,
        )
    return {"path": path, "wanted": wanted, "values": values}


def _arbitrary(study: Study, steps: int) -> dict[str, np.ndarray]:
    """A sum of two other sinusoids, through fits to the next ten samples or as a set-point that moves."""
    times = np.arange(steps + 10)
    wanted = 0.18 * np.sin(0.17 * times) + 0.08 * np.sin(0.41 * times + 1.0)
    paths, errors = {"reference": wanted[:steps]}, {}
    for name, window in (("HMPC, fits", 10), ("HMPC, set-points", 0), ("MPCT, set-points", 0)):
        controller = _controller(artificial="equilibrium" if name[0] == "M" else "harmonic")
        plant, x, path, infeasible = controller.plant, np.zeros(4), [], 0
        for step in range(steps):
            held = Harmonic(np.eye(5)[0] * wanted[step], np.zeros(5), np.zeros(5))
            ahead = wanted[step : step + window, None]
            found = controller.solve(x, plant.fit(_POSITION, ahead) if window else held)
            infeasible += not found.solved
            path.append(x[0])
            x = plant.A @ x + plant.B @ found.controls[0]
        paths[name] = np.asarray(path)
        error = (paths[name] - wanted[:steps])[30 if steps > 30 else 0 :]
        errors[name] = float(np.sqrt(np.mean(error**2)))
        study.row(part="two sinusoids", arm=name, case="other frequencies", feasible=steps - infeasible, of=steps,
                  error=errors[name], largest_rise=None, artificial_amplitude=None, variables=controller.variables,
                  solver_ms=None)  # fmt: skip
    ratio = errors["HMPC, fits"] / errors["HMPC, set-points"]
    study.claim(
        "References of other frequencies are followed through local fits, much closer than as set-points.",
        expected="RMS error after 30 steps with fits <= 0.3 of that with set-points (about 0.020 and 0.148 m)",
        measured=", ".join(f"{name}: {error:.4f} m" for name, error in errors.items()) + f"; ratio {ratio:.2f}",
        holds=ratio <= 0.3,
    )
    return paths


def _sizes(study: Study, periods: list[int], steps: int) -> None:
    """The same sinusoid with an artificial harmonic and with an artificial period, from rest, at equal costs."""
    A, B = axis()
    sizes: dict[str, list[int]] = {"HMPC": [], "periodic MPCT": []}
    for period in periods:
        w = 2.0 * np.pi / period
        # The offset cost of a sinusoid summed over its period: the mean square of sine and cosine is one half.
        Te, Se = (period * weight for weight in _OFFSETS)
        harmonic = HMPC(HarmonicPlant(A, B, w), *_WEIGHTS, _ROWS, Te, Se, Th=0.5 * Te, Sh=0.5 * Se)
        whole = PeriodicMPCT(A, B, *_WEIGHTS, _ROWS, *_OFFSETS, period=period)
        reference = harmonic.plant.complete(_POSITION, Harmonic(np.zeros(1), np.array([0.2]), np.zeros(1)))
        for name, controller in (("HMPC", harmonic), ("periodic MPCT", whole)):
            x, seconds, misses = np.zeros(4), [], []
            for step in range(steps):
                now = reference.rotated(w * step)
                table = now.values(w, period)
                if isinstance(controller, HMPC):
                    found: Any = controller.solve(x, now)
                else:
                    found = controller.solve(x, table[:, :4], table[:, 4:])
                seconds.append(found.seconds)
                misses.append(x[0] - table[0, 0])
                x = A @ x + B @ found.controls[0]
            sizes[name].append(controller.variables)
            study.row(part="size", arm=name, case=f"period {period}", feasible=steps, of=steps,
                      error=float(np.abs(misses[-1])), largest_rise=None, artificial_amplitude=None,
                      variables=controller.variables, solver_ms=1e3 * float(np.median(seconds)))  # fmt: skip
    growth = np.diff(sizes["periodic MPCT"]) / np.diff(periods)
    study.claim(
        "Its size does not depend on the period of the reference.",
        expected="HMPC: the same number of variables; periodic MPCT: n + m = 5 more for each sample of the period",
        measured=f"{sizes['HMPC']} against {sizes['periodic MPCT']} variables for periods {periods}",
        holds=len(set(sizes["HMPC"])) == 1 and bool(np.all(growth == 5.0)),
    )


def _draw_domains(study: Study, domains: dict[int, dict[str, np.ndarray]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    colour = colours(["HMPC", "MPCT"])
    panels = np.atleast_1d(figure.subplots(1, len(domains), sharey=True))
    for axes, (horizon, both) in zip(panels, domains.items(), strict=True):
        count = len(both["HMPC"])
        v, a = np.meshgrid(np.linspace(-0.45, 0.45, count), np.linspace(-0.3, 0.3, count), indexing="ij")
        axes.scatter(v, a, s=6, color=LIGHT["grid"], label="start without an answer")
        for name, size in (("HMPC", 70), ("MPCT", 18)):
            label = f"{name} has one"
            axes.scatter(v[both[name]], a[both[name]], s=size, color=colour[name], label=label)
        axes.set_title(f"N = {horizon}", fontsize=9)
        axes.set(xlabel="velocity (m/s)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("angle (rad)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, study.figure("domains"))


def _draw_following(study: Study, followed: dict[float, dict[str, np.ndarray]], paths: dict[str, np.ndarray]) -> None:
    from matplotlib.figure import Figure

    names = ["HMPC", "HMPC, set-points", "MPCT, set-points"]
    colour = colours(names)
    figure = Figure(figsize=(7.2, 6.6), layout="constrained")
    panels = figure.subplots(3, 1)
    for axes, (amplitude, found) in zip(panels, followed.items(), strict=False):
        steps = 0.2 * np.arange(len(found["path"]))
        axes.plot(steps, found["wanted"], color=LIGHT["muted"], linestyle=":", label="reference")
        axes.plot(steps, found["path"], color=colour["HMPC"], label="HMPC")
        kind = "within the bounds" if amplitude < 0.3 else "too large for the bounds"
        axes.set_title(f"amplitude {amplitude} m, {kind}", fontsize=9)
    axes = panels[2]
    for name, path in paths.items():
        style = ":" if name == "reference" else "-"
        shade = LIGHT["muted"] if name == "reference" else colour[name.removesuffix(", fits")]
        axes.plot(0.2 * np.arange(len(path)), path, color=shade, linestyle=style, label=name)
    axes.set_title("two sinusoids of other frequencies", fontsize=9)
    for axes in panels:
        axes.set(ylabel="position (m)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[2].set_xlabel("time (s)")
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, study.figure("following"))
