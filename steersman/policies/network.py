"""Policies whose distribution parameters come from a neural network."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.networks import MLP, orthogonal
from steersman.policies.heads import Head
from steersman.policies.policy import StochasticPolicy
from steersman.policies.preprocessing import Features, Preprocess


class ActorNetwork(eqx.Module):
    """From a feature vector (and a memory) to distribution parameters: the learned part of a policy.

    Attributes:
        unrolled: whether what it puts out depends on the parameters through earlier steps too, so that a gradient
            needs whole sequences. Where it is False, the recorded memory of a step is all that the step depends on,
            and calls broadcast over leading axes.
    """

    unrolled: ClassVar[bool] = False

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The memory before an episode's first step."""
        del key
        return ()

    @abc.abstractmethod
    def __call__(self, features: Float[Array, "... D"], carry: PyTree) -> tuple[PyTree, PyTree]:
        """``(output, carry)``, where the head reads `output`."""


class FeedForward(ActorNetwork):
    """A multilayer perceptron without memory."""

    trunk: MLP

    def __call__(self, features: Float[Array, "... D"], carry: PyTree) -> tuple[PyTree, PyTree]:
        return self.trunk(features), carry


class Recurrent(ActorNetwork):
    """A gated recurrent unit (Cho et al., 2014, arXiv:1406.1078) and a linear layer that reads its state."""

    unrolled: ClassVar[bool] = True

    cell: eqx.nn.GRUCell
    readout: Float[Array, "hidden out"]
    bias: Float[Array, " out"]

    def __init__(self, input_size: int, output_size: int, hidden: int, *, output_gain: float, key: Key[Array, ""]):
        cell_key, readout_key = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(input_size, hidden, key=cell_key)
        self.readout = orthogonal(readout_key, (hidden, output_size), output_gain)
        self.bias = jnp.zeros(output_size)

    def init(self, key: Key[Array, ""]) -> Float[Array, " hidden"]:
        del key
        return jnp.zeros(self.cell.hidden_size)

    def __call__(self, features: Float[Array, " D"], carry: Float[Array, " hidden"]) -> tuple[Array, Array]:
        carry = self.cell(features, carry)
        return carry @ self.readout + self.bias, carry


class NetworkPolicy(StochasticPolicy):
    """Preprocessing, a network, and a head that reads the network's output.

    Attributes:
        preprocess: flattens and standardizes the observation; not learned by gradients.
        network: the learned map.
        free: learned numbers that no observation changes (a state-free log-std).
        head: the family of action distributions.
    """

    preprocess: Preprocess
    network: ActorNetwork
    free: Float[Array, " free"]
    head: Head

    @property
    def unrolled(self) -> bool:
        """Whether its likelihood must be unrolled through time (:class:`ActorNetwork`)."""
        return self.network.unrolled

    def init(self, key: Key[Array, ""]) -> PyTree:
        return self.network.init(key)

    def remember(self, features: Features, carry: PyTree, sample: PyTree) -> PyTree:
        """The memory after a step on which `sample` was drawn."""
        del sample
        return self.from_features(features, carry)[1]

    def from_features(self, features: Features, carry: PyTree) -> tuple[PyTree, PyTree]:
        """Distribution parameters from an already preprocessed observation."""
        output, carry = self.network(features.vector, carry)
        parameters = self.head.from_output(output, self.free)
        if features.allowed is not None:
            parameters = self.head.mask(parameters, features.allowed)
        return parameters, carry

    def parameters_for(self, features: Features, carry: PyTree, sample: PyTree) -> PyTree:
        """Distribution parameters as the likelihood of `sample` needs them; for most policies they ignore it.

        A policy that has only a substitute for its likelihood, worked out from what it recorded beside its action,
        answers here with the numbers that its head makes the substitute of. Broadcasts over leading axes.
        """
        del sample
        return self.from_features(features, carry)[0]

    def parameters(self, observation: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
        return self.from_features(self.preprocess(observation), carry)


class Architecture(eqx.Module):
    """Makes policies for whatever spaces a problem has: the policy class that an algorithm trains."""

    #: Whether the policies' likelihoods must be unrolled through time (:class:`ActorNetwork`).
    unrolled: ClassVar[bool] = False

    @abc.abstractmethod
    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        """A fresh policy for a preprocessing and a family of action distributions.

        Args:
            preprocess: how observations become vectors.
            head: the family of action distributions.
            initial_log_std: start of a state-free log standard deviation of the actions.
            key: randomness of the initialization.
        """


def make_policy(
    preprocess: Preprocess,
    head: Head,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    memory: int = 0,
    initial_log_std: float = 0.0,
    key: Key[Array, ""],
) -> NetworkPolicy:
    """A fresh network policy for a preprocessing and a head.

    Args:
        preprocess: how observations become vectors.
        head: the family of action distributions.
        hidden: widths of the hidden layers (without memory).
        activation: the nonlinearity (without memory).
        memory: width of a recurrent state; 0 makes a feed-forward policy.
        initial_log_std: start of a state-free log standard deviation.
        key: randomness of the initialization.
    """
    if memory:
        network = Recurrent(preprocess.size, head.output_size, memory, output_gain=0.01, key=key)
    else:
        trunk = MLP(preprocess.size, head.output_size, hidden, activation, output_gain=0.01, key=key)
        network = FeedForward(trunk)
    free = jnp.full(head.free_size, initial_log_std, jnp.result_type(float))
    return NetworkPolicy(preprocess=preprocess, network=network, free=free, head=head)
