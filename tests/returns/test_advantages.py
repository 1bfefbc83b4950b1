import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError, InputTypeError
from steersman.returns import backward_sum, discounted_return, gae, lambda_return, n_step_return, td_error

T, N = 7, 3


@functools.partial(jax.jit, static_argnames="n")
def everything(reward, value, next_value, terminated, truncated, gamma, lam, n=3):
    rows = (reward, next_value, terminated, truncated)
    advantage, target = gae(reward, value, next_value, terminated, truncated, gamma, lam)
    return {
        "advantage": advantage,
        "target": target,
        "td": td_error(reward, value, next_value, terminated, gamma),
        "lambda": lambda_return(*rows, gamma, lam),
        "discounted": discounted_return(*rows, gamma),
        "n_step": n_step_return(*rows, gamma, n),
    }


def rollout(seed, shape=(T, N)):
    """A rollout whose next value is the following row's value, except where an episode ended."""
    rng = np.random.default_rng(seed)
    reward, value, final = rng.normal(size=(3, *shape))
    end = rng.uniform(size=shape)
    terminated, truncated = end < 0.2, (end >= 0.2) & (end < 0.4)
    following = np.concatenate([value[1:], final[-1:]])
    next_value = np.where(terminated | truncated, final, following)
    return reward, value, next_value, terminated, truncated


def explicit_sum(increment, decay):
    """Sum over every pair of rows, straight from the definition."""
    total = np.zeros_like(increment)
    for index in np.ndindex(*increment.shape[1:]):
        for t in range(len(increment)):
            for k in range(t, len(increment)):
                row = (slice(t, k), *index)
                total[(t, *index)] += np.prod(decay[row]) * increment[(k, *index)]
    return total


def explicit_n_step(reward, next_value, terminated, truncated, gamma, n):
    total = np.zeros_like(reward)
    for index in np.ndindex(*reward.shape[1:]):
        for t in range(len(reward)):
            weight = 1.0
            for k in range(t, min(t + n, len(reward))):
                row = (k, *index)
                total[(t, *index)] += weight * reward[row]
                weight *= gamma[row]
                if terminated[row]:
                    weight = 0.0
                if terminated[row] or truncated[row]:
                    break
            total[(t, *index)] += weight * next_value[row]
    return total


def test_gae_by_hand_on_a_truncation_then_a_termination():
    column = {
        "reward": [1.0, 2.0, 3.0],
        "value": [10.0, 20.0, 30.0],
        "next_value": [20.0, 40.0, 50.0],
        "truncated": [False, True, False],
        "terminated": [False, False, True],
    }
    rows = {k: jnp.asarray(v) for k, v in column.items()}
    advantage, target = gae(**rows, gamma=0.5, lam=0.5)
    # delta = (1 + .5 20 - 10, 2 + .5 40 - 20, 3 - 30) = (1, 2, -27); row 0 adds .25 of row 1; rows 1 and 2 are ends.
    np.testing.assert_allclose(advantage, [1.5, 2.0, -27.0])
    np.testing.assert_allclose(target, [11.5, 22.0, 3.0])
    # Truncation counted as termination would lose gamma V(final) = 20 in row 1 and a quarter of that in row 0.
    merged, _ = gae(**{**rows, "terminated": rows["terminated"] | rows["truncated"]}, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(merged, [-3.5, -18.0, -27.0])
    # Termination counted as truncation would add a value that nobody earns.
    nothing = jnp.zeros(3, bool)
    merged, _ = gae(
        **{**rows, "terminated": nothing, "truncated": rows["truncated"].at[2].set(True)}, gamma=0.5, lam=1.0
    )
    np.testing.assert_allclose(merged[2], -2.0)


@pytest.mark.parametrize("seed", range(3))
def test_against_explicit_sums_over_all_pairs_of_rows(seed):
    rows = reward, value, next_value, terminated, truncated = rollout(seed)
    gamma, lam = np.random.default_rng(seed).uniform(0.5, 1.0, (T, N)), 0.8
    with jax.enable_x64(True):
        got = everything(*map(jnp.asarray, rows), jnp.asarray(gamma), lam)
    delta = reward + gamma * (1 - terminated) * next_value - value
    np.testing.assert_allclose(got["td"], delta, rtol=1e-12)
    advantage = explicit_sum(delta, gamma * lam * ~(terminated | truncated))
    np.testing.assert_allclose(got["advantage"], advantage, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got["target"], advantage + value, rtol=1e-10, atol=1e-12)
    # Only because next_value continues value within episodes are the two forms of the lambda return one.
    np.testing.assert_allclose(got["lambda"], got["target"], rtol=1e-10, atol=1e-12)
    to_the_end = explicit_n_step(reward, next_value, terminated, truncated, gamma, T)
    np.testing.assert_allclose(got["discounted"], to_the_end, rtol=1e-10, atol=1e-12)
    three = explicit_n_step(reward, next_value, terminated, truncated, gamma, 3)
    np.testing.assert_allclose(got["n_step"], three, rtol=1e-10, atol=1e-12)


def test_lambda_return_is_the_weighted_mean_of_n_step_returns():
    reward, _, next_value, _, _ = rollout(5, (6, 1))
    nothing = np.zeros((6, 1), bool)
    lam, gamma = 0.7, np.full_like(reward, 0.9)
    ends = (reward, next_value, nothing, nothing)
    expected = np.zeros(6)
    for t in range(6):
        left = 6 - t
        for n in range(1, left + 1):
            weight = (1 - lam) * lam ** (n - 1) if n < left else lam ** (left - 1)
            expected[t] += weight * explicit_n_step(*ends, gamma, n)[t, 0]
    got = lambda_return(*map(jnp.asarray, ends), 0.9, lam)
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-5)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_limits_of_lambda_and_of_n(seed, gamma, lam):
    with jax.enable_x64(True):
        rows = tuple(map(jnp.asarray, rollout(seed)))
        value = np.asarray(rows[1])
        one, zero = everything(*rows, gamma, 1.0), everything(*rows, gamma, 0.0)
        np.testing.assert_allclose(one["advantage"], one["discounted"] - value, atol=1e-10)
        np.testing.assert_allclose(zero["advantage"], zero["td"], atol=1e-12)
        short, long = everything(*rows, gamma, lam, n=1), everything(*rows, gamma, lam, n=T + 4)
        np.testing.assert_allclose(short["n_step"], short["td"] + value, atol=1e-10)
        np.testing.assert_allclose(long["n_step"], long["discounted"], atol=1e-10)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**31), boundary=st.integers(0, T - 2), terminal=st.booleans())
def test_nothing_crosses_an_episode_boundary(seed, boundary, terminal):
    reward, value, next_value, terminated, truncated = rollout(seed)
    terminated[boundary], truncated[boundary] = terminal, not terminal
    other_reward, other_value, other_next = reward.copy(), value.copy(), next_value.copy()
    rng = np.random.default_rng(seed)
    for changed in (other_reward, other_value, other_next):
        changed[boundary + 1 :] += rng.normal(size=(T - boundary - 1, N)) * 100
    one = everything(reward, value, next_value, terminated, truncated, 0.9, 0.9)
    two = everything(other_reward, other_value, other_next, terminated, truncated, 0.9, 0.9)
    for name in one:
        np.testing.assert_array_equal(one[name][: boundary + 1], two[name][: boundary + 1], err_msg=name)
        assert not np.array_equal(one[name][boundary + 1 :], two[name][boundary + 1 :])


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**31), row=st.integers(0, T - 1))
def test_a_truncated_and_a_terminated_end_differ_by_the_discounted_final_value(seed, row):
    with jax.enable_x64(True):
        reward, value, next_value, terminated, truncated = rollout(seed)
        terminated[row], truncated[row] = False, True
        cut = everything(reward, value, next_value, terminated, truncated, 0.9, 0.8)
        terminated[row], truncated[row] = True, False
        ended = everything(reward, value, next_value, terminated, truncated, 0.9, 0.8)
        for name in cut:
            np.testing.assert_allclose(cut[name][row] - ended[name][row], 0.9 * next_value[row], atol=1e-12)


def test_a_terminated_row_ignores_its_next_value_whatever_it_is():
    reward, value, next_value, terminated, truncated = rollout(1)
    terminated[2, 0], next_value[2, 0] = True, np.nan
    got = everything(reward, value, next_value, terminated, truncated, 0.9, 0.9)
    for name, array in got.items():
        assert np.all(np.isfinite(array)), name


def test_per_row_discounts_value_semi_markov_steps():
    # Two decisions of 3 and 2 ticks against the same five ticks one by one, with the reward paid at each start.
    decisions = jnp.asarray([1.0, 5.0])
    duration = jnp.asarray([3.0, 2.0])
    zeros = jnp.zeros(2, bool)
    macro = discounted_return(decisions, jnp.asarray([0.0, 7.0]), zeros, zeros, 0.9**duration)
    ticks = jnp.asarray([1.0, 0.0, 0.0, 5.0, 0.0])
    zeros = jnp.zeros(5, bool)
    micro = discounted_return(ticks, jnp.asarray([0.0, 0.0, 0.0, 0.0, 7.0]), zeros, zeros, 0.9)
    np.testing.assert_allclose(macro, micro[jnp.asarray([0, 3])], rtol=1e-6)


def test_ends_and_discounts_of_environments_serve_vector_rewards():
    # T == N == K, where lining up trailing axes would go unnoticed.
    reward, value, next_value, _, _ = rollout(2, (3, 3, 3))
    _, _, _, terminated, truncated = rollout(3, (3, 3))
    gamma = np.random.default_rng(0).uniform(0.5, 1, (3, 3))
    got = everything(reward, value, next_value, terminated, truncated, gamma, 0.9)
    for k in range(3):
        columns = (reward[..., k], value[..., k], next_value[..., k])
        alone = everything(*columns, terminated, truncated, gamma, 0.9)
        for name in got:
            np.testing.assert_allclose(got[name][..., k], alone[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_precision_is_that_of_the_inputs(dtype):
    with jax.enable_x64(True):
        reward, value, next_value, terminated, truncated = rollout(0)
        arrays = [jnp.asarray(x, dtype) for x in (reward, value, next_value)]
        got = everything(*arrays, terminated, truncated, 0.9, 0.9)
        assert {str(x.dtype) for x in got.values()} == {dtype}
        eager, _ = gae(*arrays, jnp.asarray(terminated), jnp.asarray(truncated), 0.9, 0.9)
        assert str(eager.dtype) == dtype


def test_gradient_with_respect_to_rewards_is_the_discounted_weight():
    zeros = jnp.zeros(4, bool)
    gradient = jax.grad(lambda r: n_step_return(r, jnp.zeros(4), zeros, zeros, 0.5, 3)[0])(jnp.ones(4))
    np.testing.assert_allclose(gradient, [1.0, 0.5, 0.25, 0.0])


def test_backward_sum_starts_from_what_follows():
    got = backward_sum(jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, 0.25]), last=jnp.asarray(8.0))
    np.testing.assert_allclose(got, [3.0, 4.0])


ROWS = {
    "reward": jnp.zeros((4, 3)),
    "value": jnp.zeros((4, 3)),
    "next_value": jnp.zeros((4, 3)),
    "terminated": jnp.zeros((4, 3), bool),
    "truncated": jnp.zeros((4, 3), bool),
    "gamma": 0.9,
    "lam": 0.9,
}


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("value", jnp.zeros((4, 1))),
        ("value", jnp.zeros(4)),
        ("next_value", jnp.zeros((5, 3))),
        ("terminated", jnp.zeros((3, 3), bool)),
        ("terminated", jnp.zeros((4, 2), bool)),
        ("truncated", jnp.zeros(3, bool)),
        ("truncated", jnp.zeros((4, 3, 1), bool)),
        ("gamma", 1.1),
        ("gamma", float("nan")),
        ("gamma", jnp.zeros(3)),
        ("lam", -0.1),
        ("lam", jnp.zeros((3, 4))),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_input_is_named(argument, bad, compiled):
    if compiled and jnp.ndim(bad) == 0:
        return  # a traced number cannot be looked at
    function = jax.jit(gae) if compiled else gae
    with pytest.raises(InputError, match=rf"^{argument} (has shape|is)"):
        function(**{**ROWS, argument: bad})


def test_bad_input_of_the_others_is_named():
    rows = {k: ROWS[k] for k in ("reward", "next_value", "terminated", "truncated", "gamma")}
    with pytest.raises(InputError, match=r"^next_value has shape"):
        lambda_return(**{**rows, "next_value": jnp.zeros(3)}, lam=0.5)
    with pytest.raises(InputError, match=r"^next_value has shape"):
        n_step_return(**{**rows, "next_value": jnp.zeros(3)}, n=2)
    with pytest.raises(InputError, match=r"^n is 0"):
        n_step_return(**rows, n=0)
    with pytest.raises((InputTypeError, TypeError), match=r"\bn\b"):
        n_step_return(**rows, n=2.5)  # type: ignore[arg-type]
    with pytest.raises((InputError, TypeError), match="reward"):
        discounted_return(**{**rows, "reward": jnp.zeros(())})
    with pytest.raises(InputError, match=r"^decay has shape"):
        backward_sum(jnp.zeros((4, 3)), jnp.zeros(3))
    with pytest.raises(InputError, match=r"^last has shape"):
        backward_sum(jnp.zeros((4, 3)), jnp.zeros(4), jnp.zeros(4))
