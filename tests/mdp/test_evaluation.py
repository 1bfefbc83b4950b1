import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError
from steersman.mdp import (
    MDP,
    advantage,
    expected_return,
    garnet,
    occupancy,
    performance_difference,
    policy_evaluation,
    policy_gradient,
    policy_transition,
    random_mdp,
    value_iteration,
)

TO_ONE = np.array([[0.1, 0.8], [0.3, 0.9]])
LOGITS = np.array([[0.5, 0.0], [0.0, 0.5]])


def two_states():
    return MDP(np.stack([1 - TO_ONE, TO_ONE], axis=-1), [[1.0, 0.0], [0.0, 2.0]], 0.9, [0.5, 0.5])


def random_policy(key, mdp):
    return jax.nn.softmax(jax.random.normal(key, (mdp.num_states, mdp.num_actions)), axis=-1)


@jax.jit
def exact(mdp, pi):
    """Everything at once, so that it is compiled once for each size."""
    value, q_value = policy_evaluation(mdp, pi)
    return {
        "value": value,
        "q_value": q_value,
        "advantage": advantage(mdp, pi),
        "occupancy": occupancy(mdp, pi),
        "chain": policy_transition(mdp, pi),
        "eta": expected_return(mdp, pi),
    }


@jax.jit
def draw(key, discount):
    """A random model with a random start, and two random policies."""
    keys = jax.random.split(key, 4)
    mdp = random_mdp(keys[0], 5, 3, discount=discount, concentration=0.4)
    mdp = mdp.replace(start=jax.nn.softmax(jax.random.normal(keys[1], (5,))))
    return mdp, random_policy(keys[2], mdp), random_policy(keys[3], mdp)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def test_two_state_model_has_the_printed_values():
    mdp = two_states()
    found = exact(mdp, jax.nn.softmax(jnp.asarray(LOGITS), axis=-1))
    np.testing.assert_allclose(found["value"], [9.052185, 9.914648], atol=1e-6)
    np.testing.assert_allclose(found["eta"], 9.483417, atol=1e-6)
    np.testing.assert_allclose(found["advantage"], [[0.172403, -0.284245], [-1.534817, 0.930913]], atol=1e-6)
    np.testing.assert_allclose(found["q_value"] - found["value"][:, None], found["advantage"], atol=1e-12)
    np.testing.assert_allclose(found["occupancy"], [0.47646, 0.52354], atol=1e-5)
    gradient = policy_gradient(mdp, jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient, [[0.511308, -0.511308], [-3.033683, 3.033683]], atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), discount=st.sampled_from([0.0, 0.5, 0.9, 0.97]))
def test_values_and_occupancies_are_the_sums_that_define_them(seed, discount):
    with jax.enable_x64(True):
        mdp, pi, _ = draw(jax.random.key(seed), discount)
        found = exact(mdp, pi)
        chain = np.einsum("sa,sat->st", np.asarray(pi), np.asarray(mdp.transition))
        reward = np.einsum("sa,sa->s", np.asarray(pi), np.asarray(mdp.reward))
        value, visits = np.zeros(5), np.zeros(5)
        state, weight = np.asarray(mdp.start), 1.0
        law = np.eye(5)
        for _ in range(1000):
            value += weight * law @ reward
            visits += weight * (1 - discount) * state
            state, law, weight = state @ chain, law @ chain, weight * discount
        np.testing.assert_allclose(found["chain"], chain, atol=1e-12)
        np.testing.assert_allclose(found["value"], value, atol=1e-8)
        np.testing.assert_allclose(found["occupancy"], visits, atol=1e-8)
        np.testing.assert_allclose(np.sum(np.asarray(pi * found["advantage"]), axis=-1), 0.0, atol=1e-10)


def test_policy_gradient_is_the_slope_of_the_return():
    mdp, _, _ = draw(jax.random.key(4), 0.95)
    logits = jax.random.normal(jax.random.key(5), (5, 3))

    def eta(flat):
        return expected_return(mdp, jax.nn.softmax(flat.reshape(5, 3), axis=-1))

    h = 1e-5
    steps = h * jnp.eye(15)
    slopes = jax.jit(jax.vmap(lambda e: (eta(logits.ravel() + e) - eta(logits.ravel() - e)) / (2 * h)))(steps)
    np.testing.assert_allclose(jax.jit(policy_gradient)(mdp, logits).ravel(), slopes, rtol=1e-6, atol=1e-8)


def test_performance_difference_is_the_difference_of_returns():
    mdp, old, new = draw(jax.random.key(5), 0.9)
    expected = exact(mdp, new)["eta"] - exact(mdp, old)["eta"]
    assert abs(float(expected)) > 1e-2
    np.testing.assert_allclose(jax.jit(performance_difference)(mdp, old, new), expected, rtol=1e-10)


def best_by_enumeration(mdp):
    transition, reward, discount = (np.asarray(x) for x in (mdp.transition, mdp.reward, mdp.discount))
    states = np.arange(mdp.num_states)
    best = np.full(mdp.num_states, -np.inf)
    for actions in itertools.product(range(mdp.num_actions), repeat=mdp.num_states):
        chain = transition[states, list(actions)]
        value = np.linalg.solve(np.eye(mdp.num_states) - discount * chain, reward[states, list(actions)])
        best = np.maximum(best, value)
    return best


@pytest.mark.parametrize("discount", [0.0, 0.6, 0.95])
def test_value_iteration_finds_the_best_of_all_deterministic_policies(discount):
    mdp, _, _ = draw(jax.random.key(6), discount)
    solution = value_iteration(mdp, tolerance=1e-9)
    best = best_by_enumeration(mdp)
    np.testing.assert_allclose(solution.value, best, atol=1e-9)
    np.testing.assert_allclose(exact(mdp, solution.policy)["value"], best, atol=1e-9)
    np.testing.assert_array_equal(np.sum(np.asarray(solution.policy), axis=-1), 1.0)
    assert int(solution.iterations) < 1000


def test_value_iteration_solves_the_linear_program():
    mdp = garnet(jax.random.key(7), 30, 4, 3, discount=0.9)
    # Minimize sum V subject to V(s) >= r(s, a) + discount P(. | s, a) V for every pair.
    rows = np.repeat(np.eye(30), 4, axis=0) - 0.9 * np.asarray(mdp.transition).reshape(120, 30)
    program = scipy.optimize.linprog(np.ones(30), -rows, -np.asarray(mdp.reward).ravel(), bounds=(None, None))
    solution = value_iteration(mdp)
    np.testing.assert_allclose(solution.value, program.x, atol=1e-7)
    assert float(solution.change) <= 1e-8 * 0.1 / 1.8


def test_value_iteration_ends_in_single_precision_and_at_its_limit():
    with jax.enable_x64(False):
        mdp = random_mdp(jax.random.key(8), 10, 3, discount=0.99)
        solution = value_iteration(mdp, tolerance=1e-12)
        assert solution.value.dtype == jnp.float32
        assert int(solution.iterations) < 5000
        assert int(value_iteration(mdp, max_iterations=7).iterations) == 7


def test_many_policies_are_evaluated_at_once():
    mdp, old, new = draw(jax.random.key(9), 0.9)
    policies = jnp.stack([old, new, 0.5 * (old + new)])
    together = jax.jit(jax.vmap(exact, in_axes=(None, 0)))(mdp, policies)
    for i, pi in enumerate(policies):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-12), together, exact(mdp, pi)
        )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda mdp, pi: policy_evaluation(mdp, pi[:1]), r"pi's shape is \(1, 2\)"),
        (lambda mdp, pi: occupancy(mdp, pi.at[1, 0].set(0.6)), r"pi at state 1 sums to 1.1"),
        (lambda mdp, pi: expected_return(mdp, pi.at[0].set(jnp.array([1.5, -0.5]))), r"pi at .* \(0, 1\) is -0.5"),
        (lambda mdp, pi: advantage(mdp, pi.at[0, 0].set(jnp.nan)), r"pi at .* \(0, 0\) is nan"),
        (lambda mdp, pi: performance_difference(mdp, 2 * pi, pi), "old at state 0 sums to 2"),
        (lambda mdp, pi: performance_difference(mdp, pi, 2 * pi), "new at state 0 sums to 2"),
        (lambda mdp, pi: policy_gradient(mdp, pi[:1]), "logits' shape"),
        (lambda mdp, pi: policy_gradient(mdp, pi * jnp.inf), "logits is"),
        (lambda mdp, pi: value_iteration(mdp, tolerance=0.0), "tolerance is 0"),
        (lambda mdp, pi: value_iteration(mdp, max_iterations=0), "max_iterations is 0"),
    ],
)
def test_bad_input_is_named(call, sentence):
    mdp = two_states()
    with pytest.raises(InputError, match=sentence):
        call(mdp, jnp.full((2, 2), 0.5))
