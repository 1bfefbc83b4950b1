"""Trust region policy optimization (Schulman, Levine, Moritz, Jordan, Abbeel, ICML 2015, arXiv:1502.05477)."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman import objectives
from steersman.errors import InputTypeError, require, require_count, require_number
from steersman.policies import Head
from steersman.returns import standardize
from steersman.rl.critics import Examples
from steersman.rl.on_policy.actor_critic import (
    ActorCritic,
    ActorCriticState,
    Batch,
    Learned,
    examples,
    in_rows,
    likelihood,
    samples_at,
)
from steersman.rl.surrogates import Surrogate, Unclipped
from steersman.training.algorithm import Metrics
from steersman.training.collect import Collector, Rollout
from steersman.training.experience import Experience
from steersman.training.minibatches import minibatch_epochs, shuffled
from steersman.training.natural_gradient import (
    Scalar,
    backtracking_line_search,
    fisher_vector_product,
    natural_step,
    tree_dot,
)
from steersman.training.normalization import RewardScaler
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar

#: The local model of the return as a function of the distribution parameters at every row of a batch.
LocalModel = Callable[[PyTree], Float[Array, ""]]


class TrustRegionStep(NamedTuple):
    """What one policy update did. Where it was not accepted, nothing moved and the first five numbers are zero.

    Attributes:
        params: the new parameters; the old ones, bit for bit, where the update was not accepted.
        kl: mean divergence of the new policy from the old one over the states, in nats.
        max_kl: the largest divergence at any of them.
        surrogate_improvement: how much the local model grew.
        predicted_improvement: how much its gradient promised for the step that was taken.
        step_scale: the fraction of the full step that was taken.
        accepted: whether the update was accepted.
        line_search_trials: candidates that were evaluated.
        quadratic_form: ``x . F x``, from which the step's length follows.
        no_gradient: the local model is flat (advantages that do not vary, say), so the update was skipped.
        nonpositive_curvature: there is a gradient, but ``x . F x`` is no positive finite number, so the update was
            skipped.
    """

    params: PyTree
    kl: Float[Array, ""]
    max_kl: Float[Array, ""]
    surrogate_improvement: Float[Array, ""]
    predicted_improvement: Float[Array, ""]
    step_scale: Float[Array, ""]
    accepted: Bool[Array, ""]
    line_search_trials: Int[Array, ""]
    quadratic_form: Float[Array, ""]
    no_gradient: Bool[Array, ""]
    nonpositive_curvature: Bool[Array, ""]

    def metrics(self) -> Metrics:
        """All but the parameters, by name."""
        return {name: value for name, value in self._asdict().items() if name != "params"}


def trust_region_step(
    network_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    head: Head,
    local_model: LocalModel,
    fisher: Callable[[PyTree], PyTree],
    target_kl: Scalar,
    *,
    weight: Float[Array, "..."] | None = None,
    cg_iterations: int = 10,
    line_search_shrink: Scalar = 0.8,
    line_search_trials: int = 10,
) -> TrustRegionStep:
    """Increases ``L(theta)`` subject to ``mean_s KL(old || theta) <= target_kl`` (appendix C of the paper).

    The natural direction ``x`` solves ``F x = grad L``; the full step is ``sqrt(2 target_kl / x . F x) x``; the first
    of its shrinking fractions that stays in the trust region and increases ``L`` is taken, and none if all fail.

    Args:
        network_fn: from parameters to the distribution parameters at the states of a batch.
        params: the old parameters, a tree of arrays of floats.
        head: the family of distributions.
        local_model: what is to be increased, as a function of the distribution parameters.
        fisher: the product with the Fisher information at `params`, damped or not
            (:func:`~steersman.training.natural_gradient.fisher_vector_product`).
        target_kl: radius of the trust region, in nats.
        weight: weight of each state in the mean divergence; zero leaves a state out. Uniform where none is given.
        cg_iterations: steps of conjugate gradient.
        line_search_shrink: factor between one fraction and the next, in (0, 1).
        line_search_trials: most fractions that are tried.
    """

    def objective(candidate: PyTree) -> tuple[Array, PyTree]:
        parameters = network_fn(candidate)
        return local_model(parameters), parameters

    (before, old), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    natural = natural_step(gradient, fisher, target_kl, iterations=cg_iterations)

    def evaluate(candidate: PyTree) -> tuple[Array, tuple[Array, Array, Array]]:
        new = network_fn(candidate)
        kl = head.kl(old, new)
        counted = jnp.ones_like(kl) if weight is None else weight
        mean_kl = jnp.sum(jnp.where(counted > 0, counted * kl, 0.0)) / jnp.sum(counted)
        max_kl = jnp.max(jnp.where(counted > 0, kl, 0.0))
        improvement = local_model(new) - before
        # Comparisons with NaN are false, so a candidate without a finite divergence or objective is rejected.
        accepted = natural.valid & (mean_kl <= target_kl) & (improvement > 0)
        return accepted, (mean_kl, max_kl, improvement)

    search = backtracking_line_search(
        evaluate, params, natural.step, shrink=line_search_shrink, trials=line_search_trials
    )
    predicted = search.scale * natural.expected_improvement
    reached = [jnp.where(search.accepted, value, 0.0) for value in (*search.info, predicted)]
    no_gradient = tree_dot(gradient, gradient) == 0
    return TrustRegionStep(
        search.params,
        *reached,
        step_scale=search.scale,
        accepted=search.accepted,
        line_search_trials=jnp.where(natural.valid, search.trials, 0),
        quadratic_form=natural.quadratic_form,
        no_gradient=no_gradient,
        nonpositive_curvature=~natural.valid & ~no_gradient,
    )


class Sampling(eqx.Module):
    """How experience becomes a local model of the return (section 5 of the paper)."""

    @abc.abstractmethod
    def collector(self, num_envs: int, num_steps: int, required: frozenset[str] = frozenset()) -> Collector:
        """Gathers trajectories of `num_steps` steps from `num_envs` environments, and what else the model needs.

        `required` are abilities that the environment must have for other reasons.
        """

    @abc.abstractmethod
    def local_model(
        self,
        algorithm: TRPO,
        state: ActorCriticState,
        experience: Experience,
        rows: Batch,
        scaler: RewardScaler | None,
    ) -> LocalModel:
        """The local model, at zero advantage wherever nothing is known.

        Args:
            algorithm: hyperparameters at their present value.
            state: the policy and critic that the experience was gathered with.
            experience: the experience.
            rows: its trajectories in rows (:func:`~steersman.rl.on_policy.actor_critic.in_rows`).
            scaler: the running scale of the rewards, this batch included, or None.
        """


class SinglePath(Sampling):
    """Advantages along the trajectories themselves: ``L = mean_i pi(a_i | s_i) / pi_old(a_i | s_i) A_i``.

    They are brought to zero mean and unit deviation, so that ``L`` does not depend on the scale of the reward.

    Attributes:
        surrogate: minus the local model, at its initial state; the paper's is the plain ratio.
    """

    surrogate: Surrogate = eqx.field(default_factory=Unclipped)

    def collector(self, num_envs: int, num_steps: int, required: frozenset[str] = frozenset()) -> Collector:
        return Rollout(num_envs, num_steps, required)

    def local_model(
        self,
        algorithm: TRPO,
        state: ActorCriticState,
        experience: Experience,
        rows: Batch,
        scaler: RewardScaler | None,
    ) -> LocalModel:
        head, advantage = state.actor.head, standardize(rows.advantage)

        def model(parameters: PyTree) -> Float[Array, ""]:
            return -samples_at(head, rows._replace(advantage=advantage), parameters).loss(
                self.surrogate, self.surrogate.init()
            )

        return model


class TRPO(ActorCritic[ActorCriticState]):
    """Takes the longest natural-gradient step that keeps the policy within a divergence of ``target_kl``.

    Every update is checked on the whole batch before it is taken: the mean divergence from the old policy is at most
    ``target_kl`` and the local model of the return grows; otherwise the old policy stays. Worth choosing over PPO for
    small networks and where a bad update is expensive, since little but ``target_kl`` is to be tuned; and over a
    natural gradient with a fixed step, since the length of the step follows from ``target_kl``.

    The critic is a network of its own, outside the trust region. With ``normalize_observations``, the statistics that
    the policy acts under move after each update, which no bound covers.

    Attributes:
        sampling: where the local model comes from: :class:`SinglePath`, or
            :class:`~steersman.rl.on_policy.vine.Vine` on environments that can start from any state.
        target_kl: radius of the trust region ``delta``, in nats for each update.
        cg_iterations: steps of conjugate gradient towards the natural direction.
        damping: multiple of the identity added to the Fisher information.
        fisher_fraction: part of the batch that Fisher products are taken over (whole sequences with a memory).
        line_search_shrink: factor between one tried step and the next, in (0, 1).
        line_search_trials: most steps that are tried.
        critic_learning_rate: Adam's step size for the critic.
        critic_epochs: the critic's passes over a batch.
        critic_minibatches: equal parts of a pass.
    """

    sampling: Sampling = eqx.field(default_factory=SinglePath)
    target_kl: Scheduled = scalar(0.01)
    cg_iterations: int = eqx.field(static=True, default=10)
    damping: Scheduled = scalar(0.1)
    fisher_fraction: float = eqx.field(static=True, default=1.0)
    line_search_shrink: Continuous = scalar(0.8)
    line_search_trials: int = eqx.field(static=True, default=10)
    critic_learning_rate: Scheduled = scalar(1e-3)
    critic_epochs: int = eqx.field(static=True, default=10)
    critic_minibatches: int = eqx.field(static=True, default=8)

    def __check_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise InputTypeError(f"sampling is {self.sampling!r}, but it must be a Sampling such as SinglePath().")
        self.sampling.collector(self.num_envs, self.num_steps)  # which checks that its sizes fit together
        for name in ("cg_iterations", "line_search_trials", "critic_epochs", "critic_minibatches"):
            require_count(name, getattr(self, name))
        for name in ("target_kl", "critic_learning_rate"):
            if not isinstance(getattr(self, name), Schedule):
                require_number(name, getattr(self, name), above=0.0)
        if not isinstance(self.damping, Schedule):
            require_number("damping", self.damping, at_least=0.0)
        require_number("fisher_fraction", self.fisher_fraction, above=0.0, at_most=1.0)
        require_number("line_search_shrink", self.line_search_shrink, above=0.0, below=1.0)
        rows = self.num_envs * self.num_steps
        allowed = f"a divisor of num_envs * num_steps = {rows}"
        require(rows % self.critic_minibatches == 0, "critic_minibatches", self.critic_minibatches, allowed)

    @property
    def collector(self) -> Collector:
        return self.sampling.collector(self.num_envs, self.num_steps, self.critic.needs)

    def init(self, problem: Any, key: Key[Array, ""]) -> ActorCriticState:
        return self.init_state(problem, key, lambda learned: _adam().init(learned.critic), ())

    def update(self, state: ActorCriticState, experience: Experience) -> tuple[ActorCriticState, Metrics]:
        now = self.at(state)
        key, fisher_key, critic_key = jax.random.split(state.key, 3)
        batch, scaler = now.estimate(state, experience)
        actor = state.actor
        rows = in_rows(actor, batch)
        params = (actor.network, actor.free)

        def network_fn(params: PyTree, rows: Batch = rows) -> PyTree:
            return likelihood(eqx.tree_at(lambda a: (a.network, a.free), actor, params), rows)

        some = now.fisher_rows(rows, fisher_key)
        fisher = fisher_vector_product(lambda p: network_fn(p, some), params, actor.head, damping=now.damping)
        step = trust_region_step(
            network_fn,
            params,
            actor.head,
            now.sampling.local_model(now, state, experience, rows, scaler),
            fisher,
            now.target_kl,
            cg_iterations=self.cg_iterations,
            line_search_shrink=now.line_search_shrink,
            line_search_trials=self.line_search_trials,
        )
        network, free = step.params
        critic, optimizer = now.fit_critic(state, rows, critic_key)
        errors = now.critic.error(critic, examples(rows), _squared)
        metrics = step.metrics() | {
            "value_loss": jnp.mean(errors),
            "entropy": jnp.mean(actor.head.entropy(network_fn(step.params))),
            "explained_variance": objectives.explained_variance(batch.value, batch.advantage + batch.value),
        }
        samples = state.samples + jnp.uint32(self.collector.samples_per_iteration)
        changes = {"optimizer": optimizer, "samples": samples, "key": key}
        return self.finish(state, experience, Learned(network, free, critic), scaler, **changes), metrics

    def fisher_rows(self, rows: Batch, key: Key[Array, ""]) -> Batch:
        """The part of a batch that Fisher products are taken over."""
        count = rows.advantage.shape[0]
        size = math.ceil(self.fisher_fraction * count)
        if size == count:
            return rows
        chosen = shuffled(key, count)[:size]
        return jax.tree.map(lambda leaf: leaf[chosen], rows)

    def fit_critic(self, state: ActorCriticState, rows: Batch, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        """Regresses the critic on the value targets; returns its networks with Adam's state."""
        leading = rows.advantage.ndim
        single = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[leading:])), examples(rows))

        def descend(running: tuple, minibatch: Examples) -> tuple[tuple, None]:
            critic, optimizer = running
            gradient = jax.grad(lambda c: jnp.mean(self.critic.error(c, minibatch, _squared)))(critic)
            step, optimizer = _adam().update(gradient, optimizer)
            return (jax.tree.map(lambda p, s: p - self.critic_learning_rate * s, critic, step), optimizer), None

        fitted, _ = minibatch_epochs(
            descend,
            (state.critic, state.optimizer),
            single,
            key,
            epochs=self.critic_epochs,
            minibatches=self.critic_minibatches,
        )
        return fitted


def _squared(value: Array, old_value: Array, target: Array) -> Array:
    del old_value
    return objectives.squared_error(value, target)


def _adam() -> optax.GradientTransformation:
    # One flat vector instead of a dozen small arrays: on CPU most of Adam's time is the start of each operation.
    return optax.flatten(optax.scale_by_adam(eps=1e-5))
