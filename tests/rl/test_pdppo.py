"""PDPPO: its two ways of using a second critic, against exact values and against PPO."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman import mdp
from steersman.envs import LotSizing, Problem, lumpy_lot_sizing
from steersman.errors import InputError
from steersman.objectives import squared_error
from steersman.rl.critics import Examples, Outcome, StateCritic
from steersman.rl.on_policy.actor_critic import in_rows
from steersman.rl.on_policy.pdppo import PDPPO
from steersman.rl.post_decision_critics import DualCritics, HalfStepCritics
from steersman.training import train

SMALL = {"num_envs": 4, "num_steps": 10, "hidden": (8,), "epochs": 2, "minibatches": 2}
PROBLEM = Problem(LotSizing(num_steps=8))


def loss(value, old_value, target):
    return squared_error(value, target)


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def collected():
    """A state of PDPPO, and one batch of experience."""
    algorithm = PDPPO(**SMALL)
    state = jax.jit(lambda key: algorithm.init(PROBLEM, key))(jax.random.key(0))
    collector = algorithm.collector
    rollout = collector.init(PROBLEM, algorithm.behaviour(state), jax.random.key(1))
    experience = jax.jit(lambda s, r: collector.collect(PROBLEM, algorithm.behaviour(s), r)[0])(state, rollout)
    return algorithm, state, experience


def with_critic(state, network):
    return eqx.tree_at(lambda s: s.critic, state, network, is_leaf=lambda x: isinstance(x, (tuple, list)))


def test_with_lam_x_one_advantages_are_those_of_ppo(collected):
    """Oracle 2, through the algorithm: bit for bit, and smaller lam_x is something else."""
    _, state, experience = collected
    ppo = PDPPO(**SMALL, critic=StateCritic())
    estimate = jax.jit(lambda algorithm, state: algorithm.estimate(state, experience)[0])
    expected = estimate(ppo, with_critic(state, state.critic[0]))
    found = estimate(PDPPO(**SMALL, critic=HalfStepCritics(1.0)), state)
    np.testing.assert_array_equal(found.advantage, expected.advantage)
    np.testing.assert_array_equal(found.target[0], expected.target)
    other = estimate(PDPPO(**SMALL, critic=HalfStepCritics(0.5)), state)
    assert float(jnp.abs(other.advantage - expected.advantage).max()) > 1e-3


def test_the_post_decision_critic_reads_what_the_environment_gave(collected):
    algorithm, state, experience = collected
    vector, reward = algorithm.critic.read(state.actor.preprocess, experience)
    np.testing.assert_array_equal(vector, experience.extras["post_decision"])
    np.testing.assert_array_equal(reward, experience.extras["decision_reward"])
    assert set(np.unique(reward)) == {-1.0, 0.0}
    # The decision is seen, the demand is not: at least what was in stock before.
    assert bool(jnp.all(vector[..., :2] >= experience.observation[..., :2]))


def test_decision_rewards_are_scaled_as_rewards_are(collected):
    """With rewards of decisions only, chance earns nothing, in whatever units rewards are learned from."""
    _, state, experience = collected
    certain = eqx.tree_at(lambda e: e.reward, experience, experience.extras["decision_reward"])
    # Worth nothing after the decision and zero discount: what is left of the post-decision target is chance's reward.
    algorithm = PDPPO(**SMALL, reward_scale=0.1, gamma=0.0)
    _, post_target, _ = algorithm.estimate(state, certain)[0].target
    np.testing.assert_allclose(post_target, 0.0, atol=1e-7)


def test_both_critics_learn_and_each_from_its_own_target(collected):
    algorithm, state, experience = collected
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
    value = algorithm.critic.value(state.critic, rows.features.vector)
    post_value = algorithm.critic.post_value(state.critic, rows.read[0])
    examples = Examples((rows.features.vector, rows.read), rows.value, rows.target)
    found = algorithm.critic.error(state.critic, examples, loss)
    np.testing.assert_allclose(found, (value - rows.target[0]) ** 2 + (post_value - rows.target[1]) ** 2, rtol=1e-5)


class Indexed(eqx.Module):
    """A critic that looks its value up: exact, in units in which returns are standardized."""

    table: jax.Array

    def __call__(self, vector):
        return self.table[vector[..., 0].astype(int)][..., None]


def test_with_exact_critics_the_papers_advantage_is_the_positive_part():
    """Oracle 3: no reward from decisions; E[A | s, a] = max(Q - V, 0), by Monte Carlo from the tables."""
    with jax.enable_x64(True):
        tables = mdp.post_decision_tables(LotSizing(changeover_cost=0.0), discount=0.9)
        value, q_value = mdp.policy_evaluation(tables.mdp, jnp.full((243, 3), 1 / 3))
        post_value = tables.post_decision_value(value)
    tables = jax.tree.map(np.asarray, tables)
    chance = np.cumsum(tables.chance, axis=1)
    rng = np.random.default_rng(0)
    count, steps = 4_500, 80
    first = np.repeat([30, 100, 200], count // 3)
    states, actions = first, rng.integers(0, 3, count)
    chosen, rows = actions, []
    for _ in range(steps):
        post = tables.successor[states, actions]
        rows.append((states, post, tables.random_reward[post]))
        states = np.minimum((rng.random((count, 1)) > chance[post]).sum(axis=1), 242)
        actions = rng.integers(0, 3, count)
    seen, after, reward = (np.stack(part) for part in zip(*rows, strict=True))
    earned = np.zeros((steps + 1, count))
    for t in reversed(range(steps)):
        earned[t] = reward[t] + 0.9 * earned[t + 1]
    mean, scale = earned[:-1].mean(), earned[:-1].std()
    network = [Indexed(jnp.asarray((np.asarray(v) - mean) / scale, jnp.float32)) for v in (value, post_value)]
    critic, off = DualCritics(), jnp.zeros((steps, count), bool)
    vector, post_vector, reward = (jnp.asarray(x, jnp.float32) for x in (seen[..., None], after[..., None], reward))
    outcome = Outcome(reward, critic.value(network, vector), reward, off, off, lambda part: part, None)  # pyright: ignore
    advantage = np.asarray(critic.estimate(network, (post_vector, reward), outcome, 0.9, 1.0)[0])[0] * scale
    gains = []
    for state in (30, 100, 200):
        for action in range(3):
            sample = advantage[(first == state) & (chosen == action)]
            gain = float(q_value[state, action] - value[state])
            assert abs(sample.mean() - max(gain, 0.0)) < 4 * sample.std() / np.sqrt(len(sample)), (state, action)
            gains.append(gain)
    assert min(gains) < -0.2 < 0.2 < max(gains)


@pytest.mark.parametrize(("combine", "sign"), [("min", 1.0), ("max", -1.0)])
def test_only_the_critic_that_was_picked_learns(collected, combine, sign):
    """Oracle 5: with `min`, the loss does not notice changes of the larger critic."""
    _, state, experience = collected
    algorithm = PDPPO(**SMALL, critic=DualCritics(combine=combine))
    small, large = state.critic
    large = eqx.tree_at(lambda n: n.biases[-1], large, large.biases[-1] + 50.0 * sign)
    state = with_critic(state, [small, large])
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
    examples = Examples((rows.features.vector, rows.read), rows.value, rows.target)
    error = lambda network: jnp.mean(algorithm.critic.error(network, examples, loss))  # noqa: E731
    perturbed = [small, jax.tree.map(lambda leaf: leaf + 0.01, large)]
    assert float(error([small, large])) == float(error(perturbed))
    gradient = jax.grad(error)([small, large])
    assert float(jnp.abs(flat(gradient[1])).max()) == 0.0
    assert float(jnp.abs(flat(gradient[0])).max()) > 0.0


def test_the_papers_returns_are_standardized_monte_carlo_sums(collected):
    _, state, experience = collected
    algorithm = PDPPO(**SMALL, critic=DualCritics(), gamma=0.5)
    batch, _ = algorithm.estimate(state, experience)
    reward, done = np.asarray(experience.reward), np.asarray(experience.truncated)
    assert done.any()
    earned, after = np.zeros_like(reward), np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        after = earned[t] = reward[t] + 0.5 * np.where(done[t], 0.0, after)
    expected = (earned - earned.mean()) / earned.std()
    np.testing.assert_allclose(batch.target[0], expected, atol=1e-5)
    value = np.minimum(
        *(n(v)[..., 0] for n, v in zip(state.critic, (batch.features.vector, batch.read[0]), strict=True))
    )
    np.testing.assert_allclose(batch.advantage, expected - value, atol=1e-5)


def test_constant_returns_leave_no_infinities(collected):
    _, state, experience = collected
    silent = eqx.tree_at(lambda e: e.reward, experience, jnp.zeros_like(experience.reward))
    batch, _ = PDPPO(**SMALL, critic=DualCritics()).estimate(state, silent)
    np.testing.assert_array_equal(batch.target[0], 0.0)
    assert bool(jnp.all(jnp.isfinite(batch.advantage)))


@pytest.mark.parametrize(
    ("sees", "needed"), [(("state", "state"), False), (("post-decision",), True), (("state", "post-decision"), True)]
)
def test_ablations_are_configurations_of_the_slot(collected, sees, needed):
    _, state, experience = collected
    critic = DualCritics(sees)
    assert bool(critic.needs) == needed
    algorithm = PDPPO(**SMALL, critic=critic)
    networks = list(state.critic)[: len(sees)]
    batch, _ = algorithm.estimate(with_critic(state, networks), experience)
    inputs = {"state": batch.features.vector, "post-decision": experience.extras["post_decision"]}
    values = [one(inputs[what])[..., 0] for one, what in zip(networks, sees, strict=True)]
    np.testing.assert_allclose(batch.target[0] - batch.advantage, np.min(values, axis=0), atol=1e-5)


def test_critics_step_at_their_own_rate(collected):
    """From the same gradient: three times as far for the critics, as far for the actor."""
    _, state, _ = collected
    gradient = jax.tree.map(jnp.ones_like, state.learned)
    moved = []
    for rate in (1.0, 3.0):
        optimizer = PDPPO(**SMALL, critic_rate=rate)._optimizer()
        step, _ = jax.jit(optimizer.update)(gradient, state.optimizer, state.learned, value=0.0)
        moved.append(step)
    assert float(jnp.abs(flat(moved[0].critic)).max()) > 0.5
    np.testing.assert_array_equal(flat(moved[1].network), flat(moved[0].network))
    np.testing.assert_allclose(flat(moved[1].critic), 3.0 * flat(moved[0].critic), rtol=1e-6)


def test_it_learns():
    algorithm = PDPPO(num_envs=8, num_steps=50, epochs=10, minibatches=1, gamma=0.97, learning_rate=3e-3, hidden=(32,))
    trained = train(algorithm, Problem(LotSizing()), iterations=25)
    assert np.mean(trained.returns[:2]) < -100
    assert np.mean(trained.returns[-3:]) > -85


def test_several_machines_and_a_memory():
    """Traced, not compiled: every part fits every other."""
    problem = Problem(lumpy_lot_sizing(3, 2, num_steps=8))
    algorithm = PDPPO(**SMALL, memory=4, normalize_rewards=True, normalize_observations=True)

    def iterate(key):
        state = algorithm.init(problem, key)
        policy = algorithm.behaviour(state)
        experience, _, _ = algorithm.collector.collect(problem, policy, algorithm.collector.init(problem, policy, key))
        return state, algorithm.update(state, experience)

    before, (after, metrics) = jax.eval_shape(iterate, jax.random.key(0))
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert metrics["value_loss"].shape == ()
    assert before.critic[1].weights[0].shape == (8, 3 + 2 * 4 + 4)  # stocks, two setups, the memory


def test_the_papers_settings():
    algorithm = PDPPO.paper(combine="max", epochs=3)
    assert (algorithm.num_envs * algorithm.num_steps, algorithm.epochs, algorithm.minibatches) == (600, 3, 1)
    assert float(algorithm.learning_rate * algorithm.critic_rate) == pytest.approx(1.2e-3)
    assert isinstance(algorithm.critic, DualCritics)
    assert algorithm.critic.combine == "max"


class HostQueue(gymnasium.Env):
    """Serve up to two of those who wait; a coin adds one. Reports its half-steps when asked to."""

    observation_space = spaces.Box(0.0, 6.0, (1,), np.float64)
    action_space = spaces.Discrete(3)

    def __init__(self, reports=True):
        self.reports = reports

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.waiting, self.time = 3, 0
        return np.array([3.0]), {}

    def step(self, action):
        left = max(self.waiting - int(action), 0)
        self.waiting, self.time = min(left + int(self.np_random.integers(2)), 6), self.time + 1
        info = {"post_decision": np.array([float(left)]), "decision_reward": -0.3 * action} if self.reports else {}
        reward = -0.3 * float(action) - self.waiting
        return np.array([float(self.waiting)]), reward, False, self.time >= 5, info


def test_gymnasium_environments_report_their_half_steps():
    trained = train(PDPPO(**{**SMALL, "epochs": 1, "minibatches": 1}), HostQueue, iterations=2)
    assert np.isfinite(trained.metrics["value_loss"]).all()
    with pytest.raises(InputError, match="can give its post-decision state, which HostQueue"):
        train(PDPPO(**SMALL), lambda: HostQueue(reports=False), iterations=1)


def test_environments_without_post_decision_states_are_refused():
    with pytest.raises(InputError, match=r"can give its post-decision state, which cartpole-discrete cannot"):
        train(PDPPO(**SMALL), "cartpole-discrete", iterations=1)


def test_missing_reports_are_named(collected):
    algorithm, state, experience = collected
    lacking = eqx.tree_at(lambda e: e.extras, experience, {"post_decision": experience.extras["post_decision"]})
    with pytest.raises(InputError, match=r"info\['decision_reward'\] is missing"):
        algorithm.estimate(state, lacking)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HalfStepCritics(1.5), r"lam_x is 1\.5"),
        (lambda: HalfStepCritics(-0.5), "lam_x is"),
        (lambda: DualCritics(()), r"sees is \(\)"),
        (lambda: DualCritics(("state", "action")), r"sees is \('state', 'action'\)"),
        (lambda: DualCritics(combine="mean"), "combine is 'mean'"),
        (lambda: PDPPO(critic_rate=0.0), r"critic_rate is 0\.0"),
        (lambda: PDPPO(epochs=0), "epochs is 0"),
        (lambda: PDPPO.paper(gamma=2.0), r"gamma is 2\.0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
