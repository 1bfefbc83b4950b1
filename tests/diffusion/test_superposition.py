"""AND and OR: tracked log-densities against the exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import (
    DDPM,
    DiscreteVP,
    Mixture,
    RectifiedFlow,
    sample,
)
from steersman.diffusion.gpc import compose
from steersman.diffusion.superposition import Superposition
from steersman.errors import InputError, InputTypeError

PROCESS = DiscreteVP.squared_cosine(50)


@pytest.mark.parametrize("count", [2, 3])
def test_and_keeps_all_log_densities_equal(count, generator):
    """Of three, the differences of scores are nearly collinear at first, which the ridge then leaves to later steps."""
    with jax.enable_x64(True):
        process = DiscreteVP.squared_cosine(20)
        parents = [generator(0.2 + 0.1 * i, process=process, shape=(2, 2)) for i in range(count)]
        means = tuple(jnp.asarray(mean) for mean in np.random.default_rng(0).normal(size=(count, 4)))
        chain = compose(parents, op="and").chain(means, jax.random.key(0))
        assert chain.chunk.dtype == jnp.float64
        assert float(chain.memory.largest_gap) < (1e-6 if count == 2 else 1e-4)
        assert float(jnp.ptp(chain.memory.log_density)) < 1e-8
        np.testing.assert_allclose(chain.memory.share.sum(), 1.0, rtol=1e-9)


def test_trackers_follow_the_log_density(generator):
    """With enough steps l is the change of the noised log-density along the chain (Ito's lemma).

    The error of one path goes with the root of the step, but is nearly the same for both.
    """
    process = DiscreteVP.linear(1000, 1e-4, 0.02)
    parents = [generator(0.4, process=process), generator(0.7, process=process)]
    chain = jax.jit(lambda key: compose(parents, op="or").chain((0.5, -0.5), key))(jax.random.key(4))
    gained = []
    for mean, std in ((0.5, 0.4), (-0.5, 0.7)):
        alpha, sigma = process.coefficients(jnp.asarray(999))
        mixture = Mixture(jnp.zeros(1), jnp.full((1, 1), mean), jnp.full((1, 1), std**2))
        began = mixture.log_density(chain.states[0].ravel(), alpha, sigma)
        gained.append(float(mixture.log_density(chain.chunk.ravel()) - began))
    np.testing.assert_allclose(chain.memory.log_density, gained, atol=0.5)
    np.testing.assert_allclose(jnp.diff(chain.memory.log_density)[0], gained[1] - gained[0], atol=0.1)


def test_identical_parents_superpose_to_the_parent(generator):
    key, seen = jax.random.key(1), (jnp.asarray(0.4), jnp.asarray(0.4))
    parents = [generator(), generator()]
    chains = [compose(parents, op=op).chain(seen, key) for op in ("and", "or")]
    np.testing.assert_allclose(chains[0].chunk, chains[1].chunk, atol=1e-5)
    np.testing.assert_allclose(chains[1].memory.share, [0.5, 0.5], rtol=1e-5)
    tilted = compose(parents, op="or", sampler=Superposition("or", 2, bias=jnp.asarray([2.0, 0.0])))
    np.testing.assert_allclose(tilted.chain(seen, key).chunk, chains[1].chunk, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda a, b: Superposition("not"), InputError, "Unknown op"),
        (lambda a, b: Superposition("and", 1), InputError, "count"),
        (
            lambda a, b: sample(a.denoiser, Superposition("and"), a.encode(jnp.zeros(())), jax.random.key(0)),
            InputTypeError,
            "Superposition needs",
        ),
    ],
)
def test_bad_input_is_told(call, error, text, generator):
    with pytest.raises(error, match=text):
        call(generator(), generator())


@pytest.mark.parametrize("process", [DiscreteVP.squared_cosine(100), RectifiedFlow()], ids=["vp", "flow"])
def test_either_of_two_equal_policies_is_that_policy_on_any_process(process, generator):
    """Euler-Maruyama ends at N(0.4, 0.3^2), up to its step."""
    parents = [generator(0.3, DDPM(steps=100), process) for _ in range(2)]
    either = compose(parents, op="or", sampler=Superposition("or", 2, steps=100))
    seen = (jnp.asarray(0.4), jnp.asarray(0.4))
    chunks = jax.jit(jax.vmap(lambda key: either(seen, key)))(jax.random.split(jax.random.key(0), 4_000))
    np.testing.assert_allclose(chunks.mean(), 0.4, atol=0.03)
    np.testing.assert_allclose(chunks.std(), 0.3, rtol=0.1)


def test_a_limit_bounds_the_combined_sample(generator):
    """The last step of Euler-Maruyama is alpha a + b x / 2 with b = sigma^2."""
    both = compose([generator(0.3), generator(0.3)], op="and", sampler=Superposition("and", 2, limit=0.2))
    chain = both.chain((jnp.asarray(1.0), jnp.asarray(0.8)), jax.random.key(0))
    alpha, sigma = PROCESS.coefficients(jnp.asarray(0))
    np.testing.assert_allclose(chain.chunk, alpha * 0.2 + 0.5 * sigma**2 * chain.states[-2], rtol=1e-4)
