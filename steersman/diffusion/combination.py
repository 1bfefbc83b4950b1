"""Linear combinations of denoisers: composed policies, classifier-free guidance, self- and auto-guidance."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from steersman.diffusion.denoiser import Denoiser, same_process
from steersman.diffusion.predictions import Prediction
from steersman.diffusion.processes import NoiseProcess
from steersman.errors import InputError, InputTypeError, require, require_number


class CombinedPrediction(Prediction):
    """A combination's prediction, with those that it was made of.

    Attributes:
        noise: combined noise ``[H, D]``.
        sample: combined sample ``[H, D]``.
        parts: the single predictions ``[M, H, D]``; None where their chunks have different lengths.
    """

    parts: Prediction | None = None


def check_weights(weights: Any, count: int | None = None) -> Float[Array, " M"]:
    """`weights` as an array ``[M]`` of floats; they may be negative, as guidance has them.

    Weights that do not sum to 1 are refused: the combined noise and the combined sample would not make up the noisy
    chunk any more, ``x = alpha a + sigma e``. Traced weights cannot be looked at and pass.

    Args:
        weights: one number for each denoiser.
        count: how many there must be; any number where None.

    Raises:
        InputError: they have another shape, are not finite, or do not sum to 1 within 1e-6.
    """
    array = jnp.asarray(weights, jnp.result_type(float))
    shape = jnp.shape(array)
    allowed = "[M]" if count is None else f"[{count}], one for each denoiser"
    require(len(shape) == 1 and shape[0] == (count or shape[0]) and shape[0] > 0, "weights.shape", shape, allowed)
    require_number("weights", array)
    if not isinstance(array, Tracer):
        numbers = np.asarray(weights if not isinstance(weights, Tracer) else array, np.float64)
        require(abs(numbers.sum() - 1.0) <= 1e-6, "weights", numbers.tolist(), "numbers that sum to 1")
    return array


def combine(weights: Float[Array, " M"], parts: Prediction) -> CombinedPrediction:
    """``sum_m w_m e_m`` and ``sum_m w_m a_m`` of predictions ``[M, H, D]``."""
    noise, sample = (jnp.sum(weights[:, None, None] * each, axis=0) for each in (parts.noise, parts.sample))
    return CombinedPrediction(noise, sample, parts)


class Combined(Denoiser):
    """``sum_m w_m e_m``: several denoisers, each with its own observation, as one.

    At each level its score is that of the product of the noised densities, each to the power of its weight. With
    weights on the simplex it composes policies; with ``(1 + w, -w)`` the second is what the first is guided away from.

    Denoisers with shorter chunks see the first rows, and each row combines those that have it, their weights
    renormalized (equal ones where these are all zero).

    Attributes:
        denoisers: those combined, all on the levels of one process (:func:`~steersman.diffusion.on_process`).
        weights: one for each; they sum to 1 and may be negative ``[M]``.
        process: the common process.
        chunk_shape: of the longest chunk.
    """

    denoisers: tuple[Denoiser, ...]
    weights: Float[Array, " M"]
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)

    def __init__(self, denoisers: tuple[Denoiser, ...], weights: Any):
        """Combines `denoisers`.

        Raises:
            InputTypeError: one of them is no denoiser.
            InputError: there are none, they differ in process or action dimensions, or the weights do not fit.
        """
        denoisers = tuple(denoisers)
        require(len(denoisers) > 0, "denoisers", denoisers, "at least one denoiser")
        for denoiser in denoisers:
            if not isinstance(denoiser, Denoiser):
                raise InputTypeError(f"denoisers has a {type(denoiser).__name__}, but each must be a Denoiser.")
        first = denoisers[0]
        actions = [denoiser.chunk_shape[1] for denoiser in denoisers]
        require(len(set(actions)) == 1, "denoisers", actions, "of equal action dimensions")
        if not all(same_process(first.process, other.process) for other in denoisers[1:]):
            kinds = [type(denoiser.process).__name__ for denoiser in denoisers]
            raise InputError(
                f"denoisers are on different processes ({', '.join(kinds)}), but one chain needs one: put them on it "
                "with on_process(denoiser, process)."
            )
        self.denoisers = denoisers
        self.weights = check_weights(weights, len(denoisers))
        self.process = first.process
        self.chunk_shape = (max(denoiser.chunk_shape[0] for denoiser in denoisers), actions[0])

    def encode(self, observation: PyTree) -> tuple[PyTree, ...]:
        """The conditions.

        Args:
            observation: a tuple of one observation for each denoiser.

        Raises:
            InputError: another number of them.
        """
        count = len(self.denoisers)
        if not isinstance(observation, (tuple, list)):
            kind = type(observation).__name__
            raise InputTypeError(f"observation is a {kind}, but it must be a tuple of {count}, one for each denoiser.")
        require(len(observation) == count, "observation", f"{len(observation)} observations", f"{count} of them")
        return tuple(denoiser.encode(seen) for denoiser, seen in zip(self.denoisers, observation, strict=True))

    def predict(self, x: Float[Array, "H D"], level: Array, condition: tuple[PyTree, ...]) -> CombinedPrediction:
        found = [
            denoiser.predict(x[: denoiser.chunk_shape[0]], level, own)
            for denoiser, own in zip(self.denoisers, condition, strict=True)
        ]
        rows = [denoiser.chunk_shape[0] for denoiser in self.denoisers]
        longest = self.chunk_shape[0]

        def stack(*parts: Array) -> Array:
            padded = [jnp.pad(part, ((0, longest - n), (0, 0))) for part, n in zip(parts, rows, strict=True)]
            return jnp.stack(padded)

        parts = Prediction(stack(*(one.noise for one in found)), stack(*(one.sample for one in found)))
        if len(set(rows)) == 1:
            return combine(self.weights, parts)
        has = jnp.asarray(np.arange(longest) < np.asarray(rows)[:, None], self.weights.dtype)
        total = self.weights @ has
        share = jnp.where(total == 0.0, has / has.sum(axis=0), self.weights[:, None] * has)
        share = share / jnp.where(total == 0.0, 1.0, total)
        noise, sample = (jnp.sum(share[:, :, None] * each, axis=0) for each in (parts.noise, parts.sample))
        return CombinedPrediction(noise, sample)


class UnderConditions(Denoiser):
    """``sum_m w_m e(x, c_m)``: one denoiser asked under several conditions, all in one batch.

    Classifier-free guidance has the weights ``(1 + w, -w)`` with the observation and its blank; self-guidance has those
    with the present and a past observation.

    Attributes:
        denoiser: what is asked.
        weights: one for each condition; they sum to 1 and may be negative ``[M]``.
        process: the denoiser's.
        chunk_shape: the denoiser's.
    """

    denoiser: Denoiser
    weights: Float[Array, " M"]
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)

    def __init__(self, denoiser: Denoiser, weights: Any):
        """Asks `denoiser` under as many conditions as there are `weights`.

        Raises:
            InputError: the weights are not finite or do not sum to 1.
        """
        self.denoiser = denoiser
        self.weights = check_weights(weights)
        self.process = denoiser.process
        self.chunk_shape = denoiser.chunk_shape

    def encode(self, observation: PyTree) -> PyTree:
        """The conditions.

        Args:
            observation: observations with a leading axis ``M``.

        Raises:
            InputError: the axis has another length.
        """
        count = self.weights.shape[0]
        for leaf in jax.tree.leaves(observation):
            shape = jnp.shape(leaf)
            require(shape[:1] == (count,), "observation", shape, f"arrays with a leading axis of {count}, the weights'")
        return jax.vmap(self.denoiser.encode)(observation)

    def predict(self, x: Float[Array, "H D"], level: Array, condition: PyTree) -> CombinedPrediction:
        parts = jax.vmap(lambda one: self.denoiser.predict(x, level, one))(condition)
        return combine(self.weights, Prediction(parts.noise, parts.sample))
