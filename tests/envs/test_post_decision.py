"""Steps that are composed of a decision and of chance, and the test of a declared post-decision state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from scipy.stats import chi2_contingency

from steersman.envs import DeclaredPostDecision, Environment, LotSizing, PostDecisionEnvironment, Problem
from steersman.envs.post_decision import ABILITY, check_post_decision
from steersman.envs.post_decision import _homogeneity as homogeneity
from steersman.errors import InputError, InputTypeError


class Queue(Environment):
    """Customers wait; the action serves up to two; new ones come. The state is a count."""

    def reset_env(self, key, params):
        state = jax.random.randint(key, (), 0, 6)
        return self.look(state), state

    def look(self, state):
        return state[None].astype(jnp.float32)

    def step_env(self, key, state, action, params):
        left = jnp.maximum(state - action, 0)
        following = jnp.minimum(left + jax.random.bernoulli(key, 0.5).astype(jnp.int32), 6)
        return self.look(following), following, -following.astype(jnp.float32) - 0.3 * action, jnp.asarray(False), {}

    def is_truncated(self, state, params):
        return jnp.asarray(False)

    def observation_space(self, params):
        return spaces.Box(0.0, 6.0, (1,))

    def action_space(self, params):
        return spaces.Discrete(3)


def left_over(state, action, params):
    return jnp.maximum(state - action, 0)[None].astype(jnp.float32), -0.3 * action


def test_a_step_is_the_composition_of_its_halves():
    """Oracle 6: simulate(s, a) = noise(post_decision(s, a)), and post_decision is pure."""
    environment = LotSizing()
    params = environment.default_params
    _, state = environment.reset(jax.random.key(0), params)
    before = jax.tree.map(np.array, state)
    for action in (0, 1, 2):
        key = jax.random.key(action)
        observation, following, reward, terminated, info = environment.step_env(key, state, jnp.asarray(action), params)
        first, second = (environment.post_decision(state, jnp.asarray(action), params) for _ in range(2))
        expected, random_reward, ended, _ = environment.exogenous(key, first[0], params)
        jax.tree.map(np.testing.assert_array_equal, first, second)
        jax.tree.map(np.testing.assert_array_equal, following, expected)
        assert float(reward) == float(first[1] + random_reward)
        assert float(info["decision_reward"]) == float(first[1])
        np.testing.assert_array_equal(info["post_decision"], environment.observe(first[0], params))
        np.testing.assert_array_equal(observation, environment.observe(expected, params))
        assert bool(terminated) == bool(ended)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_abilities_say_so():
    assert ABILITY in Problem(LotSizing()).abilities
    assert ABILITY in Problem(DeclaredPostDecision(Queue(), left_over)).abilities
    assert Problem(Queue()).abilities == {"start from any state"}


def test_a_true_declaration_passes():
    found = check_post_decision(DeclaredPostDecision(Queue(), left_over))
    assert found.groups == 6  # 0 to 5 may be left over by several decisions
    assert found.p_value > 1e-3


def test_declaration_of_a_gymnax_environment():
    import gymnax

    environment, params = gymnax.make("Catch-bsuite")
    declared = DeclaredPostDecision(environment, lambda state, action, params: (jnp.zeros((10, 5)), 0.0))
    problem = Problem(declared, params)
    _, state = problem.reset(jax.random.split(jax.random.key(0), 2))
    *_, info = problem.step(jax.random.split(jax.random.key(1), 2), state, jnp.zeros(2, jnp.int32))
    assert info["post_decision"].shape == (2, 10, 5)
    assert problem.name == environment.name


@pytest.mark.parametrize(
    "declare",
    [
        # The state before the decision: what follows depends on the action too.
        lambda state, action, params: (state[None].astype(jnp.float32), -0.3 * action),
        # The right state, but a certain part of the reward is left to chance, of which it then depends on the action.
        lambda state, action, params: (jnp.maximum(state - action, 0)[None].astype(jnp.float32), 0.0),
    ],
)
def test_a_false_declaration_is_found(declare):
    with pytest.raises(InputError, match=r"post_decision of Queue is no post-decision state: .* both lead to"):
        check_post_decision(DeclaredPostDecision(Queue(), declare))


def test_p_values_are_calibrated():
    """Under the null, p-values are uniform; for different distributions they vanish. Against SciPy where it can."""
    rng = np.random.default_rng(0)
    found = np.asarray([homogeneity(rng.binomial(3, 0.4, (3, 200, 1)).astype(float))[0] for _ in range(400)])
    for level in (0.05, 0.25, 0.5):
        assert abs(np.mean(found < level) - level) < 4 * np.sqrt(level * (1 - level) / 400)
    other = np.stack([rng.binomial(3, p, (400, 1)) for p in (0.4, 0.6)]).astype(float)
    counts = np.stack([np.bincount(row[:, 0].astype(int), minlength=4) for row in other])
    assert homogeneity(other)[0] == pytest.approx(chi2_contingency(counts).pvalue, rel=1e-6)
    assert homogeneity(np.ones((2, 10, 3))) == [1.0]


def test_continuous_noise_is_tested_too():
    class Walk(PostDecisionEnvironment):
        """A whole-numbered target, approached with Gaussian noise whose spread must not depend on the action."""

        leak: float = 0.0

        def reset_env(self, key, params):
            state = {"x": jnp.zeros(()), "spread": jnp.zeros(())}
            return self.observe(state, params), state

        def post_decision(self, state, action, params):
            where = jnp.round(state["x"]).clip(-1, 1) * 0.0 + jnp.where(action > 0, 1.0, -1.0)
            return {"x": where, "spread": 1.0 + self.leak * (action == 2)}, jnp.zeros(())

        def exogenous(self, key, post_state, params):
            x = post_state["x"] + post_state["spread"] * jax.random.normal(key)
            return {"x": x, "spread": jnp.zeros(())}, -jnp.abs(x), jnp.asarray(False), {}

        def observe(self, state, params):
            return state["x"][None]

        def observation_space(self, params):
            return spaces.Box(-np.inf, np.inf, (1,))

        def action_space(self, params):
            return spaces.Discrete(3)

    assert check_post_decision(Walk()).groups == 2
    with pytest.raises(InputError, match="post_decision of Walk"):
        check_post_decision(Walk(leak=1.0))


def test_where_decisions_never_meet_nothing_is_tested():
    def unique(state, action, params):
        return (10.0 * state + action)[None].astype(jnp.float32), 0.0

    found = check_post_decision(DeclaredPostDecision(Queue(), unique))
    assert (found.groups, found.decisions, found.p_value) == (0, 0, 1.0)


def test_bad_input():
    with pytest.raises(InputError, match="Queue has no post-decision state"):
        check_post_decision(Queue())
    with pytest.raises(InputError, match="draws is 0"):
        check_post_decision(LotSizing(), draws=0)
    with pytest.raises(InputError, match="significance is"):
        check_post_decision(LotSizing(), significance=0.0)
    with pytest.raises(InputTypeError, match=r"environment is a object.*reset_env is missing"):
        DeclaredPostDecision(object(), left_over)


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda s, a, p: (jnp.zeros(2), 0.0), r"post_decision is observed with shape \(2,\).*\(1,\)"),
        (lambda s, a, p: (jnp.zeros(1, jnp.int32), 0.0), "post_decision is observed with .*dtype int32"),
        (lambda s, a, p: ({"x": jnp.zeros(1)}, 0.0), "post_decision is observed as"),
    ],
)
def test_a_post_decision_state_of_another_form_is_refused(declare, message):
    problem = Problem(DeclaredPostDecision(Queue(), declare))
    with pytest.raises(InputError, match=message):
        problem.step(jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))


def test_impure_declarations_are_refused():
    draws = iter(np.linspace(0.0, 1.0, 100))

    def random(state, action, params):
        return left_over(state, action, params)[0], float(next(draws))

    with pytest.raises(InputError, match="post_decision of Queue gives two answers"):
        check_post_decision(DeclaredPostDecision(Queue(), random))

    class Changes(LotSizing):
        def reset_env(self, key, params):
            observation, state = super().reset_env(key, params)
            return observation, state._asdict()

        def post_decision(self, state, action, params):
            state["time"] = state["time"] + 1
            return super().post_decision(self.state((0, 0), 1), action, params)

        def exogenous(self, key, post_state, params):
            following, *rest = super().exogenous(key, post_state, params)
            return following._asdict(), *rest

        def is_truncated(self, state, params):
            return state["time"] >= self.num_steps

        def observe(self, state, params):
            return jnp.zeros(5)

    with pytest.raises(InputError, match="changes the state"):
        check_post_decision(Changes())
