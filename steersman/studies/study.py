"""What a study is: an experiment that checks a paper's main claim, and says so when the claim does not hold."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from steersman.errors import InputError, InputTypeError, require

Budget = Literal["smoke", "cpu", "full"]
BUDGETS: tuple[Budget, ...] = ("smoke", "cpu", "full")


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, put to the test.

    Attributes:
        text: the statement, in one sentence.
        expected: what must be measured for it to hold, in words and numbers.
        measured: what was measured, in words and numbers.
        holds: whether it did; None at the ``smoke`` budget, which judges nothing.
    """

    text: str
    expected: str
    measured: str
    holds: bool | None


@dataclass(frozen=True)
class Report:
    """What a study found.

    Attributes:
        slug: the system.
        budget: how much was spent.
        seed: seed of the whole study.
        seconds: wall time.
        claims: what was judged.
        table: the numbers behind the claims, one dict a row.
        figures: where the pictures are.
        notes: what a reader must know to read the numbers rightly.
    """

    slug: str
    budget: Budget
    seed: int
    seconds: float
    claims: list[Claim]
    table: list[dict[str, Any]]
    figures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every claim that was judged holds."""
        return all(claim.holds is not False for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**asdict(self), "figures": [str(path) for path in self.figures]}


class Study:
    """A study while it runs: it gathers claims, rows and figures, and becomes a :class:`Report`.

    Args:
        slug: the system.
        budget: ``smoke`` (seconds, checks the wiring and judges nothing), ``cpu`` (minutes) or ``full`` (the paper's
            own scale).
        seed: seed of the whole study.
        folder: where figures go; ``reports/<slug>`` if None.

    Raises:
        InputError, InputTypeError: a budget or seed that cannot be used.
    """

    def __init__(self, slug: str, budget: str, seed: int, folder: str | Path | None = None):
        if budget not in BUDGETS:
            raise InputError(f"budget is {budget!r}, but it must be one of {', '.join(BUDGETS)}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputTypeError(f"seed is {seed!r}, but it must be a whole number.")
        require(seed >= 0, "seed", seed, "at least 0")
        self.slug, self.seed = slug, seed
        self.budget: Budget = cast(Budget, budget)
        self.folder = Path(folder) if folder is not None else Path("reports") / slug
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        self._claims: list[Claim] = []
        self._rows: list[dict[str, Any]] = []
        self._figures: list[Path] = []
        self._notes: list[str] = []

    def needs(self, what: str) -> InputError:
        """The error for a budget that cannot be run here, to be raised."""
        return InputError(f"budget is {self.budget!r}, but that study needs {what}; use 'cpu' or 'smoke'.")

    def claim(self, text: str, *, expected: str, measured: str, holds: bool | np.bool_) -> None:
        """Adds a claim; at the ``smoke`` budget it is recorded but not judged."""
        self._claims.append(Claim(text, expected, measured, None if self.budget == "smoke" else bool(holds)))

    def row(self, **cells: Any) -> None:
        """Adds a row to the table."""
        self._rows.append(cells)

    def figure(self, name: str) -> Path:
        """The path of a new figure, which the caller writes."""
        path = self.folder / f"{name}.png"
        self._figures.append(path)
        return path

    def note(self, text: str) -> None:
        """Adds what a reader must know to read the numbers rightly."""
        self._notes.append(text)

    def report(self) -> Report:
        """Ends the study."""
        return Report(
            self.slug,
            self.budget,
            self.seed,
            time.perf_counter() - self._began,
            self._claims,
            self._rows,
            self._figures,
            self._notes,
        )


def run_study(slug: str, *, budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study of a system; the arguments are those of :class:`Study`."""
    from steersman import catalog

    return catalog.get(slug).load_study().run(budget=budget, seed=seed, folder=folder)
