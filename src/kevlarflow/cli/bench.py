"""``kevlarflow bench``: measures KevlarFlow against stock vLLM on this machine, and writes down what it found."""

from __future__ import annotations

import argparse
import datetime
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kevlarflow.cli import bench_suite, preflight
from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.cli.model_files import find
from kevlarflow.cli.output_folder import require_writable
from kevlarflow.command_line import Parser, amount, count, memory_size
from kevlarflow.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kevlarflow.bench.experiment import Say
    from kevlarflow.bench.results import Report

    Experiment = Callable[[argparse.Namespace, Report, Path, Say], None]

REPLICATION = ("resume", "replication-cost", "standby-memory", "transfer")
EXPERIMENTS = ("throughput", "startup", "failover", "detection", *REPLICATION)
WITHOUT_STOCK = {"failover", "detection", "resume", "replication-cost", "transfer"}
DEFAULT_OUTPUT = Path("docs/benchmarks")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""vLLM's."""
FILE_WIDTH = 120
"""Characters of a line where there is no terminal."""
DESCRIPTION = """\
Measure KevlarFlow against stock vLLM, in turns, with the same flags, model and environment:

  throughput        no failure: tokens/s, TTFT and TPOT at 1, 4 and 16 streams
  startup           from the command to the first 200 of /health, with cold and with warm compile caches
  failover          from SIGKILL of a node until every affected stream goes on (KevlarFlow only)
  detection         how soon crashes and hangs are noticed on a machine that is full, and false alarms (KevlarFlow only)

  resume            recovery time against the length of contexts, with and without replication
  replication-cost  throughput and TPOT with and without replication, while nothing fails
  standby-memory    memory of standbys and nodes over some minutes; KV blocks against stock's
  transfer          ways to move a copy of a KV block to another process
  replication       the four above

Without a name all run; --resume REPORT.json goes on with a report and measures only what it lacks.
Tables go to the terminal; JSON and Markdown to --output.

The evaluation under failures, against stock vLLM behind a router, is a command of its own:

  bench run SUITE   run the cells of a suite: quick or full (bench run --help)
  bench report      write the report of the cells that are saved"""


def run(arguments: list[str]) -> int:
    """Run the experiments; return 0 when each has measured something, and no kill has cost what it must not."""
    if arguments and arguments[0] in bench_suite.VERBS:
        return bench_suite.run(arguments)
    options = _parse(arguments)
    from rich.console import Console

    from kevlarflow.bench import report as reporting

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    earlier, fresh = _earlier_report(options), _empty_report(arguments, options)
    report = earlier or fresh
    if earlier is not None:
        _require_like(earlier, fresh, options.resume)
        console.print(
            f"goes on with {options.resume}, and its flags: {shlex.join(earlier.recipe.flags())}", markup=False
        )
    if report.recipe.model is not None:
        # Each system would take a minute to say so.
        preflight.check_layers(report.recipe.stages, find(report.recipe.model))
    require_writable(options.output)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    folder = Path(tempfile.mkdtemp(prefix="kevlarflow-bench-"))
    is_fine = False
    try:
        with treated_as_interrupt():
            _measure(options, report, folder, lambda line: console.print(line, markup=False))
        is_fine = not reporting.void(report) and not reporting.harm(report)
    finally:
        if is_fine:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"logs of the systems are kept in {folder}")
        # Before anything is shown: a table that cannot be drawn must not cost what was measured.
        saved = reporting.save(report, options.output) if reporting.has_results(report) else []
        for table in reporting.tables(report):
            console.print(reporting.rich_table(table))
        if saved:
            console.print(f"saved {' and '.join(map(str, saved))}")
    return 0 if is_fine else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="kevlarflow bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="a small version of everything: does it work at all?")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, on both sides")
    parser.add_argument("--rounds", type=count, default=3, help="rounds of throughput (%(default)s)")
    parser.add_argument("--streams", type=_counts, default=(1, 4, 16), help="streams at a time (1,4,16)")
    parser.add_argument("--tokens", type=count, default=128, help="output tokens of a request (%(default)s)")
    parser.add_argument("--startup-rounds", type=count, default=2, help="rounds of startup (%(default)s)")
    parser.add_argument("--kills", type=count, help="of failover (10); crashes of detection, and as many hangs (20)")
    parser.add_argument("--kill-streams", type=count, default=16, help="streams during a kill (%(default)s)")
    parser.add_argument("--model", help="a Hugging Face folder or name (KevlarFlow's default model)")
    parser.add_argument("-pp", "--stages", type=count, default=2, help="stages of a pipeline (%(default)s)")
    parser.add_argument("-dp", "--pipelines", type=count, default=2, help="pipelines (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="as vLLM's (the model's own)")
    parser.add_argument("--max-model-len", type=count, default=2048, help="as vLLM's (%(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=memory_size, default=512 * 2**20, help="as vLLM's (512M)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and moments (%(default)s)")
    parser.add_argument(
        "--patience",
        type=amount,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait, each time, until other processes leave the machine alone (%(default)s)",
    )
    _add_replication_flags(parser)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the reports (%(default)s)")
    options = parser.parse_args(arguments)
    for name in options.experiments:
        if name not in (*EXPERIMENTS, "replication"):
            raise UsageError(f"there is no experiment {name!r}: use {', '.join(EXPERIMENTS)} or replication")
    if "replication" in options.experiments:
        options.experiments += REPLICATION
    options.experiments = options.experiments or list(EXPERIMENTS)
    return options


def _add_replication_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume-rounds", type=count, default=3, help="rounds of resume, with replication (3)")
    parser.add_argument("--contexts", type=_counts, default=(256, 1024, 2048, 4096, 7500), help="of resume, in tokens")
    parser.add_argument("--resume-streams", type=count, default=8, help="streams of resume (%(default)s)")
    parser.add_argument("--replication", choices=("on", "off", "both"), default="both", help="of resume (%(default)s)")
    parser.add_argument("--cost-rounds", type=count, default=6, help="rounds of replication-cost (%(default)s)")
    parser.add_argument("--minutes", type=amount, help="of standby-memory (10); of detection without a fault (30)")
    parser.add_argument("--resume", type=Path, metavar="REPORT", help="a JSON report to go on with")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(count(each) for each in text.split(","))


def _minutes(options: argparse.Namespace, default: float) -> float:
    return default if options.minutes is None else float(options.minutes)


def _earlier_report(options: argparse.Namespace) -> Report | None:
    """The report that `--resume` names."""
    import msgspec

    from kevlarflow.bench.results import Report

    if options.resume is None:
        return None
    try:
        return msgspec.json.decode(options.resume.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"--resume {options.resume} is no report of kevlarflow bench: {error}") from error


def _require_like(earlier: Report, fresh: Report, path: Path) -> None:
    """Raises `UsageError` when what is measured now could not stand beside what the report has."""
    there, here = earlier.machine.lasting(), fresh.machine.lasting()
    if there != here:
        what = next(name for name in there.__struct_fields__ if getattr(there, name) != getattr(here, name))
        raise UsageError(
            f"--resume {path} was measured with {what} {getattr(there, what)!r}, and this machine has "
            f"{getattr(here, what)!r}: begin a new report"
        )


def _empty_report(arguments: list[str], options: argparse.Namespace) -> Report:
    from kevlarflow.bench import machine, recipes
    from kevlarflow.bench.results import Report

    recipe = recipes.Recipe(
        model=options.model,
        stages=options.stages,
        pipelines=options.pipelines,
        eager=options.eager,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
    )
    needs_remedy = recipe.eager and recipe.stages > 1 and not set(options.experiments) <= WITHOUT_STOCK
    return Report(
        command=shlex.join(["kevlarflow", "bench", *arguments]),
        begun=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=machine.describe(),
        recipe=recipe,
        notes=[recipes.REMEDY_NOTE] * needs_remedy,
    )


def _measure(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    """Run the experiments that were asked for; each puts its result into the report as soon as there is one."""
    experiments: dict[str, Experiment] = {
        "throughput": _throughput,
        "startup": _startup,
        "failover": _failover,
        "detection": _detection,
        "resume": _resume,
        "replication-cost": _replication_cost,
        "standby-memory": _standby_memory,
        "transfer": _transfer,
    }
    for name, experiment in experiments.items():
        if name in options.experiments:
            experiment(options, report, folder, say)


def _throughput(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    from kevlarflow.bench import results, throughput

    size = {"rounds": 1, "streams": (1, 4), "tokens": 32} if options.quick else {}
    asked = {"rounds": options.rounds, "streams": options.streams, "tokens": options.tokens} | size
    plan = throughput.Plan(report.recipe, seed=options.seed, patience_seconds=options.patience, **asked)
    report.throughput = report.throughput or results.Throughput()
    throughput.run(plan, report.throughput, folder, say)


def _startup(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    from kevlarflow.bench import results, startup

    rounds = 1 if options.quick else options.startup_rounds
    report.startup = report.startup or results.Startup()
    plan = startup.Plan(report.recipe, rounds=rounds, patience_seconds=options.patience)
    startup.run(plan, report.startup, folder, say)


def _failover(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    from kevlarflow.bench import failover

    kills, streams = (2, 8) if options.quick else (options.kills or 10, options.kill_streams)
    plan = failover.Plan(
        report.recipe, kills=kills, streams=streams, seed=options.seed, patience_seconds=options.patience
    )
    if report.failover is not None and failover.is_whole(plan, report.failover):
        say(f"failover: the report has its {kills} kills")
        return
    report.failover = failover.anew(report.failover, streams)
    failover.run(plan, report.failover, folder, say)


def _detection(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    import msgspec

    from kevlarflow.bench import detection

    minutes, kills = _minutes(options, 30.0), options.kills or 20
    plan = detection.Plan(recipe=report.recipe, minutes=minutes, kills=kills, seed=options.seed)
    if options.quick:
        plan = msgspec.structs.replace(plan, minutes=0.5, kills=1, long_tokens=512)
    report.detection = report.detection or plan.empty()
    detection.run(plan, report.detection, folder, say)


def _resume(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    import msgspec

    from kevlarflow.bench import resume
    from kevlarflow.bench.replication_results import Resume, begin_again

    contexts, streams = ((256, 1024), 4) if options.quick else (options.contexts, options.resume_streams)
    longest = max(report.recipe.max_model_len, max(contexts) + resume.MOST_TOKENS)
    recipe = msgspec.structs.replace(
        report.recipe,
        max_model_len=min(longest, resume.LONGEST_CONTEXT),
        kv_cache_memory_bytes=max(report.recipe.kv_cache_memory_bytes, resume.LEAST_KV_BYTES),
    )
    replicated = {"on": (True,), "off": (False,), "both": (True, False)}[options.replication]
    report.resume = report.resume or Resume(recipe.stages, shlex.join(recipe.flags()))
    begin_again(report.resume)
    rounds = 1 if options.quick else options.resume_rounds
    plan = resume.Plan(recipe, contexts, replicated, streams, rounds, options.seed)
    resume.run(plan, report.resume, folder, say)


def _replication_cost(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    from kevlarflow.bench import replication_cost
    from kevlarflow.bench.replication_results import ReplicationCost, begin_again

    size = {"rounds": 1, "requests_each": 1, "tokens": 32} if options.quick else {"rounds": options.cost_rounds}
    plan = replication_cost.Plan(report.recipe, seed=options.seed, patience_seconds=options.patience, **size)
    report.replication_cost = report.replication_cost or ReplicationCost()
    begin_again(report.replication_cost)
    replication_cost.run(plan, report.replication_cost, folder, say)


def _standby_memory(options: argparse.Namespace, report: Report, folder: Path, say: Say) -> None:
    from kevlarflow.bench import standby_memory
    from kevlarflow.bench.replication_results import StandbyMemory, begin_again

    minutes = 0.5 if options.quick else _minutes(options, 10.0)
    report.standby_memory = report.standby_memory or StandbyMemory(minutes)
    begin_again(report.standby_memory)
    plan = standby_memory.Plan(report.recipe, minutes, seed=options.seed)
    standby_memory.run(plan, report.standby_memory, folder, say)


def _transfer(options: argparse.Namespace, report: Report, _: Path, say: Say) -> None:
    from kevlarflow.bench import transfers
    from kevlarflow.bench.replication_results import Transfers

    report.transfer = Transfers()
    transfers.run(transfers.Plan(copies=50 if options.quick else 200), report.transfer, say)
