"""LeRobot's diffusion policy in the diffusion benchmark; see diffusion.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
import worker
from lerobot_reference import start_lerobot
from unet_sizes import ACTIONS, HORIZON, OBSERVATION, WIDTHS, WINDOW

HALF = OBSERVATION // 2


@functools.cache
def model(size: int) -> Any:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel

    config = DiffusionConfig(
        down_dims=WIDTHS[size],
        horizon=HORIZON,
        n_obs_steps=WINDOW,
        device="cpu",
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
        # It trains only with images or a state of the environment.
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (HALF,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (OBSERVATION - HALF,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
    )
    return DiffusionModel(config)


def handle(request: dict) -> dict:
    size, batch, repeats, what = (request[name] for name in ("size", "batch", "repeats", "do"))
    torch.set_num_threads(request["threads"])
    found = model(size)
    if what == "train":
        found.train()
        optimizer = torch.optim.Adam(found.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        data = {
            "observation.state": torch.randn(batch, WINDOW, HALF),
            "observation.environment_state": torch.randn(batch, WINDOW, OBSERVATION - HALF),
            "action": torch.randn(batch, HORIZON, ACTIONS),
            "action_is_pad": torch.zeros(batch, HORIZON, dtype=torch.bool),
        }

        def update() -> None:
            found.compute_loss(data).backward()
            torch.nn.utils.clip_grad_norm_(found.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()

        return {"ms": worker.milliseconds(update, repeats)}
    found.eval()
    condition = torch.randn(batch, WINDOW * OBSERVATION)
    with torch.no_grad():
        if what == "call":
            x, time = torch.randn(batch, HORIZON, ACTIONS), torch.full((batch,), 5)
            return {"ms": worker.milliseconds(lambda: found.unet(x, time, global_cond=condition), repeats)}
        found.num_inference_steps = 100 if what == "hundred" else 10
        return {"ms": worker.milliseconds(lambda: found.conditional_sample(batch, global_cond=condition), repeats)}


if __name__ == "__main__":
    start_lerobot()
    worker.answer_requests(handle, ("lerobot", "torch", "diffusers"))
