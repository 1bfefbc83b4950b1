"""Episodes in a batch, by hand, and draws in proportion to weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.training import EpisodeFilter
from steersman.training.episode_filter import EpisodeReturns, systematic_draw
from steersman.training.experience import Experience


def experience(reward, terminated):
    reward, terminated = jnp.asarray(reward), jnp.asarray(terminated, bool)
    blank = jnp.zeros((*reward.shape, 1))
    return Experience(
        observation=blank,
        action=blank,
        reward=reward,
        terminated=terminated,
        truncated=jnp.zeros_like(terminated),
        next_observation=blank,
        record=(),
        carry=(),
        extras={},
    )


def test_returns_of_the_episodes_in_a_batch():
    """Columns are environments; the second ends its first episode at once, and none of its last."""
    reward = [[1.0, 5.0], [2.0, 1.0], [4.0, 1.0], [8.0, 1.0]]
    done = [[0, 1], [1, 0], [0, 1], [1, 0]]
    found = EpisodeReturns.of(experience(reward, done))
    own = np.asarray(found.returns)[np.asarray(found.number)].reshape(4, 2)
    np.testing.assert_array_equal(own, [[3, 5], [3, 2], [12, 2], [12, 1]])
    whole = np.asarray(found.complete)[np.asarray(found.number)].reshape(4, 2)
    np.testing.assert_array_equal(whole, [[1, 1], [1, 1], [1, 1], [1, 0]])
    assert int(found.complete.sum()) == 4
    assert float(found.mean_return) == pytest.approx((3 + 12 + 5 + 2) / 4)


def test_a_share_of_the_kept_episodes_is_from_the_better_ones():
    """Median 2 of five whole episodes: three are at or above it. The sixth is not whole."""
    returns = jnp.asarray([0.0, 1.0, 2.0, 2.0, 5.0, 9.0])
    share, kept = EpisodeFilter(ratio=0.6, quantile=0.5)(returns, jnp.asarray([1, 1, 1, 1, 1, 0], bool))
    assert int(kept) == 3
    np.testing.assert_allclose(share, [0.08, 0.08, 0.28, 0.28, 0.28, 0.0], rtol=1e-6)


def test_systematic_draws_take_every_place_as_often_as_it_weighs():
    weight = jnp.asarray([0.0, 0.5, 2.0, 1.5, 0.0])
    index = np.asarray(systematic_draw(jax.random.key(0), weight, 80))
    np.testing.assert_array_equal(np.bincount(index, minlength=5), [0, 10, 40, 30, 0])


def test_bad_input():
    with pytest.raises(InputError, match="quantile is 1"):
        EpisodeFilter(quantile=1.0)
    with pytest.raises(InputError, match=r"ratio is 1\.5"):
        EpisodeFilter(ratio=1.5)
