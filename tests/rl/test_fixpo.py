import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole, Pendulum
from steersman.errors import InputError
from steersman.policies import Categorical, DiagonalGaussian, GaussianParameters
from steersman.rl.fix_up import FixUp, interpolate
from steersman.rl.on_policy import PPO
from steersman.rl.on_policy.actor_critic import Learned, in_rows, samples
from steersman.rl.on_policy.fixpo import FixPO
from steersman.rl.phases import PhaseTools, Running
from steersman.rl.surrogates import Clip, FixedKL, LearnedKL, SurrogateInputs, Unclipped
from steersman.training import Linear, train

SMALL = {"num_envs": 4, "num_steps": 32, "hidden": (8,), "learning_rate": 3e-3, "minibatches": 2}


def collected(algorithm, problem, seed=0):
    state = algorithm.init(problem, jax.random.key(seed))
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), jax.random.key(seed + 1))
    return state, eqx.filter_jit(algorithm.collector.collect)(problem, algorithm.behaviour(state), rollout)[0]


@pytest.mark.parametrize("problem", [Problem(DiscreteCartPole()), Problem(Pendulum().environment())])
def test_every_update_meets_the_bound(problem):
    """Oracle 1, on a bound that steps of this size exceed again and again."""
    algorithm = FixPO(surrogate=LearnedKL(bound=0.02), phase=FixUp(rows=64), **{**SMALL, "learning_rate": 1e-2})
    trained = train(algorithm, problem, iterations=12, seeds=2)
    assert trained.metrics["max_kl"].max() <= 0.02
    assert trained.metrics["fix_up_steps"].sum() > 0
    bare = train(FixPO(surrogate=LearnedKL(bound=0.02), phase=None, **{**SMALL, "learning_rate": 1e-2}), problem,
                 iterations=12, seeds=2)  # fmt: skip
    assert bare.metrics["max_kl"].max() > 0.02


def test_the_weight_rises_where_the_largest_divergence_exceeds_its_share_of_the_bound():
    """Oracle 2: the multiplier's gradient is bound - margin max D, and it never falls below zero."""
    surrogate = LearnedKL(bound=0.3, margin=3.0, beta_learning_rate=0.05)

    def after(kl, steps=1):
        state, zeros = surrogate.init(), jnp.zeros(2)
        for _ in range(steps):
            inputs = SurrogateInputs(jnp.asarray([0.0, kl]), zeros, zeros)
            state = surrogate.learn(zeros, zeros, inputs, state)
        return float(surrogate.penalty(state))

    assert after(0.11) == pytest.approx(1.05, abs=1e-4)
    assert after(0.09) == pytest.approx(0.95, abs=1e-4)
    assert after(0.10) == pytest.approx(1.0, abs=1e-3) or abs(after(0.10) - 1.0) <= 0.05
    assert after(0.0, steps=40) == 0.0
    zeros, mean = jnp.zeros(2), LearnedKL(bound=0.3, margin=3.0, beta_learning_rate=0.05, statistic="mean")
    inputs = SurrogateInputs(jnp.asarray([0.0, 0.18]), zeros, zeros)
    assert float(mean.penalty(mean.learn(zeros, zeros, inputs, mean.init()))) < 1.0


def test_without_weight_and_fix_up_it_is_the_unclipped_surrogate():
    """Oracle 3, first half."""
    problem = Problem(DiscreteCartPole())
    bare = FixPO(surrogate=FixedKL(1e-30), phase=None, **SMALL)
    plain = PPO(surrogate=Unclipped(), **SMALL)
    state, experience = collected(plain, problem)
    update = eqx.filter_jit(lambda a, s, e: a.update(s, e)[0].learned)
    for ours, theirs in zip(*(jax.tree.leaves(update(a, state, experience)) for a in (bare, plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_an_unreachable_bound_is_never_fixed_up_and_the_weight_decays():
    """Oracle 3, second half."""
    algorithm = FixPO(surrogate=LearnedKL(bound=1e6, beta_learning_rate=0.1), **SMALL)
    trained = train(algorithm, Problem(DiscreteCartPole()), iterations=3)
    assert trained.metrics["fix_up_steps"].sum() == 0
    assert float(trained.state.method.surrogate.value[0]) == 0.0


@pytest.fixture(scope="module")
def displaced():
    """A policy far outside the bound, and what a fix-up works with."""
    problem = Problem(DiscreteCartPole())
    algorithm = FixPO(surrogate=LearnedKL(bound=0.02), **SMALL)
    state, experience = collected(algorithm, problem)
    rows = in_rows(state.actor, algorithm.estimate(state, experience)[0])
    noise = jax.random.normal(jax.random.key(5), (10_000,))
    count = 0

    def moved(leaf):
        nonlocal count
        count += leaf.size
        return leaf + 0.6 * noise[count - leaf.size : count].reshape(leaf.shape)

    learned = jax.tree.map(moved, state.learned)
    optimizer = algorithm._optimizer()

    def step(gradient, optimizer_state, learned):
        direction, optimizer_state = optimizer.update(gradient, optimizer_state, learned)
        return jax.tree.map(lambda p, s: p - 3e-3 * s, learned, direction), optimizer_state

    def fix(phase, advantage, learned=learned):
        def samples_of(learned, rows):
            return samples(state.with_learned(learned).actor, rows)

        tools = PhaseTools(rows._replace(advantage=advantage), state.learned, algorithm.surrogate, samples_of, step)
        running = Running(learned, state.optimizer, algorithm.surrogate.init(), (), phase.init())
        after = phase(running, tools)
        return after, samples_of(after.learned, rows).inputs.kl

    return fix, rows, state, learned


def test_fix_up_alone_ends_within_the_bound_whatever_the_advantages(displaced):
    """Oracle 4."""
    fix, rows, _, learned = displaced
    phase = FixUp(rows=64, max_steps=400)
    run = jax.jit(lambda advantage: fix(phase, advantage))
    first, kl = run(rows.advantage)
    assert float(jnp.max(kl)) <= 0.02
    assert int(first.phase.steps) > 0
    assert not bool(first.phase.interpolated)
    second, _ = run(-3.0 * rows.advantage + 1.0)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(first.learned.critic), jax.tree.leaves(learned.critic), strict=True):
        np.testing.assert_array_equal(a, b)


def test_where_steps_do_not_suffice_the_policy_moves_back_along_the_line(displaced):
    """Oracle 6, and the fallback at work within the phase."""
    fix, rows, _, learned = displaced
    after, kl = jax.jit(lambda: fix(FixUp(rows=64, max_steps=0), rows.advantage))()
    assert bool(after.phase.interpolated)
    assert 0.9 * 0.02 <= float(jnp.max(kl)) <= 0.02
    broken = eqx.tree_at(lambda x: x.network, learned, jax.tree.map(lambda x: x * jnp.nan, learned.network))
    after, kl = jax.jit(lambda: fix(FixUp(rows=64, max_steps=5), rows.advantage, broken))()
    assert float(jnp.max(kl)) <= 0.02


def test_interpolation_on_a_line_that_leaves_the_bound_and_comes_back():
    def worst(learned):
        t = learned.network
        return 2.0 * t + 1.5 * jnp.sin(9.0 * t)

    old, new = (Learned(jnp.asarray(t), jnp.zeros(1), jnp.asarray(c)) for t, c in ((0.0, 1.0), (1.0, 2.0)))
    found, t = interpolate(worst, old, new, 0.5)
    assert 0.0 < float(t) <= 1.0
    assert 0.45 <= float(worst(found)) <= 0.5
    assert float(found.critic) == 2.0


def test_divergence_is_of_the_old_policy_from_the_new():
    """Oracle 5: against a numerical integral, where the two directions differ."""
    gaussian = DiagonalGaussian((1,))
    old, new = (GaussianParameters(jnp.zeros(1), jnp.log(jnp.asarray([s]))) for s in (1.0, 2.0))

    def normal(x, s):
        return np.exp(-0.5 * (x / s) ** 2) / (s * np.sqrt(2 * np.pi))

    integral = integrate.quad(lambda x: normal(x, 1.0) * np.log(normal(x, 1.0) / normal(x, 2.0)), -12, 12)[0]
    assert integral == pytest.approx(0.318147, abs=1e-6)
    assert float(gaussian.kl(old, new)) == pytest.approx(integral, abs=1e-5)
    assert float(gaussian.kl(new, old)) == pytest.approx(0.806853, abs=1e-5)
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]))
    expected = 0.7 * np.log(0.7 / 0.2) + 0.1 * np.log(0.1 / 0.6)
    assert float(Categorical(3).kl(logits[0], logits[1])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedKL(bound=0.0), "bound is 0"),
        (lambda: LearnedKL(margin=0.5), r"margin is 0\.5"),
        (lambda: LearnedKL(initial_beta=-1.0), "initial_beta is -1"),
        (lambda: LearnedKL(bound=float("nan")), "bound is nan"),
        (lambda: LearnedKL(statistic="median"), "statistic is 'median'"),
        (lambda: FixUp(bound=-0.1), "bound is -0"),
        (lambda: FixUp(statistic="min"), "statistic is 'min'"),
        (lambda: FixUp(rows=0), "rows is 0"),
        (lambda: FixPO(learning_rate=Linear(1e-3, 0.0, 1000)), "learning_rate is a schedule that reaches 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_margin_of_one_warns():
    with pytest.warns(UserWarning, match="margin is 1"):
        LearnedKL(margin=1.0)


def test_a_fix_up_needs_a_bound():
    with pytest.raises(InputError, match=r"bound is None.*Clip"):
        train(FixPO(surrogate=Clip(), **SMALL), "cartpole-discrete", iterations=1)


def test_a_schedule_may_fall_as_long_as_it_stays_above_zero():
    assert FixPO(learning_rate=Linear(1e-3, 1e-5, 1000)).phase is not None
    assert FixPO(learning_rate=Linear(1e-3, 0.0, 1000), phase=None).phase is None
