"""Rollouts on the host: what they store, how they resume, and that timing changes nothing."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from steersman.envs.gymnasium_bridge import GymnasiumProblem
from steersman.envs.gymnasium_worker import episode_seed
from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError
from steersman.policies import Policy, Preprocess, head_for, make_policy
from steersman.training import host
from steersman.training.checkpoints import Checkpoints
from steersman.training.host import HostRollout, host_episode_frames, host_episodes, record_host_episode

KEYS = jax.random.split(jax.random.key(0), 2)
# One size for most tests, so that most share their compiled functions.
ROLLOUT = HostRollout(3, 10)


def network(problem, key, memory=0):
    preprocess = Preprocess(layout(problem.observation_space))
    return make_policy(preprocess, head_for(problem.action_space), hidden=(8,), memory=memory, key=key)


def networks(problem, keys=KEYS, memory=0):
    return eqx.filter_vmap(lambda key: network(problem, key, memory))(keys)


@pytest.fixture(scope="module")
def cartpole():
    return GymnasiumProblem("CartPole-v1", workers=0)


@pytest.fixture(scope="module")
def short_pendulum():
    return GymnasiumProblem("Pendulum-v1", workers=0, make_options={"max_episode_steps": 9})


def numpy_of(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_the_data_obeys_the_environment(name, cartpole, short_pendulum):
    problem = cartpole if name == "CartPole-v1" else short_pendulum
    policies = networks(problem)
    with ROLLOUT.init(problem, policies, KEYS) as live:
        batches = [numpy_of(live.collect(policies)) for _ in range(6)]
        numbers = list(zip(live.environments._seed, live.environments._number, strict=True))
    experience = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *(batch[0] for batch in batches))
    assert experience.reward.shape == (2, 60, 3)
    assert experience.record.log_prob.shape == (2, 60, 3)
    member_seeds = [seed for seed, number in numbers if number == 0]
    for member in range(2):
        for n in range(3):
            env, episode = problem.make(), 0
            observation, _ = env.reset(seed=episode_seed(int(member_seeds[member]), n, 0))
            for t in range(60):
                row = jax.tree.map(lambda leaf: leaf[member, t, n], experience)  # noqa: B023
                np.testing.assert_array_equal(row.observation, np.asarray(observation, np.float32))
                action = int(row.action) if name == "CartPole-v1" else row.action
                observation, reward, terminated, truncated, _ = env.step(action)
                assert row.reward == np.float32(reward)
                assert (row.terminated, row.truncated) == (terminated, truncated)
                np.testing.assert_array_equal(row.next_observation, np.asarray(observation, np.float32))
                if terminated or truncated:
                    episode += 1
                    observation, _ = env.reset(seed=episode_seed(int(member_seeds[member]), n, episode))
    ended = experience.terminated if name == "CartPole-v1" else experience.truncated
    assert ended.sum() >= 4
    starts = np.roll(ended, 1, axis=1)[:, 1:]
    following = np.abs(experience.observation[:, 1:] - experience.next_observation[:, :-1]).sum(-1) > 0
    np.testing.assert_array_equal(following, starts)


def test_the_record_is_what_the_policy_knew(cartpole):
    policies = networks(cartpole)
    with ROLLOUT.init(cartpole, policies, KEYS) as live:
        experience, _ = live.collect(policies)
    for member in range(2):
        policy = jax.tree.map(lambda leaf: leaf[member] if eqx.is_array(leaf) else leaf, policies)  # noqa: B023
        one = jax.tree.map(lambda leaf: leaf[member], experience)  # noqa: B023
        logits, _ = jax.vmap(jax.vmap(lambda o: policy.parameters(o, ())))(one.observation)  # noqa: B023
        np.testing.assert_allclose(one.record.parameters, logits, atol=1e-6)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), one.action[..., None], -1)[..., 0]
        np.testing.assert_allclose(one.record.log_prob, chosen, atol=1e-6)
    # Different keys in every place: a coin that is fair falls on both sides in every step.
    assert 0.2 < float(jnp.mean(experience.action)) < 0.8
    assert len(np.unique(np.asarray(experience.action).reshape(2 * 10, 3), axis=0)) > 4


def test_statistics_are_sums_over_the_episodes_that_ended(cartpole):
    policies = networks(cartpole)
    with ROLLOUT.init(cartpole, policies, KEYS) as live:
        batches = [live.collect(policies) for _ in range(12)]
        assert live.samples.tolist() == [360, 360]
    experience = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *(numpy_of(batch[0]) for batch in batches))
    for member in range(2):
        lengths = []
        for n in range(3):
            ends = np.flatnonzero(experience.done[member, :, n])
            lengths.append(np.diff(ends, prepend=-1))
        lengths = np.concatenate(lengths)
        assert sum(int(s.episodes[member]) for _, s in batches) == len(lengths)
        assert sum(float(s.length_sum[member]) for _, s in batches) == lengths.sum()
        assert sum(float(s.return_sum[member]) for _, s in batches) == lengths.sum()  # one point a step


def everything(problem, policies, rollout, keys=KEYS, batches=2):
    with rollout.init(problem, policies, keys) as live:
        return [numpy_of(live.collect(policies)) for _ in range(batches)]


def test_overlap_and_workers_change_nothing(short_pendulum):
    policies = networks(short_pendulum, memory=4)
    overlapped = everything(short_pendulum, policies, ROLLOUT)
    assert_same(overlapped, everything(short_pendulum, policies, HostRollout(3, 10, overlap=False)))
    workers = GymnasiumProblem("Pendulum-v1", workers=2, make_options={"max_episode_steps": 9})
    assert_same(overlapped, everything(workers, policies, ROLLOUT))


def test_a_member_does_not_depend_on_the_others(cartpole):
    both = everything(cartpole, networks(cartpole), ROLLOUT)
    alone = everything(cartpole, networks(cartpole, KEYS[1:]), ROLLOUT, KEYS[1:])
    for (two, _), (one, _) in zip(both, alone, strict=True):
        np.testing.assert_array_equal(two.observation[1:, 0], one.observation[:, 0])
        np.testing.assert_array_equal(two.action[1:], one.action)
        np.testing.assert_allclose(two.next_observation[1:], one.next_observation, rtol=1e-5)


def test_memory_starts_anew_with_every_episode(short_pendulum):
    class Counter(Policy):
        """Acts by how often it has acted in this episode."""

        start: jax.Array

        def init(self, key):
            return self.start

        def __call__(self, observation, carry, key):
            return jnp.full(1, carry / 10), carry + 1.0

    experience, _ = everything(short_pendulum, Counter(jnp.array([0.0, 5.0])), ROLLOUT)[0]
    within = np.arange(10) % 9
    for member, start in enumerate((0, 5)):
        np.testing.assert_array_equal(experience.carry[member], np.stack([within + start] * 3, 1))
        np.testing.assert_allclose(experience.action[member, :, 0, 0], (within + start) / 10, rtol=1e-6)
    assert experience.record == ()


@pytest.mark.parametrize("memory", [0, 4])
def test_a_snapshot_continues_bit_for_bit_in_the_middle_of_episodes(short_pendulum, memory, tmp_path):
    policies = networks(short_pendulum, memory=memory)
    checkpoints = Checkpoints(tmp_path)
    with ROLLOUT.init(short_pendulum, policies, KEYS) as live:
        checkpoints.save(0, live.snapshot(), {})  # where no environment has been stepped yet
        live.collect(policies)
        checkpoints.save(1, live.snapshot(), {})
        expected = [numpy_of(live.collect(policies)) for _ in range(3)]
        expected_end = live.snapshot()
    loaded = checkpoints.load()[1]
    checkpoints.close()
    other_keys = jax.random.split(jax.random.key(9), 2)
    with ROLLOUT.init(short_pendulum, policies, other_keys) as live:
        live.restore(loaded)
        assert live.samples.tolist() == [30, 30]
        assert_same(expected, [numpy_of(live.collect(policies)) for _ in range(3)])
        assert_same(expected_end, live.snapshot())


def test_snapshots_of_other_rollouts_are_refused(cartpole, short_pendulum):
    policies = networks(cartpole)
    with ROLLOUT.init(cartpole, policies, KEYS) as live:
        snapshot = live.snapshot()
    with (
        HostRollout(4, 10).init(cartpole, policies, KEYS) as live,
        pytest.raises(InputError, match="snapshot differs from this rollout in episode_length"),
    ):
        live.restore(snapshot)
    with (
        ROLLOUT.init(cartpole, networks(cartpole, memory=4), KEYS) as live,
        pytest.raises(InputError, match="snapshot differs from this rollout in carry/0/0"),
    ):
        live.restore(snapshot)


def test_one_environment_and_vector_environments_have_one_half(cartpole):
    policies = networks(cartpole)
    experience, _ = everything(cartpole, policies, HostRollout(1, 10))[0]
    assert experience.reward.shape == (2, 10, 1)
    vector = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 6, autoreset_mode="Disabled")
    together = everything(GymnasiumProblem(vector), policies, ROLLOUT)
    single = everything(cartpole, policies, ROLLOUT)
    np.testing.assert_array_equal(together[0][0].action, single[0][0].action)
    np.testing.assert_allclose(together[1][0].observation, single[1][0].observation, rtol=1e-5)


class Painted(gymnasium.Env):
    """Walks by its action and paints where it is; two rewards, a cost, and no end of its own."""

    observation_space = spaces.Dict({"place": spaces.Box(-np.inf, np.inf, (1,), np.float64), "t": spaces.Discrete(99)})
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.t = self.np_random.uniform(), 0
        return self._observe(), {}

    def _observe(self):
        return {"place": np.array([self.place]), "t": self.t}

    def step(self, action):
        self.place, self.t = self.place + float(action[0]), self.t + 1
        reward = np.array([self.place, np.nan if self.t == 3 else 1.0])
        return self._observe(), reward, False, self.t >= 5, {"cost": self.t}

    def render(self):
        return np.full((4, 4, 3), self.t, np.uint8)


class Steady(Policy):
    """The same action for ever."""

    value: jax.Array

    def __call__(self, observation, carry, key):
        return jnp.reshape(self.value, (1,)), carry


def test_nested_observations_vector_rewards_and_costs():
    problem = GymnasiumProblem(Painted, workers=0)
    experience, statistics = everything(problem, Steady(jnp.array([0.5, 0.25])), HostRollout(2, 6))[0]
    assert experience.observation["place"].shape == (2, 6, 2, 1)
    assert experience.reward.shape == (2, 6, 2, 2)
    np.testing.assert_array_equal(experience.next_observation["t"][0, :, 0], [1, 2, 3, 4, 5, 1])
    np.testing.assert_array_equal(experience.observation["t"][1, :, 1], [0, 1, 2, 3, 4, 0])
    np.testing.assert_array_equal(experience.extras["costs"]["cost"][0, :, 0], [1, 2, 3, 4, 5, 1])
    assert statistics.return_sum.shape == (2, 2)
    assert statistics.nonfinite_rewards.tolist() == [2, 2]
    assert statistics.nonfinite_observations.tolist() == [0, 0]
    place = experience.observation["place"][:, 0, :, 0]
    # Each episode visits place + a, ..., place + 5 a: 5 place + 15 a.
    np.testing.assert_allclose(
        statistics.return_sum[:, 0], 5 * place.sum(1) + 2 * 15 * np.array([0.5, 0.25]), rtol=1e-5
    )


def test_episodes_are_whole_and_the_same_as_by_hand(cartpole):
    policy = network(cartpole, jax.random.key(3)).mode()
    returns, lengths = host_episodes(cartpole, policy, 5, 7)
    act = jax.jit(lambda observation: policy(observation, (), jax.random.key(0))[0])
    for row in range(5):
        env = gymnasium.make("CartPole-v1")
        observation, _ = env.reset(seed=episode_seed(7, row, 0))
        steps, over = 0, False
        while not over:
            observation, _, terminated, truncated, _ = env.step(int(act(observation)))
            steps, over = steps + 1, terminated or truncated
        assert (returns[row], lengths[row]) == (steps, steps)
    cut, lengths = host_episodes(cartpole, policy, 5, 7, max_steps=6)
    assert cut.tolist() == lengths.tolist() == [6] * 5


def test_a_vector_environment_plays_several_episodes_in_a_row():
    problem = GymnasiumProblem(SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2, autoreset_mode="Disabled"))
    policy = network(problem, jax.random.key(3)).mode()
    returns, _ = host_episodes(problem, policy, 5, 7)
    assert returns.shape == (5,)
    np.testing.assert_array_equal(returns[:2], host_episodes(problem, policy, 2, 7)[0])
    assert len(set(returns.tolist())) > 1
    with pytest.raises(InputError, match="max_steps is 4, but CartPole-v1, a vector environment of 2, cannot"):
        host_episodes(problem, policy, 3, 7, max_steps=4)


def test_an_episode_is_recorded_with_its_frames():
    problem = GymnasiumProblem(Painted, workers=0)
    policy = Steady(jnp.array(0.5))
    kept = record_host_episode(problem, policy, 3)
    np.testing.assert_array_equal(kept["observations"]["t"], np.arange(5))
    np.testing.assert_array_equal(kept["actions"], np.full((5, 1), 0.5, np.float32))
    assert kept["rewards"].shape == (5, 2)
    assert [int(frame[0, 0, 0]) for frame in kept["frames"]] == [0, 1, 2, 3, 4]
    returns, lengths = host_episodes(problem, policy, 1, 3)
    assert lengths.tolist() == [5]
    np.testing.assert_allclose(returns[0, 0], kept["rewards"][:, 0].sum(), rtol=1e-6)
    assert len(host_episode_frames(problem, policy, 3, max_steps=2)) == 2


def test_a_simulation_without_opengl_is_drawn_from_its_states(monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(host, "_opengl_works", lambda: False)
    problem = GymnasiumProblem("Hopper-v5", workers=0)
    kept = record_host_episode(problem, network(problem, jax.random.key(0)), 0, max_steps=8)
    assert kept["states"]["qpos"].shape == (8, 6)
    # The observation leaves out the first coordinate and clips velocities.
    np.testing.assert_array_equal(kept["observations"][:, :5], kept["states"]["qpos"][:, 1:].astype(np.float32))
    assert len(kept["frames"]) == 8
    for frame in kept["frames"]:
        assert frame.dtype == np.uint8
        assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 5
    assert not np.array_equal(kept["frames"][0], kept["frames"][7])


def test_policies_with_loose_parts_are_refused(cartpole):
    class Loose(Policy):
        allowed: set

        def __call__(self, observation, carry, key):
            return jnp.asarray(min(self.allowed)), carry

    policies = Loose({0, 1})
    with pytest.raises(InputTypeError, match="policies has a part that is neither a JAX array nor hashable"):
        ROLLOUT.init(cartpole, policies, KEYS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda problem: HostRollout(0, 4), "num_envs is 0, but it must be at least 1"),
        (lambda problem: HostRollout(4, 0), "num_steps is 0, but it must be at least 1"),
        (
            lambda problem: HostRollout(2, 2).init(problem, networks(problem), KEYS[:1]),
            r"policies has a leaf of shape \(2, .*leading axis of 1",
        ),
        (
            lambda problem: HostRollout(2, 2).init(problem, networks(problem), KEYS[:0]),
            r"keys is \(0,\), but it must be an array of one key for each member",
        ),
        (
            lambda problem: host_episodes(problem, network(problem, KEYS[0]), 0, 0),
            "num_episodes is 0, but it must be at least 1",
        ),
        (
            lambda problem: host_episodes(problem, network(problem, KEYS[0]), 1, 0, 0),
            "max_steps is 0, but it must be at least 1",
        ),
        (
            lambda problem: record_host_episode(problem, network(problem, KEYS[0]), -1),
            "seed is -1, but it must be at least 0",
        ),
    ],
)
def test_misuse_is_named(cartpole, make, message):
    with pytest.raises(InputError, match=message):
        make(cartpole)
