"""Hyperparameters by dotted name: reading, replacing and stacking them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from steersman.errors import unknown_name
from steersman.training.algorithm import Algorithm
from steersman.training.schedules import Schedule, as_scalar


@dataclass(frozen=True)
class Member:
    """One of the trainings that run side by side: a seed and the hyperparameters that differ."""

    seed: int
    settings: dict[str, float] = field(default_factory=dict)


def _fields(owner: Any) -> dict[str, dataclasses.Field]:
    """The fields of a part by name, class variables left out; nothing for what has none."""
    return {known.name: known for known in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}


def get_hyperparameter(algorithm: Any, name: str) -> Any:
    """The hyperparameter at a dotted name.

    Raises:
        InputError: there is none, with the nearest names that there are.
    """
    value: Any = algorithm
    for part in name.split("."):
        if part not in _fields(value):
            raise unknown_name("hyperparameter", name, hyperparameters(algorithm))
        value = getattr(value, part)
    return value


def hyperparameters(algorithm: Any, prefix: str = "") -> dict[str, Any]:
    """All hyperparameters by dotted name, with their values."""
    found: dict[str, Any] = {}
    for name in _fields(algorithm):
        value = getattr(algorithm, name)
        if isinstance(value, eqx.Module) and not isinstance(value, Schedule):
            found[prefix + name] = type(value).__name__
            found |= hyperparameters(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def apply_settings(algorithm: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of `algorithm` with hyperparameters replaced by dotted name, checked as its constructor checks them.

    All are replaced before anything is checked, so sizes that must fit each other can change together.
    """
    return _replaced(algorithm, settings, "", algorithm)


def _replaced(owner: Any, settings: Mapping[str, Any], prefix: str, root: Any) -> Any:
    arguments = {name: getattr(owner, name) for name, known in _fields(owner).items() if known.init}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        if first not in arguments:
            raise unknown_name("hyperparameter", prefix + name, hyperparameters(root))
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            arguments[first] = value
    for first, deeper in inner.items():
        arguments[first] = _replaced(arguments[first], deeper, f"{prefix}{first}.", root)
    return type(owner)(**arguments)


def with_settings(algorithm: Algorithm, members: list[Member]) -> tuple[Algorithm, PyTree]:
    """The algorithm with swept leaves stacked over members, and the axes to ``vmap`` it over."""
    axes = jax.tree.map(lambda _: None, algorithm)
    for name in members[0].settings:
        values = jnp.stack([as_scalar(m.settings[name]) for m in members])

        def at(tree: Any, name: str = name) -> Any:
            for part in name.split("."):
                tree = getattr(tree, part)
            return tree

        algorithm = eqx.tree_at(at, algorithm, values)
        axes = eqx.tree_at(at, axes, 0, is_leaf=lambda leaf: leaf is None)
    return algorithm, axes
