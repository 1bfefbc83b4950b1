"""Tells the author of a new environment, in one sentence, what is wrong with it."""

from __future__ import annotations

import functools
import re
from typing import Any, NoReturn

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jaxtyping import Array, Key, PyTree

from steersman.envs.control_problem import ControlProblem
from steersman.envs.environment import Problem
from steersman.envs.spaces import as_gymnasium_space, describe, sample
from steersman.errors import InputError, InputTypeError

_STEPS = 64
_COPIES = 2
_VALUES = "observation, state, reward, terminated, truncated, info"


def check(problem: Any, key: Key[Array, ""] | None = None) -> None:
    """Checks that an environment keeps the contract that collectors and algorithms rely on.

    Calls are traced before they are run, so most faults are found without compiling anything; then a short random
    rollout is compiled and run twice. What cannot be found this way: faults that a few random actions do not reach,
    and a time limit that is reported as a termination.

    Args:
        problem: an environment with gymnax 1.0's methods, a pair ``(environment, params)``, a
            :class:`~steersman.envs.Problem`, a :class:`~steersman.envs.ControlProblem`, or the name of one of these.
        key: randomness of the rollout; fixed where None, so that two checks see the same.

    Raises:
        InputError: the first fault that was found.
        InputTypeError: the object lacks a method, or is not an environment that JAX can step.
    """
    environment, params = _unpack(problem)
    name = str(getattr(environment, "name", type(environment).__name__))
    _Check(name, environment, params).run(jax.random.key(0) if key is None else key)


def _unpack(problem: Any) -> tuple[Any, PyTree]:
    if isinstance(problem, str):
        from steersman.envs.registry import make

        problem = make(problem)
    if getattr(problem, "on_host", False) or isinstance(problem, (gymnasium.Env, gymnasium.vector.VectorEnv)):
        raise InputTypeError(
            f"problem is a {type(problem).__name__}, which is stepped on the host: check it with "
            "gymnasium.utils.env_checker.check_env."
        )
    if isinstance(problem, ControlProblem):
        problem = problem.environment()
    if isinstance(problem, Problem):
        params = problem.params
        if problem.batched_params:
            params = jax.tree.map(lambda leaf: leaf[0], params)
        return problem.environment, params
    methods = ("reset", "step", "observation_space", "action_space")
    if isinstance(problem, tuple) and len(problem) == 2:
        environment, params = problem
        _require_methods(environment, methods)
        return environment, params
    environment: Any = problem
    _require_methods(environment, (*methods, "reset_env", "step_env"))
    try:
        return environment, environment.default_params
    except AttributeError:
        name = type(environment).__name__
        raise InputTypeError(
            f"{name} has no default_params: add them, or check an (environment, params) pair."
        ) from None


def _require_methods(environment: Any, methods: tuple[str, ...]) -> None:
    for method in methods:
        if not callable(getattr(environment, method, None)):
            raise InputTypeError(f"{type(environment).__name__} has no method {method}, which an environment needs.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class _Check:
    def __init__(self, name: str, environment: Any, params: PyTree):
        self.name = name
        self.environment = environment
        self.params = params

    def fail(self, text: str) -> NoReturn:
        raise InputError(f"{self.name}: {text}.")

    def run(self, key: Array) -> None:
        self.observation_space = self.space("observation_space")
        self.action_space = self.space("action_space")
        reset_key, step_key, action_key, rollout_key = jax.random.split(key, 4)
        observation, state = self.check_reset(reset_key)
        action = self.sample_action(action_key)
        self.check_step(step_key, observation, state, action)
        self.check_same_trace(reset_key, step_key, state, action)
        self.check_vmap(reset_key)
        self.check_rollout(rollout_key)

    def space(self, method: str) -> gymnasium.Space:
        try:
            return as_gymnasium_space(getattr(self.environment, method)(self.params))
        except Exception as error:
            self.fail(f"{method}(params) failed with {_first_line(error)}")

    def sample_action(self, key: Array) -> PyTree:
        try:
            return jax.eval_shape(lambda k: sample(self.action_space, k), key)
        except InputTypeError as error:
            self.fail(f"action_{str(error).rstrip('.')}")

    def trace(self, call: str, function: Any, *arguments: Any) -> Any:
        # Tracing needs no compilation, and finds whatever jit would refuse.
        try:
            return jax.eval_shape(function, *arguments)
        except jax.errors.JAXTypeError as error:
            self.fail(f"{call} cannot be compiled by jax.jit, it failed with {_first_line(error)}")
        except Exception as error:
            self.fail(f"{call} failed with {_first_line(error)}")

    def check_reset(self, key: Array) -> tuple[PyTree, PyTree]:
        call = "reset(key, params)"
        returned = self.trace(call, self.environment.reset, key, self.params)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            self.fail(f"{call} must return (observation, state), but it returned {_count(returned)}")
        observation, state = returned
        self.check_observation("reset's observation", observation, self.observation_space)
        return observation, state

    def check_step(self, key: Array, observation: PyTree, state: PyTree, action: PyTree) -> None:
        call = f"step(key, state, action, params) with a sample of action_space, {describe(self.action_space)},"
        returned = self.trace(call, self.environment.step, key, state, action, self.params)
        if not isinstance(returned, (tuple, list)) or len(returned) != 6:
            hint = (
                ", as Gym's old interface merges them: terminated (the task ended) and truncated (cut by a time limit) "
                "stay apart"
                if isinstance(returned, (tuple, list)) and len(returned) == 5
                else ""
            )
            self.fail(f"step must return 6 values ({_VALUES}), but it returned {_count(returned)}{hint}")
        following, next_state, reward, terminated, truncated, info = returned
        self.check_observation("step's observation", following, self.observation_space)
        self.check_reward(reward)
        self.check_flag("terminated", terminated, agents=True)
        self.check_flag("truncated", truncated)
        if not isinstance(info, dict):
            self.fail(f"info must be a dict, but step returned a {type(info).__name__} in its place")
        if "final_observation" not in info:
            self.fail(
                'info["final_observation"] is missing: step must report what was observed before an automatic restart'
            )
        self.check_same("step's state", state, next_state, "the state that reset returned")
        self.check_same("step's observation", observation, following, "the observation that reset returned")
        self.check_same('info["final_observation"]', observation, info["final_observation"], "the observation")
        if _one_value(lambda *given: self.environment.step(*given)[3:5], key, state, action, self.params):
            self.fail(
                "terminated and truncated are one and the same value: terminated says that the task ended, truncated "
                "that it was cut, and values are bootstrapped only through the second"
            )

    def check_reward(self, reward: Any) -> None:
        if not hasattr(reward, "dtype") or not jnp.issubdtype(reward.dtype, jnp.floating):
            kind = getattr(reward, "dtype", type(reward).__name__)
            self.fail(f"reward must be a floating-point number, but it is {kind}")
        agents = int(getattr(self.environment, "num_agents", 0))
        allowed = reward.ndim == 0 or (reward.ndim == 1 and reward.shape[0] > 1) or (agents > 0 and reward.ndim <= 2)
        if not allowed:
            self.fail(f"reward must be a scalar (or one vector of objectives), but it has shape {reward.shape}")

    def check_flag(self, what: str, flag: Any, agents: bool = False) -> None:
        if getattr(flag, "dtype", None) != jnp.bool_:
            self.fail(f"{what} must be boolean, but it is {getattr(flag, 'dtype', type(flag).__name__)}")
        num_agents = int(getattr(self.environment, "num_agents", 0))
        if flag.shape != () and not (agents and num_agents and flag.shape == (num_agents,)):
            self.fail(f"{what} must be a scalar, but it has shape {flag.shape}")

    def check_same(self, what: str, before: PyTree, after: PyTree, reference: str) -> None:
        old, new = jax.tree.structure(before), jax.tree.structure(after)
        if old != new:
            self.fail(f"{what} must have the structure of {reference}, {old}, but it has {new}")
        for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
            if b.shape != a.shape:
                self.fail(f"{what}{_leaf(path)} must have the shape of {reference}, {b.shape}, but it has {a.shape}")
            if b.dtype != a.dtype:
                self.fail(
                    f"{what}{_leaf(path)} must have the dtype of {reference}, {b.dtype}, but it has {a.dtype}, "
                    "which jax.lax.scan refuses"
                )

    def check_observation(self, what: str, observation: PyTree, space: gymnasium.Space) -> None:
        if isinstance(space, spaces.Dict):
            if not isinstance(observation, dict) or set(observation) != set(space.spaces):
                names = ", ".join(map(repr, space.spaces))
                self.fail(f"{what} must be a dict with the keys of observation_space, {names}")
            for key, part in space.spaces.items():
                self.check_observation(f"{what}[{key!r}]", observation[key], part)
            return
        if isinstance(space, spaces.Tuple):
            if not isinstance(observation, (tuple, list)) or len(observation) != len(space.spaces):
                self.fail(f"{what} must be a tuple of {len(space.spaces)} parts, as observation_space says")
            for i, part in enumerate(space.spaces):
                self.check_observation(f"{what}[{i}]", observation[i], part)
            return
        if not hasattr(observation, "shape"):
            self.fail(f"{what} must be an array of {describe(space)}, but it is a {type(observation).__name__}")
        agents = int(getattr(self.environment, "num_agents", 0))
        expected = space.shape or ()
        if observation.shape not in ((expected, (agents, *expected)) if agents else (expected,)):
            self.fail(
                f"{what} must have the shape that observation_space says, {expected}, but has {observation.shape}"
            )
        if not _same_kind(observation.dtype, np.dtype(space.dtype)):
            self.fail(
                f"{what} must have the dtype that observation_space says, {space.dtype}, but has {observation.dtype}"
            )

    def check_same_trace(self, reset_key: Array, step_key: Array, state: PyTree, action: PyTree) -> None:
        calls = (
            ("reset(key, params)", self.environment.reset, (reset_key, self.params)),
            ("step(key, state, action, params)", self.environment.step, (step_key, state, action, self.params)),
        )
        for call, function, arguments in calls:
            # NumPy's or Python's randomness is drawn while tracing, and shows as two programs that differ.
            first, second = (_program(function, arguments) for _ in range(2))
            if first != second:
                self.fail(f"{call} is not deterministic for equal keys: draw randomness with jax.random from the key")

    def check_vmap(self, key: Array) -> None:
        problem = Problem(self.environment, self.params)
        keys = jax.random.split(key, _COPIES)
        for call, function in (
            ("reset(key, params)", lambda: problem.reset(keys)),
            ("step(key, state, action, params)", lambda: self.random_step(problem, problem.reset(keys)[1], key)),
        ):
            try:
                jax.eval_shape(function)
            except Exception as error:
                self.fail(f"{call} cannot be mapped by jax.vmap, it failed with {_first_line(error)}")

    def random_step(self, problem: Problem, state: PyTree, key: Array) -> tuple:
        action_keys, step_keys = jax.random.split(key, (2, _COPIES))
        action = jax.vmap(lambda k: sample(self.action_space, k))(action_keys)
        return problem.step(step_keys, state, action)

    def check_rollout(self, key: Array) -> None:
        problem = Problem(self.environment, self.params)

        # Randomness is drawn outside of the loop, and nothing is optimized: compiling is most of the cost.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def run(key: Array) -> tuple:
            keys = jax.random.split(key, (2 * _STEPS + 1, _COPIES))
            start, state = problem.reset(keys[-1])
            actions = jax.vmap(jax.vmap(lambda k: sample(self.action_space, k)))(keys[:_STEPS])

            def step(state: PyTree, inputs: tuple) -> tuple[PyTree, tuple]:
                step_keys, action = inputs
                observation, state, reward, terminated, truncated, info = problem.step(step_keys, state, action)
                return state, (observation, info["final_observation"], reward, terminated, truncated)

            _, steps = jax.lax.scan(step, state, (keys[_STEPS : 2 * _STEPS], actions))
            return start, steps

        try:
            outcome = jax.device_get(run(key))
            again = jax.device_get(run(key))
        except Exception as error:
            self.fail(f"a rollout of {_STEPS} random steps under jax.jit failed with {_first_line(error)}")
        start, (observation, final, reward, terminated, truncated) = outcome
        self.check_values("reset's observation", jax.tree.map(lambda leaf: leaf[None], start))
        self.check_values("step's observation", observation)
        self.check_values('info["final_observation"]', final)
        self.check_finite("reward", reward)
        for first, second in zip(jax.tree.leaves(outcome), jax.tree.leaves(again), strict=True):
            if not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
                self.fail("two rollouts with equal keys differ: draw randomness with jax.random from the key")
        ended = terminated.reshape((*truncated.shape, -1)).any(axis=-1) | truncated
        for now, at_end in zip(jax.tree.leaves(observation), jax.tree.leaves(final), strict=True):
            differs = (now != at_end).reshape((*ended.shape, -1)).any(axis=-1)
            if (differs & ~ended).any():
                self.fail('info["final_observation"] must equal the observation wherever the episode goes on')

    def check_finite(self, what: str, values: PyTree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(values):
            if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
                step = int(np.argwhere(~np.isfinite(leaf))[0][0])
                self.fail(f"{what}{_leaf(path)} is not finite after {step + 1} random steps")

    def check_values(self, what: str, observation: PyTree) -> None:
        self.check_finite(what, observation)
        self.check_inside(what, observation, self.observation_space)

    def check_inside(self, what: str, values: PyTree, space: gymnasium.Space) -> None:
        if isinstance(space, spaces.Dict):
            for key, part in space.spaces.items():
                self.check_inside(f"{what}[{key!r}]", values[key], part)
        elif isinstance(space, spaces.Tuple):
            for i, part in enumerate(space.spaces):
                self.check_inside(f"{what}[{i}]", values[i], part)
        else:
            low, high = _bounds(space)
            tolerance = 1e-5 * np.maximum(1.0, np.abs(values)) if values.dtype.kind == "f" else 0
            outside = (values < low - tolerance) | (values > high + tolerance)
            if outside.any():
                value = values[tuple(np.argwhere(outside)[0])]
                self.fail(f"{what} is outside observation_space, {describe(space)}: it held {value}")


def _program(function: Any, arguments: tuple) -> tuple:
    # A fresh function each time, as JAX remembers what it has traced.
    jaxpr = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))
    return text, [np.asarray(constant).tobytes() for constant in jaxpr.consts if hasattr(constant, "dtype")]


def _one_value(function: Any, *arguments: Any) -> bool:
    """Whether the two results of `function` are the same variable of its program, and not a constant."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    first, second = jaxpr.outvars
    while True:
        makers = [e for e in jaxpr.eqns if any(first is v for v in e.outvars) and any(second is v for v in e.outvars)]
        if not makers:
            return False
        inner = makers[0].params.get("jaxpr")
        if inner is None or len(inner.jaxpr.outvars) != len(makers[0].outvars):
            # Nothing goes into the making of a constant.
            return first is second and bool(makers[0].invars)
        # The results of a nested jit: look at what they are inside.
        results = list(makers[0].outvars)
        jaxpr = inner.jaxpr
        first, second = (jaxpr.outvars[[v is result for v in results].index(True)] for result in (first, second))


def _leaf(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _count(returned: Any) -> str:
    return f"{len(returned)} values" if isinstance(returned, (tuple, list)) else f"a {type(returned).__name__}"


def _same_kind(given: Any, expected: np.dtype) -> bool:
    def kind(dtype: Any) -> str:
        return "f" if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).kind

    return kind(given) == kind(expected)


def _bounds(space: gymnasium.Space) -> tuple[Any, Any]:
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return 0, 1
