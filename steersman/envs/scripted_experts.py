"""Scripted experts by name, and the episodes that they demonstrate."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from steersman.envs.demonstrations import Demonstrations, Episode
from steersman.envs.environment import Problem
from steersman.envs.planar import DetourReach, DriftingGoal, Number, ObstacleGate
from steersman.envs.planar_experts import detour_route, drifting_route, gate_actions
from steersman.errors import InputError, InputTypeError, require_count, require_number, unknown_name

#: A function of a number of episodes, a seed and settings by name; or where one is, so that simulators load on use.
Source = Callable[..., Demonstrations] | str

#: Steps of the planar tasks have no unit; formats that need a frame rate get this one.
PLANAR_FPS = 10

_SOURCES: dict[str, Source] = {
    "detour-reach": "steersman.envs.scripted_experts:detour_reach",
    "drifting-goal": "steersman.envs.scripted_experts:drifting_goal",
    "obstacle-gate": "steersman.envs.scripted_experts:obstacle_gate",
    "pick-and-place": "steersman.envs.tabletop:demonstrations",
    "push-t": "steersman.envs.pusht:demonstrations",
}


def demonstrated_tasks() -> list[str]:
    """Every name that :func:`demonstrate` answers to."""
    return sorted(_SOURCES)


def register_expert(name: str, source: Source) -> None:
    """Makes the demonstrations of an expert available under a name.

    Args:
        name: what :func:`demonstrate` shall answer to.
        source: ``source(episodes, seed, **settings)`` returns :class:`Demonstrations`; or where such a function is,
            ``"package.module:function"``.

    Raises:
        InputError: the name is taken or empty, or the text names no function.
        InputTypeError: the source cannot be called.
    """
    if not name or name in _SOURCES:
        raise InputError(f"name is {name!r}, but it must be new: registered are {', '.join(demonstrated_tasks())}.")
    if isinstance(source, str):
        if source.count(":") != 1:
            raise InputError(f"source is {source!r}, but it must be 'package.module:function'.")
    elif not callable(source):
        raise InputTypeError(f"source is a {type(source).__name__}, but it must be a function or where one is.")
    _SOURCES[name] = source


def demonstrate(task: str, episodes: int, seed: int = 0, **settings: Any) -> Demonstrations:
    """Episodes of a task's scripted expert; the same ones for the same arguments.

    Args:
        task: see :func:`demonstrated_tasks`.
        episodes: number of them.
        seed: of everything random.
        settings: arguments of the task's own function.

    Raises:
        InputError: there is no such task or setting, or a library is missing.
    """
    if task not in _SOURCES:
        raise unknown_name("task", task, _SOURCES)
    require_count("episodes", episodes)
    require_count("seed", seed, minimum=0)
    source = _SOURCES[task]
    if isinstance(source, str):
        module, _, name = source.partition(":")
        source = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(source).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [name for name in parameters if name not in ("episodes", "seed")]
        for name in settings:
            if name not in known:
                raise unknown_name(f"setting of {task}", name, known)
    return source(episodes, seed, **settings)


# ---- planar tasks


@eqx.filter_jit
def _play(
    environment: Any,
    params: PyTree,
    expert: Callable[..., Array],
    memory: PyTree,
    noise: Array,
    key: Key[Array, " E"],
) -> tuple:
    """All episodes in one program; what follows an end is computed and marked as not running."""
    space = environment.action_space(params)
    low, high = jnp.asarray(space.low), jnp.asarray(space.high)

    def episode(memory: PyTree, key: Array) -> tuple:
        start_key, key = jax.random.split(key)
        observation, state = environment.reset_env(start_key, params)

        def step(carry: tuple, key: Array) -> tuple[tuple, tuple]:
            observation, state, running = carry
            noise_key, step_key = jax.random.split(key)
            action = expert(observation, memory, params)
            action = action + noise * jax.random.normal(noise_key, action.shape, action.dtype)
            action = jnp.clip(action, low, high)
            seen, following, reward, terminated, info = environment.step_env(step_key, state, action, params)
            truncated = environment.is_truncated(following, params) & ~terminated
            row = (observation, action, seen, reward, terminated, truncated, info, running)
            return (seen, following, running & ~terminated & ~truncated), row

        keys = jax.random.split(key, environment.num_steps)
        return jax.lax.scan(step, (observation, state, jnp.asarray(True)), keys)[1]

    return jax.vmap(episode)(memory, key)


def _record(
    environment: Any,
    expert: Callable[..., Array],
    success: Callable[[dict[str, np.ndarray]], np.ndarray],
    task: str,
    episodes: int,
    seed: int,
    noise: Number,
    up: Number,
) -> Demonstrations:
    """Plays an expert that is told a side, 1 or -1, for each episode."""
    require_count("episodes", episodes)
    require_number("noise", noise, at_least=0.0)
    require_number("up", up, at_least=0.0, at_most=1.0)
    side_key, key = jax.random.split(jax.random.key(seed))
    side = jnp.where(jax.random.bernoulli(side_key, up, (episodes,)), 1.0, -1.0)
    problem = Problem(environment)
    played = _play(
        environment, problem.params, expert, side, jnp.asarray(noise, side.dtype), jax.random.split(key, episodes)
    )
    observation, action, seen, reward, terminated, truncated, info, running = jax.tree.map(np.asarray, played)
    succeeded = success(info)
    found = []
    for number, length in enumerate(running.sum(axis=1)):
        found.append(
            Episode(
                np.concatenate([observation[number, :length], seen[number, length - 1 : length]]),
                action[number, :length],
                reward[number, :length],
                terminated[number, :length],
                truncated[number, :length],
                succeeded[number, :length],
                task,
            )
        )
    return Demonstrations(
        tuple(found),
        fps=PLANAR_FPS,
        observation_space=problem.observation_space,
        action_space=problem.action_space,
    )


def _detour_expert(observation: Array, side: Array, params: Any) -> Array:
    return detour_route(observation, side, 1, goal=params.goal)[0]


def _drifting_expert(observation: Array, side: Array, params: Any) -> Array:
    del params
    return drifting_route(observation[:2], observation[2:], side, 1)[0]


def _gate_expert(observation: Array, side: Array, params: Any) -> Array:
    return gate_actions(observation, side, 1, step_length=params.step_length)[0]


def detour_reach(
    episodes: int, seed: int, *, noise: Number = 0.02, up: Number = 0.5, num_steps: int = 50
) -> Demonstrations:
    """Demonstrations of :class:`~steersman.envs.DetourReach`.

    Args:
        episodes: number of them.
        seed: of everything random.
        noise: standard deviation of what is added to every number of an action.
        up: chance of going above the disc.
        num_steps: steps after which an episode is cut.
    """
    task = "reach the goal around the disc"
    environment = DetourReach(num_steps=num_steps)
    return _record(environment, _detour_expert, lambda info: info["success"], task, episodes, seed, noise, up)


def drifting_goal(
    episodes: int, seed: int, *, noise: Number = 0.02, up: Number = 0.5, speed: float = 0.02
) -> Demonstrations:
    """Demonstrations of :class:`~steersman.envs.DriftingGoal`.

    A step succeeds that ends at the goal, in an episode that never entered the disc.

    Args:
        episodes: number of them.
        seed: of everything random.
        noise: standard deviation of what is added to every number of an action.
        up: chance of going above the disc.
        speed: of the goal, per step.
    """
    task = "get around the disc and hold the moving goal"

    def success(info: dict[str, np.ndarray]) -> np.ndarray:
        return info["tracking"] & ~info["collision"]

    return _record(DriftingGoal(speed=speed), _drifting_expert, success, task, episodes, seed, noise, up)


def obstacle_gate(
    episodes: int, seed: int, *, noise: Number = 0.05, up: Number = 0.5, num_steps: int = 36
) -> Demonstrations:
    """Demonstrations of :class:`~steersman.envs.ObstacleGate`, one action after the other.

    Args:
        episodes: number of them.
        seed: of everything random.
        noise: standard deviation of what is added to every number of an action.
        up: chance of going above the discs.
        num_steps: steps after which an episode is cut.
    """
    task = "pass the two discs and cross the line in the gate"
    environment = ObstacleGate(num_steps=num_steps)
    return _record(environment, _gate_expert, lambda info: info["success"], task, episodes, seed, noise, up)
