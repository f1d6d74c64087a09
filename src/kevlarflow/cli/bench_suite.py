"""``kevlarflow bench run SUITE`` and ``kevlarflow bench report``: the evaluation against what people run today."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.cli.output_folder import require_writable
from kevlarflow.command_line import Parser
from kevlarflow.errors import UsageError

if TYPE_CHECKING:
    from kevlarflow.bench.evaluation.cells import Cell

VERBS = ("run", "report")
DEFAULT_OUTPUT = Path("docs/benchmarks/evaluation")


def run(arguments: list[str]) -> int:
    """Run ``bench run`` or ``bench report``."""
    return {"run": _run, "report": _report}[arguments[0]](arguments[1:])


def _run(arguments: list[str]) -> int:
    options = _parse_run(arguments)
    from kevlarflow.bench.evaluation import cells, drive, suite, workload

    chosen = _chosen(options)
    if options.list:
        for cell in chosen:
            print(f"{cell.name:<44} {cell.why}")
        return 0
    loads = {cell: cells.workload(cell, options.trace, options.arrivals) for cell in chosen}
    for load in loads.values():
        workload.plan(load)  # What is wrong with the load is said before anything is started.
    require_writable(options.output)
    with treated_as_interrupt():
        void = suite.run(loads, options.output, lambda cell, folder: drive.run(cell, loads[cell], folder, _say), _say)
    return _report([str(options.output)]) or int(void > 0)


def _parse_run(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="kevlarflow bench run",
        description="Run the cells of a suite that are not done yet, save each, and write the report.",
    )
    parser.add_argument("suite", nargs="?", help="quick (under 10 minutes) or full")
    parser.add_argument("--cells", metavar="PATTERN", help="only cells whose name matches, such as '*.none.*'")
    parser.add_argument(
        "--cell",
        action="append",
        default=[],
        metavar="SETTING.SYSTEM.RATE.FAULT.SEED",
        help="a cell of its own, such as a10-2x4-1g.replay.light.two.3; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="show the cells and why each is there; run nothing")
    parser.add_argument("--rate", type=float, help="requests per second, in place of the setting's own")
    parser.add_argument("--arrivals", help="poisson, or trace: the trace's own, stretched (poisson)")
    parser.add_argument("--trace", help="CSV with the columns of the sample that is shipped (that one)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of cells and report (%(default)s)")
    return parser.parse_args(arguments)


def _chosen(options: argparse.Namespace) -> list[Cell]:
    from kevlarflow.bench.evaluation.cells import SUITES

    if options.suite is None and not options.cell:
        raise UsageError(f"name a suite ({', '.join(SUITES)}) or a --cell")
    if options.suite is not None and options.suite not in SUITES:
        raise UsageError(f"there is no suite {options.suite!r}: use {' or '.join(SUITES)}")
    chosen = [*SUITES.get(options.suite, []), *map(_cell, options.cell)]
    chosen = list({cell.name: cell for cell in reversed(chosen)}.values())[::-1]
    chosen = [cell for cell in chosen if options.cells is None or fnmatch.fnmatch(cell.name, options.cells)]
    if not chosen:
        raise UsageError(f"no cell matches {options.cells!r}: see kevlarflow bench run {options.suite} --list")
    return chosen if options.rate is None else list(dict.fromkeys(_at_rate(cell, options.rate) for cell in chosen))


def _at_rate(cell: Cell, rate: float) -> Cell:
    import msgspec

    from kevlarflow.bench.evaluation.cells import ASKED_RATE

    return msgspec.structs.replace(cell, rate=f"{rate:g}{ASKED_RATE}", why="asked for")


def _cell(name: str) -> Cell:
    from kevlarflow.bench.evaluation.cells import FAULTS, RATES, SETTINGS, SYSTEMS, Cell

    parts = name.split(".")
    known: list[Any] = [SETTINGS, SYSTEMS, RATES, FAULTS]
    if len(parts) != len(known) + 1 or not parts[-1].isdecimal():
        raise UsageError(f"{name!r} is no cell: write SETTING.SYSTEM.RATE.FAULT.SEED")
    for part, names in zip(parts[:-1], known, strict=True):
        if part not in names:
            raise UsageError(f"{name!r} is no cell: {part!r} is none of {', '.join(names)}")
    setting, system, rate, fault, seed = parts
    return Cell(setting, system, rate, fault, int(seed), "asked for")


def _report(arguments: list[str]) -> int:
    parser = Parser(
        prog="kevlarflow bench report", description="Write the report of saved cells: Markdown, CSV and figures."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_OUTPUT, help="of the cells (%(default)s)")
    parser.add_argument(
        "--again", type=Path, action="append", default=[], metavar="FOLDER",
        help="another run of the same cells, to tell how far runs lie apart; may be repeated",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    from kevlarflow.bench.evaluation import document

    require_writable(options.folder)
    print(f"saved {document.write(options.folder, options.again)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
