"""A multilayer perceptron as the network of a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steersman.errors import InputError, require, require_count, require_number, unknown_name
from steersman.networks.denoiser_arguments import check_arguments, check_sizes
from steersman.networks.mlp import ACTIVATIONS, MLP
from steersman.networks.time_embedding import SinusoidalTime


class MLPDenoiser(eqx.Module):
    """The flattened chunk, features of the time and the condition through fully connected layers, and back to a chunk.

    The network of small diffusion and flow policies: quick to compile and to train. With `residual`, every hidden
    layer after the first is a block ``h + V f(W f(h) + b) + c`` instead, which trains at greater depth (the residual
    perceptron of Ren et al., 2024, arXiv:2409.00588, without normalization).

    Attributes:
        time_features: of the time.
        entry: the layers, or the first of them.
        blocks: residual blocks; empty without `residual`.
        exit: the last layer of a residual network; None otherwise.
        chunk_shape: ``(H, D)``.
        condition_size: length ``C`` of the condition.
        activation: between layers.
    """

    time_features: Callable[[Array], Array]
    entry: MLP
    blocks: list[MLP]
    exit: MLP | None
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    condition_size: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        chunk_shape: tuple[int, int],
        condition_size: int,
        hidden: Sequence[int] = (256, 256, 256),
        activation: str = "swish",
        *,
        residual: bool = False,
        time_size: int = 16,
        longest_time: float = 1.0,
        time_features: Callable[[Array], Array] | None = None,
        output_gain: float = 1.0,
        key: Key[Array, ""],
    ):
        """Makes a network with fresh parameters.

        Args:
            chunk_shape: rows and action dimensions ``(H, D)``.
            condition_size: length ``C`` of the condition; zero for none.
            hidden: width of each hidden layer; all equal where `residual`.
            activation: one of ``ACTIVATIONS``.
            residual: whether hidden layers after the first are residual blocks.
            time_size: number of sinusoidal time features, even.
            longest_time: the largest time; features turn from once to a hundred times as fast as ``time /
                longest_time``. The number of levels of a discrete process, 1 for a flow.
            time_features: other features, for example :class:`~steersman.networks.OctaveTime`; `time_size` and
                `longest_time` do not count then.
            output_gain: scale of the last layer's initial weights.
            key: randomness of the initialization.

        Raises:
            InputError: a size is not usable, or residual blocks of unequal widths.
        """
        rows, actions = check_sizes(chunk_shape, condition_size)
        require_number("longest_time", longest_time, above=0.0)
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        if time_features is None:
            require_count("time_size", time_size, minimum=4)
            time_features = SinusoidalTime(time_size, 100.0 / longest_time, 1.0 / longest_time)
        told = jax.eval_shape(time_features, jnp.zeros(()))
        require(told.ndim == 1, "time_features", time_features, "called with one time and return a vector")
        inputs, outputs = rows * actions + told.shape[0] + condition_size, rows * actions
        self.time_features = time_features
        self.chunk_shape = (rows, actions)
        self.condition_size = condition_size
        self.activation = activation
        if not residual:
            self.entry = MLP(inputs, outputs, tuple(hidden), activation, output_gain=output_gain, key=key)
            self.blocks, self.exit = [], None
            return
        if not hidden or len(set(hidden)) > 1:
            raise InputError(f"hidden is {tuple(hidden)}, but residual blocks need one or more equal widths.")
        width = hidden[0]
        keys = jax.random.split(key, len(hidden) + 1)
        self.entry = MLP(inputs, width, (), key=keys[0])
        self.blocks = [MLP(width, width, (width,), activation, key=k) for k in keys[1:-1]]
        self.exit = MLP(width, outputs, (), output_gain=output_gain, key=keys[-1])

    def __call__(
        self, x: Float[Array, "H D"], time: Float[Array, ""], condition: Float[Array, " C"]
    ) -> Float[Array, "H D"]:
        """The prediction.

        Args:
            x: the noisy chunk.
            time: what the noise process tells of the level.
            condition: the encoded observation.
        """
        check_arguments(x, condition, self.chunk_shape, self.condition_size)
        hidden = self.entry(jnp.concatenate([x.ravel(), self.time_features(time), condition]))
        if self.exit is not None:
            activation = ACTIVATIONS[self.activation]
            for block in self.blocks:
                hidden = hidden + block(activation(hidden))
            hidden = self.exit(activation(hidden))
        return hidden.reshape(self.chunk_shape)
