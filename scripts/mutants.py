"""Plant protocol bugs, one at a time, and see that each is found: by the simulator, or by a named test.

Each mutant (`scripts/planted_bugs.py`) is a patch on a copy of the source. First the copy is run as it is, since what
fails then would seem to find everything. The simulator runs the mutant on its first seeds, fleets first and then a
pipeline core alone; what it does not find has to be found by the tests that the mutant names. Only what is checked
counts: an invariant that does not hold, or a named test that fails. Where a mutant makes the code around it stumble (a
`KeyError`, say), the seeds after that are tried. A table says what found each, and the exit status is 1 if one was
found by nobody.

    .venv/bin/python scripts/mutants.py [NAME ...] [--seeds N] [--jobs N] [--check]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from planted_bugs import MUTANTS, Mutant

from kevlarflow.errors import IllegalTransition, ProtocolViolation
from kevlarflow.recovery.invariants import Violated
from kevlarflow.sim import errors

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 1_000
DEADLINE_SECONDS = 600
MOST_STUMBLES = 20
"""Seeds that may fail by something else than a violation, before the simulator is given up."""
MEND = "mend it in scripts/planted_bugs.py"
WORLDS = {"fleet": [], "core alone": ["--alone"]}
PROTOCOL = (Violated, ProtocolViolation, IllegalTransition)
VIOLATIONS = {each.__name__ for each in PROTOCOL} | {
    name
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, errors.Violation) and each is not errors.Violation
}


class Finding(NamedTuple):
    """Who found a mutant; `by` is empty when nobody did."""

    by: str
    after: str
    seconds: float


class Failure(NamedTuple):
    """Of a run of the simulator: the seed, the name of the exception, and all of the line."""

    seed: int
    kind: str
    line: str


class Endless(Exception):
    """A run did not end."""


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


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the source."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        yield source


def control(mutants: Iterable[Mutant], seeds: int, jobs: int) -> str:
    """What fails without any mutant, in one line; empty when nothing does."""
    try:
        with copied() as source:
            for world, options in WORLDS.items():
                failure = _simulate(source, range(seeds), jobs, options)
                if failure is not None:
                    return f"{world}: {failure.line}"
            tests = sorted({mutant.tests for mutant in mutants if mutant.tests})
            failed = _failed_test(source, tests) if tests else ""
            return f"test: {failed}" if failed else ""
    except Endless:
        return f"a run does not end in {DEADLINE_SECONDS} s"


def hunt(mutant: Mutant, seeds: int, jobs: int) -> Finding:
    """Plant a mutant and look for it."""
    begun = time.monotonic()
    with copied() as source:
        plant(mutant, source)
        by, after = _look(mutant, source, seeds, jobs)
        if not by and mutant.tests:
            with contextlib.suppress(Endless):
                failed = _failed_test(source, [mutant.tests])
                by, after = (f"test: {failed}", "") if failed else (by, after)
    return Finding(by, after, time.monotonic() - begun)


def _look(mutant: Mutant, source: Path, seeds: int, jobs: int) -> tuple[str, str]:
    """Who finds it in the simulator, and after how many schedules; or what came of them."""
    stumbles: list[str] = []
    for world, options in WORLDS.items():
        first = 0
        while first < seeds and len(stumbles) < MOST_STUMBLES:
            try:
                failure = _simulate(source, range(first, seeds), jobs, options)
            except Endless:
                stumbles.append(f"no end in {DEADLINE_SECONDS} s")
                break
            if failure is None:
                break
            if failure.kind in VIOLATIONS:
                return f"{world}: {failure.kind}", f"seed {failure.seed:,}"
            stumbles.append(failure.kind)
            first = failure.seed + 1
    return "", f"{len(stumbles)} x {stumbles[-1]}" if stumbles else f"{2 * seeds:,} schedules"


def _simulate(source: Path, seeds: range, jobs: int, options: list[str]) -> Failure | None:
    """What the simulator finds first. Raises `Endless`; exits when the simulator does not even run."""
    wanted = ["--seeds", f"{seeds.start}:{seeds.stop}", "--jobs", str(jobs)]
    said, status = _run(source, ["-m", "kevlarflow.sim", "--quiet", *wanted, *options])
    found = re.search(r"^seed (\d+): (\w+).*$", said, re.MULTILINE)
    if found is not None:
        return Failure(int(found[1]), found[2], found[0])
    if status:
        raise SystemExit(f"the simulator does not run: {said.strip().splitlines()[-1:]}")
    return None


def _failed_test(source: Path, tests: list[str]) -> str:
    """The first of the named tests that fails; empty when none does. Raises `Endless`."""
    said, _ = _run(source, ["-m", "pytest", "-q", *tests])
    failed = re.search(r"^FAILED \S+::(\w+)", said, re.MULTILINE)
    return failed[1] if failed else ""


def _run(source: Path, arguments: list[str]) -> tuple[str, int]:
    """What it says, and its exit status. Raises `Endless`."""
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    running = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = running.communicate(timeout=DEADLINE_SECONDS)
    except BaseException as broken:
        # With all that it has started: none of them would end by itself.
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        if isinstance(broken, subprocess.TimeoutExpired):
            raise Endless from None
        raise
    return said, running.returncode


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
    if failed := control(chosen, options.seeds, options.jobs):
        print(f"without any mutant this fails already: {failed}", file=sys.stderr)
        return 1
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
