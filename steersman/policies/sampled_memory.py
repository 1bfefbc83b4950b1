"""Policies that sample their next memory like an action (Al-Hafez et al., ICLR 2024, arXiv:2311.04082).

``pi(action, next memory | observation, memory)`` is one distribution. Together with the environment's state the memory
is a state, and together with the action the next memory is an action, of a Markov decision process. So a recorded
memory is data, every derivative is that of a single step, and whatever trains a policy without memory trains these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputError, InputTypeError, require, require_count, require_number, unknown_name
from steersman.networks import MLP, orthogonal
from steersman.networks.mlp import ACTIVATIONS
from steersman.policies.heads import (
    Categorical,
    DiagonalGaussian,
    GaussianParameters,
    Head,
    MultiCategorical,
    TanhGaussian,
)
from steersman.policies.network import ActorNetwork, Architecture, NetworkPolicy, make_policy
from steersman.policies.policy import Record
from steersman.policies.preprocessing import Features, Preprocess

if TYPE_CHECKING:
    import numpyro.distributions

#: Bounds of the memory's log standard deviation, as in the authors' code.
LOG_STD_BOUNDS = (-20.0, 2.0)

_MEMORY_NOISE = 0x6D656D


class MemoryCarry(NamedTuple):
    """What a policy with a sampled memory carries.

    Attributes:
        memory: the memory as it was sampled ``[..., d]``.
        action: the last action as floats ``[..., a]``, zeros before the first; empty where the policy reads none.
    """

    memory: Float[Array, "... d"]
    action: Float[Array, "... a"]


class JointParameters(NamedTuple):
    """Parameters of the action's distribution, and of the next memory's."""

    action: PyTree
    memory: GaussianParameters


class JointSample(NamedTuple):
    """An action, before bounds, and the next memory that was drawn with it."""

    action: PyTree
    memory: Float[Array, "... d"]


class JointHead(Head):
    """A family over pairs of an action and the next memory, independent given what the policy saw.

    Likelihoods, entropies and divergences are sums over the two, so that a ratio is the product of the two ratios and
    a surrogate clips it once. The memory is a diagonal Gaussian whose log standard deviation depends on nothing.

    Attributes:
        action: the family of the actions.
        size: numbers in the memory ``d``.
        learn_std: whether state-free standard deviations are learned; they stay as they start where not.
    """

    action: Head
    size: int = eqx.field(static=True)
    learn_std: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        require_count("size", self.size, minimum=0)

    @property
    def _memory(self) -> DiagonalGaussian:
        return DiagonalGaussian((self.size,))

    @property
    def output_size(self) -> int:
        return self.action.output_size + self.size

    @property
    def free_size(self) -> int:
        return self.action.free_size + self.size

    def from_output(self, output: Float[Array, "... out"], free: Float[Array, " free"]) -> JointParameters:
        split, free_split = self.action.output_size, self.action.free_size
        free = free if self.learn_std else jax.lax.stop_gradient(free)
        mean = output[..., split:]
        log_std = jnp.broadcast_to(jnp.clip(free[free_split:], *LOG_STD_BOUNDS), mean.shape)
        action = self.action.from_output(output[..., :split], free[:free_split])
        return JointParameters(action, GaussianParameters(mean, log_std))

    def sample(self, parameters: JointParameters, key: Key[Array, ""]) -> JointSample:
        # The action draws from the key as it does without a memory, so that an empty memory changes nothing.
        noise = jax.random.fold_in(key, _MEMORY_NOISE)
        return JointSample(self.action.sample(parameters.action, key), self._memory.sample(parameters.memory, noise))

    def mode(self, parameters: JointParameters) -> JointSample:
        return JointSample(self.action.mode(parameters.action), parameters.memory.mean)

    def log_prob(self, parameters: JointParameters, action: JointSample) -> Float[Array, "..."]:
        memory = self._memory.log_prob(parameters.memory, action.memory)
        return self.action.log_prob(parameters.action, action.action) + memory

    def entropy(self, parameters: JointParameters) -> Float[Array, "..."]:
        return self.action.entropy(parameters.action) + self._memory.entropy(parameters.memory)

    def kl(self, old: JointParameters, new: JointParameters) -> Float[Array, "..."]:
        return self.action.kl(old.action, new.action) + self._memory.kl(old.memory, new.memory)

    def kl_parts(self, old: JointParameters, new: JointParameters) -> tuple[Float[Array, "..."], ...]:
        """Two parts, as a Gaussian has: by the means, to which a discrete action's belongs, and by the covariances."""
        action = self.action.kl_parts(old.action, new.action)
        mean, covariance = self._memory.kl_parts(old.memory, new.memory)
        return action[0] + mean, sum(action[1:], covariance)

    def fisher_product(self, parameters: JointParameters, tangent: JointParameters) -> JointParameters:
        return JointParameters(
            self.action.fisher_product(parameters.action, tangent.action),
            self._memory.fisher_product(parameters.memory, tangent.memory),
        )

    def distribution(self, parameters: JointParameters) -> numpyro.distributions.Distribution:
        """The distribution of the action alone."""
        return self.action.distribution(parameters.action)

    def to_action(self, sample: JointSample) -> PyTree:
        """The action; the memory stays with the policy."""
        return self.action.to_action(sample.action)

    def mask(self, parameters: JointParameters, allowed: PyTree) -> JointParameters:
        return parameters._replace(action=self.action.mask(parameters.action, allowed))


def action_size(head: Head) -> int:
    """Number of floats in :func:`action_features`.

    Raises:
        InputTypeError: nothing here knows how the family's actions become floats.
    """
    if isinstance(head, Categorical):
        return head.num_actions
    if isinstance(head, MultiCategorical):
        return sum(head.sizes)
    if isinstance(head, (DiagonalGaussian, TanhGaussian)):
        return head.dimension
    raise InputTypeError(
        f"previous_action is True, but it must be False for a {type(head).__name__}, whose actions have no known form "
        "as floats."
    )


def action_features(head: Head, sample: PyTree) -> Float[Array, "... a"]:
    """An action as a network reads it: one-hot where it is a choice, else within ``[-1, 1]`` where it is bounded.

    Args:
        head: the family that it comes from.
        sample: the action as sampled, before bounds; leading axes are kept.
    """
    if isinstance(head, Categorical):
        return jax.nn.one_hot(sample, head.num_actions)
    if isinstance(head, MultiCategorical):
        flat = sample.reshape((*sample.shape[: sample.ndim - len(head.shape)], len(head.sizes)))
        return jnp.concatenate([jax.nn.one_hot(flat[..., i], n) for i, n in enumerate(head.sizes)], axis=-1)
    if isinstance(head, TanhGaussian):
        return jnp.tanh(sample)
    assert isinstance(head, DiagonalGaussian)
    if head.low is None or head.high is None:
        return sample
    bounded = np.isfinite(head.low) & np.isfinite(head.high)
    return jnp.where(bounded, jnp.clip(sample, -1.0, 1.0), sample)


#: Makes a cell from the length of its input and the size of the memory; the cell maps ``(input, memory)`` to the mean
#: of the next memory, one step at a time.
MakeCell = Callable[[int, int, Key[Array, ""]], Callable[[Array, Array], Array]]


class AffineCell(eqx.Module):
    """``activation(W [input, memory] + b)``: a vanilla recurrent network, or a linear one.

    Attributes:
        weight: ``W`` ``[d, inputs + d]``.
        bias: ``b`` ``[d]``.
        activation: name of the nonlinearity, or None.
    """

    weight: Float[Array, "d inputs_plus_d"]
    bias: Float[Array, " d"]
    activation: str | None = eqx.field(static=True)

    def __init__(self, input_size: int, size: int, activation: str | None, key: Key[Array, ""]):
        self.weight = orthogonal(key, (size, input_size + size), 1.0)
        self.bias = jnp.zeros(size)
        self.activation = activation

    def __call__(self, inputs: Float[Array, " inputs"], memory: Float[Array, " d"]) -> Float[Array, " d"]:
        following = self.weight @ jnp.concatenate([inputs, memory]) + self.bias
        return following if self.activation is None else ACTIVATIONS[self.activation](following)


#: The cells by name: gated (Cho et al., 2014, arXiv:1406.1078), hyperbolic tangent, and linear.
CELLS: dict[str, MakeCell] = {
    "gru": lambda inputs, size, key: eqx.nn.GRUCell(inputs, size, key=key),
    "vanilla": lambda inputs, size, key: AffineCell(inputs, size, "tanh", key),
    "linear": lambda inputs, size, key: AffineCell(inputs, size, None, key),
}


class MemoryNetwork(ActorNetwork):
    """From features, memory and last action to what a head reads of the action, and the mean of the next memory.

    Calls broadcast over leading axes. The carry comes back as it went in: what follows it is not known before the
    sample is drawn.

    Attributes:
        size: numbers in the memory ``d``.
        action_size: numbers of the last action that are read.
    """

    size: int = eqx.field(static=True)
    action_size: int = eqx.field(static=True)

    def init(self, key: Key[Array, ""]) -> MemoryCarry:
        del key
        return MemoryCarry(jnp.zeros(self.size), jnp.zeros(self.action_size))


class CellNetwork(MemoryNetwork):
    """The authors' network: layers that read the observation and the last action, a cell, and a linear readout.

    The cell's output is the mean of the next memory; the action is read from that mean and from the observation's
    layers.

    Attributes:
        observe: layers that read the features, or None.
        recall: layers that read the last action, or None.
        cell: maps ``(input, memory)`` to the mean of the next memory.
        readout: what the head reads of the action.
        activation: the nonlinearity after the layers.
    """

    observe: MLP | None
    recall: MLP | None
    cell: Callable[[Array, Array], Array]
    readout: MLP
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        action_size: int,
        output_size: int,
        size: int,
        hidden: Sequence[int],
        activation: str,
        cell: MakeCell,
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 4)
        width = hidden[-1] if hidden else input_size
        self.observe = (
            MLP(input_size, width, hidden[:-1], activation, output_gain=math.sqrt(2.0), key=keys[0]) if hidden else None
        )
        self.recall = None
        recalled = action_size
        if hidden and action_size:
            recalled = width
            self.recall = MLP(action_size, width, (), activation, output_gain=math.sqrt(2.0), key=keys[1])
        self.cell = cell(width + recalled, size, keys[2])
        self.readout = MLP(width + size, output_size, (), activation, output_gain=0.01, key=keys[3])
        self.activation = activation
        self.size = size
        self.action_size = action_size

    def __call__(self, features: Float[Array, "... D"], carry: MemoryCarry) -> tuple[Array, MemoryCarry]:
        activation = ACTIVATIONS[self.activation]
        seen = features if self.observe is None else activation(self.observe(features))
        recalled = carry.action if self.recall is None else activation(self.recall(carry.action))
        mean = _batched(self.cell, jnp.concatenate([seen, recalled], axis=-1), carry.memory)
        action = self.readout(jnp.concatenate([seen, mean], axis=-1))
        return jnp.concatenate([action, mean], axis=-1), carry


class LinearKernel(MemoryNetwork):
    """``(action, next memory) = W [memory, features]``: a linear controller with internal state.

    Attributes:
        weight: ``W`` ``[outputs + d, d + D]``, the rows of the action first.
    """

    weight: Float[Array, "out d_plus_D"]

    def __call__(self, features: Float[Array, "... D"], carry: MemoryCarry) -> tuple[Array, MemoryCarry]:
        return jnp.concatenate([carry.memory, features], axis=-1) @ self.weight.T, carry


def _batched(cell: Callable[[Array, Array], Array], inputs: Array, memory: Array) -> Array:
    leading = inputs.shape[:-1]
    rows = jax.vmap(cell)(inputs.reshape(-1, inputs.shape[-1]), memory.reshape(-1, memory.shape[-1]))
    return rows.reshape((*leading, memory.shape[-1]))


class SampledMemoryPolicy(NetworkPolicy):
    """A policy whose next memory is sampled like an action.

    Its memory between steps is what was *sampled*; :meth:`parameters` gives the mean instead, which is what follows
    where nothing is sampled. :meth:`mode` therefore feeds the means of both, which runs the cell deterministically.

    Attributes:
        network: puts out what the head reads of the action, then the mean of the next memory.
        free: state-free numbers of the actions, then the memory's log standard deviation.
        head: a family over pairs of an action and the next memory.
    """

    head: JointHead  # pyright: ignore[reportIncompatibleVariableOverride]

    def remember(self, features: Features, carry: MemoryCarry, sample: JointSample) -> MemoryCarry:
        """The sampled memory and action, whatever was there before and whatever the parameters are."""
        del features
        if not carry.action.shape[-1]:
            return MemoryCarry(sample.memory, carry.action)
        return MemoryCarry(sample.memory, action_features(self.head.action, sample.action))

    def from_features(self, features: Features, carry: MemoryCarry) -> tuple[JointParameters, MemoryCarry]:
        """Parameters of the joint distribution, and what follows where the means are taken."""
        output, _ = self.network(features.vector, carry)
        parameters = self.head.from_output(output, self.free)
        if features.allowed is not None:
            parameters = self.head.mask(parameters, features.allowed)
        return parameters, self.remember(features, carry, self.head.mode(parameters))

    def act(self, observation: PyTree, carry: MemoryCarry, key: Key[Array, ""]) -> tuple[PyTree, MemoryCarry, Record]:
        features = self.preprocess(observation)
        parameters, _ = self.from_features(features, carry)
        sample = self.head.sample(parameters, key)
        record = Record(sample, self.head.log_prob(parameters, sample), parameters)
        return self.head.to_action(sample), self.remember(features, carry, sample), record

    def __call__(self, observation: PyTree, carry: MemoryCarry, key: Key[Array, ""]) -> tuple[PyTree, MemoryCarry]:
        action, carry, _ = self.act(observation, carry, key)
        return action, carry


class UnrolledMemory(ActorNetwork):
    """The same network with its memory deterministic, to be trained by backpropagation through time.

    Attributes:
        network: a network that reads no last action.
    """

    unrolled: ClassVar[bool] = True

    network: MemoryNetwork

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        return self.network.init(key).memory

    def __call__(self, features: Float[Array, "... D"], carry: Float[Array, "... d"]) -> tuple[Array, Array]:
        empty = jnp.zeros((*carry.shape[:-1], 0), carry.dtype)
        output, _ = self.network(features, MemoryCarry(carry, empty))
        split = output.shape[-1] - self.network.size
        return output[..., :split], output[..., split:]


class SampledMemory(Architecture):
    """Makes policies with a sampled memory around a recurrent cell.

    Without a memory (``size`` 0) it makes the feed-forward policy of the same layers.

    Attributes:
        size: numbers in the memory ``d``.
        hidden: widths of the layers before the cell; none hands observation and last action to the cell as they are.
        activation: their nonlinearity.
        cell: ``"gru"``, ``"vanilla"``, ``"linear"``, or a function of ``(input length, size, key)`` that makes a
            module from ``(input, memory)`` to the mean of the next memory, such as an oscillator integrated for one
            step.
        previous_action: whether the last action is read.
        initial_log_std: start of the memory's log standard deviation.
    """

    size: int = eqx.field(static=True)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(64,), converter=tuple)
    activation: str = eqx.field(static=True, default="relu")
    cell: str | MakeCell | Any = eqx.field(static=True, default="gru")
    previous_action: bool = eqx.field(static=True, default=True)
    initial_log_std: Float[Array, ""] | float = eqx.field(converter=jnp.asarray, default=math.log(0.5))

    def __check_init__(self) -> None:
        require_count("size", self.size, minimum=0)
        _check_log_std(self.initial_log_std)
        if isinstance(self.cell, str) and self.cell not in CELLS:
            raise unknown_name("cell", self.cell, CELLS)
        if not isinstance(self.cell, str) and not callable(self.cell):
            raise InputTypeError(f"cell is {self.cell!r}, but it must be a name or a function that makes a cell.")

    def _network(self, preprocess: Preprocess, head: Head, actions: int, key: Key[Array, ""]) -> CellNetwork:
        cell = CELLS[self.cell] if isinstance(self.cell, str) else self.cell
        size, outputs = preprocess.size, head.output_size
        return CellNetwork(size, actions, outputs, self.size, self.hidden, self.activation, cell, key=key)

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        if self.size == 0:
            policy = make_policy(preprocess, head, hidden=self.hidden, activation=self.activation, key=key)
            return eqx.tree_at(lambda p: p.free, policy, policy.free + initial_log_std)
        actions = action_size(head) if self.previous_action else 0
        network = self._network(preprocess, head, actions, key)
        return _sampled(preprocess, network, head, initial_log_std, self.initial_log_std)


class BackpropagatedMemory(SampledMemory):
    """Makes policies with the same network and a deterministic memory: the baseline of backpropagation through time.

    The last action is not read, as gradients would pass through it.

    Attributes:
        previous_action: False.
        initial_log_std: not used.
    """

    unrolled: ClassVar[bool] = True

    previous_action: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        require_count("size", self.size)
        if self.previous_action:
            raise InputError("previous_action is True, but it must be False where the memory is unrolled through time.")

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        network = UnrolledMemory(self._network(preprocess, head, 0, key))
        free = _free(head.free_size, initial_log_std)
        return NetworkPolicy(preprocess=preprocess, network=network, free=free, head=head)


def _optional_array(value: Any) -> Array | None:
    return None if value is None else jnp.asarray(value, jnp.result_type(float))


class LinearMemory(Architecture):
    """Makes linear-Gaussian kernels: ``action ~ N(C z + D o, s^2)``, ``z' ~ N(A z + B o, s_z^2)``.

    Attributes:
        size: numbers in the memory ``d``; 0 is linear feedback of the observation.
        initial_gain: scale of the matrix ``[[C, D], [A, B]]`` at the start, a random one with orthonormal rows or
            columns times this.
        initial_feedback: added to ``D`` at the start ``[m, D]``, such as a gain that stabilizes; none unless given.
        initial_log_std: start of the memory's log standard deviation.
        learn_std: whether the standard deviations of actions and memory are learned; they stay as they start where not.
    """

    size: int = eqx.field(static=True)
    initial_gain: Float[Array, ""] | float = eqx.field(converter=jnp.asarray, default=0.5)
    initial_feedback: Float[Array, "m D"] | None = eqx.field(converter=_optional_array, default=None)
    initial_log_std: Float[Array, ""] | float = eqx.field(converter=jnp.asarray, default=math.log(0.5))
    learn_std: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        require_count("size", self.size, minimum=0)
        require_number("initial_gain", self.initial_gain, at_least=0.0)
        if self.initial_feedback is not None:
            require_number("initial_feedback", self.initial_feedback)
        _check_log_std(self.initial_log_std)

    def _network(self, preprocess: Preprocess, head: Head, key: Key[Array, ""]) -> LinearKernel:
        shape = (head.output_size + self.size, self.size + preprocess.size)
        weight = self.initial_gain * orthogonal(key, shape, 1.0)
        if self.initial_feedback is not None:
            found, expected = self.initial_feedback.shape, (head.output_size, preprocess.size)
            require(found == expected, "initial_feedback's shape", found, f"{expected}")
            weight = weight.at[: head.output_size, self.size :].add(self.initial_feedback)
        return LinearKernel(size=self.size, action_size=0, weight=weight)

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        network = self._network(preprocess, head, key)
        return _sampled(preprocess, network, head, initial_log_std, self.initial_log_std, self.learn_std)


class BackpropagatedLinearMemory(LinearMemory):
    """Makes the same linear maps with a deterministic memory: ``action ~ N(C z + D o, s^2)``, ``z' = A z + B o``.

    Attributes:
        initial_log_std: not used.
    """

    unrolled: ClassVar[bool] = True

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        network = UnrolledMemory(self._network(preprocess, head, key))
        free = _free(head.free_size, initial_log_std)
        head = head if self.learn_std else JointHead(head, 0, learn_std=False)
        return NetworkPolicy(preprocess=preprocess, network=network, free=free, head=head)


def _free(size: int, value: Any) -> Float[Array, " free"]:
    return jnp.full(size, value, jnp.result_type(float))


def _sampled(
    preprocess: Preprocess,
    network: MemoryNetwork,
    head: Head,
    action_log_std: Any,
    memory_log_std: Any,
    learn_std: bool = True,
) -> SampledMemoryPolicy:
    free = jnp.concatenate([_free(head.free_size, action_log_std), _free(network.size, memory_log_std)])
    return SampledMemoryPolicy(
        preprocess=preprocess, network=network, free=free, head=JointHead(head, network.size, learn_std)
    )


def _check_log_std(value: Any) -> None:
    if not isinstance(value, Tracer) and bool(np.any(np.isneginf(np.asarray(value, np.float64)))):
        raise InputError(
            "initial_log_std is -inf, but it must be finite: a memory without noise has no likelihood. Make it "
            "deterministic with BackpropagatedMemory."
        )
    require_number("initial_log_std", value, at_least=LOG_STD_BOUNDS[0], at_most=LOG_STD_BOUNDS[1])
