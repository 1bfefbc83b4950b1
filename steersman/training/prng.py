"""Random keys whose generator is one fused operation on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Key, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry2x32(
    key: UInt32[Array, "2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    words = [key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    high, low = high + words[0], low + words[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            high = high + low
            low = high ^ ((low << np.uint32(rotation)) | (low >> np.uint32(32 - rotation)))
        high = high + words[(i + 1) % 3]
        low = low + words[(i + 2) % 3] + np.uint32(i + 1)
    return high, low


def _counts(shape: Sequence[int]) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """``0, 1, 2, ...`` in the given shape, as high and low words."""
    count = int(np.prod(shape, dtype=np.uint64))
    if count >= 2**32:
        raise NotImplementedError(f"shape {tuple(shape)} asks for 2^32 or more random numbers in one call")
    low = jax.lax.iota(jnp.uint32, count).reshape(tuple(shape))
    return jnp.zeros_like(low), low


def _seed(seed: Array) -> UInt32[Array, "2"]:
    high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize == 8 else jnp.zeros((), jnp.uint32)
    return jnp.stack([high, seed.astype(jnp.uint32)])


def _split(key: UInt32[Array, "2"], shape: Sequence[int]) -> UInt32[Array, "... 2"]:
    return jnp.stack(_threefry2x32(key, *_counts(shape)), axis=-1)


def _fold_in(key: UInt32[Array, "2"], data: int | Array) -> UInt32[Array, "2"]:
    return jnp.stack(_threefry2x32(key, jnp.zeros((), jnp.uint32), jnp.asarray(data, jnp.uint32)))


def _random_bits(key: UInt32[Array, "2"], width: int, shape: Sequence[int]) -> Array:
    high, low = _threefry2x32(key, *_counts(shape))
    if width == 64:
        return (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)
    return (high ^ low).astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width])


#: JAX's own generator and its very numbers, but without its loop: on CPU, JAX runs the rounds of Threefry as a loop of
#: about 80 small operations, which takes two thirds of a rollout's time. Unrolled, the rounds are one fused operation.
UNROLLED_THREEFRY = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="unrolled_threefry2x32",
    tag="ufry",
)


def key(seed: int) -> Key[Array, ""]:
    """A random key that gives the same numbers as ``jax.random.key(seed)``, faster on CPU."""
    return jax.random.key(seed, impl=UNROLLED_THREEFRY)
