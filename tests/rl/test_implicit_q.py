"""Implicit Q-learning against expectiles and Bellman targets worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.errors import InputError, InputTypeError
from steersman.rl.implicit_q import ImplicitQLearning
from steersman.training import MovingAverage, Replay, Transition

#: Action 0 pays nothing and action 1 pays one, equally often, in the one state there is.
ROWS = Transition(
    observation=jnp.zeros((64, 1)),
    action=jnp.arange(64.0)[:, None] % 2,
    reward=jnp.arange(64.0) % 2,
    next_observation=jnp.zeros((64, 1)),
    terminated=jnp.zeros(64, bool),
    truncated=jnp.zeros(64, bool),
)
LEARNING = ImplicitQLearning(
    hidden=(16,), learning_rate=1e-2, batch_size=64, updates=600, average=MovingAverage(0.9, bias_corrected=False)
)


def test_values_are_expectiles_of_what_the_data_did():
    """With no discount and exact action values 0 and 1, V is the expectile itself."""

    @jax.jit
    @jax.vmap
    def fit(expectile):
        learning = dataclasses.replace(LEARNING, expectile=expectile)
        critics, _ = learning.fit(learning.init(1, 1, jax.random.key(0)), Replay.of(ROWS), 0.0, jax.random.key(1))
        both = jnp.zeros((2, 1)), jnp.asarray([[0.0], [1.0]])
        return critics.value(jnp.zeros(1)), critics.action_value(*both), critics.advantage(*both)

    value, action_value, advantage = fit(jnp.asarray([0.7, 0.5]))
    np.testing.assert_allclose(value, [0.7, 0.5], atol=0.03)
    np.testing.assert_allclose(action_value, [[0.0, 1.0]] * 2, atol=0.02)
    np.testing.assert_allclose(advantage, action_value - value[:, None], atol=1e-6)


def test_targets_stop_at_terminations_and_discount_each_row_by_its_own_number():
    critics = LEARNING.init(1, 1, jax.random.key(3))
    rows = jax.tree.map(lambda leaf: leaf[:3], ROWS)._replace(
        next_observation=jnp.asarray([[0.3], [0.3], [0.3]]), terminated=jnp.asarray([False, True, False])
    )
    discount = jnp.asarray([0.5, 0.5, 0.1])
    q_loss, _ = LEARNING.losses((critics.q, critics.v), critics, rows, discount)
    after = float(critics.value(jnp.asarray([0.3])))
    target = np.asarray([0.0 + 0.5 * after, 1.0, 0.0 + 0.1 * after])
    inputs = jnp.concatenate([rows.observation, rows.action], axis=1)
    each = [jax.tree.map(lambda leaf, j=j: leaf[j], critics.q)(inputs)[:, 0] for j in (0, 1)]
    errors = [np.mean((np.asarray(q) - target) ** 2) for q in each]
    assert float(q_loss) == pytest.approx(np.mean(errors), rel=1e-5)
    np.testing.assert_allclose(critics.action_value(rows.observation, rows.action), np.minimum(*each), rtol=1e-6)


def test_targets_move_every_few_updates():
    learning = dataclasses.replace(LEARNING, target_every=2)
    critics, seen = learning.init(1, 1, jax.random.key(0)), []
    step = jax.jit(lambda critics: learning.step(critics, ROWS, 0.9)[0])
    for _ in range(4):
        critics = step(critics)
        seen.append(np.asarray(critics.target.value.biases[-1]))
    assert np.array_equal(seen[1], seen[2])
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[2], seen[3])


@pytest.mark.parametrize("expectile", [0.0, 1.0, float("nan")])
def test_expectiles_outside_are_refused(expectile):
    with pytest.raises(InputError, match="expectile is"):
        ImplicitQLearning(expectile=expectile)


def test_other_bad_input():
    with pytest.raises(InputError, match="learning_rate is"):
        ImplicitQLearning(learning_rate=0.0)
    with pytest.raises(InputError, match="critics is 0"):
        ImplicitQLearning(critics=0)
    with pytest.raises(InputTypeError, match="updates is"):
        ImplicitQLearning(updates=True)
    empty = Replay.zeros(jax.tree.map(lambda leaf: leaf[0], ROWS), 4)
    with pytest.raises(InputError, match="replay's size"):
        LEARNING.fit(LEARNING.init(1, 1, jax.random.key(0)), empty, 0.9, jax.random.key(0))
