"""Generative policies: a denoiser and a sampler that make action chunks of observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.denoiser import Denoiser
from steersman.diffusion.processes import Grid
from steersman.diffusion.samplers import Chain, Sampler, sample
from steersman.diffusion.scaling import Scaling, normalize_observation
from steersman.errors import InputError
from steersman.policies import ChunkPolicy


class ChunkGenerator(eqx.Module):
    """Draws a chunk of actions for an observation; what :class:`~steersman.policies.ChunkPolicy` plays out.

    Attributes:
        denoiser: what was learned, or composed, guided, converted from that.
        sampler: how chunks are drawn.
        action_scaling: from the task's actions to the denoiser's units.
        observation_scaling: the same for observations: None, one scaling, or a dictionary of them.
        evaluation: the sampler of :meth:`mode`; the same one where None.
    """

    denoiser: Denoiser
    sampler: Sampler
    action_scaling: Scaling = eqx.field(default_factory=Scaling.identity)
    observation_scaling: PyTree = None
    evaluation: Sampler | None = None

    def __check_init__(self) -> None:
        # A rule that cannot step through the process, or more steps than it has levels, is told here.
        self.sampler.check(self.denoiser.process)
        self.sampler.grid(self.denoiser.process)

    def encode(self, observation: PyTree) -> PyTree:
        """The denoiser's condition at an observation in the task's units."""
        return self.denoiser.encode(normalize_observation(self.observation_scaling, observation))

    def chain(
        self,
        observation: PyTree,
        key: Key[Array, ""] | None,
        *,
        start: Float[Array, "H D"] | None = None,
        noises: Float[Array, "n H D"] | None = None,
        grid: Grid | None = None,
        project: Callable[[Array, Array], Array] | None = None,
    ) -> Chain:
        """One run of the sampler, in the denoiser's units; arguments as of :func:`~steersman.diffusion.sample`."""
        condition = self.encode(observation)
        return sample(
            self.denoiser, self.sampler, condition, key, start=start, noises=noises, grid=grid, project=project
        )

    def __call__(self, observation: PyTree, key: Key[Array, ""]) -> Float[Array, "H D"]:
        return self.action_scaling.restore(self.chain(observation, key).chunk)

    def mode(self) -> ChunkGenerator:
        """With the sampler for evaluation."""
        if self.evaluation is None:
            return self
        return eqx.tree_at(lambda generator: generator.sampler, self, self.evaluation)

    def policy(
        self,
        action_horizon: int,
        observation_space: Any,
        *,
        observation_horizon: int | None = None,
        first_row: int | None = None,
    ) -> ChunkPolicy:
        """The policy that plays out `action_horizon` rows of each chunk.

        Args:
            action_horizon: rows played before the next chunk is drawn.
            observation_space: space of one observation, or an example.
            observation_horizon: length of the window that the denoiser was trained with; None for plain observations.
            first_row: rows skipped; those of the window's past where None.

        Raises:
            InputError: the chunk has fewer rows.
        """
        first = (observation_horizon or 1) - 1 if first_row is None else first_row
        rows = self.denoiser.chunk_shape[0]
        if first + action_horizon > rows:
            raise InputError(
                f"action_horizon is {action_horizon} from row {first}, but the denoiser's chunks have only {rows} rows."
            )
        return ChunkPolicy(
            self, action_horizon, observation_space, observation_horizon=observation_horizon, first_row=first
        )
