"""Steersman in the diffusion benchmark, through its public interface; see diffusion.py."""

from __future__ import annotations

import functools
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import worker
from unet_sizes import ACTIONS, HORIZON, OBSERVATION, ROWS_OF_DATA, WIDTHS, WINDOW

import steersman
from steersman.diffusion import (
    DDIM,
    Cloning,
    DiscreteVP,
    NetworkDenoiser,
    OneCall,
    sample,
    warm_grid,
)
from steersman.diffusion.cloning import DenoiserRecipe
from steersman.diffusion.denoiser import Flatten
from steersman.envs.chunk_data import EpisodeChunks
from steersman.networks import TemporalUNet
from steersman.training import AdamW

CONDITION = WINDOW * OBSERVATION
#: Sizes, batches and numbers of steps whose programs are compiled.
trained: set[tuple[int, int, int]] = set()


class Recipe(DenoiserRecipe):
    """The network of a size."""

    process: DiscreteVP = eqx.field(default_factory=lambda: DiscreteVP.squared_cosine(100))
    widths: tuple[int, ...] = eqx.field(static=True, default=WIDTHS[0])

    def make(self, observation: Any, chunk_shape: tuple[int, int], key: Any) -> NetworkDenoiser:
        network = TemporalUNet(chunk_shape, CONDITION, self.widths, key=key)
        return NetworkDenoiser(network, self.process, chunk_shape, encoder=Flatten())


@functools.cache
def denoiser(size: int) -> NetworkDenoiser:
    return Recipe(widths=WIDTHS[size]).make(None, (HORIZON, ACTIONS), jax.random.key(0))


@eqx.filter_jit
def one_call(denoiser: Any, x: Any, time: Any, condition: Any) -> Any:
    return jax.vmap(denoiser.network, in_axes=(0, None, 0))(x, time, condition)


@eqx.filter_jit
def chunks(denoiser: Any, sampler: Any, conditions: Any, keys: Any, guesses: Any, grid: Any) -> Any:
    def one(condition: Any, key: Any, guess: Any) -> Any:
        start = None if grid is None else guess
        return sample(denoiser, sampler, condition, key, start=start, grid=grid).chunk

    return jax.vmap(one)(conditions, keys, guesses)


@functools.cache
def training(size: int, batch: int) -> tuple[Any, Any]:
    algorithm = Cloning(
        recipe=Recipe(widths=WIDTHS[size]),
        batch_size=batch,
        learning_rate=1e-4,
        optimizer=AdamW(beta1=0.95, epsilon=1e-8),
        max_grad_norm=10.0,
    )
    observation, action = (
        jax.random.normal(jax.random.key(i), (ROWS_OF_DATA, d)) for i, d in ((2, OBSERVATION), (3, ACTIONS))
    )
    data = EpisodeChunks.cut([(observation, action)], horizon=HORIZON, observation_horizon=WINDOW)
    return algorithm, data


def train(size: int, batch: int, steps: int) -> float:
    """Milliseconds of a step, the loop with its checks and metrics included."""
    began = time.perf_counter()
    trained = steersman.train(*training(size, batch), iterations=steps, seeds=[0])
    jax.block_until_ready(trained.state)
    return 1e3 * (time.perf_counter() - began) / steps


def handle(request: dict) -> dict:
    size, batch, repeats, what = (request[name] for name in ("size", "batch", "repeats", "do"))
    if what == "train":
        if (size, batch, repeats) not in trained:
            train(size, batch, repeats)
            trained.add((size, batch, repeats))
        return {"ms": [train(size, batch, repeats)]}
    found = denoiser(size)
    x, conditions = jnp.ones((batch, HORIZON, ACTIONS)), jnp.ones((batch, CONDITION))
    keys = jax.random.split(jax.random.key(1), batch)
    if what == "call":
        return {
            "ms": worker.milliseconds(
                lambda: one_call(found, x, jnp.asarray(5.0), conditions).block_until_ready(), repeats
            )
        }
    sampler = OneCall(60) if what == "one" else DDIM(100 if what == "hundred" else 10)
    grid = warm_grid(found.process, [2, 1, 0]) if what == "warm" else None
    call = functools.partial(chunks, found, sampler, conditions, keys, x, grid)
    return {"ms": worker.milliseconds(lambda: call().block_until_ready(), repeats)}


if __name__ == "__main__":
    worker.answer_requests(handle, ("steersman", "jax", "equinox", "optax"))
