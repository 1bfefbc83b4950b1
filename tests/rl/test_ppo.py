import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole, Pendulum
from steersman.errors import InputError, InputTypeError, require_count
from steersman.policies import GaussianParameters
from steersman.rl.on_policy import PPO, SPO
from steersman.rl.on_policy.actor_critic import in_rows
from steersman.rl.surrogates import AdaptiveKL, Clip, FixedKL, QuadraticRatio, Unclipped

SMALL = {"num_envs": 4, "num_steps": 16, "hidden": (8,), "learning_rate": 1e-2}


def collected(algorithm, problem, seed=0):
    state = algorithm.init(problem, jax.random.key(seed))
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), jax.random.key(seed + 1))
    experience, _, _ = jax.jit(lambda s, r: algorithm.collector.collect(problem, algorithm.behaviour(s), r))(
        state, rollout
    )
    return state, experience


@pytest.fixture(scope="module")
def cart_pole():
    problem = Problem(DiscreteCartPole())
    return (problem, *collected(PPO(**SMALL), problem))


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_first_gradient_is_the_policy_gradient(cart_pole):
    """At the old policy the ratio is one, so every surrogate's gradient is the policy gradient (oracle 1)."""
    _, state, experience = cart_pole
    algorithm = PPO(**SMALL, minibatches=1, value_coefficient=0.0)
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
    advantage = np.asarray(rows.advantage)
    advantage = (advantage - advantage.mean()) / advantage.std()
    rows = rows._replace(advantage=jnp.asarray(advantage))

    def log_likelihood(network):
        logits = network.trunk(rows.features.vector)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.action[:, None], axis=1)[:, 0]
        return -jnp.mean(jnp.asarray(advantage) * chosen)

    expected = flat(jax.grad(log_likelihood)(state.actor.network))
    for surrogate in (Clip(0.2), Clip(0.01), Unclipped(), QuadraticRatio(0.2), FixedKL(1.0), AdaptiveKL()):
        chosen = PPO(**SMALL, minibatches=1, value_coefficient=0.0, surrogate=surrogate)
        gradient = jax.grad(
            lambda learned, chosen=chosen: chosen.loss(learned, state, rows, chosen.surrogate.init())[0]
        )(state.learned)
        np.testing.assert_allclose(flat(gradient.network), expected, rtol=1e-3, atol=1e-6)


def test_one_full_batch_is_one_adam_step_of_a2c(cart_pole):
    """K = 1 and a single minibatch with an unbounded clip is A2C (oracle 2)."""
    _, state, experience = cart_pole
    settings = {**SMALL, "epochs": 1, "minibatches": 1, "normalize_advantages": False, "max_gradient_norm": 1e9}
    algorithm = PPO(**settings, surrogate=Clip(1e6), value_coefficient=0.0)
    after, _ = jax.jit(lambda s, e: algorithm.update(s, e))(state, experience)
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])

    def a2c(network):
        log_prob = jax.nn.log_softmax(network.trunk(rows.features.vector))
        return -jnp.mean(rows.advantage * jnp.take_along_axis(log_prob, rows.action[:, None], axis=1)[:, 0])

    adam = optax.adam(1e-2, eps=1e-5)
    network = state.actor.network
    updates, _ = adam.update(jax.grad(a2c)(network), adam.init(network))
    expected = optax.apply_updates(network, updates)
    np.testing.assert_allclose(flat(after.actor.network), flat(expected), atol=2e-5)
    np.testing.assert_array_equal(flat(after.critic), flat(state.critic))


def test_ratio_is_exactly_one_at_the_first_minibatch(cart_pole):
    _, state, experience = cart_pole
    rows = in_rows(state.actor, PPO(**SMALL).estimate(state, experience)[0])
    parameters = state.actor.from_features(rows.features, ())[0]
    np.testing.assert_allclose(state.actor.head.log_prob(parameters, rows.action), rows.log_prob, atol=1e-6)


def test_truncation_bootstraps_and_termination_does_not(cart_pole):
    """Merging the two flags changes the advantages, by gamma times the value of the final observation."""
    _, state, experience = cart_pole
    algorithm = PPO(**SMALL)
    off = jnp.zeros_like(experience.terminated)
    on = off.at[7].set(True)
    cut = eqx.tree_at(lambda e: (e.terminated, e.truncated), experience, (off, on))
    ended = eqx.tree_at(lambda e: (e.terminated, e.truncated), experience, (on, off))
    advantage_cut = algorithm.estimate(state, cut)[0].advantage
    advantage_ended = algorithm.estimate(state, ended)[0].advantage
    final = state.critic(experience.next_observation[7])[..., 0]
    np.testing.assert_allclose((advantage_cut - advantage_ended)[7], 0.99 * final, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(advantage_cut[8:], advantage_ended[8:])


def test_observation_statistics_change_only_after_the_update():
    problem = Problem(Pendulum().environment())
    algorithm = PPO(**SMALL, normalize_observations=True, normalize_rewards=True, minibatches=4)
    state, experience = collected(algorithm, problem)
    after, metrics = jax.jit(lambda s, e: algorithm.update(s, e))(state, experience)
    observed = np.asarray(experience.observation).reshape(-1, 3)
    np.testing.assert_allclose(after.actor.preprocess.standardize.mean, observed.mean(0), atol=1e-5)
    np.testing.assert_allclose(state.actor.preprocess.standardize.mean, 0.0)
    assert all(np.isfinite(value).all() for value in metrics.values())


def test_adaptive_coefficient_follows_the_divergence():
    surrogate = AdaptiveKL(target=0.01, initial_beta=1.0)
    betas = [float(surrogate.adapt(jnp.asarray(1.0), jnp.asarray(d))) for d in (0.02, 0.012, 0.006, 0.015)]
    assert betas == [2.0, 1.0, 0.5, 1.0]


def test_learns_cart_pole_with_a_memory_and_without():
    from steersman.training import train

    problem = Problem(DiscreteCartPole())
    for memory in (0, 16):
        algorithm = PPO(num_envs=16, num_steps=64, memory=memory, minibatches=4, epochs=4, learning_rate=3e-3)
        trained = train(algorithm, problem, iterations=30)
        first, last = np.nanmean(trained.returns[:3]), np.nanmean(trained.returns[-3:])
        assert last > first + 40, (memory, first, last)


def test_action_masks_rule_actions_out():
    import gymnasium

    from steersman.envs import Environment

    class Masked(Environment):
        def reset_env(self, key, params):
            observation = {"value": jnp.zeros(2), "action_mask": jnp.asarray([True, False, True])}
            return observation, jnp.zeros((), jnp.int32)

        def step_env(self, key, state, action, params):
            observation, _ = self.reset_env(key, params)
            return observation, state + 1, jnp.where(action == 1, -100.0, 1.0), jnp.asarray(False), {}

        def observation_space(self, params):
            box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
            return gymnasium.spaces.Dict({"value": box, "action_mask": gymnasium.spaces.MultiBinary(3)})

        def action_space(self, params):
            return gymnasium.spaces.Discrete(3)

    algorithm = PPO(**SMALL, minibatches=2, epochs=2)
    state, experience = collected(algorithm, Problem(Masked()))
    assert float(experience.reward.min()) == 1.0
    after, metrics = jax.jit(lambda s, e: algorithm.update(s, e))(state, experience)
    assert all(np.isfinite(v).all() for v in metrics.values())
    assert bool(jnp.all(jnp.isfinite(flat(after.learned))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"minibatches": 7}, r"minibatches is 7.*divisor of num_envs \* num_steps = 2048"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"gamma": 1.5}, r"gamma is 1\.5"),
        ({"lam": -0.1}, "lam is"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient is"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm is"),
        ({"value_clip": 0.0}, "value_clip is"),
        ({"reward_scale": -1.0}, "reward_scale is"),
        ({"activation": "tahn"}, "tanh"),
        ({"memory": 8, "minibatches": 32}, "divisor of num_envs = 16"),
    ],
)
def test_bad_hyperparameters(settings, message):
    def make():
        algorithm = PPO(**settings)
        return algorithm.init(Problem(DiscreteCartPole()), jax.random.key(0))

    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("kind", [Clip, QuadraticRatio])
@pytest.mark.parametrize("epsilon", [0.0, -0.2, float("nan")])
def test_bad_epsilon(kind, epsilon):
    with pytest.raises(InputError, match="epsilon is"):
        kind(epsilon)


def test_counts_must_be_whole_numbers():
    with pytest.raises(InputTypeError, match=r"epochs is 2\.5"):
        require_count("epochs", 2.5)


def test_vector_rewards_are_refused(cart_pole):
    _, state, experience = cart_pole
    vector = eqx.tree_at(lambda e: e.reward, experience, experience.reward[..., None])
    with pytest.raises(InputError, match="reward has shape"):
        PPO(**SMALL).estimate(state, vector)


def test_zero_advantages_leave_the_policy_alone(cart_pole):
    """A minibatch whose advantages are all equal is centred, not divided by nearly nothing."""
    _, state, experience = cart_pole
    algorithm = PPO(**SMALL, minibatches=1, value_coefficient=0.0)
    # Nothing is earned, and a critic of zeros expects nothing: every advantage is the same.
    silent = eqx.tree_at(lambda e: e.reward, experience, jnp.zeros_like(experience.reward))
    state = eqx.tree_at(lambda s: s.critic, state, jax.tree.map(jnp.zeros_like, state.critic))
    after, metrics = jax.jit(lambda s, e: algorithm.update(s, e))(state, silent)
    assert all(np.isfinite(value).all() for value in metrics.values())
    np.testing.assert_allclose(flat(after.actor.network), flat(state.actor.network), atol=1e-6)


def test_spo_differs_from_ppo_in_the_surrogate_alone(cart_pole):
    _, state, experience = cart_pole
    same = {"value_clip": None, "minibatches": 1, **SMALL}
    rows = in_rows(state.actor, PPO(**same).estimate(state, experience)[0])
    moved = jax.tree.map(lambda p: p + 0.3 * jnp.sign(p + 0.01), state.learned)
    loss_ppo, (_, parts_ppo) = PPO(**same).loss(moved, state, rows, ())
    loss_spo, (_, parts_spo) = SPO(**same).loss(moved, state, rows, ())
    assert float(parts_ppo["value_loss"]) == float(parts_spo["value_loss"])
    advantage = np.asarray(rows.advantage)
    log_prob = jax.nn.log_softmax(moved.network.trunk(rows.features.vector))
    chosen = np.asarray(jnp.take_along_axis(log_prob, rows.action[:, None], axis=1)[:, 0])
    ratio = np.exp(chosen - np.asarray(rows.log_prob))
    expected = -np.mean(ratio * advantage - np.abs(advantage) * (ratio - 1) ** 2 / 0.4)
    assert float(parts_spo["policy_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss_spo) != float(loss_ppo)


def test_stored_parameters_are_those_of_the_behaviour_policy():
    problem = Problem(Pendulum().environment())
    algorithm = PPO(**SMALL)
    state, experience = collected(algorithm, problem)
    assert isinstance(experience.record.parameters, GaussianParameters)
    mean = state.actor.network.trunk(experience.observation)
    np.testing.assert_allclose(experience.record.parameters.mean, mean, atol=1e-5)
    # What the environment was sent is the sample, clipped and mapped from [-1, 1] onto the torque's bounds.
    np.testing.assert_allclose(experience.action, 2.0 * np.clip(experience.record.action, -1, 1), atol=1e-6)
