import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.networks import TransformerDenoiser
from steersman.networks.denoiser_transformer import DecoderLayer
from steersman.networks.linear import draw_parameters


@eqx.filter_jit
def call(network, x, time, condition):
    return network(x, time, condition)


def test_layers_are_pytorchs():
    import torch

    layer = draw_parameters(lambda draw: DecoderLayer(8, 2, True, draw), jax.random.key(0))
    theirs = torch.nn.TransformerDecoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)

    def tensor(array):
        return torch.nn.Parameter(torch.as_tensor(np.array(array)))

    for ours, other in ((layer.attention, theirs.self_attn), (layer.cross, theirs.multihead_attn)):
        other.in_proj_weight = tensor(jnp.concatenate([ours.query.weight, ours.key_value.weight]))
        other.in_proj_bias = tensor(jnp.concatenate([ours.query.bias, ours.key_value.bias]))
        other.out_proj.weight, other.out_proj.bias = tensor(ours.output.weight), tensor(ours.output.bias)
    for ours, other in ((layer.wide, theirs.linear1), (layer.narrow, theirs.linear2)):
        other.weight, other.bias = tensor(ours.weight), tensor(ours.bias)
    rows = np.array(jax.random.normal(jax.random.key(1), (5, 8)))
    tokens = np.array(jax.random.normal(jax.random.key(2), (3, 8)))
    mask = torch.triu(torch.full((5, 5), -torch.inf), diagonal=1)
    with torch.no_grad():
        want = theirs(torch.as_tensor(rows)[None], torch.as_tensor(tokens)[None], tgt_mask=mask)[0].numpy()
    out = eqx.filter_jit(layer)(jnp.asarray(rows), jnp.asarray(tokens))
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_what_rows_see():
    """A row's output depends on itself and earlier rows, on the time and on every frame."""
    network = TransformerDenoiser((4, 2), 6, 8, depth=2, heads=2, frames=3, key=jax.random.key(0))
    x, condition = jax.random.normal(jax.random.key(1), (4, 2)), jax.random.normal(jax.random.key(2), (6,))
    out = np.asarray(call(network, x, jnp.asarray(3.0), condition))
    assert out.shape == (4, 2)

    def moved(*changed):
        return np.abs(np.asarray(call(network, *changed)) - out).max(axis=1) > 1e-6

    np.testing.assert_array_equal(moved(x.at[2].add(1.0), jnp.asarray(3.0), condition), [False, False, True, True])
    assert moved(x, jnp.asarray(4.0), condition).all()
    for frame in range(3):
        assert moved(x, jnp.asarray(3.0), condition.at[2 * frame].add(1.0)).all()


def test_without_condition_and_mask():
    network = TransformerDenoiser((4, 2), 0, 8, depth=1, heads=2, causal=False, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 2))
    out, other = (call(network, rows, jnp.asarray(0.0), jnp.zeros(0)) for rows in (x, x.at[3].add(1.0)))
    assert (np.abs(np.asarray(out - other)).max(axis=1) > 1e-6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_shape": (4, 0)}, r"chunk_shape\[1\] is 0"),
        ({"width": 10, "heads": 4}, "width is 10, but it must be even and a multiple of heads, 4"),
        ({"frames": 4}, "condition_size is 6, but it must be a multiple of frames, 4"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 0}, "heads is 0"),
    ],
)
def test_bad_sizes(options, message):
    settings = {"chunk_shape": (4, 2), "condition_size": 6, "width": 8, **options}
    with pytest.raises(InputError, match=message):
        TransformerDenoiser(key=jax.random.key(0), **settings)


def test_bad_inputs():
    network = TransformerDenoiser((4, 2), 6, 8, depth=1, heads=2, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"x\.shape is \(3, 2\)"):
        network(jnp.zeros((3, 2)), jnp.asarray(0.0), jnp.zeros(6))
    with pytest.raises(InputError, match=r"condition\.shape is \(5,\)"):
        network(jnp.zeros((4, 2)), jnp.asarray(0.0), jnp.zeros(5))
