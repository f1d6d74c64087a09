"""A pipeline's core with an eye on the time: what was lost on its way shows only in that nothing comes any more.

It says since when an engine has waited for its nodes in vain; it answers an order that comes again, since the answer
may have been lost; and it repeats `Leave` until the node says that it has left: nothing else would ever show that one
was lost, and the lane would keep its memory from others.
"""

from __future__ import annotations

import dataclasses

from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.pipeline_events import (
    Command,
    Event,
    FormationDone,
    FormationOrdered,
    Leave,
    ReplicasConfirmed,
    StandbysAssigned,
    StepIssued,
)
from kevlarflow.recovery.recompute import Limits
from kevlarflow.types import Epoch, Member, NodeInfo

LEAVE_AGAIN_SECONDS = 1.0
GIVE_UP_SECONDS = 60.0
"""A node that has not answered `Leave` for so long is gone, or will be given up by the controller."""


@dataclasses.dataclass(frozen=True, slots=True)
class TimePassed:
    """Time has passed: something may have to be sent again."""


@dataclasses.dataclass(frozen=True, slots=True)
class LaneLeft:
    """A node has no lane of this epoch any more."""

    epoch: Epoch
    member: Member


@dataclasses.dataclass(slots=True)
class _Farewell:
    node: NodeInfo
    epoch: Epoch
    since: float
    said_at: float


class WatchedPipeline(Pipeline):
    """See the module's text. The same door as that of `Pipeline`, and two more events."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._moved_at = 0.0
        """When something last happened that an engine waits for, or it began to wait."""
        self._done: FormationDone | None = None
        self._farewells: dict[Member, _Farewell] = {}

    @property
    def waits(self) -> bool:
        """Whether it waits for its nodes."""
        return self.standing is Standing.FORMING or self._disagrees or bool(self._in_flight)

    def still_seconds(self, now: float) -> float:
        """How long it has waited for its nodes in vain; 0.0 when it does not wait."""
        return max(0.0, now - self._moved_at) if self.waits else 0.0

    def handle(self, event: Event | TimePassed | LaneLeft, now: float) -> list[Command]:
        """See `Pipeline.handle`."""
        if isinstance(event, TimePassed):
            return self._say_farewell_again(now)
        if isinstance(event, LaneLeft):
            farewell = self._farewells.get(event.member)
            if farewell is not None and event.epoch >= farewell.epoch:
                del self._farewells[event.member]
            return []
        if isinstance(event, FormationOrdered) and event.epoch == self.epoch and self.standing is Standing.SERVING:
            return [self._done] if self._done is not None and self._done.epoch == event.epoch else []
        waited, epoch = self.waits, self.epoch
        commands = super().handle(event, now)
        if not waited or self.epoch != epoch or self._is_answer(event):
            self._moved_at = now
        for command in commands:
            self._note(command, now)
        return commands

    def _is_answer(self, event: Event) -> bool:
        if isinstance(event, (StepIssued, StandbysAssigned, ReplicasConfirmed, FormationOrdered)):
            return False
        return event.epoch == self.epoch

    def _note(self, command: Command, now: float) -> None:
        match command:
            case FormationDone():
                self._done = command
            case Leave(node):
                self._farewells[node.member] = _Farewell(node, self.epoch, now, now)

    def _say_farewell_again(self, now: float) -> list[Command]:
        uses = self.standing not in (Standing.WAITING, Standing.SUSPENDED)
        serving = {node.member for node in self.nodes} if uses else set[Member]()
        self._farewells = {
            member: each
            for member, each in self._farewells.items()
            if member not in serving and now - each.since < GIVE_UP_SECONDS
        }
        due = [each for each in self._farewells.values() if now - each.said_at >= LEAVE_AGAIN_SECONDS]
        for each in due:
            each.said_at = now
        return [Leave(each.node) for each in due]
