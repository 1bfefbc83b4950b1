"""RTI-DP: real-time iteration for diffusion policies (Duan, Yin and Kragic, 2025, arXiv:2508.05396)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.execution import require_generator, shifted
from steersman.diffusion.processes import Grid
from steersman.diffusion.samplers import Sampler, sample
from steersman.diffusion.scaling import Scaling
from steersman.diffusion.warm_start import warm_grid
from steersman.errors import InputError, require, require_count, require_number, unknown_name
from steersman.policies import ChunkPolicy, Policy
from steersman.policies.windows import Seen

RULES = ("scale", "clip")


class DiscreteActions(eqx.Module):
    """Action dimensions of which only the sign counts, such as a gripper's.

    A guess on one mode keeps a few steps from reaching the other, so both modes are brought near to each other: in the
    training data (``"scale"``, see :func:`scale_discrete`), or in the guess alone (``"clip"``, for policies that are
    trained already; it wants a higher first label, 18 to 40 of 100).

    Attributes:
        dims: which they are.
        rule: one of ``RULES``.
        factor: how much nearer to zero.
    """

    dims: tuple[int, ...] = eqx.field(static=True)
    rule: str = eqx.field(static=True, default="clip")
    factor: float = eqx.field(static=True, default=10.0)

    def __check_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown_name("rule", self.rule, RULES)
        require_number("factor", self.factor, above=0.0)
        for dim in self.dims:
            require_count("dims", dim, minimum=0)

    def remembered(self, chunk: Float[Array, "H D"]) -> Float[Array, "H D"]:
        """The chunk as the next step's guess starts from it."""
        if self.rule == "scale":
            return chunk
        dims = np.asarray(self.dims)
        return chunk.at[:, dims].set(_sign(chunk[:, dims]) / self.factor)

    def command(self, row: Float[Array, " D"]) -> Float[Array, " D"]:
        """What is sent: 1 where such a dimension is above zero, else -1."""
        dims = np.asarray(self.dims)
        return row.at[dims].set(_sign(row[dims]))


def _sign(value: Array) -> Array:
    return jnp.where(value > 0.0, 1.0, -1.0).astype(value.dtype)


def scale_discrete(scaling: Scaling, dims: Sequence[int], dimensions: int, factor: float = 10.0) -> Scaling:
    """An action scaling for training that takes commands of -1 and 1 in `dims` to ``-1/factor`` and ``1/factor``.

    Args:
        scaling: that of the other dimensions.
        dims: the discrete ones.
        dimensions: of an action.
        factor: see above.
    """
    require_number("factor", factor, above=0.0)
    for dim in dims:
        require(0 <= dim < dimensions, "dims", dim, f"from 0 to {dimensions - 1}")
    index = np.asarray(dims)
    offset, scale = (jnp.broadcast_to(part, (dimensions,)) for part in (scaling.offset, scaling.scale))
    return Scaling(offset.at[index].set(0.0), scale.at[index].set(factor))


class RealTimeCarry(NamedTuple):
    """The memory of :class:`RealTimeIteration`.

    Attributes:
        seen: the observations.
        chunk: the last chunk, in the denoiser's units, discrete dimensions as they are remembered ``[H, D]``.
    """

    seen: Seen
    chunk: Float[Array, "H D"]


class RealTimeIteration(Policy):
    """A trained diffusion policy that goes on from its last chunk: a new chunk at every step, for a few network calls.

    1. The first chunk of an episode is drawn from noise, over all levels.
    2. Every other one starts from the guess ``[A[1:], A[-1]]``. No noise is added: the guess is taken for the state at
       the first label.
    3. One sweep of the sampler over the labels refreshes it; the row that is due now is played.

    Under ``vmap``, where copies may be at different steps of their episodes, both ways are computed at every step;
    where all copies start together, :meth:`begin` and :meth:`refresh` save the first.

    Attributes:
        policy: what draws chunks; its action horizon is not used.
        grid: the levels of a sweep.
        sampler: the rule of a sweep; that of the policy's generator where None.
        discrete: dimensions of which only the sign counts.
        project: called as ``project(chunk, level)`` before each step and once after the last: overwrites known entries,
            in the denoiser's units.
    """

    policy: ChunkPolicy
    grid: Grid
    sampler: Sampler | None
    discrete: DiscreteActions | None
    project: Callable[[Array, Array], Array] | None

    def __init__(
        self,
        policy: Any,
        labels: Any = (2, 1, 0),
        *,
        step_rule: str = "single",
        sampler: Sampler | None = None,
        discrete: DiscreteActions | None = None,
        project: Callable[[Array, Array], Array] | None = None,
    ):
        """Wraps a policy.

        Args:
            policy: the :class:`~steersman.policies.ChunkPolicy` of a :class:`~steersman.diffusion.ChunkGenerator`, on
                the process that it was trained on.
            labels: see :func:`~steersman.diffusion.warm_start.warm_grid`.
            step_rule: likewise.
            sampler: see the class.
            discrete: likewise.
            project: likewise.

        Raises:
            InputError: labels that cannot be used, chunks of one row, or a sampler that needs its last step.
            InputTypeError: the policy's chunks are not made by a ChunkGenerator.
        """
        generator = require_generator(policy)
        self.policy = policy
        self.grid = warm_grid(generator.denoiser.process, labels, step_rule)
        self.sampler = sampler
        self.discrete = discrete
        self.project = project
        rule = self._rule
        rule.check(generator.denoiser.process)
        if step_rule == "single" and jax.tree.leaves(rule.init(jnp.zeros(generator.denoiser.chunk_shape))):
            raise InputError(
                f"sampler is a {type(rule).__name__}, which builds on its last step, but single steps do not join up: "
                "use DDPM or DDIM, or step_rule='jump'."
            )
        if discrete is not None:
            dimensions = generator.denoiser.chunk_shape[1]
            require(max(discrete.dims, default=0) < dimensions, "dims", discrete.dims, f"below {dimensions}")

    @property
    def _generator(self) -> Any:
        return self.policy.generator

    @property
    def _rule(self) -> Sampler:
        return self._generator.sampler if self.sampler is None else self.sampler

    @property
    def calls(self) -> int:
        """Network calls of every step but an episode's first."""
        return self.grid.steps

    def init(self, key: Key[Array, ""]) -> RealTimeCarry:
        del key
        return RealTimeCarry(self.policy.window().init(), jnp.zeros(self._generator.denoiser.chunk_shape))

    def resume(self, carry: RealTimeCarry, observation: PyTree, chunk: Float[Array, "H D"]) -> RealTimeCarry:
        """The memory of a policy that has just played the first row of `chunk` at `observation`.

        Args:
            carry: the memory before.
            observation: what was seen.
            chunk: in the denoiser's units.

        Raises:
            InputError: another shape, or numbers beyond the sampler's limit, which are not in the denoiser's units.
        """
        shape = carry.chunk.shape
        require(jnp.shape(chunk) == shape, "chunk.shape", jnp.shape(chunk), f"{shape}")
        limit = self._generator.sampler.limit
        bounds = {} if limit is None else {"at_least": -limit, "at_most": limit}
        require_number("chunk", chunk, **bounds)
        return RealTimeCarry(self.policy.window().push(carry.seen, observation), jnp.asarray(chunk))

    def begin(
        self, observation: PyTree, carry: RealTimeCarry, key: Key[Array, ""]
    ) -> tuple[Float[Array, " D"], RealTimeCarry]:
        """An episode's first step: the policy's own chain."""
        window = self.policy.window()
        seen = window.push(carry.seen, observation)
        return self._play(self._drawn(window.now(seen), key), seen, carry)

    def refresh(
        self, observation: PyTree, carry: RealTimeCarry, key: Key[Array, ""]
    ) -> tuple[Float[Array, " D"], RealTimeCarry]:
        """Every other step: one sweep from the guess.

        Raises:
            InputError: there is no guess yet, where that can be seen.
        """
        if not isinstance(carry.seen.started, Tracer) and not bool(jnp.all(carry.seen.started)):
            raise InputError("carry has no chunk yet, but refresh goes on from one: call begin first.")
        window = self.policy.window()
        seen = window.push(carry.seen, observation)
        return self._play(self._swept(window.now(seen), carry.chunk, key), seen, carry)

    def __call__(
        self, observation: PyTree, carry: RealTimeCarry, key: Key[Array, ""]
    ) -> tuple[Float[Array, " D"], RealTimeCarry]:
        window = self.policy.window()
        seen = window.push(carry.seen, observation)
        read = window.now(seen)
        chunk = jax.lax.cond(
            carry.seen.started,
            lambda: self._swept(read, carry.chunk, key),
            lambda: self._drawn(read, key),
        )
        return self._play(chunk, seen, carry)

    def _drawn(self, read: PyTree, key: Array) -> Array:
        return self._generator.chain(read, key, project=self.project).chunk

    def _swept(self, read: PyTree, last: Array, key: Array) -> Array:
        generator = self._generator
        return sample(
            generator.denoiser,
            self._rule,
            generator.encode(read),
            key,
            start=shifted(last),
            grid=self.grid,
            project=self.project,
        ).chunk

    def _play(self, chunk: Array, seen: Seen, carry: RealTimeCarry) -> tuple[Array, RealTimeCarry]:
        row = self._generator.action_scaling.restore(chunk)[self.policy.first_row]
        if self.discrete is not None:
            row, chunk = self.discrete.command(row), self.discrete.remembered(chunk)
        # One observation that is not a number must not spoil every chunk that follows.
        kept = jnp.where(jnp.all(jnp.isfinite(chunk)), chunk, carry.chunk)
        return row, RealTimeCarry(seen, kept)

    def mode(self) -> RealTimeIteration:
        return eqx.tree_at(lambda own: own.policy, self, self.policy.mode())
