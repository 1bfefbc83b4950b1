"""Latent actions: what a decoder makes of a vector, as an environment in which any algorithm can learn."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key, PyTree

from steersman.diffusion.flow_policy import action_bounds
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.processes import DiscreteVP, NoiseProcess
from steersman.envs.environment import Environment
from steersman.errors import InputError, InputTypeError, require
from steersman.policies import DiagonalGaussian, Head, Policy, head_for
from steersman.rl.on_policy.actor_critic import ActorCriticState, Batch, Learned, Samples, likelihood
from steersman.rl.on_policy.ppo import PPO
from steersman.training.algorithm import Metrics
from steersman.training.schedules import Continuous, Scheduled, scalar


class Decoder(eqx.Module):
    """From an observation and a latent vector to an action, without randomness of its own."""

    @abc.abstractmethod
    def __call__(self, observation: PyTree, latent: Float[Array, " D"]) -> Float[Array, " D"]:
        """The action before bounds or squashing."""


class Unchanged(Decoder):
    """``a = z``."""

    def __call__(self, observation: PyTree, latent: Float[Array, " D"]) -> Float[Array, " D"]:
        return latent


class GenerativeDecoder(Decoder):
    """A generator whose sampler starts from the latent vector, as it would from noise.

    Attributes:
        generator: a flow, or a diffusion model with a deterministic sampler.
    """

    generator: ChunkGenerator

    def __check_init__(self) -> None:
        sampler = self.generator.sampler
        if sampler.draws:
            raise InputError(
                f"generator.sampler is a {type(sampler).__name__} that draws noise, but a decoder must be a function "
                "of its latent vector: use FlowSolver, or DDIM with eta 0."
            )

    def __call__(self, observation: PyTree, latent: Float[Array, " D"]) -> Float[Array, " D"]:
        generator = self.generator
        shape, process = generator.denoiser.chunk_shape, generator.denoiser.process
        require(latent.shape == (shape[0] * shape[1],), "latent.shape", latent.shape, f"({shape[0] * shape[1]},)")
        start = generator.sampler.start_scale(process) * latent.reshape(shape)
        return jnp.ravel(generator.action_scaling.restore(generator.chain(observation, None, start=start).chunk))

    def identity(self, observation: PyTree, process: NoiseProcess | None = None) -> GenerativeDecoder:
        """This decoder with all learned numbers zero, which hardly changes a latent vector.

        Args:
            observation: any observation.
            process: the noise process that it then has; where None its own, or the linear schedule in the place of
                another schedule on discrete levels, whose samplers would scale the vector by ``1 / alpha``.

        Raises:
            InputError: it would change a latent vector by more than a tenth.
        """
        denoiser: Any = self.generator.denoiser
        if process is None:
            own = denoiser.process
            process = DiscreteVP.linear(own.levels, spacing=own.spacing) if isinstance(own, DiscreteVP) else own
        learned, fixed = eqx.partition(denoiser, denoiser.trainable())
        zero = eqx.combine(jax.tree.map(jnp.zeros_like, learned), fixed)
        zero = eqx.tree_at(lambda d: d.process, zero, process)
        decoder = eqx.tree_at(lambda d: d.generator.denoiser, self, zero)
        rows, width = denoiser.chunk_shape
        gain = jnp.mean(decoder(observation, jnp.ones(rows * width)))
        if not isinstance(gain, Tracer):
            allowed = "within a tenth of 1: use a flow, or noise prediction on DiscreteVP.linear"
            require(0.9 < float(gain) < 1.1, "process scales latent vectors; its factor", float(gain), allowed)
        return decoder


class LatentParams(eqx.Module):
    """Parameters of :class:`LatentActions`.

    Attributes:
        params: the environment's own.
        decoder: what turns latent vectors into actions; constant while an algorithm learns.
    """

    params: PyTree
    decoder: Decoder


class LatentState(NamedTuple):
    """State of :class:`LatentActions`.

    Attributes:
        state: the environment's own.
        observation: what is about to be acted on, which the decoder reads.
    """

    state: PyTree
    observation: PyTree


class LatentActions(Environment):
    """An environment whose action is a decoder's latent vector: the augmented decision process that RL sees.

    A likelihood ratio of latent vectors is that of the whole policy, since decoder and squashing are the environment.

    Attributes:
        environment: an :class:`~steersman.envs.Environment`, or any object with gymnax 1.0's methods.
        squash: bring decoded actions into a bounded box by tanh instead of clipping.
    """

    environment: Any
    squash: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        for method in ("reset_env", "step_env", "observation_space", "action_space"):
            if not callable(getattr(self.environment, method, None)):
                kind = type(self.environment).__name__
                raise InputTypeError(
                    f"environment is a {kind}, but it must have gymnax's methods; {method} is missing."
                )

    @property
    def name(self) -> str:
        return f"latent {getattr(self.environment, 'name', type(self.environment).__name__)}"

    @property
    def default_params(self) -> LatentParams:
        return LatentParams(self.environment.default_params, Unchanged())

    def observation_space(self, params: LatentParams) -> Any:
        return self.environment.observation_space(params.params)

    def action_space(self, params: LatentParams) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, (self.bounds(params).dimension,), np.float32)

    def bounds(self, params: LatentParams) -> Any:
        """What takes a decoded action to the environment."""
        return action_bounds(head_for(self.environment.action_space(params.params)), self.squash)

    def decode(self, observation: PyTree, latent: Float[Array, " D"], params: LatentParams) -> Float[Array, " D"]:
        """The action before bounds."""
        action = params.decoder(observation, latent)
        size = self.bounds(params).dimension
        require(action.shape == (size,), "decoder's action shape", action.shape, f"({size},), the environment's")
        return action

    def reset_env(self, key: Key[Array, ""], params: LatentParams) -> tuple[PyTree, LatentState]:
        observation, state = self.environment.reset_env(key, params.params)
        return observation, LatentState(state, observation)

    def step_env(
        self, key: Key[Array, ""], state: LatentState, action: Float[Array, " D"], params: LatentParams
    ) -> tuple[PyTree, LatentState, PyTree, Bool[Array, ""], dict[str, Any]]:
        sent = self.bounds(params).to_action(self.decode(state.observation, action, params))
        following = self.environment.step_env(key, state.state, sent, params.params)
        observation, inner, reward, terminated, info = following
        return observation, LatentState(inner, observation), reward, terminated, info

    def is_truncated(self, state: LatentState, params: LatentParams) -> Bool[Array, ""]:
        return self.environment.is_truncated(state.state, params.params)


class LatentPolicy(Policy):
    """A latent policy under a decoder.

    Attributes:
        encoder: draws the latent vector.
        decoder: turns it into an action.
        bounds: takes that to the environment.
    """

    encoder: Policy
    decoder: Decoder
    bounds: Head

    def init(self, key: Key[Array, ""]) -> PyTree:
        return self.encoder.init(key)

    def __call__(self, observation: PyTree, carry: PyTree, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        latent, carry = self.encoder(observation, carry, key)
        return self.bounds.to_action(self.decoder(observation, latent)), carry

    def mode(self) -> Policy:
        return LatentPolicy(self.encoder.mode(), self.decoder, self.bounds)


class LatentPPO(PPO):
    """PPO with the penalty ``lambda (mean mu^2 + mean sigma^2)``, which keeps a latent Gaussian near the prior.

    Attributes:
        latent_penalty: weight ``lambda``.
    """

    latent_penalty: Scheduled = scalar(1e-3)
    value_coefficient: Scheduled = scalar(0.25)
    max_gradient_norm: Continuous | None = scalar(1.0)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(32,) * 4, converter=tuple)
    activation: str = eqx.field(static=True, default="swish")

    def init(self, problem: Any, key: Key[Array, ""]) -> ActorCriticState:
        state = super().init(problem, key)
        if not isinstance(state.actor.head, DiagonalGaussian):
            kind = type(state.actor.head).__name__
            raise InputTypeError(f"policy has a {kind}, but only a Gaussian has the mean and deviation to keep small.")
        return state

    def loss(
        self, learned: Learned, state: ActorCriticState, rows: Batch, surrogate: PyTree
    ) -> tuple[Float[Array, ""], tuple[Samples, Metrics]]:
        value, (drawn, shown) = super().loss(learned, state, rows, surrogate)
        latent = likelihood(state.with_learned(learned).actor, rows)
        size = jnp.mean(latent.mean**2) + jnp.mean(jnp.exp(2.0 * latent.log_std))
        return value + self.latent_penalty * size, (drawn, {**shown, "latent_size": size})
