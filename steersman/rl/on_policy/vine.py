"""The vine: short rollouts of several actions from states along a trajectory (Schulman et al., 2015, section 5.2)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from steersman import returns
from steersman.envs import Problem
from steersman.errors import InputError, InputTypeError, require, require_count
from steersman.policies import Categorical, Head, Policy, StochasticPolicy
from steersman.returns import standardize
from steersman.rl.on_policy.actor_critic import ActorCriticState, Batch, seen
from steersman.rl.on_policy.trpo import TRPO, LocalModel, Sampling
from steersman.training.collect import Collector, EpisodeStatistics, Rollout, RolloutState, episode_ends
from steersman.training.experience import Experience
from steersman.training.minibatches import shuffled
from steersman.training.normalization import RewardScaler


class Branches(eqx.Module):
    """Rollouts of length ``L`` of ``K`` actions from each of ``M`` states of a trajectory.

    Attributes:
        time: where on the trajectories each state is ``[M]``: the step,
        environment: and the environment ``[M]``.
        action: the actions that the branches begin with, before bounds ``[M, K, ...]``.
        log_prob: their log-probability under the behaviour policy.
        reward: ``[L, M, K]``. Where a branch ends, another episode begins, which does not count.
        terminated: the task ended here.
        truncated: the episode was cut here for another reason.
        final_observation: what each branch saw last before it ended or was given up ``[M, K, ...]``.
        final_carry: the policy's memory then.
    """

    time: Int[Array, " M"]
    environment: Int[Array, " M"]
    action: PyTree
    log_prob: Float[Array, "M K"]
    reward: Float[Array, "L M K"]
    terminated: Bool[Array, "L M K"]
    truncated: Bool[Array, "L M K"]
    final_observation: PyTree
    final_carry: PyTree


def _stochastic(policy: Policy) -> StochasticPolicy:
    if not isinstance(policy, StochasticPolicy):
        raise InputTypeError(f"policy is a {type(policy).__name__}, but a vine needs one with a tractable likelihood.")
    return policy


def tries_every_action(head: Head, branches: int) -> bool:
    """Whether `branches` branches are one for each action.

    Raises:
        InputError: there are fewer actions than branches.
    """
    if not isinstance(head, Categorical):
        return False
    if branches > head.num_actions:
        raise InputError(
            f"branches is {branches}, but there are only {head.num_actions} actions; with branches={head.num_actions} "
            "each is tried once."
        )
    return branches == head.num_actions


class VineRollout(Collector):
    """Trajectories of :class:`~steersman.training.Rollout`, and branches from some of their states.

    The states are drawn uniformly from the batch. The branches of one state share all random numbers, the
    environment's and the policy's, so that their returns differ because of their first actions and little else.

    Attributes:
        num_envs: parallel copies of the environment ``N``.
        num_steps: steps of each trajectory ``T``.
        states: states that branches start from ``M``.
        branches: branches of each state ``K``.
        length: steps of each branch ``L``. All are simulated and counted, also where an episode ends earlier.
    """

    num_envs: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    states: int = eqx.field(static=True)
    branches: int = eqx.field(static=True)
    length: int = eqx.field(static=True)
    required: frozenset[str] = eqx.field(static=True, default=frozenset())

    @property
    def needs(self) -> frozenset[str]:
        return self.required | {"start from any state"}

    def __check_init__(self) -> None:
        for name in ("num_envs", "num_steps", "states", "branches", "length"):
            require_count(name, getattr(self, name))
        rows = self.num_envs * self.num_steps
        require(self.states <= rows, "states", self.states, f"at most num_envs * num_steps = {rows}")

    @property
    def samples_per_iteration(self) -> int:
        return self.num_envs * self.num_steps + self.states * self.branches * self.length

    def init(self, problem: Problem, policy: Policy, key: Key[Array, ""]) -> RolloutState:
        tries_every_action(_stochastic(policy).head, self.branches)
        return Rollout(self.num_envs, self.num_steps).init(problem, policy, key)

    def collect(
        self, problem: Problem, policy: Policy, state: RolloutState
    ) -> tuple[Experience, RolloutState, EpisodeStatistics]:
        """One batch: the trajectories, with the :class:`Branches` in ``extras["branches"]``."""
        policy = _stochastic(policy)
        key, choice_key, action_key, branch_key = jax.random.split(state.key, 4)
        one_step = Rollout(self.num_envs, 1)

        def step(running: RolloutState, _: None) -> tuple[RolloutState, tuple[PyTree, ...]]:
            experience, following, statistics = one_step.collect(problem, policy, running)
            return following, (jax.tree.map(lambda leaf: leaf[0], experience), running.env_state, statistics)

        state = eqx.tree_at(lambda s: s.key, state, key)
        state, (experience, env_state, statistics) = jax.lax.scan(step, state, None, length=self.num_steps)

        index = shuffled(choice_key, self.num_steps * self.num_envs)[: self.states]
        time, environment = index // self.num_envs, index % self.num_envs
        starts = (env_state, experience.observation, experience.carry)
        env_state, observation, carry = jax.tree.map(lambda leaf: leaf[time, environment], starts)
        action, log_prob, carry = self.first_actions(policy, observation, carry, action_key)
        params, varied = problem.params, 0 if problem.batched_params else None
        if problem.batched_params:
            params = jax.tree.map(lambda leaf: leaf[environment], params)
        keys = jax.random.split(branch_key, (self.states, self.length, 2))
        # The keys of a state are not mapped over its branches: these are the common random numbers.
        over_branches = jax.vmap(partial(self.branch, problem, policy), in_axes=(None, None, None, None, 0, None))
        over_states = jax.vmap(over_branches, in_axes=(varied, 0, 0, 0, 0, 0))
        steps, final = over_states(params, env_state, observation, carry, action, keys)
        reward, terminated, truncated = (jnp.moveaxis(leaf, 2, 0) for leaf in steps)

        branches = Branches(time, environment, action, log_prob, reward, terminated, truncated, *final)
        experience = replace(experience, extras={**experience.extras, "branches": branches})
        samples = state.samples + jnp.uint32(self.states * self.branches * self.length)
        state = eqx.tree_at(lambda s: s.samples, state, samples)
        return experience, state, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), statistics)

    def first_actions(
        self, policy: StochasticPolicy, observation: PyTree, carry: PyTree, key: Key[Array, ""]
    ) -> tuple[PyTree, Float[Array, "M K"], PyTree]:
        """Actions to branch on, their log-probabilities, and the policy's memory after choosing.

        Every action once where there are as many as branches; otherwise independent draws from the policy.
        """
        head, count = policy.head, self.branches

        def at_one(observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Array, PyTree]:
            parameters, carry = policy.parameters(observation, carry)
            if tries_every_action(head, count):
                action = jnp.arange(count)
            else:
                action = jax.vmap(lambda k: head.sample(parameters, k))(jax.random.split(key, count))
            return action, jax.vmap(lambda a: head.log_prob(parameters, a))(action), carry

        return jax.vmap(at_one)(observation, carry, jax.random.split(key, self.states))

    def branch(
        self,
        problem: Problem,
        policy: StochasticPolicy,
        params: PyTree,
        env_state: PyTree,
        observation: PyTree,
        carry: PyTree,
        action: PyTree,
        keys: Key[Array, "L 2"],
    ) -> tuple[tuple[Array, Array, Array], tuple[PyTree, PyTree]]:
        """One branch: `action` first, then the policy.

        Args:
            problem: the environment.
            policy: acts from the second step on.
            params: parameters of this copy of the environment.
            env_state: where the branch starts.
            observation: what is observed there.
            carry: the policy's memory after it chose there.
            action: the first action, before bounds.
            keys: randomness of the environment and of the policy at each step.

        Returns:
            ``((reward, terminated, truncated), (final observation, final memory))``, the first three ``[L]``.
        """

        def step(running: tuple, keys: Key[Array, "2"]) -> tuple[tuple, tuple]:
            env_state, carry, action, over, final = running
            following, env_state, reward, terminated, truncated, info = problem.environment.step(
                keys[0], env_state, action, params
            )
            seen = (info["final_observation"], carry)
            final = jax.tree.map(lambda f, s: jnp.where(over, f, s), final, seen)
            over = jnp.logical_or(over, episode_ends(terminated, truncated))
            action, carry, _ = policy.act(following, carry, keys[1])
            reward = jnp.asarray(reward, jnp.result_type(float))
            return (env_state, carry, action, over, final), (reward, terminated, truncated)

        start = (env_state, carry, policy.head.to_action(action), jnp.asarray(False), (observation, carry))
        running, steps = jax.lax.scan(step, start, keys)
        return steps, running[-1]


class Vine(Sampling):
    """Action values from branches: every chosen state has several actions compared under the same random numbers.

    What is common to the branches of a state drops out of the comparison: nearly all of the variance where noise comes
    from outside, little of it where what happens next hangs on the policy's own draws. The price is many more steps of
    a simulator that can start from any state. A branch is given up after ``length`` steps and ends with the critic's
    value, unless the episode ended before.

    With one branch for each of a problem's discrete actions, the local model of a state is
    ``sum_k pi(a_k | s) Q_k`` (equation 15 of the paper); otherwise the actions are drawn from the policy, and it is
    ``sum_k w_k Q_k / sum_k w_k`` with ``w_k = pi(a_k | s) / pi_old(a_k | s)`` (equation 16). Either is averaged over
    the states; divergences are over all states of the trajectories, from which the critic learns too.

    Attributes:
        branches: branches of each state ``K``; two or more, and the number of actions where these are few.
        states: states of each batch that branches start from ``M``.
        length: steps of each branch ``L``.
    """

    branches: int = eqx.field(static=True)
    states: int = eqx.field(static=True, default=64)
    length: int = eqx.field(static=True, default=100)

    def __check_init__(self) -> None:
        require_count("branches", self.branches, minimum=2)
        require_count("states", self.states)
        require_count("length", self.length)

    def collector(self, num_envs: int, num_steps: int, required: frozenset[str] = frozenset()) -> VineRollout:
        return VineRollout(num_envs, num_steps, self.states, self.branches, self.length, required)

    def local_model(
        self,
        algorithm: TRPO,
        state: ActorCriticState,
        experience: Experience,
        rows: Batch,
        scaler: RewardScaler | None,
    ) -> LocalModel:
        head, branches = state.actor.head, experience.extras["branches"]
        every_action = tries_every_action(head, self.branches)
        q_value = self.q_values(algorithm, state, branches, scaler)
        # A baseline for each state changes neither kind of model; actions that a mask rules out have no say.
        allowed = jnp.isfinite(branches.log_prob)
        weight = jnp.where(allowed, jnp.exp(branches.log_prob), 0.0) if every_action else jnp.ones_like(q_value)
        baseline = jnp.sum(weight * q_value, axis=1) / jnp.sum(weight, axis=1)
        advantage = standardize(q_value - baseline[:, None], allowed)
        steps, envs = experience.reward.shape
        # Rows are whole sequences [N, T] where the policy has a memory, and single steps [T N] where it has none.
        sequences = state.actor.unrolled
        place = branches.environment * steps + branches.time
        place = place if sequences else branches.time * envs + branches.environment

        def model(parameters: PyTree) -> Float[Array, ""]:
            if sequences:
                parameters = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parameters)
            here = jax.tree.map(lambda leaf: leaf[place], parameters)
            log_prob = jax.vmap(head.log_prob, in_axes=(None, 1), out_axes=1)(here, branches.action)
            if every_action:
                return jnp.mean(jnp.sum(jnp.exp(log_prob) * advantage, axis=1))
            return jnp.mean(jnp.sum(jax.nn.softmax(log_prob - branches.log_prob, axis=1) * advantage, axis=1))

        return model

    def q_values(
        self, algorithm: TRPO, state: ActorCriticState, branches: Branches, scaler: RewardScaler | None
    ) -> Float[Array, "M K"]:
        """Discounted return of every branch, with the critic's value where it was cut."""
        reward = branches.reward * algorithm.reward_scale
        if scaler is not None:
            reward = jax.vmap(scaler.scale)(reward)
        vector = jax.vmap(jax.vmap(state.actor.preprocess))(branches.final_observation).vector
        value = algorithm.critic.value(state.critic, seen(vector, branches.final_carry))
        # A return stops at the first end, so that only there (or after the last step) the final value is looked at.
        next_value = jnp.broadcast_to(value, reward.shape)
        ends, gamma = (branches.terminated, branches.truncated), cast(Array, algorithm.gamma)
        return returns.discounted_return(reward, next_value, *ends, gamma)[0]
