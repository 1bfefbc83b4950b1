import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import BanditTable, ContextualBandit, Problem, check, make
from steersman.envs.bandit import bandit_progress, expected_reward
from steersman.errors import InputError

TABLE = np.asarray([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], np.float32)


def test_keeps_the_contract_and_has_a_name():
    check(ContextualBandit(3, 2))
    problem = make("contextual-bandit", contexts=5, actions=2, seed=3)
    assert problem.observation_space.n == 5
    assert problem.action_space.n == 2
    assert problem.params.mean_reward.shape == (5, 2)


def test_rewards_have_the_tables_mean_and_noise():
    problem = Problem(ContextualBandit(), BanditTable(TABLE, 0.3))
    assert problem.observation_space.n == 2
    assert problem.action_space.n == 3
    count = 60_000
    keys = jax.random.split(jax.random.key(0), count)
    context, state = problem.reset(keys)
    action = jnp.arange(count) % 3
    observation, _, reward, terminated, truncated, info = eqx.filter_jit(problem.step)(keys, state, action)
    assert bool(jnp.all(terminated))
    assert not bool(jnp.any(truncated))
    np.testing.assert_array_equal(info["final_observation"], context)
    assert not np.array_equal(observation, context)  # the next episode has its own context
    for c in range(2):
        assert abs(float(jnp.mean(context == c)) - 0.5) < 4 * 0.5 / np.sqrt(count)
        for a in range(3):
            chosen = np.asarray(reward)[(np.asarray(context) == c) & (np.asarray(action) == a)]
            assert chosen.mean() == pytest.approx(TABLE[c, a], abs=4 * 0.3 / np.sqrt(len(chosen)))
            assert chosen.std() == pytest.approx(0.3, rel=0.05)


def test_exact_values_of_policies():
    table = BanditTable(TABLE)
    greedy = jax.nn.one_hot(jnp.asarray([0, 1]), 3)
    mixed = jnp.asarray([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    both = jnp.stack([greedy, mixed, jnp.full((2, 3), 1 / 3)])
    np.testing.assert_allclose(expected_reward(both, table), [2.0, 0.25, 3.5 / 6], rtol=1e-6)
    np.testing.assert_allclose(
        bandit_progress(both, table), [1.0, (0.25 - 3.5 / 6) / (2 - 3.5 / 6), 0.0], rtol=1e-5, atol=1e-6
    )


def test_default_tables_are_standard_normal_and_differ_by_seed():
    tables = [ContextualBandit(100, 100, seed=seed).default_params.mean_reward for seed in (0, 1)]
    assert not np.allclose(*tables)
    assert float(tables[0].mean()) == pytest.approx(0.0, abs=0.04)
    assert float(tables[0].std()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("argument", "value"), [("contexts", 0), ("actions", 0), ("noise", -1.0), ("seed", -1), ("noise", float("inf"))]
)
def test_bad_fields(argument, value):
    with pytest.raises(InputError, match=argument):
        ContextualBandit(**{argument: value})


def test_bad_tables():
    with pytest.raises(InputError, match="mean_reward"):
        BanditTable(np.full((2, 2), np.nan))
    with pytest.raises(InputError, match="noise"):
        BanditTable(TABLE, -0.1)
