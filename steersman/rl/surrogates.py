"""The surrogate slot of likelihood-ratio methods: what pulls a policy towards good actions and holds it back.

Each class here fills the slot with one of the loss functions in :mod:`steersman.objectives`, adding the numbers that
it needs and, where the method has one, a coefficient that adapts after every update.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from steersman import objectives
from steersman.errors import require, require_number
from steersman.training.duals import Dual
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

    def metrics(self, state: PyTree) -> dict[str, Float[Array, ""]]:
        """What is worth watching of the state after a batch."""
        del state
        return {}


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


class LearnedKL(Surrogate):
    """A divergence penalty whose weight follows its own gradient (Zentner et al., 2023, arXiv:2312.05405).

    After each step the weight descends ``beta (bound - margin D)``, where ``D`` is the largest divergence in the
    minibatch, so it comes to rest where ``D = bound / margin``. The penalty itself is on the mean divergence.

    Attributes:
        bound: the divergence that no state is meant to exceed, in nats.
        margin: how many times below the bound the largest divergence is held; above 1.
        beta_learning_rate: Adam's step size of the weight.
        initial_beta: the weight's start.
        statistic: ``"max"`` to look at the largest divergence of a minibatch, ``"mean"`` at their mean.
    """

    bound: Continuous = scalar(0.2)
    margin: Continuous = scalar(3.0)
    beta_learning_rate: Continuous = scalar(0.01)
    initial_beta: Continuous = scalar(1.0)
    statistic: str = eqx.field(static=True, default="max")

    def __check_init__(self) -> None:
        require_number("bound", self.bound, above=0.0)
        require_number("margin", self.margin, at_least=1.0)
        require_number("beta_learning_rate", self.beta_learning_rate, at_least=0.0)
        require_number("initial_beta", self.initial_beta, at_least=0.0)
        require(self.statistic in STATISTICS, "statistic", self.statistic, " or ".join(STATISTICS))
        if isinstance(self.margin, Tracer) or float(self.margin) > 1.0:
            return
        warnings.warn(
            "margin is 1, so the penalty alone settles at the bound and about every other update exceeds it; "
            "choose a margin above 1.",
            stacklevel=2,
        )

    def init(self) -> Dual:
        return Dual.init(self.initial_beta)

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return objectives.kl_penalized(log_ratio, advantage, inputs.kl, state.value)

    def learn(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Dual:
        return state.step(self.bound - self.margin * STATISTICS[self.statistic](inputs.kl), self.beta_learning_rate)

    def penalty(self, state: PyTree) -> Float[Array, ""]:
        return state.value


#: How the divergences of several states become one.
STATISTICS: dict[str, Callable[[Array], Array]] = {"max": jnp.max, "mean": jnp.mean}
