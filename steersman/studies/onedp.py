"""Does a diffusion policy survive being distilled into one network call? (Wang et al., 2025, arXiv:2410.21257)

A chunk of four waypoints reaches a goal with a bump up or down; the two are equally likely. A perceptron learns it as
a diffusion policy of 100 levels and is distilled: with noise (OneDP-S, 4,000 updates) and without (OneDP-D, 1,500).
Beside them the teacher with 100, 10 and 1 steps, and the generator before distillation. Each method's learning rate is
the best of three on a teacher and seed that are not judged. A chunk succeeds if its bump has its height within 0.15
and its last row the goal within 0.12. Then the same for demonstrations with bumps up alone.

The second denoiser's rate is twice the generator's; the paper's ratio of 20 is for much longer runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from steersman.diffusion import DDIM, DDPM, ChunkGenerator, Cloning, DiscreteVP, MLPRecipe
from steersman.diffusion.onedp import OneDP
from steersman.diffusion.samplers import Sampler
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.planar_experts import two_mode_demonstrations, two_mode_score
from steersman.policies import ChunkPolicy
from steersman.studies.study import Report, Study
from steersman.training import WarmupCosine, train
from steersman.training.figures import save_figure
from steersman.training.prng import key

_RATES = (3e-4, 1e-3, 3e-3)


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("onedp", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("Robomimic and Push-T demonstrations with images and a day of a GPU for each teacher")
    smoke = study.budget == "smoke"
    seeds = [seed] if smoke else [seed, seed + 1, seed + 2]
    contexts = 64 if smoke else 2000
    tuning = {False: _RATES[1], True: _RATES[1]}
    if not smoke:
        tuning = _tune(seed + 100, contexts)
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    generators: dict[str, ChunkGenerator] = {}
    for kind, up in (("two modes", 0.5), ("one mode", 1.0)):
        for each in seeds:
            teacher = _teacher(each, up, smoke)
            methods = _methods(teacher, each, up, tuning, smoke)
            for name, generator in methods.items():
                scores.setdefault((kind, name), []).append(_score(generator, each, contexts))
            if kind == "two modes" and each == seed:
                generators = methods
    for (kind, name), found in scores.items():
        study.row(
            demonstrations=kind,
            method=name,
            success=_mean(found, "success"),
            least=min(one["success"] for one in found),
            up=_mean(found, "up"),
            between=_mean(found, "between"),
        )
    ratio = _latency(generators, contexts, 3 if smoke else 20)
    _judge(study, scores, ratio)
    alone = _latency(generators, 1, 3 if smoke else 300)
    study.note(
        f"The time of a chunk is that of {contexts} contexts at once. A single one takes 1/{1 / alone:.0f} of that of "
        "100 steps with a network this small, because starting a program takes longer than the network itself."
    )
    study.note(
        "Learning rates chosen on an unjudged teacher: "
        + ", ".join(f"OneDP-{'D' if single else 'S'} {rate:g}" for single, rate in tuning.items())
        + "."
    )
    _draw(study, generators)
    return study.report()


def _data(seed: int, up: float, smoke: bool) -> ChunkPairs:
    found = two_mode_demonstrations(jax.random.fold_in(key(seed), 1), 500 if smoke else 20_000, up=up)
    return ChunkPairs(found.observation, found.chunk)


def _teacher(seed: int, up: float, smoke: bool) -> ChunkPolicy:
    updates = 3 if smoke else 6000
    cloning = Cloning(
        MLPRecipe(DiscreteVP.squared_cosine(100), hidden=(16,) if smoke else (128, 128, 128), time_size=12),
        DDPM(limit=None),
        learning_rate=WarmupCosine(1e-3, updates),
    )
    policy: Any = train(cloning, _data(seed, up, smoke), iterations=updates, seeds=[seed]).policy()
    return policy


def _distil(teacher: ChunkPolicy, seed: int, up: float, single: bool, rate: float, smoke: bool) -> ChunkGenerator:
    updates = 3 if smoke else 1500 if single else 4000
    algorithm = OneDP(
        teacher,
        deterministic=single,
        learning_rate=WarmupCosine(rate, updates, end=0.05 * rate),
        score_learning_rate=WarmupCosine(2 * rate, updates, end=0.1 * rate),
    )
    policy: Any = train(algorithm, _data(seed, up, smoke), iterations=updates, seeds=[seed]).policy()
    return policy.generator


def _tune(seed: int, contexts: int) -> dict[bool, float]:
    teacher = _teacher(seed, 0.5, False)
    # Between two modes a single point cannot succeed: its rate is judged where it can.
    plain = _teacher(seed, 1.0, False)
    best = {}
    for single in (False, True):
        up = 1.0 if single else 0.5
        found = {
            rate: _score(_distil(plain if single else teacher, seed, up, single, rate, False), seed, contexts)[
                "success"
            ]
            for rate in _RATES
        }
        best[single] = max(found, key=lambda rate, found=found: found[rate])
    return best


def _with_sampler(teacher: ChunkPolicy, sampler: Sampler) -> ChunkGenerator:
    generator: Any = teacher.generator
    return eqx.tree_at(lambda g: g.sampler, generator, sampler)


def _methods(
    teacher: ChunkPolicy, seed: int, up: float, tuning: dict[bool, float], smoke: bool
) -> dict[str, ChunkGenerator]:
    untrained = OneDP(teacher)
    start: Any = untrained.policy(untrained.init(_data(seed, up, True), key(seed)))
    return {
        "DDPM, 100 steps": _with_sampler(teacher, DDPM(limit=None)),
        "DDIM, 10 steps": _with_sampler(teacher, DDIM(10, limit=None)),
        "DDIM, 1 step": _with_sampler(teacher, DDIM(1, limit=None)),
        "generator, not distilled": start.generator,
        "OneDP-S": _distil(teacher, seed, up, False, tuning[False], smoke),
        "OneDP-D": _distil(teacher, seed, up, True, tuning[True], smoke),
    }


@eqx.filter_jit
def _chunks(generator: ChunkGenerator, goals: Array, keys: Key[Array, " N"]) -> Array:
    return jax.vmap(generator)(goals, keys)


def _score(generator: ChunkGenerator, seed: int, contexts: int) -> dict[str, float]:
    goal_key, chunk_key = jax.random.split(jax.random.fold_in(key(seed), 2))
    goals = 0.6 * jax.random.uniform(goal_key, (contexts, 1), minval=-1.0)
    chunks = _chunks(generator, goals, jax.random.split(chunk_key, contexts))
    found = jax.vmap(two_mode_score)(chunks, goals)
    return {
        "success": float(jnp.mean(found.success)),
        "up": float(jnp.mean(found.amplitude > 0)),
        "between": float(jnp.mean(jnp.abs(found.amplitude) < 0.4)),
    }


def _latency(generators: dict[str, ChunkGenerator], batch: int, repeats: int) -> float:
    """Time of one call of OneDP-S over that of 100 steps, for `batch` chunks at once: the median of paired calls."""
    goals, keys = jnp.zeros((batch, 1)), jax.random.split(key(0), batch)
    calls = []
    for name in ("OneDP-S", "DDPM, 100 steps"):
        # The weights are constants of the program: handing them over at every call would take longer than the network.
        call = jax.jit(lambda goals, keys, generator=generators[name]: jax.vmap(generator)(goals, keys))
        call(goals, keys).block_until_ready()
        calls.append(call)
    ratios = []
    for _ in range(repeats):
        spent = []
        for call in calls:
            began = time.perf_counter()
            call(goals, keys).block_until_ready()
            spent.append(time.perf_counter() - began)
        ratios.append(spent[0] / spent[1])
    return float(np.median(ratios))


def _mean(found: list[dict[str, float]], name: str) -> float:
    return float(np.mean([one[name] for one in found]))


def _judge(study: Study, scores: dict[tuple[str, str], list[dict[str, float]]], ratio: float) -> None:
    two = {name: scores["two modes", name] for kind, name in scores if kind == "two modes"}
    one = {name: scores["one mode", name] for kind, name in scores if kind == "one mode"}
    distilled, start = _mean(two["OneDP-S"], "success"), _mean(two["generator, not distilled"], "success")
    study.claim(
        "One call of the distilled generator succeeds as the teacher does",
        expected="success of OneDP-S at least 0.70 and at least 5 times that before distillation",
        measured=f"{distilled:.3f}, before distillation {start:.3f}",
        holds=distilled >= 0.70 and distilled >= 5 * start,
    )
    up, between = _mean(two["OneDP-S"], "up"), _mean(two["OneDP-S"], "between")
    study.claim(
        "It keeps both modes",
        expected="bumps up in 0.35 to 0.65 of the chunks, at most 0.12 between the modes",
        measured=f"{up:.3f} up, {between:.3f} between",
        holds=0.35 <= up <= 0.65 and between <= 0.12,
    )
    once = _mean(two["DDIM, 1 step"], "success")
    study.claim(
        "The teacher itself cannot do with one step",
        expected="success of DDIM with 1 step at most 0.05",
        measured=f"{once:.3f}",
        holds=once <= 0.05,
    )
    both = _mean(one["OneDP-S"], "success"), _mean(one["OneDP-D"], "success")
    study.claim(
        "With one mode, both the generator with noise and the one without succeed",
        expected="at least 0.95 each",
        measured=f"OneDP-S {both[0]:.3f}, OneDP-D {both[1]:.3f}",
        holds=min(both) >= 0.95,
    )
    study.claim(
        "A chunk takes a twentieth of the time of 100 steps",
        expected="wall time per chunk at most 1/20",
        measured=f"1/{1 / ratio:.0f}",
        holds=ratio <= 1 / 20,
    )


def _draw(study: Study, generators: dict[str, ChunkGenerator]) -> None:
    from matplotlib import pyplot as plt

    goals = jnp.full((60, 1), 0.2)
    keys = jax.random.split(key(study.seed + 7), len(goals))
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 4.6), sharex=True, sharey=True, layout="constrained")
    for axis, (name, generator) in zip(axes.flat, generators.items(), strict=True):
        chunks = np.asarray(_chunks(generator, goals, keys))
        start = np.zeros((len(chunks), 1, 2))
        for path in np.concatenate([start, chunks], axis=1):
            axis.plot(path[:, 0], path[:, 1], color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(1.0, 0.2, marker="x", color="black", markersize=6)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-1.4, 1.6)
    figure.supxlabel("x", fontsize=9)
    figure.supylabel("y", fontsize=9)
    save_figure(figure, study.figure("chunks"))
