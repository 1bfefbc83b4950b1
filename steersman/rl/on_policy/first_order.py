"""The loop that first-order on-policy methods share: estimate, then epochs of gradient steps on minibatches."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from steersman import objectives
from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.returns import standardize
from steersman.rl.advantage_scales import AdvantageScale
from steersman.rl.alternatives import AlternativeSource
from steersman.rl.imitation import Imitation
from steersman.rl.on_policy.actor_critic import (
    ActorCritic,
    ActorCriticState,
    Batch,
    Learned,
    Samples,
    examples,
    in_rows,
    likelihood,
    samples,
)
from steersman.rl.phases import Phase, PhaseTools, Running
from steersman.rl.references import Reference
from steersman.rl.surrogates import Clip, Surrogate
from steersman.training.algorithm import Metrics
from steersman.training.experience import Experience
from steersman.training.minibatches import minibatch_epochs
from steersman.training.normalization import RewardScaler
from steersman.training.optimizers import Adam, Optimizer
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar


class Carried(NamedTuple):
    """What the slots carry from one batch to the next."""

    surrogate: PyTree
    reference: PyTree
    advantages: PyTree
    alternatives: PyTree
    imitation: PyTree = ()


class FirstOrder(ActorCritic[ActorCriticState]):
    """Takes gradient steps on a surrogate of the return, over one or more epochs of minibatches of each batch.

    Every system of the family is this loop with some of its slots filled. No slot knows what fills the others.

    Attributes:
        surrogate: the policy loss.
        reference: the policy that the surrogate compares with; the behaviour policy unless another is given.
        phase: what happens after the epochs (a repair of the policy, say), or None.
        alternatives: where more actions at the visited states come from, or None.
        imitation: a pull towards what another policy does at the visited states, or None.
        optimizer: how a gradient becomes a step.
        learning_rate: step size; give a :class:`~steersman.training.Linear` schedule to anneal it.
        critic_learning_rate: step size of the critic; that of the actor where None.
        epochs: passes over a batch ``K``.
        minibatches: equal parts of a pass.
        value_coefficient: weight of the critic's squared error ``c1``.
        entropy_coefficient: weight of the entropy bonus ``c2``.
        max_gradient_norm: bound of the global gradient norm, or None.
        value_clip: distance that a value may move within one update before its loss stops pulling, or None.
        normalize_advantages: standardize advantages within each minibatch, or an object that scales whole batches.
        target_kl: minibatches on which the approximate divergence from the reference policy exceeds this number are
            skipped, which ends learning from a batch early; None to skip none.
    """

    surrogate: Surrogate = eqx.field(default_factory=Clip)
    reference: Reference = eqx.field(default_factory=Reference)
    phase: Phase | None = None
    alternatives: AlternativeSource | None = None
    imitation: Imitation | None = None
    optimizer: Optimizer = eqx.field(default_factory=Adam)
    learning_rate: Scheduled = scalar(3e-4)
    critic_learning_rate: Scheduled | None = scalar(None)
    epochs: int = eqx.field(static=True, default=10)
    minibatches: int = eqx.field(static=True, default=8)
    value_coefficient: Scheduled = scalar(0.5)
    entropy_coefficient: Scheduled = scalar(0.0)
    max_gradient_norm: Continuous | None = scalar(0.5)
    value_clip: Continuous | None = scalar(None)
    normalize_advantages: bool | AdvantageScale = True
    target_kl: Continuous | None = scalar(None)

    def __check_init__(self) -> None:
        require_count("epochs", self.epochs)
        require_count("minibatches", self.minibatches)
        rows = self.num_envs if self.unrolled else self.num_envs * self.num_steps
        what = "num_envs" if self.unrolled else "num_envs * num_steps"
        require(rows % self.minibatches == 0, "minibatches", self.minibatches, f"a divisor of {what} = {rows}")
        if not isinstance(self.learning_rate, Schedule):
            require_number("learning_rate", self.learning_rate, above=0.0)
        for name in ("value_coefficient", "entropy_coefficient"):
            if not isinstance(getattr(self, name), Schedule):
                require_number(name, getattr(self, name), at_least=0.0)
        rate = self.critic_learning_rate
        if rate is not None and not isinstance(rate, Schedule):
            require_number("critic_learning_rate", rate, above=0.0)
        for name in ("max_gradient_norm", "value_clip", "target_kl"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), above=0.0)
        if self.alternatives is not None and isinstance(self.normalize_advantages, AdvantageScale):
            raise InputError(
                f"normalize_advantages is {type(self.normalize_advantages).__name__}, but it must be True or False "
                "with alternatives, whose advantages a scale of whole batches does not know."
            )
        for name, kind in (("surrogate", Surrogate), ("reference", Reference), ("optimizer", Optimizer)):
            if not isinstance(getattr(self, name), kind):
                raise InputTypeError(f"{name} is {getattr(self, name)!r}, but it must be of type {kind.__name__}.")

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        # One flat vector instead of a dozen small arrays: on CPU most of Adam's time is the start of each operation.
        bound: Any = self.max_gradient_norm
        clipped = optax.identity() if bound is None else optax.clip_by_global_norm(bound)
        return optax.flatten(optax.chain(clipped, self.optimizer.transformation()))

    def init(self, problem: Any, key: Key[Array, ""]) -> ActorCriticState:
        state = self.init_state(problem, key, self._optimizer().init, None)
        scale = self.normalize_advantages
        proposals = ()
        if self.alternatives is not None:
            if jax.tree.leaves(jax.eval_shape(state.actor.init, key)):
                raise InputError("alternatives are drawn for policies without a memory, but this actor has one.")
            proposals = self.alternatives.init(problem, state.actor, jax.random.fold_in(state.key, 1))
        carried = Carried(
            self.surrogate.init(),
            self.reference.init(state.learned),
            scale.init() if isinstance(scale, AdvantageScale) else (),
            proposals,
            () if self.imitation is None else self.imitation.init(state.actor),
        )
        return eqx.tree_at(lambda s: s.method, state, carried, is_leaf=lambda x: x is None)

    def update(self, state: ActorCriticState, experience: Experience) -> tuple[ActorCriticState, Metrics]:
        now = self.at(state)
        carried: Carried = state.method
        key, epochs_key = jax.random.split(state.key)
        batch, scaler = now.estimate(state, experience)
        rows, carried, metrics = now.prepare(state, carried, experience, batch, scaler)
        optimizer = now._optimizer()

        def normalize(minibatch: Batch) -> Batch:
            return _standardized(minibatch) if self.normalize_advantages is True else minibatch

        def step(gradient: Learned, optimizer_state: PyTree, learned: Learned, **seen: Array) -> tuple[Learned, PyTree]:
            direction, optimizer_state = optimizer.update(gradient, optimizer_state, learned, **seen)
            actor_rate, critic_rate = now.learning_rate, now.critic_learning_rate
            rates = Learned(actor_rate, actor_rate, actor_rate if critic_rate is None else critic_rate)

            def moved(rate: Any, part: PyTree, direction: PyTree) -> PyTree:
                return jax.tree.map(lambda p, s: p - rate * s, part, direction)

            return Learned(*map(moved, rates, learned, direction)), optimizer_state

        def descend(running: Running, minibatch: Batch) -> tuple[Running, None]:
            def parameters_of(learned: Learned, rows: Batch = minibatch) -> PyTree:
                return likelihood(state.with_learned(learned).actor, rows)

            held = now.reference.relabel(running.reference, minibatch, running.learned, parameters_of, state.actor.head)
            (loss, (drawn, _)), gradient = jax.value_and_grad(now.loss, has_aux=True)(
                running.learned, state, held, running.surrogate
            )
            learned, optimizer_state = step(gradient, running.optimizer, running.learned, value=loss)
            if now.target_kl is not None:
                far = objectives.approximate_kl(drawn.log_ratio) > now.target_kl
                held_back = (running.learned, running.optimizer), (learned, optimizer_state)
                learned, optimizer_state = jax.tree.map(lambda old, new: jnp.where(far, old, new), *held_back)
            surrogate = now.surrogate.learn(*jax.lax.stop_gradient(drawn), running.surrogate)
            reference = now.reference.track(running.reference, learned)
            return Running(learned, optimizer_state, surrogate, reference, running.phase), None

        def samples_of(learned: Learned, rows: Batch) -> Samples:
            return samples(state.with_learned(learned).actor, rows)

        phase, ready = now.phase, normalize(rows)
        tools = PhaseTools(ready, state.learned, now.surrogate, samples_of, step)
        after_epoch = None if phase is None or not phase.every_epoch else lambda running: phase(running, tools)
        running = Running(
            state.learned,
            state.optimizer,
            carried.surrogate,
            now.reference.begin(carried.reference, state.learned),
            () if phase is None else phase.init(),
        )
        running, _ = minibatch_epochs(
            descend,
            running,
            rows,
            epochs_key,
            epochs=self.epochs,
            minibatches=self.minibatches,
            prepare=normalize,
            after_epoch=after_epoch,
        )
        if phase is not None:
            running = running if phase.every_epoch else phase(running, tools)
            metrics |= phase.metrics(running.phase)
        # The numbers shown are of the whole batch and the final networks, not averages over ones long gone.
        _, (_, shown) = now.loss(running.learned, state, ready, running.surrogate)
        metrics |= shown | now.surrogate.metrics(running.surrogate)
        metrics["explained_variance"] = objectives.explained_variance(batch.value, batch.advantage + batch.value)
        method = carried._replace(
            surrogate=now.surrogate.adapt(running.surrogate, metrics["kl"]), reference=running.reference
        )
        changes = {"optimizer": running.optimizer, "method": method, "key": key}
        return self.finish(state, experience, running.learned, scaler, **changes), metrics

    def prepare(
        self,
        state: ActorCriticState,
        carried: Carried,
        experience: Experience,
        batch: Batch,
        scaler: RewardScaler | None,
    ) -> tuple[Batch, Carried, Metrics]:
        """The rows that are learned from: what the slots put beside them, and advantages scaled as a whole batch."""
        metrics: Metrics = {}
        proposed, proposals = None, carried.alternatives
        if self.alternatives is not None:

            def scale(reward: Array) -> Array:
                reward = reward * self.reward_scale
                return reward if scaler is None else scaler.scale(reward)

            proposed, proposals, metrics = self.alternatives.propose(
                proposals, experience, batch, state.actor, self, state.critic, scale
            )
        advantages = carried.advantages
        if isinstance(self.normalize_advantages, AdvantageScale):
            scaled, advantages = self.normalize_advantages(advantages, batch.advantage)
            batch = batch._replace(advantage=scaled)
        if self.imitation is not None:
            key = jax.random.fold_in(state.key, 2)
            batch = batch._replace(imitated=self.imitation.draw(carried.imitation, experience, key))
        rows = in_rows(state.actor, batch)._replace(alternatives=proposed)
        if rows.log_prob.ndim > rows.advantage.ndim:
            # Log-probabilities in several terms: all terms of an action share its advantage.
            rows = rows._replace(advantage=jnp.broadcast_to(rows.advantage[..., None], rows.log_prob.shape))
        return rows, carried._replace(advantages=advantages, alternatives=proposals), metrics

    def loss(
        self, learned: Learned, state: ActorCriticState, rows: Batch, surrogate: PyTree
    ) -> tuple[Float[Array, ""], tuple[Samples, Metrics]]:
        """Policy surrogate, value error and entropy bonus, and what is worth watching.

        Args:
            learned: the networks that are being trained.
            state: everything else, as it was when the batch was collected.
            rows: transitions, or sequences for an unrolled actor, with their advantages as they are to be used.
            surrogate: the surrogate's state.
        """
        actor = state.with_learned(learned).actor
        drawn = samples(actor, rows)
        policy_loss = drawn.loss(self.surrogate, surrogate)
        value_loss = jnp.mean(self.critic.error(learned.critic, examples(rows), self._value_loss))
        bonus = jnp.mean(drawn.inputs.entropy)
        loss = policy_loss + self.value_coefficient * value_loss - self.entropy_coefficient * bonus
        more: Metrics = {}
        if self.imitation is not None:
            imitation_loss = self.imitation.loss(actor, rows)
            loss = loss + self.imitation.coefficient * imitation_loss
            more = {"imitation_loss": imitation_loss}
        return loss, (
            drawn,
            {
                **more,
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": bonus,
                "kl": jnp.mean(drawn.inputs.kl),
                "max_kl": jnp.max(drawn.inputs.kl),
                "approx_kl": objectives.approximate_kl(drawn.log_ratio),
                "ratio_deviation": objectives.ratio_deviation(drawn.log_ratio),
            },
        )

    def _value_loss(self, value: Array, old_value: Array, target: Array) -> Array:
        if self.value_clip is None:
            return objectives.squared_error(value, target)
        return objectives.clipped_value_error(value, old_value, target, self.value_clip)


def _standardized(rows: Batch) -> Batch:
    """Rows whose advantages have mean zero and deviation one, those of their alternatives among them."""
    more = rows.alternatives
    if more is None:
        return rows._replace(advantage=standardize(rows.advantage))
    together = standardize(jnp.concatenate([rows.advantage[:, None], more.advantage], axis=1))
    return rows._replace(advantage=together[:, 0], alternatives=more._replace(advantage=together[:, 1:]))
