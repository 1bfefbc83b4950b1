"""DPPO: policy optimization through the denoising chain of a diffusion policy (Ren et al., 2024, arXiv:2409.00588)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman import objectives
from steersman.diffusion.denoising_chain import DenoisingChains
from steersman.errors import InputError, InputTypeError, require_number
from steersman.policies import Architecture
from steersman.rl.on_policy.actor_critic import ActorCriticState
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.surrogates import Surrogate, SurrogateInputs
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar


class DenoisingClip(Surrogate):
    """PPO's clip with a width for each step of the chain: tighter where there is more noise.

    Step ``i`` of ``K``, the noisiest first, has ``smallest + (epsilon - smallest) (e^{rate u} - 1) / (e^rate - 1)``
    with ``u = i / (K - 1)``; a single step has `epsilon`.

    Attributes:
        epsilon: width at the last step.
        smallest: width at the first.
        rate: how late the width grows, above 0.
    """

    epsilon: Scheduled = scalar(0.01)
    smallest: Scheduled = scalar(0.001)
    rate: Continuous = scalar(3.0)

    def __check_init__(self) -> None:
        for name in ("epsilon", "smallest"):
            if not isinstance(getattr(self, name), Schedule):
                require_number(name, getattr(self, name), above=0.0)
        require_number("rate", self.rate, above=0.0)

    def widths(self, steps: int) -> Float[Array, " steps"]:
        """The width at each of `steps` steps."""
        u = jnp.arange(steps) / (steps - 1) if steps > 1 else jnp.ones(1)
        return self.smallest + (self.epsilon - self.smallest) * jnp.expm1(self.rate * u) / jnp.expm1(self.rate)

    def __call__(
        self, log_ratio: Float[Array, "... K"], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "... K"]:
        widths = self.widths(log_ratio.shape[-1])
        return objectives.clipped(log_ratio, advantage, widths.reshape((1,) * (log_ratio.ndim - 1) + widths.shape))


class DenoisingDiscount(Surrogate):
    """Another surrogate on the steps of a chain, whose advantage is discounted away from the chunk.

    Step ``i`` of ``K``, the noisiest first, has ``discount^{K-1-i} A`` with the advantage ``A`` of its decision. Any
    surrogate fits inside.

    Attributes:
        surrogate: the policy loss.
        discount: above 0, at most 1.
    """

    surrogate: Surrogate = eqx.field(default_factory=DenoisingClip)
    discount: Continuous = scalar(0.99)

    def __check_init__(self) -> None:
        require_number("discount", self.discount, above=0.0, at_most=1.0)

    def _discounted(self, log_ratio: Array, advantage: Array) -> Array:
        steps = log_ratio.shape[-1]
        if advantage.ndim < log_ratio.ndim:
            advantage = advantage[..., None]
        return advantage * jnp.asarray(self.discount) ** jnp.arange(steps - 1, -1, -1)

    @property
    def bound(self) -> Any:
        """The bound on a divergence that the surrogate inside has, which a fix-up asks for; None if it has none."""
        return getattr(self.surrogate, "bound", None)

    def init(self) -> PyTree:
        return self.surrogate.init()

    def __call__(
        self, log_ratio: Float[Array, "... K"], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> Float[Array, "... K"]:
        return self.surrogate(log_ratio, self._discounted(log_ratio, advantage), inputs, state)

    def learn(
        self, log_ratio: Float[Array, "..."], advantage: Float[Array, "..."], inputs: SurrogateInputs, state: PyTree
    ) -> PyTree:
        return self.surrogate.learn(log_ratio, self._discounted(log_ratio, advantage), inputs, state)

    def adapt(self, state: PyTree, kl: Float[Array, ""]) -> PyTree:
        return self.surrogate.adapt(state, kl)

    def penalty(self, state: PyTree) -> Float[Array, ""]:
        return self.surrogate.penalty(state)

    def metrics(self, state: PyTree) -> dict[str, Float[Array, ""]]:
        return self.surrogate.metrics(state)


class DPPO(FirstOrder):
    """Fine-tunes a diffusion policy on any reward: each denoising step is an action with its decision's advantage.

    The loop is that of every first-order method here, so that any surrogate, phase, reference or critic works on a
    diffusion policy. A row of a minibatch is a decision with all steps of its chain, where the authors' code draws
    single steps: the gradient's mean is the same, and the observation is encoded once for all of them. The critic sees
    the observation alone. ``num_steps`` counts decisions. Give ``learning_rate`` a schedule that starts at 0 to warm
    the critic up first. Defaults are the authors' for Gym.

    The authors' options are the loop's: ``imitation=Imitation(...)`` for chains of the original policy at the visited
    states, ``normalize_advantages=ClippedAdvantages(...)`` for quantiles, ``entropy_coefficient`` for a learned eta.

    Attributes:
        architecture: the diffusion policy, :class:`~steersman.diffusion.denoising_chain.DenoisingChains`.
    """

    architecture: Architecture | None = None
    surrogate: Surrogate = eqx.field(default_factory=DenoisingDiscount)
    num_envs: int = eqx.field(static=True, default=40)
    num_steps: int = eqx.field(static=True, default=500)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(256, 256, 256), converter=tuple)
    activation: str = eqx.field(static=True, default="mish")
    learning_rate: Scheduled = scalar(1e-4)
    critic_learning_rate: Scheduled | None = scalar(1e-3)
    epochs: int = eqx.field(static=True, default=5)
    minibatches: int = eqx.field(static=True, default=40)
    max_gradient_norm: Continuous | None = scalar(None)
    target_kl: Continuous | None = scalar(1.0)
    normalize_rewards: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        if self.architecture is not None and not isinstance(self.architecture, DenoisingChains):
            raise InputTypeError(
                f"architecture is a {type(self.architecture).__name__}, but it must be DenoisingChains(generator)."
            )
        if self.alternatives is not None:
            raise InputError("alternatives is given, but it must be None: a chain is not drawn from parameters.")

    def init(self, problem: Any, key: Array) -> ActorCriticState:
        if self.architecture is None:
            raise InputError(
                "architecture is None, but it must be DenoisingChains(generator), with the generator to fine-tune."
            )
        return super().init(problem, key)
