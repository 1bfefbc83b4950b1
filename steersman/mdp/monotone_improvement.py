"""Policy iteration that provably never gets worse: the exact scheme that TRPO approximates.

Schulman, Levine, Moritz, Jordan and Abbeel, "Trust Region Policy Optimization", ICML 2015 (arXiv:1502.05477),
Algorithm 1, in the form whose penalty is the largest divergence of any state.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from steersman.errors import InputTypeError, require, require_number
from steersman.mdp.evaluation import expected_return, occupancy, policy_evaluation, require_policy
from steersman.mdp.model import MDP, require_distributions
from steersman.policies.tabular import TabularStochastic
from steersman.training.algorithm import IterativeAlgorithm, Metrics
from steersman.training.schedules import scalar

#: Halvings of the bracket of ``log w``, which is about 700 wide in double precision: down to the last digit.
_BISECTIONS = 64
#: Golden-section steps on the square root of the radius; a maximum's place is defined to half the digits only.
_GOLDEN_STEPS = 48
#: Largest radius that is tried, in nats: by then a policy is greedy up to a factor of exp(-20).
_LARGEST_RADIUS = 20.0


def categorical_divergence(old: Float[Array, "... A"], new: Float[Array, "... A"]) -> Float[Array, "..."]:
    """``KL(old || new)`` of probability rows, in nats; infinite where `new` rules out what `old` allows."""
    possible = old > 0
    ratio = jnp.where(possible, new, 1.0) / jnp.where(possible, old, 1.0)
    # Both rows sum to one, so new - old can be added to every term. Each term is then non-negative, and no digits
    # are lost between terms of opposite sign when the rows are close.
    moved = jnp.sum(jnp.where(possible, 0.0, new), axis=-1)
    return jnp.sum(jnp.where(possible, old * (ratio - 1.0 - jnp.log(ratio)), 0.0), axis=-1) + moved


class ImprovementBound(NamedTuple):
    """A lower bound on the return of a policy, from what is known about another one.

    Attributes:
        lower_bound: ``surrogate - penalty * max_divergence``, never above the new policy's expected return.
        surrogate: the local model ``L_old(new)``.
        penalty: the coefficient ``C``.
        max_divergence: ``max_s KL(old(. | s) || new(. | s))``.
    """

    lower_bound: Float[Array, ""]
    surrogate: Float[Array, ""]
    penalty: Float[Array, ""]
    max_divergence: Float[Array, ""]


def penalty_coefficient(advantage: Float[Array, "S A"], discount: Float[Array, ""]) -> Float[Array, ""]:
    """``C = 4 eps discount / (1 - discount)^2`` with ``eps = max |advantage|`` (Schulman et al., 2015, Theorem 1)."""
    return 4.0 * jnp.max(jnp.abs(advantage)) * discount / (1.0 - discount) ** 2


def improvement_bound(mdp: MDP, old: Float[Array, "S A"], new: Float[Array, "S A"]) -> ImprovementBound:
    """``eta(new) >= L_old(new) - C max_s KL(old || new)`` (Schulman et al., 2015, Theorem 1 and equation 9).

    ``L_old(new) = eta(old) + sum_s rho_old(s) sum_a new(a | s) A_old(s, a)`` uses the old policy's unnormalized
    visitation ``rho_old``.

    Args:
        mdp: the model.
        old: the policy whose advantages are known.
        new: the policy whose return is bounded from below.
    """
    require_policy(mdp, old, "old")
    require_policy(mdp, new, "new")
    value, q_value = policy_evaluation(mdp, old)
    advantage = q_value - value[:, None]
    visitation = occupancy(mdp, old) / (1.0 - mdp.discount)
    surrogate = jnp.dot(mdp.start, value) + jnp.dot(visitation, jnp.sum((new - old) * advantage, axis=-1))
    penalty = penalty_coefficient(advantage, mdp.discount)
    divergence = jnp.max(categorical_divergence(old, new))
    # Without a penalty (discount zero) the local model is exact, however far away the new policy is.
    cost = jnp.where(penalty > 0, penalty * divergence, 0.0)
    return ImprovementBound(surrogate - cost, surrogate, penalty, divergence)


def kl_ball_maximizer(
    pi_row: Float[Array, " A"], advantage_row: Float[Array, " A"], radius: Float[Array, ""] | float
) -> Float[Array, " A"]:
    """The distribution of largest mean advantage within a divergence ball: ``max_p p . A`` with ``KL(pi || p) <= t``.

    The optimum is ``p_a = pi_a / (nu - A_a)``, normalized, for a ``nu > max_a A_a`` at which the divergence is `t`;
    it falls as ``nu`` grows, so ``nu`` is found by bisection. Where the best actions have no probability under `pi`,
    the divergence stays finite down to ``nu = max_a A_a``, and a larger radius is spent on moving probability there.
    A row whose possible actions are all equally good is returned as it is. Advantages may be shifted and scaled by
    any positive factor without changing the result.

    Args:
        pi_row: the centre of the ball.
        advantage_row: what each action is worth.
        radius: the radius ``t`` in nats.

    Returns:
        The maximizer ``[A]``, for which the divergence is `radius` unless the ball holds the best distribution or
        the radius is so large that ``p`` is concentrated up to the smallest representable number.
    """
    require(pi_row.ndim == 1, "pi_row's shape", pi_row.shape, "[A]; rows of several states are mapped with vmap")
    require(advantage_row.shape == pi_row.shape, "advantage_row's shape", advantage_row.shape, f"{pi_row.shape}")
    require_distributions("pi_row", pi_row)
    require_number("advantage_row", advantage_row)
    require_number("radius", radius, at_least=0.0)
    dtype = jnp.result_type(pi_row, advantage_row)
    precision = jnp.finfo(dtype)
    radius = jnp.asarray(radius, dtype)
    possible = pi_row > 0

    gap = jnp.max(advantage_row) - advantage_row
    # A gap of the size of the advantages' own rounding is a tie: else noise would be magnified to fill the ball.
    gap = jnp.where(gap <= 4.0 * precision.eps * jnp.max(jnp.abs(advantage_row)), 0.0, gap)
    scale = jnp.max(jnp.where(possible, gap, 0.0))
    gap = gap / jnp.where(scale > 0, scale, 1.0)
    best = gap == 0

    def candidate(log_w: Array) -> tuple[Array, Array]:
        """The normalized row for ``nu = max A + w``, and its divergence from ``pi_row``."""
        w = jnp.exp(log_w)
        kept = jnp.where(possible, pi_row * (w / (w + gap)), 0.0)
        total = jnp.sum(kept)
        # For a wide bracket the two logarithms nearly cancel, so the second is taken of its distance from one.
        missing = jnp.sum(jnp.where(possible, pi_row * (gap / (w + gap)), 0.0))
        log_total = jnp.where(missing < 0.5, jnp.log1p(-jnp.minimum(missing, 0.5)), jnp.log(total))
        divergence = jnp.sum(jnp.where(possible, pi_row * jnp.log1p(gap / w), 0.0)) + log_total
        return kept / total, divergence

    def halve(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bracket
        middle = 0.5 * (low + high)
        outside = candidate(middle)[1] > radius
        return (jnp.where(outside, middle, low), jnp.where(outside, high, middle)), None

    bracket = (jnp.asarray(0.9 * math.log(precision.tiny), dtype), jnp.asarray(-math.log(precision.eps), dtype))
    (_, log_w), _ = jax.lax.scan(halve, bracket, None, length=_BISECTIONS)
    row, divergence = candidate(log_w)

    # Scaling the possible actions by m costs log(1 / m): what the radius still allows is moved to the best actions.
    reachable = jnp.any(best & possible)
    left = jnp.where(reachable, 0.0, jnp.maximum(radius - divergence, 0.0))
    best_row = best / jnp.sum(best)
    row = jnp.exp(-left) * row - jnp.expm1(-left) * best_row
    stay = (radius <= 0) | ((scale <= 0) & reachable)
    return jnp.where(stay, pi_row, row)


class PenalizedMaximum(NamedTuple):
    """The policy that maximizes the local model minus the penalty.

    Attributes:
        policy: the maximizer ``[S, A]``.
        radius: the divergence that it uses in every state, in nats.
        gain: how much the penalized local model exceeds its value at the old policy.
    """

    policy: Float[Array, "S A"]
    radius: Float[Array, ""]
    gain: Float[Array, ""]


def penalized_maximizer(
    pi: Float[Array, "S A"],
    advantage: Float[Array, "S A"],
    visitation: Float[Array, " S"],
    penalty: Float[Array, ""] | float,
) -> PenalizedMaximum:
    """``argmax_p sum_s visitation(s) sum_a p(a | s) A(s, a) - penalty max_s KL(pi(. | s) || p(. | s))``.

    Given the largest divergence ``t``, each state is solved by :func:`kl_ball_maximizer`; what remains is a concave
    function of ``t``, which is maximized by golden section. It is searched on ``sqrt(t)``, because the gain of a small
    step grows with the square root of its divergence. A shift of the advantages that depends on the state only, or a
    common factor of advantages and penalty, leaves the policy unchanged.

    Args:
        pi: the old policy.
        advantage: its advantages; action values do as well.
        visitation: unnormalized visitation of the states.
        penalty: the coefficient ``C`` of the largest divergence.
    """
    best_gain = jnp.dot(visitation, jnp.max(advantage, axis=-1) - jnp.sum(pi * advantage, axis=-1))
    # No step can gain more than the greedy one, so beyond this radius the penalty has eaten any gain.
    radius = jnp.where(penalty > 0, best_gain / jnp.where(penalty > 0, penalty, 1.0), _LARGEST_RADIUS)
    root_limit = jnp.sqrt(jnp.clip(radius, 0.0, _LARGEST_RADIUS))
    maximizers = jax.vmap(kl_ball_maximizer, in_axes=(0, 0, None))

    def gain(root: Array) -> tuple[Array, Array]:
        policy = maximizers(pi, advantage, root**2)
        change = jnp.dot(visitation, jnp.sum((policy - pi) * advantage, axis=-1))
        return change - penalty * root**2, policy

    ratio = 0.5 * (math.sqrt(5.0) - 1.0)

    def narrow(bracket: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        low, left, right, high, gain_left, gain_right = bracket
        rising = gain_right > gain_left
        low, high = jnp.where(rising, left, low), jnp.where(rising, high, right)
        # One of the two inner points is kept; only the other is new.
        new = jnp.where(rising, low + ratio * (high - low), high - ratio * (high - low))
        gain_new = gain(new)[0]
        left, right = jnp.where(rising, right, new), jnp.where(rising, new, left)
        gain_left, gain_right = jnp.where(rising, gain_right, gain_new), jnp.where(rising, gain_new, gain_left)
        return (low, left, right, high, gain_left, gain_right), None

    low, high = jnp.zeros_like(root_limit), root_limit
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    gain_left, gain_right = jax.vmap(gain)(jnp.stack([left, right]))[0]
    bracket = (low, left, right, high, gain_left, gain_right)
    (_, left, right, high, gain_left, gain_right), _ = jax.lax.scan(narrow, bracket, None, length=_GOLDEN_STEPS)
    # Without a penalty the gain never falls, and its maximum is the end of the bracket, which is never an inner point.
    roots = jnp.stack([jnp.where(gain_right > gain_left, right, left), high])
    gains, policies = jax.vmap(gain)(roots)
    best = jnp.argmax(gains)
    return PenalizedMaximum(policies[best], roots[best] ** 2, gains[best])


def _as_table(value: ArrayLike | None) -> Array | None:
    return None if value is None else jnp.asarray(value)


class MonotoneState(eqx.Module):
    """Where monotone improvement stands.

    Attributes:
        probabilities: the policy ``[S, A]``.
        converged: whether the last step promised less than the tolerance, so that the policy no longer changes.
        iteration: steps taken.
    """

    probabilities: Float[Array, "S A"]
    converged: Bool[Array, ""]
    iteration: Int[Array, ""]


class MonotoneImprovement(IterativeAlgorithm):
    """Maximizes TRPO's lower bound exactly, on an explicit model: the return never decreases.

    Each step evaluates the policy, finds the policy that maximizes ``L_old(new) - C max_s KL(old || new)``, and takes
    it if this promises an improvement of at least the tolerance. The steps are short, since the bound is cautious:
    :func:`~steersman.mdp.value_iteration` is the choice for solving a model. Take this one to see what the bound
    guarantees. Start from a policy that tries every action: leaving a deterministic one costs divergence in
    proportion to the probability that is moved, which the bound never finds worth it at discounts above 0.2.
    The guarantee holds up to rounding, so build the model and run inside ``with jax.enable_x64(True):``.

    Metrics: ``eta``, the expected return of the policy after the step; ``bound``, the lower bound that was maximized;
    ``kl_max``, the largest divergence of the step in nats; ``penalty``, the coefficient ``C``; ``improvement``, what
    the bound promised over the return before; ``converged``.

    Attributes:
        tolerance: least promised improvement for which the policy is changed, in units of the return.
        initial: the policy to start from ``[S, A]``; uniform where none is given.
    """

    tolerance: Float[Array, ""] = scalar(1e-10)
    initial: Float[Array, "S A"] | None = eqx.field(default=None, converter=_as_table)

    def __check_init__(self) -> None:
        require_number("tolerance", self.tolerance, at_least=0.0)

    def init(self, problem: Any, key: Key[Array, ""]) -> MonotoneState:
        del key
        _require_model(problem)
        if self.initial is None:
            pi = jnp.full((problem.num_states, problem.num_actions), 1.0 / problem.num_actions)
        else:
            require_policy(problem, self.initial, "initial")
            pi = self.initial
        pi = pi.astype(problem.transition.dtype)
        return MonotoneState(pi, jnp.asarray(False), jnp.zeros((), jnp.int32))

    def step(self, problem: MDP, state: MonotoneState) -> tuple[MonotoneState, Metrics]:
        old = state.probabilities
        value, q_value = policy_evaluation(problem, old)
        advantage = q_value - value[:, None]
        visitation = occupancy(problem, old) / (1.0 - problem.discount)
        penalty = penalty_coefficient(advantage, problem.discount)
        found = penalized_maximizer(old, advantage, visitation, penalty)
        # Written so that a NaN counts as no improvement.
        improves = found.gain >= jnp.maximum(self.tolerance, jnp.finfo(old.dtype).tiny)
        new = jnp.where(improves, found.policy, old)
        improvement = jnp.where(improves, found.gain, 0.0)
        metrics = {
            "eta": expected_return(problem, new),
            "bound": jnp.dot(problem.start, value) + improvement,
            "kl_max": jnp.max(categorical_divergence(old, new)),
            "penalty": penalty,
            "improvement": improvement,
            "converged": ~improves,
        }
        return MonotoneState(new, ~improves, state.iteration + 1), metrics

    def policy(self, state: MonotoneState) -> TabularStochastic:
        return TabularStochastic(state.probabilities)


def _require_model(problem: Any) -> None:
    if not isinstance(problem, MDP):
        raise InputTypeError(f"problem is a {type(problem).__name__}, but monotone improvement needs an explicit MDP.")
