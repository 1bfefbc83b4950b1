from functools import partial

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError
from steersman.policies import Categorical, DiagonalGaussian, Preprocess, make_policy
from steersman.policies.preprocessing import Features
from steersman.training.natural_gradient import (
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    natural_step,
)


@pytest.fixture
def _double_precision():
    with jax.enable_x64(True):
        yield


double_precision = pytest.mark.usefixtures("_double_precision")


# The two-state model: a d-weighted softmax table.
LOGITS = np.array([[0.5, 0.0], [0.0, 0.5]])
ADVANTAGE = np.array([[0.172403, -0.284245], [-1.534817, 0.930913]])
OCCUPANCY = np.array([0.47646, 0.52354])


@double_precision
def test_two_state_model_has_the_printed_step():
    head, logits, d = Categorical(2), jnp.asarray(LOGITS), jnp.asarray(OCCUPANCY)

    def surrogate(candidate):
        return jnp.sum(d * jnp.sum(jax.nn.softmax(candidate, axis=-1) * ADVANTAGE, axis=-1))

    def divergence(candidate):
        return head.kl(logits, candidate)

    def evaluate(candidate):
        mean = jnp.sum(d * divergence(candidate))
        return (mean <= 0.01) & (surrogate(candidate) > surrogate(logits)), mean

    @jax.jit
    def update(logits):
        fisher = fisher_vector_product(lambda table: table, logits, head, weight=d)
        natural = natural_step(jax.grad(surrogate)(logits), fisher, 0.01, tolerance=1e-20)
        found = backtracking_line_search(evaluate, logits, natural.step)
        return natural, found, jnp.max(divergence(found.params))

    natural, found, max_divergence = update(logits)
    assert bool(natural.valid)
    # The direction is the advantage, centred in each state.
    np.testing.assert_allclose(natural.direction, [[0.228324, -0.228324], [-1.232865, 1.232865]], atol=2e-6)
    np.testing.assert_allclose(natural.quadratic_form, 0.771373, atol=2e-5)
    np.testing.assert_allclose(natural.scale, 0.161021, atol=2e-6)
    # With F x = g the promised gain is beta x.F x = sqrt(2 delta x.F x).
    np.testing.assert_allclose(natural.expected_improvement, np.sqrt(0.02 * 0.771373), rtol=1e-4)
    assert (bool(found.accepted), int(found.trials), float(found.scale)) == (True, 1, 1.0)
    np.testing.assert_allclose(found.info, 0.009636, atol=1e-6)
    np.testing.assert_allclose(max_divergence, 0.017832, atol=1e-6)


def tiny_network(key, outputs, dtype):
    keys = jax.random.split(key, 3)
    return {
        "in": 0.7 * jax.random.normal(keys[0], (3, 3), dtype),
        "out": 0.7 * jax.random.normal(keys[1], (3, outputs), dtype),
        "free": 0.3 * jax.random.normal(keys[2], (2,), dtype),
    }


def categorical_case(features):
    head = Categorical(3)
    return head, 3, lambda p: jnp.tanh(features @ p["in"]) @ p["out"]


def gaussian_case(features):
    head = DiagonalGaussian((2,))
    return head, 2, lambda p: head.from_output(jnp.tanh(features @ p["in"]) @ p["out"], p["free"])


def state_dependent_case(features):
    head = DiagonalGaussian((2,), state_dependent_std=True)
    return head, 4, lambda p: head.from_output(jnp.tanh(features @ p["in"]) @ p["out"], p["free"])


CASES = [categorical_case, gaussian_case, state_dependent_case]


def dense(product, params):
    """The matrix of a product on trees, column by column."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    columns = jax.vmap(lambda e: jax.flatten_util.ravel_pytree(product(unravel(e)))[0])(jnp.eye(flat.size))
    return np.asarray(columns).T


@double_precision
@pytest.mark.parametrize("case", CASES)
def test_product_is_the_hessian_of_the_mean_divergence(case):
    features = jax.random.normal(jax.random.key(0), (7, 3))
    head, outputs, network = case(features)
    params = tiny_network(jax.random.key(1), outputs, float)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    weight = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5, 3.0, 1.0])
    n, h = flat.size, 1e-4

    def divergences(vector):
        return head.kl(network(params), network(unravel(vector)))

    steps = h * jnp.eye(n)

    @jax.jit
    def differences():
        """Second central differences of the divergence at each state, ``[n, n, B]``."""

        def corner(sign_a, sign_b):
            return jax.vmap(lambda a: jax.vmap(lambda b: divergences(flat + sign_a * a + sign_b * b))(steps))(steps)

        return (corner(1, 1) - corner(1, -1) - corner(-1, 1) + corner(-1, -1)) / (4 * h * h)

    by_state = np.asarray(differences())
    plain = dense(fisher_vector_product(network, params, head), params)
    expected = by_state.mean(axis=-1)
    assert np.linalg.norm(plain - expected) < 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose(plain, plain.T, atol=1e-12)
    assert np.linalg.eigvalsh(plain).min() > -1e-12
    weighted = dense(fisher_vector_product(network, params, head, damping=0.1, weight=weight), params)
    expected = by_state @ np.asarray(weight / weight.sum()) + 0.1 * np.eye(n)
    assert np.linalg.norm(weighted - expected) < 1e-4 * np.linalg.norm(expected)


def test_product_of_a_network_policy_is_the_directional_derivative_of_the_divergence():
    # As TRPO uses it: single precision, a policy split into learned arrays and the rest, batch axes [T, N].
    head = DiagonalGaussian((2,))
    space = spaces.Box(-1.0, 1.0, (5,), np.float32)
    policy = make_policy(Preprocess(layout(space)), head, hidden=(8,), initial_log_std=-0.5, key=jax.random.key(0))
    params, rest = eqx.partition(policy, eqx.is_inexact_array)
    features = jax.random.normal(jax.random.key(1), (4, 3, 5))

    def network(p):
        return eqx.combine(p, rest).from_features(Features(features), ())[0]

    @jax.jit
    def both(p, key):
        vector = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), p)
        old = network(p)
        slope = jax.grad(lambda q: jnp.mean(head.kl(old, network(q))))
        return fisher_vector_product(network, p, head)(vector), jax.jvp(slope, (p,), (vector,))[1]

    product, expected = both(params, jax.random.key(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), product, expected)


@settings(max_examples=12, deadline=None)
@given(d=st.sampled_from([1, 20]), seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_conjugate_gradient_is_exact_after_as_many_steps_as_there_are_unknowns(d, seed, scale):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(d, d))
        # Eigenvalues between 0.5 and about 5: rounding does not break the conjugacy of the directions.
        matrix = scale * (root @ root.T / d + 0.5 * np.eye(d))
        b = rng.normal(size=d)
        found = solve(jnp.asarray(matrix), jnp.asarray(b), d)
        exact = np.linalg.solve(matrix, b)
        assert np.linalg.norm(found.x - exact) <= 1e-6 * np.linalg.norm(exact)
        assert int(found.iterations) <= d
        left = b - matrix @ np.asarray(found.x)
        assert float(found.squared_residual) == pytest.approx(left @ left, abs=1e-12)


@partial(jax.jit, static_argnums=2)
def solve(matrix, b, iterations):
    return conjugate_gradient(lambda v: matrix @ v, b, iterations=iterations, tolerance=1e-20)


@double_precision
def test_conjugate_gradient_takes_the_iterates_of_jax_and_stops_where_told():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(20, 20))
    matrix, b = jnp.asarray(root @ root.T + np.eye(20)), jnp.asarray(rng.normal(size=20))

    @jax.jit
    def both(tolerance):
        ours = conjugate_gradient(lambda v: matrix @ v, b, iterations=20, tolerance=tolerance)
        return ours, jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, b, tol=0.0, atol=tolerance**0.5, maxiter=20)[0]

    for tolerance in (1e-1, 1e-3, 1e-4):
        ours, theirs = both(tolerance)
        np.testing.assert_allclose(ours.x, theirs, rtol=1e-8)
        assert float(ours.squared_residual) < tolerance
        assert int(ours.iterations) < 20
    before = conjugate_gradient(lambda v: matrix @ v, b, iterations=int(ours.iterations) - 1, tolerance=0.0)
    assert float(before.squared_residual) >= tolerance


@double_precision
def test_conjugate_gradient_on_trees_and_without_work():
    diagonal = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array([[4.0]])]}
    b = {"a": jnp.array([1.0, 1.0]), "b": [jnp.array([[1.0]])]}
    found = conjugate_gradient(lambda v: jax.tree.map(jnp.multiply, diagonal, v), b)
    jax.tree.map(lambda x, d: np.testing.assert_allclose(x, 1 / d), found.x, diagonal)
    assert int(found.iterations) == 3
    nothing = conjugate_gradient(lambda v: 2.0 * v, jnp.zeros(3))
    np.testing.assert_array_equal(nothing.x, 0.0)
    assert int(nothing.iterations) == 0
    # One step solves the first; the second direction would have negative curvature.
    indefinite = conjugate_gradient(lambda v: jnp.array([1.0, -3.0]) * v, jnp.array([1.0, 0.1]))
    assert np.all(np.isfinite(indefinite.x))
    assert int(indefinite.iterations) == 1
    unusable = conjugate_gradient(lambda v: jnp.nan * v, jnp.ones(2))
    np.testing.assert_array_equal(unusable.x, 0.0)


def test_a_step_that_has_no_length_is_refused_not_nan():
    cases = {
        "no gradient": (jnp.zeros(3), lambda v: v),
        "negative": (jnp.ones(3), lambda v: -v),
        "zero": (jnp.ones(3), lambda v: 0.0 * v),
        "nan": (jnp.ones(3), lambda v: jnp.nan * v),
        "gradient nan": (jnp.full(3, jnp.nan), lambda v: v),
    }
    for name, (gradient, product) in cases.items():
        found = natural_step(gradient, product, 0.01)
        assert not bool(found.valid), name
        np.testing.assert_array_equal(found.step, 0.0)
        assert float(found.scale) == 0.0, name


def test_the_step_does_not_depend_on_the_gradients_length_and_fills_the_budget():
    stretch = jnp.array([1.0, 4.0, 9.0])
    for length in (1.0, 10.0, 1e3):
        found = natural_step(length * jnp.array([1.0, -2.0, 3.0]), lambda v: stretch * v, 0.02)
        assert bool(found.valid)
        # x = (1, -1/2, 1/3) and x.F x = 1 + 1 + 1.
        np.testing.assert_allclose(found.step, np.sqrt(0.04 / 3) * np.array([1.0, -0.5, 1 / 3]), rtol=1e-5)
        np.testing.assert_allclose(0.5 * found.step @ (stretch * found.step), 0.02, rtol=1e-5)


def test_line_search_takes_the_first_candidate_that_passes():
    # A step of 8 shrinks by halves to 8, 4, 2, 1; of those that are at most 3, the first is 2.
    def evaluate(candidate):
        return candidate["x"] <= 3.0, {"seen": candidate["x"]}

    found = jax.jit(lambda p, s: backtracking_line_search(evaluate, p, s, shrink=0.5, trials=10))(
        {"x": jnp.asarray(0.0)}, {"x": jnp.asarray(8.0)}
    )
    assert (float(found.params["x"]), bool(found.accepted), int(found.trials)) == (2.0, True, 3)
    assert float(found.scale) == 0.25
    assert float(found.info["seen"]) == 2.0


@pytest.mark.parametrize("verdict", [False, float("nan")])
def test_line_search_keeps_the_old_parameters_if_every_trial_fails(verdict):
    params = {"x": jnp.array([0.1, 0.2, 0.3]), "y": jnp.asarray(-1.7)}

    def evaluate(candidate):
        return jnp.asarray(verdict) > 0, jnp.sum(candidate["x"])

    step = jax.tree.map(jnp.ones_like, params)
    found = jax.jit(lambda p: backtracking_line_search(evaluate, p, step, trials=4))(params)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert (bool(found.accepted), int(found.trials), float(found.scale)) == (False, 4, 0.0)
    # The report is that of the last candidate, so that one can see how far away it was.
    np.testing.assert_allclose(found.info, 0.6 + 3 * 0.8**3, rtol=1e-5)
    # Candidates that are NaN must not leak into what is kept.
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, step)
    found = backtracking_line_search(lambda c: (jnp.sum(c["x"]) < 9, ()), params, broken, trials=2)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


@double_precision
def test_members_side_by_side_do_what_each_does_alone():
    head = Categorical(3)
    features = jax.random.normal(jax.random.key(0), (6, 4))

    def member(params, target, delta, stretch):
        def network(p):
            return features @ p["w"] + p["b"]

        def surrogate(p):
            return jnp.mean(jnp.sum(jax.nn.softmax(network(p)) * target, axis=-1))

        def evaluate(candidate):
            divergence = jnp.mean(head.kl(network(params), network(candidate)))
            return (divergence <= delta) & (surrogate(candidate) > surrogate(params)), divergence

        fisher = fisher_vector_product(network, params, head, damping=0.1)
        natural = natural_step(jax.grad(surrogate)(params), fisher, delta)
        step = jax.tree.map(lambda leaf: stretch * leaf, natural.step)
        return natural, backtracking_line_search(evaluate, params, step, trials=8)

    keys = jax.random.split(jax.random.key(1), 3)
    params = jax.vmap(lambda key: {"w": jax.random.normal(key, (4, 3)), "b": jnp.zeros(3)})(keys)
    target = jax.random.normal(jax.random.key(2), (3, 6, 3))
    # Divergence budgets and full steps differ: the first accepts at once, the second later, the third never.
    delta, stretch = jnp.array([1e-3, 1e-2, 1e-2]), jnp.array([0.9, 2.0, -1.0])
    together = jax.jit(jax.vmap(member))(params, target, delta, stretch)
    alone = jax.jit(member)
    for i in range(3):
        one = alone(*jax.tree.map(lambda leaf, i=i: leaf[i], (params, target, delta, stretch)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-12), together, one)
    search = together[1]
    assert search.accepted.tolist() == [True, True, False]
    assert int(search.trials[0]) == 1
    assert 1 < int(search.trials[1]) < 8
    assert int(search.trials[2]) == 8
    np.testing.assert_array_equal(search.params["w"][2], params["w"][2])


def network_of_ones(params):
    return jnp.ones((4, 2)) * params


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda p: fisher_vector_product(network_of_ones, p, Categorical(2), damping=-0.1),
            InputError,
            "damping is -0.1",
        ),
        (
            lambda p: fisher_vector_product(network_of_ones, p, Categorical(2), weight=jnp.ones(3)),
            InputError,
            "weight's",
        ),
        (
            lambda p: fisher_vector_product(network_of_ones, p, Categorical(2), weight=-jnp.ones(4)),
            InputError,
            "weight is",
        ),
        (lambda p: fisher_vector_product(network_of_ones, (), Categorical(2)), InputError, "params is"),
        (
            lambda p: fisher_vector_product(network_of_ones, jnp.arange(2), Categorical(2)),
            InputTypeError,
            "params holds",
        ),
        (lambda p: conjugate_gradient(lambda v: v, p, iterations=0), InputError, "iterations is 0"),
        (lambda p: conjugate_gradient(lambda v: v, p, tolerance=-1.0), InputError, "tolerance is -1"),
        (lambda p: natural_step(p, lambda v: v, 0.0), InputError, "delta is 0"),
        (lambda p: natural_step(p, lambda v: v, float("nan")), InputError, "delta is nan"),
        (lambda p: backtracking_line_search(lambda c: (True, ()), p, p, shrink=1.0), InputError, "shrink is 1"),
        (lambda p: backtracking_line_search(lambda c: (True, ()), p, p, shrink=0.0), InputError, "shrink is 0"),
        (lambda p: backtracking_line_search(lambda c: (True, ()), p, p, trials=0), InputError, "trials is 0"),
    ],
)
def test_bad_input_is_named(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(jnp.array([0.5, -0.5]))
