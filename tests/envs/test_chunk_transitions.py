"""Cuts of episodes into chunks and what they led to, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs.chunk_transitions import ChunkTransitions
from steersman.errors import InputError

SEEN = np.arange(6.0)[:, None]
ACTED = 10.0 * np.arange(5.0)[:, None]
PAID = np.asarray([1.0, 2.0, 4.0, 8.0, 16.0])


def test_a_chunk_of_two_at_every_step():
    data = ChunkTransitions.cut([(SEEN, ACTED, PAID, True), (SEEN[:3], ACTED[:2], PAID[:2], False)], horizon=2)
    np.testing.assert_array_equal(data.observation[:, 0], [0, 1, 2, 3, 4, 0, 1])
    np.testing.assert_array_equal(data.chunk[:5, :, 0], [[0, 10], [10, 20], [20, 30], [30, 40], [40, 40]])
    np.testing.assert_array_equal(data.next_observation[:, 0], [2, 3, 4, 5, 5, 2, 2])
    np.testing.assert_allclose(data.reward, [3, 6, 12, 24, 16, 3, 2])
    np.testing.assert_array_equal(data.terminated, [0, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(data.truncated, [0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.first, [1, 0, 0, 0, 0, 1, 0])
    assert (data.size, data.played_rows, data.observation_horizon) == (7, 2, None)


def test_windows_begin_with_the_first_observation_repeated():
    data = ChunkTransitions.cut([(SEEN, ACTED, PAID, True)], horizon=4, rows=2, observation_horizon=2)
    np.testing.assert_array_equal(data.observation[:3, :, 0], [[0, 0], [0, 1], [1, 2]])
    np.testing.assert_array_equal(data.chunk[:2, :, 0], [[0, 0, 10, 20], [0, 10, 20, 30]])
    np.testing.assert_array_equal(data.next_observation[[0, 4], :, 0], [[1, 2], [4, 5]])
    np.testing.assert_allclose(data.reward[:2], [3.0, 6.0])
    assert (data.first_row, data.played_rows) == (1, 2)


def test_rows_are_selected_and_data_joined():
    data = ChunkTransitions.cut([(SEEN, ACTED, PAID, True)], horizon=2)
    twice = ChunkTransitions.join(data, data.select(np.asarray([4, 0])))
    np.testing.assert_allclose(twice.reward, [3, 6, 12, 24, 16, 16, 3])
    observation, chunk = twice.batch(jnp.asarray([5]))
    np.testing.assert_array_equal(observation, [[4.0]])
    np.testing.assert_array_equal(chunk[0, :, 0], [40.0, 40.0])


def test_bad_input():
    data = ChunkTransitions.cut([(SEEN, ACTED, PAID, True)], horizon=2)
    for changes, message in [
        ({"reward": jnp.zeros(3)}, "reward"),
        ({"terminated": jnp.zeros((5, 1), bool)}, "terminated"),
        ({"reward": data.reward.at[1].set(jnp.nan)}, "reward has NaN"),
        ({"chunk": data.chunk.at[0, 0, 0].set(jnp.inf)}, "chunk has NaN or infinity"),
        ({"next_observation": jnp.zeros((5, 2))}, "next_observation's shapes"),
        ({"rows": 3}, "rows is 3"),
    ]:
        # The class checks what the annotations of a typed program check first.
        with pytest.raises(Exception, match=message):
            dataclasses.replace(data, **changes)
    for episodes, message in [
        ([], "episodes is"),
        ([(SEEN[:5], ACTED, PAID, True)], r"episodes\[0\] has \[5\] observations"),
        ([(SEEN, ACTED, PAID[:4], True)], r"rewards of shape \(4,\)"),
        ([(SEEN[:1], ACTED[:0], PAID[:0], True)], r"actions of shape \(0, 1\)"),
    ]:
        with pytest.raises(InputError, match=message):
            ChunkTransitions.cut(episodes, horizon=2)
    with pytest.raises(InputError, match="parts have chunks"):
        ChunkTransitions.join(data, dataclasses.replace(data, rows=1))
    with pytest.raises(InputError, match="rows is 3"):
        ChunkTransitions.cut([(SEEN, ACTED, PAID, True)], horizon=4, rows=3, observation_horizon=3)
