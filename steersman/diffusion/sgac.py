"""SGAC: self-guidance and adaptive chunking for generative policies (So et al., 2025, arXiv:2510.12392)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Var
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.diffusion.combination import UnderConditions
from steersman.diffusion.execution import require_generator
from steersman.diffusion.generator import ChunkGenerator
from steersman.errors import InputError, require, require_count, require_number, unknown_name
from steersman.policies import ChunkPolicy, Policy
from steersman.policies.windows import Seen, Window
from steersman.training.schedules import Continuous, as_scalar

METRICS = ("cosine", "l1", "l2")


class SelfGuidedCarry(NamedTuple):
    """The memory of :class:`SelfGuidedPolicy`.

    Attributes:
        seen: the observations, the past one's included.
        queue: the actions that are planned from now on, in the denoiser's units ``[R, D]``.
        left: how many of them there are.
        since: steps since a chunk was drawn.
    """

    seen: Seen
    queue: Float[Array, "R D"]
    left: Int[Array, ""]
    since: Int[Array, ""]


class SelfGuidedPolicy(Policy):
    """A frozen generative policy, guided by what it would have done a moment ago, that keeps a plan while it is good.

    *Self-guidance* asks the denoiser for the present observation and for a past one, ``(1 + w) e(x, s_t) -
    w e(x, s_{t-lookback})``, in one batch: chunks move on in the direction in which the observation moved. It is the
    same combination whatever the network predicts, as all predictions are affine in each other. Before an episode is
    `lookback` steps old its first observation is the past one, so the first chunk is not guided.

    *Adaptive chunking* draws a chunk at every step and compares its first action with the queued one that was planned
    for now. Where they agree the queue is kept and the fresh chunk's last row is appended to it; where they do not, the
    fresh chunk takes the queue's place.

    Attributes:
        policy: what is guided; its action horizon is not used.
        guidance_scale: ``w``; None switches self-guidance off, and with it the second half of the batch.
        threshold: how alike the two actions must be. A cosine in [-1, 1], 1.01 to never keep and -1.01 to always keep;
            a distance for the other metrics. None switches adaptive chunking off: the fresh chunk is always taken.
        lookback: how many steps ago the past observation is from.
        metric: one of ``METRICS``, on actions in the denoiser's units.
        replan_every: steps from one drawn chunk to the next; the queue is played in between.
        append_tail: whether a queue that is kept is filled up. Otherwise it is played to its end.
    """

    policy: ChunkPolicy
    guidance_scale: Continuous | None = eqx.field(converter=as_scalar, default=1.0)
    threshold: Continuous | None = eqx.field(converter=as_scalar, default=0.97)
    lookback: int = eqx.field(static=True, default=1)
    metric: str = eqx.field(static=True, default="cosine")
    replan_every: int = eqx.field(static=True, default=1)
    append_tail: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        generator = require_generator(self.policy)
        require_count("lookback", self.lookback)
        require_count("replan_every", self.replan_every)
        rows = self._rows
        if self.replan_every > rows:
            raise InputError(f"replan_every is {self.replan_every}, but a chunk has only {rows} rows from now on.")
        if self.metric not in METRICS:
            raise unknown_name("metric", self.metric, METRICS)
        if self.threshold is not None:
            bounds = {"at_least": -1.01, "at_most": 1.01} if self.metric == "cosine" else {"at_least": 0.0}
            require_number("threshold", self.threshold, **bounds)
        if self.guidance_scale is not None:
            require_number("guidance_scale", self.guidance_scale, at_least=0.0)
            window = self.policy.window()
            if not _looks(generator, window.now(window.init())):
                warnings.warn("policy's denoiser ignores the observation: self-guidance changes nothing.", stacklevel=3)

    @property
    def _rows(self) -> int:
        generator: Any = self.policy.generator
        return generator.denoiser.chunk_shape[0] - self.policy.first_row

    @property
    def _window(self) -> Window:
        return self.policy.window(0 if self.guidance_scale is None else self.lookback)

    def init(self, key: Key[Array, ""]) -> SelfGuidedCarry:
        del key
        generator: Any = self.policy.generator
        queue = jnp.zeros((self._rows, generator.denoiser.chunk_shape[1]))
        none = jnp.zeros((), jnp.int32)
        return SelfGuidedCarry(self._window.init(), queue, none, none)

    def __call__(
        self, observation: PyTree, carry: SelfGuidedCarry, key: Key[Array, ""]
    ) -> tuple[Float[Array, " D"], SelfGuidedCarry]:
        seen = self._window.push(carry.seen, observation)

        def replan() -> tuple[Array, Array, Array]:
            fresh = self._drawn(seen, key)[self.policy.first_row :].astype(carry.queue.dtype)
            queue, left = self._kept(carry.queue, carry.left, fresh)
            return queue, left, jnp.zeros_like(carry.since)

        def go_on() -> tuple[Array, Array, Array]:
            return carry.queue, carry.left, carry.since

        if self.replan_every == 1:
            queue, left, since = replan()
        else:
            due = (carry.left == 0) | (carry.since >= self.replan_every)
            queue, left, since = jax.lax.cond(due, replan, go_on)
        generator: Any = self.policy.generator
        action = generator.action_scaling.restore(queue)[0]
        return action, SelfGuidedCarry(seen, jnp.roll(queue, -1, axis=0), left - 1, since + 1)

    def _drawn(self, seen: Seen, key: Array) -> Array:
        """A chunk, in the denoiser's units."""
        generator: Any = self.policy.generator
        if self.guidance_scale is None:
            return generator.chain(self._window.now(seen), key).chunk
        window = self._window
        both = jax.tree.map(lambda *each: jnp.stack(each), window.now(seen), window.past(seen))
        return self_guided(generator, self.guidance_scale).chain(both, key).chunk

    def _kept(self, queue: Array, left: Array, fresh: Array) -> tuple[Array, Array]:
        """The queue after the comparison with a fresh chunk, and how many actions it has."""
        rows = jnp.asarray(self._rows, left.dtype)
        if self.threshold is None:
            return fresh, rows
        keep = (left > 0) & agree(queue[0], fresh[0], self.threshold, self.metric)
        if not self.append_tail:
            return jnp.where(keep, queue, fresh), jnp.where(keep, left, rows)
        planned = (jnp.arange(queue.shape[0]) < left)[:, None]
        return jnp.where(keep & planned, queue, fresh), rows

    def mode(self) -> SelfGuidedPolicy:
        return eqx.tree_at(lambda own: own.policy, self, self.policy.mode())


def self_guided(generator: ChunkGenerator, guidance_scale: Continuous) -> ChunkGenerator:
    """A generator that is called with the present and a past observation, stacked: leaves ``[2, ...]``.

    ``(1 + w) e(x, present) - w e(x, past)``: level by level the score of
    ``p(a | present) (p(a | present) / p(a | past))^w``.
    """
    weights = jnp.stack([1.0 + jnp.asarray(guidance_scale), -jnp.asarray(guidance_scale)])
    return eqx.tree_at(lambda own: own.denoiser, generator, UnderConditions(generator.denoiser, weights))


def agree(
    queued: Float[Array, " D"], fresh: Float[Array, " D"], threshold: Continuous, metric: str = "cosine"
) -> Bool[Array, ""]:
    """Whether two actions are alike: a cosine above `threshold`, or a distance below it.

    Of actions that are zero (below 1e-6 in length) two have a cosine of 1, and one has -1 with any other.
    """
    if metric != "cosine":
        gap = queued - fresh
        length = jnp.sum(jnp.abs(gap)) if metric == "l1" else jnp.sqrt(jnp.sum(gap**2))
        return length < threshold
    norms = jnp.linalg.norm(queued), jnp.linalg.norm(fresh)
    still = jnp.stack(norms) < 1e-6
    cosine = jnp.dot(queued, fresh) / jnp.where(jnp.any(still), 1.0, norms[0] * norms[1])
    return jnp.where(jnp.all(still), 1.0, jnp.where(jnp.any(still), -1.0, cosine)) > threshold


def _looks(generator: ChunkGenerator, observation: PyTree) -> bool:
    """Whether a prediction is computed from the observation at all."""
    denoiser = generator.denoiser
    level = denoiser.process.grid(1).current[0]

    def predict(observation: PyTree) -> PyTree:
        found = denoiser.predict(jnp.zeros(denoiser.chunk_shape), level, generator.encode(observation))
        return found.noise, found.sample

    graph = jax.make_jaxpr(predict)(observation).jaxpr
    reached = set(graph.invars)
    for equation in graph.eqns:
        if any(isinstance(each, Var) and each in reached for each in equation.invars):
            reached.update(equation.outvars)
    return any(isinstance(each, Var) and each in reached for each in graph.outvars)


def activation_guidance(
    blocks: Sequence[Callable[[Array], Array]],
    hidden: Float[Array, "..."],
    cached: Sequence[Float[Array, "..."]] | None,
    guidance_scale: Continuous,
) -> tuple[Float[Array, "..."], list[Array]]:
    """Self-guidance of a network that is no denoiser, block by block; experimental.

    ``h_i = (1 + w) T_i(h_{i-1}) - w h'_i`` with the activations ``h'`` of the last control step: equation 15 of the
    paper as its text has it, its exact form is not confirmed.

    Args:
        blocks: the network's blocks ``T_i``.
        hidden: what the first one gets.
        cached: the activations of the last control step, one for each block; None at an episode's first step, with a
            scale of 0.
        guidance_scale: ``w``.

    Returns:
        The last activation, and all of them for the next control step.

    Raises:
        InputError: there are no cached activations, or not one for each block.
    """
    require_number("guidance_scale", guidance_scale, at_least=0.0)
    if cached is None:
        off = not isinstance(guidance_scale, Tracer) and float(guidance_scale) == 0.0
        require(off, "cached", cached, "the last control step's activations, unless guidance_scale is 0")
    else:
        require(
            len(cached) == len(blocks), "cached", f"{len(cached)} activations", f"{len(blocks)}, one for each block"
        )
    activations = []
    for i, block in enumerate(blocks):
        fresh = block(hidden)
        hidden = fresh if cached is None else (1.0 + guidance_scale) * fresh - guidance_scale * cached[i]
        activations.append(hidden)
    return hidden, activations
