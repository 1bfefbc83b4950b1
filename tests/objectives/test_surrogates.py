import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError, InputTypeError
from steersman.objectives import (
    clipped,
    decoupled_clipped,
    dual_clipped,
    kl_penalized,
    mean,
    policy_gradient,
    ratio_deviation,
    spo,
    unclipped,
)

RATIO = np.linspace(0.05, 3.0, 60)[:, None]
ADVANTAGE = np.array([-3.0, -0.1, 0.0, 0.1, 3.0])[None]
GRID = tuple(np.broadcast_arrays(np.log(RATIO), ADVANTAGE))


def slope(loss, ratio, advantage):
    """Derivative of a loss with respect to the ratio, per element."""
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(loss(jnp.log(r), jnp.asarray(advantage)))))
    return gradient(jnp.asarray(ratio))


def test_table_of_the_clip():
    ratio, advantage = np.array([1.5, 0.5, 1.5, 0.5]), np.array([1.0, 1.0, -1.0, -1.0])
    loss = functools.partial(clipped, clip_low=0.2)
    np.testing.assert_allclose(loss(np.log(ratio), advantage), [-1.2, -0.5, 1.5, 0.8], rtol=1e-14)
    np.testing.assert_allclose(slope(loss, ratio, advantage), [0.0, -1.0, 1.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.2, None), (0.2, 0.28), (1.5, 0.1), (0.1, math.inf)])
def test_clip_is_the_papers_minimum(low, high):
    ratio = np.exp(GRID[0])
    bounded = np.clip(ratio, 1 - low, 1 + (low if high is None else high))
    expected = -np.minimum(ratio * GRID[1], bounded * GRID[1])
    np.testing.assert_allclose(clipped(*GRID, low, high), expected, rtol=1e-12)
    assert np.all(clipped(*GRID, low, high) >= unclipped(*GRID))


def test_without_bounds_the_clip_is_the_unclipped_loss_exactly():
    for infinite in (clipped(*GRID, math.inf), dual_clipped(*GRID, math.inf, math.inf, math.inf), spo(*GRID, math.inf)):
        np.testing.assert_array_equal(infinite, unclipped(*GRID))


def test_clips_per_token_are_those_of_each_token():
    rng = np.random.default_rng(0)
    log_ratio, advantage = rng.normal(size=(2, 3, 4))
    low, high = rng.uniform(0.1, 1.2, (2, 3, 4))
    got = clipped(log_ratio, advantage, low, high)
    for index in np.ndindex(3, 4):
        one = (slice(index[0], index[0] + 1), index[1])
        alone = clipped(log_ratio[one], advantage[one], low[index], high[index])
        np.testing.assert_allclose(got[index], alone[0], rtol=1e-12)


def test_dual_clip_by_hand():
    # Ye et al., equation 5: max(min(r A, clip(r) A), c A) where A < 0; loss at most -c A.
    ratio, advantage = np.array([5.0, 2.0, 0.5, 5.0]), np.array([-1.0, -1.0, -1.0, 1.0])
    loss = functools.partial(dual_clipped, clip_low=0.2, dual_clip=3.0)
    np.testing.assert_allclose(loss(np.log(ratio), advantage), [3.0, 2.0, 0.8, -1.2], rtol=1e-12)
    np.testing.assert_allclose(slope(loss, ratio, advantage), [0.0, 1.0, 0.0, 0.0], rtol=1e-6)
    bound = np.where(GRID[1] < 0, -1.7 * GRID[1], np.inf)
    expected = np.minimum(clipped(*GRID, 0.2), bound)
    np.testing.assert_allclose(dual_clipped(*GRID, 0.2, dual_clip=1.7), expected, rtol=1e-12)
    # It never bounds what a positive advantage may gain, also not where that is left unclipped.
    expected = np.minimum(clipped(*GRID, 0.2, math.inf), bound)
    np.testing.assert_allclose(dual_clipped(*GRID, 0.2, math.inf, 1.7), expected, rtol=1e-12)


@pytest.mark.parametrize(("epsilon", "max_ratio"), [(0.2, math.inf), (0.05, 100.0), (0.3, 1.5), (math.inf, 2.0)])
def test_decoupled_clip_is_the_papers_larger_of_two(epsilon, max_ratio):
    new, behaviour, proximal, advantage = np.random.default_rng(3).normal(size=(4, 500))
    adjusted = np.maximum(behaviour, new - np.log(max_ratio))
    bounds = (-np.inf, np.inf) if epsilon == math.inf else np.log([1 - epsilon, 1 + epsilon])
    step = np.clip(new - proximal, *bounds)
    expected = np.maximum(-advantage * np.exp(new - adjusted), -advantage * np.exp(step + proximal - adjusted))
    found = decoupled_clipped(new, behaviour, proximal, advantage, epsilon, max_ratio)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_decoupled_clip_around_the_behaviour_policy_is_the_clip():
    new, old, advantage = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(4).normal(size=(3, 200)))

    def both(loss):
        return jax.value_and_grad(lambda new: jnp.sum(loss(new)))(new)

    for found, expected in zip(
        both(lambda new: decoupled_clipped(new, old, old, advantage, 0.2)),
        both(lambda new: clipped(new - old, advantage, 0.2)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_within_its_interval_the_decoupled_clip_is_the_importance_weighted_loss():
    rng = np.random.default_rng(5)
    behaviour, proximal, advantage = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 100)))
    new = proximal + jnp.asarray(rng.uniform(np.log(0.81), np.log(1.19), 100), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(decoupled_clipped(x, behaviour, proximal, advantage, 0.2)))(new)
    np.testing.assert_allclose(gradient, -jnp.exp(new - behaviour) * advantage, rtol=1e-5)


def test_without_clip_the_gradient_is_the_policy_gradient_whoever_collected_the_data():
    """Expectations over the behaviour policy are exact sums, so any bias would show."""
    rng = np.random.default_rng(6)
    logits, behaviour, proximal = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in rng.normal(size=(3, 5)))
    advantage = jnp.asarray(rng.normal(size=5), jnp.float32)

    def loss(logits):
        log_prob = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(behaviour) * decoupled_clipped(log_prob, behaviour, proximal, advantage, math.inf))

    probability = np.exp(np.asarray(logits, np.float64))
    expected = -probability * (np.asarray(advantage) - probability @ np.asarray(advantage))
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-4, atol=1e-6)


def test_a_bounded_weight_bounds_the_gradient_and_does_not_stop_it():
    new, old, advantage = jnp.asarray([0.0, 0.0]), jnp.asarray([-9.0, -0.1]), jnp.asarray([1.0, 1.0])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(decoupled_clipped(x, old, x * 0, advantage, 0.2, 100.0)))(
        new
    )
    assert float(value) == pytest.approx(-100 - math.exp(0.1), rel=1e-5)
    np.testing.assert_allclose(gradient, [-100.0, -math.exp(0.1)], rtol=1e-5)


def test_an_action_that_the_behaviour_policy_could_not_take_is_not_hidden():
    impossible = jnp.asarray([-jnp.inf])
    for max_ratio in (math.inf, 100.0):
        loss = decoupled_clipped(jnp.zeros(1), impossible, jnp.zeros(1), jnp.ones(1), 0.2, max_ratio)
        assert not np.isfinite(loss[0])


def test_decoupled_clip_names_what_is_wrong():
    row = (np.zeros(3), np.zeros(3), np.zeros(3), np.ones(3))
    for bad in (0.0, -0.1, 1.0, 7.0, math.nan, np.array([0.2, 1.0, 0.2])):
        with pytest.raises(InputError, match=r"^epsilon is"):
            decoupled_clipped(*row, bad)
    with pytest.raises(InputError, match=r"^max_ratio is"):
        decoupled_clipped(*row, 0.2, 0.0)
    for place, name in enumerate(("behaviour_log_prob", "proximal_log_prob", "advantage"), start=1):
        with pytest.raises(InputError, match=f"^{name} has shape"):
            decoupled_clipped(*row[:place], np.zeros((3, 1)), *row[place + 1 :], 0.2)


def test_table_of_spo():
    ratio, advantage = np.array([1.5, 0.5, 1.0]), np.array([2.0, -1.0, 0.7])
    loss = functools.partial(spo, epsilon=0.2)
    np.testing.assert_allclose(loss(np.log(ratio), advantage), [-1.75, 1.125, -0.7], rtol=1e-12)
    np.testing.assert_allclose(slope(loss, ratio, advantage), [3.0, -1.5, -0.7], rtol=1e-5)


@pytest.mark.parametrize("advantage", [-3.0, -0.1, 0.1, 3.0])
def test_spo_has_its_optimum_one_epsilon_away(advantage):
    epsilon, ratio = 0.2, np.linspace(0.5, 1.5, 100_001)
    loss = spo(np.log(ratio), np.full_like(ratio, advantage), epsilon)
    assert ratio[np.argmin(loss)] == pytest.approx(1 + np.sign(advantage) * epsilon, abs=1e-4)
    assert -np.min(loss) == pytest.approx(advantage + abs(advantage) * epsilon / 2, abs=1e-8)


def test_spo_has_one_curvature_everywhere():
    second = jax.grad(jax.grad(lambda ratio, advantage: spo(jnp.log(ratio), advantage, 0.2)))
    ratio, advantage = np.meshgrid([0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], [-2.0, 0.5])
    with jax.enable_x64(True):
        got = jax.jit(jnp.vectorize(second))(ratio, advantage)
    np.testing.assert_allclose(got, np.abs(advantage) / 0.2, rtol=1e-9)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    log_ratio=st.floats(-3, 3), advantage=st.floats(-10, 10), scale=st.floats(1e-3, 1e3), epsilon=st.floats(0.01, 2)
)
def test_losses_scale_with_the_advantage_and_spo_is_symmetric(log_ratio, advantage, scale, epsilon):
    row, a = np.array([log_ratio]), np.array([advantage])
    losses = (
        unclipped,
        functools.partial(clipped, clip_low=epsilon),
        functools.partial(dual_clipped, clip_low=epsilon),
        functools.partial(spo, epsilon=epsilon),
    )
    for loss in losses:
        np.testing.assert_allclose(loss(row, scale * a), scale * loss(row, a), rtol=1e-9, atol=1e-12)
    # Flipping the advantage's sign mirrors the optimum about 1: f(2 - r, -A) and f(r, A) differ by the linear part.
    ratio = np.exp(row)
    if ratio[0] < 2:
        mirrored = spo(np.log(2 - ratio), -a, epsilon) - 2 * a
        np.testing.assert_allclose(mirrored, spo(row, a, epsilon), rtol=1e-6, atol=1e-9)


SURROGATES = {
    "unclipped": unclipped,
    "clipped": functools.partial(clipped, clip_low=0.2),
    "dual_clipped": functools.partial(dual_clipped, clip_low=0.2),
    "spo": functools.partial(spo, epsilon=0.3),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_at_the_old_policy_every_gradient_is_the_policy_gradient(name):
    # A softmax policy over 4 actions: the policy gradient is -mean A (onehot - pi), in closed form.
    rng = np.random.default_rng(0)
    theta, action, advantage = rng.normal(size=4), rng.integers(4, size=32), rng.normal(size=32)
    pi = np.exp(theta) / np.exp(theta).sum()
    expected = -np.mean(advantage[:, None] * (np.eye(4)[action] - pi), axis=0)

    def objective(logits, old, loss):
        log_prob = jax.nn.log_softmax(logits)[action]
        return mean(loss(log_prob - old, jnp.asarray(advantage)))

    with jax.enable_x64(True):
        logits = jnp.asarray(theta)
        old = jax.nn.log_softmax(logits)[action]
        gradient = jax.jit(jax.grad(objective), static_argnums=2)
        got, direct = gradient(logits, old, SURROGATES[name]), gradient(logits, 0.0 * old, policy_gradient)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(direct, expected, atol=1e-12)


def test_kl_penalty_adds_its_weight_times_the_divergence():
    np.testing.assert_allclose(kl_penalized(*GRID, np.full_like(GRID[0], 0.3), 2.0), unclipped(*GRID) + 0.6)
    np.testing.assert_array_equal(kl_penalized(*GRID, np.ones_like(GRID[0]), 0.0), unclipped(*GRID))


def test_mean_ratio_deviation_is_twice_the_total_variation():
    rng = np.random.default_rng(0)
    old, new = rng.dirichlet(np.ones(5), size=2)
    # An exact expectation under the old policy, written as a mean over equally weighted rows.
    count = np.round(old * 1000).astype(int)
    old = count / count.sum()
    log_ratio = np.repeat(np.log(new / old), count)
    assert ratio_deviation(log_ratio) == pytest.approx(np.abs(new - old).sum(), rel=1e-12)


def test_spos_bound_holds_on_random_decision_processes():
    # eta(new) - eta(old) >= E[r A] / (1 - g) - 2 g xi / (1 - g)^2 E[TV], the ground that the loss stands on, with the
    # total variation as the loss measures it: half the expected |r - 1|.
    rng = np.random.default_rng(0)
    states, actions, gamma = 3, 2, 0.9
    for _ in range(1000):
        transition = rng.dirichlet(np.ones(states), size=(states, actions))
        reward, start = rng.normal(size=(states, actions)), rng.dirichlet(np.ones(states))
        old, new = rng.dirichlet(np.ones(actions), size=(2, states))
        new = old + rng.uniform() * (new - old)

        def evaluate(policy):
            chain = np.einsum("sa,sat->st", policy, transition)  # noqa: B023
            return np.linalg.solve(np.eye(states) - gamma * chain, (policy * reward).sum(1)), chain  # noqa: B023

        value, chain = evaluate(old)
        advantage = reward + gamma * transition @ value - value[:, None]
        visits = (1 - gamma) * np.linalg.solve(np.eye(states) - gamma * chain.T, start)
        log_ratio = np.log(new / old)
        gain = visits @ -(old * unclipped(log_ratio, advantage)).sum(1)
        total_variation = visits @ (old * np.abs(np.expm1(log_ratio))).sum(1) / 2
        xi = np.abs((new * advantage).sum(1)).max()
        bound = gain / (1 - gamma) - 2 * gamma * xi / (1 - gamma) ** 2 * total_variation
        assert start @ evaluate(new)[0] - start @ value >= bound - 1e-9


def test_an_exploded_ratio_has_no_gradient_where_it_is_clipped():
    # exp(1000) overflows; a clip written as a minimum would give 0 * inf.
    big, small = jnp.asarray([1000.0]), jnp.asarray([-1000.0])
    for loss, log_ratio, advantage, expected in (
        (functools.partial(clipped, clip_low=0.2), big, 1.0, -1.2),
        (functools.partial(clipped, clip_low=0.2), small, -1.0, 0.8),
        (functools.partial(clipped, clip_low=0.2), big, 0.0, 0.0),
        (functools.partial(dual_clipped, clip_low=0.2, dual_clip=3.0), big, -1.0, 3.0),
    ):
        function = jax.jit(jax.value_and_grad(lambda x, f=loss, a=advantage: f(x, jnp.full(1, a))[0]))
        value, gradient = function(log_ratio)
        assert value == pytest.approx(expected, rel=1e-6)
        assert gradient[0] == 0.0


def test_what_is_not_finite_shows():
    bad = np.array([np.nan])
    for loss in SURROGATES.values():
        assert np.isnan(loss(bad, np.ones(1))[0])
        assert np.isnan(loss(np.zeros(1), bad)[0])


@pytest.mark.parametrize("name", [*SURROGATES, "policy_gradient"])
@pytest.mark.parametrize("shapes", [((4,), (4, 1)), ((4, 1), (4,)), ((4, 1), (1, 4)), ((4, 3), (4,)), ((4,), (3,))])
def test_shapes_that_would_broadcast_unseen_are_refused(name, shapes):
    loss = {**SURROGATES, "policy_gradient": policy_gradient}[name]
    for function in (loss, jax.jit(loss)):
        with pytest.raises(InputError, match=r"^advantage has shape .* must have (log_ratio|log_prob)'s shape"):
            function(jnp.zeros(shapes[0]), jnp.zeros(shapes[1]))


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, np.float32(0.0), np.array([0.2, math.nan, 0.2])])
def test_bad_parameters_are_named(bad):
    row = (np.zeros(3), np.ones(3))
    for argument, call in (
        ("clip_low", lambda v: clipped(*row, v)),
        ("clip_high", lambda v: clipped(*row, 0.2, v)),
        ("dual_clip", lambda v: dual_clipped(*row, 0.2, None, v)),
        ("epsilon", lambda v: spo(*row, v)),
    ):
        with pytest.raises(InputError, match=rf"^{argument} is .* above"):
            call(bad)
    with pytest.raises(InputError, match=r"^dual_clip is 1.0"):
        dual_clipped(*row, 0.2, None, 1.0)
    with pytest.raises(InputError, match=r"^beta is -1.0"):
        kl_penalized(*row, np.ones(3), -1.0)
    with pytest.raises(InputError, match=r"^kl has shape"):
        kl_penalized(*row, np.ones((3, 1)), 1.0)
    with pytest.raises(InputError, match=r"^epsilon has shape"):
        spo(*row, np.ones((3, 1)))
    with pytest.raises((InputTypeError, TypeError), match="epsilon"):
        spo(*row, "0.2")  # type: ignore[arg-type]


def test_traced_and_device_parameters_are_never_looked_at():
    row = (jnp.zeros(3), jnp.ones(3))
    epsilons = jnp.asarray([-1.0, 0.2])
    assert jax.jit(jax.vmap(lambda e: spo(*row, e)))(epsilons).shape == (2, 3)
    assert jax.jit(lambda e: clipped(*row, e))(0.2).shape == (3,)
    assert jax.jit(jax.vmap(lambda e: dual_clipped(*row, e, dual_clip=1.0 + e)))(epsilons).shape == (2, 3)
