"""Ways to play chunks that are drawn anew at every step: as they come, blended with the last ones, or selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.generator import ChunkGenerator
from steersman.errors import InputError, InputTypeError, require_count, require_number
from steersman.policies import ChunkPolicy, Policy
from steersman.policies.windows import Seen
from steersman.training.schedules import Continuous, as_scalar


def require_chunk_policy(policy: Any) -> ChunkPolicy:
    """Returns `policy` if it plays chunks that are arrays of at least two rows.

    Raises:
        InputTypeError: it is no :class:`~steersman.policies.ChunkPolicy`, or its chunks are no arrays.
        InputError: its chunks have one row, which leaves none for the next step.
    """
    if not isinstance(policy, ChunkPolicy):
        raise InputTypeError(
            f"policy is a {type(policy).__name__}, but it must be a ChunkPolicy, such as ChunkGenerator.policy makes."
        )
    shape = chunk_shape(policy)
    rows = shape[0] - policy.first_row
    if rows < 2:
        raise InputError(
            f"policy's chunks have {rows} row from row {policy.first_row} on, but at least 2 are needed: one for now, "
            "one to go on from at the next step."
        )
    return policy


def require_generator(policy: Any) -> ChunkGenerator:
    """Returns the generator of a policy that :func:`require_chunk_policy` passes.

    Raises:
        InputTypeError: it is no :class:`~steersman.diffusion.ChunkGenerator`.
    """
    generator = require_chunk_policy(policy).generator
    if not isinstance(generator, ChunkGenerator):
        kind = type(generator).__name__
        raise InputTypeError(f"policy's generator is a {kind}, but it must be a ChunkGenerator.")
    return generator


def chunk_shape(policy: ChunkPolicy) -> tuple[int, int]:
    """``(H, D)`` of a policy's chunks.

    Raises:
        InputTypeError: they are no single array ``[H, D]``.
    """
    window = policy.window()
    read = window.now(window.init())
    shapes = jax.tree.leaves(jax.eval_shape(lambda seen, key: policy.generator(seen, key), read, jax.random.key(0)))
    if len(shapes) != 1 or len(shapes[0].shape) != 2:
        shown = [shape.shape for shape in shapes]
        raise InputTypeError(f"policy's chunks are arrays of shapes {shown}, but they must be one array [H, D].")
    return shapes[0].shape


def shifted(chunk: Float[Array, "H D"]) -> Float[Array, "H D"]:
    """A chunk one step later: without its first row, the last one twice."""
    return jnp.concatenate([chunk[1:], chunk[-1:]])


class Planned(NamedTuple):
    """The memory of policies that keep their last chunk.

    Attributes:
        seen: the observations.
        chunk: the last chunk, in the task's units ``[H, D]``.
    """

    seen: Seen
    chunk: Float[Array, "H D"]


class TemporalEnsemble(Policy):
    """Draws a chunk at every step and plays a running average over the chunks that planned the same moment.

    ``A_t = decay shift(A_{t-1}) + (1 - decay) A'_t`` with a fresh chunk ``A'_t``; row by row this is the exponential
    ensembling of Zhao et al. (2023, arXiv:2304.13705). Averages of two modes may be neither.

    Attributes:
        policy: what draws chunks; its action horizon is not used.
        decay: weight of the old plan, from 0 (the fresh chunk alone) to below 1.
    """

    policy: ChunkPolicy
    decay: Continuous = eqx.field(converter=as_scalar, default=0.5)

    def __check_init__(self) -> None:
        require_chunk_policy(self.policy)
        require_number("decay", self.decay, at_least=0.0, below=1.0)

    def init(self, key: Key[Array, ""]) -> Planned:
        del key
        return Planned(self.policy.window().init(), jnp.zeros(chunk_shape(self.policy)))

    def __call__(self, observation: PyTree, carry: Planned, key: Key[Array, ""]) -> tuple[Array, Planned]:
        window = self.policy.window()
        seen = window.push(carry.seen, observation)
        fresh = self.policy.generator(window.now(seen), key)
        decay = jnp.where(carry.seen.started, self.decay, 0.0).astype(fresh.dtype)
        chunk = decay * shifted(carry.chunk) + (1.0 - decay) * fresh
        return chunk[self.policy.first_row], Planned(seen, chunk)

    def mode(self) -> TemporalEnsemble:
        return eqx.tree_at(lambda own: own.policy, self, self.policy.mode())


class BidirectionalDecoding(Policy):
    """Draws several chunks at every step and plays the one that agrees best with the last plan and with its peers.

    The chunk that minimises ``sum_j decay^j |a_j - b_j|^2 + contrast (mean_i |A - A_i| - mean_i |A - W_i|)`` is taken,
    with ``b`` the last chunk shifted by a row, ``A_i`` the chunks drawn and ``W_i`` those of a weaker policy: backward
    coherence and forward contrast of Liu et al. (2024, arXiv:2408.17355), their details as remembered.

    Attributes:
        policy: what draws chunks; its action horizon is not used.
        weak: a generator of worse chunks, such as an early checkpoint; None leaves the contrast out.
        samples: chunks drawn at every step, and as many weak ones.
        decay: how much less each later row of the last plan counts.
        contrast: weight of the forward contrast.
    """

    policy: ChunkPolicy
    weak: Callable[[PyTree, Key[Array, ""]], Array] | None = None
    samples: int = eqx.field(static=True, default=16)
    decay: Continuous = eqx.field(converter=as_scalar, default=0.5)
    contrast: Continuous = eqx.field(converter=as_scalar, default=1.0)

    def __check_init__(self) -> None:
        require_chunk_policy(self.policy)
        require_count("samples", self.samples)
        require_number("decay", self.decay, at_least=0.0, at_most=1.0)
        require_number("contrast", self.contrast, at_least=0.0)

    def init(self, key: Key[Array, ""]) -> Planned:
        del key
        return Planned(self.policy.window().init(), jnp.zeros(chunk_shape(self.policy)))

    def __call__(self, observation: PyTree, carry: Planned, key: Key[Array, ""]) -> tuple[Array, Planned]:
        window, first = self.policy.window(), self.policy.first_row
        seen = window.push(carry.seen, observation)
        read = window.now(seen)
        strong_key, weak_key = jax.random.split(key)

        def drawn(generator: Callable, key: Array) -> Array:
            return jax.vmap(lambda key: generator(read, key))(jax.random.split(key, self.samples))

        chunks = drawn(self.policy.generator, strong_key)
        # The last plan's last row, which stands for one that it does not have, does not count.
        gap = jnp.sum((chunks - shifted(carry.chunk)) ** 2, axis=-1)[:, first:-1]
        cost = jnp.where(carry.seen.started, gap @ (self.decay ** jnp.arange(gap.shape[1])), 0.0)
        if self.weak is not None:
            weak = drawn(self.weak, weak_key)
            cost = cost + self.contrast * (_mean_distance(chunks, chunks) - _mean_distance(chunks, weak))
        chunk = chunks[jnp.argmin(cost)]
        return chunk[first], Planned(seen, chunk)

    def mode(self) -> BidirectionalDecoding:
        """Itself: what it selects from are draws."""
        return self


def _mean_distance(chunks: Array, others: Array) -> Array:
    flat, flat_others = (jnp.reshape(part, (part.shape[0], -1)) for part in (chunks, others))
    return jnp.mean(jnp.linalg.norm(flat[:, None] - flat_others[None], axis=-1), axis=1)
