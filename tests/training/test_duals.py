import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steersman.errors import InputError
from steersman.training.duals import Dual


def run(dual, gradient_of, learning_rate, steps, minimum=0.0):
    def step(dual, _):
        dual = dual.step(gradient_of(dual.value), learning_rate, minimum)
        return dual, dual.value

    return jax.jit(lambda d: jax.lax.scan(step, d, None, length=steps))(dual)


def test_steps_are_adams():
    gradients = jnp.asarray([0.3, -2.0, 0.01, 5.0, -0.7])
    _, values = jax.lax.scan(lambda d, g: (new := d.step(g, 0.1), new.value), Dual.init(2.0), gradients)
    adam, value, expected = optax.adam(0.1), jnp.asarray(2.0), []
    state = adam.init(value)
    for gradient in gradients:
        update, state = adam.update(gradient, state)
        value = value + np.asarray(update)
        expected.append(float(value))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_a_constrained_minimum_is_found():
    """Minimize x^2 subject to x >= 1: the multiplier settles at 2, where 2 x = multiplier."""
    dual, _ = run(Dual.init(0.0), lambda multiplier: multiplier / 2.0 - 1.0, 0.02, 1000)
    assert float(dual.value) == pytest.approx(2.0, abs=1e-2)


def test_an_inactive_constraint_costs_nothing_and_the_projection_holds():
    dual, values = run(Dual.init(0.5), lambda multiplier: jnp.ones(()), 0.1, 20)
    assert float(dual.value) == 0.0
    assert float(values.min()) >= 0.0
    assert float(run(Dual.init(0.5), lambda multiplier: jnp.ones(()), 0.1, 20, minimum=1e-3)[0].value) == np.float32(
        1e-3
    )


def test_scale_of_the_gradient_does_not_matter_and_members_are_independent():
    starts = jnp.asarray([0.1, 1.0, 5.0])
    scales = jnp.asarray([1e-3, 1.0, 1e3])
    together = Dual.init(starts)
    mapped = jax.vmap(Dual.init)(starts)
    for _ in range(3):
        together = together.step(-scales, 0.1)
        mapped = jax.vmap(lambda d, g: d.step(g, 0.1))(mapped, -scales)
    np.testing.assert_allclose(together.value, starts + 0.3, rtol=1e-4)
    np.testing.assert_allclose(mapped.value, together.value, rtol=1e-6)


def test_precision_is_the_values():
    with jax.enable_x64(True):
        assert Dual.init(1.0).step(jnp.asarray(1.0), 0.1).value.dtype == jnp.float64
        assert Dual.init(jnp.ones((), jnp.float32)).step(jnp.asarray(1.0), 0.1).value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Dual.init(-1.0), "value is -1"),
        (lambda: Dual.init(float("nan")), "value is nan"),
        (lambda: Dual.init(1.0).step(jnp.ones(2), 0.1), r"gradient's shape is \(2,\)"),
        (lambda: Dual.init(1.0).step(jnp.ones(()), -0.1), "learning_rate is -0.1"),
        (lambda: Dual.init(1.0).step(jnp.ones(()), 0.1, -1.0), "minimum is -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
