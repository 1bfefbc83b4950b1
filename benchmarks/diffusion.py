"""Diffusion policies side by side: inference and training of the same U-Net, here, in LeRobot and in CleanDiffuser.

Each contestant is a process of its own that stays alive; they take turns, so that a busy minute of the machine hits all
of them, and ratios are taken of calls that followed each other. PyTorch is asked with one thread and with two, and the
better one counts.

    .venv/bin/python benchmarks/diffusion.py --lerobot ENVIRONMENT [--cleandiffuser CHECKOUT]
    .venv/bin/python benchmarks/diffusion.py --lerobot ENVIRONMENT --quick

ENVIRONMENT is made as requirements-lerobot.txt says; CHECKOUT is CleanDiffuser's repository, which needs nothing more.
The tables go into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import page
from contestants import Contestant, Failed, Process, say
from unet_sizes import HORIZON, WIDTHS, WINDOW

RESULTS = page.ROOT / "reports" / "bench-diffusion.json"
#: What is asked: name on the page, request, and repeats of one turn.
INFERENCE = {"one call of the network": ("call", 8), "ten steps of DDIM": ("ten", 4)}
TRAINING_BATCH = 64
#: Ways to a chunk with the same network: name on the page, request, whether a peer has it.
WAYS = {
    "DDIM, 100 steps": ("hundred", True),
    "DDIM, 10 steps": ("ten", True),
    "RTI-DP, from the last chunk, 3 calls": ("warm", False),
    "OneDP, 1 call": ("one", False),
}
PLAYED = HORIZON // 2


def ask(process: Process, threads: tuple[int, ...], **request: Any) -> float:
    """Least milliseconds, with the better number of threads."""
    return min(min(process.ask(threads=number, **request)["ms"]) for number in threads)


def turns(processes: dict[str, Process], rounds: int, **request: Any) -> dict[str, list[float]]:
    """What each contestant takes, round by round; a contestant that fails is left out and told."""
    taken: dict[str, list[float]] = {name: [] for name in processes}
    for number in range(rounds):
        for name, process in list(processes.items()):
            if number > 0 and not taken[name]:
                continue
            try:
                taken[name].append(ask(process, (1,) if name == "steersman" else (1, 2), **request))
            except Failed as failure:
                say(f"{name}: {request}: {failure}")
                taken[name] = []
    said = ", ".join(f"{name} {statistics.median(values):.1f} ms" for name, values in taken.items() if values)
    say(f"{request}: {said}")
    return taken


def measure(contestants: dict[str, Contestant], rounds: int, sizes: range, quick: bool) -> dict[str, Any]:
    """Everything that is measured, as a JSON document."""
    results: dict[str, Any] = {
        "machine": page.machine(),
        "date": page.today(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
        "inference": [],
        "training": [],
        "ways": [],
    }
    with contextlib.ExitStack() as ends:
        processes: dict[str, Process] = {}
        for name, contestant in contestants.items():
            processes[name] = Process(contestant, 600.0, quick)
            ends.callback(processes[name].close)
        results["versions"] = {name: process.versions for name, process in processes.items()}
        for size in sizes:
            for what, (request, repeats) in INFERENCE.items():
                taken = turns(processes, rounds, do=request, size=size, batch=1, repeats=repeats)
                results["inference"].append({"size": size, "what": what, "ms": taken})
        for size in sizes[:1]:
            repeats = 2 if quick else 5
            taken = turns(processes, rounds, do="train", size=size, batch=TRAINING_BATCH, repeats=repeats)
            results["training"].append({"size": size, "ms": taken})
        for what, (request, everyone) in WAYS.items():
            some = {name: process for name, process in processes.items() if everyone or name == "steersman"}
            for size in sizes[:1]:
                taken = turns(some, rounds, do=request, size=size, batch=1, repeats=2)
                results["ways"].append({"size": size, "what": what, "ms": taken})
    return results


def _ratio(taken: dict[str, list[float]], peer: str) -> str:
    """A peer's time over ours, of turns that followed each other: median and range."""
    pairs = [theirs / ours for ours, theirs in zip(taken["steersman"], taken.get(peer, []), strict=False)]
    return f"{statistics.median(pairs):.1f} ({min(pairs):.1f} to {max(pairs):.1f})" if pairs else ""


def _median(taken: dict[str, list[float]], name: str) -> str:
    values = taken.get(name, [])
    return f"{statistics.median(values):.3g}" if values else ""


def block(results: dict[str, Any], peers: dict[str, str]) -> str:
    """The page's text."""
    names = {"steersman": "Steersman", **peers}

    def rows(kind: str) -> list[list[str]]:
        return [
            [", ".join(map(str, WIDTHS[entry["size"]])), *([entry["what"]] if "what" in entry else [])]
            + [_median(entry["ms"], name) for name in names]
            + [_ratio(entry["ms"], peer) for peer in peers]
            for entry in results[kind]
        ]

    ratios = [f"{title} / Steersman" for title in peers.values()]
    timed = [f"{title}, ms" for title in names.values()]
    rates = []
    for entry in results["ways"]:
        for name, title in names.items():
            values = entry["ms"].get(name)
            if values:
                middle = statistics.median(values)
                rates.append(
                    [
                        ", ".join(map(str, WIDTHS[entry["size"]])),
                        f"{entry['what']}, {title}",
                        f"{middle:.3g}",
                        f"{1e3 / middle:.3g}",
                        f"{1e3 * PLAYED / middle:.3g}",
                    ]
                )
    versions = "; ".join(
        f"{names[name]}: " + ", ".join(f"{package} {version}" for package, version in found.items())
        for name, found in results["versions"].items()
    )
    return "\n\n".join(
        [
            f"The temporal U-Net with FiLM at batch size one, horizon {HORIZON}, {WINDOW} observations; medians of "
            f"{results['rounds']} turns, each the best of some calls, and the ratio of neighbouring turns with its "
            "range. LeRobot's network is the same, layer by layer; CleanDiffuser's takes the observation through one "
            "more layer.",
            page.table(["widths", "what", *timed, *ratios], rows("inference")),
            f"A step of training: {TRAINING_BATCH} chunks, Adam, the gradient's norm bounded; ours keeps a running "
            "average of the parameters and draws the batch from the episodes besides, CleanDiffuser's averages too.",
            page.table(["widths", *timed, *ratios], rows("training")),
            f"Chunks a second by the way to one, and the actions a second that {PLAYED} rows of each make: what bounds "
            "the control rate.",
            page.table(["widths", "way", "ms per chunk", "chunks per second", "actions per second"], rates),
            f"{results['machine']}; {results['date']}; load average before the run {results['load']:.1f}. {versions}.",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot", type=Path, required=True, help="environment with LeRobot")
    parser.add_argument("--cleandiffuser", type=Path, help="checkout of CleanDiffuser")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=len(WIDTHS), help="how many networks, from the smallest")
    parser.add_argument("--quick", action="store_true", help="only whether everything runs; writes nothing")
    given = parser.parse_args()
    contestants = {
        "steersman": Contestant("Steersman", "run_unet.py", page.ROOT / ".venv"),
        "lerobot": Contestant("LeRobot", "run_lerobot.py", given.lerobot.absolute(), jax=False),
    }
    if given.cleandiffuser is not None:
        os.environ["CLEANDIFFUSER"] = str(given.cleandiffuser.absolute())
        contestants["cleandiffuser"] = Contestant(
            "CleanDiffuser", "run_cleandiffuser.py", given.lerobot.absolute(), jax=False
        )
    results = measure(
        contestants, 1 if given.quick else given.rounds, range(1 if given.quick else given.sizes), given.quick
    )
    peers = {name: contestant.title for name, contestant in contestants.items() if name != "steersman"}
    text = block(results, peers)
    print(text)
    if not given.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1))
        page.rewrite("diffusion", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
