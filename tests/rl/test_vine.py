from typing import NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Environment, Problem
from steersman.envs.dynamics import DiscreteCartPole
from steersman.errors import InputError, InputTypeError
from steersman.mdp import policy_evaluation, random_mdp
from steersman.policies import TabularStochastic
from steersman.rl.on_policy import TRPO, Vine
from steersman.rl.on_policy.actor_critic import in_rows, likelihood
from steersman.rl.on_policy.vine import VineRollout
from steersman.training import train

TINY = {"num_envs": 3, "num_steps": 8, "hidden": (4,), "critic_epochs": 1, "critic_minibatches": 1}


class Rung(NamedTuple):
    position: jax.Array
    steps: jax.Array


class Ladder(Environment):
    """Climb by one or two and earn the height times a factor; done from 9 on, cut after four steps. Deterministic."""

    @property
    def default_params(self):
        return jnp.asarray(1.0)

    def reset_env(self, key, params):
        state = Rung(jax.random.randint(key, (), 0, 4), jnp.zeros((), jnp.int32))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        state = Rung(state.position + action + 1, state.steps + 1)
        return self.observe(state), state, params * state.position, state.position >= 9, {}

    def observe(self, state):
        return jnp.stack([state.position, state.steps]).astype(jnp.float32)

    def is_truncated(self, state, params):
        return state.steps >= 4

    def observation_space(self, params):
        return gymnasium.spaces.Box(-np.inf, np.inf, (2,))

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


def climb(position, steps, action, length, factor, gamma, final_value):
    """The return of one branch that goes on by two, by hand."""
    total, discount = 0.0, 1.0
    for _ in range(length):
        position, steps = position + action + 1, steps + 1
        total += discount * factor * position
        discount *= gamma
        action = 1
        if position >= 9:
            return total
        if steps >= 4:
            break
    return total + discount * final_value


def always_up_two(state, final_value):
    """The state with a policy that always takes the second action, and a critic that says the same everywhere."""

    def places(s):
        trunk = s.actor.network.trunk
        return trunk.weights[-1], trunk.biases[-1], s.critic.weights[-1], s.critic.biases[-1]

    zeros = [jnp.zeros_like(leaf) for leaf in places(state)]
    return eqx.tree_at(places, state, (zeros[0], jnp.asarray([-50.0, 50.0]), zeros[2], jnp.asarray([final_value])))


def test_branch_returns_are_those_computed_by_hand():
    algorithm = TRPO(**TINY, sampling=Vine(branches=2, states=24, length=3), gamma=0.9, reward_scale=2.0)
    factors = jnp.asarray([1.0, 10.0, -3.0])  # each environment has its own
    problem = Problem(Ladder(), factors, batched_params=True)

    @jax.jit
    def run(key):
        state = always_up_two(algorithm.init(problem, key), final_value=7.0)
        rollout = algorithm.collector.init(problem, state.actor, key)
        experience, rollout, _ = algorithm.collector.collect(problem, state.actor, rollout)
        branches = experience.extras["branches"]
        return (
            experience,
            branches,
            rollout.samples,
            Vine.q_values(algorithm.sampling, algorithm, state, branches, None),
        )

    experience, branches, samples, q_value = run(jax.random.key(0))
    assert int(samples) == 3 * 8 + 24 * 2 * 3 == algorithm.collector.samples_per_iteration
    np.testing.assert_array_equal(branches.action, np.tile([0, 1], (24, 1)))
    # All 24 rows of the batch are branched on, each once.
    assert len(set(zip(branches.time.tolist(), branches.environment.tolist(), strict=True))) == 24
    seen = np.asarray(experience.observation)[branches.time, branches.environment]
    terminated, truncated, kinds = np.asarray(branches.terminated), np.asarray(branches.truncated), set()
    for m, (position, steps) in enumerate(seen):
        factor = 2.0 * float(factors[branches.environment[m]])
        for action in (0, 1):
            expected = climb(position, steps, action, 3, factor, 0.9, 7.0)
            assert float(q_value[m, action]) == pytest.approx(expected, rel=1e-5)
            kinds |= set(zip(terminated[:, m, action], truncated[:, m, action], strict=True))
    # Branches that terminate, that the environment cuts, both at once, and that are given up all occur.
    assert {(True, False), (False, True), (True, True), (False, False)} <= kinds
    assert not (terminated | truncated).any(axis=0).all()


def test_action_values_are_unbiased_on_a_table():
    mdp = random_mdp(jax.random.key(3), 3, 4, discount=0.5)
    problem = Problem(mdp.environment(max_steps=None))
    # Four actions and two branches: the first actions are drawn. What follows 20 steps is worth a millionth.
    sampling = Vine(branches=2, states=2000, length=20)
    algorithm = TRPO(**{**TINY, "num_envs": 50, "num_steps": 40, "hidden": (), "gamma": 0.5}, sampling=sampling)

    @jax.jit
    def run(key):
        state = algorithm.init(problem, key)
        weights = jax.random.normal(key, (4, 3))
        state = eqx.tree_at(lambda s: s.actor.network.trunk.weights[-1], state, weights)
        rollout = algorithm.collector.init(problem, state.actor, key)
        experience, _, _ = algorithm.collector.collect(problem, state.actor, rollout)
        branches = experience.extras["branches"]
        where = experience.observation[branches.time, branches.environment]
        pi = jax.nn.softmax(weights.T, axis=-1)
        q_value = sampling.q_values(algorithm, state, branches, None)
        return where, branches.action, branches.log_prob, q_value, pi, policy_evaluation(mdp, pi)[1]

    where, action, log_prob, q_value, pi, exact = (np.asarray(x) for x in run(jax.random.key(1)))
    np.testing.assert_allclose(log_prob, np.log(pi)[where[:, None], action], atol=1e-5)
    for s in range(3):
        in_state = action[where == s]
        shares = np.bincount(in_state.ravel(), minlength=4) / in_state.size
        np.testing.assert_allclose(shares, pi[s], atol=4 * 0.5 / np.sqrt(in_state.size))
        for a in range(4):
            sample = q_value[where == s][in_state == a]
            assert len(sample) > 30
            assert abs(sample.mean() - exact[s, a]) < 4 * sample.std() / np.sqrt(len(sample)) + 1e-4


class Drift(Environment):
    """A point that is pushed and blown about: all randomness is the wind's."""

    @property
    def default_params(self):
        return ()

    def reset_env(self, key, params):
        x = jax.random.normal(key, (1,))
        return x, x

    def step_env(self, key, state, action, params):
        state = 0.9 * state + 0.3 * action + jax.random.normal(key, (1,))
        return state, state, -jnp.sum(state), jnp.asarray(False), {}

    def observation_space(self, params):
        return gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def action_space(self, params):
        return gymnasium.spaces.Box(-1.0, 1.0, (1,))


@pytest.fixture(scope="module")
def drift():
    """Branches of drawn actions, and how another policy sees them."""
    problem = Problem(Drift())
    algorithm = TRPO(**{**TINY, "num_steps": 10}, sampling=Vine(branches=3, states=20, length=10))

    @jax.jit
    def run(key):
        state, collector = algorithm.init(problem, key), algorithm.collector
        experience, _, _ = collector.collect(problem, state.actor, collector.init(problem, state.actor, key))
        rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
        new = likelihood(jax.tree.map(lambda leaf: leaf + 0.1, state.actor), rows)
        value = algorithm.sampling.local_model(algorithm, state, experience, rows, None)(new)
        branches = experience.extras["branches"]
        return state, branches, new, value, algorithm.sampling.q_values(algorithm, state, branches, None)

    return problem, algorithm, *run(jax.random.key(2))


def test_local_model_of_drawn_actions_is_the_self_normalized_sum(drift):
    _, _, _, branches, new, value, q_value = drift
    mean, std = (np.asarray(x) for x in (new.mean, np.exp(new.log_std)))
    mean, std = (x.reshape(10, 3, 1)[branches.time, branches.environment] for x in (mean, std))
    action, q_value = np.asarray(branches.action)[..., 0], np.asarray(q_value)
    log_prob = -0.5 * ((action - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    weight = np.exp(log_prob - np.asarray(branches.log_prob))
    advantage = q_value - q_value.mean(axis=1, keepdims=True)
    expected = np.mean(np.sum(weight * advantage, axis=1) / np.sum(weight, axis=1)) / advantage.std()
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(value, expected, rtol=1e-3)


def test_common_random_numbers_leave_little_but_the_difference(drift):
    """With the same wind, two branches differ by their actions alone; with other winds, by all of it."""
    problem, algorithm, state, *_, q_value = drift
    collector, actor, count = algorithm.collector, state.actor, 400

    @jax.jit
    def differences(key):
        keys = jax.random.split(key, (4, count))
        observation, env_state = problem.reset(keys[0])
        actions = jax.random.normal(keys[1, 0], (2, count, 1))

        def total(env_state, observation, action, key):
            randomness = jax.random.split(key, (10, 2))
            (reward, _, _), _ = collector.branch(problem, actor, (), env_state, observation, (), action, randomness)
            return jnp.sum(0.99 ** jnp.arange(10) * reward)

        play = jax.vmap(total)
        first = play(env_state, observation, actions[0], keys[2])
        same, other = (play(env_state, observation, actions[1], keys[i]) for i in (2, 3))
        return first - same, first - other

    shared, independent = differences(jax.random.key(5))
    assert np.var(shared) < 0.05 * np.var(independent)
    # The collector gives the branches of a state the same wind: their returns differ as little.
    assert np.var(q_value[:, 0] - q_value[:, 1]) < 0.2 * np.var(independent)


def test_local_model_of_every_action_is_the_exact_sum():
    """At most as many actions as branches: probabilities weigh the returns, and a mask takes its actions out."""

    class Masked(Ladder):
        def observe(self, state):
            allowed = jnp.asarray([True, True, False])
            return {"value": super().observe(state), "action_mask": allowed}

        def observation_space(self, params):
            mask = gymnasium.spaces.MultiBinary(3)
            return gymnasium.spaces.Dict({"value": super().observation_space(params), "action_mask": mask})

        def action_space(self, params):
            return gymnasium.spaces.Discrete(3)

    problem = Problem(Masked())
    algorithm = TRPO(**TINY, memory=3, sampling=Vine(branches=3, states=10, length=4))

    @jax.jit
    def run(key):
        state = algorithm.init(problem, key)
        collector = algorithm.collector
        experience, _, _ = collector.collect(problem, state.actor, collector.init(problem, state.actor, key))
        rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
        model = algorithm.sampling.local_model(algorithm, state, experience, rows, None)
        branches = experience.extras["branches"]
        q_value = algorithm.sampling.q_values(algorithm, state, branches, None)
        after, metrics = algorithm.update(state, experience)
        new = likelihood(after.actor, rows)
        return branches, q_value, rows.parameters, new, model(rows.parameters), model(new), metrics

    branches, q_value, old, new, before, after, metrics = run(jax.random.key(4))
    # With a memory, rows are the environments' sequences.
    place = np.asarray(branches.environment), np.asarray(branches.time)
    pi_old, pi_new = (np.asarray(jax.nn.softmax(x, axis=-1))[place][:, :2] for x in (old, new))
    q_value = np.asarray(q_value)[:, :2]
    advantage = q_value - np.sum(pi_old * q_value, axis=1, keepdims=True)
    deviation = advantage.std()
    gain = np.mean(np.sum((pi_new - pi_old) * advantage, axis=1)) / deviation
    np.testing.assert_allclose(after - before, gain, rtol=1e-3)
    np.testing.assert_allclose(metrics["surrogate_improvement"], gain, rtol=1e-3)
    assert bool(metrics["accepted"])
    assert all(np.isfinite(value).all() for value in metrics.values())


def test_learns_to_balance_within_few_iterations():
    sampling = Vine(branches=2, states=32, length=40)
    algorithm = TRPO(num_envs=8, num_steps=32, hidden=(16,), target_kl=0.05, critic_minibatches=1, sampling=sampling)
    trained = train(algorithm, Problem(DiscreteCartPole()), iterations=16)
    assert np.nanmean(trained.returns[-4:]) > np.nanmean(trained.returns[:3]) + 40
    assert trained.samples[-1] == 16 * (8 * 32 + 32 * 2 * 40)
    np.testing.assert_array_equal(trained.state.samples, trained.samples[-1])
    assert (trained.metrics["kl"] <= 0.05 * 1.001).all()


# ---- bad input


def test_host_environments_are_refused():
    algorithm = TRPO(**TINY, sampling=Vine(branches=2, states=4))
    with pytest.raises(InputError, match=r"can start from any state, which CartPole-v1 on the host cannot"):
        train(algorithm, "gymnasium:CartPole-v1", iterations=1)


def test_environments_that_cannot_start_anywhere_are_refused():
    class Fixed(Problem):
        abilities = frozenset()

    with pytest.raises(InputError, match="can start from any state, which Ladder cannot"):
        train(TRPO(**TINY, sampling=Vine(branches=2, states=4)), Fixed(Ladder()), iterations=1)


def test_more_branches_than_actions_are_refused():
    with pytest.raises(InputError, match=r"branches is 3, but there are only 2 actions; with branches=2"):
        train(TRPO(**TINY, sampling=Vine(branches=3, states=4)), Problem(Ladder()), iterations=1)


def test_policies_without_a_likelihood_are_refused():
    greedy = TabularStochastic(jnp.ones((2, 2)) / 2).mode()
    with pytest.raises(InputTypeError, match="likelihood"):
        VineRollout(2, 4, 3, 2, 5).init(Problem(Ladder()), greedy, jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": 1}, "branches is 1"),
        ({"branches": 2, "states": 0}, "states is 0"),
        ({"branches": 2, "length": -1}, "length is -1"),
    ],
)
def test_bad_sizes(settings, message):
    with pytest.raises(InputError, match=message):
        Vine(**settings)


def test_more_states_than_the_batch_holds_are_refused():
    with pytest.raises(InputError, match=r"states is 25, but it must be at most num_envs \* num_steps = 24"):
        TRPO(**TINY, sampling=Vine(branches=2, states=25))
