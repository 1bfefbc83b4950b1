"""Variance of policy gradients from several actions a state, and when they beat more states.

Nauman and Cygan, "On Many-Actions Policy Gradient", ICML 2023 (arXiv:2210.13011). The estimator averages score-gradient
samples ``Y(s, a) = grad log pi(a | s) Q(s, a)`` over ``T`` states of one trajectory and ``N`` actions at each,

    ghat = (1/T) sum_t (1/N) sum_n Y(s_t, a_t^n),    a_t^n ~ pi(. | s_t) independently,

where the first action of a state is the one that is executed. Exact, for a table and a chain that starts stationary.
Variances of vectors are traces of covariances.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from steersman.errors import require, require_number
from steersman.mdp.evaluation import advantage, policy_evaluation, policy_transition, require_policy
from steersman.mdp.model import MDP

Number = Float[Array, ""] | float | int
Numbers = Float[Array, "..."] | float | int


def stationary_distribution(mdp: MDP, pi: Float[Array, "S A"]) -> Float[Array, " S"]:
    """The distribution of states that the chain under a policy keeps, ``mu = mu P_pi``.

    Args:
        mdp: the model; under the policy its states must form one recurrent class, or there is no single answer.
        pi: action probabilities.

    Returns:
        ``mu`` ``[S]``; NaN or meaningless where the chain falls into several recurrent classes.
    """
    require_policy(mdp, pi)
    chain = policy_transition(mdp, pi)
    # Adding the normalization to every equation keeps the system square and regular.
    ones = jnp.ones_like(chain)
    identity = jnp.eye(mdp.num_states, dtype=chain.dtype)
    return jnp.linalg.solve((identity - chain + ones).T, jnp.ones(mdp.num_states, chain.dtype))


def gradient_samples(
    mdp: MDP, logits: Float[Array, "S A"], *, baseline: Float[Array, " rows"] | None = None
) -> Float[Array, "S A D"]:
    """``Y(s, a) = grad log pi(a | s) (Q(s, a) - b(s))`` in the ``D = S A`` logits of a softmax policy.

    Args:
        mdp: the model.
        logits: of the policy ``[S, A]``.
        baseline: ``b`` ``[S]``; the policy's values unless given, which makes the second factor its advantages.
    """
    expected = (mdp.num_states, mdp.num_actions)
    require(logits.shape == expected, "logits' shape", logits.shape, f"[S, A], here {expected}")
    require_number("logits", logits)
    pi = jax.nn.softmax(logits, axis=-1)
    if baseline is None:
        gain = advantage(mdp, pi)
    else:
        require(baseline.shape == expected[:1], "baseline's shape", baseline.shape, f"[S], here {expected[:1]}")
        gain = policy_evaluation(mdp, pi)[1] - baseline[:, None]
    score = jnp.eye(mdp.num_actions, dtype=pi.dtype) - pi[:, None, :]
    places = jnp.eye(mdp.num_states, dtype=pi.dtype)
    samples = jnp.einsum("sab,sa,st->satb", score, gain, places)
    return samples.reshape(*expected, -1)


class ManyActionsVariance(NamedTuple):
    """What the variance of a many-action gradient is made of; ``total`` is that of one trajectory's estimate.

    Attributes:
        mean: what is estimated ``[D]``, for every number of states and actions.
        between_states: ``Var_s Ybar`` with ``Ybar(s) = E_a Y(s, a)``: what actions cannot lower.
        within_states: ``E_s Var_a Y``, divided by ``N`` in the total.
        state_covariance: ``2 sum_t (1 - t/T) Cov(Ybar(s_0), Ybar(s_t))``.
        action_covariance: ``2 sum_t (1 - t/T) E_s Cov_a(Y(s_0, a_0), E[Ybar(s_t) | s_0, a_0])``, divided by ``N`` in
            the total. Where it is negative and large, more actions can raise the variance.
        total: ``(between + within / N + state_covariance + action_covariance / N) / T``.
    """

    mean: Float[Array, " D"]
    between_states: Float[Array, ""]
    within_states: Float[Array, ""]
    state_covariance: Float[Array, ""]
    action_covariance: Float[Array, ""]
    total: Float[Array, ""]


def many_actions_variance(
    mdp: MDP,
    pi: Float[Array, "S A"],
    samples: Float[Array, "rows columns D"],
    states: Number,
    actions: Number,
) -> ManyActionsVariance:
    """Exact variance of the estimate from `states` consecutive states with `actions` actions each.

    Args:
        mdp: the model.
        pi: the policy, whose chain starts from its stationary distribution.
        samples: ``Y`` ``[S, A, D]``, of any estimator whose samples depend on state and action alone.
        states: ``T``, at least 1. It need not be whole: the formula interpolates, which comparisons of costs want.
        actions: ``N``, at least 1.
    """
    require_policy(mdp, pi)
    fits = samples.shape[:2] == (mdp.num_states, mdp.num_actions) and samples.ndim == 3
    require(fits, "samples' shape", samples.shape, f"[S, A, D] with S = {mdp.num_states} and A = {mdp.num_actions}")
    require_number("samples", samples)
    require_number("states", states, at_least=1.0)
    require_number("actions", actions, at_least=1.0)
    mu = stationary_distribution(mdp, pi)
    chain = policy_transition(mdp, pi)
    bar = jnp.einsum("sa,sad->sd", pi, samples)
    mean = mu @ bar
    centred = bar - mean
    spread = samples - bar[:, None]
    between = jnp.sum(mu[:, None] * centred**2)
    within = jnp.einsum("s,sa,sad->", mu, pi, spread**2)

    def add(t: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state_sum, action_sum, later = sums  # later: E[Ybar(s_t) - mean | s_1 = s]
        # The last term of a length that is not whole has a small weight, and none beyond.
        weight = jnp.maximum(0.0, 1.0 - t / length)
        state_sum += weight * jnp.einsum("s,sd,sd->", mu, centred, chain @ later)
        action_sum += weight * jnp.einsum("s,sa,sad,sad->", mu, pi, spread, mdp.transition @ later)
        return state_sum, action_sum, chain @ later

    length = jnp.asarray(states, samples.dtype)
    zero = jnp.zeros((), samples.dtype)
    last = jnp.ceil(length).astype(jnp.int32)
    state_sum, action_sum, _ = jax.lax.fori_loop(1, last, add, (zero, zero, centred))
    state_covariance, action_covariance = 2.0 * state_sum, 2.0 * action_sum
    total = (between + state_covariance + (within + action_covariance) / actions) / length
    return ManyActionsVariance(mean, between, within, state_covariance, action_covariance, total)


def many_actions_pay(
    mdp: MDP,
    pi: Float[Array, "S A"],
    samples: Float[Array, "rows columns D"],
    states: Number,
    actions: Number,
    delta: Number,
) -> Bool[Array, ""]:
    """Whether ``N`` actions at each of ``T`` states beat one action at each of ``delta N T`` states, of equal cost.

    ``Var(T, N) <= Var(delta N T, 1)``, where `delta` is the cost of one more action in units of that of one more state.
    The longer trajectory is inferred from the corollary for bandits (:func:`many_actions_pay_in_bandits`).

    Args:
        mdp: the model.
        pi: the policy.
        samples: ``Y`` ``[S, A, D]``.
        states: ``T``, at least 1.
        actions: ``N``, at least 1.
        delta: above 0, and such that ``delta N T`` is at least 1.
    """
    require_number("delta", delta, above=0.0)
    longer = delta * actions * states
    if not isinstance(longer, Tracer):
        require(bool(longer >= 1.0), "delta * actions * states", float(longer), "at least 1")
    many = many_actions_variance(mdp, pi, samples, states, actions).total
    return many <= many_actions_variance(mdp, pi, samples, longer, 1.0).total


def many_actions_pay_in_bandits(
    within_states: Numbers,
    between_states: Numbers,
    actions: Numbers,
    delta: Numbers,
) -> Bool[Array, "..."]:
    """The condition for contextual bandits: ``(delta - 1) E_s Var_a Y <= (1 - delta N) Var_s Ybar``.

    States are independent there. For ``delta >= 1`` it never holds, unless nothing varies.

    Args:
        within_states: ``E_s Var_a Y``.
        between_states: ``Var_s Ybar``.
        actions: ``N``, at least 1.
        delta: cost of an action in units of that of a state, above 0.
    """
    require_number("within_states", within_states, at_least=0.0)
    require_number("between_states", between_states, at_least=0.0)
    require_number("actions", actions, at_least=1.0)
    require_number("delta", delta, above=0.0)
    delta = jnp.asarray(delta)
    return (delta - 1.0) * within_states <= (1.0 - delta * actions) * between_states
