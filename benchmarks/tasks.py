"""The manipulation and planar tasks: what their scripted experts achieve, pictures of them, and a policy cloned.

    .venv/bin/python benchmarks/tasks.py figures [--task push-t]
    .venv/bin/python benchmarks/tasks.py experts [--episodes 100]
    .venv/bin/python benchmarks/tasks.py clone [--task push-t] [--demonstrations 100] [--updates 6000]

Figures go to docs/assets; the numbers are those of docs/guides/tasks.md. Drawing pick and place needs
OpenGL: on a machine without a screen, MUJOCO_GL=egl.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steersman.diffusion import DDIM, Cloning, DiscreteVP, MLPRecipe, Scaling
from steersman.envs import as_problem, planar_experts, pusht, rendering, tabletop
from steersman.envs.expert_recording import Played, play_expert
from steersman.policies import Policy
from steersman.training import evaluate, evaluation, train
from steersman.training.averaging import MovingAverage
from steersman.training.schedules import WarmupCosine

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
MAX_BYTES = 280_000


class Guided(Policy):
    """A scripted expert of a planar task, on a side that is drawn at an episode's start."""

    route: Callable[..., jax.Array]

    def init(self, key: jax.Array) -> jax.Array:
        return jax.random.rademacher(key, (), jnp.float32)

    def __call__(self, observation: Any, carry: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.route(observation, carry, key), carry


def to_a_wall(observation: jax.Array, side: jax.Array, key: jax.Array) -> jax.Array:
    """Straight to the nearer wall; from the middle row, to the drawn one."""
    del key
    return jnp.stack([jnp.zeros(()), jnp.where(observation[1] == 0, side, jnp.sign(observation[1]))])


#: What acts in each planar task. The one of the hidden target is optimal among policies without memory.
PLANAR: dict[str, Callable[..., jax.Array]] = {
    "detour-reach": lambda seen, side, key: planar_experts.detour_route(seen, side, 1)[0],
    "drifting-goal": lambda seen, side, key: planar_experts.drifting_route(seen[:2], seen[2:], side, 1)[0],
    "obstacle-gate": lambda seen, side, key: planar_experts.gate_actions(seen, side, 1)[0],
    "hidden-target": lambda seen, side, key: jax.random.rademacher(key, (1,), jnp.float32),
    "two-walls": to_a_wall,
}

SIMULATED = ("pick-and-place", "push-t")

#: Episodes that are drawn: the way below, where it takes several tries, where the wall is far.
NUMBERS = {"detour-reach": 2, "hidden-target": 6, "two-walls": 11}


def make(task: str, obs_type: str = "state", **options: Any) -> Any:
    """The Gymnasium environment of a simulated task."""
    return (tabletop.make_pick_and_place if task == "pick-and-place" else pusht.make_push_t)(obs_type, **options)


def play(task: str, environment: Any, number: int, draw: bool = False) -> Played:
    """One episode of a simulated task's expert."""
    random = np.random.default_rng(number)
    if task == "push-t":
        return play_expert(environment, pusht.PushTExpert(random), pusht.push_t_state, seed=number, draw=draw)
    expert = tabletop.PickAndPlaceExpert(int(random.integers(2)))
    return play_expert(environment, expert, lambda inner: inner.state, seed=number, draw=draw)


def render_episode(task: str, number: int) -> bytes:
    """One episode of a task's expert as an animated GIF."""
    if task in PLANAR:
        problem = as_problem(task)
        episode = evaluation.record_episode(Guided(PLANAR[task]), problem, seed=number, max_steps=120)
        arrays = (episode.states, episode.observations, episode.actions, episode.rewards)
        return rendering.render_episode(problem, *arrays, max_bytes=MAX_BYTES)
    sizes = {"visualization_width": 320, "visualization_height": 320 if task == "push-t" else 240}
    with contextlib.closing(make(task, render_mode="rgb_array", **sizes)) as environment:
        frames = play(task, environment, number, draw=True).frames
        fps = environment.metadata["render_fps"]
        return rendering.animate_frames(np.stack(frames), fps, max_bytes=MAX_BYTES)


def figures(tasks: list[str]) -> None:
    """Writes a picture of each task."""
    for task in tasks:
        path = ASSETS / f"task-{task}.gif"
        path.write_bytes(render_episode(task, NUMBERS.get(task, 1)))
        print(f"{path.relative_to(ASSETS.parent.parent)}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


def experts(tasks: list[str], episodes: int) -> None:
    """Prints what the experts achieve."""
    for task in tasks:
        began = time.perf_counter()
        if task in PLANAR:
            scores = evaluate(Guided(PLANAR[task]), task, episodes=1000, seed=1)
            print(
                f"{task}: mean return {scores.mean:.3f}, {scores.lengths.mean():.1f} steps, 1000 episodes", flush=True
            )
            continue
        with contextlib.closing(make(task)) as environment:
            # Other episodes than those that the experts were written on.
            played = [play(task, environment, 1000 + number) for number in range(episodes)]
        successes = [bool(one.episode.success[-1]) for one in played]
        lengths = [len(one.episode) for one in played]
        seconds = (time.perf_counter() - began) / episodes
        line = f"{task}: {sum(successes)} of {episodes} succeed, {np.mean(lengths):.1f} steps (at most {max(lengths)})"
        if task == "push-t":
            line += f", coverage {np.mean([one.infos[-1]['coverage'] for one in played]):.3f}"
        print(f"{line}, {seconds:.2f} s an episode", flush=True)


def clone(task: str, demonstrations: int, updates: int, batch: int, prediction: str, episodes: int, seed: int) -> None:
    """Clones a diffusion policy from the expert's episodes and counts its successes."""
    began = time.perf_counter()
    source = {"pick-and-place": tabletop.demonstrations, "push-t": pusht.demonstrations}[task]
    shown = source(demonstrations, seed, obs_type="state", noise={"pick-and-place": 0.003, "push-t": 0.0}[task])
    print(f"{len(shown)} demonstrations, {shown.num_steps} steps, {time.perf_counter() - began:.0f} s", flush=True)
    data = shown.chunks(horizon=16, observation_horizon=2)
    seen = Scaling.fit(data.observations, name="observations")
    # What hardly changes, as a cube's tilt, is not blown up to the size of what does.
    seen = Scaling(seen.offset, jnp.maximum(seen.scale, 0.05))
    cloning = Cloning(
        MLPRecipe(DiscreteVP.squared_cosine(100), prediction, hidden=(512, 512, 512), time_size=32),
        sampler=DDIM(steps=10),
        learning_rate=WarmupCosine(1e-3, updates, min(500, updates // 2)),
        batch_size=batch,
        average=MovingAverage(0.999),
        action_scaling=Scaling.fit(data.actions, name="actions"),
        observation_scaling=seen,
        action_horizon=8,
    )
    began = time.perf_counter()
    trained = train(cloning, data, iterations=updates, seeds=[seed])
    print(f"{updates} updates, {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    judged = evaluate(trained.policy(), task, episodes=episodes, seed=seed + 1)
    # Both tasks end early with a success, and only then.
    done = int(np.sum(judged.lengths < {"pick-and-place": 100, "push-t": 300}[task]))
    seconds = time.perf_counter() - began
    print(f"{done} of {episodes} succeed, {judged.lengths.mean():.1f} steps, {seconds:.0f} s", flush=True)


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("figures", "experts", "clone"))
    parser.add_argument("--task", choices=(*SIMULATED, *PLANAR))
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--demonstrations", type=int, default=100)
    parser.add_argument("--updates", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--prediction", choices=("sample", "noise"), default="sample")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tasks = [given.task] if given.task else [*SIMULATED, *PLANAR]
    if given.what == "figures":
        figures(tasks)
    elif given.what == "experts":
        experts(tasks, given.episodes or 100)
    else:
        task = given.task or "pick-and-place"
        if task not in SIMULATED:
            parser.error(f"--task is {task}, but it must be one of {', '.join(SIMULATED)} for clone.")
        clone(
            task,
            given.demonstrations,
            given.updates,
            given.batch,
            given.prediction,
            given.episodes or 50,
            given.seed,
        )


if __name__ == "__main__":
    main()
