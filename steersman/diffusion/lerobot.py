"""LeRobot's diffusion-policy checkpoints, read and written without LeRobot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from steersman.diffusion.denoiser import NetworkDenoiser
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.processes import DiscreteVP
from steersman.diffusion.samplers import DDIM, DDPM, Sampler
from steersman.diffusion.scaling import Scaling
from steersman.errors import InputError, InputTypeError, require, require_count
from steersman.networks import CroppedEncoder, ResNet18, TemporalUNet, WindowEncoder
from steersman.networks.encoders import FrozenBatchNorm
from steersman.policies import ChunkPolicy

STATE = "observation.state"
ENVIRONMENT = "observation.environment_state"
PREDICTION_TYPES = {"epsilon": "noise", "sample": "sample"}
SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")
#: What LeRobot's normalization divides by at least.
SMALLEST = 1e-8
#: Statistics that a normalization mode reads: what becomes the middle, and the ends of [-1, 1] where there are two.
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


class LeRobotPolicy(eqx.Module):
    """A diffusion policy in LeRobot's terms: a generator of chunks, and how observations come in and actions go out.

    Attributes:
        generator: the denoiser on a :class:`~steersman.networks.TemporalUNet`, its sampler and its scalings. Replace
            its parts freely: any sampler, a composed or distilled denoiser.
        observation_shapes: names and shapes of one observation's entries.
        observation_horizon: observations that a window has, LeRobot's ``n_obs_steps``.
        action_horizon: rows played out of each chunk, ``n_action_steps``.
    """

    generator: ChunkGenerator
    observation_shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    observation_horizon: int = eqx.field(static=True)
    action_horizon: int = eqx.field(static=True)

    def __init__(
        self,
        generator: ChunkGenerator,
        observation_shapes: Mapping[str, tuple[int, ...]],
        observation_horizon: int,
        action_horizon: int,
    ):
        """Collects the parts.

        Args:
            generator: makes chunks of windows that are dictionaries.
            observation_shapes: for each entry of an observation, its shape: ``"observation.state"`` ``[n]``, images
                ``"observation.image..."`` ``[channels, height, width]``, ``"observation.environment_state"`` ``[n]``.
            observation_horizon: length of a window.
            action_horizon: rows played out of each chunk.
        """
        require_count("observation_horizon", observation_horizon)
        require_count("action_horizon", action_horizon)
        self.generator = generator
        self.observation_shapes = tuple((name, tuple(shape)) for name, shape in observation_shapes.items())
        self.observation_horizon = observation_horizon
        self.action_horizon = action_horizon

    def policy(self) -> ChunkPolicy:
        """The policy: it remembers the window, and plays chunks out from the row of the newest observation on."""
        space = spaces.Dict(
            {name: spaces.Box(-np.inf, np.inf, shape, np.float32) for name, shape in self.observation_shapes}
        )
        return self.generator.policy(self.action_horizon, space, observation_horizon=self.observation_horizon)


def _block_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for place, other in (("first", "conv1"), ("second", "conv2")):
        yield f"{ours}.{place}.convolution", f"{theirs}.{other}.block.0"
        yield f"{ours}.{place}.norm", f"{theirs}.{other}.block.1"
    yield f"{ours}.modulation", f"{theirs}.cond_encoder.1"
    yield f"{ours}.shortcut", f"{theirs}.residual_conv"


def _unet_names(levels: int) -> Iterator[tuple[str, str]]:
    yield "time_layers.0", "diffusion_step_encoder.1"
    yield "time_layers.1", "diffusion_step_encoder.3"
    for room, other, count, last in (
        ("down", "down_modules", levels, "downsampling"),
        ("up", "up_modules", levels - 1, "upsampling"),
    ):
        for level in range(count):
            yield from _block_names(f"{room}.{level}.first", f"{other}.{level}.0")
            yield from _block_names(f"{room}.{level}.second", f"{other}.{level}.1")
            yield f"{room}.{level}.{last}", f"{other}.{level}.2"
    for place in range(2):
        yield from _block_names(f"middle.{place}", f"mid_modules.{place}")
    yield "final.convolution", "final_conv.0.block.0"
    yield "final.norm", "final_conv.0.block.1"
    yield "output", "final_conv.1"


def _resnet_names() -> Iterator[tuple[str, str]]:
    yield "stem", "backbone.0"
    yield "stem_norm", "backbone.1"
    for block in range(8):
        theirs = f"backbone.{4 + block // 2}.{block % 2}"
        for place, convolution, norm in (
            ("first", "conv1", "bn1"),
            ("second", "conv2", "bn2"),
            ("shortcut", "downsample.0", "downsample.1"),
        ):
            yield f"blocks.{block}.{place}", f"{theirs}.{convolution}"
            yield f"blocks.{block}.{place}_norm", f"{theirs}.{norm}"
    yield "maps", "pool.nets"
    yield "output", "out"


def _find(module: Any, path: str) -> Any:
    for part in path.split("."):
        if module is None:
            return None
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def _arrays(module: TemporalUNet | ResNet18, prefix: str) -> Iterator[tuple[str, str]]:
    """Where each array of `module` is, and its name in a checkpoint."""
    names = _unet_names(len(module.down)) if isinstance(module, TemporalUNet) else _resnet_names()
    fields = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    for ours, theirs in names:
        layer = _find(module, ours)
        for field, other in fields.items():
            if getattr(layer, field, None) is not None:
                yield f"{ours}.{field}", f"{prefix}{theirs}.{other}"


def _reshaped(path: str, array: Any, *, ours: bool) -> Any:
    """An array in our layout from LeRobot's, or the other way round."""
    if path.endswith("upsampling.weight"):
        return array.transpose(2, 1, 0)
    if path == "maps.weight":
        return array.reshape(array.shape[:2]) if ours else array[:, :, None, None]
    return array


def _fill(module: Any, prefix: str, given: dict[str, np.ndarray], file: Path) -> Any:
    """`module` with the arrays of a checkpoint, which are taken out of `given`."""
    table = list(_arrays(module, prefix))
    missing = [name for _, name in table if name not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{file} has no {missing[0]!r}{more}: it does not belong to this config.json.")
    new = []
    for path, name in table:
        array = _reshaped(path, given.pop(name), ours=True)
        want = tuple(_find(module, path).shape)
        if array.shape != want:
            raise InputError(f"{file} has {name!r} of shape {array.shape}, but by config.json it must be {want}.")
        new.append(jnp.asarray(array, jnp.result_type(float)))
    return eqx.tree_at(lambda tree: [_find(tree, path) for path, _ in table], module, new)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent} is no LeRobot checkpoint: it has no {path.name}.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, but it must be a JSON object.")
    return found


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise InputError(f"{path.parent} is no whole LeRobot checkpoint: it has no {path.name}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from None


def _features(config: dict[str, Any], path: Path) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Shapes of the observation's entries and of the action, in either generation's words."""
    if "input_features" in config:
        inputs = {name: tuple(f["shape"]) for name, f in (config["input_features"] or {}).items()}
        outputs = {name: tuple(f["shape"]) for name, f in (config.get("output_features") or {}).items()}
    elif "input_shapes" in config:
        inputs = {name: tuple(shape) for name, shape in config["input_shapes"].items()}
        outputs = {name: tuple(shape) for name, shape in config.get("output_shapes", {}).items()}
    else:
        raise InputError(f"{path} has no 'input_features'.")
    if STATE not in inputs:
        raise InputError(f"{path} has no {STATE!r} among its inputs {sorted(inputs)}, which a diffusion policy needs.")
    if "action" not in outputs:
        raise InputError(f"{path} has no 'action' among its outputs {sorted(outputs)}.")
    return inputs, outputs["action"]


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if name == STATE:
        return "STATE"
    if name == ENVIRONMENT:
        return "ENV"
    if name == "action":
        return "ACTION"
    if len(shape) == 3:
        return "VISUAL"
    raise InputError(
        f"observation has {name!r} of shape {shape}, but a diffusion policy reads "
        f"{STATE!r}, {ENVIRONMENT!r} and images."
    )


def _modes(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The normalization mode of each entry."""
    if "normalization_mapping" in config:
        mapping = config["normalization_mapping"]
        return {name: str(mapping.get(_kind(name, shape), "IDENTITY")).upper() for name, shape in shapes.items()}
    old = {**config.get("input_normalization_modes", {}), **config.get("output_normalization_modes", {})}
    return {name: str(old.get(name, "IDENTITY")).upper() for name in shapes}


def _statistics(folder: Path, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics by ``entry.statistic``: of the processors' files, or of buffers that older versions keep in the model.

    The latter are taken out of `weights`. Older names have underscores for dots: ``observation_state``.
    """
    found = {}
    for name in [name for name in weights if name.startswith(("normalize_", "unnormalize_"))]:
        parts = name.split(".")
        value = weights.pop(name)
        if len(parts) == 3 and parts[1].startswith("buffer_"):
            found[f"{parts[1].removeprefix('buffer_')}.{parts[2]}"] = value
    for processor in ("policy_preprocessor.json", "policy_postprocessor.json"):
        if (folder / processor).is_file():
            for step in _read_json(folder / processor).get("steps", []):
                if "normalizer" in step.get("registry_name", "") and "state_file" in step:
                    found.update(_read_arrays(folder / step["state_file"]))
    return found


def _scaling(name: str, mode: str, statistics: dict[str, np.ndarray], folder: Path) -> Scaling | None:
    if mode == "IDENTITY":
        return None
    if mode not in STATISTICS:
        raise InputError(f"normalization_mapping has {mode!r} for {name!r}: known are {sorted(STATISTICS)}.")
    values = []
    for statistic in STATISTICS[mode]:
        keys = (f"{name}.{statistic}", f"{name.replace('.', '_')}.{statistic}")
        key = next((key for key in keys if key in statistics), None)
        if key is None:
            raise InputError(
                f"{folder} has no statistic {keys[0]!r}, which {mode} normalization needs: neither in "
                "policy_preprocessor.json's files nor in the model."
            )
        values.append(np.asarray(statistics[key], np.float64))
        if not np.isfinite(values[-1]).all():
            raise InputError(f"{folder} has the statistic {key!r} with NaN or infinity: the policy was never fitted.")
    first, second = values
    if mode == "MEAN_STD":
        offset, scale = first, second + SMALLEST
    else:
        still = second == first
        # What never changed is -1 in the network's units, and as an action comes back as what it was.
        width = np.where(still, SMALLEST if name == "action" else 2.0, second - first)
        offset, scale = first + 0.5 * width, 0.5 * width
    return Scaling(jnp.asarray(offset, jnp.result_type(float)), jnp.asarray(scale, jnp.result_type(float)))


def _betas(schedule: str, levels: int, start: float, end: float) -> np.ndarray:
    """Noise rates as the diffusers library has them, with their rounding: the last of them are felt."""
    if schedule == "squaredcos_cap_v2":
        u = np.arange(levels + 1) / levels
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - f[1:] / f[:-1], 0.999).astype(np.float32)
    if schedule == "linear":
        return np.linspace(start, end, levels, dtype=np.float32)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, levels, dtype=np.float32) ** 2
    raise InputError(f"beta_schedule is {schedule!r}, but it must be one of {list(SCHEDULES)}.")


def load_lerobot(folder: str | Path) -> LeRobotPolicy:
    """Reads a diffusion policy that LeRobot saved.

    Reads ``config.json``, ``model.safetensors`` and the statistics of the normalization, from the processors' files or,
    in checkpoints of older versions, from the model. From the same noise it computes the same actions as LeRobot. Runs
    no code of the checkpoint.

    Observations are dictionaries with LeRobot's names; images are floats ``[channels, height, width]`` in [0, 1].
    Crops are central when the policy acts; while it is trained on they are at random places, if ``crop_is_random``.

    Args:
        folder: where ``config.json`` is.

    Raises:
        InputError: a file or an array is missing, or is not that of such a policy, or the policy uses what is not
            supported here (another backbone than ``resnet18``, resized images); the sentence names it.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = _read_json(path)
    kind = config.get("type", "diffusion" if "down_dims" in config else None)
    require(kind == "diffusion", f"{path}: type", kind, "'diffusion'")
    inputs, action_shape = _features(config, path)

    def get(name: str, default: Any = ...) -> Any:
        value = config.get(name, default)
        if value is ...:
            raise InputError(f"{path} has no {name!r}.")
        return value

    images = [name for name, shape in inputs.items() if _kind(name, shape) == "VISUAL"]
    if images:
        backbone = get("vision_backbone", "resnet18")
        require(backbone == "resnet18", f"{path}: vision_backbone", backbone, "'resnet18'")
        require(
            not config.get("resize_shape"),
            f"{path}: resize_shape",
            config.get("resize_shape"),
            "null: resize images before",
        )
    horizon, frames = get("horizon"), get("n_obs_steps")
    weights = {
        name.replace("_orig_mod.", ""): value for name, value in _read_arrays(folder / "model.safetensors").items()
    }
    statistics = _statistics(folder, weights)
    for name in [name for name in weights if name.endswith(("num_batches_tracked", "pool.pos_grid"))]:
        del weights[name]
    file = folder / "model.safetensors"
    encoders: dict[str, Any] = {STATE: None}
    size = math.prod(inputs[STATE])
    if images:
        crop = config.get("crop_shape")

        shape: Any = inputs[images[0]]
        sides = shape[1:] if crop is None else (crop[0], crop[1])

        def make_encoder() -> ResNet18:
            return ResNet18(
                (shape[0], *sides),
                keypoints=get("spatial_softmax_num_keypoints", 32),
                normalization="group" if get("use_group_norm", True) else "batch",
                key=jax.random.key(0),
            )

        def cropped(encoder: ResNet18) -> ResNet18 | CroppedEncoder:
            return encoder if crop is None else CroppedEncoder(encoder, shape, sides, get("crop_is_random", True))

        blank = eqx.filter_eval_shape(make_encoder)
        if config.get("use_separate_rgb_encoder_per_camera", False):
            for place, name in enumerate(images):
                encoders[name] = cropped(_fill(blank, f"diffusion.rgb_encoder.{place}.", weights, file))
        else:
            shared = cropped(_fill(blank, "diffusion.rgb_encoder.", weights, file))
            encoders.update(dict.fromkeys(images, shared))
        size += len(images) * 2 * get("spatial_softmax_num_keypoints", 32)
    if ENVIRONMENT in inputs:
        encoders[ENVIRONMENT] = None
        size += math.prod(inputs[ENVIRONMENT])
    widths = tuple(get("down_dims"))

    def make_network() -> TemporalUNet:
        return TemporalUNet(
            (horizon, action_shape[0]),
            frames * size,
            widths,
            kernel=get("kernel_size", 5),
            groups=get("n_groups", 8),
            time_size=get("diffusion_step_embed_dim", 128),
            scaled=get("use_film_scale_modulation", True),
            key=jax.random.key(0),
        )

    network = _fill(eqx.filter_eval_shape(make_network), "diffusion.unet.", weights, file)
    if weights:
        raise InputError(f"{file} has {sorted(weights)[0]!r}, which no diffusion policy with this config.json has.")
    modes = _modes(config, {**inputs, "action": action_shape})
    scalings = {name: _scaling(name, modes[name], statistics, folder) for name in (*inputs, "action")}
    action_scaling = scalings.pop("action")
    predicted = get("prediction_type", "epsilon")
    require(predicted in PREDICTION_TYPES, f"{path}: prediction_type", predicted, "'epsilon' or 'sample'")
    betas = _betas(
        get("beta_schedule", "squaredcos_cap_v2"),
        get("num_train_timesteps", 100),
        get("beta_start", 1e-4),
        get("beta_end", 0.02),
    )
    limit = get("clip_sample_range", 1.0) if get("clip_sample", True) else None
    rule = get("noise_scheduler_type", "DDPM")
    require(rule in ("DDPM", "DDIM"), f"{path}: noise_scheduler_type", rule, "'DDPM' or 'DDIM'")
    sampler = (DDPM if rule == "DDPM" else DDIM)(steps=config.get("num_inference_steps"), limit=limit)
    denoiser = NetworkDenoiser(
        network=network,
        process=DiscreteVP.from_betas(betas),
        chunk_shape=(horizon, action_shape[0]),
        prediction=PREDICTION_TYPES[predicted],
        encoder=WindowEncoder(encoders),
    )
    generator = ChunkGenerator(
        denoiser,
        sampler,
        action_scaling=Scaling.identity() if action_scaling is None else action_scaling,
        observation_scaling=scalings,
    )
    return LeRobotPolicy(generator, inputs, frames, get("n_action_steps"))


def _schedule(process: DiscreteVP) -> dict[str, Any]:
    """The settings of LeRobot's schedule that `process` is."""
    signal = np.asarray(process.signal, np.float64)
    betas = 1.0 - signal[1:] / signal[:-1]
    levels, start, end = betas.size, float(f"{betas[0]:.5g}"), float(f"{betas[-1]:.5g}")
    for name in SCHEDULES:
        if np.allclose(_betas(name, levels, start, end), betas, rtol=1e-4, atol=2e-6):
            found: dict[str, Any] = {"beta_schedule": name, "num_train_timesteps": levels}
            return found if name == SCHEDULES[0] else {**found, "beta_start": start, "beta_end": end}
    raise InputError(f"process has other noise rates than LeRobot's schedules {list(SCHEDULES)}.")


def _sampler(sampler: Sampler) -> dict[str, Any]:
    if isinstance(sampler, DDIM) and (sampler.eta > 0.0 or sampler.limited_noise):
        raise InputError("sampler is a DDIM with eta or limited_noise, which LeRobot does not have.")
    if not isinstance(sampler, (DDPM, DDIM)) or sampler.std_bounds is not None or sampler.noise_limit is not None:
        raise InputTypeError(f"sampler is {sampler!r}, but LeRobot has only plain DDPM and DDIM.")
    limit = sampler.limit
    return {
        "noise_scheduler_type": type(sampler).__name__,
        "num_inference_steps": sampler.steps,
        "clip_sample": limit is not None,
        "clip_sample_range": 1.0 if limit is None else limit,
    }


def _write_processors(
    folder: Path, features: dict[str, Any], modes: dict[str, str], statistics: dict[str, np.ndarray]
) -> None:
    from safetensors.numpy import save_file

    outputs = {"action": features["action"]}
    to_cpu = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    for name, steps, at, own in (
        (
            "policy_preprocessor",
            [
                {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
                {"registry_name": "to_batch_processor", "config": {}},
                to_cpu,
            ],
            3,
            features,
        ),
        ("policy_postprocessor", [to_cpu], 0, outputs),
    ):
        kind = "normalizer_processor" if at else "unnormalizer_processor"
        state_file = f"{name}_step_{at}_{kind}.safetensors"
        settings = {"eps": SMALLEST, "features": own, "norm_map": modes}
        steps.insert(at, {"registry_name": kind, "config": settings, "state_file": state_file})
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}, indent=2))
        save_file(statistics, folder / state_file)


def save_lerobot(folder: str | Path, policy: LeRobotPolicy) -> None:
    """Writes a diffusion policy as LeRobot saves it: configuration, weights, and processors with the statistics.

    Every entry is normalized by mean and standard deviation there, which any scaling can be written as.

    Args:
        folder: made where it does not exist; files of the same names are overwritten.
        policy: its denoiser a plain network of the kind that :func:`load_lerobot` makes.

    Raises:
        InputError: LeRobot has nothing like a part of it (another network, process or sampler); the sentence names it.
    """
    from safetensors.numpy import save_file

    denoiser = policy.generator.denoiser
    network = getattr(denoiser, "network", None)
    if not isinstance(denoiser, NetworkDenoiser) or not isinstance(network, TemporalUNet):
        raise InputTypeError("policy has a denoiser other than a NetworkDenoiser on a TemporalUNet.")
    encoder, process = denoiser.encoder, denoiser.process
    if not isinstance(encoder, WindowEncoder) or not isinstance(process, DiscreteVP):
        raise InputTypeError("policy has a denoiser without a WindowEncoder on a DiscreteVP process.")
    inverse = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    require(denoiser.prediction in inverse, "prediction", denoiser.prediction, f"one of {sorted(inverse)}")
    require(denoiser.output_scale == 1.0, "output_scale", denoiser.output_scale, "1, as LeRobot's")
    require(process.spacing == "leading", "process.spacing", process.spacing, "'leading', as LeRobot's")
    shapes = dict(policy.observation_shapes)
    images = [name for name, shape in shapes.items() if _kind(name, shape) == "VISUAL"]
    order = tuple(name for name in (STATE, *images, ENVIRONMENT) if name in shapes)
    require(encoder.names == order, "encoder.names", encoder.names, f"{order}, LeRobot's order")
    arrays: dict[str, np.ndarray] = {}

    def put(module: TemporalUNet | ResNet18, prefix: str) -> None:
        for path, name in _arrays(module, prefix):
            array = np.asarray(_find(module, path), np.float32)
            arrays[name] = np.ascontiguousarray(_reshaped(path, array, ours=False))

    put(network, "diffusion.unet.")
    first = network.down[0].first
    config: dict[str, Any] = {
        "type": "diffusion",
        "n_obs_steps": policy.observation_horizon,
        "horizon": denoiser.chunk_shape[0],
        "n_action_steps": policy.action_horizon,
        "down_dims": [level.first.first.convolution.weight.shape[0] for level in network.down],
        "kernel_size": first.first.convolution.weight.shape[2],
        "n_groups": first.first.norm.groups,
        "diffusion_step_embed_dim": network.time_features.size,
        "use_film_scale_modulation": first.scaled,
        "prediction_type": inverse[denoiser.prediction],
        **_schedule(process),
        **_sampler(policy.generator.sampler),
    }
    require(network.final.norm.groups == 8, "widths[0]", config["down_dims"][0], "at least 8 to be read by LeRobot")
    if images:
        places = encoder.places[1 : 1 + len(images)]
        used = [encoder.encoders[place] if place >= 0 else None for place in places]
        separate = len(set(places)) > 1
        crops = [encoder if isinstance(encoder, CroppedEncoder) else None for encoder in used]
        used = [encoder if crop is None else crop.encoder for encoder, crop in zip(used, crops, strict=True)]
        for place, image_encoder in enumerate(used):
            if not isinstance(image_encoder, ResNet18):
                raise InputTypeError(f"encoder of {images[place]!r} is no ResNet18.")
            prefix = f"diffusion.rgb_encoder.{place}." if separate else "diffusion.rgb_encoder."
            put(image_encoder, prefix)
            # Five layers of stride 2.
            height, width = (-(-side // 32) for side in image_encoder.image_shape[1:])
            across, down = np.meshgrid(np.linspace(-1.0, 1.0, width), np.linspace(-1.0, 1.0, height))
            arrays[f"{prefix}pool.pos_grid"] = np.stack([across.ravel(), down.ravel()], axis=1).astype(np.float32)
            if isinstance(image_encoder.stem_norm, FrozenBatchNorm):
                for name in [name for name in arrays if name.startswith(prefix) and name.endswith("running_mean")]:
                    arrays[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
        image_encoder = used[0]
        assert isinstance(image_encoder, ResNet18)
        config |= {
            "vision_backbone": "resnet18",
            "pretrained_backbone_weights": None,
            "crop_shape": crops[0] and crops[0].crop,
            "crop_is_random": crops[0] is None or crops[0].random,
            "spatial_softmax_num_keypoints": image_encoder.maps.weight.shape[0],
            "use_group_norm": not isinstance(image_encoder.stem_norm, FrozenBatchNorm),
            "use_separate_rgb_encoder_per_camera": separate,
        }
    all_shapes: dict[str, tuple[int, ...]] = {**shapes, "action": (denoiser.chunk_shape[1],)}
    features = {name: {"type": _kind(name, shape), "shape": list(shape)} for name, shape in all_shapes.items()}
    modes = {feature["type"]: "MEAN_STD" for feature in features.values()}
    statistics = {}
    given = policy.generator.observation_scaling
    for name, shape in all_shapes.items():
        scaling = policy.generator.action_scaling if name == "action" else given and given.get(name)
        scaling = scaling or Scaling.identity()
        size = (shape[0], 1, 1) if len(shape) == 3 else shape
        for statistic, value in (("mean", scaling.offset), ("std", scaling.scale)):
            statistics[f"{name}.{statistic}"] = np.array(np.broadcast_to(np.asarray(value, np.float32), size))
    config["input_features"] = {name: feature for name, feature in features.items() if name != "action"}
    config["output_features"] = {"action": features["action"]}
    config["normalization_mapping"] = modes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    save_file(arrays, folder / "model.safetensors")
    _write_processors(folder, features, modes, statistics)
