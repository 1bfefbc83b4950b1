"""Action distributions against NumPyro, SciPy, enumeration and numerical integration."""

import functools
import itertools
import warnings

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError, InputTypeError
from steersman.policies import (
    Categorical,
    DiagonalGaussian,
    GaussianParameters,
    MultiCategorical,
    TanhGaussian,
    head_for,
)


def quietly(kind, *args, **kwargs):
    """A space, without Gymnasium's remark on bounds that are not float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(*args, **kwargs)


def random_parameters(head, seed, leading=()):
    """Parameters of any head, from a network output of moderate size."""
    output = np.random.default_rng(seed).normal(size=(*leading, head.output_size))
    return head.from_output(jnp.asarray(output), 0.3 * jnp.arange(head.free_size) - 0.5)


HEADS = {
    "categorical": Categorical(5),
    "multi": MultiCategorical((2, 3, 4), (3,)),
    "gaussian": DiagonalGaussian((3,), (-1.0, 0.0, -2.0), (1.0, 4.0, 5.0)),
    "gaussian_dependent": DiagonalGaussian((2,), state_dependent_std=True),
    "tanh": TanhGaussian((2,), (-1.0, 0.0), (1.0, 4.0)),
}


def seeds():
    return st.integers(0, 10**6)


@functools.cache
def ours_and_numpyros(name):
    head = HEADS[name]

    @jax.jit
    def both(old, new, key):
        theirs = head.distribution(old)
        action = head.sample(old, key)
        ours = {"log_prob": head.log_prob(old, action), "entropy": head.entropy(old)}
        other = {"log_prob": theirs.log_prob(action), "entropy": theirs.entropy()}
        if name.startswith("gaussian"):
            ours["kl"] = head.kl(old, new)
            other["kl"] = numpyro.distributions.kl_divergence(theirs, head.distribution(new))
        return ours, other

    return both


@pytest.mark.parametrize("name", ["categorical", "multi", "gaussian", "gaussian_dependent"])
@settings(max_examples=5, deadline=None)
@given(seed=seeds())
def test_likelihood_entropy_and_divergence_equal_numpyros(name, seed):
    head = HEADS[name]
    with jax.enable_x64(True):
        old, new = random_parameters(head, seed), random_parameters(head, seed + 1)
        ours, theirs = ours_and_numpyros(name)(old, new, jax.random.key(seed))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, theirs)


@jax.jit
def categorical_numbers(logits, new):
    head = Categorical(5)
    return head.log_prob(logits, jnp.arange(5)), head.entropy(logits), head.kl(logits, new), head.mode(logits)


@settings(max_examples=5, deadline=None)
@given(seed=seeds())
def test_categorical_by_enumeration(seed):
    logits, new = np.random.default_rng(seed).normal(size=(2, 5)) * 2
    probs, new_probs = scipy.special.softmax(logits), scipy.special.softmax(new)
    with jax.enable_x64(True):
        log_probs, entropy, divergence, mode = categorical_numbers(logits, new)
        np.testing.assert_allclose(log_probs, np.log(probs), rtol=1e-10)
        np.testing.assert_allclose(entropy, scipy.stats.entropy(probs), rtol=1e-10)
        np.testing.assert_allclose(divergence, scipy.stats.entropy(probs, new_probs), rtol=1e-10)
        assert mode == np.argmax(probs)


def test_log_prob_is_the_same_for_many_actions_as_for_few():
    # More than 64 choices take another way through the code.
    logits = np.random.default_rng(0).normal(size=100)
    expected = logits - np.log(np.exp(logits).sum())
    found = jax.vmap(lambda action: Categorical(100).log_prob(jnp.asarray(logits), action))(jnp.arange(100))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_multicategorical_by_enumeration_of_all_joint_actions():
    head = MultiCategorical((2, 3), (2,))
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        old, new = (jnp.asarray(rng.normal(size=5)) for _ in range(2))
        actions = jnp.asarray(list(itertools.product(range(2), range(3))))
        table = {}
        for name, parameters in (("old", old), ("new", new)):
            first, second = np.exp(parameters[:2]), np.exp(parameters[2:])
            joint = np.outer(first / first.sum(), second / second.sum()).ravel()
            np.testing.assert_allclose(np.exp(head.log_prob(parameters, actions)), joint, rtol=1e-10)
            table[name] = joint
        np.testing.assert_allclose(head.entropy(old), scipy.stats.entropy(table["old"]), rtol=1e-10)
        np.testing.assert_allclose(head.kl(old, new), scipy.stats.entropy(table["old"], table["new"]), rtol=1e-10)


def draw(head, parameters, count, seed):
    sample = jax.jit(jax.vmap(lambda key: head.sample(parameters, key)))
    return np.asarray(sample(jax.random.split(jax.random.key(seed), count)))


def test_samples_have_the_frequencies_of_the_distribution():
    logits = np.array([0.0, 1.0, -np.inf, 2.0])
    counts = np.bincount(draw(Categorical(4), jnp.asarray(logits), 20_000, 0), minlength=4)
    expected = scipy.special.softmax(logits) * 20_000
    assert counts[2] == 0
    assert scipy.stats.chisquare(counts[[0, 1, 3]], expected[[0, 1, 3]]).pvalue > 1e-3

    parameters = GaussianParameters(jnp.asarray([1.0, -2.0]), jnp.log(jnp.asarray([0.5, 3.0])))
    draws = draw(DiagonalGaussian((2,)), parameters, 5_000, 1)
    for i, (mean, std) in enumerate([(1.0, 0.5), (-2.0, 3.0)]):
        assert scipy.stats.kstest(draws[:, i], "norm", (mean, std)).pvalue > 1e-3

    logits = jnp.log(jnp.asarray([0.25, 0.75, 0.5, 0.2, 0.3]))
    draws = draw(MultiCategorical((2, 3), (2,)), logits, 20_000, 2)
    joint = np.zeros((2, 3))
    np.add.at(joint, (draws[:, 0], draws[:, 1]), 1)
    expected = np.outer([0.25, 0.75], [0.5, 0.2, 0.3]) * 20_000
    assert scipy.stats.chisquare(joint.ravel(), expected.ravel()).pvalue > 1e-3


@settings(max_examples=5, deadline=None)
@given(seed=seeds())
def test_gaussian_equals_scipys(seed):
    head = DiagonalGaussian((3,))
    with jax.enable_x64(True):
        mean, log_std, action = np.random.default_rng(seed).normal(size=(3, 3))
        parameters = GaussianParameters(jnp.asarray(mean), jnp.asarray(log_std))
        expected = scipy.stats.norm.logpdf(action, mean, np.exp(log_std)).sum()
        np.testing.assert_allclose(head.log_prob(parameters, jnp.asarray(action)), expected, rtol=1e-10)
        expected = scipy.stats.norm.entropy(mean, np.exp(log_std)).sum()
        np.testing.assert_allclose(head.entropy(parameters), expected, rtol=1e-10)


def test_gaussian_divergence_by_numerical_integration():
    old, new = (0.3, 0.8), (-0.5, 1.7)

    def integrand(x):
        log_old, log_new = scipy.stats.norm.logpdf(x, *old), scipy.stats.norm.logpdf(x, *new)
        return np.exp(log_old) * (log_old - log_new)

    expected = scipy.integrate.quad(integrand, -10, 10)[0]
    parameters = [GaussianParameters(jnp.asarray([m]), jnp.log(jnp.asarray([s]))) for m, s in (old, new)]
    np.testing.assert_allclose(DiagonalGaussian((1,)).kl(*parameters), expected, rtol=1e-5)


def test_tanh_density_is_that_of_the_squashed_value():
    head, parameters = TanhGaussian((1,)), GaussianParameters(jnp.asarray([0.4]), jnp.asarray([-0.3]))

    def density(squashed):
        return float(jnp.exp(head.log_prob(parameters, jnp.arctanh(jnp.asarray([squashed])))))

    with jax.enable_x64(True):
        assert scipy.integrate.quad(density, -1, 1)[0] == pytest.approx(1.0, abs=1e-6)
        # Change of variables written out: the normal density over the derivative of tanh.
        squashed = 0.7
        raw = np.arctanh(squashed)
        expected = scipy.stats.norm.pdf(raw, 0.4, np.exp(-0.3)) / (1 - squashed**2)
        assert density(squashed) == pytest.approx(expected, rel=1e-6)


def test_tanh_likelihood_stays_finite_far_out():
    head, parameters = TanhGaussian((1,)), GaussianParameters(jnp.asarray([0.0]), jnp.asarray([0.0]))
    for value in (-50.0, 50.0):
        log_prob, gradient = jax.value_and_grad(lambda x: head.log_prob(parameters, x[None]))(jnp.asarray(value))
        assert np.isfinite(log_prob)
        assert np.isfinite(gradient)


@pytest.mark.parametrize(
    ("mean", "std", "accuracy"), [(0.0, 0.1, 1e-6), (1.5, 0.7, 1e-5), (0.3, 1.0, 3e-5), (0, 2, 5e-3)]
)
def test_tanh_entropy_and_divergence_by_numerical_integration(mean, std, accuracy):
    head = TanhGaussian((1,))

    def log_density(x, m, s):
        return scipy.stats.norm.logpdf(x, m, s) - 2 * (np.log(2) - x - np.logaddexp(0, -2 * x))

    def weight(x):
        return scipy.stats.norm.pdf(x, mean, std)

    limits = (mean - 12 * std, mean + 12 * std)
    entropy = scipy.integrate.quad(lambda x: -weight(x) * log_density(x, mean, std), *limits, limit=200)[0]
    divergence = scipy.integrate.quad(
        lambda x: weight(x) * (log_density(x, mean, std) - log_density(x, 0.2, 0.9)), *limits, limit=200
    )[0]
    with jax.enable_x64(True):
        parameters = GaussianParameters(jnp.asarray([float(mean)]), jnp.log(jnp.asarray([float(std)])))
        other = GaussianParameters(jnp.asarray([0.2]), jnp.log(jnp.asarray([0.9])))
        assert float(head.entropy(parameters)) == pytest.approx(entropy, abs=accuracy)
        assert float(head.kl(parameters, other)) == pytest.approx(divergence, rel=1e-7)


@functools.cache
def fisher_and_hessian(name):
    head = HEADS[name]
    _, unravel = jax.flatten_util.ravel_pytree(random_parameters(head, 0))

    @jax.jit
    def both(flat, tangent):
        product = head.fisher_product(unravel(flat), unravel(tangent))
        hessian = jax.hessian(lambda new: head.kl(unravel(flat), unravel(new)))(flat)
        return jax.flatten_util.ravel_pytree(product)[0], hessian @ tangent

    return both


@pytest.mark.parametrize("name", list(HEADS))
@settings(max_examples=5, deadline=None)
@given(seed=seeds())
def test_fisher_product_is_the_hessian_of_the_divergence(name, seed):
    with jax.enable_x64(True):
        flat, _ = jax.flatten_util.ravel_pytree(random_parameters(HEADS[name], seed))
        tangent = jnp.asarray(np.random.default_rng(seed + 1).normal(size=flat.shape))
        product, expected = fisher_and_hessian(name)(flat, tangent)
        np.testing.assert_allclose(product, expected, rtol=1e-8, atol=1e-10)


def test_masked_categorical_is_the_renormalized_rest():
    head, logits = Categorical(4), jnp.asarray([0.5, -1.0, 2.0, 0.0])
    allowed = np.array([1, 0, 1, 1], np.int8)
    masked = head.mask(logits, allowed)
    probs = np.exp(np.asarray(logits)) * allowed
    probs /= probs.sum()
    np.testing.assert_allclose(jnp.exp(head.log_prob(masked, jnp.arange(4))), probs, atol=1e-6)
    np.testing.assert_allclose(head.entropy(masked), scipy.stats.entropy(probs[allowed > 0]), rtol=1e-6)
    assert head.mode(head.mask(logits, [True, True, False, True])) == 0
    other = head.mask(jnp.asarray([0.0, 5.0, 1.0, 0.3]), allowed)
    rest = np.exp([0.0, 1.0, 0.3]) / np.exp([0.0, 1.0, 0.3]).sum()
    np.testing.assert_allclose(head.kl(masked, other), scipy.stats.entropy(probs[allowed > 0], rest), rtol=1e-5)
    assert head.kl(masked, logits) < jnp.inf == head.kl(logits, masked)


def test_numpyros_form_of_a_mask_gives_zero_probability():
    head = Categorical(3)
    masked = head.mask(jnp.asarray([0.1, 0.2, 0.3]), [True, False, True])
    theirs = head.distribution(masked)
    np.testing.assert_allclose(
        jnp.exp(theirs.log_prob(jnp.arange(3))), jnp.exp(head.log_prob(masked, jnp.arange(3))), rtol=1e-6
    )
    np.testing.assert_allclose(theirs.entropy(), head.entropy(masked), rtol=1e-6)


def test_numpyros_event_has_the_shape_of_an_action():
    head = MultiCategorical((2, 3, 4, 2), (2, 2))
    parameters = random_parameters(head, 0, (5,))

    @jax.jit
    def both(parameters):
        action = head.sample(parameters, jax.random.key(0))
        theirs = head.distribution(parameters)
        assert (theirs.batch_shape, theirs.event_shape, action.shape) == ((5,), (2, 2), (5, 2, 2))
        return theirs.log_prob(action), head.log_prob(parameters, action)

    np.testing.assert_allclose(*both(parameters), rtol=1e-5)


def test_gradients_through_a_mask_are_finite():
    head, allowed = Categorical(3), jnp.asarray([True, False, True])

    def loss(logits):
        masked = head.mask(logits, allowed)
        fisher = head.fisher_product(masked, jnp.ones(3))
        return (
            head.entropy(masked)
            + head.log_prob(masked, jnp.asarray(0))
            + head.kl(masked, masked + 0.1)
            + jnp.sum(fisher)
        )

    gradient = jax.grad(loss)(jnp.asarray([0.1, 0.2, 0.3]))
    assert np.all(np.isfinite(gradient))
    assert gradient[1] == 0


def test_masks_of_several_places_come_concatenated_or_one_by_one():
    head, logits = MultiCategorical((2, 3), (2,)), jnp.zeros(5)
    concatenated = head.mask(logits, jnp.asarray([1, 0, 1, 1, 0]))
    apart = head.mask(logits, (np.array([1, 0], np.int8), np.array([1, 1, 0], np.int8)))
    np.testing.assert_array_equal(concatenated, apart)
    np.testing.assert_allclose(jnp.exp(head.log_prob(apart, jnp.asarray([0, 1]))), 0.5, rtol=1e-6)
    assert set(map(tuple, draw(head, apart, 200, 0).tolist())) == {(0, 0), (0, 1)}


def test_continuous_heads_refuse_a_mask():
    with pytest.raises(InputTypeError, match="action_mask"):
        DiagonalGaussian((1,)).mask(None, None)


BOX = quietly(spaces.Box, np.array([[-1.0, 0.0], [2.0, -5.0]]), np.array([[1.0, 4.0], [3.0, 5.0]]), dtype=np.float32)
SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3, 4]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 2], [3, 4]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 2)),
    spaces.Box(-2.0, 3.0, (3,)),
    spaces.Box(-1.0, 1.0, ()),
    BOX,
    spaces.Box(-np.inf, np.inf, (2,)),
    quietly(spaces.Box, np.array([0.0, -1.0, -np.inf]), np.array([np.inf, 1.0, np.inf]), dtype=np.float32),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_head_for_a_space_gives_actions_of_the_space(space):
    head = head_for(space)
    parameters = head.from_output(3.0 * jnp.arange(head.output_size, dtype=jnp.float32), jnp.ones(head.free_size))

    act = jax.jit(jax.vmap(lambda key: head.to_action(head.sample(parameters, key))))
    actions = np.asarray(act(jax.random.split(jax.random.key(0), 30)))
    for action in [*actions, np.asarray(head.to_action(head.mode(parameters)))]:
        assert space.contains(np.asarray(action, space.dtype))


@pytest.mark.parametrize(
    "space",
    [spaces.Box(0, 255, (2,), np.uint8), spaces.Dict({"a": spaces.Discrete(2)}), spaces.Text(3)],
    ids=str,
)
def test_a_space_without_a_head_is_refused(space):
    with pytest.raises(InputTypeError, match="action space is"):
        head_for(space)


def test_discrete_actions_start_where_the_space_does():
    head = head_for(spaces.Discrete(3, start=-1))
    assert head.to_action(head.mode(jnp.asarray([5.0, 0.0, 0.0]))) == -1
    assert head.log_prob(jnp.zeros(3), jnp.asarray(2)) == pytest.approx(-np.log(3))


def test_unit_interval_is_mapped_onto_the_box():
    for head in (head_for(BOX), TanhGaussian((2, 2), (-1.0, 0.0, 2.0, -5.0), (1.0, 4.0, 3.0, 5.0))):
        far = 1e6 * jnp.asarray([1.0, -1.0, 1.0, -1.0])
        np.testing.assert_array_equal(head.to_action(far), [[1.0, 0.0], [3.0, -5.0]])
        np.testing.assert_allclose(head.to_action(jnp.zeros(4)), [[0.0, 2.0], [2.5, 0.0]], atol=1e-6)
    np.testing.assert_allclose(head_for(BOX).to_action(jnp.full(4, 0.5)), [[0.5, 3.0], [2.75, 2.5]])


def test_half_open_bounds_clip_and_do_not_scale():
    head = head_for(SPACES[-1])
    np.testing.assert_allclose(head.to_action(jnp.asarray([7.0, 3.0, -9.0])), [7.0, 1.0, -9.0])
    np.testing.assert_allclose(head.to_action(jnp.asarray([-7.0, -0.5, 9.0])), [0.0, -0.5, 9.0])


@pytest.mark.parametrize("name", list(HEADS))
def test_leading_axes_broadcast_and_equal_vmap(name):
    head = HEADS[name]
    old, new, tangent, one = (random_parameters(head, i, (4, 2)) for i in range(4))
    one = jax.tree.map(lambda leaf: leaf[0, 0], one)

    def everything(old, new, tangent, action):
        return {
            "log_prob": head.log_prob(old, action),
            "of_one": head.log_prob(one, action),
            "entropy": head.entropy(old),
            "kl": head.kl(old, new),
            "mode": head.mode(old),
            "fisher": head.fisher_product(old, tangent),
            "action": head.to_action(action),
            "numpyro": head.distribution(old).log_prob(action),
        }

    action = jax.jit(jax.vmap(jax.vmap(head.sample)))(old, jax.random.split(jax.random.key(0), (4, 2)))
    batched = jax.jit(everything)(old, new, tangent, action)
    mapped = jax.jit(jax.vmap(jax.vmap(everything)))(old, new, tangent, action)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), batched, mapped)
    for scalar in ("log_prob", "of_one", "entropy", "kl", "numpyro"):
        assert batched[scalar].shape == (4, 2)


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_arithmetic_stays_in_the_dtype_of_the_parameters(name, dtype):
    head = HEADS[name]

    def numbers(output, free):
        parameters = head.from_output(output, free)
        sample = head.sample(parameters, jax.random.key(0))
        tangent = head.fisher_product(parameters, parameters)
        return head.log_prob(parameters, sample), head.entropy(parameters), tangent, head.to_action(sample)

    with jax.enable_x64(dtype == "float64"):
        sizes = (head.output_size, head.free_size)
        found = jax.eval_shape(numbers, *(jax.ShapeDtypeStruct((size,), dtype) for size in sizes))
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(found)}
    assert {kind for kind in kinds if "float" in kind} == {dtype}


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: Categorical(0), "num_actions"),
        (lambda: MultiCategorical((), (0,)), "sizes"),
        (lambda: MultiCategorical((2, 0), (2,)), "sizes"),
        (lambda: MultiCategorical((2, 3), (3,)), "shape"),
        (lambda: MultiCategorical((2, 3), (2,), (1,)), "start"),
        (lambda: DiagonalGaussian((1,), (0.0,)), "low and high"),
        (lambda: DiagonalGaussian((2,), (0.0,), (1.0,)), "low and high"),
        (lambda: DiagonalGaussian((1,), (1.0,), (0.0,)), "low and high"),
        (lambda: TanhGaussian((1,), (0.0,), (float("inf"),)), "low and high"),
    ],
)
def test_bad_heads_are_refused_by_name(build, argument):
    with pytest.raises(InputError, match=argument):
        build()
