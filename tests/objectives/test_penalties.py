import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.objectives import adaptive_kl

RULE = [(0.02, 2.0), (0.012, 1.0), (0.006, 0.5), (0.015, 1.0), (0.0, 0.5)]


@pytest.mark.parametrize(("kl", "expected"), RULE)
def test_the_papers_rule(kl, expected):
    assert adaptive_kl(1.0, kl, 0.01) == expected
    assert jax.jit(lambda b, d: adaptive_kl(b, d, 0.01))(jnp.asarray(1.0), jnp.asarray(kl)) == expected


def test_both_borders_are_inside_the_dead_band():
    np.testing.assert_array_equal(adaptive_kl(jnp.ones(2), jnp.asarray([2.0, 0.5]), 1.0, factor=2.0), [1.0, 1.0])


def test_each_agent_has_its_own_weight_and_other_factors():
    got = adaptive_kl(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([5.0, 1.0, 0.1]), 1.0, factor=2.0, multiplier=3.0)
    np.testing.assert_allclose(got, [3.0, 2.0, 1.0], rtol=1e-6)


def test_torch_tensors_and_numbers_mix():
    torch = pytest.importorskip("torch")
    got = adaptive_kl(1.0, torch.tensor(0.02, dtype=torch.float64), 0.01)
    assert got.dtype == torch.float64
    assert float(got) == 2.0
    assert adaptive_kl(torch.tensor([1.0]), 0.02, 0.01).tolist() == [2.0]


@pytest.mark.parametrize(
    ("argument", "bad"),
    [("beta", 0.0), ("target", -1.0), ("target", float("nan")), ("factor", 0.9), ("multiplier", 1.0)],
)
def test_bad_input_is_named(argument, bad):
    with pytest.raises(InputError, match=rf"^{argument} is"):
        adaptive_kl(**{"beta": 1.0, "kl": 0.01, "target": 0.01, argument: bad})
