"""Measurement: pure functions of recorded streams. No clock, no server, no opinion.

All times are seconds. A stream's **pause** after a fault is the longest wait between two of its tokens that begins
around the fault and ends after it. It is not always the wait for the very next token: tokens that were on their way
when the node died still arrive, and a measurement that stopped at those would flatter.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from kevlarflow.bench.streams import Stream

DRAIN_SECONDS = 1.0
"""A pause that is due to a fault begins at most this long after it; by then what was on its way has arrived."""
LEAST_DRAIN_SECONDS = 0.25
"""It counts that long after a fault in any case: a step that another stage was in may end that late."""
USUAL_WAITS = 5
"""So many waits of a stream before a fault say how long it takes at most for what was on its way to arrive."""


class Pause(msgspec.Struct, frozen=True):
    """What a fault did to one stream."""

    stream: str
    next_token_seconds: float
    """From the fault to the very next token, even one that was on its way."""
    resumed_seconds: float
    """From the fault to the token that ended the pause."""
    gap_seconds: float
    """From the last token before the pause (or the request) to the token that ended it."""
    tokens_before: int
    """Tokens that had arrived before the pause."""


class Spread(msgspec.Struct, frozen=True):
    """The middle of several rounds, and how far they lie apart."""

    median: float
    lowest: float
    highest: float
    rounds: int


class LoadSummary(msgspec.Struct, frozen=True):
    """What one load has shown."""

    streams: int
    """Streams at a time."""
    requests: int
    tokens: int
    seconds: float
    """From the first request to the last token."""
    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    gap_p99: float
    """Of the waits between neighbouring events of all streams."""


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, interpolated; `fraction` from 0 to 1."""
    if not values:
        raise ValueError("there is no percentile of nothing")
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def time_to_first_token(stream: Stream) -> float:
    """From the request to its first token."""
    return stream.times[0] - stream.sent_at


def time_per_output_token(stream: Stream) -> float | None:
    """Mean time of a token after the first event; None when there is no other event."""
    later = stream.tokens - stream.counts[0]
    return (stream.times[-1] - stream.times[0]) / later if later else None


def gaps(stream: Stream) -> list[float]:
    """Waits between neighbouring events that carried tokens."""
    return [later - earlier for earlier, later in itertools.pairwise(stream.times)]


def summarize(streams: Sequence[Stream], at_a_time: int) -> LoadSummary:
    """What a load has shown whose streams are all whole."""
    first = [time_to_first_token(stream) for stream in streams]
    each = [time for stream in streams if (time := time_per_output_token(stream)) is not None]
    waits = [gap for stream in streams for gap in gaps(stream)]
    seconds = max(stream.times[-1] for stream in streams) - min(stream.sent_at for stream in streams)
    tokens = sum(stream.tokens for stream in streams)
    return LoadSummary(
        streams=at_a_time,
        requests=len(streams),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        ttft_p50=percentile(first, 0.50),
        ttft_p99=percentile(first, 0.99),
        tpot_p50=percentile(each, 0.50),
        tpot_p99=percentile(each, 0.99),
        gap_p99=percentile(waits, 0.99),
    )


def pause_after(stream: Stream, fault_at: float) -> Pause | None:
    """What a fault at `fault_at` did to a stream; None when the stream was over, or not yet begun.

    Of the waits around the fault, it is the one of which most lies behind it: one that was long before, such as for a
    first token, and ends just after it ended with a token that was on its way.
    """
    marks = [stream.sent_at, *stream.times]
    if stream.sent_at >= fault_at or marks[-1] <= fault_at:
        return None
    usual = [later - earlier for earlier, later in itertools.pairwise(stream.times) if later <= fault_at]
    longest_usual = max(usual[-USUAL_WAITS:], default=DRAIN_SECONDS)
    drain = min(DRAIN_SECONDS, max(LEAST_DRAIN_SECONDS, longest_usual))
    waits = [
        (later - max(earlier, fault_at), later, position)
        for position, (earlier, later) in enumerate(itertools.pairwise(marks))
        if later > fault_at and earlier <= fault_at + drain
    ]
    _, ended_at, position = max(waits)
    return Pause(
        stream=stream.name,
        next_token_seconds=min(later for _, later, _ in waits) - fault_at,
        resumed_seconds=ended_at - fault_at,
        gap_seconds=ended_at - marks[position],
        tokens_before=sum(stream.counts[:position]),
    )


def longest_gap_during(streams: Iterable[Stream], since: float, until: float) -> float:
    """The longest wait between neighbouring events of any stream that overlaps this span; 0.0 if there is none."""
    return max(
        (later - earlier for earlier, later in _waits(streams) if later > since and earlier < until), default=0.0
    )


def longest_gap_within(streams: Iterable[Stream], since: float, until: float) -> float:
    """The longest wait of any stream that begins and ends in this span; 0.0 if there is none."""
    waits = _waits(streams)
    return max((later - earlier for earlier, later in waits if since <= earlier and later <= until), default=0.0)


def _waits(streams: Iterable[Stream]) -> Iterator[tuple[float, float]]:
    return itertools.chain.from_iterable(itertools.pairwise(stream.times) for stream in streams)


def spread(values: Sequence[float]) -> Spread:
    """The middle of several rounds, and how far they lie apart."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Ours by theirs, round by round, for the rounds in which both have a value."""
    pairs = itertools.zip_longest(ours, theirs)
    return [one / other for one, other in pairs if one is not None and other]
