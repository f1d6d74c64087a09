"""The main thread's side of replication: what it notes of each lane, and how replicas come back into a lane.

As a source it tells the replication thread what each step writes. As the donor of a lost lane it takes the replicas
that it kept and writes them into the lane's KV memory: only content of the generation that the engine asks for, with
no fewer tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

import msgspec

from kevlarflow.node.block_map import physical
from kevlarflow.node.lanes import Lane
from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.recovery.use import NO_CHANGE, Use
from kevlarflow.replication.blocks import KvBlocks
from kevlarflow.replication.source import LaneReplication
from kevlarflow.types import NodeInfo
from kevlarflow.wire import steps

if TYPE_CHECKING:
    from kevlarflow.node.replicator import Replicator


FLUSH_SECONDS = 0.1
"""What a standby has not confirmed by then is computed again: that takes two steps, about as long."""


class LaneReplicas:
    """See the module's text. In the simulator the replicator is one without a thread."""

    def __init__(self, replicator: Replicator, kv: KvBlocks) -> None:
        self._replicator = replicator
        self._kv = kv

    # ---- as a source

    def open(self, lane: Lane) -> None:
        """The lane was opened under a new epoch."""
        self._replicator.store.unpin(lane.pipeline)
        replication = self._of(lane)
        replication.epoch = lane.epoch
        # That an earlier epoch is flushed means nothing to this one.
        replication.flushing = None

    def close(self, lane: Lane) -> None:
        """The lane was left."""
        self._replicator.store.unpin(lane.pipeline)
        self._replicator.leave(lane.pipeline)
        lane.replication = None

    def kept(self, lane: Lane) -> Set[int]:
        """Blocks of the lane that copies are here of: the memory that they would be put into is backed."""
        return self._replicator.store.ages(lane.pipeline).keys()

    def _of(self, lane: Lane) -> LaneReplication:
        if lane.replication is None:
            lane.replication = self._replicator.lane(lane.pipeline, lane.blocks.table)
            lane.replication.epoch = lane.epoch
        return lane.replication

    def assign(self, lane: Lane, standby: NodeInfo | None, *, anew: bool = False) -> None:
        """Replicate to `standby` from now on; `anew`: send everything once more."""
        self._replicator.assign(self._of(lane), standby, anew=anew)

    def hasten(self, lane: Lane) -> None:
        """The lane is about to move: copy every token at once, until it is opened again."""
        if self._of(lane).queue.hasten():
            self._replicator.ring()

    def flush(self, lane: Lane, now: float) -> None:
        """No further step of this lane comes: what its standby lacks is copied, and `outcomes` says when it has it."""
        lane.flush_until = now + FLUSH_SECONDS
        replication = self._of(lane)
        replication.queue.hasten()
        replication.flushing = lane.epoch
        self._replicator.ring()

    def begin(self, lane: Lane, writes: Iterable[Replica], use: Use) -> None:
        """A step is about to write these blocks, and changes the use of some."""
        self._of(lane).queue.begin(writes, use)

    def end(self, lane: Lane, writes: Iterable[Replica]) -> None:
        """The step has written them."""
        if self._of(lane).queue.end(writes):
            self._replicator.ring()

    def hold(self, lane: Lane, held: Iterable[Replica]) -> None:
        """The lane was restored and holds these, but for those that `place_rest` has yet to write."""
        resting = {replica.block for replica, _ in lane.rest}
        if self._of(lane).queue.hold(replica for replica in held if replica.block not in resting):
            self._replicator.ring()

    @property
    def answered(self) -> int:
        """A file descriptor that is readable when there are `outcomes`."""
        return self._replicator.answered

    def outcomes(self) -> Iterator[steps.Replicated | steps.Flushed]:
        """What the standbys have answered since the last call, and which lanes are flushed."""
        return self._replicator.take_outcomes()

    # ---- as a donor

    def place(
        self, lane: Lane, now: Sequence[Replica], later: Sequence[Replica]
    ) -> tuple[list[Replica], list[Replica], Callable[[], None]]:
        """Find the replicas of `now`, and keep those of `later`.

        Returns what is not here, what is here and holds more tokens than were asked for, and how to write those of
        `now` into the lane. Nothing here changes until then, so it can be told before.
        """
        store = self._replicator.store
        store.pin(lane.pipeline)
        found, missing = store.find(lane.pipeline, now)
        lane.rest, missing_later = store.find(lane.pipeline, later)
        fuller = {replica for replica, _ in found}.difference(now)
        write = functools.partial(self._write, lane, found)
        return missing + missing_later, sorted(fuller, key=lambda replica: replica.block), write

    def place_ahead(self, lane: Lane, wanted: Sequence[Replica]) -> tuple[list[Replica], list[Replica]]:
        """Write replicas into a lane that is served elsewhere still; returns what `place` does of them.

        Newer copies come in meanwhile: one that has replaced another while that was written leaves neither in place.
        """
        store = self._replicator.store
        before = store.ages(lane.pipeline)
        found, missing = store.find(lane.pipeline, wanted)
        self._write(lane, found)
        after = store.ages(lane.pipeline)
        spoilt = {replica.block for replica, _ in found if before.get(replica.block) != after.get(replica.block)}
        missing += [replica for replica in wanted if replica.block in spoilt]
        fuller = {replica for replica, _ in found if replica.block not in spoilt}.difference(wanted)
        return missing, sorted(fuller, key=lambda replica: replica.block)

    def _write(self, lane: Lane, copies: Sequence[tuple[Replica, memoryview]]) -> None:
        blocks = physical((replica.block for replica, _ in copies), lane.blocks.table)
        self._kv.write([(block, data) for block, (_, data) in zip(blocks, copies, strict=True)])

    def place_rest(self, lane: Lane) -> None:
        """Write what `place` kept; the store needs nothing of this lane any more."""
        self._write(lane, lane.rest)
        placed = [msgspec.structs.replace(replica, worth=Worth.PREFIX) for replica, _ in lane.rest]
        lane.rest.clear()
        self.begin(lane, placed, NO_CHANGE)
        self.end(lane, placed)
        self._replicator.store.forget(lane.pipeline)
