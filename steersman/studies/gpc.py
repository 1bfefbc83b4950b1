"""Do composed policies beat the better of their parents, without training? (arXiv:2510.01068)

A reach around a disc towards a goal that two sensors read, each precisely in one direction only; demonstrations pass
on either side. Each parent knows one sensor. With exact parents (Gaussian mixtures) nothing but the composition is
tested; with trained ones, once on equal processes and once on different ones, the conversion between processes too.
Weights are chosen on 200 validation episodes and judged on 1,000 others. Where one parent is much worse nothing is
to be gained. One number each over three seeds; the curves are on 2,000 further episodes a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from steersman.diffusion.cloning import Cloning, MLPRecipe
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.gpc import compose, reweighted
from steersman.diffusion.mixtures import Mixture, MixtureDenoiser
from steersman.diffusion.processes import DiscreteVP, NoiseProcess, RectifiedFlow
from steersman.diffusion.samplers import DDPM
from steersman.diffusion.scaling import Scaling
from steersman.diffusion.weight_search import choose_weights, play, simplex
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.planar_experts import (
    reach_posterior,
    reach_success,
    two_sensor_demonstrations,
)
from steersman.studies.study import Report, Study
from steersman.training import train
from steersman.training.figures import LIGHT, colours, save_figure
from steersman.training.schedules import WarmupCosine

_COMPLEMENTARY = ((0.05, 0.5), (0.5, 0.05))
_ONE_BAD = ((0.08, 0.08), (0.8, 0.8))
_SHAPE = (8, 2)

#: Draws a chunk for the readings ``[2, 2]`` of the two sensors.
Draw = Callable[[Array, Key[Array, ""]], Array]


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("gpc", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("Robomimic, RoboTwin 2.0 and a trained policy for each of their tasks and sensors, on a GPU")
    smoke = study.budget == "smoke"
    process = DiscreteVP.squared_cosine(4 if smoke else 50)
    counts = (4, 4, 4) if smoke else (200, 1000, 2000)
    seeds = [seed] if smoke else [seed, seed + 1, seed + 2]

    exact = [_exact(process, np.asarray(_COMPLEMENTARY[i])) for i in range(2)]
    sweep = _sweep(study, "exact parents", exact, _COMPLEMENTARY, seeds, counts)
    others = _others(study, exact, seeds, counts[0] + counts[1], counts[2])
    curves = {"exact parents": sweep["curve"]}
    _judge_gain(study, "Exact parents: the composition beats the better one.", sweep, 0.15)
    best, composed = max(sweep["curve"][0], sweep["curve"][-1]), sweep["curve"].max()
    study.claim(
        "Averaging actions is worse than either parent's own.",
        expected="average of a draw from each < better parent",
        measured=f"{others['averaged actions']:.3f} against {best:.3f}",
        holds=others["averaged actions"] < best,
    )
    study.claim(
        "AND-superposition, which tracks the densities, does better still.",
        expected="AND >= best of the weight curve + 0.03",
        measured=f"{others['and']:.3f} against {composed:.3f}",
        holds=others["and"] >= composed + 0.03,
    )
    if not smoke:
        bad = _sweep(
            study, "one bad parent", [_exact(process, np.asarray(s)) for s in _ONE_BAD], _ONE_BAD, seeds, counts
        )
        curves["one bad parent"] = bad["curve"]
        study.claim(
            "Where one parent is much worse, nothing is gained.",
            expected="chosen composition within 0.05 of the better parent",
            measured=f"{bad['test']:.3f} against {bad['parent']:.3f}",
            holds=abs(bad["test"] - bad["parent"]) <= 0.05,
        )
        trained = _train(study.seed, process)
        for name, pair in {
            "trained, both VP": (trained["a"], trained["b"]),
            "trained, VP and flow": (trained["a"], trained["b, flow"]),
        }.items():
            found = _sweep(study, name, list(pair), _COMPLEMENTARY, seeds, (counts[0], counts[1], 0), process)
            curves[name] = found["curve"]
            _judge_gain(study, f"{name[0].upper()}{name[1:]}: the composition beats the better one.", found, 0.10)
    _draw_curves(study, curves, others)
    _draw_chunks(study, exact, 8 if smoke else 60)
    return study.report()


def _exact(process: NoiseProcess, sensor_std: np.ndarray) -> ChunkGenerator:
    """The exact policy given the readings of one sensor ``[2]``, or of several ``[S, 2]``."""
    std = jnp.asarray(sensor_std, jnp.result_type(float))
    denoiser = MixtureDenoiser(
        mixture=lambda reading: Mixture(*reach_posterior(reading, std)), process=process, chunk_shape=_SHAPE
    )
    return ChunkGenerator(denoiser, DDPM(limit=None))


def _episode(draw: Draw, sensor_std: Any, key: Key[Array, ""]) -> Float[Array, ""]:
    """Success of one reach: the same goal, readings and noise for every `draw`."""
    goal_key, sensor_key, chunk_key = jax.random.split(key, 3)
    goal = 0.4 * jax.random.normal(goal_key, (2,))
    readings = goal + jnp.asarray(sensor_std, goal.dtype) * jax.random.normal(sensor_key, (2, 2))
    return jnp.asarray(reach_success(draw(readings, chunk_key), goal), goal.dtype)


def _sweep(
    study: Study,
    part: str,
    parents: list[ChunkGenerator],
    sensor_std: Any,
    seeds: list[int],
    counts: tuple[int, int, int],
    process: NoiseProcess | None = None,
) -> dict[str, Any]:
    """Chooses weights, tests them, and measures the whole curve; means over the seeds."""
    validation, test, dense = counts
    both = compose(parents, process=process)

    def evaluate(weights: Any, key: Key[Array, ""]) -> Array:
        return _episode(lambda seen, key: reweighted(both, weights)((seen[0], seen[1]), key), sensor_std, key)

    candidates = simplex(2, 2 if study.budget == "smoke" else 10)
    tests, curve, shown = [], [], []
    for seed in seeds:
        # Disjoint blocks of episode seeds: validation, test, curve.
        first = 100_000 * seed + 50_000
        tuning = play(evaluate, candidates, range(first, first + validation))
        best, inner = choose_weights(candidates, tuning)
        rows = np.stack([candidates[best], candidates[inner], [1.0, 0.0], [0.0, 1.0]])
        tests.append(play(evaluate, rows, range(first + validation, first + validation + test)).mean(axis=1))
        begin = first + validation + test
        curve.append((play(evaluate, candidates, range(begin, begin + dense)) if dense else tuning).mean(axis=1))
        shown.append(f"{candidates[best][0]:.1f}")
    for weights, each in zip(candidates, np.asarray(curve).T, strict=True):
        _row(study, part, f"weight {weights[0]:.1f}", each)
    for name, each in zip(("chosen", "best inner", "first", "second"), np.asarray(tests).T, strict=True):
        _row(study, part, f"{name}, on test episodes", each)
    study.note(f"{part}: chosen weights of the first policy {', '.join(shown)}.")
    chosen, _, *alone = np.mean(tests, axis=0)
    return {"curve": np.mean(curve, axis=0), "test": float(chosen), "parent": float(max(alone))}


def _row(study: Study, part: str, arm: str, scores: Any) -> None:
    study.row(
        part=part, arm=arm, success=float(np.mean(scores)), lowest=float(np.min(scores)), highest=float(np.max(scores))
    )


def _judge_gain(study: Study, text: str, found: dict[str, Any], least: float) -> None:
    study.claim(
        text,
        expected=f"success on test episodes >= better parent + {least}",
        measured=f"{found['test']:.3f} against {found['parent']:.3f}",
        holds=found["test"] - found["parent"] >= least,
    )


def _others(
    study: Study, parents: list[ChunkGenerator], seeds: list[int], skipped: int, count: int
) -> dict[str, float]:
    """The other ways to use two policies, on the curve's episodes."""
    first, second = parents
    conjunction, disjunction = (compose(parents, op=op) for op in ("and", "or"))
    joint = _exact(first.denoiser.process, np.asarray(_COMPLEMENTARY))

    def averaged(seen: Array, key: Key[Array, ""]) -> Array:
        one, other = jax.random.split(key)
        return 0.5 * (first(seen[0], one) + second(seen[1], other))

    draws: dict[str, Draw] = {
        "averaged actions": averaged,
        "and": lambda seen, key: conjunction((seen[0], seen[1]), key),
        "or": lambda seen, key: disjunction((seen[0], seen[1]), key),
        "both sensors, exact": joint,
    }
    if study.budget == "smoke":
        draws = {name: draws[name] for name in ("averaged actions", "and")}
    starts = [100_000 * seed + 50_000 + skipped for seed in seeds]
    keys = jax.vmap(jax.random.key)(jnp.concatenate([jnp.arange(s, s + count, dtype=jnp.uint32) for s in starts]))
    found = {}
    for name, draw in draws.items():
        played = jax.jit(jax.vmap(lambda key, draw=draw: _episode(draw, _COMPLEMENTARY, key)))(keys)
        scores = np.asarray(played).reshape(len(seeds), count).mean(axis=1)
        found[name] = float(np.mean(scores))
        _row(study, "exact parents", name, scores)
    return found


def _train(seed: int, process: NoiseProcess) -> dict[str, ChunkGenerator]:
    """A network for each sensor, and a flow for the second: equal data, steps, sizes and rates."""
    data = two_sensor_demonstrations(jax.random.key(seed + 7), 20_000, jnp.asarray(_COMPLEMENTARY))
    scaling = Scaling.fit(data.chunk)
    found = {}
    for name, (sensor, on) in {"a": (0, process), "b": (1, process), "b, flow": (1, RectifiedFlow())}.items():
        algorithm = Cloning(
            recipe=MLPRecipe(process=on, prediction="noise" if on is process else "flow"),
            sampler=DDPM(steps=50),
            learning_rate=WarmupCosine(1e-3, 4_000, 100),
            action_scaling=scaling,
        )
        pairs = ChunkPairs(data.observation[:, sensor], data.chunk)
        trained: Any = train(algorithm, pairs, iterations=4_000, seeds=[seed])
        found[name] = trained.policy().generator
    return found


def _draw_curves(study: Study, curves: dict[str, np.ndarray], others: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    colour = colours(curves)
    for name, curve in curves.items():
        # Candidates rise in the first policy's weight.
        axes.plot(np.linspace(0.0, 1.0, len(curve)), curve, marker="o", markersize=4, color=colour[name], label=name)
    for name, value in others.items():
        axes.axhline(value, color=LIGHT["muted"], linestyle=":", linewidth=1.0)
        axes.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set(xlabel="weight of the first policy", ylabel="success", xlim=(0, 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, study.figure("weights"))


def _draw_chunks(study: Study, parents: list[ChunkGenerator], count: int) -> None:
    """Chunks of each way for one goal and one pair of readings."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    goal = jnp.asarray([0.2, -0.1])
    readings = goal + jnp.asarray([[0.03, 0.45], [-0.5, -0.02]])
    first, second = parents
    ways: dict[str, Draw] = {
        "first policy": lambda seen, key: first(seen[0], key),
        "second policy": lambda seen, key: second(seen[1], key),
        "averaged actions": lambda seen, key: 0.5 * (first(seen[0], key) + second(seen[1], jax.random.fold_in(key, 1))),
        "composed, 0.5": lambda seen, key: compose(parents)((seen[0], seen[1]), key),
        "and": lambda seen, key: compose(parents, op="and")((seen[0], seen[1]), key),
        "or": lambda seen, key: compose(parents, op="or")((seen[0], seen[1]), key),
    }
    if study.budget == "smoke":
        ways = {name: ways[name] for name in ("first policy", "second policy")}
    keys = jax.random.split(jax.random.key(study.seed + 11), count)
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    for axes, (name, draw) in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, ways.items(), strict=False):
        chunks = np.asarray(jax.jit(jax.vmap(lambda key, draw=draw: draw(readings, key)))(keys))
        rate = np.mean([bool(reach_success(jnp.asarray(chunk), goal)) for chunk in chunks])
        paths = np.concatenate([np.broadcast_to([-2.0, 0.0], (count, 1, 2)), chunks], axis=1)
        axes.add_patch(Circle((-1.0, 0.0), 0.5, color=LIGHT["grid"]))
        axes.plot(*paths.transpose(2, 1, 0), color=colours(["path"])["path"], alpha=0.25, linewidth=0.8)
        axes.plot(*np.asarray(goal), marker="*", color=LIGHT["ink"], markersize=9)
        axes.set_title(f"{name}: {rate:.0%} succeed", fontsize=9)
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, study.figure("chunks"))
