"""The benchmarks' page in the documentation: tables, the machine, and the blocks that are rewritten."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"

#: What opens and closes each block. Everything outside of them is written by hand and left as it is.
BLOCKS = {
    "ppo": ("<!-- bench:ppo -->", "<!-- /bench -->"),
    "diffusion": ("<!-- bench:diffusion -->", "<!-- /bench:diffusion -->"),
    "profile": ("<!-- bench:profile -->", "<!-- /bench:profile -->"),
}


def rewrite(block: str, text: str) -> None:
    """Puts `text` into a block of the page; at the page's end if the page has no such block yet."""
    opening, closing = BLOCKS[block]
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    start = page.find(opening)
    end = page.find(closing, start)
    if start < 0 or end < 0:
        before, after = page.rstrip("\n") + ("\n\n" if page else ""), "\n"
    else:
        before, after = page[:start], page[end + len(closing) :]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(f"{before}{opening}\n\n{text.strip()}\n\n{closing}{after}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is legible as plain text too; the first column to the left, the others to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def machine() -> str:
    """The processor, its cores, the memory and the operating system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {cores} cores, {memory:.0f} GiB of memory, {platform.system()} ({platform.machine()})"


def today() -> str:
    """The date, as the page shows it."""
    return datetime.date.today().isoformat()
