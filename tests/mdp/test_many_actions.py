import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.mdp import MDP, policy_evaluation, random_mdp
from steersman.mdp.many_actions import (
    gradient_samples,
    many_actions_pay,
    many_actions_pay_in_bandits,
    many_actions_variance,
    stationary_distribution,
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def two_states():
    transition = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]]])
    mdp = MDP(transition, np.array([[1.0, 0.0], [0.0, 2.0]]), 0.9)
    logits = jnp.array([[0.5, 0.0], [0.0, 0.5]])
    return mdp, logits, jax.nn.softmax(logits, axis=-1), gradient_samples(mdp, logits)


def test_printed_values_of_the_two_state_model(two_states):
    mdp, _, pi, samples = two_states
    np.testing.assert_allclose(stationary_distribution(mdp, pi), [0.472674, 0.527326], atol=1e-6)
    one = many_actions_variance(mdp, pi, samples, 1, 1)
    np.testing.assert_allclose(one.mean, [0.050725, -0.050725, -0.305562, 0.305562], atol=1e-6)
    assert float(one.between_states) == pytest.approx(0.173124, abs=1e-6)
    assert float(one.within_states) == pytest.approx(0.093169, abs=1e-6)
    assert float(one.total) == pytest.approx(0.266293, abs=1e-6)
    assert float(many_actions_variance(mdp, pi, samples, 1, 4).total) == pytest.approx(0.196416, abs=1e-6)


def test_bandit_condition_of_the_printed_values():
    assert bool(many_actions_pay_in_bandits(0.093169, 0.173124, 4, 0.25))
    assert not bool(many_actions_pay_in_bandits(0.093169, 0.173124, 4, 0.5))
    never = many_actions_pay_in_bandits(0.093169, 0.173124, jnp.asarray([2.0, 4.0, 64.0]), jnp.asarray([1.0, 1.5, 3.0]))
    assert not never.any()


def test_in_a_bandit_the_general_condition_is_the_corollary():
    """Next states that depend on nothing leave no covariances."""
    transition = np.broadcast_to([0.2, 0.5, 0.3], (3, 2, 3))
    mdp = MDP(transition, np.random.default_rng(0).normal(size=(3, 2)), 0.9)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))
    pi, samples = jax.nn.softmax(logits, axis=-1), gradient_samples(mdp, logits)
    parts = many_actions_variance(mdp, pi, samples, 5, 3)
    np.testing.assert_allclose([parts.state_covariance, parts.action_covariance], 0.0, atol=1e-12)
    for delta in (0.1, 0.2, 0.3, 0.35, 0.5, 1.0, 2.0):
        general = many_actions_pay(mdp, pi, samples, 6, 3, delta)
        corollary = many_actions_pay_in_bandits(parts.within_states, parts.between_states, 3, delta)
        assert bool(general) == bool(corollary), delta


def simulate(mdp, pi, samples, states, actions, count, rng):
    """Estimates ``[count, D]``, each from a stationary trajectory of its own."""
    pi, samples, transition = np.asarray(pi), np.asarray(samples), np.asarray(mdp.transition)
    state = rng.choice(mdp.num_states, size=count, p=np.asarray(stationary_distribution(mdp, jnp.asarray(pi))))
    total = np.zeros((count, samples.shape[-1]))
    for _ in range(states):
        levels = np.cumsum(pi, axis=1)[state]
        drawn = (rng.random((actions, count, 1)) > levels).sum(axis=-1)
        total += samples[state, drawn].mean(axis=0) / states
        levels = np.cumsum(transition, axis=2)[state, drawn[0]]
        state = (rng.random((count, 1)) > levels).sum(axis=-1)
    return total


def test_formula_agrees_with_simulation():
    """60,000 replicates on a random model; also the mean, which no number of states or actions changes."""
    mdp = random_mdp(jax.random.key(3), 3, 2, concentration=0.5, discount=0.9)
    logits = jax.random.normal(jax.random.key(4), (3, 2))
    pi, samples = jax.nn.softmax(logits, axis=-1), gradient_samples(mdp, logits)
    rng = np.random.default_rng(0)
    for states, actions in [(1, 1), (4, 1), (4, 2), (4, 4), (8, 3)]:
        found = simulate(mdp, pi, samples, states, actions, 60_000, rng)
        exact = many_actions_variance(mdp, pi, samples, states, actions)
        assert found.var(axis=0).sum() == pytest.approx(float(exact.total), rel=0.03), (states, actions)
        error = np.linalg.norm(found.mean(axis=0) - exact.mean)
        assert error < 4 * np.sqrt(float(exact.total) / 60_000), (states, actions)


def test_variance_by_enumeration_of_every_path(two_states):
    """Two states, two actions at each: all trajectories and their probabilities, summed."""
    mdp, _, pi, samples = (np.asarray(part) if hasattr(part, "shape") else part for part in two_states)
    mu, transition = np.asarray(stationary_distribution(mdp, jnp.asarray(pi))), np.asarray(mdp.transition)
    first, second = np.zeros(4), 0.0
    for s0, s1 in np.ndindex(2, 2):
        for a, b, c, d in np.ndindex(2, 2, 2, 2):
            chance = mu[s0] * pi[s0, a] * pi[s0, b] * transition[s0, a, s1] * pi[s1, c] * pi[s1, d]
            estimate = (samples[s0, a] + samples[s0, b] + samples[s1, c] + samples[s1, d]) / 4
            first += chance * estimate
            second += chance * estimate @ estimate
    exact = many_actions_variance(mdp, jnp.asarray(pi), jnp.asarray(samples), 2, 2)
    np.testing.assert_allclose(exact.mean, first, atol=1e-12)
    assert float(exact.total) == pytest.approx(second - first @ first, abs=1e-12)


def test_a_baseline_of_the_state_leaves_the_mean_alone(two_states):
    mdp, logits, pi, samples = two_states
    shifted = gradient_samples(mdp, logits, baseline=jnp.asarray([3.0, -7.0]))
    for states, actions in [(1, 1), (3, 1), (3, 4)]:
        plain = many_actions_variance(mdp, pi, samples, states, actions)
        other = many_actions_variance(mdp, pi, shifted, states, actions)
        np.testing.assert_allclose(other.mean, plain.mean, atol=1e-12)
        assert float(other.within_states) > float(plain.within_states)
    value = policy_evaluation(mdp, pi)[0]
    np.testing.assert_allclose(gradient_samples(mdp, logits, baseline=value), samples, atol=1e-12)


def test_in_a_chain_with_memory_many_actions_can_pay_for_dear_actions():
    """States that hardly ever change: more of them say little, so actions pay at nearly the price of a state."""
    stay = np.array([[0.999, 0.001], [0.001, 0.999]])
    mdp = MDP(np.stack([stay, stay], axis=1), np.array([[1.0, 0.0], [0.0, 1.0]]), 0.5)
    logits = jnp.zeros((2, 2))
    samples = gradient_samples(mdp, logits, baseline=jnp.asarray([0.0, 0.0]))
    pi = jax.nn.softmax(logits, axis=-1)
    assert bool(many_actions_pay(mdp, pi, samples, 4, 4, 0.9))
    parts = many_actions_variance(mdp, pi, samples, 4, 4)
    assert not bool(many_actions_pay_in_bandits(parts.within_states, parts.between_states, 4, 0.9))


def test_bad_input(two_states):
    mdp, logits, pi, samples = two_states
    with pytest.raises(InputError, match="delta is 0"):
        many_actions_pay(mdp, pi, samples, 2, 2, 0.0)
    with pytest.raises(InputError, match=r"delta is -1"):
        many_actions_pay_in_bandits(1.0, 1.0, 2, -1.0)
    with pytest.raises(InputError, match=r"delta \* actions \* states is 0\.4"):
        many_actions_pay(mdp, pi, samples, 2, 2, 0.1)
    with pytest.raises(InputError, match="actions is 0"):
        many_actions_variance(mdp, pi, samples, 2, 0)
    with pytest.raises(InputError, match="states is 0"):
        many_actions_variance(mdp, pi, samples, 0, 1)
    with pytest.raises(InputError, match="samples' shape"):
        many_actions_variance(mdp, pi, samples[:, :1], 2, 1)
    with pytest.raises(InputError, match="samples is"):
        many_actions_variance(mdp, pi, samples.at[0, 0, 0].set(jnp.nan), 2, 1)
    with pytest.raises(InputError, match="baseline's shape"):
        gradient_samples(mdp, logits, baseline=jnp.zeros(3))
    with pytest.raises(InputError, match="logits' shape"):
        gradient_samples(mdp, logits[:, :1])
