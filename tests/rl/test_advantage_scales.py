"""Scales of a batch's advantages against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.rl.advantage_scales import AdvantageMoments, ClippedAdvantages


def test_clipped_advantages_stay_within_quantiles_of_the_standardized_batch():
    advantage = np.random.default_rng(0).standard_cauchy(size=(20, 5)).astype(np.float32)
    scale = ClippedAdvantages(0.1, 0.8)
    found, _ = scale(scale.init(), jnp.asarray(advantage))
    standard = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    want = np.clip(standard, *np.quantile(standard, [0.1, 0.8]))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    plain, _ = AdvantageMoments()(AdvantageMoments().init(), jnp.asarray(advantage))
    whole = ClippedAdvantages(0.0, 1.0)
    np.testing.assert_allclose(whole(whole.init(), jnp.asarray(advantage))[0], plain, rtol=1e-6)


def test_bad_input():
    with pytest.raises(InputError, match="low is -0"):
        ClippedAdvantages(-0.1)
    with pytest.raises(InputError, match=r"high is 1\.5"):
        ClippedAdvantages(0.1, 1.5)
    with pytest.raises(InputError, match=r"low is 0\.5, but it must be below high"):
        ClippedAdvantages(0.5, 0.5)
    with pytest.raises(Exception, match="scale"):
        ClippedAdvantages(scale=3)
