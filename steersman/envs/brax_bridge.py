"""Brax and MuJoCo Playground environments (``reset(rng) -> state``, ``step(state, action) -> state``) as ours."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jaxtyping import Array, Bool, Int, Key, PyTree

from steersman.envs.environment import Environment
from steersman.errors import InputError, InputTypeError, require_count

#: Brax's own default, for environments that say nothing about their episodes' length.
EPISODE_LENGTH = 1_000


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """What is fixed about the environment, held by identity, since static parts of a PyTree must hash."""

    env: Any
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    wrapped: bool


class BraxState(eqx.Module):
    """The environment's own state, and what it leaves to its wrappers.

    Attributes:
        inner: the state that the environment returned.
        steps: taken in this episode.
        truncated: whether the episode was cut here by its length.
    """

    inner: Any
    steps: Int[Array, ""]
    truncated: Bool[Array, ""]


class BraxEnvironment(Environment):
    """Any environment in the shape of ``brax.envs.Env`` or ``mujoco_playground.MjxEnv``.

    Only the shape counts: ``reset(rng)`` and ``step(state, action)`` return a state with ``obs``, ``reward``,
    ``done`` and ``info``, and ``action_size`` says how long an action is; actions lie in ``[-1, 1]``. Neither library
    is imported.

    Brax reports time limits as ``done`` and says aside, in ``info["truncation"]`` of its ``EpisodeWrapper``, that
    nothing had ended; here the two are kept apart. A bare environment has no limit, and gets one.

    Attributes:
        episode_length: steps after which an episode is cut, or None where the environment's own wrapper does that.
    """

    episode_length: int | None = eqx.field(static=True)
    _held: _Held = eqx.field(static=True)

    def __init__(self, env: Any, episode_length: int | None = None):
        """Looks at one reset without running it.

        Args:
            env: the environment, neither vectorized nor restarting itself (without ``VmapWrapper``,
                ``AutoResetWrapper`` and the like).
            episode_length: steps after which an episode is cut; by default what ``EpisodeWrapper`` or the
                environment's configuration says, else 1000.

        Raises:
            InputTypeError: the environment has not this shape, or is vectorized.
            InputError: it restarts itself, which hides the final observation.
        """
        if not is_brax_like(env):
            raise InputTypeError(
                f"env is a {type(env).__name__}, but it must have reset(rng), step(state, action) and action_size, as "
                "Brax environments do."
            )
        name = type(getattr(env, "unwrapped", env)).__name__
        try:
            state = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        except Exception as error:
            raise InputTypeError(
                f"env is a {name} that cannot be reset with one key ({type(error).__name__}: {error}); it must be "
                "given without VmapWrapper or any other vectorization."
            ) from error
        for part in ("obs", "reward", "done", "info"):
            if not hasattr(state, part):
                raise InputTypeError(
                    f"env is a {name} whose reset returns a {type(state).__name__} without {part}, but it must have "
                    "obs, reward, done and info."
                )
        if state.done.ndim > 0:
            raise InputTypeError(
                f"env is a {name} with done of shape {state.done.shape}, but it must be a single environment; give it "
                "without VmapWrapper."
            )
        restarts = [entry for entry in state.info if entry in ("first_obs", "first_pipeline_state", "first_state")]
        if restarts:
            raise InputError(
                f"env is a {name} that restarts itself (its info has {restarts[0]!r}), which hides the observation at "
                "an episode's end; give it without AutoResetWrapper."
            )
        wrapped = "truncation" in state.info
        if episode_length is not None:
            require_count("episode_length", episode_length)
        elif not wrapped:
            configured = getattr(getattr(env, "_config", None), "episode_length", None)
            episode_length = EPISODE_LENGTH if configured is None else int(configured)
        self.episode_length = episode_length
        action_space = spaces.Box(-1.0, 1.0, (int(env.action_size),), np.float32)
        self._held = _Held(env, _space_of(state.obs), action_space, wrapped)

    @property
    def name(self) -> str:
        return type(getattr(self._held.env, "unwrapped", self._held.env)).__name__

    @property
    def sample_time(self) -> float | None:
        step = getattr(self._held.env, "dt", None)
        # Brax keeps it in single precision: 0.04 s is not 0.0399999991 s.
        return None if step is None else float(f"{float(step):.7g}")

    def observation_space(self, params: PyTree) -> gymnasium.Space:
        return self._held.observation_space

    def action_space(self, params: PyTree) -> gymnasium.Space:
        return self._held.action_space

    def reset_env(self, key: Key[Array, ""], params: PyTree) -> tuple[PyTree, BraxState]:
        del params
        inner = jax.tree.map(_strong, self._held.env.reset(_raw(key)))
        return _plain(inner.obs), BraxState(inner, jnp.zeros((), jnp.int32), jnp.asarray(False))

    def step_env(
        self, key: Key[Array, ""], state: BraxState, action: PyTree, params: PyTree
    ) -> tuple[PyTree, BraxState, Array, Bool[Array, ""], dict[str, Any]]:
        del key, params
        # Wrappers write into the dicts of the state that they are given, which is the caller's: they get a copy.
        given = jax.tree.map(lambda leaf: leaf, state.inner)
        inner = self._held.env.step(given, action)
        if jax.tree.structure(inner) != jax.tree.structure(state.inner):
            raise InputTypeError(
                f"{self.name} returns a state of another structure from step than from reset, so it cannot be scanned."
            )
        inner = jax.tree.map(lambda new, old: _strong(new, jnp.asarray(old).dtype), inner, state.inner)
        done, steps = inner.done > 0.5, state.steps + 1
        cut = jnp.asarray(False)
        if self._held.wrapped:
            cut = inner.info["truncation"] > 0.5
        terminated = done & ~cut
        if self.episode_length is not None:
            cut = cut | (steps >= self.episode_length)
        info = {"metrics": dict(getattr(inner, "metrics", {}))}
        if "costs" in inner.info:
            info["costs"] = inner.info["costs"]
        elif "cost" in inner.info:
            info["costs"] = {"cost": inner.info["cost"]}
        return _plain(inner.obs), BraxState(inner, steps, cut), inner.reward, terminated, info

    def is_truncated(self, state: BraxState, params: PyTree) -> Bool[Array, ""]:
        del params
        return state.truncated


def is_brax_like(given: Any) -> bool:
    """Whether `given` has the shape that :class:`BraxEnvironment` takes.

    ``brax.envs.Env`` and ``mujoco_playground.MjxEnv``, bare or in their wrappers, have no class in common, and only
    ``reset``, ``step`` and ``action_size`` in their interface; gymnax-style and Gymnasium environments lack the last.
    """
    missing = object()
    # Looked up without evaluating: some environments compute their sizes by a whole reset.
    sized = inspect.getattr_static(given, "action_size", missing) is not missing
    bare = not hasattr(type(given), "step_env") and not isinstance(given, (gymnasium.Env, gymnasium.vector.VectorEnv))
    return sized and bare and callable(getattr(given, "reset", None)) and callable(getattr(given, "step", None))


def _raw(key: Key[Array, ""]) -> Array:
    """`key` as the array of words that these environments were written for."""
    default = jax.random.key(0)
    if jax.random.key_impl(key) == jax.random.key_impl(default):
        return jax.random.key_data(key)
    return jax.random.PRNGKey(jax.random.bits(key))


def _strong(value: Any, dtype: Any = None) -> Any:
    """An array whose type does not depend on what it is combined with, so that states can be scanned over."""
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    return jnp.asarray(value, value.dtype if dtype is None else dtype)


def _plain(observation: PyTree) -> PyTree:
    """Observations as plain dicts, whichever mapping an environment uses."""
    if isinstance(observation, Mapping):
        return {name: _plain(part) for name, part in observation.items()}
    return observation


def _space_of(observation: Any) -> gymnasium.Space:
    if isinstance(observation, Mapping):
        return spaces.Dict({name: _space_of(part) for name, part in observation.items()})
    dtype = np.dtype(observation.dtype)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return spaces.Box(limits.min, limits.max, observation.shape, dtype.type)
    return spaces.Box(-np.inf, np.inf, observation.shape, dtype.type)
