"""Which steps and requests may have cost nodes, and which must not run again.

A step that kills the node that runs it would kill the next one as well. So every loss of a node is held against the
steps that it may have been running, and while such *suspects* are in flight they are sent one at a time: a second loss
then has one step to blame, and that step is not sent a third time. A request that is taken out of a suspect, because it
has no room on the new node, is scheduled again in another step: it stays suspect until it has come further than it was.
Requests that are computed again for a new node can cost it just as well; a count of its own bounds that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kevlarflow.recovery.coverage import starts_of
from kevlarflow.recovery.ledger import Step

MAX_COST = 2
"""Nodes that a step, or a request, may cost."""
REASON = f"{MAX_COST} nodes were lost while they computed this request: it is not tried again"


class Suspect(NamedTuple):
    """A request that was taken out of a suspect."""

    cost: int
    """Nodes that it may have cost."""
    end: int
    """Tokens that it would have had computed."""


class Suspicion:
    """See the module's text."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        """What each step in flight may have cost."""
        self._requests: dict[str, Suspect] = {}
        self._again: dict[str, int] = {}
        """What computing a request again may have cost, until it goes on or ends."""

    def clear(self) -> None:
        """All requests have been ended."""
        self._steps.clear()
        self._requests.clear()
        self._again.clear()

    def falls_on(self, step: Step) -> bool:
        """Whether the step has to run alone."""
        return step.sequence in self._steps or not self._requests.keys().isdisjoint(step.scheduled)

    def blame_step(self, step: Step) -> dict[str, str]:
        """A node was lost that may have been running this; returns requests that must not run again, and why."""
        cost = self._steps[step.sequence] = self._steps.get(step.sequence, 0) + 1
        doomed = dict.fromkeys(step.scheduled, REASON) if cost >= MAX_COST else {}
        return doomed | self.blame_requests(step, self._requests.keys() & step.scheduled.keys())

    def blame_requests(self, step: Step, requests: Iterable[str]) -> dict[str, str]:
        """The same for requests in a step that are suspects themselves, or that were taken out of it meanwhile."""
        ends = _ends(step)
        doomed = {}
        for request in sorted(requests):
            before = self._requests.get(request, Suspect(0, 0))
            self._requests[request] = Suspect(before.cost + 1, max(before.end, ends[request]))
            if before.cost + 1 >= MAX_COST:
                doomed[request] = REASON
        return doomed

    def blame_recompute(self, requests: Iterable[str]) -> dict[str, str]:
        """A node was lost that may have been computing these again; returns the same."""
        concerned = set(requests)
        for request in concerned:
            self._again[request] = self._again.get(request, 0) + 1
        return {request: REASON for request in sorted(concerned) if self._again[request] >= MAX_COST}

    def leave_out(self, step: Step, requests: Iterable[str]) -> None:
        """These are taken out of a step; the others in it stay where they are."""
        cost = self._steps.get(step.sequence, 0)
        if 0 < cost < MAX_COST:
            ends = _ends(step)
            self._requests |= {request: Suspect(cost, ends[request]) for request in requests}

    def acquit(self, step: Step) -> None:
        """A step is done: who has come so far again, or has ended, is no suspect any more."""
        self._steps.pop(step.sequence, None)
        for request in step.scheduled.keys() | step.finished:
            self._again.pop(request, None)
        ends = _ends(step) if self._requests else {}
        for request, suspect in list(self._requests.items()):
            if request in step.finished or ends.get(request, 0) >= suspect.end:
                del self._requests[request]


def _ends(step: Step) -> dict[str, int]:
    """Tokens that each request has computed after the step."""
    starts = starts_of(step)
    return {request: starts[request] + count for request, count in step.scheduled.items()}
