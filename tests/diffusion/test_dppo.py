"""DPPO against exact gradients of a linear chain, Gaussian PPO, and samplers run by hand."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from scipy import stats

from steersman import objectives
from steersman.diffusion import (
    DDIM,
    DDPM,
    ChunkGenerator,
    DiscreteVP,
    DPMSolver,
    Mixture,
    MixtureDenoiser,
    NetworkDenoiser,
    sample,
)
from steersman.diffusion.denoising_chain import ChainHead, DenoisingChains, Transitions
from steersman.diffusion.dppo import DPPO, DenoisingClip, DenoisingDiscount
from steersman.diffusion.samplers import StochasticSampler
from steersman.diffusion.scaling import Scaling
from steersman.envs import ChunkedEnvironment, ObstacleGate, Problem
from steersman.errors import InputError, InputTypeError, NonFiniteError
from steersman.networks import MLPDenoiser
from steersman.policies import Architecture
from steersman.policies.preprocessing import Features
from steersman.policies.storage import load_policy, save_policy
from steersman.rl.advantage_scales import ClippedAdvantages
from steersman.rl.fix_up import FixUp
from steersman.rl.imitation import Imitation
from steersman.rl.on_policy.actor_critic import samples
from steersman.rl.references import MovingAverageReference
from steersman.rl.surrogates import LearnedKL, QuadraticRatio, Score, SurrogateInputs, Unclipped
from steersman.training import train

SMALL = {"num_envs": 8, "num_steps": 3, "hidden": (8,), "activation": "tanh", "epochs": 1, "minibatches": 2}


class Line(eqx.Module):
    """The network ``th x + b``."""

    th: Float[Array, ""]
    b: Float[Array, ""]

    def __call__(self, x, time, condition):
        return self.th * x + self.b


class Direct(StochasticSampler):
    """Every step's mean is the predicted sample itself."""

    steps: int | None = eqx.field(static=True, default=None)
    limit: float | None = eqx.field(static=True, default=None)
    std_bounds: tuple[float, float] | None = eqx.field(static=True, default=None)
    noise_limit: float | None = eqx.field(static=True, default=None)

    def transition(self, predict, process, x, current, following):
        return predict(x, current).sample, jnp.zeros(())


def problem(rows=2):
    return Problem(ChunkedEnvironment(ObstacleGate(), rows))


def gate_generator(levels=4, rows=3, sampler=None):
    network = MLPDenoiser((rows, 2), 2, (8,), time_size=4, longest_time=float(levels), key=jax.random.key(3))
    denoiser = NetworkDenoiser(network, DiscreteVP.squared_cosine(levels), (rows, 2))
    return ChunkGenerator(denoiser, DDPM() if sampler is None else sampler)


def chain_policy(generator, space=None, **slots):
    chains = DenoisingChains(generator, **slots)
    return DPPO(architecture=chains, **SMALL).init_networks(problem() if space is None else space, jax.random.key(0))[0]


def test_the_policy_gradient_of_a_linear_chain_is_exact():
    """Oracle 1: reward -(x0 - 1)^2 on x1 = th x2 + b + s z, x0 = th x1 + b + s z, at th .5, b .2, s .3."""
    denoiser = NetworkDenoiser(Line(jnp.asarray(0.5), jnp.asarray(0.2)), DiscreteVP.linear(2), (1, 1), "sample")
    chains = DenoisingChains(
        ChunkGenerator(denoiser, Direct()),
        exploration_std=0.3,
        likelihood_std=0.3,
        noise_limit=None,
        log_prob_bounds=None,
    )
    from gymnasium import spaces

    from steersman.envs.spaces import layout
    from steersman.policies import Preprocess, head_for

    head = head_for(spaces.Box(-np.inf, np.inf, (1, 1), np.float32))
    policy = chains.make(Preprocess(layout(spaces.Box(-1, 1, (1,)))), head, initial_log_std=0.0, key=jax.random.key(0))
    count = 400_000
    surrogate = DenoisingDiscount(Score(), 0.6)

    @jax.jit
    def gradients(keys):
        seen = jnp.zeros((count, 1))
        states = jax.vmap(policy.draw)(seen, keys)[0]
        reward = -((states[:, -1, 0, 0] - 1.0) ** 2)
        advantage = reward - jnp.mean(reward)

        def of_step(network, discounted):
            tried = eqx.tree_at(lambda p: p.network, policy, network)
            parameters = tried.parameters_for(Features(seen, None, seen), (), states)
            log_prob = tried.head.log_prob(parameters, states)
            if discounted:
                inputs = SurrogateInputs(jnp.zeros(()), log_prob, jnp.zeros(()))
                return -2.0 * jnp.mean(surrogate(log_prob, advantage, inputs, ()))
            return jnp.mean(log_prob * advantage[:, None], axis=0)

        each = jax.jacrev(lambda n: of_step(n, False))(policy.network).network
        shared = jax.grad(lambda n: of_step(n, True))(policy.network).network
        return each.th, each.b, shared.th, shared.b, jnp.std(states[:, 0])

    th, b, shared_th, shared_b, start = gradients(jax.random.split(jax.random.key(1), count))
    assert float(start) == pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(th, [-0.25, -0.06], atol=0.02)
    np.testing.assert_allclose(b, [0.70, 1.40], atol=0.02)
    assert float(shared_th) == pytest.approx(0.6 * -0.25 - 0.06, abs=0.02)
    assert float(shared_b) == pytest.approx(0.6 * 0.70 + 1.40, abs=0.02)


def test_densities_divergences_and_entropies_are_those_of_gaussians():
    """One step of one number, against SciPy; the mean over played rows otherwise."""
    head = ChainHead(Scaling.identity(), 1, 1)
    old, new = (Transitions(jnp.full((1, 3, 1), m), jnp.full(1, s)) for m, s in ((0.2, 0.3), (-0.1, 0.5)))
    chain = jnp.asarray([[[7.0], [7.0], [7.0]], [[9.0], [0.6], [9.0]]])
    assert head.log_prob(old, chain) == pytest.approx(stats.norm(0.2, 0.3).logpdf(0.6), abs=1e-5)
    assert head.log_prob(old, chain.at[1, 1].set(9.0)) == pytest.approx(-5.0)
    assert head.entropy(new) == pytest.approx(stats.norm(-0.1, 0.5).entropy(), abs=1e-5)
    kl = math.log(0.5 / 0.3) + (0.3**2 + 0.3**2) / (2 * 0.5**2) - 0.5
    assert head.kl(old, new) == pytest.approx(kl, abs=1e-6)
    joint = dataclasses.replace(head, rows=3, first_row=0, average=False, log_prob_bounds=None)
    expected = sum(stats.norm(0.2, 0.3).logpdf(x) for x in (9.0, 0.6, 9.0))
    assert joint.log_prob(old, chain) == pytest.approx(expected, rel=1e-5)
    wide = dataclasses.replace(joint, average=True)
    # The Fisher information of a normal distribution: 1 / s^2 for its mean, 2 / s^2 for its deviation.
    tangent = Transitions(jnp.asarray([[[1.0], [-2.0], [0.5]]]), jnp.asarray([0.7]))
    for of, share in ((joint, 1.0), (wide, 1.0 / 3.0)):
        found = of.fisher_product(old, tangent)
        np.testing.assert_allclose(found.mean, share * tangent.mean / 0.09, rtol=1e-5)
        np.testing.assert_allclose(found.std, share * 3 * 2.0 / 0.09 * 0.7, rtol=1e-5)
    np.testing.assert_allclose(head.fisher_product(old, tangent).mean[0, :, 0], [0.0, -2.0 / 0.09, 0.0], rtol=1e-5)


def test_a_chain_is_the_sampler_s_own_with_a_floor_under_its_noise():
    """Oracle 6: with untouched parameters the recorded part is the tail of the original's chain."""
    sampler = DDIM(eta=1.0, limited_noise=True)
    generator = gate_generator(sampler=sampler)
    policy, seen, key = chain_policy(generator, steps=2), jnp.asarray([0.3, -0.2]), jax.random.key(5)
    states, transitions = jax.jit(lambda seen, key: policy.draw(seen, key))(seen, key)
    start_key, noise_key = jax.random.split(key)
    floored = dataclasses.replace(sampler, std_bounds=(0.1, math.inf), noise_limit=3.0)
    chain = sample(
        generator.denoiser,
        floored,
        generator.encode(seen),
        None,
        start=jax.random.normal(start_key, (3, 2)),
        noises=jax.random.normal(noise_key, (4, 3, 2)),
    )
    np.testing.assert_allclose(states, chain.states[2:], atol=1e-5)
    np.testing.assert_allclose(transitions.mean, chain.mean[2:], atol=1e-5)
    np.testing.assert_allclose(transitions.std, chain.std[2:], atol=1e-6)
    # DDIM with eta 1 draws with the deviation of DDPM's posterior, worked out from the rates.
    signal = np.asarray(DiscreteVP.squared_cosine(4).signal, np.float64)
    beta = 1 - signal[1:] / signal[:-1]
    posterior = np.sqrt(beta * (1 - signal[:-1]) / (1 - signal[1:]))
    np.testing.assert_allclose(chain.std, np.maximum(posterior[::-1], 0.1), atol=1e-5)


def test_the_frozen_part_has_no_gradient_and_keeps_its_levels():
    """Oracle 6."""
    policy, seen = chain_policy(gate_generator(), steps=2), jnp.asarray([0.3, -0.2])
    states, _ = policy.draw(seen, jax.random.key(0))

    def total(source, network):
        tried = eqx.tree_at(lambda p: (p.source, p.network), policy, (source, network))
        parameters = tried.parameters_for(Features(seen, None, seen), (), states)
        return jnp.sum(tried.head.log_prob(parameters, states))

    def both(parts):
        return total(eqx.tree_at(lambda s: s.denoiser.network, policy.source, parts[0]), parts[1])

    frozen, tuned = jax.jit(jax.grad(both))((policy.source.denoiser.network, policy.network))
    assert all(float(jnp.max(jnp.abs(leaf))) == 0.0 for leaf in jax.tree.leaves(frozen))
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tuned)) > 0.0
    changed = eqx.tree_at(lambda p: p.network, policy, jax.tree.map(lambda leaf: leaf + 0.1, policy.network))
    mixed, original, x = changed.generator().denoiser, policy.source.denoiser, jnp.full((3, 2), 0.4)

    @jax.jit
    def noises():
        levels = jnp.arange(4)
        three = (mixed, original, changed.tuned().denoiser)
        return [jax.vmap(lambda k, d=d: d.predict(x, k, d.encode(seen)).noise)(levels) for d in three]

    found, before, after = noises()
    for k, expected in enumerate([after[0], after[1], before[2], before[3]]):
        np.testing.assert_allclose(found[k], expected, atol=1e-6)
    assert float(jnp.max(jnp.abs(after[3] - before[3]))) > 1e-3


def collected(algorithm, where):
    state = algorithm.init(where, jax.random.key(0))
    rollout = algorithm.collector.init(where, algorithm.behaviour(state), jax.random.key(1))
    return state, algorithm.collector.collect(where, algorithm.behaviour(state), rollout)[0]


@pytest.fixture(scope="module")
def batch():
    algorithm = DPPO(architecture=DenoisingChains(gate_generator(), steps=3), **SMALL)
    where = problem()

    @eqx.filter_jit
    def run():
        state, experience = collected(algorithm, where)
        estimate, scaler = algorithm.estimate(state, experience)
        rows, _, _ = algorithm.prepare(state, state.method, experience, estimate, scaler)
        return state, experience, rows

    return algorithm, *run()


def test_before_an_update_every_ratio_is_one(batch):
    """Oracle 3."""
    algorithm, state, experience, rows = batch
    assert rows.log_prob.shape == rows.advantage.shape == (24, 3)
    np.testing.assert_array_equal(rows.advantage[:, 0], rows.advantage[:, 2])
    assert experience.record.action.shape == (3, 8, 4, 3, 2)
    assert experience.action.shape == (3, 8, 2, 2)
    assert float(jnp.max(jnp.abs(experience.action))) <= 1.0
    drawn = jax.jit(lambda rows: samples(state.actor, rows))(rows)
    np.testing.assert_allclose(drawn.log_ratio, 0.0, atol=1e-5)
    np.testing.assert_allclose(drawn.inputs.kl, 0.0, atol=1e-5)
    expected = -np.mean(np.asarray(rows.advantage) * 0.99 ** np.asarray([2, 1, 0]))
    assert float(drawn.loss(algorithm.surrogate, ())) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(
        experience.action, np.clip(experience.record.action[..., -1, :2, :], -1.0, 1.0), atol=1e-6
    )


@pytest.mark.parametrize(
    "slots",
    [
        {"surrogate": DenoisingDiscount(LearnedKL(0.02, margin=2.0)), "phase": FixUp(rows=24, max_steps=4)},
        {"surrogate": QuadraticRatio(0.02), "reference": MovingAverageReference()},
    ],
    ids=["fixpo", "spo from a moving average"],
)
def test_other_methods_slots_work_on_a_diffusion_policy(batch, slots):
    """And two thresholds of the divergence: one that nothing exceeds, one that all but the first step do."""
    _, _, experience, _ = batch
    given = DenoisingChains(gate_generator(), steps=3)
    numbers = {**SMALL, "learning_rate": 3e-3}
    run = eqx.filter_jit(lambda a: a.update(a.init(problem(), jax.random.key(0)), experience))
    for target, steps in ((1e6, 2), (1e-12, 1)):
        state, metrics = run(DPPO(architecture=given, target_kl=target, **numbers, **slots))
        assert all(np.all(np.isfinite(value)) for value in metrics.values())
        if "phase" in slots:
            assert float(metrics["max_kl"]) <= 0.02
        elif target > 1.0:
            assert 0.0 < float(metrics["kl"]) < 1.0
        counts = [leaf for leaf in jax.tree.leaves(state.optimizer) if jnp.issubdtype(leaf.dtype, jnp.integer)]
        assert "phase" in slots or [int(count) for count in counts] == [steps]
        for kept, original in zip(jax.tree.leaves(state.actor.source), jax.tree.leaves(given.generator), strict=True):
            np.testing.assert_array_equal(kept, original)


def test_one_step_with_a_fixed_deviation_is_gaussian_ppo():
    """Oracle 2: loss and gradient of the same batch, with the Gaussian written out."""
    generator = gate_generator(levels=1, rows=1, sampler=Direct())
    slots = {"likelihood_std": 0.2, "exploration_std": 0.2, "log_prob_bounds": None}
    policy, seen = chain_policy(generator, problem(1), **slots), jnp.ones((16, 2))

    @jax.jit
    def both():
        states, _ = jax.vmap(policy.draw)(seen, jax.random.split(jax.random.key(2), 16))
        advantage = jax.random.normal(jax.random.key(3), (16,))

        def log_prob_of(network):
            tried = eqx.tree_at(lambda p: p.network, policy, network)
            return tried.head.log_prob(tried.parameters_for(Features(seen, None, seen), (), states), states)

        old = log_prob_of(policy.network)

        def ours(network):
            log_prob = log_prob_of(network)
            inputs = SurrogateInputs(jnp.zeros(()), log_prob, jnp.zeros(()))
            return jnp.mean(DenoisingDiscount(DenoisingClip(0.05, 0.001), 0.9)(log_prob - old, advantage, inputs, ()))

        def gaussian(network):
            denoiser = eqx.combine(network, generator.denoiser)

            def mean(x, seen):
                return denoiser.predict(x, jnp.asarray(0), denoiser.encode(seen)).sample

            log_prob = jax.scipy.stats.norm.logpdf(states[:, 1], jax.vmap(mean)(states[:, 0], seen), 0.2)
            return jnp.mean(objectives.clipped(jnp.mean(log_prob, axis=(1, 2)) - old[:, 0], advantage, 0.05))

        moved = jax.tree.map(lambda leaf: leaf * 1.01 + 0.001, policy.network)
        return [jax.value_and_grad(f)(moved) for f in (ours, gaussian)]

    (mine, d_mine), (theirs, d_theirs) = both()
    assert float(mine) == pytest.approx(float(theirs), abs=1e-5)
    for a, b in zip(jax.tree.leaves(d_mine), jax.tree.leaves(d_theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3)


def test_clip_widths_grow_and_discounts_weigh_the_last_step_most():
    """Oracle 5."""
    widths = np.asarray(DenoisingClip(0.1, 0.001, 3.0).widths(10))
    assert widths[0] == pytest.approx(0.001)
    assert widths[9] == pytest.approx(0.1)
    assert np.all(np.diff(widths) > 0)
    assert widths[4] == pytest.approx(0.001 + 0.099 * math.expm1(3 * 4 / 9) / math.expm1(3.0))
    assert DenoisingClip(0.1).widths(1) == pytest.approx(0.1)
    zeros, inputs = jnp.zeros((2, 3)), SurrogateInputs(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    advantage = jnp.asarray([1.0, -2.0])
    even = DenoisingDiscount(Unclipped(), 1.0)(zeros, advantage, inputs, ())
    np.testing.assert_allclose(even, -np.repeat(np.asarray(advantage)[:, None], 3, axis=1))
    falling = DenoisingDiscount(Unclipped(), 0.5)(zeros, advantage, inputs, ())
    np.testing.assert_allclose(falling[0], [-0.25, -0.5, -1.0])


def test_a_learned_eta_has_the_gradient_of_its_gaussians():
    """Densities and entropy against DDIM written out at eta = low + (high - low) sigmoid(x), and their differences."""
    generator = gate_generator(sampler=DDIM(eta=0.5, limit=None))
    slots = {"eta_bounds": (0.1, 1.0), "exploration_std": 1e-3, "likelihood_std": 1e-3, "log_prob_bounds": None}
    policy, seen = chain_policy(generator, **slots), jnp.asarray([0.3, -0.2])
    assert float(policy.eta) == pytest.approx(0.5)
    plain = chain_policy(generator, **{**slots, "eta_bounds": None})
    signal = np.asarray(DiscreteVP.squared_cosine(4).signal, np.float64)

    @jax.jit
    def ours(free, states):
        def both(free):
            tried = eqx.tree_at(lambda p: p.free, policy, free)
            parameters = tried.parameters_for(Features(seen, None, seen), (), states)
            return tried.head.log_prob(parameters, states), tried.head.entropy(parameters)

        return both(free), jax.jacrev(both)(free)

    states, same = jax.jit(lambda key: (policy.draw(seen, key)[0], plain.draw(seen, key)[0]))(jax.random.key(0))
    np.testing.assert_allclose(states, same, atol=1e-5)
    noises = [
        np.asarray(generator.denoiser.predict(states[3 - k], jnp.asarray(k), generator.encode(seen)).noise, np.float64)
        for k in range(4)
    ]

    def by_hand(x):
        eta = 0.1 + 0.9 / (1.0 + np.exp(-x))
        found = []
        for k in reversed(range(4)):
            here, before = signal[k + 1], signal[k]
            state, following = (np.asarray(states[i], np.float64) for i in (3 - k, 4 - k))
            clean = (state - np.sqrt(1 - here) * noises[k]) / np.sqrt(here)
            own = eta * np.sqrt((1 - before) / (1 - here) * (1 - here / before))
            mean = np.sqrt(before) * clean + np.sqrt(max(1 - before - own**2, 0.0)) * noises[k]
            std = max(own, 1e-3)
            played = stats.norm(mean, std).logpdf(following)[:2]
            found.append((played.mean(), stats.norm(0.0, std).entropy()))
        return np.asarray(found).T

    start = float(policy.free[0])
    values, slopes = ours(policy.free, states)
    # The last step has no noise of its own, and a floor of 1e-3 is too little for float32 to know its density.
    np.testing.assert_allclose(np.stack(values)[:, :3], by_hand(start)[:, :3], rtol=2e-3)
    steps = (by_hand(start + 1e-4) - by_hand(start - 1e-4)) / 2e-4
    np.testing.assert_allclose(np.stack(slopes)[:, :3, 0], steps[:, :3], rtol=2e-2, atol=2e-3)
    np.testing.assert_array_equal(np.stack(slopes)[:, 3, 0], 0.0)


def test_the_authors_options_fit_together(batch):
    """Eta, the pull towards the original policy's chains, and clipped advantages in one update."""
    generator = gate_generator(sampler=DDIM(eta=0.5))
    algorithm = DPPO(
        architecture=DenoisingChains(generator, eta_bounds=(0.1, 1.0), exploration_std=0.01, likelihood_std=0.01),
        imitation=Imitation(0.5),
        normalize_advantages=ClippedAdvantages(0.1, 0.9),
        entropy_coefficient=0.1,
        **SMALL,
    )

    @eqx.filter_jit
    def run():
        state, experience = collected(algorithm, problem())
        estimate, scaler = algorithm.estimate(state, experience)
        rows, _, _ = algorithm.prepare(state, state.method, experience, estimate, scaler)
        rows = rows._replace(advantage=jnp.zeros_like(rows.advantage))

        def loss(free):
            return algorithm.loss(state.learned._replace(free=free), state, rows, ())[0]

        slope = jax.grad(loss)(state.actor.free)
        after, metrics = algorithm.update(state, experience)
        own = state.actor.head.log_prob(state.actor.parameters_for(rows.features, (), rows.imitated), rows.imitated)
        return state, rows, slope, after, metrics, own, algorithm.loss(state.learned, state, rows, ())[1][1]

    state, rows, slope, after, metrics, own, before = run()
    assert rows.imitated.shape == rows.action.shape
    assert float(jnp.max(jnp.abs(rows.imitated - rows.action))) > 0.01
    assert float(before["imitation_loss"]) == pytest.approx(-float(jnp.mean(own)), rel=1e-5)
    assert np.isfinite(slope).all()
    assert float(slope[0]) != 0.0
    assert float(after.actor.free[0]) != float(state.actor.free[0])
    assert all(np.all(np.isfinite(value)) for value in metrics.values())


class Spoiled(ObstacleGate):
    """Gives no numbers from the second step on."""

    def step_env(self, key, state, action, params):
        observation, state, reward, terminated, info = super().step_env(key, state, action, params)
        return jax.tree.map(lambda leaf: leaf * jnp.nan, observation), state, reward, terminated, info


def test_observations_that_are_not_numbers_stop_the_run():
    algorithm = DPPO(architecture=DenoisingChains(gate_generator(levels=1)), **SMALL)
    with pytest.raises(NonFiniteError, match=r"returned \d+ NaN or infinite observations in iteration 1"):
        train(algorithm, Problem(ChunkedEnvironment(Spoiled(), 2)), iterations=1)


def test_a_chain_policy_is_saved_and_loaded(tmp_path):
    policy = chain_policy(gate_generator(), steps=2)
    loaded = load_policy(save_policy(policy, tmp_path / "policy"))
    assert bool(eqx.tree_equal(policy, loaded))


def test_what_is_learned_is_played_without_exploration():
    policy = chain_policy(gate_generator())
    play, key, seen = policy.mode(), jax.random.key(4), jnp.asarray([-1.0, 0.0])
    action, _ = play(seen, play.init(key), key)
    np.testing.assert_allclose(action, np.clip(policy.source(seen, key)[:2], -1.0, 1.0), atol=1e-6)


def mixture_generator():
    mixture = Mixture(jnp.zeros(1), jnp.zeros((1, 6)), jnp.ones((1, 6)))
    return ChunkGenerator(MixtureDenoiser(lambda _: mixture, DiscreteVP.linear(4), (3, 2)), DDPM())


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ({"steps": 5}, InputError, "steps is 5, but it must be at most the sampler's 4"),
        ({"exploration_std": 0.0}, InputError, "exploration_std is 0"),
        ({"likelihood_std": -1.0}, InputError, "likelihood_std is -1"),
        ({"noise_limit": 0.0}, InputError, "noise_limit is 0"),
        ({"log_prob_bounds": (1.0, 0.0)}, InputError, "log_prob_bounds is"),
        ({"eta_bounds": (0.1, 1.0)}, InputTypeError, r"generator\.sampler is a DDPM, but only DDIM has an eta"),
        ({"generator": "steady", "eta_bounds": (0.1, 1.0)}, InputError, r"eta_bounds is \(0\.1, 1\.0\)"),
        ({"generator": 3}, InputTypeError, "generator is a int"),
        ({"generator": "flow"}, InputTypeError, "generator.sampler is a DPMSolver"),
        ({"generator": "exact"}, InputTypeError, "generator.denoiser is a MixtureDenoiser"),
    ],
)
def test_chains_that_cannot_be_are_refused(slots, error, message):
    named = {
        "flow": lambda: gate_generator(sampler=DPMSolver(4)),
        "steady": lambda: gate_generator(sampler=DDIM(eta=0.0)),
        "exact": mixture_generator,
    }
    slots = {"generator": "usual", **slots}
    make = named.get(slots["generator"], gate_generator) if isinstance(slots["generator"], str) else None
    if make is None:
        # The class checks what the annotation of a typed program would.
        with pytest.raises(Exception, match="generator"):
            DenoisingChains(slots["generator"])
        return
    with pytest.raises(error, match=message):
        DenoisingChains(**{**slots, "generator": make()})


def test_what_does_not_fit_together_is_refused(batch):
    algorithm, state, _, rows = batch
    with pytest.raises(InputError, match=r"sample\.shape"):
        state.actor.parameters_for(rows.features, (), rows.action[:, 1:])
    with pytest.raises(InputError, match="action has a chain of 3 states"):
        state.actor.head.log_prob(rows.parameters, rows.action[:, 1:])
    with pytest.raises(InputError, match="actions are of shape"):
        algorithm.init(problem(4), jax.random.key(0))
    with pytest.raises(InputError, match="actions are of shape"):
        algorithm.init(Problem(ObstacleGate()), jax.random.key(0))
    with pytest.raises(InputError, match="architecture is None"):
        DPPO(**SMALL).init(problem(), jax.random.key(0))
    with pytest.raises(InputTypeError, match="architecture is a"):
        DPPO(architecture=_Other(), **SMALL)
    for discount in (0.0, 1.5):
        with pytest.raises(InputError, match="discount is"):
            DenoisingDiscount(discount=discount)
    with pytest.raises(InputError, match="smallest is"):
        DenoisingClip(0.1, -0.1)
    with pytest.raises(InputError, match="target_kl is"):
        DPPO(target_kl=0.0, **SMALL)
    with pytest.raises(InputError, match="critic_learning_rate is"):
        DPPO(critic_learning_rate=0.0, **SMALL)
    with pytest.raises(InputTypeError, match="A denoising chain has no"):
        state.actor.from_features(rows.features, ())


class _Other(Architecture):
    def make(self, preprocess, head, *, initial_log_std, key):
        raise NotImplementedError
