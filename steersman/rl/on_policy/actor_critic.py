"""What on-policy actor-critic methods share: networks, normalizers, and advantage estimates from a batch."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt32

from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError, require_count, require_number
from steersman.networks import MLP
from steersman.policies import Architecture, Head, NetworkPolicy, Policy, Preprocess, head_for, make_policy
from steersman.policies.preprocessing import Features
from steersman.rl.alternatives import Alternatives
from steersman.rl.critics import Critic, Examples, Outcome, StateCritic
from steersman.rl.surrogates import Surrogate, SurrogateInputs
from steersman.training.algorithm import InteractiveAlgorithm
from steersman.training.collect import Collector, Rollout, episode_ends
from steersman.training.experience import Experience
from steersman.training.normalization import RewardScaler, RunningMoments
from steersman.training.schedules import Continuous, Schedule, Scheduled, resolve, scalar


class Learned(NamedTuple):
    """What gradients change: the actor's network and state-free numbers, and the critic's networks."""

    network: PyTree
    free: Float[Array, " free"]
    critic: PyTree


class ActorCriticState(eqx.Module):
    """What an actor-critic method carries from one iteration to the next.

    Attributes:
        actor: the policy, with the observation statistics that it acts under.
        critic: the critic's networks.
        optimizer: state of the optimizer(s).
        moments: running moments of the observations, or None.
        reward_scaler: running scale of the rewards, or None.
        method: what the particular method carries (an adaptive coefficient, say).
        samples: environment steps learned from so far.
        key: randomness of what follows.
    """

    actor: NetworkPolicy
    critic: PyTree
    optimizer: PyTree
    moments: RunningMoments | None
    reward_scaler: RewardScaler | None
    method: PyTree
    samples: UInt32[Array, ""]
    key: Key[Array, ""]

    @property
    def learned(self) -> Learned:
        """The trainable part."""
        return Learned(self.actor.network, self.actor.free, self.critic)

    def with_learned(self, learned: Learned) -> ActorCriticState:
        """This state with the trainable part replaced."""
        return eqx.tree_at(
            lambda s: (s.actor.network, s.actor.free, s.critic), self, (learned.network, learned.free, learned.critic)
        )


class Batch(NamedTuple):
    """One on-policy batch, ready for learning; leaves ``[T, N, ...]`` until they are put in rows.

    Attributes:
        features: preprocessed observations.
        carry: the actor's memory before each step.
        start: where an episode began with this step (the memory was reset).
        action: samples before bounds, as likelihoods need them.
        log_prob: their log-probability under the behaviour policy.
        parameters: the behaviour policy's distribution parameters.
        advantage: advantage estimates.
        target: regression targets of the critic, in its own form.
        value: the critic's values when the batch was collected.
        read: what the critic reads beyond features and memory.
        alternatives: more samples beside each row, or None.
        imitated: what another policy did in the same place, or nothing.
    """

    features: Features
    carry: PyTree
    start: Bool[Array, "T N"]
    action: PyTree
    log_prob: Float[Array, "T N"]
    parameters: PyTree
    advantage: Float[Array, "T N"]
    target: PyTree
    value: Float[Array, "T N"]
    read: PyTree = ()
    alternatives: Alternatives | None = None
    imitated: PyTree = ()


S = TypeVar("S", bound=ActorCriticState)


class ActorCritic(InteractiveAlgorithm, Generic[S]):
    """Base of the on-policy methods: a stochastic actor, a value critic, rollouts and generalized advantages.

    Attributes:
        num_envs: parallel environments ``N``.
        num_steps: steps per environment and iteration ``T``.
        gamma: discount.
        lam: trace parameter of the generalized advantage estimate.
        hidden: widths of the hidden layers of both networks.
        activation: their nonlinearity.
        memory: width of a recurrent actor's state; 0 for a feed-forward actor.
        architecture: what makes the actor, in place of the three numbers above; None for those.
        critic: what estimates values, and how they become advantages.
        initial_log_std: start of a Gaussian policy's log standard deviation, in units of the half-width of the box.
        normalize_observations: standardize observations by running moments, clipped to 10 deviations.
        normalize_rewards: divide rewards by the running deviation of the discounted return.
        reward_scale: constant factor on rewards while learning.
    """

    num_envs: int = eqx.field(static=True, default=16)
    num_steps: int = eqx.field(static=True, default=128)
    gamma: Scheduled = scalar(0.99)
    lam: Scheduled = scalar(0.95)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(64, 64), converter=tuple)
    activation: str = eqx.field(static=True, default="tanh")
    memory: int = eqx.field(static=True, default=0)
    architecture: Architecture | None = None
    critic: Critic = eqx.field(default_factory=StateCritic)
    initial_log_std: Continuous = scalar(0.0)
    normalize_observations: bool = eqx.field(static=True, default=False)
    normalize_rewards: bool = eqx.field(static=True, default=False)
    reward_scale: Continuous = scalar(1.0)

    def __check_init__(self) -> None:
        require_count("num_envs", self.num_envs)
        require_count("num_steps", self.num_steps)
        require_count("memory", self.memory, minimum=0)
        if self.architecture is not None and not isinstance(self.architecture, Architecture):
            raise InputTypeError(f"architecture is {self.architecture!r}, but it must be an Architecture or None.")
        if not isinstance(self.critic, Critic):
            raise InputTypeError(f"critic is {self.critic!r}, but it must be a Critic such as StateCritic().")
        for name in ("gamma", "lam"):
            if not isinstance(getattr(self, name), Schedule):
                require_number(name, getattr(self, name), at_least=0.0, at_most=1.0)
        require_number("initial_log_std", self.initial_log_std)
        require_number("reward_scale", self.reward_scale, above=0.0)

    @property
    def collector(self) -> Collector:
        return Rollout(self.num_envs, self.num_steps, self.critic.needs)

    @property
    def unrolled(self) -> bool:
        """Whether the actor learns from whole sequences, because its memory must be unrolled through time."""
        return self.memory > 0 if self.architecture is None else self.architecture.unrolled

    def init_networks(self, problem: Any, key: Key[Array, ""]) -> tuple[NetworkPolicy, PyTree]:
        """A fresh actor, and the critic's networks, for the problem's spaces."""
        actor_key, critic_key = jax.random.split(key)
        preprocess = Preprocess(layout(problem.observation_space))
        if self.normalize_observations:
            identity = RunningMoments.zeros((preprocess.size,)).standardizer()
            preprocess = Preprocess(preprocess.layout, identity)
        head = head_for(problem.action_space)
        if self.architecture is not None:
            actor = self.architecture.make(preprocess, head, initial_log_std=self.initial_log_std, key=actor_key)
        else:
            actor = make_policy(
                preprocess,
                head,
                hidden=self.hidden,
                activation=self.activation,
                memory=self.memory,
                initial_log_std=0.0,
                key=actor_key,
            )
            actor = eqx.tree_at(lambda a: a.free, actor, actor.free + self.initial_log_std)
        # A memory is part of what the critic sees: without it, values of a partially observed problem would average
        # over everything the actor remembers.
        memory = jax.eval_shape(actor.init, jax.random.key(0))
        size = preprocess.size + sum(leaf.size for leaf in jax.tree.leaves(memory))
        critic = self.critic.init(
            size, lambda size, key: MLP(size, 1, self.hidden, self.activation, key=key), critic_key
        )
        return actor, critic

    def init_state(self, problem: Any, key: Key[Array, ""], optimizer: Any, method: PyTree) -> ActorCriticState:
        """The first state; `optimizer` is a function from the trainable part to the optimizer's state."""
        network_key, key = jax.random.split(key)
        actor, critic = self.init_networks(problem, network_key)
        return ActorCriticState(
            actor=actor,
            critic=critic,
            optimizer=optimizer(Learned(actor.network, actor.free, critic)),
            moments=RunningMoments.zeros((actor.preprocess.size,)) if self.normalize_observations else None,
            reward_scaler=RewardScaler.zeros(self.num_envs) if self.normalize_rewards else None,
            method=method,
            samples=jnp.zeros((), jnp.uint32),
            key=key,
        )

    def behaviour(self, state: ActorCriticState) -> NetworkPolicy:
        return state.actor

    def policy(self, state: ActorCriticState) -> Policy:
        return state.actor

    def at(self, state: ActorCriticState) -> Any:
        """This algorithm with every scheduled hyperparameter at its present value."""
        return resolve(self, state.samples)

    def estimate(self, state: ActorCriticState, experience: Experience) -> tuple[Batch, RewardScaler | None]:
        """Advantages and value targets of a batch (Schulman et al., 2016, arXiv:1506.02438)."""
        if experience.reward.ndim != 2:
            raise InputError(
                f"reward has shape {experience.reward.shape[2:]} per step, but {type(self).__name__} learns from a "
                "scalar reward; combine the objectives into one first."
            )
        if not hasattr(experience.record, "log_prob"):
            raise InputError(
                f"experience.record is {experience.record!r}, but {type(self).__name__} needs the log-probabilities "
                "and parameters of the policy that acted."
            )
        actor = state.actor
        done = episode_ends(experience.terminated, experience.truncated)
        reward, scaler = experience.reward * self.reward_scale, state.reward_scaler
        if scaler is not None:
            scaler = scaler.update(reward, done, self.gamma)
            reward = scaler.scale(reward)
        features = jax.vmap(jax.vmap(actor.preprocess))(experience.observation)
        value, next_value = self._values(state, experience, features)
        read = self.critic.read(actor.preprocess, experience)

        def scale(part: Array) -> Array:
            part = part * self.reward_scale
            return part if scaler is None else scaler.scale(part)

        outcome = Outcome(reward, value, next_value, experience.terminated, experience.truncated, scale, experience)
        advantage, target = self.critic.estimate(state.critic, read, outcome, self.gamma, self.lam)
        start = jnp.concatenate([jnp.zeros_like(done[:1]), done[:-1]])
        record = experience.record
        batch = Batch(
            features=features,
            carry=experience.carry,
            start=start,
            action=record.action,
            log_prob=record.log_prob,
            parameters=record.parameters,
            advantage=advantage,
            target=target,
            value=value,
            read=read,
        )
        return batch, scaler

    def _values(
        self, state: ActorCriticState, experience: Experience, features: Features
    ) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
        """Values before and after each step."""
        actor = state.actor

        def value_of(vector: Array, carry: PyTree) -> Array:
            return self.critic.value(state.critic, seen(vector, carry))

        value = value_of(features.vector, experience.carry)

        def after(observation: PyTree, features: Features, carry: PyTree, sample: PyTree) -> Array:
            # The memory after the step: a restart may already have wiped the recorded one.
            carry = jax.vmap(jax.vmap(actor.remember))(features, carry, sample)
            vector = jax.vmap(jax.vmap(actor.preprocess))(observation).vector
            return value_of(vector, carry)

        steps = (experience.next_observation, features, experience.carry, experience.record.action)
        shifted = jnp.concatenate([value[1:], after(*jax.tree.map(lambda x: x[-1:], steps))])
        # The next row holds the value after this step except where the episode was cut, which is rare: the final
        # observations are evaluated only if there is one. (Where the task ended, nothing is bootstrapped.)
        cut = jnp.logical_and(experience.truncated, jnp.logical_not(experience.terminated))
        next_value = jax.lax.cond(
            jnp.any(cut),
            lambda: jnp.where(cut, after(*steps), shifted),
            lambda: shifted,
        )
        return value, next_value

    def finish(
        self, state: S, experience: Experience, learned: Learned, scaler: RewardScaler | None, **changes: Any
    ) -> S:
        """The state after an update: new networks, and statistics that now include this batch."""
        state = state.with_learned(learned)  # pyright: ignore[reportAssignmentType]
        actor, moments = state.actor, state.moments
        if moments is not None:
            # Only now: until here, likelihoods were computed under the statistics that the batch was collected with.
            moments = moments.update(jax.vmap(jax.vmap(actor.preprocess.layout))(experience.observation))
            actor = eqx.tree_at(lambda a: a.preprocess.standardize, actor, moments.standardizer())
        samples = state.samples + jnp.uint32(experience.reward.shape[0] * experience.reward.shape[1])
        changes = {"actor": actor, "moments": moments, "reward_scaler": scaler, "samples": samples, **changes}
        names = tuple(changes)
        return eqx.tree_at(
            lambda s: tuple(getattr(s, n) for n in names), state, tuple(changes.values()), is_leaf=lambda x: x is None
        )


def seen(vector: Float[Array, "... D"], carry: PyTree) -> Float[Array, "... size"]:
    """What a critic sees: the features and the actor's memory."""
    return jnp.concatenate([vector, *jax.tree.leaves(carry)], axis=-1)


def in_rows(actor: NetworkPolicy, batch: Batch) -> Batch:
    """A batch as the rows that minibatches are made of.

    A row is one transition ``[T N, ...]``. For an actor whose memory must be unrolled it is one environment's sequence
    ``[N, T, ...]``.
    """
    if actor.unrolled:
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), batch)
    return jax.tree.map(lambda leaf: leaf.reshape((leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])), batch)


def likelihood(actor: NetworkPolicy, rows: Batch) -> PyTree:
    """Distribution parameters of `actor` at every row, unrolling its memory where it has to be."""
    if not actor.unrolled:
        return actor.parameters_for(rows.features, rows.carry, rows.action)

    def unroll(features: Features, carry: PyTree, start: Bool[Array, " T"]) -> PyTree:
        fresh = actor.init(jax.random.key(0))

        def step(carry: PyTree, inputs: tuple[Features, Array]) -> tuple[PyTree, PyTree]:
            features, start = inputs
            carry = jax.tree.map(lambda f, c: jnp.where(start, f, c), fresh, carry)
            parameters, carry = actor.from_features(features, carry)
            return carry, parameters

        first = jax.tree.map(lambda c: c[0], carry)
        return jax.lax.scan(step, first, (features, start))[1]

    return jax.vmap(unroll)(rows.features, rows.carry, rows.start)


class Samples(NamedTuple):
    """What a surrogate is called with, for every sample of some rows: ``[B]``, or ``[B, 1 + K]`` with alternatives."""

    log_ratio: Float[Array, "..."]
    advantage: Float[Array, "..."]
    inputs: SurrogateInputs

    def loss(self, surrogate: Surrogate, state: PyTree) -> Float[Array, ""]:
        """The mean of a surrogate's losses: over the samples of each row, and over rows."""
        return jnp.mean(surrogate(self.log_ratio, self.advantage, self.inputs, state))


def samples(actor: NetworkPolicy, rows: Batch) -> Samples:
    """The samples of some rows, and of the alternatives beside them, under a policy."""
    parameters = likelihood(actor, rows)
    more = rows.alternatives
    if more is None:
        return samples_at(actor.head, rows, parameters)

    def beside(own: PyTree, others: PyTree) -> PyTree:
        return jax.tree.map(lambda o, k: jnp.concatenate([o[:, None], k], axis=1), own, others)

    if more.features is None:
        there = jax.tree.map(lambda p, k: jnp.broadcast_to(p[:, None], k.shape), parameters, more.parameters)
    else:
        there = actor.from_features(more.features, ())[0]
    together = rows._replace(
        action=beside(rows.action, more.action),
        log_prob=beside(rows.log_prob, more.log_prob),
        parameters=beside(rows.parameters, more.parameters),
        advantage=beside(rows.advantage, more.advantage),
    )
    return samples_at(actor.head, together, beside(parameters, there))


def samples_at(head: Head, rows: Batch, parameters: PyTree) -> Samples:
    """The samples of some rows under a policy whose distribution parameters there are `parameters`."""
    log_prob = head.log_prob(parameters, rows.action)
    inputs = SurrogateInputs(
        kl=head.kl(rows.parameters, parameters),
        log_prob=log_prob,
        entropy=head.entropy(parameters),
        kl_parts=head.kl_parts(rows.parameters, parameters),
    )
    return Samples(log_prob - rows.log_prob, rows.advantage, inputs)


def examples(rows: Batch) -> Examples:
    """What a critic regresses on."""
    return Examples((seen(rows.features.vector, rows.carry), rows.read), rows.value, rows.target)
