"""Policies that sample their memory: the joint family, what is carried, cells, and the deterministic twin."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gymnasium import spaces

from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError
from steersman.policies import (
    Categorical,
    DiagonalGaussian,
    GaussianParameters,
    MultiCategorical,
    Preprocess,
    TanhGaussian,
    check_policy,
    head_for,
    load_policy,
    make_policy,
    save_policy,
)
from steersman.policies.sampled_memory import (
    BackpropagatedLinearMemory,
    BackpropagatedMemory,
    JointHead,
    JointParameters,
    JointSample,
    LinearMemory,
    SampledMemory,
    action_features,
    action_size,
)

KEY = jax.random.key(0)
OBSERVATION = spaces.Box(-2.0, 2.0, (3,))
HEADS = {
    "categorical": Categorical(3, start=1),
    "several choices": MultiCategorical((2, 3), (2,)),
    "gaussian": DiagonalGaussian((2,)),
    "gaussian in a box": DiagonalGaussian((2,), (-1.0, 0.0), (3.0, np.inf)),
    "squashed gaussian": TanhGaussian((2,), (-1.0, -1.0), (1.0, 2.0)),
}


@pytest.fixture(params=list(HEADS))
def head(request):
    return HEADS[request.param]


def random_parameters(head, key, size, leading=()):
    joint = JointHead(head, size)
    keys = jax.random.split(key)
    output = jax.random.normal(keys[0], (*leading, joint.output_size))
    return joint.from_output(output, 0.3 * jax.random.normal(keys[1], (joint.free_size,)))


def policy_for(head, architecture, key=KEY):
    return architecture.make(Preprocess(layout(OBSERVATION)), head, initial_log_std=-0.5, key=key)


act = eqx.filter_jit(lambda policy, observation, carry: policy.act(observation, carry, KEY))
parameters_of = eqx.filter_jit(lambda policy, observation, carry: policy.parameters(observation, carry)[0])


def equal(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, **tolerance), found, expected)


def test_likelihood_is_that_of_both_together(head):
    parameters = random_parameters(head, KEY, 2, (4,))
    joint = JointHead(head, 2)
    sample = jax.vmap(joint.sample)(parameters, jax.random.split(KEY, 4))
    density = scipy.stats.norm.logpdf(sample.memory, parameters.memory.mean, np.exp(parameters.memory.log_std))
    expected = np.asarray(head.log_prob(parameters.action, sample.action)) + density.sum(axis=-1)
    np.testing.assert_allclose(joint.log_prob(parameters, sample), expected, rtol=1e-5, atol=1e-5)
    noise = scipy.stats.norm.entropy(scale=np.exp(parameters.memory.log_std)).sum(axis=-1)
    np.testing.assert_allclose(joint.entropy(parameters), head.entropy(parameters.action) + noise, rtol=1e-5)


def test_divergence_is_the_mean_log_ratio():
    head = JointHead(Categorical(3), 2)
    old, new = (random_parameters(Categorical(3), jax.random.key(i), 2) for i in (1, 2))
    samples = jax.vmap(lambda key: head.sample(old, key))(jax.random.split(KEY, 40_000))
    ratio = np.asarray(head.log_prob(old, samples) - head.log_prob(new, samples))
    assert float(head.kl(old, new)) == pytest.approx(ratio.mean(), abs=0.02 * float(ratio.std()))
    assert float(head.kl(old, old)) == pytest.approx(0.0, abs=1e-6)
    assert len(head.kl_parts(old, new)) == 2
    assert [float(part) for part in head.kl_parts(old, old)] == pytest.approx([0.0] * 2, abs=1e-6)


def test_fisher_product_is_the_curvature_of_the_divergence(head):
    if isinstance(head, MultiCategorical):
        pytest.skip("its curvature is that of its parts, which tests/policies/test_heads.py compares")
    joint = JointHead(head, 2)
    at = random_parameters(head, KEY, 2)
    tangent = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), at)
    slope = jax.jvp(jax.grad(lambda new: joint.kl(at, new)), (at,), (tangent,))[1]
    equal(joint.fisher_product(at, tangent), slope, rtol=1e-3, atol=1e-4)


def test_an_empty_memory_changes_not_a_bit(head):
    """d = 0 is the policy without a memory: samples, likelihoods, entropies, divergences (oracle 1)."""
    joint = JointHead(head, 0)
    old, new = (random_parameters(head, jax.random.key(i), 0) for i in (1, 2))
    sample = joint.sample(old, KEY)
    equal(sample.action, head.sample(old.action, KEY), rtol=0)
    equal(joint.log_prob(old, sample), head.log_prob(old.action, sample.action), rtol=0)
    equal(joint.entropy(old), head.entropy(old.action), rtol=0)
    equal(joint.kl(old, new), head.kl(old.action, new.action), rtol=0)
    equal(joint.to_action(sample), head.to_action(sample.action), rtol=0)


def test_spread_of_the_memory_is_bounded():
    joint = JointHead(Categorical(2), 2)
    parameters = joint.from_output(jnp.zeros(4), jnp.asarray([-50.0, 9.0]))
    np.testing.assert_array_equal(parameters.memory.log_std, [-20.0, 2.0])


def test_disallowed_actions_are_ruled_out():
    joint = JointHead(Categorical(3), 1)
    parameters = joint.mask(random_parameters(Categorical(3), KEY, 1), jnp.asarray([True, False, True]))
    draws = jax.vmap(lambda key: joint.sample(parameters, key).action)(jax.random.split(KEY, 200))
    assert set(np.unique(draws)) == {0, 2}
    assert joint.distribution(parameters).probs[1] == 0.0


def test_actions_as_floats():
    np.testing.assert_array_equal(action_features(HEADS["categorical"], jnp.asarray([2, 0])), [[0, 0, 1], [1, 0, 0]])
    several = action_features(HEADS["several choices"], jnp.asarray([1, 0]))
    np.testing.assert_array_equal(several, [0, 1, 1, 0, 0])
    boxed = action_features(HEADS["gaussian in a box"], jnp.asarray([4.0, 4.0]))
    np.testing.assert_array_equal(boxed, [1.0, 4.0])  # only the first has bounds on both sides
    np.testing.assert_array_equal(action_features(HEADS["gaussian"], jnp.asarray([4.0, -4.0])), [4.0, -4.0])
    squashed = action_features(HEADS["squashed gaussian"], jnp.asarray([0.5, 0.0]))
    np.testing.assert_allclose(squashed, [np.tanh(0.5), 0.0], rtol=1e-6)
    for head in HEADS.values():
        sample = head.sample(random_parameters(head, KEY, 1).action, KEY)
        assert action_features(head, sample).shape == (action_size(head),)


ARCHITECTURES = {"gated": SampledMemory(4, hidden=(5,)), "without layers": SampledMemory(2, (), cell="linear")}


@pytest.mark.parametrize(("head", "architecture"), [*((h, "gated") for h in HEADS), ("gaussian", "without layers")])
def test_what_is_carried_is_what_was_sampled(head, architecture):
    head = HEADS[head]
    policy = policy_for(head, ARCHITECTURES[architecture])
    start = policy.init(KEY)
    equal(jax.tree.map(np.asarray, start), jax.tree.map(np.zeros_like, start))
    observation = jnp.asarray([0.3, -0.4, 1.0])
    action, carry, record = act(policy, observation, start)
    np.testing.assert_array_equal(carry.memory, record.action.memory)
    np.testing.assert_array_equal(carry.action, action_features(head, record.action.action))
    equal(action, head.to_action(record.action.action))
    again = policy.head.log_prob(parameters_of(policy, observation, start), record.action)
    np.testing.assert_allclose(again, record.log_prob, rtol=1e-5)
    # Another memory or another last action give another distribution of both.
    for changed in (carry._replace(action=start.action), carry._replace(memory=start.memory)):
        first, other = (parameters_of(policy, observation, c) for c in (carry, changed))
        assert not np.allclose(first.memory.mean, other.memory.mean)
    equal(eqx.filter_jit(policy)(observation, start, KEY), (action, carry), rtol=1e-6)


def test_mode_feeds_the_means_of_both():
    policy = policy_for(DiagonalGaussian((2,)), SampledMemory(4))
    carry, means = policy.init(KEY), policy.init(KEY)
    for step in range(3):
        observation = jnp.full(3, 0.1 * step)
        parameters = parameters_of(policy, observation, means)
        action, carry, _ = act(policy.mode(), observation, carry)
        np.testing.assert_allclose(action, parameters.action.mean, rtol=1e-6)
        means = means._replace(memory=parameters.memory.mean, action=parameters.action.mean)
        equal(carry, means, rtol=1e-6)


@pytest.mark.parametrize("name", ["several choices", "squashed gaussian"])
def test_calls_broadcast_over_leading_axes(name):
    """What learning from rows needs: one call on ``[5, 2]`` steps is ten calls on one."""
    policy = policy_for(HEADS[name], SampledMemory(4, hidden=(6, 5), activation="tanh"))

    @eqx.filter_jit
    def both(policy, observation, keys):
        carry = jax.vmap(jax.vmap(lambda o, k: policy.act(o, policy.init(k), k)[1]))(observation, keys)
        features = jax.vmap(jax.vmap(policy.preprocess))(observation)
        apart = jax.vmap(jax.vmap(policy.from_features))(features, carry)
        return policy.from_features(features, carry), apart

    together, apart = both(policy, jax.random.normal(KEY, (5, 2, 3)), jax.random.split(KEY, (5, 2)))
    equal(together, apart, rtol=1e-4, atol=1e-5)


def test_linear_kernel_by_hand():
    policy = policy_for(DiagonalGaussian((1,)), LinearMemory(2, initial_log_std=-1.0))
    weight = jnp.arange(15.0).reshape(3, 5) / 10
    policy = eqx.tree_at(lambda p: p.network.weight, policy, weight)
    carry = policy.init(KEY)._replace(memory=jnp.asarray([1.0, -2.0]))
    parameters, _ = policy.parameters(jnp.asarray([0.5, 1.0, 2.0]), carry)
    seen = np.asarray([1.0, -2.0, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(parameters.action.mean, weight[:1] @ seen, rtol=1e-5)
    np.testing.assert_allclose(parameters.memory.mean, weight[1:] @ seen, rtol=1e-5)
    np.testing.assert_allclose(parameters.action.log_std, [-0.5])
    np.testing.assert_allclose(parameters.memory.log_std, [-1.0, -1.0])


def test_start_of_a_linear_kernel():
    policy = policy_for(DiagonalGaussian((1,)), LinearMemory(1, initial_gain=0.3))
    weight = np.asarray(policy.network.weight)
    np.testing.assert_allclose(weight @ weight.T, 0.09 * np.eye(2), atol=1e-5)
    fed = policy_for(DiagonalGaussian((1,)), LinearMemory(1, initial_gain=0.3, initial_feedback=[[-1.0, 0.0, 2.0]]))
    np.testing.assert_allclose(fed.network.weight - weight, [[0, -1, 0, 2], [0, 0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("kind", [LinearMemory, BackpropagatedLinearMemory])
@pytest.mark.parametrize("learned", [True, False])
def test_spreads_that_are_not_learned_have_no_gradient(kind, learned):
    policy = policy_for(DiagonalGaussian((1,)), kind(1, learn_std=learned))

    @eqx.filter_jit
    @eqx.filter_grad
    def score(policy):
        _, _, record = policy.act(jnp.ones(3), policy.init(KEY), KEY)
        return policy.head.log_prob(record.parameters, jax.lax.stop_gradient(record.action))

    gradient = score(policy)
    assert np.all((np.asarray(gradient.free) != 0) == learned)
    assert np.any(np.asarray(jax.tree.leaves(gradient.network)[0]) != 0)


class Oscillator(eqx.Module):
    """A phase that turns with a learned frequency, pushed by what is seen."""

    frequency: jax.Array
    push: jax.Array

    def __call__(self, inputs, memory):
        angle = jnp.arctan2(memory[1], memory[0]) + self.frequency
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)]) + self.push @ inputs


def make_oscillator(input_size, size, key):
    assert size == 2
    return Oscillator(jnp.asarray(0.3), 0.1 * jax.random.normal(key, (2, input_size)))


def test_any_cell_can_be_the_memory():

    @eqx.filter_jit
    @eqx.filter_grad
    def score(policy):
        parameters, _ = policy.parameters(jnp.ones(3), policy.init(KEY))
        return policy.head.log_prob(parameters, JointSample(jnp.ones(1), jnp.ones(2)))

    for cell in ("gru", "vanilla", "linear", make_oscillator):
        gradient = score(policy_for(DiagonalGaussian((1,)), SampledMemory(2, hidden=(4,), cell=cell)))
        assert np.any(np.asarray(jax.tree.leaves(gradient.network.cell)[0]) != 0)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_without_a_memory_it_is_the_feed_forward_policy():
    head = DiagonalGaussian((2,))
    found = policy_for(head, SampledMemory(0, hidden=(7, 5), activation="elu"))
    plain = make_policy(
        Preprocess(layout(OBSERVATION)), head, hidden=(7, 5), activation="elu", initial_log_std=-0.5, key=KEY
    )
    equal(jax.tree.leaves(found), jax.tree.leaves(plain), rtol=0)
    assert type(found) is type(plain)
    # A linear kernel without memory is linear feedback.
    linear = policy_for(head, LinearMemory(0))
    observation = jnp.asarray([1.0, 2.0, 3.0])
    mean = linear.parameters(observation, linear.init(KEY))[0].action.mean
    np.testing.assert_allclose(mean, linear.network.weight @ observation, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampled", "unrolled"),
    [
        (SampledMemory(3, previous_action=False), BackpropagatedMemory(3)),
        (LinearMemory(3), BackpropagatedLinearMemory(3)),
    ],
)
def test_the_deterministic_twin_follows_the_mean(sampled, unrolled):
    """From equal keys both have the same network; fed with means, the sampled one is the recurrence of the other."""
    head = DiagonalGaussian((2,))
    policy, twin = policy_for(head, sampled), policy_for(head, unrolled)
    assert (policy.unrolled, twin.unrolled) == (False, True)
    carry, memory = policy.init(KEY), twin.init(KEY)
    for step in range(3):
        observation = jnp.full(3, 0.3 * step - 0.2)
        action, carry, _ = act(policy.mode(), observation, carry)
        twin_action, memory, _ = act(twin.mode(), observation, memory)
        np.testing.assert_allclose(action, twin_action, rtol=1e-6)
        np.testing.assert_allclose(carry.memory, memory, rtol=1e-6)


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=2), spaces.Box(-1.0, 1.0, (2,))])
@pytest.mark.parametrize("architecture", [SampledMemory(4), LinearMemory(2), BackpropagatedMemory(4)])
def test_saved_and_loaded_it_behaves_the_same(space, architecture, tmp_path):
    class Problem:
        observation_space, action_space = OBSERVATION, space

    policy = policy_for(head_for(space), architecture)
    check_policy(policy, Problem())
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path)
    found, expected = (act(p, jnp.ones(3), p.init(KEY)) for p in (loaded, policy))
    equal(found, expected, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampledMemory(-1), "size is -1"),
        (lambda: LinearMemory(-1), "size is -1"),
        (lambda: BackpropagatedMemory(0), "size is 0"),
        (lambda: JointHead(Categorical(2), -2), "size is -2"),
        (lambda: SampledMemory(2, initial_log_std=-np.inf), "initial_log_std is -inf.*no likelihood"),
        (lambda: LinearMemory(2, initial_log_std=-np.inf), "initial_log_std is -inf"),
        (lambda: SampledMemory(2, initial_log_std=3.0), r"initial_log_std is 3\.0.*at most 2"),
        (lambda: SampledMemory(2, initial_log_std=np.nan), "initial_log_std is nan"),
        (lambda: SampledMemory(2, cell="lstm"), "Unknown cell 'lstm'"),
        (lambda: LinearMemory(1, initial_gain=-0.5), r"initial_gain is -0\.5"),
        (lambda: LinearMemory(1, initial_feedback=[[np.nan]]), "initial_feedback is"),
        (
            lambda: policy_for(DiagonalGaussian((1,)), LinearMemory(1, initial_feedback=[[1.0]])),
            r"initial_feedback's shape is \(1, 1\).*\(1, 3\)",
        ),
        (lambda: BackpropagatedMemory(2, previous_action=True), "previous_action is True"),
        (lambda: policy_for(Categorical(2), SampledMemory(2, activation="tahn")), "tanh"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_kinds_that_cannot_be_used():
    with pytest.raises(InputTypeError, match="cell is 3"):
        SampledMemory(2, cell=3)
    from steersman.policies import Head

    class Strange(Head):
        output_size = 1
        from_output = sample = mode = log_prob = entropy = kl = fisher_product = distribution = None

    with pytest.raises(InputTypeError, match=r"previous_action is True.*Strange"):
        action_size(Strange())


def test_parameters_have_their_own_kinds():
    parameters = random_parameters(Categorical(2), KEY, 2)
    assert isinstance(parameters, JointParameters)
    assert isinstance(parameters.memory, GaussianParameters)
