"""Exact gradient ascent on softmax tables, and what is proven about its steps.

The gradient itself is :func:`~steersman.mdp.policy_gradient`, the policy gradient theorem for a table. Iterated with
exact values, it shows what the theory promises without any sampling noise. Rewards enter the guarantees through the
width of their range only: a shift of all rewards changes no advantage. Everything runs under ``jit`` and ``vmap``,
over models and step sizes too; comparisons with a bound want double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steersman.errors import require, require_count, require_number
from steersman.mdp.evaluation import advantage, expected_return, policy_gradient
from steersman.mdp.model import MDP


class Ascent(NamedTuple):
    """What an iteration on logits passed through.

    Attributes:
        logits: where it ended ``[S, A]``.
        policy: their softmax ``[S, A]``.
        returns: expected return from the start distribution before each step, and after the last ``[T + 1]``.
    """

    logits: Float[Array, "S A"]
    policy: Float[Array, "S A"]
    returns: Float[Array, " iterations"]


def softmax_policy_gradient(
    mdp: MDP,
    learning_rate: Float[Array, ""] | float,
    iterations: int,
    logits: Float[Array, "S A"] | None = None,
) -> Ascent:
    """Gradient ascent with exact gradients, ``logits <- logits + learning_rate grad J``.

    For steps up to :func:`monotone_step_size` the return never falls, and where every state has start probability it
    converges to the optimum at a rate of ``1 / T`` (Mei, Xiao, Szepesvari and Schuurmans, 2020, arXiv:2005.06392).

    Args:
        mdp: the model.
        learning_rate: the step size, above 0.
        iterations: number of steps ``T``.
        logits: where to start; zeros, the uniform policy, where none are given.
    """
    return _ascend(mdp, learning_rate, iterations, logits, lambda theta: policy_gradient(mdp, theta))


def natural_policy_gradient(
    mdp: MDP,
    learning_rate: Float[Array, ""] | float,
    iterations: int,
    logits: Float[Array, "S A"] | None = None,
) -> Ascent:
    """Natural gradient ascent with exact values, ``logits <- logits + learning_rate A / (1 - discount)``.

    ``A / (1 - discount)`` is the gradient times the pseudo-inverse of the Fisher information, up to a shift of each
    state's logits, which no policy sees (Kakade, 2001). Neither the start distribution nor the visitation of a state
    enters: each state's policy is multiplied by ``exp(learning_rate A / (1 - discount))`` and normalized.
    :func:`natural_gradient_bound` bounds what is lost after ``T`` steps.

    Args:
        mdp: the model.
        learning_rate: the step size, above 0; any size is allowed, and larger is faster.
        iterations: number of steps ``T``.
        logits: where to start; zeros, the uniform policy, where none are given.
    """

    def direction(theta: Array) -> Array:
        return advantage(mdp, jax.nn.softmax(theta, axis=-1)) / (1.0 - mdp.discount)

    return _ascend(mdp, learning_rate, iterations, logits, direction)


def _ascend(
    mdp: MDP,
    learning_rate: Float[Array, ""] | float,
    iterations: int,
    logits: Float[Array, "S A"] | None,
    direction: Callable[[Array], Array],
) -> Ascent:
    require_number("learning_rate", learning_rate, above=0.0)
    require_count("iterations", iterations, minimum=0)
    shape = (mdp.num_states, mdp.num_actions)
    if logits is None:
        logits = jnp.zeros(shape, mdp.transition.dtype)
    require(logits.shape == shape, "logits' shape", logits.shape, f"[S, A], here {shape}")
    require_number("logits", logits)

    def score(theta: Array) -> Array:
        return expected_return(mdp, jax.nn.softmax(theta, axis=-1))

    def step(theta: Array, _: None) -> tuple[Array, Array]:
        return (theta + learning_rate * direction(theta)).astype(theta.dtype), score(theta)

    last, returns = jax.lax.scan(step, logits, None, length=iterations)
    return Ascent(last, jax.nn.softmax(last, axis=-1), jnp.append(returns, score(last)))


def natural_gradient_bound(
    num_actions: int,
    discount: Float[Array, "..."] | float,
    learning_rate: Float[Array, "..."] | float,
    iterations: Int[Array, "..."] | int,
    reward_range: Float[Array, "..."] | float = 1.0,
) -> Float[Array, "..."]:
    """The most that ``T`` natural gradient steps from the uniform policy can still lose to the optimum.

    ``J* - J_T <= ln(A) / (eta T) + R / ((1 - discount)^2 T)``, for every step size (Agarwal, Kakade, Lee and Mahajan,
    2021, arXiv:1908.00261, for rewards in [0, 1]; multiplying the rewards by ``R`` is dividing ``eta`` by it). It
    knows nothing of the number of states or of the start distribution.

    Args:
        num_actions: number of actions ``A``.
        discount: discount factor in ``[0, 1)``.
        learning_rate: the step size ``eta``, above 0.
        iterations: number of steps ``T``, at least 1.
        reward_range: largest reward minus smallest ``R``.
    """
    require_count("num_actions", num_actions)
    require_number("discount", discount, at_least=0.0, below=1.0)
    require_number("learning_rate", learning_rate, above=0.0)
    require_number("iterations", iterations, at_least=1.0)
    require_number("reward_range", reward_range, at_least=0.0)
    distance = jnp.log(num_actions) / learning_rate
    return (distance + reward_range / (1.0 - discount) ** 2) / iterations


def monotone_step_size(
    discount: Float[Array, "..."] | float, reward_range: Float[Array, "..."] | float = 1.0
) -> Float[Array, "..."]:
    """A step size of :func:`softmax_policy_gradient` at which the return never falls: ``(1 - discount)^3 / (8 R)``.

    The inverse of the return's smoothness in the logits (Mei et al., 2020, lemma 7, for rewards in [0, 1]). It is
    cautious: much larger steps usually rise too, and are needed to get anywhere soon.

    Args:
        discount: discount factor in ``[0, 1)``.
        reward_range: largest reward minus smallest ``R``, above 0.
    """
    require_number("discount", discount, at_least=0.0, below=1.0)
    require_number("reward_range", reward_range, above=0.0)
    return (1.0 - jnp.asarray(discount)) ** 3 / (8.0 * reward_range)
