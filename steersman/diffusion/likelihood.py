"""Exact likelihoods of flows: the instantaneous change of variables."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from steersman.diffusion.denoiser import Denoiser
from steersman.diffusion.processes import ContinuousProcess
from steersman.errors import InputTypeError, require_number


def flow_log_prob(
    denoiser: Denoiser,
    condition: PyTree,
    chunk: Float[Array, "H D"],
    *,
    relative_tolerance: float = 1e-5,
    absolute_tolerance: float = 1e-5,
    margin: float = 1e-4,
) -> Float[Array, ""]:
    """Log-density of `chunk` under the flow that turns noise into chunks.

    Along ``dx/dt = v(x, t)`` the log-density changes by ``-div v`` (Chen et al., 2018, arXiv:1806.07366; for diffusion
    models Song et al., 2021, arXiv:2011.13456). Solves ``x`` and the divergence from the data to the noise by Diffrax's
    adaptive fifth-order Runge-Kutta method; the divergence is the exact trace, ``H * D`` derivatives at each
    evaluation.

    Args:
        denoiser: a denoiser on a continuous process.
        condition: the encoded observation.
        chunk: where the density is asked for.
        relative_tolerance: of the solver.
        absolute_tolerance: of the solver.
        margin: where the flow has no finite rate at an end of its interval, the fraction of it left out there.

    Raises:
        InputTypeError: the process has discrete levels, and so no flow.
    """
    process = denoiser.process
    if not isinstance(process, ContinuousProcess):
        raise InputTypeError(
            f"denoiser is on a {type(process).__name__}, but a likelihood needs a process with real levels."
        )
    require_number("margin", margin, at_least=0.0, below=0.5)
    # The whole interval of the levels, however many steps a sampler would take of it.
    whole = process.grid(1)
    noisy, clean = whole.current[0], whole.following[0]
    span = noisy - clean
    noisy, clean = noisy - margin * span, clean + margin * span

    def velocity(x: Array, level: Array) -> Array:
        alpha_rate, sigma_rate = process.rates(level)
        found = denoiser.predict(x.reshape(chunk.shape), level, condition)
        return jnp.ravel(alpha_rate * found.sample + sigma_rate * found.noise)

    def field(level: Any, state: tuple[Array, Array], _: Any) -> tuple[Array, Array]:
        x = state[0]
        jacobian = jax.jacfwd(velocity)(x, level)
        return velocity(x, level), jnp.trace(jacobian)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        t0=clean,
        t1=noisy,
        dt0=None,
        y0=(jnp.ravel(chunk), jnp.zeros((), chunk.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=relative_tolerance, atol=absolute_tolerance),
        max_steps=4096,
    )
    assert solution.ys is not None
    end, divergence = solution.ys[0][-1], solution.ys[1][-1]
    alpha, sigma = process.coefficients(noisy)
    del alpha
    scale = sigma if process.prior_scale != 1.0 else jnp.ones_like(sigma)
    prior = -0.5 * jnp.sum((end / scale) ** 2) - end.size * (jnp.log(scale) + 0.5 * jnp.log(2.0 * jnp.pi))
    # The state was at `margin` of the way already, where it was taken for the clean chunk.
    return prior + divergence
