"""Step-size rules that see the value of what they improve."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from steersman.errors import require_number
from steersman.training.optimizers import Optimizer
from steersman.training.schedules import Continuous, scalar

Scalar = Float[Array, ""] | float


class PolyakState(NamedTuple):
    """What the last Polyak step was, for the records.

    Attributes:
        step_size: what the gradient was multiplied with.
        gap: how far the value was above the target, zero where it was not.
        gradient_norm: Euclidean norm of the gradient over all parameters.
    """

    step_size: Float[Array, ""]
    gap: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def polyak_step_size(
    gap: Float[Array, "..."], squared_norm: Float[Array, "..."], c: Scalar = 1.0, cap: Scalar = jnp.inf
) -> Float[Array, "..."]:
    """``min(gap / (c |g|^2), cap)``, zero where the gap is not positive (Loizou et al., 2021, arXiv:2002.10542).

    Where the gradient vanishes and the gap does not, it is the cap.

    Args:
        gap: distance of the value from its target.
        squared_norm: squared Euclidean norm of the gradient.
        c: 1 for Polyak's step; larger is more cautious, and theory asks for at least 1/2.
        cap: largest step size, infinite for none. Its unit is that of squared parameters per value.
    """
    flat = squared_norm == 0
    ratio = gap / (c * jnp.where(flat, 1.0, squared_norm))
    # NaN stays NaN in all three, so that it is seen and not stepped over.
    ratio = jnp.where(flat & (gap > 0), jnp.inf, jnp.maximum(ratio, 0.0))
    return jnp.minimum(ratio, cap)


def require_polyak(c: Any, cap: Any) -> None:
    """Checks the two numbers of a Polyak step; the cap may be infinite."""
    require_number("c", c, above=0.0)
    if isinstance(cap, Tracer) or not np.all(np.isposinf(np.asarray(cap))):
        require_number("cap", cap, above=0.0)


def scale_by_polyak_sps(c: Scalar = 1.0, cap: Scalar = jnp.inf) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the stochastic Polyak step size; what comes out is to be subtracted.

    See :func:`polyak_sps`, which subtracts.
    """
    require_polyak(c, cap)

    def init(params: PyTree) -> PolyakState:
        # The state keeps the type of what it will hold, so that it can be a loop's carry.
        zero = jnp.zeros((), jnp.result_type(float, *jax.tree.leaves(params)))
        return PolyakState(zero, zero, zero)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value: Any, target: Any = 0.0, **extra: Any
    ) -> tuple[PyTree, PolyakState]:
        del params, extra
        dtype = state.step_size.dtype
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(updates)]
        squared = sum(squares, jnp.zeros((), dtype))
        gap = jnp.asarray(value - target, dtype)
        step = polyak_step_size(gap, squared, c, cap)
        # A vanishing gradient times an infinite cap would not be a number.
        factor = jnp.where(squared == 0, 0.0, step)
        scaled = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), updates)
        return scaled, PolyakState(step.astype(dtype), jnp.maximum(gap, 0.0), jnp.sqrt(squared))

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def polyak_sps(c: Scalar = 1.0, cap: Scalar = jnp.inf) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with the stochastic Polyak step size, as an Optax transformation.

    ``update(gradient, state, params, value=f, target=f_star)`` returns ``-min((f - f_star) / (c |g|^2), cap) g``, with
    a gap below zero counted as zero. Both extra arguments belong to one call: the target may be a different number
    every time. To go uphill, pass the negatives of value, target and gradient.

    ``optax.polyak_sgd`` is the same for ``c = 1`` and a fixed target, except that it takes no step where the gradient
    is shorter than 1.5e-8, which rewards on a small scale are near.

    Args:
        c: 1 for Polyak's step; larger is more cautious.
        cap: largest step size; infinite for none.

    Raises:
        InputError: a number is not above zero.
    """
    return optax.chain(scale_by_polyak_sps(c, cap), optax.scale(-1.0))


class Polyak(Optimizer):
    """The optimizer slot with a step size that follows from the distance to a known target. Use a learning rate of 1.

    The loss is at best ``-target``: give the return that an optimal policy reaches, on the scale that the method
    maximizes (discounted from an episode's start for :class:`~steersman.rl.on_policy.PolicyGradient`).

    Attributes:
        target: the highest return.
        c: 1 for Polyak's step; larger is more cautious.
        cap: largest step size; infinite for none.
    """

    target: Continuous = scalar(0.0)
    c: Continuous = scalar(1.0)
    cap: Continuous = scalar(1.0)

    def __check_init__(self) -> None:
        require_number("target", self.target)
        require_polyak(self.c, self.cap)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        rule = scale_by_polyak_sps(self.c, self.cap)

        def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
            return rule.update(updates, state, params, **{"target": -self.target, **extra})

        return optax.GradientTransformationExtraArgs(rule.init, update)
