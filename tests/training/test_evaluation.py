"""One set of calls evaluates, records, renders and compares every kind of policy."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control import lqr
from steersman.envs import DoubleIntegrator, Environment, Problem
from steersman.envs.spaces import layout
from steersman.errors import InputError
from steersman.policies import (
    ActionFilter,
    ChunkPolicy,
    ClipToBox,
    ObservationNoise,
    Policy,
    Preprocess,
    Tabular,
    head_for,
    load_policy,
    make_policy,
    save_policy,
)
from steersman.rl.on_policy import PPO
from steersman.training import compare, evaluate, evaluate_members, record_episode, render

TASK = DoubleIntegrator(horizon=40)
PROBLEM = Problem(TASK.environment())


class Countdown(Environment):
    """Ends after as many steps as its parameter says; the observation is what is left."""

    truncates: bool = eqx.field(static=True, default=False)

    @property
    def default_params(self):
        return jnp.asarray(5)

    def reset_env(self, key, params):
        return jnp.asarray(params), jnp.asarray(params)

    def step_env(self, key, state, action, params):
        state = state - 1
        terminated = jnp.asarray(False) if self.truncates else state == 0
        return state, state, 1.0 + action, terminated, {}

    def is_truncated(self, state, params):
        return state == 0 if self.truncates else jnp.asarray(False)

    def observation_space(self, params):
        return gymnasium.spaces.Discrete(6)

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


class Plan(eqx.Module):
    """A chunk of constant forces towards the origin."""

    def __call__(self, seen, key):
        return jnp.broadcast_to(jnp.clip(-seen[..., :1].reshape(-1)[-1:], -1, 1), (4, 1))


class ReceedingHorizon(Policy):
    """Gradient descent on a short plan, started from the last plan moved by one step."""

    task: DoubleIntegrator
    horizon: int = eqx.field(static=True, default=8)

    def init(self, key):
        return jnp.zeros((self.horizon, 1))

    def __call__(self, observation, carry, key):
        def cost(plan):
            def step(x, u):
                return self.task.dynamics(x, u), self.task.stage_cost(x, u)

            x, costs = jax.lax.scan(step, observation, plan)
            return costs.sum() + self.task.terminal_cost(x)

        plan = jnp.concatenate([carry[1:], jnp.zeros((1, 1))])
        for _ in range(5):
            plan = jnp.clip(plan - 0.5 * jax.grad(cost)(plan), -1.0, 1.0)
        return plan[0], plan


def kinds():
    A, B = TASK.linearize(jnp.zeros(2), jnp.zeros(1))
    solution = lqr(np.asarray(A), np.asarray(B), np.diag([1.0, 0.1]), np.array([[0.01]]))
    preprocess = Preprocess(layout(PROBLEM.observation_space))
    return {
        "recurrent": make_policy(preprocess, head_for(PROBLEM.action_space), memory=4, key=jax.random.key(0)),
        "lqr": ActionFilter(solution.policy(), ClipToBox.from_space(PROBLEM.action_space)),
        "receding horizon": ReceedingHorizon(TASK),
        "chunks": ChunkPolicy(Plan(), 3, PROBLEM.observation_space),
    }


@pytest.mark.parametrize("truncates", [False, True])
def test_returns_are_those_of_whole_episodes(truncates):
    problem = Problem(Countdown(truncates=truncates), jnp.asarray(4))
    result = evaluate(Tabular(jnp.asarray([0, 1, 0, 1, 0, 0])), problem, episodes=3)
    # Observed 4, 3, 2, 1 before acting: the table acts 0, 1, 0, 1, and every step earns one more than its action.
    assert result.returns.tolist() == [6.0] * 3
    assert result.lengths.tolist() == [4] * 3
    assert result.mean == 6.0


def test_an_episode_without_end_is_cut():
    problem = Problem(Countdown(truncates=True), jnp.asarray(5))
    result = evaluate(Tabular(jnp.zeros(6, jnp.int32)), problem, episodes=2, max_steps=3)
    assert result.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("name", ["recurrent", "lqr", "receding horizon", "chunks"])
def test_every_kind_is_evaluated_recorded_rendered_saved_and_wrapped(name, tmp_path):
    policy = kinds()[name]
    result = evaluate(policy, PROBLEM, episodes=4)
    assert np.isfinite(result.returns).all()
    assert result.lengths.tolist() == [40] * 4
    episode = record_episode(policy, PROBLEM, seed=3)
    assert len(episode.rewards) == 40
    assert render(episode, PROBLEM)[:4] == b"GIF8"
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path, trusted=(ReceedingHorizon, Plan))
    np.testing.assert_array_equal(evaluate(loaded, PROBLEM, episodes=4).returns, result.returns)
    wrapped = ObservationNoise(ActionFilter(policy, ClipToBox.from_space(PROBLEM.action_space)), 0.01)
    noisy = evaluate(wrapped, PROBLEM, episodes=4).returns
    assert not np.array_equal(noisy, result.returns)
    np.testing.assert_allclose(noisy, result.returns, atol=2.0)


def test_controllers_and_learners_are_compared_by_one_call(tmp_path):
    contestants = {
        "lqr": kinds()["lqr"],
        "chunks": kinds()["chunks"],
        "ppo": PPO(num_envs=4, num_steps=20, hidden=(8,), epochs=1, minibatches=2),
    }
    report = tmp_path / "report.html"
    result = compare(contestants, PROBLEM, steps=160, seeds=2, episodes=4, report=report)
    summary = result.summary()
    assert set(summary["systems"]) == set(contestants)
    assert summary["systems"]["lqr"]["iqm"] > summary["systems"]["ppo"]["iqm"]
    assert report.exists()


def test_a_policy_for_other_spaces_is_refused():
    with pytest.raises(InputError, match=r"observation|action"):
        evaluate(Tabular(jnp.zeros(6, jnp.int32)), PROBLEM)
    with pytest.raises(InputError, match="episodes is 0"):
        evaluate(kinds()["lqr"], PROBLEM, episodes=0)


def test_members_are_evaluated_as_each_alone():
    preprocess, head = Preprocess(layout(PROBLEM.observation_space)), head_for(PROBLEM.action_space)
    each = [make_policy(preprocess, head, hidden=(4,), key=jax.random.key(i)) for i in range(2)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    returns = evaluate_members(together, PROBLEM, episodes=5, seed=4)
    alone = [evaluate(policy, PROBLEM, episodes=5, seed=4).mean for policy in each]
    np.testing.assert_allclose(returns, alone, rtol=1e-4)


def test_host_environments_are_evaluated_by_the_same_call():
    preprocess = Preprocess(layout(gymnasium.spaces.Box(-np.inf, np.inf, (4,))))
    policy = make_policy(preprocess, head_for(gymnasium.spaces.Discrete(2)), hidden=(4,), key=jax.random.key(0))
    result = evaluate(policy, "gymnasium:CartPole-v1", episodes=3)
    assert (result.returns == result.lengths).all()
    episode = record_episode(policy, "gymnasium:CartPole-v1", max_steps=20)
    assert render(episode, "gymnasium:CartPole-v1")[:4] == b"GIF8"
