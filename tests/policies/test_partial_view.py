"""Policies that read some of the features, beside a critic that reads all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from steersman.envs import HiddenVelocity, Problem
from steersman.envs.spaces import layout
from steersman.errors import InputError
from steersman.policies import DiagonalGaussian, Preprocess, load_policy, save_policy
from steersman.policies.partial_view import PartialView
from steersman.policies.sampled_memory import BackpropagatedMemory, LinearMemory, SampledMemory
from steersman.rl.on_policy.s2pg import S2PG

KEY = jax.random.key(0)
PREPROCESS = Preprocess(layout(spaces.Box(-np.inf, np.inf, (4,))))
HEAD = DiagonalGaussian((2,))


@pytest.mark.parametrize("inner", [SampledMemory(3), LinearMemory(2), SampledMemory(0), BackpropagatedMemory(3)])
def test_it_acts_as_the_inner_policy_does_on_its_columns(inner, tmp_path):
    policy = PartialView(inner, (2, 0)).make(PREPROCESS, HEAD, initial_log_std=-1.0, key=KEY)
    narrow = Preprocess(layout(spaces.Box(-np.inf, np.inf, (2,))))
    alone = inner.make(narrow, HEAD, initial_log_std=-1.0, key=KEY)
    assert policy.unrolled == alone.unrolled
    observation = jnp.asarray([1.0, 20.0, -0.5, 300.0])

    @jax.jit
    def two_steps(policy, observation):
        action, carry, _ = policy.act(observation, policy.init(KEY), KEY)
        return action, policy.act(observation, carry, KEY)

    found, expected = two_steps(policy, observation), two_steps(alone, observation[jnp.asarray([2, 0])])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    save_policy(policy, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, two_steps(load_policy(tmp_path), observation), expected)


def test_the_critic_reads_everything():
    problem = Problem(HiddenVelocity(privileged=True).environment())
    algorithm = S2PG(architecture=PartialView(LinearMemory(1), (0,)), num_envs=8)
    state = algorithm.init(problem, KEY)
    assert state.critic.weights[0].shape == (64, 3 + 1)
    assert state.actor.network.network.weight.shape == (2, 2)


def test_privileged_observations_are_the_state_after_the_measurement():
    problem = HiddenVelocity(privileged=True)
    seen = problem.observe(jnp.asarray([1.0, 2.0]), KEY)
    np.testing.assert_array_equal(seen[1:], [1.0, 2.0])
    np.testing.assert_array_equal(seen[:1], HiddenVelocity().observe(jnp.asarray([1.0, 2.0]), KEY))


@pytest.mark.parametrize(
    ("columns", "message"),
    [((), r"columns is \(\)"), ((-1,), "columns is -1"), ((1, 4), r"columns is \(1, 4\).*below 4")],
)
def test_bad_columns(columns, message):
    with pytest.raises(InputError, match=message):
        PartialView(SampledMemory(2), columns).make(PREPROCESS, HEAD, initial_log_std=0.0, key=KEY)
