"""Playing scripted experts in Gymnasium environments, and recording what they show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from jaxtyping import Float

from steersman.envs.demonstrations import Demonstrations, Episode
from steersman.errors import RunError, require_count

#: Acts for one episode: from the environment's state to an action.
Expert = Callable[[Any], Any]


class Played(NamedTuple):
    """An episode that an expert has played.

    Attributes:
        episode: what was seen and done, with what was seen after the last action.
        frames: pictures ``[height, width, 3]`` before each action and after the last; none unless asked for.
        infos: what the environment told beside each step.
    """

    episode: Episode
    frames: list[np.ndarray]
    infos: list[dict[str, Any]]


def play_expert(
    environment: gymnasium.Env,
    expert: Expert,
    read_state: Callable[[Any], Any],
    *,
    seed: int,
    disturb: Callable[[np.ndarray], np.ndarray] | None = None,
    draw: bool = False,
    task: str = "",
) -> Played:
    """Plays one episode to its end.

    Args:
        environment: ends or truncates its episodes, and says ``is_success`` in ``info``.
        expert: what acts; a fresh one.
        read_state: gives what the expert is called with, from the environment's innermost part.
        seed: of the environment's reset.
        disturb: changes each action before it is played and recorded.
        draw: keep pictures; the environment must have been made with ``render_mode="rgb_array"``.
        task: what the episode shows, in words.
    """
    require_count("seed", seed, 0)
    observation, _ = environment.reset(seed=seed)
    space: Any = environment.action_space
    seen, actions, rewards, ends, infos = [observation], [], [], [], []
    frames = [_picture(environment)] if draw else []
    over = False
    while not over:
        action = np.asarray(expert(read_state(environment.unwrapped)), np.float64)
        if disturb is not None:
            action = disturb(action)
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        observation, reward, terminated, truncated, info = environment.step(action)
        over = bool(terminated or truncated)
        seen.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        ends.append((bool(terminated), bool(truncated), bool(info["is_success"])))
        infos.append(info)
        if draw:
            frames.append(_picture(environment))
    terminated, truncated, success = np.asarray(ends).T
    stacked = jax.tree.map(lambda *leaves: _single(np.stack(leaves)), *seen)
    reward = np.asarray(rewards, np.float32)
    return Played(Episode(stacked, np.stack(actions), reward, terminated, truncated, success, task), frames, infos)


def record_expert(
    environment: gymnasium.Env,
    make_expert: Callable[[np.random.Generator], Expert],
    read_state: Callable[[Any], Any],
    episodes: int,
    seed: int,
    *,
    noise: Float[np.ndarray, " D"] | float = 0.0,
    only_successes: bool = True,
    task: str = "",
) -> Demonstrations:
    """Records episodes, each from a start of its own. The environment is closed at the end.

    Args:
        environment: see :func:`play_expert`.
        make_expert: gives a fresh expert for an episode, from the episode's randomness.
        read_state: see :func:`play_expert`.
        episodes: how many are recorded.
        seed: what all randomness comes from. The starts are others than those of an evaluation with this seed.
        noise: standard deviation of what is added to each number of an action that is played.
        only_successes: leave out episodes without success and play others in their place.
        task: what the episodes show, in words.

    Raises:
        RunError: fewer than one episode in ten succeeds.
    """
    kept: list[Episode] = []
    attempts = 0
    try:
        require_count("episodes", episodes)
        require_count("seed", seed, 0)
        while len(kept) < episodes:
            if attempts >= 10 * episodes:
                raise RunError(
                    f"The expert succeeded in {len(kept)} of {attempts} episodes, so {episodes} cannot be recorded; "
                    "lower the noise, or keep failures with only_successes=False."
                )
            random = np.random.default_rng((seed, attempts))
            attempts += 1
            start = int(random.integers(2**31))

            def disturb(action: np.ndarray, random: np.random.Generator = random) -> np.ndarray:
                return action + noise * random.standard_normal(action.shape)

            expert = make_expert(random)
            episode = play_expert(environment, expert, read_state, seed=start, disturb=disturb, task=task).episode
            if not only_successes or bool(np.any(episode.success)):
                kept.append(episode)
    finally:
        environment.close()
    return Demonstrations(
        tuple(kept),
        fps=environment.metadata.get("render_fps"),
        observation_space=environment.observation_space,
        action_space=environment.action_space,
        environment=environment.spec,
    )


def _single(array: np.ndarray) -> np.ndarray:
    # What JAX computes in, and half the size.
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _picture(environment: gymnasium.Env) -> np.ndarray:
    picture: Any = environment.render()
    return np.asarray(picture)
