"""From observations to condition vectors: point clouds, images, windows of several frames."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputError, InputTypeError, require, require_count, unknown_name
from steersman.networks.crops import KeyedEncoder, encode
from steersman.networks.linear import Draw, Linear, draw_parameters


def _check_image(image: Any, channels: int, shape: tuple[int, int] | None = None) -> None:
    """One sentence for what is not a float image ``[channels, height, width]``."""
    dtype, found = jnp.result_type(image), jnp.shape(image)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputTypeError(f"image has dtype {dtype}, but it must hold floats: divide bytes by 255.")
    want = (channels, *shape) if shape else f"({channels}, height, width)"
    if len(found) == 3 and found[-1] == channels and found[0] != channels:
        raise InputError(f"image has shape {found}, channels last, but it must be {want}.")
    good = len(found) == 3 and found[0] == channels and (shape is None or found[1:] == tuple(shape))
    require(good, "image.shape", found, f"{want}")


class PointNet(eqx.Module):
    """A point cloud to a vector: one perceptron for every point, pooled, then a linear layer and a normalization.

    The encoder of 3D Diffusion Policy (Ze et al., 2024, arXiv:2403.03954) after PointNet (Qi et al., 2017,
    arXiv:1612.00593): each hidden layer is linear, layer normalization, ReLU. The order of the points does not matter.

    Attributes:
        layers: of the perceptron.
        norms: after each of them.
        output: to the vector.
        output_norm: after it.
        channels: numbers of each point.
        pool: ``"max"`` or ``"mean"``.
    """

    layers: list[Linear]
    norms: list[eqx.nn.LayerNorm]
    output: Linear
    output_norm: eqx.nn.LayerNorm
    channels: int = eqx.field(static=True)
    pool: str = eqx.field(static=True)

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256),
        output_size: int = 64,
        *,
        pool: str = "max",
        key: Key[Array, ""],
    ):
        """Makes an encoder with fresh parameters.

        Args:
            channels: numbers of each point: 3 for positions, 6 with colours.
            widths: width of each layer of the perceptron.
            output_size: length of the vector.
            pool: ``"max"`` or ``"mean"`` over the points.
            key: randomness of the initialization.
        """
        require_count("channels", channels)
        require_count("output_size", output_size)
        require(len(widths) > 0, "widths", tuple(widths), "one width a layer")
        for width in widths:
            require_count("widths", width)
        if pool not in ("max", "mean"):
            raise unknown_name("pool", pool, ("max", "mean"))
        sizes = [channels, *widths]

        def build(draw: Draw) -> tuple[list[Linear], Linear]:
            layers = [Linear(into, out, draw) for into, out in itertools.pairwise(sizes)]
            return layers, Linear(sizes[-1], output_size, draw)

        self.layers, self.output = draw_parameters(build, key)
        self.norms = [eqx.nn.LayerNorm(width) for width in widths]
        self.output_norm = eqx.nn.LayerNorm(output_size)
        self.channels = channels
        self.pool = pool

    def __call__(self, points: Array) -> Float[Array, " out"]:
        """The vector.

        Args:
            points: at least one point, ``[N, channels]``.

        Raises:
            InputError: no points, points of another size, or NaN among them (where they are not being traced).
        """
        shape = points.shape
        require(points.ndim == 2 and shape[1] == self.channels, "points.shape", shape, f"[N, {self.channels}]")
        require(shape[0] > 0, "points.shape", shape, "at least one point")
        if not isinstance(points, Tracer) and not np.isfinite(np.asarray(points)).all():
            raise InputError("points has NaN or infinity: drop such points, or repeat others in their place.")

        def features(point: Array) -> Array:
            for layer, norm in zip(self.layers, self.norms, strict=True):
                point = jax.nn.relu(norm(layer(point)))
            return point

        hidden = jax.vmap(features)(points)
        pooled = jnp.max(hidden, axis=0) if self.pool == "max" else jnp.mean(hidden, axis=0)
        return self.output_norm(self.output(pooled))


class ImageConvolution(eqx.Module):
    """A convolution without bias, ``[in, height, width] -> [out, height / stride, width / stride]``.

    Attributes:
        weight: ``[out, in, kernel, kernel]``.
        stride: distance between windows.
    """

    weight: Float[Array, "out in kernel kernel"]
    stride: int = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, kernel: int, draw: Draw, stride: int = 1):
        """Draws the weights.

        Args:
            inputs: channels in.
            outputs: channels out.
            kernel: side of a window, odd.
            draw: where random numbers come from.
            stride: distance between windows.
        """
        self.weight = draw((outputs, inputs, kernel, kernel), inputs * kernel**2)
        self.stride = stride

    def __call__(self, x: Float[Array, "in height width"]) -> Float[Array, "out height2 width2"]:
        """Applies the convolution, padded with zeros by half a window."""
        pad = self.weight.shape[-1] // 2
        return jax.lax.conv_general_dilated(x[None], self.weight, (self.stride,) * 2, [(pad, pad)] * 2)[0]


class ConvEncoder(eqx.Module):
    """A small image encoder: convolutions of stride 2 with ReLU, then a linear layer on all that is left.

    Attributes:
        convolutions: each halves height and width.
        biases: of each, ``[out]``.
        output: to the vector.
        image_shape: ``(channels, height, width)``.
    """

    convolutions: list[ImageConvolution]
    biases: list[Float[Array, " out"]]
    output: Linear
    image_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        widths: Sequence[int] = (16, 32, 64),
        output_size: int = 64,
        *,
        kernel: int = 3,
        key: Key[Array, ""],
    ):
        """Makes an encoder with fresh parameters.

        Args:
            image_shape: ``(channels, height, width)``.
            widths: channels after each convolution.
            output_size: length of the vector.
            kernel: side of a window, odd.
            key: randomness of the initialization.
        """
        require(len(image_shape) == 3, "image_shape", image_shape, "(channels, height, width)")
        for size in image_shape:
            require_count("image_shape", size)
        require(len(widths) > 0, "widths", tuple(widths), "one number of channels a convolution")
        for width in widths:
            require_count("widths", width)
        require_count("output_size", output_size)
        require_count("kernel", kernel)
        require(kernel % 2 == 1, "kernel", kernel, "odd, so that a window has a middle")
        channels, height, width = image_shape
        for _ in widths:
            height, width = (height + 1) // 2, (width + 1) // 2
        sizes = [channels, *widths]

        def build(draw: Draw) -> tuple[list[ImageConvolution], list[Array], Linear]:
            pairs = list(itertools.pairwise(sizes))
            convolutions = [ImageConvolution(into, out, kernel, draw, stride=2) for into, out in pairs]
            biases = [draw((out,), into * kernel**2) for into, out in pairs]
            return convolutions, biases, Linear(sizes[-1] * height * width, output_size, draw)

        self.convolutions, self.biases, self.output = draw_parameters(build, key)
        self.image_shape = (channels, image_shape[1], image_shape[2])

    def __call__(self, image: Array) -> Float[Array, " out"]:
        """The vector of one image.

        Args:
            image: of :attr:`image_shape`, with values around [0, 1].

        Raises:
            InputError: an image of another shape, or with its channels last.
            InputTypeError: an image of bytes.
        """
        _check_image(image, self.image_shape[0], self.image_shape[1:])
        hidden = image
        for convolution, bias in zip(self.convolutions, self.biases, strict=True):
            hidden = jax.nn.relu(convolution(hidden) + bias[:, None, None])
        return self.output(hidden.ravel())


class FrozenBatchNorm(eqx.Module):
    """Batch normalization with fixed statistics, as it is evaluated: ``weight (x - mean) / sqrt(var + eps) + bias``.

    Attributes:
        weight: ``[channels]``.
        bias: ``[channels]``.
        mean: running mean at the end of training; takes no gradient.
        variance: running variance; takes no gradient.
    """

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    mean: Float[Array, " channels"]
    variance: Float[Array, " channels"]

    def __init__(self, channels: int):
        """The identity, nearly.

        Args:
            channels: of the images.
        """
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)
        self.mean, self.variance = jnp.zeros(channels), jnp.ones(channels)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        """Applies the normalization."""
        mean, variance = jax.lax.stop_gradient((self.mean, self.variance))
        scale = self.weight * jax.lax.rsqrt(variance + 1e-5)
        return scale[:, None, None] * x + (self.bias - scale * mean)[:, None, None]


def _norm(kind: str, channels: int) -> FrozenBatchNorm | eqx.nn.GroupNorm:
    return FrozenBatchNorm(channels) if kind == "batch" else eqx.nn.GroupNorm(max(1, channels // 16), channels)


class ResidualImageBlock(eqx.Module):
    """Two convolutions with a shortcut (He et al., 2016, arXiv:1512.03385).

    Attributes:
        first: may halve height and width.
        first_norm: after it.
        second: keeps them.
        second_norm: after it.
        shortcut: a convolution of kernel one where the shapes differ.
        shortcut_norm: after it.
    """

    first: ImageConvolution
    first_norm: FrozenBatchNorm | eqx.nn.GroupNorm
    second: ImageConvolution
    second_norm: FrozenBatchNorm | eqx.nn.GroupNorm
    shortcut: ImageConvolution | None
    shortcut_norm: FrozenBatchNorm | eqx.nn.GroupNorm | None

    def __init__(self, inputs: int, outputs: int, stride: int, normalization: str, draw: Draw):
        """Makes the parts.

        Args:
            inputs: channels in.
            outputs: channels out.
            stride: of the first convolution and the shortcut.
            normalization: ``"group"`` or ``"batch"``.
            draw: where random numbers come from.
        """
        self.first = ImageConvolution(inputs, outputs, 3, draw, stride)
        self.first_norm = _norm(normalization, outputs)
        self.second = ImageConvolution(outputs, outputs, 3, draw)
        self.second_norm = _norm(normalization, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else ImageConvolution(inputs, outputs, 1, draw, stride)
        self.shortcut_norm = None if same else _norm(normalization, outputs)

    def __call__(self, x: Float[Array, "in height width"]) -> Float[Array, "out height2 width2"]:
        """Applies the block."""
        hidden = jax.nn.relu(self.first_norm(self.first(x)))
        hidden = self.second_norm(self.second(hidden))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(hidden + x)


def spatial_softmax(features: Float[Array, "K height width"]) -> Float[Array, "K 2"]:
    """Expected coordinates ``(x, y)`` in [-1, 1] of each map under a softmax over its pixels.

    The keypoints of deep spatial autoencoders (Finn et al., 2016, arXiv:1509.06113).
    """
    _, height, width = features.shape
    attention = jax.nn.softmax(features.reshape(features.shape[0], -1), axis=-1).reshape(features.shape)
    across = jnp.linspace(-1.0, 1.0, width, dtype=features.dtype)
    down = jnp.linspace(-1.0, 1.0, height, dtype=features.dtype)
    return jnp.stack([attention.sum(1) @ across, attention.sum(2) @ down], axis=-1)


class ResNet18(eqx.Module):
    """An 18-layer residual network with keypoints at its end: the image encoder of diffusion policies.

    Convolution of stride 2, pooling of stride 2, four stages of two blocks, then ``keypoints`` maps by a
    convolution of kernel one, their :func:`spatial_softmax`, a linear layer and ReLU: ``[2 keypoints]``. The layout is
    that of LeRobot's ``DiffusionRgbEncoder``.

    Attributes:
        stem: the first convolution.
        stem_norm: after it.
        blocks: eight of them.
        maps: weights of the keypoint maps ``[keypoints, channels]`` with biases.
        output: on the keypoints' coordinates.
        image_shape: ``(channels, height, width)``.
    """

    stem: ImageConvolution
    stem_norm: FrozenBatchNorm | eqx.nn.GroupNorm
    blocks: list[ResidualImageBlock]
    maps: Linear
    output: Linear
    image_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        keypoints: int = 32,
        normalization: str = "group",
        width: int = 64,
        key: Key[Array, ""],
    ):
        """Makes an encoder with fresh parameters.

        Args:
            image_shape: ``(channels, height, width)``.
            keypoints: number of maps.
            normalization: ``"group"`` (16 channels a group), or ``"batch"`` with fixed statistics, for weights that
                were trained with them.
            width: channels of the first stage, doubled in each of the next three.
            key: randomness of the initialization.

        Raises:
            InputError: a size is not usable.
        """
        require(len(image_shape) == 3, "image_shape", image_shape, "(channels, height, width)")
        for size in image_shape:
            require_count("image_shape", size)
        require_count("keypoints", keypoints)
        require_count("width", width)
        if normalization not in ("group", "batch"):
            raise unknown_name("normalization", normalization, ("group", "batch"))
        divided = normalization == "batch" or width % 16 == 0
        require(divided, "width", width, "a multiple of 16, the channels of a group")
        sizes = [width, width, 2 * width, 4 * width, 8 * width]

        def build(draw: Draw) -> tuple[ImageConvolution, list[ResidualImageBlock], Linear, Linear]:
            stem = ImageConvolution(image_shape[0], width, 7, draw, stride=2)
            blocks = []
            for stage, (into, out) in enumerate(itertools.pairwise(sizes)):
                blocks.append(ResidualImageBlock(into, out, 1 if stage == 0 else 2, normalization, draw))
                blocks.append(ResidualImageBlock(out, out, 1, normalization, draw))
            return stem, blocks, Linear(sizes[-1], keypoints, draw), Linear(2 * keypoints, 2 * keypoints, draw)

        self.stem, self.blocks, self.maps, self.output = draw_parameters(build, key)
        self.stem_norm = _norm(normalization, width)
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])

    def __call__(self, image: Array) -> Float[Array, " out"]:
        """The keypoint features of one image.

        Args:
            image: of :attr:`image_shape`; values as in training.

        Raises:
            InputError: an image of another shape, or with its channels last.
            InputTypeError: an image of bytes.
        """
        _check_image(image, self.image_shape[0], self.image_shape[1:])
        hidden = jax.nn.relu(self.stem_norm(self.stem(image)))
        hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))
        for block in self.blocks:
            hidden = block(hidden)
        maps = jnp.einsum("kc,chw->khw", self.maps.weight, hidden) + self.maps.bias[:, None, None]
        return jax.nn.relu(self.output(spatial_softmax(maps).ravel()))


class WindowEncoder(KeyedEncoder):
    """Encodes each frame of an observation window and puts the results one after the other: ``[C]``.

    Within a frame the entries follow each other in the order in which they were given. One encoder under two names is
    one encoder: its weights are shared.

    Attributes:
        encoders: the distinct encoders.
        names: entries of the observation, in order; empty where the window is one array.
        places: for each name, which encoder; -1 where the entry is taken as it is.
    """

    encoders: list[Callable[[Array], Array]]
    names: tuple[str, ...] = eqx.field(static=True)
    places: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, encoders: Mapping[str, Callable[[Array], Array] | None] | Callable[[Array], Array] | None):
        """Collects the encoders.

        Args:
            encoders: for each entry of an observation that is a dictionary, what maps one frame of it to a vector, or
                None for its numbers as they are; or the same for windows that are one array.
        """
        given = encoders if isinstance(encoders, Mapping) else {"": encoders}
        require(len(given) > 0, "encoders", encoders, "at least one entry")
        self.names = tuple(encoders) if isinstance(encoders, Mapping) else ()
        self.encoders = []
        places = []
        for encoder in given.values():
            if encoder is not None and not any(encoder is known for known in self.encoders):
                self.encoders.append(encoder)
            places.append(-1 if encoder is None else next(i for i, e in enumerate(self.encoders) if e is encoder))
        self.places = tuple(places)

    def __call__(self, observation: PyTree, key: Key[Array, ""] | None = None) -> Float[Array, " C"]:
        """The condition.

        Args:
            observation: arrays with a leading axis of ``To`` frames.
            key: randomness of encoders that draw while they learn, another for each frame; None when acting.

        Raises:
            InputError: an entry is missing, or the entries have unequal numbers of frames.
        """
        if self.names:
            if not isinstance(observation, Mapping):
                kind = type(observation).__name__
                raise InputTypeError(f"observation is a {kind}, but it must be a dictionary with {list(self.names)}.")
            for name in self.names:
                if name not in observation:
                    raise InputError(f"observation has no {name!r}: it has {sorted(observation)}.")
            entries = [observation[name] for name in self.names]
        else:
            entries = [observation]
        frames = [jnp.shape(entry)[:1] for entry in entries]
        require(all(f and f == frames[0] for f in frames), "observation", frames, "arrays with equally many frames")
        parts = []
        for number, (place, entry) in enumerate(zip(self.places, entries, strict=True)):
            if place < 0:
                flat = jnp.asarray(entry, jnp.result_type(float))
                parts.append(flat.reshape(flat.shape[0], math.prod(flat.shape[1:])))
            else:
                encoder = self.encoders[place]
                keys = None if key is None else jax.random.split(jax.random.fold_in(key, number), frames[0][0])
                parts.append(jax.vmap(lambda frame, key, encoder=encoder: encode(encoder, frame, key))(entry, keys))
        return jnp.concatenate(parts, axis=1).ravel()
