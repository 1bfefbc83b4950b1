"""PPO with an averaged proximal policy, and batch size-invariance (Hilton, Cobbe, Schulman, 2022, arXiv:2110.00641)."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import equinox as eqx
from jaxtyping import Array, Float, UInt32

from steersman.errors import InputError, InputTypeError, require, require_number
from steersman.policies import NetworkPolicy
from steersman.rl.advantage_scales import AdvantageMoments, AdvantageScale
from steersman.rl.on_policy.actor_critic import ActorCriticState
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.references import MovingAverageReference, Reference
from steersman.rl.surrogates import Clip, Surrogate
from steersman.training.averaging import MovingAverage, decay_of
from steersman.training.hyperparameters import apply_settings
from steersman.training.optimizers import SGD, Adam, Optimizer
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar


class PPOEWMA(FirstOrder):
    """PPO whose steps are measured from an average of recent policies rather than from the one that acted.

    PPO's old policy has two jobs: to weigh the data, and to hold back the step. Only the first needs the policy that
    collected the data. For the second any recent policy will do; here it has exponentially averaged parameters, whose
    age in samples does not depend on the batch size, and which remains recent where the data are old. With
    :func:`rescale_batch` the result, as a function of samples, hardly depends on the batch size.

    Attributes:
        surrogate: the policy loss, around the averaged policy.
        reference: the averaged policy; its decay is per gradient step.
        optimizer: Adam, with the small epsilon that keeps its steps independent of the gradient's scale.
        learning_rate: Adam's step size.
        epochs: passes over a batch.
        max_gradient_norm: none, as in the authors' code: small batches have larger gradients.
        normalize_advantages: by moments of whole batches, which small batches can share.
    """

    surrogate: Surrogate = eqx.field(default_factory=Clip)
    reference: Reference = eqx.field(default_factory=MovingAverageReference)
    optimizer: Optimizer = eqx.field(default_factory=lambda: Adam(epsilon=1e-8))
    learning_rate: Scheduled = scalar(5e-4)
    epochs: int = eqx.field(static=True, default=1)
    max_gradient_norm: Continuous | None = scalar(None)
    normalize_advantages: bool | AdvantageScale = eqx.field(default_factory=AdvantageMoments)

    def __check_init__(self) -> None:
        if isinstance(self.surrogate, Clip) and not isinstance(self.surrogate.epsilon, Schedule):
            require_number("surrogate.epsilon", self.surrogate.epsilon, above=0.0, below=1.0)

    def averaged_policy(self, state: ActorCriticState) -> NetworkPolicy:
        """The policy with averaged parameters, often a little better and always smoother than the newest.

        Raises:
            InputTypeError: the reference averages nothing.
        """
        if not isinstance(self.reference, MovingAverageReference):
            raise InputTypeError(f"reference is {self.reference!r}, which keeps no averaged policy.")
        return state.with_learned(state.method.reference.value).actor


class ScaledSchedule(Schedule):
    """Another schedule times a factor."""

    schedule: Schedule
    factor: Continuous = scalar(1.0)

    def __call__(self, samples: UInt32[Array, ""]) -> Float[Array, ""]:
        return self.factor * self.schedule(samples)


A = TypeVar("A", bound=FirstOrder)


def rescale_batch(algorithm: A, c: float | int) -> A:
    """The algorithm at a ``c`` times smaller batch, adjusted so that it learns the same from as many samples.

    Iterations and minibatches both become smaller by ``c``; their number stays. Then

    - the learning rate becomes ``1 / sqrt(c)`` times as large for Adam, whose steps do not grow with the gradient, and
      ``1 / c`` times for plain gradient steps;
    - the averaged policy's centre of mass becomes ``c`` times as many gradient steps, which is as many samples;
    - moments of advantages decay by ``1 - (1 - b) / c``, and so weigh as many samples as before. (Where a larger batch
      alone holds more than that, by zero.)

    Clip range, epochs, discounts and Adam's decays stay. The rule holds while batches are small next to the critical
    batch size, where a gradient is mostly noise; for larger ones (``c < 1``) the learning rate soon is too large.

    Args:
        algorithm: usually a :class:`PPOEWMA`. Others are rescaled as far as they have what is listed; without an
            averaged policy, the invariance is lost.
        c: above 0; ``num_envs / c`` must be whole.

    Raises:
        InputError: the batch cannot be divided so, or the optimizer is one that no rule is known for.
    """
    require_number("c", c, above=0.0)
    num_envs = algorithm.num_envs / float(c)
    whole = round(num_envs)
    require(
        whole >= 1 and math.isclose(num_envs, whole, rel_tol=1e-9),
        "c",
        c,
        f"a number by which num_envs = {algorithm.num_envs} can be divided",
    )
    rows = whole if algorithm.unrolled else whole * algorithm.num_steps
    require(
        rows % algorithm.minibatches == 0,
        "c",
        c,
        f"a number that leaves minibatches of equal size ({algorithm.minibatches} of {rows} rows are not)",
    )
    if not isinstance(algorithm.optimizer, (Adam, SGD)):
        raise InputError(f"optimizer is {algorithm.optimizer!r}, but rescaling is only known for Adam and SGD.")
    factor = c**-0.5 if isinstance(algorithm.optimizer, Adam) else 1.0 / c
    rate = algorithm.learning_rate
    rate = ScaledSchedule(rate, factor) if isinstance(rate, Schedule) else rate * factor
    settings: dict[str, Any] = {"num_envs": whole, "learning_rate": rate}
    if isinstance(algorithm.reference, MovingAverageReference):
        settings["reference.decay"] = decay_of(c * MovingAverage(algorithm.reference.decay).centre_of_mass)
    if isinstance(algorithm.normalize_advantages, AdvantageMoments):
        decay = 1.0 - (1.0 - float(algorithm.normalize_advantages.decay)) / c
        settings["normalize_advantages.decay"] = max(0.0, decay)
    return apply_settings(algorithm, settings)
