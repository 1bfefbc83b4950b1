import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from steersman.diffusion import NetworkDenoiser, RectifiedFlow, sample
from steersman.diffusion.cloning import MLPRecipe
from steersman.diffusion.flow_policy import FlowArchitecture, FlowSample
from steersman.diffusion.fpo import FPO, LimitedRatio
from steersman.diffusion.samplers import FlowSolver
from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole
from steersman.envs.planar import HiddenTarget, TwoWalls, hidden_target_success, hidden_target_value
from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError
from steersman.policies import Preprocess, head_for
from steersman.rl.fix_up import FixUp
from steersman.rl.on_policy.actor_critic import in_rows, samples
from steersman.rl.on_policy.first_order import FirstOrder, _standardized
from steersman.rl.on_policy.ppo_ewma import MovingAverageReference
from steersman.rl.surrogates import Clip, LearnedKL, QuadraticRatio
from steersman.training import Linear, train

RECIPE = MLPRecipe(RectifiedFlow(), "flow", (8,), time_size=4, output_scale=0.25)
FLOW = FlowArchitecture(RECIPE, sampler=FlowSolver(3), pairs=4)
SMALL = {"num_envs": 8, "num_steps": 2, "hidden": (4,), "epochs": 1, "minibatches": 2, "normalize_observations": False}


class Exact(eqx.Module):
    """The optimal prediction of the noise where actions are normal."""

    mean: jax.Array
    std: jax.Array

    def __call__(self, x, time, condition):
        return time * (x - (1 - time) * self.mean) / ((1 - time) ** 2 * self.std**2 + time**2)


class Identity(eqx.Module):
    factor: jax.Array

    def __call__(self, x, time, condition):
        return self.factor * x


def flow_policy(network, prediction="noise", **options):
    problem = Problem(HiddenTarget())
    denoiser = NetworkDenoiser(network, RectifiedFlow(), (1, 1), prediction)
    made = FlowArchitecture(denoiser=denoiser, **options)
    preprocess, head = Preprocess(layout(problem.observation_space)), head_for(problem.action_space)
    return made.make(preprocess, head, initial_log_std=0.0, key=jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    """A fresh batch, in rows, of a grid whose actions are bounded."""
    algorithm = FPO(architecture=FLOW, **SMALL)
    problem = Problem(TwoWalls())
    state = algorithm.init(problem, jax.random.key(0))
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), jax.random.key(1))
    experience = eqx.filter_jit(algorithm.collector.collect)(problem, algorithm.behaviour(state), rollout)[0]
    rows = in_rows(state.actor, eqx.filter_jit(algorithm.estimate)(state, experience)[0])
    advantage = jax.random.normal(jax.random.key(2), rows.advantage.shape)
    return algorithm, state, experience, rows._replace(advantage=advantage)


def explicit_losses(network, rows):
    """The flow's error as noise, ``e - (x + (1 - t) u)``, written out."""
    denoiser = network.denoiser

    def one(vector, drawn):
        def pair(e, t):
            x = t * e + (1 - t) * drawn.action
            u = 0.25 * denoiser.network(x, t, vector)
            return jnp.mean((e - (x + (1 - t) * u)) ** 2)

        return jnp.mean(jax.vmap(pair)(drawn.noise, drawn.level))

    return jax.vmap(one)(rows.features.vector, rows.action)


def gradient_of(algorithm, state, rows):
    def policy_loss(learned):
        return samples(state.with_learned(learned).actor, rows).loss(algorithm.surrogate, ())

    return jax.jit(jax.value_and_grad(policy_loss))(state.learned)[1].network


def test_the_first_gradient_is_that_of_the_advantage_weighted_flow_matching_loss(batch):
    """Oracle 1."""
    algorithm, state, _, rows = batch
    fresh = samples(state.actor, rows)
    np.testing.assert_allclose(fresh.log_ratio, 0.0, atol=1e-6)
    np.testing.assert_allclose(fresh.inputs.kl, 0.0, atol=1e-6)
    explicit = jax.jit(jax.grad(lambda n: jnp.mean(rows.advantage * explicit_losses(n, rows))))(state.actor.network)
    ours = gradient_of(algorithm, state, rows)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(explicit), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ours)) > 1e-4


def test_advantages_of_zero_leave_the_actor_and_a_good_action_loses_loss(batch):
    """Oracle 4."""
    algorithm, state, _, rows = batch
    nothing = gradient_of(algorithm, state, rows._replace(advantage=jnp.zeros_like(rows.advantage)))
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(nothing))
    one = rows._replace(advantage=jnp.zeros_like(rows.advantage).at[3].set(1.0))
    step = jax.tree.map(lambda p, g: p - 0.01 * g, state.actor.network, gradient_of(algorithm, state, one))
    assert float(explicit_losses(step, rows)[3]) < float(explicit_losses(state.actor.network, rows)[3])


@pytest.mark.parametrize(("std", "exact", "unweighted"), [(0.7, -0.0510204, -0.010715), (0.4, -0.526453, -0.095941)])
def test_weighted_loss_differences_are_exact_likelihood_ratios(std, exact, unweighted):
    """Oracle 2: integrals over level and noise by Gauss quadrature."""
    t, of_t = np.polynomial.legendre.leggauss(60)
    t, of_t = 0.5 * (t + 1), 0.5 * of_t
    e, of_e = np.polynomial.hermite_e.hermegauss(8)
    level, noise = (part.ravel() for part in np.meshgrid(t, e, indexing="ij"))
    weight = np.outer(of_t, of_e / of_e.sum()).ravel()
    drawn = FlowSample(jnp.full((1, 1), 0.3), jnp.asarray(noise)[:, None, None], jnp.asarray(level))
    first = flow_policy(Exact(jnp.asarray(0.0), jnp.asarray(0.7)))
    second = flow_policy(Exact(jnp.asarray(0.5), jnp.asarray(std)))
    gap = np.asarray(second.losses(jnp.ones(1), drawn) - first.losses(jnp.ones(1), drawn), np.float64)
    log_p = [-0.5 * ((0.3 - m) / s) ** 2 - np.log(s) for m, s in ((0.0, 0.7), (0.5, std))]
    assert log_p[0] - log_p[1] == pytest.approx(exact, abs=1e-6)
    assert float(np.sum(weight * gap / (level * (1 - level)))) == pytest.approx(exact, abs=2e-4)
    assert float(np.sum(weight * gap)) == pytest.approx(unweighted, abs=2e-5)


def test_ratios_of_pairs_average_above_the_ratio_of_averages(batch):
    """Oracle 3, and the loss of single pairs against numbers."""
    _, state, _, rows = batch
    moved = jax.tree.map(lambda leaf: 1.3 * leaf, state.learned)
    whole = samples(state.with_learned(moved).actor, rows)
    old, new = rows.parameters, jax.vmap(state.with_learned(moved).actor.losses)(rows.features.vector, rows.action)
    pairs = np.asarray(old - new)
    np.testing.assert_allclose(whole.log_ratio, pairs.mean(axis=1), atol=1e-6)
    assert (np.exp(pairs).mean(axis=1) >= np.exp(np.asarray(whole.log_ratio)) - 1e-6).all()
    shared = rows.advantage[:, None]
    terms = LimitedRatio(Clip(0.05), limit=0.1)(jnp.asarray(pairs), shared, whole.inputs, ())
    ratio, advantage = np.exp(np.clip(pairs, -0.1, 0.1)), np.asarray(shared)
    np.testing.assert_allclose(terms, -np.minimum(ratio * advantage, np.clip(ratio, 0.95, 1.05) * advantage), rtol=1e-5)


def test_pairs_of_their_own_share_the_advantage_and_what_is_known_of_the_action(batch):
    """In one loop with any surrogate and reference: the divergence stays that of the action, for each of its pairs."""
    _, state, _, rows = batch
    head = dataclasses.replace(state.actor.head, per_pair=True)
    each = eqx.tree_at(lambda s: s.actor.head, state, head)
    moved = jax.tree.map(lambda leaf: 1.3 * leaf, state.learned)
    apart = samples(each.with_learned(moved).actor, rows._replace(log_prob=-rows.parameters))
    whole = samples(state.with_learned(moved).actor, rows)
    assert apart.log_ratio.shape == apart.inputs.kl.shape == apart.inputs.entropy.shape == (16, 4)
    np.testing.assert_allclose(apart.log_ratio.mean(axis=1), whole.log_ratio, atol=1e-5)
    np.testing.assert_allclose(apart.inputs.kl, np.repeat(whole.inputs.kl[:, None], 4, axis=1), atol=1e-6)
    pairs = FlowArchitecture(RECIPE, sampler=FlowSolver(3), pairs=4, per_pair=True)
    algorithm = FPO(
        architecture=pairs, surrogate=LimitedRatio(LearnedKL(bound=0.1)), reference=MovingAverageReference(), **SMALL
    )
    trained = train(algorithm, HiddenTarget(), iterations=1)
    assert all(np.isfinite(value).all() for name, value in trained.metrics.items() if name != "episode_return")


def test_exact_scores_of_the_hidden_target():
    """Oracle 5, by enumeration of the tries."""
    q = np.asarray([0.5, 0.5])
    alive, success, value = 1.0, 0.0, 0.0
    for tried in range(10):
        success, value, alive = success + alive * 0.5, value + 0.9**tried * alive * 0.5, alive * 0.5
    assert float(hidden_target_success(q)) == pytest.approx(success) == pytest.approx(0.99902, abs=1e-5)
    assert float(hidden_target_value(q, discount=0.9)) == pytest.approx(value) == pytest.approx(0.90878, abs=1e-4)


def test_samplers_may_differ_and_losses_do_not_know():
    """Oracle 6: the flow u = x has the map x_0 = x_1 / e."""
    policy = flow_policy(Identity(jnp.asarray(1.0)), "flow")
    ends = [
        float(sample(policy.denoiser, FlowSolver(n), jnp.ones(1), None, start=jnp.ones((1, 1))).chunk[0, 0])
        for n in (10, 40)
    ]
    np.testing.assert_allclose(ends, [0.348678, 0.363232], atol=1e-6)
    output = policy.denoiser.output
    solved = solve_ivp(
        lambda t, x: np.asarray(output(jnp.asarray(x)[None], jnp.asarray(t), jnp.ones(1)))[0], (1, 0), [1.0], rtol=1e-6
    )
    assert solved.y[0, -1] == pytest.approx(0.367879, abs=1e-5)
    other = eqx.tree_at(lambda p: p.sampler, policy, FlowSolver(3))
    _, _, record = policy.act(jnp.ones(1), (), jax.random.key(0))
    np.testing.assert_allclose(other.losses(jnp.ones(1), record.action), record.parameters, rtol=1e-6)
    action, _ = policy(jnp.ones(1), (), jax.random.key(0))
    np.testing.assert_allclose(action, record.action.action[0], rtol=1e-6)
    assert float(policy.mode()(jnp.ones(1), (), jax.random.key(0))[0][0]) == 0.0


def test_actions_are_learned_from_as_they_were_before_squashing(batch):
    algorithm, state, experience, rows = batch
    np.testing.assert_allclose(
        experience.action.reshape(-1, 2), np.tanh(np.asarray(rows.action.action)[:, 0]), rtol=1e-5, atol=1e-6
    )
    squashed = eqx.tree_at(lambda x: x.action, experience, jnp.full_like(experience.action, jnp.nan))
    again = eqx.filter_jit(algorithm.estimate)(state, squashed)[0]
    assert bool(jnp.isfinite(again.advantage).all())
    assert np.array_equal(again.action.action.reshape(-1, 1, 2), rows.action.action)


def test_any_surrogate_and_phase_of_the_family_fit():
    """SPO's penalty with FixPO's second phase on a flow policy: the estimated divergence stays within the bound."""
    algorithm = FirstOrder(
        architecture=FLOW,
        surrogate=QuadraticRatio(0.2),
        phase=FixUp(bound=1e-3, max_steps=20, rows=16),
        reference=MovingAverageReference(0.9),
        **{**SMALL, "epochs": 4, "learning_rate": 3e-2},
    )
    trained = train(algorithm, HiddenTarget(), iterations=2)
    assert trained.metrics["max_kl"].max() <= 1e-3
    assert trained.metrics["fix_up_steps"].sum() > 0
    assert np.isfinite(trained.metrics["policy_loss"]).all()


def test_bad_input(batch):
    algorithm, state, experience, rows = batch
    with pytest.raises(InputError, match="pairs is 0"):
        FlowArchitecture(pairs=0)
    with pytest.raises(InputError, match="Unknown prediction 'nois'"):
        FlowArchitecture(supervise="nois")
    with pytest.raises(InputError, match="size is 7"):
        MLPRecipe(time_size=7).make(jnp.zeros(1), (1, 1), jax.random.key(0))
    with pytest.raises(InputTypeError, match="action space has a Categorical"):
        FPO(architecture=FLOW, **SMALL).init(Problem(DiscreteCartPole()), jax.random.key(0))
    with pytest.raises(InputError, match="minibatches is 3"):
        FPO(architecture=FLOW, **{**SMALL, "minibatches": 3})
    with pytest.raises(InputTypeError, match="architecture is None"):
        FPO(architecture=None)
    for weight in (0.01, Linear(0.01, 0.0, 100)):
        with pytest.raises(InputError, match="entropy_coefficient"):
            FPO(entropy_coefficient=weight)
    with pytest.raises(InputError, match="limit is 0"):
        LimitedRatio(limit=0.0)
    drawn = FlowSample(jnp.zeros((1, 1)), jnp.zeros((2, 1, 1)), jnp.asarray([0.5, 1.5]))
    with pytest.raises(InputError, match="level is"):
        flow_policy(Identity(jnp.asarray(1.0)), "flow").losses(jnp.ones(1), drawn)
    wide = NetworkDenoiser(Identity(jnp.asarray(1.0)), RectifiedFlow(), (1, 2), "flow")
    with pytest.raises(InputError, match=r"denoiser.chunk_shape"):
        FPO(architecture=FlowArchitecture(denoiser=wide), **SMALL).init(Problem(HiddenTarget()), jax.random.key(0))
    with pytest.raises(InputError, match=r"experience.record.action is a"):
        samples(state.actor, rows._replace(action=rows.action.action))
    with pytest.raises(InputError, match=r"experience.record"):
        algorithm.estimate(state, eqx.tree_at(lambda x: x.record, experience, ()))
    with pytest.raises(InputTypeError, match="Fisher information"):
        state.actor.head.fisher_product(rows.parameters, rows.parameters)


def test_equal_advantages_do_no_harm(batch):
    rows = batch[3]
    flat = _standardized(rows._replace(advantage=jnp.full_like(rows.advantage, 2.0)))
    assert np.array_equal(flat.advantage, np.zeros_like(flat.advantage))
