"""Flow and diffusion policies for likelihood-ratio methods: denoising losses in the place of likelihoods."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.cloning import DenoiserRecipe, MLPRecipe
from steersman.diffusion.denoiser import NetworkDenoiser
from steersman.diffusion.losses import prediction_errors
from steersman.diffusion.predictions import check_prediction
from steersman.diffusion.processes import RectifiedFlow
from steersman.diffusion.samplers import FlowSolver, Sampler, sample
from steersman.errors import InputError, InputTypeError, require, require_count, require_number
from steersman.networks import OctaveTime
from steersman.policies import Architecture, DiagonalGaussian, Head, NetworkPolicy, Policy, Preprocess, Record
from steersman.policies.heads import TanhGaussian
from steersman.policies.network import ActorNetwork
from steersman.policies.preprocessing import Features


class FlowSample(NamedTuple):
    """An action, and the pairs of noise and level at which its losses are compared.

    Attributes:
        action: what the sampler ended in, before bounds or squashing ``[..., H, D]``.
        noise: standard normal ``[..., N, H, D]``.
        level: as the noise process draws them ``[..., N]``.
    """

    action: Float[Array, "... H D"]
    noise: Float[Array, "... N H D"]
    level: Array


class FlowHead(Head):
    """Minus the denoising losses of an action in the place of its log-probability (arXiv:2507.21053, section 4).

    The parameters at a sample are its losses ``[..., N]``. A ratio of two policies is then
    ``exp(mean_i l_i^old - mean_i l_i)``, which every surrogate takes for the likelihood ratio. The divergence is the
    estimate ``r - 1 - log r`` from the one sample that there is; it is zero where the losses agree and never negative.
    Neither entropy nor Fisher information is known: the entropy is given as zero, the rest is refused.

    Attributes:
        bounds: takes an action to the environment: clips or squashes it.
        chunk_shape: ``(H, D)``.
        per_pair: whether each pair has a log-ratio of its own, on a trailing axis.
    """

    bounds: Head
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    per_pair: bool = eqx.field(static=True, default=False)

    @property
    def output_size(self) -> int:
        return math.prod(self.chunk_shape)

    def log_prob(self, parameters: Float[Array, "... N"], action: FlowSample) -> Float[Array, "..."]:
        del action
        return -parameters if self.per_pair else -jnp.mean(parameters, axis=-1)

    def _of_each(self, value: Float[Array, "..."], parameters: Float[Array, "... N"]) -> Float[Array, "..."]:
        # In the shape of the log-probabilities: all pairs of an action share what is known of it as a whole.
        return jnp.broadcast_to(value[..., None], parameters.shape) if self.per_pair else value

    def entropy(self, parameters: Float[Array, "... N"]) -> Float[Array, "..."]:
        return self._of_each(jnp.zeros_like(parameters[..., 0]), parameters)

    def kl(self, old: Float[Array, "... N"], new: Float[Array, "... N"]) -> Float[Array, "..."]:
        log_ratio = jnp.mean(old - new, axis=-1)
        return self._of_each(jnp.expm1(log_ratio) - log_ratio, new)

    def to_action(self, sample: FlowSample) -> PyTree:
        action = sample.action
        return self.bounds.to_action(action.reshape((*action.shape[:-2], -1)))

    def from_output(self, output: Array, free: Array) -> PyTree:
        raise _refused("distribution parameters apart from a sample")

    def sample(self, parameters: PyTree, key: Key[Array, ""]) -> PyTree:
        raise _refused("distribution parameters to sample from")

    def mode(self, parameters: PyTree) -> PyTree:
        raise _refused("distribution parameters with a mode")

    def fisher_product(self, parameters: PyTree, tangent: PyTree) -> PyTree:
        raise _refused("Fisher information")

    def distribution(self, parameters: PyTree) -> Any:
        raise _refused("distribution that NumPyro knows")


def _refused(what: str) -> InputTypeError:
    return InputTypeError(f"A flow policy has no {what}: its losses stand in for likelihood ratios, nothing more.")


class FlowNetwork(ActorNetwork):
    """The learned part of a denoiser; None in the place of everything else.

    Attributes:
        denoiser: a :class:`~steersman.diffusion.NetworkDenoiser`, filtered.
    """

    denoiser: Any

    def __call__(self, features: Float[Array, "... D"], carry: PyTree) -> tuple[PyTree, PyTree]:
        """What the denoiser is told of `features`."""
        return self.denoiser.encode(features), carry


class FlowPolicy(NetworkPolicy):
    """Acts by running a sampler on a denoiser, and records what a later ratio needs: pairs, and their losses.

    The record does not depend on the sampler, which may be another one at every call.

    Attributes:
        fixed: the part of the denoiser that is not learned (its noise process).
        sampler: how actions are drawn.
        supervise: the prediction whose error is the loss.
        pairs: pairs of noise and level for each action ``N``.
    """

    fixed: Any
    sampler: Sampler
    supervise: str = eqx.field(static=True)
    pairs: int = eqx.field(static=True)

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The denoiser, on the standardized observation vector."""
        return eqx.combine(self.network.denoiser, self.fixed)  # pyright: ignore[reportAttributeAccessIssue]

    def remember(self, features: Features, carry: PyTree, sample: PyTree) -> PyTree:
        return carry

    def from_features(self, features: Features, carry: PyTree) -> tuple[PyTree, PyTree]:
        raise _refused("distribution parameters apart from a sample")

    def losses(self, features: Float[Array, " size"], drawn: FlowSample) -> Float[Array, " N"]:
        """Mean squared error over the entries of the action, for each of its pairs."""
        denoiser = self.denoiser
        condition = denoiser.encode(features)
        if isinstance(denoiser.process, RectifiedFlow):
            require_number("level", drawn.level, at_least=0.0, at_most=1.0)

        def one(noise: Array, level: Array) -> Array:
            errors = prediction_errors(denoiser, drawn.action, condition, level, noise, supervise=self.supervise)
            return jnp.mean(errors)

        return jax.vmap(one)(drawn.noise, drawn.level)

    def parameters_for(self, features: Features, carry: PyTree, sample: PyTree) -> Float[Array, "... N"]:
        if not isinstance(sample, FlowSample):
            raise InputError(
                f"experience.record.action is a {type(sample).__name__}, but a flow policy learns from the FlowSample "
                "that it recorded: the action before squashing, with its pairs of noise and level."
            )
        losses = self.losses
        for _ in range(features.vector.ndim - 1):
            losses = jax.vmap(losses)
        return losses(features.vector, sample)

    def draw(self, vector: Float[Array, " size"], key: Key[Array, ""] | None) -> Float[Array, "H D"]:
        """An action before bounds; from the middle of the noise, without any, where `key` is None."""
        denoiser, grid = self.denoiser, self.sampler.grid(self.fixed.process)
        middle = jnp.zeros(denoiser.chunk_shape)
        given: dict[str, Any] = {}
        if key is None:
            given = {"start": middle, "noises": jnp.zeros((grid.steps, *middle.shape))}
        return sample(denoiser, self.sampler, denoiser.encode(vector), key, **given).chunk

    def act(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree, Record]:
        vector = self.preprocess(observation).vector
        action_key, noise_key, level_key = jax.random.split(key, 3)
        action = self.draw(vector, action_key)
        noise = jax.random.normal(noise_key, (self.pairs, *action.shape), action.dtype)
        drawn = FlowSample(action, noise, self.fixed.process.sample_level(level_key, (self.pairs,)))
        losses = self.losses(vector, drawn)
        return self.head.to_action(drawn), carry, Record(drawn, self.head.log_prob(losses, drawn), losses)

    def _play(self, observation: PyTree, key: Key[Array, ""] | None) -> PyTree:
        action = self.draw(self.preprocess(observation).vector, key)
        return self.head.to_action(FlowSample(action, action[None], jnp.zeros(1)))

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        return self._play(observation, jax.random.split(key, 3)[0]), carry

    def mode(self) -> Policy:
        return NoiseFree(self)


class NoiseFree(Policy):
    """A flow policy whose sampler starts from zero and draws nothing.

    Attributes:
        policy: the flow policy.
    """

    policy: FlowPolicy

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        del key
        return self.policy._play(observation, None), carry


def action_bounds(head: Head, squash: bool) -> Any:
    """What takes actions of any size to an environment: `head`, or tanh where it has bounds and `squash` is set.

    Raises:
        InputTypeError: the actions are not a box of floats.
    """
    if not isinstance(head, DiagonalGaussian):
        raise InputTypeError(
            f"action space has a {type(head).__name__}, but a generative policy needs a box of floats."
        )
    bounded = head.low is not None and head.high is not None and all(map(math.isfinite, head.low + head.high))
    return TanhGaussian(head.shape, head.low, head.high) if squash and bounded else head


class FlowArchitecture(Architecture):
    """Makes flow policies, for any loop that takes an architecture: the likelihood-free policy class.

    Attributes:
        recipe: makes a fresh denoiser of the flattened observation.
        denoiser: one that was trained already, in place of `recipe`.
        sampler: how actions are drawn; may be replaced at any time.
        supervise: the prediction whose error is compared: ``"noise"``, or ``"flow"`` for flow matching's own loss.
        pairs: pairs of noise and level for each action.
        squash: bring actions into a bounded box by tanh instead of clipping.
        per_pair: a ratio for each pair instead of one of their mean.
    """

    recipe: DenoiserRecipe = eqx.field(
        default_factory=lambda: MLPRecipe(
            RectifiedFlow(), "flow", (32, 32, 32, 32), time_features=OctaveTime(4), output_scale=0.25
        )
    )
    denoiser: NetworkDenoiser | None = None
    sampler: Sampler = eqx.field(default_factory=FlowSolver)
    supervise: str = eqx.field(static=True, default="noise")
    pairs: int = eqx.field(static=True, default=8)
    squash: bool = eqx.field(static=True, default=True)
    per_pair: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        require_count("pairs", self.pairs)
        check_prediction(self.supervise)

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> FlowPolicy:
        del initial_log_std
        bounds = action_bounds(head, self.squash)
        shape = bounds.shape if len(bounds.shape) == 2 else (1, bounds.dimension)
        denoiser = self.denoiser
        if denoiser is None:
            denoiser = self.recipe.make(jnp.zeros(preprocess.size), shape, key)
        require(denoiser.chunk_shape == shape, "denoiser.chunk_shape", denoiser.chunk_shape, f"the actions', {shape}")
        self.sampler.check(denoiser.process)
        learned, fixed = eqx.partition(denoiser, denoiser.trainable())
        return FlowPolicy(
            preprocess=preprocess,
            network=FlowNetwork(learned),
            free=jnp.zeros(0),
            head=FlowHead(bounds, shape, self.per_pair),
            fixed=fixed,
            sampler=self.sampler,
            supervise=self.supervise,
            pairs=self.pairs,
        )
