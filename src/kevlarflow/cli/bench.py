"""``kevlarflow bench``: measures KevlarFlow against stock vLLM on this machine, and writes down what it found."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kevlarflow.cli import bench_suite
from kevlarflow.errors import UsageError

if TYPE_CHECKING:
    from kevlarflow.bench.experiment import Say
    from kevlarflow.bench.results import Report

EXPERIMENTS = ("throughput", "startup", "failover")
DEFAULT_OUTPUT = Path("docs/benchmarks")
FILE_WIDTH = 120
"""Characters of a line where there is no terminal."""
DESCRIPTION = """\
Measure KevlarFlow against stock vLLM, in turns, with the same flags, model and environment:

  throughput   no failure: tokens/s, TTFT and TPOT at 1, 4 and 16 streams
  startup      from the command to the first 200 of /health, with cold and with warm compile caches
  failover     from SIGKILL of a node to the next token of every affected stream (KevlarFlow only)

Without a name all three run. Tables go to the terminal; JSON and Markdown to --output.

The evaluation under failures, against stock vLLM behind a router, is a command of its own:

  bench run SUITE   run the cells of a suite: quick or full (bench run --help)
  bench report      write the report of the cells that are saved"""


def run(arguments: list[str]) -> int:
    """Run the experiments; return 0 when each has measured something."""
    if arguments and arguments[0] in bench_suite.VERBS:
        return bench_suite.run(arguments)
    options = _parse(arguments)
    from rich.console import Console

    from kevlarflow.bench import report as reporting

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    report = _empty_report(arguments, options)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="kevlarflow-bench-"))
    is_complete = False
    try:
        _measure(options, report, folder, lambda line: console.print(line, markup=False))
        is_complete = not reporting.void(report)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if is_complete:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"logs of the systems are kept in {folder}")
        for grid in reporting.grids(report):
            console.print(reporting.rich_table(grid))
        if any(True for _ in reporting.grids(report)):
            console.print(f"saved {' and '.join(map(str, reporting.save(report, options.output)))}")
    return 0 if is_complete else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kevlarflow bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="a small version of everything: does it work at all?")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, on both sides")
    parser.add_argument("--rounds", type=_count, default=3, help="rounds of throughput (%(default)s)")
    parser.add_argument("--streams", type=_counts, default=(1, 4, 16), help="streams at a time (1,4,16)")
    parser.add_argument("--tokens", type=_count, default=128, help="output tokens of a request (%(default)s)")
    parser.add_argument("--startup-rounds", type=_count, default=2, help="rounds of startup (%(default)s)")
    parser.add_argument("--kills", type=_count, default=10, help="kills of failover (%(default)s)")
    parser.add_argument("--kill-streams", type=_count, default=16, help="streams during a kill (%(default)s)")
    parser.add_argument("--model", help="a Hugging Face folder or name (KevlarFlow's default model)")
    parser.add_argument("-pp", "--stages", type=_count, default=2, help="stages of a pipeline (%(default)s)")
    parser.add_argument("-dp", "--pipelines", type=_count, default=2, help="pipelines (%(default)s)")
    parser.add_argument("--dtype", help="as vLLM's (the model's own)")
    parser.add_argument("--max-model-len", type=_count, default=2048, help="as vLLM's (%(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=_bytes, default=512 * 2**20, help="as vLLM's (512M)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and moments (%(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait, each time, until other processes leave the machine alone (%(default)s)",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the reports (%(default)s)")
    options = parser.parse_args(arguments)
    for name in options.experiments:
        if name not in EXPERIMENTS:
            raise UsageError(f"there is no experiment {name!r}: use {', '.join(EXPERIMENTS)}")
    options.experiments = options.experiments or list(EXPERIMENTS)
    return options


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(each) for each in text.split(","))


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([MG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes, such as 512M or 2G")
    return int(match[1]) * {"": 1, "M": 2**20, "G": 2**30}[match[2]]


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _empty_report(arguments: list[str], options: argparse.Namespace) -> Report:
    from kevlarflow.bench import contestants, machine
    from kevlarflow.bench.results import Report

    recipe = contestants.Recipe(
        model=options.model,
        stages=options.stages,
        pipelines=options.pipelines,
        eager=options.eager,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
    )
    needs_remedy = recipe.eager and recipe.stages > 1 and set(options.experiments) != {"failover"}
    return Report(
        command=shlex.join(["kevlarflow", "bench", *arguments]),
        begun=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=machine.describe(),
        recipe=recipe,
        notes=[contestants.REMEDY_NOTE] * needs_remedy,
    )


def _measure(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    """Run the experiments that were asked for; each puts its result into the report as soon as there is one."""
    from kevlarflow.bench import failover, results, startup, throughput

    recipe = report.recipe
    if "throughput" in options.experiments:
        size = {"rounds": 1, "streams": (1, 4), "tokens": 32} if options.quick else {}
        asked = {"rounds": options.rounds, "streams": options.streams, "tokens": options.tokens} | size
        throughput_plan = throughput.Plan(recipe, seed=options.seed, patience_seconds=options.patience, **asked)
        report.throughput = results.Throughput()
        throughput.run(throughput_plan, report.throughput, folder, say)
    if "startup" in options.experiments:
        rounds = 1 if options.quick else options.startup_rounds
        startup_plan = startup.Plan(recipe, rounds=rounds, patience_seconds=options.patience)
        report.startup = results.Startup()
        startup.run(startup_plan, report.startup, folder, say)
    if "failover" in options.experiments:
        kills, streams = (2, 8) if options.quick else (options.kills, options.kill_streams)
        failover_plan = failover.Plan(
            recipe, kills=kills, streams=streams, seed=options.seed, patience_seconds=options.patience
        )
        report.failover = results.Failover(streams)
        failover.run(failover_plan, report.failover, folder, say)
