"""Exact solutions of explicit models: values, occupancies, gradients and optimal policies.

Policies are tables of probabilities ``[S, A]``. Everything is a linear solve or a fixed-point iteration in the
model's precision, runs under ``jit`` and ``vmap`` (over policies, models or both), and is differentiable except for
:func:`value_iteration`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steersman.errors import require, require_count, require_number
from steersman.mdp.model import MDP, require_distributions


def require_policy(mdp: MDP, pi: Array, argument: str = "pi") -> None:
    """Checks that `pi` is a table of action probabilities ``[S, A]`` for `mdp`."""
    expected = (mdp.num_states, mdp.num_actions)
    require(pi.shape == expected, f"{argument}'s shape", pi.shape, f"[S, A], here {expected}")
    require_distributions(argument, pi)


def policy_transition(mdp: MDP, pi: Float[Array, "S A"]) -> Float[Array, "S S"]:
    """The state chain under a policy, ``P_pi(s' | s)``."""
    return jnp.einsum("sa,sat->st", pi, mdp.transition)


def policy_evaluation(mdp: MDP, pi: Float[Array, "S A"]) -> tuple[Float[Array, " S"], Float[Array, "S A"]]:
    """Exact discounted values of a policy: ``V = (I - discount P_pi)^-1 r_pi`` and ``Q = r + discount P V``.

    Args:
        mdp: the model.
        pi: action probabilities.

    Returns:
        ``(V, Q)``: state values ``[S]`` and action values ``[S, A]``.
    """
    require_policy(mdp, pi)
    system = jnp.eye(mdp.num_states, dtype=mdp.transition.dtype) - mdp.discount * policy_transition(mdp, pi)
    value = jnp.linalg.solve(system, jnp.sum(pi * mdp.reward, axis=-1))
    return value, mdp.reward + mdp.discount * (mdp.transition @ value)


def advantage(mdp: MDP, pi: Float[Array, "S A"]) -> Float[Array, "S A"]:
    """``A = Q - V`` of a policy; its mean under the policy is zero in every state."""
    value, q_value = policy_evaluation(mdp, pi)
    return q_value - value[:, None]


def occupancy(mdp: MDP, pi: Float[Array, "S A"]) -> Float[Array, " S"]:
    """Normalized discounted state occupancy, ``d(s) = (1 - discount) sum_t discount^t P(s_t = s)``.

    Dividing by ``1 - discount`` gives the unnormalized visitation; multiplying by ``pi`` the occupancy of pairs.
    """
    require_policy(mdp, pi)
    system = jnp.eye(mdp.num_states, dtype=mdp.transition.dtype) - mdp.discount * policy_transition(mdp, pi).T
    return jnp.linalg.solve(system, (1.0 - mdp.discount) * mdp.start)


def expected_return(mdp: MDP, pi: Float[Array, "S A"]) -> Float[Array, ""]:
    """Expected discounted return from the start distribution, ``sum_s start(s) V(s)``."""
    return jnp.dot(mdp.start, policy_evaluation(mdp, pi)[0])


def policy_gradient(mdp: MDP, logits: Float[Array, "S A"]) -> Float[Array, "S A"]:
    """Exact gradient of the expected return in the logits of a softmax policy.

    ``d eta / d logits(s, a) = d(s) pi(a | s) A(s, a) / (1 - discount)``: the policy gradient theorem (Sutton et al.,
    2000) for a table.
    """
    expected = (mdp.num_states, mdp.num_actions)
    require(logits.shape == expected, "logits' shape", logits.shape, f"[S, A], here {expected}")
    require_number("logits", logits)
    pi = jax.nn.softmax(logits, axis=-1)
    visitation = occupancy(mdp, pi) / (1.0 - mdp.discount)
    return visitation[:, None] * pi * advantage(mdp, pi)


def performance_difference(mdp: MDP, old: Float[Array, "S A"], new: Float[Array, "S A"]) -> Float[Array, ""]:
    """``eta(new) - eta(old)`` from the old advantages and the new occupancy.

    ``sum_s d_new(s) sum_a new(a | s) A_old(s, a) / (1 - discount)`` (Kakade and Langford, 2002). It keeps digits
    that the difference of two returns loses when the policies are close.
    """
    require_policy(mdp, old, "old")
    require_policy(mdp, new, "new")
    gain = jnp.sum((new - old) * advantage(mdp, old), axis=-1)
    return jnp.dot(occupancy(mdp, new), gain) / (1.0 - mdp.discount)


class OptimalSolution(NamedTuple):
    """What :func:`value_iteration` found.

    Attributes:
        value: optimal state values ``[S]``, within the tolerance.
        q_value: their action values ``[S, A]``.
        policy: a greedy policy, one probability of one in each row ``[S, A]``.
        iterations: sweeps that were needed.
        change: largest change of a value in the last sweep.
    """

    value: Float[Array, " S"]
    q_value: Float[Array, "S A"]
    policy: Float[Array, "S A"]
    iterations: Int[Array, ""]
    change: Float[Array, ""]


def value_iteration(mdp: MDP, *, tolerance: float = 1e-8, max_iterations: int = 100_000) -> OptimalSolution:
    """Optimal values by repeated application of ``V <- max_a (r + discount P V)``.

    Stops when a sweep changes no value by more than ``tolerance (1 - discount) / (2 discount)``, which makes the
    values `tolerance` / 2 accurate and the greedy policy `tolerance`-optimal (Puterman, 1994, Theorem 6.3.1), or when
    what changes is below the rounding of the values.

    Args:
        mdp: the model.
        tolerance: how much the greedy policy may lose in any state, in units of the reward.
        max_iterations: sweeps after which it stops in any case.
    """
    require_number("tolerance", tolerance, above=0.0)
    require_count("max_iterations", max_iterations)
    dtype = mdp.transition.dtype
    rounding = jnp.finfo(dtype).eps

    def bellman(value: Array) -> Array:
        return mdp.reward + mdp.discount * (mdp.transition @ value)

    def running(state: tuple[Array, Array, Array]) -> Array:
        value, change, iteration = state
        enough = tolerance * (1.0 - mdp.discount) / (2.0 * jnp.maximum(mdp.discount, rounding))
        floor = 8.0 * rounding * jnp.max(jnp.abs(value))
        return (change > jnp.maximum(enough, floor)) & (iteration < max_iterations)

    def sweep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        value, _, iteration = state
        following = jnp.max(bellman(value), axis=-1)
        return following, jnp.max(jnp.abs(following - value)), iteration + 1

    start = (jnp.zeros(mdp.num_states, dtype), jnp.asarray(jnp.inf, dtype), jnp.zeros((), jnp.int32))
    value, change, iterations = jax.lax.while_loop(running, sweep, start)
    q_value = bellman(value)
    policy = jax.nn.one_hot(jnp.argmax(q_value, axis=-1), mdp.num_actions, dtype=dtype)
    return OptimalSolution(value, q_value, policy, iterations, change)
