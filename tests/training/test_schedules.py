import jax
import jax.numpy as jnp
import pytest

from steersman.errors import InputError
from steersman.rl.on_policy import PPO
from steersman.rl.surrogates import Clip
from steersman.training import Linear, resolve


def test_linear_goes_from_start_to_end_and_stays():
    schedule = Linear(1.0, 0.2, 100)
    values = [float(schedule(jnp.uint32(n))) for n in (0, 50, 100, 1000)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_resolve_replaces_schedules_wherever_they_are():
    algorithm = PPO(learning_rate=Linear(1e-3, 0.0, 1000), surrogate=Clip(Linear(0.2, 0.1, 1000)))
    now = jax.jit(lambda n: resolve(algorithm, n))(jnp.uint32(500))
    assert float(now.learning_rate) == pytest.approx(5e-4)
    assert float(now.surrogate.epsilon) == pytest.approx(0.15)
    assert float(now.gamma) == pytest.approx(0.99)


def test_a_schedule_of_no_length_is_refused():
    with pytest.raises(InputError, match="steps is 0"):
        Linear(1.0, 0.0, 0)
