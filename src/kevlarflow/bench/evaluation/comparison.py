"""Cells side by side: one row for each, the ratios that the paper reports, and the cost when nothing fails. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from kevlarflow.bench.evaluation import outcome
from kevlarflow.bench.evaluation.cells import KEVLARFLOW, NO_FAULT, SETTINGS, STOCK, STOCK_DP, Cell
from kevlarflow.bench.evaluation.outcome import CellResult, Window

AFTER_SECONDS = 30
"""Goodput right after a fault is that of so many seconds, against as many before it."""

PAPER = {
    "MTTR": 20.0,
    "average latency": 3.1,
    "p99 latency": 2.8,
    "average TTFT": 378.9,
    "p99 TTFT": 574.6,
}
"""What the paper reports: baseline by KevlarFlow, under failure."""
PAPER_OVERHEAD = "2.3-4.0 %"


class Row(msgspec.Struct, frozen=True):
    """A cell in numbers. NaN where there is none."""

    cell: Cell
    conditions: str
    void: str | None
    attempts: tuple[str, ...]
    """What the earlier attempts were."""
    died: str | None
    seconds: float
    """What the cell took in all."""
    rate: float
    window: Window
    """The failure window; without a fault the whole load."""
    mttr: float
    """Fault to first token, of the pipeline that took longest; infinite when one was not back within the cell."""
    goodput_back: float
    goodput_kept: float
    """Goodput in the seconds after the fault by what was delivered before it, to whomever."""
    tokens_per_second: float
    """Of requests that ended whole, over the load."""
    lost: int
    """Of all requests of the cell, whenever."""
    wrong: int | None
    """None: there is no run without failure to compare with."""
    repeated: int
    recomputed_tokens: int
    overrun_share: float
    strangers: float
    """Share of the machine that other processes used."""
    ready_seconds: float
    restart_seconds: float


def rows(results: Sequence[CellResult]) -> list[Row]:
    """A row for each cell."""
    return [_row(result, _reference(result, results)) for result in results]


def _row(result: CellResult, reference: CellResult | None) -> Row:
    firsts = [math.inf if each.first_token_seconds is None else each.first_token_seconds for each in result.strikes]
    restarts = [life.first_token - life.ended for life in result.lives if life.first_token is not None]
    steps = sum(each.steps for each in result.steps)
    back = outcome.goodput_back_seconds(result)
    return Row(
        cell=result.cell,
        conditions=result.conditions,
        void=result.void,
        attempts=tuple(result.attempts),
        died=result.died,
        seconds=result.seconds,
        rate=result.requests_per_second,
        window=outcome.window(result.requests, result.fault_at or 0.0, result.load_seconds),
        mttr=max(firsts, default=math.nan),
        goodput_back=math.nan if back is None else back,
        goodput_kept=_kept(result),
        tokens_per_second=_throughput(result),
        lost=outcome.window(result.requests, -math.inf).lost,
        wrong=None if reference is None else len(outcome.wrong(result, reference)),
        repeated=len(outcome.repeated(result)),
        recomputed_tokens=outcome.recomputed_tokens(result),
        overrun_share=sum(each.overruns for each in result.steps) / steps if steps else math.nan,
        strangers=result.strangers,
        ready_seconds=result.ready_seconds or math.nan,
        restart_seconds=max(restarts, default=math.nan),
    )


def _reference(result: CellResult, results: Sequence[CellResult]) -> CellResult | None:
    """The same requests without failure: the system's own, another's, or what stock did not lose in one with."""
    cell = result.cell

    def fits(other: CellResult) -> bool:
        there = other.cell
        same = (there.setting, there.rate, there.seed) == (cell.setting, cell.rate, cell.seed)
        sound = there.fault == NO_FAULT or there.system in {STOCK, STOCK_DP}
        alike = other.conditions == result.conditions
        return same and alike and sound and other.void is None and other is not result

    def rank(other: CellResult) -> tuple[bool, bool, str]:
        return other.cell.fault != NO_FAULT, other.cell.system != cell.system, other.cell.system

    return min(filter(fits, results), key=rank, default=None)


def _kept(result: CellResult) -> float:
    if (fault := result.fault_at) is None:
        return math.nan
    at = round(fault)
    # What a request got that was lost later was delivered before the fault as well.
    before = sum(result.tokens_per_second[max(0, at - AFTER_SECONDS) : at])
    after = sum(result.good_tokens_per_second[at : at + AFTER_SECONDS])
    return after / before if before else math.nan


def _throughput(result: CellResult) -> float:
    last = max((each.last for each in result.requests if each.last is not None), default=math.nan)
    return sum(result.good_tokens_per_second) / max(last, result.load_seconds)


class Ratios(msgspec.Struct, frozen=True):
    """A system by KevlarFlow, in the same setting, at the same rate, under the same faults."""

    cell: Cell
    """The other system's."""
    values: dict[str, float]
    """By the paper's names; NaN where one of the two has none, or the other was never back."""
    lost: int
    lost_by_us: int


def ratios(found: Sequence[Row]) -> Iterator[Ratios]:
    """Every system with a fault against KevlarFlow."""
    ours = {_place(row): row for row in found if row.cell.system == KEVLARFLOW and row.void is None}
    for row in found:
        mine = ours.get(_place(row))
        if row.cell.fault == NO_FAULT or row.cell.system == KEVLARFLOW or mine is None or row.void is not None:
            continue
        pairs = zip(measures(row), measures(mine), strict=True)
        values = [theirs / us if us and math.isfinite(theirs) else math.nan for theirs, us in pairs]
        yield Ratios(row.cell, dict(zip(PAPER, values, strict=True)), row.window.lost, mine.window.lost)


def measures(row: Row) -> tuple[float, ...]:
    """What the paper compares, in the order of `PAPER`."""
    seen = row.window
    return row.mttr, seen.latency_mean, seen.latency_p99, seen.ttft_mean, seen.ttft_p99


def _place(row: Row) -> tuple[str, str, str, int, str]:
    cell = row.cell
    return cell.setting, cell.rate, cell.fault, cell.seed, row.conditions


class Overhead(msgspec.Struct, frozen=True):
    """KevlarFlow by one stock server, when nothing fails."""

    cell: Cell
    throughput: float
    latency_mean: float
    latency_p99: float
    tpot_mean: float


def overheads(found: Sequence[Row]) -> Iterator[Overhead]:
    """For every place where both have run without failure."""
    calm = {(row.cell.system, _place(row)): row for row in found if row.cell.fault == NO_FAULT and not row.void}
    for (system, place), ours in calm.items():
        theirs = calm.get((STOCK_DP, place))
        if system == KEVLARFLOW and theirs is not None:
            mine, other = ours.window, theirs.window
            yield Overhead(
                ours.cell,
                ours.tokens_per_second / theirs.tokens_per_second,
                mine.latency_mean / other.latency_mean,
                mine.latency_p99 / other.latency_p99,
                mine.tpot_mean / other.tpot_mean,
            )


def is_emulated(cell: Cell) -> bool:
    """Whether the device time of a cell is emulated."""
    return SETTINGS[cell.setting].profile is not None


def emulation_note(setting: str) -> str:
    """What every figure and table of a setting has to say."""
    profile = SETTINGS[setting].profile
    if profile is None:
        return "real compute on the CPU"
    slower = f", slowed down {profile.slowdown:g} times" if profile.slowdown != 1 else ""
    link = profile.link_bits_per_second / 1e9
    return f"DEVICE TIME IS EMULATED: {profile.device.name}, {link:g} Gbps links{slower}"
