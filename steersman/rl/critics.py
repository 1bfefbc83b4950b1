"""The critic slot: what estimates values, and how they turn rewards into advantages and regression targets."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from steersman import returns
from steersman.networks import MLP
from steersman.policies import Preprocess
from steersman.training.experience import Experience

#: Makes a network from a number of inputs to one value.
MakeNetwork = Callable[[int, Key[Array, ""]], MLP]
#: A per-sample loss of ``(value, old value, target)``.
ValueLoss = Callable[[Array, Array, Array], Array]


class Outcome(NamedTuple):
    """What a batch brought, as critics see it; all ``[T, N]``.

    Attributes:
        reward: rewards as they are learned from (scaled).
        value: values before each step.
        next_value: values after each step, before any restart.
        terminated: where the task ended.
        truncated: where the episode was cut.
        scale: turns an unscaled part of the reward into the units of `reward`.
        experience: the whole batch.
    """

    reward: Float[Array, "T N"]
    value: Float[Array, "T N"]
    next_value: Float[Array, "T N"]
    terminated: Bool[Array, "T N"]
    truncated: Bool[Array, "T N"]
    scale: Callable[[Array], Array]
    experience: Experience


class Examples(NamedTuple):
    """What a critic regresses on, one row a step.

    Attributes:
        inputs: what its networks read.
        value: values when the batch was collected.
        target: what they should have been, in the critic's own form.
    """

    inputs: PyTree
    value: Float[Array, "..."]
    target: PyTree


class Critic(eqx.Module):
    """Estimates values. Its networks are kept, as one PyTree, in the state of the method that uses it."""

    #: Abilities that the environment must have.
    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def init(self, size: int, make: MakeNetwork, key: Key[Array, ""]) -> PyTree:
        """Fresh networks for inputs of `size` numbers: the features and, if the actor has one, its memory."""

    @abc.abstractmethod
    def value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        """The value of what is seen."""

    def read(self, preprocess: Preprocess, experience: Experience) -> PyTree:
        """What the critic needs of each step beyond features and memory, leaves ``[T, N, ...]``; nothing as a rule."""
        del preprocess, experience
        return ()

    @abc.abstractmethod
    def estimate(
        self,
        network: PyTree,
        read: PyTree,
        outcome: Outcome,
        gamma: Float[Array, ""] | float,
        lam: Float[Array, ""] | float,
    ) -> tuple[Float[Array, "T N"], PyTree]:
        """``(advantage, target)`` of every step.

        Args:
            network: the critic's networks.
            read: from :meth:`read`.
            outcome: what the batch brought.
            gamma: discount.
            lam: trace parameter.
        """

    @abc.abstractmethod
    def error(self, network: PyTree, examples: Examples, loss: ValueLoss) -> Float[Array, "..."]:
        """Loss of every row; the examples' inputs are ``(vector, read)``."""


class StateCritic(Critic):
    """One network from what is seen to its value; generalized advantages (Schulman et al., 2016, arXiv:1506.02438)."""

    def init(self, size: int, make: MakeNetwork, key: Key[Array, ""]) -> MLP:
        return make(size, key)

    def value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        return network(vector)[..., 0]

    def estimate(
        self,
        network: PyTree,
        read: PyTree,
        outcome: Outcome,
        gamma: Float[Array, ""] | float,
        lam: Float[Array, ""] | float,
    ) -> tuple[Float[Array, "T N"], PyTree]:
        return returns.gae(
            outcome.reward, outcome.value, outcome.next_value, outcome.terminated, outcome.truncated, gamma, lam
        )

    def error(self, network: PyTree, examples: Examples, loss: ValueLoss) -> Float[Array, "..."]:
        return loss(self.value(network, examples.inputs[0]), examples.value, examples.target)


class NoCritic(StateCritic):
    """No values at all: with a trace parameter of one, advantages are discounted returns, cut where episodes are."""

    def init(self, size: int, make: MakeNetwork, key: Key[Array, ""]) -> PyTree:
        return ()

    def value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        return jnp.zeros(vector.shape[:-1], vector.dtype)

    def error(self, network: PyTree, examples: Examples, loss: ValueLoss) -> Float[Array, "..."]:
        return jnp.zeros_like(examples.value)
