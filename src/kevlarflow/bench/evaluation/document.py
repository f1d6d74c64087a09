"""The report of saved cells: Markdown for people, CSV for tools, figures; written beside the cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from kevlarflow.bench.evaluation import figures
from kevlarflow.bench.evaluation.cells import NO_FAULT, RATES, SETTINGS, SYSTEMS, Cell, workload
from kevlarflow.bench.evaluation.claims import claims
from kevlarflow.bench.evaluation.comparison import (
    AFTER_SECONDS,
    PAPER,
    PAPER_OVERHEAD,
    Row,
    emulation_note,
    is_emulated,
    overheads,
    ratios,
    rows,
)
from kevlarflow.bench.evaluation.outcome import GOODPUT_WINDOW_SECONDS, CellResult
from kevlarflow.bench.evaluation.prose import FORMULAS, WHY_DIFFERENT
from kevlarflow.bench.evaluation.saved import load_all
from kevlarflow.bench.evaluation.spread import THROUGHPUT, half_width, spreads
from kevlarflow.bench.evaluation.workload import Workload
from kevlarflow.bench.recipes import REMEDY_NOTE
from kevlarflow.bench.table import told_attempts

NOTHING = "-"


def write(folder: Path, again: Sequence[Path] = ()) -> Path:
    """Write the report of the cells in `folder`; returns the Markdown file.

    `again` holds other runs of the same cells, which tell how far runs lie apart.
    """
    results = load_all(folder)
    found = rows(results)
    others = [row for other in again for row in rows(load_all(other))]
    drawn = figures.draw(results, found, folder / "figures")
    _write_csv(found, folder / "cells.csv")
    path = folder / "README.md"
    path.write_text("\n".join(_lines(results, found, others, [each.relative_to(folder) for each in drawn])) + "\n")
    return path


def _lines(
    results: Sequence[CellResult], found: Sequence[Row], others: Sequence[Row], drawn: Sequence[Path]
) -> Iterator[str]:
    yield from ("# KevlarFlow and what people run today, under failures", "")
    yield from _how(results)
    yield from ("", "## Against the paper", "")
    yield from _ratio_lines(found)
    yield from ("", "## Claims", "")
    yield from _claim_lines(found)
    yield from ("", "## Cost when nothing fails", "")
    yield from _overhead_lines(found)
    yield from ("", "## How far runs lie apart", "")
    yield from _spread_lines([*found, *others])
    yield from ("", "## All cells", "")
    yield from _cell_lines(found)
    yield from ("", "## Figures", "")
    yield from (f"![{path.stem}]({path.as_posix()})\n" for path in drawn)
    yield from ("## Why figures differ from the paper's", "")
    yield WHY_DIFFERENT


def _how(results: Sequence[CellResult]) -> Iterator[str]:
    first, last = min(each.begun for each in results), max(each.begun for each in results)
    yield "Each cell is `kevlarflow bench run --cell NAME`, or part of a suite; this page is `kevlarflow bench report`."
    yield f"Cells begun {first} to {last}; they took {sum(each.seconds for each in results) / 60:.0f} minutes."
    for each in dict.fromkeys(each.machine for each in results if each.machine is not None):
        yield f"Machine: {each.processor}, {each.cores} cores, {each.memory_gib} GiB; Python {each.python},"
        yield f"vLLM {each.vllm}, torch {each.torch}, KevlarFlow {each.kevlarflow}."
    yield from ("", "| system | what it is |", "|---|---|")
    yield from (f"| {name} | {what} |" for name, what in SYSTEMS.items())
    yield from ("", "| setting | nodes | device time | requests/s |", "|---|---|---|---|")
    for name in dict.fromkeys(each.cell.setting for each in results):
        setting = SETTINGS[name]
        grid = f"{setting.recipe.pipelines} x {setting.recipe.stages}"
        rates = ", ".join(f"{rate} {value:g}" for rate, value in setting.rates.items())
        yield f"| {name} | {grid} | {emulation_note(name)} | {rates} |"
    yield ""
    yield (
        "Rates: " + "; ".join(f"*{name}*: {what}" for name, what in RATES.items()) + ". Arrivals are a Poisson process;"
    )
    yield "lengths are drawn from the Azure LLM inference trace 2023 (conversation; CC-BY 4.0, Microsoft), by 1/8."
    yield from _other_loads(results)
    yield "All systems run eagerly, in float32, without prefix caching, with the same flags."
    yield REMEDY_NOTE
    if any(is_emulated(each.cell) for each in results):
        yield from ("", "## Where device time is emulated (e)", "", FORMULAS)


def _other_loads(results: Sequence[CellResult]) -> Iterator[str]:
    """Cells whose load is none of the suite's."""
    for each in results:
        if each.load is not None and _named(each.load) != _named(workload(each.cell)):
            rate, trace = each.load.requests_per_second, Path(each.load.trace).name
            yield f"But {each.cell.name}: {each.load.arrivals} arrivals, {rate:g} a second, of {trace}."


def _named(load: Workload) -> Workload:
    """Wherever its trace lay when it was measured."""
    return msgspec.structs.replace(load, trace=Path(load.trace).name)


def _ratio_lines(found: Sequence[Row]) -> Iterator[str]:
    yield "The other system's figure by KevlarFlow's, over the failure window of"
    yield f"{_windows(found)}: above 1 KevlarFlow is ahead."
    yield ""
    yield from _table("cell", *PAPER, "lost", "lost by KevlarFlow")
    yield f"| **the paper** (restart by KevlarFlow) | {' | '.join(f'{value:g}x' for value in PAPER.values())} | | |"
    for each in ratios(found):
        values = " | ".join(_number(value, "{:.1f}x") for value in each.values.values())
        yield f"| {each.cell.name}{_mark(each.cell)} | {values} | {each.lost} | {each.lost_by_us} |"
    if any(is_emulated(row.cell) for row in found):
        yield from ("", "(e) device time is emulated.")


def _claim_lines(found: Sequence[Row]) -> Iterator[str]:
    words = {True: "yes", False: "**no**", None: "no cell says"}
    yield from _table("claim", "found", "holds")
    yield from (f"| {each.text} | {each.found} | {words[each.holds]} |" for each in claims(found))


def _windows(found: Sequence[Row]) -> str:
    seconds = sorted({SETTINGS[row.cell.setting].after_seconds for row in found})
    return " or ".join(f"{each:.0f} s" for each in seconds)


def _overhead_lines(found: Sequence[Row]) -> Iterator[str]:
    measured = list(overheads(found))
    if not measured:
        yield f"Not measured in these cells. The paper: {PAPER_OVERHEAD} average latency."
        return
    yield f"KevlarFlow by stock-dp, same load. The paper: {PAPER_OVERHEAD} average latency."
    yield ""
    yield from _table("cell", "throughput", "average latency", "p99 latency", "TPOT")
    for each in measured:
        values = (each.throughput, each.latency_mean, each.latency_p99, each.tpot_mean)
        shown = " | ".join(_number(value, "{:.3f}") for value in values)
        yield f"| {each.cell.name}{_mark(each.cell)} | {shown} |"


def _spread_lines(found: Sequence[Row]) -> Iterator[str]:
    measured = list(spreads(found))
    if not measured:
        yield "Each cell was run once."
        return
    yield "Least and most of the runs of a cell (other draws of the load, other runs of the suite), and half of that"
    yield "range as a share of its middle. Times in seconds."
    yield ""
    names = (*PAPER, THROUGHPUT)
    yield from _table("cell", "runs", *names)
    for each in measured:
        shown = (_range(each.ranges.get(name)) for name in names)
        yield f"| {each.scene} | {each.runs} | {' | '.join(shown)} |"


def _range(limits: tuple[float, float] | None) -> str:
    return NOTHING if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f} (±{half_width(*limits):.0%})"


def _cell_lines(found: Sequence[Row]) -> Iterator[str]:
    yield "MTTR: from the fault to the first token of the pipeline that was hit (the slower of two). Goodput back:"
    yield f"until goodput is at 90 % of what was delivered before, over the next {GOODPUT_WINDOW_SECONDS} s and over"
    yield f"the rest of the load. Kept: goodput in the {AFTER_SECONDS} s after the fault by what was delivered in as"
    yield "many before. Requests, lost ones and times: of the failure window. Wrong: whole, and not the output of"
    yield "a run without failure (or of what stock did not lose in one with). Times in seconds."
    yield ""
    yield from _table(
        "cell", "requests", "lost", "wrong", "MTTR", "goodput back", "kept", "latency avg / p99", "TTFT avg / p99",
        "TPOT avg / p99", "tokens/s", "recomputed tokens", "overruns",
        "others' CPU",
    )  # fmt: skip
    for row in found:
        if row.void is not None:
            yield f"| {row.cell.name} | **void**: {row.void} |" + " |" * 12
            continue
        yield "| " + " | ".join(_cells(row)) + " |"
    again = [row for row in found if row.attempts]
    if again:
        yield from ("", "Run again, since they were void:", "")
        yield from (f"- {row.cell.name}: {told_attempts(row.attempts)}" for row in again)


def _cells(row: Row) -> Iterator[str]:
    seen, has_fault = row.window, row.cell.fault != NO_FAULT
    yield row.cell.name + _mark(row.cell)
    lost = f"{seen.lost} ({seen.lost_tokens} tokens)" if seen.lost else "0"
    yield from (str(seen.requests), lost + ", and it died" * bool(row.died))
    yield NOTHING if row.wrong is None else str(row.wrong)
    yield _number(row.mttr, "{:.2f}", "not in the cell") if has_fault else ""
    yield _number(row.goodput_back, "{:.0f}", "not in the cell") if has_fault else ""
    yield _number(row.goodput_kept, "{:.2f}") if has_fault else ""
    yield _pair(seen.latency_mean, seen.latency_p99, "{:.2f}")
    yield _pair(seen.ttft_mean, seen.ttft_p99, "{:.2f}")
    yield _pair(seen.tpot_mean, seen.tpot_p99, "{:.3f}")
    yield from (_number(row.tokens_per_second, "{:.1f}"), str(row.recomputed_tokens) if has_fault else "")
    yield _number(row.overrun_share, "{:.2%}", "")
    yield f"{row.strangers:.0%}"


def _table(*headers: str) -> Iterable[str]:
    return f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)


def _mark(cell: Cell) -> str:
    return " (e)" if is_emulated(cell) else ""


def _number(value: float, form: str, otherwise: str = NOTHING) -> str:
    return form.format(value) if math.isfinite(value) else otherwise


def _pair(one: float, other: float, form: str) -> str:
    return f"{_number(one, form)} / {_number(other, form)}"


COLUMNS = (
    "cell", "emulated", "void", "died", "requests_per_second", "requests", "lost", "lost_tokens", "wrong", "repeated",
    "mttr_seconds", "goodput_back_seconds", "goodput_kept", "latency_mean", "latency_p99", "ttft_mean", "ttft_p99",
    "tpot_mean", "tpot_p99", "tokens_per_second", "recomputed_tokens", "overrun_share", "strangers", "ready_seconds",
    "restart_seconds",
)  # fmt: skip


def _write_csv(found: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in found:
            seen = row.window
            values = (
                row.cell.name, is_emulated(row.cell), row.void or "", row.died or "",
                row.rate, seen.requests, seen.lost,
                seen.lost_tokens, row.wrong, row.repeated, row.mttr, row.goodput_back, row.goodput_kept,
                seen.latency_mean, seen.latency_p99, seen.ttft_mean, seen.ttft_p99, seen.tpot_mean, seen.tpot_p99,
                row.tokens_per_second, row.recomputed_tokens, row.overrun_share, row.strangers, row.ready_seconds,
                row.restart_seconds,
            )  # fmt: skip
            writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
