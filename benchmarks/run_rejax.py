"""rejax in the PPO benchmark, as its own documentation runs it; see worker.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import worker
from rejax import PPO
from rejax.evaluate import evaluate


def with_scaled_rewards(environment: Any, scale: float) -> Any:
    """The environment with its rewards multiplied, for which rejax has no setting."""

    class Scaled(type(environment)):
        def step_env(self, key: Any, state: Any, action: Any, params: Any) -> tuple:
            observation, state, reward, done, info = super().step_env(key, state, action, params)
            return observation, state, scale * reward, done, info

    return Scaled()


@functools.cache
def agent(name: str, iterations: int, evaluates: bool) -> PPO:
    """An agent whose ``train`` runs so many iterations, then evaluates the mode of its policy (or does not)."""
    task = worker.TASKS[name]
    environment, params = gymnax.make(name)

    def evaluation(algorithm: PPO, state: Any, key: Any) -> Any:
        if not evaluates:
            return jnp.zeros(())

        def act(observation: Any, key: Any) -> Any:
            actor = algorithm.actor.apply(state.actor_ts.params, observation[None], method="_action_dist")
            return actor.mode()[0]

        return evaluate(act, key, environment, params, worker.EVALUATION_EPISODES, task.episode_steps)[1].mean()

    algorithm = PPO.create(
        env=environment if task.reward_scale == 1.0 else with_scaled_rewards(environment, task.reward_scale),
        env_params=params,
        agent_kwargs={"hidden_layer_sizes": worker.HIDDEN, "activation": "tanh"},
        num_envs=worker.NUM_ENVS,
        num_steps=worker.NUM_STEPS,
        num_epochs=worker.EPOCHS,
        num_minibatches=worker.MINIBATCHES,
        learning_rate=worker.LEARNING_RATE,
        gamma=task.gamma,
        gae_lambda=worker.LAMBDA,
        clip_eps=worker.CLIP,
        ent_coef=0.0,
        # rejax halves the squared error before it applies the coefficient.
        vf_coef=2.0 * worker.VALUE_COEFFICIENT,
        max_grad_norm=worker.MAX_GRADIENT_NORM,
        total_timesteps=iterations * worker.BATCH,
        eval_freq=iterations * worker.BATCH,
        skip_initial_evaluation=True,
    )
    return algorithm.replace(eval_callback=evaluation)


@functools.cache
def whole(name: str, iterations: int) -> Callable[[Any], Any]:
    """A whole training as one program."""
    return jax.jit(agent(name, iterations, False).train)


def stretch(task: worker.Task, iterations: int, seed: int) -> None:
    jax.block_until_ready(whole(task.name, iterations)(jax.random.PRNGKey(seed)))


def learn(task: worker.Task, seed: int, interval: int, evaluated: Callable[[int, float], None]) -> None:
    algorithm = agent(task.name, interval, True)
    # The agent is closed over: rejax keeps its learning rate in the optimizer, which is no argument of a program.
    state = jax.jit(algorithm.init_state)(jax.random.PRNGKey(seed))
    go_on = jax.jit(lambda state: algorithm.train(train_state=state))
    iterations = 0
    while True:
        state, returns = go_on(state)
        iterations += interval
        evaluated(iterations, float(returns[-1]))


if __name__ == "__main__":
    for name in worker.TASKS:
        gymnax.make(name)
    worker.serve(stretch, learn, ("rejax", "jax", "flax", "optax", "gymnax", "distrax"))
