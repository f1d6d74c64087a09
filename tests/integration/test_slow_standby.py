"""A standby that is slow: decoding does not wait for it, and replication catches up when it is quick again.

The thread that takes copies stands still while the node that it belongs to goes on computing for its own pipeline, so
that nobody is suspect. Calm and fault alternate under one and the same load, and each span with the fault is compared
with the calm around it, since machines are busy with other things at times.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import NamedTuple

import pytest

from integration.cluster import Cluster
from integration.holding import HeldThread
from integration.test_moves import PROMPTS, Load
from integration.waiting import until
from integration.watching import Row, lane
from kevlarflow.replication.source import UNANSWERED_SECONDS

pytestmark = pytest.mark.timeout(600)

PIPELINE, STAGE = 0, 1
REPLICATION_THREAD = "replicator"
TOKENS = 80
ROUNDS = 3
CALM_SECONDS = 1.5
FAULT_SECONDS = UNANSWERED_SECONDS + 0.5
"""Longer than copies may be unanswered."""
PATIENCE_SECONDS = 30.0
TOKENS_BEHIND = 16
"""So many tokens at least are not on a standby that does not answer, before it may go on."""
MOST_TIMES_SLOWER = 1.8
"""A step that waits for the standby takes many times as long."""
STILL_SECONDS = 0.25
COVERED = 0.8


class Span(NamedTuple):
    """Monotonic seconds."""

    begin: float
    end: float


def tokens_per_second(load: Load, span: Span) -> float:
    """Of the streams of the pipeline whose standby is slow."""
    streams = [stream for stream in load.streams if stream.pipeline == PIPELINE]
    return sum(span.begin <= at < span.end for stream in streams for at in stream.times) / (span.end - span.begin)


def slowdowns(load: Load, calm: list[Span], faulty: list[Span]) -> list[float]:
    """How many times longer a token took in each span with the fault than in the calm before and after it."""
    rates = [tokens_per_second(load, span) for span in calm]
    return [
        (before + after) / 2 / tokens_per_second(load, span)
        for before, after, span in zip(rates, rates[1:], faulty, strict=False)
    ]


def for_a_while(seconds: float) -> Span:
    begin = time.monotonic()
    time.sleep(seconds)
    return Span(begin, time.monotonic())


@pytest.mark.parametrize(
    "answers",
    [pytest.param(False, id="does not answer"), pytest.param(True, id="answers late", marks=pytest.mark.slow)],
)
def test_decoding_does_not_wait_for_a_standby_that(answers: bool, grid: Cluster) -> None:
    load = Load(grid, TOKENS)
    before = grid.status()
    standby = lane(grid, PIPELINE, STAGE)["standby"]
    (pid,) = (node["pid"] for node in before["nodes"] if node["id"] == standby)

    def has_fallen_behind() -> bool:
        return bool(lane(grid, PIPELINE, STAGE)["lag_tokens"] >= TOKENS_BEHIND)

    def has_caught_up() -> Row | None:
        status = grid.status()
        row = lane(grid, PIPELINE, STAGE)
        return row if status["engines"][PIPELINE]["running"] and row["coverage"] >= COVERED else None

    def is_busy() -> bool:
        return all(engine["running"] == len(PROMPTS) / 2 for engine in grid.status()["engines"])

    def calm_and_fault() -> tuple[list[Span], list[Span]]:
        until("every stream to be under way", is_busy, PATIENCE_SECONDS)
        calm, faulty = [for_a_while(CALM_SECONDS)], []
        for _ in range(ROUNDS):
            with HeldThread(pid, REPLICATION_THREAD, STILL_SECONDS, STILL_SECONDS / 20 if answers else 0.0) as held:
                faulty.append(for_a_while(FAULT_SECONDS))
                if answers:
                    assert held.times > FAULT_SECONDS / STILL_SECONDS / 4, "it was to be held most of the time"
                else:
                    until("the standby to fall behind", has_fallen_behind, PATIENCE_SECONDS)
                    assert held.is_held
            until("replication to catch up while streams go on", has_caught_up, PATIENCE_SECONDS, poll=0.05)
            calm.append(for_a_while(CALM_SECONDS))
        return calm, faulty

    calm, faulty = asyncio.run(load.run(calm_and_fault))
    load.require_whole()
    ratios = slowdowns(load, calm, faulty)
    print("tokens/s:", [f"{tokens_per_second(load, span):.0f}" for spans in (calm, faulty) for span in spans])
    usual_gap, gap = (max(load.longest_gap(*span) for span in spans) for spans in (calm, faulty))
    times = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"a token took {times} times as long; longest gap {gap:.2f} s, else {usual_gap:.2f} s")
    assert statistics.median(ratios) < MOST_TIMES_SLOWER
    assert gap < max(UNANSWERED_SECONDS, 3 * usual_gap)
    after = grid.wait_settled()
    assert after["recoveries"] == before["recoveries"], "nobody was to be blamed for it"
