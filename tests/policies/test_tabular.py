"""Table policies against lookups by hand and frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from steersman.errors import InputError, InputTypeError
from steersman.policies import Tabular, TabularStochastic

KEY = jax.random.key(0)
PROBABILITIES = np.array([[0.2, 0.8, 0.0], [0.5, 0.25, 0.25]])


def test_each_state_has_its_action():
    policy = Tabular([3, 1, 2])
    actions = jax.jit(jax.vmap(lambda s: policy(s, (), KEY)[0]))(jnp.arange(3))
    np.testing.assert_array_equal(actions, [3, 1, 2])
    shifted = Tabular([[0.5, 1.0], [2.0, 3.0]], start=1)
    np.testing.assert_array_equal(shifted(jnp.asarray(2), (), KEY)[0], [2.0, 3.0])


def test_greedy_takes_the_first_of_the_best():
    values = [[0.0, 2.0, 1.0], [5.0, -1.0, 5.0]]
    np.testing.assert_array_equal(Tabular.greedy(values).table, [1, 0])
    np.testing.assert_array_equal(Tabular.greedy(values, first_action=1).table, [2, 1])


def test_stochastic_rows_are_the_distribution():
    policy = TabularStochastic(PROBABILITIES, start=4, first_action=1)
    for row in range(2):
        state = jnp.asarray(row + 4)
        found = policy.distribution(state, ())
        np.testing.assert_allclose(found.probs, PROBABILITIES[row], atol=1e-6)
        keys = jax.random.split(KEY, 5000)
        action, _, record = jax.jit(jax.vmap(lambda key, s=state: policy.act(s, (), key)))(keys)
        counts = np.bincount(np.asarray(action) - 1, minlength=3)
        possible = PROBABILITIES[row] > 0
        assert counts[~possible].sum() == 0
        assert scipy.stats.chisquare(counts[possible], 5000 * PROBABILITIES[row][possible]).pvalue > 1e-3
        np.testing.assert_allclose(np.exp(record.log_prob), PROBABILITIES[row][np.asarray(action) - 1], rtol=1e-5)


def test_the_mode_is_the_likeliest_action():
    mode = TabularStochastic(PROBABILITIES).mode()
    actions = [int(mode(jnp.asarray(s), (), KEY)[0]) for s in range(2)]
    assert actions == [1, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Tabular(3), "table is"),
        (lambda: Tabular.greedy([1.0, 2.0]), "values is"),
        (lambda: TabularStochastic([0.5, 0.5]), "probabilities is"),
        (lambda: TabularStochastic([[0.5, 0.5], [0.5, 0.6]]), "row 1"),
        (lambda: TabularStochastic([[1.5, -0.5]]), "row 0"),
        (lambda: TabularStochastic([[np.nan, 0.5]]), "row 0"),
    ],
)
def test_bad_tables_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_an_observation_that_is_no_state_is_refused():
    for policy in (Tabular([1, 2]), TabularStochastic([[1.0]])):
        with pytest.raises((InputTypeError, TypeError), match="observation"):
            policy(jnp.ones(2), (), KEY)
