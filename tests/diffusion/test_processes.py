import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion import (
    EDM,
    PREDICTIONS,
    ContinuousVP,
    DiscreteVP,
    Matched,
    Mixture,
    MixtureDenoiser,
    RectifiedFlow,
    read_prediction,
    write_prediction,
)
from steersman.errors import InputError, InputTypeError

CONTINUOUS = {"flow": RectifiedFlow(), "vp": ContinuousVP(), "edm": EDM()}


def test_squared_cosine_schedule_by_its_definition():
    levels = 50
    f = [np.cos((k / levels + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(levels + 1)]
    product, expected = 1.0, []
    for k in range(levels):
        product *= 1.0 - min(1.0 - f[k + 1] / f[k], 0.999)
        expected.append(product)
    process = DiscreteVP.squared_cosine(levels)
    alpha, sigma = process.coefficients(jnp.arange(levels))
    np.testing.assert_allclose(alpha**2, expected, rtol=2e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    assert process.coefficients(jnp.asarray(-1)) == (1.0, 0.0)


def test_a_shifted_flow_visits_levels_with_another_ratio_of_noise_to_signal():
    """sigma / alpha is `shift` times what it is at even levels, in the grid and in what is drawn; the line stays."""
    even, shifted = RectifiedFlow(), RectifiedFlow(shift=0.5)
    key = jax.random.key(0)
    for a, b in (
        (even.grid(8).current[1:], shifted.grid(8).current[1:]),
        (even.sample_level(key, (64,)), shifted.sample_level(key, (64,))),
    ):
        np.testing.assert_allclose(b / (1 - b), 0.5 * a / (1 - a), rtol=1e-4)
    assert (float(shifted.grid(8).current[0]), float(shifted.grid(8).following[-1])) == (1.0, 0.0)
    np.testing.assert_array_equal(shifted.coefficients(jnp.asarray(0.3)), even.coefficients(jnp.asarray(0.3)))
    with pytest.raises(InputError, match="shift is 0"):
        RectifiedFlow(shift=0.0)


def test_grids_end_in_clean_data_and_have_the_known_places():
    process = DiscreteVP.squared_cosine(100)
    leading = process.grid(10)
    np.testing.assert_array_equal(leading.current, np.arange(90, -1, -10))
    np.testing.assert_array_equal(leading.following, [*range(80, -1, -10), -1])
    trailing = DiscreteVP.squared_cosine(100, spacing="trailing").grid(4)
    np.testing.assert_array_equal(trailing.current, [99, 74, 49, 24])
    spaced = DiscreteVP.squared_cosine(100, spacing="linspace").grid(3)
    np.testing.assert_array_equal(spaced.current, [99, 50, 0])
    single = process.single_steps([5, 3, 1, 0])
    np.testing.assert_array_equal(single.following, [4, 2, 0, -1])
    edm = EDM().grid(18)
    np.testing.assert_allclose([edm.current[0], edm.current[-1], edm.following[-1]], [80.0, 0.002, 0.0], rtol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_levels_are_found_again_by_their_ratio(name):
    process = CONTINUOUS[name]
    levels = jnp.linspace(0.02, 0.95, 13)
    alpha, sigma = process.coefficients(levels)
    np.testing.assert_allclose(process.match(sigma / alpha), levels, rtol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_rates_agree_with_finite_differences(name):
    process, level, h = CONTINUOUS[name], 0.4, 1e-3
    rates = process.rates(jnp.asarray(level))
    above = process.coefficients(jnp.asarray(level + h))
    below = process.coefficients(jnp.asarray(level - h))
    for rate, a, b in zip(rates, above, below, strict=True):
        np.testing.assert_allclose(rate, (a - b) / (2 * h), atol=2e-3)


def test_discrete_levels_are_found_exactly_and_between():
    process = DiscreteVP.squared_cosine(50)
    levels = jnp.arange(50)
    alpha, sigma = process.coefficients(levels)
    np.testing.assert_array_equal(process.match(sigma / alpha), levels)
    np.testing.assert_allclose(process.match_between(sigma / alpha)[:-1], levels[:-1], atol=2e-2)
    between = process.coefficients(jnp.asarray(20.5))
    assert alpha[21] < between[0] < alpha[20]


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(PREDICTIONS),
    alpha=st.floats(0.05, 1.0),
    sigma=st.floats(0.05, 3.0),
    clean=st.floats(-2.0, 2.0),
    noise=st.floats(-2.0, 2.0),
)
def test_every_prediction_leads_back_to_noise_and_sample(kind, alpha, sigma, clean, noise):
    clean, noise, alpha, sigma = (jnp.asarray(number, jnp.float32) for number in (clean, noise, alpha, sigma))
    value = write_prediction(kind, clean, noise, alpha, sigma)
    found = read_prediction(kind, value, alpha * clean + sigma * noise, alpha, sigma)
    np.testing.assert_allclose([found.noise, found.sample], [noise, clean], atol=1e-3)


def _scalar_policy(process):
    mixture = Mixture(jnp.zeros(1), jnp.full((1, 2), 0.3), jnp.full((1, 2), 0.04))
    return MixtureDenoiser(lambda _: mixture, process, (1, 2))


def test_matched_ratios_give_the_same_noise():
    """A flow asked on the levels of a discrete process says what that process's own expectation says."""
    discrete = DiscreteVP.squared_cosine(50)
    own = _scalar_policy(discrete)
    converted = Matched(_scalar_policy(RectifiedFlow()), discrete)
    keys = jax.random.split(jax.random.key(0), 20)

    def both(key):
        x = jax.random.normal(key, (1, 2))
        level = jax.random.randint(key, (), 0, 49)
        return own.predict(x, level, own.encode(())), converted.predict(x, level, converted.encode(()))

    a, b = jax.jit(jax.vmap(both))(keys)
    np.testing.assert_allclose(a.noise, b.noise, atol=2e-5)


def test_nearest_and_interpolated_levels_of_a_discrete_parent():
    flow = RectifiedFlow()
    exact, x = _scalar_policy(flow), jnp.asarray([[0.4, -0.2]])
    parent = _scalar_policy(DiscreteVP.squared_cosine(50))
    truth = exact.predict(x, jnp.asarray(0.437), exact.encode(()))
    nearest = Matched(parent, flow).predict(x, jnp.asarray(0.437), parent.encode(()))
    between = Matched(parent, flow, between=True).predict(x, jnp.asarray(0.437), parent.encode(()))
    np.testing.assert_allclose(nearest.noise, truth.noise, atol=0.05)
    np.testing.assert_allclose(between.noise, truth.noise, atol=1e-5)
    # At pure noise nothing is known of the sample but what the policy says.
    pure = Matched(parent, flow).predict(x, jnp.asarray(1.0), parent.encode(()))
    assert bool(jnp.all(jnp.isfinite(pure.sample)))


def test_bad_input_is_told():
    with pytest.raises(InputError, match="steps is 101, but the schedule has only 100"):
        DiscreteVP.squared_cosine(100).grid(101)
    with pytest.raises(InputError, match="betas"):
        DiscreteVP.from_betas([0.1, 1.0])
    with pytest.raises(InputError, match="spacing"):
        DiscreteVP.squared_cosine(10, spacing="leeding")
    for labels in ([3, 3, 0], [3, 1], [10, 0], [2.5, 0.0], []):
        with pytest.raises(InputError, match="labels"):
            DiscreteVP.squared_cosine(10).single_steps(labels)
    with pytest.raises(InputError, match="prediction"):
        read_prediction("nois", jnp.ones(1), jnp.ones(1), jnp.ones(1), jnp.ones(1))
    with pytest.raises(InputTypeError, match="between"):
        Matched(_scalar_policy(RectifiedFlow()), DiscreteVP.squared_cosine(10), between=True)
    with pytest.raises(InputError, match="largest"):
        EDM(smallest=1.0, largest=0.5)
