"""Explicit Markov decision processes: the tables, random families of them, and their simulation."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from steersman.envs import Environment
from steersman.errors import InputError, InputTypeError, require, require_count, require_number

Scalar = Float[Array, ""] | float

#: How far from one a row of probabilities may sum, which covers rows that were normalized in single precision.
ROW_TOLERANCE = 1e-6


def _as_floats(argument: str, value: Any) -> Array:
    """`value` as an array of floats, of double precision only where JAX has it switched on."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise InputTypeError(f"{argument} is a {type(value).__name__}, but it must be an array of numbers.") from None
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array
    if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.bool_)):
        raise InputTypeError(f"{argument} has dtype {array.dtype}, but it must be an array of real numbers.")
    return array.astype(float)


def _place(argument: str, index: tuple[int, ...]) -> str:
    names = {1: "state", 2: "(state, action)", 3: "(state, action, next state)"}
    where = index[0] if len(index) == 1 else index
    return f"{argument} at {names[len(index)]} {where}"


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(bad)[0])


def _require_finite(argument: str, value: Array) -> None:
    if isinstance(value, Tracer):
        return
    numbers = np.asarray(value)
    bad = ~np.isfinite(numbers)
    if bad.any():
        index = _first(bad)
        raise InputError(f"{_place(argument, index)} is {numbers[index]}, but it must be a finite number.")


def require_distributions(argument: str, rows: Array) -> None:
    """Checks that the last axis of `rows` holds probabilities that sum to one.

    The sentence names the first entry or row that does not, and by how much. Values that are being traced by JAX
    cannot be looked at and pass.

    Args:
        argument: the name shown in the error.
        rows: probabilities ``[..., n]`` with at most two leading axes.

    Raises:
        InputError: NaN, a negative entry, or a row whose sum differs from one by more than ``ROW_TOLERANCE``.
    """
    if isinstance(rows, Tracer):
        return
    _require_finite(argument, rows)
    numbers = np.asarray(rows, np.float64)
    if (numbers < 0).any():
        index = _first(numbers < 0)
        raise InputError(f"{_place(argument, index)} is {numbers[index]:g}, but a probability must not be negative.")
    sums = np.asarray(numbers.sum(axis=-1))
    bad = np.abs(sums - 1.0) > ROW_TOLERANCE
    if bad.any():
        index = _first(bad) if bad.ndim else ()
        row = _place(argument, index) if index else argument
        raise InputError(
            f"{row} sums to {sums[index]:.9g}, which misses one by {sums[index] - 1.0:+.3g}, but it must sum to one."
        )


class MDP(eqx.Module):
    """A finite Markov decision process with discounting, given by its tables.

    It is a PyTree of arrays, so that it passes through ``jit``, ``vmap`` and ``grad``; a table that is varied
    (rewards, a worst-case kernel, another start) is exchanged with :meth:`replace`. Computations run in the tables'
    precision. Exact results want double precision: build and use the model inside ``with jax.enable_x64(True):``.

    Attributes:
        transition: ``P(s' | s, a)``, ``[S, A, S]``.
        reward: expected reward of an action ``[S, A]``.
        discount: discount factor in ``[0, 1)``.
        start: distribution of the first state ``[S]``.
    """

    transition: Float[Array, "S A S"]
    reward: Float[Array, "S A"]
    discount: Float[Array, ""]
    start: Float[Array, " S"]

    #: Algorithms without interaction are trained on the model itself (see :func:`steersman.envs.as_problem`).
    is_problem: ClassVar[bool] = True

    def __init__(
        self,
        transition: Any,
        reward: Any,
        discount: Any,
        start: Any = None,
    ):
        """Checks the tables (arrays or nested sequences) and brings the reward to ``[S, A]``.

        Args:
            transition: ``P(s' | s, a)``, ``[S, A, S]``.
            reward: ``[S, A]``; or ``[S, A, S]`` by the next state too, of which the expectation is kept; or ``[S]``,
                earned in the state in which one acts.
            discount: discount factor in ``[0, 1)``.
            start: distribution of the first state ``[S]``; uniform where none is given.

        Raises:
            InputError: a shape does not fit, a probability is negative, a row does not sum to one, a number is not
                finite, or the discount is outside ``[0, 1)``.
        """
        kernel = _as_floats("transition", transition)
        fits = kernel.ndim == 3 and kernel.shape[0] == kernel.shape[2] and kernel.size > 0
        require(fits, "transition's shape", kernel.shape, "[S, A, S] with at least one state and one action")
        num_states, num_actions, _ = kernel.shape
        require_distributions("transition", kernel)

        table = _as_floats("reward", reward)
        shapes = ((num_states, num_actions), kernel.shape, (num_states,))
        allowed = f"[S, A], [S, A, S] or [S] with S = {num_states} and A = {num_actions}"
        require(table.shape in shapes, "reward's shape", table.shape, allowed)
        _require_finite("reward", table)
        if table.ndim == 3:
            table = jnp.sum(kernel * table, axis=-1)
        elif table.ndim == 1:
            table = jnp.broadcast_to(table[:, None], (num_states, num_actions))

        gamma = _as_floats("discount", discount)
        require(gamma.ndim == 0, "discount's shape", gamma.shape, "(), one number for all states")
        require_number("discount", gamma, at_least=0.0, below=1.0)

        first = jnp.full(num_states, 1.0 / num_states) if start is None else _as_floats("start", start)
        require(first.shape == (num_states,), "start's shape", first.shape, f"[S] with S = {num_states}")
        require_distributions("start", first)

        # One precision for all tables, so that no result depends on which of them a function happens to read.
        dtype = jnp.result_type(kernel, table)
        self.transition = kernel.astype(dtype)
        self.reward = table.astype(dtype)
        self.discount = gamma.astype(dtype)
        self.start = first.astype(dtype)

    @property
    def num_states(self) -> int:
        """Number of states ``S``."""
        return self.transition.shape[0]

    @property
    def num_actions(self) -> int:
        """Number of actions ``A``."""
        return self.transition.shape[1]

    def replace(
        self,
        *,
        transition: Any = None,
        reward: Any = None,
        discount: Any = None,
        start: Any = None,
    ) -> MDP:
        """The same model with some of its tables exchanged, checked like a new one."""
        return MDP(
            self.transition if transition is None else transition,
            self.reward if reward is None else reward,
            self.discount if discount is None else discount,
            self.start if start is None else start,
        )

    def environment(self, *, max_steps: int | None = 200, geometric: bool = False) -> TabularEnvironment:
        """This model as an environment with discrete observations and actions, on which any learner can be run.

        Args:
            max_steps: steps after which an episode is *truncated*, or None for no limit. Values bootstrap through
                it, so a learner whose discount factor is the model's estimates the model's values.
            geometric: *terminate* after each step with probability ``1 - discount``. The undiscounted return then
                has the model's discounted value as its mean, so a learner's own discount factor should be one.
        """
        return TabularEnvironment(self, max_steps, geometric)


class TabularState(NamedTuple):
    """Where a tabular environment stands: its state and the steps taken in this episode."""

    state: Int[Array, ""]
    time: Int[Array, ""]


class TabularEnvironment(Environment):
    """Episodes of an explicit model; its parameters are the model, so that a robust method can vary the tables.

    The reward of a step is its expectation given state and action.

    Attributes:
        mdp: the model that is simulated where no other is given.
        max_steps: steps after which an episode is truncated, or None.
        geometric: whether each step terminates with probability ``1 - discount``.
    """

    mdp: MDP
    max_steps: int | None = eqx.field(static=True, default=200)
    geometric: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        if self.max_steps is not None:
            require_count("max_steps", self.max_steps)

    @property
    def default_params(self) -> MDP:
        return self.mdp

    def reset_env(self, key: Key[Array, ""], params: MDP) -> tuple[Int[Array, ""], TabularState]:
        state = jax.random.choice(key, params.num_states, p=params.start)
        return state, TabularState(state, jnp.zeros((), jnp.int32))

    def step_env(
        self, key: Key[Array, ""], state: TabularState, action: Int[Array, ""], params: MDP
    ) -> tuple[Int[Array, ""], TabularState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        next_key, end_key = jax.random.split(key)
        following = jax.random.choice(next_key, params.num_states, p=params.transition[state.state, action])
        terminated = jnp.asarray(False)
        if self.geometric:
            terminated = jax.random.bernoulli(end_key, 1.0 - params.discount)
        reward = params.reward[state.state, action]
        return following, TabularState(following, state.time + 1), reward, terminated, {}

    def is_truncated(self, state: TabularState, params: MDP) -> Bool[Array, ""]:
        del params
        return jnp.asarray(False) if self.max_steps is None else state.time >= self.max_steps

    def observation_space(self, params: MDP) -> gymnasium.Space:
        return spaces.Discrete(params.num_states)

    def action_space(self, params: MDP) -> gymnasium.Space:
        return spaces.Discrete(params.num_actions)


def random_mdp(
    key: Key[Array, ""],
    num_states: int,
    num_actions: int,
    *,
    concentration: Scalar = 1.0,
    reward_std: Scalar = 1.0,
    discount: Scalar = 0.9,
) -> MDP:
    """A model whose transition rows are Dirichlet draws and whose rewards are centred normal draws.

    Args:
        key: randomness of the tables.
        num_states: number of states.
        num_actions: number of actions.
        concentration: parameter of the symmetric Dirichlet distribution; small values make nearly deterministic rows.
        reward_std: standard deviation of the rewards.
        discount: discount factor in ``[0, 1)``.
    """
    require_count("num_states", num_states)
    require_count("num_actions", num_actions)
    require_number("concentration", concentration, above=0.0)
    require_number("reward_std", reward_std, at_least=0.0)
    require_number("discount", discount, at_least=0.0, below=1.0)
    transition_key, reward_key = jax.random.split(key)
    shape = (num_states, num_actions)
    transition = jax.random.dirichlet(transition_key, jnp.full(num_states, concentration, float), shape)
    return MDP(transition, reward_std * jax.random.normal(reward_key, shape), discount)


def garnet(
    key: Key[Array, ""],
    num_states: int,
    num_actions: int,
    branching: int,
    *,
    reward_std: Scalar = 1.0,
    discount: Scalar = 0.9,
) -> MDP:
    """A Garnet model (Archibald, McKinnon and Thomas, 1995): few successors of each pair, chosen at random.

    Every state-action pair leads to `branching` different states; their probabilities are the gaps between sorted
    uniform cut points. Rewards are centred normal draws for each pair.

    Args:
        key: randomness of the tables.
        num_states: number of states.
        num_actions: number of actions.
        branching: number of successors of each state-action pair, at most `num_states`.
        reward_std: standard deviation of the rewards.
        discount: discount factor in ``[0, 1)``.
    """
    require_count("num_states", num_states)
    require_count("num_actions", num_actions)
    require_count("branching", branching)
    require(branching <= num_states, "branching", branching, f"at most num_states, which is {num_states}")
    require_number("reward_std", reward_std, at_least=0.0)
    require_number("discount", discount, at_least=0.0, below=1.0)
    successor_key, cut_key, reward_key = jax.random.split(key, 3)
    shape = (num_states, num_actions)
    # The first entries of a random order are a draw without replacement.
    order = jnp.argsort(jax.random.uniform(successor_key, (*shape, num_states)), axis=-1)
    successors = order[..., :branching]
    cuts = jnp.sort(jax.random.uniform(cut_key, (*shape, branching - 1)), axis=-1)
    gaps = jnp.diff(cuts, axis=-1, prepend=0.0, append=1.0)
    places = jax.nn.one_hot(successors, num_states, dtype=gaps.dtype)
    transition = jnp.einsum("sab,sabn->san", gaps, places)
    return MDP(transition, reward_std * jax.random.normal(reward_key, shape), discount)
