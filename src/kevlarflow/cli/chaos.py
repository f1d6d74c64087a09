"""``kevlarflow chaos``: hurts a cluster as a scenario says, and checks what has to hold."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.cli.log_folder import log_folder
from kevlarflow.command_line import Parser, port
from kevlarflow.errors import KevlarFlowError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from kevlarflow.bench.chaos.judge import Observed, Verdict
    from kevlarflow.bench.chaos.scenario import Scenario
    from kevlarflow.bench.chaos.show import Screen

FAILED = 1
FILE_WIDTH = 160
"""Characters of a line where there is no terminal."""
DESCRIPTION = """\
Start a cluster, run a load without faults and again with them, and check what the scenario asks for.
A SCENARIO is a YAML file, or the name of one that comes with KevlarFlow (--list).

Exit status: 0 when every check holds, 1 when one does not, 2 for a bad scenario, and 3 when the run is
void because a fault did not happen (but 1 if requests or other nodes were lost in it, or texts differ)."""


def run(arguments: list[str]) -> int:
    """Perform the scenarios one after the other; return the worst exit status."""
    from kevlarflow.bench.chaos import scenario as scenarios

    options = _parse(arguments)
    if options.list:
        for name in scenarios.shipped():
            print(f"{name:<14} {scenarios.load(name).about}")
        return 0
    if options.all and options.scenarios:
        raise UsageError(f"--all performs what comes with KevlarFlow: leave it out, or {' '.join(options.scenarios)}")
    names = options.scenarios or (scenarios.shipped() if options.all else [])
    if not names:
        raise UsageError(f"name a scenario, or use --all: {', '.join(scenarios.shipped())}")
    # All are read before the first one starts: a typing error must not cost minutes.
    chosen = [(name, scenarios.load(name, starts_cluster=options.port is None)) for name in names]
    with treated_as_interrupt():
        performed = [_perform(name, scenario, options) for name, scenario in chosen]
    reports = [report for _, report in performed]
    if options.json:
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    # One that failed says more than one that is void.
    return min((status for status, _ in performed if status), default=0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="kevlarflow chaos", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="a YAML file or a name of --list")
    parser.add_argument("--list", action="store_true", help="list the scenarios that come with KevlarFlow")
    parser.add_argument("--all", action="store_true", help="perform all of those")
    parser.add_argument("--port", type=port, help="hurt the cluster that runs on this port, whatever `cluster` says")
    parser.add_argument("--plain", action="store_true", help="print plain lines even on a terminal")
    parser.add_argument("--json", action="store_true", help="print a JSON report, and everything else to stderr")
    return parser.parse_args(arguments)


def _perform(name: str, scenario: Scenario, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """One scenario: its exit status and its report."""
    from rich.console import Console

    from kevlarflow.bench.chaos import judge, show
    from kevlarflow.bench.chaos.scenario import as_data
    from kevlarflow.faults import FaultDidNotHappen

    title = Path(name).stem
    out = sys.stderr if options.json else sys.stdout
    console = Console(file=out, highlight=False, force_terminal=False if options.plain else None)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    screen = show.Screen(console, f"{title}: {scenario.about}")
    report: dict[str, Any] = {"scenario": title, "outcome": "void", "definition": as_data(scenario)}
    try:
        seen, verdicts = _observe(name, scenario, options.port, screen, console)
    except FaultDidNotHappen as error:
        report["reason"] = str(error)
        if screen.performance is not None and (broken := judge.harm(scenario.checks, screen.performance.seen)):
            console.print(show.verdicts(broken))
            print(f"{show.last_line(title, broken)}; and void: {error}", file=out, flush=True)
            return FAILED, report | _account(screen.performance.seen, broken, holds=False)
        print(f"VOID {title}: {error}", file=out, flush=True)
        return error.exit_status, report
    except KevlarFlowError as error:
        # The others are performed all the same, and what they have shown is not lost.
        print(f"FAILED {title}: {error}", file=out, flush=True)
        return error.exit_status, report | {"outcome": "failed", "reason": str(error)}
    console.print(show.verdicts(verdicts))
    print(show.last_line(title, verdicts), file=out, flush=True)
    holds = all(verdict.holds for verdict in verdicts)
    return 0 if holds else FAILED, report | _account(seen, verdicts, holds=holds)


def _observe(
    name: str, scenario: Scenario, port: int | None, screen: Screen, console: Console
) -> tuple[Observed, list[Verdict]]:
    """What was seen, and how that is judged; the cluster's log stays when a check does not hold."""
    from kevlarflow.bench.chaos import stage
    from kevlarflow.bench.chaos.judge import judge
    from kevlarflow.default_model import ensure_default_model

    if port is not None:
        seen = stage.on_running_cluster(scenario, name, port, screen)
        return seen, judge(scenario.checks, seen)
    if scenario.cluster.model is None:
        ensure_default_model()
    with log_folder("chaos", functools.partial(console.print, markup=False)) as logs:
        seen = stage.on_own_cluster(scenario, logs.folder, screen)
        verdicts = judge(scenario.checks, seen)
        logs.are_kept = not all(verdict.holds for verdict in verdicts)
    return seen, verdicts


def _account(seen: Observed, verdicts: list[Verdict], *, holds: bool) -> dict[str, Any]:
    import msgspec

    return {
        "outcome": "passed" if holds else "failed",
        "checks": msgspec.to_builtins(verdicts),
        "faults": msgspec.to_builtins(seen.faults),
        "requests": len(seen.answers),
        "tokens": sum(answer.stream.tokens for answer in seen.answers),
        "lane_back_seconds": seen.lane_back_seconds,
        "moved_seconds": seen.moved_seconds,
        "recoveries": seen.recoveries,
        "unexpected": seen.unexpected,
        "left_behind": seen.left_behind,
    }
