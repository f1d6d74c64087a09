"""Who is slow: nodes that take far longer for the same work than their peers, for long.

Nothing about such a node is broken, so no timeout finds it; but its whole pipeline goes at its pace. What is slow
cannot be said of a node alone, since models, machines and loads differ. So nodes are compared, under four rules:

* *The same work.* Only steps of one stage are compared: stages differ, as the last one has the vocabulary to multiply.
  A step of twice the size (`kevlarflow.types.Pace`) takes at most twice as long. So each size that a peer has computed
  bounds what a healthy node would take for this one, and the tightest bound counts. What a node does for other
  pipelines does not matter: it is the length of steps that counts, not their number.
* *The same time.* Only the last few reports count. When a machine becomes slow, all nodes on it do.
* *Several witnesses.* In each report the mean of a node's steps is taken, so that pauses count; of the reports, and of
  the sizes, the median, so that one odd second counts for nothing. A node with few steps neither judges nor is judged.
* *For long.* A node is slow after so many reports in a row as make up `slow_after_ms`. Reports that are only nearly bad
  enough, or that say nothing, neither add to these nor end them, unless there is nothing for two windows.

A stage with one node has no peers, and a fleet without load has no steps: then nobody is slow.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence

from kevlarflow.config import PACE_REPORTS, ServeConfig
from kevlarflow.recovery.events import NodeSlow
from kevlarflow.types import Member, Pace, Stage

FEWEST_REPORTS = 3
"""Of these, so many have to hold steps of a size: then a single one cannot decide."""
FEWEST_STEPS = 5
"""In the window, of a size."""
LONGEST_SILENCE = 2 * PACE_REPORTS
"""Reports after which nothing could be compared: then evidence from before is forgotten."""
LEAST_SECONDS = 1e-6
"""Shorter times cannot be compared."""
RELAPSE = 0.75
"""A member is no longer on its way to be slow when its ratio falls below this share of the limit."""

Size = tuple[int, int]


@dataclasses.dataclass
class _History:
    """What one member has reported lately."""

    stage: Stage
    reports: collections.deque[tuple[float, Sequence[Pace]]]
    """With the time at which each arrived."""
    bad: int = 0
    """Reports that made it slower than the limit, since one last did not."""
    silent: int = 0
    """Reports in a row after which nothing could be compared."""


class Paces:
    """Turns what nodes report of their steps into events for the cluster."""

    def __init__(self, config: ServeConfig) -> None:
        self._limit = config.slow_ratio
        self._interval = config.timeouts.pace_interval_ms / 1_000
        self._enough = math.ceil(config.timeouts.slow_after_ms / config.timeouts.pace_interval_ms)
        self._histories: dict[Member, _History] = {}

    def hear(self, member: Member, stage: Stage, report: Sequence[Pace], now: float) -> list[NodeSlow]:
        """A node reports; says again and again that it is slow, for as long as it is."""
        if not self._limit:
            return []
        history = self._histories.setdefault(member, _History(stage, collections.deque(maxlen=PACE_REPORTS)))
        history.reports.append((now, report))
        ratio = self._ratio(member, history, now)
        self._count(history, ratio)
        if ratio is None or ratio < self._limit or history.bad < self._enough:
            return []
        return [NodeSlow(member, ratio, history.bad * self._interval)]

    def forget(self, member: Member) -> None:
        """The member is gone."""
        self._histories.pop(member, None)

    def _count(self, history: _History, ratio: float | None) -> None:
        history.silent = history.silent + 1 if ratio is None else 0
        if history.silent >= LONGEST_SILENCE or (ratio is not None and ratio < RELAPSE * self._limit):
            history.bad = 0
        elif ratio is not None and ratio >= self._limit:
            history.bad += 1

    def _ratio(self, member: Member, history: _History, now: float) -> float | None:
        """How many times as long as its peers the member takes; None when there is nothing to compare."""
        mine = self._typical(history, now)
        if not mine:
            return None
        peers = [
            self._typical(each, now)
            for other, each in self._histories.items()
            if other != member and each.stage == history.stage
        ]
        ratios = []
        for size, seconds in mine.items():
            bounds = [_bound(size, peer) for peer in peers if peer]
            if bounds:
                ratios.append(seconds / statistics.median_low(bounds))
        return statistics.median_low(ratios) if ratios else None

    def _typical(self, history: _History, now: float) -> dict[Size, float]:
        """Seconds of a step, by size. Of a member that has fallen silent nothing is left after a window."""
        means: dict[Size, list[float]] = collections.defaultdict(list)
        steps: dict[Size, int] = collections.defaultdict(int)
        for at, report in history.reports:
            if now - at > (PACE_REPORTS + 1) * self._interval:
                continue
            for pace in report:
                means[pace.size].append(pace.seconds / pace.steps)
                steps[pace.size] += pace.steps
        return {
            size: max(LEAST_SECONDS, statistics.median(each))
            for size, each in means.items()
            if len(each) >= FEWEST_REPORTS and steps[size] >= FEWEST_STEPS
        }


def _bound(size: Size, peer: dict[Size, float]) -> float:
    """Seconds within which a step of this size should be computed, as what a peer takes for others shows."""
    requests, context = size
    return min(
        seconds * 2.0 ** max(0, requests - its_requests, context - its_context)
        for (its_requests, its_context), seconds in peer.items()
    )
