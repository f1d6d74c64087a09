"""What is done ahead of a planned change of nodes, while steps go on under the old epoch.

    order ──► Prepare: a new node that is the lane's standby opens it under the new epoch and puts replicas in place
          ──► prepared: later steps are held back, and Flush: an old node sends its standby what that still lacks
          ──► flushed, and the steps in flight are done: the nodes change, with next to nothing left to do

Nothing that was put in place ahead is believed as such: a block may have been given to another request since. What
counts is its tag, looked at when no step runs any more. Only a lane that will have its node's memory for itself is
prepared: which blocks it gets of a memory that it shares is decided as the nodes change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.in_flight import InFlight
from kevlarflow.recovery.pipeline_events import (
    Answer,
    Command,
    Flush,
    FormationOrdered,
    Prepare,
    ReplicasPlaced,
    RequestFormation,
    StageJoined,
    StepBroken,
)
from kevlarflow.recovery.watermarks import Watermarks
from kevlarflow.types import Epoch, NodeInfo, Stage

PREPARE_SECONDS = 5.0
"""A node that puts replicas in place for longer is reported."""


@dataclasses.dataclass(slots=True)
class Ahead:
    """An order, and how far the preparations for it have come. `came_at` is monotonic seconds."""

    order: FormationOrdered
    came_at: float
    new_standbys: tuple[Stage, ...] = ()
    """Stages that it gives to their standbys."""
    opened: set[Stage] = dataclasses.field(default_factory=set)
    """Stages whose new node was told to open the lane."""
    joined: set[Stage] = dataclasses.field(default_factory=set)
    """Those that have."""
    asked: dict[Stage, dict[int, Replica]] = dataclasses.field(default_factory=dict)
    """What nodes are putting in place."""
    placed: dict[Stage, dict[int, Replica]] = dataclasses.field(default_factory=dict)
    """What they have put in place."""
    to_flush: set[Stage] = dataclasses.field(default_factory=set)
    """Stages whose old node has yet to say that its standby has everything."""


class Plans:
    """The order that waits, if any. It has steps held back, and asks who the standbys are and what they have."""

    def __init__(self, in_flight: InFlight, watermarks: Watermarks) -> None:
        self._in_flight = in_flight
        self._watermarks = watermarks
        self.waiting: Ahead | None = None
        self.opened: dict[NodeInfo, Epoch] = {}
        """Nodes that were told to open the lane for an order that was not carried out yet, or never will be."""

    @property
    def epoch(self) -> Epoch | None:
        """Of the order that waits."""
        return self.waiting.order.epoch if self.waiting is not None else None

    @property
    def due(self) -> Ahead | None:
        """The order that waits, once all is prepared and only steps are left that are held back."""
        ahead = self.waiting
        waits = ahead is None or ahead.asked or ahead.to_flush or self._in_flight.running
        return None if waits or not self._in_flight.hold_back else ahead

    def make(self, order: FormationOrdered, nodes: Sequence[NodeInfo], now: float) -> list[Command]:
        """Prepare for an order to a pipeline that works on `nodes`; it replaces the one that waits."""
        changed = [Stage(index) for index, node in enumerate(order.nodes) if node != nodes[index]]
        standbys = [each for each in changed if self._watermarks.is_standby(each, order.nodes[each].member)]
        ahead = self.waiting = Ahead(order, now, new_standbys=tuple(standbys))
        # Steps that are held back already for an earlier order do not wait for preparations as well.
        if order.shares <= 1 and not self._in_flight.hold_back:
            ahead.opened.update(standbys)
            ahead.asked = {stage: self._watermarks.valid(stage) for stage in standbys}
            self.opened.update((order.nodes[stage], order.epoch) for stage in standbys)
        prepare = [Prepare(stage, order, tuple(replicas.values())) for stage, replicas in ahead.asked.items()]
        return [*prepare] if prepare else self._hold_back(ahead)

    def answered(self, event: Answer) -> list[Command]:
        """A new node has said something under the epoch of the order that waits."""
        ahead = self.waiting
        assert ahead is not None, "an epoch is an order's"
        match event:
            case StepBroken(stage=stage, reason=reason):
                return [RequestFormation(stage, reason)]
            case StageJoined(stage=stage):
                ahead.joined.add(stage)
            case ReplicasPlaced(stage=stage) if stage in ahead.asked:
                ahead.placed[stage] = in_place(ahead.asked.pop(stage), event)
                return [] if ahead.asked else self._hold_back(ahead)
        return []

    def overdue(self, now: float) -> list[Command]:
        """The order that waits has come again: a node that should have answered long ago may not have been reached."""
        ahead = self.waiting
        if ahead is None or now - ahead.came_at < PREPARE_SECONDS:
            return []
        if not self._in_flight.running:
            # Without requests nobody would ever notice that the answer was lost. What the standby lacks is computed.
            ahead.to_flush.clear()
        return [
            RequestFormation(stage, "it was asked to take a lane and did not answer") for stage in sorted(ahead.asked)
        ]

    def _hold_back(self, ahead: Ahead) -> list[Command]:
        """From now on steps wait for the new nodes, and those in flight are the old ones' last."""
        self._in_flight.hold_back = True
        ahead.to_flush.update(ahead.new_standbys)
        return [Flush(stage) for stage in ahead.new_standbys]

    def flushed(self, stage: Stage) -> None:
        """The standby of a stage has everything, or cannot be brought to have it soon."""
        if self.waiting is not None:
            self.waiting.to_flush.discard(stage)

    def drop(self) -> None:
        """The order that waits is being carried out, or replaced by something that does not wait."""
        self.waiting = None


def in_place(asked: Mapping[int, Replica], answer: ReplicasPlaced) -> dict[int, Replica]:
    """What a node holds of the replicas, by block, that it was asked to put in place."""
    missing = {replica.block for replica in answer.missing}
    found = {block: replica for block, replica in asked.items() if block not in missing}
    return found | {replica.block: replica for replica in answer.fuller if replica.block in found}
