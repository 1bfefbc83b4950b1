import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole, Pendulum
from steersman.errors import InputError, InputTypeError
from steersman.mdp import MDP, expected_return, improvement_bound, occupancy, policy_evaluation
from steersman.policies import Categorical
from steersman.rl.on_policy import TRPO, SinglePath, trust_region_step
from steersman.rl.on_policy.actor_critic import in_rows, likelihood
from steersman.training import train
from steersman.training.natural_gradient import fisher_vector_product

SMALL = {"num_envs": 4, "num_steps": 16, "hidden": (8,), "critic_epochs": 2, "critic_minibatches": 4}
HEAD = Categorical(2)


def collected(algorithm, problem, seed=0):
    state = algorithm.init(problem, jax.random.key(seed))
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), jax.random.key(seed + 1))
    experience, _, _ = jax.jit(lambda s, r: algorithm.collector.collect(problem, algorithm.behaviour(s), r))(
        state, rollout
    )
    return state, experience


@eqx.filter_jit
def update(algorithm, state, experience):
    return algorithm.update(state, experience)


@eqx.filter_jit
def prepared(algorithm, state, experience):
    """The rows of a batch, and the old policy's distribution at them as the networks give it now."""
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
    return rows, likelihood(state.actor, rows)


@pytest.fixture(scope="module")
def cart_pole():
    return collected(TRPO(**SMALL), Problem(DiscreteCartPole()))


@pytest.fixture(scope="module")
def rows(cart_pole):
    return prepared(TRPO(**SMALL), *cart_pole)[0]


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_same_policy(after, before):
    for new, old in zip(jax.tree.leaves(after.actor), jax.tree.leaves(before.actor), strict=True):
        np.testing.assert_array_equal(new, old)


# ---- the exact case


@jax.jit
def exact_update(mdp, logits, baseline):
    """One update of a softmax table with exact advantages and occupancy."""
    pi = jax.nn.softmax(logits, axis=-1)
    value, q_value = policy_evaluation(mdp, pi)
    advantage = q_value - value[:, None] + baseline[:, None]
    d = occupancy(mdp, pi)

    def model(table):
        return jnp.sum(d * jnp.sum(jax.nn.softmax(table, axis=-1) * advantage, axis=-1))

    fisher = fisher_vector_product(lambda table: table, logits, HEAD, weight=d)
    return trust_region_step(lambda table: table, logits, HEAD, model, fisher, 0.01, weight=d)


def two_states():
    transition = [[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]]]
    return MDP(transition, [[1.0, 0.0], [0.0, 2.0]], 0.9, [0.5, 0.5]), jnp.asarray([[0.5, 0.0], [0.0, 0.5]])


def test_two_state_model_has_the_printed_update():
    with jax.enable_x64(True):
        mdp, logits = two_states()
        old = jax.nn.softmax(logits, axis=-1)
        step = exact_update(mdp, logits, jnp.zeros(2))
        new = jax.nn.softmax(step.params, axis=-1)
        expected = np.asarray(logits) + 0.161021 * np.array([[0.228324, -0.228324], [-1.232865, 1.232865]])
        np.testing.assert_allclose(step.params, expected, atol=3e-6)
        np.testing.assert_allclose(step.quadratic_form, 0.771373, atol=2e-5)
        np.testing.assert_allclose((step.kl, step.max_kl), (0.009636, 0.017832), atol=1e-6)
        assert (bool(step.accepted), int(step.line_search_trials), float(step.step_scale)) == (True, 1, 1.0)
        # The surrogate is weighted by the normalized occupancy, the paper's local model by the unnormalized one.
        local_model = expected_return(mdp, old) + 10.0 * step.surrogate_improvement
        np.testing.assert_allclose(local_model, 10.655116, atol=1e-4)
        np.testing.assert_allclose(expected_return(mdp, new), 10.717155, atol=1e-4)
        bound = improvement_bound(mdp, old, new)
        np.testing.assert_allclose(bound.lower_bound, 0.8025, atol=2e-3)
        np.testing.assert_allclose(step.predicted_improvement, np.sqrt(0.02 * 0.771373), rtol=1e-4)


def test_exact_update_ignores_the_scale_of_the_reward_and_any_baseline():
    with jax.enable_x64(True):
        mdp, logits = two_states()
        plain = exact_update(mdp, logits, jnp.zeros(2)).params
        scaled = exact_update(mdp.replace(reward=1000 * mdp.reward), logits, jnp.zeros(2)).params
        shifted = exact_update(mdp, logits, jnp.asarray([300.0, -70.0])).params
        np.testing.assert_allclose(scaled, plain, atol=1e-9)
        np.testing.assert_allclose(shifted, plain, atol=1e-9)


# ---- one update from samples


def test_single_path_gradient_is_the_policy_gradient(cart_pole, rows):
    state, experience = cart_pole
    model = SinglePath().local_model(TRPO(**SMALL), state, experience, rows, None)
    advantage = np.asarray(rows.advantage)
    advantage = (advantage - advantage.mean()) / advantage.std()

    def log_likelihood(network):
        log_prob = jax.nn.log_softmax(network.trunk(rows.features.vector))
        return jnp.mean(advantage * jnp.take_along_axis(log_prob, rows.action[:, None], axis=1)[:, 0])

    @jax.jit
    def both(network):
        return jax.grad(lambda n: model(n.trunk(rows.features.vector)))(network), jax.grad(log_likelihood)(network)

    gradient, expected = both(state.actor.network)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-3, atol=1e-6)


def test_reported_divergence_and_improvement_are_those_of_the_new_policy(cart_pole, rows):
    state, experience = cart_pole
    after, metrics = update(TRPO(**SMALL), state, experience)
    assert bool(metrics["accepted"])
    action = np.asarray(rows.action)
    log_probs = jax.jit(lambda network: jax.nn.log_softmax(network.trunk(rows.features.vector)))
    old, new = (np.asarray(log_probs(s.actor.network)) for s in (state, after))
    kl = np.sum(np.exp(old) * (old - new), axis=1)
    np.testing.assert_allclose((metrics["kl"], metrics["max_kl"]), (kl.mean(), kl.max()), rtol=1e-3)
    assert 0 < kl.mean() <= 0.01
    advantage = np.asarray(rows.advantage)
    advantage = (advantage - advantage.mean()) / advantage.std()
    picked = np.arange(len(action)), action
    gain = np.mean((np.exp(new[picked] - old[picked]) - 1.0) * advantage)
    np.testing.assert_allclose(metrics["surrogate_improvement"], gain, rtol=1e-3)
    # A short step gains about what its gradient promises.
    np.testing.assert_allclose(metrics["predicted_improvement"], gain, rtol=0.1)
    assert int(after.samples) == 64


class Misleading(SinglePath):
    """A local model whose gradient points downhill, so that every step makes it smaller."""

    def local_model(self, algorithm, state, experience, rows, scaler):
        model = super().local_model(algorithm, state, experience, rows, scaler)

        def misleading(parameters):
            value = model(parameters)
            return value - 2.0 * jax.lax.stop_gradient(value)

        return misleading


def test_old_policy_stays_where_every_step_is_rejected(cart_pole):
    state, experience = cart_pole
    after, metrics = update(TRPO(**SMALL, sampling=Misleading()), state, experience)
    assert_same_policy(after, state)
    assert not bool(metrics["accepted"])
    assert int(metrics["line_search_trials"]) == 10
    assert float(metrics["quadratic_form"]) > 0
    for name in ("kl", "max_kl", "surrogate_improvement", "predicted_improvement", "step_scale"):
        assert float(metrics[name]) == 0.0
    # The critic learns all the same.
    assert float(jnp.max(jnp.abs(flat(after.critic) - flat(state.critic)))) > 0


def test_advantages_that_do_not_vary_skip_the_update(cart_pole):
    state, experience = cart_pole
    nothing = eqx.tree_at(
        lambda s: (s.critic.weights[-1], s.critic.biases[-1]), state, replace_fn=lambda leaf: jnp.zeros_like(leaf)
    )
    flat_reward = eqx.tree_at(lambda e: e.reward, experience, jnp.zeros_like(experience.reward))
    after, metrics = update(TRPO(**SMALL), nothing, flat_reward)
    assert_same_policy(after, nothing)
    assert bool(metrics["no_gradient"])
    assert not bool(metrics["nonpositive_curvature"])
    assert int(metrics["line_search_trials"]) == 0
    assert all(np.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("where", ["reward", "log_prob"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_leave_the_policy_alone(cart_pole, where, value):
    state, experience = cart_pole

    def place(e):
        return e.reward if where == "reward" else e.record.log_prob

    broken = eqx.tree_at(place, experience, replace_fn=lambda leaf: leaf.at[3, 1].set(value))
    after, metrics = update(TRPO(**SMALL), state, broken)
    # An infinite log-probability is a ratio of zero: one sample that has no say. All else must be refused.
    if not (where == "log_prob" and value == np.inf):
        assert_same_policy(after, state)
        assert not bool(metrics["accepted"])
    assert bool(jnp.all(jnp.isfinite(flat((after.actor.network, after.actor.free)))))


def test_candidates_that_rule_out_what_the_old_policy_does_are_rejected():
    def network(p):
        return jnp.stack([p, jnp.where(p > 0, -jnp.inf, 0.0)])[None]

    fisher = fisher_vector_product(lambda p: jnp.stack([p, jnp.zeros_like(p)])[None], jnp.zeros(()), HEAD)
    step = trust_region_step(network, jnp.zeros(()), HEAD, lambda q: jax.nn.softmax(q)[0, 0], fisher, 1e6)
    assert not bool(step.accepted)
    assert float(step.params) == 0.0
    assert int(step.line_search_trials) == 10


def test_a_fisher_product_that_is_not_positive_is_reported():
    step = trust_region_step(lambda p: p, jnp.zeros((1, 2)), HEAD, lambda q: q[0, 0], lambda v: -v, 0.01)
    assert bool(step.nonpositive_curvature)
    assert not bool(step.accepted)
    assert not bool(step.no_gradient)
    assert int(step.line_search_trials) == 0
    np.testing.assert_array_equal(step.params, np.zeros((1, 2)))


def test_states_of_weight_zero_do_not_count():
    """Two real states and one of weight zero, at which the policy moves a lot."""
    weight = jnp.asarray([1.0, 1.0, 0.0])
    features = jnp.asarray([[1.0], [-0.5], [100.0]])

    def network(w, features=features):
        return jnp.concatenate([jnp.zeros_like(features), features * w], axis=-1)

    def step(features, weight):
        fisher = fisher_vector_product(lambda w: network(w, features), jnp.zeros(1), HEAD, weight=weight)
        return trust_region_step(
            lambda w: network(w, features), jnp.zeros(1), HEAD, lambda q: q[0, 1], fisher, 0.01, weight=weight
        )

    some, both = step(features, weight), step(features[:2], None)
    for name in ("params", "kl", "max_kl"):
        np.testing.assert_allclose(getattr(some, name), getattr(both, name), rtol=1e-5)
    assert float(some.max_kl) < 0.03


def test_memory_and_continuous_actions_under_all_normalizers():
    """The divergence is that of the unrolled memory, and Fisher products may be taken over half of the sequences."""
    algorithm = TRPO(
        **SMALL, memory=6, normalize_observations=True, normalize_rewards=True, fisher_fraction=0.5, target_kl=0.02
    )
    problem = Problem(Pendulum().environment())
    state, experience = collected(algorithm, problem)
    both = eqx.filter_jit(lambda *given: (*update(*given), *prepared(*given)))
    after, metrics, rows, unchanged = both(algorithm, state, experience)
    assert bool(metrics["accepted"])
    assert all(np.isfinite(value).all() for value in metrics.values())
    np.testing.assert_allclose(unchanged.mean, rows.parameters.mean, atol=1e-5)

    step, vector = jax.jit(lambda network, x, carry: jax.vmap(network)(x, carry)), rows.features.vector

    def unroll(network):
        carry, means = jnp.zeros((4, 6)), []
        for t in range(16):
            mean, carry = step(network, vector[:, t], carry)
            means.append(np.asarray(mean))
        return np.stack(means, axis=1)

    old, new = (unroll(x.actor.network) for x in (state, after))
    s, z = (np.asarray(x.actor.free) for x in (state, after))
    kl = np.sum(z - s + 0.5 * (np.exp(2 * (s - z)) + ((old - new) / np.exp(z)) ** 2 - 1.0), axis=-1)
    np.testing.assert_allclose(metrics["kl"], kl.mean(), rtol=1e-3)
    assert kl.mean() <= 0.02 * 1.001
    assert np.abs(after.actor.preprocess.standardize.mean).max() > 0


def test_side_by_side_is_one_by_one(cart_pole):
    state, experience = cart_pole
    algorithm, budgets = TRPO(**SMALL), jnp.asarray([0.001, 0.05])
    axes = eqx.tree_at(lambda a: a.target_kl, jax.tree.map(lambda _: None, algorithm), 0, is_leaf=lambda x: x is None)
    swept = eqx.tree_at(lambda a: a.target_kl, algorithm, budgets)
    together, metrics = eqx.filter_jit(eqx.filter_vmap(update, in_axes=(axes, None, None)))(swept, state, experience)
    for i, budget in enumerate(budgets):
        alone, expected = update(TRPO(**SMALL, target_kl=float(budget)), state, experience)
        for batched, single in zip(jax.tree.leaves(together.learned), jax.tree.leaves(alone.learned), strict=True):
            np.testing.assert_allclose(batched[i], single, atol=1e-4)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=2e-3, atol=1e-6)
    assert float(metrics["kl"][1]) > 10 * float(metrics["kl"][0])


# ---- training


@pytest.fixture(scope="module")
def trained():
    algorithm = TRPO(hidden=(32,), critic_epochs=4)
    return train(algorithm, Problem(DiscreteCartPole()), iterations=10, seeds=2, sweep={"target_kl": [0.003, 0.03]})


def test_learns_to_balance_within_few_iterations(trained):
    returns = trained.returns[:, 2:]
    assert np.nanmean(returns[-3:]) > np.nanmean(returns[:2]) + 80


def test_accepted_updates_never_leave_the_trust_region(trained):
    bound = np.array([0.003, 0.003, 0.03, 0.03]) * (1 + 1e-3)
    kl, accepted = trained.metrics["kl"], trained.metrics["accepted"].astype(bool)
    assert accepted.mean() > 0.9
    assert (kl <= bound).all()
    assert (kl[accepted] > 0).all()
    assert (kl[~accepted] == 0).all()
    assert (trained.metrics["surrogate_improvement"][accepted] > 0).all()
    np.testing.assert_array_equal(trained.state.samples, 10 * 2048)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_kl": 0.0}, r"target_kl is 0\.0"),
        ({"target_kl": -0.01}, "target_kl is -0.0"),
        ({"target_kl": float("nan")}, "target_kl is nan"),
        ({"cg_iterations": 0}, "cg_iterations is 0"),
        ({"damping": -1.0}, r"damping is -1\.0"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"fisher_fraction": 0.0}, r"fisher_fraction is 0\.0"),
        ({"fisher_fraction": 1.5}, r"fisher_fraction is 1\.5"),
        ({"line_search_shrink": 1.0}, r"line_search_shrink is 1\.0"),
        ({"line_search_trials": 0}, "line_search_trials is 0"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate is"),
        ({"critic_epochs": 0}, "critic_epochs is 0"),
        ({"critic_minibatches": 7}, r"critic_minibatches is 7.*divisor of num_envs \* num_steps = 2048"),
        ({"gamma": 1.5}, r"gamma is 1\.5"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"lam": -0.1}, "lam is"),
    ],
)
def test_bad_hyperparameters(settings, message):
    with pytest.raises(InputError, match=message):
        TRPO(**settings)


def test_sampling_must_be_one():
    with pytest.raises((InputTypeError, TypeError)):
        TRPO(sampling="vine")


def test_sweeps_are_checked_before_anything_runs():
    with pytest.raises(InputError, match="target_kl is"):
        train(TRPO(**SMALL), Problem(DiscreteCartPole()), iterations=1, sweep={"target_kl": [0.01, -1.0]})


def test_vector_rewards_are_refused(cart_pole):
    state, experience = cart_pole
    vector = eqx.tree_at(lambda e: e.reward, experience, experience.reward[..., None])
    with pytest.raises(InputError, match="reward has shape"):
        TRPO(**SMALL).update(state, vector)
