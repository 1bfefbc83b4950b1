"""The algorithm contract: two shapes that one training loop runs."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Key, PyTree

from steersman.policies import Policy
from steersman.training.collect import Collector
from steersman.training.experience import Experience

Metrics = dict[str, Array]


class Algorithm(eqx.Module):
    """What makes or improves a policy. Its fields are its hyperparameters.

    Sizes and counts are static fields; everything continuous is an array leaf (or a schedule of them), so that
    ``vmap`` over hyperparameters works. The state that an algorithm carries is a PyTree of arrays, and every method
    is pure, so that whole iterations run under one ``jit`` and a stopped run continues bit for bit.
    """

    @abc.abstractmethod
    def init(self, problem: Any, key: Key[Array, ""]) -> PyTree:
        """The state before the first iteration. Raises for a problem that this algorithm cannot work on."""

    @abc.abstractmethod
    def policy(self, state: PyTree) -> Policy:
        """The policy that has been learned so far, ready for use."""


class IterativeAlgorithm(Algorithm):
    """An algorithm that does not interact: tables, planning, offline data, distillation."""

    @abc.abstractmethod
    def step(self, problem: Any, state: PyTree) -> tuple[PyTree, Metrics]:
        """One iteration, pure and jittable."""


class InteractiveAlgorithm(Algorithm):
    """An algorithm that learns from what its own behaviour brings about.

    It never steps an environment itself: its ``collector`` does.
    """

    @property
    @abc.abstractmethod
    def collector(self) -> Collector:
        """Gathers the experience of one iteration, and says what it needs from an environment."""

    @abc.abstractmethod
    def behaviour(self, state: PyTree) -> Policy:
        """The policy that collects the next experience."""

    @abc.abstractmethod
    def update(self, state: PyTree, experience: Experience) -> tuple[PyTree, Metrics]:
        """Learns from one batch of experience; pure and jittable."""
