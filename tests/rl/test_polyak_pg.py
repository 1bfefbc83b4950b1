import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole
from steersman.errors import InputError, InputTypeError, NonFiniteError
from steersman.mdp import expected_return, policy_gradient, random_mdp, value_iteration
from steersman.rl.on_policy.policy_gradient import PolicyGradient, episode_likelihood, weights
from steersman.rl.on_policy.polyak_pg import PolyakPG
from steersman.training import train
from steersman.training.step_sizes import Polyak, polyak_step_size

SMALL = {"num_episodes": 6, "horizon": 30, "hidden": ()}


class Scaled(DiscreteCartPole):
    """Balancing with ``factor * 1 + shift`` a step."""

    factor: jax.Array = eqx.field(converter=jnp.asarray, default=1.0)
    shift: jax.Array = eqx.field(converter=jnp.asarray, default=0.0)

    def step_env(self, key, state, action, params):
        observation, state, reward, terminated, info = super().step_env(key, state, action, params)
        return observation, state, self.factor * reward + self.shift, terminated, info


@eqx.filter_jit
def begun(algorithm, problem, seed):
    state = algorithm.init(problem, jax.random.key(seed))
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), jax.random.key(seed + 1))
    experience, _, _ = algorithm.collector.collect(problem, algorithm.behaviour(state), rollout)
    return state, experience


@eqx.filter_jit
def updated(algorithm, state, experience):
    return algorithm.update(state, experience)


@eqx.filter_jit
def estimated(algorithm, policy, experience):
    return algorithm.estimate(policy, experience)


PROBLEM = Problem(Scaled())


@pytest.fixture(scope="module")
def twin():
    return PolyakPG(**SMALL), *begun(PolyakPG(**SMALL), PROBLEM, 0)


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def by_hand(policy, experience, gamma):
    """Value and GPOMDP gradient of a linear softmax policy, one step after the other, in NumPy."""
    weight, bias = np.asarray(policy.network.trunk.weights[0]), np.asarray(policy.network.trunk.biases[0])
    observation, action = np.asarray(experience.observation), np.asarray(experience.action)
    reward, mask = np.asarray(experience.reward), np.asarray(experience.extras["mask"])
    steps, episodes = reward.shape
    to_go = np.array(
        [[sum(gamma**h * reward[h, i] for h in range(t, steps)) for i in range(episodes)] for t in range(steps)]
    )
    gradient, entropy = [np.zeros_like(weight), np.zeros_like(bias)], []
    for t in range(steps):
        running = [i for i in range(episodes) if mask[t, i]]
        for i in running:
            logits = weight @ observation[t, i] + bias
            probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            entropy.append(-np.sum(probability * np.log(probability)))
            score = np.eye(2)[action[t, i]] - probability
            advantage = to_go[t, i] - np.mean([to_go[t, j] for j in running])
            gradient[0] += np.outer(score, observation[t, i]) * advantage / episodes
            gradient[1] += score * advantage / episodes
    return to_go[0].mean(), np.mean(entropy), gradient


def test_estimates_are_the_formulas(twin):
    _, state, experience = twin
    policy, played = member(state.policies, 0), member(experience, 0)
    algorithm = PolicyGradient(**SMALL)
    found = estimated(algorithm, policy, played)
    value, entropy, gradient = by_hand(policy, played, 0.99)
    assert float(found.value) == pytest.approx(value, rel=1e-5)
    assert float(found.entropy) == pytest.approx(entropy, rel=1e-5)
    assert float(found.objective) == float(found.value)
    np.testing.assert_allclose(found.gradient.network.trunk.weights[0], gradient[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.gradient.network.trunk.biases[0], gradient[1], rtol=1e-3, atol=1e-4)


def test_entropy_enters_value_and_gradient(twin):
    """``tau H`` is added to the objective; its slope at the visited states, found by differences, to the gradient."""
    _, state, experience = twin
    policy, played, tau = member(state.policies, 0), member(experience, 0), 5.0
    policy = eqx.tree_at(lambda p: p.network.trunk.weights[0], policy, jnp.array([[0.5, -1.0, 2.0, 0.3], [0.0] * 4]))
    plain = estimated(PolicyGradient(**SMALL), policy, played)
    bonus = estimated(PolicyGradient(**SMALL, entropy_coefficient=tau), policy, played)
    assert float(bonus.objective - plain.objective) == pytest.approx(tau * float(plain.entropy), rel=1e-4)

    def entropy(change):
        moved = eqx.tree_at(lambda p: p.network.trunk.biases[0], policy, policy.network.trunk.biases[0] + change)
        parameters = episode_likelihood(moved, played)
        return np.mean(np.asarray(moved.head.entropy(parameters))[np.asarray(played.extras["mask"])])

    for i in range(2):
        step = np.zeros(2, np.float32)
        step[i] = 0.05
        slope = (entropy(step) - entropy(-step)) / 0.1
        added = (bonus.gradient.network.trunk.biases[0] - plain.gradient.network.trunk.biases[0])[i]
        assert float(added) == pytest.approx(tau * slope, abs=2e-3)


def test_optimal_baseline_has_the_same_objective(twin):
    _, state, experience = twin
    policy, played = member(state.policies, 0), member(experience, 0)
    one, other = (
        PolicyGradient(**SMALL, baseline=b, entropy_coefficient=0.1).estimate(policy, played)
        for b in ("none", "optimal")
    )
    assert float(one.objective) == pytest.approx(float(other.objective), rel=1e-6)
    assert jax.tree.structure(one.gradient) == jax.tree.structure(other.gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other.gradient))


def test_memory_is_unrolled_from_the_episodes_start():
    """Log-probabilities of the unrolled policy are those that it acted with."""
    algorithm = PolicyGradient(num_episodes=6, horizon=30, memory=5)
    state, experience = begun(algorithm, PROBLEM, 2)

    @jax.jit
    def log_prob_of(policy):
        return policy.head.log_prob(episode_likelihood(policy, experience), experience.record.action)

    log_prob = log_prob_of(state.policy)
    mask = np.asarray(experience.extras["mask"])
    np.testing.assert_allclose(np.asarray(log_prob)[mask], np.asarray(experience.record.log_prob)[mask], atol=1e-5)


def test_the_better_copy_stays_and_the_worse_takes_a_polyak_step(twin):
    algorithm, state, experience = twin
    after, metrics = updated(algorithm, state, experience)
    parts = [by_hand(member(state.policies, i), member(experience, i), 0.99) for i in range(2)]
    objective = [value + 0.01 * entropy for value, entropy, _ in parts]
    better, worse = int(np.argmax(objective)), int(np.argmin(objective))
    for leaf, kept in zip(*(jax.tree.leaves(weights(s.policies)) for s in (state, after)), strict=True):
        np.testing.assert_array_equal(leaf[better], kept[better])
    gap = objective[better] - objective[worse]
    estimate = estimated(
        PolicyGradient(**SMALL, entropy_coefficient=0.01), member(state.policies, worse), member(experience, worse)
    )
    squared = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(estimate.gradient))
    assert float(metrics["gap"]) == pytest.approx(gap, rel=1e-4)
    assert float(after.step.step_size[worse]) == pytest.approx(gap / squared, rel=1e-3)
    expected = (
        member(state.policies, worse).network.trunk.biases[0]
        + gap / squared * estimate.gradient.network.trunk.biases[0]
    )
    np.testing.assert_allclose(after.policies.network.trunk.biases[0][worse], expected, rtol=1e-3, atol=1e-5)
    assert float(after.step.step_size[better]) == 0.0
    chosen = algorithm.policy(after)
    np.testing.assert_array_equal(chosen.network.trunk.biases[0], state.policies.network.trunk.biases[0][better])


def test_equal_copies_on_equal_data_do_not_move(twin):
    """Both gaps are zero; a slack moves both alike (oracle 5)."""
    algorithm, state, experience = twin
    state = eqx.tree_at(lambda s: s.policies, state, jax.tree.map(lambda leaf: leaf[jnp.array([0, 0])], state.policies))
    experience = jax.tree.map(lambda leaf: leaf[jnp.array([0, 0])], experience)
    after, metrics = updated(algorithm, state, experience)
    jax.tree.map(np.testing.assert_array_equal, weights(after.policies), weights(state.policies))
    assert int(metrics["stalled"]) == 1
    assert float(metrics["step_size"]) == 0.0
    moved, metrics = updated(PolyakPG(**SMALL, target_slack=0.5), state, experience)
    assert int(metrics["stalled"]) == 0
    for leaf in jax.tree.leaves(weights(moved.policies)):
        np.testing.assert_array_equal(leaf[0], leaf[1])


def test_rewards_on_another_scale_change_no_step():
    """Powers of two scale without rounding, so the policies are the same to the last bit (oracle 2)."""
    found = {}
    for factor in (1.0, 0.25):
        algorithm = PolyakPG(**SMALL, entropy_coefficient=0.5 * factor, cap=jnp.inf)
        trained = train(algorithm, Problem(Scaled(factor=factor)), iterations=6, seeds=[3])
        found[factor] = jax.tree.leaves(weights(trained.state.policies))
        assert trained.metrics["step_size"].max() > 0
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_constant_added_to_every_reward_changes_no_step(twin):
    """Value and optimum of a task of fixed length shift alike (oracle 3); with exact numbers, and with samples."""
    mdp, logits = random_mdp(jax.random.key(0), 6, 3), jax.random.normal(jax.random.key(1), (6, 3))

    @jax.jit
    def step(model):
        gap = model.start @ value_iteration(model).value - expected_return(model, jax.nn.softmax(logits))
        return polyak_step_size(gap, jnp.sum(policy_gradient(model, logits) ** 2))

    assert float(step(mdp)) == pytest.approx(float(step(mdp.replace(reward=mdp.reward + 3.0))), rel=1e-4)

    _, state, experience = twin
    policy, played = member(state.policies, 0), member(experience, 0)
    reward = jax.random.normal(jax.random.key(2), played.reward.shape)
    long = eqx.tree_at(lambda e: e.extras["mask"], played, jnp.ones_like(played.extras["mask"]))
    estimates = [
        estimated(PolicyGradient(**SMALL), policy, eqx.tree_at(lambda e: e.reward, long, reward + shift))
        for shift in (0.0, 2.0)
    ]
    assert float(estimates[1].value - estimates[0].value) == pytest.approx(2 * (1 - 0.99**30) / 0.01, rel=1e-4)
    for one, other in zip(*(jax.tree.leaves(e.gradient) for e in estimates), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_known_target_is_the_polyak_optimizer(twin):
    """A single copy with a target takes the step of a policy gradient whose optimizer knows the target."""
    _, state, experience = twin
    known = PolyakPG(**SMALL, target=26.0, c=2.0, cap=0.3)
    single = eqx.tree_at(lambda s: s.policies, state, jax.tree.map(lambda leaf: leaf[:1], state.policies))
    single = eqx.tree_at(lambda s: (s.step, s.running_return), single, member_kept((state.step, state.running_return)))
    after, metrics = updated(known, single, member_kept(experience))
    slot = PolicyGradient(**SMALL, entropy_coefficient=0.01, optimizer=Polyak(26.0, 2.0, 0.3), learning_rate=1.0)
    begin = slot.init(PROBLEM, jax.random.key(0))
    begin = eqx.tree_at(lambda s: s.policy, begin, member(state.policies, 0))
    other, _ = updated(slot, begin, member(experience, 0))
    for one, two in zip(jax.tree.leaves(weights(after.policies)), jax.tree.leaves(weights(other.policy)), strict=True):
        np.testing.assert_allclose(one[0], two, rtol=1e-5, atol=1e-7)
    assert 0 < float(metrics["step_size"]) <= 0.3


def member_kept(tree):
    return jax.tree.map(lambda leaf: leaf[:1], tree)


def test_learns_with_a_known_optimum_and_says_when_a_target_is_too_low():
    optimum = (1 - 0.99**200) / 0.01
    algorithm = PolyakPG(num_episodes=10, hidden=(), target=optimum)
    trained = train(algorithm, PROBLEM, iterations=25, sweep={"target": [optimum, 0.5]})
    assert trained.returns[-5:, 0].mean() > trained.returns[0, 0] + 60
    assert trained.policy(0).network.trunk.weights[0].shape == (2, 4)
    np.testing.assert_array_equal(trained.metrics["stalled"][:, 1], np.arange(1, 26))
    assert not trained.metrics["step_size"][:, 1].any()


def test_a_value_that_is_no_number_stops_the_run():
    algorithm = PolyakPG(**SMALL, entropy_coefficient=0.5, cap=jnp.inf)
    with pytest.raises(NonFiniteError, match=r"returned .* NaN or infinite rewards in iteration 1 "):
        train(algorithm, Problem(Scaled(factor=jnp.nan)), iterations=2, seeds=[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": 0.0}, "c is 0.0"),
        ({"cap": 0.0}, "cap is 0.0"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient is"),
        ({"target": float("nan")}, "target is nan"),
        ({"target_slack": -1.0}, "target_slack is -1.0"),
        ({"return_decay": 1.0}, "return_decay is 1.0"),
        ({"num_episodes": 1}, "num_episodes is 1.*baseline 'mean'"),
        ({"baseline": "critic"}, "Unknown baseline 'critic'"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"horizon": 0}, "horizon is 0"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(InputError, match=message):
        PolyakPG(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PolyakPG, {"horizon": None}, "horizon"),
        (PolyakPG, {"architecture": "mlp"}, "architecture"),
        (PolicyGradient, {"optimizer": "adam"}, "optimizer"),
    ],
)
def test_bad_kinds(kind, arguments, message):
    # The hook that checks types in tests speaks first; without it the library does.
    with pytest.raises((InputTypeError, TypeError), match=message):
        kind(**arguments)
