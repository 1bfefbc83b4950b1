"""Policies on disk: arrays as safetensors, everything else as JSON. Loading runs no code from the files.

The JSON names classes and functions; it never defines them. A name is looked up only in ``steersman``, in
``equinox.nn``, in a short list of JAX functions, and in what the caller passes as ``trusted``. Instances are filled
field by field, as JAX rebuilds a PyTree, so that no constructor and no converter runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import sys
import types
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from gymnasium import spaces
from jax.core import Tracer

from steersman.envs.spaces import as_gymnasium_space, describe, layout
from steersman.errors import InputError, InputTypeError
from steersman.policies.heads import Categorical, MultiCategorical
from steersman.policies.network import NetworkPolicy
from steersman.policies.policy import Mode, Policy, StochasticPolicy, zero_element
from steersman.policies.tabular import Tabular, TabularStochastic
from steersman.policies.wrappers import ObservationNoise

FORMAT = "steersman-policy"
#: Version of the description. It changes when an older one can no longer be read.
VERSION = 1

DESCRIPTION = "policy.json"
ARRAYS = "policy.safetensors"

#: NumPy's names of the dtypes that can be stored, with those of safetensors.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}

#: Levels of nesting that can be saved and read: more than a policy has, fewer than Python's stack holds.
_DEEPEST = 64

_KEY_KINDS = ("threefry2x32", "rbg", "unsafe_rbg")

#: Rooms whose module-level functions a file may name: those that hold mathematics, none that reads or writes.
_FUNCTION_ROOMS = ("networks", "policies", "returns", "objectives", "control", "mdp", "diffusion", "envs")

#: Functions of ``jax.numpy`` that no file may name: they touch files or foreign memory, or call what they are given.
_FORBIDDEN_FUNCTIONS = frozenset(
    (
        *("from_dlpack", "frombuffer", "fromfile", "fromfunction", "fromiter", "frompyfunc", "fromstring"),
        *("load", "save", "savez", "printoptions", "set_printoptions"),
        *("apply_along_axis", "apply_over_axes", "piecewise", "vectorize"),
    )
)

_MODULE_NAME = re.compile(r"steersman(\.[A-Za-z_][A-Za-z0-9_]*)*")

_M = TypeVar("_M", bound=eqx.Module)


class PolicyFileError(InputError):
    """A saved policy cannot be read: a file is missing, damaged, of another format, or not to be trusted."""


# ------------------------------------------------------------------------------------------------------------ saving


def save_policy(policy: Any, folder: str | os.PathLike[str]) -> Path:
    """Writes a policy as ``policy.safetensors`` (arrays) and ``policy.json`` (everything else).

    Any PyTree of ``equinox.Module`` can be saved whose fields hold arrays, PRNG keys, numbers, strings, None, dtypes,
    Gymnasium spaces, functions that have a name, and lists, tuples, named tuples and dicts of these. Each file is
    replaced atomically, the description last: a folder that was interrupted between the two is recognized as damaged
    when it is read.

    Args:
        policy: what to save, an ``equinox.Module``.
        folder: where to; made if it is not there.

    Returns:
        The folder.

    Raises:
        InputTypeError: a field holds something that cannot be saved; the message gives its path.
    """
    if not isinstance(policy, eqx.Module):
        raise InputTypeError(f"policy is a {type(policy).__name__}, but it must be an equinox.Module.")
    encoder = _Encoder()
    tree = encoder.encode(policy, "policy")
    data = safetensors.numpy.save(encoder.arrays)
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {"steersman": _own_version(), "jax": jax.__version__, "equinox": eqx.__version__},
        "policy": tree,
        "arrays": {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "entries": {
                name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in encoder.arrays.items()
            },
        },
    }
    description["digest"] = _digest(description)
    text = json.dumps(description, indent=1, allow_nan=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / ARRAYS, data)
    _write(folder / DESCRIPTION, text.encode())
    return folder


def _own_version() -> str:
    from steersman import __version__

    return __version__


def _digest(description: dict[str, Any]) -> str:
    """SHA-256 of the description without its digest, independent of white space and the order of keys."""
    rest = {name: value for name, value in description.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Encoder:
    """Turns a value into JSON, putting arrays aside."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._depth = 0

    def encode(self, value: Any, path: str) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise InputTypeError(f"policy is nested more than {_DEEPEST} levels deep, or contains itself.")
        node = self._encode(value, path)
        self._depth -= 1
        return node

    def _encode(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"kind": "float", "value": repr(value)}
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return self._array(value, path)
        if isinstance(value, eqx.Module):
            return self._module(value, path)
        if _is_namedtuple(type(value)):
            fields = {n: self.encode(v, f"{path}.{n}") for n, v in zip(value._fields, value, strict=True)}
            return {"kind": "namedtuple", "class": _class_name(type(value)), "fields": fields}
        if type(value) in (list, tuple):
            items = [self.encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
            return {"kind": type(value).__name__, "items": items}
        if type(value) is dict:
            items = [[self._key(k, path), self.encode(v, f"{path}[{k!r}]")] for k, v in value.items()]
            return {"kind": "dict", "items": items}
        if isinstance(value, spaces.Space):
            return self._space(value, path)
        dtype = _dtype_node(value)
        if dtype is not None:
            return dtype
        if callable(value):
            return self._function(value, path)
        raise _cannot_save(path, f"a {type(value).__name__}")

    def _key(self, key: Any, path: str) -> Any:
        if type(key) is tuple:
            return {"kind": "tuple", "items": [self._key(part, path) for part in key]}
        if key is None or type(key) in (bool, int, str, float):
            return self.encode(key, path)
        raise _cannot_save(path, f"a dict with a {type(key).__name__} as a key")

    def _array(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Tracer):
            raise InputTypeError(
                f"{path} is being traced by JAX: save_policy must be called outside jit, vmap and grad."
            )
        node: dict[str, Any] = {"kind": "array", "name": self._name(path), "holder": "jax"}
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            node |= {"holder": "key", "implementation": str(jax.random.key_impl(value))}
            if node["implementation"] not in _KEY_KINDS:
                raise _cannot_save(path, f"a PRNG key of the kind {node['implementation']}")
            value = jax.random.key_data(value)
        elif isinstance(value, jax.Array):
            node |= {"weak": True} if value.weak_type else {}
        else:
            node["holder"] = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        array = np.asarray(value)
        if array.dtype.name not in _DTYPES:
            raise _cannot_save(path, f"an array of dtype {array.dtype}")
        # A copy in C order and native byte order; np.ascontiguousarray would give a scalar an axis.
        self.arrays[node["name"]] = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
        return node

    def _name(self, path: str) -> str:
        name = base = path.partition(".")[2] or path
        count = 1
        while name in self.arrays:
            count += 1
            name = f"{base}~{count}"
        return name

    def _module(self, value: eqx.Module, path: str) -> dict[str, Any]:
        held = vars(value)
        fields = {}
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            if field.name not in held:
                raise InputTypeError(f"{path}.{field.name} was never set, so the policy cannot be saved.")
            fields[field.name] = self.encode(held[field.name], f"{path}.{field.name}")
        return {"kind": "module", "class": _class_name(type(value)), "fields": fields}

    def _space(self, space: spaces.Space, path: str) -> dict[str, Any]:
        node: dict[str, Any] = {"kind": "space", "space": type(space).__name__}
        if type(space) is spaces.Box:
            bounds = {side: self.encode(getattr(space, side), f"{path}.{side}") for side in ("low", "high")}
            return node | bounds | {"dtype": _dtype_node(space.dtype)}
        if type(space) is spaces.Discrete:
            return node | {"n": int(space.n), "start": int(space.start), "dtype": _dtype_node(space.dtype)}
        if type(space) is spaces.MultiDiscrete:
            parts = {name: self.encode(getattr(space, name), f"{path}.{name}") for name in ("nvec", "start")}
            return node | parts | {"dtype": _dtype_node(space.dtype)}
        if type(space) is spaces.MultiBinary:
            return node | {"n": self.encode(space.n, path)}
        if type(space) is spaces.Dict:
            inner = [[name, self.encode(part, f"{path}[{name!r}]")] for name, part in space.spaces.items()]
            if all(type(name) is str for name, _ in inner):
                return node | {"items": inner}
        if type(space) is spaces.Tuple:
            return node | {"items": [self.encode(part, f"{path}[{i}]") for i, part in enumerate(space.spaces)]}
        raise _cannot_save(path, f"a {type(space).__name__} space")

    def _function(self, value: Any, path: str) -> dict[str, Any]:
        name = _function_name(value)
        if name is not None:
            return {"kind": "function", "name": name}
        what = "a lambda" if getattr(value, "__name__", "") == "<lambda>" else f"the {type(value).__name__} {value!r}"
        raise _cannot_save(path, what)


def _cannot_save(path: str, what: str) -> InputTypeError:
    return InputTypeError(
        f"{path} is {what}, which cannot be saved: a policy's fields may hold arrays, numbers, strings, None, dtypes, "
        "Gymnasium spaces, equinox.Modules, functions defined at the top level of a module, and containers of these."
    )


def _class_name(cls: type) -> str:
    """``module:name``, with the front door of its room where the room exports the class."""
    parts = cls.__module__.split(".")
    doors = [".".join(parts[:2])] if parts[0] in ("steersman", "equinox") else []
    for module in [*doors, cls.__module__]:
        if getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
            return f"{module}:{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def _dtype_node(value: Any) -> dict[str, Any] | None:
    """A dtype in the form in which it was given: ``np.dtype``, NumPy's or JAX's scalar type, or Python's."""
    if isinstance(value, np.dtype):
        form, name = "dtype", value.name
    elif isinstance(value, type(jnp.float32)):
        form, name = "jax", np.dtype(value).name
    elif isinstance(value, type) and issubclass(value, np.generic):
        form, name = "numpy", np.dtype(value).name
    elif value in (bool, int, float) and isinstance(value, type):
        return {"kind": "dtype", "form": "python", "name": value.__name__}
    else:
        return None
    return {"kind": "dtype", "form": form, "name": name} if name in _DTYPES else None


# --------------------------------------------------------------------------------------------------------- functions


@functools.cache
def _identity() -> Callable[[Any], Any]:
    # The default of eqx.nn.MLP's last activation is a lambda, found here without naming a private module.
    return inspect.signature(eqx.nn.MLP.__init__).parameters["final_activation"].default


def _jax_function(module: str, name: str) -> Any:
    """The function of ``jax.nn`` or ``jax.numpy`` that a file may name, or None."""
    if name.startswith("_") or name in _FORBIDDEN_FUNCTIONS:
        return None
    found = vars({"jax.nn": jax.nn, "jax.numpy": jnp}[module]).get(name)
    if not callable(found) or isinstance(found, (type, type(jnp.float32))):
        return None
    return found


def _function_name(value: Any) -> str | None:
    """The name under which a function is saved; None where it has none that would find it again."""
    if value is _identity():
        return "equinox.nn:identity"
    for module in ("jax.nn", "jax.numpy"):
        for name in vars(sys.modules[module]):
            if _jax_function(module, name) is value:
                return f"{module}:{name}"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or name is None or getattr(sys.modules.get(module), name, None) is not value:
        return None
    return f"{module}:{name}" if isinstance(value, types.FunctionType) or hasattr(value, "__wrapped__") else None


# ----------------------------------------------------------------------------------------------------------- loading


def load_policy(folder: str | os.PathLike[str], trusted: Sequence[Any] | type = ()) -> Any:
    """Reads what :func:`save_policy` wrote, without running any code from the files.

    Args:
        folder: the folder with ``policy.safetensors`` and ``policy.json``.
        trusted: your own classes (``equinox.Module`` or named tuples) and module-level functions that the policy may
            be made of; one class needs no tuple. Nothing outside Steersman, ``equinox.nn`` and JAX's array functions
            is used unless it is here.

    Returns:
        The policy, every array equal bit for bit.

    Raises:
        PolicyFileError: a file is missing, damaged, of another format, or names something that is not trusted.
        InputTypeError: `trusted` holds something that is neither a module class, a named tuple nor a function.
    """
    folder = Path(folder)
    known = _trusted_names(trusted)
    description = _read_description(folder / DESCRIPTION)
    arrays = _read_arrays(folder / ARRAYS, description.get("arrays"))
    policy = _Decoder(folder, arrays, known).decode(description.get("policy"), "policy")
    if not isinstance(policy, eqx.Module):
        raise PolicyFileError(f"{folder / DESCRIPTION} holds a {type(policy).__name__}, but it must hold a policy.")
    return policy


def _trusted_names(trusted: Any) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for item in trusted if isinstance(trusted, (tuple, list)) else (trusted,):
        if isinstance(item, type) and (issubclass(item, eqx.Module) or _is_namedtuple(item)):
            known[_class_name(item)] = item
        elif isinstance(item, types.FunctionType) or (not isinstance(item, type) and hasattr(item, "__wrapped__")):
            known[f"{item.__module__}:{item.__qualname__}"] = item
        else:
            raise InputTypeError(
                f"trusted holds {item!r}, but it may hold only equinox.Module classes, named tuples and functions."
            )
    return known


def _is_namedtuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PolicyFileError(f"{path} does not exist, so there is no policy to load.") from None
    except OSError as error:
        raise PolicyFileError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_description(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        description = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise PolicyFileError(f"{path} is not readable JSON: it was cut short or changed.") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise PolicyFileError(f"{path} is not the description of a Steersman policy.")
    version = description.get("version")
    if type(version) is not int:
        raise PolicyFileError(f"{path} gives no format version.")
    if version != VERSION:
        writer = description.get("written_by")
        writer = writer.get("steersman", "unknown") if isinstance(writer, dict) else "unknown"
        advice = "upgrade Steersman to read it" if version > VERSION else "save it again with this version"
        raise PolicyFileError(
            f"{path} has format version {version} (written by Steersman {writer}), but this version reads {VERSION}: "
            f"{advice}."
        )
    with contextlib.suppress(ValueError, RecursionError):
        if description.get("digest") == _digest(description):
            return description
    raise PolicyFileError(f"{path} does not match its digest: it was damaged or changed after it was written.")


def _read_arrays(path: Path, table: Any) -> dict[str, np.ndarray]:
    """The arrays of the file, checked against what the description says about them."""
    description = path.with_name(DESCRIPTION)
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(entries, dict):
        raise PolicyFileError(f"{description} has no table of arrays.")
    data = _read(path)
    if len(data) != table.get("bytes"):
        raise PolicyFileError(f"{path} has {len(data)} bytes of {table.get('bytes')}: it was cut short or replaced.")
    if hashlib.sha256(data).hexdigest() != table.get("sha256"):
        raise PolicyFileError(f"{path} does not match the digest in {DESCRIPTION}: it was damaged or replaced.")
    try:
        stored = dict(safetensors.deserialize(data))
    except Exception as error:  # The parser's own error class moved between its versions.
        raise PolicyFileError(f"{path} is not a readable safetensors file: {error}.") from None
    arrays = {}
    for name, entry in entries.items():
        if name not in stored:
            raise PolicyFileError(f"{path} lacks the array {name!r} that {DESCRIPTION} lists.")
        found, shape = stored[name], entry.get("shape") if isinstance(entry, dict) else None
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        # Sizes come from the bytes that are there: a shape is only ever compared, so none can make memory be taken.
        if list(found["shape"]) != shape:
            raise PolicyFileError(f"{path}'s array {name!r} has shape {list(found['shape'])}, not {shape}.")
        if not isinstance(dtype, str) or _DTYPES.get(dtype) != found["dtype"]:
            raise PolicyFileError(f"{path}'s array {name!r} has dtype {found['dtype']}, not {dtype!r}.")
        arrays[name] = np.frombuffer(found["data"], np.dtype(dtype)).reshape(shape)
    unexpected = sorted(set(stored) - set(arrays))
    if unexpected:
        raise PolicyFileError(f"{path} holds the array {unexpected[0]!r} that {DESCRIPTION} does not list.")
    return arrays


class _Decoder:
    """Rebuilds values from JSON and arrays."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray], trusted: dict[str, Any]) -> None:
        self.file = folder / DESCRIPTION
        self.arrays = arrays
        self.trusted = trusted
        self._depth = 0

    def error(self, path: str, what: str) -> PolicyFileError:
        return PolicyFileError(f"{self.file}: {path} {what}.")

    def decode(self, node: Any, path: str) -> Any:
        if node is None or type(node) in (bool, int, float, str):
            return node
        if not isinstance(node, dict):
            raise self.error(path, "is malformed")
        kind = node.get("kind")
        readers: dict[Any, Callable[[dict[str, Any], str], Any]] = {
            "array": self._array,
            "dict": self._dict,
            "dtype": self._dtype,
            "float": self._float,
            "function": self._function,
            "list": self._items,
            "module": self._module,
            "namedtuple": self._namedtuple,
            "space": self._space,
            "tuple": lambda node, path: tuple(self._items(node, path)),
        }
        if not isinstance(kind, str) or kind not in readers:
            raise self.error(path, f"is of the unknown kind {kind!r}")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise PolicyFileError(f"{self.file} is nested more than {_DEEPEST} levels deep.")
        value = readers[kind](node, path)
        self._depth -= 1
        return value

    def _get(self, node: dict[str, Any], name: str, kind: type[Any], path: str) -> Any:
        value = node.get(name)
        if type(value) is not kind:
            raise self.error(path, f"has no valid {name!r}")
        return value

    def _items(self, node: dict[str, Any], path: str) -> list[Any]:
        return [self.decode(item, f"{path}[{i}]") for i, item in enumerate(self._get(node, "items", list, path))]

    def _pairs(self, node: dict[str, Any], path: str) -> list[list[Any]]:
        pairs = self._get(node, "items", list, path)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise self.error(path, "has items that are not pairs")
        return pairs

    def _dict(self, node: dict[str, Any], path: str) -> dict[Any, Any]:
        result = {}
        for key_node, item in self._pairs(node, path):
            key = self.decode(key_node, path)
            try:
                result[key] = self.decode(item, f"{path}[{key!r}]")
            except TypeError:
                raise self.error(path, "has a key that cannot be one") from None
        return result

    def _float(self, node: dict[str, Any], path: str) -> float:
        value = self._get(node, "value", str, path)
        if value not in ("inf", "-inf", "nan"):
            raise self.error(path, "has no valid 'value'")
        return float(value)

    def _dtype(self, node: dict[str, Any], path: str) -> Any:
        form, name = node.get("form"), node.get("name")
        if form == "python" and name in ("bool", "int", "float"):
            return {"bool": bool, "int": int, "float": float}[name]
        if not isinstance(name, str) or name not in _DTYPES or form not in ("dtype", "numpy", "jax"):
            raise self.error(path, f"is the unknown dtype {name!r}")
        if form == "jax":
            return getattr(jnp, "bool_" if name == "bool" else name)
        return np.dtype(name) if form == "dtype" else np.dtype(name).type

    def _array(self, node: dict[str, Any], path: str) -> Any:
        name, holder = node.get("name"), node.get("holder")
        if not isinstance(name, str) or name not in self.arrays:
            raise self.error(path, f"refers to the array {name!r}, which is not listed")
        array = self.arrays[name]
        if holder == "numpy":
            return array.copy()
        if holder == "numpy_scalar" and array.ndim == 0:
            return array[()]
        if holder not in ("jax", "key"):
            raise self.error(path, f"is an array of the unknown kind {holder!r}")
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise self.error(path, f"has dtype {array.dtype}, which JAX holds only with jax.enable_x64")
        if holder == "jax":
            value = jnp.asarray(array)
            return _weaken(value) if node.get("weak") is True else value
        implementation = node.get("implementation")
        if implementation not in _KEY_KINDS:
            raise self.error(path, f"is a PRNG key of the unknown kind {implementation!r}")
        try:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=implementation)
        except (TypeError, ValueError):
            raise self.error(path, f"is not a PRNG key of the kind {implementation!r}") from None

    def _function(self, node: dict[str, Any], path: str) -> Any:
        name = self._get(node, "name", str, path)
        if name in self.trusted and not isinstance(self.trusted[name], type):
            return self.trusted[name]
        module, _, attribute = name.partition(":")
        found = None
        if name == "equinox.nn:identity":
            found = _identity()
        elif module in ("jax.nn", "jax.numpy"):
            found = _jax_function(module, attribute)
        elif module.split(".")[0] == "steersman":
            found = self._own(module, attribute, path)
            room = module.split(".")[1] if "." in module else ""
            at_home = getattr(found, "__module__", None) == module and getattr(found, "__qualname__", None) == attribute
            top_level = at_home and "." not in attribute and not isinstance(found, type)
            if room not in _FUNCTION_ROOMS or module == __name__ or not top_level:
                found = None
        if not callable(found):
            short = attribute.rpartition(".")[2] or name
            raise self.error(
                path,
                f"names the function {name!r}, which is not one that a policy may call: "
                f"pass trusted=({short},) if it is your own and you trust it",
            )
        return found

    def _own(self, module: str, attribute: str, path: str) -> Any:
        """What Steersman itself defines under a name, or None. Imports Steersman's modules and no other."""
        if not _MODULE_NAME.fullmatch(module) or "__" in module or "__" in attribute:
            return None
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            if error.name is not None and error.name.split(".")[0] != "steersman":
                raise self.error(path, f"needs {module!r}, which needs {error.name!r}: install it") from None
            return None
        for part in attribute.split("."):
            found = getattr(found, part, None)
        return found

    def _class(self, node: dict[str, Any], path: str, fits: Callable[[type], bool], what: str) -> type:
        """The class that a node names, if it may be used."""
        name = self._get(node, "class", str, path)
        module, _, attribute = name.partition(":")
        found: Any = None
        if name in self.trusted:
            found = self.trusted[name]
        elif module.split(".")[0] == "steersman":
            found = self._own(module, attribute, path)
            if not isinstance(found, type) or found.__module__.split(".")[0] != "steersman":
                writer = "which this version of Steersman does not have"
                raise self.error(path, f"names the class {name!r}, {writer}")
        elif module == "equinox.nn" and not attribute.startswith("_"):
            found = vars(eqx.nn).get(attribute)
        if not isinstance(found, type):
            short = attribute.rpartition(".")[2] or name
            raise self.error(
                path,
                f"names the class {name!r}, which is neither Steersman's nor equinox.nn's: "
                f"pass trusted=({short},) if it is your own and you trust it",
            )
        if not fits(found) or inspect.isabstract(found):
            raise self.error(path, f"names the class {name!r}, which is not {what}")
        return found

    def _fields(self, node: dict[str, Any], expected: Sequence[str], path: str) -> dict[str, Any]:
        fields = self._get(node, "fields", dict, path)
        for wrong in sorted(set(fields) ^ set(expected)):
            fault = "lacks the field" if wrong in expected else "has a field that the class does not have:"
            raise self.error(path, f"({node['class']}) {fault} {wrong!r}")
        return {name: self.decode(fields[name], f"{path}.{name}") for name in expected}

    def _module(self, node: dict[str, Any], path: str) -> Any:
        cls: Any = self._class(node, path, lambda c: issubclass(c, eqx.Module), "an equinox.Module")
        values = self._fields(node, [field.name for field in dataclasses.fields(cls)], path)
        # As JAX rebuilds a PyTree: no __init__, __post_init__, __check_init__ or converter runs.
        module = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(module, name, value)
        return module

    def _namedtuple(self, node: dict[str, Any], path: str) -> Any:
        cls: Any = self._class(node, path, _is_namedtuple, "a named tuple")
        return tuple.__new__(cls, self._fields(node, cls._fields, path).values())

    def _space(self, node: dict[str, Any], path: str) -> spaces.Space:
        name = node.get("space")
        try:
            if name == "Dict":
                parts = self._pairs(node, path)
                return spaces.Dict(OrderedDict((str(key), self._inner(part, path)) for key, part in parts))
            if name == "Tuple":
                return spaces.Tuple([self._inner(part, path) for part in self._get(node, "items", list, path)])
            if name == "MultiBinary":
                n = self.decode(node.get("n"), path)
                return spaces.MultiBinary(list(n) if isinstance(n, tuple) else n)
            dtype = self.decode(node.get("dtype"), path)
            if name == "Box":
                low, high = (self._bound(node, side, path) for side in ("low", "high"))
                return spaces.Box(low, high, low.shape, dtype)
            if name == "Discrete":
                n, start = self._get(node, "n", int, path), self._get(node, "start", int, path)
                options = {} if dtype == np.int64 else {"dtype": dtype}
                return spaces.Discrete(n, start=start, **options)
            if name == "MultiDiscrete":
                nvec, start = (self._bound(node, part, path) for part in ("nvec", "start"))
                return spaces.MultiDiscrete(nvec, dtype, start=start)  # pyright: ignore[reportArgumentType]
        except (AssertionError, AttributeError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, PolicyFileError):
                raise
            raise self.error(path, f"is not a valid {name} space") from None
        raise self.error(path, f"is a space of the unknown kind {name!r}")

    def _bound(self, node: dict[str, Any], name: str, path: str) -> np.ndarray:
        value = self.decode(node.get(name), path)
        if not isinstance(value, np.ndarray):
            raise self.error(path, f"has no valid {name!r}")
        return value

    def _inner(self, node: Any, path: str) -> spaces.Space:
        space = self.decode(node, path)
        if not isinstance(space, spaces.Space):
            raise self.error(path, "holds something that is not a space")
        return space


def _weaken(value: jax.Array) -> jax.Array:
    """`value` as a weakly typed array, as Python numbers make them: it does not decide a result's dtype."""
    for blank in (0.0, 0, 0j):
        weak = jnp.full(value.shape, blank)
        if weak.dtype == value.dtype:
            return weak.at[...].set(value)
    return value


# ------------------------------------------------------------------------------------------------ does a policy fit?


def policy_fits(policy: Policy, problem: Any) -> bool:
    """Whether :func:`check_policy` would find nothing to say."""
    return _misfit(policy, problem) is None


def check_policy(policy: Policy, problem: Any) -> None:
    """Checks, without running it, that a policy reads a problem's observations and gives actions of its space.

    Args:
        policy: what shall act.
        problem: whatever :func:`steersman.envs.as_problem` takes, or anything that has both spaces.

    Raises:
        InputError: it was made for another observation space or another action space.
    """
    misfit = _misfit(policy, problem)
    if misfit is not None:
        raise InputError(misfit)


def _spaces(problem: Any) -> tuple[spaces.Space, spaces.Space]:
    for prefix in ("single_", ""):
        found = [getattr(problem, f"{prefix}{name}_space", None) for name in ("observation", "action")]
        if isinstance(found[0], spaces.Space) and isinstance(found[1], spaces.Space):
            return found[0], found[1]
    from steersman.envs import as_problem

    problem = as_problem(problem)
    return as_gymnasium_space(problem.observation_space), as_gymnasium_space(problem.action_space)


def _misfit(policy: Policy, problem: Any) -> str | None:
    observation_space, action_space = _spaces(problem)
    declared = _declared_misfit(policy, observation_space, action_space)
    if declared is not None:
        return declared

    def act(observation: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        carry = policy.init(key)
        action, following = policy(observation, carry, key)
        return action, carry, following

    observation = jax.eval_shape(lambda: zero_element(observation_space))
    try:
        action, carry, following = jax.eval_shape(act, observation, jax.random.key(0))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return (
            f"policy cannot act on observations from {describe(observation_space)}: "
            f"{type(error).__name__}: {reason.rstrip('.')}."
        )
    if _shapes(carry) != _shapes(following):
        return f"policy returns the memory {_shapes(following)}, but starts with {_shapes(carry)}."
    expected = jax.eval_shape(lambda: zero_element(action_space))
    if jax.tree.structure(action) != jax.tree.structure(expected):
        return (
            f"policy gives actions of the structure {jax.tree.structure(action)}, but the problem's action space is "
            f"{describe(action_space)}."
        )
    for given, wanted in zip(jax.tree.leaves(action), jax.tree.leaves(expected), strict=True):
        if given.shape != wanted.shape or _family(given.dtype) != _family(wanted.dtype):
            return (
                f"policy gives actions of shape {given.shape} and dtype {given.dtype}, but the problem's action space "
                f"is {describe(action_space)} of dtype {wanted.dtype}."
            )
    return None


def _shapes(tree: Any) -> tuple[Any, Any]:
    return jax.tree.structure(tree), [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def _family(dtype: Any) -> str:
    return next(name for name in ("bool_", "integer", "inexact") if jnp.issubdtype(dtype, getattr(jnp, name)))


def _declared_misfit(policy: Any, observation_space: spaces.Space, action_space: spaces.Space) -> str | None:
    """What shapes cannot tell: numbers of choices, which many policies declare."""
    while isinstance(policy, (Mode, ObservationNoise)):
        policy = policy.policy
    if isinstance(policy, NetworkPolicy) and policy.preprocess.layout != layout(observation_space):
        size = policy.preprocess.size
        return (
            f"policy reads observations that flatten to {size} numbers, but the problem's observation space is "
            f"{describe(observation_space)}."
        )
    if isinstance(policy, (Tabular, TabularStochastic)) and isinstance(observation_space, spaces.Discrete):
        table = policy.table if isinstance(policy, Tabular) else policy.probabilities
        known = (policy.start, table.shape[0])
        if known != (int(observation_space.start), int(observation_space.n)):
            return (
                f"policy has a table of {known[1]} states from {known[0]}, but the problem's observation space is "
                f"{observation_space}."
            )
    head = policy.head if isinstance(policy, StochasticPolicy) else None
    made_for = None
    if isinstance(head, Categorical) and isinstance(action_space, spaces.Discrete):
        made_for = spaces.Discrete(head.num_actions, start=head.start)
        fits = (head.num_actions, head.start) == (int(action_space.n), int(action_space.start))
    elif isinstance(head, MultiCategorical) and isinstance(action_space, spaces.MultiDiscrete):
        made_for = f"places of {head.sizes} choices from {head.start or 0}"
        start = head.start or (0,) * len(head.sizes)
        fits = head.sizes == tuple(np.ravel(action_space.nvec)) and start == tuple(np.ravel(action_space.start))
    else:
        fits = True
    if not fits:
        return f"policy chooses among {made_for}, but the problem's action space is {action_space}."
    if isinstance(policy, Tabular) and isinstance(action_space, spaces.Discrete) and policy.table.ndim == 1:
        low, high = int(policy.table.min()), int(policy.table.max())
        if low < int(action_space.start) or high >= int(action_space.start) + int(action_space.n):
            return f"policy has actions from {low} to {high}, but the problem's action space is {action_space}."
    return None
