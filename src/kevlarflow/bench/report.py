"""A report for people: the same tables on the terminal and in Markdown, and the data behind them as JSON.

A `Table` does not know yet where it will be shown. Everything that is written here is computed from the
results alone, so that a saved report can be rendered again.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kevlarflow.bench.detection_report import alarms_table, detection_table, faults_table
from kevlarflow.bench.measure import Pause, percentile, ratios, spread
from kevlarflow.bench.recipes import KEVLARFLOW, STOCK
from kevlarflow.bench.replication_report import cost_table, draw_resume, memory_table, resume_table, transfer_table
from kevlarflow.bench.results import Failover, Kill, Report, Startup, Throughput
from kevlarflow.bench.table import NOTHING, Table, milliseconds, told_before, verdict
from kevlarflow.types import PHASES

if TYPE_CHECKING:
    from rich.console import RenderableType

EXPERIMENTS = (
    "throughput", "startup", "failover", "detection", "resume", "replication_cost", "standby_memory", "transfer",
)  # fmt: skip
"""Parts of a report, in the order in which they are shown."""
MEASURES = (
    ("throughput", "tokens_per_second", 1.0, "{:.1f} tokens/s"),
    ("TTFT p50", "ttft_p50", 1e3, "{:.0f} ms"),
    ("TTFT p99", "ttft_p99", 1e3, "{:.0f} ms"),
    ("TPOT p50", "tpot_p50", 1e3, "{:.1f} ms"),
    ("TPOT p99", "tpot_p99", 1e3, "{:.1f} ms"),
)


def has_results(report: Report) -> bool:
    """Whether any experiment has begun."""
    return any(getattr(report, name) is not None for name in EXPERIMENTS)


def tables(report: Report) -> Iterator[Table]:
    """All tables of a report."""
    if report.throughput is not None:
        yield throughput_table(report.throughput)
        yield rounds_table(report.throughput)
    if report.startup is not None:
        yield startup_table(report.startup)
    if report.failover is not None:
        yield pauses_table(report.failover)
        yield phases_table(report.failover)
        yield kills_table(report.failover)
    if report.detection is not None:
        yield alarms_table(report.detection, report.machine.cores)
        yield detection_table(report.detection)
        yield faults_table(report.detection)
    if report.resume is not None:
        yield resume_table(report.resume)
    if report.replication_cost is not None:
        yield cost_table(report.replication_cost)
    if report.standby_memory is not None:
        yield memory_table(report.standby_memory)
    if report.transfer is not None:
        yield transfer_table(report.transfer)


def void(report: Report) -> list[str]:
    """Why some of it counts for nothing; empty when everything does."""
    parts = [
        *(report.throughput.rounds if report.throughput else ()),
        *(report.startup.starts if report.startup else ()),
        *(report.failover.kills if report.failover else ()),
        *(report.resume.points if report.resume else ()),
        *(report.replication_cost.loads if report.replication_cost else ()),
        *(each for each in (report.failover, report.detection, report.resume) if each),
        *(each for each in (report.replication_cost, report.standby_memory, report.transfer) if each),
    ]
    return [part.void for part in parts if part.void is not None]


def harm(report: Report) -> list[str]:
    """What the system has done wrong after kills, and before them."""
    return report.failover.harm if report.failover else []


# ---- no failure


def throughput_table(result: Throughput) -> Table:
    """Both systems side by side, and the ratio within each round."""
    rounds = 1 + max((each.number for each in result.rounds), default=0)
    rows = []
    for streams in sorted({load.summary.streams for each in result.rounds for load in each.loads}):
        for label, field, scale, form in MEASURES:
            values = {name: _by_round(result, name, streams, field, rounds) for name in (STOCK, KEVLARFLOW)}
            cells = (_middle(values[name], scale, form) for name in (STOCK, KEVLARFLOW))
            rows.append((str(streams), label, *cells, _ratio(values[KEVLARFLOW], values[STOCK])))
    remarks = told_before(result.attempts)
    remarks += [
        f"round {each.number}, {each.system}: void: {each.void}" for each in result.rounds if each.void is not None
    ]
    strangers = [load.strangers for each in result.rounds for load in each.loads]
    if strangers:
        remarks.append(
            "median of the rounds; ratio KevlarFlow / stock within a round: median (lowest to highest). "
            f"Other processes used {percentile(strangers, 0.5):.0%} of the machine (at most {max(strangers):.0%})."
        )
    remarks += [f"left running by {each.system}: {left}" for each in result.rounds for left in each.leftovers]
    return Table("No failure", ("streams", "", STOCK, KEVLARFLOW, "ratio"), rows, remarks)


def rounds_table(result: Throughput) -> Table:
    """One row for each load, in the order in which they ran."""
    headers = ("round", "system", "ready", "streams", "throughput", "TTFT p50", "TPOT p50", "others' CPU")
    rows: list[tuple[str, ...]] = []
    for each in result.rounds:
        if each.void is not None or each.ready_seconds is None:
            continue
        for load in each.loads:
            shown = [MEASURES[0], MEASURES[1], MEASURES[3]]
            cells = [form.format(getattr(load.summary, field) * scale) for _, field, scale, form in shown]
            ready, streams = f"{each.ready_seconds:.1f} s", str(load.summary.streams)
            rows.append((str(each.number), each.system, ready, streams, *cells, f"{load.strangers:.0%}"))
    return Table("Rounds", headers, rows)


def _by_round(result: Throughput, name: str, streams: int, field: str, rounds: int) -> list[float | None]:
    values: list[float | None] = [None] * rounds
    for each in result.rounds:
        for load in each.loads:
            if each.system == name and each.void is None and load.summary.streams == streams:
                values[each.number] = getattr(load.summary, field)
    return values


def _middle(values: Sequence[float | None], scale: float, form: str) -> str:
    known = [value * scale for value in values if value is not None]
    return form.format(spread(known).median) if known else NOTHING


def _ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    known = ratios(ours, theirs)
    if not known:
        return NOTHING
    middle = spread(known)
    return f"{middle.median:.3f} ({middle.lowest:.3f} to {middle.highest:.3f})"


# ---- ready


def startup_table(result: Startup) -> Table:
    """Seconds to the first 200, cold and warm."""
    rounds = 1 + max((each.number for each in result.starts), default=0)
    strangers = [each.strangers for each in result.starts if each.void is None]
    rows = []
    for cache in dict.fromkeys(each.cache for each in result.starts):
        values = {}
        for name in (STOCK, KEVLARFLOW):
            values[name] = list[float | None]([None] * rounds)
            for each in result.starts:
                if (each.cache, each.system) == (cache, name) and each.void is None:
                    values[name][each.number] = each.ready_seconds
        cells = (_middle(values[name], 1.0, "{:.1f} s") for name in (STOCK, KEVLARFLOW))
        rows.append((f"{cache} caches", *cells, _ratio(values[KEVLARFLOW], values[STOCK])))
    remarks = told_before(result.attempts)
    remarks += [
        f"round {each.number}, {each.system}, {each.cache}: void: {each.void}"
        for each in result.starts
        if each.void is not None
    ]
    if strangers:
        remarks.append(
            f"Other processes used {percentile(strangers, 0.5):.0%} of the machine (at most {max(strangers):.0%})."
        )
    return Table("Ready: command to the first 200 of /health", ("", STOCK, KEVLARFLOW, "ratio"), rows, remarks)


# ---- failover


def pauses_table(result: Failover) -> Table:
    """How long streams stood still."""
    kills = [kill for kill in result.kills if kill.void is None]
    last = max((kill.stage for kill in kills), default=0)
    rows = []
    for label, chosen in (
        ("all", kills),
        ("first stage", [kill for kill in kills if kill.stage == 0]),
        ("last stage", [kill for kill in kills if kill.stage == last and last > 0]),
    ):
        affected = [pause for kill in chosen for pause in kill.affected]
        others = [pause for kill in chosen for pause in kill.bystanders]
        if affected:
            rows.append((label, str(len(chosen)), str(len(affected)), *_pause_cells(affected, others)))
    remarks = told_before(result.attempts)
    remarks += [f"kill {kill.number}: void: {kill.void}" for kill in result.kills if kill.void is not None]
    remarks += [f"kill {kill.number}: {each}" for kill in result.kills for each in kill.harm]
    remarks += [f"no further kills: {result.void}"] if result.void is not None else []
    lost, failed = sum(len(kill.lost) for kill in result.kills), sum(kill.failure is not None for kill in kills)
    earlier = f", and {len(result.earlier_harm)} such outcomes of earlier attempts" if result.earlier_harm else ""
    if kills or result.harm:
        remarks.append(
            "Required: no stream lost, and each lane taken over and back in time. "
            f"{lost} streams lost, {failed} of {len(kills)} kills not recovered from in time{earlier}: "
            f"{verdict(not result.harm)}."
        )
    remarks.append(
        "next token: from SIGKILL to the very next one, even if it was on its way when the node died; longest wait: "
        "of each stream for a token, of those that began before the kill or at most one ordinary wait after it; "
        "resumed: from SIGKILL to the end of that wait; others: longest wait for a token on the pipelines that lost "
        "no node."
    )
    numbers = ("next token p50", "worst", "longest wait p50", "worst", "resumed p50", "worst", "others p50", "worst")
    headers = ("killed", "kills", "streams", *numbers)
    return Table(f"Failover under {result.streams} streams", headers, rows, remarks)


def _pause_cells(affected: Sequence[Pause], others: Sequence[Pause]) -> Iterator[str]:
    resumed = [pause.resumed_seconds for pause in affected]
    following = [pause.next_token_seconds for pause in affected]
    longest = [pause.gap_seconds for pause in affected]
    for values in (following, longest, resumed, [pause.gap_seconds for pause in others]):
        yield milliseconds(percentile(values, 0.5)) if values else NOTHING
        yield milliseconds(max(values)) if values else NOTHING


def phases_table(result: Failover) -> Table:
    """Where the time went, from the cluster's own records."""
    kills = [kill for kill in result.kills if kill.void is None]
    rows: list[tuple[str, ...]] = []
    for phase in PHASES:
        values = [kill.phases[phase] for kill in kills if kill.phases]
        if values:
            rows.append((phase, milliseconds(percentile(values, 0.5)), milliseconds(max(values))))
    remarks = ["detect counts from the last proof of life."]
    return Table("Phases of the recovery, as in kevlarflow status", ("phase", "p50", "worst"), rows, remarks)


def kills_table(result: Failover) -> Table:
    """One row for each kill."""
    headers = (
        "kill",
        "node",
        "taken over by",
        "streams",
        "lost",
        "resumed, worst",
        "recovery",
        "recompute",
        "tokens",
        "lane back",
        "gap then",
        "before",
    )
    remarks = ["gap then: the longest wait for a token of any stream while the lane moved home; before: just before."]
    return Table("Kills", headers, [_kill_row(kill) for kill in result.kills if kill.void is None], remarks)


def _kill_row(kill: Kill) -> tuple[str, ...]:
    return (
        str(kill.number),
        kill.node,
        kill.taken_over_by,
        str(len(kill.affected)),
        str(len(kill.lost)),
        milliseconds(max(pause.resumed_seconds for pause in kill.affected)) if kill.affected else NOTHING,
        *(milliseconds(kill.phases[phase]) if kill.phases else NOTHING for phase in ("total", "recompute")),
        f"{kill.recomputed_tokens:,}",
        NOTHING if kill.rejoin_seconds is None else f"{kill.rejoin_seconds:.1f} s",
        *(NOTHING if each is None else milliseconds(each) for each in _rejoin_gaps(kill)),
    )


def _rejoin_gaps(kill: Kill) -> tuple[float | None, float | None]:
    return kill.rejoin_gap_seconds, kill.gap_before_rejoin_seconds


# ---- where it is shown


def rich_table(table: Table) -> RenderableType:
    """For the terminal."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for position, header in enumerate(table.headers):
        shown.add_column(header, justify="left" if position < 1 else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return Group(shown, *(Text(remark, style="dim") for remark in table.remarks), Text())


def markdown(report: Report) -> str:
    """The whole report."""
    machine, recipe = report.machine, report.recipe
    lines = [
        f"# Benchmark of {report.begun[:10]}",
        "",
        f"`{report.command}`",
        "",
        f"- Model: {recipe.served_name}, {recipe.pipelines} pipelines (-dp) x {recipe.stages} stages (-pp), "
        f"{'eager' if recipe.eager else 'compiled'}; both systems with `{' '.join(recipe.flags())}`",
        f"- Machine: {machine.cores} cores of {machine.processor}, {machine.memory_gib} GiB; "
        f"KevlarFlow {machine.kevlarflow}, vLLM {machine.vllm}, torch {machine.torch}, Python {machine.python}",
        *(f"- {note}" for note in report.notes),
    ]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", _markdown_row(table.headers), "|---" * len(table.headers) + "|"]
        lines += [_markdown_row(row) for row in table.rows]
        for remark in table.remarks:
            lines += ["", remark]
    return "\n".join([*lines, ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def save(report: Report, folder: Path) -> list[Path]:
    """Write JSON, Markdown and, where there is one, a picture; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    moment = datetime.datetime.fromisoformat(report.begun).strftime("%Y%m%d-%H%M%S")
    stem = "-".join([moment, *(name.replace("_", "-") for name in EXPERIMENTS if getattr(report, name))])
    data, text, picture = (folder / f"{stem}.{kind}" for kind in ("json", "md", "png"))
    data.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    is_drawn = report.resume is not None and draw_resume(report.resume, picture)
    shown = f"\n![Recovery time against context length]({picture.name})\n" if is_drawn else ""
    text.write_text(markdown(report) + shown, encoding="utf-8")
    return [data, text, *[picture] * is_drawn]
