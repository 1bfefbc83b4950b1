import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError
from steersman.training.minibatches import minibatch_epochs, shuffled


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1))
def test_shuffled_is_a_permutation(count, seed):
    order = np.asarray(shuffled(jax.random.key(seed), count))
    assert np.array_equal(np.sort(order), np.arange(count))


def test_shuffled_is_uniform_enough_in_place_and_in_neighbours():
    count, draws = 1024, 2000
    orders = np.asarray(jax.vmap(lambda k: shuffled(k, count))(jax.random.split(jax.random.key(0), draws)))
    # Where an element lands: 16 bins, chi-square of each element has mean 15 and deviation 5.5 if uniform.
    positions = np.argsort(orders, axis=1)[:, ::37] // (count // 16)
    counts = np.stack([(positions == b).sum(axis=0) for b in range(16)])
    chi_square = ((counts - draws / 16) ** 2 / (draws / 16)).sum(axis=0)
    assert abs(chi_square.mean() - 15) < 4
    assert chi_square.max() < 60
    # Elements that were neighbours share a minibatch of 1/8 as often as chance says: (128 - 1) / (1024 - 1).
    minibatch = np.argsort(orders, axis=1) // 128
    together = (minibatch[:, :-1] == minibatch[:, 1:]).mean()
    assert abs(together - 127 / 1023) < 0.002


def test_every_row_is_seen_once_an_epoch():
    rows = {"x": jnp.arange(48), "y": jnp.arange(48)[:, None] * jnp.ones(3)}

    def update(total, minibatch):
        assert minibatch["x"].shape == (8,)
        return total + minibatch["x"].sum(), (minibatch["x"], minibatch["y"])

    total, (x, y) = minibatch_epochs(update, jnp.asarray(0), rows, jax.random.key(0), epochs=5, minibatches=6)
    assert int(total) == 5 * 48 * 47 // 2
    for epoch in np.asarray(x):
        assert np.array_equal(np.sort(epoch.ravel()), np.arange(48))
    assert np.array_equal(np.asarray(y)[..., 0], np.asarray(x))
    assert not np.array_equal(np.asarray(x)[0], np.asarray(x)[1])


def test_minibatches_must_divide():
    with pytest.raises(InputError, match=r"minibatches is 5.*divisor of the 48 rows"):
        minibatch_epochs(lambda s, m: (s, ()), 0, jnp.arange(48), jax.random.key(0), epochs=1, minibatches=5)
