"""Saved policies: bit-exact round trips, and files that are damaged or mean harm."""

import builtins
import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.envs.spaces import layout
from steersman.errors import InputError, InputTypeError
from steersman.networks import orthogonal
from steersman.policies import (
    ActionFilter,
    ChunkPolicy,
    ClipToBox,
    GaussianParameters,
    LinearFeedback,
    ObservationNoise,
    Policy,
    PolicyFileError,
    Preprocess,
    Standardize,
    Tabular,
    TabularStochastic,
    check_policy,
    head_for,
    load_policy,
    make_policy,
    policy_fits,
    save_policy,
    storage,
)

KEY = jax.random.key(0)


def double(x):
    return 2 * x


class Holder(Policy):
    """A user's own policy that holds anything."""

    content: Any
    fixed: Any = eqx.field(static=True, default=None)

    def __call__(self, observation, carry, key):
        return observation, carry


class Pair(NamedTuple):
    left: Any
    right: Any


class Careful(Policy):
    """Its constructor and converter must not run when it is loaded."""

    gain: jax.Array = eqx.field(converter=lambda x: jnp.asarray(x) * Careful.factor)
    factor = 2.0

    def __init__(self, gain):
        if Careful.factor != 2.0:
            raise AssertionError("__init__ ran")
        self.gain = gain

    def __check_init__(self):
        if Careful.factor != 2.0:
            raise AssertionError("__check_init__ ran")

    def __call__(self, observation, carry, key):
        return self.gain * observation, carry


class Chunks(eqx.Module):
    network: eqx.nn.MLP
    rows: int = eqx.field(static=True)

    def __call__(self, seen, key):
        return jnp.outer(jnp.arange(self.rows), self.network(jnp.ravel(seen))) + jax.random.normal(key, (self.rows, 1))


def network_policy(action_space, **options):
    space = spaces.Box(-1, 1, (3,))
    scale = Standardize(jnp.asarray([0.1, 0.2, 0.3]), jnp.ones(3))
    preprocess = Preprocess(layout(space), scale)
    return make_policy(preprocess, head_for(action_space), key=KEY, **{"hidden": (4,), **options})


BOX_ACTIONS = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 5], np.float32))
VECTOR = jnp.asarray([0.3, -0.5, 0.9])
POLICIES = {
    "categorical": (network_policy(spaces.Discrete(3, start=1)), VECTOR, ()),
    "multi": (network_policy(spaces.MultiDiscrete([2, 3])), VECTOR, ()),
    "gaussian": (network_policy(BOX_ACTIONS, initial_log_std=-0.3), VECTOR, ()),
    "recurrent": (network_policy(BOX_ACTIONS, memory=5), VECTOR, ()),
    "mode": (network_policy(BOX_ACTIONS).mode(), VECTOR, ()),
    "wrapped twice": (
        ActionFilter(ObservationNoise(network_policy(BOX_ACTIONS), 0.1), ClipToBox.from_space(BOX_ACTIONS)),
        VECTOR,
        (),
    ),
    "feedback": (LinearFeedback([[1.0, 2.0, 3.0]], low=-1.0), VECTOR, ()),
    "tabular": (Tabular([2, 0, 1]), jnp.asarray(1), ()),
    "tabular stochastic": (TabularStochastic([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0]]), jnp.asarray(0), ()),
    "chunks": (
        ChunkPolicy(
            Chunks(eqx.nn.MLP(6, 1, 4, 1, key=KEY), 4), 2, spaces.Box(-1, 1, (3,)), observation_horizon=2, first_row=1
        ),
        VECTOR,
        (Chunks,),
    ),
    "own": (Careful(jnp.asarray([1.0, 2.0, 3.0])), VECTOR, (Careful,)),
}


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(leaf)), bits(jax.random.key_data(leaf)))
    if isinstance(leaf, jax.Array):
        return ("jax", leaf.weak_type, bits(np.asarray(leaf)))
    if isinstance(leaf, (np.ndarray, np.generic)):
        return (type(leaf).__name__, leaf.dtype.name, leaf.shape, leaf.tobytes())
    return (type(leaf), repr(leaf))


def assert_same(found, expected):
    """Equal classes, fields, containers and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert bits(a) == bits(b)


def run(policy, observation):
    @jax.jit
    def go(observation, key):
        def step(carry, key):
            action, carry, record = policy.act(observation, carry, key)
            return carry, (action, record)

        return jax.lax.scan(step, policy.init(key), jax.random.split(key, 5))

    return go(observation, jax.random.key(7))


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_loaded_policy_is_the_saved_one(name, tmp_path):
    policy, observation, trusted = POLICIES[name]
    assert save_policy(policy, tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder"
    loaded = load_policy(tmp_path / "deep" / "folder", trusted=trusted)
    assert type(loaded) is type(policy)
    assert_same(loaded, policy)
    jax.tree.map(np.testing.assert_array_equal, run(loaded, observation), run(policy, observation))
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "policy.json",
        "policy.safetensors",
    ]


def test_no_constructor_or_converter_runs(tmp_path, monkeypatch):
    save_policy(POLICIES["own"][0], tmp_path)
    monkeypatch.setattr(Careful, "factor", 3.0)
    with pytest.raises(AssertionError):
        Careful(jnp.ones(3))
    np.testing.assert_array_equal(load_policy(tmp_path, trusted=(Careful,)).gain, [2.0, 4.0, 6.0])


def test_arrays_are_readable_by_anyone_and_named_by_their_path(tmp_path):
    policy = network_policy(BOX_ACTIONS)
    save_policy(policy, tmp_path)
    arrays = safetensors.numpy.load_file(tmp_path / "policy.safetensors")
    np.testing.assert_array_equal(arrays["network.trunk.weights[0]"], policy.network.trunk.weights[0])
    text = json.loads((tmp_path / "policy.json").read_text())
    assert text["policy"]["class"] == "steersman.policies:NetworkPolicy"
    assert text["arrays"]["entries"]["free"] == {"shape": [2], "dtype": "float32"}


def test_saving_again_replaces(tmp_path):
    for factor in (1.0, 2.0):
        save_policy(LinearFeedback([[factor]]), tmp_path)
        assert load_policy(tmp_path).gain[0, 0] == factor


# ------------------------------------------------------------------------------------------------- what can be held


DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype, tmp_path):
    data = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 16 * np.dtype(dtype).itemsize, np.uint8)
    array = np.frombuffer(data.tobytes(), np.dtype(dtype)).reshape(4, 4)
    content = {
        "jax": jnp.asarray(array),
        "numpy": array,
        "scalar": array[0, 0],
        "zero-d": jnp.asarray(array[1, 1]),
        "empty": jnp.zeros((0, 3), dtype),
        "transposed": array.T,
    }
    save_policy(Holder(content), tmp_path)
    assert_same(load_policy(tmp_path, (Holder,)).content, content)


def test_float64_needs_float64(tmp_path):
    with jax.enable_x64(True):
        policy = Holder((jnp.asarray([0.1, 1 / 3]), jnp.asarray(2**40)))
        save_policy(policy, tmp_path)
        assert_same(load_policy(tmp_path, (Holder,)), policy)
    with pytest.raises(PolicyFileError, match=r"policy.content\[0\] has dtype float64, .*enable_x64"):
        load_policy(tmp_path, (Holder,))
    # NumPy's own arrays are what they are.
    save_policy(Holder(np.asarray([0.1])), tmp_path)
    assert load_policy(tmp_path, (Holder,)).content.dtype == np.float64


def test_weak_types_survive(tmp_path):
    content = [jnp.asarray(0.5), jnp.full((2, 3), 0.25), jnp.asarray(3), jnp.asarray(0.5, jnp.float32)]
    save_policy(Holder(content), tmp_path)
    loaded = load_policy(tmp_path, (Holder,)).content
    assert_same(loaded, content)
    assert (loaded[0] * jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_random_keys_survive(tmp_path):
    content = [
        jax.random.key(3),
        jax.random.split(jax.random.key(1, impl="rbg"), 4),
        jax.random.key(0, impl="unsafe_rbg"),
    ]
    save_policy(Holder(content), tmp_path)
    assert_same(load_policy(tmp_path, (Holder,)).content, content)


FUNCTIONS = [jax.nn.relu, jax.nn.gelu, jnp.tanh, jnp.add, jnp.mean, orthogonal, double]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_named_functions_survive(function, tmp_path):
    save_policy(Holder(function, fixed=function), tmp_path)
    loaded = load_policy(tmp_path, (Holder, double))
    assert loaded.content is function
    assert loaded.fixed is function


def test_static_things_survive(tmp_path):
    fixed = (
        *(None, True, 0, -(2**70), 0.1, -0.0, 1e-320, float("inf"), -float("inf"), "", 'π\n"', ()),
        *(np.dtype("float32"), np.float16, jnp.bfloat16, np.dtype(ml_dtypes.bfloat16), float, int, np.bool_),
        Pair("a", GaussianParameters(1, 2.5)),
    )
    save_policy(Holder(None, fixed), tmp_path)
    loaded = load_policy(tmp_path, (Holder, Pair))
    assert loaded.fixed == fixed
    assert [type(a) for a in loaded.fixed] == [type(a) for a in fixed]
    assert repr(loaded.fixed) == repr(fixed)
    assert isinstance(loaded.fixed[-1].right, GaussianParameters)
    save_policy(Holder(float("nan")), tmp_path)
    assert np.isnan(load_policy(tmp_path, (Holder,)).content)


SPACES = [
    spaces.Box(-1.0, np.inf, (2, 3)),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Box(-1.0, 1.0, (), np.float64),
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 2], [3, 4]])),
    spaces.MultiBinary(3),
    spaces.MultiBinary((2, 3)),
    spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Tuple([spaces.Box(0, 1, (1,)), spaces.Discrete(3)]))]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive(space, tmp_path):
    save_policy(Holder(None, space), tmp_path)
    loaded = load_policy(tmp_path, (Holder,)).fixed
    assert loaded == space
    assert repr(loaded) == repr(space)
    assert (loaded.dtype, loaded.shape) == (space.dtype, space.shape)
    if isinstance(space, spaces.Dict):
        assert list(loaded.spaces) == list(space.spaces)
    if isinstance(space, spaces.Box):
        assert (loaded.low.tobytes(), loaded.high.tobytes()) == (space.low.tobytes(), space.high.tobytes())


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.integers(0, 3).map(lambda n: np.arange(n, dtype=np.int16)),
    st.floats(width=32, allow_nan=False).map(lambda x: jnp.asarray(x, jnp.float32)),
)
# JAX sorts the keys of a dict, so they are of one kind.
KEYS = (st.text(max_size=3), st.integers(-3, 3), st.tuples(st.integers(0, 1), st.text(max_size=1)))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        *(st.dictionaries(keys, inner, max_size=3) for keys in KEYS),
        st.tuples(inner, inner).map(lambda two: Pair(*two)),
        inner.map(Holder),
    ),
    max_leaves=12,
)


def describe_tree(value):
    """A nested tuple that is equal exactly where two trees are, order of dicts included."""
    if isinstance(value, Holder):
        return ("Holder", describe_tree(value.content))
    if isinstance(value, dict):
        return ("dict", [(k, type(k), describe_tree(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [describe_tree(v) for v in value])
    return bits(value)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_nested_containers_survive(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(Holder(tree), folder)
    assert describe_tree(load_policy(folder, (Holder, Pair))) == describe_tree(Holder(tree))


def test_equinox_networks_survive(tmp_path):
    networks = [
        eqx.nn.MLP(2, 3, 4, 2, activation=jax.nn.gelu, key=KEY),
        eqx.nn.GRUCell(2, 3, key=KEY),
        eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=KEY), eqx.nn.LayerNorm(3), eqx.nn.Lambda(jnp.tanh)]),
        eqx.nn.Conv1d(2, 3, 3, key=KEY),
        eqx.nn.MultiheadAttention(2, 4, key=KEY),
    ]
    save_policy(Holder(networks), tmp_path)
    loaded = load_policy(tmp_path, (Holder,)).content
    assert_same(loaded, networks)
    np.testing.assert_array_equal(loaded[0](jnp.ones(2)), networks[0](jnp.ones(2)))


# -------------------------------------------------------------------------------------------------- what cannot be held


def nested():
    content = 0
    for _ in range(70):
        content = [content]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda x: x, "policy.content is a lambda"),
        ({"a": [1, lambda x: x]}, r"policy.content\['a'\]\[1\] is a lambda"),
        (Holder(eqx.nn.Lambda(lambda x: x)), "policy.content.content.fn is a lambda"),
        (Holder("x").__call__, "policy.content"),
        (object(), "policy.content is a object"),
        ({1, 2}, "policy.content is a set"),
        (b"bytes", "policy.content is a bytes"),
        ({b"k": 1}, "policy.content is a dict with a bytes as a key"),
        (np.asarray(["text"]), "policy.content is an array of dtype <U4"),
        (np.zeros(2, np.complex128), "policy.content is an array of dtype complex128"),
        (spaces.Text(3), "policy.content is a Text space"),
        (os.system, "policy.content is the builtin_function_or_method"),
        (nested(), "policy is nested more than 64 levels deep"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_saved_is_refused_with_its_path(content, message, tmp_path):
    with pytest.raises(InputTypeError, match=message):
        save_policy(Holder(content), tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_modules_are_saved_and_only_outside_jit(tmp_path):
    with pytest.raises(InputTypeError, match="policy is a dict"):
        save_policy({}, tmp_path)
    with pytest.raises(InputTypeError, match=r"policy\.content is being traced"):
        jax.jit(lambda x: save_policy(Holder(x), tmp_path) and x)(jnp.ones(2))


def test_trusted_takes_classes_and_functions_only(tmp_path):
    save_policy(LinearFeedback([[1.0]]), tmp_path)
    for item in (os.system, subprocess.Popen, builtins.eval, "Holder", int):
        with pytest.raises(InputTypeError, match="trusted holds"):
            load_policy(tmp_path, trusted=(item,))
    assert load_policy(tmp_path, trusted=Holder).gain == 1.0  # One class needs no tuple.


# ------------------------------------------------------------------------------------------------------ damaged files


def rewrite(folder, change, sign=True):
    """Changes the description, as a forger would: with its digest made right again."""
    path = folder / "policy.json"
    description = json.loads(path.read_text())
    description = change(description) or description
    if sign:
        description["digest"] = storage._digest(description)
    path.write_text(json.dumps(description))


def forge_arrays(folder, arrays):
    """Other arrays under a description that says they are right."""
    data = arrays if isinstance(arrays, bytes) else safetensors.numpy.save(arrays)
    (folder / "policy.safetensors").write_bytes(data)

    def change(description):
        description["arrays"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite(folder, change)


@pytest.fixture
def saved(tmp_path):
    return save_policy(LinearFeedback([[1.0, 2.0]]), tmp_path / "policy")


def refused(folder, message, trusted=()):
    with pytest.raises(PolicyFileError, match=message) as caught:
        load_policy(folder, trusted)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert text.endswith(".")
    assert isinstance(caught.value, InputError)


def test_missing_files(saved, tmp_path):
    refused(tmp_path / "nowhere", "policy.json does not exist")
    (saved / "policy.safetensors").unlink()
    refused(saved, "policy.safetensors does not exist")
    (saved / "policy.safetensors").mkdir()
    refused(saved, "policy.safetensors cannot be read")


def test_truncated_and_changed_files(saved):
    path = saved / "policy.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    refused(saved, f"policy.safetensors has {len(data) - 5} bytes of {len(data)}: it was cut short")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(saved, "policy.safetensors does not match the digest")
    path.write_bytes(data)
    text = (saved / "policy.json").read_text()
    for broken in ("[]", "3"):
        (saved / "policy.json").write_text(broken)
        refused(saved, "is not the description of a Steersman policy")
    for broken in (text[: len(text) // 2], "", "\x00\x01", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (saved / "policy.json").write_text(broken)
        refused(saved, "policy.json is not readable JSON")
    (saved / "policy.json").write_bytes(b"\xff\xfe\x00")
    refused(saved, "policy.json is not readable JSON")
    (saved / "policy.json").write_text(text.replace("float32", "float64"))
    refused(saved, "policy.json does not match its digest")


def test_a_save_that_was_interrupted_between_the_files_is_noticed(saved, tmp_path):
    save_policy(LinearFeedback([[7.0, 2.0]]), tmp_path / "other")
    os.replace(tmp_path / "other" / "policy.safetensors", saved / "policy.safetensors")
    refused(saved, "policy.safetensors does not match the digest")


def test_a_failed_write_leaves_the_old_policy(saved, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_policy(LinearFeedback([[9.0, 9.0]]), saved)
    monkeypatch.undo()
    np.testing.assert_array_equal(load_policy(saved).gain, [[1.0, 2.0]])
    assert len(list(saved.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "format version 2 .written by Steersman .*upgrade Steersman"),
        (lambda d: d.update(version=0), "format version 0 .*save it again"),
        (lambda d: d.update(version="1"), "gives no format version"),
        (lambda d: d.update(format="other"), "is not the description of a Steersman policy"),
        (lambda d: d.pop("policy") and None, "holds a NoneType"),
        (lambda d: d.update(arrays=3), "has no table of arrays"),
        (lambda d: d.update(policy=3), "holds a int, but it must hold a policy"),
        (lambda d: d.update(policy={"kind": "pickle", "data": "..."}), "unknown kind 'pickle'"),
        (lambda d: d.update(policy=[1]), "policy is malformed"),
        (lambda d: d["policy"].pop("fields") and None, "has no valid 'fields'"),
        (lambda d: d["policy"]["fields"].pop("low"), "lacks the field 'low'"),
        (lambda d: d["policy"]["fields"].update(__class__=1), "has a field that the class does not have: '__class__'"),
        (lambda d: d["policy"]["fields"].update(low={"kind": "array", "name": "x", "holder": "jax"}), "'x', which is"),
        (lambda d: d["policy"]["fields"].update(low={"kind": "array", "name": ["x"]}), "which is not listed"),
        (lambda d: d["policy"]["fields"]["gain"].update(holder="object"), "unknown kind 'object'"),
        (lambda d: d["policy"]["fields"]["gain"].update(holder="key"), "PRNG key of the unknown kind None"),
        (
            lambda d: d["policy"]["fields"]["gain"].update(holder="key", implementation="threefry2x32"),
            "is not a PRNG key",
        ),
        (lambda d: d["policy"]["fields"].update(low={"kind": "float", "value": "1"}), "no valid 'value'"),
        (lambda d: d["policy"]["fields"].update(low={"kind": "list", "items": {}}), "no valid 'items'"),
        (lambda d: d["policy"]["fields"].update(low={"kind": "dict", "items": [1]}), "not pairs"),
        (
            lambda d: d["policy"]["fields"].update(low={"kind": "dict", "items": [[{"kind": "list", "items": []}, 1]]}),
            "a key that cannot be one",
        ),
        (lambda d: d["policy"]["fields"].update(low={"kind": "dtype", "form": "dtype", "name": "V9"}), "unknown dtype"),
        (lambda d: d["policy"]["fields"].update(low={"kind": "space", "space": "Graph"}), "unknown kind 'Graph'"),
        (
            lambda d: d["policy"]["fields"].update(low={"kind": "space", "space": "Discrete", "n": -1, "start": 0}),
            "not a valid Discrete space",
        ),
        (
            lambda d: d["policy"]["fields"].update(low={"kind": "space", "space": "Box", "low": 0, "high": 10**9}),
            "has no valid 'low'",
        ),
        (
            lambda d: d["policy"]["fields"].update(low={"kind": "space", "space": "Tuple", "items": [1]}),
            "not a space",
        ),
    ],
)
def test_descriptions_that_make_no_sense(saved, change, message):
    rewrite(saved, change)
    refused(saved, message)


def test_descriptions_nested_too_deeply(saved):
    def change(description):
        node = 1
        for _ in range(70):
            node = {"kind": "list", "items": [node]}
        description["policy"]["fields"]["low"] = node

    rewrite(saved, change)
    refused(saved, "is nested more than 64 levels deep")


def test_arrays_that_are_not_what_the_description_says(saved):
    good = safetensors.numpy.load_file(saved / "policy.safetensors")
    forge_arrays(saved, {name: value for name, value in good.items() if name != "gain"})
    refused(saved, "policy.safetensors lacks the array 'gain'")
    forge_arrays(saved, {**good, "gain": np.ones((2, 2), np.float32)})
    refused(saved, r"array 'gain' has shape \[2, 2\], not \[1, 2\]")
    forge_arrays(saved, {**good, "gain": np.ones((1, 2), np.float16)})
    refused(saved, "array 'gain' has dtype F16, not 'float32'")
    forge_arrays(saved, {**good, "extra": np.ones(1)})
    refused(saved, "holds the array 'extra'")
    forge_arrays(saved, b"not safetensors")
    refused(saved, "is not a readable safetensors file")


def test_huge_shapes_take_no_memory(saved):
    data = (saved / "policy.safetensors").read_bytes()
    header = {"gain": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    forge_arrays(saved, len(text).to_bytes(8, "little") + text + b"\0" * 8)
    refused(saved, "is not a readable safetensors file")
    # The length of the header itself.
    forge_arrays(saved, (2**62).to_bytes(8, "little") + data[8:])
    refused(saved, "is not a readable safetensors file")
    good = {"gain": np.ones((1, 2), np.float32)}
    forge_arrays(saved, good)
    rewrite(saved, lambda d: d["arrays"]["entries"]["gain"].update(shape=[2**40, 2**20]))
    refused(saved, "has shape")


# ------------------------------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "posix:system",
        "builtins:eval",
        "builtins:object",
        "subprocess:Popen",
        "equinox.nn:jax",
        "equinox.nn:_mlp.MLP",
        "equinox:Module",
        "equinox.nn._mlp:MLP",
        "nowhere:Thing",
        "tests.policies:Holder",
        "equinox.nn",
        "",
        ":",
    ],
)
def test_foreign_classes_are_never_used(saved, name):
    rewrite(saved, lambda d: d["policy"].update({"class": name}))
    refused(saved, r"names the class .*trusted=\(.*if it is your own and you trust it")
    # An unrelated trusted class changes nothing.
    refused(saved, "names the class", trusted=(Holder,))


def test_a_class_that_only_the_file_names_is_never_imported(saved):
    rewrite(saved, lambda d: d["policy"].update({"class": "antigravity:Flight"}))
    refused(saved, "antigravity:Flight")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steersman.policies:Nothing", "which this version of Steersman does not have"),
        ("steersman.nowhere:Nothing", "which this version of Steersman does not have"),
        ("steersman.policies.storage:os.system", "does not have"),
        ("steersman.policies.storage:json.JSONDecoder", "does not have"),
        ("steersman.policies.storage:Path", "does not have"),
        ("steersman.policies.storage:uuid.UUID", "does not have"),
        ("steersman.__main__:main", "does not have"),
        ("steersman.policies:Policy.__class__", "does not have"),
        ("steersman...policies:Policy", "does not have"),
        ("steersman.policies/../x:Policy", "does not have"),
        ("steersman.policies:Policy", "which is not an equinox.Module"),  # Abstract: it cannot act.
        ("steersman.policies:PolicyFileError", "which is not an equinox.Module"),
        ("steersman.policies:GaussianParameters", "which is not an equinox.Module"),
        ("equinox.nn:State", "which is not an equinox.Module"),
        ("steersman.policies:Tabular", "Tabular"),
    ],
)
def test_names_inside_steersman_give_modules_only(saved, name, message):
    rewrite(saved, lambda d: d["policy"].update({"class": name}))
    refused(saved, message)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "builtins:print",
        "jax.numpy:save",
        "jax.numpy:load",
        "jax.numpy:vectorize",
        "jax.numpy:__getattr__",
        "jax.numpy:float32",
        "jax.nn:initializers",
        "jax.lax:add",
        "steersman.policies.storage:save_policy",
        "steersman.policies:save_policy",
        "steersman.policies.storage:_write",
        "steersman.policies.storage:os.system",
        "steersman.policies.heads:eqx.filter_jit",
        "steersman.policies.heads:Categorical",
        "steersman.networks.mlp:jax.jit",
        "steersman.policies.policy:Policy.mode",
        "steersman.training.runs:atomic",
        "steersman.cli:main",
        "steersman:cite",
    ],
)
def test_foreign_functions_are_never_used(tmp_path, name):
    save_policy(Holder(jax.nn.relu), tmp_path)
    rewrite(tmp_path, lambda d: d["policy"]["fields"]["content"].update(name=name))
    refused(tmp_path, "names the function .* not one that a policy may call", trusted=(Holder, double))


def test_no_function_that_may_be_named_touches_files():
    # Whatever of jax.numpy a file may name must at most compute: checked against NumPy's own input and output routines.
    forbidden = {
        "save",
        "savez",
        "savez_compressed",
        "savetxt",
        "load",
        "loadtxt",
        "genfromtxt",
        "fromfile",
        "fromregex",
    }
    forbidden |= {"memmap", "tofile", "DataSource", "fromstring", "frombuffer", "from_dlpack"}
    named = {name for name in dir(jnp) if storage._jax_function("jax.numpy", name) is not None}
    assert not named & forbidden
    assert {"tanh", "maximum", "einsum"} <= named


def test_your_own_class_must_be_trusted_and_is_matched_by_identity(tmp_path):
    save_policy(Holder(1), tmp_path)
    refused(tmp_path, r"names the class '.*:Holder'.*trusted=\(Holder,\)")
    assert load_policy(tmp_path, (Holder,)).content == 1

    class Other(Holder):
        pass

    Other.__qualname__ = "Holder"
    loaded = load_policy(tmp_path, (Other,))
    assert type(loaded) is Other  # The caller's object, not what a module holds under that name.
    save_policy(Holder(double), tmp_path)
    refused(tmp_path, r"names the function '.*:double'.*trusted=\(double,\)", trusted=(Holder,))
    assert load_policy(tmp_path, (Holder, double)).content is double


def test_classes_made_inside_functions_can_be_trusted(tmp_path):
    class Local(Policy):
        gain: float

        def __call__(self, observation, carry, key):
            return self.gain * observation, carry

    save_policy(Local(2.0), tmp_path)
    assert load_policy(tmp_path, (Local,)).gain == 2.0


def test_a_changed_class_is_refused(tmp_path):
    def make(changed):
        class Local(Policy):
            gain: float
            if changed:
                bias: float = 0.0

            def __call__(self, observation, carry, key):
                return observation, carry

        return Local

    save_policy(make(False)(2.0), tmp_path)
    refused(tmp_path, "lacks the field 'bias'", trusted=(make(True),))
    save_policy(make(True)(2.0), tmp_path)
    refused(tmp_path, "has a field that the class does not have: 'bias'", trusted=(make(False),))


def test_forged_files_run_nothing(tmp_path, monkeypatch):
    """Every node of a good description, replaced by every bad one: a refusal or a policy, and never a call."""
    save_policy(POLICIES["wrapped twice"][0], tmp_path)
    good = json.loads((tmp_path / "policy.json").read_text())
    for module, name in ((os, "system"), (subprocess, "Popen"), (builtins, "eval"), (builtins, "exec")):
        monkeypatch.setattr(module, name, lambda *a, n=name, **k: pytest.fail(f"{n} was called"))

    def places(node, path=()):
        yield path
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            yield from places(child, (*path, key))

    bad = [
        None,
        1e300,
        [],
        {},
        {"kind": "module", "class": "os:system", "fields": {}},
        {"kind": "function", "name": "os:system"},
    ]
    for i, path in enumerate(places(good["policy"])):
        description = copy.deepcopy(good)
        node = description
        for key in ("policy", *path[:-1]) if path else ():
            node = node[key]
        node[path[-1] if path else "policy"] = bad[i % len(bad)]
        rewrite(tmp_path, lambda _, d=description: d)
        with contextlib.suppress(PolicyFileError):
            load_policy(tmp_path)


# ------------------------------------------------------------------------------------------------ does a policy fit?


class Spaces(NamedTuple):
    """The least that a problem must have to be checked against."""

    observation_space: gymnasium.Space
    action_space: gymnasium.Space


BOX3 = spaces.Box(-1, 1, (3,))
FITTING = {
    "categorical": Spaces(BOX3, spaces.Discrete(3, start=1)),
    "multi": Spaces(BOX3, spaces.MultiDiscrete([2, 3])),
    "gaussian": Spaces(spaces.Box(-1, 1, (3,), np.float64), BOX_ACTIONS),
    "recurrent": Spaces(BOX3, BOX_ACTIONS),
    "mode": Spaces(BOX3, BOX_ACTIONS),
    "wrapped twice": Spaces(BOX3, BOX_ACTIONS),
    "feedback": Spaces(BOX3, spaces.Box(-1, 1, (1,))),
    "tabular": Spaces(spaces.Discrete(3), spaces.Discrete(3)),
    "tabular stochastic": Spaces(spaces.Discrete(2), spaces.Discrete(3)),
    "chunks": Spaces(BOX3, spaces.Box(-1, 1, (1,))),
    "own": Spaces(BOX3, BOX3),
}


@pytest.mark.parametrize("name", list(FITTING))
def test_policies_fit_what_they_were_made_for(name):
    check_policy(POLICIES[name][0], FITTING[name])
    assert policy_fits(POLICIES[name][0], FITTING[name])


BOX2 = spaces.Box(-1, 1, (2,))
MISFITS = [
    ("categorical", Spaces(BOX2, spaces.Discrete(3, start=1)), "observations that flatten to 3 .* Box of shape"),
    ("categorical", Spaces(BOX3, spaces.Discrete(4, start=1)), r"chooses among Discrete\(3, start=1\)"),
    ("categorical", Spaces(BOX3, spaces.Discrete(3)), r"action space is Discrete\(3\)"),
    ("categorical", Spaces(BOX3, BOX_ACTIONS), r"actions of shape \(\) and dtype int32"),
    ("multi", Spaces(BOX3, spaces.MultiDiscrete([3, 2])), r"places of \(2, 3\) choices"),
    ("gaussian", Spaces(BOX3, spaces.Discrete(2)), r"actions of shape \(2,\) .* Discrete\(2\)"),
    ("gaussian", Spaces(BOX3, BOX3), r"actions of shape \(2,\) .* Box of shape \(3,\)"),
    ("mode", Spaces(BOX2, BOX_ACTIONS), "flatten to 3 numbers"),
    ("gaussian", Spaces(BOX3, spaces.Dict({"a": BOX_ACTIONS})), "actions of the structure"),
    ("feedback", Spaces(BOX2, spaces.Box(-1, 1, (1,))), "cannot act on observations from Box of shape"),
    ("feedback", Spaces(spaces.Dict({"x": BOX3}), spaces.Box(-1, 1, (1,))), "cannot act on observations"),
    ("tabular", Spaces(spaces.Discrete(4), spaces.Discrete(3)), "table of 3 states from 0"),
    ("tabular", Spaces(spaces.Discrete(3), spaces.Discrete(2)), "actions from 0 to 2"),
    ("tabular", Spaces(BOX3, spaces.Discrete(3)), "cannot act on observations"),
    ("tabular stochastic", Spaces(spaces.Discrete(2, start=1), spaces.Discrete(3)), "table of 2 states"),
    ("chunks", Spaces(BOX2, spaces.Box(-1, 1, (1,))), "cannot act on observations"),
]


@pytest.mark.parametrize(("name", "problem", "message"), MISFITS)
def test_a_policy_for_another_problem_is_told_apart(name, problem, message):
    assert not policy_fits(POLICIES[name][0], problem)
    with pytest.raises(InputError, match=message) as caught:
        check_policy(POLICIES[name][0], problem)
    assert str(caught.value).startswith("policy ")
    assert "\n" not in str(caught.value)


def test_a_memory_that_changes_its_shape_is_found():
    class Growing(Policy):
        def init(self, key):
            return jnp.zeros(1)

        def __call__(self, observation, carry, key):
            return observation, jnp.concatenate([carry, carry])

    with pytest.raises(InputError, match="policy returns the memory"):
        check_policy(Growing(), Spaces(BOX2, BOX2))


def test_gymnasium_environments_are_problems_too():
    environment = gymnasium.make("CartPole-v1")
    policy = make_policy(Preprocess(layout(environment.observation_space)), head_for(environment.action_space), key=KEY)
    check_policy(policy, environment)
    assert not policy_fits(policy, gymnasium.make("Acrobot-v1"))
    environment.close()
