"""Consistency distillation: boundary values by hand, a teacher that a student can equal, and paths without noise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.diffusion import (
    DDIM,
    ChunkGenerator,
    DiscreteVP,
    FlowSolver,
    Mixture,
    MixtureDenoiser,
    MLPRecipe,
    NetworkDenoiser,
    RectifiedFlow,
)
from steersman.diffusion.distillation import ConsistencyDenoiser, ConsistencyDistillation
from steersman.diffusion.samplers import OneCall
from steersman.envs.chunk_data import Observations
from steersman.errors import InputError, InputTypeError
from steersman.networks import MLPDenoiser
from steersman.policies.storage import load_policy, save_policy
from steersman.training import train

PROCESS = DiscreteVP.squared_cosine(20)
OBSERVATIONS = Observations(jnp.linspace(-1.0, 1.0, 8)[:, None])


def teacher(sampler=None, evaluation=None, process=PROCESS, prediction="noise"):
    network = MLPDenoiser((2, 1), 1, (8,), time_size=4, longest_time=20.0, key=jax.random.key(0))
    denoiser = NetworkDenoiser(network=network, process=process, chunk_shape=(2, 1), prediction=prediction)
    sampler = DDIM(4) if sampler is None else sampler
    return ChunkGenerator(denoiser, sampler, evaluation=evaluation).policy(1, jnp.zeros(1))


def test_the_student_is_the_identity_at_level_zero():
    student = ConsistencyDenoiser(teacher().generator.denoiser)
    skip, out = student.boundary(jnp.asarray([0, 3]))
    np.testing.assert_allclose(skip, [1.0, 0.25 / (30.0**2 + 0.25)], rtol=1e-6)
    np.testing.assert_allclose(out, [0.0, 30.0 / np.sqrt(30.0**2 + 0.25)], rtol=1e-6)
    x = jnp.asarray([[0.3], [-2.0]])
    np.testing.assert_allclose(student.predict(x, jnp.asarray(0), jnp.zeros(1)).sample, x)


def test_a_student_that_is_its_teacher_has_no_error():
    """A teacher of one call is reached exactly, but for the share of its input that the boundary form keeps."""
    policy = teacher(OneCall(15, limit=None))
    distillation = ConsistencyDistillation(policy)
    state = distillation.init(OBSERVATIONS, jax.random.key(0))
    seen, z = jnp.asarray([0.4]), jnp.asarray([[0.7], [-0.2]])
    chain = distillation.path(seen, z)
    assert float(distillation.errors(state.network, state.network, seen, chain, jnp.asarray(0))) < 1e-8
    moved = jax.tree.map(lambda leaf: leaf + 0.1 if eqx.is_inexact_array(leaf) else leaf, policy.generator.denoiser)
    other = eqx.tree_at(lambda s: s.denoiser.network, state.network, moved.network)
    assert float(distillation.errors(other, state.network, seen, chain, jnp.asarray(0))) > 1e-3


def test_the_path_is_that_of_the_sampler_for_evaluation():
    noisy = DDIM(4, eta=1.0, std_bounds=(0.1, 0.8))
    z = jnp.asarray([[0.7], [-0.2]])
    found = ConsistencyDistillation(teacher(noisy, DDIM(4))).path(jnp.zeros(1), z)
    expected = teacher().generator.chain(jnp.zeros(1), None, start=z)
    np.testing.assert_allclose(found.states, expected.states, atol=1e-6)
    still = ConsistencyDistillation(teacher(noisy)).path(jnp.zeros(1), z)
    np.testing.assert_allclose(still.states[1:], still.mean, atol=1e-6)


def test_a_pair_of_states_is_pulled_to_the_average_and_the_last_to_the_chunk():
    distillation = ConsistencyDistillation(teacher(), kind="consistency")
    state = distillation.init(OBSERVATIONS, jax.random.key(0))
    seen, z, network = jnp.asarray([0.4]), jnp.asarray([[0.7], [-0.2]]), state.network
    chain, levels = distillation.path(seen, z), [15, 10, 5, 0]
    condition = network.encode(seen)
    for i in range(4):
        found = network.predict(chain.states[i], jnp.asarray(levels[i]), condition).sample
        target = chain.chunk
        if i < 3:
            target = network.predict(chain.states[i + 1], jnp.asarray(levels[i + 1]), condition).sample
        error = distillation.errors(network, network, seen, chain, jnp.asarray(i))
        assert float(error) == pytest.approx(float(jnp.mean((found - target) ** 2)), abs=1e-6)


def test_a_small_student_learns_the_map_of_a_flow(tmp_path):
    process = RectifiedFlow()
    mixture = Mixture(jnp.zeros(1), jnp.full((1, 2), 0.5), jnp.full((1, 2), 0.2))
    exact = ChunkGenerator(MixtureDenoiser(lambda _: mixture, process, (2, 1)), FlowSolver(4)).policy(1, jnp.zeros(1))
    recipe = MLPRecipe(process, "flow", hidden=(16,), time_size=4)
    distillation = ConsistencyDistillation(exact, recipe, learning_rate=1e-2, batch_size=64)
    trained = train(distillation, OBSERVATIONS, iterations=200)
    assert trained.metrics["loss"][-1, 0] < 0.02 * trained.metrics["loss"][0, 0]
    policy = trained.policy()
    loaded = load_policy(save_policy(policy, tmp_path / "student"))
    assert bool(eqx.tree_equal(policy, loaded))
    z = jnp.asarray([[1.0], [-1.0]])
    chunk = policy.generator.chain(jnp.zeros(1), None, start=z).chunk
    np.testing.assert_allclose(chunk, exact.generator.chain(jnp.zeros(1), None, start=z).chunk, atol=0.1)


def test_bad_input():
    with pytest.raises(InputError, match="kind 'same'"):
        ConsistencyDistillation(teacher(), kind="same")
    with pytest.raises(InputError, match="student has another noise process"):
        ConsistencyDistillation(teacher(), MLPRecipe(DiscreteVP.linear(20)))
    with pytest.raises(InputError, match="data_std is 0"):
        ConsistencyDenoiser(teacher().generator.denoiser, 0.0)
    mixture = Mixture(jnp.zeros(1), jnp.zeros((1, 2)), jnp.ones((1, 2)))
    exact = ChunkGenerator(MixtureDenoiser(lambda _: mixture, PROCESS, (2, 1)), DDIM(4)).policy(1, jnp.zeros(1))
    with pytest.raises(InputTypeError, match="student is None"):
        ConsistencyDistillation(exact)
    with pytest.raises(InputTypeError, match="problem is a int"):
        ConsistencyDistillation(teacher()).init(3, jax.random.key(0))
