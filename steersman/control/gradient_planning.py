"""Grad-MPC: plans by gradient descent through a differentiable world model (Jyothir et al., 2023, arXiv:2312.17227).

A few candidate plans are unrolled from the same state, each takes some steps down the gradient of its predicted cost
with the model held fixed, and the cheapest that was seen is played. Candidates come from the last plan, from a policy
(Policy+Grad-MPC), or from both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.control.planning import Plan, Planner, PlanningModel, look_ahead
from steersman.control.sampling import Proposals
from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.policies import Policy
from steersman.training.optimizers import Adam, Optimizer
from steersman.training.schedules import Continuous, Schedule, Scheduled, resolve, scalar


class Refined(NamedTuple):
    """Candidates after the descent.

    Attributes:
        controls: of each candidate, the cheapest that it passed through ``[J, H, m]``.
        cost: predicted for them; infinite where the candidate never had a finite one ``[J]``.
        initial_cost: before the descent; infinite where it was not finite ``[J]``.
        gradient: greatest norm of a candidate's gradient on its way ``[J]``; zero where the model is flat.
    """

    controls: Float[Array, "J H m"]
    cost: Float[Array, " J"]
    initial_cost: Float[Array, " J"]
    gradient: Float[Array, " J"]


class GradientPlanner(Planner):
    """Batched descent on open-loop plans.

    ::

        candidates: the last plan shifted by a step, that plus N(0, std^2), proposals
        repeat: for each, from the same state, u <- clip(u - learning_rate Adam(dJ/du))
        play the cheapest plan seen

    The state is never carried from one iteration to the next. Since every iterate's cost is known on the way, the
    cheapest is kept, not the last: a plan is never worse than any of its candidates, the shifted last plan among
    them. A candidate whose cost or gradient is not finite stays where it is; where all costs fail, the shifted last
    plan is kept, with infinite cost.

    Attributes:
        model: what is differentiated; see :meth:`check`.
        horizon: steps of a plan ``H``.
        candidates: from the last plan ``J``; 0 to start from proposals alone.
        iterations: gradient steps ``I``; 0 for the best of the candidates.
        learning_rate: step size, in the controls' units; may follow a schedule of the iteration.
        std: spread of the candidates around the last plan, in the controls' units; one number, or one for each.
        discount: see :func:`~steersman.control.planning.look_ahead`.
        optimizer: turns gradients into steps.
        proposals: further candidates: :class:`PolicyProposals`, or any function ``(state, key) -> [P, H, m]``.
    """

    model: PlanningModel
    horizon: int = eqx.field(static=True, default=15)
    candidates: int = eqx.field(static=True, default=4)
    iterations: int = eqx.field(static=True, default=10)
    learning_rate: Scheduled = scalar(0.1)
    std: Continuous | Float[Array, " m"] = scalar(0.5)
    discount: Continuous = scalar(1.0)
    # Costs have any scale, so that Adam's usual 1e-5 may be larger than a gradient.
    optimizer: Optimizer = eqx.field(default_factory=lambda: Adam(epsilon=1e-8))
    proposals: Proposals | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.model, PlanningModel):
            raise InputTypeError(f"model is a {type(self.model).__name__}, but it must be a PlanningModel.")
        require_count("horizon", self.horizon)
        require_count("candidates", self.candidates, minimum=1 if self.proposals is None else 0)
        require_count("iterations", self.iterations, minimum=0)
        if not isinstance(self.learning_rate, Schedule):
            require_number("learning_rate", self.learning_rate, above=0.0)
        require_number("std", self.std, at_least=0.0)
        require_number("discount", self.discount, above=0.0, at_most=1.0)
        low, high = self.model.control_bounds
        require(bool(np.all(low < high)), "model.control_bounds", (low, high), "low < high in each control")

    def init(self) -> Plan:
        idle = self._clip(jnp.zeros((self.horizon, self.model.control_size)))
        nan = jnp.full((), jnp.nan)
        return Plan(idle, nan, (), {"finite": jnp.ones(()), "initial_cost": nan, "gradient": jnp.zeros(())})

    def _clip(self, controls: Array) -> Array:
        low, high = (jnp.asarray(bound, controls.dtype) for bound in self.model.control_bounds)
        return jnp.clip(controls, low, high)

    def propose(self, state: PyTree, last: Plan, key: Key[Array, ""]) -> Float[Array, "J H m"]:
        """The candidates before the descent: the shifted last plan, those around it, proposals.

        More candidates of the same key begin with the same ones.
        """
        proposal_key, key = jax.random.split(key)
        shifted = jnp.concatenate([last.controls[1:], last.controls[-1:]])
        spread = jnp.asarray(self.std, shifted.dtype)

        def around(index: Array) -> Array:
            noise = jax.random.normal(jax.random.fold_in(key, index), shifted.shape, shifted.dtype)
            return shifted + jnp.where(index > 0, spread, 0.0) * noise

        drawn = jax.vmap(around)(jnp.arange(self.candidates))
        if self.proposals is not None:
            drawn = jnp.concatenate([drawn, self.proposals(state, proposal_key).astype(shifted.dtype)])
        return self._clip(drawn)

    def refine(self, state: PyTree, candidates: Float[Array, "J H m"]) -> Refined:
        """Descends from each candidate, all from the same state.

        Raises:
            InputTypeError: the model cannot be differentiated, as one that calls a simulator on the host.
        """
        free, transformation = _Unbounded(self.model), self.optimizer.transformation()

        def cost_of(controls: Array) -> Array:
            return look_ahead(free, state, controls, discount=self.discount).cost

        def one(start: Array) -> Refined:
            def descend(running: tuple, iteration: Array) -> tuple[tuple, tuple]:
                controls, memory, best, least = running
                cost, gradient = jax.value_and_grad(cost_of)(controls)
                # NaN is below nothing.
                best, least = jnp.where(cost < least, controls, best), jnp.where(cost < least, cost, least)
                norm = jnp.linalg.norm(gradient)
                good = jnp.isfinite(cost) & jnp.isfinite(norm)
                direction, updated = transformation.update(gradient, memory, controls, value=cost)
                moved = self._clip(controls - resolve(self.learning_rate, iteration) * direction)
                moved, memory = jax.tree.map(
                    lambda new, old: jnp.where(good, new, old), (moved, updated), (controls, memory)
                )
                return (moved.astype(start.dtype), memory, best, least), (cost, jnp.where(good, norm, 0.0))

            infinite = jnp.full((), jnp.inf, start.dtype)
            steps = jnp.arange(self.iterations, dtype=jnp.uint32)
            running = (start, transformation.init(start), start, infinite)
            (last, _, best, least), (costs, norms) = jax.lax.scan(descend, running, steps)
            cost = cost_of(last)
            first = cost if self.iterations == 0 else costs[0]
            best, least = jnp.where(cost < least, last, best), jnp.where(cost < least, cost, least)
            first = jnp.where(jnp.isfinite(first), first, jnp.inf)
            least = jnp.where(jnp.isfinite(least), least, jnp.inf)
            return Refined(best, least, first, jnp.max(norms, initial=0.0))

        try:
            return jax.vmap(one)(candidates)
        except (TypeError, ValueError, NotImplementedError) as error:
            # What JAX says of host callbacks and of loops of unknown length.
            if "JVP" in str(error) or "ifferentiation" in str(error):
                raise _not_differentiable(self.model, str(error).split(".")[0]) from error
            raise

    def plan(self, state: PyTree, last: Plan, key: Key[Array, ""]) -> Plan:
        candidates = self.propose(state, last, key)
        refined = self.refine(state, candidates)
        best = jnp.argmin(refined.cost)
        some = jnp.isfinite(refined.cost[best])
        shifted = self._clip(jnp.concatenate([last.controls[1:], last.controls[-1:]]))
        report = {
            "finite": jnp.mean(jnp.isfinite(refined.cost), dtype=candidates.dtype),
            "initial_cost": jnp.min(refined.initial_cost),
            "gradient": jnp.max(refined.gradient),
        }
        return Plan(jnp.where(some, refined.controls[best], shifted), refined.cost[best], (), report)

    def check(self, state: PyTree, key: Key[Array, ""] | None = None) -> None:
        """Makes sure that there is something to descend: to be called once, outside ``jit``.

        Args:
            state: any that plans start from.
            key: randomness of the plans that are tried; ``jax.random.key(0)`` where None.

        Raises:
            InputTypeError: the model cannot be differentiated.
            InputError: the predicted cost is nowhere finite, or its gradient is zero at every candidate.
        """
        key = jax.random.key(0) if key is None else key
        last = self.init()
        refined = dataclasses.replace(self, iterations=1).refine(state, self.propose(state, last, key))
        if not bool(jnp.any(jnp.isfinite(refined.cost))):
            raise InputError("model predicts no finite cost from state under any candidate, but plans need one.")
        if not bool(jnp.any(refined.gradient > 0.0)):
            raise _not_differentiable(self.model, "the gradient of its cost in the controls is zero everywhere")


def _not_differentiable(model: PlanningModel, why: str) -> InputTypeError:
    return InputTypeError(
        f"model is a {type(model).__name__} whose cost cannot be descended ({why}), but a GradientPlanner needs "
        "gradients: plan with SamplingPlanner and CrossEntropy, which do not."
    )


class _Unbounded(PlanningModel):
    """A model whose controls are held within bounds by somebody else.

    On a bound, the derivative of a clip is a half, and outside zero; the gradient at a projected plan is the model's.
    """

    model: PlanningModel

    @property
    def control_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        size = self.model.control_size
        return np.full(size, -np.inf), np.full(size, np.inf)

    def step(self, state: PyTree, u: Float[Array, " m"]) -> tuple[PyTree, Float[Array, ""]]:
        return self.model.step(state, u)

    def terminal_cost(self, state: PyTree) -> Float[Array, ""]:
        return self.model.terminal_cost(state)


class PolicyProposals(eqx.Module):
    """Plans that a policy would follow within a model: the seeds of Policy+Grad-MPC, or of any sampling planner.

    The first is the policy's without exploration; others have noise on each action, or are drawn from the policy
    itself. The policy's memory starts anew with each plan.

    Attributes:
        model: what is followed.
        policy: what proposes.
        horizon: steps of a plan.
        count: plans proposed.
        std: noise on the actions of all but the first, in the controls' units; drawn from the policy where None.
        observe: what the policy sees of a model's state; the state itself where None.
    """

    model: PlanningModel
    policy: Policy
    horizon: int = eqx.field(static=True, default=15)
    count: int = eqx.field(static=True, default=4)
    std: Continuous | None = scalar(None)
    observe: Callable[[PyTree], PyTree] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        for name, kind in (("model", PlanningModel), ("policy", Policy)):
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise InputTypeError(f"{name} is a {type(given).__name__}, but it must be a {kind.__name__}.")
        require_count("horizon", self.horizon)
        require_count("count", self.count)
        if self.std is not None:
            require_number("std", self.std, at_least=0.0)

    def __call__(self, state: PyTree, key: Key[Array, ""]) -> Float[Array, "P H m"]:
        """The plans, within bounds.

        Args:
            state: where they start.
            key: randomness of the policy and of the noise.
        """
        first = self._follow(self.policy.mode(), state, key, 0.0)[None]
        if self.count == 1:
            return first
        policy, std = (self.policy, 0.0) if self.std is None else (self.policy.mode(), self.std)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(1, self.count))
        return jnp.concatenate([first, jax.vmap(lambda key: self._follow(policy, state, key, std))(keys)])

    def _follow(self, policy: Policy, state: PyTree, key: Array, std: Any) -> Array:
        low, high = self.model.control_bounds

        def step(running: tuple, key: Array) -> tuple[tuple, Array]:
            x, memory = running
            policy_key, noise_key = jax.random.split(key)
            seen = x if self.observe is None else self.observe(x)
            action, memory = policy(seen, memory, policy_key)
            noise = std * jax.random.normal(noise_key, action.shape, action.dtype)
            u = jnp.clip(action + noise, jnp.asarray(low, action.dtype), jnp.asarray(high, action.dtype))
            return (self.model.step(x, u)[0], memory), u

        init_key, key = jax.random.split(key)
        return jax.lax.scan(step, (state, policy.init(init_key)), jax.random.split(key, self.horizon))[1]
