import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs import Problem
from steersman.envs.dynamics import Pendulum
from steersman.errors import InputError
from steersman.policies import LinearFeedback
from steersman.training import Experience, Rollout
from steersman.training.replay import Replay, transitions


def rows(first, count):
    number = jnp.arange(first, first + count, dtype=jnp.float32)
    return {"x": jnp.stack([number, -number], axis=1), "flag": number.astype(jnp.int32) % 2 == 0}


def stored(replay):
    return sorted(np.asarray(replay.rows["x"][:, 0])[np.asarray(replay.valid)].tolist())


ADD = jax.jit(lambda replay, rows: replay.add(rows))
ADD_SOME = jax.jit(lambda replay, rows, keep: replay.add(rows, keep))


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 3, 5, 9]), min_size=1, max_size=6))
def test_the_ring_holds_the_newest_rows(sizes):
    replay, seen = Replay.zeros(jax.tree.map(lambda leaf: leaf[0], rows(0, 1)), 7), []
    for size in sizes:
        replay = ADD(replay, rows(len(seen) + 1, size))
        seen += range(len(seen) + 1, len(seen) + 1 + size)
        assert stored(replay) == sorted(seen[-7:])
        assert int(replay.size) == min(len(seen), 7) == int(replay.valid.sum())
        assert bool(jnp.all(replay.rows["x"][:, 0] == -replay.rows["x"][:, 1]))


@settings(max_examples=20, deadline=None)
@given(data=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_rows_that_are_not_kept_leave_no_trace(data):
    replay, seen, first = Replay.zeros(jax.tree.map(lambda leaf: leaf[0], rows(0, 1)), 7), [], 1
    for keep in data:
        replay = ADD_SOME(replay, rows(first, 9), jnp.asarray(keep))
        seen += [first + i for i in range(9) if keep[i]]
        first += 9
        assert stored(replay) == sorted(seen[-7:])


def test_samples_are_uniform_over_what_is_stored():
    replay = ADD(Replay.zeros(jax.tree.map(lambda leaf: leaf[0], rows(0, 1)), 16), rows(1, 5))
    drawn = jax.jit(lambda key: replay.sample(key, 20_000))(jax.random.key(0))
    values, counts = np.unique(np.asarray(drawn["x"][:, 0]), return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(counts, 4_000, atol=4 * np.sqrt(20_000 * 0.2 * 0.8))
    assert bool(jnp.all(drawn["flag"] == (drawn["x"][:, 0] % 2 == 0)))


def test_a_dataset_is_a_full_ring():
    replay = Replay.of(rows(1, 4))
    assert replay.capacity == int(replay.size) == 4
    assert stored(ADD(replay, rows(9, 1))) == [2, 3, 4, 9]


@pytest.fixture(scope="module")
def experience():
    problem, policy = Problem(Pendulum(horizon=5).environment()), LinearFeedback(np.zeros((1, 3)))
    rollout = Rollout(num_envs=3, num_steps=12)
    return rollout.collect(problem, policy, rollout.init(problem, policy, jax.random.key(0)))[0]


def test_no_transition_leads_across_an_episodes_end(experience):
    """The pendulum turns by its new rate times the sample time, at an episode's end too; a restart would jump."""
    found = transitions(experience, side={"torque": experience.action})
    assert found.observation.shape == (36, 3)
    assert found.side["torque"].shape == (36, 1)
    assert int(found.truncated.sum()) == 6
    before, after = (np.arctan2(o[:, 1], o[:, 0]) for o in (found.observation, found.next_observation))
    turned = (after - before + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(turned, 0.05 * found.next_observation[:, 2], atol=1e-5)


def test_experience_that_forgot_the_final_observations_is_refused(experience):
    following = jnp.concatenate([experience.observation[1:], experience.next_observation[-1:]])
    broken = Experience(**{**vars(experience), "next_observation": following})
    with pytest.raises(InputError, match=r"next_observation is .*first observation wherever"):
        transitions(broken)


def test_bad_input(experience):
    row = jax.tree.map(lambda leaf: leaf[0], rows(0, 1))
    with pytest.raises(InputError, match="capacity is 0"):
        Replay.zeros(row, 0)
    empty = Replay.zeros(row, 4)
    with pytest.raises(InputError, match=r"replay's size is 0.*at least 1"):
        empty.sample(jax.random.key(0), 2)
    full = empty.add(rows(1, 4))
    with pytest.raises(InputError, match="count is 0"):
        full.sample(jax.random.key(0), 0)
    with pytest.raises(InputError, match="rows is PyTreeDef"):
        full.add({"x": jnp.zeros((2, 2))})
    with pytest.raises(InputError, match=r"rows has a leaf of shape \(3,\)"):
        full.add({"x": jnp.zeros((2, 3)), "flag": jnp.zeros(2, bool)})
    with pytest.raises(InputError, match="keep's shape is"):
        full.add(rows(1, 4), jnp.ones(3, bool))
    with pytest.raises(InputError, match="numbers of rows in rows"):
        Replay.of({"x": jnp.zeros(2), "y": jnp.zeros(3)})
