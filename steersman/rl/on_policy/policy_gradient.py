"""Episodic policy gradients: REINFORCE in its per-decision form, GPOMDP (Baxter, Bartlett, 2001, arXiv:1106.0665)."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree, UInt32

from steersman import returns
from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError, require, require_count, require_number, unknown_name
from steersman.policies import Architecture, NetworkPolicy, Policy, Preprocess, head_for, make_policy
from steersman.policies.preprocessing import Features
from steersman.training.algorithm import InteractiveAlgorithm, Metrics
from steersman.training.collect import Collector
from steersman.training.episodes import Episodes
from steersman.training.experience import Experience
from steersman.training.optimizers import Adam, Optimizer
from steersman.training.schedules import Continuous, Schedule, Scheduled, resolve, scalar


class Weights(NamedTuple):
    """What gradients change of a policy: its network, and the numbers that no observation changes."""

    network: PyTree
    free: Float[Array, " free"]


def weights(policy: NetworkPolicy) -> Weights:
    """The trainable part of a policy."""
    return Weights(policy.network, policy.free)


def with_weights(policy: NetworkPolicy, learned: Weights) -> NetworkPolicy:
    """A policy with its trainable part replaced."""
    return eqx.tree_at(lambda p: (p.network, p.free), policy, (learned.network, learned.free))


def episode_likelihood(policy: NetworkPolicy, experience: Experience) -> PyTree:
    """Distribution parameters of `policy` at every step of whole episodes, leaves ``[T, N, ...]``.

    A memory that must be unrolled is, from each episode's start; one that was recorded is taken as it was.
    """
    features = jax.vmap(jax.vmap(policy.preprocess))(experience.observation)
    if not policy.unrolled:
        return policy.parameters_for(features, experience.carry, experience.record.action)

    def unroll(features: Features, carry: PyTree) -> PyTree:
        def step(carry: PyTree, features: Features) -> tuple[PyTree, PyTree]:
            parameters, carry = policy.from_features(features, carry)
            return carry, parameters

        return jax.lax.scan(step, jax.tree.map(lambda leaf: leaf[0], carry), features)[1]

    return jax.vmap(unroll, in_axes=1, out_axes=1)(features, experience.carry)


class GradientEstimate(NamedTuple):
    """What a batch of episodes says about a policy.

    Attributes:
        objective: ``F = V + tau H``: what `gradient` is the gradient of.
        value: ``V``, mean discounted return from the start.
        entropy: ``H``, mean entropy of the visited steps, in nats.
        gradient: uphill, in the policy's :class:`Weights`.
    """

    objective: Float[Array, ""]
    value: Float[Array, ""]
    entropy: Float[Array, ""]
    gradient: Weights

    @property
    def gradient_norm(self) -> Float[Array, ""]:
        """Euclidean norm over all parameters."""
        return optax.tree.norm(self.gradient)


class EpisodicPolicyGradient(InteractiveAlgorithm):
    """Base of methods that estimate a return and its gradient from the same whole episodes.

    One discount serves both: the gradient is that of the return that is estimated, so their scales fit together.

    Attributes:
        num_episodes: episodes in a batch ``m``.
        horizon: most steps of an episode; one that gets there is cut.
        gamma: discount, counted from an episode's start.
        baseline: what scores' weights are reduced by: ``"none"``, the ``"mean"`` over the batch at each step, its
            ``"leave-one-out"`` form, or the ``"optimal"`` one of each parameter (see :mod:`steersman.returns`).
        entropy_coefficient: weight of the mean entropy ``tau`` in the objective and in its gradient, in units of the
            return. The gradient takes the visited states as given.
        hidden: widths of the hidden layers; none for a linear policy.
        activation: their nonlinearity.
        memory: width of a recurrent state; 0 for a feed-forward policy.
        architecture: what makes the policy, in place of the three numbers above; None for those.
        initial_log_std: start of a Gaussian policy's log standard deviation, in units of the half-width of the box.
    """

    num_episodes: int = eqx.field(static=True, default=20)
    horizon: int = eqx.field(static=True, default=200)
    gamma: Scheduled = scalar(0.99)
    baseline: str = eqx.field(static=True, default="mean")
    entropy_coefficient: Scheduled = scalar(0.0)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(32,), converter=tuple)
    activation: str = eqx.field(static=True, default="tanh")
    memory: int = eqx.field(static=True, default=0)
    architecture: Architecture | None = None
    initial_log_std: Continuous = scalar(0.0)

    def __check_init__(self) -> None:
        require_count("num_episodes", self.num_episodes)
        require_count("horizon", self.horizon)
        require_count("memory", self.memory, minimum=0)
        if self.baseline not in returns.BASELINES:
            raise unknown_name("baseline", self.baseline, returns.BASELINES)
        allowed = f"at least 2 for baseline {self.baseline!r}, which compares episodes"
        require(self.num_episodes >= 2 or self.baseline == "none", "num_episodes", self.num_episodes, allowed)
        if self.architecture is not None and not isinstance(self.architecture, Architecture):
            raise InputTypeError(f"architecture is {self.architecture!r}, but it must be an Architecture or None.")
        if not isinstance(self.gamma, Schedule):
            require_number("gamma", self.gamma, at_least=0.0, at_most=1.0)
        if not isinstance(self.entropy_coefficient, Schedule):
            require_number("entropy_coefficient", self.entropy_coefficient, at_least=0.0)
        require_number("initial_log_std", self.initial_log_std)

    @property
    def collector(self) -> Collector:
        return Episodes(self.num_episodes, self.horizon)

    def make_policy(self, problem: Any, key: Key[Array, ""]) -> NetworkPolicy:
        """A fresh policy for the problem's spaces."""
        preprocess, head = Preprocess(layout(problem.observation_space)), head_for(problem.action_space)
        if self.architecture is not None:
            return self.architecture.make(preprocess, head, initial_log_std=self.initial_log_std, key=key)
        shape: dict[str, Any] = {"hidden": self.hidden, "activation": self.activation, "memory": self.memory}
        policy = make_policy(preprocess, head, **shape, initial_log_std=0.0, key=key)
        return eqx.tree_at(lambda p: p.free, policy, policy.free + self.initial_log_std)

    def estimate(self, policy: NetworkPolicy, experience: Experience) -> GradientEstimate:
        """Objective and gradient at `policy`, from episodes that it played.

        Args:
            policy: the policy.
            experience: from :class:`~steersman.training.episodes.Episodes`.
        """
        reward, mask = experience.reward, experience.extras["mask"]
        if reward.ndim != 2:
            raise InputError(
                f"reward has shape {reward.shape[2:]} per step, but {type(self).__name__} learns from a scalar reward; "
                "combine the objectives into one first."
            )
        head, tau = policy.head, self.entropy_coefficient

        def at(learned: Weights) -> tuple[Array, Array]:
            parameters = episode_likelihood(with_weights(policy, learned), experience)
            log_prob = head.log_prob(parameters, experience.record.action)
            return log_prob, jnp.mean(head.entropy(parameters), where=mask)

        def scalar_objective(learned: Weights) -> tuple[Array, Array]:
            log_prob, entropy = at(learned)
            score = returns.gpomdp_objective(log_prob, reward, self.gamma, mask, baseline=self.baseline)
            return score + tau * entropy, entropy

        learned = weights(policy)
        if self.baseline == "optimal":
            gradient = returns.gpomdp_gradient(
                lambda p: at(p)[0], learned, reward, self.gamma, mask, baseline=self.baseline
            )
            entropy, slope = jax.value_and_grad(lambda p: at(p)[1])(learned)
            gradient = jax.tree.map(lambda g, s: g + tau * s, gradient, slope)
        else:
            gradient, entropy = jax.grad(scalar_objective, has_aux=True)(learned)
        value = jnp.mean(returns.episode_return(reward, self.gamma, mask))
        return GradientEstimate(value + tau * entropy, value, entropy, gradient)


class PolicyGradientState(eqx.Module):
    """What an episodic policy gradient carries from one batch to the next.

    Attributes:
        policy: the policy.
        optimizer: state of the optimizer.
        samples: environment steps learned from so far.
    """

    policy: NetworkPolicy
    optimizer: PyTree
    samples: UInt32[Array, ""]


class PolicyGradient(EpisodicPolicyGradient):
    """One step along the policy gradient for every batch of whole episodes; no critic.

    Unbiased (with ``baseline="leave-one-out"`` or ``"none"``) and simple, and therefore noisy: worth choosing for short
    episodes, for small policies and as a reference. On long ones a critic pays off, as in PPO.

    Attributes:
        optimizer: how a gradient becomes a step: Adam, SGD, or
            :class:`~steersman.training.step_sizes.Polyak` where the optimal return is known (with a learning rate
            of 1).
        learning_rate: step size.
    """

    optimizer: Optimizer = eqx.field(default_factory=Adam)
    learning_rate: Scheduled = scalar(1e-2)

    def __check_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise InputTypeError(f"optimizer is {self.optimizer!r}, but it must be an Optimizer such as Adam().")
        if not isinstance(self.learning_rate, Schedule):
            require_number("learning_rate", self.learning_rate, above=0.0)

    def init(self, problem: Any, key: Key[Array, ""]) -> PolicyGradientState:
        policy = self.make_policy(problem, key)
        learned: Any = weights(policy)
        optimizer = self.optimizer.transformation().init(learned)
        return PolicyGradientState(policy, optimizer, jnp.zeros((), jnp.uint32))

    def behaviour(self, state: PolicyGradientState) -> NetworkPolicy:
        return state.policy

    def policy(self, state: PolicyGradientState) -> Policy:
        return state.policy

    def update(self, state: PolicyGradientState, experience: Experience) -> tuple[PolicyGradientState, Metrics]:
        now = resolve(self, state.samples)
        estimate = now.estimate(state.policy, experience)
        learned: Any = weights(state.policy)
        # Optimizers go downhill: they see the negatives.
        slope: Any = jax.tree.map(jnp.negative, estimate.gradient)
        rule = now.optimizer.transformation()
        step, optimizer = rule.update(slope, state.optimizer, learned, value=-estimate.objective)
        learned = jax.tree.map(lambda p, s: p - now.learning_rate * s, learned, step)
        samples = state.samples + jnp.uint32(self.collector.samples_per_iteration)
        state = PolicyGradientState(with_weights(state.policy, learned), optimizer, samples)
        return state, {
            "objective": estimate.objective,
            "discounted_return": estimate.value,
            "entropy": estimate.entropy,
            "gradient_norm": estimate.gradient_norm,
            "step_length": now.learning_rate * optax.tree.norm(step),
        }
