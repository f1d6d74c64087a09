"""What is claimed, and what the cells say of it. A claim without cells is neither held nor broken. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from kevlarflow.bench.evaluation.cells import KEVLARFLOW, NO_FAULT, SETTINGS, STOCK, SUITES
from kevlarflow.bench.evaluation.comparison import PAPER, Row, is_emulated, overheads, ratios

MTTR_RATIO = 100.0
LEAST_THROUGHPUT = 0.98
MOST_LATENCY = 1.02
MOST_QUICK_MINUTES = 10.0


class Claim(msgspec.Struct, frozen=True):
    """One claim."""

    text: str
    found: str
    holds: bool | None
    """None: there is no cell to say."""


def claims(rows: Sequence[Row]) -> list[Claim]:
    """All claims of the evaluation."""
    valid = [row for row in rows if row.void is None]
    return [_mttr(valid), _lost(valid), *_paper(valid), *_overhead(valid), *_goodput(valid), _quick(valid)]


def _mttr(rows: Sequence[Row]) -> Claim:
    text = f"MTTR at least {MTTR_RATIO:.0f}x lower than stock's"
    never = [row.cell.name for row in rows if row.cell.system == KEVLARFLOW and math.isinf(row.mttr)]
    if never:
        return Claim(text, f"never back: {', '.join(never)}", False)
    by_stock = [each.values["MTTR"] for each in ratios(rows) if each.cell.system == STOCK]
    known = [value for value in by_stock if not math.isnan(value)]
    if not known:
        return Claim(text, "", None)
    return Claim(text, f"{min(known):.0f}x to {max(known):.0f}x", min(known) >= MTTR_RATIO)


def _lost(rows: Sequence[Row]) -> Claim:
    lost, wrong, found = _losses([row for row in rows if row.cell.system == KEVLARFLOW])
    *_, theirs = _losses([row for row in rows if row.cell.system == STOCK])
    holds = None if wrong is None else lost + wrong == 0
    return Claim("no request lost or wrong", f"{found}; stock: {theirs}", False if lost else holds)


def _losses(rows: Sequence[Row]) -> tuple[int, int | None, str]:
    """Requests lost, requests wrong (None: nothing could be compared), and both in words."""
    lost, compared = sum(row.lost for row in rows), [row.wrong for row in rows if row.wrong is not None]
    calm = sum(row.cell.fault == NO_FAULT for row in rows)
    cells = f"{len(rows) - calm} cells with a fault" + (f" and {calm} without" if calm else "")
    words = f"{lost} lost in {cells}, {sum(compared)} wrong in the {len(compared)} that can be compared"
    return lost, sum(compared) if compared else None, words


def _paper(rows: Sequence[Row]) -> Iterator[Claim]:
    found = [each for each in ratios(rows) if each.cell.system == STOCK]
    for name, value in PAPER.items():
        known = [(each.values[name], each.cell.name) for each in found if not math.isnan(each.values[name])]
        best = max(known, default=None)
        told = "" if best is None else f"{best[0]:.1f}x in {best[1]}"
        yield Claim(f"the paper's {value:g}x in {name} is reached somewhere", told, best and best[0] >= value)


def _overhead(rows: Sequence[Row]) -> Iterator[Claim]:
    text = f"without failure: throughput at least {LEAST_THROUGHPUT}, average latency at most {MOST_LATENCY}"
    text += " of stock-dp's"
    measured = list(overheads(rows))
    for each in measured:
        holds = each.throughput >= LEAST_THROUGHPUT and each.latency_mean <= MOST_LATENCY
        yield Claim(text, f"{each.throughput:.3f}, {each.latency_mean:.3f}: {each.cell.name}", holds)
    if not measured:
        yield Claim(text, "", None)


def _goodput(rows: Sequence[Row]) -> Iterator[Claim]:
    ours = [row for row in rows if row.cell.system == KEVLARFLOW and is_emulated(row.cell)]
    measured = [row for row in ours if not math.isnan(row.goodput_kept)]
    for row in measured:
        pipelines = SETTINGS[row.cell.setting].recipe.pipelines
        least = (pipelines - 1) / pipelines
        found = f"{row.goodput_kept:.2f}: {row.cell.name}"
        yield Claim(f"goodput after a loss at least {least:.2f} of what it was", found, row.goodput_kept >= least)
    if not measured:
        yield Claim("goodput after a loss at least (nodes of that stage left) / R of what it was", "", None)


def _quick(rows: Sequence[Row]) -> Claim:
    text = f"the quick suite takes less than {MOST_QUICK_MINUTES:.0f} minutes"
    took = {row.cell.name: row.seconds for row in rows}
    names = [cell.name for cell in SUITES["quick"]]
    if not all(name in took for name in names):
        return Claim(text, "", None)
    minutes = sum(took[name] for name in names) / 60
    return Claim(text, f"{minutes:.1f}", minutes < MOST_QUICK_MINUTES)
