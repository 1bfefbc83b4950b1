"""Runs every study at the ``cpu`` budget and says which claims hold: ``python -m steersman.studies [SLUG ...]``."""

from __future__ import annotations

import json
import subprocess
import sys

from steersman import catalog


def main(slugs: list[str]) -> int:
    """Runs the studies named, or all of them, one process each."""
    failed = 0
    for slug in slugs or [system.slug for system in catalog.systems()]:
        command = [sys.executable, "-m", "steersman.cli", "study", slug, "--budget", "cpu", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in (0, 1):
            print(f"{slug}: could not run")
            failed += 1
            continue
        report = json.loads(done.stdout)
        for claim in report["claims"]:
            mark = "holds" if claim["holds"] else "DOES NOT HOLD"
            print(f"{slug}: {mark}: {claim['text']} expected {claim['expected']}; measured {claim['measured']}")
            failed += not claim["holds"]
        print(f"{slug}: {report['seconds']:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
