"""Is a refreshed chunk as good as a fresh one, at a twentieth of the network calls? (arXiv:2508.05396)

A point gets around a disc on either side. Its policy is known exactly, a mixture of two routes, and so are its noised
scores: what differs between the arms is only how chunks are drawn. 900 episodes an arm, three seeds. Calls per step are
counted over the 50 control steps of the task, the first full chain included. Roughness is the mean change of velocity,
up to an episode's end.

The same arms are run with a network that was trained on draws of that policy; these rows are reported and not judged.
The second part flips a gripper: how far a few steps take a guess on the wrong one of two modes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from steersman.diffusion.cloning import Cloning, MLPRecipe
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.mixtures import Mixture, MixtureDenoiser
from steersman.diffusion.processes import DiscreteVP, Grid
from steersman.diffusion.rti_dp import RealTimeIteration
from steersman.diffusion.samplers import DDIM, DDPM, Sampler, sample
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.planar import DetourReach
from steersman.envs.planar_experts import detour_policy
from steersman.policies import ChunkPolicy, Policy
from steersman.studies.study import Report, Study
from steersman.training import train
from steersman.training.figures import LIGHT, colours, save_figure

_LIMIT = 1.5
_LABELS = {"RTI [2,1,0]": (2, 1, 0), "RTI [5,3,1,0]": (5, 3, 1, 0), "RTI [10,...,0]": (10, 8, 5, 3, 2, 1, 0)}


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("rti-dp", budget, seed, folder)
    if study.budget == "full":
        raise study.needs(
            "the public diffusion_policy checkpoints for Robomimic, PushT and BlockPush, their simulators and a GPU"
        )
    smoke = study.budget == "smoke"
    seeds = [seed] if smoke else [3 * seed, 3 * seed + 1, 3 * seed + 2]
    environment = DetourReach(num_steps=4 if smoke else 50)
    process = DiscreteVP.squared_cosine(20 if smoke else 100)
    keys = jnp.concatenate([jax.random.split(jax.random.key(each), 4 if smoke else 300) for each in seeds])
    exact = MixtureDenoiser(mixture=lambda seen: Mixture(*detour_policy(seen)), process=process, chunk_shape=(8, 2))
    found = {}
    for name, arm in _arms(exact, environment, smoke).items():
        found[name] = _measure(study, "exact", name, arm, environment, keys, len(seeds))
    _judge(study, found)
    _draw(study, found)
    if not smoke:
        trained = _trained(exact, environment, seed)
        for name, arm in _arms(trained, environment, smoke).items():
            _measure(study, "network", name, arm, environment, keys[:60], 1)
    _gripper(study, process)
    return study.report()


class _Arm(NamedTuple):
    """A policy, and what its steps cost: network calls of an episode's first step and of the others on average."""

    policy: Policy
    first: int
    other: float


class _Levels(eqx.Module):
    """Draws chunks from noise over given levels."""

    generator: ChunkGenerator
    grid: Grid

    def __call__(self, observation: PyTree, key: Key[Array, ""]) -> Array:
        return self.generator.chain(observation, key, grid=self.grid).chunk


def _arms(denoiser: Any, environment: DetourReach, smoke: bool) -> dict[str, _Arm]:
    space = environment.observation_space(environment.default_params)
    process: DiscreteVP = denoiser.process
    full = process.levels

    def drawn(sampler: Sampler, rows: int = 1) -> ChunkPolicy:
        return ChunkGenerator(denoiser, sampler).policy(rows, space)

    chain = drawn(DDPM(limit=_LIMIT))
    labels = {name: _LABELS[name] for name in list(_LABELS)[: 1 if smoke else 3]}
    arms = {"full chain": _Arm(chain, full, full)}
    if not smoke:
        plans = -(-environment.num_steps // 4)
        others = full * (plans - 1) / (environment.num_steps - 1)
        arms["4 actions open-loop"] = _Arm(drawn(DDPM(limit=_LIMIT), 4), full, others)
    arms |= {name: _Arm(RealTimeIteration(chain, given), full, len(given)) for name, given in labels.items()}
    # Few steps want to begin at the last level, so DDIM gets the spacing that does.
    trailing = DiscreteVP(process.signal, "trailing")
    for steps in (3,) if smoke else (3, 10):
        few = _Levels(ChunkGenerator(denoiser, DDIM(steps, limit=_LIMIT)), trailing.grid(steps))
        arms[f"DDIM-{steps}"] = _Arm(ChunkPolicy(few, 1, space), steps, steps)
    noise = _Levels(ChunkGenerator(denoiser, DDPM(limit=_LIMIT)), process.single_steps([2, 1, 0]))
    arms["[2,1,0] from noise"] = _Arm(ChunkPolicy(noise, 1, space), 3, 3)
    return arms


@eqx.filter_jit
def _episodes(policy: Policy, environment: DetourReach, keys: Array) -> tuple[Array, Array, Array]:
    """Positions ``[N, T + 1, 2]``, whether each step was still to be taken ``[N, T]``, and success ``[N]``."""
    params = environment.default_params
    count = keys.shape[0]
    keys = jax.vmap(lambda key: jax.random.split(key, 2 * environment.num_steps + 1))(keys)
    start, state = jax.vmap(environment.reset_env, (0, None))(keys[:, 0], params)
    # All copies keep step, so what counts steps is one number for all, and only the branch that is due is computed.
    carry = policy.init(keys[0, 0])
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, carry)
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)) if leaf.ndim else leaf, carry)

    def step(running: tuple, key: Array) -> tuple[tuple, tuple]:
        seen, state, carry, over, success = running
        action, carry = jax.vmap(policy, (0, axes, 0), (0, axes))(seen, carry, key[0])
        seen, state, _, ended, info = jax.vmap(environment.step_env, (0, 0, 0, None))(key[1], state, action, params)
        return (seen, state, carry, over | ended, success | (info["success"] & ~over)), (seen, ~over)

    no = jnp.zeros(count, bool)
    steps = jnp.moveaxis(keys[:, 1:].reshape(count, environment.num_steps, 2), 0, 2)
    running, (path, active) = jax.lax.scan(step, (start, state, carry, no, no), steps)
    return jnp.moveaxis(jnp.concatenate([start[None], path]), 0, 1), active.T, running[4]


def _measure(
    study: Study, part: str, name: str, arm: _Arm, environment: DetourReach, keys: Array, seeds: int
) -> dict[str, Any]:
    path, active, success = (np.asarray(each) for each in _episodes(arm.policy, environment, keys))
    turn = np.linalg.norm(np.diff(path, 2, axis=1), axis=-1)
    horizon = environment.num_steps
    each = success.reshape(seeds, -1).mean(axis=1)
    length = active.sum(axis=1)
    numbers = {
        "success": float(success.mean()),
        "calls_per_step": (arm.first + (horizon - 1) * arm.other) / horizon,
        "calls_until_end": float(np.mean((arm.first + (length - 1) * arm.other) / length)),
        "roughness": float(turn[active[:, 1:]].mean()),
    }
    low, high = float(each.min()), float(each.max())
    study.row(part=part, arm=name, lowest_seed=low, highest_seed=high, value=None, **numbers)
    return {**numbers, "path": path, "active": active, "won": success}


def _judge(study: Study, found: dict[str, dict[str, Any]]) -> None:
    chain, warm, noise = (found[name] for name in ("full chain", "RTI [2,1,0]", "[2,1,0] from noise"))
    study.claim(
        "Three steps from the last chunk succeed as often as the full chain at every step.",
        expected="success of RTI [2,1,0] at least that of the full chain less 0.02, and at least 0.95",
        measured=f"{warm['success']:.3f} against {chain['success']:.3f}",
        holds=warm["success"] >= chain["success"] - 0.02 and warm["success"] >= 0.95,
    )
    study.claim(
        "They cost a twentieth of the network calls.",
        expected="at most 6 calls per control step, the first full chain included (full chain: 100)",
        measured=f"{warm['calls_per_step']:.2f}",
        holds=warm["calls_per_step"] <= 6,
    )
    study.claim(
        "It is the guess that does it: the same three steps from noise fail.",
        expected="success of [2,1,0] from Gaussian noise at most 0.1",
        measured=f"{noise['success']:.3f}",
        holds=noise["success"] <= 0.1,
    )
    study.claim(
        "Successive chunks agree, so that motion is smoother.",
        expected="roughness of RTI [2,1,0] below that of the full chain",
        measured=f"{warm['roughness']:.4f} against {chain['roughness']:.4f}",
        holds=warm["roughness"] < chain["roughness"],
    )


def _trained(exact: MixtureDenoiser, environment: DetourReach, seed: int) -> Any:
    """A network trained on draws of the policy, at positions on its way and around them."""
    rows, dimensions = exact.chunk_shape
    keys = jax.random.split(jax.random.key(1_000 + seed), 4)

    class Expert(eqx.Module):
        def __call__(self, seen: Array, key: Key[Array, ""]) -> Array:
            return exact.mixture(seen).sample(key)[0].reshape(rows, dimensions)

    expert = ChunkPolicy(Expert(), 1, environment.observation_space(environment.default_params))
    path, active, _ = _episodes(expert, environment, jax.random.split(keys[0], 600))
    visited = path[:, :-1][active]
    visited = visited + 0.05 * jax.random.normal(keys[1], visited.shape)
    chunk = jax.jit(jax.vmap(Expert()))(visited, jax.random.split(keys[2], len(visited)))
    cloning = Cloning(recipe=MLPRecipe(exact.process, hidden=(256, 256, 256)), batch_size=64)
    trained = train(cloning, ChunkPairs(visited, chunk), iterations=6_000, seeds=[seed], progress=False)
    policy: Any = trained.policy()
    return policy.generator.denoiser


# From the value on one mode to the value on the other: mode, guess, local standard deviation.
_GRIPPERS = {"untreated": (1.0, 1.0, 0.03), "scaled": (0.1, 0.1, 0.003), "clipped": (1.0, 0.1, 0.03)}
_LISTS = {
    "[2,1,0]": (2, 1, 0),
    "[7,5,3,1,0]": (7, 5, 3, 1, 0),
    "[22,20,...,2,1,0]": (22, 20, 18, 16, 14, 12, 10, 8, 5, 3, 2, 1, 0),
}


def _gripper(study: Study, process: DiscreteVP) -> None:
    """Mean sweeps from a positive guess where the policy wants the negative value with chance 0.99."""

    @eqx.filter_jit
    def swept(grid: Grid, mode: Array, guess: Array, std: Array) -> Array:
        mixture = Mixture(jnp.log(jnp.asarray([0.99, 0.01])), jnp.stack([-mode, mode])[:, None], std**2)
        denoiser = MixtureDenoiser(mixture=lambda _: mixture, process=process, chunk_shape=(1, 1))
        noises = jnp.zeros((grid.steps, 1, 1))
        return sample(denoiser, DDPM(), mixture, None, start=guess[None, None], noises=noises, grid=grid).chunk[0, 0]

    blank = dict.fromkeys(("lowest_seed", "highest_seed"))
    rest = dict.fromkeys(("success", "calls_per_step", "calls_until_end", "roughness"))
    given = jnp.asarray(list(_GRIPPERS.values())).T
    for name, labels in _LISTS.items():
        if labels[0] < (5 if study.budget == "smoke" else process.levels):
            values = jax.vmap(swept, (None, 0, 0, 0))(process.single_steps(labels), *given)
            for treatment, value in zip(_GRIPPERS, np.asarray(values), strict=True):
                study.row(part=f"gripper, {treatment}", arm=name, **blank, value=float(value), **rest)


def _draw(study: Study, found: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    colour = colours(found)
    figure = Figure(figsize=(8.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, numbers in found.items():
        place = numbers["calls_per_step"], numbers["success"]
        axes.plot(*place, "o", color=colour[name], markersize=10, label=name, linestyle="none")
    axes.set(xscale="log", xlim=(2, 150), ylim=(-0.05, 1.08), xlabel="network calls per control step", ylabel="success")
    axes.grid(color=LIGHT["grid"], linewidth=0.8)
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(figure, study.figure("calls"))

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("full chain", "RTI [2,1,0]"), strict=True):
        numbers = found[name]
        angle = np.linspace(0.0, 2.0 * np.pi, 100)
        axes.fill(0.4 * np.cos(angle), 0.4 * np.sin(angle), color=LIGHT["grid"])
        for path, active, won in list(zip(numbers["path"], numbers["active"], numbers["won"], strict=True))[:12]:
            way = path[: active.sum() + 1]
            axes.plot(way[:, 0], way[:, 1], color=colour[name], alpha=0.6, linewidth=1.2)
            if not won:
                axes.plot(way[-1, 0], way[-1, 1], "x", color=LIGHT["ink"], markersize=7)
        axes.plot(1.0, 0.0, "*", color=LIGHT["ink"], markersize=11)
        axes.set(title=name, aspect="equal", xlim=(-1.1, 1.2), ylim=(-1.0, 1.0), xlabel="x")
    save_figure(figure, study.figure("paths"))
