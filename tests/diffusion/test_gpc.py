"""Composed policies against closed forms: Gaussian parents and exact recursions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import (
    DDIM,
    DDPM,
    ChunkGenerator,
    DiscreteVP,
    FlowSolver,
    Mixture,
    MixtureDenoiser,
    RectifiedFlow,
    Scaling,
    on_process,
)
from steersman.diffusion.combination import check_weights
from steersman.diffusion.gpc import compose, generators_of, reweighted
from steersman.diffusion.superposition import Superposition
from steersman.errors import InputError, InputTypeError

PROCESS = DiscreteVP.squared_cosine(50)


def draws(policy, observation, count, seed=0):
    return jax.jit(jax.vmap(lambda key: policy(observation, key)))(jax.random.split(jax.random.key(seed), count))


def test_unit_weights_are_the_parent_and_order_does_not_matter(generator):
    parents = [generator(0.2), generator(0.3), generator(0.1)]
    means, key = (0.4, -0.2, 0.1), jax.random.key(3)
    combined = compose(parents, [1.0, 0.0, 0.0])
    swapped = compose(parents[::-1])

    @jax.jit
    def run(key):
        alone = [parent(jnp.asarray(mean), key) for parent, mean in zip(parents, means, strict=True)]
        units = [reweighted(combined, row)(means, key) for row in np.eye(3)]
        return alone, units, reweighted(combined, np.full(3, 1 / 3))(means, key), swapped(means[::-1], key)

    alone, units, one, other = run(key)
    # The same arithmetic; compiled into another program, a product and a sum may be rounded once or twice.
    np.testing.assert_allclose(units, alone, atol=1e-6)
    conditions, x, level = combined.denoiser.encode(means), jnp.full((1, 1), 0.3), jnp.asarray(20)
    for row, parent, condition in zip(np.eye(3), parents, conditions, strict=True):
        found = reweighted(combined, row).denoiser.predict(x, level, conditions)
        want = parent.denoiser.predict(x, level, condition)
        np.testing.assert_array_equal([found.noise, found.sample], [want.noise, want.sample])
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "eta", "mean", "std"),
    [(DDIM(limit=None), 0.0, 0.53679, 0.20205), (DDPM(limit=None), 1.0, 0.47744, 0.17991)],
    ids=["ddim", "ddpm"],
)
def test_unequal_gaussians_end_where_the_recursion_says(sampler, eta, mean, std, generator, affine_recursion):
    """Not at 0.20588 and 0.16270, the normalized product of the densities: noised scores are averaged."""
    np.testing.assert_allclose(affine_recursion((0.0, 1.0), (0.1, 0.3), (0.3, 0.7), eta), (mean, std), atol=1e-5)
    composed = compose([generator(0.1), generator(0.3)], [0.3, 0.7], sampler=sampler)
    chunks = draws(composed, (jnp.asarray(0.0), jnp.asarray(1.0)), 20_000)
    np.testing.assert_allclose(chunks.mean(), mean, atol=4 * std / np.sqrt(20_000))
    np.testing.assert_allclose(chunks.std(), std, rtol=0.02)


def test_policies_of_other_processes_agree_at_equal_signal_to_noise(gaussian):
    """The noise of N(m, s^2) at x is sigma (x - alpha m) / (alpha^2 s^2 + sigma^2), whoever is asked."""
    with jax.enable_x64(True):
        flow = on_process(gaussian(0.3, RectifiedFlow()), DiscreteVP.squared_cosine(50))
        rng = np.random.default_rng(0)
        for x, k in zip(rng.normal(size=20), rng.integers(0, 50, 20), strict=True):
            level = jnp.asarray(k, jnp.int32)
            alpha, sigma = (float(c) for c in flow.process.coefficients(level))
            found = flow.predict(jnp.full((1, 1), x), level, flow.encode(jnp.asarray(0.4)))
            truth = sigma * (x - alpha * 0.4) / (alpha**2 * 0.09 + sigma**2)
            np.testing.assert_allclose(found.noise[0, 0], truth, atol=1e-6)


def test_bayes_is_the_exact_fusion(generator):
    """Prior N(0, 1), independent readings of unit variance: p(a | o1) p(a | o2) / p(a) = N((o1 + o2) / 3, 1/3)."""

    def posterior(reading):
        return Mixture(jnp.zeros(1), jnp.full((1, 1), 0.5 * reading), jnp.full((1, 1), 0.5))

    single = ChunkGenerator(MixtureDenoiser(posterior, PROCESS, (1, 1)), DDPM(limit=None))
    fused = compose([single, single, generator(1.0)], op="bayes").denoiser
    clean = jnp.asarray(0)
    x = jnp.full((1, 1), 1.2)
    alpha, sigma = (float(c) for c in PROCESS.coefficients(clean))
    found = fused.predict(x, clean, fused.encode((jnp.asarray(1.2), jnp.asarray(0.3), jnp.asarray(0.0))))
    truth = sigma * (1.2 - alpha * 0.5) / (alpha**2 / 3 + sigma**2)
    np.testing.assert_allclose(found.noise[0, 0], truth, rtol=0.02)


def test_views_pick_each_policys_part_in_its_units(gaussian, generator):
    scaled = ChunkGenerator(
        gaussian(0.2), DDPM(limit=None), observation_scaling=Scaling(jnp.asarray(1.0), jnp.asarray(2.0))
    )
    both = compose([generator(0.2), scaled], [0.5, 0.5], views=["a", lambda seen: seen["b"]])
    plain = compose([generator(0.2), generator(0.2)], [0.5, 0.5])
    key = jax.random.key(0)
    found = both({"a": jnp.asarray(0.4), "b": jnp.asarray(1.6)}, key)
    np.testing.assert_allclose(found, plain((jnp.asarray(0.4), jnp.asarray(0.3)), key), atol=1e-6)
    with pytest.raises(InputError, match="no 'a'"):
        both({"b": jnp.asarray(1.6)}, key)


class Regressor:
    pass


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda a, b, generator: compose([a, b], [1.5, -0.5]), InputError, "weights"),
        (lambda a, b, generator: compose([a, b], [0.5, 0.4]), InputError, "sum to 1"),
        (lambda a, b, generator: compose([a, b], [float("nan"), 1.0]), InputError, "weights"),
        (lambda a, b, generator: compose([a, b], [1.0]), InputError, r"weights\.shape"),
        (lambda a, b, generator: compose([a]), InputError, "at least two"),
        (lambda a, b, generator: compose([a, Regressor()]), InputTypeError, r"policies\[1\] is a Regressor"),
        (lambda a, b, generator: compose([a, generator(shape=(1, 2))]), InputError, "action dimensions"),
        (
            lambda a, b, generator: compose(
                [a, ChunkGenerator(b.denoiser, b.sampler, Scaling(jnp.zeros(()), jnp.asarray(2.0)))]
            ),
            InputError,
            "action_scaling",
        ),
        (
            lambda a, b, generator: compose([a, generator(process=RectifiedFlow(), sampler=FlowSolver(5))]),
            InputError,
            "process is None",
        ),
        (lambda a, b, generator: compose([a, b], op="and", sampler=DDIM()), InputError, "sampler"),
        (lambda a, b, generator: compose([a, b], sampler=Superposition("or")), InputError, "sampler"),
        (lambda a, b, generator: compose([a, b], [0.5, 0.5], op="or"), InputError, "weights"),
        (lambda a, b, generator: compose([a, generator(shape=(2, 1))], op="and"), InputError, "equally many rows"),
        (lambda a, b, generator: compose([a, b], op="xor"), InputError, "Unknown op"),
        (lambda a, b, generator: compose([a, b], views=["x"]), InputError, "views"),
        (lambda a, b, generator: compose([a, b])((jnp.zeros(()),), jax.random.key(0)), InputError, "observation"),
    ],
)
def test_bad_input_is_told(call, error, text, generator):
    with pytest.raises(error, match=text):
        call(generator(), generator(), generator)


def test_generators_come_out_of_policies(generator):
    policy = generator().policy(1, jnp.zeros(()))
    assert generators_of([policy, generator()])[0] is policy.generator
    assert check_weights([0.5, 0.5], 2).shape == (2,)
