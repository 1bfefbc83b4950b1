"""A training run killed with SIGKILL at twenty random moments ends bit-identical to one never interrupted."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

# Most of a short process's time goes into imports, so one process imports and forks itself for each attempt. It
# computes nothing before: a fork does not survive the threads of a running XLA.
_NURSERY = """
    import os, sys
    from pathlib import Path
    from steersman.envs import Problem
    from steersman.envs.dynamics import DiscreteCartPole
    from steersman.rl.on_policy import PPO
    from steersman.training import Linear, train

    def attempt(run, iterations):
        algorithm = PPO(
            num_envs=4, num_steps=8, hidden=(8,), epochs=2, minibatches=2, learning_rate=Linear(1e-2, 1e-3, 10_000),
            normalize_observations=True, normalize_rewards=True,
        )
        resume = (run / "config.yaml").exists()
        print("ready", flush=True)
        train(algorithm, Problem(DiscreteCartPole()), iterations=iterations, seeds=2, run=run, resume=resume,
              chunk_seconds=0.02, on_chunk=lambda iteration, state: print(iteration, flush=True))
        print("finished", flush=True)

    for line in sys.stdin:
        run, iterations, output = line.split()
        child = os.fork()
        if child == 0:
            said = os.open(output, os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.close(said)
            code = 1
            try:
                attempt(Path(run), int(iterations))
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)
"""
_ITERATIONS = 4000


class Nursery:
    """Starts attempts, one at a time."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_NURSERY)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, run):
        """An attempt at `run`: its process number, and what it prints."""
        self.count += 1
        output = self.folder / f"output-{self.count}"
        os.mkfifo(output)
        self.process.stdin.write(f"{run} {_ITERATIONS} {output}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        return child, output.open()

    def wait(self):
        assert self.process.stdout.readline().strip() == "ended"

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    nursery = Nursery(tmp_path)
    _, said = nursery.start(tmp_path / "whole")
    text = said.read()
    nursery.wait()
    assert text.strip().endswith("finished"), text[-2000:]

    chance = random.Random(0)
    run, kills, reached = tmp_path / "run", 0, []
    for attempt in range(200):
        child, said = nursery.start(run)
        if kills < 20:
            assert said.readline().strip() == "ready"
            # Every third kill falls into start-up or restoring, the others some chunks later, at any point of one.
            if attempt % 3:
                for _ in range(chance.randint(1, 3)):
                    line = said.readline().strip()
                    if line and line != "finished":
                        reached.append(int(line))
            time.sleep(chance.uniform(0.0, 0.05 if attempt % 3 else 1.0))
            os.kill(child, signal.SIGKILL)
            nursery.wait()
            said.close()
            kills += 1
            continue
        text = said.read()
        nursery.wait()
        assert text.strip().endswith("finished"), text[-2000:]
        break
    nursery.close()
    assert kills == 20
    assert reached == sorted(reached), "a resumed run went back behind a chunk that had been reported"
    assert reached[-1] < _ITERATIONS, "the run had finished before the last kill"
    for name in (
        "metrics.parquet",
        *(f"policies/seed={s}/policy.{e}" for s in (0, 1) for e in ("json", "safetensors")),
    ):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
