"""Tables of half-steps against an enumeration in plain Python."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman import mdp
from steersman.envs import LotSizing
from steersman.envs.dynamics import DiscreteCartPole
from steersman.errors import InputTypeError
from steersman.mdp.post_decision import PostDecisionTables


def enumerated(state, action, capacity=8):
    """One item machine by the rules of the plant: distribution of the next state, and the expected reward."""
    stock, setup = list(state[:2]), state[2]
    reward = 0.0
    if action:
        changed = action != setup
        reward -= float(changed)
        stock[action - 1] += 3 - changed
    following = {}
    for demand in itertools.product(range(5), repeat=2):
        chance = math.prod(math.comb(4, d) * 0.3**d * 0.7 ** (4 - d) for d in demand)
        lost = sum(max(d - i, 0) for d, i in zip(demand, stock, strict=True))
        left = tuple(min(max(i - d, 0), capacity) for d, i in zip(demand, stock, strict=True))
        reward -= chance * (2.0 * lost + 0.1 * sum(left))
        following[(*left, action)] = following.get((*left, action), 0.0) + chance
    return following, reward


@pytest.fixture(scope="module")
def small() -> PostDecisionTables:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, mdp.post_decision_tables(LotSizing(), discount=0.97))


def test_every_row_is_the_plants(small):
    names = [(i, j, m) for i in range(9) for j in range(9) for m in range(3)]
    number = {name: k for k, name in enumerate(names)}
    assert small.mdp.transition.shape == (243, 3, 243)
    for name in names[::7]:
        for action in range(3):
            following, reward = enumerated(name, action)
            expected = np.zeros(243)
            for after, chance in following.items():
                expected[number[after]] = chance
            np.testing.assert_allclose(small.mdp.transition[number[name], action], expected, atol=1e-12)
            assert small.mdp.reward[number[name], action] == pytest.approx(reward, abs=1e-12)


def test_the_halves_make_the_whole(small):
    np.testing.assert_allclose(small.chance[small.successor], small.mdp.transition, atol=1e-14)
    np.testing.assert_allclose(small.decision_reward + small.random_reward[small.successor], small.mdp.reward)
    assert set(np.unique(small.decision_reward)) == {-1.0, 0.0}
    # Setups as they are left, and stocks of up to eleven of the item that was made.
    assert small.chance.shape == (81 + 2 * (9 * 10), 243)


def test_observations_lead_back_to_their_numbers(small):
    rng = np.random.default_rng(0)
    some = rng.integers(0, 243, (4, 5))
    seen, after = (jnp.asarray(x, jnp.float32) for x in (small.observation[some], small.post_observation))
    tables = jax.tree.map(jnp.asarray, small)
    np.testing.assert_array_equal(tables.index(seen), some)
    posts = rng.integers(0, len(small.chance), 20)
    np.testing.assert_array_equal(tables.post_index(after[posts]), posts)


def test_several_machines():
    environment = LotSizing(2, 2, capacity=2, rate=1, changeover_loss=0, max_orders=1)
    tables = mdp.post_decision_tables(environment, discount=0.9)
    assert tables.mdp.transition.shape == (81, 9, 81)
    # Both machines, set up for item 1, make item 2: two changeovers.
    states = environment.states()
    row = np.flatnonzero(
        (np.asarray(states.inventory) == (0, 0)).all(axis=1) & (np.asarray(states.setup) == (1, 1)).all(axis=1)
    )
    assert tables.decision_reward[row[0], 8] == -2.0
    # Two of item 2 before demand; an order for each item with probability 0.3.
    post = tables.successor[row[0], 8]
    assert float(tables.random_reward[post]) == pytest.approx(-2.0 * 0.3 - 0.1 * (2 * 0.7 + 1 * 0.3), abs=1e-6)


def test_bad_input():
    with pytest.raises(InputTypeError, match=r"environment is a DiscreteCartPole.*method post_decision"):
        mdp.post_decision_tables(DiscreteCartPole(), discount=0.9)
