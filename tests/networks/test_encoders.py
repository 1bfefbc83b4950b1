"""Encoders against PyTorch's layers and by hand; ResNet18 whole is held to LeRobot's in diffusion/test_lerobot.py."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError, InputTypeError
from steersman.networks import ConvEncoder, PointNet, ResNet18, WindowEncoder, spatial_softmax
from steersman.networks.encoders import FrozenBatchNorm, ResidualImageBlock
from steersman.networks.linear import draw_parameters


@eqx.filter_jit
def call(encoder, observation):
    return encoder(observation)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_pointnet_by_hand(pool):
    encoder = PointNet(3, (5, 4), 6, pool=pool, key=jax.random.key(0))
    points = np.asarray(jax.random.normal(jax.random.key(1), (7, 3)))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    hidden = points
    for layer in encoder.layers:
        hidden = np.maximum(norm(hidden @ np.asarray(layer.weight).T + np.asarray(layer.bias)), 0.0)
    pooled = hidden.max(0) if pool == "max" else hidden.mean(0)
    want = norm(np.asarray(encoder.output.weight) @ pooled + np.asarray(encoder.output.bias))
    np.testing.assert_allclose(call(encoder, jnp.asarray(points)), want, atol=1e-5)
    np.testing.assert_allclose(call(encoder, jnp.asarray(points[::-1].copy())), want, atol=1e-5)


def test_bad_clouds():
    encoder = PointNet(3, (4,), 2, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"points\.shape is \(5, 2\), but it must be \[N, 3\]"):
        encoder(jnp.zeros((5, 2)))
    with pytest.raises(InputError, match=r"points\.shape is \(0, 3\), but it must be at least one point"):
        encoder(jnp.zeros((0, 3)))
    with pytest.raises(InputError, match="points has NaN"):
        encoder(jnp.zeros((5, 3)).at[2, 1].set(jnp.nan))
    with pytest.raises(InputError, match="Unknown pool 'sum'"):
        PointNet(pool="sum", key=jax.random.key(0))
    with pytest.raises(InputError, match="widths is"):
        PointNet(widths=(), key=jax.random.key(0))


def test_small_image_encoder_is_pytorchs():
    import torch

    encoder = ConvEncoder((3, 9, 6), (4, 5), 7, key=jax.random.key(0))
    image = np.array(jax.random.uniform(jax.random.key(1), (3, 9, 6)))
    hidden = torch.as_tensor(image)[None]
    for convolution, bias in zip(encoder.convolutions, encoder.biases, strict=True):
        weight = torch.as_tensor(np.array(convolution.weight))
        hidden = torch.relu(torch.nn.functional.conv2d(hidden, weight, torch.as_tensor(np.array(bias)), 2, 1))
    want = np.asarray(encoder.output.weight) @ hidden.numpy().ravel() + np.asarray(encoder.output.bias)
    np.testing.assert_allclose(call(encoder, jnp.asarray(image)), want, atol=1e-5)


def test_bad_images():
    for encoder in (
        ConvEncoder((3, 8, 6), (4,), 7, key=jax.random.key(0)),
        ResNet18((3, 8, 6), width=16, keypoints=2, key=jax.random.key(0)),
    ):
        with pytest.raises(InputError, match=r"image has shape \(8, 6, 3\), channels last"):
            encoder(jnp.zeros((8, 6, 3)))
        with pytest.raises(InputTypeError, match=r"image has dtype uint8.*divide bytes by 255"):
            encoder(jnp.zeros((3, 8, 6), jnp.uint8))
        with pytest.raises(InputError, match=r"image\.shape is \(1, 8, 6\), but it must be"):
            encoder(jnp.zeros((1, 8, 6)))
        with pytest.raises(InputError, match=r"image\.shape is \(3, 9, 6\), but it must be"):
            encoder(jnp.zeros((3, 9, 6)))
    with pytest.raises(InputError, match="Unknown normalization 'layer'"):
        ResNet18((3, 8, 6), normalization="layer", key=jax.random.key(0))
    with pytest.raises(InputError, match="width is 25, but it must be a multiple of 16"):
        ResNet18((3, 8, 6), width=25, key=jax.random.key(0))
    with pytest.raises(InputError, match="kernel is 2"):
        ConvEncoder((3, 8, 6), kernel=2, key=jax.random.key(0))


def test_residual_block_of_fixed_statistics_is_pytorchs():
    import torch

    block = draw_parameters(lambda draw: ResidualImageBlock(2, 3, 2, "batch", draw), jax.random.key(0))
    names = ("weight", "bias", "mean", "variance")
    numbers = iter(np.asarray(jax.random.uniform(jax.random.key(1), (12, 3))) + 0.5)
    filled = [jnp.asarray(next(numbers)) for _ in range(12)]
    block = eqx.tree_at(
        lambda b: [getattr(norm, name) for norm in (b.first_norm, b.second_norm, b.shortcut_norm) for name in names],
        block,
        filled,
    )
    image = np.array(jax.random.normal(jax.random.key(2), (2, 7, 6)))

    def convolve(layer, x, stride):
        weight = torch.as_tensor(np.array(layer.weight))
        return torch.nn.functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    def norm(layer, x):
        weight, bias, mean, variance = (torch.as_tensor(np.array(getattr(layer, name))) for name in names)
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias)

    x = torch.as_tensor(image)[None]
    hidden = torch.relu(norm(block.first_norm, convolve(block.first, x, 2)))
    hidden = norm(block.second_norm, convolve(block.second, hidden, 1))
    want = torch.relu(hidden + norm(block.shortcut_norm, convolve(block.shortcut, x, 2)))[0].numpy()
    np.testing.assert_allclose(call(block, jnp.asarray(image)), want, atol=1e-5)
    gradient = eqx.filter_grad(lambda b: jnp.sum(b(jnp.asarray(image))))(block)
    assert isinstance(gradient.first_norm, FrozenBatchNorm)
    assert np.abs(gradient.first_norm.mean).max() == 0.0
    assert np.abs(gradient.first_norm.weight).max() > 0.0


def test_keypoints_by_hand():
    """A peak's coordinates run from -1 to 1: across the width first, then down."""
    maps = np.zeros((3, 3, 5), np.float32)
    maps[0, 2, 1] = 100.0
    maps[1, 0, 4] = 100.0
    np.testing.assert_allclose(spatial_softmax(jnp.asarray(maps)), [[-0.5, 1.0], [1.0, -1.0], [0.0, 0.0]], atol=1e-6)


def test_a_window_goes_frame_by_frame():
    encoder = WindowEncoder({"cloud": lambda points: jnp.sum(points, axis=0), "state": None, "other": jnp.ravel})
    observation = {
        "state": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]),
        "cloud": jnp.arange(12.0).reshape(2, 2, 3),
        "other": jnp.asarray([[[5.0]], [[6.0]]]),
    }
    np.testing.assert_allclose(encoder(observation), [3.0, 5.0, 7.0, 1.0, 2.0, 5.0, 15.0, 17.0, 19.0, 3.0, 4.0, 6.0])
    np.testing.assert_allclose(WindowEncoder(None)(jnp.arange(6).reshape(3, 2)), np.arange(6.0))


def test_one_encoder_under_two_names_shares_its_weights():
    net = PointNet(2, (4,), 3, key=jax.random.key(0))
    encoder = WindowEncoder({"b": net, "a": net})
    assert len(jax.tree.leaves(eqx.filter(encoder, eqx.is_array))) == len(
        jax.tree.leaves(eqx.filter(net, eqx.is_array))
    )
    first, second = jax.random.normal(jax.random.key(1), (2, 1, 5, 2))
    out = call(encoder, {"a": first, "b": second})
    np.testing.assert_allclose(out, np.concatenate([call(net, second[0]), call(net, first[0])]), atol=1e-5)


def test_bad_windows():
    encoder = WindowEncoder({"state": None, "other": None})
    with pytest.raises(InputTypeError, match="observation is a"):
        encoder(jnp.zeros((2, 3)))
    with pytest.raises(InputError, match="observation has no 'other'"):
        encoder({"state": jnp.zeros((2, 3))})
    with pytest.raises(InputError, match="equally many frames"):
        encoder({"state": jnp.zeros((2, 3)), "other": jnp.zeros((3, 3))})
    with pytest.raises(InputError, match="encoders is"):
        WindowEncoder({})
