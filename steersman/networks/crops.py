"""Crops in front of an image encoder: at random places while it learns, in the middle when it acts."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputError, require, require_count


class KeyedEncoder(eqx.Module):
    """An encoder that may draw while it learns: it is then called with a key, and without one when it acts."""

    @abc.abstractmethod
    def __call__(self, observation: PyTree, key: Key[Array, ""] | None = None) -> Float[Array, " C"]:
        """The vector of one observation."""


def encode(encoder: Callable[..., Array], observation: PyTree, key: Key[Array, ""] | None) -> Float[Array, " C"]:
    """Calls any encoder; with the key where there is one and the encoder takes it."""
    if key is None or not isinstance(encoder, KeyedEncoder):
        return encoder(observation)
    return encoder(observation, key)


class CroppedEncoder(KeyedEncoder):
    """An image encoder that looks at a part of each image.

    With a key the part is anywhere with equal chances, which teaches the encoder not to mind where things are; without
    one it is the middle, as in robomimic and diffusion policy (Chi et al., 2023, arXiv:2303.04137). An image that has
    the size of the part passes as it is.

    Attributes:
        encoder: takes images of the part's size.
        image_shape: ``(channels, height, width)`` of whole images.
        crop: height and width of the part.
        random: whether a key moves the part; the middle always where False.
    """

    encoder: Callable[[Array], Array]
    image_shape: tuple[int, int, int] = eqx.field(static=True)
    crop: tuple[int, int] = eqx.field(static=True)
    random: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        require(len(self.image_shape) == 3, "image_shape", self.image_shape, "(channels, height, width)")
        for size in self.image_shape:
            require_count("image_shape", size)
        sides, crop = self.image_shape[1:], self.crop
        good = len(crop) == 2 and all(0 < part <= side for part, side in zip(crop, sides, strict=True))
        require(good, "crop", crop, f"(height, width) within the image's {sides}")

    def __call__(self, observation: Array, key: Key[Array, ""] | None = None) -> Float[Array, " C"]:
        """The vector of the part.

        Args:
            observation: an image ``[channels, height, width]``.
            key: randomness of the place; the middle where None.

        Raises:
            InputError: an image of another size.
        """
        shape = jnp.shape(observation)
        cropped = (self.image_shape[0], *self.crop)
        if shape not in (self.image_shape, cropped):
            last = ", channels last" if shape == (*self.image_shape[1:], self.image_shape[0]) else ""
            raise InputError(
                f"image has shape {shape}{last}, but it must be {self.image_shape}, or {cropped} if it is cropped."
            )
        if shape == cropped:
            return self.encoder(observation)
        spare = [have - want for have, want in zip(self.image_shape[1:], self.crop, strict=True)]
        if key is None or not self.random:
            # Halves are rounded to even, as torchvision's CenterCrop does.
            corner: Any = [round(each / 2.0) for each in spare]
        else:
            corner = jax.random.randint(key, (2,), 0, jnp.asarray(spare) + 1)
        part = jax.lax.dynamic_slice(observation, (0, corner[0], corner[1]), cropped)
        return self.encoder(part)
