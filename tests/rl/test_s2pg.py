"""Stochastic stateful policy gradients: estimates against exact gradients, and what may and may not reach them."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control import LinearController, controller_cost
from steersman.envs import Environment, HiddenVelocity, Pendulum, Problem
from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError, NonFiniteError
from steersman.policies import Categorical, DiagonalGaussian, NetworkPolicy, Preprocess
from steersman.policies.network import ActorNetwork
from steersman.policies.preprocessing import Features
from steersman.policies.sampled_memory import (
    BackpropagatedLinearMemory,
    BackpropagatedMemory,
    JointHead,
    JointSample,
    LinearMemory,
    MemoryCarry,
    SampledMemory,
)
from steersman.rl.on_policy.actor_critic import in_rows, likelihood
from steersman.rl.on_policy.policy_gradient import PolicyGradient, weights, with_weights
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.s2pg import S2PG, EpisodicS2PG, check_memory
from steersman.rl.on_policy.truncated_bptt import TruncatedBPTT, pieces
from steersman.training import train

SMALL = {"num_envs": 4, "num_steps": 12, "hidden": (8,), "minibatches": 2, "epochs": 2, "learning_rate": 1e-2}
PENDULUM = Problem(Pendulum().environment(num_steps=5))


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def collected(algorithm, problem=PENDULUM):
    state = jax.jit(lambda key: algorithm.init(problem, key))(jax.random.key(0))
    collector = algorithm.collector

    @jax.jit
    def collect(state):
        policy = algorithm.behaviour(state)
        return collector.collect(problem, policy, collector.init(problem, policy, jax.random.key(1)))[0]

    return state, collect(state)


@pytest.fixture(scope="module")
def batch():
    algorithm = S2PG(architecture=SampledMemory(3, hidden=(4,)), **SMALL)
    state, experience = collected(algorithm)
    return algorithm, state, experience


def replicates(algorithm, policy, problem, episodes, count):
    """Independent estimates of the gradient at a policy."""

    @jax.jit
    def all_of_them(keys):
        def one(key):
            experience, _ = algorithm.collector.play(problem, policy, key)
            return flat(algorithm.estimate(policy, experience).gradient)

        return jax.lax.map(one, keys)

    assert algorithm.num_episodes * count == episodes
    return np.asarray(all_of_them(jax.random.split(jax.random.key(7), count)))


def central_differences(value, at, step):
    slopes = []
    for i in range(at.size):
        nudge = step * np.eye(at.size)[i]
        slopes.append((value(at + nudge) - value(at - nudge)) / (2 * step))
    return np.asarray(slopes)


def within_standard_errors(found, expected, errors=4.0):
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - expected) <= errors * error), (found.mean(axis=0), expected, error)
    # The estimate must be sharp enough for the comparison to mean something.
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(expected), (error, expected)


# A partially observed decision process with two states, and a controller with two memory states.
MOVE = np.asarray([[[0.9, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.6, 0.4]]])  # [action, state, next state]
SEE = np.asarray([[0.8, 0.2], [0.3, 0.7]])  # [state, observation]
EARN = np.asarray([[1.0, -0.5], [-1.0, 0.7]])  # [state, action]
START = np.asarray([0.6, 0.4])


class TwoStates(Environment):
    def reset_env(self, key, params):
        state = jax.random.bernoulli(key, START[1]).astype(jnp.int32)
        return self.see(jax.random.fold_in(key, 1), state), state

    def see(self, key, state):
        return jax.random.bernoulli(key, jnp.asarray(SEE)[state, 1]).astype(jnp.int32)

    def step_env(self, key, state, action, params):
        move, see = jax.random.split(key)
        following = jax.random.bernoulli(move, jnp.asarray(MOVE)[action, state, 1]).astype(jnp.int32)
        return self.see(see, following), following, jnp.asarray(EARN)[state, action], jnp.asarray(False), {}

    def observation_space(self, params):
        return gymnasium.spaces.Discrete(2)

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


class Table(ActorNetwork):
    """Logits of the four pairs (action, next memory) for each observation and memory."""

    logits: jax.Array

    def init(self, key):
        return jnp.asarray([1.0, 0.0])

    def __call__(self, features, carry):
        return jnp.einsum("...o,...z,ozn->...n", features, carry, self.logits), carry


class Pairs(Categorical):
    def to_action(self, sample):
        return sample // 2


class FiniteStateController(NetworkPolicy):
    def from_features(self, features, carry):
        return self.head.from_output(self.network(features.vector, carry)[0], self.free), carry

    def remember(self, features, carry, sample):
        return jax.nn.one_hot(sample % 2, 2)

    def act(self, observation, carry, key):
        action, _, record = super().act(observation, carry, key)
        return action, self.remember(None, carry, record.action), record


def exact_return(logits, gamma):
    """Discounted return by a linear solve over pairs of state and memory."""
    table = np.exp(logits.reshape(2, 2, 4))
    pi = (table / table.sum(axis=-1, keepdims=True)).reshape(2, 2, 2, 2)  # [o, z, a, z']
    acting = np.einsum("so,ozan->szan", SEE, pi)
    earned = np.einsum("szan,sa->sz", acting, EARN).ravel()
    moving = np.einsum("szan,ast->sztn", acting, MOVE).reshape(4, 4)
    start = np.asarray([START[0], 0.0, START[1], 0.0])
    return start @ np.linalg.solve(np.eye(4) - gamma * moving, earned)


def test_finite_state_controller_against_exact_gradient():
    """The gradient of a linear solve, within four standard errors of the estimate (oracle 2)."""
    gamma, logits = 0.7, np.random.default_rng(0).normal(size=16)
    policy = FiniteStateController(
        Preprocess(layout(gymnasium.spaces.Discrete(2))), Table(jnp.asarray(logits.reshape(2, 2, 4))), jnp.zeros(0),
        Pairs(4),
    )  # fmt: skip
    algorithm = PolicyGradient(num_episodes=500, horizon=35, gamma=gamma, baseline="leave-one-out")
    found = replicates(algorithm, policy, Problem(TwoStates()), 40_000, 80)
    expected = central_differences(lambda x: exact_return(x, gamma), logits, 1e-5)
    within_standard_errors(found, expected)


def linear_policy(x):
    """A kernel with one memory from (C, D, A, B, log s, log s_z)."""
    policy = LinearMemory(1).make(
        Preprocess(layout(gymnasium.spaces.Box(-np.inf, np.inf, (1,)))), DiagonalGaussian((1,)), initial_log_std=0.0,
        key=jax.random.key(0),
    )  # fmt: skip
    return eqx.tree_at(
        lambda p: (p.network.weight, p.free), policy, (jnp.asarray(x[:4]).reshape(2, 2), jnp.asarray(x[4:]))
    )


@pytest.fixture(scope="module")
def linear_case():
    horizon, gamma = 20, 0.98
    problem = HiddenVelocity(horizon=horizon)
    at = np.asarray([1.5, -3.0, 0.6, 0.8, np.log(0.4), np.log(0.4)])

    def value(x):
        c, d, a, b = x[:4].reshape(4, 1, 1)
        noises = {"action_noise": np.exp(x[4]), "memory_noise": np.exp(x[5])}
        return -float(controller_cost(problem, LinearController(a, b, c, d), gamma, horizon=horizon, **noises))

    # Costs come back in single precision, so the step is wide; the second-order error is below 1e-3 of the slope.
    return problem, at, gamma, horizon, central_differences(value, at, 1e-2)


def test_linear_gaussian_kernel_against_exact_gradient(linear_case):
    """The gradient of the covariance recursion, within four standard errors at 40,000 episodes (oracle 3)."""
    problem, at, gamma, horizon, expected = linear_case
    algorithm = EpisodicS2PG(num_episodes=500, horizon=horizon, gamma=gamma, baseline="leave-one-out")
    found = replicates(algorithm, linear_policy(at), Problem(problem.environment()), 40_000, 80)
    within_standard_errors(found, expected)


def test_deterministic_limit():
    """Without noise the gradient is ``dmu_a' grad_a Q + dmu_z' grad_z Q``, and noise costs its square (oracle 4)."""
    head = JointHead(DiagonalGaussian((1,)), 1)
    nodes, masses = np.polynomial.hermite_e.hermegauss(20)
    noise = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.outer(masses, masses).ravel() / (2 * np.pi)

    def q(action, memory):
        return -((action - 0.5) ** 2) - 0.7 * memory**2 + 0.3 * action * memory + 0.2 * action**3 * memory

    def means(theta):
        return jnp.stack([jnp.sin(theta[0]) + 0.5 * theta[1], theta[0] * theta[1]])

    with jax.enable_x64(True):
        theta = jnp.asarray(np.asarray([0.4, -0.8]))
        centre = means(theta)

        @jax.jit
        @jax.grad
        def expected_score(theta, std):
            points = centre + std * noise
            parameters = head.from_output(jnp.broadcast_to(means(theta), points.shape), jnp.log(std) * jnp.ones(2))
            log_prob = head.log_prob(parameters, JointSample(points[:, :1], points[:, 1:]))
            return jnp.sum(mass * log_prob * q(points[:, 0], points[:, 1]))

        deterministic = jax.jacobian(means)(theta).T @ jnp.stack(jax.grad(q, argnums=(0, 1))(*centre))
        errors = [float(jnp.linalg.norm(expected_score(theta, std) - deterministic)) for std in (0.2, 0.1, 0.05, 0.025)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4.0, rtol=0.01)
    assert errors[-1] < 1e-3


def test_gradients_do_not_pass_through_recorded_memories(batch):
    """What happened before a step reaches its gradient only as data (oracle 5)."""
    algorithm, state, experience = batch
    estimated, _ = jax.jit(lambda s, e: algorithm.estimate(s, e))(state, experience)

    def last_gradient(rows, policy):
        def loss(learned):
            parameters = likelihood(with_weights(policy, learned), rows)
            last = jax.tree.map(lambda leaf: leaf.reshape(12, 4, *leaf.shape[1:])[-1], (parameters, rows.action))
            return jnp.sum(policy.head.log_prob(*last))

        return flat(jax.grad(loss)(weights(policy)))

    rows = in_rows(state.actor, estimated)
    gradient = jax.jit(lambda rows: last_gradient(rows, state.actor))
    earlier = rows.features.vector.at[: 11 * 4].multiply(3.0)
    disturbed = rows._replace(features=Features(earlier))
    np.testing.assert_array_equal(gradient(rows), gradient(disturbed))
    assert np.any(gradient(rows) != 0)
    # The memory itself is data, and matters as such.
    moved = rows._replace(carry=rows.carry._replace(memory=rows.carry.memory + 1.0))
    assert not np.allclose(gradient(rows), gradient(moved))


def test_with_backpropagation_through_time_they_do():
    algorithm = TruncatedBPTT(architecture=BackpropagatedMemory(3, hidden=(4,)), truncation=6, **SMALL)
    problem = Problem(Pendulum().environment(num_steps=100))
    state, experience = collected(algorithm, problem)
    estimated, _ = jax.jit(lambda s, e: algorithm.estimate(s, e))(state, experience)
    rows = in_rows(state.actor, estimated)
    assert rows.log_prob.shape == (8, 6)

    @jax.jit
    def last_gradient(rows):
        def loss(learned):
            parameters = likelihood(with_weights(state.actor, learned), rows)
            return jnp.sum(state.actor.head.log_prob(parameters, rows.action)[:, -1])

        return jax.grad(loss)(weights(state.actor))

    earlier = rows.features.vector.at[:, :5].multiply(3.0)
    assert not np.allclose(flat(last_gradient(rows)), flat(last_gradient(rows._replace(features=Features(earlier)))))
    # Unrolled from the memory recorded where a piece begins, likelihoods are those that were recorded.
    parameters = jax.jit(likelihood)(state.actor, rows)
    np.testing.assert_allclose(state.actor.head.log_prob(parameters, rows.action), rows.log_prob, atol=1e-5)


def test_pieces_are_consecutive_steps_of_one_environment():
    steps = jnp.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(pieces({"t": steps}, 3)["t"], [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
    assert pieces(jnp.zeros((6, 2, 0)), 2).shape == (2, 6, 0)


def test_joint_ratio_is_the_product_and_starts_at_one(batch):
    """Oracle 6."""
    algorithm, state, experience = batch
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
    head = state.actor.head

    @jax.jit
    def ratios(actor):
        parameters = likelihood(actor, rows)
        together = head.log_prob(parameters, rows.action) - head.log_prob(rows.parameters, rows.action)
        apart = [
            family.log_prob(getattr(parameters, name), getattr(rows.action, name))
            - family.log_prob(getattr(rows.parameters, name), getattr(rows.action, name))
            for name, family in (("action", head.action), ("memory", DiagonalGaussian((3,))))
        ]
        recorded = head.log_prob(parameters, rows.action) - rows.log_prob
        return together, apart, recorded

    assert float(jnp.abs(ratios(state.actor)[2]).max()) < 1e-5
    moved = with_weights(state.actor, jax.tree.map(lambda leaf: leaf + 0.05, weights(state.actor)))
    together, apart, _ = ratios(moved)
    np.testing.assert_allclose(np.exp(together), np.exp(apart[0]) * np.exp(apart[1]), rtol=1e-4)
    assert float(np.abs(together).max()) > 0.01


@pytest.mark.parametrize("episodic", [False, True])
def test_without_a_memory_training_is_that_of_the_parent(episodic):
    """Bit for bit (oracle 1)."""
    shape = {"hidden": (6,), "activation": "tanh"}
    if episodic:
        settings = {"num_episodes": 4, "horizon": 5}
        arms = (
            EpisodicS2PG(architecture=SampledMemory(0, **shape), **settings),
            PolicyGradient(baseline="optimal", **settings, **shape),
        )
    else:
        settings = {**SMALL, "hidden": (6,)}
        arms = S2PG(architecture=SampledMemory(0, **shape), **settings), PPO(**settings)
    states = [train(algorithm, PENDULUM, iterations=2, seeds=[3]).state for algorithm in arms]
    found, expected = (jax.tree.leaves(state) for state in states)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


def test_the_critic_sees_memory_and_last_action(batch):
    _, state, experience = batch
    assert state.critic.weights[0].shape == (8, 3 + 3 + 1)
    # The recorded memory is the one that was sampled a step before, except where an episode began.
    sampled, kept = experience.record.action.memory[:-1], experience.carry.memory[1:]
    done = np.asarray(experience.truncated)[:-1]
    np.testing.assert_array_equal(np.asarray(kept)[~done], np.asarray(sampled)[~done])
    np.testing.assert_array_equal(np.asarray(kept)[done], 0.0)
    assert done.sum() == 8


def test_learns_what_needs_a_memory():
    """Recall the first observation: without a memory half of the answers are right."""

    class Recall(Environment):
        def reset_env(self, key, params):
            cue = 2.0 * jax.random.bernoulli(key).astype(jnp.float32) - 1.0
            return jnp.asarray([cue, 1.0]), (cue, jnp.zeros((), jnp.int32))

        def step_env(self, key, state, action, params):
            cue, time = state
            reward = jnp.where((time == 2) & ((action == 1) == (cue > 0)), 1.0, 0.0)
            return jnp.zeros(2), (cue, time + 1), reward, time == 2, {}

        def observation_space(self, params):
            return gymnasium.spaces.Box(-1.0, 1.0, (2,))

        def action_space(self, params):
            return gymnasium.spaces.Discrete(2)

    memory = SampledMemory(4, hidden=(16,), activation="tanh", previous_action=False)
    settings = {"num_envs": 32, "num_steps": 24, "hidden": (16,), "learning_rate": 1e-2, "epochs": 4, "minibatches": 4}
    trained = train(S2PG(architecture=memory, **settings), Problem(Recall()), iterations=60)
    assert float(np.mean(trained.returns[-3:])) > 0.8


def altered(experience, where, value):
    return eqx.tree_at(where, experience, value)


@pytest.mark.parametrize("kind", ["missing", "not reset", "not finite"])
def test_bad_memories(batch, kind):
    algorithm, state, experience = batch
    if kind == "missing":
        bad, message = altered(experience, lambda e: e.carry, ()), r"experience\.carry has arrays of shapes \[\]"
    elif kind == "not reset":
        memory = experience.carry.memory.at[5, 1].set(0.25)
        bad = altered(experience, lambda e: e.carry.memory, memory)
        message = r"experience\.carry is \[0\.25.*at step 5 of environment 1.*as an episode begins"
    else:
        memory = experience.carry.memory.at[3, 2, 0].set(jnp.nan)
        bad = altered(experience, lambda e: e.carry.memory, memory)
        message = r"experience\.carry is NaN or infinite at step 3 of environment 2"
    check_memory(state.actor, experience)
    with pytest.raises(InputError, match=message):
        algorithm.update(state, bad)


def test_a_memory_that_becomes_infinite_stops_training():
    class Exploding(eqx.Module):
        weight: jax.Array

        def __call__(self, inputs, memory):
            return jnp.exp(50.0 + memory**2) + self.weight[0] * inputs[0]

    def explode(input_size, size, key):
        return Exploding(jnp.ones(1))

    algorithm = S2PG(architecture=SampledMemory(2, cell=explode), **SMALL)
    with pytest.raises(NonFiniteError, match="NaN or infinit"):
        train(algorithm, PENDULUM, iterations=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S2PG(memory=8), "memory is 8"),
        (lambda: EpisodicS2PG(memory=8), "memory is 8"),
        (lambda: S2PG(num_envs=4, num_steps=10, minibatches=3), "minibatches is 3"),
        (lambda: TruncatedBPTT(memory=4, num_steps=16, truncation=5), "truncation is 5.*divisor of num_steps = 16"),
        (lambda: TruncatedBPTT(memory=4, truncation=0), "truncation is 0"),
        (lambda: TruncatedBPTT(), "architecture is None"),
    ],
)
def test_bad_hyperparameters(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("kind", [S2PG, EpisodicS2PG])
@pytest.mark.parametrize("architecture", [None, BackpropagatedMemory(2), BackpropagatedLinearMemory(2)])
def test_a_memory_that_is_not_sampled_is_refused(kind, architecture):
    with pytest.raises(InputTypeError, match=r"architecture is .*samples its memory"):
        kind(architecture=architecture)


def test_previous_actions_start_at_zero_in_every_episode(batch):
    _, _, experience = batch
    assert isinstance(experience.carry, MemoryCarry)
    np.testing.assert_array_equal(experience.carry.action[0], 0.0)
    np.testing.assert_array_equal(experience.carry.action[5], 0.0)
    np.testing.assert_allclose(experience.carry.action[1], jnp.clip(experience.record.action.action[0], -1, 1))
