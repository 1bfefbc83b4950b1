import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.training import prng


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
def test_same_numbers_as_jax(seed):
    ours, theirs = prng.key(seed), jax.random.key(seed, impl="threefry2x32")

    def draws(key):
        a, b, c = jax.random.split(key, 3)
        many = jax.random.split(jax.random.fold_in(a, 7), (3, 2))
        return [
            jax.random.uniform(b, (5,)),
            jax.random.normal(c, (2, 3)),
            jax.random.categorical(a, jnp.zeros((4, 6))),
            jax.random.permutation(b, 17),
            jax.random.bits(c, (4,), jnp.uint8),
            jax.random.bits(c, (4,), jnp.uint16),
            jax.random.randint(a, (9,), -3, 100),
            jax.vmap(jax.vmap(jax.random.uniform))(many),
        ]

    for a, b in zip(jax.jit(draws)(ours), jax.jit(draws)(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_64_bits():
    with jax.enable_x64(True):
        a = jax.random.uniform(prng.key(2**40 + 3), (5,), jnp.float64)
        b = jax.random.uniform(jax.random.key(2**40 + 3, impl="threefry2x32"), (5,), jnp.float64)
    np.testing.assert_array_equal(a, b)
