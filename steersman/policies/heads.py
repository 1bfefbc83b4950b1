"""Families of action distributions: sample, likelihood, entropy, divergence and Fisher information.

A head has no learned parts. Its ``parameters`` are arrays that a network puts out, so the same head serves a
network, a table and a mixture. All methods are unbatched on the event (sums over action dimensions) and broadcast
over leading axes.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jaxtyping import Array, Float, Int, Key, PyTree

from steersman.envs.spaces import describe
from steersman.errors import InputTypeError, require, require_count

if TYPE_CHECKING:
    import numpyro.distributions


class Head(eqx.Module):
    """A family of distributions over actions."""

    @property
    @abc.abstractmethod
    def output_size(self) -> int:
        """Number of floats that a network must put out for :meth:`from_output`."""

    @property
    def free_size(self) -> int:
        """Number of learned floats that do not depend on the observation (a state-free log-std)."""
        return 0

    @abc.abstractmethod
    def from_output(self, output: Float[Array, "... out"], free: Float[Array, " free"]) -> PyTree:
        """Distribution parameters from a network's output and the state-free learned floats."""

    @abc.abstractmethod
    def sample(self, parameters: PyTree, key: Key[Array, ""]) -> PyTree:
        """Draws one action, before bounds."""

    @abc.abstractmethod
    def mode(self, parameters: PyTree) -> PyTree:
        """The most likely action, before bounds."""

    @abc.abstractmethod
    def log_prob(self, parameters: PyTree, action: PyTree) -> Float[Array, "..."]:
        """Joint log-density of `action` (as sampled, before bounds)."""

    @abc.abstractmethod
    def entropy(self, parameters: PyTree) -> Float[Array, "..."]:
        """Entropy in nats."""

    @abc.abstractmethod
    def kl(self, old: PyTree, new: PyTree) -> Float[Array, "..."]:
        """``KL(old || new)`` in nats."""

    def kl_parts(self, old: PyTree, new: PyTree) -> tuple[Float[Array, "..."], ...]:
        """The divergence in parts that can be bounded apart, each zero where its part of the parameters is equal."""
        return (self.kl(old, new),)

    @abc.abstractmethod
    def fisher_product(self, parameters: PyTree, tangent: PyTree) -> PyTree:
        """Fisher information at `parameters` times `tangent`: the Hessian of the divergence at equality."""

    @abc.abstractmethod
    def distribution(self, parameters: PyTree) -> numpyro.distributions.Distribution:
        """The same distribution as a NumPyro object."""

    def to_action(self, sample: PyTree) -> PyTree:
        """What is sent to the environment for a sample."""
        return sample

    def mask(self, parameters: PyTree, allowed: PyTree) -> PyTree:
        """Parameters with the disallowed actions ruled out."""
        del parameters, allowed
        raise InputTypeError(f"action_mask was given, but {type(self).__name__} has no discrete actions to mask.")


def _pick(log_probs: Float[Array, "... n"], index: Int[Array, "..."]) -> Float[Array, "..."]:
    # A gather's gradient is a scatter, which is slow on CPU: for small n a masked sum is several times faster.
    if log_probs.shape[-1] <= 64:
        chosen = jnp.arange(log_probs.shape[-1]) == index[..., None]
        return jnp.sum(jnp.where(chosen, log_probs, 0.0), axis=-1)
    return jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]


def _finite(logits: Float[Array, "... n"]) -> Float[Array, "... n"]:
    # NumPyro refuses infinite logits; the smallest finite number gives a masked action probability zero too.
    return jnp.maximum(logits, jnp.finfo(logits.dtype).min)


class Categorical(Head):
    """A distribution over ``num_actions`` discrete actions; parameters are unnormalized logits.

    Attributes:
        num_actions: how many actions there are.
        start: the number of the first action.
    """

    num_actions: int = eqx.field(static=True)
    start: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        require_count("num_actions", self.num_actions)

    @property
    def output_size(self) -> int:
        return self.num_actions

    def from_output(self, output: Float[Array, "... out"], free: Float[Array, " free"]) -> Float[Array, "... n"]:
        del free
        return output

    def sample(self, parameters: Float[Array, "... n"], key: Key[Array, ""]) -> Int[Array, "..."]:
        return jax.random.categorical(key, parameters)

    def mode(self, parameters: Float[Array, "... n"]) -> Int[Array, "..."]:
        return jnp.argmax(parameters, axis=-1)

    def log_prob(self, parameters: Float[Array, "... n"], action: Int[Array, "..."]) -> Float[Array, "..."]:
        return _pick(jax.nn.log_softmax(parameters), jnp.asarray(action))

    def entropy(self, parameters: Float[Array, "... n"]) -> Float[Array, "..."]:
        log_probs = jax.nn.log_softmax(parameters)
        probs = jnp.exp(log_probs)
        # A masked action has probability zero and log-probability minus infinity; its product is taken as zero.
        return -jnp.sum(jnp.where(probs > 0, probs * jnp.where(probs > 0, log_probs, 0.0), 0.0), axis=-1)

    def kl(self, old: Float[Array, "... n"], new: Float[Array, "... n"]) -> Float[Array, "..."]:
        old_log, new_log = jax.nn.log_softmax(old), jax.nn.log_softmax(new)
        old_prob = jnp.exp(old_log)
        difference = jnp.where(old_prob > 0, old_log - new_log, 0.0)
        return jnp.sum(old_prob * difference, axis=-1)

    def fisher_product(self, parameters: Float[Array, "... n"], tangent: Float[Array, "... n"]) -> Array:
        probs = jax.nn.softmax(parameters)
        return probs * (tangent - jnp.sum(probs * tangent, axis=-1, keepdims=True))

    def distribution(self, parameters: Float[Array, "... n"]) -> numpyro.distributions.Distribution:
        import numpyro.distributions

        return numpyro.distributions.CategoricalLogits(logits=_finite(parameters))

    def to_action(self, sample: Int[Array, "..."]) -> Int[Array, "..."]:
        return sample + self.start if self.start else sample

    def mask(self, parameters: Float[Array, "... n"], allowed: PyTree) -> Float[Array, "... n"]:
        return jnp.where(jnp.asarray(allowed, bool), parameters, -jnp.inf)


class MultiCategorical(Head):
    """Independent categorical choices; parameters are the logits of all of them, concatenated.

    Attributes:
        sizes: number of choices in each place.
        shape: shape of one action.
        start: number of the first choice in each place, or None where all are zero.
    """

    sizes: tuple[int, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    start: tuple[int, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        require(len(self.sizes) > 0, "sizes", self.sizes, "at least one number of choices")
        for size in self.sizes:
            require_count("sizes", size)
        places = len(self.sizes)
        require(math.prod(self.shape) == places, "shape", self.shape, f"a shape of {places} places, one for each size")
        require(self.start is None or len(self.start) == places, "start", self.start, f"{places} numbers, or None")

    @property
    def output_size(self) -> int:
        return sum(self.sizes)

    def _parts(self, parameters: Array) -> list[Array]:
        return jnp.split(parameters, np.cumsum(self.sizes)[:-1].tolist(), axis=-1)

    def _heads(self) -> list[Categorical]:
        return [Categorical(size) for size in self.sizes]

    def from_output(self, output: Float[Array, "... out"], free: Float[Array, " free"]) -> Float[Array, "... out"]:
        del free
        return output

    def sample(self, parameters: Float[Array, "... out"], key: Key[Array, ""]) -> Int[Array, "..."]:
        keys = jax.random.split(key, len(self.sizes))
        parts = [jax.random.categorical(k, p) for k, p in zip(keys, self._parts(parameters), strict=True)]
        return self._join(parts)

    def mode(self, parameters: Float[Array, "... out"]) -> Int[Array, "..."]:
        return self._join([jnp.argmax(part, axis=-1) for part in self._parts(parameters)])

    def _join(self, parts: list[Array]) -> Array:
        joined = jnp.stack(parts, axis=-1)
        return joined.reshape(joined.shape[:-1] + self.shape)

    def _flat(self, action: Array) -> Array:
        action = jnp.asarray(action)
        leading = action.shape[: action.ndim - len(self.shape)]
        return action.reshape((*leading, len(self.sizes)))

    def log_prob(self, parameters: Float[Array, "... out"], action: Int[Array, "..."]) -> Float[Array, "..."]:
        flat = self._flat(action)
        terms = [_pick(jax.nn.log_softmax(p), flat[..., i]) for i, p in enumerate(self._parts(parameters))]
        return sum(terms[1:], terms[0])

    def entropy(self, parameters: Float[Array, "... out"]) -> Float[Array, "..."]:
        terms = [h.entropy(p) for h, p in zip(self._heads(), self._parts(parameters), strict=True)]
        return sum(terms[1:], terms[0])

    def kl(self, old: Float[Array, "... out"], new: Float[Array, "... out"]) -> Float[Array, "..."]:
        parts = zip(self._heads(), self._parts(old), self._parts(new), strict=True)
        terms = [head.kl(o, n) for head, o, n in parts]
        return sum(terms[1:], terms[0])

    def fisher_product(self, parameters: Float[Array, "... out"], tangent: Float[Array, "... out"]) -> Array:
        parts = zip(self._heads(), self._parts(parameters), self._parts(tangent), strict=True)
        return jnp.concatenate([head.fisher_product(p, t) for head, p, t in parts], axis=-1)

    def distribution(self, parameters: Float[Array, "... out"]) -> numpyro.distributions.Distribution:
        import numpyro.distributions

        # Padding with impossible choices makes the places equally wide, so that one distribution holds them all.
        width = max(self.sizes)
        padded = [
            jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, width - p.shape[-1])], constant_values=-jnp.inf)
            for p in self._parts(parameters)
        ]
        logits = _finite(jnp.stack(padded, axis=-2))
        logits = logits.reshape((*logits.shape[:-2], *self.shape, width))
        return numpyro.distributions.CategoricalLogits(logits=logits).to_event(len(self.shape))

    def to_action(self, sample: Int[Array, "..."]) -> Int[Array, "..."]:
        return sample if self.start is None else sample + jnp.asarray(self.start).reshape(self.shape)

    def mask(self, parameters: Float[Array, "... out"], allowed: PyTree) -> Float[Array, "... out"]:
        # Gymnasium gives one mask for each place; a concatenated one is taken as it is.
        if isinstance(allowed, (tuple, list)):
            allowed = jnp.concatenate([jnp.asarray(part, bool) for part in allowed], axis=-1)
        return jnp.where(jnp.asarray(allowed, bool), parameters, -jnp.inf)


class GaussianParameters(NamedTuple):
    """Mean and log standard deviation of a diagonal Gaussian, each ``[..., D]``."""

    mean: Float[Array, "... D"]
    log_std: Float[Array, "... D"]


_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_QUADRATURE_NODES = 16


class _Continuous(Head):
    """What the Gaussian families share: the box, and its map from ``[-1, 1]``."""

    shape: tuple[int, ...] = eqx.field(static=True)
    low: tuple[float, ...] | None = eqx.field(static=True, default=None)
    high: tuple[float, ...] | None = eqx.field(static=True, default=None)
    #: log-std from the network instead of a learned vector that is the same at every observation.
    state_dependent_std: bool = eqx.field(static=True, default=False, kw_only=True)

    @property
    def dimension(self) -> int:
        return math.prod(self.shape)

    @property
    def output_size(self) -> int:
        return self.dimension * (2 if self.state_dependent_std else 1)

    @property
    def free_size(self) -> int:
        return 0 if self.state_dependent_std else self.dimension

    def from_output(self, output: Float[Array, "... out"], free: Float[Array, " free"]) -> GaussianParameters:
        if self.state_dependent_std:
            mean, log_std = jnp.split(output, 2, axis=-1)
            return GaussianParameters(mean, log_std)
        return GaussianParameters(output, jnp.broadcast_to(free, output.shape))

    def __check_init__(self) -> None:
        bounds = (self.low, self.high)
        require((self.low is None) == (self.high is None), "low and high", bounds, "both given or both None")
        if self.low is None or self.high is None:
            return
        sizes = (len(self.low), len(self.high))
        require(sizes == (self.dimension,) * 2, "low and high", bounds, f"{self.dimension} numbers each")
        ordered = all(low <= high for low, high in zip(self.low, self.high, strict=True))
        require(ordered, "low and high", bounds, "ordered, low at or below high everywhere")

    def _scale(self, unit: Float[Array, "... D"]) -> Float[Array, "..."]:
        if self.low is not None and self.high is not None:
            low, high = np.asarray(self.low), np.asarray(self.high)
            bounded = np.isfinite(low) & np.isfinite(high)
            centre, half = np.zeros(self.dimension), np.ones(self.dimension)
            centre[bounded] = 0.5 * low[bounded] + 0.5 * high[bounded]
            half[bounded] = 0.5 * high[bounded] - 0.5 * low[bounded]
            unit = jnp.asarray(centre, unit.dtype) + jnp.asarray(half, unit.dtype) * unit
            # Clipped last, because the affine map rounds and can leave the box by one unit in the last place.
            unit = jnp.clip(unit, jnp.asarray(low, unit.dtype), jnp.asarray(high, unit.dtype))
        return unit.reshape(unit.shape[:-1] + self.shape)


class DiagonalGaussian(_Continuous):
    """Independent normal distributions; parameters are :class:`GaussianParameters`.

    Where an action is bounded on both sides, ``[-1, 1]`` is mapped onto its interval; what falls outside a bound is
    clipped on its way to the environment. Likelihoods are of the sample before clipping.
    """

    def sample(self, parameters: GaussianParameters, key: Key[Array, ""]) -> Float[Array, "... D"]:
        noise = jax.random.normal(key, parameters.mean.shape, parameters.mean.dtype)
        return parameters.mean + jnp.exp(parameters.log_std) * noise

    def mode(self, parameters: GaussianParameters) -> Float[Array, "... D"]:
        return parameters.mean

    def log_prob(self, parameters: GaussianParameters, action: Float[Array, "... D"]) -> Float[Array, "..."]:
        standardized = (action - parameters.mean) * jnp.exp(-parameters.log_std)
        return jnp.sum(-0.5 * standardized**2 - parameters.log_std - _LOG_SQRT_2PI, axis=-1)

    def entropy(self, parameters: GaussianParameters) -> Float[Array, "..."]:
        return jnp.sum(parameters.log_std + 0.5 + _LOG_SQRT_2PI, axis=-1)

    def kl(self, old: GaussianParameters, new: GaussianParameters) -> Float[Array, "..."]:
        variance_ratio = jnp.exp(2.0 * (old.log_std - new.log_std))
        distance = ((old.mean - new.mean) * jnp.exp(-new.log_std)) ** 2
        return jnp.sum(new.log_std - old.log_std + 0.5 * (variance_ratio + distance - 1.0), axis=-1)

    def kl_parts(self, old: GaussianParameters, new: GaussianParameters) -> tuple[Array, Array]:
        """Divergence of the means under the old covariance, and of the covariances (arXiv:1909.12238, section 4)."""
        mean = 0.5 * jnp.sum(((old.mean - new.mean) * jnp.exp(-old.log_std)) ** 2, axis=-1)
        log_ratio = old.log_std - new.log_std
        return mean, jnp.sum(0.5 * (jnp.exp(2.0 * log_ratio) - 1.0) - log_ratio, axis=-1)

    def fisher_product(self, parameters: GaussianParameters, tangent: GaussianParameters) -> GaussianParameters:
        return GaussianParameters(tangent.mean * jnp.exp(-2.0 * parameters.log_std), 2.0 * tangent.log_std)

    def distribution(self, parameters: GaussianParameters) -> numpyro.distributions.Distribution:
        import numpyro.distributions

        return numpyro.distributions.Normal(parameters.mean, jnp.exp(parameters.log_std)).to_event(1)

    def to_action(self, sample: Float[Array, "... D"]) -> Float[Array, "..."]:
        return self._scale(sample)


class TanhGaussian(_Continuous):
    """A diagonal Gaussian squashed by tanh onto a bounded box.

    Samples and likelihoods are of the value *before* the tanh, so that a ratio never needs an inverse; the change of
    variables is part of ``log_prob``, which is the density of the squashed value in ``(-1, 1)``. The entropy is that
    of the squashed value too: the Gaussian's plus the mean log-derivative, which has no closed form and is integrated
    by Gauss-Hermite quadrature: to 2e-5 nats per dimension up to a std of 1, to 4e-3 up to 2.
    """

    def __check_init__(self) -> None:
        if self.low is not None and self.high is not None:
            finite = bool(np.all(np.isfinite(self.low)) and np.all(np.isfinite(self.high)))
            require(finite, "low and high", (self.low, self.high), "finite for a TanhGaussian")

    def _gaussian(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.shape)

    @staticmethod
    def _log_derivative(value: Float[Array, "... D"]) -> Float[Array, "..."]:
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), which neither overflows nor loses digits.
        return jnp.sum(2.0 * (math.log(2.0) - value - jax.nn.softplus(-2.0 * value)), axis=-1)

    def sample(self, parameters: GaussianParameters, key: Key[Array, ""]) -> Float[Array, "... D"]:
        return self._gaussian().sample(parameters, key)

    def mode(self, parameters: GaussianParameters) -> Float[Array, "... D"]:
        return parameters.mean

    def log_prob(self, parameters: GaussianParameters, action: Float[Array, "... D"]) -> Float[Array, "..."]:
        return self._gaussian().log_prob(parameters, action) - self._log_derivative(action)

    def entropy(self, parameters: GaussianParameters) -> Float[Array, "..."]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)
        mean, std = parameters.mean[..., None, :], jnp.exp(parameters.log_std)[..., None, :]
        values = self._log_derivative(mean + std * jnp.asarray(nodes[:, None], mean.dtype))
        expected = jnp.sum(values * jnp.asarray(weights / weights.sum(), mean.dtype), axis=-1)
        return self._gaussian().entropy(parameters) + expected

    def kl(self, old: GaussianParameters, new: GaussianParameters) -> Float[Array, "..."]:
        # The divergence does not change under an invertible map of the samples.
        return self._gaussian().kl(old, new)

    def kl_parts(self, old: GaussianParameters, new: GaussianParameters) -> tuple[Array, Array]:
        return self._gaussian().kl_parts(old, new)

    def fisher_product(self, parameters: GaussianParameters, tangent: GaussianParameters) -> GaussianParameters:
        return self._gaussian().fisher_product(parameters, tangent)

    def distribution(self, parameters: GaussianParameters) -> numpyro.distributions.Distribution:
        return self._gaussian().distribution(parameters)

    def to_action(self, sample: Float[Array, "... D"]) -> Float[Array, "..."]:
        return self._scale(jnp.tanh(sample))


def head_for(space: gymnasium.Space, **options: Any) -> Head:
    """The usual head for an action space: categorical for discrete, diagonal Gaussian for a box of floats.

    Args:
        space: a Gymnasium action space.
        **options: passed to the Gaussian head, for example ``state_dependent_std=True``.

    Raises:
        InputTypeError: no head here covers the space.
    """
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in np.ravel(space.nvec))
        start = tuple(int(n) for n in np.ravel(space.start))
        return MultiCategorical(sizes, tuple(space.shape), start if any(start) else None)
    if isinstance(space, spaces.MultiBinary):
        shape = tuple(space.shape)
        return MultiCategorical((2,) * math.prod(shape), shape)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        low, high = np.ravel(space.low), np.ravel(space.high)
        if np.any(np.isfinite(low)) or np.any(np.isfinite(high)):
            return DiagonalGaussian(tuple(space.shape), tuple(low.tolist()), tuple(high.tolist()), **options)
        return DiagonalGaussian(tuple(space.shape), **options)
    raise InputTypeError(
        f"action space is {describe(space)}, but a policy head exists only for Discrete, MultiDiscrete, MultiBinary "
        "and Box-of-floats spaces."
    )
