"""Stable-Baselines3 in the PPO benchmark, on Gymnasium's own environments; see worker.py."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import torch
import worker
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

# On networks this small a second thread gains nothing on a quiet machine, and waiting for it on a busy one takes ten
# times as long as the work.
torch.set_num_threads(1)


def environments(task: worker.Task, count: int, scale: float) -> DummyVecEnv:
    def one() -> gymnasium.Env:
        environment = gymnasium.make(task.name)
        if scale == 1.0:
            return environment
        return gymnasium.wrappers.TransformReward(environment, lambda reward: scale * reward)

    return DummyVecEnv([one] * count)


def agent(task: worker.Task, seed: int) -> PPO:
    return PPO(
        "MlpPolicy",
        environments(task, worker.NUM_ENVS, task.reward_scale),
        n_steps=worker.NUM_STEPS,
        batch_size=worker.BATCH // worker.MINIBATCHES,
        n_epochs=worker.EPOCHS,
        learning_rate=worker.LEARNING_RATE,
        gamma=task.gamma,
        gae_lambda=worker.LAMBDA,
        clip_range=worker.CLIP,
        ent_coef=0.0,
        vf_coef=worker.VALUE_COEFFICIENT,
        max_grad_norm=worker.MAX_GRADIENT_NORM,
        policy_kwargs={
            "net_arch": {"pi": list(worker.HIDDEN), "vf": list(worker.HIDDEN)},
            "activation_fn": torch.nn.Tanh,
            "optimizer_kwargs": {"eps": worker.ADAM_EPSILON},
        },
        seed=seed,
        device="cpu",
    )


def mean_return(model: PPO, evaluation: DummyVecEnv) -> float:
    """Mean return of one whole episode in each evaluation environment."""
    observation = evaluation.reset()
    total, over = np.zeros(evaluation.num_envs), np.zeros(evaluation.num_envs, bool)
    while not over.all():
        observation, reward, done, _ = evaluation.step(model.predict(observation, deterministic=True)[0])
        total += reward * ~over
        over |= done
    return float(total.mean())


def stretch(task: worker.Task, iterations: int, seed: int) -> None:
    agent(task, seed).learn(iterations * worker.BATCH)


def learn(task: worker.Task, seed: int, interval: int, evaluated: Callable[[int, float], None]) -> None:
    evaluation = environments(task, worker.EVALUATION_EPISODES, 1.0)
    evaluation.seed(1_000 + seed)

    class Evaluate(BaseCallback):
        """Evaluates before a rollout, when the updates after the last one are done."""

        def _on_rollout_start(self) -> None:
            iterations = self.num_timesteps // worker.BATCH
            if iterations and iterations % interval == 0:
                evaluated(iterations, mean_return(self.model, evaluation))

        def _on_step(self) -> bool:
            return True

    agent(task, seed).learn(100_000 * worker.BATCH, callback=Evaluate())


if __name__ == "__main__":
    worker.serve(stretch, learn, ("stable-baselines3", "torch", "gymnasium", "numpy"))
