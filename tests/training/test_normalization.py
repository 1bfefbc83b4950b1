import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.training.normalization import RewardScaler, RunningMoments


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 1000), offset=st.floats(-50, 50))
def test_moments_do_not_depend_on_how_rows_are_batched(sizes, seed, offset):
    batches = [
        np.random.default_rng(seed + i).normal(offset, 3.0, (n, 2)).astype(np.float32) for i, n in enumerate(sizes)
    ]
    moments = RunningMoments.zeros((2,))
    for batch in batches:
        moments = moments.update(jnp.asarray(batch))
    everything = np.concatenate(batches).astype(np.float64)
    assert float(moments.count) == len(everything)
    np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.variance, everything.var(0), rtol=2e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(decay=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_older_batches_fade(decay, seed):
    """The recursion of the sums w, m1, m2 in double precision (oracle of PPO-EWMA)."""
    rng = np.random.default_rng(seed)
    moments, weight, first, second = RunningMoments.zeros(), 0.0, 0.0, 0.0
    for n in rng.integers(1, 30, size=5):
        batch = rng.normal(2.0, 3.0, n)
        moments = moments.update(jnp.asarray(batch, jnp.float32), decay)
        weight = decay * weight + n
        first = decay * first + n * batch.mean()
        second = decay * second + n * (batch.var() + batch.mean() ** 2)
    mean = first / weight
    assert float(moments.count) == pytest.approx(weight, rel=1e-5)
    assert float(moments.mean) == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert float(moments.variance) == pytest.approx(second / weight - mean**2, rel=1e-3, abs=1e-3)


def test_small_batches_that_fade_slowly_weigh_as_much_as_one_large_batch():
    moments = RunningMoments.zeros()
    for _ in range(200):
        moments = moments.update(jnp.zeros(512 // 16), 1 - 1 / 16)
    assert float(moments.count) == pytest.approx(512, rel=1e-4)


def test_standardizer_centres_scales_and_clips():
    data = np.random.default_rng(0).normal(5.0, 2.0, (1000, 3)).astype(np.float32)
    standardize = RunningMoments.zeros((3,)).update(jnp.asarray(data)).standardizer(clip=2.0)
    out = np.asarray(standardize(jnp.asarray(data)))
    np.testing.assert_allclose(out, np.clip((data - data.mean(0)) / data.std(0), -2, 2), atol=1e-4)


def test_moments_of_nothing_change_nothing():
    x = jnp.asarray([1.0, -3.0])
    np.testing.assert_allclose(RunningMoments.zeros((2,)).standardizer()(x), x, rtol=1e-6)


def test_reward_scale_is_the_deviation_of_the_discounted_return():
    rng = np.random.default_rng(1)
    reward = rng.normal(size=(50, 4)).astype(np.float32)
    done = rng.random((50, 4)) < 0.1
    gamma = 0.9
    running, seen = np.zeros(4), []
    for t in range(50):
        running = gamma * running + reward[t]
        seen.append(running.copy())
        running = np.where(done[t], 0.0, running)
    scaler = RewardScaler.zeros(4).update(jnp.asarray(reward[:20]), jnp.asarray(done[:20]), gamma)
    scaler = scaler.update(jnp.asarray(reward[20:]), jnp.asarray(done[20:]), gamma)
    np.testing.assert_allclose(scaler.scale(jnp.asarray(reward)), np.clip(reward / np.std(seen), -10, 10), rtol=1e-3)


def test_integer_observations_are_counted_as_floats():
    big = jnp.full((1000, 1), 2_000_000_000, jnp.int32)  # their sum overflows 32-bit integers
    moments = jax.jit(lambda m, x: m.update(x))(RunningMoments.zeros((1,)), big)
    assert float(moments.mean[0]) == pytest.approx(2e9, rel=1e-6)
