"""Plant protocol bugs, one at a time, and see that each is found: by the simulator, or by a named test.

Each mutant (`scripts/planted_bugs.py`) is a patch on a copy of the source. The simulator runs the copy on its first
seeds, fleets first and then a pipeline core alone; what it does not find has to be found by the tests that the mutant
names. A table says what found each, and the exit status is 1 if one was found by nobody.

    .venv/bin/python scripts/mutants.py [NAME ...] [--seeds N] [--jobs N] [--check]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from planted_bugs import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 1_000
DEADLINE_SECONDS = 600
MEND = "mend it in scripts/planted_bugs.py"


class Finding(NamedTuple):
    """Who found a mutant; `by` is empty when nobody did."""

    by: str
    after: str
    seconds: float


def misfit(mutant: Mutant, source: Path) -> str:
    """What keeps a mutant from being planted, in one line; empty when nothing does."""
    path = source / "kevlarflow" / mutant.file
    found = path.read_text().count(mutant.text) if path.exists() else 0
    if found != 1:
        return f"mutant {mutant.name!r}: its text is {found} times in {mutant.file}, which has changed: {MEND}"
    tests, _, test = mutant.tests.partition("::")
    if tests and not ((ROOT / tests).is_file() and f"def {test}" in (ROOT / tests).read_text()):
        return f"mutant {mutant.name!r}: there is no {mutant.tests}: {MEND}"
    return ""


def plant(mutant: Mutant, source: Path) -> None:
    """Patch the copy. The text has to be there exactly once."""
    if why := misfit(mutant, source):
        raise SystemExit(why)
    path = source / "kevlarflow" / mutant.file
    path.write_text(path.read_text().replace(mutant.text, mutant.instead))


def hunt(mutant: Mutant, seeds: int, jobs: int) -> Finding:
    """Plant a mutant and look for it."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        plant(mutant, source)
        for what, options in (("fleet", []), ("core alone", ["--alone"])):
            arguments = ["-m", "kevlarflow.sim", "--quiet", "--seeds", str(seeds), "--jobs", str(jobs), *options]
            found = _run(source, arguments)
            violation = re.search(r"^seed \d+: (\w+)", found, re.MULTILINE)
            schedules = re.search(r"^([\d,]+) schedules", found, re.MULTILINE)
            if violation and schedules:
                return Finding(f"{what}: {violation[1]}", f"{schedules[1]} schedules", time.monotonic() - begun)
        if mutant.tests:
            failed = re.search(r"^FAILED \S+::(\w+)", _run(source, ["-m", "pytest", "-q", mutant.tests]), re.MULTILINE)
            if failed:
                return Finding(f"test: {failed[1]}", "", time.monotonic() - begun)
    return Finding("", f"{2 * seeds:,} schedules", time.monotonic() - begun)


def _run(source: Path, arguments: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    return done.stdout


def main() -> int:
    """Hunt those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants to plant, by any part of their names (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="schedules for each (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--check", action="store_true", help="only see whether they could be planted")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if not options.names or any(name in each.name for name in options.names)]
    if options.check:
        misfits = [why for mutant in chosen if (why := misfit(mutant, ROOT / "src"))]
        print("\n".join([*misfits, f"{len(chosen) - len(misfits)} of {len(chosen)} can be planted"]))
        return 1 if misfits or not chosen else 0
    survivors = 0
    print(f"{'mutant':62} {'found by':58} {'after':18} seconds")
    for mutant in chosen:
        finding = hunt(mutant, options.seeds, options.jobs)
        survivors += not finding.by
        print(f"{mutant.name:62} {finding.by or 'NOBODY':58} {finding.after:18} {finding.seconds:7.1f}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} found")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
