"""An environment whose action is a chunk of another environment's actions."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jaxtyping import Array, Bool, Key, PyTree

from steersman.envs.environment import Environment
from steersman.envs.spaces import as_gymnasium_space
from steersman.errors import InputError, InputTypeError, require, require_count, require_number


class ChunkedEnvironment(Environment):
    """Plays chunks of `rows` actions, each as far as the episode goes, and pays the sum of their rewards.

    What chunk-level learning trains on: one decision of DPPO (Ren et al., 2024, arXiv:2409.00588) or RL-100 (Lei et
    al., 2025, arXiv:2510.14830) is one step here. A policy of chunks for the environment itself is a
    :class:`~steersman.policies.ChunkPolicy`; both play the same actions.

    ``info["duration"]`` is the number of rows played, or the sum of their durations where the environment reports
    such; named costs are added up as rewards are; the rest of ``info`` is that of the last row played. Rows that
    follow an end are not played and change nothing, though they are computed.

    Attributes:
        environment: an :class:`Environment`, or any object with gymnax 1.0's methods.
        rows: actions in a chunk, the leading axis of an action; the second where there is an axis of agents.
        discount: of rewards and costs within a chunk, per step (or per unit of duration). The step's own bootstrap
            then is ``discount ** duration``.
    """

    environment: Any
    rows: int = eqx.field(static=True)
    discount: float = eqx.field(static=True)

    def __init__(self, environment: Any, rows: int, *, discount: float = 1.0):
        """Wraps an environment.

        Args:
            environment: see the class.
            rows: see the class.
            discount: see the class.
        """
        for method in ("reset_env", "step_env", "observation_space", "action_space"):
            if not callable(getattr(environment, method, None)):
                raise InputTypeError(
                    f"environment is a {type(environment).__name__}, but it must have gymnax's methods; "
                    f"{method} is missing."
                )
        require_count("rows", rows)
        require_number("discount", discount, at_least=0.0, at_most=1.0)
        self.environment = environment
        self.rows = int(rows)
        self.discount = float(discount)
        self.num_agents = int(getattr(environment, "num_agents", 0))

    @property
    def name(self) -> str:
        inner = getattr(self.environment, "name", type(self.environment).__name__)
        return f"{inner} in chunks of {self.rows}"

    @property
    def default_params(self) -> PyTree:
        return self.environment.default_params

    @property
    def sample_time(self) -> float | None:
        inner = getattr(self.environment, "sample_time", None)
        return None if inner is None else self.rows * inner

    def observation_space(self, params: PyTree) -> gymnasium.Space:
        return as_gymnasium_space(self.environment.observation_space(params))

    def action_space(self, params: PyTree) -> gymnasium.Space:
        """`rows` actions: boxes and discrete spaces get a leading axis.

        Raises:
            InputError: observations carry an action mask, which speaks of the first row alone.
            InputTypeError: the environment's actions are of a kind that has no rows.
        """
        observed = self.observation_space(params)
        if isinstance(observed, spaces.Dict) and "action_mask" in observed.spaces:
            raise InputError(
                "environment observes an action_mask, but its actions must be free: the mask allows a first action "
                "and says nothing about the others of a chunk."
            )
        return _repeated(as_gymnasium_space(self.environment.action_space(params)), self.rows)

    def reset_env(self, key: Key[Array, ""], params: PyTree) -> tuple[PyTree, PyTree]:
        return self.environment.reset_env(key, params)

    def step_env(
        self, key: Key[Array, ""], state: PyTree, action: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, Bool[Array, "..."], dict[str, Any]]:
        axis = 1 if self.num_agents else 0
        for leaf in jax.tree.leaves(action):
            require(
                leaf.ndim > axis and leaf.shape[axis] == self.rows,
                "action's shape",
                leaf.shape,
                f"that of {self.rows} rows, on axis {axis}",
            )
        if axis:
            action = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), action)
        keys = jax.random.split(key, self.rows)

        def play(key: Array, state: PyTree, row: PyTree) -> tuple:
            observation, state, reward, terminated, info = self.environment.step_env(key, state, row, params)
            info = dict(info)
            duration = jnp.asarray(info.pop("duration", jnp.asarray(1, jnp.int32)))
            costs = info.pop("costs", {})
            return observation, state, {"reward": reward, "costs": costs}, duration, jnp.asarray(terminated), info

        def blank(shape: Any) -> Array:
            return jnp.zeros(shape.shape, shape.dtype)

        first = jax.tree.map(lambda leaf: leaf[0], action)
        shapes = jax.eval_shape(play, keys[0], state, first)
        observation, _, paid, duration, terminated, info = jax.tree.map(blank, shapes)

        def step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            _, state, paid, duration, terminated, _ = carry
            done = jnp.any(terminated) | self.is_truncated(state, params)
            # The first row is always played: callers restart what has ended.
            done = done & (inputs[2] > 0)
            observation, following, more, lasted, ended, info = play(inputs[0], state, inputs[1])
            weight = self.discount**duration
            paid = jax.tree.map(lambda total, new: (total + weight * new).astype(total.dtype), paid, more)
            played = (observation, following, paid, duration + lasted, ended, info)
            return jax.tree.map(lambda old, new: jnp.where(done, old, new), carry, played), None

        # The sums of a row that is not played go too, as the whole carry is kept.
        carry = (observation, state, paid, duration, terminated, info)
        carry, _ = jax.lax.scan(step, carry, (keys, action, jnp.arange(self.rows)))
        observation, state, paid, duration, terminated, info = carry
        info = {**info, "duration": duration}
        if paid["costs"]:
            info["costs"] = paid["costs"]
        return observation, state, paid["reward"], terminated, info

    def is_truncated(self, state: PyTree, params: PyTree) -> Bool[Array, ""]:
        limit = getattr(self.environment, "is_truncated", None)
        return jnp.asarray(False) if limit is None else limit(state, params)


def _repeated(space: gymnasium.Space, rows: int) -> gymnasium.Space:
    """The space of `rows` elements of a space."""

    def stacked(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return np.broadcast_to(array, (rows, *array.shape)).copy()

    if isinstance(space, spaces.Box):
        return spaces.Box(stacked(space.low), stacked(space.high), dtype=space.dtype.type)  # pyright: ignore[reportArgumentType]
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        count = space.n if isinstance(space, spaces.Discrete) else space.nvec
        return spaces.MultiDiscrete(stacked(count), start=stacked(space.start))
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary((rows, *space.shape))
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _repeated(part, rows) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_repeated(part, rows) for part in space.spaces])
    raise InputTypeError(f"environment's action space is a {type(space).__name__}, which cannot be repeated in rows.")
