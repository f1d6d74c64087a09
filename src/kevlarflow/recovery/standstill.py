"""A pipeline that stands still: its engine waits for an answer, and no node of it is at work for it.

Then something was lost on its way: a connection broke, and what was in it is gone though everybody lives. Which
message it was does not matter: the pipeline is formed anew with the same members. That makes its links again, and sends
everything again that could have been lost. It may be a false alarm (messages may be slow without bound): that costs a
pause and nothing else, so each further time within `RECENT_SECONDS` has to wait for twice as long.

Nobody is blamed for it, as long as it helps; `recovery.relinking` says what is done, and what when it does not help. A
node that nobody can reach any more is silent or deaf, and is found by `recovery.detector`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kevlarflow.config import Timeouts
from kevlarflow.recovery import events
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline, subject
from kevlarflow.types import Cause, Member, PipelineId, Stage

RECENT_SECONDS = 30.0
"""For so long it counts that a pipeline was formed anew because it stood still."""
WELL_SECONDS = 5.0
"""A pipeline that was formed and did not stand still for so long is well: what befalls it next is another trouble."""
FAIR_STEPS = 8
"""A lane that has work gets its turn before its node has done so many pieces of work for others.

They count from when there may be work for it: since the engine waits, and no node has done anything for the pipeline. A
node may be in a single step of another pipeline for seconds.
"""


class Work(NamedTuple):
    """What a beat says of a node's work."""

    pipeline: PipelineId | None = None
    """Whose work runs; None: nobody's."""
    done: Mapping[PipelineId, int] = {}
    """Pieces of work done so far, by pipeline."""


@dataclasses.dataclass
class _Rest:
    """Since when a node has done nothing for a pipeline."""

    done: int
    since: float
    total: int | None = None
    """What the node had done for all by the first beat since when there may be work for this one; None until then.

    Many short pieces come with an order, and a beat may be from before them.
    """


@dataclasses.dataclass
class _Node:
    beat_at: float
    work: Work
    rests: dict[PipelineId, _Rest]


class Stillness:
    """Holds what engines report against what nodes beat."""

    def __init__(self, timeouts: Timeouts, pipelines: int) -> None:
        self._patience = timeouts.still_after_ms / 1_000
        self._gap = 4 * timeouts.heartbeat_interval_ms / 1_000
        self._pipelines = [PipelineId(number) for number in range(pipelines)]
        self._nodes: dict[Member, _Node] = {}
        self._waits = dict.fromkeys(self._pipelines, float("-inf"))
        """Since when the engine of each pipeline waits, as it last said."""

    def beat(self, member: Member, work: Work, now: float) -> None:
        """A node says what it does."""
        total = sum(work.done.values())
        node = self._nodes.get(member)
        if node is None:
            node = self._nodes[member] = _Node(now, work, {})
        node.beat_at, node.work = now, work
        for pipeline in self._pipelines:
            done = work.done.get(pipeline, 0)
            rest = node.rests.get(pipeline)
            if rest is None:
                node.rests[pipeline] = _Rest(done, now)
            elif rest.done != done or work.pipeline == pipeline:
                node.rests[pipeline] = _Rest(done, now)
                self._count_anew(pipeline)
            elif rest.total is None:
                rest.total = total

    def _count_anew(self, pipeline: PipelineId) -> None:
        """Only from now on there may be work for the pipeline, at whichever node."""
        for node in self._nodes.values():
            if pipeline in node.rests:
                node.rests[pipeline].total = None

    def forget(self, member: Member) -> None:
        """A node is gone."""
        self._nodes.pop(member, None)

    def judge(
        self, report: events.EngineReport, members: Iterable[Member | None], leaving: Iterable[Member], now: float
    ) -> events.PipelineStill | None:
        """What a report amounts to, of an engine whose pipeline has these members; each report has to pass here.

        Those that are `leaving` may be at work for it still: a planned order waits for the steps in flight.
        """
        since = now - report.still_seconds
        if report.still_seconds == 0.0 or since - self._waits[report.pipeline] > self._gap:
            self._waits[report.pipeline] = since
            self._count_anew(report.pipeline)
        if report.still_seconds < self._patience:
            return None
        if not all(member is not None and self._rests(member, report.pipeline, now) for member in members):
            return None
        if any(self._is_heard(each, now) and not self._rests(each, report.pipeline, now) for each in leaving):
            return None
        return events.PipelineStill(report.pipeline, report.epoch, report.still_seconds, report.awaited)

    def _is_heard(self, member: Member, now: float) -> bool:
        node = self._nodes.get(member)
        return node is not None and now - node.beat_at <= self._gap

    def _rests(self, member: Member, pipeline: PipelineId, now: float) -> bool:
        """Whether a node is heard, and would have worked for the pipeline by now if it had anything to do for it."""
        if not self._is_heard(member, now):
            return False
        node = self._nodes[member]
        rest = node.rests[pipeline]
        if node.beat_at - rest.since < self._patience - self._gap:
            return False
        done = sum(node.work.done.values())
        return node.work.pipeline is None or (rest.total is not None and done - rest.total >= FAIR_STEPS)


# ---- what the cluster notes of it


def on_still(grid: Grid, event: events.PipelineStill) -> None:
    """An engine waits in vain."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is None or not pipeline.engine.attached or pipeline.holes:
        return
    order = pipeline.order
    # An order that gives room back waits for the steps in flight, as a planned one does: see `wire.orders`.
    waits = isinstance(order, events.Form) and (order.cause.is_planned or order.cause is Cause.SHARE)
    if order is not None and event.epoch < order.epoch and not waits:
        # It has yet to take an order that makes it form anew in any case.
        return
    news = f"{subject(pipeline.id)} stood still for {event.seconds:.1f} s with no node at work"
    _relink(grid, pipeline, news, event.awaited, grid.now - event.seconds)


def on_unlinked(grid: Grid, event: events.MemberFailed) -> None:
    """A node has noticed that the connection to its engine broke."""
    pipeline = grid.pipelines[event.pipeline]
    if event.epoch == pipeline.epoch:
        news = f"the connection from {subject(pipeline.id)} to {event.member.node} broke"
        _relink(grid, pipeline, news, (grid.slots[event.member.node].stage,), grid.now, lasts=True)


def note_report(grid: Grid, pipeline: Pipeline, report: events.EngineReport) -> None:
    """An engine that has had an answer since it was said to stand still goes on."""
    went_on = grid.now - report.still_seconds > pipeline.relink_since + grid.config.timeouts.report_interval_ms / 1_000
    if pipeline.relink_at is not None and not pipeline.relink_lasts and went_on:
        pipeline.relink_at = None


def _relink(
    grid: Grid, pipeline: Pipeline, news: str, stages: tuple[Stage, ...], since: float, *, lasts: bool = False
) -> None:
    """Have the pipeline formed anew, at once or when it may be again; `stages` are those that have not answered."""
    if pipeline.relink_at is not None:
        pipeline.relink_lasts = pipeline.relink_lasts or lasts
        pipeline.relink_stages = stages or pipeline.relink_stages
        return
    if pipeline.formed and since - pipeline.formed_at >= WELL_SECONDS:
        pipeline.relinked_in_vain = 0
    pipeline.relinked = [at for at in pipeline.relinked if grid.now - at < RECENT_SECONDS]
    if not pipeline.relinked:
        pipeline.relinked_in_vain = 0
    due = grid.now
    if pipeline.relinked:
        pause = grid.config.timeouts.still_after_ms / 1_000 * 2 ** (len(pipeline.relinked) - 1)
        due = max(due, pipeline.relinked[-1] + pause)
    pipeline.relink_at = due
    pipeline.relink_lasts = lasts
    pipeline.relink_news = news
    pipeline.relink_stages = stages
    pipeline.relink_since = since
