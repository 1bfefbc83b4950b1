"""A phase that takes an updated policy back within a bound on its divergence from the old one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from steersman.errors import InputError, require, require_count, require_number
from steersman.rl.phases import Phase, PhaseTools, Running
from steersman.rl.surrogates import STATISTICS
from steersman.training.schedules import Continuous, scalar

_BISECTIONS = 24
#: The bound is met with this much to spare, so that it holds however the same divergences are rounded later.
_SPARE = 1e-4
#: A penalty of weight zero has no gradient; Adam makes the size of the step insensitive to the weight.
_LEAST_PENALTY = 1e-3


class FixUpCounts(NamedTuple):
    """What fixing up a batch took.

    Attributes:
        steps: gradient steps.
        passes: passes over the batch that made any.
        interpolated: whether the steps did not suffice, so that the policy was moved back along the straight line.
    """

    steps: Int[Array, ""]
    passes: Int[Array, ""]
    interpolated: Bool[Array, ""]


class FixUp(Phase):
    """Descends the divergence alone, chunk by chunk, until no state of the batch exceeds the bound.

    The second phase of Zentner et al., 2023 (arXiv:2312.05405). It ends only after a look at the whole batch that
    finds the bound met, so the policy that it returns meets it by construction. Should `max_steps` steps not suffice,
    the parameters are moved back along the straight line to the old ones, as far as the bound asks for; the old ones
    themselves always meet it.

    The critic, and its part of the optimizer's state, stay as they are.

    Attributes:
        bound: most divergence ``KL(old || new)``, in nats; the surrogate's own bound where it is None.
        rows: rows of a chunk, at most.
        max_steps: most gradient steps of one run of the phase; not checked within a pass.
        statistic: ``"max"`` bounds every state of the batch, ``"mean"`` their mean.
        fresh_optimizer: start each run with an empty optimizer state. The shared one still carries momentum of the
            steps that led outwards.
    """

    bound: Continuous | None = scalar(None)
    rows: int = eqx.field(static=True, default=1024)
    max_steps: int = eqx.field(static=True, default=200)
    statistic: str = eqx.field(static=True, default="max")
    fresh_optimizer: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        if self.bound is not None:
            require_number("bound", self.bound, above=0.0)
        require_count("rows", self.rows)
        require_count("max_steps", self.max_steps, minimum=0)
        require(self.statistic in STATISTICS, "statistic", self.statistic, " or ".join(STATISTICS))

    def init(self) -> FixUpCounts:
        return FixUpCounts(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.asarray(False))

    def metrics(self, state: FixUpCounts) -> dict[str, Float[Array, ""]]:
        numbers = {"fix_up_steps": state.steps, "fix_up_passes": state.passes, "interpolated": state.interpolated}
        return {name: value.astype(jnp.float32) for name, value in numbers.items()}

    def __call__(self, running: Running, tools: PhaseTools) -> Running:
        return _one_by_one(lambda running: self.fix(running, tools), running)

    def fix(self, running: Running, tools: PhaseTools) -> Running:
        """The phase for one training."""
        bound = self.bound if self.bound is not None else getattr(tools.surrogate, "bound", None)
        if bound is None:
            kind = type(tools.surrogate).__name__
            raise InputError(f"bound is None, but it must be a number: the surrogate {kind} has no bound of its own.")
        limit = jnp.asarray(bound) * (1.0 - _SPARE)
        reduce, surrogate = STATISTICS[self.statistic], tools.surrogate
        chunks = _in_chunks(tools.rows, self.rows)

        def worst(learned: Any) -> Float[Array, ""]:
            return reduce(tools.samples(learned, tools.rows).inputs.kl)

        def chunk_step(state: tuple, rows: Any) -> tuple[tuple, None]:
            running, steps = state

            def loss(learned: Any) -> tuple[Array, Any]:
                drawn = tools.samples(learned, rows)
                weight = jnp.maximum(surrogate.penalty(running.surrogate), _LEAST_PENALTY)
                return weight * jnp.mean(drawn.inputs.kl), drawn

            def mend(running: Running) -> Running:
                gradient, drawn = jax.grad(loss, has_aux=True)(running.learned)
                learned, optimizer = tools.step(gradient, running.optimizer, running.learned)
                learned, optimizer = _actor_only(running.learned, running.optimizer, learned, optimizer)
                multipliers = surrogate.learn(drawn.log_ratio, drawn.advantage, drawn.inputs, running.surrogate)
                return running._replace(learned=learned, optimizer=optimizer, surrogate=multipliers)

            violated = ~(reduce(tools.samples(running.learned, rows).inputs.kl) <= limit)
            running = jax.lax.cond(violated, mend, lambda running: running, running)
            return (running, steps + violated), None

        def one_pass(state: tuple) -> tuple:
            running, steps, passes, _ = state
            (running, steps), _ = jax.lax.scan(chunk_step, (running, steps), chunks)
            return running, steps, passes + 1, worst(running.learned)

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, steps, passes, reached = state
            # Passes are bounded too: a divergence that is not a number violates nothing and would never end.
            return (reached > limit) & (steps < self.max_steps) & (passes < self.max_steps)

        begin = running
        if self.fresh_optimizer:
            begin = running._replace(optimizer=jax.tree.map(jnp.zeros_like, running.optimizer))
        zero = jnp.zeros((), jnp.int32)
        fixed, steps, passes, reached = jax.lax.while_loop(
            unfinished, one_pass, (begin, zero, zero, worst(running.learned))
        )
        met = reached <= limit
        learned = jax.lax.cond(
            met, lambda: fixed.learned, lambda: interpolate(worst, tools.old, fixed.learned, limit)[0]
        )
        counts: FixUpCounts = running.phase
        counts = FixUpCounts(counts.steps + steps, counts.passes + passes, counts.interpolated | ~met)
        optimizer = running.optimizer if self.fresh_optimizer else fixed.optimizer
        return fixed._replace(learned=learned, optimizer=optimizer, phase=counts)


def interpolate(worst: Any, old: Any, new: Any, limit: Float[Array, ""] | float) -> tuple[Any, Float[Array, ""]]:
    """The point between two actors, found by bisection, at which a divergence is just within its limit.

    Args:
        worst: from trainable parameters to the divergence; at `old` it is within the limit.
        old: trainable parameters with ``network``, ``free`` and ``critic``.
        new: others, whose divergence exceeds the limit or is not a number.
        limit: the most divergence allowed.

    Returns:
        The parameters ``old + t (new - old)``, with the critic of `new`, and ``t`` in ``[0, 1)``.
    """

    def at(t: Float[Array, ""]) -> Any:
        between = jax.tree.map(lambda o, n: jnp.where(t > 0, o + t * (n - o), o), old, new)
        return between._replace(critic=new.critic)

    def halve(interval: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = interval
        middle = 0.5 * (low + high)
        met = worst(at(middle)) <= limit
        return (jnp.where(met, middle, low), jnp.where(met, high, middle)), None

    (t, _), _ = jax.lax.scan(halve, (jnp.zeros(()), jnp.ones(())), None, length=_BISECTIONS)
    return at(t), t


def _one_by_one(function: Callable[[Running], Running], running: Running) -> Running:
    """Calls a function that is not vectorized under ``vmap`` but run for one training after the other.

    How long a fix-up takes differs from one training to the next, and vectorized loops all take as long as the longest.
    """
    converted = eqx.filter_closure_convert(function, running)
    arrays, static = eqx.partition(converted, eqx.is_array)

    @jax.custom_batching.sequential_vmap
    def one(arrays: Any, running: Running) -> Running:
        return eqx.combine(arrays, static)(running)

    return one(arrays, running)


def _in_chunks(rows: PyTree, size: int) -> PyTree:
    """Rows as equal chunks of at most `size`, ``[C, R / C, ...]``."""
    count = jax.tree.leaves(rows)[0].shape[0]
    chunks = next(c for c in range(1, count + 1) if count % c == 0 and count // c <= size)
    return jax.tree.map(lambda leaf: leaf.reshape((chunks, count // chunks, *leaf.shape[1:])), rows)


def _actor_only(old: Any, old_optimizer: PyTree, new: Any, new_optimizer: PyTree) -> tuple[Any, PyTree]:
    """A step without its effect on the critic: momentum would move it although its gradient is zero."""
    zeros = jax.tree.map(jnp.zeros_like, old)
    parts = zeros._replace(**{name: jax.tree.map(jnp.ones_like, getattr(old, name)) for name in ("network", "free")})
    actor = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(parts)]) > 0

    def keep(new: Array, old: Array) -> Array:
        # The optimizer sees all parameters as one vector, in the order of their leaves.
        return jnp.where(actor, new, old) if new.shape == actor.shape else new

    return new._replace(critic=old.critic), jax.tree.map(keep, new_optimizer, old_optimizer)
