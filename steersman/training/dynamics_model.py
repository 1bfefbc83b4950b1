"""Dynamics models: what a state and an action lead to, learned from transitions; and rollouts through them.

Observations and actions are vectors here, in their own units, as :func:`steersman.envs.spaces.layout` flattens them.
A model normalizes for itself, so that whatever reads its predictions (a policy, a critic, a cost) may normalize in
its own way. Calls broadcast over leading axes.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman.errors import require, require_count, require_number
from steersman.networks import MLP
from steersman.training.replay import Replay
from steersman.training.schedules import Continuous, scalar


class Prediction(NamedTuple):
    """What a step leads to.

    Attributes:
        next_observation: ``[..., n]``.
        reward: ``[...]``.
        terminated: probability that the task ends with this step ``[...]``.
    """

    next_observation: Float[Array, "... n"]
    reward: Float[Array, "..."]
    terminated: Float[Array, "..."]


class TransitionModel(eqx.Module):
    """A model of one step, known or learned."""

    @abc.abstractmethod
    def __call__(
        self, observation: Float[Array, "... n"], action: Float[Array, "... m"], key: Key[Array, ""]
    ) -> Prediction:
        """One draw of the step's outcome.

        Args:
            observation: where it starts.
            action: what is done, as it is sent to the environment.
            key: randomness; a deterministic model ignores it.
        """

    def limits(self) -> tuple[Float[Array, " n"], Float[Array, " n"]] | None:
        """The box within which predictions are to be believed ``(low, high)``; None for a model without one."""
        return None


class ModelRollout(NamedTuple):
    """An imagined stretch of ``H`` steps.

    Attributes:
        observation: ``x_0 .. x_H``, ``[H + 1, ..., n]``.
        action: ``u_0 .. u_{H-1}``, ``[H, ..., m]``.
        reward: of each step ``[H, ...]``.
        alive: probability that the task has not ended before each state ``[H + 1, ...]``.
        clipped: where a predicted state was brought back into the model's box, or was not finite ``[H, ...]``.
        carry: the policy's memory after acting at ``x_0 .. x_{H-1}``, leaves ``[H, ...]``.
    """

    observation: Float[Array, "states ... n"]
    action: Float[Array, "H ... m"]
    reward: Float[Array, "H ..."]
    alive: Float[Array, "states ..."]
    clipped: Bool[Array, "H ..."]
    carry: PyTree

    @property
    def clipped_share(self) -> Float[Array, ""]:
        """Share of the predicted states that were clipped."""
        return jnp.mean(self.clipped, dtype=self.reward.dtype)


#: Acts within a model: from an observation vector, a memory and a key to an action vector and the next memory.
ModelPolicy = Callable[[Array, PyTree, Array], tuple[Array, PyTree]]


def rollout_model(
    model: TransitionModel,
    policy: ModelPolicy,
    observation: Float[Array, "... n"],
    action: Float[Array, "... m"],
    horizon: int,
    key: Key[Array, ""],
    carry: PyTree = (),
) -> ModelRollout:
    """Follows a model from given states and first actions, then by a policy; differentiable in all of them.

    ``x_{h+1} = f(x_h, u_h)`` with ``u_h ~ policy(x_h)`` for ``h >= 1``. A state outside the model's box is brought
    back to its nearest point, and one that is not finite stays where it was: an exploding model then gives wrong
    values, not infinite ones, and :attr:`ModelRollout.clipped` says how often.

    Args:
        model: what is followed.
        policy: called with ``(observation, carry, key)`` for a whole batch at once.
        observation: ``x_0``.
        action: ``u_0``, with the same leading axes.
        horizon: number of steps ``H``, at least 1.
        key: randomness of model and policy.
        carry: the policy's memory *after* acting at ``x_0``.
    """
    require_count("horizon", horizon)
    limits = model.limits()

    def follow(x: Array, u: Array, key: Array) -> tuple[Array, Array, Array, Array]:
        predicted = model(x, u, key)
        following = predicted.next_observation
        good = jnp.isfinite(following)
        held = jnp.where(good, following, x)
        if limits is not None:
            held = jnp.clip(held, *limits)
        clipped = jnp.any(held != following, axis=-1)
        reward = jnp.where(jnp.isfinite(predicted.reward), predicted.reward, 0.0)
        return held, reward, 1.0 - predicted.terminated, clipped

    def step(running: tuple, key: Array) -> tuple[tuple, tuple]:
        x, alive, memory = running
        policy_key, model_key = jax.random.split(key)
        u, memory = policy(x, memory, policy_key)
        following, reward, survives, clipped = follow(x, u, model_key)
        alive = alive * survives
        return (following, alive, memory), (following, u, reward, alive, clipped, memory)

    keys = jax.random.split(key, horizon)
    second, reward, survives, clipped = follow(observation, action, keys[0])
    _, later = jax.lax.scan(step, (second, survives, carry), keys[1:])
    states, actions, rewards, alive, clips, memories = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]),
        (second, action, reward, survives, clipped, carry),
        later,
    )
    return ModelRollout(
        observation=jnp.concatenate([observation[None], states]),
        action=actions,
        reward=rewards,
        alive=jnp.concatenate([jnp.ones_like(alive[:1]), alive]),
        clipped=clips,
        carry=memories,
    )


def bootstrapped_return(
    rollout: ModelRollout, last_value: Float[Array, "..."], gamma: Float[Array, ""] | float
) -> Float[Array, "..."]:
    """``sum_{h<H} gamma^h alive_h r_h + gamma^H alive_H V(x_H)``: an estimate of ``Q(x_0, u_0)``.

    Unbiased for every horizon where the model and the value are exact.

    Args:
        rollout: see :func:`rollout_model`.
        last_value: the value of its last state.
        gamma: discount.
    """
    horizon = rollout.reward.shape[0]
    weight = (jnp.asarray(gamma) ** jnp.arange(horizon)).reshape((-1,) + (1,) * (rollout.reward.ndim - 1))
    earned = jnp.sum(weight * rollout.alive[:-1] * rollout.reward, axis=0)
    return earned + gamma**horizon * rollout.alive[-1] * last_value


#: Log-variances of normalized targets are held between these softly, as a network's guesses of them run away.
_LOG_VARIANCE = (-12.0, 2.0)


class EnsembleModel(TransitionModel):
    """Networks that predict the normalized change of the observation and the reward, fitted to transitions.

    Each of ``E`` members is fitted to its own resamples of the data; where they disagree, data is missing. An outcome
    is that of a member drawn anew for every row and step (``TS1`` of Chua et al., 2018, arXiv:1805.12114).

    Attributes:
        networks: the members, stacked ``[E, ...]``.
        input_mean: of observation and action ``[n + m]``.
        input_std: likewise.
        target_mean: of the change of the observation, and of the reward ``[n + 1]``.
        target_std: likewise.
        low: smallest observation seen ``[n]``.
        high: largest.
        members: ``E``.
        gaussian: whether members predict variances too and outcomes are drawn from them.
        terminates: whether the probability that the task ends is predicted; else it never does.
        margin: how far outside the box of what was seen predictions are let, in widths of the box.
    """

    networks: MLP
    input_mean: Float[Array, " inputs"]
    input_std: Float[Array, " inputs"]
    target_mean: Float[Array, " targets"]
    target_std: Float[Array, " targets"]
    low: Float[Array, " n"]
    high: Float[Array, " n"]
    members: int = eqx.field(static=True)
    gaussian: bool = eqx.field(static=True)
    terminates: bool = eqx.field(static=True)
    margin: float = eqx.field(static=True)

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "swish",
        members: int = 1,
        gaussian: bool = False,
        terminates: bool = False,
        margin: float = 0.5,
        key: Key[Array, ""],
    ):
        """Draws networks whose first prediction is that nothing changes.

        Args:
            observation_size: ``n``.
            action_size: ``m``.
            hidden: widths of the hidden layers.
            activation: their nonlinearity.
            members: number of networks.
            gaussian: predict variances too.
            terminates: predict whether the task ends.
            margin: see the class.
            key: randomness of the networks.
        """
        require_count("observation_size", observation_size)
        require_count("action_size", action_size)
        require_count("members", members)
        require(margin >= 0.0 and math.isfinite(margin), "margin", margin, "a finite number at least 0")
        self.members, self.gaussian, self.terminates, self.margin = members, gaussian, terminates, margin
        targets = observation_size + 1
        outputs = targets * (2 if gaussian else 1) + int(terminates)
        inputs = observation_size + action_size

        def make(key: Array) -> MLP:
            return MLP(inputs, outputs, hidden, activation, output_gain=0.0, key=key)

        self.networks = eqx.filter_vmap(make)(jax.random.split(key, members))
        self.input_mean, self.input_std = jnp.zeros(inputs), jnp.ones(inputs)
        self.target_mean, self.target_std = jnp.zeros(targets), jnp.ones(targets)
        self.low, self.high = jnp.full(observation_size, -jnp.inf), jnp.full(observation_size, jnp.inf)

    @property
    def observation_size(self) -> int:
        """Length of an observation vector ``n``."""
        return self.low.shape[0]

    def limits(self) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        width = jnp.where(jnp.isfinite(self.high - self.low), self.high - self.low, 0.0)
        return self.low - self.margin * width, self.high + self.margin * width

    def outputs(
        self, observation: Float[Array, "... n"], action: Float[Array, "... m"]
    ) -> tuple[Float[Array, "E ... targets"], Float[Array, "E ... targets"], Float[Array, "E ..."]]:
        """Every member's mean and deviation of ``(change, reward)`` in their units, and termination probability."""
        inputs = (jnp.concatenate([observation, action], axis=-1) - self.input_mean) / self.input_std
        raw = eqx.filter_vmap(lambda network: network(inputs))(self.networks)
        mean, log_variance, logit = self._split(raw)
        deviation = jnp.exp(0.5 * log_variance) if self.gaussian else jnp.zeros_like(mean)
        terminated = jax.nn.sigmoid(logit) if self.terminates else jnp.zeros_like(mean[..., 0])
        return self.target_mean + self.target_std * mean, self.target_std * deviation, terminated

    def _split(self, raw: Float[Array, "... out"]) -> tuple[Array, Array, Array]:
        targets = self.target_mean.shape[0]
        mean, logit = raw[..., :targets], raw[..., -1]
        if not self.gaussian:
            return mean, jnp.zeros_like(mean), logit
        low, high = _LOG_VARIANCE
        free = raw[..., targets : 2 * targets]
        return mean, low + jax.nn.softplus(high - jax.nn.softplus(high - free) - low), logit

    def __call__(
        self, observation: Float[Array, "... n"], action: Float[Array, "... m"], key: Key[Array, ""]
    ) -> Prediction:
        mean, deviation, terminated = self.outputs(observation, action)
        member_key, noise_key = jax.random.split(key)
        if self.members > 1:
            chosen = jax.random.randint(member_key, terminated.shape[1:], 0, self.members)
            weight = jax.nn.one_hot(chosen, self.members, axis=0, dtype=mean.dtype)
            mean, deviation = (jnp.sum(weight[..., None] * part, axis=0) for part in (mean, deviation))
            terminated = jnp.sum(weight * terminated, axis=0)
        else:
            mean, deviation, terminated = mean[0], deviation[0], terminated[0]
        if self.gaussian:
            mean = mean + deviation * jax.random.normal(noise_key, mean.shape, mean.dtype)
        return Prediction(observation + mean[..., :-1], mean[..., -1], terminated)

    def loss(self, network: MLP, rows: Float[Array, "rows columns"]) -> Float[Array, ""]:
        """One member's loss on rows in the model's units: inputs, targets, whether the task ended."""
        inputs = self.input_mean.shape[0]
        mean, log_variance, logit = self._split(network(rows[:, :inputs]))
        error = (rows[:, inputs:-1] - mean) ** 2
        if self.gaussian:
            error = error * jnp.exp(-log_variance) + log_variance
        total = jnp.mean(error)
        if self.terminates:
            total = total + jnp.mean(optax.sigmoid_binary_cross_entropy(logit, rows[:, -1]))
        return total

    def disagreement(
        self, observation: Float[Array, "... n"], action: Float[Array, "... m"]
    ) -> Float[Array, "... targets"]:
        """Standard deviation over members of the predicted change and reward, in their units."""
        return jnp.std(self.outputs(observation, action)[0], axis=0)


class ModelLearner(eqx.Module):
    """The model slot of methods that learn one: how it is made, and how it follows the data."""

    @abc.abstractmethod
    def init(self, observation_size: int, action_size: int, key: Key[Array, ""]) -> TransitionModel:
        """The model before any data, for vectors of these sizes."""

    @abc.abstractmethod
    def fit(
        self, model: Any, replay: Replay, key: Key[Array, ""]
    ) -> tuple[TransitionModel, dict[str, Float[Array, ""] | Int[Array, ""]]]:
        """The model fitted to what is stored, and what is worth watching of that; pure and jittable.

        Args:
            model: the present one.
            replay: :class:`~steersman.training.replay.Transition` rows with vectors as observations and actions.
            key: randomness.
        """


class KnownModel(ModelLearner):
    """A model that is given and does not change.

    Attributes:
        model: called with batches of vectors (:class:`TransitionModel`).
    """

    model: TransitionModel

    def init(self, observation_size: int, action_size: int, key: Key[Array, ""]) -> TransitionModel:
        return self.model

    def fit(self, model: Any, replay: Replay, key: Key[Array, ""]) -> tuple[TransitionModel, dict[str, Array]]:
        return model, {}


class EnsembleLearner(ModelLearner):
    """Fits an :class:`EnsembleModel` by minibatch Adam until a held-out part of the data no longer gains.

    A fit starts from what was learned before. Each member keeps the parameters that were best on the held-out rows,
    those it started from among them, so that no fit makes it worse there. Normalization follows all rows stored.

    Attributes:
        hidden: widths of the hidden layers.
        activation: their nonlinearity.
        members: number of networks.
        gaussian: predict variances too.
        terminates: predict whether the task ends.
        margin: see :class:`EnsembleModel`.
        learning_rate: Adam's step size.
        batch_size: rows of a minibatch, of each member.
        epochs: most passes of one fit; a pass is `batches` minibatches.
        batches: minibatches of a pass.
        patience: passes without improvement before a fit stops.
        improvement: relative fall of a member's held-out loss that counts as one.
        holdout: every ``holdout``-th place of the data is held out, at least 2. Places, not rows drawn anew at each
            fit, so that what judges has never been fitted to.
        holdout_rows: rows that the held-out loss is computed of.
    """

    hidden: tuple[int, ...] = eqx.field(static=True, default=(256, 256), converter=tuple)
    activation: str = eqx.field(static=True, default="swish")
    members: int = eqx.field(static=True, default=1)
    gaussian: bool = eqx.field(static=True, default=False)
    terminates: bool = eqx.field(static=True, default=False)
    margin: float = eqx.field(static=True, default=0.5)
    learning_rate: Continuous = scalar(1e-3)
    batch_size: int = eqx.field(static=True, default=256)
    epochs: int = eqx.field(static=True, default=20)
    batches: int = eqx.field(static=True, default=20)
    patience: int = eqx.field(static=True, default=3)
    improvement: Continuous = scalar(0.01)
    holdout: int = eqx.field(static=True, default=7)
    holdout_rows: int = eqx.field(static=True, default=512)

    def __check_init__(self) -> None:
        require_number("learning_rate", self.learning_rate, above=0.0)
        require_number("improvement", self.improvement, at_least=0.0, below=1.0)
        for name in ("members", "batch_size", "epochs", "batches", "patience", "holdout_rows"):
            require_count(name, getattr(self, name))
        require_count("holdout", self.holdout, minimum=2)

    def init(self, observation_size: int, action_size: int, key: Key[Array, ""]) -> EnsembleModel:
        return EnsembleModel(
            observation_size,
            action_size,
            hidden=self.hidden,
            activation=self.activation,
            members=self.members,
            gaussian=self.gaussian,
            terminates=self.terminates,
            margin=self.margin,
            key=key,
        )

    def fit(
        self, model: EnsembleModel, replay: Replay, key: Key[Array, ""]
    ) -> tuple[EnsembleModel, dict[str, Float[Array, ""] | Int[Array, ""]]]:
        """The fitted model, and ``model_holdout_loss``, ``model_loss`` (of the last pass) and ``model_epochs``.

        Losses are averaged over members. For deterministic members they are mean squared errors in units of the
        targets' variance.

        Raises:
            InputError: fewer than two rows, or rows of other sizes than the model's.
        """
        rows = replay.rows
        sizes = rows.observation.shape[-1], rows.action.shape[-1]
        expected = model.observation_size, model.input_mean.shape[0] - model.observation_size
        require(sizes == expected, "sizes of observation and action in replay", sizes, f"{expected}, as the model's")
        replay.require_rows(2)
        model, packed = _normalized(model, replay)
        # Held out are places 0, k, 2k, ...: both parts are drawn from by arithmetic, without sorting or rejection.
        held = (replay.size + self.holdout - 1) // self.holdout
        held_key, key = jax.random.split(key)
        judges = packed[jax.random.randint(held_key, (self.holdout_rows,), 0, jnp.maximum(held, 1)) * self.holdout]
        optimizer = optax.flatten(optax.adam(1.0))

        def judge(networks: MLP) -> Float[Array, " E"]:
            return eqx.filter_vmap(lambda network: model.loss(network, judges))(networks)

        def total(networks: MLP, batch: Float[Array, "E rows columns"]) -> tuple[Array, Array]:
            losses = eqx.filter_vmap(model.loss)(networks, batch)
            return jnp.sum(losses), jnp.mean(losses)

        def descend(running: tuple, batch: Array) -> tuple[tuple, Array]:
            networks, state = running
            (_, shown), gradient = jax.value_and_grad(total, has_aux=True)(networks, batch)
            updates, state = optimizer.update(gradient, state)
            networks = jax.tree.map(lambda p, u: p + self.learning_rate * u, networks, updates)
            return (networks, state), shown

        def one_pass(running: tuple) -> tuple:
            networks, state, best, best_loss, waited, passes, _, key = running
            draw_key, key = jax.random.split(key)
            count = (self.batches, model.members, self.batch_size)
            drawn = jax.random.randint(draw_key, count, 0, jnp.maximum(replay.size - held, 1))
            # The i-th row that is not held out.
            batches = packed[drawn + drawn // (self.holdout - 1) + 1]
            (networks, state), shown = jax.lax.scan(descend, (networks, state), batches)
            losses = judge(networks)
            better = losses < best_loss
            best = jax.tree.map(
                lambda b, n: jnp.where(better.reshape((-1,) + (1,) * (n.ndim - 1)), n, b), best, networks
            )
            clear = jnp.any(losses < best_loss - self.improvement * jnp.abs(best_loss))
            waited = jnp.where(clear, 0, waited + 1)
            return networks, state, best, jnp.fmin(best_loss, losses), waited, passes + 1, jnp.mean(shown), key

        def unfinished(running: tuple) -> Array:
            return jnp.logical_and(running[5] < self.epochs, running[4] < self.patience)

        networks: Any = model.networks
        before, zero = judge(networks), jnp.zeros((), jnp.int32)
        start = (networks, optimizer.init(networks), networks, before, zero, zero, jnp.zeros_like(before[0]), key)
        _, _, best, best_loss, _, passes, shown, _ = jax.lax.while_loop(unfinished, one_pass, start)
        model = eqx.tree_at(lambda m: m.networks, model, best)
        return model, {"model_holdout_loss": jnp.mean(best_loss), "model_loss": shown, "model_epochs": passes}


def _normalized(model: EnsembleModel, replay: Replay) -> tuple[EnsembleModel, Float[Array, "C columns"]]:
    """A model with the statistics of what is stored, and that in its units: inputs, targets, whether the task ended."""
    rows = replay.rows
    inputs = jnp.concatenate([rows.observation, rows.action], axis=-1)
    targets = jnp.concatenate([rows.next_observation - rows.observation, rows.reward[:, None]], axis=-1)
    valid = replay.valid[:, None]

    def moments(values: Array) -> tuple[Array, Array]:
        count = jnp.maximum(replay.size, 1)
        mean = jnp.sum(jnp.where(valid, values, 0.0), axis=0) / count
        variance = jnp.sum(jnp.where(valid, (values - mean) ** 2, 0.0), axis=0) / count
        # What never varies is left in its units: dividing by nearly nothing would magnify its rounding.
        constant = variance <= 1e-10 * (1.0 + mean**2)
        return mean, jnp.where(constant, 1.0, jnp.sqrt(jnp.where(constant, 1.0, variance)))

    both = jnp.concatenate([rows.observation, rows.next_observation])
    known = jnp.concatenate([valid, valid])
    low = jnp.min(jnp.where(known, both, jnp.inf), axis=0)
    high = jnp.max(jnp.where(known, both, -jnp.inf), axis=0)
    model = eqx.tree_at(
        lambda m: (m.input_mean, m.input_std, m.target_mean, m.target_std, m.low, m.high),
        model,
        (*moments(inputs), *moments(targets), low, high),
    )
    scaled = (inputs - model.input_mean) / model.input_std, (targets - model.target_mean) / model.target_std
    return model, jnp.concatenate([*scaled, rows.terminated.astype(inputs.dtype)[:, None]], axis=-1)


def quadratic_features(z: Float[Array, "... d"]) -> Float[Array, "... features"]:
    """``1``, ``z_i`` and ``z_i z_j`` for ``i <= j``: all quadratic functions of `z` are linear in them."""
    size = z.shape[-1]
    first, second = jnp.triu_indices(size)
    products = z[..., first] * z[..., second]
    return jnp.concatenate([jnp.ones_like(z[..., :1]), z, products], axis=-1)


class LinearQuadraticModel(TransitionModel):
    """Linear dynamics with a quadratic reward: ``x' = A x + B u + offset + L e``, ``r = w . features([x, u])``.

    Attributes:
        A: ``[n, n]``.
        B: ``[n, m]``.
        offset: ``[n]``.
        noise: the factor ``L`` ``[n, n]`` of the disturbance, ``e ~ N(0, I)``.
        reward_weights: of :func:`quadratic_features` of the concatenated state and action.
    """

    A: Float[Array, "n n"]
    B: Float[Array, "n m"]
    offset: Float[Array, " n"]
    noise: Float[Array, "n n"]
    reward_weights: Float[Array, " features"]

    def __call__(
        self, observation: Float[Array, "... n"], action: Float[Array, "... m"], key: Key[Array, ""]
    ) -> Prediction:
        mean = observation @ self.A.T + action @ self.B.T + self.offset
        disturbance = jax.random.normal(key, mean.shape, mean.dtype) @ self.noise.T
        reward = quadratic_features(jnp.concatenate([observation, action], axis=-1)) @ self.reward_weights
        return Prediction(mean + disturbance, reward, jnp.zeros_like(reward))

    @classmethod
    def least_squares(cls, replay: Replay) -> LinearQuadraticModel:
        """Least squares on the stored transitions; the disturbance is that of the residuals.

        Args:
            replay: :class:`~steersman.training.replay.Transition` rows with vectors as observations and actions.

        Raises:
            InputError: fewer rows than coefficients.
        """
        rows = replay.rows
        n, m = rows.observation.shape[-1], rows.action.shape[-1]
        z = jnp.concatenate([rows.observation, rows.action], axis=-1)
        features = quadratic_features(z)
        replay.require_rows(features.shape[-1])
        weight = replay.valid.astype(z.dtype)[:, None]
        # Affine in state and action: the first columns of the features.
        affine = features[:, : 1 + n + m]
        solution = jnp.linalg.lstsq(weight * affine, weight * rows.next_observation)[0]
        residual = weight * (rows.next_observation - affine @ solution)
        freedom = jnp.maximum(replay.size - affine.shape[1], 1)
        values, vectors = jnp.linalg.eigh(residual.T @ residual / freedom)
        noise = vectors * jnp.sqrt(jnp.maximum(values, 0.0))
        rewards = jnp.linalg.lstsq(weight * features, weight[:, 0] * rows.reward)[0]
        return cls(solution[1 : 1 + n].T, solution[1 + n :].T, solution[0], noise, rewards)

    @classmethod
    def from_costs(cls, A: Any, B: Any, Q: Any, R: Any, noise: Any = None) -> LinearQuadraticModel:
        """The model of ``x' = A x + B u + L e`` with the reward ``-(x'Qx + u'Ru)``.

        Args:
            A: ``[n, n]``.
            B: ``[n, m]``.
            Q: ``[n, n]``, symmetric.
            R: ``[m, m]``, symmetric.
            noise: the factor ``L``; zero unless given.
        """
        a, b, q, r = (jnp.asarray(value, jnp.result_type(float)) for value in (A, B, Q, R))
        require(a.ndim == 2 and a.shape[0] == a.shape[1], "A's shape", a.shape, "square [n, n]")
        n = a.shape[0]
        require(b.ndim == 2 and b.shape[0] == n, "B's shape", b.shape, f"[n, m] with n = {n} as in A")
        m = b.shape[1]
        require(q.shape == (n, n), "Q's shape", q.shape, f"({n}, {n})")
        require(r.shape == (m, m), "R's shape", r.shape, f"({m}, {m})")
        factor = jnp.zeros((n, n)) if noise is None else jnp.asarray(noise)
        require(factor.shape == (n, n), "noise's shape", factor.shape, f"({n}, {n})")
        joint = jnp.zeros((n + m, n + m)).at[:n, :n].set(q).at[n:, n:].set(r)
        first, second = jnp.triu_indices(n + m)
        products = jnp.where(first == second, 1.0, 2.0) * joint[first, second]
        return cls(a, b, jnp.zeros(n), factor, -jnp.concatenate([jnp.zeros(1 + n + m), products]))
