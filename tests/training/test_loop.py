"""The loop's promises: members are independent, chunks do not matter, nothing saved is lost, and stops say why."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import Environment, Problem
from steersman.envs.dynamics import DiscreteCartPole
from steersman.errors import InputError, InputTypeError, NonFiniteError, RunError
from steersman.policies import Policy, load_policy
from steersman.rl.on_policy import PPO
from steersman.training import IterativeAlgorithm, evaluate_members, train
from steersman.training.checkpoints import to_arrays
from steersman.training.hyperparameters import hyperparameters
from steersman.training.runs import read_metrics

ALGORITHM = PPO(num_envs=4, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=3e-3)
PROBLEM = Problem(DiscreteCartPole())


def same(a, b):
    left, right = to_arrays(a), to_arrays(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=folder)


class Interrupted(Exception):
    pass


def test_metrics_have_one_row_per_iteration_and_member(uninterrupted):
    assert uninterrupted.samples.tolist() == [32 * (i + 1) for i in range(12)]
    assert all(values.shape == (12, 1) for values in uninterrupted.metrics.values())
    saved = read_metrics(uninterrupted.run)
    assert saved["iteration"].tolist() == list(range(1, 13))
    assert saved["seed"].tolist() == [3] * 12
    np.testing.assert_array_equal(saved["policy_loss"], uninterrupted.metrics["policy_loss"][:, 0])


def test_a_resumed_run_ends_bit_identical(uninterrupted, tmp_path):
    def stop(iteration, state):
        if iteration >= 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run", on_chunk=stop)
    resumed = train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run", resume=True)
    same(resumed.state, uninterrupted.state)
    for name in ("metrics.parquet", "policies/seed=3/policy.safetensors", "policies/seed=3/policy.json"):
        assert (tmp_path / "run" / name).read_bytes() == (uninterrupted.run / name).read_bytes()


@pytest.mark.parametrize("failing", [1, 4, 7, 9])
def test_a_full_disk_stops_the_run_and_loses_nothing(uninterrupted, tmp_path, monkeypatch, failing):
    replace, calls = os.replace, 0

    def full(source, target):
        nonlocal calls
        calls += "metrics" in str(target) or "config" in str(target)
        if calls == failing:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run")
    monkeypatch.undo()
    resume = (tmp_path / "run" / "config.yaml").exists()
    resumed = train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run", resume=resume)
    same(resumed.state, uninterrupted.state)
    assert (tmp_path / "run/metrics.parquet").read_bytes() == (uninterrupted.run / "metrics.parquet").read_bytes()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    def stop(iteration, state):
        if iteration >= 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run", on_chunk=stop)
    newest = max((tmp_path / "run/checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    resumed = train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run", resume=True)
    same(resumed.state, uninterrupted.state)


def test_when_every_checkpoint_is_damaged_it_says_so(tmp_path):
    train(ALGORITHM, PROBLEM, iterations=3, run=tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00hostile")
    with pytest.raises(RunError, match="checkpoint"):
        train(ALGORITHM, PROBLEM, iterations=6, run=tmp_path / "run", resume=True)


def test_a_longer_run_continues_a_finished_one(uninterrupted, tmp_path):
    train(ALGORITHM, PROBLEM, iterations=5, seeds=[3], run=tmp_path / "run")
    longer = train(ALGORITHM, PROBLEM, iterations=12, seeds=[3], run=tmp_path / "run", resume=True)
    same(longer.state, uninterrupted.state)


def test_a_run_in_use_is_refused(tmp_path):
    seen = []

    def second(iteration, state):
        with pytest.raises(RunError, match="in use by another process"):
            train(ALGORITHM, PROBLEM, iterations=3, run=tmp_path / "run", resume=True)
        seen.append(iteration)

    train(ALGORITHM, PROBLEM, iterations=2, run=tmp_path / "run", on_chunk=second)
    assert seen


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
        (lambda run: (run / "config.yaml").write_text("format: 99\nversions: {steersman: 9.9}\n"), "format 99.*9.9"),
        (lambda run: (run / "config.yaml").write_text("{[broken"), "cannot be read"),
        (lambda run: (run / "config.yaml").write_text("!!python/object/apply:os.system ['false']"), "cannot be read"),
        (lambda run: (run / "config.yaml").write_text("just text"), "not the configuration of a run"),
    ],
)
def test_a_folder_that_is_no_run_of_this_version(tmp_path, damage, message):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("format: 1\n")
    damage(run)
    with pytest.raises(RunError, match=message):
        train(ALGORITHM, PROBLEM, iterations=1, run=run, resume=True)


def test_an_existing_run_is_not_overwritten(uninterrupted):
    with pytest.raises(RunError, match="holds a run already"):
        train(ALGORITHM, PROBLEM, iterations=1, run=uninterrupted.run)


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train(ALGORITHM, PROBLEM, iterations=1, run=tmp_path / "file" / "run")


def test_a_changed_configuration_cannot_be_resumed(tmp_path):
    train(ALGORITHM, PROBLEM, iterations=2, run=tmp_path / "run")
    wider = PPO(num_envs=4, num_steps=8, hidden=(16,), epochs=2, minibatches=2)
    with pytest.raises(RunError, match="configuration or the version has changed"):
        train(wider, PROBLEM, iterations=4, run=tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="other seeds or settings"):
        train(ALGORITHM, PROBLEM, iterations=4, seeds=[9], run=tmp_path / "run", resume=True)


def test_members_side_by_side_learn_what_each_would_alone():
    together = train(ALGORITHM, PROBLEM, iterations=4, seeds=[1, 2], sweep={"learning_rate": [1e-3, 1e-2]})
    assert [m.seed for m in together.members] == [1, 2, 1, 2]
    from steersman.training import apply_settings

    alone = train(apply_settings(ALGORITHM, {"learning_rate": 1e-2}), PROBLEM, iterations=4, seeds=[2])
    left = jax.tree.leaves(eqx.filter(together.policy(3), eqx.is_inexact_array))
    right = jax.tree.leaves(eqx.filter(alone.policy(), eqx.is_inexact_array))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    returns = evaluate_members(together.policies(), PROBLEM, episodes=4)
    assert returns.shape == (4,)
    assert np.isfinite(returns).all()


def test_saved_policies_act_as_the_trained_ones(uninterrupted):
    loaded = load_policy(uninterrupted.run / "policies" / "seed=3")
    observation = jnp.asarray([0.1, -0.2, 0.03, 0.4])
    for policy in (uninterrupted.policy(), loaded):
        assert isinstance(policy, Policy)
    a, _ = uninterrupted.policy().mode()(observation, (), jax.random.key(0))
    b, _ = loaded.mode()(observation, (), jax.random.key(0))
    assert int(a) == int(b)


class Broken(Environment):
    """Counts steps and misbehaves at the fortieth."""

    nan_reward: bool = eqx.field(static=True, default=True)

    def reset_env(self, key, params):
        return jnp.zeros(2), jnp.zeros((), jnp.int32)

    def step_env(self, key, state, action, params):
        bad = jnp.where(state == 40, jnp.nan, 1.0)
        observation = jnp.zeros(2) if self.nan_reward else jnp.full(2, bad)
        return observation, state + 1, bad if self.nan_reward else jnp.asarray(1.0), jnp.asarray(False), {}

    def observation_space(self, params):
        return gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


@pytest.mark.parametrize(("nan_reward", "what"), [(True, "rewards"), (False, "observations")])
def test_nan_from_the_environment_stops_with_the_place(tmp_path, nan_reward, what):
    with pytest.raises(
        NonFiniteError, match=rf"Broken returned [48] NaN or infinite {what} in iteration 6 \(seed 0\).*"
    ):
        train(ALGORITHM, Problem(Broken(nan_reward=nan_reward)), iterations=9, run=tmp_path / "run")


def test_divergence_stops_and_names_the_last_good_checkpoint(tmp_path):
    wild = PPO(num_envs=4, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=1e30)
    with pytest.raises(NonFiniteError, match=r"became .* in iteration \d+ \(step \d+, seed 0\); .*checkpoint"):
        train(wild, PROBLEM, iterations=9, run=tmp_path / "run")


class Drifting(Broken):
    """Its observation changes from whole numbers to floats with the first step."""

    def reset_env(self, key, params):
        return jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32)


class Merged(Broken):
    """Gives five values, as if an episode could end in one way only."""

    def step(self, key, state, action, params=None):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return observation, state, reward, terminated | truncated, info


@pytest.mark.parametrize(("kind", "message"), [(Drifting, "observation"), (Merged, r"step.*5 values")])
def test_an_environment_that_breaks_its_contract_is_told_so(kind, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        train(ALGORITHM, Problem(kind()), iterations=1)


def test_a_resumed_run_on_a_host_simulator_ends_bit_identical(tmp_path):
    def stop(iteration, state):
        if iteration >= 2:
            raise Interrupted

    arguments = {"problem": "gymnasium:CartPole-v1", "iterations": 5, "seeds": 2}
    whole = train(ALGORITHM, **arguments, run=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(ALGORITHM, **arguments, run=tmp_path / "run", on_chunk=stop)
    resumed = train(ALGORITHM, **arguments, run=tmp_path / "run", resume=True)
    same(resumed.state, whole.state)
    assert (tmp_path / "run/metrics.parquet").read_bytes() == (tmp_path / "whole/metrics.parquet").read_bytes()


class Halving(IterativeAlgorithm):
    """Divides a number by two: the smallest algorithm without interaction."""

    factor: jax.Array = eqx.field(converter=jnp.asarray, default=0.5)

    def init(self, problem, key):
        return jnp.asarray(problem.start)

    def step(self, problem, state):
        state = state * self.factor
        return state, {"distance": jnp.abs(state - problem.target)}

    def policy(self, state):
        return _Constant(state)


class _Constant(Policy):
    value: jax.Array

    def __call__(self, observation, carry, key):
        return self.value, carry


class Interval(eqx.Module):
    start: jax.Array
    target: jax.Array

    is_problem = True


def test_algorithms_without_interaction_run_on_the_same_loop():
    problem = Interval(jnp.asarray(1.0), jnp.asarray(0.0))
    trained = train(Halving(), problem, iterations=5, sweep={"factor": [0.5, 0.1]})
    np.testing.assert_allclose(trained.metrics["distance"][-1], [0.5**5, 0.1**5], rtol=1e-5)
    assert float(trained.policy(1)((), (), jax.random.key(0))[0]) == pytest.approx(1e-5)
    with pytest.raises(InputError, match="steps is 10, but Halving does not interact"):
        train(Halving(), problem, steps=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one must be given"),
        ({"steps": 10, "iterations": 1}, "exactly one must be given"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2**33}, "steps is .* below 2\\^32"),
        ({"iterations": -1}, "iterations is -1"),
        ({"iterations": 1, "seeds": 0}, "seeds is 0"),
        ({"iterations": 1, "seeds": [1, 1]}, "seeds is .*all different"),
        (
            {"iterations": 1, "sweep": {"learning_rat": [1.0]}},
            "Unknown hyperparameter 'learning_rat': did you mean 'le",
        ),
        ({"iterations": 1, "sweep": {"num_envs": [4.0]}}, "sweep names 'num_envs'"),
        ({"iterations": 1, "sweep": {"learning_rate": []}}, "at least one value"),
        ({"iterations": 1, "sweep": {"learning_rate": [-1.0]}}, "learning_rate is -1"),
        ({"iterations": 1, "devices": 64}, "devices is 64.*that JAX sees"),
        ({"iterations": 1, "chunk_seconds": 0.0}, "chunk_seconds is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        train(ALGORITHM, PROBLEM, **arguments)


def test_what_is_no_problem_is_refused():
    with pytest.raises(InputTypeError, match="problem is a int"):
        train(ALGORITHM, 3, iterations=1)


def test_hyperparameters_are_listed_by_dotted_name():
    names = hyperparameters(ALGORITHM)
    assert names["surrogate"] == "Clip"
    assert float(names["surrogate.epsilon"]) == pytest.approx(0.2)


_SHARDED = """
    import json, sys, numpy as np
    from steersman.envs import Problem
    from steersman.envs.dynamics import DiscreteCartPole
    from steersman.rl.on_policy import PPO
    from steersman.training import train
    algorithm = PPO(num_envs=8, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=3e-3)
    out = {}
    for devices in (1, 4):
        for seeds in (1, 4):  # sharded over environments, then over members
            trained = train(algorithm, Problem(DiscreteCartPole()), iterations=3, seeds=seeds, devices=devices)
            out[f"{devices}-{seeds}"] = np.asarray(trained.metrics["value_loss"]).tolist()
            if devices == 4:
                import jax
                used = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(trained.state)}
                assert used == {4}, used
    print(json.dumps(out))
"""


def test_one_and_four_devices_give_the_same_numbers():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SHARDED)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    out = json.loads(run.stdout)
    np.testing.assert_allclose(out["1-1"], out["4-1"], rtol=1e-4)
    np.testing.assert_allclose(out["1-4"], out["4-4"], rtol=1e-4)


_PROCESS = """
    import sys, jax, numpy as np
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
    from steersman.envs import Problem
    from steersman.envs.dynamics import DiscreteCartPole
    from steersman.rl.on_policy import PPO
    from steersman.training import train
    assert jax.device_count() == 2 and jax.local_device_count() == 1
    algorithm = PPO(num_envs=8, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=3e-3)
    trained = train(algorithm, Problem(DiscreteCartPole()), iterations=3, devices=2, run=sys.argv[3])
    print(" ".join(f"{v:.7f}" for v in trained.metrics["value_loss"][:, 0]))
"""


def test_two_processes_give_the_same_numbers_as_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_PROCESS), str(i), port, str(tmp_path / "run")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    algorithm = PPO(num_envs=8, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=3e-3)
    alone = train(algorithm, PROBLEM, iterations=3).metrics["value_loss"][:, 0]
    for out, _ in outputs:
        np.testing.assert_allclose([float(v) for v in out.strip().splitlines()[-1].split()], alone, rtol=1e-4)
    assert (Path(tmp_path) / "run" / "metrics.parquet").exists()


def test_environments_may_draw_from_every_distribution_of_jax():
    """JAX has Poisson variables for its own keys alone; training uses another form of them."""

    class Queue(Environment):
        def reset_env(self, key, params):
            waiting = jax.random.poisson(key, 3.0).astype(jnp.float32)
            return waiting[None], waiting

        def step_env(self, key, state, action, params):
            waiting = jnp.clip(state + jax.random.poisson(key, 1.0) - action, 0.0, 20.0)
            return waiting[None], waiting, -waiting, jnp.asarray(False), {}

        def observation_space(self, params):
            return gymnasium.spaces.Box(0.0, 20.0, (1,))

        def action_space(self, params):
            return gymnasium.spaces.Discrete(3)

    algorithm = PPO(num_envs=2, num_steps=8, hidden=(4,), epochs=1, minibatches=1)
    assert np.isfinite(train(algorithm, Queue(), iterations=1).metrics["value_loss"]).all()
