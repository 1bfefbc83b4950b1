"""A loop in the style of PureJaxRL in the PPO benchmark; see worker.py.

PureJaxRL (Lu et al., 2022, "Discovered policy optimisation", arXiv:2210.05639) is a collection of single files, not a
package. This is its published idea, written anew: Flax networks, Optax, gymnax environments stepped under ``vmap``
and ``scan``, minibatches from ``jax.random.permutation``, and one ``jit`` over the whole training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import optax
import worker
from flax.training.train_state import TrainState
from gymnax.environments import spaces


class ActorCritic(nn.Module):
    """Separate actor and critic; the actor gives logits, or a mean beside a state-free log standard deviation."""

    outputs: int
    continuous: bool

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array]:
        def network(outputs: int, gain: float) -> jax.Array:
            hidden = observation
            for width in worker.HIDDEN:
                hidden = nn.tanh(nn.Dense(width, kernel_init=nn.initializers.orthogonal(math.sqrt(2.0)))(hidden))
            return nn.Dense(outputs, kernel_init=nn.initializers.orthogonal(gain))(hidden)

        output, value = network(self.outputs, 0.01), network(1, 1.0)[..., 0]
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,)) if self.continuous else None
        return (output, log_std), value


def sample(distribution: tuple, key: jax.Array) -> jax.Array:
    output, log_std = distribution
    if log_std is None:
        return jax.random.categorical(key, output)
    return output + jnp.exp(log_std) * jax.random.normal(key, output.shape)


def mode(distribution: tuple) -> jax.Array:
    output, log_std = distribution
    return jnp.argmax(output, axis=-1) if log_std is None else output


def log_prob(distribution: tuple, action: jax.Array) -> jax.Array:
    output, log_std = distribution
    if log_std is None:
        return jnp.take_along_axis(jax.nn.log_softmax(output), action[..., None], axis=-1)[..., 0]
    standardized = (action - output) / jnp.exp(log_std)
    return jnp.sum(-0.5 * standardized**2 - log_std - 0.5 * math.log(2.0 * math.pi), axis=-1)


class Transition(NamedTuple):
    done: jax.Array
    action: jax.Array
    value: jax.Array
    reward: jax.Array
    log_prob: jax.Array
    observation: jax.Array


class Runner(NamedTuple):
    train_state: TrainState
    env_state: Any
    observation: jax.Array
    episode_return: jax.Array
    key: jax.Array


class Training(NamedTuple):
    init: Callable[[jax.Array], Runner]
    update: Callable[[Runner, None], tuple[Runner, jax.Array]]
    evaluate: Callable[[TrainState, jax.Array], jax.Array]


@functools.cache
def training(name: str) -> Training:
    task = worker.TASKS[name]
    environment, params = gymnax.make(name)
    space = environment.action_space(params)
    continuous = not isinstance(space, spaces.Discrete)
    network = ActorCritic(space.shape[0] if continuous else space.n, continuous)
    optimizer = optax.chain(
        optax.clip_by_global_norm(worker.MAX_GRADIENT_NORM),
        optax.adam(worker.LEARNING_RATE, eps=worker.ADAM_EPSILON),
    )
    reset = jax.vmap(environment.reset, in_axes=(0, None))
    step = jax.vmap(environment.step, in_axes=(0, 0, 0, None))

    def act(action: jax.Array) -> jax.Array:
        return jnp.clip(action, space.low, space.high) if continuous else action

    def init(key: jax.Array) -> Runner:
        key, network_key, reset_key = jax.random.split(key, 3)
        observation, env_state = reset(jax.random.split(reset_key, worker.NUM_ENVS), params)
        train_state = TrainState.create(
            apply_fn=network.apply, params=network.init(network_key, observation), tx=optimizer
        )
        return Runner(train_state, env_state, observation, jnp.zeros(worker.NUM_ENVS), key)

    def env_step(runner: Runner, _: None) -> tuple[Runner, tuple[Transition, jax.Array]]:
        key, action_key, step_key = jax.random.split(runner.key, 3)
        distribution, value = network.apply(runner.train_state.params, runner.observation)
        action = sample(distribution, action_key)
        step_keys = jax.random.split(step_key, worker.NUM_ENVS)
        observation, env_state, reward, done, _ = step(step_keys, runner.env_state, act(action), params)
        episode_return = runner.episode_return + reward
        transition = Transition(
            done, action, value, task.reward_scale * reward, log_prob(distribution, action), runner.observation
        )
        finished = jnp.where(done, episode_return, jnp.nan)
        runner = Runner(runner.train_state, env_state, observation, jnp.where(done, 0.0, episode_return), key)
        return runner, (transition, finished)

    def advantages_of(rollout: Transition, last_value: jax.Array) -> tuple[jax.Array, jax.Array]:
        def backward(following: tuple, transition: Transition) -> tuple[tuple, jax.Array]:
            advantage, next_value = following
            alive = 1.0 - transition.done
            delta = transition.reward + task.gamma * next_value * alive - transition.value
            advantage = delta + task.gamma * worker.LAMBDA * alive * advantage
            return (advantage, transition.value), advantage

        start = (jnp.zeros_like(last_value), last_value)
        advantage = jax.lax.scan(backward, start, rollout, reverse=True, unroll=16)[1]
        return advantage, advantage + rollout.value

    def loss(weights: Any, minibatch: tuple) -> jax.Array:
        rollout, advantage, target = minibatch
        distribution, value = network.apply(weights, rollout.observation)
        ratio = jnp.exp(log_prob(distribution, rollout.action) - rollout.log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = jnp.clip(ratio, 1.0 - worker.CLIP, 1.0 + worker.CLIP)
        policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
        return policy_loss + worker.VALUE_COEFFICIENT * jnp.square(value - target).mean()

    def descend(train_state: TrainState, minibatch: tuple) -> tuple[TrainState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(train_state.params, minibatch)
        return train_state.apply_gradients(grads=gradient), value

    def update(runner: Runner, _: None) -> tuple[Runner, jax.Array]:
        runner, (rollout, finished) = jax.lax.scan(env_step, runner, None, worker.NUM_STEPS)
        last_value = network.apply(runner.train_state.params, runner.observation)[1]
        batch = (rollout, *advantages_of(rollout, last_value))
        rows = jax.tree.map(lambda leaf: leaf.reshape((worker.BATCH, *leaf.shape[2:])), batch)

        def epoch(running: tuple, _: None) -> tuple[tuple, jax.Array]:
            train_state, key = running
            key, order_key = jax.random.split(key)
            order = jax.random.permutation(order_key, worker.BATCH)
            shuffled = jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=0), rows)
            minibatches = jax.tree.map(lambda leaf: leaf.reshape((worker.MINIBATCHES, -1, *leaf.shape[1:])), shuffled)
            train_state, losses = jax.lax.scan(descend, train_state, minibatches)
            return (train_state, key), losses

        (train_state, key), _ = jax.lax.scan(epoch, (runner.train_state, runner.key), None, worker.EPOCHS)
        return runner._replace(train_state=train_state, key=key), jnp.nanmean(finished)

    def evaluate(train_state: TrainState, key: jax.Array) -> jax.Array:
        reset_key, key = jax.random.split(key)
        observation, env_state = reset(jax.random.split(reset_key, worker.EVALUATION_EPISODES), params)

        def play(running: tuple, key: jax.Array) -> tuple[tuple, None]:
            observation, env_state, total, over = running
            action = act(mode(network.apply(train_state.params, observation)[0]))
            keys = jax.random.split(key, worker.EVALUATION_EPISODES)
            observation, env_state, reward, done, _ = step(keys, env_state, action, params)
            return (observation, env_state, total + reward * ~over, over | done), None

        zeros = jnp.zeros(worker.EVALUATION_EPISODES)
        running = (observation, env_state, zeros, zeros > 0)
        return jax.lax.scan(play, running, jax.random.split(key, task.episode_steps))[0][2].mean()

    return Training(init, update, evaluate)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(name: str, iterations: int, key: jax.Array) -> tuple[Runner, jax.Array]:
    """The whole training as one program: the last state, and the mean return of each iteration's episodes."""
    return jax.lax.scan(training(name).update, training(name).init(key), None, iterations)


@functools.partial(jax.jit, static_argnums=0)
def start(name: str, key: jax.Array) -> Runner:
    return training(name).init(key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def go_on(name: str, interval: int, runner: Runner) -> tuple[Runner, jax.Array]:
    """Training up to the next evaluation, and its mean return."""
    runner = jax.lax.scan(training(name).update, runner, None, interval)[0]
    key, evaluation_key = jax.random.split(runner.key)
    return runner._replace(key=key), training(name).evaluate(runner.train_state, evaluation_key)


def stretch(task: worker.Task, iterations: int, seed: int) -> None:
    jax.block_until_ready(train(task.name, iterations, jax.random.PRNGKey(seed)))


def learn(task: worker.Task, seed: int, interval: int, evaluated: Callable[[int, float], None]) -> None:
    runner, iterations = start(task.name, jax.random.PRNGKey(seed)), 0
    while True:
        runner, mean_return = go_on(task.name, interval, runner)
        iterations += interval
        evaluated(iterations, float(mean_return))


if __name__ == "__main__":
    for name in worker.TASKS:
        gymnax.make(name)
    worker.serve(stretch, learn, ("jax", "flax", "optax", "gymnax"))
