import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs import as_problem
from steersman.errors import InputError
from steersman.mdp import (
    MDP,
    advantage,
    expected_return,
    monotone_step_size,
    natural_gradient_bound,
    natural_policy_gradient,
    policy_gradient,
    random_mdp,
    softmax_policy_gradient,
    value_iteration,
)
from steersman.policies import TabularStochastic
from steersman.training import Rollout

TO_ONE = np.array([[0.1, 0.8], [0.3, 0.9]])
LOGITS = np.array([[0.5, 0.0], [0.0, 0.5]])
GRADIENT = np.array([[0.511308, -0.511308], [-3.033683, 3.033683]])


def two_states():
    return MDP(np.stack([1 - TO_ONE, TO_ONE], axis=-1), [[1.0, 0.0], [0.0, 2.0]], 0.9, [0.5, 0.5])


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def test_estimates_from_trajectories_agree_with_the_exact_gradient():
    """REINFORCE with gamma^t weights, and actor-critic with exact advantages."""
    mdp, logits = two_states(), jnp.asarray(LOGITS)
    probabilities = jax.nn.softmax(logits, axis=-1)
    steps, episodes = 160, 4096  # 0.9^160 is 5e-8
    policy = TabularStochastic(probabilities)
    problem = as_problem(mdp.environment(max_steps=None))
    rollout = Rollout(episodes, steps)
    experience = jax.jit(lambda s: rollout.collect(problem, policy, s)[0])(
        rollout.init(problem, policy, jax.random.key(0))
    )
    state, action = np.asarray(experience.observation), np.asarray(experience.action)
    discounted = 0.9 ** np.arange(steps)[:, None] * np.asarray(experience.reward, np.float64)
    to_go = np.cumsum(discounted[::-1], axis=0)[::-1]  # gamma^t G_t
    exact = 0.9 ** np.arange(steps)[:, None] * np.asarray(advantage(mdp, probabilities))[state, action]
    here = np.eye(2)[state]
    score = here[..., None] * (np.eye(2)[action] - np.asarray(probabilities)[state])[:, :, None, :]
    for weight in (to_go, exact):
        samples = np.einsum("tn,tnsa->nsa", weight, score)
        error = samples.mean(axis=0) - GRADIENT
        np.testing.assert_array_less(np.abs(error), 4 * samples.std(axis=0) / np.sqrt(episodes))
        assert np.all(samples.std(axis=0) / np.sqrt(episodes) < 0.25)  # four of these would tell a wrong gradient


def test_one_gradient_step_moves_along_the_printed_gradient():
    ascent = softmax_policy_gradient(two_states(), 0.01, 1, jnp.asarray(LOGITS))
    np.testing.assert_allclose((ascent.logits - LOGITS) / 0.01, GRADIENT, atol=1e-6)
    np.testing.assert_allclose(ascent.returns[0], 9.483417, atol=1e-6)


def test_natural_step_is_the_gradient_times_the_inverse_fisher_information():
    """The Fisher information is built from outer products of scores, and inverted by its singular values."""
    mdp = random_mdp(jax.random.key(3), 4, 3)
    logits = jax.random.normal(jax.random.key(4), (4, 3))
    pi = np.asarray(jax.nn.softmax(logits, axis=-1))
    chain = np.einsum("sa,sat->st", pi, np.asarray(mdp.transition))
    occupancy = 0.1 * np.linalg.solve(np.eye(4) - 0.9 * chain.T, np.asarray(mdp.start))
    fisher = np.zeros((12, 12))
    for s in range(4):
        for a in range(3):
            score = np.zeros((4, 3))
            score[s] = np.eye(3)[a] - pi[s]
            fisher += occupancy[s] * pi[s, a] * np.outer(score.ravel(), score.ravel())
    expected = (np.linalg.pinv(fisher, rcond=1e-10) @ np.asarray(policy_gradient(mdp, logits)).ravel()).reshape(4, 3)
    moved = np.asarray(natural_policy_gradient(mdp, 1.0, 1, logits).logits - logits)
    # Equal up to a shift of each state's logits.
    np.testing.assert_allclose(
        moved - moved.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-8
    )


def test_without_a_future_natural_steps_are_exponential_weights():
    bandit = MDP(np.ones((1, 3, 1)), [[0.3, 0.9, -0.2]], 0.0)
    found = natural_policy_gradient(bandit, 0.5, 7)
    expected = np.exp(0.5 * 7 * np.array([0.3, 0.9, -0.2]))
    np.testing.assert_allclose(found.policy[0], expected / expected.sum(), rtol=1e-12)


def test_softmax_gradient_closes_the_gap_at_a_rate_of_one_over_the_steps():
    """Two arms that pay 1 and 0: d D = 2 eta p (1 - p) dt with p = 1 / (1 + e^-D), so D + sinh D = eta T."""
    bandit = MDP(np.ones((1, 2, 1)), [[1.0, 0.0]], 0.0)
    gap = 1.0 - np.asarray(jax.jit(lambda: softmax_policy_gradient(bandit, 0.1, 20_000).returns)())
    count = np.array([100, 1_000, 20_000])
    difference = np.log(1.0 / gap[count] - 1.0)
    np.testing.assert_allclose(difference + np.sinh(difference), 0.1 * count, rtol=0.01)
    assert gap[20_000] * 2 * 0.1 * 20_000 == pytest.approx(1.0, abs=0.01)


@jax.jit
def _paths(key, eta, scale, shift):
    mdp = random_mdp(key, 6, 3, discount=0.9, concentration=0.5)
    # The same dynamics with rewards of width `scale` anywhere on the line.
    reward = shift + scale * jax.random.uniform(jax.random.key(1), (6, 3))
    width = jnp.max(reward) - jnp.min(reward)
    mdp = mdp.replace(reward=reward)
    best = expected_return(mdp, value_iteration(mdp, tolerance=1e-9).policy)
    natural = natural_policy_gradient(mdp, eta, 100).returns
    plain = softmax_policy_gradient(mdp, monotone_step_size(0.9, width), 100).returns
    bound = natural_gradient_bound(3, 0.9, eta, jnp.arange(1, 101), width)
    return best - natural, bound, plain


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    eta=st.sampled_from([0.03, 0.1, 1.0, 10.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    shift=st.sampled_from([-5.0, 0.0, 2.0]),
)
def test_guarantees_hold_on_random_models(seed, eta, scale, shift):
    with jax.enable_x64(True):
        gap, bound, plain = (np.asarray(x) for x in _paths(jax.random.key(seed), eta, scale, shift))
        assert np.all(gap[1:] <= bound + 1e-9)
        assert np.all(np.diff(gap) <= 1e-9), "natural steps with exact values never lose"
        assert np.all(np.diff(plain) >= -1e-12 * np.abs(plain[:-1]))
        assert plain[-1] > plain[0]


def test_bound_in_numbers_and_its_step_size():
    # ln 4 / (0.1 * 50) + 1 / (0.01 * 50)
    assert float(natural_gradient_bound(4, 0.9, 0.1, 50)) == pytest.approx(0.277259 + 2.0, abs=1e-6)
    assert float(natural_gradient_bound(4, 0.9, 0.1, 50, 3.0)) == pytest.approx(0.277259 + 6.0, abs=1e-6)
    assert float(monotone_step_size(0.9)) == pytest.approx(1.25e-4)
    assert float(monotone_step_size(0.5, 2.0)) == pytest.approx(0.125 / 16)


def test_no_steps_leave_the_start():
    ascent = softmax_policy_gradient(two_states(), 1.0, 0)
    np.testing.assert_allclose(ascent.policy, 0.5)
    assert ascent.returns.shape == (1,)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: softmax_policy_gradient(m, 0.0, 3), "learning_rate is 0"),
        (lambda m: natural_policy_gradient(m, -1.0, 3), "learning_rate is -1"),
        (lambda m: natural_policy_gradient(m, 0.1, -1), "iterations is -1"),
        (lambda m: softmax_policy_gradient(m, 0.1, 3, jnp.zeros((1, 2))), "logits' shape"),
        (lambda m: softmax_policy_gradient(m, 0.1, 3, jnp.full((2, 2), jnp.nan)), "logits is"),
        (lambda m: natural_gradient_bound(4, 1.0, 0.1, 5), "discount is 1"),
        (lambda m: natural_gradient_bound(4, 0.9, 0.0, 5), "learning_rate is 0"),
        (lambda m: natural_gradient_bound(4, 0.9, 0.1, 0), "iterations is 0"),
        (lambda m: natural_gradient_bound(4, 0.9, 0.1, 5, -1.0), "reward_range is -1"),
        (lambda m: monotone_step_size(1.0), "discount is 1"),
        (lambda m: monotone_step_size(0.9, 0.0), "reward_range is 0"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(two_states())
