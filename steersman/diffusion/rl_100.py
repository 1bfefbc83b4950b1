"""RL-100: imitation, gated offline improvement, online fine-tuning and distillation.

Lei et al. (2025, arXiv:2510.14830). Every stage is an algorithm of its own, to be run alone by
:func:`steersman.training.train`: :class:`~steersman.diffusion.cloning.Cloning`,
:class:`~steersman.diffusion.offline_improvement.OfflineImprovement`, :class:`~steersman.diffusion.dppo.DPPO` and
:class:`~steersman.diffusion.distillation.ConsistencyDistillation`; :class:`RL100` runs them in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from steersman.diffusion.cloning import Cloning, MLPRecipe
from steersman.diffusion.distillation import ConsistencyDistillation
from steersman.diffusion.dppo import DPPO
from steersman.diffusion.offline_improvement import (
    OfflineImprovement,
    exploring_chains,
    generator_of,
    with_generator,
)
from steersman.diffusion.samplers import DDIM
from steersman.envs import as_problem
from steersman.envs.chunk_transitions import ChunkTransitions
from steersman.errors import InputError, InputTypeError, require_count
from steersman.policies import ChunkPolicy
from steersman.policies.storage import load_policy, save_policy
from steersman.rl.surrogates import Clip
from steersman.training import train
from steersman.training.algorithm import Algorithm, IterativeAlgorithm


def imitation(**options: Any) -> Cloning:
    """The imitation stage: a noise-predicting policy with ten stochastic steps; `options` are those of Cloning."""
    settings = {
        "recipe": MLPRecipe(),
        "sampler": DDIM(10, eta=1.0, std_bounds=(0.0067, 0.1)),
        "evaluation": DDIM(10),
        "learning_rate": 1.4e-4,
        "max_grad_norm": None,
    }
    return Cloning(**{**settings, **options})


def online(policy: ChunkPolicy, **options: Any) -> DPPO:
    """The online stage: the on-policy loop with RL-100's numbers; `options` are those of DPPO."""
    settings = {
        "architecture": exploring_chains(policy),
        "surrogate": Clip(0.2),
        "gamma": 0.99**policy.action_horizon,
        "epochs": 10,
        "learning_rate": 3e-6,
        "critic_learning_rate": 3e-4,
        "max_gradient_norm": 0.5,
        "value_clip": 0.2,
        "target_kl": None,
        "normalize_rewards": False,
    }
    return DPPO(**{**settings, **options})


def one_step(policy: ChunkPolicy, **options: Any) -> ConsistencyDistillation:
    """The distillation stage: the student follows the exploring sampler's own path, with every step at its mean.

    That is what was improved; the same network stepped without noise goes other ways. `options` are those of
    ConsistencyDistillation.
    """
    teacher = with_generator(policy, dataclasses.replace(generator_of(policy), evaluation=None))
    return ConsistencyDistillation(teacher, **options)


def collected(algorithm: DPPO, policy: ChunkPolicy, problem: Any, key: Key[Array, ""]) -> ChunkTransitions:
    """What one batch of the online stage's exploring policy brought, as more offline data."""
    first_key, second_key = jax.random.split(key)

    @eqx.filter_jit
    def collect() -> tuple[Any, Bool[Array, "T N"]]:
        behaviour = algorithm.behaviour(algorithm.init(problem, first_key))
        rollout = algorithm.collector.init(problem, behaviour, second_key)
        experience = algorithm.collector.collect(problem, behaviour, rollout)[0]
        done = experience.done
        return experience, jnp.concatenate([jnp.ones_like(done[:1]), done[:-1]])

    experience, first = collect()
    chunk = generator_of(policy).action_scaling.restore(experience.record.action[..., -1, :, :])

    # Each environment's decisions after one another, as the rows of an episode are.
    def rows(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape((-1, *leaf.shape[2:])), tree)

    return ChunkTransitions(
        observation=rows(experience.observation),
        chunk=rows(chunk),
        reward=rows(experience.reward),
        next_observation=rows(experience.next_observation),
        terminated=rows(experience.terminated),
        truncated=rows(experience.truncated),
        first=rows(first),
        rows=policy.action_horizon,
        window=policy.observation_horizon,
    )


@dataclass(frozen=True)
class RL100:
    """The stages in their order, each of which ends in a policy that can be kept, judged and resumed from.

    With several rounds, what each offline policy collects joins the data, and imitation starts again from all of it.
    A stage is any algorithm: the functions take the policy of the stage before.

    Attributes:
        imitation: clones the data.
        imitation_steps: its gradient steps.
        offline: improves a policy from data.
        offline_blocks: its iterations.
        rounds: how often the two are run; more than one needs an environment.
        online: fine-tunes a policy by interaction.
        online_iterations: its iterations; 0 for none.
        distillation: makes a one-step policy.
        distillation_steps: its iterations; 0 for none.
    """

    imitation: Cloning
    imitation_steps: int = 20_000
    offline: Callable[[ChunkPolicy], IterativeAlgorithm] = OfflineImprovement
    offline_blocks: int = 160
    rounds: int = 1
    online: Callable[[ChunkPolicy], DPPO] = online
    online_iterations: int = 100
    distillation: Callable[[ChunkPolicy], IterativeAlgorithm] = one_step
    distillation_steps: int = 5000

    def __post_init__(self) -> None:
        for name in ("imitation_steps", "offline_blocks", "rounds"):
            require_count(name, getattr(self, name))
        for name in ("online_iterations", "distillation_steps"):
            require_count(name, getattr(self, name), minimum=0)

    def run(
        self, data: ChunkTransitions, environment: Any = None, *, seed: int = 0, folder: str | Path | None = None
    ) -> dict[str, ChunkPolicy]:
        """Runs every stage.

        Args:
            data: demonstrations with rewards, in the task's units.
            environment: whatever :func:`steersman.envs.as_problem` accepts that takes the chunks' played rows as one
                action (:class:`~steersman.envs.ChunkedEnvironment`); None for no online stage.
            seed: of all stages.
            folder: each stage's policy is saved there under its name, and what is there already is not learned again.

        Returns:
            The policies ``il_0, offline_0, il_1, ..., online, student``, in order.

        Raises:
            InputError, InputTypeError: a stage cannot be run on what is given.
        """
        if not isinstance(data, ChunkTransitions):
            raise InputTypeError(f"data is a {type(data).__name__}, but RL-100 needs ChunkTransitions, with rewards.")
        if environment is None and self.rounds > 1:
            raise InputError(f"rounds is {self.rounds}, but without an environment to collect from it must be 1.")
        problem: Any = None if environment is None else as_problem(environment)
        stages: dict[str, ChunkPolicy] = {}

        def stage(name: str, make: Callable[[], Algorithm], on: Any, iterations: int) -> ChunkPolicy:
            place = None if folder is None else Path(folder) / name
            if place is not None and (place / "policy.json").exists():
                stages[name] = load_policy(place)
            else:
                stages[name] = self._learned(make(), on, iterations, seed, stages)
                if place is not None:
                    save_policy(stages[name], place)
            return stages[name]

        policy: Any = None
        for number in range(self.rounds):
            if number > 0:
                key = jax.random.fold_in(jax.random.key(seed), number)
                data = ChunkTransitions.join(data, collected(self.online(policy), policy, problem, key))
            policy = stage(f"il_{number}", lambda: self.imitation, data, self.imitation_steps)
            policy = stage(f"offline_{number}", lambda p=policy: self.offline(p), data, self.offline_blocks)
        if problem is not None and self.online_iterations > 0:
            policy = stage("online", lambda: self.online(policy), problem, self.online_iterations)
        if self.distillation_steps > 0:
            stage("student", lambda: self.distillation(policy), data, self.distillation_steps)
        return stages

    def _learned(
        self, algorithm: Algorithm, problem: Any, iterations: int, seed: int, before: dict[str, ChunkPolicy]
    ) -> ChunkPolicy:
        if isinstance(algorithm, OfflineImprovement):
            # Compiled, it would see no values.
            algorithm.check(problem)
        learned: Any = train(algorithm, problem, iterations=iterations, seeds=[seed]).policy()
        if isinstance(learned, ChunkPolicy):
            return learned
        # The online stage's policy acts with whole chunks, for learning; what it leaves is a policy like all others.
        return with_generator(list(before.values())[-1], learned.generator())
