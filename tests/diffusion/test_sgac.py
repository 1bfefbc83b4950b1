"""Self-guidance against closed forms, adaptive chunking against traces by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import (
    DDIM,
    ChunkGenerator,
    Denoiser,
    DiscreteVP,
    Mixture,
    MixtureDenoiser,
    NoiseProcess,
    Prediction,
)
from steersman.diffusion.sgac import SelfGuidedPolicy, activation_guidance, agree, self_guided
from steersman.errors import InputError, InputTypeError
from steersman.policies import ChunkPolicy

PROCESS = DiscreteVP.squared_cosine(20)
SAMPLER = DDIM(4, limit=None)


class Table(Denoiser):
    """Chunks that are written down, one for each observation: the number of its row."""

    chunks: jax.Array
    process: NoiseProcess = eqx.field(default_factory=lambda: PROCESS)

    @property
    def chunk_shape(self):
        return self.chunks.shape[1:]

    def predict(self, x, level, condition):
        alpha, sigma = self.process.coefficients(level)
        chunk = self.chunks[jnp.asarray(condition, jnp.int32)[..., 0]]
        return Prediction((x - alpha * chunk) / sigma, chunk)


TABLE = jnp.stack(
    [jnp.asarray([row, [0.1] * 3]).T for row in ([1.0, 2.0, 3.0], [1.0, 2.1, 9.0], [-1.0, 5.0, 6.0], [7.0, 8.0, 9.0])]
)


def table_policy(chunks=TABLE):
    return ChunkGenerator(Table(chunks), SAMPLER).policy(1, jnp.zeros(1))


def gaussian(policy_of, std, rows=2):
    """Chunks around rows ``policy_of(observation)``, all alike, of one number each."""

    def mixture(seen):
        return Mixture(jnp.zeros(1), jnp.full((1, rows), policy_of(seen)), jnp.asarray(std**2))

    return MixtureDenoiser(mixture=mixture, process=PROCESS, chunk_shape=(rows, 1))


@eqx.filter_jit
def trace(policy, observations, keys):
    """Actions, and queues after each."""

    def step(carry, given):
        action, carry = policy(given[0], carry, given[1])
        return carry, (action, carry)

    return jax.lax.scan(step, policy.init(keys[0]), (observations, keys))[1]


STEPS = jnp.arange(4.0)[:, None]
KEYS = jax.random.split(jax.random.key(0), 4)


def test_the_queue_by_hand():
    """cos((2, 0.1), (1, 0.1)) = 0.9988 keeps; cos((3, 0.1), (-1, 0.1)) < 0 replaces; cos((5, 0.1), (7, 0.1)) keeps."""
    actions, carry = trace(SelfGuidedPolicy(table_policy(), None, 0.97), STEPS, KEYS)
    np.testing.assert_allclose(actions[:, 0], [1, 2, -1, 5], atol=1e-5)
    queues = [carry.queue[i, : int(carry.left[i]), 0] for i in range(4)]
    for found, expected in zip(queues, ([2, 3], [3, 9], [5, 6], [6, 9]), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_queue_without_its_tail():
    actions, carry = trace(SelfGuidedPolicy(table_policy(), None, -1.01, append_tail=False), STEPS, KEYS)
    np.testing.assert_allclose(actions[:, 0], [1, 2, 3, 7], atol=1e-5)
    np.testing.assert_array_equal(carry.left, [2, 1, 0, 2])


def test_replanning_every_other_step():
    actions, _ = trace(SelfGuidedPolicy(table_policy(), None, 0.97, replan_every=2), STEPS, KEYS)
    np.testing.assert_allclose(actions[:, 0], [1, 2, -1, 5], atol=1e-5)
    # Kept at the third step, whose chunk then fills up two rows.
    actions, carry = trace(SelfGuidedPolicy(table_policy(), None, -1.01, replan_every=2), STEPS, KEYS)
    np.testing.assert_allclose(actions[:, 0], [1, 2, 3, 5], atol=1e-5)
    np.testing.assert_allclose(carry.queue[-1, 0, 0], 6, atol=1e-5)


def test_the_two_ends_of_the_threshold():
    """Never keeping is closed loop, always keeping plays last rows, each two steps after it was drawn."""
    policy = gaussian(lambda seen: seen[0], 0.3, rows=3)
    closed = ChunkGenerator(policy, SAMPLER).policy(1, jnp.zeros(1))
    expected, _ = trace(closed, STEPS, KEYS)
    never, _ = trace(SelfGuidedPolicy(closed, 0.0, 1.01), STEPS, KEYS)
    np.testing.assert_allclose(never, expected, atol=1e-5)
    plain, _ = trace(SelfGuidedPolicy(closed, None, None), STEPS, KEYS)
    np.testing.assert_allclose(plain, expected, atol=1e-6)
    always, _ = trace(SelfGuidedPolicy(closed, None, -1.01), STEPS, KEYS)
    draw = eqx.filter_jit(closed.generator.chain)
    chunks = [draw(seen, key).chunk for seen, key in zip(STEPS, KEYS, strict=True)]
    np.testing.assert_allclose(always, [*chunks[0], chunks[1][-1]], atol=1e-5)


def test_gaussian_policies_are_extrapolated():
    """N(k s, S) becomes N(k (s + w (s - s')), S): the same noise gives the same draw around the other mean."""
    generator = ChunkGenerator(gaussian(lambda seen: 0.7 * seen[0], 0.3), SAMPLER)

    @jax.jit
    @jax.vmap
    def both(scale):
        now, past = jnp.asarray([0.5]), jnp.asarray([0.2])
        guided = self_guided(generator, scale).chain(jnp.stack([now, past]), KEYS[0]).chunk
        still = self_guided(generator, scale).chain(jnp.stack([now, now]), KEYS[0]).chunk
        return guided, generator.chain(now + scale * (now - past), KEYS[0]).chunk, still

    guided, expected, still = both(jnp.asarray([0.0, 0.5, 1.0, 4.0]))
    np.testing.assert_allclose(guided, expected, atol=1e-5)
    # Without motion there is nothing to extrapolate, whatever the scale.
    np.testing.assert_allclose(still, jnp.broadcast_to(expected[0], still.shape), atol=1e-5)


def test_the_lag_behind_a_moving_goal():
    """A policy that goes a quarter of the way lags by (1 - w) speed / 0.25, and is unstable where 0.75 w > 1."""
    denoiser = gaussian(lambda seen: seen[0] + 0.25 * (seen[1] - seen[0]), 1e-4)
    closed = ChunkGenerator(denoiser, SAMPLER).policy(1, jnp.zeros(2))

    @jax.jit
    @jax.vmap
    def lag(scale):
        policy = SelfGuidedPolicy(closed, scale, None)

        def step(running, key):
            seen, carry = running
            action, carry = policy(seen, carry, key)
            return (jnp.stack([action[0], seen[1] + 0.02]), carry), seen[1] - seen[0]

        start = jnp.zeros(2), policy.init(KEYS[0])
        return jax.lax.scan(step, start, jax.random.split(KEYS[0], 300))[1]

    found = lag(jnp.asarray([0.0, 0.5, 1.0, 1.5]))
    np.testing.assert_allclose(found[:3, -1], [0.08, 0.04, 0.0], atol=2e-3)
    assert np.abs(found[3, -20:]).max() > 1.0


def test_guidance_is_the_score_of_a_quotient_of_densities():
    def mixture(seen):
        return Mixture(jnp.log(jnp.asarray([0.3, 0.7])), jnp.stack([seen, -seen - 0.2])[:, None], jnp.asarray([[0.04]]))

    denoiser = MixtureDenoiser(mixture=lambda seen: mixture(seen[0]), process=PROCESS, chunk_shape=(1, 1))
    scale, level, x = 1.3, jnp.asarray(6), jnp.asarray([[0.4]])
    pair = jnp.asarray([[0.6], [0.35]])
    generator = self_guided(ChunkGenerator(denoiser, SAMPLER), scale)

    @jax.jit
    def predictions():
        guided = generator.denoiser.predict(x, level, generator.encode(pair)).noise
        now, past = (denoiser.predict(x, level, denoiser.encode(seen)).noise for seen in pair)
        return guided[0, 0], ((1 + scale) * now - scale * past)[0, 0]

    guided, separate = predictions()
    np.testing.assert_allclose(guided, separate, atol=1e-6)
    alpha, sigma = (float(each) for each in PROCESS.coefficients(level))

    def log_density(x, seen):
        means, spread = alpha * np.asarray([seen, -seen - 0.2]), alpha**2 * 0.04 + sigma**2
        return np.log(np.sum([0.3, 0.7] * np.exp(-((x - means) ** 2) / (2 * spread))))

    def quotient(x):
        return (1 + scale) * log_density(x, 0.6) - scale * log_density(x, 0.35)

    slope = (quotient(0.4 + 1e-5) - quotient(0.4 - 1e-5)) / 2e-5
    np.testing.assert_allclose(guided, -sigma * slope, atol=1e-5)


def test_windows_of_the_past():
    """Windows of two, two steps back: with mean = newest of the window, 2 now - past, and no guidance at first."""
    generator = ChunkGenerator(gaussian(lambda seen: seen[-1, 0], 1e-4, rows=3), SAMPLER)
    policy = generator.policy(1, jnp.zeros(1), observation_horizon=2)
    guided = SelfGuidedPolicy(policy, 1.0, None, lookback=2)
    actions, carry = trace(guided, jnp.asarray([[0.1], [0.4], [0.2], [0.9]]), KEYS)
    np.testing.assert_allclose(actions[:, 0], [0.1, 0.7, 0.3, 1.4], atol=2e-3)
    np.testing.assert_allclose(carry.seen.history[-1][:, 0], [0.1, 0.4, 0.2, 0.9], atol=1e-6)


@pytest.mark.parametrize(
    ("queued", "fresh", "threshold", "metric", "same"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.97, "cosine", True),
        ([0.0, 0.0], [1.0, 0.0], -0.99, "cosine", False),
        ([1.0, 0.0], [5.0, 0.0], 0.97, "cosine", True),
        ([1.0, 0.0], [-1.0, 0.0], -0.5, "cosine", False),
        ([0.3, 0.0], [0.0, 0.4], 0.6, "l2", True),
        ([0.3, 0.0], [0.0, 0.4], 0.6, "l1", False),
    ],
)
def test_agreement(queued, fresh, threshold, metric, same):
    assert bool(agree(jnp.asarray(queued), jnp.asarray(fresh), threshold, metric)) is same


def test_activation_guidance():
    blocks = [lambda h: 2.0 * h, lambda h: h + 1.0]
    hidden, cached = activation_guidance(blocks, jnp.asarray(1.0), None, 0.0)
    assert [float(each) for each in cached] == [2.0, 3.0]
    # 2 * (2 * 2) - 2 = 6, then 2 * (6 + 1) - 3 = 11.
    hidden, cached = activation_guidance(blocks, jnp.asarray(2.0), cached, 1.0)
    assert float(hidden) == 11.0
    assert [float(each) for each in cached] == [6.0, 11.0]


def other_shape():
    policy = SelfGuidedPolicy(table_policy(), None)
    return policy(jnp.zeros(2), policy.init(KEYS[0]), KEYS[0])


BAD = {
    "scale": (lambda: SelfGuidedPolicy(table_policy(), -0.1), InputError, r"guidance_scale is -0\.1"),
    "NaN": (lambda: SelfGuidedPolicy(table_policy(), float("nan")), InputError, "guidance_scale is nan"),
    "lookback": (lambda: SelfGuidedPolicy(table_policy(), lookback=0), InputError, "lookback is 0"),
    "threshold": (lambda: SelfGuidedPolicy(table_policy(), threshold=1.5), InputError, r"threshold is 1\.5"),
    "distance": (lambda: SelfGuidedPolicy(table_policy(), threshold=-0.1, metric="l1"), InputError, r"threshold is -0"),
    "metric": (lambda: SelfGuidedPolicy(table_policy(), metric="cosin"), InputError, "Unknown metric 'cosin'"),
    "one row": (lambda: SelfGuidedPolicy(table_policy(TABLE[:, :1])), InputError, "policy's chunks have 1 row"),
    "replan": (lambda: SelfGuidedPolicy(table_policy(), replan_every=4), InputError, "replan_every is 4"),
    "generator": (
        lambda: SelfGuidedPolicy(ChunkPolicy(lambda o, k: jnp.zeros((2, 1)), 1, jnp.zeros(1))),
        InputTypeError,
        "policy's generator is a function",
    ),
    "shapes": (other_shape, InputError, r"observation's shape is \(2,\).*\(1,\)"),
    "cache": (lambda: activation_guidance([jnp.tanh], jnp.zeros(1), None, 1.0), InputError, "cached is None"),
    "cache size": (
        lambda: activation_guidance([jnp.tanh], jnp.zeros(1), [], 1.0),
        InputError,
        "cached is '0 activations'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_a_policy_that_does_not_look_warns():
    blind = ChunkGenerator(gaussian(lambda seen: 0.3, 0.1), SAMPLER).policy(1, jnp.zeros(1))
    with pytest.warns(UserWarning, match="ignores the observation"):
        SelfGuidedPolicy(blind)
