"""The one-dimensional convolutional network of diffusion policies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steersman.errors import require, require_count
from steersman.networks.denoiser_arguments import check_arguments, check_sizes
from steersman.networks.linear import Draw, Linear, draw_parameters
from steersman.networks.mlp import mish
from steersman.networks.time_embedding import SinusoidalTime


class TemporalConvolution(eqx.Module):
    """A convolution over the rows of a chunk, ``[in, H] -> [out, H / stride]``, padded with zeros on both sides.

    Written as one product of the weights with the windows, which at batch size one is bound by the reading of the
    weights; XLA's convolutions on CPU are several times slower, and by orders of magnitude for wide layers.

    Attributes:
        weight: ``[out, in, kernel]``.
        bias: ``[out]``.
        stride: distance between windows.
    """

    weight: Float[Array, "out in kernel"]
    bias: Float[Array, " out"]
    stride: int = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, kernel: int, draw: Draw, stride: int = 1):
        """Draws weights and biases.

        Args:
            inputs: channels in.
            outputs: channels out.
            kernel: rows that a window spans, odd.
            draw: where random numbers come from.
            stride: distance between windows.
        """
        self.weight = draw((outputs, inputs, kernel), inputs * kernel)
        self.bias = draw((outputs,), inputs * kernel)
        self.stride = stride

    def __call__(self, x: Float[Array, "in H"]) -> Float[Array, "out H2"]:
        """Applies the convolution."""
        outputs, inputs, kernel = self.weight.shape
        if kernel == 1:
            return self.weight[:, :, 0] @ x + self.bias[:, None]
        rows = (x.shape[1] - 1) // self.stride + 1
        padded = jnp.pad(x, ((0, 0), (kernel // 2, kernel // 2))).T
        last = self.stride * (rows - 1) + 1
        taps = [padded[tap : tap + last : self.stride] for tap in range(kernel)]
        windows = jnp.stack(taps, axis=-1).reshape(rows, inputs * kernel)
        # Both operands have the contracted axis last: the fastest of the four ways on CPU.
        return jnp.einsum("ok,hk->oh", self.weight.reshape(outputs, -1), windows) + self.bias[:, None]


class TemporalUpsampling(eqx.Module):
    """A transposed convolution of stride 2, kernel 4 and padding 1: ``[channels, H] -> [channels, 2 H]``.

    Row ``2m`` is ``W_1 x_m + W_3 x_(m-1)``, row ``2m + 1`` is ``W_2 x_m + W_0 x_(m+1)``.

    Attributes:
        weight: ``[4, out, in]``.
        bias: ``[out]``.
    """

    weight: Float[Array, "4 out in"]
    bias: Float[Array, " out"]

    def __init__(self, channels: int, draw: Draw):
        """Draws weights and biases.

        Args:
            channels: in and out.
            draw: where random numbers come from.
        """
        self.weight = draw((4, channels, channels), 4 * channels)
        self.bias = draw((channels,), 4 * channels)

    def __call__(self, x: Float[Array, "in H"]) -> Float[Array, "out H2"]:
        """Applies the transposed convolution."""
        taps = jnp.einsum("toi,ih->toh", self.weight, x)
        nothing = jnp.zeros_like(taps[0, :, :1])
        even = taps[1] + jnp.concatenate([nothing, taps[3, :, :-1]], axis=1)
        odd = taps[2] + jnp.concatenate([taps[0, :, 1:], nothing], axis=1)
        return jnp.stack([even, odd], axis=-1).reshape(even.shape[0], -1) + self.bias[:, None]


class ConvolutionBlock(eqx.Module):
    """Convolution, group normalization, Mish.

    Attributes:
        convolution: keeps the number of rows.
        norm: statistics over the rows and the channels of a group.
    """

    convolution: TemporalConvolution
    norm: eqx.nn.GroupNorm

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int, draw: Draw):
        """Makes the parts.

        Args:
            inputs: channels in.
            outputs: channels out.
            kernel: rows that a window spans.
            groups: groups of channels with common statistics.
            draw: where random numbers come from.
        """
        self.convolution = TemporalConvolution(inputs, outputs, kernel, draw)
        self.norm = eqx.nn.GroupNorm(groups, outputs)

    def __call__(self, x: Float[Array, "in H"]) -> Float[Array, "out H"]:
        """Applies the block."""
        return mish(self.norm(self.convolution(x)))


class FiLMResidualBlock(eqx.Module):
    """Two convolution blocks with a shortcut; the condition scales and shifts the channels between them.

    Feature-wise linear modulation (Perez et al., 2018, arXiv:1709.07871): ``scale * h + shift``, or ``h + shift``.

    Attributes:
        first: the block before the modulation.
        second: the block after it.
        modulation: from the activated condition to scales and shifts, or to shifts.
        shortcut: a convolution of kernel one, or None where input and output have equally many channels.
        scaled: whether the condition gives scales too.
    """

    first: ConvolutionBlock
    second: ConvolutionBlock
    modulation: Linear
    shortcut: TemporalConvolution | None
    scaled: bool = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        condition_size: int,
        kernel: int,
        groups: int,
        scaled: bool,
        draw: Draw,
    ):
        """Makes the parts.

        Args:
            inputs: channels in.
            outputs: channels out.
            condition_size: length of the condition.
            kernel: rows that a window spans.
            groups: groups of channels with common statistics.
            scaled: whether the condition gives scales too.
            draw: where random numbers come from.
        """
        self.first = ConvolutionBlock(inputs, outputs, kernel, groups, draw)
        self.second = ConvolutionBlock(outputs, outputs, kernel, groups, draw)
        self.modulation = Linear(condition_size, 2 * outputs if scaled else outputs, draw)
        self.shortcut = None if inputs == outputs else TemporalConvolution(inputs, outputs, 1, draw)
        self.scaled = scaled

    def __call__(self, x: Float[Array, "in H"], condition: Float[Array, " C"]) -> Float[Array, "out H"]:
        """Applies the block; `condition` has been activated already."""
        modulation = self.modulation(condition)[:, None]
        hidden = self.first(x)
        if self.scaled:
            scale, shift = jnp.split(modulation, 2)
            hidden = scale * hidden + shift
        else:
            hidden = hidden + modulation
        return self.second(hidden) + (x if self.shortcut is None else self.shortcut(x))


class Descent(eqx.Module):
    """One level on the way down: two blocks, and half as many rows."""

    first: FiLMResidualBlock
    second: FiLMResidualBlock
    downsampling: TemporalConvolution | None


class Ascent(eqx.Module):
    """One level on the way up: two blocks on the rows below and those kept on the way down, and twice as many rows."""

    first: FiLMResidualBlock
    second: FiLMResidualBlock
    upsampling: TemporalUpsampling


class TemporalUNet(eqx.Module):
    """The conditional U-Net of diffusion policy (Chi et al., 2023, arXiv:2303.04137), with LeRobot's architecture.

    A denoiser's network: called unbatched with a noisy chunk, a time and one condition vector. Time features and
    condition modulate every residual block. On CPU its time at batch size one is that of reading its weights once.

    Attributes:
        time_features: of the time, ``[time_size]``.
        time_layers: two linear layers with Mish between them.
        down: the levels on the way down; the last does not downsample.
        middle: two blocks at the bottom.
        up: the levels on the way up.
        final: the last convolution block.
        output: to the action dimensions, kernel one.
        chunk_shape: ``(H, D)``.
        condition_size: length ``C`` of the condition.
    """

    time_features: SinusoidalTime
    time_layers: tuple[Linear, Linear]
    down: list[Descent]
    middle: list[FiLMResidualBlock]
    up: list[Ascent]
    final: ConvolutionBlock
    output: TemporalConvolution
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    condition_size: int = eqx.field(static=True)

    def __init__(
        self,
        chunk_shape: tuple[int, int],
        condition_size: int,
        widths: Sequence[int] = (256, 512, 1024),
        *,
        kernel: int = 5,
        groups: int = 8,
        time_size: int = 128,
        scaled: bool = True,
        key: Key[Array, ""],
    ):
        """Makes a network with fresh parameters.

        Args:
            chunk_shape: rows and action dimensions ``(H, D)``; ``H`` a multiple of ``2^(levels - 1)``.
            condition_size: length ``C`` of the condition; zero for none.
            widths: channels of each level, from the finest.
            kernel: rows that a window spans, odd.
            groups: groups of channels with common statistics in each normalization; divides every width. The last
                block always has 8, or one for each channel where there are fewer.
            time_size: number of time features.
            scaled: whether the condition scales the channels as well as shifting them.
            key: randomness of the initialization.

        Raises:
            InputError: rows that cannot be halved often enough, or widths that groups do not divide.
        """
        rows, actions = check_sizes(chunk_shape, condition_size)
        require_count("groups", groups)
        require_count("kernel", kernel)
        require(kernel % 2 == 1, "kernel", kernel, "odd, so that a window has a middle row")
        require(len(widths) > 0, "widths", tuple(widths), "one number of channels a level")
        for width in widths:
            require_count("widths", width)
            require(width % groups == 0, "widths", tuple(widths), f"multiples of groups, {groups}")
        halvings = len(widths) - 1
        require(
            rows % 2**halvings == 0,
            "chunk_shape[0]",
            rows,
            f"a multiple of {2**halvings}, because {len(widths)} levels halve the rows {halvings} times",
        )
        final_groups = min(8, widths[0])
        require(widths[0] % final_groups == 0, "widths[0]", widths[0], f"a multiple of {final_groups}")
        size = time_size + condition_size
        pairs = [(actions, widths[0]), *itertools.pairwise(widths)]

        def build(draw: Draw) -> tuple:
            def block(inputs: int, outputs: int) -> FiLMResidualBlock:
                return FiLMResidualBlock(inputs, outputs, size, kernel, groups, scaled, draw)

            time_layers = Linear(time_size, 4 * time_size, draw), Linear(4 * time_size, time_size, draw)
            down = []
            for level, (inputs, outputs) in enumerate(pairs):
                first, second = block(inputs, outputs), block(outputs, outputs)
                shorter = TemporalConvolution(outputs, outputs, 3, draw, stride=2) if level < halvings else None
                down.append(Descent(first, second, shorter))
            middle = [block(widths[-1], widths[-1]), block(widths[-1], widths[-1])]
            up = []
            for outputs, inputs in reversed(pairs[1:]):
                first, second = block(2 * inputs, outputs), block(outputs, outputs)
                up.append(Ascent(first, second, TemporalUpsampling(outputs, draw)))
            final = ConvolutionBlock(widths[0], widths[0], kernel, final_groups, draw)
            return time_layers, down, middle, up, final, TemporalConvolution(widths[0], actions, 1, draw)

        self.time_features = SinusoidalTime(time_size)
        parts = draw_parameters(build, key)
        self.time_layers, self.down, self.middle, self.up, self.final, self.output = parts
        self.chunk_shape = (rows, actions)
        self.condition_size = condition_size

    def __call__(
        self, x: Float[Array, "H D"], time: Float[Array, ""], condition: Float[Array, " C"]
    ) -> Float[Array, "H D"]:
        """The prediction.

        Args:
            x: the noisy chunk.
            time: what the noise process tells of the level; a level's number for the usual discrete processes.
            condition: the encoded observation.
        """
        check_arguments(x, condition, self.chunk_shape, self.condition_size)
        first, second = self.time_layers
        told = second(mish(first(self.time_features(time))))
        # Every block activates its condition; once is enough.
        told = mish(jnp.concatenate([told, condition]))
        hidden = x.T
        kept = []
        for level in self.down:
            hidden = level.second(level.first(hidden, told), told)
            kept.append(hidden)
            if level.downsampling is not None:
                hidden = level.downsampling(hidden)
        for block in self.middle:
            hidden = block(hidden, told)
        for level in self.up:
            hidden = jnp.concatenate([hidden, kept.pop()])
            hidden = level.upsampling(level.second(level.first(hidden, told), told))
        return self.output(self.final(hidden)).T
