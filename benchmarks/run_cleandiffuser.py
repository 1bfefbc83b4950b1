"""CleanDiffuser's U-Net and DDIM in the diffusion benchmark; see diffusion.py.

The package pins libraries that no longer install; what is timed needs torch, einops and NumPy alone, so its source is
read from the folder CLEANDIFFUSER, a checkout of its repository.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import worker
from lerobot_reference import start_lerobot
from unet_sizes import ACTIONS, HORIZON, OBSERVATION, WIDTHS, WINDOW


@functools.cache
def model(size: int) -> Any:
    from cleandiffuser.diffusion.diffusionsde import DiscreteDiffusionSDE
    from cleandiffuser.nn_condition import IdentityCondition
    from cleandiffuser.nn_diffusion import ChiUNet1d

    width = WIDTHS[size][0]
    network = ChiUNet1d(ACTIONS, OBSERVATION, WINDOW, model_dim=width, emb_dim=128, dim_mult=[1, 2, 2])
    return DiscreteDiffusionSDE(
        network,
        IdentityCondition(dropout=0.0),
        diffusion_steps=100,
        grad_clip_norm=10.0,
        optim_params={"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6},
        x_max=torch.ones(HORIZON, ACTIONS),
        x_min=-torch.ones(HORIZON, ACTIONS),
        device="cpu",
    )


def handle(request: dict) -> dict:
    size, batch, repeats, what = (request[name] for name in ("size", "batch", "repeats", "do"))
    torch.set_num_threads(request["threads"])
    found = model(size)
    condition = torch.randn(batch, WINDOW, OBSERVATION)
    x = torch.randn(batch, HORIZON, ACTIONS)
    if what == "train":
        found.train()
        return {"ms": worker.milliseconds(lambda: found.update(x, condition), repeats)}
    found.eval()
    with torch.no_grad():
        if what == "call":
            network, time = found.model["diffusion"], torch.full((batch,), 5)
            return {"ms": worker.milliseconds(lambda: network(x, time, condition), repeats)}
        steps = 100 if what == "hundred" else 10
        call = functools.partial(
            found.sample,
            torch.zeros(batch, HORIZON, ACTIONS),
            solver="ddim",
            n_samples=batch,
            sample_steps=steps,
            condition_cfg=condition,
            w_cfg=1.0,
        )
        return {"ms": worker.milliseconds(call, repeats)}


if __name__ == "__main__":
    sys.path.insert(0, os.environ["CLEANDIFFUSER"])
    start_lerobot()
    worker.answer_requests(handle, ("torch",))
