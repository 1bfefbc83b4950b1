"""Environments whose step splits into a known decision and random noise, and a test that a split is a true one.

One step is ``s --(a, f)--> s^x = f(s, a) --(noise)--> s'``: the decision's immediate effect, which is known, then what
nobody controls (Powell, 2011, *Approximate Dynamic Programming*, chapter 4). The post-decision state ``s^x`` must hold
all that the noise depends on, ``P(s' | s, a) = P(s' | f(s, a))``; only then can it have a value of its own.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from steersman.envs.environment import Environment, Problem, as_problem
from steersman.envs.spaces import as_gymnasium_space, sample
from steersman.errors import InputError, InputTypeError, require_count, require_number

#: What a problem with post-decision states says among its abilities.
ABILITY = "give its post-decision state"


class PostDecisionEnvironment(Environment):
    """An environment that is written as its two half-steps; the step is their composition and nothing else.

    An author writes ``post_decision``, ``exogenous`` and ``observe`` in place of ``step_env``. Each step then reports,
    beside what every environment reports, ``info["post_decision"]``, the observation of the post-decision state, and
    ``info["decision_reward"]``, the part of the reward that the decision alone fixes.
    """

    abilities: ClassVar[frozenset[str]] = frozenset({ABILITY})

    @abc.abstractmethod
    def post_decision(self, state: PyTree, action: PyTree, params: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        """The decision's immediate effect, pure and without randomness: ``(post_state, decision_reward)``.

        Args:
            state: the state acted in; it must not be changed.
            action: the action.
            params: the environment's parameters.

        Returns:
            The post-decision state, of the structure that :meth:`observe` takes, and the reward that is certain.
        """

    @abc.abstractmethod
    def exogenous(
        self, key: Key[Array, ""], post_state: PyTree, params: PyTree
    ) -> tuple[PyTree, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        """What chance adds: ``(state, random_reward, terminated, info)``. It sees neither the state nor the action."""

    @abc.abstractmethod
    def observe(self, state: PyTree, params: PyTree) -> PyTree:
        """The observation of a state, or of a post-decision state: the same features for both."""

    def step_env(
        self, key: Key[Array, ""], state: PyTree, action: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        post_state, decision_reward = self.post_decision(state, action, params)
        following, random_reward, terminated, info = self.exogenous(key, post_state, params)
        observation = self.observe(following, params)
        seen = self.observe(post_state, params)
        _require_same_form(self.name, seen, observation)
        info = {**info, "post_decision": seen, "decision_reward": decision_reward}
        return observation, following, decision_reward + random_reward, terminated, info


class DeclaredPostDecision(Environment):
    """Any environment that JAX can step, with a post-decision state that its user declares.

    Whether the declaration is true is the user's word: :func:`check_post_decision` tests it.

    Attributes:
        environment: an :class:`Environment`, or any object with gymnax 1.0's methods.
        declare: pure function ``(state, action, params) -> (observation, decision_reward)``: what would be observed
            after the decision and before chance, in the features of an observation, and the reward that the decision
            alone fixes.
    """

    environment: Any
    declare: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, Any]] = eqx.field(static=True)

    def __check_init__(self) -> None:
        for method in ("reset_env", "step_env", "observation_space", "action_space"):
            if not callable(getattr(self.environment, method, None)):
                raise InputTypeError(
                    f"environment is a {type(self.environment).__name__}, but it must have gymnax's methods; "
                    f"{method} is missing."
                )
        if not callable(self.declare):
            raise InputTypeError(f"declare is a {type(self.declare).__name__}, but it must be a function.")

    @property
    def abilities(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset(getattr(self.environment, "abilities", ())) | {ABILITY}

    @property
    def name(self) -> str:
        return str(getattr(self.environment, "name", type(self.environment).__name__))

    @property
    def default_params(self) -> PyTree:
        return self.environment.default_params

    @property
    def sample_time(self) -> float | None:
        return getattr(self.environment, "sample_time", None)

    def post_decision(self, state: PyTree, action: PyTree, params: PyTree) -> tuple[PyTree, Any]:
        """What was declared."""
        return self.declare(state, action, params)

    def reset_env(self, key: Key[Array, ""], params: PyTree) -> tuple[PyTree, PyTree]:
        return self.environment.reset_env(key, params)

    def step_env(
        self, key: Key[Array, ""], state: PyTree, action: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, Bool[Array, ""], dict[str, Any]]:
        seen, decision_reward = self.declare(state, action, params)
        observation, following, reward, terminated, info = self.environment.step_env(key, state, action, params)
        _require_same_form(self.name, seen, observation)
        decision_reward = jnp.asarray(decision_reward, jnp.result_type(float))
        info = {**info, "post_decision": seen, "decision_reward": decision_reward}
        return observation, following, reward, terminated, info

    def is_truncated(self, state: PyTree, params: PyTree) -> Bool[Array, ""]:
        limit = getattr(self.environment, "is_truncated", None)
        return jnp.asarray(False) if limit is None else limit(state, params)

    def observation_space(self, params: PyTree) -> gymnasium.Space:
        return as_gymnasium_space(self.environment.observation_space(params))

    def action_space(self, params: PyTree) -> gymnasium.Space:
        return as_gymnasium_space(self.environment.action_space(params))


def _require_same_form(name: str, seen: PyTree, observation: PyTree) -> None:
    old, new = jax.tree.structure(observation), jax.tree.structure(seen)
    if old != new:
        raise InputError(f"{name}: post_decision is observed as {new}, but it must have the observation's form {old}.")
    for before, after in zip(jax.tree.leaves(observation), jax.tree.leaves(seen), strict=True):
        b, a = jnp.asarray(before), jnp.asarray(after)
        if (b.shape, b.dtype) != (a.shape, a.dtype):
            raise InputError(
                f"{name}: post_decision is observed with shape {a.shape} and dtype {a.dtype}, but it must have the "
                f"observation's, {b.shape} and {b.dtype}."
            )


@dataclass(frozen=True)
class PostDecisionTest:
    """What :func:`check_post_decision` could compare.

    Attributes:
        groups: post-decision states that two or more different decisions led to. With none, nothing was tested.
        decisions: how many different (observation, action) pairs these groups held.
        p_value: smallest p-value of all tests, corrected for their number (Bonferroni).
    """

    groups: int
    decisions: int
    p_value: float


def check_post_decision(
    problem: Any,
    *,
    key: Key[Array, ""] | None = None,
    copies: int = 32,
    steps: int = 64,
    draws: int = 512,
    max_groups: int = 32,
    significance: float = 1e-3,
) -> PostDecisionTest:
    """Tests that chance depends on state and action only through the post-decision state.

    A random rollout looks for different decisions with the same post-decision observation. From each of them many
    next steps are drawn; if the declaration is true, what follows (next observation, termination, random part of the
    reward) has the same distribution for all decisions of a group, which Pearson's chi-square test of homogeneity
    judges. Values that are many are sorted into eight bins; outcomes that are rare are put together.

    Where states are continuous, two decisions hardly ever lead to exactly the same place, and the result says that no
    group was found.

    Args:
        problem: whatever :func:`steersman.envs.as_problem` accepts, with a post-decision state.
        key: randomness of the test; fixed where None.
        copies: parallel environments of the rollout.
        steps: its length.
        draws: next steps drawn from each decision.
        max_groups: how many groups are compared at most, those with the most decisions first.
        significance: the corrected p-value below which the declaration counts as false: the chance of a false alarm.

    Returns:
        What was compared.

    Raises:
        InputError: no post-decision state is declared; it is not a pure function; its form is not an observation's;
            or it fails the test.
    """
    for argument, value in (("copies", copies), ("steps", steps), ("draws", draws), ("max_groups", max_groups)):
        require_count(argument, value)
    require_number("significance", significance, above=0.0, below=1.0)
    problem = as_problem(problem)
    if problem.on_host or ABILITY not in problem.abilities:
        raise InputError(
            f"{problem.name} has no post-decision state on the device: subclass PostDecisionEnvironment, or wrap it in "
            "DeclaredPostDecision."
        )
    key = jax.random.key(0) if key is None else key
    if problem.batched_params:
        copies = jax.tree.leaves(problem.params)[0].shape[0]
    start_key, rollout_key, draw_key = jax.random.split(key, 3)
    state, rows = _decisions(problem, start_key, rollout_key, copies, steps)
    observation, action, post = rows
    _require_pure(problem, *(jax.tree.map(lambda leaf: leaf[0], tree) for tree in (state, action)))
    groups = _groups(observation, action, post, max_groups)
    if not groups:
        return PostDecisionTest(0, 0, 1.0)
    chosen = np.concatenate(groups)
    params = None
    if problem.batched_params:
        params = jax.tree.map(lambda leaf: leaf[chosen % copies], problem.params)
    state, decided = jax.tree.map(lambda leaf: leaf[chosen], (state, action))
    outcomes = _outcomes(problem, params, state, decided, draw_key, draws)
    place = {row: i for i, row in enumerate(chosen)}
    found: list[tuple[float, np.ndarray]] = []
    for group in groups:
        found += [(p, group) for p in _homogeneity(outcomes[[place[row] for row in group]])]
    smallest, group = min(found, key=lambda pair: pair[0])
    p_value = min(1.0, smallest * len(found))
    if p_value < significance:
        observation, action, post = jax.tree.map(lambda leaf: leaf[group[:2]], rows)
        raise InputError(
            f"post_decision of {problem.name} is no post-decision state: from observations {_shown(observation, 0)} "
            f"and {_shown(observation, 1)}, actions {_shown(action, 0)} and {_shown(action, 1)} both lead to "
            f"{_shown(post, 0)}, but what follows is differently distributed (p = {p_value:.1e})."
        )
    return PostDecisionTest(len(groups), len(chosen), p_value)


def _shown(rows: PyTree, index: int) -> str:
    return " ".join(str(np.asarray(leaf[index]).tolist()) for leaf in jax.tree.leaves(rows))


def _require_pure(problem: Problem, state: PyTree, action: PyTree) -> None:
    params = problem.params
    if problem.batched_params:
        params = jax.tree.map(lambda leaf: leaf[0], params)
    kept = [(id(leaf), np.array(leaf)) for leaf in jax.tree.leaves(state)]
    first, second = (problem.environment.post_decision(state, action, params) for _ in range(2))
    after = [(id(leaf), np.array(leaf)) for leaf in jax.tree.leaves(state)]
    same = len(kept) == len(after)
    if not same or any(i != j or not np.array_equal(a, b) for (i, a), (j, b) in zip(kept, after, strict=True)):
        raise InputError(
            f"post_decision of {problem.name} changes the state that it is given; it must return a new one."
        )
    leaves = jax.tree.leaves(first), jax.tree.leaves(second)
    if not all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)):
        raise InputError(
            f"post_decision of {problem.name} gives two answers to the same state and action; what is random belongs "
            "to what follows the decision."
        )


# Compiled once and run once: optimizing would cost more than it saves.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _decisions(problem: Problem, start_key: Array, rollout_key: Array, copies: int, steps: int) -> tuple:
    """States ``[K, ...]``, and observations, actions and post-decision observations, of a random rollout."""

    def step(running: tuple, keys: Array) -> tuple[tuple, tuple]:
        observation, state = running
        action = jax.vmap(lambda k: sample(problem.action_space, k))(keys[0])
        following, next_state, _, _, _, info = problem.step(keys[1], state, action)
        return (following, next_state), (state, (observation, action, info["post_decision"]))

    @_jit
    def run(start_keys: Array, keys: Array) -> tuple:
        _, rows = jax.lax.scan(step, problem.reset(start_keys), keys)
        return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), rows)

    return run(jax.random.split(start_key, copies), jax.random.split(rollout_key, (steps, 2, copies)))


def _flat(rows: PyTree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(rows)], axis=1)


def _groups(observation: PyTree, action: PyTree, post: PyTree, max_groups: int, largest: int = 4) -> list[np.ndarray]:
    """Row numbers of different decisions with the same post-decision observation."""
    decision = np.concatenate([_flat(observation), _flat(action)], axis=1)
    _, rows = np.unique(decision, axis=0, return_index=True)
    _, group = np.unique(_flat(post)[rows], axis=0, return_inverse=True)
    group = group.ravel()
    sizes = np.bincount(group)
    order = [g for g in np.argsort(-sizes, kind="stable") if sizes[g] > 1][:max_groups]
    return [rows[group == g][:largest] for g in order]


def _outcomes(problem: Problem, params: PyTree, state: PyTree, action: PyTree, key: Array, draws: int) -> np.ndarray:
    """What follows each decision ``[K, draws, features]``; `params` have a leading axis, or are None for the usual."""
    count = jax.tree.leaves(state)[0].shape[0]
    axes = (0, 0, 0, None if params is None else 0)
    params = problem.params if params is None else params

    def one(key: Array, state: PyTree, action: PyTree, params: PyTree) -> Array:
        _, _, reward, terminated, _, info = problem.environment.step(key, state, action, params)
        parts = [*jax.tree.leaves(info["final_observation"]), reward - info["decision_reward"], terminated]
        return jnp.concatenate([jnp.ravel(part).astype(float) for part in parts])

    several = jax.vmap(jax.vmap(one, in_axes=(0, None, None, None)), in_axes=axes)
    return np.asarray(_jit(several)(jax.random.split(key, (count, draws)), state, action, params))


def _homogeneity(outcomes: Any, bins: int = 8, least: float = 5.0) -> list[float]:
    """p-values that `outcomes` ``[decisions, draws, features]`` are alike, by each feature and by all together."""
    from scipy.special import chdtrc

    values = np.asarray(outcomes, np.float64)
    scale = np.maximum(np.abs(values).max(axis=(0, 1)), 1e-12)
    values = np.round(values / scale, 5)  # sums of rewards differ in their last digits
    decisions, draws, features = values.shape
    codes = np.empty(values.shape, np.int64)
    for i in range(features):
        known, code = np.unique(values[..., i], return_inverse=True)
        if len(known) > 2 * bins:
            edges = np.quantile(values[..., i], np.arange(1, bins) / bins)
            code = np.searchsorted(edges, values[..., i])
        codes[..., i] = code.reshape(decisions, draws)
    _, together = np.unique(codes.reshape(-1, features), axis=0, return_inverse=True)
    found = []
    for code in [*np.moveaxis(codes, -1, 0), together.reshape(decisions, draws)]:
        table = np.stack([np.bincount(row, minlength=code.max() + 1) for row in code])
        rare = table.sum(axis=0) < least * decisions
        table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
        # Where few counts are expected the statistic is not distributed as chi-square.
        table = table[:, table.sum(axis=0) >= least * decisions]
        if table.shape[1] > 1:
            expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
            statistic = np.sum((table - expected) ** 2 / expected)
            found.append(float(chdtrc((decisions - 1) * (table.shape[1] - 1), statistic)))
    return found or [1.0]
