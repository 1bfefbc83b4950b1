"""Policies that are shown less than their critic."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.envs.spaces import Layout
from steersman.errors import require, require_count
from steersman.policies.heads import Head
from steersman.policies.network import ActorNetwork, Architecture, NetworkPolicy
from steersman.policies.preprocessing import Preprocess


class View(ActorNetwork):
    """A network that reads some of the features.

    Attributes:
        network: what reads them.
        columns: which of the features.
    """

    network: ActorNetwork
    columns: tuple[int, ...] = eqx.field(static=True)

    @property
    def unrolled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.network.unrolled

    def init(self, key: Key[Array, ""]) -> PyTree:
        return self.network.init(key)

    def __call__(self, features: Float[Array, "... D"], carry: PyTree) -> tuple[PyTree, PyTree]:
        return self.network(features[..., np.asarray(self.columns)], carry)


class PartialView(Architecture):
    """Makes policies that read some of the features, where a critic reads all: an asymmetric actor-critic.

    For training where more is known than will be when the policy acts (Pinto et al., 2018, arXiv:1710.06542): the
    observation holds both, and what the policy must do without is left out here. Such a critic knows values that the
    policy's observations and memory do not determine, so its advantages are less noisy and need shorter traces.

    Attributes:
        architecture: what makes the policy.
        columns: which features it reads, counted in the flattened observation.
    """

    architecture: Architecture
    columns: tuple[int, ...] = eqx.field(static=True, converter=tuple)

    def __check_init__(self) -> None:
        require(len(self.columns) > 0, "columns", self.columns, "at least one number of a feature")
        for column in self.columns:
            require_count("columns", column, minimum=0)

    @property
    def unrolled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.architecture.unrolled

    def make(
        self, preprocess: Preprocess, head: Head, *, initial_log_std: Float[Array, ""] | float, key: Key[Array, ""]
    ) -> NetworkPolicy:
        require(max(self.columns) < preprocess.size, "columns", self.columns, f"below {preprocess.size}, the features")
        seen = Preprocess(Layout("values", len(self.columns)))
        policy = self.architecture.make(seen, head, initial_log_std=initial_log_std, key=key)
        parts: Any = (preprocess, View(policy.network, self.columns))
        return eqx.tree_at(lambda p: (p.preprocess, p.network), policy, parts)
