import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import multivariate_normal

from steersman.diffusion import DDIM, DDPM, DiscreteVP, FlowSolver, RectifiedFlow
from steersman.diffusion.cloning import Cloning, MLPRecipe
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.gorl import StageLoop, flow_cloning
from steersman.diffusion.latent_actions import (
    Decoder,
    GenerativeDecoder,
    LatentActions,
    LatentParams,
    LatentPolicy,
    LatentPPO,
    Unchanged,
)
from steersman.envs import Problem
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.dynamics import DiscreteCartPole
from steersman.envs.planar import HiddenTarget, TwoWalls
from steersman.errors import InputError, InputTypeError
from steersman.policies import DiagonalGaussian, GaussianParameters
from steersman.rl.on_policy.actor_critic import in_rows
from steersman.rl.on_policy.ppo import PPO
from steersman.studies.gorl import _kept, predicted_success
from steersman.training import EpisodeFilter, Linear

AGENT = {"num_envs": 8, "num_steps": 4, "hidden": (4,), "epochs": 1, "minibatches": 2}
FLOW = flow_cloning(recipe=MLPRecipe(RectifiedFlow(), "flow", (8,), time_size=4), batch_size=16)
PROBLEM = Problem(HiddenTarget(cost=0.02))


def loop(**changes):
    sizes = {"iterations": 1, "collect_envs": 32, "collect_steps": 16, "max_samples": 64, "refit_steps": 2}
    return StageLoop(**{"agent": LatentPPO(**AGENT), "decoder": FLOW, **sizes, **changes})


def decoder_of(recipe, sampler):
    denoiser = recipe.make(jnp.ones(3), (1, 2), jax.random.key(0))
    return GenerativeDecoder(ChunkGenerator(denoiser, sampler))


@pytest.mark.parametrize("steps", [1, 7])
def test_an_untrained_flow_changes_nothing(steps):
    """Oracle 1, first half."""
    decoder = decoder_of(FLOW.recipe, FlowSolver(steps)).identity(jnp.ones(3))
    latent = jnp.asarray([0.3, -2.0])
    np.testing.assert_allclose(decoder(5.0 * jnp.ones(3), latent), latent, rtol=3e-7)


def test_an_untrained_noise_network_scales_by_the_schedule():
    """Oracle 1, second half: 1 / sqrt(prod (1 - beta)) on the linear schedule; the cosine one is refused."""
    decoder = decoder_of(MLPRecipe(DiscreteVP.squared_cosine(10), "noise", (4,)), DDIM(10, limit=None))
    zero = decoder.identity(jnp.ones(3))
    gain = np.prod(1.0 - np.linspace(1e-4, 0.02, 10)) ** -0.5
    assert gain == pytest.approx(1.0519, abs=1e-4)
    np.testing.assert_allclose(zero(jnp.ones(3), jnp.asarray([1.0, -2.0])), [gain, -2 * gain], rtol=1e-5)
    with pytest.raises(InputError, match="process scales latent vectors; its factor is"):
        decoder.identity(jnp.ones(3), DiscreteVP.squared_cosine(10))


def test_stage_zero_is_plain_ppo():
    """Oracle 2: the same experience, loss and networks on the same keys."""
    agent = PPO(**AGENT)
    observed = jnp.ones(1)
    denoiser = FLOW.recipe.make(observed, (1, 1), jax.random.key(0))
    decoder = GenerativeDecoder(ChunkGenerator(denoiser, FlowSolver(3))).identity(observed)
    latent = Problem(LatentActions(PROBLEM.environment), LatentParams(PROBLEM.params, decoder))

    def update(problem):
        state = agent.init(problem, jax.random.key(1))
        rollout = agent.collector.init(problem, agent.behaviour(state), jax.random.key(2))
        experience = agent.collector.collect(problem, agent.behaviour(state), rollout)[0]
        state, metrics = agent.update(state, experience)
        return experience.reward, experience.action, state.learned, metrics

    for ours, theirs in zip(*(jax.tree.leaves(jax.jit(update)(p)) for p in (latent, PROBLEM)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_latent_ratios_are_those_of_the_actions():
    """Oracle 3: the Jacobian of an invertible linear decoder cancels."""
    generator = np.random.default_rng(0)
    head = DiagonalGaussian((3,))
    for _ in range(100):
        matrix, shift = generator.normal(size=(3, 3)) + 2.0 * np.eye(3), generator.normal(size=3)
        means, stds = generator.normal(size=(2, 3)), np.exp(0.3 * generator.normal(size=(2, 3)))
        latent = means[0] + stds[0] * generator.normal(size=3)
        ours = [
            float(head.log_prob(GaussianParameters(jnp.asarray(m), jnp.log(jnp.asarray(s))), jnp.asarray(latent)))
            for m, s in zip(means, stds, strict=True)
        ]
        action = matrix @ latent + shift
        theirs = [
            multivariate_normal(matrix @ m + shift, matrix @ np.diag(s**2) @ matrix.T).logpdf(action)
            for m, s in zip(means, stds, strict=True)
        ]
        assert ours[1] - ours[0] == pytest.approx(theirs[1] - theirs[0], abs=1e-3, rel=1e-4)


def test_a_refitted_decoder_is_the_quantile_map():
    """Oracle 4: monotone transport from the standard normal, for a Gaussian and for two modes."""
    recipe = MLPRecipe(RectifiedFlow(), "flow", (64, 64))
    rate = Linear(1e-2, 1e-4, 1000)
    cloning = flow_cloning(recipe=recipe, batch_size=512, learning_rate=rate, sampler=FlowSolver(30))
    trainer = loop(decoder=cloning, refit_steps=1000)
    generator = np.random.default_rng(0)
    gaussian = 0.4 + 0.6 * generator.normal(size=8192)
    modes = np.where(generator.random(8192) < 0.5, 1.0, -1.0) + 0.1 * generator.normal(size=8192)
    data = jnp.asarray(np.stack([gaussian, modes]), jnp.float32)[..., None, None]

    @jax.jit
    def maps(data, latent):
        def one(chunk, key):
            decoder, _ = trainer._refit(ChunkPairs(jnp.ones((8192, 1)), chunk), key)
            return jax.vmap(lambda z: decoder(jnp.ones(1), z[None])[0])(latent)

        return jax.vmap(one)(data, jax.random.split(jax.random.key(0), 2))

    latent = np.linspace(-2.0, 2.0, 401)
    line, steps = np.asarray(maps(data, jnp.asarray(latent, jnp.float32)))
    middle = np.abs(latent) < 1.5
    assert np.abs(line - (0.4 + 0.6 * latent))[middle].max() < 0.05
    assert (np.diff(steps) > -1e-4).all()
    drawn = np.interp(generator.normal(size=20_000), latent, steps)
    assert [(np.abs(drawn - mode) < 0.4).mean() for mode in (-1, 1)] == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_exact_recursion():
    """Oracle 5: the specified successes, and its masses against the filter on simulated episodes."""
    np.testing.assert_allclose(predicted_success(6), [0.638, 0.807, 0.907, 0.967, 0.985, 0.995], atol=0.01)
    np.testing.assert_allclose(predicted_success(4, 1.0), [0.638, 0.860, 0.963, 0.990], atol=0.01)
    np.testing.assert_allclose(predicted_success(3, 0.0), 0.64, atol=0.005)
    generator = np.random.default_rng(0)
    actions = generator.normal(size=(40_000, 10))
    target = np.where(generator.random(40_000) < 0.5, 1.0, -1.0)
    hit = np.abs(actions - target[:, None]) < 0.2
    length = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 10)
    returns = hit.any(axis=1) - 0.02 * length
    weight, kept = EpisodeFilter()(jnp.asarray(returns, jnp.float32), jnp.ones(40_000, bool))
    assert int(kept) >= 20_000
    played = np.arange(10) < length[:, None]
    edges = np.asarray([-np.inf, -1.2, -0.8, 0.8, 1.2, np.inf])

    def masses(weight):
        return np.histogram(actions[played], edges, weights=np.repeat(weight, length))[0]

    plain, ours = masses(np.ones(40_000)), masses(np.asarray(weight, np.float64))
    exact = np.diff(ndtr(edges))
    np.testing.assert_allclose(ours / ours.sum(), _kept(exact, 0.8, 0.5), atol=0.01)
    np.testing.assert_allclose(plain / plain.sum(), _kept(exact, 0.0, 0.5), atol=0.01)


@pytest.fixture(scope="module")
def staged():
    algorithm = loop(filter=EpisodeFilter(), first=LatentPPO(latent_penalty=0.0, **AGENT))
    state = algorithm.init(PROBLEM, jax.random.key(0))
    after, metrics = eqx.filter_jit(algorithm.step)(PROBLEM, state)
    return algorithm, state, after, metrics


def test_decoder_and_latent_policy_do_not_change_together(staged):
    """Oracle 6: the stage's decoder is as it was; the next one is another, and knows nothing of the policy."""
    algorithm, state, after, metrics = staged
    assert bool(eqx.tree_equal(after.played, state.decoder))
    assert not bool(eqx.tree_equal(after.decoder.generator.denoiser, state.decoder.generator.denoiser))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert float(metrics["kept_episodes"]) > 16
    assert float(metrics["samples"]) == 8 * 4 + 32 * 16
    policy = algorithm.policy(after)
    assert isinstance(policy, LatentPolicy)
    action, _ = policy(jnp.ones(1), (), jax.random.key(0))
    latent, _ = after.encoder(jnp.ones(1), (), jax.random.key(0))
    np.testing.assert_allclose(action, latent, rtol=1e-5)
    assert policy.mode()(jnp.ones(1), (), jax.random.key(0))[0].shape == (1,)


def test_a_latent_penalty_holds_the_policy_near_the_prior(staged):
    state = staged[0].agent.init(PROBLEM, jax.random.key(0))
    agent = LatentPPO(latent_penalty=0.7, **AGENT)
    plain = LatentPPO(latent_penalty=0.0, **AGENT)
    rollout = agent.collector.init(PROBLEM, state.actor, jax.random.key(1))
    experience = eqx.filter_jit(agent.collector.collect)(PROBLEM, state.actor, rollout)[0]
    rows = in_rows(state.actor, eqx.filter_jit(agent.estimate)(state, experience)[0])
    gap = eqx.filter_jit(lambda: jnp.subtract(*(a.loss(state.learned, state, rows, ())[0] for a in (agent, plain))))()
    mean, log_std = rows.parameters
    assert float(gap) == pytest.approx(0.7 * float(np.mean(mean**2) + np.mean(np.exp(2 * log_std))), rel=1e-4)


class Wide(Decoder):
    def __call__(self, observation, latent):
        return jnp.concatenate([latent, latent])


class Broken(HiddenTarget):
    def step_env(self, key, state, action, params):
        observation, state, reward, terminated, info = super().step_env(key, state, action, params)
        return observation, state, reward * jnp.nan, terminated, info


def test_bad_input(staged):
    algorithm, state, _, _ = staged
    with pytest.raises(InputError, match=r"latent\.shape is"):
        decoder_of(FLOW.recipe, FlowSolver(2))(jnp.ones(3), jnp.ones(3))
    with pytest.raises(InputError, match="decoder's action shape is"):
        LatentActions(PROBLEM.environment).decode(jnp.ones(1), jnp.ones(1), LatentParams(PROBLEM.params, Wide()))
    with pytest.raises(InputError, match=r"generator\.sampler is a DDPM that draws noise"):
        decoder_of(MLPRecipe(DiscreteVP.linear(10), "noise", (4,)), DDPM(10))
    with pytest.raises(InputTypeError, match="environment is a int"):
        LatentActions(3)
    with pytest.raises(InputTypeError, match="action space has a Categorical"):
        algorithm.init(Problem(DiscreteCartPole()), jax.random.key(0))
    with pytest.raises(InputError, match="quantile is 1"):
        EpisodeFilter(quantile=1.0)
    with pytest.raises(InputError, match=r"ratio is 1\.5"):
        EpisodeFilter(ratio=1.5)
    with pytest.raises(InputError, match="refit_steps is 0"):
        loop(refit_steps=0)
    for agent in (3, Cloning(), PPO):
        with pytest.raises(Exception, match="agent"):
            loop(agent=agent)
    with pytest.raises(InputTypeError, match="policy has a Categorical"):
        LatentPPO(**AGENT).init(Problem(DiscreteCartPole()), jax.random.key(0))
    nothing = algorithm._latent(Problem(Broken(cost=0.02)), state.decoder)
    with pytest.raises(Exception, match="returns have NaN or infinity among them"):
        jax.block_until_ready(eqx.filter_jit(loop()._collect)(nothing, state.encoder, jax.random.key(0)))
    with pytest.raises(InputError, match="first is of another kind"):
        loop(first=PPO(**AGENT))
    with pytest.raises(InputTypeError, match="problem is a"):
        algorithm.init(ChunkPairs(jnp.ones((2, 1)), jnp.ones((2, 1, 1))), jax.random.key(0))
    latent = algorithm._latent(PROBLEM, state.decoder)
    with pytest.raises(Exception, match="encoder is deterministic"):
        jax.block_until_ready(eqx.filter_jit(algorithm._collect)(latent, state.encoder.mode(), jax.random.key(0)))
    few = loop(filter=EpisodeFilter(quantile=0.9), decoder=flow_cloning(recipe=FLOW.recipe, batch_size=500))
    collect = eqx.filter_jit(few._collect)
    with pytest.raises(Exception, match="filter keeps fewer episodes"):
        jax.block_until_ready(collect(latent, state.encoder, jax.random.key(0)))


def test_bounded_actions_are_squashed_after_decoding():
    environment = LatentActions(TwoWalls())
    params = environment.default_params
    assert isinstance(params.decoder, Unchanged)
    bounds = environment.bounds(params)
    np.testing.assert_allclose(bounds.to_action(jnp.asarray([0.5, -3.0])), np.tanh([0.5, -3.0]), rtol=1e-5)
    assert environment.action_space(params).shape == (2,)
