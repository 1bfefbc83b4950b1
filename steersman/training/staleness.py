"""Learning from actors that lag behind: what asynchronous training does to the data, in one process."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from steersman.errors import InputTypeError, require_count
from steersman.policies import Policy
from steersman.training.algorithm import InteractiveAlgorithm, Metrics
from steersman.training.collect import Collector
from steersman.training.experience import Experience


class StaleState(eqx.Module):
    """What :class:`Stale` carries.

    Attributes:
        inner: the state of the algorithm that learns.
        queue: the arrays of the behaviour policies of the last iterations, oldest first ``[staleness, ...]``.
    """

    inner: PyTree
    queue: PyTree


class Stale(InteractiveAlgorithm):
    """Any interactive algorithm, with actors that use the policy of some iterations ago.

    The learner sees what it would see if every batch waited ``staleness`` iterations in a queue, except that it does
    not wait for the first one: until that many updates have been made, the first policy acts. Delaying policies rather
    than experience needs far less memory and works with every collector.

    Attributes:
        algorithm: what learns. To cope with old data it needs the importance weights of a
            :class:`~steersman.rl.references.ProximalReference`, or something like them.
        staleness: iterations between a policy and the update that its data are used in.
    """

    algorithm: InteractiveAlgorithm
    staleness: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not isinstance(self.algorithm, InteractiveAlgorithm):
            raise InputTypeError(f"algorithm is {self.algorithm!r}, but it must be an algorithm that interacts.")
        require_count("staleness", self.staleness, minimum=0)

    @property
    def collector(self) -> Collector:
        return self.algorithm.collector

    @property
    def num_envs(self) -> int | None:
        """Parallel environments, where the algorithm says so; for sharding over devices."""
        return getattr(self.algorithm, "num_envs", None)

    def init(self, problem: Any, key: Key[Array, ""]) -> StaleState:
        inner = self.algorithm.init(problem, key)
        first = eqx.filter(self.algorithm.behaviour(inner), eqx.is_array)
        return StaleState(
            inner, jax.tree.map(lambda leaf: jnp.stack([leaf] * self.staleness), first) if self.staleness else ()
        )

    def policy(self, state: StaleState) -> Policy:
        return self.algorithm.policy(state.inner)

    def behaviour(self, state: StaleState) -> Policy:
        newest = self.algorithm.behaviour(state.inner)
        if not self.staleness:
            return newest
        oldest = jax.tree.map(lambda leaf: leaf[0], state.queue)
        return eqx.combine(oldest, eqx.filter(newest, eqx.is_array, inverse=True))

    def update(self, state: StaleState, experience: Experience) -> tuple[StaleState, Metrics]:
        newest = eqx.filter(self.algorithm.behaviour(state.inner), eqx.is_array)
        inner, metrics = self.algorithm.update(state.inner, experience)
        if not self.staleness:
            return StaleState(inner, ()), metrics
        queue = jax.tree.map(lambda queue, new: jnp.concatenate([queue[1:], new[None]]), state.queue, newest)
        return StaleState(inner, queue), metrics
