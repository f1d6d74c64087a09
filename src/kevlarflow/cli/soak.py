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

FAILED = 1
DEFAULT_OUTPUT = Path("docs/benchmarks")
DESCRIPTION = """\
Hurt one cluster under load and wait until it is whole again, over and over: crashes, hangs, freezes and cut
connections, of nodes and of those that help them out, in every phase of a recovery. The order and the moments are
drawn from the seed. No request may be lost, no text differ, and no surviving process may grow. The report is
written after each round. Exit status: 0 when every check holds, 1 when one does not, 3 when too many rounds are
void."""


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

    ensure_default_model()
    console = Console(highlight=False, soft_wrap=True)
    result = soak.Soak(
        plan=soak.Plan(faults=options.faults, seed=options.seed), command=command, machine=machine.describe()
    )
    stem = f"{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-soak"
    say = functools.partial(console.print, markup=False)
    with log_folder("soak", say) as logs:
        soak.run(result, logs.folder, say, lambda: soak_report.save(result, options.output, stem))
        verdicts = soak.judge(result)
        logs.are_kept = not all(verdict.holds for verdict in verdicts)
    console.print(show.verdicts(verdicts))
    console.print(f"saved {options.output / stem}.json and .md", markup=False)
    print(show.last_line("soak", verdicts), flush=True)
    return 0 if all(verdict.holds for verdict in verdicts) else FAILED
