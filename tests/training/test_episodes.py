import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Environment, Problem
from steersman.errors import InputError, InputTypeError
from steersman.policies import Policy
from steersman.rl.on_policy.policy_gradient import PolicyGradient
from steersman.training import train
from steersman.training.episodes import Episodes, PopulationEpisodes


class Countdown(Environment):
    """Starts at a number from 2 to 9 and ends at zero: lengths are known from the first observation."""

    limit: jax.Array = eqx.field(converter=jnp.asarray, default=100)
    spoiled: jax.Array = eqx.field(converter=jnp.asarray, default=-1)  # the step whose reward is not a number

    def reset_env(self, key, params):
        start = jax.random.randint(key, (), 2, 10)
        return start.astype(jnp.float32)[None], (start, jnp.zeros((), jnp.int32))

    def step_env(self, key, state, action, params):
        left, steps = state[0] - 1, state[1] + 1
        reward = jnp.where(steps == self.spoiled, jnp.nan, steps.astype(jnp.float32))
        return left.astype(jnp.float32)[None], (left, steps), reward, left == 0, {}

    def is_truncated(self, state, params):
        return state[1] >= self.limit

    def observation_space(self, params):
        return gymnasium.spaces.Box(0, 10, (1,))

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


class Constant(Policy):
    """Takes its one action and counts the steps of the episode in its memory."""

    action: jax.Array

    def init(self, key):
        return jnp.zeros((), jnp.int32)

    def __call__(self, observation, carry, key):
        return self.action, carry + 1


POLICY = Constant(jnp.asarray(0))


@eqx.filter_jit
def played(collector, problem, key):
    return collector.play(problem, POLICY, key)


@eqx.filter_jit
def collected(collector, problem, policy, key):
    return collector.collect(problem, policy, collector.init(problem, policy, key))


@jax.jit
def two_batches(key):
    collector, problem = Episodes(64, 6), Problem(Countdown(limit=5))
    state = collector.init(problem, POLICY, key)
    first, state, statistics = collector.collect(problem, POLICY, state)
    second, state, _ = collector.collect(problem, POLICY, state)
    return first, second, statistics, state


FIRST, SECOND, STATISTICS, STATE = two_batches(jax.random.key(0))


@pytest.mark.parametrize("experience", [FIRST, SECOND], ids=["first", "second"])
def test_mask_ends_with_the_episode(experience):
    """A start of k ends after k steps; more than 5 are cut by the environment (at 5, before the horizon of 6)."""
    start = np.asarray(experience.observation)[0, :, 0].astype(int)
    length = np.minimum(start, 5)
    mask = np.asarray(experience.extras["mask"])
    np.testing.assert_array_equal(mask, np.arange(6)[:, None] < length)
    np.testing.assert_array_equal(np.asarray(experience.reward).sum(axis=0), length * (length + 1) / 2)
    ended, cut = np.asarray(experience.terminated), np.asarray(experience.truncated)
    np.testing.assert_array_equal(ended.sum(axis=0), start <= 5)
    np.testing.assert_array_equal((ended | cut).sum(axis=0), 1)
    np.testing.assert_array_equal(np.argmax(ended | cut, axis=0), length - 1)
    np.testing.assert_array_equal(np.asarray(experience.carry)[0], 0)
    np.testing.assert_array_equal(np.asarray(experience.carry)[mask], np.nonzero(mask)[0])


def test_batches_are_fresh_and_different():
    assert not np.array_equal(FIRST.observation[0], SECOND.observation[0])
    assert int(STATE.samples) == 2 * 64 * 6


def test_statistics_are_of_whole_episodes():
    length = np.minimum(np.asarray(FIRST.observation)[0, :, 0], 5)
    assert int(STATISTICS.episodes) == 64
    assert float(STATISTICS.length_sum) == length.sum()
    assert float(STATISTICS.return_sum) == (length * (length + 1) / 2).sum()


def test_horizon_cuts_what_still_runs():
    experience, _ = played(Episodes(32, 4), Problem(Countdown()), jax.random.key(1))
    start = np.asarray(experience.observation)[0, :, 0]
    np.testing.assert_array_equal(np.asarray(experience.truncated)[-1], start > 4)
    np.testing.assert_array_equal(np.asarray(experience.terminated).any(axis=0), start <= 4)
    assert not np.asarray(experience.truncated)[:-1].any()


def test_nan_after_the_end_is_nobodys_business():
    _, statistics = played(Episodes(32, 4), Problem(Countdown(spoiled=2)), jax.random.key(0))
    assert int(statistics.nonfinite_rewards) == 32  # once an episode, and not in the ones that do not count


def test_members_play_their_own_episodes():
    problem, policies = Problem(Countdown()), Constant(jnp.array([0, 1]))
    collector = PopulationEpisodes(2, 16, 5)
    keys = jax.random.split(jax.random.key(3), 2)
    experience, state, statistics = collected(collector, problem, policies, keys)
    assert experience.reward.shape == (2, 5, 16)
    np.testing.assert_array_equal(experience.action, np.array([0, 1])[:, None, None] * np.ones((2, 5, 16)))
    assert not np.array_equal(experience.observation[0], experience.observation[1])
    for i in range(2):
        expected, _, _ = collected(Episodes(16, 5), problem, Constant(jnp.asarray(i)), keys[i])
        np.testing.assert_array_equal(experience.observation[i], expected.observation)
    assert int(statistics.episodes) == 32
    assert collector.samples_per_iteration == 2 * 16 * 5 == int(state.samples)


def test_one_key_becomes_a_different_one_for_each_member():
    collector, policies = PopulationEpisodes(3, 2, 2), Constant(jnp.arange(3))
    keys = jax.random.key_data(collector.init(Problem(Countdown()), policies, jax.random.key(0)).key)
    assert len(np.unique(np.asarray(keys), axis=0)) == 3


def test_members_that_share_a_key_are_refused():
    shared = jnp.stack([jax.random.key(5)] * 2)
    with pytest.raises(InputError, match=r"key is .*different for every member"):
        PopulationEpisodes(2, 4, 4).init(Problem(Countdown()), Constant(jnp.arange(2)), shared)


def test_policies_must_be_as_many_as_members():
    with pytest.raises(InputError, match=r"policy has a leaf of shape \(3,\).*2 members"):
        PopulationEpisodes(2, 4, 4).init(Problem(Countdown()), Constant(jnp.arange(3)), jax.random.key(0))


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"num_episodes": 0, "horizon": 5}, InputError, "num_episodes is 0"),
        ({"num_episodes": 4, "horizon": 0}, InputError, "horizon is 0"),
        # The hook that checks types in tests speaks first; without it the library does.
        ({"num_episodes": 4, "horizon": None}, (InputTypeError, TypeError), "horizon"),
    ],
)
def test_bad_sizes(sizes, kind, message):
    with pytest.raises(kind, match=message):
        Episodes(**sizes)
    with pytest.raises(kind, match=message):
        PopulationEpisodes(members=2, **sizes)


def test_simulators_on_the_host_are_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"PolicyGradient needs an environment that can start from any state"):
        train(PolicyGradient(num_episodes=2, horizon=5), "gymnasium:CartPole-v1", iterations=1)
