import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from steersman.diffusion import (
    DDIM,
    EDM,
    ChunkGenerator,
    DiscreteVP,
    FlowSolver,
    Mixture,
    MixtureDenoiser,
    NetworkDenoiser,
    NoiseProcess,
    RectifiedFlow,
)
from steersman.diffusion.onedp import OneDP, reverse_kl_surrogate
from steersman.diffusion.samplers import OneCall
from steersman.envs.chunk_data import Observations
from steersman.errors import InputError, InputTypeError
from steersman.training import train

PROCESS = DiscreteVP.squared_cosine(100)
OBSERVATIONS = Observations(jnp.zeros((4, 1)))


class GaussianNetwork(eqx.Module):
    """The exact noise prediction of N(mean, exp(log_std)^2): a network of two parameters."""

    mean: Array
    log_std: Array
    process: NoiseProcess

    def __call__(self, x, time, condition):
        signal = jax.lax.stop_gradient(self.process)
        level = time.astype(jnp.int32) if isinstance(signal, DiscreteVP) else time
        alpha, sigma = signal.coefficients(level)
        return sigma * (x - alpha * self.mean) / (alpha**2 * jnp.exp(2 * self.log_std) + sigma**2)


def teacher(mean=0.4, std=0.3, process=PROCESS, limit=None):
    network = GaussianNetwork(jnp.asarray(mean), jnp.log(jnp.asarray(std)), process)
    denoiser = NetworkDenoiser(network=network, process=process, chunk_shape=(1, 1), prediction="noise")
    sampler = DDIM(limit=limit) if isinstance(process, DiscreteVP) else FlowSolver(5)
    return ChunkGenerator(denoiser, sampler).policy(1, jnp.zeros(1))


def generated(algorithm, state, count=4000):
    generator = algorithm.policy(state).generator
    keys = jax.random.split(jax.random.key(9), count)
    return jax.vmap(lambda key: generator(jnp.zeros(1), key))(keys)[:, 0, 0]


def test_gradient_is_that_of_the_divergence():
    """Against the closed-form divergence of Gaussians, differentiated in the generator's mean and spread."""
    m, covariance = jnp.asarray([0.3, -0.2]), jnp.asarray([[0.3, 0.1], [0.1, 0.2]])
    mixture = Mixture.from_covariance(jnp.zeros(1), m[None], covariance)
    at = (jnp.asarray([0.5, 0.1]), jnp.asarray([[0.4, 0.0], [0.2, 0.7]]))
    levels = jnp.arange(2, 96)

    def divergence(mu, spread):
        def one(level):
            alpha, sigma = PROCESS.coefficients(level)
            mine = alpha**2 * spread @ spread.T + sigma**2 * jnp.eye(2)
            other = alpha**2 * covariance + sigma**2 * jnp.eye(2)
            det = lambda a: a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]  # noqa: E731
            inverse = jnp.asarray([[other[1, 1], -other[0, 1]], [-other[1, 0], other[0, 0]]]) / det(other)
            shift = alpha * (mu - m)
            kl = 0.5 * (jnp.trace(inverse @ mine) - 2 + shift @ inverse @ shift + jnp.log(det(other) / det(mine)))
            return sigma**2 * kl

        return jnp.mean(jax.vmap(one)(levels))

    def sampled(parameters, exact, key):
        mu, spread = parameters
        level_key, z_key, e_key = jax.random.split(key, 3)
        count = 300_000

        def one(level, z, e):
            alpha, sigma = PROCESS.coefficients(level)
            noisy = alpha * (mu + spread @ z) + sigma * e
            own = exact.predict(jax.lax.stop_gradient(noisy), alpha, sigma).noise
            known = mixture.predict(jax.lax.stop_gradient(noisy), alpha, sigma).noise
            return reverse_kl_surrogate(noisy[None], known[None], own[None], sigma)

        draws = jax.random.randint(level_key, (count,), 2, 96)
        noise = jax.random.normal(z_key, (count, 2)), jax.random.normal(e_key, (count, 2))
        return jnp.mean(jax.vmap(one)(draws, *noise))

    own = Mixture.from_covariance(jnp.zeros(1), at[0][None], at[1] @ at[1].T)
    truth = jax.grad(divergence, argnums=(0, 1))(*at)
    found = jax.jit(jax.grad(sampled))(at, own, jax.random.key(0))
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in truth)
    for a, b in zip(found, truth, strict=True):
        np.testing.assert_allclose(a, b, atol=0.015 * scale)
    # Where the two laws agree every sample's gradient vanishes.
    root = jnp.asarray(np.linalg.cholesky(np.asarray(covariance)))
    for leaf in jax.jit(jax.grad(sampled))((m, root), mixture, jax.random.key(1)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-4)


@pytest.mark.parametrize(("mode", "resting"), [(0.8, 0.478), (1.0, 0.719), (2.0, 1.857)])
def test_single_points_rest_between_two_modes(mode, resting):
    """The field of OneDP-D at a point changes its sign where quadrature has its roots."""
    mixture = Mixture(jnp.zeros(2), jnp.asarray([[mode], [-mode]]), jnp.full((2, 1), 0.03**2))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)

    def field(point):
        def one(level):
            alpha, sigma = PROCESS.coefficients(level)

            def at(e):
                noisy = alpha * point + sigma * e
                return jax.grad(
                    lambda x: reverse_kl_surrogate(
                        x, mixture.predict(x[0], alpha, sigma).noise[None], e[None, None], sigma
                    )
                )(noisy[None, None])[0, 0]

            return alpha * jnp.sum(jnp.asarray(weights) * jax.vmap(at)(jnp.asarray(nodes))) / np.sqrt(2 * np.pi)

        return jnp.sum(jax.vmap(one)(jnp.arange(2, 96)))

    below, above = jax.jit(jax.vmap(field))(jnp.asarray([resting - 0.01, resting + 0.01]))
    assert below < 0 < above


def test_starts_as_the_teacher_at_one_level_and_learns_its_law():
    policy = teacher(mean=0.4, std=0.3)
    algorithm = OneDP(policy, learning_rate=3e-3, score_learning_rate=6e-3, batch_size=256)
    start = generated(algorithm, algorithm.init(OBSERVATIONS, jax.random.key(0)))
    alpha, sigma = (float(c) for c in PROCESS.coefficients(jnp.asarray(65)))
    gain = 0.09 * alpha / (0.09 * alpha**2 + sigma**2)
    np.testing.assert_allclose(start.std(), gain, rtol=0.05)
    np.testing.assert_allclose(start.mean(), 0.4 * (1 - alpha * gain), atol=0.02)
    trained = train(algorithm, OBSERVATIONS, iterations=3000)
    found = generated(algorithm, jax.tree.map(lambda leaf: leaf[0], trained.state))
    np.testing.assert_allclose([found.mean(), found.std()], [0.4, 0.3], atol=0.03)


def test_the_second_denoiser_learns_the_law_of_what_is_generated():
    algorithm = OneDP(teacher(mean=0.4, std=0.3), learning_rate=0.0, score_learning_rate=6e-3, batch_size=256)
    trained = train(algorithm, OBSERVATIONS, iterations=1500)
    state = jax.tree.map(lambda leaf: leaf[0], trained.state)
    found = generated(algorithm, state)
    learned = state.score.network
    np.testing.assert_allclose([learned.mean, jnp.exp(learned.log_std)], [found.mean(), found.std()], atol=0.03)


def test_without_a_second_denoiser_that_learns_nothing_moves():
    algorithm = OneDP(teacher(), learning_rate=1e-2, score_learning_rate=0.0, batch_size=32)
    start = algorithm.init(OBSERVATIONS, jax.random.key(0))
    after, _ = eqx.filter_jit(lambda a, state: a.step(OBSERVATIONS, state))(algorithm, start)
    np.testing.assert_array_equal(after.student.network.mean, start.student.network.mean)
    np.testing.assert_array_equal(after.student.network.log_std, start.student.network.log_std)


def test_single_points_find_one_mode():
    algorithm = OneDP(teacher(mean=0.4, std=0.3), deterministic=True, learning_rate=3e-3, batch_size=256)
    trained = train(algorithm, OBSERVATIONS, iterations=1500)
    found = generated(algorithm, jax.tree.map(lambda leaf: leaf[0], trained.state), count=3)
    np.testing.assert_allclose(found, 0.4, atol=0.03)


def test_the_dirac_residual_is_exact():
    """With the same noise in both places, e_teacher - e = -e alpha^2 s^2 / (alpha^2 s^2 + sigma^2) at A = m."""
    denoiser = teacher(mean=0.4, std=0.3).generator.denoiser
    e = jnp.asarray([[0.7]])
    for level in (5, 40, 90):
        alpha, sigma = PROCESS.coefficients(jnp.asarray(level))
        found = denoiser.predict(alpha * 0.4 + sigma * e, jnp.asarray(level), jnp.zeros(1)).noise - e
        kept = alpha**2 * 0.09
        np.testing.assert_allclose(found, -e * kept / (kept + sigma**2), atol=1e-5)


@pytest.mark.parametrize(("process", "level"), [(RectifiedFlow(), 0.7), (EDM(), 2.5)], ids=["flow", "edm"])
def test_other_processes_start_at_their_own_scale(process, level):
    mixture = Mixture(jnp.zeros(1), jnp.full((1, 1), 0.4), jnp.full((1, 1), 0.09))
    denoiser = MixtureDenoiser(lambda _: mixture, process, (1, 1))
    generator = ChunkGenerator(denoiser, OneCall(level=level, limit=None))
    chain = generator.chain((), jax.random.key(0))
    assert chain.states.shape == (2, 1, 1)
    z = jax.random.normal(jax.random.split(jax.random.key(0))[0], (1, 1))
    np.testing.assert_allclose(chain.states[0], level * z, rtol=1e-6)


def test_bad_input_is_told():
    with pytest.raises(InputError, match="start_level is 100"):
        OneDP(teacher(), start_level=100)
    with pytest.raises(InputError, match="levels"):
        OneDP(teacher(), levels=(95, 2))
    with pytest.raises(InputError, match="levels"):
        OneDP(teacher(), levels=(2, 100))
    with pytest.raises(InputError, match="no numbered levels"):
        OneDP(teacher(process=RectifiedFlow()), start_level=0.7)
    mixture = Mixture(jnp.zeros(1), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    exact = MixtureDenoiser(lambda _: mixture, PROCESS, (1, 1))
    with pytest.raises(InputTypeError, match="NetworkDenoiser"):
        OneDP(ChunkGenerator(exact, DDIM()).policy(1, jnp.zeros(1)))
    with pytest.raises(InputError, match="batch_size"):
        OneDP(teacher(), batch_size=0)
    with pytest.raises(InputError, match="leading axis"):
        Observations(jnp.zeros((0, 1)))
    with pytest.raises(InputTypeError, match="ObservationData"):
        OneDP(teacher()).init("data", jax.random.key(0))
