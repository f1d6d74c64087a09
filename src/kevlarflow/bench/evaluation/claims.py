"""What is claimed, and what the cells say of it. A claim without cells is neither held nor broken. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from kevlarflow.bench.evaluation.cells import KEVLARFLOW, SETTINGS, STOCK
from kevlarflow.bench.evaluation.comparison import PAPER, Row, is_emulated, overheads, ratios

MTTR_RATIO = 100.0
LEAST_THROUGHPUT = 0.98
MOST_LATENCY = 1.02
SPREAD_OF_GOODPUT = 0.1
"""Requests come at random: goodput of 30 s varies by about so much from one stretch to the next."""


class Claim(msgspec.Struct, frozen=True):
    """One claim."""

    text: str
    found: str
    holds: bool | None
    """None: there is no cell to say."""


def claims(rows: Sequence[Row]) -> list[Claim]:
    """All claims of the evaluation."""
    valid = [row for row in rows if row.void is None]
    return [_mttr(valid), _lost(valid), *_paper(valid), *_overhead(valid), *_goodput(valid)]


def _mttr(rows: Sequence[Row]) -> Claim:
    by_stock = {each.cell.name: each.values["MTTR"] for each in ratios(rows) if each.cell.system == STOCK}
    known = {name: value for name, value in by_stock.items() if not math.isnan(value)}
    if not known:
        return Claim(f"MTTR at least {MTTR_RATIO:.0f}x lower than stock's", "", None)
    found = f"{min(known.values()):.0f}x to {max(known.values()):.0f}x"
    return Claim(f"MTTR at least {MTTR_RATIO:.0f}x lower than stock's", found, min(known.values()) >= MTTR_RATIO)


def _lost(rows: Sequence[Row]) -> Claim:
    ours = [row for row in rows if row.cell.system == KEVLARFLOW]
    theirs = [row for row in rows if row.cell.system == STOCK]
    lost, wrong = sum(row.window.lost for row in ours), sum(row.wrong or 0 for row in ours)
    found = f"{lost} lost and {wrong} wrong in {len(ours)} cells; stock lost {sum(row.window.lost for row in theirs)}"
    return Claim("no request lost or wrong", f"{found} in {len(theirs)}", lost + wrong == 0 if ours else None)


def _paper(rows: Sequence[Row]) -> Iterator[Claim]:
    found = [each for each in ratios(rows) if each.cell.system == STOCK]
    for name, value in PAPER.items():
        known = [(each.values[name], each.cell.name) for each in found if not math.isnan(each.values[name])]
        best = max(known, default=None)
        told = "" if best is None else f"{best[0]:.1f}x in {best[1]}"
        yield Claim(f"the paper's {value:g}x in {name} is reached somewhere", told, best and best[0] >= value)


def _overhead(rows: Sequence[Row]) -> Iterator[Claim]:
    for each in overheads(rows):
        holds = each.throughput >= LEAST_THROUGHPUT and each.latency_mean <= MOST_LATENCY
        text = f"without failure: throughput at least {LEAST_THROUGHPUT}, average latency at most {MOST_LATENCY}"
        yield Claim(f"{text} of stock-dp's", f"{each.throughput:.3f}, {each.latency_mean:.3f}: {each.cell.name}", holds)


def _goodput(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in rows:
        if row.cell.system != KEVLARFLOW or not is_emulated(row.cell) or math.isnan(row.goodput_kept):
            continue
        pipelines = SETTINGS[row.cell.setting].recipe.pipelines
        least = (pipelines - 1) / pipelines
        found = f"{row.goodput_kept:.2f} (spread {SPREAD_OF_GOODPUT}): {row.cell.name}"
        yield Claim(f"goodput after a loss at least {least:.2f}", found, row.goodput_kept >= least - SPREAD_OF_GOODPUT)
