"""The sides of a comparison: programs that stay alive, each in its own environment, and answer in turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Contestant(NamedTuple):
    """A side of the comparison: its name on the page, its script, its environment, and whether JAX runs it."""

    title: str
    script: str
    environment: Path
    jax: bool = True


class Failed(Exception):  # noqa: N818 - an outcome that a table shows
    """A contestant gave no result; the text says why."""


class Process:
    """A contestant's process, which answers one request at a time."""

    def __init__(self, contestant: Contestant, patience: float, quick: bool):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        # A cache from an earlier run would hide what compilation costs.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if quick:
            environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        self.patience = patience
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [str(python_of(contestant.environment)), contestant.script],
            cwd=HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except Failed:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Failed: the contestant failed, ended, or took longer than its patience.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.patience, stop)
        timer.start()
        # What a library prints while it is imported comes before the first answer.
        line = next((line for line in iter(self._process.stdout.readline, "") if line.startswith("{")), "")
        timer.cancel()
        if late.is_set():
            raise Failed(f"no answer within {self.patience:.0f} s")
        if not line:
            raise Failed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"ended with status {self._process.returncode}" + (f": {lines[-1][:200]}" if lines else "")

    def close(self) -> None:
        """Ends the process; nothing happens where it has ended by itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def python_of(environment: Path) -> Path:
    """An environment's interpreter."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
