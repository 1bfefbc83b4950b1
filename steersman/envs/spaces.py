"""Gymnasium's spaces as the library's only space type: conversion, sampling and sizes."""

from __future__ import annotations

from typing import Any

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


def flat_size(space: gymnasium.Space) -> int:
    """Number of floats that :func:`flatten` makes of one element of `space`."""
    if isinstance(space, spaces.Dict):
        return sum(flat_size(part) for name, part in space.spaces.items() if name != "action_mask")
    if isinstance(space, spaces.Tuple):
        return sum(flat_size(part) for part in space.spaces)
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(np.sum(space.nvec))
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return int(np.prod(space.shape))
    raise InputTypeError(f"observation space is a {type(space).__name__}, which has no flat vector form.")


def flatten(space: gymnasium.Space, element: PyTree) -> Float[Array, " size"]:
    """One element of `space` as a float vector; discrete parts become one-hot, an action mask is left out."""
    if isinstance(space, spaces.Dict):
        parts = [flatten(p, element[name]) for name, p in space.spaces.items() if name != "action_mask"]
        return jnp.concatenate(parts)
    if isinstance(space, spaces.Tuple):
        return jnp.concatenate([flatten(p, e) for p, e in zip(space.spaces, element, strict=True)])
    if isinstance(space, spaces.Discrete):
        return jax.nn.one_hot(element - int(space.start), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        sizes = np.asarray(space.nvec).ravel()
        values = jnp.ravel(jnp.asarray(element) - jnp.asarray(space.start))
        return jnp.concatenate([jax.nn.one_hot(values[i], int(n)) for i, n in enumerate(sizes)])
    flat = jnp.ravel(element)
    return flat if jnp.issubdtype(flat.dtype, jnp.floating) else flat.astype(jnp.float32)


def describe(space: gymnasium.Space) -> str:
    """A short human-readable form, for error messages."""
    if isinstance(space, spaces.Box):
        return f"Box of shape {space.shape}"
    return str(space)
