"""Layers against PyTorch's; the whole network is held to LeRobot's in tests/diffusion/test_lerobot.py."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.networks import TemporalUNet
from steersman.networks.linear import draw_parameters
from steersman.networks.temporal_unet import TemporalConvolution, TemporalUpsampling


@pytest.mark.parametrize(("kernel", "stride", "rows"), [(5, 1, 8), (3, 2, 8), (3, 2, 7), (1, 1, 4)])
def test_convolution_is_pytorchs(kernel, stride, rows):
    import torch

    layer = draw_parameters(lambda draw: TemporalConvolution(3, 4, kernel, draw, stride), jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, rows)))
    weight, bias = (torch.as_tensor(np.array(part)) for part in (layer.weight, layer.bias))
    want = torch.nn.functional.conv1d(torch.as_tensor(x.copy())[None], weight, bias, stride, kernel // 2)
    np.testing.assert_allclose(layer(jnp.asarray(x)), want[0].numpy(), atol=1e-6)


def test_upsampling_is_pytorchs():
    import torch

    layer = draw_parameters(lambda draw: TemporalUpsampling(3, draw), jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, 5)))
    weight = torch.as_tensor(np.array(layer.weight).transpose(2, 1, 0).copy())
    bias = torch.as_tensor(np.array(layer.bias))
    want = torch.nn.functional.conv_transpose1d(torch.as_tensor(x.copy())[None], weight, bias, 2, 1)
    np.testing.assert_allclose(layer(jnp.asarray(x)), want[0].numpy(), atol=1e-6)


@eqx.filter_jit
def call(network, x, time, condition):
    return jax.vmap(network)(x, time, condition)


@pytest.mark.parametrize(("scaled", "size"), [(True, 3), (False, 0)])
def test_batches_are_single_calls(scaled, size):
    network = TemporalUNet((8, 2), size, (8, 16), kernel=3, time_size=8, scaled=scaled, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 8, 2))
    time, condition = jnp.arange(3.0), jax.random.normal(jax.random.key(2), (3, size))
    out = call(network, x, time, condition)
    assert out.shape == (3, 8, 2)
    assert np.isfinite(out).all()
    for i in range(3):
        one = call(network, x[i : i + 1], time[i : i + 1], condition[i : i + 1])[0]
        np.testing.assert_allclose(out[i], one, atol=1e-5)
    assert np.abs(np.diff(out, axis=0)).max() > 1e-3


def test_everything_takes_part():
    """The gradient reaches every parameter."""
    network = TemporalUNet((4, 2), 3, (16, 16), kernel=3, time_size=8, key=jax.random.key(0))

    @eqx.filter_jit
    def gradient(network):
        x = jax.random.normal(jax.random.key(1), (4, 2))
        return eqx.filter_grad(lambda n: jnp.sum(n(x, jnp.asarray(2.0), jnp.ones(3)) ** 2))(network)

    for leaf in jax.tree.leaves(gradient(network)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0.0


def test_initialization_is_pytorchs():
    """Uniform within one over the root of the inputs, biases too; the same inside jit as outside."""

    def make(key):
        return TemporalUNet((4, 2), 3, (16, 32), time_size=16, key=key)

    network, jitted = make(jax.random.key(0)), eqx.filter_jit(make)(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(network), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    weight, bound = np.asarray(network.middle[0].first.convolution.weight), 1.0 / np.sqrt(32 * 5)
    assert 0.99 * bound < np.abs(weight).max() <= bound
    assert weight.std() == pytest.approx(bound / np.sqrt(3.0), rel=0.05)
    assert abs(weight.mean()) < 0.05 * bound


@pytest.mark.parametrize(
    ("shape", "widths", "options", "message"),
    [
        ((6, 2), (8, 8, 8), {}, r"chunk_shape\[0\] is 6, but it must be a multiple of 4, because 3 levels halve"),
        ((0, 2), (8,), {}, r"chunk_shape\[0\] is 0"),
        ((8, 2), (8, 12), {}, r"widths is \(8, 12\), but it must be multiples of groups, 8"),
        ((8, 2), (), {}, "widths is"),
        ((8, 2), (8,), {"kernel": 4}, "kernel is 4, but it must be odd"),
        ((8, 2), (8,), {"time_size": 7}, "size is 7, but it must be even"),
        ((8, 2), (12,), {"groups": 4}, r"widths\[0\] is 12, but it must be a multiple of 8"),
    ],
)
def test_bad_sizes(shape, widths, options, message):
    with pytest.raises(InputError, match=message):
        TemporalUNet(shape, 3, widths, key=jax.random.key(0), **options)


def test_bad_inputs():
    network = TemporalUNet((4, 2), 3, (8,), time_size=8, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"x\.shape is \(8, 2\), but it must be \(4, 2\)"):
        network(jnp.zeros((8, 2)), jnp.asarray(0.0), jnp.zeros(3))
    with pytest.raises(InputError, match=r"condition\.shape is \(2,\), but it must be \(3,\)"):
        network(jnp.zeros((4, 2)), jnp.asarray(0.0), jnp.zeros(2))
