"""What one cell has yielded, as plain data, and everything that is computed from it. Pure: no clock, no server.

Times are seconds since the load began. A request is **lost** when it failed or did not bring all of its tokens; it is
**wrong** when it did, and they are not those of a run without failure. The failure window begins at the first fault
and ends with the load; what is asked of it counts every request that was under way in it or came in it.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from kevlarflow.bench.evaluation.cells import Cell
from kevlarflow.bench.evaluation.workload import Planned, Workload
from kevlarflow.bench.machine import Machine
from kevlarflow.bench.measure import DRAIN_SECONDS, pause_after, percentile
from kevlarflow.bench.streams import Stream
from kevlarflow.emulation.profile import StepCounts

GOODPUT_SHARE = 0.9
BEFORE_SECONDS = 30
"""What was delivered before a fault is that of so many seconds."""
GOODPUT_WINDOW_SECONDS = 8
"""Goodput is averaged over so long: requests come at random."""


class RequestRecord(msgspec.Struct, frozen=True):
    """What became of one request."""

    name: str
    sent: float
    asked_tokens: int
    tokens: int
    first: float | None
    """When its first token arrived."""
    last: float | None
    pipeline: int | None
    digest: int
    """CRC of its text."""
    defect: str | None
    """Why it is not whole."""
    ended: float | None = None
    """When its stream ended; a lost one ends after its last token."""

    @property
    def until(self) -> float:
        """Until when it was under way."""
        known = self.last if self.ended is None and self.defect is None else self.ended
        return math.inf if known is None else known

    @property
    def latency(self) -> float:
        """From the request to its last token; counts for whole ones only."""
        return math.nan if self.last is None else self.last - self.sent

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return math.nan if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        if self.first is None or self.last is None or self.tokens < 2:
            return math.nan
        return (self.last - self.first) / (self.tokens - 1)


class StrikeRecord(msgspec.Struct):
    """One fault, and when what it hit was back."""

    at: float
    pipeline: int
    stage: int
    target: str
    first_token_seconds: float | None = None
    """From the fault to the first token that the pipeline made after it; None: not within the cell."""


class LifeRecord(msgspec.Struct, frozen=True):
    """One restart of a server."""

    server: str
    ended: float
    ready: float | None
    first_token: float | None


class CellResult(msgspec.Struct):
    """Everything that is kept of a cell."""

    cell: Cell
    begun: str
    """Local time, ISO 8601."""
    conditions: str = ""
    """`cells.conditions` of setting, load and machine: what is compared must have been measured under the same."""
    machine: Machine | None = None
    load: Workload | None = None
    """None: it could not be planned."""
    seconds: float = 0.0
    """What the cell took in all."""
    load_begun: float | None = None
    """`time.monotonic()` of the load's beginning, the clock by which processes say when their steps were late."""
    void: str | None = None
    """Why it counts for nothing."""
    attempts: list[str] = msgspec.field(default_factory=list)
    """What each earlier attempt under the same conditions was, in a line. Void ones are run again, and what made them
    void may have been the system's own doing."""
    died: str | None = None
    """How the system ended after a fault, if it did; what it lost by that counts."""
    requests_per_second: float = 0.0
    ready_seconds: float | None = None
    load_seconds: float = 0.0
    requests: list[RequestRecord] = msgspec.field(default_factory=list)
    tokens_per_second: list[int] = msgspec.field(default_factory=list)
    """Tokens that arrived in each second of the load and after it."""
    good_tokens_per_second: list[int] = msgspec.field(default_factory=list)
    """Of these, the ones of requests that ended whole."""
    strikes: list[StrikeRecord] = msgspec.field(default_factory=list)
    lives: list[LifeRecord] = msgspec.field(default_factory=list)
    recoveries: list[dict[str, Any]] = msgspec.field(default_factory=list)
    steps: list[StepCounts] = msgspec.field(default_factory=list)
    strangers: float = 0.0
    """Share of the machine's CPU time that other processes took, from 0 to 1."""
    leftovers: list[str] = msgspec.field(default_factory=list)

    @property
    def fault_at(self) -> float | None:
        """When the first fault struck."""
        return min((strike.at for strike in self.strikes), default=None)


class Window(msgspec.Struct, frozen=True):
    """What users saw in a stretch of time. NaN where there was nothing to see."""

    requests: int
    lost: int
    lost_tokens: int
    latency_mean: float
    latency_p99: float
    ttft_mean: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float


def record(planned: Planned, stream: Stream, begun: float) -> RequestRecord:
    """What is kept of a stream. `begun` is the `time.monotonic()` of the load's beginning."""
    return RequestRecord(
        name=planned.name,
        sent=stream.sent_at - begun,
        asked_tokens=planned.output_tokens,
        tokens=stream.tokens,
        first=stream.times[0] - begun if stream.times else None,
        last=stream.times[-1] - begun if stream.times else None,
        pipeline=stream.pipeline,
        digest=zlib.crc32(stream.text.encode()),
        defect=stream.defect(planned.output_tokens),
        ended=None if stream.ended_at is None else stream.ended_at - begun,
    )


def window(records: Iterable[RequestRecord], begin: float, end: float = math.inf) -> Window:
    """The requests that were under way or came between `begin` and `end`."""
    inside = [each for each in records if each.sent < end and each.until >= begin]
    whole = [each for each in inside if each.defect is None]
    first = [each.ttft for each in inside if each.first is not None and each.first >= begin]
    latencies = [each.latency for each in whole]
    tpots = [each.tpot for each in whole if not math.isnan(each.tpot)]
    return Window(
        requests=len(inside),
        lost=len(inside) - len(whole),
        lost_tokens=sum(max(0, each.asked_tokens - each.tokens) for each in inside if each.defect is not None),
        latency_mean=_mean(latencies),
        latency_p99=_p99(latencies),
        ttft_mean=_mean(first),
        ttft_p99=_p99(first),
        tpot_mean=_mean(tpots),
        tpot_p99=_p99(tpots),
    )


def wrong(result: CellResult, reference: CellResult) -> list[str]:
    """Requests that are whole in both, and differ."""
    expected = {each.name: each.digest for each in reference.requests if each.defect is None}
    whole = (each for each in result.requests if each.defect is None)
    return [each.name for each in whole if expected.get(each.name, each.digest) != each.digest]


def repeated(result: CellResult) -> list[str]:
    """Requests that brought more tokens than were asked for."""
    return [each.name for each in result.requests if each.tokens > each.asked_tokens]


def arrivals(streams: Sequence[Stream], begun: float) -> list[int]:
    """Tokens in each second since `begun`."""
    marks = [(math.floor(at - begun), count) for s in streams for at, count in zip(s.times, s.counts, strict=True)]
    bins = [0] * (1 + max((second for second, _ in marks), default=-1))
    for second, count in marks:
        bins[max(0, second)] += count
    return bins


def first_token_after(streams: Sequence[Stream], pipeline: int, fault_at: float) -> float | None:
    """Seconds from the fault to the first token that a pipeline made after it, by streams that were pinned to it.

    A stream that was under way shows it by the end of its pause, one that came later by its first token. One that
    ended, or broke, just after the fault shows nothing: its last tokens may have been on their way already.
    """
    ours = [stream for stream in streams if stream.pipeline == pipeline]
    longer = [stream for stream in ours if stream.times and stream.times[-1] > fault_at + DRAIN_SECONDS]
    resumed = [pause.resumed_seconds for stream in longer if (pause := pause_after(stream, fault_at)) is not None]
    later = [stream.times[0] - fault_at for stream in ours if stream.sent_at >= fault_at and stream.times]
    return min([*resumed, *later], default=None)


def goodput_back_seconds(result: CellResult) -> float | None:
    """From the first fault until goodput is at 90 % of what was delivered before; 0: it never fell; None: never back.

    Both averaged over the next seconds and on average until the load ends: a moment of it is not yet a return.
    """
    if (fault := result.fault_at) is None:
        return None
    begun, end = math.ceil(fault), math.floor(result.load_seconds)
    bins = (result.good_tokens_per_second + [0] * end)[:end]
    wanted = GOODPUT_SHARE * _mean(result.tokens_per_second[max(0, begun - BEFORE_SECONDS) : begun])
    if not wanted > 0:
        return None
    for second in range(begun, end - GOODPUT_WINDOW_SECONDS + 1):
        if min(_mean(bins[second : second + GOODPUT_WINDOW_SECONDS]), _mean(bins[second:])) >= wanted:
            return max(0.0, second - fault) if second > begun else 0.0
    return None


def recomputed_tokens(result: CellResult) -> int:
    """Tokens whose KV was computed again."""
    return sum(each.get("recomputed_tokens") or 0 for each in result.recoveries)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _p99(values: Sequence[float]) -> float:
    return percentile(values, 0.99) if values else math.nan
