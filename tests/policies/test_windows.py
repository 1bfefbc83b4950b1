"""Windows of observations, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.policies import Window


def test_windows():
    window = Window(jnp.zeros(1), 2, 1)
    seen = window.push(window.init(), jnp.asarray([1.0]))
    np.testing.assert_array_equal(window.past(seen), [[1.0], [1.0]])
    for value in (2.0, 3.0):
        seen = window.push(seen, jnp.asarray([value]))
    np.testing.assert_array_equal(window.now(seen), [[2.0], [3.0]])
    np.testing.assert_array_equal(window.past(seen), [[1.0], [2.0]])
    plain = Window(jnp.zeros(1), None)
    np.testing.assert_array_equal(plain.now(plain.push(plain.init(), jnp.asarray([4.0]))), [4.0])


def test_bad_input():
    with pytest.raises(InputError, match="lookback is -1"):
        Window(jnp.zeros(1), None, -1)
    window = Window(jnp.zeros(1), 2)
    with pytest.raises(InputError, match="observation's shape is"):
        window.push(window.init(), jnp.zeros(2))
    with pytest.raises(InputError, match=r"observation is \[nan\]"):
        window.push(window.init(), jnp.full(1, jnp.nan))
