"""The surrogate slot of likelihood-ratio methods: what pulls a policy towards good actions and holds it back.

Each class here fills the slot with one of the loss functions in :mod:`steersman.objectives`, adding the numbers that
it needs and, where the method has one, a coefficient that adapts after every update.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman import objectives
from steersman.errors import require_number
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar


class SurrogateInputs(NamedTuple):
    """What a surrogate may look at beyond ratio and advantage. What it leaves unused is never computed.

    Attributes:
        kl: divergence of the new policy from the old one at each observation, ``KL(old || new)``.
        log_prob: log-probability of the action under the new policy.
        entropy: entropy of the new policy at each observation.
        kl_parts: the divergence in parts that can be bounded apart (:meth:`~steersman.policies.Head.kl_parts`).
    """

    kl: Float[Array, "..."]
    log_prob: Float[Array, "..."]
    entropy: Float[Array, "..."]
    kl_parts: tuple[Float[Array, "..."], ...] = ()


class Surrogate(eqx.Module):
    """A per-sample policy loss, to be minimized.

    It is called with a whole minibatch at once, so that a loss may weigh samples against each other.
    """

    def init(self) -> PyTree:
        """The surrogate's own state (an adaptive coefficient, multipliers); empty unless it has one."""
        return ()

    @abc.abstractmethod
    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        """Loss of each sample.

        Args:
            log_ratio: log-probability under the new policy minus that under the behaviour policy.
            advantage: advantage estimates.
            inputs: what else is known of each sample.
            state: the surrogate's own state.
        """

    def learn(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> PyTree:
        """The next state after one gradient step, from the numbers that the step's loss was made of.

        This is where multipliers and temperatures follow their own gradients. The arguments are those of the call.
        """
        del log_ratio, advantage, inputs
        return state

    def adapt(self, state: PyTree, kl: Float[Array, ""]) -> PyTree:
        """The next state after all steps on a batch, given the mean divergence that they reached."""
        del kl
        return state

    def penalty(self, state: PyTree) -> Float[Array, ""]:
        """The present weight of a divergence from the old policy; one where the loss has no such term."""
        del state
        return jnp.ones(())


def _check(name: str, value: Any) -> None:
    if not isinstance(value, Schedule):
        require_number(name, value, above=0.0)


class Clip(Surrogate):
    """PPO's clipped ratio (Schulman et al., 2017, arXiv:1707.06347, equation 7)."""

    epsilon: Scheduled = scalar(0.2)

    def __check_init__(self) -> None:
        _check("epsilon", self.epsilon)

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.clipped(log_ratio, advantage, self.epsilon)


class Score(Surrogate):
    """The score function's loss, ``-A log pi(a | s)``, whose gradient is the policy gradient (Williams, 1992)."""

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.policy_gradient(inputs.log_prob, advantage)


class Unclipped(Surrogate):
    """The bare importance-weighted advantage, ``-r A``: a baseline that nothing holds back."""

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.unclipped(log_ratio, advantage)


class QuadraticRatio(Surrogate):
    """SPO's quadratic penalty on the ratio (Xie et al., 2025, arXiv:2401.16025)."""

    epsilon: Scheduled = scalar(0.2)

    def __check_init__(self) -> None:
        _check("epsilon", self.epsilon)

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.spo(log_ratio, advantage, self.epsilon)


class FixedKL(Surrogate):
    """A divergence penalty with a constant coefficient (arXiv:1707.06347, section 4)."""

    beta: Scheduled = scalar(1.0)

    def __check_init__(self) -> None:
        _check("beta", self.beta)

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.kl_penalized(log_ratio, advantage, inputs.kl, self.beta)

    def penalty(self, state: PyTree) -> Float[Array, ""]:
        return jnp.asarray(self.beta)


class AdaptiveKL(Surrogate):
    """A divergence penalty that doubles or halves to stay near a target (arXiv:1707.06347, equation 8)."""

    target: Scheduled = scalar(0.01)
    initial_beta: Continuous = scalar(1.0)

    def __check_init__(self) -> None:
        _check("target", self.target)
        _check("initial_beta", self.initial_beta)

    def init(self) -> Float[Array, ""]:
        return jnp.asarray(self.initial_beta)

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.kl_penalized(log_ratio, advantage, inputs.kl, state)

    def adapt(self, state: PyTree, kl: Float[Array, ""]) -> PyTree:
        return objectives.adaptive_kl(state, kl, self.target)

    def penalty(self, state: PyTree) -> Float[Array, ""]:
        return state
