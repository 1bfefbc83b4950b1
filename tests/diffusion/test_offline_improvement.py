"""The offline stage: ratios, deviations, revert and discount by hand, and what it refuses."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import DDIM, ChunkGenerator, DiscreteVP, NetworkDenoiser
from steersman.diffusion.offline_improvement import OfflineImprovement, exploring_chains, generator_of
from steersman.diffusion.samplers import posterior
from steersman.diffusion.scaling import Scaling
from steersman.envs.chunk_data import ChunkPairs
from steersman.envs.chunk_transitions import ChunkTransitions
from steersman.errors import InputError, InputTypeError
from steersman.networks import MLPDenoiser
from steersman.rl.implicit_q import ImplicitQLearning
from steersman.rl.model_evaluation import ImprovementGate, ModelRolloutValue
from steersman.training import EnsembleLearner, MovingAverage
from steersman.training.optimizers import SGD

BOUNDS = (0.05, 0.6)
SIZES = {"updates": 1, "batch_size": 16, "rollouts": 4, "evaluation": ModelRolloutValue(2)}
CRITICS = ImplicitQLearning(
    hidden=(8,), learning_rate=1e-2, batch_size=16, updates=800, average=MovingAverage(0.9, bias_corrected=False)
)
MODEL = EnsembleLearner(hidden=(8,), terminates=True, epochs=1, batches=1, batch_size=8, holdout_rows=8)


def policy(rows=3, sampler=None, **more):
    network = MLPDenoiser((rows, 2), 2, (8,), time_size=4, longest_time=20.0, key=jax.random.key(0))
    denoiser = NetworkDenoiser(network=network, process=DiscreteVP.squared_cosine(20), chunk_shape=(rows, 2))
    sampler = DDIM(4, eta=1.0, std_bounds=BOUNDS) if sampler is None else sampler
    return ChunkGenerator(denoiser, sampler, **more).policy(2, jnp.zeros(2))


def transitions(rows=3, reward: Any = 2.0, played=2, **changes):
    """A task that goes on for ever and pays one for every action."""
    seen = jax.random.uniform(jax.random.key(1), (32, 2))
    chunk = jax.random.uniform(jax.random.key(2), (32, rows, 2))
    none = jnp.zeros(32, bool)
    data = ChunkTransitions(seen, chunk, jnp.full(32, reward), seen[::-1], none, none, ~none, rows=played)
    return dataclasses.replace(data, **changes)


OFFLINE = OfflineImprovement(policy(), CRITICS, MODEL, gamma=0.5, gate=ImprovementGate(1e6), **SIZES)


@pytest.fixture(scope="module")
def improved():
    """One initialization, and one block that is refused and one that is not."""
    state = eqx.filter_jit(OFFLINE.init)(transitions(), jax.random.key(0))
    free = dataclasses.replace(OFFLINE, gate=None)
    # Rates in one program: the smallest changes nothing that could be seen.
    step = eqx.filter_jit(lambda rate: dataclasses.replace(free, learning_rate=rate).step(None, state))
    return state, step


def test_a_decision_is_discounted_by_all_of_its_actions(improved):
    """Two actions that pay one each, a discount of one half an action: V = 2 / (1 - 1/4)."""
    state, _ = improved
    value = jax.vmap(state.critics.value)(state.features)
    np.testing.assert_allclose(value, 2.0 / (1.0 - 0.25), atol=0.1)


def test_at_the_behaviour_policy_the_loss_is_minus_the_mean_advantage(improved):
    state, step = improved
    _, shown = step(jnp.asarray(1e-12))
    assert float(shown["loss"]) == pytest.approx(0.0, abs=1e-5)
    accepted, _ = step(jnp.asarray(1e-2))
    before, after = (jax.tree.leaves(tree) for tree in (state.accepted.kept, accepted.accepted.kept))
    assert max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(before, after, strict=True)) > 1e-3
    assert float(accepted.accepted.value) != float(state.accepted.value)
    moved, start = generator_of(OFFLINE.policy(accepted)), generator_of(OFFLINE.start)
    assert bool(eqx.tree_equal(eqx.tree_at(lambda g: g.denoiser.network, moved, start.denoiser.network), start))


def test_what_a_gate_refuses_is_undone(improved):
    state, _ = improved
    following, shown = eqx.filter_jit(OFFLINE.step)(None, state)
    assert float(shown["accepted"]) == 0.0
    assert bool(eqx.tree_equal(following.accepted.kept, state.accepted.kept))
    assert bool(eqx.tree_equal(following.optimizer, state.optimizer))
    assert int(following.accepted.judged) == 1
    assert bool(eqx.tree_equal(OFFLINE.policy(following), OFFLINE.start))


def test_likelihoods_are_those_of_the_clipped_deviations(improved):
    state, _ = improved
    actor = OFFLINE._actor(state.features)
    states, gaussians = eqx.filter_jit(eqx.filter_vmap(actor.draw))(
        state.features, jax.random.split(jax.random.key(3), 32)
    )
    process = generator_of(OFFLINE.start).denoiser.process
    grid = process.grid(4)
    # DDPM's posterior between the two levels: beta~ = (1 - abar') / (1 - abar) (1 - abar / abar').
    before, here = (np.asarray(process.coefficients(level)[0]) ** 2 for level in (grid.following, grid.current))
    own = np.sqrt((1.0 - before) / (1.0 - here) * (1.0 - here / before))
    np.testing.assert_allclose(jax.vmap(lambda c, f: posterior(process, c, f)[2])(*_levels(grid)), own, atol=1e-6)
    assert own.min() < BOUNDS[0] < BOUNDS[1] < own.max()
    np.testing.assert_allclose(gaussians.std, np.broadcast_to(np.clip(own, *BOUNDS), (32, 4)), atol=1e-6)
    recorded = actor.head.log_prob(gaussians, states)
    asked = jax.vmap(lambda i: jax.vmap(lambda o, s: actor.step_log_prob(o, s, i))(state.features, states))
    np.testing.assert_allclose(eqx.filter_jit(asked)(jnp.arange(4)).T, recorded, atol=1e-4, rtol=1e-5)
    z = (states[:, 1:, :2] - gaussians.mean[:, :, :2]) / gaussians.std[..., None, None]
    by_hand = jnp.sum(-0.5 * z**2 - jnp.log(gaussians.std * jnp.sqrt(2 * jnp.pi))[..., None, None], axis=(2, 3))
    np.testing.assert_allclose(recorded, by_hand, rtol=1e-5, atol=1e-4)


def _levels(grid):
    return grid.current, grid.following


def test_policies_that_cannot_explore_are_refused():
    for sampler, message in [
        (DDIM(4), "std_bounds None"),
        (DDIM(4, eta=1.0, std_bounds=(0.0, 0.1)), "std_bounds"),
        (DDIM(3, eta=1.0, std_bounds=BOUNDS), "steps is 3, but it must divide the 20 levels"),
    ]:
        with pytest.raises(InputError, match=message):
            exploring_chains(policy(sampler=sampler))
    with pytest.raises(InputError, match="std_bounds is"):
        DDIM(4, eta=1.0, std_bounds=(0.2, 0.1))
    wrong: Any = 3
    with pytest.raises(Exception, match="start"):
        OfflineImprovement(wrong)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: ChunkPairs(transitions().observation, transitions().chunk), "ChunkTransitions"),
        (lambda: transitions(rows=4), r"problem\.chunk's shape"),
        (lambda: transitions(played=3), r"problem\.played_rows is 3"),
        (lambda: transitions(chunk=50.0 * transitions().chunk, reward=jnp.arange(32.0)), r"problem\.chunk reaches"),
    ],
)
def test_data_that_does_not_fit_the_policy_is_refused(problem, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        OFFLINE.check(problem())


def test_data_without_a_success_is_told():
    with pytest.warns(UserWarning, match=r"problem\.reward is the same everywhere"):
        OFFLINE.check(transitions())


def test_numbers_that_cannot_be_are_refused():
    blind = dataclasses.replace(OFFLINE, model=dataclasses.replace(MODEL, terminates=False))
    with pytest.raises(InputError, match=r"model\.terminates is False"):
        blind.check(transitions(terminated=jnp.arange(32) == 5))
    scaled = policy(action_scaling=Scaling(jnp.zeros(2), jnp.asarray([50.0, 50.0])))
    dataclasses.replace(OFFLINE, start=scaled).check(
        transitions(chunk=50.0 * transitions().chunk, reward=jnp.arange(32.0))
    )
    for slots, message in [({"clip": 0.0}, "clip is 0"), ({"gamma": 1.5}, "gamma is"), ({"updates": 0}, "updates is")]:
        with pytest.raises(InputError, match=message):
            dataclasses.replace(OFFLINE, **slots)
    assert isinstance(dataclasses.replace(OFFLINE, optimizer=SGD()).optimizer, SGD)
