"""The natural-gradient step with a divergence budget: Fisher products, conjugate gradient and line search.

The parts know parameters as PyTrees and nothing of any system. Put together they are TRPO's policy update (Schulman
et al., 2015, arXiv:1502.05477, appendix C)::

    fisher = fisher_vector_product(network, params, head, damping=0.1)
    natural = natural_step(gradient, fisher, delta)
    search = backtracking_line_search(evaluate, params, natural.step)

Every function runs under ``jit`` and ``vmap``. Parameters are trees of floating-point arrays: a policy is split with
``equinox.partition`` before, and joined inside the network function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from steersman.errors import InputTypeError, require, require_count, require_number
from steersman.policies import Head

Scalar = Float[Array, ""] | float


def tree_dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product of two trees of arrays, over all elements."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products, jnp.zeros(()))


def _add_scaled(x: PyTree, factor: Scalar, y: PyTree) -> PyTree:
    # The result keeps the type of `x`, so that a loop's carry does not change its type with the factor's.
    return jax.tree.map(lambda a, b: (a + factor * b).astype(a.dtype), x, y)


def _where(condition: Bool[Array, ""], x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _require_parameters(params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    require(len(leaves) > 0, "params", params, "a tree with at least one array of floats")
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            shown = type(leaf).__name__ if dtype is None else f"an array of {dtype}"
            raise InputTypeError(f"params holds {shown}, but its leaves must be arrays of floats.")


def fisher_vector_product(
    network_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    head: Head,
    *,
    damping: Scalar = 0.0,
    weight: Float[Array, "..."] | None = None,
) -> Callable[[PyTree], PyTree]:
    """The product with the Fisher information of a policy's parameters, without forming the matrix.

    ``F v = mean_s J(s)^T M(s) J(s) v + damping v`` with ``J`` the Jacobian of the distribution parameters and ``M``
    their own Fisher information (``head.fisher_product``). This is the Hessian at `params` of the mean divergence
    from the policy at `params` (Schulman et al., 2015, appendix C.1). The network is linearized once, here, and the
    products share that work.

    Args:
        network_fn: from parameters to the distribution parameters of a batch of states, leaves ``[B..., event]``.
            To save work it may be given a part of the states that the gradient was taken on.
        params: the parameters at which the information is taken.
        head: the family of distributions.
        damping: non-negative multiple of the identity that is added.
        weight: weight of each state ``[B...]``, non-negative, of which only the proportions matter; zero leaves a
            state out. Uniform where none is given.

    Returns:
        A function of a tree like `params` that returns a tree like `params`.

    Raises:
        InputError: the damping is negative or not finite, or the weights have another shape than the batch.
        InputTypeError: a leaf of the parameters is not an array of floats.
    """
    _require_parameters(params)
    require_number("damping", damping, at_least=0.0)
    outputs, push_forward = jax.linearize(network_fn, params)
    pull_back = jax.linear_transpose(push_forward, params)
    batch = jax.eval_shape(head.kl, outputs, outputs).shape
    if weight is None:
        share = jnp.asarray(1.0 / max(1, math.prod(batch)))
    else:
        require(jnp.shape(weight) == batch, "weight's shape", jnp.shape(weight), f"that of the batch, {batch}")
        require_number("weight", weight, at_least=0.0)
        share = weight / jnp.sum(weight)

    def shared(leaf: Array) -> Array:
        scale = share.reshape(share.shape + (1,) * (leaf.ndim - share.ndim))
        return (leaf * scale).astype(leaf.dtype)

    def product(vector: PyTree) -> PyTree:
        information = head.fisher_product(outputs, push_forward(vector))
        (pulled,) = pull_back(jax.tree.map(shared, information))
        return _add_scaled(pulled, damping, vector)

    return product


class LinearSolution(NamedTuple):
    """What conjugate gradient found.

    Attributes:
        x: the approximate solution.
        squared_residual: ``||b - A x||^2``, as the recursion carries it.
        iterations: products that were used.
    """

    x: PyTree
    squared_residual: Float[Array, ""]
    iterations: Int[Array, ""]


def conjugate_gradient(
    matvec: Callable[[PyTree], PyTree], b: PyTree, *, iterations: int = 10, tolerance: Scalar = 1e-10
) -> LinearSolution:
    """Solves ``A x = b`` for a symmetric positive semidefinite ``A``, from ``x = 0`` (Hestenes and Stiefel, 1952).

    The number of steps is fixed, so that the cost is known and the loop can be differentiated and mapped; once the
    squared residual is below `tolerance`, or a direction without positive curvature is met, nothing changes any more.

    Args:
        matvec: the product with ``A``, from a tree like `b` to a tree like `b`.
        b: the right side.
        iterations: number of steps.
        tolerance: squared residual norm at which it stops; absolute, not relative to `b`.
    """
    # jax.scipy.sparse.linalg.cg stops at max(tol ||b||, atol), a norm and by default relative; even with tol=0 and
    # atol=sqrt(tolerance), where the iterates agree, it tells neither residual nor count, and it divides by the
    # curvature also where rounding or a wrong Fisher product has made that zero or negative.
    require_count("iterations", iterations)
    require_number("tolerance", tolerance, at_least=0.0)

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        x, residual, direction, squared, count, running = state
        product = matvec(direction)
        curvature = tree_dot(direction, product)
        # Comparisons with NaN are false, so a NaN also ends the iteration, with the last good point.
        running = running & (squared >= tolerance) & (squared > 0) & (curvature > 0)
        length = jnp.where(running, squared / jnp.where(running, curvature, 1.0), 0.0)
        moved = _add_scaled(x, length, direction)
        left = _add_scaled(residual, -length, product)
        following = tree_dot(left, left).astype(squared.dtype)
        turn = jnp.where(running, following / jnp.where(running, squared, 1.0), 0.0)
        turned = _add_scaled(left, turn, direction)
        taken = (moved, left, turned, following, count + 1)
        kept = (x, residual, direction, squared, count)
        return (*_where(running, taken, kept), running), None

    squared = tree_dot(b, b)
    start = (jax.tree.map(jnp.zeros_like, b), b, b, squared, jnp.zeros((), jnp.int32), jnp.asarray(True))
    (x, _, _, squared, count, _), _ = jax.lax.scan(step, start, None, length=iterations)
    return LinearSolution(x, squared, count)


class NaturalStep(NamedTuple):
    """A step along the natural gradient whose quadratic model of the divergence is `delta`.

    Attributes:
        step: what is added to the parameters; zero where `valid` is false.
        direction: the natural gradient ``x`` with ``F x = g``.
        scale: the factor ``beta``, with ``step = beta x``; zero where `valid` is false.
        expected_improvement: first-order gain of the objective, ``g . step``.
        quadratic_form: ``x . F x``, as it was computed.
        squared_residual: ``||g - F x||^2`` of the linear solve.
        iterations: Fisher products that the solve used.
        valid: false where ``x . F x`` is not a positive finite number (no gradient, or a Fisher product that is not
            positive semidefinite), so that no step length follows from it.
    """

    step: PyTree
    direction: PyTree
    scale: Float[Array, ""]
    expected_improvement: Float[Array, ""]
    quadratic_form: Float[Array, ""]
    squared_residual: Float[Array, ""]
    iterations: Int[Array, ""]
    valid: Bool[Array, ""]


def natural_step(
    gradient: PyTree,
    fisher: Callable[[PyTree], PyTree],
    delta: Scalar,
    *,
    iterations: int = 10,
    tolerance: Scalar = 1e-10,
) -> NaturalStep:
    """The longest natural-gradient step that a divergence budget allows: ``beta x`` with ``F x = g``.

    ``beta = sqrt(2 delta / x . F x)`` makes the divergence ``delta`` to second order (Schulman et al., 2015,
    appendix C). The same, damped, product serves the solve and the length.

    Args:
        gradient: gradient ``g`` of the objective that is to be *increased*.
        fisher: the product with ``F``, from :func:`fisher_vector_product`.
        delta: divergence budget in nats.
        iterations: steps of conjugate gradient.
        tolerance: squared residual norm at which these stop.

    Raises:
        InputError: `delta` is not a positive finite number.
    """
    require_number("delta", delta, above=0.0)
    solution = conjugate_gradient(fisher, gradient, iterations=iterations, tolerance=tolerance)
    # One more product instead of x . (g - residual): the recursion's residual drifts away from the true one.
    quadratic = tree_dot(solution.x, fisher(solution.x))
    valid = (quadratic > 0) & jnp.isfinite(quadratic)
    scale = jnp.where(valid, jnp.sqrt(2.0 * delta / jnp.where(valid, quadratic, 1.0)), 0.0)
    step = jax.tree.map(lambda x: jnp.where(valid, scale * x, 0.0).astype(x.dtype), solution.x)
    return NaturalStep(
        step=step,
        direction=solution.x,
        scale=scale,
        expected_improvement=tree_dot(gradient, step),
        quadratic_form=quadratic,
        squared_residual=solution.squared_residual,
        iterations=solution.iterations,
        valid=valid,
    )


class LineSearch(NamedTuple):
    """What a backtracking line search found.

    Attributes:
        params: the first candidate that was accepted; the old parameters, bit for bit, where none was.
        accepted: whether one was.
        trials: candidates that were evaluated.
        scale: the fraction of the full step that was taken; zero where none was.
        info: what `evaluate` told about the accepted candidate, or about the last one where none was accepted.
    """

    params: PyTree
    accepted: Bool[Array, ""]
    trials: Int[Array, ""]
    scale: Float[Array, ""]
    info: PyTree


def backtracking_line_search(
    evaluate: Callable[[PyTree], tuple[Bool[Array, ""] | bool, Any]],
    params: PyTree,
    step: PyTree,
    *,
    shrink: Scalar = 0.8,
    trials: int = 10,
) -> LineSearch:
    """Tries ``params + shrink^j step`` for ``j = 0, 1, ...`` and takes the first that is accepted.

    Args:
        evaluate: from candidate parameters to ``(accepted, info)``, where `info` is a tree of arrays to report. A
            test written with ``<=`` and ``>`` rejects NaN by itself.
        params: the parameters to start from, which are kept if every candidate is rejected.
        step: the full step, a tree like `params`.
        shrink: factor between one candidate and the next, in (0, 1).
        trials: most candidates that are tried.

    Raises:
        InputError: `shrink` is outside (0, 1), or `trials` is not positive.
    """
    require_number("shrink", shrink, above=0.0, below=1.0)
    require_count("trials", trials)

    def candidate(scale: Array) -> PyTree:
        return _add_scaled(params, scale, step)

    def attempt(scale: Array) -> tuple[Array, PyTree]:
        accepted, info = evaluate(candidate(scale))
        return jnp.asarray(accepted, bool), jax.tree.map(jnp.asarray, info)

    def searching(state: tuple) -> Array:
        trial, accepted, _, _ = state
        return ~accepted & (trial < trials)

    def body(state: tuple) -> tuple:
        trial, _, scale, _ = state
        scale = jnp.where(trial == 0, scale, scale * shrink)
        accepted, info = attempt(scale)
        return trial + 1, accepted, scale, info

    full = jnp.ones((), jnp.result_type(float))
    _, shapes = jax.eval_shape(attempt, full)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = (jnp.zeros((), jnp.int32), jnp.asarray(False), full, nothing)
    trial, accepted, scale, info = jax.lax.while_loop(searching, body, start)
    taken = _where(accepted, candidate(scale), params)
    return LineSearch(taken, accepted, trial, jnp.where(accepted, scale, 0.0), info)
