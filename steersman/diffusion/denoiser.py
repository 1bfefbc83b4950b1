"""The denoiser contract: whatever can say what is noise and what is action in a noisy chunk."""

# Annotations are evaluated here: Equinox does not recognize a stringified AbstractVar, and would make a field of it.

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.predictions import Prediction, check_prediction, read_prediction
from steersman.diffusion.processes import DiscreteVP, NoiseProcess
from steersman.errors import InputTypeError, require, require_number
from steersman.networks.crops import encode


class Denoiser(eqx.Module):
    """Predicts, at a noisy chunk, the noise in it and the sample behind it.

    Trained networks are denoisers, and so are exact mixtures, guided, composed and converted denoisers: every sampler,
    loss and likelihood takes any of them. Unbatched; callers ``vmap``.

    Attributes:
        process: the noise process whose levels it understands.
        chunk_shape: rows and action dimensions ``(H, D)`` of its chunks.
    """

    process: eqx.AbstractVar[NoiseProcess]
    chunk_shape: eqx.AbstractVar[tuple[int, int]]

    def encode(self, observation: PyTree) -> PyTree:
        """What :meth:`predict` needs of an observation; computed once per chunk, not once per step."""
        return observation

    @abc.abstractmethod
    def predict(self, x: Float[Array, "H D"], level: Array, condition: PyTree) -> Prediction:
        """The prediction at ``x = alpha a + sigma e``.

        Args:
            x: the noisy chunk.
            level: its level, a scalar as the process has them.
            condition: what :meth:`encode` returned.
        """


class Flatten(eqx.Module):
    """All numbers of an observation as one vector: the encoder where there is none."""

    def __call__(self, observation: PyTree) -> Float[Array, " C"]:
        leaves = jax.tree.leaves(observation)
        return jnp.concatenate([jnp.ravel(jnp.asarray(leaf, jnp.result_type(float))) for leaf in leaves])


class NetworkDenoiser(Denoiser):
    """A network that predicts one of ``PREDICTIONS``.

    Attributes:
        network: called as ``network(x [H, D], time [], condition [C]) -> [H, D]``.
        process: the noise process that it is trained on.
        chunk_shape: ``(H, D)``.
        prediction: what its output means.
        encoder: makes the condition ``[C]`` of an observation; trained together with the network.
        output_scale: constant factor on the network's output.
    """

    network: Callable[..., Array]
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    prediction: str = eqx.field(static=True, default="noise")
    encoder: Callable[[PyTree], Array] = eqx.field(default_factory=Flatten)
    output_scale: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        check_prediction(self.prediction)
        shape = self.chunk_shape
        require(len(shape) == 2 and min(shape) > 0, "chunk_shape", shape, "(rows, action dimensions)")
        require_number("output_scale", self.output_scale)

    def trainable(self) -> PyTree:
        """A PyTree of booleans like this one: what gradients may change, the network and its encoder."""
        frozen = jax.tree.map(lambda _: False, self)
        parts = jax.tree.map(eqx.is_inexact_array, (self.network, self.encoder))
        return eqx.tree_at(lambda denoiser: (denoiser.network, denoiser.encoder), frozen, parts)

    def encode(self, observation: PyTree, key: Key[Array, ""] | None = None) -> Float[Array, " C"]:
        """The condition; a key, which losses give, lets an encoder augment what it sees."""
        return encode(self.encoder, observation, key)

    def output(self, x: Float[Array, "H D"], level: Array, condition: Float[Array, " C"]) -> Float[Array, "H D"]:
        """The network's output, as :attr:`prediction` says what it is."""
        value = self.network(x, self.process.network_time(level), condition)
        return value if self.output_scale == 1.0 else self.output_scale * value

    def predict(self, x: Float[Array, "H D"], level: Array, condition: Float[Array, " C"]) -> Prediction:
        alpha, sigma = self.process.coefficients(level)
        return read_prediction(self.prediction, self.output(x, level, condition), x, alpha, sigma)


class Matched(Denoiser):
    """A denoiser on the levels of another process.

    Noisy chunks of two processes whose signal-to-noise ratios agree are equal up to a factor, so a conditional
    expectation at one is the conditional expectation at the other. The conversion is exact where the denoiser's
    process has a level with the ratio that is asked for; where it has only ``K`` of them, the nearest answers.

    Attributes:
        denoiser: what is asked.
        process: the process in whose levels it is asked.
        chunk_shape: the denoiser's.
        between: ask a discrete denoiser between its levels, where its network takes real numbers.
    """

    denoiser: Denoiser
    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    between: bool = eqx.field(static=True)

    def __init__(self, denoiser: Denoiser, process: NoiseProcess, *, between: bool = False):
        """Puts `denoiser` on the levels of `process`.

        Raises:
            InputTypeError: `between` is asked for, but the denoiser's levels are real numbers already.
        """
        if between and not isinstance(denoiser.process, DiscreteVP):
            kind = type(denoiser.process).__name__
            raise InputTypeError(f"between is True, but the levels of the denoiser's {kind} are real numbers already.")
        self.denoiser = denoiser
        self.process = process
        self.chunk_shape = denoiser.chunk_shape
        self.between = between

    def encode(self, observation: PyTree) -> PyTree:
        return self.denoiser.encode(observation)

    def predict(self, x: Float[Array, "H D"], level: Array, condition: PyTree) -> Prediction:
        own: Any = self.denoiser.process
        alpha, sigma = self.process.coefficients(level)
        ratio = sigma / alpha
        between = self.between and isinstance(own, DiscreteVP)
        own_level = own.match_between(ratio) if between else own.match(ratio)
        own_alpha, own_sigma = own.coefficients(own_level)
        scale = jnp.sqrt((own_alpha**2 + own_sigma**2) / (alpha**2 + sigma**2))
        found = self.denoiser.predict(scale * x, own_level, condition)
        # The nearest level is not quite this one: its noise is kept, and the sample made to fit this chunk, unless
        # the chunk is noise alone and says nothing of it.
        noisy = alpha < 1e-3 * sigma
        sample = (x - sigma * found.noise) / jnp.where(noisy, 1.0, alpha)
        return Prediction(found.noise, jnp.where(noisy, found.sample, sample))


def on_process(denoiser: Denoiser, process: NoiseProcess, *, between: bool = False) -> Denoiser:
    """`denoiser` on the levels of `process`; itself where it is on them already."""
    if same_process(denoiser.process, process):
        return denoiser
    return Matched(denoiser, process, between=between and isinstance(denoiser.process, DiscreteVP))


def same_process(one: NoiseProcess, other: NoiseProcess) -> bool:
    """Whether two processes are the same, also inside ``jit``; those being traced are if their structure is."""
    leaves, other_leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return all(
        isinstance(a, Tracer) or isinstance(b, Tracer) or np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(leaves, other_leaves, strict=True)
    )
