"""Does a flow policy, trained by its losses alone, find both modes of an optimal policy? (arXiv:2507.21053)

Small A, a hidden target: a policy that cannot know where the target is does best by trying both places. The best
Gaussian succeeds in 0.639 of the episodes, whatever trains it; two modes of one half each in 0.999. Each iteration's
1024 actions are draws from one policy at one observation, so their two hit frequencies give its exact success and
value. An arm's score is its mean over the last ten iterations. All arms have the same batches, epochs, minibatches and
learning rate, and networks of four layers of 32:

- FPO, with 8 pairs an action and with 1, and with flow matching's own loss in place of the noise's.
- Gaussian PPO, with clips of 0.05, 0.1 and 0.2 from initial deviations of 0.3, 0.7 and 1.
- denoising MDP: every step of the sampler gets Gaussian noise of one deviation, 0.05, 0.1 or 0.2, and a likelihood
  ratio of its own, in which the deviation is the one that was drawn with. One seed each.

Small B, a grid between two walls: from its middle row both directions are optimal. FPO and Gaussian PPO, two seeds;
success and the entropy of the vertical move in the middle row are reported, and nothing is judged by them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from steersman.diffusion.cloning import MLPRecipe
from steersman.diffusion.denoising_chain import DenoisingChains
from steersman.diffusion.flow_policy import FlowArchitecture
from steersman.diffusion.fpo import FPO, LimitedRatio
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.processes import RectifiedFlow
from steersman.diffusion.samplers import DDIM
from steersman.envs import Problem
from steersman.envs.chunked import ChunkedEnvironment
from steersman.envs.planar import HiddenTarget, TwoWalls, best_gaussian, hidden_target_success, hidden_target_value
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.surrogates import Clip
from steersman.studies.study import Report, Study
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.figures import save_figure
from steersman.training.statistics import curve_interval

_DISCOUNT = 0.9
_CLIPS, _DEVIATIONS, _NOISES = (0.05, 0.1, 0.2), (0.3, 0.7, 1.0), (0.05, 0.1, 0.2)
_MIDDLE = 0.04
_CHAINS: dict[str, Any] = {"noise_limit": None, "average": False, "log_prob_bounds": None}


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("fpo", budget, seed, folder)
    if study.budget == "full":
        raise study.needs("a GPU and ten tasks of MuJoCo Playground, 60 million steps each")
    smoke = study.budget == "smoke"
    seeds = [seed + i for i in range(1 if smoke else 3)]
    shared: dict[str, Any] = {
        "num_envs": 16 if smoke else 512,
        "num_steps": 2,
        "gamma": _DISCOUNT,
        "lam": 0.95,
        "hidden": (8,) if smoke else (32,) * 4,
        "activation": "swish",
        "epochs": 1 if smoke else 8,
        "minibatches": 2 if smoke else 8,
        "learning_rate": 3e-4,
        "value_coefficient": 0.25,
        "max_gradient_norm": None,
        "reward_scale": 1.0,
        "normalize_observations": False,
    }
    _hidden_target(study, shared, seeds, iterations=2 if smoke else 60)
    if not smoke:
        _two_walls(study, shared | {"num_envs": 128, "num_steps": 8, "gamma": 0.99}, seeds[:2], iterations=80)
    return study.report()


# ---- small A


def _curves(
    algorithm: FirstOrder, problem: Problem, seeds: list[int], iterations: int, settings: dict[str, Any]
) -> Any:
    """Sent actions ``[settings, seeds, iterations, rows, D]`` and what was observed before them, as one program."""

    def one(values: dict[str, Array], key: Key[Array, ""]) -> Any:
        changed = algorithm
        for name, value in values.items():
            places = _PLACES[name]
            changed = eqx.tree_at(places, changed, (value,) * len(places(changed)))
        init_key, rollout_key = jax.random.split(key)
        state = changed.init(problem, init_key)
        rollout = changed.collector.init(problem, changed.behaviour(state), rollout_key)

        def iteration(running: Any, _: None) -> Any:
            state, rollout = running
            experience, rollout = changed.collector.collect(problem, changed.behaviour(state), rollout)[:2]
            state = changed.update(state, experience)[0]
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), experience)
            return (state, rollout), (flat.action, flat.observation, flat.reward, flat.done)

        return jax.lax.scan(iteration, (state, rollout), None, length=iterations)[1]

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    values = {name: jnp.asarray(value) for name, value in settings.items()}
    found = eqx.filter_jit(jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None), axis_size=_size(values)))(
        values, keys
    )
    return jax.tree.map(np.asarray, found)


def _size(values: dict[str, Any]) -> int:
    return next((len(value) for value in values.values()), 1)


_PLACES: dict[str, Any] = {
    "clip": lambda a: (a.surrogate.epsilon,),
    "log_std": lambda a: (a.initial_log_std,),
    "noise": lambda a: (a.architecture.exploration_std, a.architecture.likelihood_std),
}


def _hidden_target(study: Study, shared: dict[str, Any], seeds: list[int], iterations: int) -> None:
    smoke = study.budget == "smoke"
    problem = Problem(HiddenTarget())
    flow = FlowArchitecture(MLPRecipe(RectifiedFlow(), "flow", (8,))) if smoke else FlowArchitecture()
    few = [seeds[0]]
    fresh = flow.recipe.make(jnp.ones(1), (1, 1), jax.random.key(seeds[0]))
    chain = DenoisingChains(ChunkGenerator(fresh, DDIM(10, limit=None)), **_CHAINS)
    clips, deviations = (grid.ravel() for grid in np.meshgrid(_CLIPS, _DEVIATIONS, indexing="ij"))
    arms: dict[str, tuple[FirstOrder, list[int], dict[str, Any]]] = {
        "FPO": (FPO(architecture=flow, **shared), seeds, {}),
        "FPO, 1 pair": (FPO(architecture=FlowArchitecture(pairs=1), **shared), seeds, {}),
        "FPO, flow loss": (FPO(architecture=FlowArchitecture(supervise="flow"), **shared), few, {}),
        "Gaussian PPO": (
            PPO(surrogate=Clip(0.1), **shared), seeds, {"clip": clips, "log_std": np.log(deviations)}
        ),
        "denoising MDP": (
            PPO(architecture=chain, surrogate=LimitedRatio(Clip(0.05)), **shared), few, {"noise": np.asarray(_NOISES)}
        ),
    }  # fmt: skip
    if smoke:
        arms = {name: arms[name] for name in ("FPO", "Gaussian PPO")}
    success, value, final = {}, {}, {}
    for name, (algorithm, own, settings) in arms.items():
        where = Problem(ChunkedEnvironment(problem.environment, 1)) if name == "denoising MDP" else problem
        actions = _curves(algorithm, where, own, iterations, settings)[0].reshape(*_rows(settings, own, iterations), -1)
        hits = np.stack([(np.abs(actions - target) < 0.2).mean(axis=-1) for target in (1.0, -1.0)], axis=-1)
        success[name] = np.asarray(hidden_target_success(hits))
        value[name] = np.asarray(hidden_target_value(hits, discount=_DISCOUNT))
        final[name] = actions[0, 0, -1]
        for i in range(hits.shape[0]):
            label = ", ".join(f"{key} {np.exp(v[i]) if key == 'log_std' else v[i]:g}" for key, v in settings.items())
            study.row(
                task="hidden target",
                arm=name,
                setting=label.replace("log_std", "initial deviation"),
                seeds=len(own),
                success=float(success[name][i, :, -10:].mean()),
                worst_seed=float(success[name][i, :, -10:].mean(axis=-1).min()),
                discounted=float(value[name][i, :, -10:].mean()),
                at_iteration_20=float(success[name][i, :, min(20, iterations) - 1].mean()),
                modes_hit="/".join(f"{share:.2f}" for share in hits[i, 0, -10:].mean(axis=0)),
                vertical_entropy="",
            )
    ceiling = best_gaussian()
    _draw(study, success, final, ceiling.score)
    reached = success["FPO"][0, :, -10:].mean(axis=-1)
    earned = value["FPO"][0, :, -10:].mean(axis=-1)
    study.claim(
        "A flow policy trained by its losses alone finds both modes.",
        expected="success at least 0.95 and discounted value at least 0.85 in each of 3 seeds",
        measured=f"success {_numbers(reached)}; value {_numbers(earned)}",
        holds=reached.min() >= 0.95 and earned.min() >= 0.85,
    )
    gaussian = success["Gaussian PPO"][..., -10:].mean(axis=-1)
    study.claim(
        "No Gaussian policy does, at any clip or initial deviation.",
        expected=f"every run at most 0.66 (exact ceiling {ceiling.score:.3f} and noise)",
        measured=f"largest {gaussian.max():.3f} of {gaussian.size} runs",
        holds=gaussian.max() <= 0.66,
    )
    if smoke:
        return
    one, eight = success["FPO, 1 pair"][0], success["FPO"][0]
    study.claim(
        "One pair an action suffices to learn, but learns more slowly.",
        expected="a final success above the Gaussian ceiling, and a smaller mean over the whole run than with 8 pairs",
        measured=f"final {one[:, -10:].mean():.3f}; mean over the run {one.mean():.3f} against {eight.mean():.3f}",
        holds=one[:, -10:].mean() > ceiling.score and one.mean() < eight.mean(),
    )


def _rows(settings: dict[str, Any], seeds: list[int], iterations: int) -> tuple[int, int, int]:
    return _size(settings), len(seeds), iterations


def _numbers(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _draw(study: Study, success: dict[str, np.ndarray], final: dict[str, np.ndarray], ceiling: float) -> None:
    """Learning curves, each arm at its best setting, and the actions of the last iteration."""
    from matplotlib.figure import Figure

    curves = {}
    for name, scores in success.items():
        best = scores[int(np.argmax(scores[..., -10:].mean(axis=(1, 2))))]
        curves[name] = (np.arange(best.shape[1]), curve_interval(best, np.mean))
    figure = draw_curves(curves, x_label="iteration", y_label="exact success", label="legend")
    figure.axes[0].axhline(ceiling, color="0.4", linestyle=":", linewidth=1.0)
    save_figure(figure, study.figure("success"))
    figure = Figure(figsize=(6.0, 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("FPO", "Gaussian PPO"), strict=True):
        axes.hist(np.clip(final[name], -2.5, 2.5), bins=np.linspace(-2.5, 2.5, 51), color="0.35")
        for target in (-1.0, 1.0):
            axes.axvspan(target - 0.2, target + 0.2, color="tab:orange", alpha=0.3, linewidth=0.0)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("action")
    figure.axes[0].set_ylabel("actions of the last batch")
    save_figure(figure, study.figure("actions"))


# ---- small B


def _two_walls(study: Study, shared: dict[str, Any], seeds: list[int], iterations: int) -> None:
    problem = Problem(TwoWalls())
    arms = {
        "FPO": FPO(architecture=FlowArchitecture(squash=False), **shared),
        "Gaussian PPO": PPO(surrogate=Clip(0.05), **shared),
    }
    for name, algorithm in arms.items():
        actions, observed, reward, done = (part[0] for part in _curves(algorithm, problem, seeds, iterations, {}))
        late = slice(-10, None)
        ended, paid = done[:, late].sum(), (reward[:, late] > 0).sum()
        entropies = []
        for own, seen in zip(actions[:, late], observed[:, late], strict=True):
            moves = np.round(np.clip(own[np.abs(seen[..., 1]) < _MIDDLE], -1.0, 1.0))[:, 1]
            shares = np.asarray([(moves == move).mean() for move in (-1.0, 0.0, 1.0)])
            entropies.append(float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum()))
        study.row(
            task="two walls",
            arm=name,
            setting="",
            seeds=len(seeds),
            success=float(paid / max(ended, 1)),
            worst_seed="",
            discounted="",
            at_iteration_20="",
            modes_hit="",
            vertical_entropy=float(np.mean(entropies)),
        )
