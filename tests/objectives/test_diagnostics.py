import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from steersman.errors import InputError
from steersman.objectives import approximate_kl, clip_fraction, explained_variance, ratio_deviation


def test_approximate_kl_is_the_divergence_in_expectation():
    old = np.array([0.5, 0.3, 0.2])
    new = np.array([0.4, 0.4, 0.2])
    log_ratio = np.log(new / old)[[0] * 5 + [1] * 3 + [2] * 2]
    assert approximate_kl(log_ratio) == pytest.approx(old @ np.log(old / new), rel=1e-12)
    mask = np.array([True] * 5 + [False] * 5)
    assert approximate_kl(log_ratio, mask) == pytest.approx(0.8 - 1 - np.log(0.8), rel=1e-12)


def test_ratio_deviation_and_clip_fraction_by_hand():
    log_ratio = np.log(np.array([0.5, 0.9, 1.1, 1.25, 2.0]))
    assert ratio_deviation(log_ratio) == pytest.approx((0.5 + 0.1 + 0.1 + 0.25 + 1.0) / 5)
    assert clip_fraction(log_ratio, 0.2) == pytest.approx(3 / 5)
    assert clip_fraction(log_ratio, 0.2, 0.3) == pytest.approx(2 / 5)
    assert clip_fraction(log_ratio, 0.2, mask=np.array([1, 1, 0, 0, 0])) == pytest.approx(1 / 2)


def test_explained_variance_of_a_linear_fit_is_its_squared_correlation():
    feature, noise = np.random.default_rng(0).normal(size=(2, 30))
    target = 2 * feature + noise + 5
    fit = scipy.stats.linregress(feature, target)
    value = fit.slope * feature + fit.intercept
    assert explained_variance(value, target) == pytest.approx(fit.rvalue**2, rel=1e-12)
    # A constant offset is not held against a critic, and a constant critic explains nothing.
    assert explained_variance(value + 3, target) == pytest.approx(fit.rvalue**2, rel=1e-12)
    assert explained_variance(0 * value, target) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 1.0),
        ([5.0, 5.0], [1.0, 2.0], 0.0),
        ([3.0, 3.0], [1.0, 1.0], 1.0),
        ([1, 2], [0, 0], 0.0),
    ],
)
def test_explained_variance_at_its_corners(value, target, expected):
    assert explained_variance(jnp.asarray(value, float), jnp.asarray(target, float)) == expected


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"^target has shape"):
        explained_variance(np.zeros(3), np.zeros((3, 1)))
    with pytest.raises(InputError, match=r"^mask has shape"):
        approximate_kl(np.zeros(3), np.ones(2))
    with pytest.raises(InputError, match=r"^clip_low is 0.0"):
        clip_fraction(np.zeros(3), 0.0)
