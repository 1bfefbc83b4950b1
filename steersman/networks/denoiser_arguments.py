"""What every network of a denoiser checks: its sizes when it is made, its arguments when it is called."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array

from steersman.errors import require, require_count


def check_sizes(chunk_shape: Sequence[int], condition_size: int) -> tuple[int, int]:
    """Rows and action dimensions ``(H, D)`` of usable sizes.

    Raises:
        InputError: a size is not usable.
    """
    require(len(chunk_shape) == 2, "chunk_shape", chunk_shape, "(rows, action dimensions)")
    rows, actions = chunk_shape
    require_count("chunk_shape[0]", rows)
    require_count("chunk_shape[1]", actions)
    require_count("condition_size", condition_size, minimum=0)
    return rows, actions


def check_arguments(x: Array, condition: Array, chunk_shape: tuple[int, int], condition_size: int) -> None:
    """Raises InputError for a chunk or a condition of another shape than the network was made for."""
    require(x.shape == chunk_shape, "x.shape", x.shape, f"{chunk_shape}")
    require(condition.shape == (condition_size,), "condition.shape", condition.shape, f"({condition_size},)")
