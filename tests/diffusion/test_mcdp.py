"""Policies of different modalities: composed like single ones where they must be, refused where they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import DDIM, DDPM, ChunkGenerator, DiscreteVP, Mixture, MixtureDenoiser, MLPRecipe, Scaling
from steersman.diffusion.gpc import reweighted
from steersman.diffusion.mcdp import (
    ImageRecipe,
    PointCloudRecipe,
    VectorRecipe,
    WeightSweep,
    check_modalities,
    compose_modalities,
    weight_sweep,
)
from steersman.errors import InputError, InputTypeError

PROCESS = DiscreteVP.squared_cosine(50)


def gaussian(std=0.2, process=PROCESS, shape=(1, 1), sampler=None, scaling=None):
    def mixture(mean):
        size = shape[0] * shape[1]
        return Mixture(jnp.zeros(1), jnp.full((1, size), mean), jnp.full((1, size), std**2))

    denoiser = MixtureDenoiser(mixture, process, shape)
    sampler = DDPM(limit=None) if sampler is None else sampler
    return ChunkGenerator(denoiser, sampler, Scaling.identity() if scaling is None else scaling)


def network(recipe, observation, seed=0, **changes):
    made = MLPRecipe(process=DiscreteVP.squared_cosine(3), hidden=(8,), encoder=recipe, **changes)
    return ChunkGenerator(made.make(observation, (2, 2), jax.random.key(seed)), DDPM())


CLOUD = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
IMAGE = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 4)), jnp.float32)
POLICIES = {
    "image": network(VectorRecipe(hidden=(4,), output_size=3), IMAGE),
    "point_cloud": network(PointCloudRecipe(widths=(4,), output_size=3), CLOUD, 1),
}
BOTH = compose_modalities(POLICIES)
SEEN = {"image": IMAGE, "point_cloud": CLOUD}


def test_full_weight_is_the_single_policy():
    key = jax.random.key(2)

    @jax.jit
    def run(key):
        alone = [POLICIES[name](SEEN[name], key) for name in POLICIES]
        return alone, [reweighted(BOTH, row)(SEEN, key) for row in ([1.0, 0.0], [0.0, 1.0])]

    alone, composed = run(key)
    np.testing.assert_allclose(composed, alone, atol=1e-5)
    conditions, x, level = BOTH.encode(SEEN), jnp.full((2, 2), 0.3), jnp.asarray(1)
    for row, name, condition in zip(([1.0, 0.0], [0.0, 1.0]), POLICIES, conditions, strict=True):
        found = reweighted(BOTH, row).denoiser.predict(x, level, conditions)
        np.testing.assert_array_equal(found.noise, POLICIES[name].denoiser.predict(x, level, condition).noise)


def test_order_of_points_and_of_modalities_does_not_matter():
    key = jax.random.key(2)
    swapped = compose_modalities(dict(reversed(POLICIES.items())), {"point_cloud": 0.5, "image": 0.5})
    run = jax.jit(lambda seen: (BOTH(seen, key), swapped(seen, key)))
    found = run(SEEN)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(run(SEEN | {"point_cloud": CLOUD[::-1]})[0], found[0], atol=1e-6)


def test_equal_gaussians_compose_to_the_gaussian_between():
    """Fifty cosine steps of deviation 0.2 end at 0.17491; the mean is that of the weights."""
    both = compose_modalities({"a": gaussian(), "b": gaussian()}, {"a": 0.3, "b": 0.7})
    single = gaussian()
    keys = jax.random.split(jax.random.key(0), 20_000)

    @jax.jit
    def run(keys):
        seen = {"a": jnp.asarray(1.0), "b": jnp.asarray(-1.0)}
        return jax.vmap(lambda key: (both(seen, key), single(jnp.asarray(-0.4), key)))(keys)

    composed, alone = run(keys)
    np.testing.assert_allclose(composed, alone, atol=2e-5)
    np.testing.assert_allclose(composed.std(), 0.17491, rtol=0.02)


def test_composing_tempers_and_does_not_fuse():
    """Near the data the precision is the average of the two posteriors', not that of the joint posterior."""
    prior, stds, readings, clean = 0.4, (0.1, 0.3), (0.2, -0.1), jnp.asarray(0)
    precision = [1 / prior**2 + 1 / std**2 for std in stds]

    def posterior(i):
        mixture = lambda o: Mixture(  # noqa: E731
            jnp.zeros(1), jnp.full((1, 1), o / stds[i] ** 2 / precision[i]), jnp.full((1, 1), 1 / precision[i])
        )
        # Noise so small that the noised density is the density.
        process = DiscreteVP.from_betas([1e-6, 0.5])
        return ChunkGenerator(MixtureDenoiser(mixture, process, (1, 1)), DDPM(limit=None))

    with jax.enable_x64(True):
        both = compose_modalities({"a": posterior(0), "b": posterior(1)})
        conditions = both.encode({"a": jnp.asarray(readings[0]), "b": jnp.asarray(readings[1])})
        sigma = both.denoiser.process.coefficients(clean)[1]

        def score(x):
            return -both.denoiser.predict(jnp.full((1, 1), x), clean, conditions).noise[0, 0] / sigma

        slope = -float(jax.grad(score)(0.0))
        middle = float(score(0.0)) / slope
    np.testing.assert_allclose(slope, np.mean(precision), rtol=1e-3)
    weighted = sum(o / std**2 for o, std in zip(readings, stds, strict=True)) / sum(precision)
    np.testing.assert_allclose(middle, weighted, rtol=1e-3)
    assert slope < 0.7 * (1 / prior**2 + sum(1 / std**2 for std in stds))


def test_every_weight_keeps_both_modes():
    def modes(mean):
        return Mixture(jnp.zeros(2), jnp.stack([mean + 1.0, mean - 1.0])[:, None], jnp.full((2, 1), 0.01))

    policies = {name: ChunkGenerator(MixtureDenoiser(modes, PROCESS, (1, 1)), DDPM(limit=None)) for name in "ab"}
    both = compose_modalities(policies)
    seen = {"a": jnp.asarray(0.05), "b": jnp.asarray(-0.05)}
    sweep = weight_sweep(lambda w, key: reweighted(both, w)(seen, key)[0, 0] > 0.0, range(4_000), parts=4)
    np.testing.assert_allclose(sweep.mean, 0.5, atol=0.03)


def test_sweep_reads_its_curve():
    def sweep(*means):
        return WeightSweep(np.linspace(0, 1, len(means)), np.asarray(means)[:, None])

    assert sweep(0.3, 0.5, 0.7, 0.4, 0.2).gain == pytest.approx(0.4)
    assert sweep(0.3, 0.2, 0.1).gain == pytest.approx(-0.1)
    assert sweep(0.3, 0.5, 0.7, 0.4, 0.2).favours_better
    assert not sweep(0.2, 0.7, 0.5, 0.4, 0.3).favours_better
    assert sweep(0.3, 0.5, 0.7, 0.4, 0.2).largest_dip == 0.0
    assert sweep(0.3, 0.6, 0.4, 0.7, 0.2).largest_dip == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [(PointCloudRecipe(widths=(4,), output_size=3), (5, 3)), (ImageRecipe((4,), 3), (1, 8, 8)), (VectorRecipe(), (6,))],
    ids=["cloud", "image", "vector"],
)
def test_encoders_take_frames_and_windows(recipe, shape):
    """A window's vector is its frames' vectors, one after the other."""
    rng = np.random.default_rng(0)
    window = jnp.asarray(rng.uniform(size=(2, *shape)), jnp.float32)
    encoder = recipe.make(window, jax.random.key(0))
    single = recipe.make(window[0], jax.random.key(0))
    np.testing.assert_allclose(encoder(window), jnp.concatenate([single(frame) for frame in window]), atol=1e-5)
    with pytest.raises(InputError, match=r"observation\.shape"):
        recipe.make(jnp.zeros((1, 1, *shape)), jax.random.key(0))


SHORT = {"a": gaussian(), "b": gaussian()}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(process=DiscreteVP.squared_cosine(40))}), InputError,
         "another noise process"),
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(process=DiscreteVP.linear(50))}), InputError,
         "another noise process"),
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(shape=(2, 1))}), InputError, "chunk_shape"),
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(shape=(1, 2))}), InputError, "action dimensions"),
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(sampler=DDPM(limit=1.0))}), InputError, "limit"),
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(sampler=DDIM(limit=None))}), InputError, "a DDPM"),
        (lambda: check_modalities({"a": gaussian(), "b": gaussian(sampler=DDPM(steps=5, limit=None))}), InputError,
         r"sampler\.steps"),
        (lambda: check_modalities(
            {"image": POLICIES["image"], "b": network(VectorRecipe(), IMAGE, prediction="sample")}), InputError,
         r"denoiser\.prediction"),
        (lambda: check_modalities(
            {"a": gaussian(), "b": gaussian(scaling=Scaling(jnp.asarray(1e-3), jnp.ones(())))}), InputError,
         "action_scaling"),
        (lambda: check_modalities({"a": gaussian(), "b": lambda seen, key: seen}), InputTypeError, r"policies\[1\]"),
        (lambda: compose_modalities(SHORT, {"a": 1.5, "b": -0.5}), InputError, "weights"),
        (lambda: compose_modalities(SHORT, {"a": 0.5, "b": 0.4}), InputError, "sum to 1"),
        (lambda: compose_modalities(SHORT, {"a": 0.5, "c": 0.5}), InputError, "weights"),
        (lambda: BOTH({"image": IMAGE}, jax.random.key(0)), InputError, "no 'point_cloud'"),
        (lambda: BOTH(SEEN | {"point_cloud": CLOUD.at[0, 0].set(jnp.nan)}, jax.random.key(0)), InputError, "NaN"),
        (lambda: BOTH(SEEN | {"point_cloud": CLOUD[:0]}, jax.random.key(0)), InputError, "at least one point"),
        (lambda: BOTH(SEEN | {"point_cloud": CLOUD[:, :2]}, jax.random.key(0)), InputError, r"points\.shape"),
        (lambda: BOTH(SEEN | {"image": IMAGE[:1]}, jax.random.key(0)), InputError, r"condition\.shape"),
        (lambda: weight_sweep(lambda w, key: 0.0, [0], parts=1), InputError, "parts"),
    ],
)  # fmt: skip
def test_bad_input_is_told(call, error, text):
    with pytest.raises(error, match=text):
        call()
