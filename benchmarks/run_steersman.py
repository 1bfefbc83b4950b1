"""Steersman in the PPO benchmark, through its public interface; see worker.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import worker

import steersman
from steersman.envs import make
from steersman.rl.on_policy import PPO


@functools.cache
def problem_and_algorithm(name: str) -> tuple[Any, PPO]:
    task = worker.TASKS[name]
    algorithm = PPO(
        num_envs=worker.NUM_ENVS,
        num_steps=worker.NUM_STEPS,
        gamma=task.gamma,
        lam=worker.LAMBDA,
        hidden=worker.HIDDEN,
        activation="tanh",
        # Log-std is in units of the torque's half-width, 2 N m; this starts at 1 N m, where the peers start.
        initial_log_std=-math.log(2.0) if name == "Pendulum-v1" else 0.0,
        reward_scale=task.reward_scale,
        learning_rate=worker.LEARNING_RATE,
        epochs=worker.EPOCHS,
        minibatches=worker.MINIBATCHES,
        value_coefficient=worker.VALUE_COEFFICIENT,
        entropy_coefficient=0.0,
        max_gradient_norm=worker.MAX_GRADIENT_NORM,
    )
    return make(f"gymnax:{name}"), algorithm


def stretch(task: worker.Task, iterations: int, seed: int) -> None:
    problem, algorithm = problem_and_algorithm(task.name)
    trained = steersman.train(algorithm, problem, iterations=iterations, seeds=[seed])
    jax.block_until_ready(trained.state.learned)


def learn(task: worker.Task, seed: int, interval: int, evaluated: Callable[[int, float], None]) -> None:
    problem, algorithm = problem_and_algorithm(task.name)

    def on_chunk(iteration: int, state: Any) -> None:
        if iteration % interval == 0:
            policy = jax.tree.map(lambda leaf: leaf[0], algorithm.policy(state))
            episodes = worker.EVALUATION_EPISODES
            evaluated(iteration, steersman.evaluate(policy, problem, episodes=episodes, seed=1_000 + iteration).mean)

    # Chunks of one iteration, so that evaluations fall on the same steps as the peers'.
    steersman.train(algorithm, problem, iterations=100_000, seeds=[seed], chunk_seconds=1e-9, on_chunk=on_chunk)


if __name__ == "__main__":
    for name in worker.TASKS:
        problem_and_algorithm(name)
    worker.serve(stretch, learn, ("steersman", "jax", "equinox", "optax", "gymnax"))
