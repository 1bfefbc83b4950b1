"""How wrong a combination of denoisers is: its squared error as a function of the weights, and what that bounds."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from steersman.diffusion.combination import Combined
from steersman.diffusion.denoiser import Denoiser
from steersman.errors import require, require_number


def error_products(
    combined: Combined,
    observation: PyTree,
    clean: Float[Array, "B H D"],
    key: Key[Array, ""],
    *,
    truth: Denoiser | None = None,
    truth_observation: PyTree = None,
) -> Float[Array, "M M"]:
    """``G_ij = E <e_i, e_j>`` of the denoisers' errors at noisy data, at levels as training draws them.

    Without `truth` errors are taken to the noise that was drawn. Since ``E[noise | x]`` is the truth, that adds the
    same constant to every ``G_ij``, hence to ``w' G w`` for all weights of sum 1: the best weights stay the same.

    Args:
        combined: the denoisers; their chunks equally long, the weights do not count.
        observation: tuple of one observation for each denoiser, with a leading batch axis.
        clean: chunks that followed them, in the denoisers' units.
        key: randomness of levels and noise.
        truth: an exact denoiser on the same process.
        truth_observation: what it is asked under, with a leading batch axis.
    """
    rows = [denoiser.chunk_shape[0] for denoiser in combined.denoisers]
    require(len(set(rows)) == 1, "combined", f"chunks of {rows} rows", "of denoisers with equally long chunks")
    level_key, noise_key = jax.random.split(key)
    levels = combined.process.sample_level(level_key, clean.shape[:1])
    noises = jax.random.normal(noise_key, clean.shape, clean.dtype)
    x = combined.process.perturb(clean, noises, levels)

    def one(observation: PyTree, seen: PyTree, x: Array, level: Array, noise: Array) -> Array:
        found = combined.predict(x, level, combined.encode(observation))
        assert found.parts is not None
        target = noise if truth is None else truth.predict(x, level, truth.encode(seen)).noise
        errors = (found.parts.noise - target).reshape(len(rows), -1)
        return errors @ errors.T

    if truth_observation is None:
        truth_observation = jnp.zeros(clean.shape[:1])
    return jnp.mean(jax.vmap(one)(observation, truth_observation, x, levels, noises), axis=0)


def error_power(products: Any, weights: Any) -> np.ndarray:
    """``Q(w) = E |sum_i w_i e_i|^2 = w' G w`` of weights ``[..., M]`` (proposition 4.1 of arXiv:2510.01068)."""
    products, weights = np.asarray(products, np.float64), np.asarray(weights, np.float64)
    return np.asarray(np.einsum("...i,ij,...j->...", weights, products, weights))


def best_weights(products: Any) -> np.ndarray:
    """The weights on the simplex with the least ``w' G w`` ``[M]``.

    For two: ``w_1 = clip((G_22 - G_12) / (G_11 - 2 G_12 + G_22), 0, 1)``. In general by going through the faces of the
    simplex, on each of which the minimum of sum 1 solves a linear system.

    Raises:
        InputError: `products` is not square or not finite.
    """
    require_number("products", products)
    products = np.asarray(products, np.float64)
    count = products.shape[0]
    require(products.shape == (count, count) and count >= 1, "products.shape", products.shape, "[M, M]")
    best = np.eye(count)[int(np.argmin(np.diagonal(products)))]
    for size in range(2, count + 1):
        for face in itertools.combinations(range(count), size):
            own = products[np.ix_(face, face)]
            system = np.block([[own, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            solution = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0][:size]
            candidate = np.zeros(count)
            candidate[list(face)] = solution
            inside = solution.min() >= 0.0 and abs(solution.sum() - 1.0) < 1e-9
            if inside and error_power(products, candidate) < error_power(products, best):
                best = candidate
    return best


def endpoint_error_bound(times: Any, state_lipschitz: Any, score_lipschitz: Any, score_error: Any) -> float:
    """Bound on the mean distance between the ends of two flows, one with a wrong score (proposition 4.2).

    ``E |x(T) - x*(T)| <= (int exp(2 int_t^T L) S(t)^2 dt)^(1/2) (int kappa(t)^2 dt)^(1/2)``, integrals by the
    trapezoidal rule.

    Args:
        times: rising times along the flow ``[n]``, from noise to data.
        state_lipschitz: ``L(t)``, Lipschitz constant of the drift in the state ``[n]``.
        score_lipschitz: ``S(t)``, that of the drift in the score.
        score_error: ``kappa(t)``, root mean squared error of the score.
    """
    t, state, score, error = (
        np.asarray(each, np.float64) for each in (times, state_lipschitz, score_lipschitz, score_error)
    )
    require(t.ndim == 1 and t.size >= 2 and bool(np.all(np.diff(t) > 0.0)), "times", t.tolist(), "rising, at least two")
    for name, each in (("state_lipschitz", state), ("score_lipschitz", score), ("score_error", error)):
        require(each.shape == t.shape, f"{name}.shape", each.shape, f"that of times, {t.shape}")
        require_number(name, each, at_least=0.0)
    grown = np.concatenate([[0.0], np.cumsum(0.5 * (state[1:] + state[:-1]) * np.diff(t))])
    growth = np.trapezoid(np.exp(2.0 * (grown[-1] - grown)) * score**2, t)
    return float(np.sqrt(growth) * np.sqrt(np.trapezoid(error**2, t)))
