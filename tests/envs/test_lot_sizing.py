"""Stochastic lot-sizing: steps worked out by hand, exact references, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

from steersman import mdp
from steersman.envs import LotSizing, Problem, check, check_post_decision, lumpy_lot_sizing
from steersman.errors import InputError


@pytest.fixture(scope="module")
def tables():
    """The small instance as tables in double precision, and its states; episodes start with a machine set up."""
    environment = LotSizing()
    with jax.enable_x64(True):
        states = environment.states()
        start = np.asarray(states.setup[:, 0] > 0, float)
        return mdp.post_decision_tables(environment, discount=0.97, start=start / start.sum()), states


def undiscounted(model, action_or_table, steps=50):
    """Exact mean return of a whole episode."""
    pi = np.asarray(action_or_table, float)
    pi = np.eye(model.num_actions)[pi.astype(int)] if pi.ndim == 1 else pi
    transition = np.einsum("sa,sat->st", pi, np.asarray(model.transition))
    reward = (pi * np.asarray(model.reward)).sum(axis=1)
    place, total = np.asarray(model.start), 0.0
    for _ in range(steps):
        total, place = total + place @ reward, place @ transition
    return total


def test_decisions_by_hand():
    environment = LotSizing()
    params = environment.default_params
    cases = [
        # (stock, setup), action -> (stock, setup), reward of the decision
        (((5, 2), 1), 1, ((8, 2), 1), 0.0),  # goes on with item 1
        (((5, 2), 1), 2, ((5, 4), 2), -1.0),  # a changeover costs 1 and one unit
        (((5, 2), 0), 1, ((7, 2), 1), -1.0),  # so does starting an idle machine
        (((5, 2), 2), 0, ((5, 2), 0), 0.0),  # stopping is free, and forgets the setup
    ]
    for (stock, setup), action, (after, machine), reward in cases:
        post, earned = environment.post_decision(environment.state(stock, setup), jnp.asarray(action), params)
        assert (post.inventory.tolist(), post.setup.tolist()) == (list(after), [machine])
        assert float(earned) == reward


def test_chance_by_hand():
    environment = LotSizing()
    params = environment.default_params
    post, _ = environment.post_decision(environment.state((8, 1), 1), jnp.asarray(1), params)
    assert post.inventory.tolist() == [11, 1]  # more than the capacity, until demand has come
    following, reward = environment.respond(post, jnp.asarray([1, 3]), params)
    assert following.inventory.tolist() == [8, 0]  # two units of item 1 thrown away
    assert float(reward) == pytest.approx(-2.0 * 2 - 0.1 * 8)
    assert int(following.time) == 1


def test_two_machines_on_one_item_add_up():
    environment = lumpy_lot_sizing()
    params = environment.default_params
    post, reward = environment.post_decision(environment.state((0, 1, 2, 3), (3, 4)), jnp.asarray([3, 3]), params)
    assert post.inventory.tolist() == [0, 1, 7, 3]
    assert post.setup.tolist() == [3, 3]
    assert float(reward) == -1.0
    assert environment.action_space(params).nvec.tolist() == [5, 5]


def test_lumpy_demand_has_the_same_mean_and_twice_the_deviation():
    moments = []
    for environment in (LotSizing(), lumpy_lot_sizing(2, 1)):
        demand, probability = environment.outcomes(environment.default_params)
        assert probability.sum() == pytest.approx(1.0)
        mean = probability @ np.asarray(demand)
        moments.append((mean, np.sqrt(probability @ (np.asarray(demand) - mean) ** 2)))
    np.testing.assert_allclose(moments[0][0], 1.2)
    np.testing.assert_allclose(moments[1][0], 1.2)
    np.testing.assert_allclose(moments[1][1], 2.0 * moments[0][1])


def test_demand_is_drawn_from_its_table():
    environment = LotSizing(capacity=30)
    params = environment.default_params
    post = environment.state((20, 20), 1)
    draw = jax.jit(jax.vmap(lambda key: environment.exogenous(key, post, params)[0].inventory))
    demand = 20 - np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    expected = binom.pmf(np.arange(5), 4, 0.3)
    for item in range(2):
        seen = np.bincount(demand[:, item], minlength=5) / len(demand)
        np.testing.assert_allclose(seen, expected, atol=4 * np.sqrt(0.25 / len(demand)))
    assert abs(np.corrcoef(demand.T)[0, 1]) < 4 / np.sqrt(len(demand))


def test_contract():
    check(LotSizing(num_steps=7))
    check(lumpy_lot_sizing(3, 2, num_steps=7))


def test_factorizes():
    found = check_post_decision(LotSizing())
    assert found.groups >= 20
    assert found.p_value > 1e-3


def test_exact_references(tables):
    """Oracle 1: returns of the optimum, of a simple rule and of chance, and three optimal actions."""
    table, states = tables
    model = table.mdp
    with jax.enable_x64(True):
        solution = mdp.value_iteration(model, tolerance=1e-10)
        policy = jnp.full((243, 3), 1 / 3)
        for _ in range(50):  # policy iteration
            q_value = mdp.policy_evaluation(model, policy)[1]
            policy = jax.nn.one_hot(jnp.argmax(q_value, axis=1), 3, dtype=float)
        np.testing.assert_allclose(mdp.policy_evaluation(model, policy)[0], solution.value, atol=1e-8)
        post_value = table.post_decision_value(solution.value)
        np.testing.assert_allclose(table.action_value(post_value), solution.q_value, atol=1e-10)
    stock, setup = np.asarray(states.inventory), np.asarray(states.setup[:, 0])
    greedy = np.argmax(np.asarray(solution.q_value), axis=1)
    for inventory, machine, best in (((0, 0), 1, 1), ((4, 0), 1, 2), ((1, 3), 1, 1)):
        row = np.flatnonzero((stock == inventory).all(axis=1) & (setup == machine))
        assert greedy[row].tolist() == [best]
    # The started item until three are in stock, then the other one if that has fewer than three.
    lower, least = np.argmin(stock, axis=1) + 1, stock.min(axis=1)
    own = np.where(setup > 0, stock[np.arange(243), np.maximum(setup - 1, 0)], 99)
    rule = np.where(own < 3, setup, np.where(least < 3, lower, setup))
    assert undiscounted(model, greedy) == pytest.approx(-52.0, abs=0.05)
    assert undiscounted(model, rule) == pytest.approx(-59.0, abs=0.05)
    assert undiscounted(model, np.full((243, 3), 1 / 3)) == pytest.approx(-121.2, abs=0.3)


def test_tables_agree_with_simulation(tables):
    """Mean return of simulated random episodes against the tables' exact one."""
    table, _ = tables
    problem = Problem(LotSizing())

    def episode(key):
        reset_key, key = jax.random.split(key)
        _, state = problem.environment.reset(reset_key, problem.params)

        def step(state, key):
            action_key, step_key = jax.random.split(key)
            action = jax.random.randint(action_key, (), 0, 3)
            _, state, reward, _, _, _ = problem.environment.step(step_key, state, action, problem.params)
            return state, reward

        return jnp.sum(jax.lax.scan(step, state, jax.random.split(key, 50))[1])

    returns = np.asarray(jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(3), 4_000)))
    exact = undiscounted(table.mdp, np.full((243, 3), 1 / 3))
    assert abs(returns.mean() - exact) < 4 * returns.std() / np.sqrt(len(returns))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LotSizing(num_items=0), "num_items is 0"),
        (lambda: LotSizing(changeover_loss=4), "changeover_loss is 4.*at most rate = 3"),
        (lambda: LotSizing(order_probability=1.5), r"order_probability is 1\.5"),
        (lambda: LotSizing(lost_sale_cost=-1.0), "lost_sale_cost is"),
        (lambda: LotSizing().state((-1, 0), 1), r"inventory is \[-1, 0\].*whole numbers from 0 to 8"),
        (lambda: LotSizing().state((0.5, 0), 1), r"inventory is \[0\.5, 0\.0\].*whole numbers"),
        (lambda: LotSizing().state((float("nan"), 0), 1), "inventory is"),
        (lambda: LotSizing().state((0, 0, 0), 1), r"inventory's shape is \(3,\)"),
        (lambda: LotSizing().state((0, 0), 3), r"setup is \[3\].*0 to 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("action", "message"), [(3, "action of machine 1 is 3"), (-1, "machine 1 is -1"), ([1, 2], "action's shape")]
)
def test_bad_action(action, message):
    environment = LotSizing()
    with pytest.raises(InputError, match=message):
        environment.post_decision(environment.state((0, 0), 1), jnp.asarray(action), environment.default_params)


def test_bad_action_names_the_machine():
    environment = lumpy_lot_sizing()
    with pytest.raises(InputError, match=r"action of machine 2 is 5.*at most 4"):
        environment.post_decision(
            environment.state((0, 0, 0, 0), (1, 1)), jnp.asarray([0, 5]), environment.default_params
        )
