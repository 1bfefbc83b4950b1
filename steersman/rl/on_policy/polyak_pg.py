"""Polyak-PG: policy gradient with Polyak's step size (Li, Yuan, Fan, Schmidt, Horvath, Gower, Takac, 2024).

arXiv:2404.07525. The order of updates in the twin form, and the use of the entropy, are this library's reading of
public summaries of the paper.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from steersman.errors import require_number
from steersman.policies import NetworkPolicy, Policy
from steersman.rl.on_policy.policy_gradient import (
    EpisodicPolicyGradient,
    GradientEstimate,
    Weights,
    weights,
    with_weights,
)
from steersman.training.algorithm import Metrics
from steersman.training.collect import Collector
from steersman.training.episodes import PopulationEpisodes
from steersman.training.experience import Experience
from steersman.training.schedules import Continuous, Schedule, Scheduled, resolve, scalar
from steersman.training.step_sizes import PolyakState, require_polyak, scale_by_polyak_sps


class PolyakPGState(eqx.Module):
    """What Polyak-PG carries from one batch to the next; ``M`` is 2 for the twin, 1 with a known target.

    Attributes:
        policies: the copies, every array with a leading axis ``[M]``.
        step: each copy's last step ``[M]``.
        running_return: running mean of each copy's discounted return ``[M]``.
        stalled: batches since anything moved.
        samples: environment steps learned from so far.
    """

    policies: NetworkPolicy
    step: PolyakState
    running_return: Float[Array, " M"]
    stalled: Int[Array, ""]
    samples: UInt32[Array, ""]


class PolyakPG(EpisodicPolicyGradient):
    """Policy gradient without a learning rate: ``gamma = min{(F* - F) / (c |g|^2), cap}``.

    ``F`` and its gradient ``g`` are estimated from the same episodes. Where the optimal value is known, give it as
    ``target``. Where it is not, two copies are trained, each on its own episodes, and the better estimate of the two
    is the target of both: the worse copy is drawn towards the better one and, by noise and curvature, past it; the
    better one stays. Rewards on another scale change no step (with ``entropy_coefficient`` and ``cap`` scaled along).

    Worth choosing where tuning a step size for each task is the bottleneck. A tuned Adam is as good or better, and on
    long or hard tasks a critic is.

    Nearly deterministic policies have next to no gradient while the gap need not vanish, so that the step explodes;
    the entropy and the cap are there against that. Without noise and on a concave objective the twin stalls where the
    two values meet; ``target_slack`` keeps it going. A target below what the policy reaches already leaves nothing to
    do: the metric ``stalled`` counts batches without any movement. Returns are reported as means over both copies, and
    as ``best_return`` of the one that would be returned.

    Attributes:
        entropy_coefficient: a hundredth of the range of one step's reward is a good choice; 0 disables it.
        c: 1 for Polyak's step; 2 is more cautious.
        cap: largest step size; infinite for none. None is 100 for the twin and 1 with a known target, where a network
            may need far less than a linear policy. Its unit is that of squared parameters per return.
        target: the optimal value, discounted; None trains the twin.
        target_slack: added to the better of the twin's values.
        return_decay: decay of the running mean of returns by which the better copy is chosen in the end.
    """

    entropy_coefficient: Scheduled = scalar(0.01)
    c: Continuous = scalar(1.0)
    cap: Continuous | None = scalar(None)
    target: Scheduled = scalar(None)
    target_slack: Continuous = scalar(0.0)
    return_decay: Continuous = scalar(0.9)

    def __check_init__(self) -> None:
        require_polyak(self.c, 1.0 if self.cap is None else self.cap)
        if self.target is not None and not isinstance(self.target, Schedule):
            require_number("target", self.target)
        require_number("target_slack", self.target_slack, at_least=0.0)
        require_number("return_decay", self.return_decay, at_least=0.0, below=1.0)

    @property
    def copies(self) -> int:
        """Policies that are trained ``M``."""
        return 2 if self.target is None else 1

    @property
    def step_cap(self) -> Any:
        """The cap that holds."""
        return self.cap if self.cap is not None else (100.0 if self.target is None else 1.0)

    @property
    def collector(self) -> Collector:
        return PopulationEpisodes(self.copies, self.num_episodes, self.horizon)

    def init(self, problem: Any, key: Key[Array, ""]) -> PolyakPGState:
        keys = jax.random.split(key, self.copies)
        policies = eqx.filter_vmap(lambda k: self.make_policy(problem, k))(keys)
        step: Any = jax.vmap(scale_by_polyak_sps().init)(weights(policies))
        return PolyakPGState(
            policies=policies,
            step=step,
            running_return=jnp.zeros(self.copies),
            stalled=jnp.zeros((), jnp.int32),
            samples=jnp.zeros((), jnp.uint32),
        )

    def behaviour(self, state: PolyakPGState) -> NetworkPolicy:
        """All copies at once, with a leading axis."""
        return state.policies

    def policy(self, state: PolyakPGState) -> Policy:
        """The copy whose running return is higher."""
        best = jnp.argmax(state.running_return)
        return jax.tree.map(lambda leaf: leaf[best], state.policies)

    def update(self, state: PolyakPGState, experience: Experience) -> tuple[PolyakPGState, Metrics]:
        now = resolve(self, state.samples)
        estimates = eqx.filter_vmap(now.estimate)(state.policies, experience)
        learned, step = now.step(weights(state.policies), state.step, estimates)
        moved = jnp.any((step.step_size > 0) & (step.gradient_norm > 0))
        kept = now.return_decay * state.running_return
        following = PolyakPGState(
            policies=with_weights(state.policies, learned),
            step=step,
            running_return=kept + (1.0 - now.return_decay) * estimates.value,
            stalled=jnp.where(moved, 0, state.stalled + 1),
            samples=state.samples + jnp.uint32(self.collector.samples_per_iteration),
        )
        best = jnp.argmax(following.running_return)
        # Without a cap a vanishing gradient reports an infinite step, though nothing moves.
        shown = jnp.minimum(step.step_size, jnp.finfo(step.step_size.dtype).max)
        return following, {
            "best_return": jnp.sum(experience.reward[best]) / self.num_episodes,
            "objective": jnp.max(estimates.objective),
            "discounted_return": jnp.max(estimates.value),
            "entropy": jnp.mean(estimates.entropy),
            "step_size": jnp.max(shown),
            "gap": jnp.max(step.gap),
            "gradient_norm": jnp.max(step.gradient_norm),
            "stalled": following.stalled,
        }

    def step(self, learned: Weights, state: PolyakState, estimates: GradientEstimate) -> tuple[Weights, PolyakState]:
        """Every copy after its step, all leaves with a leading axis of copies."""
        target = self.target
        if target is None:
            target = jnp.max(estimates.objective) + self.target_slack
        rule = scale_by_polyak_sps(self.c, self.step_cap)

        def one(learned: Any, state: PolyakState, objective: Array, gradient: Weights) -> tuple[Any, Any]:
            # Optax goes downhill: it sees the negatives.
            slope: Any = jax.tree.map(jnp.negative, gradient)
            step, after = rule.update(slope, state, learned, value=-objective, target=-target)
            return jax.tree.map(jnp.subtract, learned, step), after

        return jax.vmap(one)(learned, state, estimates.objective, estimates.gradient)
