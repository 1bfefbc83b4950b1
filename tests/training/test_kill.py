"""A training run killed with SIGKILL at twenty random moments ends bit-identical to one never interrupted."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

_TRAIN = """
    import sys
    from pathlib import Path
    from steersman.envs import Problem
    from steersman.envs.dynamics import DiscreteCartPole
    from steersman.rl.on_policy import PPO
    from steersman.training import Linear, train
    run = Path(sys.argv[1])
    algorithm = PPO(
        num_envs=4, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=Linear(1e-2, 1e-3, 10_000),
        normalize_observations=True, normalize_rewards=True,
    )
    resume = (run / "config.yaml").exists()
    print("ready", flush=True)
    train(algorithm, Problem(DiscreteCartPole()), iterations=int(sys.argv[2]), seeds=2, run=run, resume=resume,
          chunk_seconds=0.02, on_chunk=lambda iteration, state: print(iteration, flush=True))
    print("finished", flush=True)
"""
_ITERATIONS = 4000


def start(run, cache):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_TRAIN), str(run), str(_ITERATIONS)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    cache = tmp_path / "cache"
    whole = start(tmp_path / "whole", cache)
    out, errors = whole.communicate(timeout=300)
    assert out.strip().endswith("finished"), errors[-2000:]

    chance = random.Random(0)
    run, kills, reached = tmp_path / "run", 0, []
    for attempt in range(200):
        process = start(run, cache)
        if kills < 20:
            assert process.stdout.readline().strip() == "ready"
            # Every third kill falls into start-up or restoring, the others some chunks later, at any point of one.
            if attempt % 3:
                for _ in range(chance.randint(1, 3)):
                    line = process.stdout.readline().strip()
                    if line and line != "finished":
                        reached.append(int(line))
            time.sleep(chance.uniform(0.0, 0.05 if attempt % 3 else 1.0))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        out, errors = process.communicate(timeout=300)
        assert out.strip().endswith("finished"), errors[-2000:]
        break
    assert kills == 20
    assert reached == sorted(reached), "a resumed run went back behind a chunk that had been reported"
    assert reached[-1] < _ITERATIONS, "the run had finished before the last kill"
    for name in (
        "metrics.parquet",
        *(f"policies/seed={s}/policy.{e}" for s in (0, 1) for e in ("json", "safetensors")),
    ):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
