"""Do a camera's and a range sensor's policy, composed with fixed weights, beat either? (arXiv:2503.12466)

A reach around a disc. The camera, a line of pixels, tells in which direction the goal is and not how far; the range
sensor, a small point cloud, how far and badly in which direction. One network is trained for each, with an encoder of
its own, on the same chunks, with the same steps, sizes and rates; a third sees both and is the upper reference. A
broken camera is the case in which nothing is to be gained. Every arm plays the same episodes, three blocks of them.

Actions are standardized and samples not limited, for all arms. With actions scaled to [-1, 1] and limited to that, the
composition of these networks reached 0.48 at equal weights; the choice was made on a training and episodes of seeds
that the study does not use, where standardized actions reached 0.70.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from steersman.diffusion.cloning import Cloning, EncoderRecipe, MLPRecipe
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.gpc import reweighted
from steersman.diffusion.mcdp import PointCloudRecipe, VectorRecipe, WeightSweep, compose_modalities, weight_sweep
from steersman.diffusion.processes import DiscreteVP
from steersman.diffusion.samplers import DDPM
from steersman.diffusion.scaling import Scaling
from steersman.diffusion.weight_search import play
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.planar import Discs
from steersman.envs.planar_experts import (
    cloud_reading,
    image_reading,
    reach_success,
    two_modality_demonstrations,
)
from steersman.studies.study import Report, Study
from steersman.training import train
from steersman.training.figures import LIGHT, colours, save_figure
from steersman.training.schedules import WarmupCosine

_BROKEN = 0.4
_OBSTACLE = ((-1.0, 0.0),), (0.45,)

#: Draws a chunk for the readings ``{"image": [24], "point_cloud": [16, 2]}``.
Draw = Callable[[PyTree, Key[Array, ""]], Array]


class BothRecipe(EncoderRecipe):
    """The encoders of both modalities side by side, for the joint policy."""

    def make(self, observation: PyTree, key: Key[Array, ""]) -> Any:
        return Both([_RECIPES[name].make(observation[name], key) for name in _RECIPES])


class Both(eqx.Module):
    """One encoder for each modality, in the order of their names.

    Attributes:
        encoders: of the image and of the point cloud.
    """

    encoders: list[Callable[[Array], Array]]

    def __call__(self, observation: PyTree) -> Array:
        return jnp.concatenate([f(observation[name]) for f, name in zip(self.encoders, _RECIPES, strict=True)])


_RECIPES: dict[str, Any] = {
    "image": VectorRecipe(),
    "point_cloud": PointCloudRecipe(widths=(64,), output_size=32, pool="mean"),
}


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("mcdp", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("RoboTwin with trained image and point-cloud policies, about a day of a GPU for each task")
    smoke = study.budget == "smoke"
    process = DiscreteVP.squared_cosine(4 if smoke else 50)
    size, steps, count, blocks = (64, 2, 4, 1) if smoke else (20_000, 4_000, 1_000, 3)
    key = jax.random.key(seed + 17)
    data = two_modality_demonstrations(key, size)
    scaling = Scaling.fit(data.chunk, "standard")

    def clone(observation: PyTree, encoder: Any) -> ChunkGenerator:
        algorithm = Cloning(
            recipe=MLPRecipe(process=process, encoder=encoder, time_size=10),
            sampler=DDPM(limit=None),
            learning_rate=WarmupCosine(1e-3, steps + 1, 0.025 * steps),
            action_scaling=scaling,
        )
        trained: Any = train(algorithm, ChunkPairs(observation, data.chunk), iterations=steps, seeds=[seed])
        return trained.policy().generator

    parents = {name: clone(data.observation[name], recipe) for name, recipe in _RECIPES.items()}
    starts = [10_000 * (3 * seed + block) + 5_000 for block in range(blocks)]
    episodes = [each for start in starts for each in range(start, start + count)]
    sweep = _sweep(study, "both sensors work", parents, episodes, blocks, 0.02, 2 if smoke else 10)
    others = _others(study, parents, None if smoke else clone(data.observation, BothRecipe()), episodes, blocks)
    half = float(sweep.mean[len(sweep.mean) // 2])
    better = float(max(sweep.mean[0], sweep.mean[-1]))
    study.claim(
        "Two moderate policies compose to a better one, with equal weights.",
        expected="success at 0.5 >= better parent + 0.20",
        measured=f"{half:.3f} against {better:.3f}",
        holds=half - better >= 0.20,
    )
    study.claim(
        "The curve over the weights has one hump.",
        expected="no dip deeper than 0.05",
        measured=f"deepest {sweep.largest_dip:.3f}",
        holds=sweep.largest_dip <= 0.05,
    )
    study.claim(
        "Averaging actions is worse than the better policy.",
        expected="average of a draw from each < better parent",
        measured=f"{others['averaged actions']:.3f} against {better:.3f}",
        holds=others["averaged actions"] < better,
    )
    curves = {"both sensors work": sweep}
    if not smoke:
        broken_data = two_modality_demonstrations(key, size, bearing_noise=_BROKEN)
        broken = {"image": clone(broken_data.observation["image"], _RECIPES["image"])}
        found = _sweep(
            study, "broken camera", broken | {"point_cloud": parents["point_cloud"]}, episodes, blocks, _BROKEN, 10
        )
        curves["broken camera"] = found
        study.claim(
            "Where one policy is much worse, no weight beats the better one.",
            expected="best over all weights - better parent <= 0.03",
            measured=f"{found.mean.max():.3f} against {max(found.mean[0], found.mean[-1]):.3f}",
            holds=float(found.mean.max()) - max(found.mean[0], found.mean[-1]) <= 0.03,
        )
    _draw(study, curves, others)
    return study.report()


def _episode(draw: Draw, bearing_noise: float, key: Key[Array, ""]) -> Array:
    """Success of one reach: the same goal, readings and noise for every `draw`."""
    goal_key, image_key, cloud_key, chunk_key = jax.random.split(key, 4)
    goal = 0.4 * jax.random.normal(goal_key, (2,))
    seen = {
        "image": image_reading(image_key, goal, bearing_noise=bearing_noise),
        "point_cloud": cloud_reading(cloud_key, goal),
    }
    obstacle = Discs(*_OBSTACLE)
    return jnp.asarray(reach_success(draw(seen, chunk_key), goal, obstacle=obstacle, tolerance=0.2), goal.dtype)


def _sweep(
    study: Study,
    part: str,
    parents: dict[str, ChunkGenerator],
    episodes: list[int],
    blocks: int,
    bearing_noise: float,
    parts: int,
) -> WeightSweep:
    both = compose_modalities(parents)
    found = weight_sweep(
        lambda weights, key: _episode(reweighted(both, weights), bearing_noise, key), episodes, parts=parts
    )
    for weight, scores in zip(found.weights, found.scores, strict=True):
        _row(study, part, f"image weight {weight:.1f}", scores, blocks)
    return found


def _row(study: Study, part: str, arm: str, scores: np.ndarray, blocks: int) -> None:
    means = scores.reshape(blocks, -1).mean(axis=1)
    study.row(part=part, arm=arm, success=float(means.mean()), lowest=float(means.min()), highest=float(means.max()))


def _others(
    study: Study,
    parents: dict[str, ChunkGenerator],
    joint: ChunkGenerator | None,
    episodes: list[int],
    blocks: int,
) -> dict[str, float]:
    def averaged(seen: PyTree, key: Key[Array, ""]) -> Array:
        keys = jax.random.split(key)
        chunks = [parent(seen[name], own) for (name, parent), own in zip(parents.items(), keys, strict=True)]
        return 0.5 * (chunks[0] + chunks[1])

    draws: dict[str, Draw] = {"averaged actions": averaged} | ({} if joint is None else {"joint policy": joint})
    found = {}
    for name, draw in draws.items():
        scores = play(lambda _, key, draw=draw: _episode(draw, 0.02, key), np.ones((1, 1)), episodes)[0]
        found[name] = float(scores.mean())
        _row(study, "both sensors work", name, scores, blocks)
    return found


def _draw(study: Study, curves: dict[str, WeightSweep], others: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    colour = colours(curves)
    for name, sweep in curves.items():
        axes.plot(sweep.weights, sweep.mean, marker="o", markersize=4, color=colour[name], label=name)
    for name, value in others.items():
        axes.axhline(value, color=LIGHT["muted"], linestyle=":", linewidth=1.0)
        axes.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set(xlabel="weight of the image policy", ylabel="success", xlim=(0, 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, study.figure("weights"))
