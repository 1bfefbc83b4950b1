from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole, Pendulum
from steersman.envs.spaces import layout
from steersman.errors import InputError
from steersman.policies import DiagonalGaussian, GaussianParameters, Preprocess, head_for
from steersman.rl.critics import Outcome
from steersman.rl.mpo_surrogate import Bound, WeightedLikelihood
from steersman.rl.on_policy import policy_gradients_guide as guide
from steersman.rl.on_policy.a2c import A2C
from steersman.rl.on_policy.actor_critic import in_rows, samples
from steersman.rl.on_policy.policy_gradients_guide import (
    NextTargetCritic,
    SoftplusTanhGaussian,
    SquashedActor,
    guide_algorithms,
    suite,
)
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.reinforce import REINFORCE, unfinished
from steersman.rl.on_policy.trpo import TRPO
from steersman.rl.on_policy.vmpo import VMPO
from steersman.rl.surrogates import SurrogateInputs, Unclipped
from steersman.training import train
from steersman.training.experience import Experience
from steersman.training.report import ComparisonResult, SystemResult

SMALL = {"num_envs": 4, "num_steps": 16, "hidden": (8,), "learning_rate": 1e-2}


def collected(algorithm, problem, seed=0):
    state = algorithm.init(problem, jax.random.key(seed))
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), jax.random.key(seed + 1))
    experience, _, _ = jax.jit(lambda s, r: algorithm.collector.collect(problem, algorithm.behaviour(s), r))(
        state, rollout
    )
    return state, experience


@pytest.fixture(scope="module")
def cart_pole():
    return collected(A2C(**SMALL), Problem(DiscreteCartPole()))


@pytest.fixture(scope="module")
def pendulum():
    return collected(VMPO(**SMALL, architecture=SquashedActor((8,))), Problem(Pendulum().environment()))


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def returns_by_hand(reward, ends, gamma):
    """Discounted return to go of each step, cut where an episode or the batch ends, by the definition's double sum."""
    steps, envs = reward.shape
    found = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            for k in range(t, steps):
                found[t, n] += gamma ** (k - t) * reward[k, n]
                if ends[k, n]:
                    break
    return found


def test_reinforce_takes_one_adam_step_along_scores_weighed_with_returns(cart_pole):
    _, experience = cart_pole
    # Episodes that terminate and that are cut, at different times.
    terminated = jnp.zeros((16, 4), bool).at[5, 0].set(True).at[9, 2].set(True)
    truncated = jnp.zeros((16, 4), bool).at[7, 1].set(True).at[15, 3].set(True)
    experience = Experience(**{**vars(experience), "terminated": terminated, "truncated": truncated})
    algorithm = REINFORCE(**SMALL, gamma=0.9, max_gradient_norm=1e9)
    state = algorithm.init(Problem(DiscreteCartPole()), jax.random.key(0))
    after, metrics = jax.jit(lambda s, e: algorithm.update(s, e))(state, experience)
    assert jax.tree.leaves(state.critic) == []
    weight = returns_by_hand(np.asarray(experience.reward), np.asarray(terminated | truncated), 0.9).reshape(-1) / 64
    observation, action = (jnp.asarray(x).reshape(64, -1) for x in (experience.observation, experience.record.action))

    @jax.jit
    def score(network):
        log_prob = jax.nn.log_softmax(network.trunk(observation))
        return -jnp.sum(weight * jnp.take_along_axis(log_prob, action, axis=1)[:, 0])

    gradient = flat(jax.grad(score)(state.actor.network))
    adam = optax.adam(1e-2, eps=1e-5)
    step = np.asarray(adam.update(gradient, adam.init(gradient))[0])
    np.testing.assert_allclose(flat(after.actor.network) - flat(state.actor.network), step, atol=2e-5)
    # Environments 0 and 2 end within the batch and begin again, 1 too, 3 ends with the batch.
    np.testing.assert_array_equal(np.asarray(unfinished(experience)).sum(axis=0), [10, 8, 6, 0])
    assert float(metrics["unfinished"]) == pytest.approx(24 / 64)


def test_a2c_on_one_minibatch_is_ppo_without_a_clip(cart_pole):
    """The same update."""
    state, experience = cart_pole
    settings = {**SMALL, "minibatches": 1, "entropy_coefficient": 0.01}
    once = A2C(**settings)
    after, metrics = jax.jit(lambda s, e: once.update(s, e))(state, experience)
    unclipped = PPO(**settings, epochs=1, surrogate=Unclipped())
    expected, _ = jax.jit(lambda s, e: unclipped.update(s, e))(state, experience)
    np.testing.assert_allclose(flat(after.learned), flat(expected.learned), atol=2e-6)
    assert float(metrics["kl"]) > 0


def test_limits_of_the_temperature_are_cloning_and_the_best_sample(cart_pole):
    """On the gradient of the whole loss."""
    state, experience = cart_pole
    algorithm = VMPO(**SMALL, minibatches=1, value_coefficient=0.0)
    rows = in_rows(state.actor, jax.jit(lambda s, e: algorithm.estimate(s, e))(state, experience)[0])

    @jax.jit
    def gradient(learned, duals):
        # At the old policy the divergence has no gradient, so what is left is the weighted likelihood.
        return jax.grad(lambda learned: algorithm.loss(learned, state, rows, duals)[0])(learned)

    @jax.jit
    def by_hand(network, weight):
        def loss(network):
            log_prob = jax.nn.log_softmax(network.trunk(rows.features.vector))
            return -jnp.sum(weight * jnp.take_along_axis(log_prob, rows.action[:, None], axis=1)[:, 0])

        return jax.grad(loss)(network)

    advantage = np.asarray(rows.advantage)
    for temperature, chosen in ((1e6, advantage >= np.median(advantage)), (1e-6, advantage == advantage.max())):
        found = gradient(state.learned, WeightedLikelihood(initial_temperature=temperature).init())
        expected = by_hand(state.actor.network, jnp.asarray(chosen / chosen.sum(), jnp.float32))
        np.testing.assert_allclose(flat(found.network), flat(expected), rtol=1e-3, atol=1e-5)


def integrated_divergence(old, new):
    """KL of two normal distributions, each given by mean and deviation, by quadrature."""

    def log_density(x, mean, std):
        return -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))

    def integrand(x):
        return np.exp(log_density(x, *old)) * (log_density(x, *old) - log_density(x, *new))

    return scipy.integrate.quad(integrand, old[0] - 12 * old[1], old[0] + 12 * old[1], limit=200)[0]


def test_parts_of_a_gaussians_divergence_are_divergences():
    """Each part is the divergence that remains when the other parameter is the old one's."""
    head, old, new = DiagonalGaussian((2,)), ([0.3, -1.0], [0.5, 2.0]), ([0.7, -0.4], [0.8, 1.1])
    with jax.enable_x64(True):
        parameters = [GaussianParameters(jnp.asarray(m), jnp.log(jnp.asarray(s))) for m, s in (old, new)]
        mean, covariance = head.kl_parts(*parameters)
        halves = (
            parameters[0]._replace(mean=parameters[1].mean),
            parameters[0]._replace(log_std=parameters[1].log_std),
        )
        by_quadrature = [
            sum(integrated_divergence((old[0][i], old[1][i]), (new[0][i], old[1][i])) for i in range(2)),
            sum(integrated_divergence((old[0][i], old[1][i]), (old[0][i], new[1][i])) for i in range(2)),
        ]
        np.testing.assert_allclose([mean, covariance], by_quadrature, rtol=1e-8)
        for half in halves:
            np.testing.assert_allclose(
                sum(head.kl_parts(parameters[0], half)), head.kl(parameters[0], half), rtol=1e-12
            )
        assert [float(part) for part in head.kl_parts(parameters[0], parameters[0])] == [0.0, 0.0]
        assert float(mean) > 0
        assert float(covariance) > 0


def test_the_divergence_is_from_the_policy_that_collected_the_batch(pendulum):
    """After a step it is positive and pulls; from the policy itself it is neither."""
    state, experience = pendulum
    algorithm = VMPO(**SMALL, architecture=SquashedActor((8,)), epochs=1, minibatches=1)
    after, metrics = jax.jit(lambda s, e: algorithm.update(s, e))(state, experience)
    assert float(metrics["kl"]) > 1e-6
    rows = in_rows(state.actor, jax.jit(lambda s, e: algorithm.estimate(s, e))(state, experience)[0])
    learned = after.learned

    def pull(rows):
        """Gradient of the terms with a multiplier: what is left when the weighted likelihood is taken off."""

        def loss(learned, multiplier):
            bound = Bound(0.01, multiplier)
            surrogate = WeightedLikelihood(divergence=bound, mean=bound, covariance=bound)
            return samples(state.with_learned(learned).actor, rows).loss(surrogate, surrogate.init())

        with_bound, without = (jax.grad(loss)(learned, multiplier) for multiplier in (1.0, 1e-12))
        return jnp.max(jnp.abs(flat(with_bound.network) - flat(without.network)))

    pull = jax.jit(pull)
    assert float(pull(rows)) > 1e-3
    current = state.with_learned(learned).actor.from_features(rows.features, rows.carry)[0]
    assert float(pull(rows._replace(parameters=current))) < 1e-6


def test_temperature_and_multipliers_follow_their_duals():
    surrogate = WeightedLikelihood(dual_learning_rate=0.1)
    state = surrogate.init()
    advantage = jnp.asarray([3.0, 1.0, -1.0, -2.0])
    zeros = jnp.zeros(4)

    @jax.jit
    def learn(state, mean, covariance):
        inputs = SurrogateInputs(zeros, zeros, zeros, (jnp.full(4, mean), jnp.full(4, covariance)))
        return surrogate.learn(zeros, advantage, inputs, state)

    # At temperature one the weights of 3 and 1 are 0.881 and 0.119: a divergence of 0.328, more than the 0.01 allowed.
    after = learn(state, 0.02, 1e-5)
    assert float(after.temperature.value) == pytest.approx(1.1, rel=1e-4)
    assert float(after.mean.value) == pytest.approx(1.1, rel=1e-4)
    assert float(after.covariance.value) == pytest.approx(0.9, rel=1e-4)
    assert float(after.divergence.value) == 5.0
    for _ in range(40):
        after = learn(after, 0.0, 0.0)
    assert float(after.mean.value) == pytest.approx(1e-8)
    assert float(after.covariance.value) == pytest.approx(1e-8)
    names = {"temperature", "divergence_multiplier", "mean_multiplier", "covariance_multiplier"}
    assert set(surrogate.metrics(after)) == names
    assert float(surrogate.penalty(after)) == 5.0


def test_equal_advantages_copy_what_was_done():
    surrogate = WeightedLikelihood()
    log_prob = jnp.asarray([-1.0, -2.0, -3.0])
    inputs = SurrogateInputs(jnp.zeros(3), log_prob, jnp.zeros(3), (jnp.zeros(3),))
    loss = surrogate(jnp.zeros(3), jnp.full(3, 7.0), inputs, surrogate.init())
    np.testing.assert_allclose(jnp.mean(loss), 2.0, rtol=1e-6)


def test_squashed_densities_integrate_to_one_and_stay_finite_far_out():
    """Over the squashed action itself."""
    with jax.enable_x64(True):
        head = SoftplusTanhGaussian((1,), (-2.0,), (2.0,), state_dependent_std=True)
        parameters = head.from_output(jnp.asarray([0.4, 0.3]), jnp.zeros(0))
        assert float(jnp.exp(parameters.log_std[0])) == pytest.approx(np.log1p(np.exp(0.3)) + 0.001)
        edges = np.linspace(-1, 1, 400_001)
        middle = 0.5 * (edges[1:] + edges[:-1])
        log_prob = jax.jit(lambda u: head.log_prob(parameters, jnp.arctanh(u)[:, None]))(jnp.asarray(middle))
        assert float(np.sum(np.exp(np.asarray(log_prob))) * (edges[1] - edges[0])) == pytest.approx(1.0, abs=1e-4)
    for far in (-10.0, 10.0):
        value, slope = jax.value_and_grad(
            lambda mean, far=far: head.log_prob(GaussianParameters(mean, jnp.zeros(1)), jnp.asarray([far]))
        )(jnp.zeros(1))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_actions_are_kept_before_squashing(pendulum):
    state, experience = pendulum
    assert isinstance(state.actor.head, SoftplusTanhGaussian)
    np.testing.assert_allclose(experience.action, 2.0 * np.tanh(experience.record.action), atol=1e-5)
    assert float(jnp.abs(experience.record.action).max()) > 1.0
    assert np.isfinite(experience.record.log_prob).all()
    # Spaces that are not bounded on all sides, or discrete, keep their usual head.
    preprocess = Preprocess(layout(gymnasium.spaces.Box(-1.0, 1.0, (3,))))
    half_open = gymnasium.spaces.Box(np.array([0.0, -np.inf]), np.array([1.0, 1.0]), dtype=np.float64)
    for space in (half_open, gymnasium.spaces.Discrete(3)):
        actor = SquashedActor((8,)).make(preprocess, head_for(space), initial_log_std=-0.5, key=jax.random.key(0))
        assert type(actor.head) is type(head_for(space))


def test_next_target_advantages_by_hand():
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 12, 2))
    next_value[:-1] = value[1:]
    terminated, truncated = np.zeros((12, 2), bool), np.zeros((12, 2), bool)
    terminated[3, 0] = truncated[6, 1] = truncated[3, 0] = True
    next_value[6, 1] = 0.7  # what was seen before the restart
    gamma, lam, expected = 0.9, 0.8, np.zeros((12, 2))
    for n in range(2):
        advantage = 0.0
        for t in reversed(range(12)):
            ends = terminated[t, n] or truncated[t, n]
            error = reward[t, n] + gamma * (not terminated[t, n]) * next_value[t, n] - value[t, n]
            expected[t, n] = error + gamma * (0.0 if ends else advantage)
            advantage = error + gamma * lam * (0.0 if ends else advantage)
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x) for x in (reward, value, next_value, terminated, truncated))
        outcome = Outcome(*arrays, scale=lambda x: x, experience=None)  # pyright: ignore[reportArgumentType]
        found, target = NextTargetCritic().estimate(None, (), outcome, gamma, lam)
        same, _ = NextTargetCritic().estimate(None, (), outcome, gamma, 1.0)
        plain, expected_target = super(NextTargetCritic, NextTargetCritic()).estimate(None, (), outcome, gamma, 1.0)
        np.testing.assert_allclose(same, plain, atol=1e-12)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert target.shape == expected_target.shape


def test_vmpo_learns_cart_pole_within_its_bound():
    algorithm = VMPO(num_envs=16, num_steps=64, minibatches=4, epochs=4, learning_rate=3e-3)
    trained = train(algorithm, Problem(DiscreteCartPole()), iterations=30)
    first, last = np.nanmean(trained.returns[:3]), np.nanmean(trained.returns[-3:])
    assert last > first + 40, (first, last)
    assert float(np.mean(trained.metrics["kl"])) < 0.05
    assert np.all(trained.metrics["temperature"] > 0)


def test_guide_settings_are_the_tables():
    found: dict[str, Any] = dict(guide_algorithms(8_000_000))
    assert list(found) == ["reinforce", "a2c", "trpo", "ppo", "vmpo"]
    sizes = [(a.num_envs, a.num_steps) for a in found.values()]
    assert sizes == [(1, 2048)] + [(8, 2048)] * 4
    for algorithm in found.values():
        assert algorithm.normalize_observations
        assert algorithm.normalize_rewards
        assert algorithm.architecture.hidden == (32,) * 4
        assert algorithm.hidden == (256,) * 5
        assert float(algorithm.gamma) == pytest.approx(0.99)
    ppo, vmpo, trpo = found["ppo"], found["vmpo"], found["trpo"]
    assert isinstance(trpo, TRPO)
    assert (ppo.epochs, ppo.minibatches, vmpo.epochs, found["a2c"].epochs) == (10, 8, 10, 1)
    assert (vmpo.normalize_advantages, ppo.normalize_advantages) == (False, True)
    assert float(ppo.learning_rate(jnp.uint32(8_000_000))) == pytest.approx(3e-6, rel=1e-4)
    assert float(vmpo.surrogate.covariance.epsilon) == pytest.approx(5e-5)


def test_suite_trains_all_five_with_what_is_shared(monkeypatch):
    seen: dict[str, Any] = {}

    def compare(contestants, problem, **options):
        seen.update(contestants=contestants, problem=problem, options=options)
        return ComparisonResult("cart-pole", {"ppo": one}, {}, "")

    one = SystemResult("ppo", "", np.zeros(1), np.zeros(1), np.zeros((1, 1)), {}, 0.0, None, "")
    monkeypatch.setattr(guide, "compare", compare)
    suite(
        "cartpole-discrete",
        steps=1000,
        seeds=2,
        shared={"hidden": (16,), "architecture": None},
        settings={"ppo": {"surrogate.epsilon": 0.1, "hidden": (4,)}, "reinforce": {"num_steps": 500}},
    )
    found = seen["contestants"]
    assert [found[name].hidden for name in found] == [(16,), (16,), (16,), (4,), (16,)]
    assert all(algorithm.architecture is None for algorithm in found.values())
    assert float(found["ppo"].surrogate.epsilon) == pytest.approx(0.1)
    assert found["reinforce"].num_steps == 500
    assert seen["options"]["steps"] == 1000
    assert seen["options"]["seeds"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightedLikelihood(initial_temperature=0.0), r"initial_temperature is 0\.0"),
        (lambda: WeightedLikelihood(temperature_epsilon=-1.0), "temperature_epsilon is -1"),
        (lambda: WeightedLikelihood(dual_learning_rate=0.0), r"dual_learning_rate is 0\.0"),
        (lambda: Bound(0.0), r"epsilon is 0\.0"),
        (lambda: Bound(0.01, 0.0), r"initial_multiplier is 0\.0"),
        (lambda: VMPO(minibatches=7), r"minibatches is 7.*divisor of num_envs \* num_steps = 2048"),
        (lambda: guide_algorithms(0), "steps is 0"),
        (lambda: suite("pendulum-swingup", steps=10, settings={"vmp": {}}), "Unknown method 'vmp'.*'vmpo'"),
        (lambda: suite("pendulum-swingup", steps=10, shared={"hiden": (4,)}), "Unknown hyperparameter 'hiden'.*hidden"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_missing_parameters_of_the_old_policy_are_named():
    surrogate, zeros = WeightedLikelihood(), jnp.zeros(3)
    for parts in ((), (zeros, zeros, zeros)):
        with pytest.raises(InputError, match=rf"kl_parts has {len(parts)} parts"):
            surrogate(zeros, zeros, SurrogateInputs(zeros, zeros, zeros, parts), surrogate.init())


def test_no_samples_are_named():
    surrogate, nothing = WeightedLikelihood(), jnp.zeros(0)
    with pytest.raises(InputError, match=r"advantage has shape \(0,\)"):
        surrogate(nothing, nothing, SurrogateInputs(nothing, nothing, nothing, (nothing,)), surrogate.init())
