import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError
from steersman.returns import gae, vtrace

T, N = 6, 2


def rollout(seed, shape=(T, N)):
    rng = np.random.default_rng(seed)
    reward, value, final, log_ratio = rng.normal(size=(4, *shape))
    end = rng.uniform(size=shape)
    terminated, truncated = end < 0.2, (end >= 0.2) & (end < 0.4)
    next_value = np.where(terminated | truncated, final, np.concatenate([value[1:], final[-1:]]))
    return reward, value, next_value, log_ratio, terminated, truncated


vtrace_jit = jax.jit(vtrace)


@pytest.mark.parametrize("seed", range(3))
def test_against_the_papers_sum(seed):
    # v_s = V_s + sum_t gamma^(t-s) (prod_{i<t} c_i) rho_t delta_t, Espeholt et al. equation 1, with episodes cut.
    reward, value, next_value, log_ratio, terminated, truncated = rollout(seed)
    gamma, lam, rho_clip, c_clip = 0.9, 0.8, 1.5, 1.1
    ratio = np.exp(log_ratio)
    rho, c = np.minimum(rho_clip, ratio), lam * np.minimum(c_clip, ratio)
    expected, advantage = value.copy(), np.zeros((T, N))
    for n in range(N):
        for s in range(T):
            weight = 1.0
            for t in range(s, T):
                bootstrap = 0.0 if terminated[t, n] else gamma * next_value[t, n]
                expected[s, n] += weight * rho[t, n] * (reward[t, n] + bootstrap - value[t, n])
                weight *= gamma * c[t, n]
                if terminated[t, n] or truncated[t, n]:
                    break
        for s in range(T):
            if terminated[s, n]:
                following = 0.0
            elif truncated[s, n] or s == T - 1:
                following = next_value[s, n]
            else:
                following = (1 - lam) * next_value[s, n] + lam * expected[s + 1, n]
            advantage[s, n] = rho[s, n] * (reward[s, n] + gamma * following - value[s, n])
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (reward, value, next_value, log_ratio, terminated, truncated))
        got = vtrace_jit(*arrays, gamma, lam, rho_clip, c_clip)
    np.testing.assert_allclose(got[0], expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got[1], advantage, rtol=1e-10, atol=1e-12)


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_on_policy_it_is_generalized_advantage_estimation(seed, gamma, lam):
    with jax.enable_x64(True):
        reward, value, next_value, _, terminated, truncated = map(jnp.asarray, rollout(seed))
        target, advantage = vtrace_jit(reward, value, next_value, 0 * reward, terminated, truncated, gamma, lam)
        expected, expected_target = gae(reward, value, next_value, terminated, truncated, gamma, lam)
        np.testing.assert_allclose(target, expected_target, atol=1e-10)
        np.testing.assert_allclose(advantage, expected, atol=1e-10)


def test_truncation_is_bootstrapped_and_termination_is_not():
    no, yes = jnp.zeros((1, 1), bool), jnp.ones((1, 1), bool)
    row = (jnp.ones((1, 1)), jnp.full((1, 1), 2.0), jnp.full((1, 1), 10.0), jnp.log(jnp.full((1, 1), 0.5)))
    # Ratio one half: V + .5 (1 + .9 * 10 - 2) = 6 where it was cut, 2 + .5 (1 - 2) = 1.5 where it terminated.
    np.testing.assert_allclose(vtrace(*row, no, yes, 0.9)[0], 6.0, rtol=1e-6)
    np.testing.assert_allclose(vtrace(*row, yes, no, 0.9)[0], 1.5, rtol=1e-6)


def test_without_clipping_the_target_is_unbiased_for_the_target_policy():
    # One state, two actions, one step to the end: averaging over the behaviour policy must give the target policy's
    # mean reward, whatever the value estimate says.
    behaviour, target_policy, rewards = np.array([0.9, 0.1]), np.array([0.2, 0.8]), np.array([1.0, 5.0])
    ends = jnp.ones((1, 2), bool)
    log_ratio = jnp.log(target_policy / behaviour)[None]
    inf = float("inf")
    guess, zero = jnp.full((1, 2), 3.0), jnp.zeros((1, 2))
    target, _ = vtrace(jnp.asarray(rewards)[None], guess, zero, log_ratio, ends, ~ends, 0.9, 1.0, inf, inf)
    np.testing.assert_allclose(behaviour @ np.asarray(target[0]), target_policy @ rewards, rtol=1e-6)


def test_an_exploded_ratio_is_clipped_without_overflow():
    reward, value, next_value, _, terminated, truncated = rollout(0)
    huge = jnp.full((T, N), 1e4)
    got = vtrace_jit(reward, value, next_value, huge, terminated, truncated, 0.9)
    one = vtrace_jit(reward, value, next_value, 0 * huge, terminated, truncated, 0.9)
    np.testing.assert_allclose(got, one, rtol=1e-6)


def test_joint_ratios_serve_vector_rewards_and_precision_is_kept():
    reward, value, next_value, _, _, _ = rollout(0, (3, 3, 3))
    _, _, _, log_ratio, terminated, truncated = rollout(1, (3, 3))
    with jax.enable_x64(True):
        single = [jnp.asarray(x, "float32") for x in (reward, value, next_value, log_ratio)]
        got = vtrace(*single, jnp.asarray(terminated), jnp.asarray(truncated), 0.9)
        assert {str(x.dtype) for x in got} == {"float32"}
    for k in range(3):
        columns = (reward[..., k], value[..., k], next_value[..., k])
        alone = vtrace_jit(*columns, log_ratio, terminated, truncated, 0.9)
        np.testing.assert_allclose(np.stack(got)[..., k], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("log_ratio", jnp.zeros(3)),
        ("log_ratio", jnp.zeros(())),
        ("value", jnp.zeros(4)),
        ("terminated", jnp.zeros(3, bool)),
        ("truncated", jnp.zeros((4, 2), bool)),
        ("gamma", 2.0),
        ("lam", float("nan")),
        ("rho_clip", 0.0),
        ("c_clip", float("nan")),
    ],
)
def test_bad_input_is_named(argument, bad):
    no = jnp.zeros((4, 3), bool)
    zeros = {k: jnp.zeros((4, 3)) for k in ("reward", "value", "next_value", "log_ratio")}
    good = {**zeros, "terminated": no, "truncated": no, "gamma": 0.9}
    with pytest.raises(InputError, match=rf"^{argument} (has shape|is)"):
        vtrace(**{**good, argument: bad})
