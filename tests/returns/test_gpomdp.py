import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steersman import returns
from steersman.errors import InputError

GAMMA, STEPS = 0.9, 4
# Two states, two actions; action 1 in state 1 ends the episode.
KERNEL = np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]])
REWARD = np.array([[1.0, -0.5], [0.3, 2.0]])
LOGITS = np.array([[0.4, -0.2], [-0.3, 0.5]], np.float32)


def trajectories():
    """Every path from state 0: states, actions and mask [T, K], and the environment's part of its probability."""
    states, actions, chances = [], [], []
    for path in itertools.product((0, 1), repeat=2 * STEPS - 1):
        action, state = path[:STEPS], (0, *path[STEPS:])
        chance = np.prod([KERNEL[state[t], action[t], state[t + 1]] for t in range(STEPS - 1)])
        states.append(state)
        actions.append(action)
        chances.append(chance)
    states, actions = np.array(states).T, np.array(actions).T
    ended = np.cumsum((states == 1) & (actions == 1), axis=0) - ((states == 1) & (actions == 1)) > 0
    return states, actions, ~ended, np.array(chances)


STATES, ACTIONS, MASK, CHANCE = trajectories()
EARNED = REWARD[STATES, ACTIONS]
POLICY = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
WEIGHT = CHANCE * np.prod(POLICY[STATES, ACTIONS], axis=0)


def log_prob_of(states, actions):
    return lambda logits: jax.nn.log_softmax(logits)[states, actions]


def exact_return(logits):
    """By backward induction; what follows the end is worth nothing."""
    pi, value = jax.nn.softmax(logits), jnp.zeros(2)
    goes_on = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    for _ in range(STEPS):
        value = jnp.sum(pi * (REWARD + GAMMA * goes_on * (KERNEL @ value)), axis=1)
    return value[0]


TRUTH = np.asarray(jax.grad(exact_return)(jnp.asarray(LOGITS)))


def one_by_one(states, actions, reward, mask):
    """Gradient estimates ``[K, 2, 2]`` of every path alone."""

    def single(s, a, r, m):
        return returns.gpomdp_gradient(
            log_prob_of(s[:, None], a[:, None]), jnp.asarray(LOGITS), r[:, None], GAMMA, m[:, None], baseline="none"
        )

    return np.asarray(jax.jit(jax.vmap(single, in_axes=1))(states, actions, reward, mask))


def test_reward_to_go_counts_from_the_episodes_start():
    reward = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = jnp.array([[True, True], [True, True], [True, False]])
    np.testing.assert_allclose(
        returns.reward_to_go(reward, 0.5, mask), [[1 + 1.5 + 1.25, 2 + 2], [1.5 + 1.25, 2], [1.25, 0]]
    )
    np.testing.assert_allclose(returns.episode_return(reward, 0.5, mask), [3.75, 4.0])
    np.testing.assert_allclose(returns.episode_return(reward[..., None], 0.5, mask)[:, 0], [3.75, 4.0])


def test_mean_over_all_paths_is_the_exact_gradient():
    """Sum over every path of its probability times its estimate: no sampling error (oracle 4)."""
    each = one_by_one(STATES, ACTIONS, EARNED.astype(np.float32), MASK)
    assert WEIGHT.sum() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(np.tensordot(WEIGHT, each, 1), TRUTH, atol=1e-6)
    value = returns.episode_return(jnp.asarray(EARNED, jnp.float32), GAMMA, jnp.asarray(MASK))
    assert WEIGHT @ np.asarray(value) == pytest.approx(float(exact_return(jnp.asarray(LOGITS))), abs=1e-6)


@pytest.mark.parametrize("baseline", ["leave-one-out", "mean"])
def test_pairs_of_paths(baseline):
    """Over every pair of episodes: leaving one's own out is unbiased; the plain mean of two halves the gradient."""
    first, second = (i.ravel() for i in np.indices((len(WEIGHT),) * 2))
    mask = np.ones_like(MASK) if baseline == "mean" else MASK  # halving is exact where all episodes are as long
    reward = EARNED.astype(np.float32)

    def pair(i, j):
        pick = jnp.stack([i, j])
        s, a, r, m = (jnp.asarray(x)[:, pick] for x in (STATES, ACTIONS, reward, mask))
        return returns.gpomdp_gradient(log_prob_of(s, a), jnp.asarray(LOGITS), r, GAMMA, m, baseline=baseline)

    each = np.asarray(jax.jit(jax.vmap(pair))(first, second))
    expected = TRUTH
    if baseline == "mean":
        expected = 0.5 * np.tensordot(WEIGHT, one_by_one(STATES, ACTIONS, reward, mask), 1)
    np.testing.assert_allclose(np.tensordot(WEIGHT[first] * WEIGHT[second], each, 1), expected, atol=2e-6)


@pytest.mark.parametrize("baseline", returns.BASELINES)
def test_samples_agree_with_enumeration(baseline):
    """A hundred thousand sampled episodes, in batches, within four standard errors (oracle 4)."""
    rng, reward = np.random.default_rng(0), EARNED.astype(np.float32)
    picks = rng.choice(len(WEIGHT), p=WEIGHT / WEIGHT.sum(), size=(50, 2000))

    def batch(pick):
        s, a, r, m = (jnp.asarray(x)[:, pick] for x in (STATES, ACTIONS, reward, MASK))
        return returns.gpomdp_gradient(log_prob_of(s, a), jnp.asarray(LOGITS), r, GAMMA, m, baseline=baseline)

    each = np.asarray(jax.jit(lambda picks: jax.lax.map(batch, picks))(picks))
    error = each.std(axis=0, ddof=1) / np.sqrt(len(each))
    assert np.all(np.abs(each.mean(axis=0) - TRUTH) < 4 * error + 1e-3 * np.abs(TRUTH))


def test_any_constant_baseline_of_each_reward_keeps_the_mean():
    """The form with cumulative scores stays unbiased where episodes end early, because those keep their scores."""
    score = returns.cumulative_scores(log_prob_of(STATES, ACTIONS), jnp.asarray(LOGITS), jnp.asarray(MASK))
    assert score.shape == (STEPS, len(WEIGHT), 4)
    earned = np.where(MASK, GAMMA ** np.arange(STEPS)[:, None] * EARNED, 0.0)
    baseline = np.linspace(-1.0, 2.0, STEPS * 4).reshape(STEPS, 1, 4)
    estimate = np.sum(np.asarray(score) * (earned[..., None] - baseline), axis=0)
    np.testing.assert_allclose(WEIGHT @ estimate, TRUTH.ravel(), atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 5, 2), elements=st.floats(-3, 3, width=32)),
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-3, 3, width=32)),
    st.floats(-0.5, 0.5),
)
def test_optimal_baseline_minimizes_the_second_moment(score, reward, change):
    """``sum w^2 (R - b)^2`` is smallest at the baseline, whatever it is changed by."""
    b = np.asarray(returns.optimal_baseline(jnp.asarray(score), jnp.asarray(reward)), np.float64)

    def moment(b):
        return np.sum(score**2 * (reward[..., None] - b[:, None, :]) ** 2, axis=1)

    assert np.all(moment(b) <= moment(b + change) + 1e-4)


def test_cumulative_weights_give_another_policys_return():
    """Mean of weighted rewards over all paths of one policy is the exact return of the other."""
    other = jnp.array([[-0.5, 0.1], [0.2, 0.0]])
    ratio = log_prob_of(STATES, ACTIONS)(other) - log_prob_of(STATES, ACTIONS)(jnp.asarray(LOGITS))
    weight = returns.cumulative_weights(ratio, jnp.asarray(MASK))
    value = returns.reward_to_go(jnp.asarray(EARNED, jnp.float32), GAMMA, jnp.asarray(MASK), weight)[0]
    assert WEIGHT @ np.asarray(value) == pytest.approx(float(exact_return(other)), abs=1e-5)


def test_weighted_objective_gives_another_policys_gradient():
    other = jnp.array([[-0.5, 0.1], [0.2, 0.0]])
    ratio = log_prob_of(STATES, ACTIONS)(other) - log_prob_of(STATES, ACTIONS)(jnp.asarray(LOGITS))
    weight = returns.cumulative_weights(ratio, jnp.asarray(MASK))
    # Every path once, its rewards times its probability: the mean over paths is then the sum.
    reward = jnp.asarray(EARNED * WEIGHT * len(WEIGHT), jnp.float32)
    gradient = jax.grad(
        lambda logits: returns.gpomdp_objective(
            log_prob_of(STATES, ACTIONS)(logits), reward, GAMMA, jnp.asarray(MASK), baseline="none", weight=weight
        )
    )(other)
    np.testing.assert_allclose(gradient, jax.grad(exact_return)(other), atol=1e-5)


def test_nothing_after_the_end_is_looked_at():
    clean, mask = jnp.asarray(EARNED, jnp.float32), jnp.asarray(MASK)
    spoiled = jnp.where(mask, clean, jnp.nan)
    arguments = (log_prob_of(STATES, ACTIONS), jnp.asarray(LOGITS))
    for baseline in returns.BASELINES:
        both = [returns.gpomdp_gradient(*arguments, r, GAMMA, mask, baseline=baseline) for r in (clean, spoiled)]
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": jnp.array([0.9, 0.8])}, "gamma's shape is"),
        ({"baseline": "avarage"}, "Unknown baseline 'avarage'"),
        ({"baseline": "optimal"}, "baseline is 'optimal'"),
        ({"log_prob": jnp.zeros((4, 2))}, "log_prob has shape"),
        ({"mask": jnp.ones((2, 3), bool)}, "mask has shape"),
        ({"reward": jnp.zeros((4, 1)), "log_prob": jnp.zeros((4, 1))}, "at least two episodes for baseline 'mean'"),
        ({"reward": jnp.zeros((4, 3, 2)), "log_prob": jnp.zeros((4, 3, 2))}, "reward's shape is"),
    ],
)
def test_bad_input(change, message):
    good = {"log_prob": jnp.zeros((4, 3)), "reward": jnp.zeros((4, 3)), "gamma": 0.9}
    with pytest.raises(InputError, match=message):
        returns.gpomdp_objective(**(good | change))


def test_a_baseline_over_one_episode_is_refused():
    with pytest.raises(InputError, match="to_go's shape"):
        returns.time_baseline(jnp.zeros((4, 1)))
    with pytest.raises(InputError, match="baseline 'optimal'"):
        returns.gpomdp_gradient(lambda p: p, jnp.zeros((4, 1)), jnp.zeros((4, 1)), 0.9, baseline="optimal")
