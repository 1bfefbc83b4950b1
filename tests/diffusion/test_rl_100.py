"""RL-100's stages in their order: what each is given, what is kept, and what is not learned twice."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import DDIM, DiscreteVP, MLPRecipe
from steersman.diffusion.offline_improvement import generator_of
from steersman.diffusion.rl_100 import RL100, collected, imitation, online
from steersman.envs import ChunkedEnvironment, ObstacleGate, Problem
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.chunk_transitions import ChunkTransitions
from steersman.errors import InputError, InputTypeError
from steersman.policies import ChunkPolicy
from steersman.training import IterativeAlgorithm

ENVIRONMENT = ChunkedEnvironment(ObstacleGate(), 2)
SEEN: list[int] = []


class Same(IterativeAlgorithm):
    """A stage that changes nothing, and writes down how much data it was given."""

    start: ChunkPolicy

    def init(self, problem, key):
        SEEN.append(problem.size)
        return jnp.zeros(())

    def step(self, problem, state):
        return state, {"nothing": state}

    def policy(self, state):
        return self.start


def data(rows=2):
    numbers = np.random.default_rng(0)
    episodes = [(numbers.normal(size=(7, 2)), numbers.normal(size=(6, 2)), np.eye(6)[5], True) for _ in range(2)]
    return ChunkTransitions.cut(episodes, horizon=rows)


def small_online(policy: ChunkPolicy):
    sizes: dict[str, Any] = {"num_envs": 4, "num_steps": 3, "hidden": (4,), "epochs": 1, "minibatches": 2}
    return online(policy, learning_rate=1e-2, **sizes)


CLONING = imitation(
    recipe=MLPRecipe(DiscreteVP.squared_cosine(4), hidden=(4,), time_size=4),
    sampler=DDIM(2, eta=1.0, std_bounds=(0.05, 0.8)),
    evaluation=DDIM(2),
    batch_size=4,
)
STAGES = RL100(CLONING, 1, Same, 1, 2, small_online, 1, Same, 1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, STAGES.run(data(), ENVIRONMENT, folder=folder)


def test_stages_follow_one_another_and_the_data_grows(kept):
    folder, stages = kept
    assert list(stages) == ["il_0", "offline_0", "il_1", "offline_1", "online", "student"]
    # Twelve decisions were shown, and 3 steps of 4 environments are collected; the last stage is traced already.
    assert SEEN == [12, 24]
    assert bool(eqx.tree_equal(stages["offline_0"], stages["il_0"]))
    before, after = generator_of(stages["offline_1"]), generator_of(stages["online"])
    assert not bool(eqx.tree_equal(before.denoiser.network, after.denoiser.network))
    assert bool(eqx.tree_equal(before, eqx.tree_at(lambda g: g.denoiser, after, before.denoiser)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(stages)


def test_what_is_kept_is_not_learned_again(kept):
    folder, stages = kept

    def refuse(policy):
        raise AssertionError("learned again")

    again = dataclasses.replace(STAGES, offline=refuse, distillation=refuse, rounds=1, online_iterations=0)
    loaded = again.run(data(), folder=folder)
    assert list(loaded) == ["il_0", "offline_0", "student"]
    assert all(bool(eqx.tree_equal(loaded[name], stages[name])) for name in loaded)


def test_collected_decisions_are_those_of_the_environment(kept):
    _, stages = kept
    policy, problem = stages["offline_1"], Problem(ENVIRONMENT)
    found = collected(small_online(policy), policy, problem, jax.random.key(5))
    assert found.chunk.shape == (12, 2, 2)
    assert (found.played_rows, found.window) == (2, None)
    # Rows of one environment follow one another until an episode ends.
    goes_on = ~np.asarray(found.first[1:])
    np.testing.assert_array_equal(found.observation[1:][goes_on], found.next_observation[:-1][goes_on])
    np.testing.assert_array_equal(np.flatnonzero(found.first)[:1], [0])
    moved = 0.1 * jnp.sum(jnp.clip(found.chunk, -1.0, 1.0), axis=1)
    running = ~np.asarray(found.terminated)
    np.testing.assert_allclose(
        (found.next_observation - found.observation)[running], np.asarray(moved)[running], atol=1e-5
    )


def test_bad_input():
    with pytest.raises(InputError, match="rounds is 2, but without an environment"):
        STAGES.run(data())
    pairs: Any = ChunkPairs(data().observation, data().chunk)
    with pytest.raises((InputTypeError, TypeError), match="data"):
        STAGES.run(pairs)
    with pytest.raises(InputError, match="rounds is 0"):
        dataclasses.replace(STAGES, rounds=0)
    with pytest.raises(InputError, match="online_iterations is -1"):
        dataclasses.replace(STAGES, online_iterations=-1)
