import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion import Cloning, DiscreteVP, MLPRecipe, Scaling
from steersman.envs.chunk_data import EpisodeChunks
from steersman.envs.demonstrations import Demonstrations, Episode
from steersman.envs.lerobot_datasets import read_lerobot_dataset, write_lerobot_dataset
from steersman.envs.minari_datasets import read_minari, write_minari
from steersman.envs.scripted_experts import demonstrate
from steersman.errors import InputError, InputTypeError
from steersman.training import train


def episode(length=3, *, final=True, start=0.0, **fields):
    seen = start + np.arange(length + final, dtype=np.float32)[:, None]
    defaults = {"reward": np.arange(length, dtype=np.float32), "terminated": np.arange(length) == length - 1}
    return Episode(seen, 10 + seen[:length], **defaults | fields)


def test_what_is_not_said_of_an_end_is_a_cut():
    plain = Episode(np.zeros((3, 1)), np.zeros((3, 2)))
    assert (len(plain), plain.has_final_observation) == (3, False)
    assert (plain.terminated.tolist(), plain.truncated.tolist()) == ([False] * 3, [False, False, True])
    ended = episode()
    assert (len(ended), ended.has_final_observation) == (3, True)
    assert not ended.truncated.any()


def test_returns_and_slices():
    every = Demonstrations(
        (episode(3, success=[0, 1, 0]), episode(4, success=[0, 0, 0, 0]), episode(2, success=[0, 1])), fps=20
    )
    np.testing.assert_array_equal(every.returns, [3.0, 6.0, 1.0])
    np.testing.assert_array_equal(every.successes, [True, False, True])
    assert (len(every), every.num_steps, len(every[1])) == (3, 9, 4)
    rest = every[1:]
    assert (len(rest), rest.fps, rest.num_steps) == (2, 20, 6)
    assert Demonstrations((episode(),)).successes is None


def test_transitions_by_hand():
    with_end = episode(2, start=0.0)
    cut = episode(3, final=False, start=5.0, terminated=None)
    ended = episode(2, final=False, start=8.0)
    steps = Demonstrations((with_end, cut, ended)).transitions()
    # Of the episode that was cut, the last step has no known successor.
    np.testing.assert_array_equal(steps.observation[:, 0], [0, 1, 5, 6, 8, 9])
    np.testing.assert_array_equal(steps.next_observation[:, 0], [1, 2, 6, 7, 9, 9])
    np.testing.assert_array_equal(steps.action[:, 0], [10, 11, 15, 16, 18, 19])
    np.testing.assert_array_equal(steps.reward, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(steps.terminated, [0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(steps.truncated, [0, 0, 0, 0, 0, 0])


def test_chunk_transitions_by_hand():
    cut = episode(3, final=False, start=5.0, terminated=None)
    ended = episode(2, final=False, start=8.0)
    chunks = Demonstrations((cut, ended)).chunk_transitions(2)
    np.testing.assert_array_equal(chunks.observation[:, 0], [5, 6, 8, 9])
    np.testing.assert_array_equal(chunks.next_observation[:, 0], [7, 7, 9, 9])
    np.testing.assert_array_equal(chunks.chunk[:, :, 0], [[15, 16], [16, 16], [18, 19], [19, 19]])
    np.testing.assert_array_equal(chunks.reward, [1, 1, 1, 1])
    np.testing.assert_array_equal(chunks.terminated, [0, 0, 1, 1])
    pixels = np.full((3, 2, 4, 3), 51, np.uint8)
    seen = Demonstrations((Episode(pixels, np.zeros((2, 1)), np.zeros(2)),)).chunk_transitions(2).observation
    assert seen.shape == (2, 3, 2, 4)
    np.testing.assert_allclose(seen, 0.2)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_transitions_keep_every_reward_and_follow_each_other(lengths):
    every = Demonstrations(tuple(episode(n, start=10.0 * i) for i, n in enumerate(lengths)))
    steps = every.transitions()
    assert len(steps.reward) == every.num_steps
    np.testing.assert_allclose(steps.reward.sum(), every.returns.sum())
    np.testing.assert_array_equal(steps.next_observation, steps.observation + 1)


def test_chunks_are_those_of_the_episodes():
    every = Demonstrations((episode(4), episode(2, start=7.0)))
    chunks = every.chunks(3, observation_horizon=2)
    wanted = EpisodeChunks.cut([(e.observation, e.action) for e in every], horizon=3, observation_horizon=2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), chunks, wanted))
    assert chunks.size == 6


def test_bytes_become_images_as_encoders_take_them():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    seen = {"camera": pixels, "state": np.zeros((5, 2), np.float32)}
    chunks = Demonstrations((Episode(seen, np.zeros((5, 1), np.float32)),)).chunks(2, observation_horizon=2)
    assert chunks.observation["camera"].dtype == jnp.uint8
    window, _ = chunks.batch(jnp.asarray([0, 3]))
    assert (window["camera"].shape, window["camera"].dtype) == ((2, 2, 3, 6, 8), jnp.result_type(float))
    np.testing.assert_allclose(window["camera"][1, 0, 2], pixels[2, :, :, 2] / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(window["camera"][0, 0], window["camera"][0, 1])


def test_a_policy_is_cloned_from_either_format(tmp_path):
    recorded = demonstrate("detour-reach", 12, seed=3)
    # One name in both formats, so that one program serves both.
    named = [dataclasses.replace(e, observation={"observation.state": e.observation}) for e in recorded]
    every = dataclasses.replace(recorded, episodes=tuple(named), observation_space=None)
    write_lerobot_dataset(tmp_path / "lerobot", every)
    write_minari("detour/expert-v0", every, root=tmp_path)
    sources = {
        "lerobot": read_lerobot_dataset(tmp_path / "lerobot"),
        "minari": read_minari("detour/expert-v0", root=tmp_path),
    }
    data = sources["lerobot"].chunks(4, observation_horizon=2)
    algorithm = Cloning(
        MLPRecipe(DiscreteVP.squared_cosine(10), hidden=(32,)),
        batch_size=64,
        learning_rate=5e-3,
        action_scaling=Scaling.fit(data.actions),
        observation_scaling={"observation.state": Scaling.fit(data.observations["observation.state"])},
    )
    trained = {
        name: train(algorithm, source.chunks(4, observation_horizon=2), iterations=200)
        for name, source in sources.items()
    }
    losses = {name: float(np.ravel(result.metrics["loss"])[-1]) for name, result in trained.items()}
    assert losses["lerobot"] < 0.6
    # The files hold the same numbers, so what is learned from them is the same.
    assert losses["lerobot"] == losses["minari"]
    assert eqx.tree_equal(trained["lerobot"].policy(), trained["minari"].policy())


def test_what_never_changes_has_no_scale():
    still = np.stack([np.arange(4.0), np.full(4, 2.0)], axis=1)
    data = Demonstrations((Episode(still, still),)).chunks(2)
    with pytest.raises(InputError, match=r"actions never changes in entries \[1\]"):
        Scaling.fit(data.actions, name="actions")


ZEROS = np.zeros((3, 1))


@pytest.mark.parametrize(
    ("observation", "action", "fields", "message"),
    [
        (np.zeros((5, 1)), ZEROS, {}, r"observation is ragged: its shape is \(5, 1\), but with 3 actions"),
        ({"a": ZEROS, "b": np.zeros((4, 1))}, ZEROS, {}, r"observation\['b'\] is ragged"),
        (ZEROS, {"arm": ZEROS, "hand": np.zeros((2, 1))}, {}, r"action\['hand'\]'s shape is \(2, 1\)"),
        (ZEROS, np.zeros((0, 1)), {}, r"action's shape is \(0, 1\)"),
        (ZEROS, np.asarray(1.0), {}, r"action's shape is \(\)"),
        ({}, ZEROS, {}, "observation is empty"),
        (ZEROS, ZEROS, {"reward": np.zeros(4)}, r"reward's shape is \(4,\), but it must be \(3,\)"),
        (ZEROS, ZEROS, {"terminated": np.zeros((3, 1))}, r"terminated's shape is \(3, 1\)"),
        (np.asarray(["a", "b", "c"]), ZEROS, {}, "observation has dtype <U1, but it must hold numbers"),
        (ZEROS, ZEROS, {"reward": [None, 1, 2]}, "reward has dtype object"),
    ],
)
def test_a_bad_episode_is_told(observation, action, fields, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        Episode(observation, action, **fields)


def test_bad_demonstrations_are_told():
    with pytest.raises(InputError, match="episodes is"):
        Demonstrations(())
    with pytest.raises(InputError, match="fps is 0"):
        Demonstrations((episode(),), fps=0)
    wider = Episode(np.zeros((4, 2), np.float32), np.zeros((3, 1), np.float32), reward=np.zeros(3, np.float32))
    with pytest.raises(InputError, match=r"episodes\[1\] has observation of shape \[T, 2\] and dtype float32, but the"):
        Demonstrations((episode(), wider))
    with pytest.raises(InputError, match=r"episodes\[1\] has no reward, but the first has reward"):
        Demonstrations((episode(), episode(reward=None)))
    silent = Demonstrations((episode(reward=None),))
    short = Demonstrations((episode(1, final=False, terminated=None),))
    with pytest.raises(InputError, match="no reward, which returns needs"):
        _ = silent.returns
    for what, arguments in (("transitions", ()), ("chunk_transitions", (2,))):
        with pytest.raises(InputError, match=f"no reward, which {what} needs"):
            getattr(silent, what)(*arguments)
        with pytest.raises(InputError, match="episodes have no transitions"):
            getattr(short, what)(*arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 3, 6, 8), np.uint8), r"camera'\] has bytes of shape \(3, 3, 6, 8\), but images must be bytes"),
        (np.zeros((3, 6, 8, 3), np.float32), r"has floats of shape \(3, 6, 8, 3\).*floats \[T, C, H, W\]"),
        (np.full((3, 3, 6, 8), 255.0), r"has values from 255 to 255"),
        (np.full((3, 3, 6, 8), np.nan), r"has values from nan to nan"),
        (np.zeros((3, 6, 8, 3), np.int64), "has dtype int64"),
    ],
)
def test_bad_images_are_told(images, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        Demonstrations((Episode({"camera": images}, ZEROS),)).chunks(2)


def test_actions_that_are_no_vectors_are_told():
    with pytest.raises(InputError, match=r"episodes\[0\] has actions of shape \(3,\)"):
        Demonstrations((Episode(ZEROS, np.zeros(3, np.int64)),)).chunks(2)
