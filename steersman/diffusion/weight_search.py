"""Choosing the weights of a combination by playing episodes, the same ones for every candidate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from steersman.diffusion.combination import check_weights
from steersman.errors import require, require_count


def simplex(count: int, parts: int = 10, *, corners: bool = True) -> np.ndarray:
    """All weights that are multiples of ``1 / parts`` ``[C, count]``.

    Args:
        count: number of policies.
        parts: how finely.
        corners: also weights of 0; without them every policy counts.

    Raises:
        InputError: nothing is left.
    """
    require_count("count", count, minimum=2)
    require_count("parts", parts)
    lowest = 0 if corners else 1
    heads = itertools.product(range(lowest, parts + 1), repeat=count - 1)
    rows = [(*head, parts - sum(head)) for head in heads if parts - sum(head) >= lowest]
    require(len(rows) > 0, "parts", parts, f"at least {count} without corners")
    return np.asarray(rows, np.float64) / parts


class Search(eqx.Module):
    """What a search for weights found.

    Attributes:
        candidates: the weights tried ``[C, M]``.
        scores: of each on every validation episode ``[C, N]``.
        best: index of the candidate with the highest mean.
        inner: the same among those that let every policy count; -1 where there is none.
        test_scores: of the best on the test episodes ``[T]``; empty without.
    """

    candidates: np.ndarray
    scores: np.ndarray
    best: int
    inner: int
    test_scores: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """The chosen weights ``[M]``."""
        return self.candidates[self.best]


def search_weights(
    evaluate: Callable[[Any, Any], Any],
    candidates: Any,
    seeds: Sequence[int],
    *,
    test_seeds: Sequence[int] = (),
    on_host: bool = False,
) -> Search:
    """Chooses weights by validation episodes (algorithm 1), the same episodes for every candidate.

    Args:
        evaluate: called as ``evaluate(weights [M], key)``, plays one episode and returns its score. Runs inside one
            ``jit`` over all candidates and episodes.
        candidates: weights ``[C, M]``, for example :func:`simplex`.
        seeds: whole numbers, one for each validation episode.
        test_seeds: others, on which the chosen weights are evaluated once.
        on_host: call ``evaluate(weights, seed)`` from Python instead, for robots and simulators.

    Raises:
        InputError: no candidates or no seeds, or validation and test share seeds.
    """
    candidates = np.asarray(candidates, np.float64)
    good = candidates.ndim == 2 and candidates.size > 0
    require(good, "candidates.shape", candidates.shape, "[C, M] with at least one candidate")
    require(len(seeds) > 0, "seeds", list(seeds), "at least one whole number")
    shared = sorted(set(seeds) & set(test_seeds))
    require(not shared, "test_seeds", shared, "disjoint from seeds, on which the weights are chosen")
    for row in candidates:
        check_weights(row)

    scores = play(evaluate, candidates, seeds, on_host=on_host)
    best, inner = choose_weights(candidates, scores)
    tested = play(evaluate, candidates[best : best + 1], test_seeds, on_host=on_host)[0] if test_seeds else np.zeros(0)
    return Search(candidates, scores, best, inner, tested)


def play(
    evaluate: Callable[[Any, Any], Any], candidates: Any, seeds: Sequence[int], *, on_host: bool = False
) -> np.ndarray:
    """Scores ``[C, N]`` of every candidate on every episode; arguments as of :func:`search_weights`."""
    rows = np.asarray(candidates, np.float64)
    if on_host:
        return np.asarray([[float(evaluate(row, seed)) for seed in seeds] for row in rows])
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return np.asarray(_play(evaluate, jnp.asarray(rows, jnp.result_type(float)), keys))


@eqx.filter_jit
def _play(evaluate: Callable[[Any, Any], Any], rows: Array, keys: Key[Array, " N"]) -> Array:
    def one(row: Array) -> Array:
        return jax.vmap(lambda key: jnp.asarray(evaluate(row, key), jnp.result_type(float)))(keys)

    return jax.lax.map(one, rows)


def choose_weights(candidates: Any, scores: Any) -> tuple[int, int]:
    """Indices of the best candidate, and of the best that lets every policy count (-1 where there is none).

    Of equally good ones the one with more weight on the better single policy, as far as `candidates` holds these.
    """
    candidates, mean = np.asarray(candidates, np.float64), np.asarray(scores, np.float64).mean(axis=1)
    alone = [np.flatnonzero(np.isclose(candidates[:, i], 1.0)) for i in range(candidates.shape[1])]
    value = [mean[each].max() if each.size else -np.inf for each in alone]
    better = candidates[:, int(np.argmax(value))]

    def choose(among: np.ndarray) -> int:
        if not among.size:
            return -1
        tied = among[mean[among] == mean[among].max()]
        return int(tied[np.argmax(better[tied])])

    return choose(np.arange(len(candidates))), choose(np.flatnonzero((candidates > 0.0).all(axis=1)))
