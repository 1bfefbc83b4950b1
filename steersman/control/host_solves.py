"""Solvers on the host inside ``jit``, ``vmap`` and ``scan``, controllers on them, and what acts where they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.control.planning import Plan
from steersman.control.quadratic_programs import PreparedADMM, PreparedQP, QPSolution
from steersman.errors import InputError, InputTypeError, require
from steersman.policies import Policy

#: What acts where a solver has no answer: ``"shift"`` (the last plan from its second control on, which repeats its last
#: one), a control ``[m]`` to be held, or a function ``(state, last plan) -> controls [H, m]`` that can be traced.
Fallback = Any


def on_host(function: Callable[..., PyTree], like: PyTree) -> Callable[..., PyTree]:
    """A function of NumPy arrays as one that can be traced; ``vmap`` calls it once for each element.

    It must do without JAX, which can wait for itself inside a callback, and answer the same to the same arguments.

    Args:
        function: PyTrees of arrays in, a PyTree of arrays out.
        like: arrays or shapes with the structure, shapes and types of the answer, which is cast to the types.

    Raises:
        InputError: while it runs, an answer has another shape.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), like)

    def cast(leaf: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        array = np.asarray(leaf, shape.dtype)
        require(array.shape == shape.shape, "a shape of the answer", array.shape, f"{shape.shape}")
        return array

    def run(*arguments: Any) -> PyTree:
        return jax.tree.map(cast, function(*jax.tree.map(np.asarray, arguments)), shapes)

    def call(*arguments: Any) -> PyTree:
        return jax.pure_callback(run, shapes, *arguments, vmap_method="sequential")

    return call


def solve_qp(prepared: PreparedQP, parameters: Float[Array, " k"], start: Any = None, dual: Any = None) -> QPSolution:
    """Solves a prepared program inside ``jit`` and ``vmap``, whatever its backend.

    Args:
        prepared: of any solver.
        parameters: ``[k]``.
        start: a guess of the variables ``[n]``; ignored where it is not finite.
        dual: a guess of the multipliers ``[c]``, likewise.
    """
    kind = parameters.dtype
    if isinstance(prepared, PreparedADMM):
        start, dual = (None if guess is None else jnp.nan_to_num(guess) for guess in (start, dual))
        return prepared.solve(parameters, start, dual)
    program: Any = prepared.program  # pyright: ignore[reportAttributeAccessIssue]

    def solve(parameters: np.ndarray, start: Any, dual: Any) -> QPSolution:
        count = len(program.row_names)
        if not np.all(np.isfinite(parameters)):
            nothing = np.full(program.size, np.nan)
            return QPSolution(nothing, np.zeros(count), np.int32(4), np.int32(0), np.float64(0.0), np.float64(np.nan))
        usable = start is not None and np.all(np.isfinite(start))
        sure = usable and dual is not None and np.all(np.isfinite(dual))
        return prepared.solve(parameters, start if usable else None, dual if sure else None)

    number, whole = jax.ShapeDtypeStruct((), kind), jax.ShapeDtypeStruct((), jnp.int32)
    z, rows = (jax.ShapeDtypeStruct((size,), kind) for size in (program.size, len(program.row_names)))
    return on_host(solve, QPSolution(z, rows, whole, whole, number, number))(parameters, start, dual)


def check_fallback(fallback: Fallback, controls: int) -> Fallback:
    """A fallback that can be used, or an error that names it.

    Args:
        fallback: see :data:`Fallback`.
        controls: number of controls ``m``.
    """
    if callable(fallback) or (isinstance(fallback, str) and fallback == "shift"):
        return fallback
    if isinstance(fallback, str):
        raise InputError(f"fallback is {fallback!r}, but it must be 'shift', a control or a function.")
    try:
        held = jnp.asarray(fallback, jnp.result_type(float))
    except (TypeError, ValueError):
        raise InputTypeError(f"fallback is {fallback!r}, but it must be 'shift', a control or a function.") from None
    require(held.shape == (controls,), "fallback's shape", held.shape, f"({controls},)")
    return held


def fall_back(fallback: Fallback, state: PyTree, last: Plan) -> Float[Array, "H m"]:
    """The controls of a checked fallback; those of the first plan, NaN by custom, where it shifts and there is none."""
    if callable(fallback):
        controls: Any = fallback(state, last)
        return controls
    if isinstance(fallback, str):
        return jnp.concatenate([last.controls[1:], last.controls[-1:]])
    return jnp.broadcast_to(jnp.asarray(fallback), last.controls.shape)


class HostController(Policy):
    """A controller that solves on the host. Its memory is the last plan, whose report names status and fallback.

    Attributes:
        solve: ``(state, last plan) -> plan`` in NumPy. The report has a ``status``, an index into
            :data:`~steersman.control.quadratic_programs.STATUSES`; where it is above 1 the controls are not used.
        first: what stands for the last plan before the first one; every plan has its shapes and types.
        fallback: what acts where there is no answer, see :data:`Fallback`. Before the first plan there is nothing to
            shift but the controls of `first`: make them NaN, so that nothing wrong goes unseen.
    """

    solve: Callable[[Any, Plan], Plan] = eqx.field(static=True)
    first: Plan
    fallback: Fallback

    def __init__(self, solve: Callable[[Any, Plan], Plan], first: Plan, fallback: Fallback = "shift") -> None:
        require("status" in first.report, "first.report", sorted(first.report), "with a 'status'")
        self.solve = solve
        report = {**first.report, "fallback": jnp.zeros((), jnp.int32)}
        self.first = jax.tree.map(jnp.asarray, first._replace(report=report))
        self.fallback = check_fallback(fallback, self.first.controls.shape[1])

    def init(self, key: Key[Array, ""]) -> Plan:
        del key
        return self.first

    def __call__(self, observation: PyTree, carry: Plan, key: Key[Array, ""]) -> tuple[Float[Array, " m"], Plan]:
        del key
        plan = on_host(self._answer, self.first)(observation, carry)
        failed = plan.report["status"] > 1
        controls = jnp.where(failed, fall_back(self.fallback, observation, carry), plan.controls)
        plan = plan._replace(controls=controls, report={**plan.report, "fallback": failed.astype(jnp.int32)})
        return controls[0], plan

    def _answer(self, state: Any, last: Plan) -> Plan:
        plan = self.solve(state, last)
        return plan._replace(report={**plan.report, "fallback": np.int32(0)})
