"""MCDP: compose diffusion policies of different modalities by averaging their scores (Cao et al., 2025).

arXiv:2503.12466. A preset of :mod:`steersman.diffusion.gpc`: one process, one sampler, fixed weights; what makes
policies of a camera and of a range sensor fit together is checked, and a sweep over the weights reported.
"""

# Annotations are evaluated here: Equinox does not recognize a stringified AbstractVar, and would make a field of it.

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from steersman.diffusion.cloning import EncoderRecipe
from steersman.diffusion.denoiser import same_process
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.gpc import compose, generators_of
from steersman.diffusion.weight_search import play, simplex
from steersman.errors import InputError, require, require_count
from steersman.networks import MLP, ConvEncoder, CroppedEncoder, PointNet, WindowEncoder


def check_modalities(policies: Mapping[str, Any]) -> dict[str, ChunkGenerator]:
    """The generators of policies that were trained alike, each on another modality.

    Alike are the noise process, what the networks predict, the number of rows, the units of actions and the sampler.
    Policies that differ in the first three can still be composed, by :func:`~steersman.diffusion.gpc.compose`.

    Args:
        policies: for each modality its policy or generator.

    Raises:
        InputError: something differs, in one sentence that says between which and how.
        InputTypeError: a policy without a denoiser, such as a regressed one.
    """
    names = list(policies)
    found = dict(zip(names, generators_of(list(policies.values())), strict=True))
    first, *others = names
    for name in others:
        pair = f"policies[{name!r}]"
        one, other = found[first], found[name]
        rows = other.denoiser.chunk_shape[0]
        want = one.denoiser.chunk_shape[0]
        require(rows == want, f"{pair}.denoiser.chunk_shape[0]", rows, f"{want}, as that of {first!r}")
        if not same_process(one.denoiser.process, other.denoiser.process):
            raise InputError(
                f"{pair} is on another noise process than {first!r}, but one chain needs one schedule: train both on "
                "it, or compose them at equal signal-to-noise ratios with gpc.compose(..., process=...)."
            )
        kinds = [getattr(generator.denoiser, "prediction", None) for generator in (one, other)]
        good = None in kinds or kinds[0] == kinds[1]
        require(good, f"{pair}.denoiser.prediction", kinds[1], f"{kinds[0]!r}, as that of {first!r}")
        for field in ("steps", "limit"):
            values = [getattr(generator.sampler, field) for generator in (one, other)]
            require(values[0] == values[1], f"{pair}.sampler.{field}", values[1], f"{values[0]}, as that of {first!r}")
        good = type(one.sampler) is type(other.sampler)
        allowed = f"a {type(one.sampler).__name__}, as that of {first!r}"
        require(good, f"{pair}.sampler", type(other.sampler).__name__, allowed)
    return found


def compose_modalities(policies: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> ChunkGenerator:
    """One generator for observations that are dictionaries of modalities.

    ``sum_m w_m e_m(x, k, c_m)`` in one chain, that is the weighted geometric mean of the noised densities, not
    normalized. It tempers what each modality knows: with independent sensors the exact fusion multiplies the densities
    and divides by the prior, which takes an unconditional policy (``gpc.compose(..., op="bayes")``).

    Args:
        policies: for each entry of the observation the policy that looks at it.
        weights: for each entry, not negative, with sum 1; equal where None.

    Raises:
        InputError: the policies differ (:func:`check_modalities`), or the weights do not fit.
    """
    found = check_modalities(policies)
    if weights is not None:
        require(set(weights) == set(found), "weights", sorted(weights), f"one for each of {sorted(found)}")
    shares = None if weights is None else [weights[name] for name in found]
    return compose(list(found.values()), shares, views=list(found))


class WeightSweep(eqx.Module):
    """Scores of two modalities composed with weights all the way from one to the other.

    Attributes:
        weights: of the first modality, rising from 0 to 1 ``[C]``.
        scores: on every episode, the same for all weights ``[C, N]``.
    """

    weights: np.ndarray
    scores: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean score of each weight ``[C]``."""
        return self.scores.mean(axis=1)

    @property
    def gain(self) -> float:
        """How much the best composition is above the better modality: positive where both are moderate (F1)."""
        return float(self.mean[1:-1].max() - max(self.mean[0], self.mean[-1]))

    @property
    def favours_better(self) -> bool:
        """Whether the best composition has at least half its weight on the better modality (F3, a tendency)."""
        best = self.weights[1:-1][int(np.argmax(self.mean[1:-1]))]
        return bool(best >= 0.5 if self.mean[-1] >= self.mean[0] else best <= 0.5)

    @property
    def largest_dip(self) -> float:
        """How far the curve ever falls below the lower of its heights to both sides; 0 for one with one hump."""
        mean = self.mean
        left, right = np.maximum.accumulate(mean), np.maximum.accumulate(mean[::-1])[::-1]
        return float(np.max(np.minimum(left, right) - mean))


def weight_sweep(
    evaluate: Callable[[Any, Any], Any], seeds: Sequence[int], *, parts: int = 10, on_host: bool = False
) -> WeightSweep:
    """Plays the same episodes with weights from 0 to 1 in steps of ``1 / parts``.

    Args:
        evaluate: called as ``evaluate(weights [2], key)``, plays one episode and returns its score.
        seeds: one for each episode.
        parts: how many steps.
        on_host: call ``evaluate(weights, seed)`` from Python instead.
    """
    require_count("parts", parts, minimum=2)
    candidates = simplex(2, parts)
    return WeightSweep(candidates[:, 0], play(evaluate, candidates, seeds, on_host=on_host))


# ---- encoders of one modality


class FrameRecipe(EncoderRecipe):
    """An encoder of single frames; for observations with one more axis, of windows, frame by frame.

    Attributes:
        output_size: numbers of each frame's vector.
    """

    output_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def frame_axes(self) -> int:
        """Axes of one frame."""

    @abc.abstractmethod
    def encoder(self, shape: tuple[int, ...], key: Key[Array, ""]) -> Callable[[Array], Array]:
        """The encoder of one frame of this shape."""

    def make(self, observation: PyTree, key: Key[Array, ""]) -> Any:
        shape, axes = jnp.shape(observation), self.frame_axes()
        allowed = f"{axes} axes, or {axes + 1} for windows"
        require(len(shape) in (axes, axes + 1), "observation.shape", shape, allowed)
        encoder = self.encoder(shape[-axes:], key)
        return encoder if len(shape) == axes else WindowEncoder(encoder)


class PointCloudRecipe(FrameRecipe):
    """A PointNet on clouds ``[N, channels]``.

    Attributes:
        widths: of the perceptron of each point.
        output_size: numbers of the vector.
        pool: ``"max"`` or ``"mean"``.
    """

    widths: tuple[int, ...] = eqx.field(static=True, default=(64, 128, 256))
    output_size: int = eqx.field(static=True, default=64)
    pool: str = eqx.field(static=True, default="max")

    def frame_axes(self) -> int:
        return 2

    def encoder(self, shape: tuple[int, ...], key: Key[Array, ""]) -> PointNet:
        return PointNet(shape[-1], self.widths, self.output_size, pool=self.pool, key=key)


class ImageRecipe(FrameRecipe):
    """Convolutions on images ``[channels, height, width]``.

    Attributes:
        widths: channels after each convolution.
        output_size: numbers of the vector.
        crop: height and width of the part that is looked at: somewhere while learning, the middle when acting; None
            for the whole.
    """

    widths: tuple[int, ...] = eqx.field(static=True, default=(16, 32, 64))
    output_size: int = eqx.field(static=True, default=64)
    crop: tuple[int, int] | None = eqx.field(static=True, default=None)

    def frame_axes(self) -> int:
        return 3

    def encoder(self, shape: tuple[int, ...], key: Key[Array, ""]) -> Callable[[Array], Array]:
        whole = (shape[0], shape[1], shape[2])
        height, width = whole[1:] if self.crop is None else self.crop
        encoder = ConvEncoder((shape[0], height, width), self.widths, self.output_size, key=key)
        return encoder if self.crop is None else CroppedEncoder(encoder, whole, self.crop)


class VectorRecipe(FrameRecipe):
    """A perceptron on vectors: one line of pixels, a depth scan, joint angles.

    Attributes:
        hidden: width of each hidden layer.
        output_size: numbers of the vector.
        activation: between layers.
    """

    hidden: tuple[int, ...] = eqx.field(static=True, default=(64,))
    output_size: int = eqx.field(static=True, default=32)
    activation: str = eqx.field(static=True, default="swish")

    def frame_axes(self) -> int:
        return 1

    def encoder(self, shape: tuple[int, ...], key: Key[Array, ""]) -> MLP:
        return MLP(shape[0], self.output_size, self.hidden, self.activation, key=key)
