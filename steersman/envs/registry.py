"""Environments by name: Steersman's own, gymnax's and Gymnasium's."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium

from steersman.envs.bandit import ContextualBandit
from steersman.envs.control_problem import ControlProblem
from steersman.envs.dynamics import (
    CartPoleBalance,
    CartPoleSwingUp,
    DiscreteCartPole,
    DoubleIntegrator,
    Pendulum,
    PlanarQuadrotor,
)
from steersman.envs.environment import Problem, as_problem
from steersman.envs.hidden_velocity import HiddenVelocity
from steersman.envs.lot_sizing import LotSizing
from steersman.envs.planar import DetourReach, DriftingGoal, HiddenTarget, ObstacleGate, TwoWalls
from steersman.errors import InputError, InputTypeError, unknown_name


def _push_t(**options: Any) -> Any:
    return _make_gymnasium("gym_pusht/PushT-v0", options)


def _pick_and_place(**options: Any) -> Any:
    return _make_gymnasium("steersman/PickAndPlace-v0", options)


_FACTORIES: dict[str, Callable[..., Any]] = {
    "cartpole-balance": CartPoleBalance,
    "cartpole-discrete": DiscreteCartPole,
    "cartpole-swingup": CartPoleSwingUp,
    "contextual-bandit": ContextualBandit,
    "detour-reach": DetourReach,
    "double-integrator": DoubleIntegrator,
    "drifting-goal": DriftingGoal,
    "hidden-target": HiddenTarget,
    "hidden-velocity": HiddenVelocity,
    "lot-sizing": LotSizing,
    "obstacle-gate": ObstacleGate,
    "pendulum-swingup": Pendulum,
    "pick-and-place": _pick_and_place,
    "planar-quadrotor": PlanarQuadrotor,
    "push-t": _push_t,
    "two-walls": TwoWalls,
}


def names() -> list[str]:
    """Every name that :func:`make` answers to: Steersman's, then gymnax's, then what only Gymnasium has."""
    known = [*_FACTORIES, *_gymnax_ids(), *_gymnasium_ids()]
    return list(dict.fromkeys(known))


def register(name: str, factory: Callable[..., Any]) -> None:
    """Makes an environment available under a name.

    Args:
        name: what :func:`make` shall answer to; letter case, hyphens and underscores do not matter.
        factory: called with the options of :func:`make`; returns anything that
            :func:`~steersman.envs.as_problem` accepts.

    Raises:
        InputError: the name is taken, empty, or holds a colon (which separates a library's name).
        InputTypeError: the factory cannot be called.
    """
    if not isinstance(name, str) or not _plain(name) or ":" in name:
        raise InputError(f"name is {name!r}, but it must be letters, digits and hyphens.")
    if _own_name(name) is not None:
        raise InputError(f"name is {name!r}, but it must be new: {_own_name(name)!r} is registered already.")
    if not callable(factory):
        raise InputTypeError(f"factory is a {type(factory).__name__}, but it must be a function that makes a problem.")
    _FACTORIES[name] = factory


def make(name: str, **options: Any) -> Any:
    """Makes a problem that algorithms can be trained on.

    Steersman's own names come first (``"pendulum-swingup"`` or ``"PendulumSwingup"``), then those of gymnax's
    environments, which are stepped on the device (``"CartPole-v1"``), then those of Gymnasium's, which are stepped on
    the host (``"Hopper-v5"``). ``"gymnax:..."`` and ``"gymnasium:..."`` choose a library.

    Args:
        name: the name; :func:`names` lists them.
        options: for Steersman's own, arguments of the problem and, for a control problem, ``num_steps``; for gymnax,
            arguments or parameters of the environment; for Gymnasium, arguments of
            :class:`~steersman.envs.gymnasium_bridge.GymnasiumProblem` and of ``gymnasium.make``.

    Returns:
        A :class:`~steersman.envs.Problem`, or a problem on the host.

    Raises:
        InputError: the name or an option is unknown, or a library is missing.
    """
    if not isinstance(name, str):
        raise InputTypeError(f"name is a {type(name).__name__}, but it must be text.")
    library, _, rest = name.rpartition(":")
    if library == "gymnax":
        return _make_gymnax(rest, options)
    if library == "gymnasium":
        return _make_gymnasium(rest, options)
    if library:
        # Gymnasium's own way of naming a module that registers environments when it is imported.
        return _make_gymnasium(name, options)
    own = _own_name(name)
    if own is not None:
        return _make_own(own, options)
    if name in _gymnax_ids():
        return _make_gymnax(name, options)
    if _in_gymnasium(name):
        return _make_gymnasium(name, options)
    raise unknown_name("environment", name, names())


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in "-_ ")


def _own_name(name: str) -> str | None:
    return next((own for own in _FACTORIES if _plain(own) == _plain(name)), None)


def _check_options(name: str, options: Iterable[str], accepted: Iterable[str]) -> None:
    accepted = list(accepted)
    for option in options:
        if option not in accepted:
            raise unknown_name(f"option of {name}", option, accepted)


def _make_own(name: str, options: dict[str, Any]) -> Any:
    factory = _FACTORIES[name]
    parameters = inspect.signature(factory).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    # A control problem has no number of steps: its environment does.
    for_environment = (
        {} if open_ended else {k: v for k, v in options.items() if k not in parameters and k == "num_steps"}
    )
    for_factory = {k: v for k, v in options.items() if k not in for_environment}
    if not open_ended:
        _check_options(name, for_factory, parameters)
    made = factory(**for_factory)
    if isinstance(made, ControlProblem):
        return as_problem(made.environment(**for_environment))
    _check_options(name, for_environment, parameters)
    return as_problem(made)


@functools.cache
def _builtin_gymnax_ids() -> tuple[str, ...]:
    # Importing gymnax takes seconds, as it brings its plotting along. Its list of names is a literal that can be read.
    spec = importlib.util.find_spec("gymnax")
    if spec is None or spec.origin is None:
        return ()
    source = Path(spec.origin).with_name("registration.py")
    if source.exists():
        for statement in ast.parse(source.read_text(encoding="utf-8")).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "_BUILTIN_ENV_IDS" for target in targets):
                return tuple(ast.literal_eval(statement.value))  # pyright: ignore[reportAttributeAccessIssue]
    import gymnax

    return tuple(gymnax.registered_envs)


def _gymnax_ids() -> tuple[str, ...]:
    loaded = sys.modules.get("gymnax")
    return tuple(getattr(loaded, "registered_envs", ())) or _builtin_gymnax_ids()


_MADE: dict[str, tuple[Any, Any]] = {}


def _make_gymnax(name: str, options: dict[str, Any]) -> Problem:
    if name not in _gymnax_ids():
        raise unknown_name("gymnax environment", name, _gymnax_ids())
    import gymnax

    # gymnax's environments compare by identity: the same object each time lets compiled programs be used again.
    if name not in _MADE:
        _MADE[name] = gymnax.make(name)
    environment, params = _MADE[name]
    fields = [field for field in getattr(params, "__dataclass_fields__", {})]
    arguments = [
        argument for argument in inspect.signature(type(environment).__init__).parameters if argument != "self"
    ]
    _check_options(name, options, {*fields, *(a for a in arguments if a not in ("args", "kwargs"))})
    if any(option in arguments for option in options):
        environment, params = gymnax.make(name, **{k: v for k, v in options.items() if k in arguments})
    values = {k: v for k, v in options.items() if k in fields and k not in arguments}
    return Problem(environment, params.replace(**values) if values else params)


def _gymnasium_ids() -> list[str]:
    from steersman.envs.gymnasium_bridge import NAMESPACES

    # The GymV... entries are adapters that take an environment, not environments.
    known = [name for name in gymnasium.registry if not name.startswith("GymV")]
    # Packages are imported when one of their tasks is made.
    installed = [ids for package, (ids, _) in NAMESPACES.items() if importlib.util.find_spec(package) is not None]
    return [*known, *(name for ids in installed for name in ids if name not in known)]


def _in_gymnasium(name: str) -> bool:
    from steersman.envs.gymnasium_bridge import import_namespace

    import_namespace(name)
    return name in gymnasium.registry


def _make_gymnasium(name: str, options: dict[str, Any]) -> Any:
    if ":" not in name:
        if not _in_gymnasium(name):
            raise unknown_name("Gymnasium environment", name, _gymnasium_ids())
        entry = gymnasium.registry[name].entry_point
        if str(entry).startswith("gymnasium.envs.mujoco") and importlib.util.find_spec("mujoco") is None:
            raise InputError(f"{name} needs MuJoCo: install it with pip install 'steersman[mujoco]'.")
    from steersman.envs.gymnasium_bridge import GymnasiumProblem

    options = dict(options)
    workers = {"workers": options.pop("workers")} if "workers" in options else {}
    return GymnasiumProblem(name, **workers, make_options=options)
