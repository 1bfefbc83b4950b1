import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control.linear_policy import evaluate_linear_policy
from steersman.envs import Environment, Problem
from steersman.envs.dynamics import DiscreteCartPole, Pendulum
from steersman.errors import InputError
from steersman.rl.alternatives import Alternatives
from steersman.rl.alternatives_from_model import ModelActions, ModelStates
from steersman.rl.alternatives_from_q import QActions
from steersman.rl.on_policy.actor_critic import in_rows
from steersman.rl.on_policy.mbma import MBMA
from steersman.rl.on_policy.ppo import PPO
from steersman.training.dynamics_model import (
    EnsembleLearner,
    KnownModel,
    LinearQuadraticModel,
    Prediction,
    TransitionModel,
    bootstrapped_return,
    rollout_model,
)
from steersman.training.replay import Replay, Transition

SMALL = {"num_envs": 4, "num_steps": 16, "hidden": (8,), "epochs": 2, "minibatches": 4, "learning_rate": 1e-2}
TINY = EnsembleLearner(hidden=(8,), epochs=2, batches=3, batch_size=16, holdout_rows=8)

# A linear-quadratic task with known values.
A, B = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.1]])
Q, R, K = np.diag([1.0, 0.1]), np.array([[0.01]]), np.array([[1.0, 1.2]])


class TruePendulum(TransitionModel):
    """The swing-up's own equations, on its observations."""

    def __call__(self, observation, action, key):
        problem = Pendulum()
        inner = observation.reshape(-1, 3)
        state = jnp.stack([jnp.arctan2(inner[:, 1], inner[:, 0]), inner[:, 2]], axis=1)
        torque = action.reshape(-1, 1)
        following = jax.vmap(lambda x, u: problem.dynamics(x, u, jnp.zeros(1)))(state, torque)
        reward = -jax.vmap(problem.stage_cost)(state, torque).reshape(action.shape[:-1])
        return Prediction(jax.vmap(problem.observe)(following).reshape(observation.shape), reward, 0.0 * reward)


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def proposals():
    """One batch under a wide policy and uneven observation statistics, and what three sources say about it."""
    problem = Problem(Pendulum().environment())
    known = {"actions": 4, "learner": KnownModel(TruePendulum()), "capacity": 100}
    sources = {
        "one step": ModelActions(horizon=1, **known),
        "states": ModelStates(horizon=1, **known),
        "learned": ModelActions(actions=3, horizon=3, learner=TINY, capacity=200),
        "q": QActions(actions=3, hidden=(8,), epochs=2),
    }
    settings = {**SMALL, "reward_scale": 0.1, "initial_log_std": 0.3, "normalize_observations": True, "gamma": 0.9}

    @jax.jit
    def everything(key):
        algorithm = PPO(**settings)
        state = algorithm.init(problem, key)
        standardize = state.actor.preprocess.standardize
        uneven = (jnp.asarray([0.2, -0.1, 1.0]), jnp.asarray([1.0, 2.0, 0.3]))
        state = eqx.tree_at(
            lambda s: (s.actor.preprocess.standardize.mean, s.actor.preprocess.standardize.inverse_std), state, uneven
        )
        assert standardize is not None
        rollout = algorithm.collector.init(problem, state.actor, key)
        experience, _, _ = algorithm.collector.collect(problem, state.actor, rollout)
        batch, scaler = algorithm.estimate(state, experience)
        found = {}
        for name, source in sources.items():
            proposed = MBMA(**settings, alternatives=source)
            carried = proposed.init(problem, key).method
            rows, _, metrics = proposed.prepare(state, carried, experience, batch, scaler)
            found[name] = (rows.alternatives, metrics)
        return state, experience, batch, found

    state, experience, batch, found = everything(jax.random.key(3))
    return problem, PPO(**settings), state, experience, batch, found


def test_with_one_action_it_is_ppo_bit_for_bit(proposals):
    problem, plain, _, experience, _, _ = proposals

    def learned(algorithm):
        state = algorithm.init(problem, jax.random.key(3))
        return eqx.filter_jit(algorithm.update)(state, experience)

    after, metrics = learned(plain)
    settings = {name: getattr(plain, name) for name in (*SMALL, "reward_scale", "normalize_observations", "gamma")}
    settings["initial_log_std"] = 0.3
    same, same_metrics = learned(MBMA(**settings, alternatives=ModelActions(actions=1)))
    np.testing.assert_array_equal(flat(same.learned), flat(after.learned))
    assert same_metrics.keys() == metrics.keys()
    for source in (ModelStates(actions=1), QActions(actions=1)):
        assert source.init(problem, after.actor, jax.random.key(0)) == ()
        assert source.propose((), experience, None, after.actor, None, None, abs) == (None, (), {})
    more, more_metrics = learned(MBMA(**settings, alternatives=ModelActions(actions=2, horizon=2, learner=TINY)))
    assert not np.array_equal(flat(more.learned), flat(after.learned))
    assert int(more.method.alternatives.replay.size) == 64
    assert all(np.isfinite(value) for value in more_metrics.values())


def test_alternatives_are_scored_as_the_environment_would(proposals):
    """With a model that is right, one step and the critic: the environment's own step from the same states."""
    _, _, state, experience, batch, found = proposals
    more, metrics = found["one step"]
    observation = experience.observation.reshape(-1, 3)
    environment = Pendulum().environment()
    sample = np.asarray(more.action)
    assert sample.shape == (64, 3, 1)
    assert (np.abs(sample) > 1).any(), "some lie outside the box"
    # What is sent is clipped to the box of 2 N m; the environment is started where each observation was made.
    _, first = environment.reset(jax.random.key(0))
    angle, rate = jnp.arctan2(observation[:, 1], observation[:, 0]), observation[:, 2]

    def step(angle, rate, torque):
        at = eqx.tree_at(lambda s: s.x, first, jnp.stack([angle, rate]))
        after, _, reward, _, _, _ = environment.step(jax.random.key(0), at, torque)
        return after, reward

    torque = 2.0 * np.clip(sample, -1, 1)
    after, reward = jax.vmap(lambda a, r, us: jax.vmap(lambda u: step(a, r, u))(us))(angle, rate, torque)
    standardize = state.actor.preprocess.standardize

    def value(o):
        return np.asarray(state.critic(jnp.clip((o - standardize.mean) * standardize.inverse_std, -10, 10)))[..., 0]

    expected = 0.1 * reward + 0.9 * value(after) - value(observation)[:, None]
    np.testing.assert_allclose(more.advantage, expected, atol=2e-4)
    mean, std = (np.asarray(part).reshape(64, 1) for part in (batch.parameters.mean, jnp.exp(batch.parameters.log_std)))
    density = -0.5 * ((sample[..., 0] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(more.log_prob, density, atol=1e-4)
    assert float(metrics["model_clipped_share"]) == 0.0


def test_samples_are_drawn_from_the_behaviour_policy(proposals):
    _, _, _, _, batch, found = proposals
    more, _ = found["one step"]
    mean, std = (
        np.asarray(part).reshape(64, 1, 1) for part in (batch.parameters.mean, jnp.exp(batch.parameters.log_std))
    )
    noise = ((np.asarray(more.action) - mean) / std).ravel()
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert noise.var() == pytest.approx(1.0, abs=4 * np.sqrt(2 / noise.size))
    assert len(np.unique(noise)) == noise.size


def test_simulated_states_follow_the_executed_action(proposals):
    """With a model that is right, the first simulated state is the one that was visited next."""
    _, _, state, experience, _, found = proposals
    more, _ = found["states"]
    standardize = state.actor.preprocess.standardize
    following = np.asarray(experience.next_observation).reshape(-1, 3)
    expected = np.clip((following - standardize.mean) * standardize.inverse_std, -10, 10)
    np.testing.assert_allclose(more.features.vector[:, 0], expected, atol=1e-3)
    # Each later one follows from the action drawn at the one before.
    model = TruePendulum()
    raw = np.asarray(more.features.vector) / np.asarray(standardize.inverse_std) + np.asarray(standardize.mean)
    torque = 2.0 * jnp.clip(more.action, -1, 1)
    step = model(jnp.asarray(raw), torque, jax.random.key(0))
    np.testing.assert_allclose(raw[:, 1:], step.next_observation[:, :-1], atol=1e-3)

    def value(o):
        return np.asarray(state.critic(jnp.clip((o - standardize.mean) * standardize.inverse_std, -10, 10)))[..., 0]

    expected = 0.1 * step.reward + 0.9 * value(step.next_observation) - value(raw)
    np.testing.assert_allclose(more.advantage, expected, atol=1e-3)


def test_every_source_proposes_in_rows(proposals):
    _, _, _, _, _, found = proposals
    for name, count in (("learned", 2), ("q", 2)):
        more, metrics = found[name]
        assert more.action.shape == (64, count, 1)
        assert more.log_prob.shape == more.advantage.shape == (64, count)
        assert all(np.isfinite(value) for value in metrics.values())
        assert bool(jnp.all(jnp.isfinite(more.advantage)))


def test_samples_are_averaged_within_states_and_the_critic_sees_none(proposals):
    _, algorithm, state, _, batch, found = proposals
    rows = in_rows(state.actor, batch)
    plain, (_, shown) = algorithm.loss(state.learned, state, rows, ())
    copies = Alternatives(
        *(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3, axis=1), part) for part in
          (rows.action, rows.log_prob, rows.parameters, rows.advantage))
    )  # fmt: skip
    same, (_, same_shown) = algorithm.loss(state.learned, state, rows._replace(alternatives=copies), ())
    assert float(same) == pytest.approx(float(plain), rel=1e-5)
    more, _ = found["one step"]
    moved = jax.tree.map(lambda p: p + 0.05 * jnp.sign(p + 0.01), state.learned)
    _, (drawn, other) = algorithm.loss(moved, state, rows._replace(alternatives=more), ())
    assert drawn.log_ratio.shape == (64, 4)
    actor = state.with_learned(moved).actor
    mean = np.asarray(actor.network.trunk(rows.features.vector))[..., 0]
    std = float(jnp.exp(actor.free[0]))
    action = np.concatenate([np.asarray(rows.action)[:, None, 0], np.asarray(more.action)[..., 0]], axis=1)
    old = np.concatenate([np.asarray(rows.log_prob)[:, None], more.log_prob], axis=1)
    advantage = np.concatenate([np.asarray(rows.advantage)[:, None], more.advantage], axis=1)
    ratio = np.exp(-0.5 * ((action - mean[:, None]) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi) - old)
    each = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    assert float(other["policy_loss"]) == pytest.approx(float(np.mean([np.mean(row) for row in each])), rel=1e-3)
    _, (_, without) = algorithm.loss(moved, state, rows, ())
    assert float(other["value_loss"]) == float(without["value_loss"])
    assert float(shown["value_loss"]) == float(same_shown["value_loss"])


def test_exact_model_and_value_leave_no_bias_at_any_horizon():
    """The mean of many rollouts is the action value from the Lyapunov equation."""
    exact = evaluate_linear_policy(A, B, Q, R, K, action_covariance=[[0.25]], noise=1e-3 * np.eye(2), discount=0.95)
    model = LinearQuadraticModel.from_costs(A, B, Q, R, np.sqrt(1e-3) * np.eye(2))
    x, u, count = jnp.asarray([0.8, -0.6]), jnp.asarray([0.9]), 40_000

    def policy(x, carry, key):
        return -x @ K.T.astype(np.float32) + 0.5 * jax.random.normal(key, (*x.shape[:-1], 1)), carry

    @eqx.filter_jit
    def estimates(horizon, key):
        start = jnp.broadcast_to(x, (count, 2)), jnp.broadcast_to(u, (count, 1))
        rollout = rollout_model(model, policy, *start, horizon, key)
        return bootstrapped_return(rollout, exact.value(rollout.observation[-1]), 0.95)

    truth = float(exact.q_value(x, u))
    for horizon in (1, 2, 5):
        found = np.asarray(estimates(horizon, jax.random.key(horizon)))
        assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(count) + 1e-5 * abs(truth), horizon


def test_a_fitted_linear_model_has_no_bias_either():
    with jax.enable_x64(True):
        exact = evaluate_linear_policy(A, B, Q, R, K, action_covariance=[[0.0]], noise=np.zeros((2, 2)), discount=0.95)
        rng = np.random.default_rng(0)
        x, u = jnp.asarray(rng.normal(size=(50, 2))), jnp.asarray(rng.normal(size=(50, 1)))
        reward = -jnp.einsum("bi,ij,bj->b", x, Q, x) - 0.01 * u[:, 0] ** 2
        no = jnp.zeros(50, bool)
        replay = Replay.of(Transition(x, u, reward, x @ A.T + u @ B.T, no, no))
        model = LinearQuadraticModel.least_squares(replay)
        for horizon in (1, 4):
            rollout = rollout_model(model, lambda x, c, k: (-x @ K.T, c), x, u, horizon, jax.random.key(0))
            found = bootstrapped_return(rollout, exact.value(rollout.observation[-1]), 0.95)
            np.testing.assert_allclose(found, exact.q_value(x, u), rtol=1e-6)


def test_a_q_network_learns_what_actions_are_worth():
    """Returns that depend on state and action, with noise: regression finds the dependence."""
    problem = Problem(Pendulum().environment())
    source = QActions(actions=2, hidden=(32,), learning_rate=1e-2, epochs=60)

    @jax.jit
    def fitted(key):
        keys = jax.random.split(key, 4)
        state = source.init(problem, PPO(**SMALL).init(problem, key).actor, key)
        inputs = jax.random.normal(keys[0], (512, 4))
        truth = -10.0 * (inputs[:, 3] - inputs[:, 0]) ** 2 - 50.0
        noisy = truth + 3.0 * jax.random.normal(keys[1], truth.shape)
        moments = state.inputs.update(inputs), state.targets.update(noisy)
        state = eqx.tree_at(lambda s: (s.inputs, s.targets), state, moments)
        state, loss = source.fit(state, inputs, noisy, keys[2])
        fresh = jax.random.normal(keys[3], (512, 4)).clip(-2, 2)
        return loss, source.q_value(state, fresh), -10.0 * (fresh[:, 3] - fresh[:, 0]) ** 2 - 50.0

    loss, found, truth = (np.asarray(part) for part in fitted(jax.random.key(0)))
    assert loss < 0.1
    assert np.var(found - truth) < 0.1 * np.var(truth)
    assert abs(np.mean(found - truth)) < 3.0


def test_discrete_actions_work_too():
    problem, algorithm = Problem(DiscreteCartPole()), PPO(**SMALL)
    learner = EnsembleLearner(hidden=(8,), epochs=1, batches=2, batch_size=16, terminates=True)
    sources = [ModelStates(actions=3, horizon=2, learner=learner), QActions(actions=3, hidden=(8,), epochs=1)]

    @jax.jit
    def everything(key):
        state = algorithm.init(problem, key)
        rollout = algorithm.collector.init(problem, state.actor, key)
        experience, _, _ = algorithm.collector.collect(problem, state.actor, rollout)
        batch, _ = algorithm.estimate(state, experience)
        return [
            source.propose(
                source.init(problem, state.actor, key), experience, batch, state.actor, algorithm, state.critic, abs
            )[0]
            for source in sources
        ]

    for more in everything(jax.random.key(0)):
        assert more.action.shape == more.advantage.shape == (64, 2)
        assert set(np.unique(more.action)) == {0, 1}
        assert np.isfinite(more.advantage).all()


class Masked(Environment):
    def reset_env(self, key, params):
        return {"value": jnp.zeros(2), "action_mask": jnp.asarray([True, False])}, jnp.zeros(())

    def step_env(self, key, state, action, params):
        observation, _ = self.reset_env(key, params)
        return observation, state, jnp.ones(()), jnp.asarray(False), {}

    def observation_space(self, params):
        box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
        return gymnasium.spaces.Dict({"value": box, "action_mask": gymnasium.spaces.MultiBinary(2)})

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


def test_bad_input(proposals):
    for kind in (ModelActions, ModelStates):
        for field in ("actions", "horizon", "capacity"):
            with pytest.raises(InputError, match=f"{field} is 0"):
                kind(**{field: 0})
    for field in ("actions", "epochs", "minibatches"):
        with pytest.raises(InputError, match=f"{field} is -1"):
            QActions(**{field: -1})
    with pytest.raises(InputError, match="learning_rate is"):
        QActions(learning_rate=float("nan"))
    pendulum = Problem(Pendulum().environment())
    with pytest.raises(InputError, match="policies without a memory"):
        MBMA(**{**SMALL, "memory": 4, "minibatches": 2}).init(pendulum, jax.random.key(0))
    with pytest.raises(InputError, match="action_mask"):
        MBMA(**SMALL, alternatives=ModelActions(learner=TINY)).init(Problem(Masked()), jax.random.key(0))
    _, _, state, experience, batch, _ = proposals
    source = QActions(hidden=(8,), minibatches=7)
    carried = source.init(pendulum, state.actor, jax.random.key(0))
    with pytest.raises(InputError, match=r"alternatives\.minibatches is 7.*divisor of the 64 rows"):
        source.propose(carried, experience, batch, state.actor, None, state.critic, abs)


def test_alternatives_and_a_scale_of_whole_batches_are_refused_together():
    from steersman.rl.advantage_scales import AdvantageMoments

    with pytest.raises(InputError, match="normalize_advantages is AdvantageMoments"):
        MBMA(normalize_advantages=AdvantageMoments())
