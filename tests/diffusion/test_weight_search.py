"""The search for weights: common episodes, ties, candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion.weight_search import choose_weights, search_weights, simplex
from steersman.errors import InputError


def test_weight_search_uses_common_random_numbers():
    def score(weights, key):
        return -jnp.abs(weights[0] - 0.3) + jax.random.normal(key)

    found = search_weights(score, simplex(2), range(20), test_seeds=range(20, 25))
    np.testing.assert_allclose(found.weights, [0.3, 0.7])
    spread = (found.scores - found.scores[0]).std(axis=1)
    np.testing.assert_allclose(spread, 0.0, atol=1e-5)
    assert found.test_scores.shape == (5,)
    host = search_weights(lambda weights, seed: weights[1] + seed, simplex(2), [1, 2], on_host=True)
    assert host.best == 0
    np.testing.assert_allclose(host.candidates[host.inner], [0.1, 0.9])


def test_ties_go_to_the_better_policy():
    candidates = simplex(2, 4)
    assert choose_weights(candidates, [[0.1], [0.9], [0.9], [0.9], [0.5]]) == (3, 3)
    assert choose_weights(candidates, [[0.5], [0.9], [0.9], [0.9], [0.1]]) == (1, 1)
    assert simplex(3, 10, corners=False).shape == (36, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: search_weights(lambda w, s: 0.0, np.zeros((0, 2)), [1]), InputError, "candidates"),
        (lambda: search_weights(lambda w, s: 0.0, simplex(2), []), InputError, "seeds"),
        (lambda: search_weights(lambda w, s: 0.0, simplex(2), [1, 2], test_seeds=[2]), InputError, "test_seeds"),
        (lambda: simplex(3, 2, corners=False), InputError, "parts"),
    ],
)
def test_bad_input_is_told(call, error, text):
    with pytest.raises(error, match=text):
        call()
