"""The reference slot: which policy an update is held close to."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman.errors import require_number
from steersman.policies import Head
from steersman.training.averaging import Average, MovingAverage
from steersman.training.schedules import Continuous, scalar


class Reference(eqx.Module):
    """The policy that surrogates compare the new one with: here the behaviour policy, which collected the batch.

    Any other reference relabels a batch: with its own likelihoods and distribution parameters in place of the
    behaviour policy's, and advantages multiplied by the importance weight between the two. Every surrogate then
    works unchanged, as ``pi_reference / pi_behaviour * f(pi / pi_reference, A)``.
    """

    def init(self, learned: PyTree) -> PyTree:
        """The reference's own state, given the first trainable parameters."""
        del learned
        return ()

    def begin(self, state: PyTree, learned: PyTree) -> PyTree:
        """The state when a batch is about to be learned from."""
        del learned
        return state

    def track(self, state: PyTree, learned: PyTree) -> PyTree:
        """The state after one gradient step, given the parameters that it reached."""
        del learned
        return state

    def relabel(
        self, state: PyTree, rows: Any, learned: PyTree, parameters_of: Callable[..., PyTree], head: Head
    ) -> Any:
        """A minibatch as a surrogate should see it.

        Args:
            state: the reference's state.
            rows: the minibatch, with ``action``, ``log_prob``, ``parameters`` and ``advantage`` of each row.
            learned: the present trainable parameters.
            parameters_of: from trainable parameters to the distribution parameters at the rows, or at other rows given
                as a second argument.
            head: the family of distributions.
        """
        del state, learned, parameters_of, head
        return rows


class ProximalReference(Reference):
    """A reference that did not collect the data: the *proximal* policy (Hilton et al., 2022, arXiv:2110.00641).

    Steps are measured from it, while importance weights still correct for the behaviour policy. The weight is bounded
    so that ``pi / pi_behaviour`` is at most ``max_ratio``; the loss is then
    :func:`~steersman.objectives.decoupled_clipped` if the surrogate is the clip. A behaviour log-probability of minus
    infinity is left as it is, and training stops there.

    Attributes:
        max_ratio: bound on the importance weight of a sample, or None.
    """

    max_ratio: Continuous | None = scalar(100.0)

    def __check_init__(self) -> None:
        if self.max_ratio is not None:
            require_number("max_ratio", self.max_ratio, above=0.0)

    @abc.abstractmethod
    def proximal(self, state: PyTree) -> PyTree:
        """The trainable parameters of the proximal policy."""

    def weight(
        self, log_prob: Float[Array, "..."], reference: Float[Array, "..."], behaviour: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """What advantages are multiplied by: ``pi_reference / pi_behaviour``, bounded.

        Args:
            log_prob: under the present policy.
            reference: under the proximal policy.
            behaviour: under the behaviour policy.
        """
        if self.max_ratio is not None:
            nearest = log_prob - jnp.log(self.max_ratio)
            behaviour = jnp.where(jnp.isfinite(behaviour), jnp.maximum(behaviour, nearest), behaviour)
        return jnp.exp(reference - behaviour)

    def relabel(
        self, state: PyTree, rows: Any, learned: PyTree, parameters_of: Callable[..., PyTree], head: Head
    ) -> Any:
        proximal = self.proximal(state)

        def labelled(samples: Any, new: PyTree, parameters: PyTree) -> Any:
            log_prob = head.log_prob(parameters, samples.action)
            weight = self.weight(head.log_prob(new, samples.action), log_prob, samples.log_prob)
            return samples._replace(log_prob=log_prob, parameters=parameters, advantage=weight * samples.advantage)

        both = [parameters_of(parameters) for parameters in (learned, proximal)]
        relabelled = labelled(rows, *both)
        more = rows.alternatives
        if more is None:
            return relabelled
        if more.features is None:
            there = [jax.tree.map(lambda p, k: jnp.broadcast_to(p[:, None], k.shape), b, more.parameters) for b in both]
        else:
            elsewhere = rows._replace(features=more.features, carry=())
            there = [parameters_of(parameters, elsewhere) for parameters in (learned, proximal)]
        return relabelled._replace(alternatives=labelled(more, *there))


class MovingAverageReference(ProximalReference):
    """The policy whose parameters are the exponentially weighted mean of those after every gradient step.

    How far the policy may run ahead of it is then set by the decay, not by how many steps are made of one batch.

    Attributes:
        decay: of the mean, per gradient step; its iterates are ``decay / (1 - decay)`` steps old in the mean. At zero
            the reference is the newest policy itself.
    """

    decay: Continuous = scalar(8.0 / 9.0)

    def __check_init__(self) -> None:
        MovingAverage(self.decay)

    def init(self, learned: PyTree) -> Average:
        return MovingAverage(self.decay).init(learned)

    def track(self, state: Average, learned: PyTree) -> Average:
        return MovingAverage(self.decay).update(state, learned)

    def proximal(self, state: Average) -> PyTree:
        return state.value


class UpdateStart(ProximalReference):
    """The policy as it was when the update began. On fresh data that is the behaviour policy; on stale data it is not.

    Attributes:
        importance_weighted: whether advantages are weighted for the data being older. Without weights stale data are
            taken for the policy's own, a mistake that is here to be studied.
    """

    importance_weighted: bool = eqx.field(static=True, default=True)

    def init(self, learned: PyTree) -> PyTree:
        return learned

    def begin(self, state: PyTree, learned: PyTree) -> PyTree:
        return learned

    def proximal(self, state: PyTree) -> PyTree:
        return state

    def weight(
        self, log_prob: Float[Array, "..."], reference: Float[Array, "..."], behaviour: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        if not self.importance_weighted:
            return jnp.ones_like(behaviour)
        return super().weight(log_prob, reference, behaviour)
