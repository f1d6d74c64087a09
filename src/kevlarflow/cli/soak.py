"""``kevlarflow soak``: fault after fault for long, of every kind in every phase, and a look for leaks."""

from __future__ import annotations

import argparse
import datetime
import functools
import shlex
from pathlib import Path

from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.cli.log_folder import log_folder
from kevlarflow.cli.output_folder import require_writable
from kevlarflow.command_line import Parser, count
from kevlarflow.errors import KevlarFlowError

FAILED = 1
DEFAULT_OUTPUT = Path("docs/benchmarks")
DESCRIPTION = """\
Hurt one cluster under load and wait until it is whole again, over and over: crashes, hangs, freezes and cut
connections, of nodes and of those that help them out, in every phase of a recovery. The order and the moments are
drawn from the seed. No request may be lost, no text differ, no node be given up that was not ended, and no
surviving process grow. The report is written after each round. Exit status: 0 when every check holds, 1 when one
does not, 3 when too many rounds are void and nothing else is wrong."""


def run(arguments: list[str]) -> int:
    """Soak; return the exit status."""
    parser = Parser(prog="kevlarflow soak", description=DESCRIPTION)
    parser.add_argument("--faults", type=count, default=20, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments (%(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the report (%(default)s)")
    options = parser.parse_args(arguments)
    require_writable(options.output)
    with treated_as_interrupt():
        return _soak(options, shlex.join(["kevlarflow", "soak", *arguments]))


def _soak(options: argparse.Namespace, command: str) -> int:
    from rich.console import Console

    from kevlarflow.bench import machine
    from kevlarflow.bench.chaos import show, soak, soak_report
    from kevlarflow.default_model import ensure_default_model
    from kevlarflow.faults import FaultDidNotHappen

    ensure_default_model()
    console = Console(highlight=False, soft_wrap=True)
    result = soak.Soak(
        plan=soak.Plan(faults=options.faults, seed=options.seed), command=command, machine=machine.describe()
    )
    stem = f"{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-soak"
    say = functools.partial(console.print, markup=False)
    ended: KevlarFlowError | None = None
    try:
        with log_folder("soak", say) as logs:
            try:
                soak.run(result, logs.folder, say, lambda: soak_report.save(result, options.output, stem))
            except KevlarFlowError as error:
                if not result.rounds:
                    raise
                ended = error
            verdicts = soak.judge(result)
            logs.are_kept = not all(verdict.holds for verdict in verdicts)
        console.print(show.verdicts(verdicts))
    finally:
        if result.rounds:
            say(f"saved {options.output / stem}.json and .md")
    broken = [verdict.check for verdict in verdicts if not verdict.holds]
    if isinstance(ended, FaultDidNotHappen) and broken == [soak.VERIFIED]:
        print(f"VOID soak: {ended}", flush=True)
        return ended.exit_status
    early = f"; ended early: {ended}" if ended is not None else ""
    print(f"{show.last_line('soak', verdicts)}{early}", flush=True)
    return FAILED if broken else 0
