"""Proximal policy optimization (Schulman, Wolski, Dhariwal, Radford, Klimov, 2017, arXiv:1707.06347)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from steersman import objectives
from steersman.errors import require, require_count, require_number
from steersman.returns import standardize
from steersman.rl.on_policy.actor_critic import (
    ActorCritic,
    ActorCriticState,
    Batch,
    Learned,
    in_rows,
    likelihood,
    values,
)
from steersman.rl.surrogates import Clip, Surrogate, SurrogateInputs
from steersman.training.algorithm import Metrics
from steersman.training.experience import Experience
from steersman.training.minibatches import minibatch_epochs
from steersman.training.schedules import Continuous, Schedule, Scheduled, scalar


class PPO(ActorCritic[ActorCriticState]):
    """Reuses each on-policy batch for several epochs of minibatch Adam, while a surrogate holds the policy back.

    The surrogate is a slot: with :class:`~steersman.rl.surrogates.Clip` this is PPO-clip, with
    :class:`~steersman.rl.surrogates.AdaptiveKL` PPO-penalty; any other fits.

    Attributes:
        surrogate: the policy loss.
        learning_rate: Adam's step size; give a :class:`~steersman.training.Linear` schedule to anneal it.
        epochs: passes over a batch ``K``.
        minibatches: equal parts of a pass.
        value_coefficient: weight of the critic's squared error ``c1``.
        entropy_coefficient: weight of the entropy bonus ``c2``.
        max_gradient_norm: bound of the global gradient norm.
        value_clip: distance that a value may move within one update before its loss stops pulling, or None.
        normalize_advantages: standardize advantages within each minibatch.
    """

    surrogate: Surrogate = eqx.field(default_factory=Clip)
    learning_rate: Scheduled = scalar(3e-4)
    epochs: int = eqx.field(static=True, default=10)
    minibatches: int = eqx.field(static=True, default=8)
    value_coefficient: Scheduled = scalar(0.5)
    entropy_coefficient: Scheduled = scalar(0.0)
    max_gradient_norm: Continuous = scalar(0.5)
    value_clip: Continuous | None = scalar(None)
    normalize_advantages: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        require_count("epochs", self.epochs)
        require_count("minibatches", self.minibatches)
        rows = self.num_envs if self.memory else self.num_envs * self.num_steps
        what = "num_envs" if self.memory else "num_envs * num_steps"
        require(rows % self.minibatches == 0, "minibatches", self.minibatches, f"a divisor of {what} = {rows}")
        if not isinstance(self.learning_rate, Schedule):
            require_number("learning_rate", self.learning_rate, above=0.0)
        for name in ("value_coefficient", "entropy_coefficient"):
            if not isinstance(getattr(self, name), Schedule):
                require_number(name, getattr(self, name), at_least=0.0)
        require_number("max_gradient_norm", self.max_gradient_norm, above=0.0)
        if self.value_clip is not None:
            require_number("value_clip", self.value_clip, above=0.0)

    def _optimizer(self) -> optax.GradientTransformation:
        # One flat vector instead of a dozen small arrays: on CPU most of Adam's time is the start of each operation.
        return optax.flatten(
            optax.chain(optax.clip_by_global_norm(self.max_gradient_norm), optax.scale_by_adam(eps=1e-5))
        )

    def init(self, problem: Any, key: Key[Array, ""]) -> ActorCriticState:
        return self.init_state(problem, key, self._optimizer().init, self.surrogate.init())

    def update(self, state: ActorCriticState, experience: Experience) -> tuple[ActorCriticState, Metrics]:
        now = self.at(state)
        key, epochs_key = jax.random.split(state.key)
        batch, scaler = now.estimate(state, experience)
        rows = in_rows(batch)
        optimizer = now._optimizer()

        def prepare(minibatch: Batch) -> Batch:
            if not self.normalize_advantages:
                return minibatch
            return minibatch._replace(advantage=standardize(minibatch.advantage))

        def descend(running: tuple, minibatch: Batch) -> tuple[tuple, None]:
            learned, optimizer_state = running
            gradient = jax.grad(lambda learned: now.loss(learned, state, minibatch)[0])(learned)
            step, optimizer_state = optimizer.update(gradient, optimizer_state)
            learned = jax.tree.map(lambda p, s: p - now.learning_rate * s, learned, step)
            return (learned, optimizer_state), None

        (learned, optimizer_state), _ = minibatch_epochs(
            descend,
            (state.learned, state.optimizer),
            rows,
            epochs_key,
            epochs=self.epochs,
            minibatches=self.minibatches,
            prepare=prepare,
        )
        # The numbers shown are of the whole batch and the final networks, not averages over ones long gone.
        _, metrics = now.loss(learned, state, prepare(rows))
        metrics["explained_variance"] = objectives.explained_variance(batch.value, batch.target)
        method = now.surrogate.adapt(state.method, metrics["kl"])
        changes = {"optimizer": optimizer_state, "method": method, "key": key}
        return self.finish(state, experience, learned, scaler, **changes), metrics

    def loss(self, learned: Learned, state: ActorCriticState, rows: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Policy surrogate, value error and entropy bonus (equation 9), and what is worth watching.

        Args:
            learned: the networks that are being trained.
            state: everything else, as it was when the batch was collected.
            rows: transitions, or sequences for a recurrent actor, with their advantages as they are to be used.
        """
        actor = state.with_learned(learned).actor
        head = actor.head
        parameters = likelihood(actor, rows)
        log_prob = head.log_prob(parameters, rows.action)
        log_ratio = log_prob - rows.log_prob
        kl, entropy = head.kl(rows.parameters, parameters), head.entropy(parameters)
        inputs = SurrogateInputs(kl, log_prob, entropy)
        policy_loss = jnp.mean(self.surrogate(log_ratio, rows.advantage, inputs, state.method))
        value = values(learned.critic, rows)
        if self.value_clip is None:
            value_loss = jnp.mean(objectives.squared_error(value, rows.target))
        else:
            value_loss = jnp.mean(objectives.clipped_value_error(value, rows.value, rows.target, self.value_clip))
        bonus = jnp.mean(entropy)
        loss = policy_loss + self.value_coefficient * value_loss - self.entropy_coefficient * bonus
        return loss, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": bonus,
            "kl": jnp.mean(kl),
            "max_kl": jnp.max(kl),
            "approx_kl": objectives.approximate_kl(log_ratio),
            "ratio_deviation": objectives.ratio_deviation(log_ratio),
        }
