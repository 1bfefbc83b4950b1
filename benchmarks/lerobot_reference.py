"""What LeRobot's own diffusion policies compute: the reference that Steersman's reader of their checkpoints is held to.

Runs in an environment with LeRobot (see requirements-lerobot.txt). ``python benchmarks/lerobot_reference.py`` writes
``tests/data/lerobot/<case>/``: LeRobot's configuration and processors, the checkpoint (or, where it is large, only the
names and shapes of its arrays, which :func:`weight` fills), and ``reference.npz`` with observations, noise and the
actions. ``... check FOLDER CASE`` reads a checkpoint that Steersman wrote and compares its actions with the case's.
"""

from __future__ import annotations

import json
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "lerobot"
CASES: dict[str, dict[str, Any]] = {
    "state-ddpm": {
        "shapes": {"observation.state": (3,), "observation.environment_state": (2,)},
        "config": {"num_train_timesteps": 50, "num_inference_steps": 15, "n_groups": 4, "clip_sample_range": 1.5},
    },
    "state-ddim": {
        "shapes": {"observation.state": (3,), "observation.environment_state": (2,)},
        "config": {
            "noise_scheduler_type": "DDIM",
            "num_inference_steps": 5,
            "prediction_type": "sample",
            "use_film_scale_modulation": False,
            "beta_schedule": "linear",
            "kernel_size": 3,
            "normalization_mapping": {"STATE": "MEAN_STD", "ENV": "MIN_MAX", "ACTION": "MEAN_STD"},
        },
    },
    "image-group": {
        "shapes": {"observation.state": (3,), "observation.images.a": (3, 40, 36), "observation.images.b": (3, 40, 36)},
        "config": {
            "noise_scheduler_type": "DDIM",
            "num_inference_steps": 5,
            "crop_shape": (33, 32),
            "spatial_softmax_num_keypoints": 4,
            "use_group_norm": True,
            "use_separate_rgb_encoder_per_camera": False,
        },
    },
    "image-batch": {
        "shapes": {"observation.state": (3,), "observation.images.a": (3, 36, 40), "observation.images.b": (3, 36, 40)},
        "config": {
            "noise_scheduler_type": "DDIM",
            "num_inference_steps": 3,
            "spatial_softmax_num_keypoints": 4,
            "use_group_norm": False,
            "use_separate_rgb_encoder_per_camera": True,
        },
    },
}
ACTIONS = 2


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array that is a function of its name and shape alone."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    count = int(np.prod(shape))
    wave = 2.0 * np.modf(4e4 * np.sin(np.arange(count) + zlib.crc32(name.encode()) % 1000) + 4e4)[0] - 1.0
    if name.endswith("running_var"):
        value = 1.0 + 0.5 * wave
    elif len(shape) > 1:
        value = 1.7 * wave / np.sqrt(np.prod(shape[1:]))
    else:
        value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * wave
    return value.reshape(shape).astype(np.float32)


def statistics(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """Made-up statistics of the observations and the actions."""
    rng = np.random.default_rng(1)
    found = {}
    for name, shape in {**shapes, "action": (ACTIONS,)}.items():
        size = (shape[0], 1, 1) if len(shape) == 3 else shape
        low = rng.uniform(-2.0, 0.0, size).astype(np.float32)
        high = low + rng.uniform(1.0, 3.0, size).astype(np.float32)
        std = (0.3 * (high - low)).astype(np.float32)
        found[name] = {"min": low, "max": high, "mean": (0.5 * (low + high)).astype(np.float32), "std": std}
    return found


def start_lerobot() -> None:
    """Lets torchvision be imported beside a torch that its compiled part was not made for; nothing needs that part."""
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


def make_policy(case: str) -> tuple[Any, Any]:
    """LeRobot's policy with the formula's weights, and its configuration."""
    import torch
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    kinds = {"state": FeatureType.STATE, "environment_state": FeatureType.ENV}
    settings = dict(CASES[case]["config"])
    if "normalization_mapping" in settings:
        modes = settings["normalization_mapping"]
        settings["normalization_mapping"] = {kind: NormalizationMode(mode) for kind, mode in modes.items()}
    config = DiffusionConfig(
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        # A group of one channel of eight rows may hardly vary, and then its normalization amplifies rounding.
        down_dims=(8, 16) if case.startswith("state") else (32, 32),
        diffusion_step_embed_dim=8,
        device="cpu",
        input_features={
            name: PolicyFeature(kinds.get(name.split(".", 1)[1], FeatureType.VISUAL), shape)
            for name, shape in CASES[case]["shapes"].items()
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
        **settings,
    )
    policy = DiffusionPolicy(config)
    # The grid of the keypoints is computed, not learned.
    state = {
        name: value if name.endswith("pos_grid") else torch.as_tensor(weight(name, tuple(value.shape)))
        for name, value in policy.state_dict().items()
    }
    policy.load_state_dict(state)
    return policy.eval(), config


def act(policy: Any, before: Any, after: Any, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The whole normalized chunk and the actions in the task's units, with given noise."""
    import torch
    from diffusers.schedulers import scheduling_ddpm

    names = list(policy.config.input_features)
    frames = [before({name: torch.as_tensor(given[name][i]) for name in names}) for i in range(2)]
    batch = {name: torch.stack([frame[name] for frame in frames], dim=1) for name in names}
    images = list(policy.config.image_features)
    if images:
        batch["observation.images"] = torch.stack([batch[name] for name in images], dim=-4)
    noises = iter(given["noises"])
    scheduling_ddpm.randn_tensor = lambda *_, **__: torch.as_tensor(next(noises))[None]
    chunks = []
    inner = policy.diffusion.conditional_sample

    def record(*arguments: Any, **options: Any) -> Any:
        chunks.append(inner(*arguments, **options))
        return chunks[-1]

    policy.diffusion.conditional_sample = record
    with torch.no_grad():
        actions = policy.diffusion.generate_actions(batch, noise=torch.as_tensor(given["start"])[None])
        actions = after(actions)
    return chunks[0][0].numpy(), actions[0].numpy()


def write(case: str) -> None:
    """Writes the reference of one case."""
    from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors

    policy, config = make_policy(case)
    shapes = CASES[case]["shapes"]
    before, after = make_diffusion_pre_post_processors(config, statistics(shapes))
    rng = np.random.default_rng(2)
    given = {name: rng.uniform(0.0, 1.0, (2, *shape)).astype(np.float32) for name, shape in shapes.items()}
    steps = config.num_inference_steps
    given["start"] = rng.standard_normal((8, ACTIONS)).astype(np.float32)
    given["noises"] = rng.standard_normal((steps, 8, ACTIONS)).astype(np.float32)
    chunk, actions = act(policy, before, after, given)
    folder = DATA / case
    folder.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    if config.image_features:
        (folder / "model.safetensors").unlink()
        arrays = {name: list(value.shape) for name, value in policy.state_dict().items()}
        (folder / "arrays.json").write_text(json.dumps(arrays))
    np.savez_compressed(folder / "reference.npz", chunk=chunk, actions=actions, **given)
    print(case, "chunk", chunk.std(), "actions", actions.ravel()[:4])


def check(folder: str, case: str) -> None:
    """Loads what Steersman wrote with LeRobot's own classes and compares actions."""
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    policy = DiffusionPolicy.from_pretrained(folder, strict=True)
    before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
    reference = dict(np.load(DATA / case / "reference.npz"))
    chunk, actions = act(policy.eval(), before, after, reference)
    print(
        json.dumps(
            {
                "case": case,
                "chunk": float(np.abs(chunk - reference["chunk"]).max()),
                "actions": float(np.abs(actions - reference["actions"]).max()),
            }
        )
    )


if __name__ == "__main__":
    start_lerobot()
    if sys.argv[1:2] == ["check"]:
        check(sys.argv[2], sys.argv[3])
    else:
        for name in CASES:
            write(name)
