"""Run folders: what training leaves on disk, written so that a kill at any moment loses at most one chunk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import yaml

from steersman.errors import RunError
from steersman.training.checkpoints import Checkpoints

#: Version of the folder's layout. It changes when an older or newer folder can no longer be continued.
FORMAT = 1

_SHOWN_PACKAGES = ("steersman", "jax", "equinox", "optax", "gymnax", "gymnasium", "mujoco", "numpy")


class _PlainDumper(yaml.SafeDumper):
    """Writes equal parts out each time: anchors are hard to read and to edit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in _SHOWN_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # Temporary files are private; what takes their place is as readable as any file of the user's.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Run:
    """One run folder, held by one process at a time. Where several processes train one run, only the first writes.

    Layout: ``config.yaml`` (all that is needed to repeat the run), ``checkpoints/``, ``metrics.parquet`` (one row per
    iteration and member; parts in ``metrics/`` while the run goes on), ``policies/`` (one folder per member),
    ``report.html``.
    """

    def __init__(self, folder: Path, lock: IO[str] | None):
        self.folder = folder
        self._lock = lock
        self.checkpoints = Checkpoints(folder / "checkpoints")

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any]) -> Run:
        """Makes a new run folder.

        Raises:
            RunError: the folder holds a run already, or cannot be written.
        """
        if jax.process_index() != 0:
            return cls(folder, None)
        if (folder / "config.yaml").exists():
            raise RunError(f"run folder {folder} holds a run already; resume it, or choose another folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _hold(folder)
            (folder / "metrics").mkdir(exist_ok=True)
            content = {"format": FORMAT, **config, "versions": versions()}
            with atomic(folder / "config.yaml") as temporary:
                temporary.write_text(yaml.dump(content, Dumper=_PlainDumper, sort_keys=False))
        except OSError as error:
            raise RunError(f"run folder {folder} cannot be written ({error.strerror or error}).") from error
        return cls(folder, lock)

    @classmethod
    def open(cls, folder: Path) -> tuple[Run, dict[str, Any]]:
        """Takes hold of an existing run folder to continue it.

        Raises:
            RunError: it is no run folder, of another format, or another process holds it.
        """
        config = read_config(folder)
        if jax.process_index() != 0:
            return cls(folder, None), config
        try:
            lock = _hold(folder)
        except OSError as error:
            raise RunError(f"run folder {folder} cannot be written ({error.strerror or error}).") from error
        return cls(folder, lock), config

    def write_metrics(self, first: int, table: Mapping[str, np.ndarray]) -> None:
        """Writes the rows of one chunk, which starts at iteration `first`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._lock is None:
            return
        try:
            with atomic(self.folder / "metrics" / f"{first:012d}.parquet") as temporary:
                pq.write_table(pa.table(dict(table)), temporary)
        except OSError as error:
            last = self.checkpoints.latest()
            kept = f"the last good checkpoint is iteration {last}" if last is not None else "nothing was saved before"
            raise RunError(
                f"Metrics cannot be written to {self.folder} ({error.strerror or error}); {kept}."
            ) from error

    def drop_metrics(self, first: int) -> None:
        """Forgets all rows after iteration `first`: they belong to work that was lost and will be done again."""
        if self._lock is None:
            return
        for part in self.parts():
            if int(part.stem) >= first:
                part.unlink()
                continue
            table = read_part(part)
            kept = table["iteration"] <= first
            if not kept.all():
                self.write_metrics(int(part.stem), {name: column[kept] for name, column in table.items()})

    def parts(self) -> list[Path]:
        """The files that hold the metrics so far, in order."""
        return sorted(p for p in (self.folder / "metrics").glob("*.parquet") if p.stem.isdigit())

    def merge_metrics(self) -> Path | None:
        """Joins the parts into ``metrics.parquet``, whose bytes do not depend on where chunks began."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = self.parts()
        if not parts or self._lock is None:
            return None
        table = pa.concat_tables([pq.read_table(part) for part in parts]).combine_chunks()
        path = self.folder / "metrics.parquet"
        with atomic(path) as temporary:
            pq.write_table(table, temporary)
        return path

    def close(self) -> None:
        """Lets another process have the folder."""
        self.checkpoints.close()
        if self._lock is not None:
            self._lock.close()


def _hold(folder: Path) -> IO[str]:
    # The kernel drops this lock when the process dies, however it dies, so a killed run never blocks its resumption.
    lock = open(folder / "lock", "w")  # noqa: SIM115 (held for the life of the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunError(f"run folder {folder} is in use by another process; wait for it, or stop it first.") from None
    return lock


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run folder.

    Raises:
        RunError: there is no run, its configuration cannot be read, or its format is another version's.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no config.yaml.")
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(config, dict) or "format" not in config:
        raise RunError(f"{path} is not the configuration of a run.")
    if config["format"] != FORMAT:
        made_by = (config.get("versions") or {}).get("steersman", "unknown")
        raise RunError(
            f"run folder {folder} has format {config['format']} (written by steersman {made_by}), but this version "
            f"reads format {FORMAT}; continue it with the version that wrote it."
        )
    return config


def read_part(path: Path) -> dict[str, np.ndarray]:
    """The columns of one metrics file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"metrics file {path} cannot be read ({str(error).splitlines()[0]}).") from error
    return {name: table.column(name).to_numpy() for name in table.column_names}


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """All metrics of a run so far, one array per column, one row per iteration and member."""
    merged = folder / "metrics.parquet"
    parts = [merged] if merged.exists() else sorted((folder / "metrics").glob("[0-9]*.parquet"))
    if not parts:
        raise RunError(f"run folder {folder} has no metrics yet.")
    tables = [read_part(part) for part in parts]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
