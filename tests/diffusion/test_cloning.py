import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import DDIM, DDPM, Cloning, DiscreteVP, FlowSolver, MLPRecipe, RectifiedFlow, Scaling
from steersman.diffusion.mcdp import ImageRecipe
from steersman.envs.chunk_data import ChunkPairs, EpisodeChunks
from steersman.errors import InputError, InputTypeError
from steersman.training import WarmupCosine, train

TENTHS = Scaling(jnp.zeros(()), jnp.asarray(10.0))


def two_modes(count=4000, seed=0):
    """Chunks of two rows at +-(side + observation), in units of ten."""
    rng = np.random.default_rng(seed)
    observation = rng.uniform(-1.0, 1.0, (count, 1)).astype(np.float32)
    side = rng.choice([-1.0, 1.0], (count, 1, 1))
    chunk = 10.0 * (side + 0.5 * observation[:, :, None] + 0.05 * rng.normal(size=(count, 2, 1)))
    return ChunkPairs(jnp.asarray(observation), jnp.asarray(chunk, jnp.float32))


@pytest.mark.parametrize(
    ("process", "prediction", "sampler"),
    [(DiscreteVP.squared_cosine(20), "noise", DDPM()), (RectifiedFlow(), "flow", FlowSolver(10))],
    ids=["diffusion", "flow"],
)
def test_learns_both_modes_and_their_place(process, prediction, sampler):
    data = two_modes()
    algorithm = Cloning(
        MLPRecipe(process, prediction, hidden=(64, 64)),
        sampler,
        learning_rate=WarmupCosine(5e-3, 3000, warmup=20),
        action_scaling=Scaling.fit(data.actions),
    )
    trained = train(algorithm, data, iterations=3000)
    generator = trained.policy().generator
    draws = jax.jit(jax.vmap(lambda key: generator(jnp.asarray([0.6]), key)))(jax.random.split(jax.random.key(1), 2000))
    up = draws[:, 0, 0] > 3.0
    assert 0.4 < float(up.mean()) < 0.6
    np.testing.assert_allclose(draws[up].mean(), 13.0, atol=0.8)
    np.testing.assert_allclose(draws[~up].mean(), -7.0, atol=0.8)
    # Rows of one chunk belong to one mode.
    assert float(jnp.mean(up == (draws[:, 1, 0] > 3.0))) > 0.98


def test_episodes_are_cut_as_diffusion_policy_cuts_them():
    episodes = [(np.arange(4.0)[:, None], 10.0 + np.arange(4.0)[:, None]), (np.full((3, 1), 7.0), np.full((2, 1), 8.0))]
    data = EpisodeChunks.cut(episodes, horizon=4, observation_horizon=2)
    assert data.size == 6
    observation, chunk = data.batch(jnp.asarray([0, 3, 5]))
    np.testing.assert_array_equal(observation[:, :, 0], [[0, 0], [2, 3], [7, 7]])
    # The first row belongs to the window's oldest observation.
    np.testing.assert_array_equal(chunk[:, :, 0], [[10, 10, 11, 12], [12, 13, 13, 13], [8, 8, 8, 8]])


def test_a_windowed_policy_plays_the_row_that_belongs_to_now():
    time = np.arange(200.0)[:, None] / 100.0
    data = EpisodeChunks.cut([(time, time)], horizon=4, observation_horizon=2)
    algorithm = Cloning(
        MLPRecipe(DiscreteVP.squared_cosine(10), hidden=(64,)),
        DDIM(),
        learning_rate=3e-3,
        batch_size=128,
        action_horizon=2,
    )
    policy = train(algorithm, data, iterations=2500).policy()
    carry = policy.init(jax.random.key(0))
    first, carry = policy(jnp.asarray([0.99]), carry, jax.random.key(0))
    second, carry = policy(jnp.asarray([1.0]), carry, jax.random.key(0))
    np.testing.assert_allclose([first[0], second[0]], [0.99, 1.0], atol=0.1)


def test_crops_move_while_an_encoder_learns_and_rest_when_it_acts():
    """The encoder gets a key in the loss alone: the loss knows every part of the image, the policy only the middle."""
    recipe = MLPRecipe(DiscreteVP.squared_cosine(10), hidden=(8,), encoder=ImageRecipe((2,), 3, crop=(4, 4)))
    generator = np.random.default_rng(0)
    data = ChunkPairs(
        jnp.asarray(generator.uniform(size=(16, 1, 6, 6)), jnp.float32), jnp.asarray(generator.normal(size=(16, 1, 1)))
    )
    algorithm = Cloning(recipe, DDIM(5), batch_size=8)
    start = algorithm.init(data, jax.random.key(0))
    state, _ = eqx.filter_jit(algorithm.step)(data, start)

    @jax.jit
    def sensitivity(denoiser, images, key):
        """Where the image matters: to the loss of a batch, and to what is played."""

        def loss(images):
            return algorithm.loss(denoiser, images, data.chunk, key)

        def played(images):
            return jnp.sum(jax.vmap(lambda image: denoiser.encode(image) ** 2)(images))

        return [jnp.abs(jax.grad(f)(images))[:, 0].sum(axis=0) > 0.0 for f in (loss, played)]

    learning, acting = sensitivity(state.denoiser, data.observation, jax.random.key(1))
    middle = np.zeros((6, 6), bool)
    middle[1:5, 1:5] = True
    assert not np.any(np.asarray(acting) & ~middle)
    assert np.asarray(acting).any()
    assert np.asarray(learning)[~middle].any()


def test_bad_data_is_told():
    good = np.zeros((3, 1)), np.zeros((3, 1))
    with pytest.raises(InputError, match="episodes is"):
        EpisodeChunks.cut([], horizon=4)
    with pytest.raises(InputError, match=r"episodes\[1\] is ragged: 5 observations but 3"):
        EpisodeChunks.cut([good, (np.zeros((5, 1)), np.zeros((3, 1)))], horizon=4)
    with pytest.raises(InputError, match=r"episodes\[1\] has actions of 2 dimensions"):
        EpisodeChunks.cut([good, (np.zeros((3, 1)), np.zeros((3, 2)))], horizon=4)
    with pytest.raises(InputError, match=r"episodes\[0\] has actions of shape \(0, 1\)"):
        EpisodeChunks.cut([(np.zeros((0, 1)), np.zeros((0, 1)))], horizon=4)
    with pytest.raises(InputError, match="observation_horizon is 5"):
        EpisodeChunks.cut([good], horizon=4, observation_horizon=5)
    with pytest.raises(InputError, match=r"chunk\.shape"):
        ChunkPairs(jnp.zeros((3, 1)), jnp.zeros((4, 2, 1)))
    with pytest.raises(InputError, match=r"actions never changes in entries \[1\]"):
        Scaling.fit(np.stack([np.arange(4.0), np.ones(4)], axis=1), name="actions")
    with pytest.raises(InputError, match="has NaN or infinity"):
        Scaling.fit(np.asarray([[1.0], [np.nan]]))
    with pytest.raises(InputTypeError, match="ChunkData"):
        Cloning().init("data", jax.random.key(0))
    data = EpisodeChunks.cut([good], horizon=4, observation_horizon=2)
    with pytest.raises(InputError, match="action_horizon is 4"):
        train(Cloning(action_horizon=4), data, iterations=1)
    with pytest.raises(InputError, match="steps is 200, but the schedule has only 100"):
        train(Cloning(sampler=DDPM(200), action_scaling=TENTHS), two_modes(8), iterations=1).policy()
    with pytest.raises(InputError, match=r"problem has actions of which \d+% lie beyond the sampler's limit 1\.0"):
        Cloning().init(two_modes(8), jax.random.key(0))
