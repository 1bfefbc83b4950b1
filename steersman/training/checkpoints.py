"""Checkpoints of everything a run needs to continue bit for bit, written by Orbax."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from steersman.errors import RunError


def to_host(array: Any) -> np.ndarray:
    """A host copy of an array, also of one that is spread over several processes."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def to_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves of `tree` as numbered host arrays; typed random keys as their raw words, empty arrays left out."""
    arrays = {}
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if leaf.size == 0:
            continue
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        arrays[f"{i:05d}"] = to_host(leaf)
    return arrays


def from_arrays(template: PyTree, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Puts arrays made by :func:`to_arrays` back into the structure of `template` (shapes suffice).

    Raises:
        RunError: number, shape or dtype of the arrays is not what the template says.
    """
    leaves, structure = jax.tree.flatten(template)
    names = [f"{i:05d}" for i, leaf in enumerate(leaves) if leaf.size]
    if set(names) != set(arrays):
        raise RunError(
            f"{source} holds {len(arrays)} arrays, but this run's state has {len(names)}; the configuration or the "
            "version has changed."
        )
    restored = []
    for i, leaf in enumerate(leaves):
        if leaf.size == 0:
            restored.append(jnp.zeros(leaf.shape, leaf.dtype))
            continue
        array = arrays[f"{i:05d}"]
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        expected = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
        if tuple(array.shape) != tuple(expected.shape) or array.dtype != expected.dtype:
            raise RunError(
                f"{source}: array {i} is {array.dtype}{list(array.shape)}, but this run's state needs "
                f"{expected.dtype}{list(expected.shape)}; the configuration or the version has changed."
            )
        value = jnp.asarray(array)
        restored.append(
            jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.empty((), leaf.dtype))) if is_key else value
        )
    return jax.tree.unflatten(structure, restored)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A fingerprint of names, types, shapes and contents."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


class Checkpoints:
    """The last few checkpoints in a folder. A checkpoint appears whole or not at all.

    Args:
        folder: where they are kept.
        keep: how many of the newest survive.
    """

    def __init__(self, folder: Path, keep: int = 3):
        import orbax.checkpoint as ocp

        # Orbax logs every step of its protocol through absl; a user wants to see errors only.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder
        self._ocp = ocp
        folder.mkdir(parents=True, exist_ok=True)
        # Where several processes train one run, the first alone writes, and the others must not be waited for.
        only = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, enable_async_checkpointing=False, multiprocessing_options=only
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, iteration: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Writes one checkpoint; `facts` must be JSON."""
        if jax.process_index() != 0:
            return
        args = self._ocp.args
        facts = {**facts, "digest": digest(arrays)}
        try:
            self._manager.save(
                iteration, args=args.Composite(state=args.StandardSave(dict(arrays)), facts=args.JsonSave(facts))
            )
        except Exception as error:  # Orbax wraps what the disk says in several types.
            last = self.latest()
            kept = f"the last good checkpoint is iteration {last}" if last is not None else "nothing was saved before"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RunError(f"Checkpoint {iteration} cannot be written to {self.folder} ({reason}); {kept}.") from error

    def iterations(self) -> list[int]:
        """Which iterations have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest iteration that has one."""
        found = self.iterations()
        return found[-1] if found else None

    def load(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole.

        Returns:
            ``(iteration, arrays, facts, warnings)``, with a warning for each newer checkpoint that could not be read;
            None where there has never been a checkpoint.

        Raises:
            RunError: there are checkpoints, but none can be read.
        """
        warnings = []
        args = self._ocp.args
        found = self.iterations()
        for iteration in reversed(found):
            where = self.folder / str(iteration)
            try:
                restored = self._manager.restore(
                    iteration, args=args.Composite(state=args.StandardRestore(), facts=args.JsonRestore())
                )
                arrays = {name: np.asarray(value) for name, value in restored["state"].items()}
                facts = dict(restored["facts"])
            except Exception as error:  # A damaged file can surface as almost any exception type.
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.append(f"Checkpoint {where} cannot be read ({reason[:200]}).")
                continue
            if digest(arrays) != facts.pop("digest", None):
                warnings.append(f"Checkpoint {where} is damaged: its contents do not match its fingerprint.")
                continue
            return iteration, arrays, facts, warnings
        if found:
            raise RunError(f"No checkpoint in {self.folder} can be read: " + " ".join(warnings))
        return None

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()
