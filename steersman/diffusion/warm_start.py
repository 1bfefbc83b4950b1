"""Sampling from a guess instead of from noise: where to begin, and how much of the guess's error is left."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steersman.diffusion.mixtures import Mixture, MixtureDenoiser
from steersman.diffusion.processes import DiscreteVP, Grid, NoiseProcess
from steersman.diffusion.samplers import Sampler, sample
from steersman.errors import InputError, InputTypeError, require, require_number, unknown_name

STEP_RULES = ("single", "jump")


def warm_grid(process: NoiseProcess, labels: Any, step_rule: str = "single") -> Grid:
    """The levels of one sweep from a guess.

    Args:
        process: the noise process that the denoiser was trained on.
        labels: where the denoiser is asked, strictly decreasing. For a discrete process whole numbers that end in 0.
        step_rule: ``"single"`` goes down one level from each label, whatever the next label is, as the authors' code
            does; ``"jump"`` goes to the next label, and from the last one to clean data.

    Raises:
        InputError: the labels are not like that, or a process with a continuum of levels is to be stepped singly.
    """
    if step_rule not in STEP_RULES:
        raise unknown_name("step_rule", step_rule, STEP_RULES)
    if isinstance(process, DiscreteVP):
        grid = process.single_steps(labels)
        current = grid.current
        if step_rule == "single":
            return grid
    else:
        if step_rule == "single":
            raise InputError(f"step_rule is 'single', but a {type(process).__name__} has no single levels: use 'jump'.")
        whole = process.grid(1)
        given = np.asarray(labels, np.float64)
        high, low = float(whole.current[0]), float(whole.following[0])
        good = given.ndim == 1 and given.size > 0 and bool(np.all(np.diff(given) < 0))
        good = good and given[0] <= high and given[-1] > low
        require(good, "labels", given.tolist(), f"strictly decreasing, from {high:g} at most and above {low:g}")
        current = jnp.asarray(given, whole.current.dtype)
    return Grid(current, jnp.concatenate([current[1:], process.grid(1).following]))


def contraction(process: NoiseProcess, sampler: Sampler, grid: Grid, std: Float[Array, ""] | float) -> Float[Array, ""]:
    """Factor by which one sweep brings two guesses together, where the policy is locally a Gaussian.

    Derivative of the mean map ``guess -> chunk`` for a policy of standard deviation `std`. For DDPM's rule each step
    from ``k`` to ``k'`` contributes ``(alpha / alpha') v' / v`` with ``v = alpha^2 std^2 + sigma^2``, so that steps
    that join up from ``K'`` to clean data give ``alpha std^2 / (alpha^2 std^2 + sigma^2)`` at ``K'``. Errors of
    successive chunks follow ``e' <= contraction (e + drift)``, and settle at
    ``contraction drift / (1 - contraction)``.

    Args:
        process: the noise process.
        sampler: the rule of the sweep.
        grid: its levels.
        std: of chunks around their mode, in the denoiser's units.
    """
    require_number("std", std, above=0.0)
    mixture = Mixture(jnp.zeros(1), jnp.zeros((1, 1)), jnp.asarray(std) ** 2)
    denoiser = MixtureDenoiser(mixture=lambda _: mixture, process=process, chunk_shape=(1, 1))

    def swept(start: Array) -> Array:
        noises = jnp.zeros((grid.steps, 1, 1), start.dtype)
        return sample(denoiser, sampler, mixture, None, start=start, noises=noises, grid=grid).chunk

    zero = jnp.zeros((1, 1))
    return jax.jvp(swept, (zero,), (jnp.ones_like(zero),))[1][0, 0]


def estimate_start(
    process: DiscreteVP,
    guesses: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    std: float | None = None,
    tolerance: float | None = None,
) -> int:
    """A first label, from pairs of a guess and a chunk that a full chain drew for the same observation.

    The paper's rule takes the label whose mean state is nearest, ``argmin_k mean |G - alpha_k A|``. It tends to labels
    near 0. With `std` and `tolerance` the first label is the smallest whose contraction, over all levels below, takes
    the root mean square of ``|G - A|`` to at most `tolerance`.

    Args:
        process: the noise process.
        guesses: shifted last chunks, in the denoiser's units ``[N, H, D]``.
        targets: chunks of full chains ``[N, H, D]``.
        std: of chunks around their mode, as in :func:`contraction`.
        tolerance: what may remain of the distance; given together with `std`.

    Raises:
        InputError: shapes that differ, numbers that are not finite, or only one of `std` and `tolerance`.
        InputTypeError: the process has a continuum of levels.
    """
    if not isinstance(process, DiscreteVP):
        raise InputTypeError(f"process is a {type(process).__name__}, but labels are levels of a DiscreteVP.")
    require(guesses.ndim == 3, "guesses.shape", guesses.shape, "[N, H, D]")
    require(guesses.shape == targets.shape, "targets.shape", targets.shape, f"that of guesses, {guesses.shape}")
    require_number("guesses", guesses)
    require_number("targets", targets)
    if (std is None) != (tolerance is None):
        raise InputError(f"tolerance is {tolerance!r} and std is {std!r}, but they must be given together.")
    alpha, sigma = process.coefficients(jnp.arange(process.levels))
    if std is None or tolerance is None:
        gap = jax.vmap(lambda a: jnp.mean(jnp.linalg.norm(guesses - a * targets, axis=(1, 2))))(alpha)
        return int(jnp.argmin(gap))
    require_number("std", std, above=0.0)
    require_number("tolerance", tolerance, above=0.0)
    drift = jnp.sqrt(jnp.mean(jnp.sum((guesses - targets) ** 2, axis=(1, 2))))
    left = drift * alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    good = left <= tolerance
    return int(jnp.where(jnp.any(good), jnp.argmax(good), process.levels - 1))
