"""The optimizer slot: how a gradient becomes a step."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import optax

from steersman.errors import require_number
from steersman.training.schedules import Continuous, scalar


class Optimizer(eqx.Module):
    """Turns gradients of a loss into the direction that a learning rate is multiplied with."""

    @abc.abstractmethod
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The Optax transformation; its output is multiplied by the learning rate and *subtracted*.

        It is called with the present loss as the extra argument ``value``, which step-size rules may look at.
        """


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015, arXiv:1412.6980).

    Attributes:
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
        epsilon: added to the root of the latter.
    """

    beta1: Continuous = scalar(0.9)
    beta2: Continuous = scalar(0.999)
    epsilon: Continuous = scalar(1e-5)

    def __check_init__(self) -> None:
        require_number("beta1", self.beta1, at_least=0.0, below=1.0)
        require_number("beta2", self.beta2, at_least=0.0, below=1.0)
        require_number("epsilon", self.epsilon, above=0.0)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        numbers: Any = {"b1": self.beta1, "b2": self.beta2, "eps": self.epsilon}
        return optax.with_extra_args_support(optax.scale_by_adam(**numbers))


class AdamW(Adam):
    """Adam with weight decay apart from the gradient (Loshchilov and Hutter, 2019, arXiv:1711.05101).

    Attributes:
        weight_decay: fraction of the parameters subtracted in each step, times the learning rate.
    """

    weight_decay: Continuous = scalar(1e-6)

    def __check_init__(self) -> None:
        require_number("weight_decay", self.weight_decay, at_least=0.0)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        decay: Any = self.weight_decay
        return optax.with_extra_args_support(optax.chain(super().transformation(), optax.add_decayed_weights(decay)))


class SGD(Optimizer):
    """The gradient itself."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(optax.identity())
