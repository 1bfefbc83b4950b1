"""Batches of Gymnasium environments: what they deliver, restart, and resume."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs import as_problem
from steersman.envs.gymnasium_bridge import GymnasiumProblem
from steersman.envs.gymnasium_worker import episode_seed
from steersman.errors import InputError, InputTypeError, RunError


def own_environment(kind="plain", length=5):
    """A function that makes a counting environment. Everything is local, so that it can be sent by value."""

    class Counting(gymnasium.Env):
        """Adds up its actions; ends when told to. `kind` adds one peculiarity."""

        episodes = 0

        def __init__(self):
            self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
            self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float64)
            if kind == "nested":
                place = spaces.Box(-np.inf, np.inf, (2,), np.float64)
                self.observation_space = spaces.Dict({"place": place, "step": spaces.Discrete(100)})
                self.action_space = spaces.Tuple((self.action_space, spaces.Discrete(3, start=1)))
            if kind == "text":
                self.observation_space = spaces.Text(5)

        def _observe(self):
            place = np.array([self.total, self.start])
            return {"place": place, "step": self.count} if kind == "nested" else place

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.start = self.np_random.uniform()
            self.total, self.count, self.before = 0.0, 0, None
            Counting.episodes += 1
            if kind == "forgetful":
                self.start = Counting.episodes
            return self._observe(), {}

        def step(self, action):
            if kind == "nested":
                self.total += float(action[0][0]) * int(action[1])
            else:
                self.total += float(action[0])
            if kind == "keeps":
                # A penalty on the change of the action, which it does not copy.
                self.total += 0.0 if self.before is None else float(self.before[0])
                self.before = action
            self.count += 1
            if kind == "fails" and self.total > 2.0:
                raise ValueError("the arm is on fire")
            reward = {"vector": np.array([self.total, 1.0]), "nan": np.nan}.get(kind, self.total)
            info = {"cost": 2 * self.total} if kind == "costs" else {}
            if kind == "named":
                info = {"costs": {"fuel": 1.0, "heat": self.total}, "duration": self.count}
            return self._observe(), reward, self.total > 3.0, self.count >= length, info

    return Counting


def actions_of(problem, count, steps, seed=0):
    problem.action_space.seed(seed)
    return [np.stack([problem.action_space.sample() for _ in range(count)]) for _ in range(steps)]


def play(problem, count, actions, *, seed=3, **options):
    """Everything that a batch delivers, one tuple of arrays for each step."""
    with problem.start(count, seed, **options) as environments:
        rows = [(environments.reset(),)]
        for action in actions:
            observation, reward, terminated, truncated, info = environments.step(action)
            rows.append((observation, reward, terminated, truncated, info["final_observation"]))
    return rows


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype


def reference(make, seed, row, actions):
    """The same stream from a fresh environment, stepped by hand."""
    env, episode = make(), 0
    observation, _ = env.reset(seed=episode_seed(seed, row, episode))
    yield (observation,)
    for action in actions:
        final, reward, terminated, truncated, _ = env.step(action)
        observation = final
        if terminated or truncated:
            episode += 1
            observation, _ = env.reset(seed=episode_seed(seed, row, episode))
        yield observation, reward, terminated, truncated, final


@pytest.mark.parametrize(
    ("name", "steps", "ends"), [("CartPole-v1", 80, "terminated"), ("Pendulum-v1", 210, "truncated")]
)
def test_a_batch_is_what_single_environments_do(name, steps, ends):
    problem = GymnasiumProblem(name, workers=0)
    actions = actions_of(problem, 3, steps)
    delivered = play(problem, 3, actions)
    ended = 0
    for row in range(3):
        expected = reference(lambda: gymnasium.make(name), 3, row, [a[row] for a in actions])
        for t, (got, truth) in enumerate(zip(delivered, expected, strict=True)):
            for array, value in zip(got, truth, strict=True):
                np.testing.assert_array_equal(array[row], np.asarray(value, array.dtype))
            if t > 0 and truth[2 if ends == "terminated" else 3]:
                ended += 1
                assert not np.array_equal(got[0][row], got[4][row])
            elif t > 0:
                np.testing.assert_array_equal(got[0][row], got[4][row])
    assert ended >= 3


def test_types_are_those_of_jax_and_the_spaces_say_so():
    problem = GymnasiumProblem(own_environment("nested"))
    assert problem.name == "Counting"
    assert problem.num_agents == 0
    assert problem.on_host
    assert problem.observation_space["place"].dtype == np.float32
    assert problem.observation_space["step"].dtype == np.int32
    assert problem.action_space[0] == spaces.Box(-1.0, 1.0, (1,), np.float32)
    assert problem.action_space[1].start == 1
    with problem.start(2, 0, workers=0) as environments:
        observation = environments.reset()
        assert observation["place"].dtype == np.float32
        assert observation["place"].shape == (2, 2)
        assert observation["step"].dtype == np.int32
        action = (np.full((2, 1), 0.5, np.float32), np.array([1, 3], np.int32))
        observation, reward, *_ = environments.step(action)
    np.testing.assert_array_equal(observation["place"][:, 0], np.float32([0.5, 1.5]))
    np.testing.assert_array_equal(observation["step"], [1, 1])
    np.testing.assert_array_equal(reward, np.float32([0.5, 1.5]))


def test_worker_processes_change_nothing():
    problem = GymnasiumProblem(own_environment("nested"))
    rng = np.random.default_rng(0)
    actions = [(rng.uniform(-1, 1, (5, 1)), rng.integers(1, 4, 5)) for _ in range(12)]
    flat = [play_nested(problem, actions, workers) for workers in (0, 2, 3)]
    assert_same(flat[0], flat[1])
    assert_same(flat[0], flat[2])
    assert not multiprocessing.active_children()


def play_nested(problem, actions, workers):
    rows = play(problem, 5, actions, workers=workers)
    return [
        tuple(leaf for part in row for leaf in (part.values() if isinstance(part, dict) else [part])) for row in rows
    ]


def test_streams_belong_to_seeds_and_not_to_batches():
    problem = GymnasiumProblem("CartPole-v1", workers=0)
    actions = actions_of(problem, 4, 60)
    together = play(problem, 2, actions, seed=[5, 8])
    alone = [play(problem, 2, [a[rows] for a in actions], seed=s) for s, rows in ((5, slice(0, 2)), (8, slice(2, 4)))]
    for seed, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
        assert_same([tuple(leaf[rows] for leaf in step) for step in together], alone[seed])
    assert_same(play(problem, 4, actions), play(problem, 4, actions))
    assert not np.array_equal(play(problem, 4, [], seed=0)[0][0], play(problem, 4, [], seed=1)[0][0])


def test_parts_are_stepped_on_their_own():
    problem = GymnasiumProblem("CartPole-v1", workers=0)
    actions = actions_of(problem, 3, 40)
    whole = play(problem, 3, actions, seed=[1, 2][:1])
    with problem.start(3, 1, parts=2) as environments:
        first, second = environments.reset(0), environments.reset(1)
        np.testing.assert_array_equal(np.concatenate([first, second]), whole[0][0])
        for t, action in enumerate(actions):
            environments.step_async(action[:1], 0)
            environments.step_async(action[1:], 1)
            later, earlier = environments.step_wait(1), environments.step_wait(0)
            np.testing.assert_array_equal(np.concatenate([earlier.observation, later.observation]), whole[t + 1][0])


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Hopper-v5", "HalfCheetah-v5"])
def test_a_snapshot_continues_bit_for_bit(name):
    if name in ("Hopper-v5", "HalfCheetah-v5"):
        pytest.importorskip("mujoco")
    problem = GymnasiumProblem(name, workers=0)
    actions = actions_of(problem, 3, 60)
    with problem.start(3, 11, parts=2) as environments:
        for part in (0, 1):
            environments.reset(part)
        for action in actions[:33]:
            environments.step(action[:1], 0)
            environments.step(action[1:], 1)
        snapshot = environments.snapshot()
        assert snapshot["length"].max() > 0
        expected = [(environments.step(a[:1], 0), environments.step(a[1:], 1)) for a in actions[33:]]
        final = environments.snapshot()
    # Another batch, started from another seed and somewhere else.
    with problem.start(3, 12, parts=2) as environments:
        environments.restore(snapshot)
        np.testing.assert_array_equal(environments.snapshot()["action/0"], snapshot["action/0"])
        for action, truth in zip(actions[33:], expected, strict=True):
            for part, rows in ((0, action[:1]), (1, action[1:])):
                got = environments.step(rows, part)
                np.testing.assert_array_equal(got.observation, truth[part].observation)
                np.testing.assert_array_equal(got.reward, truth[part].reward)
                np.testing.assert_array_equal(got.info["final_observation"], truth[part].info["final_observation"])
        for key, array in environments.snapshot().items():
            np.testing.assert_array_equal(array, final[key])


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 17), length=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_a_snapshot_may_be_taken_anywhere(before, length, seed):
    problem = GymnasiumProblem(own_environment(length=length), workers=0)
    actions = actions_of(problem, 2, before + 4, seed=seed)
    with problem.start(2, seed) as first, problem.start(2, 0) as second:
        first.reset()
        for action in actions[:before]:
            first.step(action)
        second.restore(first.snapshot())
        for action in actions[before:]:
            a, b = first.step(action), second.step(action)
            np.testing.assert_array_equal(a.observation, b.observation)
            np.testing.assert_array_equal(a.reward, b.reward)


def test_a_snapshot_crosses_arrangements():
    problem = GymnasiumProblem(own_environment("nested"))
    rng = np.random.default_rng(1)
    actions = [(rng.uniform(-1, 1, (3, 1)), rng.integers(1, 4, 3)) for _ in range(14)]
    with problem.start(3, 1, workers=0) as here, problem.start(3, 2, workers=2) as there:
        assert there.workers == 2
        here.reset()
        for action in actions[:8]:
            here.step(action)
        there.restore(here.snapshot())
        for action in actions[8:]:
            np.testing.assert_array_equal(
                here.step(action).observation["place"], there.step(action).observation["place"]
            )
        for key, array in here.snapshot().items():
            np.testing.assert_array_equal(array, there.snapshot()[key])


def test_what_is_not_deterministic_is_not_continued():
    problem = GymnasiumProblem(own_environment("forgetful"), workers=0)
    with problem.start(2, 0) as environments:
        environments.reset()
        environments.step(np.zeros((2, 1)))
        snapshot = environments.snapshot()
        with pytest.raises(RunError, match=r"Counting is not deterministic.*cannot be continued exactly"):
            environments.restore(snapshot)


def test_snapshots_of_other_batches_are_refused():
    problem = GymnasiumProblem("CartPole-v1", workers=0)
    with problem.start(2, 0) as environments, problem.start(3, 0) as larger:
        environments.reset(), larger.reset()
        with pytest.raises(InputError, match="snapshot is 'of 3 environments'"):
            environments.restore(larger.snapshot())
        snapshot = environments.snapshot()
        with pytest.raises(InputError, match=r"snapshot is .*'digest', 'episode', 'length'"):
            environments.restore({"seed": snapshot["seed"]})
        with pytest.raises(InputError, match="snapshot is 'with other actions'"):
            environments.restore(snapshot | {"action/0": np.zeros((4, 2))})
        environments.retire(np.array([True, False]))
        with pytest.raises(InputError, match="retired is 1, but it must be 0"):
            environments.snapshot()


def vector(name, count, mode="Disabled"):
    return SyncVectorEnv([lambda: gymnasium.make(name)] * count, autoreset_mode=mode)


def test_a_vector_environment_does_the_same():
    single = GymnasiumProblem("CartPole-v1", workers=0)
    problem = GymnasiumProblem(vector("CartPole-v1", 3))
    assert problem.observation_space == single.observation_space
    assert problem.action_space == single.action_space
    actions = actions_of(single, 3, 90)
    assert_same(play(problem, 3, actions), play(single, 3, actions))
    with problem.start(3, 3) as environments:
        environments.reset()
        for action in actions[:50]:
            environments.step(action)
        snapshot = environments.snapshot()
        expected = [environments.step(action).observation for action in actions[50:]]
        environments.restore(snapshot)
        for action, truth in zip(actions[50:], expected, strict=True):
            np.testing.assert_array_equal(environments.step(action).observation, truth)
    with pytest.raises(InputError, match="num_envs is 4, but it must be 3"):
        problem.start(4, 0)
    with pytest.raises(InputError, match="parts is 2, but it must be 1"):
        problem.start(3, 0, parts=2)
    with pytest.raises(InputTypeError, match=r"problem is .*vector environment"):
        problem.make()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_vector_environments_that_restart_themselves_are_refused(mode):
    with pytest.raises(InputError, match=f"source is .*autoreset mode '{mode}', but it must be 'Disabled'"):
        GymnasiumProblem(vector("CartPole-v1", 2, mode))


def test_an_environment_may_keep_the_action_it_was_given():
    problem = GymnasiumProblem(own_environment("keeps"), workers=0)
    with problem.start(1, 0) as environments:
        environments.reset()
        environments.step(np.array([[0.5]]))
        observation = environments.step(np.array([[0.25]])).observation
    assert observation[0, 0] == 0.5 + 0.25 + 0.5


def test_vector_rewards_costs_and_nonfinite_values_are_passed_on():
    action = np.full((2, 1), 0.5)

    def one_step(kind):
        with GymnasiumProblem(own_environment(kind), workers=0).start(2, 0) as environments:
            environments.reset()
            return environments.step(action)

    assert one_step("vector").reward.tolist() == [[0.5, 1.0], [0.5, 1.0]]
    np.testing.assert_array_equal(one_step("costs").info["costs"]["cost"], [1.0, 1.0])
    named = one_step("named").info
    np.testing.assert_array_equal(named["costs"]["heat"], [0.5, 0.5])
    np.testing.assert_array_equal(named["duration"], [1, 1])
    assert np.isnan(one_step("nan").reward).all()


def test_retired_rows_stand_still():
    problem = GymnasiumProblem(own_environment(length=50), workers=0)
    with problem.start(3, 0) as environments:
        environments.reset()
        environments.step(np.full((3, 1), 0.5))
        environments.retire(np.array([False, True, False]))
        observation = environments.step(np.full((3, 1), 0.5)).observation
    assert observation[:, 0].tolist() == [1.0, 0.5, 1.0]


def test_sources():
    assert GymnasiumProblem(gymnasium.make("CartPole-v1", max_episode_steps=7), workers=0).spec.max_episode_steps == 7
    short = GymnasiumProblem("Pendulum-v1", workers=0, make_options={"max_episode_steps": 4, "g": 5.0})
    assert short.make().unwrapped.g == 5.0
    rows = play(short, 1, actions_of(short, 1, 8))
    assert [bool(row[3][0]) for row in rows[1:]] == [False, False, False, True] * 2
    assert as_problem(lambda: gymnasium.make("CartPole-v1")).name == "CartPole-v1"
    assert as_problem(gymnasium.make("CartPole-v1")).name == "CartPole-v1"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: GymnasiumProblem("CartPol-v1"),
            InputError,
            "Unknown Gymnasium environment 'CartPol-v1'.*'CartPole-v1'",
        ),
        (lambda: GymnasiumProblem("nowhere:Task-v0"), InputError, "source is 'nowhere:Task-v0', but nowhere cannot"),
        (lambda: GymnasiumProblem(own_environment()()), InputTypeError, "source is a Counting without a spec"),
        (lambda: GymnasiumProblem(dict), InputTypeError, "source is a function that makes a dict"),
        (lambda: GymnasiumProblem(own_environment("text")), InputTypeError, "The observation space is a Text"),
        (lambda: GymnasiumProblem("CartPole-v1", workers=-1), InputError, "workers is -1, but it must be at least 0"),
        (
            lambda: GymnasiumProblem("CartPole-v1", make_options={"gravty": 1}),
            InputError,
            "make_options is {'gravty': 1}",
        ),
        (
            lambda: GymnasiumProblem(own_environment(), make_options={"g": 1}),
            InputError,
            "make_options is {'g': 1}, but it must be empty",
        ),
    ],
)
def test_unusable_sources_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_misuse_is_named():
    problem = GymnasiumProblem("Pendulum-v1", workers=0)
    for options, message in [
        ({"num_envs": 0, "seed": 0}, "num_envs is 0, but it must be at least 1"),
        ({"num_envs": 2, "seed": -1}, "seed is -1, but it must be at least 0"),
        ({"num_envs": 2, "seed": []}, "seed is .*at least one"),
        ({"num_envs": 2, "seed": 0, "parts": 3}, "parts is 3, but it must be at most num_envs, which is 2"),
    ]:
        with pytest.raises(InputError, match=message):
            problem.start(**options)
    environments = problem.start(2, 0)
    with pytest.raises(InputError, match="part is 0, but it must be one that was reset"):
        environments.step(np.zeros((2, 1)))
    environments.reset()
    with pytest.raises(InputError, match=r"action has shape \(2,\), but it must be \(2, 1\): one action for each"):
        environments.step(np.zeros(2))
    with pytest.raises(InputError, match="part is 0, but it must be one that step_async"):
        environments.step_wait()
    environments.step_async(np.zeros((2, 1)))
    with pytest.raises(InputError, match="part is 0, but it must be one whose last step was waited for"):
        environments.step_async(np.zeros((2, 1)))
    with pytest.raises(InputError, match="part is 1, but it must be one of 0 to 0"):
        environments.reset(1)
    environments.close()
    environments.close()
    with pytest.raises(RunError, match="Pendulum-v1 was closed"):
        environments.reset()
    nested = GymnasiumProblem(own_environment("nested"), workers=0)
    with nested.start(2, 0) as environments:
        environments.reset()
        with pytest.raises(InputTypeError, match="action is a ndarray, but it must be a batch of Tuple"):
            environments.step(np.zeros((3, 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_failing_environments_are_named(workers):
    problem = GymnasiumProblem(own_environment("fails", length=9))
    environments = problem.start(2, 0, workers=workers)
    environments.reset()
    environments.step(np.ones((2, 1)))
    environments.step(np.ones((2, 1)))
    with pytest.raises(RunError, match=r"Counting failed.*ValueError: the arm is on fire"):
        environments.step(np.ones((2, 1)))
    with pytest.raises(RunError, match="Counting was closed"):
        environments.reset()
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_named_and_leaves_nothing_behind():
    environments = GymnasiumProblem(own_environment()).start(2, 0, workers=2)
    environments.reset()
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"A worker process of Counting died \(exit status -9\)"):
        environments.step(np.zeros((2, 1)))
    assert not multiprocessing.active_children()


def test_what_cannot_be_sent_is_stepped_by_threads():
    lock = threading.Lock()

    def closing_over_a_lock(kind):
        make = own_environment(kind)

        def locked():
            with lock:
                return make()

        return GymnasiumProblem(locked, workers=2)

    problem = closing_over_a_lock("plain")
    with pytest.warns(
        UserWarning, match="Counting is stepped by 2 threads of this process instead of worker processes"
    ):
        environments = problem.start(5, 3)
    actions = actions_of(problem, 5, 12)
    expected = play(problem, 5, actions, workers=0)
    with environments:
        assert (environments.workers, environments.threads) == (0, 2)
        np.testing.assert_array_equal(environments.reset(), expected[0][0])
        for action, truth in zip(actions, expected[1:], strict=True):
            observation, reward, terminated, truncated, info = environments.step(action)
            assert_same([(observation, reward, terminated, truncated, info["final_observation"])], [truth])
        environments.restore(environments.snapshot())
    with pytest.warns(UserWarning, match="threads"):
        failing = closing_over_a_lock("fails").start(2, 0)
    failing.reset()
    failing.step(np.ones((2, 1)))
    failing.step(np.ones((2, 1)))
    with pytest.raises(RunError, match="Counting failed: ValueError: the arm is on fire"):
        failing.step(np.ones((2, 1)))
    assert not multiprocessing.active_children()


def test_workers_are_chosen_by_what_a_step_costs():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    problem = GymnasiumProblem("CartPole-v1")
    problem.step_seconds = 1e-6
    assert problem._choose_workers(None, 40) == 0
    problem.step_seconds = 1.0
    assert problem._choose_workers(None, 40) == (cores if cores > 1 else 0)
    assert problem._choose_workers(None, 1) == (1 if cores > 1 else 0)
    assert problem._choose_workers(9, 4) == 4


@pytest.mark.slow
def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    pytest.importorskip("mujoco")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            print("once", flush=True)
            import gymnasium
            from steersman.envs.gymnasium_bridge import GymnasiumProblem

            class Mine(gymnasium.Wrapper):
                pass

            with GymnasiumProblem(lambda: Mine(gymnasium.make("Hopper-v5")), workers=2).start(4, 0) as environments:
                print(environments.workers, environments.reset().shape, flush=True)
            """
        )
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["once", "2 (4, 11)"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]  # no log file of MuJoCo's
