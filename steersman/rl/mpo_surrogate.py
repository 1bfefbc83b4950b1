"""V-MPO's policy loss: likelihood weighted by exponentiated advantages, within bounds on the divergence."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steersman import objectives
from steersman.errors import InputError, require_number
from steersman.rl.surrogates import Surrogate, SurrogateInputs
from steersman.training.duals import Dual
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar

#: Temperature and multipliers stay at or above it: something is divided by the one, and the others can still grow.
_SMALLEST = 1e-8


class Bound(eqx.Module):
    """A bound on a divergence that a multiplier enforces.

    Attributes:
        epsilon: the divergence that is allowed, in nats.
        initial_multiplier: where its multiplier starts.
    """

    epsilon: Scheduled = scalar(0.01)
    initial_multiplier: Continuous = scalar(1.0)

    def __check_init__(self) -> None:
        if not isinstance(self.epsilon, Schedule):
            require_number("epsilon", self.epsilon, above=0.0)
        require_number("initial_multiplier", self.initial_multiplier, above=0.0)


class Duals(NamedTuple):
    """What the loss has learned beside the policy.

    Attributes:
        temperature: of the weights.
        divergence: multiplier of the whole divergence, where it has one part.
        mean: multiplier of a Gaussian's divergence by its mean.
        covariance: multiplier of its divergence by its covariance.
    """

    temperature: Dual
    divergence: Dual
    mean: Dual
    covariance: Dual


class WeightedLikelihood(Surrogate):
    """Likelihood of the better half of a minibatch, weighted by ``exp(A / eta)`` (Song et al., 2020, arXiv:1909.12238).

    ``-sum_i psi_i log pi(a_i | s_i) + alpha KL(old || pi)``: the weights ``psi`` are the distribution over the half
    with the larger advantages that is best within a divergence `temperature_epsilon` of the uniform one (E-step); the
    policy is fitted to them within bounds on its own divergence from the policy that collected the batch (M-step).
    No ratio appears, so none can explode. The temperature ``eta`` and the multipliers ``alpha`` follow gradients of
    their own duals after every step. A Gaussian's mean and covariance are bounded apart, so that it cannot buy a
    larger step of the mean by shrinking.

    Where all advantages of a minibatch are equal, all its samples are kept with equal weight: the policy then copies
    what it did.

    Attributes:
        temperature_epsilon: divergence of the weights from uniform ones, in nats.
        initial_temperature: where ``eta`` starts. Its right size follows that of the advantages.
        divergence: the bound for policies whose divergence has one part (discrete actions).
        mean: the bound on a Gaussian's mean.
        covariance: the bound on a Gaussian's covariance.
        dual_learning_rate: Adam's step size for temperature and multipliers.
    """

    temperature_epsilon: Scheduled = scalar(0.01)
    initial_temperature: Continuous = scalar(1.0)
    divergence: Bound = eqx.field(default_factory=lambda: Bound(0.01, 5.0))
    mean: Bound = eqx.field(default_factory=lambda: Bound(0.01, 1.0))
    covariance: Bound = eqx.field(default_factory=lambda: Bound(5e-5, 1.0))
    dual_learning_rate: Scheduled = scalar(1e-2)

    def __check_init__(self) -> None:
        require_number("initial_temperature", self.initial_temperature, above=0.0)
        for name in ("temperature_epsilon", "dual_learning_rate"):
            if not isinstance(getattr(self, name), Schedule):
                require_number(name, getattr(self, name), above=0.0)

    def init(self) -> Duals:
        multipliers = (Dual.init(bound.initial_multiplier) for bound in (self.divergence, self.mean, self.covariance))
        return Duals(Dual.init(self.initial_temperature), *multipliers)

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: Duals
    ) -> Float[Array, "..."]:
        better = objectives.top_half(advantage)
        weight = objectives.temperature_weights(advantage, state.temperature.value, better)
        # The mean over all samples is to be the weighted sum over the better half.
        loss = objectives.policy_gradient(inputs.log_prob, jax.lax.stop_gradient(weight * weight.size))
        for name, kl in _parts(inputs).items():
            loss = loss + getattr(state, name).value * kl
        return loss

    def learn(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: Duals
    ) -> Duals:
        better = objectives.top_half(advantage)
        slope = jax.grad(objectives.temperature_loss, argnums=1)(
            advantage, state.temperature.value, self.temperature_epsilon, better
        )
        rate = self.dual_learning_rate
        changes = {"temperature": state.temperature.step(slope, rate, _SMALLEST)}
        for name, kl in _parts(inputs).items():
            # The dual alpha (epsilon - KL) is minimized: alpha grows while the divergence is above its bound.
            slope = getattr(self, name).epsilon - jnp.mean(kl)
            changes[name] = getattr(state, name).step(slope, rate, _SMALLEST)
        return state._replace(**changes)

    def penalty(self, state: Duals) -> Float[Array, ""]:
        """The multiplier of the whole divergence."""
        return state.divergence.value

    def metrics(self, state: Duals) -> dict[str, Float[Array, ""]]:
        """The temperature, and each bound's multiplier; one whose bound the policy has no part for never moves."""
        return {"temperature": state.temperature.value} | {
            f"{name}_multiplier": getattr(state, name).value for name in ("divergence", "mean", "covariance")
        }


def _parts(inputs: SurrogateInputs) -> dict[str, Float[Array, "..."]]:
    """The divergence by the names of the bounds on its parts."""
    names = {1: ("divergence",), 2: ("mean", "covariance")}.get(len(inputs.kl_parts))
    if names is None:
        raise InputError(
            f"kl_parts has {len(inputs.kl_parts)} parts, but there are bounds for one (the whole divergence) or two "
            "(mean and covariance): the policy's stored distribution parameters are missing, or its head is another."
        )
    return dict(zip(names, inputs.kl_parts, strict=True))
