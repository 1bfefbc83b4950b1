import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.networks import OctaveTime, SinusoidalTime


def test_sinusoidal_features_by_hand():
    features = np.asarray(SinusoidalTime(6)(jnp.asarray(3.0)))
    angles = 3.0 * np.array([1.0, 1e-2, 1e-4])
    np.testing.assert_allclose(features, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)
    features = np.asarray(SinusoidalTime(4, 100.0, 1.0)(jnp.asarray(0.25)))
    np.testing.assert_allclose(features, [np.sin(25.0), np.sin(0.25), np.cos(25.0), np.cos(0.25)], atol=1e-5)


def test_octaves_by_hand():
    embedding = OctaveTime(3)
    features = np.asarray(embedding(jnp.asarray(0.3)))
    assert embedding.size == 6
    np.testing.assert_allclose(features, np.cos([0.3, 0.6, 1.2]).tolist() + np.sin([0.3, 0.6, 1.2]).tolist(), atol=1e-6)


def test_bad_sizes():
    with pytest.raises(InputError, match="size is 2"):
        SinusoidalTime(2)
    with pytest.raises(InputError, match="size is 5, but it must be even"):
        SinusoidalTime(5)
    with pytest.raises(InputError, match=r"fastest is 0\.1"):
        SinusoidalTime(4, 0.1, 1.0)
    with pytest.raises(InputError, match=r"slowest is 0\.0"):
        SinusoidalTime(4, 1.0, 0.0)
    with pytest.raises(InputError, match="octaves is 0"):
        OctaveTime(0)
    with pytest.raises(InputError, match="octaves is 40"):
        OctaveTime(40)
