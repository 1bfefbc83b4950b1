import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError
from steersman.training.step_sizes import Polyak, polyak_sps, polyak_step_size, scale_by_polyak_sps


@pytest.mark.parametrize(("c", "factor"), [(1.0, 0.5), (0.5, 0.0), (2.0, 0.75)])
@pytest.mark.parametrize("a", [1e-3, 1.0, 250.0])
def test_quadratic_shrinks_by_a_factor_that_its_curvature_does_not_enter(a, c, factor):
    """``a x^2 / 2`` with minimum 0: ``x`` becomes ``(1 - 1 / (2 c)) x`` (oracle 1)."""
    x, rule = jnp.asarray(3.0), polyak_sps(c)
    change, state = rule.update(a * x, rule.init(x), x, value=0.5 * a * x**2, target=0.0)
    assert float(x + change) == pytest.approx(factor * 3.0, abs=1e-5)
    assert float(state[0].step_size) == pytest.approx(1.0 / (2 * a * c), rel=1e-5)


def test_agrees_with_optax_where_both_are_defined():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    gradient = {"a": jnp.array([0.3, 0.1]), "b": jnp.array(-2.0)}
    for cap in (0.05, 10.0):
        theirs = optax.polyak_sgd(max_learning_rate=cap, f_min=0.25)
        ours = polyak_sps(1.0, cap)
        expected, _ = theirs.update(gradient, theirs.init(params), params, value=jnp.asarray(0.7))
        found, _ = ours.update(gradient, ours.init(params), params, value=0.7, target=0.25)
        jax.tree.map(lambda e, f: np.testing.assert_allclose(e, f, rtol=1e-6), expected, found)


@settings(max_examples=30, deadline=None)
@given(st.floats(-5, 5), st.floats(0, 5), st.floats(0.5, 3), st.floats(0.01, 100))
def test_bounds(gap, squared, c, cap):
    """Never negative, never above the cap, zero without a gap, the cap where the gradient vanishes (oracle 6)."""
    step = float(polyak_step_size(jnp.asarray(gap), jnp.asarray(squared), c, cap))
    assert 0.0 <= step <= np.float32(cap)
    if gap <= 0:
        assert step == 0.0
    elif np.float32(squared) == 0 and np.float32(gap) > 0:
        assert step == np.float32(cap)


def test_scaling_the_objective_changes_no_step():
    """Gap times k and squared norm times k^2 (oracle 2)."""
    gradient, rule = jnp.array([0.3, -0.4]), polyak_sps(1.5)
    one, _ = rule.update(gradient, rule.init(gradient), value=2.0, target=0.5)
    for k in (1e-3, 1e3):
        other, _ = rule.update(k * gradient, rule.init(gradient), value=2.0 * k, target=0.5 * k)
        np.testing.assert_allclose(other, one, rtol=1e-5)


def test_nothing_is_not_multiplied_by_infinity():
    rule = scale_by_polyak_sps()
    step, state = rule.update(jnp.zeros(3), rule.init(jnp.zeros(3)), value=1.0)
    np.testing.assert_array_equal(step, 0.0)
    assert np.isinf(state.step_size)
    step, _ = rule.update(jnp.ones(3), rule.init(jnp.zeros(3)), value=jnp.nan)
    assert np.isnan(step).all()


def test_runs_in_a_chain_under_jit():
    rule = optax.chain(optax.add_decayed_weights(0.1), polyak_sps(1.0, 5.0))

    @jax.jit
    def descend(x, target):
        def step(carry, _):
            x, state = carry
            value, gradient = jax.value_and_grad(lambda x: jnp.sum((x - 1.0) ** 2) + 2.0)(x)
            change, state = rule.update(gradient, state, x, value=value, target=target)
            return (x + change, state), value

        return jax.lax.scan(step, (x, rule.init(x)), None, length=40)[1]

    assert float(descend(jnp.array([3.0, -2.0]), 2.0)[-1]) == pytest.approx(2.0, abs=0.1)


def test_slot_goes_downhill_to_a_known_return():
    """The optimizer slot gets losses and subtracts: a return of -3 and an optimum of 5 are a gap of 8."""
    rule = Polyak(target=5.0, c=2.0, cap=100.0).transformation()
    step, state = rule.update(jnp.array([2.0]), rule.init(jnp.array([0.0])), value=jnp.asarray(3.0))
    np.testing.assert_allclose(step, 8.0 / (2.0 * 4.0) * 2.0)
    assert float(state.gap) == 8.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": 0.0}, "c is 0.0"),
        ({"c": -1.0}, "c is -1.0"),
        ({"cap": 0.0}, "cap is 0.0"),
        ({"cap": float("nan")}, "cap is nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        polyak_sps(**arguments)
    with pytest.raises(InputError, match=message):
        Polyak(target=1.0, **arguments)


def test_a_target_that_is_no_number():
    with pytest.raises(InputError, match="target is inf"):
        Polyak(target=float("inf"))
