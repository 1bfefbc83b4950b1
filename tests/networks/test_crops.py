"""Cropped encoders: which part is seen, and when it moves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.networks import CroppedEncoder, WindowEncoder

IMAGE = jnp.arange(7 * 6, dtype=jnp.float32).reshape(1, 7, 6)
ENCODER = CroppedEncoder(jnp.ravel, (1, 7, 6), (4, 3))


@eqx.filter_jit
def parts(encoder, image, keys):
    return jax.vmap(lambda key: encoder(image, key))(keys)


def test_without_a_key_the_middle_is_seen():
    """Spare rows and columns of 3: half of them, rounded to even, is 2, as torchvision's CenterCrop has it."""
    want = np.asarray(IMAGE)[:, 2:6, 2:5].ravel()
    np.testing.assert_array_equal(ENCODER(IMAGE), want)
    np.testing.assert_array_equal(ENCODER(jnp.asarray(want).reshape(1, 4, 3)), want)


def test_with_keys_every_part_is_seen_equally_often():
    found = np.asarray(parts(ENCODER, IMAGE, jax.random.split(jax.random.key(0), 4000)))
    image = np.asarray(IMAGE)[0]
    want = {(i, j): image[i : i + 4, j : j + 3].ravel() for i in range(4) for j in range(4)}
    corners = [divmod(int(first), 6) for first in found[:, 0]]
    for corner, part in zip(corners, found, strict=True):
        np.testing.assert_array_equal(part, want[corner])
    counts = np.asarray([corners.count(corner) for corner in want])
    # Sixteen places, 250 times each: chi squared with 15 degrees of freedom is above 37.7 once in a thousand.
    assert ((counts - 250.0) ** 2 / 250.0).sum() < 37.7
    still = CroppedEncoder(jnp.ravel, (1, 7, 6), (4, 3), random=False)
    np.testing.assert_array_equal(parts(still, IMAGE, jax.random.split(jax.random.key(0), 3)), [ENCODER(IMAGE)] * 3)


def test_every_frame_of_a_window_is_cropped_on_its_own():
    encoder = WindowEncoder({"image": ENCODER, "state": None})
    window = {"image": jnp.stack([IMAGE] * 12), "state": jnp.ones((12, 2))}
    acting = np.asarray(encoder(window)).reshape(12, 14)
    np.testing.assert_array_equal(acting, np.tile([*np.asarray(ENCODER(IMAGE)), 1.0, 1.0], (12, 1)))
    learning = np.asarray(encoder(window, jax.random.key(0))).reshape(12, 14)
    assert len({row[0] for row in learning}) > 3
    np.testing.assert_array_equal(learning[:, 12:], 1.0)


def test_bad_input():
    with pytest.raises(InputError, match=r"crop is \(8, 3\)"):
        CroppedEncoder(jnp.ravel, (1, 7, 6), (8, 3))
    with pytest.raises(InputError, match="image_shape is 0"):
        CroppedEncoder(jnp.ravel, (0, 7, 6), (4, 3))
    with pytest.raises(InputError, match=r"image has shape \(7, 6, 1\), channels last, but it must be \(1, 7, 6\)"):
        ENCODER(jnp.zeros((7, 6, 1)))
    with pytest.raises(InputError, match=r"image has shape \(1, 5, 5\), but it must be"):
        ENCODER(jnp.zeros((1, 5, 5)))
