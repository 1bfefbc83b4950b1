"""One protocol for every kind of policy: acted with under jit, batched, scanned, wrapped, saved and loaded."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman.control import lqr
from steersman.envs.spaces import layout
from steersman.policies import (
    ActionFilter,
    ChunkPolicy,
    ClipToBox,
    ObservationNoise,
    Policy,
    Preprocess,
    Tabular,
    check_policy,
    head_for,
    load_policy,
    make_policy,
    save_policy,
)

KEY = jax.random.key(0)
STEPS, COPIES = 6, 3

# A double integrator sampled at 0.2 s: position and speed, pushed by an acceleration.
A = np.array([[1.0, 0.2], [0.0, 1.0]], np.float32)
B = np.array([[0.02], [0.2]], np.float32)
OBSERVATION = spaces.Box(-10.0, 10.0, (2,))
ACTION = spaces.Box(-1.0, 1.0, (1,))


class GradientShooting(Policy):
    """Receding-horizon control by projected gradient descent on a plan; the memory is the last plan, its warm start."""

    transition: jax.Array
    effect: jax.Array
    rate: jax.Array
    horizon: int = eqx.field(static=True)
    iterations: int = eqx.field(static=True)

    def init(self, key):
        return jnp.zeros((self.horizon, 1))

    def cost(self, plan, start):
        def step(x, u):
            x = self.transition @ x + self.effect @ u
            return x, jnp.sum(x**2) + 0.1 * jnp.sum(u**2)

        return jnp.sum(jax.lax.scan(step, start, plan)[1])

    def __call__(self, observation, carry, key):
        warm = jnp.concatenate([carry[1:], carry[-1:]])

        def improve(_, plan):
            return jnp.clip(plan - self.rate * jax.grad(self.cost)(plan, observation), -1.0, 1.0)

        plan = jax.lax.fori_loop(0, self.iterations, improve, warm)
        return plan[0], plan


class Planner(eqx.Module):
    """Chunks of an affine plan with a random slope, from two observations."""

    weight: jax.Array

    def __call__(self, seen, key):
        slope = jax.random.normal(key, ())
        return (jnp.tanh(seen.ravel() @ self.weight) + 0.1 * slope * jnp.arange(4.0))[:, None]


def draw_states(key, shape):
    return jax.random.uniform(key, (*shape, 2), minval=-1.0, maxval=1.0)


def draw_numbers(key, shape):
    return jax.random.randint(key, shape, 0, 5)


PLAIN = make_policy(Preprocess(layout(OBSERVATION)), head_for(ACTION), memory=4, key=KEY)
SHOOTING = GradientShooting(jnp.asarray(A), jnp.asarray(B), jnp.asarray(0.02), 8, 10)
KINDS = {
    "recurrent network": (PLAIN, OBSERVATION, ACTION, draw_states, ()),
    "regulator": (lqr(A, B, np.eye(2), np.eye(1)).policy(low=-1.0, high=1.0), OBSERVATION, ACTION, draw_states, ()),
    "receding horizon": (SHOOTING, OBSERVATION, ACTION, draw_states, (GradientShooting,)),
    "table": (Tabular([2, 0, 1, 1, 0]), spaces.Discrete(5), spaces.Discrete(3), draw_numbers, ()),
    "chunks": (
        ChunkPolicy(Planner(jnp.linspace(-1, 1, 4)), 3, OBSERVATION, observation_horizon=2),
        OBSERVATION,
        ACTION,
        draw_states,
        (Planner,),
    ),
}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


def scan(policy, observations, key):
    """The least loop that acts: one memory, one key a step."""

    def step(carry, given):
        observation, key = given
        action, carry, record = policy.act(observation, carry, key)
        return carry, (action, record)

    start_key, key = jax.random.split(key)
    keys = jax.random.split(key, STEPS)
    carry, history = jax.lax.scan(step, policy.init(start_key), (observations, keys))
    return history, carry


run = eqx.filter_jit(scan)
run_many = eqx.filter_jit(eqx.filter_vmap(scan, in_axes=(None, 0, 0)))


def assert_equal(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_it_acts_batched_and_over_time_as_it_does_one_by_one(kind):
    policy, _, action_space, draw, _ = kind
    observations, keys = draw(KEY, (COPIES, STEPS)), jax.random.split(jax.random.key(1), COPIES)
    many = run_many(policy, observations, keys)
    for i in range(COPIES):
        one = run(policy, observations[i], keys[i])
        assert_equal(jax.tree.map(lambda leaf, i=i: leaf[i], many), one, rtol=1e-4, atol=1e-5)
    actions = np.asarray(many[0][0])
    assert actions.shape == (COPIES, STEPS, *action_space.shape)

    # Step by step, with one jitted call each: the memory holds all that is needed.
    act = eqx.filter_jit(lambda policy, *arguments: policy.act(*arguments))
    start_key, key = jax.random.split(keys[0])
    carry = policy.init(start_key)
    for t, step_key in enumerate(jax.random.split(key, STEPS)):
        action, carry, _ = act(policy, observations[0, t], carry, step_key)
        np.testing.assert_allclose(action, actions[0, t], rtol=1e-4, atol=1e-5)


def test_it_is_a_pytree_for_plain_jax(kind):
    policy, _, _, draw, _ = kind
    observation = draw(KEY, ())
    act = jax.jit(lambda policy, observation: policy(observation, policy.init(KEY), KEY)[0])
    np.testing.assert_allclose(act(policy, observation), policy(observation, policy.init(KEY), KEY)[0], rtol=1e-5)
    # Unflattened from its own leaves, as every transformation does.
    leaves, structure = jax.tree.flatten(policy)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(act(again, observation), act(policy, observation))


def test_it_fits_its_problem_and_no_other(kind):
    class Problem:
        observation_space, action_space = kind[1], kind[2]

    check_policy(kind[0], Problem())
    Problem.action_space = spaces.Box(-1.0, 1.0, (7,))
    with pytest.raises(ValueError, match="policy "):
        check_policy(kind[0], Problem())


def test_wrapped_it_keeps_its_memory_and_its_record(kind):
    policy, _, action_space, draw, _ = kind
    low, high = (-0.2, 0.2) if isinstance(action_space, spaces.Box) else (1, 1)
    observations = draw(KEY, (STEPS,))
    silent = ActionFilter(ObservationNoise(policy, 0.0), ClipToBox(low, high))
    (actions, record), carry = run(silent, observations, KEY)
    assert np.all((np.asarray(actions) >= low) & (np.asarray(actions) <= high))
    (_, bare_record), bare_carry = run(policy, observations, KEY)
    assert jax.tree.structure((record, carry)) == jax.tree.structure((bare_record, bare_carry))
    assert type(silent.mode()) is ActionFilter

    disturbed = ActionFilter(ObservationNoise(policy, 0.5), ClipToBox(-9, 9))
    changed = not np.allclose(run(disturbed, observations, KEY)[0][0], run(policy, observations, KEY)[0][0])
    # A table reads whole numbers, which noise leaves alone.
    assert changed == (draw is draw_states)


@pytest.mark.parametrize("wrapped", [False, True])
def test_saved_and_loaded_it_behaves_the_same(kind, wrapped, tmp_path):
    policy, _, _, draw, trusted = kind
    if wrapped:
        policy = ActionFilter(ObservationNoise(policy, 0.1), ClipToBox(-1, 1))
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path, trusted=trusted)
    observations = draw(jax.random.key(5), (STEPS,))
    found, expected = (run(p, observations, KEY) for p in (loaded, policy))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if trusted:
        with pytest.raises(ValueError, match="trusted"):
            load_policy(tmp_path)


def simulate(policy, steps=60):
    @eqx.filter_jit
    def go(policy, key):
        def step(state, key):
            x, carry = state
            u, carry = policy(x, carry, key)
            cost = jnp.sum(x**2) + 0.1 * jnp.sum(u**2)
            return (A @ x + B @ jnp.clip(u, -1.0, 1.0), carry), (cost, x)

        start = (jnp.asarray([1.0, 0.0]), policy.init(key))
        return jax.lax.scan(step, start, jax.random.split(key, steps))[1]

    costs, states = go(policy, KEY)
    return float(jnp.sum(costs)), np.asarray(states)


def test_two_kinds_of_controller_solve_the_same_problem():
    regulator = lqr(A, B, np.eye(2), 0.1 * np.eye(1)).policy(low=-1.0, high=1.0)
    planner = GradientShooting(jnp.asarray(A), jnp.asarray(B), jnp.asarray(0.02), 15, 50)
    (best, states), (planned, others) = simulate(regulator), simulate(planner)
    assert np.abs(states[-1]).max() < 1e-3
    assert np.abs(others[-1]).max() < 0.02
    assert planned < 1.1 * best
    # The warm start is what makes few iterations enough: forgotten at every step, the plan is worse.

    class Forgetful(GradientShooting):
        def __call__(self, observation, carry, key):
            return super().__call__(observation, jnp.zeros_like(carry), key)

    few = [kind(jnp.asarray(A), jnp.asarray(B), jnp.asarray(0.02), 15, 3) for kind in (GradientShooting, Forgetful)]
    warm, cold = (simulate(policy)[0] for policy in few)
    assert warm < 0.95 * cold
