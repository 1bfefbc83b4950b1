"""Real-time iteration against closed forms: on Gaussian policies a sweep is affine, so moments follow exactly."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import (
    DDIM,
    DDPM,
    ChunkGenerator,
    Denoiser,
    DiscreteVP,
    DPMSolver,
    Mixture,
    MixtureDenoiser,
    NoiseProcess,
    RectifiedFlow,
    Scaling,
    sample,
)
from steersman.diffusion.rti_dp import DiscreteActions, RealTimeIteration, scale_discrete
from steersman.diffusion.warm_start import contraction, estimate_start, warm_grid
from steersman.errors import InputError, InputTypeError
from steersman.policies import ChunkPolicy

PROCESS = DiscreteVP.squared_cosine(100)
SHORT = DiscreteVP.squared_cosine(12)
LONG = [25, 22, 20, 18, 16, 14, 12, 10, 8, 5, 3, 2, 1, 0]
CALLS = []


class Moving(Denoiser):
    """The exact denoiser of rows around ``speed (time + row)``, where the observation is the time; counts its calls."""

    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True, default=(4, 1))
    speed: float = 0.05
    std: float = 0.05

    def predict(self, x, level, condition):
        jax.debug.callback(lambda: CALLS.append(1))
        rows, columns = self.chunk_shape
        mean = self.speed * (condition + jnp.arange(rows)[:, None]) * jnp.ones(columns)
        alpha, sigma = self.process.coefficients(level)
        found = Mixture(jnp.zeros(1), mean.reshape(1, -1), jnp.asarray(self.std**2)).predict(x.ravel(), alpha, sigma)
        return jax.tree.map(lambda flat: flat.reshape(x.shape), found)


def moving(process=SHORT, sampler=None, shape=(4, 1)):
    # Draws so small that what is played is the mean.
    sampler = DDPM(limit=None, noise_limit=1e-9) if sampler is None else sampler
    generator = ChunkGenerator(Moving(process, shape), sampler)
    return generator.policy(1, jnp.zeros(1))


@jax.jit
def swept(start, noises, current, mean, std):
    """One sweep of single steps, for a Gaussian policy of one number."""
    mixture = Mixture(jnp.zeros(1), mean[None, None], std**2)
    denoiser = MixtureDenoiser(mixture=lambda _: mixture, process=PROCESS, chunk_shape=(1, 1))
    grid = PROCESS.single_steps([0])
    grid = eqx.tree_at(lambda own: (own.current, own.following), grid, (current, current - 1))
    chunk = sample(denoiser, DDPM(limit=None), mixture, None, start=start[None, None], noises=noises, grid=grid).chunk
    return chunk[0, 0]


def moments(labels, guess, mean=1.0, std=0.05):
    """Mean and variance of one sweep, and its slope in the guess; it is affine in guess and noise."""
    given = jnp.asarray(labels, jnp.int32), jnp.asarray(mean), jnp.asarray(std)
    noises = jnp.zeros((len(labels), 1, 1))
    value = swept(jnp.asarray(guess), noises, *given)
    slope, spread = jax.grad(swept, (0, 1))(jnp.asarray(guess), noises, *given)
    return float(value), float(jnp.sum(spread**2)), float(slope)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 1, 0], (0.21168, 0.42742, 0.74982)),
        (list(range(25, -1, -1)), (0.00498, 0.01373, 0.05292)),
        (LONG, (0.03366, 0.08081, 0.21218)),
    ],
)
def test_contraction(labels, expected):
    stds = jnp.asarray([0.03, 0.05, 0.1])
    grid = PROCESS.single_steps(labels)
    found = jax.vmap(lambda std: contraction(PROCESS, DDPM(), grid, std))(stds)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if labels[0] == len(labels) - 1:
        alpha, sigma = PROCESS.coefficients(jnp.asarray(labels[0]))
        np.testing.assert_allclose(found, alpha * stds**2 / (alpha**2 * stds**2 + sigma**2), atol=1e-5)


def test_moments_of_a_sweep():
    low_mean, variance, slope = moments([2, 1, 0], 0.8)
    mean = moments([2, 1, 0], 1.0)[0]
    np.testing.assert_allclose([low_mean, mean], [0.915232, 1.000716], atol=2e-6)
    np.testing.assert_allclose(variance, 5.47253e-4, rtol=1e-4)
    # Repeated, guess = last result: the fixed point of m -> m(0) + slope m, and of v -> variance + slope^2 v.
    offset = mean - slope
    np.testing.assert_allclose(offset / (1 - slope), 1.001251, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(variance / (1 - slope**2)), 0.025876, atol=1e-5)
    _, variance, slope = moments(LONG, 1.0)
    np.testing.assert_allclose(np.sqrt(variance / (1 - slope**2)), 0.047702, atol=1e-5)


def test_all_levels_from_noise_are_the_policy_itself():
    policy = moving(sampler=DDPM())
    warm = RealTimeIteration(policy, range(11, -1, -1))
    key, observation = jax.random.key(1), jnp.ones(1)
    noise = jax.random.normal(jax.random.key(0), (5, 1))
    carry = warm.init(key)
    carry = carry._replace(seen=carry.seen._replace(started=jnp.asarray(True)), chunk=noise[:4])
    start = jnp.concatenate([noise[1:4], noise[3:4]])

    @jax.jit
    def both(carry):
        return warm.refresh(observation, carry, key)[1], policy.generator.chain(observation, key, start=start).chunk

    carry, expected = both(carry)
    np.testing.assert_array_equal(carry.chunk, expected)


@pytest.mark.parametrize(
    ("mode", "std", "guess", "expected"),
    [
        (1.0, 0.03, 1.0, {(2, 1, 0): 1.0, (22, 20, 18, 16, 14, 12, 10, 8, 5, 3, 2, 1, 0): 1.0}),
        (0.1, 0.003, 0.1, {(2, 1, 0): 0.0999, (7, 5, 3, 1, 0): -0.0996}),
        (1.0, 0.03, 0.1, {(7, 5, 3, 1, 0): 0.879, (22, 20, 18, 16, 14, 12, 10, 8, 5, 3, 2, 1, 0): -0.960}),
    ],
)
def test_gripper_flips(mode, std, guess, expected):
    for labels, value in expected.items():
        chunk = gripper(PROCESS.single_steps(labels), *(jnp.asarray(each) for each in (mode, std, guess)))
        np.testing.assert_allclose(chunk, value, atol=1e-3)


@eqx.filter_jit
def gripper(grid, mode, std, guess):
    mixture = Mixture(jnp.log(jnp.asarray([0.99, 0.01])), jnp.stack([-mode, mode])[:, None], std**2)
    denoiser = MixtureDenoiser(mixture=lambda _: mixture, process=PROCESS, chunk_shape=(1, 1))
    noises = jnp.zeros((grid.steps, 1, 1))
    return sample(denoiser, DDPM(), mixture, None, start=guess[None, None], noises=noises, grid=grid).chunk[0, 0]


def test_the_shift_leads_a_moving_target():
    policy = moving(PROCESS)
    warm = RealTimeIteration(policy, [2, 1, 0])
    grid, generator = PROCESS.single_steps([2, 1, 0]), policy.generator

    @jax.jit
    def both(key):
        def step(running, time):
            carry, still = running
            _, carry = warm.refresh(time, carry, key)
            still = generator.chain(time, key, start=still, grid=grid).chunk
            return (carry, still), (carry.chunk[0, 0] - 0.05 * time[0], still[0, 0] - 0.05 * time[0])

        carry = warm.init(key)
        carry = carry._replace(chunk=0.05 * jnp.arange(4.0)[:, None])
        return jax.lax.scan(step, (carry, carry.chunk), jnp.arange(1.0, 41.0)[:, None])[1]

    with_shift, without = both(jax.random.key(0))
    # Without: e = c (e - v), which settles at -c v / (1 - c).
    c = float(contraction(PROCESS, DDPM(), grid, 0.05))
    offset = without[-1] + c * 0.05 / (1 - c)
    assert abs(offset) < 5e-3
    assert abs(with_shift[-1]) < abs(without[-1]) / 3


def test_copies_and_calls():
    warm = RealTimeIteration(moving(sampler=DDPM()), [5, 3, 1, 0])
    observations, keys = jnp.asarray([[0.0], [1.0], [2.0]]), jax.random.split(jax.random.key(0), (3, 2))

    @jax.jit
    def two_steps(observation, keys):
        carry = warm.init(keys[0])
        first, carry = warm(observation, carry, keys[0])
        second, carry = warm(observation, carry, keys[1])
        return first, second, carry.chunk

    CALLS.clear()
    alone = [two_steps(*case) for case in zip(observations, keys, strict=True)]
    jax.effects_barrier()
    assert len(CALLS) == 3 * (12 + 4)

    @jax.jit
    @jax.vmap
    def in_lockstep(observation, keys):
        first, carry = warm.begin(observation, warm.init(keys[0]), keys[0])
        second, carry = warm.refresh(observation, carry, keys[1])
        return first, second, carry.chunk

    together = in_lockstep(observations, keys)
    for i, case in enumerate(alone):
        for one, many in zip(case, together, strict=True):
            np.testing.assert_allclose(one, many[i], atol=1e-5)
    assert warm.calls == 4


def test_windows_and_their_row():
    """With windows of two the row due now is the second, and the newest observation comes last."""
    generator = ChunkGenerator(Newest(SHORT), DDPM(limit=None, noise_limit=1e-9))
    warm = RealTimeIteration(generator.policy(1, jnp.zeros(1), observation_horizon=2), [11, 5, 2, 1, 0])
    carry = warm.init(jax.random.key(0))
    for value in (0.3, -0.6):
        action, carry = eqx.filter_jit(warm)(jnp.full(1, value), carry, jax.random.key(1))
    np.testing.assert_allclose(action, -0.6, atol=0.02)
    np.testing.assert_allclose(carry.chunk[:, 0], [0.3, -0.6, -0.6], atol=0.02)


class Newest(Denoiser):
    """Rows around the two observations of the window, the newest one twice."""

    process: NoiseProcess
    chunk_shape: tuple[int, int] = eqx.field(static=True, default=(3, 1))

    def predict(self, x, level, condition):
        alpha, sigma = self.process.coefficients(level)
        mean = jnp.concatenate([condition, condition[-1:]]).reshape(1, -1)
        found = Mixture(jnp.zeros(1), mean, jnp.asarray(1e-4)).predict(x.ravel(), alpha, sigma)
        return jax.tree.map(lambda flat: flat.reshape(x.shape), found)


def test_discrete_dimensions():
    chunk = jnp.asarray([[0.5, 0.02], [0.4, -0.3]])
    clip = DiscreteActions((1,), "clip", 10.0)
    np.testing.assert_allclose(clip.remembered(chunk), [[0.5, 0.1], [0.4, -0.1]])
    np.testing.assert_allclose(clip.command(chunk[1]), [0.4, -1.0])
    scale = DiscreteActions((1,), "scale")
    np.testing.assert_array_equal(scale.remembered(chunk), chunk)
    scaling = scale_discrete(Scaling(jnp.asarray([1.0, 0.5]), jnp.asarray([2.0, 3.0])), [1], 2)
    np.testing.assert_allclose(scaling.normalize(jnp.asarray([3.0, -1.0])), [1.0, -0.1])


def test_estimates_of_the_first_label():
    targets = jnp.ones((3, 2, 1))
    alpha, sigma = (np.asarray(each) for each in PROCESS.coefficients(jnp.arange(100)))
    # The paper's rule finds the level whose mean the guesses are.
    assert estimate_start(PROCESS, float(alpha[30]) * targets, targets) == 30
    found = estimate_start(PROCESS, targets + 0.1, targets, std=0.05, tolerance=0.01)
    left = 0.1 * np.sqrt(2) * alpha * 0.05**2 / (alpha**2 * 0.05**2 + sigma**2)
    assert left[found] <= 0.01 < left[found - 1]


def test_continuous_processes_jump():
    grid = warm_grid(RectifiedFlow(), [0.2, 0.1], "jump")
    np.testing.assert_allclose(grid.current, [0.2, 0.1], atol=1e-7)
    np.testing.assert_allclose(grid.following, [0.1, 0.0], atol=1e-7)
    np.testing.assert_array_equal(warm_grid(PROCESS, [5, 3, 0], "jump").following, [3, 0, -1])
    np.testing.assert_array_equal(warm_grid(PROCESS, [5, 3, 0]).following, [4, 2, -1])


def test_what_is_not_a_number_is_forgotten():
    warm = RealTimeIteration(moving(), [2, 1, 0])
    step = eqx.filter_jit(warm)
    key = jax.random.key(0)
    _, before = step(jnp.ones(1), warm.init(key), key)
    action, after = step(jnp.full(1, jnp.nan), before, key)
    assert np.isnan(action).all()
    np.testing.assert_array_equal(after.chunk, before.chunk)
    assert np.isfinite(step(jnp.ones(1), after, key)[0]).all()


def test_known_entries_are_overwritten():
    warm = RealTimeIteration(moving(), [2, 1, 0], project=lambda chunk, level: chunk.at[1, 0].set(0.7))
    step = eqx.filter_jit(warm)
    _, carry = step(jnp.ones(1), warm.init(jax.random.key(0)), jax.random.key(0))
    _, carry = step(jnp.ones(1), carry, jax.random.key(1))
    np.testing.assert_allclose(carry.chunk[:, 0], [0.05, 0.7, 0.15, 0.2], atol=0.05)
    assert float(carry.chunk[1, 0]) == pytest.approx(0.7)


def refreshed(carry_of, observation=0.0):
    warm = RealTimeIteration(moving(sampler=DDPM()))
    carry = warm.init(jax.random.key(0))
    return warm.refresh(jnp.full(1, observation), carry_of(warm, carry), jax.random.key(0))


def started(warm, carry):
    return warm.resume(carry, jnp.zeros(1), jnp.zeros((4, 1)))


BAD = {
    "rising": (lambda: RealTimeIteration(moving(), [1, 2, 0]), InputError, r"labels is \[1, 2, 0\]"),
    "no zero": (lambda: RealTimeIteration(moving(), [3, 2, 1]), InputError, r"labels is \[3, 2, 1\]"),
    "beyond": (lambda: RealTimeIteration(moving(), [12, 0]), InputError, r"labels is \[12, 0\].*11 at most"),
    "rule": (lambda: warm_grid(SHORT, [0], "sinlge"), InputError, "Unknown step_rule 'sinlge'"),
    "single": (lambda: warm_grid(RectifiedFlow(), [0.1]), InputError, "step_rule is 'single', but a RectifiedFlow"),
    "real labels": (lambda: warm_grid(RectifiedFlow(), [0.1, 0.0], "jump"), InputError, r"labels is \[0\.1, 0\.0\]"),
    "memory": (
        lambda: RealTimeIteration(moving(), sampler=DPMSolver(5)),
        InputError,
        "sampler is a DPMSolver, which builds on its last step",
    ),
    "one row": (lambda: RealTimeIteration(moving(shape=(1, 1))), InputError, "policy's chunks have 1 row"),
    "no chunks": (lambda: RealTimeIteration(moving().generator), InputTypeError, "policy is a ChunkGenerator"),
    "no generator": (
        lambda: RealTimeIteration(ChunkPolicy(lambda o, k: jnp.zeros((2, 1)), 1, jnp.zeros(1))),
        InputTypeError,
        "policy's generator is a function",
    ),
    "factor": (lambda: DiscreteActions((0,), factor=0.0), InputError, "factor is 0"),
    "treatment": (lambda: DiscreteActions((0,), "clamp"), InputError, "Unknown rule 'clamp'"),
    "dims": (
        lambda: RealTimeIteration(moving(), discrete=DiscreteActions((1,))),
        InputError,
        r"dims is \(1,\), but it must be below 1",
    ),
    "scaled dims": (lambda: scale_discrete(Scaling.identity(), [2], 2), InputError, "dims is 2"),
    "too early": (lambda: refreshed(lambda warm, carry: carry), InputError, "carry has no chunk yet"),
    "NaN": (lambda: refreshed(started, jnp.nan), InputError, "observation is"),
    "guess shape": (
        lambda: refreshed(lambda warm, carry: warm.resume(carry, jnp.zeros(1), jnp.zeros((3, 1)))),
        InputError,
        r"chunk.shape is \(3, 1\)",
    ),
    "guess units": (
        lambda: refreshed(lambda warm, carry: warm.resume(carry, jnp.zeros(1), jnp.full((4, 1), 250.0))),
        InputError,
        "chunk is .*250.*at most 1",
    ),
    "estimate": (
        lambda: estimate_start(PROCESS, jnp.zeros((1, 2, 1)), jnp.zeros((1, 3, 1))),
        InputError,
        r"targets.shape is \(1, 3, 1\)",
    ),
    "half a rule": (
        lambda: estimate_start(PROCESS, jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)), std=0.1),
        InputError,
        "tolerance is None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_mode_is_the_evaluation_sampler():
    generator = ChunkGenerator(Moving(SHORT), DDPM(), evaluation=DDIM(4))
    warm = RealTimeIteration(generator.policy(1, jnp.zeros(1))).mode()
    assert warm.policy.generator.sampler == DDIM(4)
