"""Planning by sampling: many candidate plans are simulated side by side, and the search moves to the better ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.control.planning import Correction, Plan, Planner, PlanningModel, finite_bounds, look_ahead
from steersman.control.search import CrossEntropy, RandomShooting, Search, SearchRule
from steersman.control.splines import Spline
from steersman.errors import InputTypeError, require_count, require_number
from steersman.training.schedules import Continuous, scalar

#: Plans proposed by something else, ``(state, key) -> [P, H, m]``: a policy's rollouts, a library of motions.
Proposals = Callable[[PyTree, Array], Array]


class SamplingPlanner(Planner):
    """One loop for random shooting, predictive sampling, CEM, iCEM and MPPI: the search rule tells them apart.

    ::

        shift the last plan by a step; widen the search again
        repeat: draw candidates; simulate them; let the rule learn from their costs
        play the mean (or the cheapest candidate seen)

    Candidates whose cost is not finite count as infinitely expensive; the report says how many there were. Where all
    fail in every iteration, the shifted last plan is kept.

    Attributes:
        model: what is simulated.
        spline: the plan's length, and its knots.
        rule: how the search learns.
        samples: candidates drawn in an iteration.
        iterations: of each plan.
        best: whether the cheapest candidate of the plan is played, not the mean of the search.
        discount: see :func:`~steersman.control.planning.look_ahead`.
        correct: changes controls where they are applied, in simulation too; the search learns from what was applied,
            so knots must be controls (a spline without ``knots``).
        proposals: further candidates in every iteration.
    """

    model: PlanningModel
    spline: Spline
    rule: SearchRule = eqx.field(default_factory=CrossEntropy)
    samples: int = eqx.field(static=True, default=64)
    iterations: int = eqx.field(static=True, default=4)
    best: bool = eqx.field(static=True, default=False)
    discount: Continuous = scalar(1.0)
    correct: Correction | None = None
    proposals: Proposals | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.model, PlanningModel):
            raise InputTypeError(f"model is a {type(self.model).__name__}, but it must be a PlanningModel.")
        require_count("iterations", self.iterations)
        require_number("discount", self.discount, above=0.0, at_most=1.0)
        self.rule.check(self.samples)
        if isinstance(self.rule, RandomShooting):
            finite_bounds(self.model, "for candidates to be drawn between them")

    def _bounds(self, dtype: Any = None) -> tuple[Array, Array]:
        low, high = self.model.control_bounds
        return jnp.asarray(low, dtype), jnp.asarray(high, dtype)

    def init(self) -> Plan:
        low, high = self._bounds(jnp.result_type(float))
        knots = jnp.clip(jnp.zeros((self.spline.size, self.model.control_size)), low, high)
        return self._answer(self.rule.init(knots), knots, jnp.full((), jnp.nan), jnp.ones(()))

    def _answer(self, search: Search, knots: Array, cost: Array, finite: Array) -> Plan:
        low, high = self._bounds(knots.dtype)
        controls = jnp.clip(self.spline.controls(knots), low, high)
        return Plan(controls, cost, search, {"finite": finite, "std": jnp.mean(search.std)})

    def simulate(self, state: PyTree, knots: Float[Array, "N K m"]) -> tuple[Float[Array, "N K m"], Float[Array, " N"]]:
        """The knots of candidates as they were applied, and their costs."""

        def one(controls: Array) -> tuple[Array, Array]:
            seen = look_ahead(self.model, state, controls, discount=self.discount, correct=self.correct)
            return seen.controls, seen.cost

        low, high = self._bounds(knots.dtype)
        applied, costs = jax.vmap(one)(self.spline.controls(knots))
        # Without a correction bounds are all that changes a candidate, and knots of a curve keep to them themselves.
        changed = jnp.clip(knots, low, high) if self.correct is None else self.spline.fit(applied)
        return changed, jnp.where(jnp.isfinite(costs), costs, jnp.inf)

    def plan(self, state: PyTree, last: Plan, key: Key[Array, ""]) -> Plan:
        proposal_key, key = jax.random.split(key)
        shifted: Search = jax.tree.map(lambda leaf: leaf, last.memory)
        shifted = Search(self.spline.shift(shifted.mean), shifted.std, self.spline.shift(shifted.kept))
        search = self.rule.restart(shifted)
        others = jnp.zeros((0, *search.mean.shape), search.mean.dtype)
        if self.proposals is not None:
            others = self.spline.fit(self.proposals(state, proposal_key))

        def iterate(running: tuple, key: Key[Array, ""]) -> tuple[tuple, Array]:
            search, best, least = running
            draw_key, update_key = jax.random.split(key)
            drawn = self.rule.draw(search, self._bounds(search.mean.dtype), self.samples, draw_key)
            candidates, costs = self.simulate(state, jnp.concatenate([drawn, search.kept, others]))
            learned = self.rule.update(search, candidates, costs, update_key)
            cheapest = jnp.argmin(costs)
            some = jnp.isfinite(costs[cheapest])
            better = costs[cheapest] < least
            best = jnp.where(better, candidates[cheapest], best)
            least = jnp.where(better, costs[cheapest], least)
            search = jax.tree.map(lambda new, old: jnp.where(some, new, old), learned, search)
            return (search, best, least), jnp.mean(jnp.isfinite(costs))

        infinite = jnp.full((), jnp.inf, search.mean.dtype)
        (search, best, least), finite = jax.lax.scan(
            iterate, (search, search.mean, infinite), jax.random.split(key, self.iterations)
        )
        return self._answer(search, best if self.best else search.mean, least, jnp.mean(finite))
