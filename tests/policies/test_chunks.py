"""Chunk execution against a queue written in plain Python."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError, InputTypeError
from steersman.policies import ChunkPolicy

BOX = spaces.Box(-np.inf, np.inf, (2,))
KEY = jax.random.key(0)


class Plan(eqx.Module):
    """Row ``i`` of the chunk is ``100 i`` plus everything that is seen, plus noise of a given size."""

    rows: int = eqx.field(static=True)
    noise: float = 0.0

    def __call__(self, seen, key):
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(seen))
        rows = 100.0 * jnp.arange(self.rows) + total
        return (rows + self.noise * jax.random.normal(key, (self.rows,)))[:, None]

    def mode(self):
        return Plan(self.rows)


def run(policy, observations, key=KEY):
    def step(carry, given):
        action, carry = policy(given[0], carry, given[1])
        return carry, action

    keys = jax.random.split(key, observations.shape[0])
    return jax.lax.scan(step, policy.init(key), (observations, keys))[1]


def queue_by_hand(observations, rows, horizon, memory, first):
    seen, queue, actions = [], [], []
    for observation in observations:
        seen.append(observation)
        if not queue:
            window = [seen[max(i, 0)] for i in range(len(seen) - (memory or 1), len(seen))]
            queue = [100.0 * i + np.sum(window) for i in range(rows)][first : first + horizon]
        actions.append(queue.pop(0))
    return np.array(actions)[:, None]


@settings(max_examples=12, deadline=None)
@given(
    horizon=st.integers(1, 4),
    spare=st.integers(0, 2),
    memory=st.sampled_from([None, 1, 3]),
    first=st.integers(0, 2),
    seed=st.integers(0, 100),
)
def test_chunks_are_played_as_a_queue_would(horizon, spare, memory, first, seed):
    rows = horizon + spare + first
    policy = ChunkPolicy(Plan(rows), horizon, BOX, observation_horizon=memory, first_row=first)
    observations = np.random.default_rng(seed).integers(-5, 5, (9, 2)).astype(np.float32)
    found = run(policy, jnp.asarray(observations))
    np.testing.assert_allclose(found, queue_by_hand(observations, rows, horizon, memory, first), rtol=1e-6)


def test_copies_at_different_rows_do_not_disturb_each_other():
    policy = ChunkPolicy(Plan(4), 3, BOX, observation_horizon=2)
    observations = jax.random.normal(KEY, (7, 2))
    late = policy.init(KEY)
    step = jax.jit(jax.vmap(policy, in_axes=(0, 0, 0)))
    carry = jax.vmap(policy.init)(jax.random.split(KEY, 2))
    # The second copy starts its episode two steps later: its memory is made new, as a collector does at a restart.
    actions = []
    for t in range(7):
        if t == 2:
            carry = jax.tree.map(lambda leaf, new: leaf.at[1].set(new), carry, late)
        action, carry = step(jnp.stack([observations[t]] * 2), carry, jax.random.split(jax.random.key(t), 2))
        actions.append(action)
    actions = np.stack(actions)
    np.testing.assert_allclose(actions[:, 0], run(policy, observations), rtol=1e-6)
    np.testing.assert_allclose(actions[2:, 1], run(policy, observations[2:]), rtol=1e-6)


def test_the_generator_runs_only_when_it_is_asked():
    calls = []

    class Counted(eqx.Module):
        def __call__(self, seen, key):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.zeros((5, 1))

    run(ChunkPolicy(Counted(), 4, BOX), jnp.zeros((9, 2))).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 3


def test_chunks_and_observations_may_be_trees():
    class Both(eqx.Module):
        def __call__(self, seen, key):
            # The history's newest entry is its last.
            steps = jnp.arange(3, dtype=jnp.float32)
            return {"move": steps[:, None] + seen["x"][-1], "grip": jnp.full(3, seen["n"][-1])}

    space = spaces.Dict({"x": spaces.Box(-1, 1, (2,)), "n": spaces.Discrete(5)})
    policy = ChunkPolicy(Both(), 2, space, observation_horizon=2)
    carry = policy.init(KEY)
    for t, n in enumerate((4, 1, 2)):
        action, carry = policy({"x": jnp.asarray([0.5, 1.0]), "n": jnp.asarray(n)}, carry, KEY)
        np.testing.assert_allclose(action["move"], np.array([0.5, 1.0]) + t % 2)
        assert action["grip"] == (4, 4, 2)[t]
        assert jnp.issubdtype(action["grip"].dtype, jnp.integer)


def test_the_mode_is_the_generators():
    noisy = ChunkPolicy(Plan(3, 1.0), 2, BOX)
    observations = jnp.ones((4, 2))
    assert not np.allclose(run(noisy, observations), run(noisy, observations, jax.random.key(1)))
    np.testing.assert_allclose(run(noisy.mode(), observations)[:, 0], [2, 102, 2, 102])


def test_gradients_pass_through_the_generator():
    class Linear(eqx.Module):
        weight: jax.Array

        def __call__(self, seen, key):
            return jnp.outer(jnp.arange(1.0, 4.0), self.weight @ seen)

    @jax.grad
    def slope(weight):
        return jnp.sum(run(ChunkPolicy(Linear(weight), 2, BOX), jnp.ones((4, 2))))

    # Rows 1 and 2, twice, times an observation of ones.
    np.testing.assert_allclose(slope(jnp.ones((1, 2))), [[6.0, 6.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_horizon": 4}, "action_horizon is 4"),
        ({"action_horizon": 2, "first_row": 2}, "action_horizon is 2 from first_row 2"),
        ({"action_horizon": 0}, "action_horizon is 0"),
        ({"action_horizon": 1, "observation_horizon": 0}, "observation_horizon is 0"),
        ({"action_horizon": 1, "first_row": -1}, "first_row is -1"),
    ],
)
def test_bad_horizons_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        ChunkPolicy(Plan(3), observation_space=BOX, **options)


def test_a_space_without_arrays_is_refused():
    with pytest.raises(InputTypeError, match="space is a Text"):
        ChunkPolicy(Plan(3), 1, spaces.Text(3))
