"""FPO: flow matching policy gradients (McAllister et al., 2025, arXiv:2507.21053)."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from steersman.diffusion.flow_policy import FlowArchitecture
from steersman.errors import InputError, InputTypeError, require_number
from steersman.policies import Architecture
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import Clip, Surrogate, SurrogateInputs
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar


class LimitedRatio(Surrogate):
    """Another surrogate on log-ratios that are bounded first: those of a flow policy's single pairs have wide tails.

    Attributes:
        surrogate: the policy loss.
        limit: bound on the magnitude of a log-ratio.
    """

    surrogate: Surrogate = eqx.field(default_factory=lambda: Clip(0.05))
    limit: Continuous = scalar(3.0)

    def __check_init__(self) -> None:
        require_number("limit", self.limit, above=0.0)

    def _limited(self, log_ratio: Array) -> Array:
        return jnp.clip(log_ratio, -self.limit, self.limit)

    def init(self) -> PyTree:
        return self.surrogate.init()

    def __call__(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "..."]:
        return self.surrogate(self._limited(log_ratio), advantage, inputs, state)

    def learn(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> PyTree:
        return self.surrogate.learn(self._limited(log_ratio), advantage, inputs, state)

    def adapt(self, state: PyTree, kl: Float[Array, ""]) -> PyTree:
        return self.surrogate.adapt(state, kl)

    def penalty(self, state: PyTree) -> Float[Array, ""]:
        return self.surrogate.penalty(state)

    def metrics(self, state: PyTree) -> dict[str, Float[Array, ""]]:
        return self.surrogate.metrics(state)


class FPO(FirstOrder):
    """Trains a flow policy on-policy with PPO's mechanics: no likelihoods, no stored chains, any sampler.

    The loop is that of every first-order method here, so any surrogate, phase, reference or critic fits. A batch is
    learned from under the observation statistics that it was collected with. The first gradient on fresh data is that
    of the advantage-weighted flow matching loss. Defaults are the authors', but for the size of a batch.

    Attributes:
        architecture: the flow policy.
    """

    architecture: Architecture | None = eqx.field(default_factory=FlowArchitecture)
    surrogate: Surrogate = eqx.field(default_factory=lambda: Clip(0.05))
    gamma: Scheduled = scalar(0.995)
    reward_scale: Continuous = scalar(10.0)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(256,) * 5, converter=tuple)
    activation: str = eqx.field(static=True, default="swish")
    normalize_observations: bool = eqx.field(static=True, default=True)
    epochs: int = eqx.field(static=True, default=16)
    minibatches: int = eqx.field(static=True, default=32)
    value_coefficient: Scheduled = scalar(0.25)
    max_gradient_norm: Continuous | None = scalar(None)

    def __check_init__(self) -> None:
        flow, weight = self.architecture, self.entropy_coefficient
        if not isinstance(flow, FlowArchitecture):
            raise InputTypeError(f"architecture is {flow!r}, but it must be a FlowArchitecture.")
        if isinstance(weight, Schedule) or (not isinstance(weight, Tracer) and float(weight) != 0.0):
            raise InputError(f"entropy_coefficient is {weight}, but it must be 0: a flow's entropy is not known.")
