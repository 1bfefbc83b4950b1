"""GPC: compose generative policies at test time (Cao et al., 2026, arXiv:2510.01068)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PyTree

from steersman.diffusion.combination import Combined, CombinedPrediction, check_weights
from steersman.diffusion.denoiser import Denoiser, on_process, same_process
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.processes import NoiseProcess
from steersman.diffusion.samplers import Sampler
from steersman.diffusion.scaling import normalize_observation
from steersman.diffusion.superposition import Superposition
from steersman.errors import InputError, InputTypeError, require, require_number, unknown_name

OPS = ("mean", "and", "or", "bayes")

#: What picks a policy's part out of an observation: an entry's name, several names, or a function.
View = str | tuple[str, ...] | Callable[[PyTree], PyTree]


class Views(Denoiser):
    """A combination whose members each see their part of an observation, in their own units.

    Attributes:
        combined: the combination.
        views: for each member what picks its part; None where observations come as a tuple, one for each.
        scalings: for each member its scaling of observations, or None.
        process: the combination's.
        chunk_shape: the combination's.
    """

    combined: Combined
    views: tuple[View, ...] | None = eqx.field(static=True)
    scalings: tuple[PyTree, ...]
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)

    def encode(self, observation: PyTree) -> PyTree:
        """The conditions.

        Raises:
            InputError: an entry that a member looks at is missing.
        """
        if self.views is None:
            count = len(self.scalings)
            good = isinstance(observation, (tuple, list)) and len(observation) == count
            shown = f"{len(observation)} observations" if isinstance(observation, (tuple, list)) else type(observation)
            require(good, "observation", shown, f"a tuple of {count} observations, one for each policy")
            parts = tuple(observation)
        else:
            parts = tuple(_look(view, observation) for view in self.views)
        normalized = [normalize_observation(scaling, part) for scaling, part in zip(self.scalings, parts, strict=True)]
        return self.combined.encode(tuple(normalized))

    def predict(self, x: Float[Array, "H D"], level: Array, condition: PyTree) -> CombinedPrediction:
        return self.combined.predict(x, level, condition)


def _look(view: View, observation: PyTree) -> PyTree:
    if callable(view):
        return view(observation)
    names = (view,) if isinstance(view, str) else view
    for name in names:
        if name not in observation:
            raise InputError(f"observation has no {name!r}, which a policy looks at: it has {sorted(observation)}.")
    return observation[view] if isinstance(view, str) else {name: observation[name] for name in names}


def generators_of(policies: Sequence[Any]) -> list[ChunkGenerator]:
    """The generators of chunk policies; generators pass as they are.

    Raises:
        InputTypeError: one is neither, for example a network that regresses actions.
        InputError: fewer than two, chunks of different action dimensions, or unequal scalings of actions.
    """
    found = []
    for i, policy in enumerate(policies):
        policy = getattr(policy, "generator", policy) if not isinstance(policy, ChunkGenerator) else policy
        if not isinstance(policy, ChunkGenerator):
            raise InputTypeError(
                f"policies[{i}] is a {type(policy).__name__}, but it must be a ChunkGenerator or a policy with one: "
                "only what has a denoiser can be composed."
            )
        found.append(policy)
    require(len(found) >= 2, "policies", f"{len(found)} policies", "at least two policies")
    actions = [generator.denoiser.chunk_shape[1] for generator in found]
    require(len(set(actions)) == 1, "policies", actions, "of equal action dimensions")
    first = found[0].action_scaling
    for i, other in enumerate(generator.action_scaling for generator in found[1:]):
        gaps = [
            float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
            for a, b in ((first.offset, other.offset), (first.scale, other.scale))
        ]
        if max(gaps) > 1e-5:
            raise InputError(
                f"policies[{i + 1}].action_scaling differs from that of policies[0] by {max(gaps):.3g}, but chunks can "
                "be composed only in common units: train all with one Scaling."
            )
    return found


def compose(
    policies: Sequence[Any],
    weights: Any = None,
    op: str = "mean",
    *,
    sampler: Sampler | None = None,
    process: NoiseProcess | None = None,
    between: bool = False,
    views: Sequence[View] | None = None,
) -> ChunkGenerator:
    """One generator of several, without training.

    At every level each policy predicts the noise in the same chunk, and one step of one chain is taken with their
    combination: a convex one, ``sum_i w_i e_i``, or a superposition. Policies of other processes are asked at equal
    signal-to-noise ratios, shorter chunks fill the first rows.

    Args:
        policies: generators, or policies that have one, with equal units of actions.
        weights: for ``"mean"``: one for each, not negative, with sum 1; equal where None.
        op: ``"mean"``; ``"and"`` for chunks equally likely under all, ``"or"`` for those of any, both by
            :class:`~steersman.diffusion.superposition.Superposition`; ``"bayes"`` for conditionally independent
            observations, ``sum_{i < n} e_i - (n - 2) e_n``, where the last of the ``n`` policies is unconditional.
        sampler: how chunks are drawn; the first policy's where None.
        process: the process of the chain; must be given where the policies have different ones.
        between: ask discrete denoisers between their levels.
        views: what each policy sees of an observation; a tuple with one observation for each where None.

    Returns:
        A generator, called with ``(observation, key)``.

    Raises:
        InputError: policies, weights, sampler or process do not fit together.
        InputTypeError: a policy that has no denoiser.
    """
    if op not in OPS:
        raise unknown_name("op", op, OPS)
    found = generators_of(policies)
    count = len(found)
    if op != "mean":
        require(weights is None, "weights", weights, f"None for op={op!r}, which has its own")
    if views is not None:
        require(len(views) == count, "views", tuple(views), f"{count} views, one for each policy")
    own = [generator.denoiser.process for generator in found]
    if process is None:
        if not all(same_process(own[0], other) for other in own[1:]):
            kinds = ", ".join(type(each).__name__ for each in own)
            raise InputError(f"process is None, but the policies have different ones ({kinds}): say which to run on.")
        process = own[0]
    denoisers = tuple(on_process(generator.denoiser, process, between=between) for generator in found)
    if op == "bayes":
        weights = np.append(np.ones(count - 1), 2.0 - count)
    elif weights is None:
        weights = np.full(count, 1.0 / count)
    elif op == "mean":
        require_number("weights", weights, at_least=0.0)
    combined = Combined(denoisers, check_weights(weights, count))
    if op in ("and", "or"):
        rows = [denoiser.chunk_shape[0] for denoiser in denoisers]
        require(len(set(rows)) == 1, "policies", f"chunks of {rows} rows", f"of equally many rows for op={op!r}")
        if sampler is None:
            sampler = Superposition(op=op, count=count, steps=found[0].sampler.steps)
        good = isinstance(sampler, Superposition) and sampler.op == op and sampler.count == count
        allowed = f"a Superposition({op!r}, {count}): the log-densities are tracked along a stochastic chain"
        require(good, "sampler", type(sampler).__name__, allowed)
    sampler = found[0].sampler if sampler is None else sampler
    require(op in ("and", "or") or not isinstance(sampler, Superposition), "sampler", "Superposition", "for and, or")
    scalings = tuple(generator.observation_scaling for generator in found)
    seen = Views(
        combined=combined,
        views=None if views is None else tuple(views),
        scalings=scalings,
        process=process,
        chunk_shape=combined.chunk_shape,
    )
    return ChunkGenerator(seen, sampler, found[0].action_scaling)


def reweighted(generator: ChunkGenerator, weights: Any) -> ChunkGenerator:
    """A composed generator with other weights, which may be traced: a sweep is one program under ``vmap``."""
    combined: Any = generator.denoiser
    new = check_weights(weights, combined.combined.weights.shape[0])
    return eqx.tree_at(lambda each: each.denoiser.combined.weights, generator, new)
