"""The optimizer slot: how a gradient becomes a step."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from steersman.errors import require_number
from steersman.training.schedules import Continuous, scalar


class Optimizer(eqx.Module):
    """Turns gradients of a loss into the direction that a learning rate is multiplied with."""

    @abc.abstractmethod
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The Optax transformation; its output is multiplied by the learning rate and *subtracted*.

        It is called with the present loss as the extra argument ``value``, which step-size rules may look at.
        """


class Descent(NamedTuple):
    """One step down a loss.

    Attributes:
        parameters: after the step.
        memory: the optimizer's.
        loss: before the step.
        gradient_norm: before it is bounded.
    """

    parameters: PyTree
    memory: PyTree
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def descend(
    optimizer: Optimizer,
    loss: Callable[[PyTree], Float[Array, ""]],
    parameters: PyTree,
    memory: PyTree,
    learning_rate: Float[Array, ""] | float,
    max_norm: Float[Array, ""] | float | None = None,
) -> Descent:
    """One step down a loss, ``parameters - learning_rate direction``.

    Array by array: joining large networks into one vector and cutting it again would cost a fifth of a step.

    Args:
        optimizer: turns the gradient into the direction.
        loss: of the parameters.
        parameters: a tree of floating-point arrays.
        memory: the optimizer's, first ``optimizer.transformation().init(parameters)``.
        learning_rate: step size.
        max_norm: bound on the gradient's norm, or None.
    """
    value, gradient = jax.value_and_grad(loss)(parameters)
    norm = optax.global_norm(gradient)
    if max_norm is not None:
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda leaf: leaf * factor, gradient)
    direction, memory = optimizer.transformation().update(gradient, memory, parameters, value=value)
    parameters = jax.tree.map(lambda leaf, change: leaf - learning_rate * change, parameters, direction)
    return Descent(parameters, memory, value, norm)


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
