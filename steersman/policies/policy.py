"""The one protocol: a policy maps what has been observed to an action."""

# Annotations are evaluated here: Equinox does not recognize a stringified AbstractVar, and would make a field of it.

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.errors import InputTypeError
from steersman.policies.heads import Head

if TYPE_CHECKING:
    import numpyro.distributions


class Policy(eqx.Module):
    """Maps an observation and a memory to an action and the next memory.

    Unbatched: one observation in, one action out; callers ``vmap``. A policy is a PyTree, so it passes through
    ``jit``, ``vmap`` and ``grad``, and is saved as arrays plus a description.
    """

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The memory before the first observation of an episode; empty unless a policy has one."""
        del key
        return ()

    @abc.abstractmethod
    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        """Acts.

        Args:
            observation: one observation, as the environment's observation space says.
            carry: the memory, from :meth:`init` or the last call.
            key: randomness for this call; a deterministic policy ignores it.

        Returns:
            The action, as the environment's action space says, and the next memory.
        """

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, PyTree]:
        """Acts, and reports what only the acting policy knows.

        Returns:
            ``(action, carry, record)``; the record is stored with the experience and is empty unless a policy has
            something to say (see :class:`StochasticPolicy`).
        """
        action, carry = self(observation, carry, key)
        return action, carry, ()

    def mode(self) -> "Policy":
        """This policy with its own exploration switched off; itself where there is none."""
        return self


class Record(eqx.Module):
    """What a stochastic policy knew when it acted, which later estimates need.

    Attributes:
        action: the sample as the distribution gave it, before bounds were applied. Likelihoods are of this value.
        log_prob: its log-density or log-probability.
        parameters: the parameters of the distribution it was drawn from.
    """

    action: PyTree
    log_prob: Float[Array, "..."]
    parameters: PyTree


class StochasticPolicy(Policy):
    """A policy with a tractable likelihood.

    Subclasses give :meth:`parameters` and a ``head``, the family of distributions they parametrize.
    """

    head: eqx.AbstractVar[Head]

    @abc.abstractmethod
    def parameters(self, observation: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
        """The parameters of the action distribution at `observation`, and the next memory."""

    def distribution(self, observation: PyTree, carry: PyTree) -> "numpyro.distributions.Distribution":
        """The action distribution as a NumPyro distribution (over actions before bounds are applied)."""
        return self.head.distribution(self.parameters(observation, carry)[0])

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, Record]:
        parameters, carry = self.parameters(observation, carry)
        sample = self.head.sample(parameters, key)
        record = Record(sample, self.head.log_prob(parameters, sample), parameters)
        return self.head.to_action(sample), carry, record

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        parameters, carry = self.parameters(observation, carry)
        return self.head.to_action(self.head.sample(parameters, key)), carry

    def mode(self) -> "Policy":
        return Mode(self)


class Mode(Policy):
    """The most likely action of a stochastic policy (for a Gaussian, its mean)."""

    policy: StochasticPolicy

    def init(self, key: Key[Array, ""]) -> PyTree:
        return self.policy.init(key)

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        del key
        parameters, carry = self.policy.parameters(observation, carry)
        return self.policy.head.to_action(self.policy.head.mode(parameters)), carry


class Wrapper(Policy):
    """A policy around a policy. Whatever it does not change passes through."""

    policy: Policy

    def init(self, key: Key[Array, ""]) -> PyTree:
        return self.policy.init(key)

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        action, carry, _ = self.act(observation, carry, key)
        return action, carry

    @abc.abstractmethod
    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, PyTree]: ...

    def mode(self) -> "Policy":
        return eqx.tree_at(lambda wrapper: wrapper.policy, self, self.policy.mode())


def zero_element(space: Any) -> PyTree:
    """An all-zero element of a Gymnasium space, for memories that hold actions or observations.

    Every number is zero, also where the space's own bounds leave zero out.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {name: zero_element(part) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(zero_element(part) for part in space.spaces)
    if space.shape is None or space.dtype is None:
        raise InputTypeError(f"space is a {type(space).__name__}, whose elements are not arrays.")
    return jnp.zeros(space.shape, jax.dtypes.canonicalize_dtype(space.dtype))
