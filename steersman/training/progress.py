"""Live progress on standard error: rate, return, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np


class Progress:
    """A progress line for one or more trainings that run side by side.

    Args:
        enabled: whether anything is shown.
        title: what stands at the front of the line.
    """

    def __init__(self, enabled: bool = True, title: str = "training"):
        self.enabled = enabled
        self.title = title
        self._bar: Any = None
        self._task: Any = None
        self._samples = 1
        self._members = 1
        self._return = float("nan")

    @contextlib.contextmanager
    def running(self, total: int, done: int, samples_per_iteration: int, members: int) -> Iterator[None]:
        """Shows the line while the block runs."""
        self._samples, self._members = samples_per_iteration, members
        if not self.enabled:
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        with self._bar:
            self._task = self._bar.add_task(self.title, total=total, completed=done, facts="compiling")
            yield
        self._bar = None

    def note(self, message: str) -> None:
        """Says something without disturbing the line."""
        if self._bar is not None:
            self._bar.console.print(message)

    def advance(self, size: int, metrics: dict[str, np.ndarray]) -> None:
        """Reports `size` more iterations."""
        if self._bar is None:
            return
        returns = metrics.get("episode_return")
        if returns is not None and np.isfinite(returns).any():
            self._return = float(np.nanmean(returns[-8:])) if np.isfinite(returns[-8:]).any() else self._return
        self._bar.update(self._task, advance=size)
        speed = self._bar.tasks[self._task].speed
        facts = f"return {self._return:8.1f}" if np.isfinite(self._return) else ""
        if speed:
            facts = f"{speed * self._samples * self._members / 1e3:6.0f}k steps/s  {facts}"
        self._bar.update(self._task, facts=facts)
