import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs.dynamics import Pendulum
from steersman.errors import InputError
from steersman.training.dynamics_model import (
    EnsembleLearner,
    EnsembleModel,
    KnownModel,
    LinearQuadraticModel,
    Prediction,
    TransitionModel,
    bootstrapped_return,
    quadratic_features,
    rollout_model,
)
from steersman.training.replay import Replay, Transition

A = np.array([[1.0, 0.1], [0.0, 1.0]])
B = np.array([[0.0], [0.1]])
Q, R = np.diag([1.0, 0.1]), np.array([[0.01]])


def dataset(observation, action, reward, following, terminated=None):
    count = len(observation)
    ended = jnp.zeros(count, bool) if terminated is None else jnp.asarray(terminated)
    rows = Transition(observation, action, reward, following, ended, jnp.zeros(count, bool))
    return Replay.of(jax.tree.map(jnp.asarray, rows))


def still(x, carry, key):
    return jnp.zeros((*x.shape[:-1], 1)), carry


class Tripling(TransitionModel):
    """An unstable model whose box is [-10, 10]."""

    def __call__(self, observation, action, key):
        return Prediction(3.0 * observation, jnp.sum(observation, axis=-1), jnp.full(observation.shape[:-1], 0.25))

    def limits(self):
        return jnp.full(2, -10.0), jnp.full(2, 10.0)


@eqx.filter_jit
def fitted(learner, replay, key):
    sizes = replay.rows.observation.shape[-1], replay.rows.action.shape[-1]
    first = learner.init(*sizes, key)
    return first, *learner.fit(first, replay, key)


@pytest.fixture(scope="module")
def pendulum():
    """Transitions from anywhere, by the true equations, and a model of them; the last 1,000 are for judging."""
    problem = Pendulum()

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, 3)
        angle = jax.random.uniform(keys[0], (9_000,), minval=-np.pi, maxval=np.pi)
        state = jnp.stack([angle, jax.random.uniform(keys[1], (9_000,), minval=-6.0, maxval=6.0)], axis=1)
        torque = jax.random.uniform(keys[2], (9_000, 1), minval=-2.0, maxval=2.0)
        following = jax.vmap(lambda x, u: problem.dynamics(x, u, jnp.zeros(1)))(state, torque)
        reward = -jax.vmap(problem.stage_cost)(state, torque)
        return jax.vmap(problem.observe)(state), torque, reward, jax.vmap(problem.observe)(following)

    everything = draw(jax.random.key(0))
    replay = dataset(*(part[:8_000] for part in everything))
    learner = EnsembleLearner(hidden=(32, 32), members=2, epochs=20, learning_rate=5e-3)
    return replay, [part[8_000:] for part in everything], fitted(learner, replay, jax.random.key(1))


def test_an_ensemble_learns_the_pendulum(pendulum):
    _, (seen, torque, reward, later), (first, model, metrics) = pendulum
    np.testing.assert_allclose(first.outputs(seen, torque)[0], 0.0, atol=1e-6)
    mean = np.mean(model.outputs(seen, torque)[0], axis=0)
    truth = np.concatenate([later - seen, reward[:, None]], axis=1)
    unexplained = (truth - mean).var(axis=0) / truth.var(axis=0)
    assert (unexplained < 0.03).all(), unexplained
    # The held-out loss that the fit reports is the error on rows that it has not seen.
    assert float(metrics["model_holdout_loss"]) == pytest.approx(float(np.mean(unexplained)), abs=0.02)
    assert 1 <= int(metrics["model_epochs"]) <= 20
    far = jnp.full((1, 3), 40.0)
    inside, outside = (np.mean(model.disagreement(x, torque[: len(x)])) for x in (seen, far))
    assert outside > 10 * inside


def test_what_judges_a_fit_is_never_fitted_to():
    """Every seventh row says the opposite of the others: a model of the others loses there and is not kept."""
    x = np.random.default_rng(0).normal(size=(1_400, 1)).astype(np.float32)
    sign = np.where(np.arange(1_400) % 7 == 0, -1.0, 1.0)[:, None].astype(np.float32)
    replay = dataset(x, x, (x * sign)[:, 0], x + x * sign)
    learner = EnsembleLearner(hidden=(), epochs=20, patience=2, batches=60, learning_rate=3e-2, holdout_rows=200)
    first, model, metrics = fitted(learner, replay, jax.random.key(0))
    assert float(metrics["model_loss"]) < 0.1, "the others are fitted"
    assert int(metrics["model_epochs"]) == 2, "and it gives up"
    np.testing.assert_array_equal(model.networks.weights[0], first.networks.weights[0])


def test_variances_and_ends_are_learned():
    """Noise of deviation exp(x - 1.5), and an end with probability 0.25 + 0.25 x."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (8_000, 1)).astype(np.float32)
    noise = rng.normal(size=(8_000, 1)) * np.exp(x - 1.5)
    ended = rng.random(8_000) < 0.25 + 0.25 * x[:, 0]
    replay = dataset(x, 0 * x, 0 * x[:, 0], (x + noise).astype(np.float32), ended)
    learner = EnsembleLearner(hidden=(32,), gaussian=True, terminates=True, epochs=12, learning_rate=1e-2)
    _, model, _ = fitted(learner, replay, jax.random.key(0))
    places = jnp.asarray([[-0.5], [0.5]])
    _, deviation, chance = model.outputs(places, jnp.zeros((2, 1)))
    np.testing.assert_allclose(deviation[0, :, 0], np.exp([-2.0, -1.0]), rtol=0.15)
    np.testing.assert_allclose(chance[0], [0.125, 0.375], atol=0.08)
    repeated = jnp.broadcast_to(places, (20_000, 2, 1))
    drawn = model(repeated, jnp.zeros_like(repeated), jax.random.key(2))
    spread = np.asarray(drawn.next_observation - repeated)[..., 0].std(axis=0)
    np.testing.assert_allclose(spread, deviation[0, :, 0], rtol=0.03)


def test_an_outcome_is_that_of_a_random_member():
    model = EnsembleModel(1, 1, hidden=(), members=3, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.networks.biases[0], model, jnp.asarray([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    x = jnp.zeros((9_000, 1))
    values, counts = np.unique(model(x, x, jax.random.key(1)).next_observation, return_counts=True)
    assert values.tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_allclose(counts, 3_000, atol=4 * np.sqrt(9_000 * 2 / 9))


def test_least_squares_recovers_a_linear_quadratic_system():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, u = rng.normal(size=(60, 2)), rng.normal(size=(60, 1))
        reward = -np.einsum("bi,ij,bj->b", x, Q, x) - 0.01 * u[:, 0] ** 2
        found = LinearQuadraticModel.least_squares(dataset(x, u, reward, x @ A.T + u @ B.T))
        np.testing.assert_allclose(found.A, A, atol=1e-8)
        np.testing.assert_allclose(found.B, B, atol=1e-8)
        np.testing.assert_allclose(found.noise, 0.0, atol=1e-8)
        exact = LinearQuadraticModel.from_costs(A, B, Q, R)
        np.testing.assert_allclose(found.reward_weights, exact.reward_weights, atol=1e-8)
        noisy = np.random.default_rng(1).normal(size=(20_000, 2))
        x, u = rng.normal(size=(20_000, 2)), rng.normal(size=(20_000, 1))
        factor = np.array([[0.3, 0.0], [0.1, 0.2]])
        found = LinearQuadraticModel.least_squares(
            dataset(x, u, np.zeros(20_000), x @ A.T + u @ B.T + noisy @ factor.T)
        )
        np.testing.assert_allclose(found.noise @ found.noise.T, factor @ factor.T, atol=3e-3)


def test_a_rollout_is_the_hand_written_loop():
    model = LinearQuadraticModel.from_costs(A, B, Q, R)
    x = jnp.asarray([[1.0, -0.5], [0.2, 0.3]])
    u = jnp.asarray([[0.7], [-0.1]])

    def feedback(x, carry, key):
        return -x[..., :1] - carry, carry + 1.0

    rollout = rollout_model(model, feedback, x, u, 3, jax.random.key(0), jnp.zeros((2, 1)))
    at, act, memory = np.asarray(x), np.asarray(u), 0.0
    total = np.zeros(2)
    for h in range(3):
        np.testing.assert_allclose(rollout.observation[h], at, rtol=1e-5)
        np.testing.assert_allclose(rollout.action[h], act, rtol=1e-5)
        earned = -np.einsum("bi,ij,bj->b", at, Q, at) - 0.01 * act[:, 0] ** 2
        np.testing.assert_allclose(rollout.reward[h], earned, rtol=1e-4)
        total += 0.9**h * earned
        at = at @ A.T + act @ B.T
        act, memory = -at[:, :1] - memory, memory + 1.0
    np.testing.assert_allclose(rollout.observation[3], at, rtol=1e-5)
    np.testing.assert_allclose(rollout.carry[:, 0, 0], [0.0, 1.0, 2.0])
    total += 0.9**3 * np.asarray([5.0, -2.0])
    np.testing.assert_allclose(bootstrapped_return(rollout, jnp.asarray([5.0, -2.0]), 0.9), total, rtol=1e-5)
    assert float(rollout.clipped_share) == 0.0


def test_ends_take_their_share_of_what_follows():
    rollout = rollout_model(Tripling(), still, jnp.full((1, 2), 0.5), jnp.zeros((1, 1)), 2, jax.random.key(0))
    np.testing.assert_allclose(rollout.alive[:, 0], [1.0, 0.75, 0.5625])
    expected = 1.0 + 0.9 * 0.75 * 3.0 + 0.81 * 0.5625 * 4.0
    np.testing.assert_allclose(bootstrapped_return(rollout, jnp.asarray([4.0]), 0.9), expected, rtol=1e-6)


def test_exploding_rollouts_are_capped_and_counted():
    start = jnp.asarray([[0.01, 0.02], [2.0, -2.0], [jnp.nan, 1.0]])
    rollout = rollout_model(Tripling(), still, start[:2], jnp.zeros((2, 1)), 4, jax.random.key(0))
    np.testing.assert_allclose(rollout.observation[:, 1], [[2, -2], [6, -6], [10, -10], [10, -10], [10, -10]])
    assert rollout.clipped[:, 1].tolist() == [False, True, True, True]
    assert not rollout.clipped[:, 0].any()
    assert float(rollout.clipped_share) == pytest.approx(3 / 8)

    class Broken(Tripling):
        def __call__(self, observation, action, key):
            nothing = jnp.full(observation.shape[:-1], jnp.nan)
            return Prediction(observation * jnp.nan, nothing, jnp.zeros_like(nothing))

    rollout = rollout_model(Broken(), still, start[:2], jnp.zeros((2, 1)), 3, jax.random.key(0))
    np.testing.assert_allclose(rollout.observation[-1], start[:2])
    assert float(rollout.clipped_share) == 1.0
    assert bool(jnp.all(jnp.isfinite(bootstrapped_return(rollout, jnp.zeros(2), 0.9))))


def test_learned_models_stay_near_what_was_seen(pendulum):
    _, (seen, torque, _, _), (_, model, _) = pendulum
    low, high = model.limits()
    np.testing.assert_allclose([low[:2], high[:2]], [[-2, -2], [2, 2]], atol=0.01)
    # A rate of at most 6 rad/s grows by at most 0.05 (15 + 3 * 2) in a step; half the width of that on either side.
    np.testing.assert_allclose([low[2], high[2]], [-2 * 7.05, 2 * 7.05], atol=0.4)
    drifting = eqx.tree_at(lambda m: m.target_mean, model, jnp.asarray([10.0, 10.0, 10.0, 0.0]))
    rollout = rollout_model(drifting, still, seen[:5], torque[:5], 8, jax.random.key(2))
    assert bool(jnp.all(rollout.observation[1:] <= high + 1e-5))
    assert float(rollout.clipped_share) > 0.5


def test_gradients_through_a_rollout_are_those_of_finite_differences():
    with jax.enable_x64(True):
        model = LinearQuadraticModel.from_costs(A, B, Q, R)

        @jax.jit
        def score(gain):
            def feedback(x, carry, key):
                return -x @ gain.T, carry

            x = jnp.asarray([[1.0, -0.5]])
            rollout = rollout_model(model, feedback, x, -x @ gain.T, 6, jax.random.key(0))
            return bootstrapped_return(rollout, -jnp.sum(rollout.observation[-1] ** 2, axis=-1), 0.9)[0]

        gain = jnp.asarray([[0.8, 0.5]])
        found = jax.grad(score)(gain)
        for i in range(2):
            move = jnp.zeros((1, 2)).at[0, i].set(1e-5)
            assert float(found[0, i]) == pytest.approx(
                float((score(gain + move) - score(gain - move)) / 2e-5), rel=1e-6
            )


def test_quadratic_features():
    z = jnp.asarray([2.0, 3.0])
    assert quadratic_features(z).tolist() == [1.0, 2.0, 3.0, 4.0, 6.0, 9.0]


def test_a_known_model_is_left_alone(pendulum):
    model = Tripling()
    learner = KnownModel(model)
    assert learner.init(2, 1, jax.random.key(0)) is model
    assert learner.fit(model, pendulum[0], jax.random.key(0)) == (model, {})


def test_bad_input(pendulum):
    model = Tripling()
    with pytest.raises(InputError, match="horizon is 0"):
        rollout_model(model, still, jnp.zeros((1, 2)), jnp.zeros((1, 1)), 0, jax.random.key(0))
    for field in ("members", "batch_size", "epochs", "batches", "patience", "holdout_rows"):
        with pytest.raises(InputError, match=f"{field} is 0"):
            EnsembleLearner(**{field: 0})
    with pytest.raises(InputError, match="holdout is 1"):
        EnsembleLearner(holdout=1)
    with pytest.raises(InputError, match=r"learning_rate is 0\.0"):
        EnsembleLearner(learning_rate=0.0)
    with pytest.raises(InputError, match=r"margin is -1\.0"):
        EnsembleModel(2, 1, margin=-1.0, key=jax.random.key(0))
    learner = EnsembleLearner(hidden=(4,))
    with pytest.raises(InputError, match=r"sizes of observation and action in replay is \(3, 1\).*\(2, 1\)"):
        learner.fit(learner.init(2, 1, jax.random.key(0)), pendulum[0], jax.random.key(0))
    empty = Replay.zeros(jax.tree.map(lambda leaf: leaf[0], pendulum[0].rows), 8)
    with pytest.raises(InputError, match=r"replay's size is 0.*at least 2"):
        learner.fit(learner.init(3, 1, jax.random.key(0)), empty, jax.random.key(0))
    with pytest.raises(InputError, match=r"replay's size is 0.*at least 15"):
        LinearQuadraticModel.least_squares(empty)
    with pytest.raises(InputError, match="Q's shape"):
        LinearQuadraticModel.from_costs(A, B, np.eye(3), R)
    with pytest.raises(InputError, match="B's shape"):
        LinearQuadraticModel.from_costs(A, np.ones((3, 1)), Q, R)
