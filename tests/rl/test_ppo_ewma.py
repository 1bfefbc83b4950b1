"""PPO-EWMA: its averaged policy, its decoupled loss, stale data, and the recipe for other batch sizes."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import ContextualBandit, Problem
from steersman.errors import InputError, InputTypeError
from steersman.objectives import decoupled_clipped
from steersman.policies import Categorical
from steersman.policies.preprocessing import Features
from steersman.rl.advantage_scales import AdvantageMoments
from steersman.rl.alternatives import Alternatives
from steersman.rl.on_policy import PPO
from steersman.rl.on_policy.actor_critic import Batch
from steersman.rl.on_policy.ppo_ewma import PPOEWMA, rescale_batch
from steersman.rl.references import MovingAverageReference, Reference, UpdateStart
from steersman.rl.surrogates import Clip, FixedKL, SurrogateInputs
from steersman.training import Linear, resolve
from steersman.training.averaging import MovingAverage
from steersman.training.checkpoints import from_arrays, to_arrays
from steersman.training.optimizers import SGD, Optimizer
from steersman.training.prng import key
from steersman.training.staleness import Stale

BANDIT = Problem(ContextualBandit(3, 2, noise=0.1))
SMALL = {"num_envs": 32, "num_steps": 1, "hidden": (), "minibatches": 1, "epochs": 1, "learning_rate": 0.05}


@eqx.filter_jit
def iterate(algorithm, problem, start, iterations):
    """States after every iteration, and the experience of each."""
    state = algorithm.init(problem, start)
    rollout = algorithm.collector.init(problem, algorithm.behaviour(state), start)

    def step(running, _):
        state, rollout = running
        experience, rollout, _ = algorithm.collector.collect(problem, algorithm.behaviour(state), rollout)
        state, metrics = algorithm.update(state, experience)
        return (state, rollout), (state, experience, metrics)

    return state, *jax.lax.scan(step, (state, rollout), None, length=iterations)[1]


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_averaged_policy_is_the_weighted_mean_of_all_iterates():
    first, states, _, _ = iterate(PPOEWMA(**SMALL, reference=MovingAverageReference(decay=0.6)), BANDIT, key(0), 6)
    iterates = np.stack([first.actor.network.trunk.weights[0], *states.actor.network.trunk.weights[0]])
    assert np.abs(np.diff(iterates, axis=0)).max() > 0.01
    for n in (1, 3, 6):
        weights = 0.6 ** np.arange(n, -1, -1.0)
        expected = np.tensordot(weights / weights.sum(), iterates[: n + 1], 1)
        average = states.method.reference
        np.testing.assert_allclose(average.value.network.trunk.weights[0][n - 1], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(average.weight[n - 1], weights.sum(), rtol=1e-6)
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    averaged = PPOEWMA(**SMALL).averaged_policy(last)
    np.testing.assert_array_equal(
        averaged.network.trunk.weights[0], last.method.reference.value.network.trunk.weights[0]
    )
    assert not np.array_equal(averaged.network.trunk.weights[0], last.actor.network.trunk.weights[0])


def rows_of(log_prob, advantage, parameters, alternatives=None):
    count = len(advantage)
    return Batch(
        features=Features(jnp.zeros((count, 1)), None),
        carry=(),
        start=jnp.zeros(count, bool),
        action=jnp.arange(count) % 4,
        log_prob=log_prob,
        parameters=parameters,
        advantage=advantage,
        target=advantage,
        value=advantage,
        alternatives=alternatives,
    )


@pytest.mark.parametrize("max_ratio", [None, 100.0, 1.2])
def test_relabelled_rows_and_the_clip_are_the_papers_decoupled_loss(max_ratio):
    """Loss and gradient; log-probabilities here are of tables, so that nothing of the loop is used."""
    rng = np.random.default_rng(0)
    new, proximal, behaviour = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 200, 4)))
    advantage = jnp.asarray(rng.normal(size=200), jnp.float32)
    action = np.arange(200) % 4

    def log_prob(logits):
        return jax.nn.log_softmax(logits)[np.arange(200), action]

    rows = rows_of(log_prob(behaviour), advantage, behaviour)
    average = MovingAverage(0.5).init(proximal)
    reference = MovingAverageReference(decay=0.5, max_ratio=max_ratio)
    held = reference.relabel(average, rows, new, lambda table: table, Categorical(4))
    np.testing.assert_array_equal(held.parameters, proximal)

    def ours(logits):
        unused = SurrogateInputs(*[jnp.zeros(200)] * 3, kl_parts=())
        return jnp.sum(Clip(0.2)(log_prob(logits) - held.log_prob, held.advantage, unused, ()))

    def theirs(logits):
        bound = math.inf if max_ratio is None else max_ratio
        log_probs = (log_prob(logits), log_prob(behaviour), log_prob(proximal))
        return jnp.sum(decoupled_clipped(*log_probs, advantage, 0.2, bound))

    for mine, papers in zip(jax.value_and_grad(ours)(new), jax.value_and_grad(theirs)(new), strict=True):
        np.testing.assert_allclose(mine, papers, rtol=2e-5, atol=2e-5)


def test_alternatives_are_weighted_like_rows():
    rng = np.random.default_rng(1)
    logits = {name: rng.normal(size=(6, 4)) for name in ("new", "proximal", "behaviour")}
    elsewhere = {name: rng.normal(size=(6, 3, 4)) for name in logits}
    action = rng.integers(0, 4, (6, 3))
    advantage = rng.normal(size=(6, 3))
    reference = UpdateStart(max_ratio=None)

    def chosen(table):
        return np.take_along_axis(np.asarray(jax.nn.log_softmax(jnp.asarray(table))), action[..., None], -1)[..., 0]

    for features in (None, Features(jnp.zeros((6, 3, 1)), None)):
        own = {name: np.repeat(table[:, None], 3, axis=1) for name, table in logits.items()}
        there = own if features is None else elsewhere
        more = Alternatives(
            jnp.asarray(action),
            jnp.asarray(chosen(there["behaviour"])),
            jnp.asarray(there["behaviour"]),
            jnp.asarray(advantage),
            features,
        )
        rows = rows_of(jnp.zeros(6), jnp.ones(6), jnp.zeros((6, 4)), more)

        def parameters_of(name, other=None):
            return jnp.asarray(logits[name] if other is None else elsewhere[name])

        held = reference.relabel("proximal", rows, "new", parameters_of, Categorical(4)).alternatives
        np.testing.assert_allclose(held.log_prob, chosen(there["proximal"]), rtol=1e-5)
        weight = np.exp(chosen(there["proximal"]) - chosen(there["behaviour"]))
        np.testing.assert_allclose(held.advantage, advantage * weight, rtol=1e-5)


def test_measured_from_the_policy_that_collected_the_data_nothing_changes():
    logits, advantage = jnp.asarray(np.random.default_rng(3).normal(size=(2, 40, 4)), jnp.float32)
    log_prob = Categorical(4).log_prob(logits, jnp.arange(40) % 4)
    rows = rows_of(log_prob, advantage[:, 0], logits)
    for reference in (UpdateStart(), UpdateStart(importance_weighted=False), MovingAverageReference()):
        started = reference.begin(reference.init(logits), logits)
        held = reference.relabel(started, rows, logits, lambda table: table, Categorical(4))
        assert eqx.tree_equal(held, rows)


def test_without_importance_weights_old_data_are_taken_for_its_own():
    old, new = jnp.asarray(np.random.default_rng(4).normal(size=(2, 40, 4)), jnp.float32)
    action = jnp.arange(40) % 4
    rows = rows_of(Categorical(4).log_prob(old, action), jnp.ones(40), old)
    held = UpdateStart(importance_weighted=False).relabel(new, rows, new, lambda table: table, Categorical(4))
    np.testing.assert_array_equal(held.advantage, rows.advantage)
    np.testing.assert_array_equal(held.log_prob, Categorical(4).log_prob(new, action))


def test_advantages_share_moments_with_earlier_batches():
    scale, rng = AdvantageMoments(0.75), np.random.default_rng(2)
    state, weight, first, second = scale.init(), 0.0, 0.0, 0.0
    for _ in range(4):
        batch = rng.normal(1.0, 2.0, (8, 3))
        weight, first = 0.75 * weight + 24, 0.75 * first + batch.sum()
        second = 0.75 * second + (batch**2).sum()
        scaled, state = scale(state, jnp.asarray(batch, jnp.float32))
        mean = first / weight
        expected = (batch - mean) / np.sqrt(second / weight - mean**2)
        np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-5)


def test_actors_lag_by_the_staleness():
    learner, lag = PPOEWMA(**SMALL), 2
    first, states, experience, _ = iterate(Stale(learner, lag), BANDIT, key(2), 6)
    tables = np.stack([first.inner.actor.network.trunk.weights[0], *states.inner.actor.network.trunk.weights[0]])
    biases = np.stack([first.inner.actor.network.trunk.biases[0], *states.inner.actor.network.trunk.biases[0]])
    assert np.abs(np.diff(tables, axis=0)).max(axis=(1, 2)).min() > 1e-3
    for i in range(6):
        acting = max(0, i - lag)
        context = np.asarray(experience.observation[i, 0])
        expected = tables[acting].T[context] + biases[acting]
        np.testing.assert_allclose(experience.record.parameters[i, 0], expected, atol=1e-6)
    # What is resumed from holds the queue, the average and its weight.
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    restored = from_arrays(jax.eval_shape(lambda: last), to_arrays(last), "a test")
    assert eqx.tree_equal(restored, last)
    assert float(restored.inner.method.reference.weight) > 2


def test_without_staleness_the_newest_policy_acts():
    learner = PPOEWMA(**SMALL)
    state = Stale(learner, 0).init(BANDIT, key(3))
    assert eqx.tree_equal(Stale(learner, 0).behaviour(state), learner.behaviour(state.inner))
    assert eqx.tree_equal(Stale(learner, 0).policy(state), learner.policy(state.inner))
    assert Stale(learner, 0).collector == learner.collector


def test_works_with_a_memory_and_another_surrogate():
    """A divergence penalty from the averaged policy, on a recurrent actor with a Gaussian head."""
    from steersman.envs.dynamics import Pendulum

    algorithm = PPOEWMA(num_envs=4, num_steps=8, memory=8, minibatches=2, surrogate=FixedKL(1.0))
    _, states, _, metrics = iterate(algorithm, Problem(Pendulum().environment()), key(4), 2)
    assert all(np.isfinite(value).all() for value in metrics.values())
    np.testing.assert_allclose(states.method.reference.weight[0], 1 + 8 / 9 + (8 / 9) ** 2, rtol=1e-5)


def numbers(algorithm):
    return (
        algorithm.num_envs,
        float(algorithm.learning_rate),
        float(algorithm.reference.decay),
        float(algorithm.normalize_advantages.decay),
    )


def test_the_recipe_by_hand():
    base = PPOEWMA(num_envs=64, num_steps=256)
    assert numbers(base) == pytest.approx((64, 5e-4, 8 / 9, 0.0))
    assert numbers(rescale_batch(base, 4)) == pytest.approx((16, 2.5e-4, 32 / 33, 0.75))
    assert numbers(rescale_batch(base, 0.25)) == pytest.approx((256, 1e-3, 2 / 3, 0.0))
    assert numbers(rescale_batch(rescale_batch(base, 2), 4)) == pytest.approx(numbers(rescale_batch(base, 8)))
    assert numbers(rescale_batch(rescale_batch(base, 16), 1 / 16)) == pytest.approx(numbers(base), abs=1e-6)
    same = ("num_steps", "minibatches", "epochs", "gamma", "lam", "surrogate", "entropy_coefficient")
    small = rescale_batch(base, 4)
    assert all(eqx.tree_equal(getattr(base, name), getattr(small, name)) for name in same)
    assert float(rescale_batch(PPOEWMA(optimizer=SGD()), 4).learning_rate) == pytest.approx(5e-4 / 4)
    annealed = rescale_batch(PPOEWMA(learning_rate=Linear(1e-3, 0.0, 100)), 4)
    assert float(resolve(annealed, jnp.asarray(50, jnp.uint32)).learning_rate) == pytest.approx(2.5e-4)
    plain = rescale_batch(PPO(), 4)
    assert plain.num_envs == 4
    assert float(plain.learning_rate) == pytest.approx(1.5e-4)


class Sign(Optimizer):
    def transformation(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingAverageReference(decay=1.0), r"decay is 1\.0"),
        (lambda: MovingAverageReference(decay=-0.1), "decay is -0.1"),
        (lambda: MovingAverageReference(max_ratio=0.0), r"max_ratio is 0\.0"),
        (lambda: AdvantageMoments(1.0), r"decay is 1\.0"),
        (lambda: PPOEWMA(surrogate=Clip(1.0)), r"surrogate.epsilon is 1\.0.*below 1"),
        (lambda: PPOEWMA(minibatches=7), "minibatches is 7"),
        (lambda: rescale_batch(PPOEWMA(), 0.0), r"^c is 0\.0"),
        (lambda: rescale_batch(PPOEWMA(), -2.0), r"^c is -2\.0"),
        (lambda: rescale_batch(PPOEWMA(num_envs=16), 3), "^c is 3.*num_envs = 16"),
        (lambda: rescale_batch(PPOEWMA(num_envs=16), 32), "^c is 32.*num_envs = 16"),
        (lambda: rescale_batch(PPOEWMA(num_envs=16, num_steps=1, minibatches=8), 4), "^c is 4.*minibatches"),
        (lambda: rescale_batch(PPOEWMA(optimizer=Sign()), 4), "^optimizer is"),
        (lambda: Stale(PPO(), -1), "staleness is -1"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_reference_that_averages_nothing_has_no_averaged_policy():
    state = PPOEWMA(**SMALL).init(BANDIT, key(0))
    with pytest.raises(InputTypeError, match=r"^reference is"):
        PPOEWMA(**SMALL, reference=Reference()).averaged_policy(state)


def test_missing_and_impossible_log_probabilities():
    algorithm = PPOEWMA(**SMALL)
    state, _, experience, _ = iterate(algorithm, BANDIT, key(3), 6)
    experience = jax.tree.map(lambda leaf: leaf[0], experience)
    with pytest.raises(InputError, match=r"^experience\.record is \(\)"):
        algorithm.update(state, eqx.tree_at(lambda e: e.record, experience, ()))
    log_prob = experience.record.log_prob
    rows = rows_of(log_prob[0].at[3].set(-jnp.inf), jnp.ones(32), jnp.zeros((32, 4)))
    held = UpdateStart().relabel(0, rows, 0, lambda _: jnp.zeros((32, 4)), Categorical(4))
    assert np.flatnonzero(~np.isfinite(held.advantage)).tolist() == [3]
