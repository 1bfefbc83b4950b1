"""The memory of policies that look back: the last observations, as a window that a network reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from steersman.errors import require, require_count, require_number


class Seen(NamedTuple):
    """What a :class:`Window` remembers.

    Attributes:
        history: the last observations, oldest first, leaves ``[length, ...]``.
        started: whether there was an observation yet.
    """

    history: PyTree
    started: Bool[Array, ""]


class Window(eqx.Module):
    """The observations that a chunk policy's generator reads, now and `lookback` steps ago.

    Before an episode is as old as that, its first observation stands in for what is missing.

    Attributes:
        blank: an all-zero observation.
        observation_horizon: length of the window; None for plain observations without that axis.
        lookback: how many steps ago the older window ends.
    """

    blank: PyTree
    observation_horizon: int | None = eqx.field(static=True)
    lookback: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        require_count("lookback", self.lookback, minimum=0)

    def init(self) -> Seen:
        """The memory before the first observation."""
        length = (self.observation_horizon or 1) + self.lookback
        blank = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), self.blank)
        return Seen(blank, jnp.asarray(False))

    def push(self, seen: Seen, observation: PyTree) -> Seen:
        """The memory after one more observation.

        Raises:
            InputError: it has another shape than those before, or is not finite where that can be seen.
        """

        def shift(history: Array, newest: Any) -> Array:
            require(
                jnp.shape(newest) == history.shape[1:], "observation's shape", jnp.shape(newest), f"{history.shape[1:]}"
            )
            newest = jnp.asarray(newest, history.dtype)
            if jnp.issubdtype(history.dtype, jnp.floating):
                require_number("observation", newest)
            following = jnp.concatenate([history[1:], newest[None]])
            return jnp.where(seen.started, following, jnp.broadcast_to(newest, history.shape))

        return Seen(jax.tree.map(shift, seen.history, observation), jnp.ones_like(seen.started))

    def _ending(self, seen: Seen, ago: int) -> PyTree:
        def cut(history: Array) -> Array:
            end = history.shape[0] - ago
            return (
                history[end - 1] if self.observation_horizon is None else history[end - self.observation_horizon : end]
            )

        return jax.tree.map(cut, seen.history)

    def now(self, seen: Seen) -> PyTree:
        """What the generator reads."""
        return self._ending(seen, 0)

    def past(self, seen: Seen) -> PyTree:
        """What it read `lookback` steps ago."""
        return self._ending(seen, self.lookback)
