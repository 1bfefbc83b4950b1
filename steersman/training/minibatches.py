"""Epochs of shuffled minibatches as one scan."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree, UInt32

from steersman.errors import require, require_count

State = TypeVar("State", bound=PyTree)

_ROUNDS = 6


def _mix(x: UInt32[Array, "..."], key: UInt32[Array, ""]) -> UInt32[Array, "..."]:
    """An integer hash whose every output bit depends on every input bit (the finalizer of MurmurHash3)."""
    x = x * jnp.uint32(0x9E3779B1) + key
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def shuffled(key: Key[Array, ""], count: int) -> Int[Array, " count"]:
    """A pseudo-random order of ``0 .. count - 1``.

    Sorting random keys, as ``jax.random.permutation`` does, can take a quarter of a whole PPO iteration on CPU. Here
    the order is an alternating Feistel network over the mixed radix ``count = a b`` (Black and Rogaway, 2002,
    "Ciphers with arbitrary finite domains"): every round adds a hash of one digit to the other digit, which is
    invertible whatever the hash, so the result is a permutation without any sorting. Counts that are small or have
    no factors of similar size are sorted after all.
    """
    require_count("count", count)
    radix = next(a for a in range(math.isqrt(count), 0, -1) if count % a == 0)
    if radix < 16:
        return jax.random.permutation(key, count)
    other = count // radix
    round_keys = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)
    index = jnp.arange(count, dtype=jnp.uint32)
    high, low = index // other, index % other
    for i in range(_ROUNDS):
        # The hash is reduced before it is added: a sum that wraps at 2^32 would no longer be invertible.
        high = (high + _mix(low, round_keys[i, 0]) % radix) % radix
        low = (low + _mix(high, round_keys[i, 1]) % other) % other
    return (high * other + low).astype(jnp.int32)


def minibatch_epochs(
    update: Callable[[State, PyTree], tuple[State, PyTree]],
    state: State,
    rows: PyTree,
    key: Key[Array, ""],
    *,
    epochs: int,
    minibatches: int,
    prepare: Callable[[PyTree], PyTree] | None = None,
    after_epoch: Callable[[State], State] | None = None,
) -> tuple[State, PyTree]:
    """Runs `update` over shuffled minibatches for several epochs.

    Args:
        update: maps ``(state, minibatch)`` to ``(state, outputs)``.
        state: what is updated.
        rows: a PyTree whose leaves share their leading axis ``R``; a minibatch has ``R / minibatches`` of them.
        key: randomness of the order.
        epochs: passes over the rows; each is shuffled anew.
        minibatches: number of equal parts of one pass.
        prepare: what is done to a minibatch that does not depend on the state (standardizing, say). It is done to all
            minibatches of an epoch at once, which is much cheaper than one by one within the scan.
        after_epoch: what is done to the state after each epoch.

    Returns:
        The last state, and the outputs stacked ``[epochs, minibatches, ...]``.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    require_count("epochs", epochs)
    require_count("minibatches", minibatches)
    require(count % minibatches == 0, "minibatches", minibatches, f"a divisor of the {count} rows of a batch")

    def epoch(state: State, key: Key[Array, ""]) -> tuple[State, PyTree]:
        # The whole batch is put in order once an epoch; a gather per minibatch would read it as often again.
        order = shuffled(key, count) if minibatches > 1 else None

        def arrange(leaf: Array) -> Array:
            ordered = leaf if order is None else jnp.take(leaf, order, axis=0, unique_indices=True, mode="clip")
            return ordered.reshape((minibatches, count // minibatches, *leaf.shape[1:]))

        arranged = jax.tree.map(arrange, rows)
        state, outputs = jax.lax.scan(update, state, arranged if prepare is None else jax.vmap(prepare)(arranged))
        return state if after_epoch is None else after_epoch(state), outputs

    return jax.lax.scan(epoch, state, jax.random.split(key, epochs))
