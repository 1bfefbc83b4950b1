"""Samplers against closed forms: on Gaussian policies every step is affine, so moments follow by recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from steersman.diffusion import (
    DDIM,
    DDPM,
    EDM,
    ContinuousVP,
    DiscreteVP,
    DPMSolver,
    FlowSolver,
    Mixture,
    MixtureDenoiser,
    RectifiedFlow,
    flow_log_prob,
    sample,
    transition_log_prob,
)
from steersman.errors import InputError, InputTypeError


def gaussian(process, mean, std):
    mixture = Mixture(jnp.zeros(1), jnp.full((1, 1), mean), jnp.full((1, 1), std**2))
    return MixtureDenoiser(lambda _: mixture, process, (1, 1))


def draw(denoiser, sampler, count, seed=0, **slots):
    def one(key):
        return sample(denoiser, sampler, denoiser.encode(()), key, **slots).chunk

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), count))


def affine_recursion(mean, std, levels, eta):
    """Mean and standard deviation of the sampled law, in float64, straight from the definitions."""
    f = [np.cos((k / levels + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(levels + 1)]
    signal = np.cumprod([1 - min(1 - f[k + 1] / f[k], 0.999) for k in range(levels)])
    m, v = 0.0, 1.0
    for k in reversed(range(levels)):
        here, before = signal[k], signal[k - 1] if k else 1.0
        spread = here * std**2 + 1 - here
        # E[e | x] = slope x + offset for a Gaussian policy.
        slope = np.sqrt(1 - here) / spread
        offset = -slope * np.sqrt(here) * mean
        s2 = eta**2 * (1 - before) / (1 - here) * (1 - here / before)
        of_x = np.sqrt(before / here) * (1 - slope * np.sqrt(1 - here)) + np.sqrt(1 - before - s2) * slope
        constant = offset * (np.sqrt(1 - before - s2) - np.sqrt(before / here) * np.sqrt(1 - here))
        m, v = of_x * m + constant, of_x**2 * v + s2
    return m, np.sqrt(v)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 1.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_moments_follow_the_affine_recursion(name, eta):
    process = DiscreteVP.squared_cosine(50)
    sampler = DDPM(limit=None) if name == "ddpm" else DDIM(eta=eta, limit=None)
    draws = draw(gaussian(process, 0.4, 0.2), sampler, 20_000)
    mean, std = affine_recursion(0.4, 0.2, 50, eta)
    np.testing.assert_allclose(draws.mean(), mean, atol=4 * std / np.sqrt(20_000))
    np.testing.assert_allclose(draws.std(), std, rtol=0.02)


def test_ddpm_shrinks_by_the_published_amount():
    """Fifty cosine steps of a policy with standard deviation 0.2 end at 0.17491."""
    np.testing.assert_allclose(affine_recursion(0.0, 0.2, 50, 1.0)[1], 0.17491, atol=1e-5)


DETERMINISTIC = {
    "ddim": (DiscreteVP.squared_cosine(100), DDIM(limit=None), 0.06),
    "dpm-solver, discrete": (DiscreteVP.squared_cosine(100, spacing="trailing"), DPMSolver(20, limit=None), 0.03),
    "dpm-solver, flow": (RectifiedFlow(), DPMSolver(30, limit=None), 0.02),
    "heun, flow": (RectifiedFlow(), FlowSolver(40, order=2), 0.005),
    "euler, flow": (RectifiedFlow(), FlowSolver(200), 0.02),
    "heun, edm": (EDM(), FlowSolver(40, order=2), 0.01),
    "heun, vp": (ContinuousVP(), FlowSolver(200, order=2), 0.02),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_carry_noise_to_the_policy(name):
    """For a Gaussian the exact flow maps the standard normal z of the start to m + s z."""
    process, sampler, tolerance = DETERMINISTIC[name]
    denoiser = gaussian(process, 0.5, 0.3)
    z = jnp.asarray([-1.5, 0.0, 1.0])

    @jax.jit
    def ends(z):
        start = process.prior_scale * z[:, None, None]
        return jax.vmap(lambda x: sample(denoiser, sampler, denoiser.encode(()), None, start=x).chunk)(start)

    np.testing.assert_allclose(ends(z)[:, 0, 0], 0.5 + 0.3 * z, atol=tolerance)


def test_euler_and_heun_converge_at_their_orders():
    denoiser, z = gaussian(RectifiedFlow(), 0.5, 0.3), jnp.ones((1, 1))

    def error(order, steps):
        solver = FlowSolver(steps, order=order)
        return abs(float(sample(denoiser, solver, denoiser.encode(()), None, start=z).chunk[0, 0]) - 0.8)

    assert 1.6 < error(1, 20) / error(1, 40) < 2.6
    assert error(2, 40) < 0.1 * error(1, 40)


def test_ddim_on_straight_paths_is_euler():
    denoiser, z = gaussian(RectifiedFlow(), 0.5, 0.3), jnp.full((1, 1), 0.7)
    ends = [
        sample(denoiser, sampler, denoiser.encode(()), None, start=z).chunk
        for sampler in (DDIM(7, limit=None), FlowSolver(7))
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)


def test_two_modes_keep_their_weights():
    mixture = Mixture(jnp.log(jnp.asarray([0.3, 0.7])), jnp.asarray([[-0.6], [0.6]]), jnp.full((2, 1), 0.01))
    denoiser = MixtureDenoiser(lambda _: mixture, DiscreteVP.squared_cosine(50), (1, 1))
    draws = draw(denoiser, DDPM(), 8_000)
    np.testing.assert_allclose((draws > 0).mean(), 0.7, atol=0.02)
    np.testing.assert_allclose(jnp.abs(draws).mean(), 0.6, atol=0.02)


def test_scores_and_densities_of_mixtures():
    """Noise predictions are -sigma times the gradient of the log-density, and densities are SciPy's."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(2, 3, 3)) * 0.4
    covariance = factors @ factors.transpose(0, 2, 1) + 0.1 * np.eye(3)
    mean, weight = rng.normal(size=(2, 3)), np.array([0.25, 0.75])
    mixture = Mixture.from_covariance(jnp.log(jnp.asarray(weight)), jnp.asarray(mean), jnp.asarray(covariance))
    x, alpha, sigma = jnp.asarray(rng.normal(size=3), jnp.float32), 0.8, 0.6
    truth = np.log(
        sum(
            w * stats.multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * np.eye(3)).pdf(np.asarray(x))
            for w, m, c in zip(weight, mean, covariance, strict=True)
        )
    )
    np.testing.assert_allclose(mixture.log_density(x, alpha, sigma), truth, rtol=1e-5)
    score = jax.grad(mixture.log_density)(x, alpha, sigma)
    found = mixture.predict(x, jnp.asarray(alpha), jnp.asarray(sigma))
    np.testing.assert_allclose(found.noise, -sigma * score, atol=1e-5)
    np.testing.assert_allclose(alpha * found.sample + sigma * found.noise, x, atol=1e-5)
    draws = jax.vmap(mixture.sample)(jax.random.split(jax.random.key(1), 20_000))[0]
    np.testing.assert_allclose(draws.mean(0), weight @ mean, atol=0.03)


@pytest.mark.parametrize("process", [RectifiedFlow(), ContinuousVP(), EDM()], ids=["flow", "vp", "edm"])
def test_flow_likelihood_is_the_gaussians(process):
    denoiser = gaussian(process, 0.5, 0.3)
    points = jnp.asarray([0.1, 0.5, 1.2])

    @jax.jit
    def densities(points):
        return jax.vmap(lambda p: flow_log_prob(denoiser, denoiser.encode(()), p[None, None]))(points)

    np.testing.assert_allclose(densities(points), stats.norm(0.5, 0.3).logpdf(points), atol=0.02)


def test_chains_record_what_was_drawn():
    process = DiscreteVP.squared_cosine(10)
    denoiser, sampler = gaussian(process, 0.2, 0.3), DDPM(std_bounds=(0.1, 0.4), noise_limit=1.5)
    chain = sample(denoiser, sampler, denoiser.encode(()), jax.random.key(2))
    standardized = (chain.states[1:] - chain.mean) / chain.std[:, None, None]
    assert chain.states.shape == (11, 1, 1)
    np.testing.assert_allclose([jnp.min(chain.std), jnp.max(chain.std)], [0.1, 0.4], rtol=1e-6)
    assert float(jnp.max(jnp.abs(standardized))) <= 1.5 + 1e-5
    truth = stats.norm(chain.mean[:, 0, 0], chain.std).logpdf(chain.states[1:, 0, 0])
    np.testing.assert_allclose(transition_log_prob(chain.states[1:], chain.mean, chain.std)[:, 0, 0], truth, rtol=1e-4)


def test_projection_and_warm_start():
    process = DiscreteVP.squared_cosine(20)
    denoiser = gaussian(process, 0.2, 0.3)
    fixed = sample(
        denoiser, DDPM(), denoiser.encode(()), jax.random.key(0), project=lambda x, level: jnp.full_like(x, 0.7)
    )
    np.testing.assert_allclose(fixed.chunk, 0.7, rtol=1e-6)
    start = jnp.full((1, 1), 0.25)
    grid = process.single_steps([2, 1, 0])
    warm = sample(denoiser, DDPM(limit=None), denoiser.encode(()), jax.random.key(0), start=start, grid=grid)
    assert warm.states.shape[0] == 4
    np.testing.assert_array_equal(warm.states[0], start)


def test_bad_input_is_told():
    discrete, flow = gaussian(DiscreteVP.squared_cosine(5), 0.0, 1.0), gaussian(RectifiedFlow(), 0.0, 1.0)
    with pytest.raises(InputError, match="key is None"):
        sample(discrete, DDPM(), discrete.encode(()), None)
    with pytest.raises(InputError, match=r"start\.shape"):
        sample(discrete, DDPM(), discrete.encode(()), jax.random.key(0), start=jnp.zeros((2, 1)))
    with pytest.raises(InputTypeError, match="FlowSolver"):
        sample(discrete, FlowSolver(3), discrete.encode(()), jax.random.key(0))
    with pytest.raises(InputError, match="steps is None"):
        sample(flow, DDPM(), flow.encode(()), jax.random.key(0))
    with pytest.raises(InputError, match="eta"):
        DDIM(eta=1.5)
    with pytest.raises(InputError, match="std_bounds"):
        DDPM(std_bounds=(0.2, 0.1))
    with pytest.raises(InputError, match="order"):
        FlowSolver(order=3)
    with pytest.raises(InputTypeError, match="real levels"):
        flow_log_prob(discrete, discrete.encode(()), jnp.zeros((1, 1)))
