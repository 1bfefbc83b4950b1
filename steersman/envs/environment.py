"""The environment contract: gymnax's functional interface, with termination and truncation kept apart."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, PyTree

from steersman.envs.spaces import as_gymnasium_space
from steersman.errors import InputTypeError


class Environment(eqx.Module):
    """A problem that is stepped inside ``jit``, one copy at a time; callers ``vmap``.

    An author writes ``reset_env``, ``step_env``, the two spaces and, where episodes are cut by a limit that is not
    part of the task, ``is_truncated``. Everything that a robust or model-based method may want to vary belongs into
    the parameters, which are an argument of every call.

    Any object with gymnax 1.0's methods is accepted wherever this class is: subclassing is a convenience.

    What the contract carries beyond the common case: observations and actions may be PyTrees; ``reward`` may have a
    trailing axis (several objectives, or one entry per agent); ``info["costs"]`` is a dict of named costs;
    ``info["duration"]`` the duration of a step where steps last differently long (semi-Markov); an observation dict
    with the key ``"action_mask"`` says which discrete actions are allowed.
    """

    #: What it can do beyond ``reset`` and ``step``, as verbs that algorithms know; they join its problem's abilities.
    abilities: ClassVar[frozenset[str]] = frozenset()

    #: Number of agents on a leading axis of observations, actions and rewards; 0 means a single agent without axis.
    num_agents: int = eqx.field(static=True, default=0, kw_only=True)

    @property
    def name(self) -> str:
        """The name shown in reports."""
        return type(self).__name__

    @property
    def default_params(self) -> PyTree:
        """The parameters used where a caller gives none."""
        return ()

    @property
    def sample_time(self) -> float | None:
        """Seconds of problem time per step, or None where time has no unit."""
        return None

    @abc.abstractmethod
    def reset_env(self, key: Key[Array, ""], params: PyTree) -> tuple[PyTree, PyTree]:
        """Draws a start: ``(observation, state)``."""

    @abc.abstractmethod
    def step_env(
        self, key: Key[Array, ""], state: PyTree, action: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, Bool[Array, ""], dict[str, Any]]:
        """One transition: ``(observation, state, reward, terminated, info)``, without a reset."""

    def is_truncated(self, state: PyTree, params: PyTree) -> Bool[Array, ""]:
        """Whether the episode is cut here for a reason outside the task, such as a time limit."""
        del state, params
        return jnp.asarray(False)

    @abc.abstractmethod
    def observation_space(self, params: PyTree) -> gymnasium.Space:
        """The space of one observation."""

    @abc.abstractmethod
    def action_space(self, params: PyTree) -> gymnasium.Space:
        """The space of one action."""

    def reset(self, key: Key[Array, ""], params: PyTree = None) -> tuple[PyTree, PyTree]:
        """Draws a start: ``(observation, state)``."""
        return self.reset_env(key, self.default_params if params is None else params)

    def step(
        self, key: Key[Array, ""], state: PyTree, action: PyTree, params: PyTree = None
    ) -> tuple[PyTree, PyTree, PyTree, Bool[Array, "..."], Bool[Array, ""], dict[str, Any]]:
        """One transition, starting a new episode where this one ended.

        Returns:
            ``(observation, state, reward, terminated, truncated, info)``. Where the episode ended, the observation
            and the state are those of the next episode's start, and ``info["final_observation"]`` is what was
            observed at the end; otherwise the two observations are equal.
        """
        params = self.default_params if params is None else params
        step_key, reset_key = jax.random.split(key)
        next_observation, next_state, reward, terminated, info = self.step_env(step_key, state, action, params)
        truncated = self.is_truncated(next_state, params)
        done = jnp.logical_or(jnp.any(terminated), truncated)
        start_observation, start_state = self.reset_env(reset_key, params)

        def choose(start: PyTree, following: PyTree) -> PyTree:
            return jax.tree.map(lambda s, f: jnp.where(done, s, f), start, following)

        info = {**info, "final_observation": next_observation}
        observation = choose(start_observation, next_observation)
        return observation, choose(start_state, next_state), reward, terminated, truncated, info


@dataclasses.dataclass(frozen=True)
class _Spaces:
    """A problem's spaces, which do not hash by themselves, as the static parts of a PyTree must."""

    observation: gymnasium.Space
    action: gymnasium.Space

    def __hash__(self) -> int:
        # Equal spaces have equal kinds and shapes, which is enough for a hash.
        return hash(tuple((type(s), s.shape, str(s.dtype)) for s in (self.observation, self.action)))


class Problem(eqx.Module):
    """An environment together with its parameters: what an algorithm is given to learn on.

    Attributes:
        environment: an :class:`Environment`, or any object with gymnax 1.0's methods.
        params: its parameters. With ``batched_params`` every leaf has a leading axis of the number of parallel
            environments, so that each copy can differ (domain randomization, robust training).
    """

    environment: Any
    params: PyTree
    batched_params: bool = eqx.field(static=True)
    _spaces: _Spaces = eqx.field(static=True)

    on_host: ClassVar[bool] = False

    def __init__(self, environment: Any, params: PyTree = None, *, batched_params: bool = False):
        """Pairs an environment with its parameters.

        Args:
            environment: see the class.
            params: see the class; the environment's own default parameters if None.
            batched_params: whether every leaf of `params` has a leading axis of environments.
        """
        self.environment = environment
        self.params = environment.default_params if params is None else params
        self.batched_params = batched_params
        one = jax.tree.map(lambda leaf: leaf[0], self.params) if batched_params else self.params
        self._spaces = _Spaces(
            as_gymnasium_space(environment.observation_space(one)), as_gymnasium_space(environment.action_space(one))
        )

    @property
    def name(self) -> str:
        """The environment's name."""
        return str(getattr(self.environment, "name", type(self.environment).__name__))

    @property
    def abilities(self) -> frozenset[str]:
        """What the environment can do beyond ``reset`` and ``step``, as verbs that algorithms know.

        ``"start from any state"`` for every environment here, since states are arguments, and what it says of itself.
        """
        return frozenset({"start from any state"}) | frozenset(getattr(self.environment, "abilities", ()))

    @property
    def num_agents(self) -> int:
        """Number of agents, or 0 for a single agent without an agent axis."""
        return int(getattr(self.environment, "num_agents", 0))

    @property
    def observation_space(self) -> gymnasium.Space:
        """The space of one observation."""
        return self._spaces.observation

    @property
    def action_space(self) -> gymnasium.Space:
        """The space of one action."""
        return self._spaces.action

    def reset(self, keys: Key[Array, " N"]) -> tuple[PyTree, PyTree]:
        """Starts one episode per key: observations and states with a leading axis ``N``."""
        axes = (0, 0 if self.batched_params else None)
        call = jax.vmap(self.environment.reset, in_axes=axes)
        return _with_known_keys(lambda keys: call(keys, self.params), keys)

    def step(
        self, keys: Key[Array, " N"], state: PyTree, action: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree, dict[str, Any]]:
        """Steps ``N`` copies, restarting those that end; see :meth:`Environment.step`."""
        axes = (0, 0, 0, 0 if self.batched_params else None)
        call = jax.vmap(self.environment.step, in_axes=axes)
        return _with_known_keys(lambda keys: call(keys, state, action, self.params), keys)


def _with_known_keys(call: Callable[[Key[Array, " N"]], Any], keys: Key[Array, " N"]) -> Any:
    """Calls an environment; where it draws from a distribution that JAX has for its own generator alone, with its keys.

    ``jax.random.poisson`` is one. Training draws from an unrolled form of the same generator, which gives the same
    numbers from the same words but is another kind of key.
    """
    try:
        return call(keys)
    except NotImplementedError as error:
        words = jax.random.key_data(keys)
        if "threefry2x32" not in str(error) or words.shape[-1] != 2:
            raise
        return call(jax.random.wrap_key_data(words, impl="threefry2x32"))


def as_problem(given: Any) -> Any:
    """Turns whatever a user brings into a problem that algorithms can be trained on.

    Accepts a name (see :func:`steersman.envs.make`), a :class:`Problem`, a gymnax-style environment, a pair
    ``(environment, params)``, a :class:`~steersman.envs.ControlProblem`, a Brax environment, a Gymnasium environment
    or a function that makes one. What says ``is_problem`` of itself (an explicit decision process, a dataset, which
    algorithms without interaction take) is returned as it is.

    Raises:
        InputTypeError: nothing here knows how to step what was given.
    """
    if isinstance(given, str):
        from steersman.envs.registry import make

        return make(given)
    if isinstance(given, Problem) or getattr(given, "on_host", False) or getattr(given, "is_problem", False):
        return given
    if isinstance(given, tuple):
        if len(given) == 2 and hasattr(given[0], "step"):
            return Problem(given[0], given[1])
    elif callable(getattr(given, "environment", None)):
        return as_problem(given.environment())
    if hasattr(given, "reset_env") and hasattr(given, "step_env") and hasattr(given, "default_params"):
        return Problem(given)
    from steersman.envs.brax_bridge import BraxEnvironment, is_brax_like

    if is_brax_like(given):
        return Problem(BraxEnvironment(given))
    if isinstance(given, (gymnasium.Env, gymnasium.vector.VectorEnv)) or callable(given):
        from steersman.envs.gymnasium_bridge import GymnasiumProblem

        return GymnasiumProblem(cast(Any, given))
    raise InputTypeError(
        f"problem is a {type(given).__name__}, but it must be an environment's name, a gymnax-style or Brax "
        "environment, an (environment, params) pair, a ControlProblem, a Gymnasium environment or a function "
        "that makes one."
    )
