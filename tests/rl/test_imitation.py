"""The pull towards a teacher, on policies whose best answer is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import ContextualBandit, Problem
from steersman.errors import InputError
from steersman.rl.imitation import Imitation
from steersman.rl.on_policy import PPO
from steersman.training import train

SMALL = {"num_envs": 64, "num_steps": 1, "epochs": 2, "minibatches": 2, "hidden": (), "learning_rate": 0.1}
BANDIT = Problem(ContextualBandit(3, 2))


def test_a_strong_pull_leads_to_the_teacher():
    """Rewards weigh nothing beside it: the learner's probabilities become those of a teacher it never was."""
    fresh = PPO(**SMALL).init(BANDIT, jax.random.key(5)).actor
    teacher = eqx.tree_at(lambda p: p.network.trunk.biases[-1], fresh, jnp.asarray([1.5, -1.0]))
    trained = train(PPO(imitation=Imitation(30.0, teacher), **SMALL), BANDIT, iterations=60)
    seen = jnp.eye(3)

    def chances(policy):
        return np.asarray(jax.vmap(lambda s: jax.nn.softmax(policy.distribution(s, ()).logits))(seen))

    np.testing.assert_allclose(chances(trained.policy()), chances(teacher), atol=0.08)
    assert np.isfinite(trained.metrics["imitation_loss"]).all()


def test_bad_input():
    with pytest.raises(InputError, match="coefficient is -1"):
        Imitation(-1.0)
    with pytest.raises(InputError, match="apart from a memory, but this actor has one"):
        PPO(imitation=Imitation(), memory=4, **SMALL).init(BANDIT, jax.random.key(0))
    other = PPO(**SMALL).init(Problem(ContextualBandit(3, 2)), jax.random.key(0)).actor
    assert Imitation(0.0, other).init(other) == ()
