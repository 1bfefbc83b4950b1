"""Half-step advantages against the ordinary ones, their definition, and exact values of a solved problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman import mdp
from steersman.envs import LotSizing
from steersman.errors import InputError
from steersman.returns import gae, half_step_gae

GAE = jax.jit(gae)
HALF_STEP = jax.jit(half_step_gae)


def rollout(seed, steps=7, envs=3):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(5, steps, envs)).astype(np.float32) * 10.0 ** rng.integers(-2, 3)
    ends = rng.random((2, steps, envs)) < 0.15
    return (*numbers, *ends)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_with_lam_x_one_it_is_gae_bit_for_bit(seed, gamma, lam):
    """Oracle 2: whatever the post-decision values."""
    reward, decision, value, post, following, terminated, truncated = rollout(seed)
    found = HALF_STEP(reward, decision, value, post, following, terminated, truncated, gamma, lam, 1.0)
    advantage, target = GAE(reward, value, following, terminated, truncated, gamma, lam)
    np.testing.assert_array_equal(found.advantage, advantage)
    np.testing.assert_array_equal(found.target, target)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), *[st.floats(0, 1) for _ in range(3)])
def test_definition(seed, gamma, lam, lam_x):
    """The recursion of the two half-steps, in a loop."""
    reward, decision, value, post, following, terminated, truncated = (np.float64(x) for x in rollout(seed))
    advantage, post_target, after = np.zeros_like(reward), np.zeros_like(reward), np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        goes_on = 1.0 - terminated[t]
        d = decision[t] + post[t] - value[t]
        e = reward[t] - decision[t] + gamma * goes_on * following[t] - post[t]
        trace = lam * (1.0 - truncated[t]) * after
        post_target[t] = reward[t] - decision[t] + gamma * goes_on * (following[t] + trace)
        after = advantage[t] = d + lam_x * (e + gamma * goes_on * trace)
    found = HALF_STEP(reward, decision, value, post, following, terminated > 0, truncated > 0, gamma, lam, lam_x)
    scale = np.abs(reward).max() + np.abs(value).max()
    np.testing.assert_allclose(found.advantage, advantage, atol=2e-5 * scale)
    np.testing.assert_allclose(found.target, advantage + value, atol=2e-5 * scale)
    np.testing.assert_allclose(found.post_target, post_target, atol=2e-5 * scale)


@pytest.fixture(scope="module")
def solved():
    """Exact values of the uniform policy on the lot-sizing problem."""
    with jax.enable_x64(True):
        tables = mdp.post_decision_tables(LotSizing(), discount=0.97)
        value, q_value = mdp.policy_evaluation(tables.mdp, jnp.full((243, 3), 1 / 3))
        return tables, value, q_value, tables.post_decision_value(value)


def simulate(solved, state, action, count, steps, rng):
    """Trajectories from one state and action, then uniformly random; NumPy, from the tables' half-steps."""
    tables, value, _, post_value = (jax.tree.map(np.asarray, part) for part in solved)
    cumulative = np.cumsum(tables.chance, axis=1)
    states, actions = np.full(count, state), np.full(count, action)
    rows = []
    for _ in range(steps):
        post = tables.successor[states, actions]
        following = np.minimum((rng.random((count, 1)) > cumulative[post]).sum(axis=1), 242)
        decision = tables.decision_reward[states, actions]
        # Rewards of chance enter by their mean given the post-decision state, which leaves all means as they are.
        rows.append(
            (decision + tables.random_reward[post], decision, value[states], post_value[post], value[following])
        )
        states, actions = following, rng.integers(0, 3, count)
    return (np.stack(part) for part in zip(*rows, strict=True))


def test_exact_values_give_the_exact_advantage_for_every_lam_x(solved):
    """Oracle 2: E[A | s, a] = Q - V, by Monte Carlo."""
    _, value, q_value, _ = solved
    rng = np.random.default_rng(0)
    off = np.zeros((30, 4_000), bool)
    for state, action in ((0, 1), (100, 2), (200, 0)):
        rows = list(simulate(solved, state, action, 4_000, 30, rng))
        for lam_x in (0.0, 0.5, 0.9, 1.0):
            found = np.asarray(HALF_STEP(*rows, off, off, 0.97, 0.95, lam_x).advantage[0])
            error = found.mean() - float(q_value[state, action] - value[state])
            assert abs(error) < 4 * found.std() / np.sqrt(len(found)) + 1e-4, (state, action, lam_x)
            if lam_x == 0.0:
                assert found.std() < 1e-4  # given state and action, nothing random is left


def test_without_noise_lam_x_is_irrelevant():
    """Oracle 4: constant demand, exact values."""
    environment = LotSizing(order_probability=1.0, max_orders=1)
    tables = mdp.post_decision_tables(environment, discount=0.9)
    pi = jax.nn.one_hot(jnp.arange(243) % 3, 3)  # some deterministic policy
    value = mdp.policy_evaluation(tables.mdp, pi)[0]
    post_value = tables.post_decision_value(value)
    states, rows = 17, []
    for t in range(20):
        action = int(jnp.argmax(pi[states])) if t else 2
        post = int(tables.successor[states, action])
        following = int(jnp.argmax(tables.chance[post]))
        decision = tables.decision_reward[states, action]
        rows.append(
            (decision + tables.random_reward[post], decision, value[states], post_value[post], value[following])
        )
        states = following
    rows = [jnp.stack(part)[:, None] for part in zip(*rows, strict=True)]
    off = jnp.zeros((20, 1), bool)
    found = [HALF_STEP(*rows, off, off, 0.9, 0.95, lam_x).advantage for lam_x in (0.0, 0.3, 1.0)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    np.testing.assert_allclose(found[0], found[2], atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam_x": 1.5}, r"lam_x is 1\.5"),
        ({"lam_x": -0.1}, "lam_x is"),
        ({"gamma": 2.0}, "gamma is"),
        ({"decision_reward": np.zeros((7, 2))}, r"decision_reward has shape \(7, 2\)"),
        ({"post_value": np.zeros(7)}, r"post_value has shape \(7,\)"),
        ({"value": np.zeros((6, 3))}, r"value has shape \(6, 3\)"),
        ({"terminated": np.zeros((3, 7), bool)}, "terminated has shape"),
    ],
)
def test_bad_input(changes, message):
    names = ("reward", "decision_reward", "value", "post_value", "next_value", "terminated", "truncated")
    arrays = {name: jnp.asarray(array) for name, array in zip(names, rollout(0), strict=True)}
    changes = {name: jnp.asarray(value) if np.ndim(value) else value for name, value in changes.items()}
    with pytest.raises(InputError, match=message):
        half_step_gae(**{**arrays, "gamma": 0.9, "lam": 0.9, "lam_x": 0.9, **changes})
