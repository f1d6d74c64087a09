"""Which requests may have cost nodes, and which must not run again.

A request that kills the node that computes it would kill the next one as well. A node leaves behind what it was
computing when it died (`types.Computing`), so a loss is held against the requests of that step, and two are too many.
Where nobody knows what a node was computing, all that it may have been running is held to have killed it.

A node that somebody has stopped or killed (`types.Loss`) is held against nobody.

A node may also die of a request a moment after it has computed it. So every other loss is held against all that the
node may have been running, in a second count with a higher bound. While such *suspects* are in flight, steps are sent
one at a time: the next loss then has one step to blame. A request stays suspect, in whatever step it is, until it has
come further than it was.

Requests that are computed again for a new node can cost it just as well; counts of their own bound that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kevlarflow.recovery.coverage import starts_of
from kevlarflow.recovery.ledger import Step
from kevlarflow.recovery.recompute import Chunk

MAX_COST = 2
"""Nodes that may be lost while they compute a request."""
MAX_POSSIBLE_COST = 4
"""Nodes that may be lost while a request is in flight there, though none was caught computing it."""
NOT_AGAIN = "it is not tried again"
"""How the reason ends of a request that is to blame itself: its client had better not try again either."""
REASON = f"{MAX_COST} nodes were lost while they computed this request: {NOT_AGAIN}"
POSSIBLE_REASON = f"{MAX_POSSIBLE_COST} nodes were lost while they had this request: {NOT_AGAIN}"


class Requests(NamedTuple):
    """Requests that were computed, or may have been."""

    in_steps: Mapping[str, int] = {}
    """Those in steps, each with the tokens that it would have had computed."""
    again: Mapping[str, int] = {}
    """Those that were computed again, likewise."""


def of_step(step: Step) -> Requests:
    """Those of a step."""
    starts = starts_of(step)
    return Requests(in_steps={request: starts[request] + count for request, count in step.scheduled.items()})


def of_chunk(chunk: Chunk) -> Requests:
    """Those of a chunk that is computed again."""
    return Requests(again={span.request: span.end for span in chunk.spans})


def together(parts: Iterable[Requests]) -> Requests:
    """All of them, each as far as it came at most."""
    in_steps: dict[str, int] = {}
    again: dict[str, int] = {}
    for part in parts:
        for known, more in ((in_steps, part.in_steps), (again, part.again)):
            known.update({request: max(end, known.get(request, 0)) for request, end in more.items()})
    return Requests(in_steps, again)


class Suspect(NamedTuple):
    """What is held against a request."""

    cost: int = 0
    """Nodes that were lost while they computed it."""
    possible_cost: int = 0
    """Nodes that were lost and may have computed it."""
    end: int = 0
    """Tokens that it would have had computed."""


class Suspicion:
    """See the module's text."""

    def __init__(self) -> None:
        self._in_steps: dict[str, Suspect] = {}
        self._again: dict[str, Suspect] = {}
        """What computing a request again may have cost, until it goes on or ends."""

    def clear(self) -> None:
        """All requests have been ended."""
        self._in_steps.clear()
        self._again.clear()

    def falls_on(self, step: Step) -> bool:
        """Whether the step has to run alone."""
        return not self._in_steps.keys().isdisjoint(step.scheduled)

    def blame(self, caught: Requests, possible: Requests) -> dict[str, str]:
        """A node was lost that was computing some requests, and may have computed others.

        Returns the requests that must not run again, each with the reason.
        """
        in_steps = _blame(self._in_steps, caught.in_steps, possible.in_steps)
        return in_steps | _blame(self._again, caught.again, possible.again)

    def acquit(self, step: Step) -> None:
        """A step is done: who has come so far again, or has ended, is no suspect any more."""
        for request in step.scheduled.keys() | step.finished:
            self._again.pop(request, None)
        ends = of_step(step).in_steps if self._in_steps else {}
        for request, suspect in list(self._in_steps.items()):
            if request in step.finished or ends.get(request, 0) >= suspect.end:
                del self._in_steps[request]


def _blame(suspects: dict[str, Suspect], caught: Mapping[str, int], possible: Mapping[str, int]) -> dict[str, str]:
    doomed = {}
    for request in sorted(caught.keys() | possible.keys()):
        before = suspects.get(request, Suspect())
        suspects[request] = now = Suspect(
            cost=before.cost + (request in caught),
            possible_cost=before.possible_cost + 1,
            end=max(before.end, caught.get(request, 0), possible.get(request, 0)),
        )
        if now.cost >= MAX_COST:
            doomed[request] = REASON
        elif now.possible_cost >= MAX_POSSIBLE_COST:
            doomed[request] = POSSIBLE_REASON
    return doomed
