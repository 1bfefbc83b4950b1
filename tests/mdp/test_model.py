import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs import Problem, as_problem
from steersman.errors import InputError, InputTypeError
from steersman.mdp import MDP, garnet, random_mdp

TRANSITION = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]]])
REWARD = np.array([[1.0, 0.0], [0.0, 2.0]])


def changed(array, index, value):
    array = np.array(array, dtype=float)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"transition": changed(TRANSITION, (1, 0, 0), 0.8)}, r"transition at \(state, action\) \(1, 0\) sums to 1.1"),
        ({"transition": changed(TRANSITION, (0, 1, 0), 0.0)}, r"\(0, 1\) sums to .* misses one by -0.2"),
        ({"transition": changed(TRANSITION, (0, 1, 1), -0.8)}, r"transition at .* \(0, 1, 1\) is -0.8, but a prob"),
        ({"transition": changed(TRANSITION, (0, 0, 1), np.nan)}, r"transition at .* \(0, 0, 1\) is nan"),
        ({"transition": TRANSITION[0]}, r"transition's shape is \(2, 2\)"),
        ({"transition": TRANSITION[:1]}, r"transition's shape is \(1, 2, 2\)"),
        ({"reward": np.zeros((2, 3))}, r"reward's shape is \(2, 3\).*S = 2 and A = 2"),
        ({"reward": changed(REWARD, (1, 0), np.inf)}, r"reward at \(state, action\) \(1, 0\) is inf"),
        ({"discount": 1.0}, "discount is 1.0"),
        ({"discount": -0.1}, "discount is -0.1"),
        ({"discount": float("nan")}, "discount is nan"),
        ({"discount": [0.9, 0.9]}, "discount's shape"),
        ({"start": [0.5, 0.4]}, "start sums to 0.9"),
        ({"start": [1.5, -0.5]}, "start at state 1 is -0.5"),
        ({"start": [1.0]}, r"start's shape is \(1,\)"),
    ],
)
def test_bad_tables_are_named(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        MDP(**{"transition": TRANSITION, "reward": REWARD, "discount": 0.9, **arguments})


@pytest.mark.parametrize("argument", ["transition", "reward", "discount", "start"])
def test_what_is_not_a_table_of_numbers_is_refused(argument):
    with pytest.raises(InputTypeError, match=argument):
        MDP(**{"transition": TRANSITION, "reward": REWARD, "discount": 0.9, argument: ["a", object()]})
    with pytest.raises(InputTypeError, match=argument):
        MDP(**{"transition": TRANSITION, "reward": REWARD, "discount": 0.9, argument: np.ones(2, complex)})


def test_rewards_in_every_form_become_expected_rewards():
    by_next_state = np.arange(8.0).reshape(2, 2, 2)
    # (0, 0): 0.9 * 0 + 0.1 * 1; (0, 1): 0.2 * 2 + 0.8 * 3; (1, 0): 0.7 * 4 + 0.3 * 5; (1, 1): 0.1 * 6 + 0.9 * 7
    np.testing.assert_allclose(MDP(TRANSITION, by_next_state, 0.9).reward, [[0.1, 2.8], [4.3, 6.9]], rtol=1e-6)
    np.testing.assert_allclose(MDP(TRANSITION, [3.0, 5.0], 0.9).reward, [[3.0, 3.0], [5.0, 5.0]])
    np.testing.assert_allclose(MDP(TRANSITION, [[1, 0], [0, 2]], 0).reward, REWARD)


def test_start_is_uniform_unless_given_and_tables_are_exchanged_with_a_check():
    mdp = MDP(TRANSITION, REWARD, 0.9)
    np.testing.assert_allclose(mdp.start, [0.5, 0.5])
    other = mdp.replace(start=[0.0, 1.0], discount=0.5)
    np.testing.assert_allclose(other.start, [0.0, 1.0])
    assert float(other.discount) == 0.5
    assert other.transition is not None
    np.testing.assert_array_equal(other.transition, mdp.transition)
    with pytest.raises(InputError, match="discount is 2"):
        mdp.replace(discount=2.0)


def test_precision_follows_the_context():
    leaves = jax.tree.leaves(random_mdp(jax.random.key(0), 5, 3))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(garnet(jax.random.key(0), 5, 3, 2)) + jax.tree.leaves(MDP(TRANSITION, REWARD, 0.9))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}


def test_models_can_be_built_and_mapped_inside_jit():
    keys = jax.random.split(jax.random.key(1), 4)
    models = jax.jit(jax.vmap(lambda key: garnet(key, 5, 3, 2)))(keys)
    assert models.transition.shape == (4, 5, 3, 5)
    np.testing.assert_allclose(jnp.sum(models.transition, axis=-1), 1.0, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(
    concentration=st.sampled_from([0.05, 0.3, 1.0, 10.0]),
    branching=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_models_are_models(concentration, branching, seed):
    # Making one checks its rows.
    mdp = random_mdp(jax.random.key(seed), 5, 3, concentration=concentration, reward_std=0.0)
    assert (mdp.num_states, mdp.num_actions) == (5, 3)
    assert not np.any(np.asarray(mdp.reward))
    sparse = garnet(jax.random.key(seed), 5, 3, branching)
    # A gap between two equal cut points has probability zero, so there are branching successors or, rarely, fewer.
    successors = np.sum(np.asarray(sparse.transition) > 0, axis=-1)
    assert np.all(successors <= branching)
    assert np.mean(successors) > branching - 0.2


def test_dirichlet_rows_and_rewards_have_the_stated_moments():
    mdp = random_mdp(jax.random.key(3), 40, 25, concentration=0.3, reward_std=2.0)
    # Variance of one entry of a symmetric Dirichlet: (S - 1) / (S^2 (S a + 1)).
    expected = 39 / (40**2 * (40 * 0.3 + 1))
    assert np.var(np.asarray(mdp.transition)) == pytest.approx(expected, rel=0.05)
    assert np.std(np.asarray(mdp.reward)) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda key: random_mdp(key, 0, 2), "num_states"),
        (lambda key: random_mdp(key, 2, 0), "num_actions"),
        (lambda key: random_mdp(key, 2, 2, concentration=0.0), "concentration"),
        (lambda key: random_mdp(key, 2, 2, reward_std=-1.0), "reward_std"),
        (lambda key: random_mdp(key, 2, 2, discount=1.0), "discount"),
        (lambda key: garnet(key, 3, 2, 0), "branching"),
        (lambda key: garnet(key, 3, 2, 4), "branching"),
        (lambda key: MDP(TRANSITION, REWARD, 0.9).environment(max_steps=0), "max_steps"),
    ],
)
def test_bad_arguments_of_the_makers_are_named(make, argument):
    with pytest.raises(InputError, match=argument):
        make(jax.random.key(0))


def rollouts(problem, actions, key, n, steps):
    """Steps n copies with a fixed action in each state; all of it under one jit."""

    @jax.jit
    def run(key):
        reset_key, step_key = jax.random.split(key)
        observation, state = problem.reset(jax.random.split(reset_key, n))

        def step(running, key):
            observation, state = running
            out = problem.step(jax.random.split(key, n), state, actions[observation])
            following, state, reward, terminated, truncated, info = out
            return (following, state), (observation, info["final_observation"], reward, terminated, truncated)

        return jax.lax.scan(step, (observation, state), jax.random.split(step_key, steps))[1]

    return jax.tree.map(np.asarray, run(key))


def test_environment_follows_the_tables():
    mdp = MDP(TRANSITION, REWARD, 0.9, start=[0.25, 0.75])
    problem = as_problem(mdp.environment(max_steps=5))
    assert isinstance(problem, Problem)
    assert problem.observation_space == spaces.Discrete(2)
    assert problem.action_space == spaces.Discrete(2)
    actions = jnp.array([1, 0])
    observation, following, reward, terminated, truncated = rollouts(problem, actions, jax.random.key(0), 2000, 10)
    assert not terminated.any()
    np.testing.assert_array_equal(truncated.all(axis=1), np.arange(1, 11) % 5 == 0)
    assert not truncated[[0, 1, 2, 3, 5, 6, 7, 8]].any()
    np.testing.assert_array_equal(reward, np.array([0.0, 0.0])[observation])
    np.testing.assert_allclose(observation[[0, 5]].mean(), 0.75, atol=0.03)
    for state, action in ((0, 1), (1, 0)):
        share = following[observation == state].mean()
        np.testing.assert_allclose(share, TRANSITION[state, action, 1], atol=0.02)


def test_geometric_episodes_have_the_discounted_value_as_their_mean_return():
    mdp = MDP(TRANSITION, REWARD, 0.8)
    problem = as_problem(mdp.environment(max_steps=None, geometric=True))
    actions = jnp.array([0, 1])
    _, _, reward, terminated, truncated = rollouts(problem, actions, jax.random.key(1), 4000, 80)
    assert not truncated.any()
    first = np.cumsum(terminated, axis=0) - terminated == 0
    measured = (reward * first).sum(axis=0)
    # The value solves V = r + 0.8 P V for the chain of actions (0, 1).
    chain = np.array([[0.9, 0.1], [0.1, 0.9]])
    value = np.linalg.solve(np.eye(2) - 0.8 * chain, np.array([1.0, 2.0]))
    assert measured.mean() == pytest.approx(value.mean(), abs=4 * measured.std() / np.sqrt(4000))


def test_the_environment_takes_other_tables_as_parameters():
    mdp = MDP(TRANSITION, REWARD, 0.9)
    other = mdp.replace(reward=REWARD + 10.0)
    environment = mdp.environment()
    _, state = environment.reset(jax.random.key(0), other)
    reward = environment.step(jax.random.key(1), state, jnp.asarray(0), other)[2]
    assert float(reward) in (10.0, 11.0)


def test_the_model_says_that_it_is_a_problem():
    assert MDP(TRANSITION, REWARD, 0.9).is_problem
