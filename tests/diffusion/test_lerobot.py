"""Equality with LeRobot itself: tests/data/lerobot was written by LeRobot (benchmarks/lerobot_reference.py)."""

import json
import shutil
import zlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steersman.diffusion import DDIM, DiscreteVP, DPMSolver, RectifiedFlow, Scaling
from steersman.diffusion.lerobot import load_lerobot, save_lerobot
from steersman.errors import InputError, InputTypeError

DATA = Path(__file__).resolve().parent.parent / "data" / "lerobot"


def formula(name, shape):
    """The weights of the image policies, a function of name and shape: as in benchmarks/lerobot_reference.py."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    wave = 2.0 * np.modf(4e4 * np.sin(np.arange(int(np.prod(shape))) + zlib.crc32(name.encode()) % 1000) + 4e4)[0] - 1.0
    if name.endswith("running_var"):
        value = 1.0 + 0.5 * wave
    elif len(shape) > 1:
        value = 1.7 * wave / np.sqrt(np.prod(shape[1:]))
    else:
        value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * wave
    return value.reshape(shape).astype(np.float32)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    def make(case):
        folder = tmp_path_factory.mktemp(case)
        shutil.copytree(DATA / case, folder, dirs_exist_ok=True)
        arrays = json.loads((folder / "arrays.json").read_text())
        save_file({name: formula(name, tuple(shape)) for name, shape in arrays.items()}, folder / "model.safetensors")
        return folder

    return make


@eqx.filter_jit
def run(policy, observation, start, noises):
    generator = policy.generator
    chunk = generator.chain(observation, None, start=start, noises=noises).chunk
    return chunk, generator.action_scaling.restore(chunk)


def compare(folder, case):
    """Largest differences of the chunk and of the played actions."""
    policy = load_lerobot(folder)
    reference = dict(np.load(DATA / case / "reference.npz"))
    observation = {name: jnp.asarray(reference[name]) for name, _ in policy.observation_shapes}
    chunk, actions = run(policy, observation, jnp.asarray(reference["start"]), jnp.asarray(reference["noises"]))
    first = policy.observation_horizon - 1
    played = actions[first : first + policy.action_horizon]
    assert played.shape == reference["actions"].shape
    return np.abs(chunk - reference["chunk"]).max(), np.abs(played - reference["actions"]).max()


@pytest.mark.parametrize("case", ["state-ddpm", "state-ddim"])
def test_same_noise_gives_lerobots_actions(case):
    assert max(compare(DATA / case, case)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["image-group", "image-batch"])
def test_same_noise_gives_lerobots_actions_from_images(case, image_folder):
    assert max(compare(image_folder(case), case)) < 1e-5


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(DATA / "state-ddim", tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_older_checkpoints_keep_the_statistics_in_the_model(copied):
    """Versions before the processors: buffers in the model, shapes and modes under other names, no type."""
    weights = load_file(copied / "model.safetensors")
    statistics = load_file(copied / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    for name, value in statistics.items():
        entry, statistic = name.rsplit(".", 1)
        rooms = ("normalize_targets", "unnormalize_outputs") if entry == "action" else ("normalize_inputs",)
        for room in rooms:
            weights[f"{room}.buffer_{entry.replace('.', '_')}.{statistic}"] = value
    save_file(weights, copied / "model.safetensors")
    for path in copied.glob("policy_*"):
        path.unlink()
    config = json.loads((copied / "config.json").read_text())
    config["input_shapes"] = {name: f["shape"] for name, f in config.pop("input_features").items()}
    config["output_shapes"] = {name: f["shape"] for name, f in config.pop("output_features").items()}
    modes = {key: mode.lower() for key, mode in config.pop("normalization_mapping").items()}
    config["input_normalization_modes"] = {
        "observation.state": modes["STATE"],
        "observation.environment_state": modes["ENV"],
    }
    config["output_normalization_modes"] = {"action": modes["ACTION"]}
    del config["type"]
    (copied / "config.json").write_text(json.dumps(config))
    assert max(compare(copied, "state-ddim")) < 1e-5


def test_what_is_written_reads_back(tmp_path):
    """Weights bit for bit under LeRobot's names; actions to rounding, as the scalings are written in another form."""
    for case in ("state-ddpm", "state-ddim"):
        save_lerobot(tmp_path / case, load_lerobot(DATA / case))
        before, after = (load_file(folder / case / "model.safetensors") for folder in (DATA, tmp_path))
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
        want, got = (json.loads((folder / case / "config.json").read_text()) for folder in (DATA, tmp_path))
        same = set(got) - {"normalization_mapping", "beta_start", "beta_end"}
        assert {name: got[name] for name in same} == {name: want[name] for name in same}
    assert max(compare(tmp_path / "state-ddim", "state-ddim")) < 1e-5


@pytest.mark.slow
def test_written_image_policies_have_lerobots_arrays(tmp_path, image_folder):
    folder = image_folder("image-batch")
    save_lerobot(tmp_path, load_lerobot(folder))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        # The formula fills LeRobot's grid of pixel positions with numbers of its own.
        if name.endswith("pool.pos_grid"):
            assert after[name].shape == value.shape
        else:
            np.testing.assert_array_equal(after[name], value)


def test_the_policy_plays_chunks_out():
    loaded = load_lerobot(DATA / "state-ddpm")
    policy = loaded.policy()
    assert (policy.action_horizon, policy.observation_horizon, policy.first_row) == (4, 2, 1)
    observation = {name: jnp.ones(shape) for name, shape in loaded.observation_shapes}
    step = eqx.filter_jit(lambda *a: policy(*a))
    action, carry = step(observation, policy.init(jax.random.key(0)), jax.random.key(1))
    following, carry = step(observation, carry, jax.random.key(2))
    assert action.shape == (2,)
    np.testing.assert_array_equal(np.stack([action, following]), carry.queue[:2])


def test_constant_entries(copied):
    """What never changed is -1 to the network, and comes back as itself."""
    path = copied / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    statistics = load_file(path)
    statistics["observation.environment_state.max"][0] = statistics["observation.environment_state.min"][0]
    save_file(statistics, path)
    scaling = load_lerobot(copied).generator.observation_scaling["observation.environment_state"]
    low = jnp.asarray(statistics["observation.environment_state.min"])
    np.testing.assert_allclose(scaling.normalize(low), -1.0, atol=1e-6)


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config.pop(name) if value is None else config.update({name: value})
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "act"}, "type is 'act', but it must be 'diffusion'"),
        ({"input_features": None}, "has no 'input_features'"),
        ({"input_features": {"action": {"shape": [2]}}}, "has no 'observation.state'"),
        ({"output_features": {}}, "has no 'action'"),
        ({"horizon": None}, "has no 'horizon'"),
        ({"horizon": 7}, r"chunk_shape\[0\] is 7, but it must be a multiple of 2"),
        ({"noise_scheduler_type": "PNDM"}, "noise_scheduler_type is 'PNDM'"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"down_dims": [8, 24]}, "by config.json it must be"),
        ({"down_dims": [8, 16, 16]}, "has no 'diffusion.unet.down_modules.1.2.weight'"),
        ({"normalization_mapping": {"STATE": "MAGIC"}}, "'MAGIC' for 'observation.state'"),
        ({"normalization_mapping": {"STATE": "QUANTILES"}}, "no statistic 'observation.state.q01'"),
        ({"n_action_steps": None}, "has no 'n_action_steps'"),
    ],
)
def test_foreign_configurations(copied, changes, message):
    edit(copied, **changes)
    with pytest.raises(InputError, match=message):
        load_lerobot(copied)


def test_arrays_left_over(copied):
    weights = load_file(copied / "model.safetensors")
    weights["model.text_encoder.weight"] = np.zeros(2, np.float32)
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(InputError, match=r"has 'model\.text_encoder\.weight', which no diffusion policy"):
        load_lerobot(copied)


def test_foreign_image_configurations(tmp_path):
    shutil.copytree(DATA / "image-group", tmp_path, dirs_exist_ok=True)
    edit(tmp_path, vision_backbone="resnet50")
    with pytest.raises(InputError, match="vision_backbone is 'resnet50'"):
        load_lerobot(tmp_path)
    edit(tmp_path, vision_backbone="resnet18", resize_shape=[20, 20])
    with pytest.raises(InputError, match="resize_shape is"):
        load_lerobot(tmp_path)


def test_missing_and_broken_files(copied):
    with pytest.raises(InputError, match=r"is no LeRobot checkpoint: it has no config\.json"):
        load_lerobot(copied / "nothing")
    (copied / "policy_preprocessor_step_3_normalizer_processor.safetensors").unlink()
    with pytest.raises(InputError, match="policy_preprocessor_step_3_normalizer_processor"):
        load_lerobot(copied)
    for path in copied.glob("policy_*"):
        path.unlink()
    with pytest.raises(InputError, match=r"no statistic 'observation.state.mean'"):
        load_lerobot(copied)
    (copied / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_lerobot(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it has no model\.safetensors"):
        load_lerobot(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        load_lerobot(copied)
    (copied / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must be a JSON object"):
        load_lerobot(copied)


def test_policies_that_lerobot_does_not_have(tmp_path):
    policy = load_lerobot(DATA / "state-ddim")

    def refused(where, value, message, error=InputError):
        changed = eqx.tree_at(where, policy, value, is_leaf=lambda leaf: leaf is None)
        with pytest.raises(error, match=message):
            save_lerobot(tmp_path, changed)

    refused(lambda p: p.generator.sampler, DPMSolver(5), "sampler is DPMSolver", InputTypeError)
    refused(lambda p: p.generator.sampler, DDIM(5, eta=0.5), "sampler is a DDIM with eta")
    refused(lambda p: p.generator.denoiser.process, RectifiedFlow(), "DiscreteVP process", InputTypeError)
    trailing = DiscreteVP.linear(100, spacing="trailing")
    refused(lambda p: p.generator.denoiser.process, trailing, "spacing is 'trailing'")
    odd = DiscreteVP.from_betas(np.linspace(0.01, 0.3, 100) ** 2.5)
    refused(lambda p: p.generator.denoiser.process, odd, "process has other noise rates")
    refused(lambda p: p.generator.denoiser.network, lambda x, t, c: x, "TemporalUNet", InputTypeError)
    assert isinstance(policy.generator.action_scaling, Scaling)
