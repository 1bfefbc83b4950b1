"""Ways to play chunks that are drawn at every step, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion.execution import BidirectionalDecoding, TemporalEnsemble, require_chunk_policy, shifted
from steersman.errors import InputError, InputTypeError
from steersman.policies import ChunkPolicy, LinearFeedback

ROWS = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 2.1, 9.0], [0.0, 0.0, 0.0]])


def table(seen, key):
    del key
    return ROWS[jnp.asarray(seen[0], jnp.int32)][:, None]


def coin(seen, key):
    """Chunks of ones or of minus ones, by chance."""
    del seen
    return jnp.full((3, 1), jnp.where(jax.random.bernoulli(key), 1.0, -1.0))


def play(policy, observations):
    keys = jax.random.split(jax.random.key(0), len(observations))

    @jax.jit
    def run():
        def step(carry, given):
            action, carry = policy(given[0], carry, given[1])
            return carry, (action[0], carry.chunk[:, 0])

        return jax.lax.scan(step, policy.init(keys[0]), (observations, keys))[1]

    return run()


def chunk_policy(generator=table, **options):
    return ChunkPolicy(generator, 1, jnp.zeros(1), **options)


def test_temporal_ensemble():
    """0.5 (2, 3, 3) + 0.5 (1, 2.1, 9) = (1.5, 2.55, 6), and 0.5 (2.55, 6, 6) + 0."""
    actions, chunks = play(TemporalEnsemble(chunk_policy()), jnp.arange(3.0)[:, None])
    np.testing.assert_allclose(actions, [1.0, 1.5, 1.275], atol=1e-6)
    np.testing.assert_allclose(chunks[1], [1.5, 2.55, 6.0], atol=1e-6)


def test_no_decay_is_closed_loop():
    actions, _ = play(TemporalEnsemble(chunk_policy(), 0.0), jnp.arange(3.0)[:, None])
    np.testing.assert_allclose(actions, ROWS[:, 0])


def test_bidirectional_decoding_keeps_to_its_mode():
    """One of sixteen draws is of the last plan's mode, but for a chance of 2^-16."""
    actions, _ = play(BidirectionalDecoding(chunk_policy(coin)), jnp.zeros((30, 1)))
    assert len(set(np.asarray(actions).tolist())) == 1
    plain, _ = play(TemporalEnsemble(chunk_policy(coin), 0.0), jnp.zeros((30, 1)))
    assert len(set(np.asarray(plain).tolist())) == 2


def test_contrast_turns_away_from_the_weak_policy():
    policy = BidirectionalDecoding(chunk_policy(coin), lambda seen, key: jnp.ones((3, 1)))
    actions, _ = play(policy, jnp.zeros((5, 1)))
    np.testing.assert_array_equal(actions, -1.0)


def test_a_plan_one_step_later():
    np.testing.assert_array_equal(shifted(ROWS), ROWS[jnp.asarray([1, 2, 2])])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TemporalEnsemble(chunk_policy(), 1.0), InputError, "decay is 1.*below 1"),
        (lambda: BidirectionalDecoding(chunk_policy(), samples=0), InputError, "samples is 0"),
        (lambda: BidirectionalDecoding(chunk_policy(), contrast=-1.0), InputError, "contrast is -1"),
        (lambda: BidirectionalDecoding(chunk_policy(), decay=1.5), InputError, r"decay is 1\.5"),
        (lambda: TemporalEnsemble(chunk_policy(first_row=2)), InputError, "policy's chunks have 1 row from row 2"),
        (
            lambda: TemporalEnsemble(chunk_policy(lambda o, k: {"a": jnp.zeros((2, 1)), "b": jnp.zeros((2, 1))})),
            InputTypeError,
            "policy's chunks are arrays of shapes",
        ),
        (lambda: require_chunk_policy(LinearFeedback(jnp.zeros((1, 1)))), InputTypeError, "policy is a LinearFeedback"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
