"""Gymnasium's spaces as the library's only space type: conversion, sampling and sizes."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputTypeError


def as_gymnasium_space(space: Any) -> gymnasium.Space:
    """Converts a gymnax-style space to Gymnasium's; a Gymnasium space is returned unchanged."""
    if isinstance(space, gymnasium.Space):
        return space
    if hasattr(space, "spaces"):
        inner = space.spaces
        if isinstance(inner, dict):
            return spaces.Dict({name: as_gymnasium_space(part) for name, part in inner.items()})
        return spaces.Tuple([as_gymnasium_space(part) for part in inner])
    if hasattr(space, "n"):
        return spaces.Discrete(int(space.n))
    if hasattr(space, "low") and hasattr(space, "high"):
        shape = tuple(int(size) for size in space.shape)
        dtype = np.dtype(space.dtype)
        low = np.broadcast_to(np.asarray(space.low), shape).astype(dtype)
        high = np.broadcast_to(np.asarray(space.high), shape).astype(dtype)
        return spaces.Box(low, high, shape, dtype.type)
    raise InputTypeError(f"space is a {type(space).__name__}, but it must be a Gymnasium or a gymnax space.")


def sample(space: gymnasium.Space, key: Key[Array, ""]) -> PyTree:
    """Draws one element of `space` inside ``jit``; unbounded boxes are sampled from a standard normal."""
    if isinstance(space, spaces.Discrete):
        return jax.random.randint(key, (), int(space.start), int(space.start) + int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        start = jnp.asarray(space.start)
        return jax.random.randint(key, space.shape, start, start + jnp.asarray(space.nvec))
    if isinstance(space, spaces.MultiBinary):
        return jax.random.bernoulli(key, 0.5, space.shape).astype(jnp.int8)
    if isinstance(space, spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            return jax.random.randint(key, space.shape, jnp.asarray(space.low), jnp.asarray(space.high) + 1)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        low = np.where(bounded, space.low, 0.0)
        high = np.where(bounded, space.high, 1.0)
        uniform_key, normal_key = jax.random.split(key)
        uniform = low + (high - low) * jax.random.uniform(uniform_key, space.shape)
        normal = jnp.clip(jax.random.normal(normal_key, space.shape), space.low, space.high)
        return jnp.where(bounded, uniform, normal).astype(space.dtype)
    if isinstance(space, spaces.Dict):
        keys = jax.random.split(key, len(space.spaces))
        return {name: sample(part, k) for (name, part), k in zip(space.spaces.items(), keys, strict=True)}
    if isinstance(space, spaces.Tuple):
        keys = jax.random.split(key, len(space.spaces))
        return tuple(sample(part, k) for part, k in zip(space.spaces, keys, strict=True))
    raise InputTypeError(f"space is a {type(space).__name__}, which cannot be sampled inside jit.")


class Layout(eqx.Module):
    """How an element of a space becomes a vector of floats. Holds no bounds, hashes, and is a PyTree without leaves.

    Attributes:
        kind: ``values`` (taken as they are), ``one_hot``, or ``parts`` (concatenated).
        size: length of the vector.
        start: number of the first category.
        sizes: number of categories in each place of a one-hot layout.
        names: keys of the parts; positions where the space is a tuple.
        parts: their layouts.
        allowed: whether an ``"action_mask"`` travels beside the vector.
    """

    kind: str = eqx.field(static=True)
    size: int = eqx.field(static=True)
    start: tuple[int, ...] = eqx.field(static=True, default=())
    sizes: tuple[int, ...] = eqx.field(static=True, default=())
    names: tuple[str | int, ...] = eqx.field(static=True, default=())
    parts: tuple[Layout, ...] = ()
    allowed: bool = eqx.field(static=True, default=False)

    def __call__(self, element: PyTree) -> Float[Array, " size"]:
        """One element as a float vector."""
        if self.kind == "parts":
            return jnp.concatenate([part(element[name]) for name, part in zip(self.names, self.parts, strict=True)])
        flat = jnp.ravel(jnp.asarray(element))
        if self.kind == "one_hot":
            hots = [jax.nn.one_hot(flat[i] - self.start[i], n) for i, n in enumerate(self.sizes)]
            return hots[0] if len(hots) == 1 else jnp.concatenate(hots)
        return flat if jnp.issubdtype(flat.dtype, jnp.floating) else flat.astype(jnp.float32)


def layout(space: gymnasium.Space) -> Layout:
    """The vector layout of `space`: discrete parts become one-hot, an action mask is left out.

    Raises:
        InputTypeError: the space has no vector form.
    """
    if isinstance(space, spaces.Dict):
        names = tuple(name for name in space.spaces if name != "action_mask")
        parts = tuple(layout(space.spaces[name]) for name in names)
        size = sum(part.size for part in parts)
        return Layout("parts", size, names=names, parts=parts, allowed="action_mask" in space.spaces)
    if isinstance(space, spaces.Tuple):
        parts = tuple(layout(part) for part in space.spaces)
        return Layout("parts", sum(p.size for p in parts), names=tuple(range(len(parts))), parts=parts)
    if isinstance(space, spaces.Discrete):
        return Layout("one_hot", int(space.n), start=(int(space.start),), sizes=(int(space.n),))
    if isinstance(space, spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in np.ravel(space.nvec))
        return Layout("one_hot", sum(sizes), start=tuple(int(n) for n in np.ravel(space.start)), sizes=sizes)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return Layout("values", math.prod(space.shape))
    raise InputTypeError(f"observation space is a {type(space).__name__}, which has no vector form.")


def describe(space: gymnasium.Space) -> str:
    """A short human-readable form, for error messages."""
    if isinstance(space, spaces.Box):
        return f"Box of shape {space.shape}"
    return str(space)
