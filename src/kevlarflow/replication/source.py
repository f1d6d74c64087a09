"""The source's half of replication: copy what is due to the standby of each lane, one block at a time.

Of a block whose first tokens the standby has, only those behind them are copied. The copy is made first and the block
looked at again afterwards: only if it still holds what it held is the copy sent. No step waits for any of it. A standby
that is slow, stopped or gone costs nothing but coverage: a few copies may be unanswered; then copying stops, and what
was not answered in time is due again. Traffic is capped, so that catching up after a failure does not take the memory
bandwidth that decoding needs.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Sequence

import msgspec

from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.blocks import KvBlocks
from kevlarflow.replication.queue import Due, ReplicationQueue
from kevlarflow.replication.transfer import CHANNEL_PLACES, Outlet, Transfer
from kevlarflow.types import Epoch, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import replicas, steps

log = logging.getLogger("kevlarflow.replication")

UNANSWERED_SECONDS = 2.0
"""After this long without an answer, copies that are on their way are given up, and are due again."""
CLOSED_SECONDS = 10.0
"""A channel that the standby has closed is opened anew after this long."""
MAX_REVALUED = 128
"""Blocks of which a copy says along what their replicas are worth now: 2 KiB."""
IDLE_SECONDS = 1.0
BLOCKED_SECONDS = 0.1


class LaneReplication:
    """What is known of one lane. The main thread changes `epoch` and `standby`, between two steps only."""

    def __init__(self, pipeline: PipelineId, table: Sequence[int], queue: ReplicationQueue) -> None:
        self.pipeline = pipeline
        self.table = table
        """Physical block of each block of the lane. Where it changes, the lane's content is forgotten before."""
        self.queue = queue
        self.epoch = Epoch(0)
        self.standby: NodeInfo | None = None
        self.channels_wanted = 0
        """Counts the occasions on which a new channel was asked for."""
        self.copied_at = 0.0
        """When the last copy was sent: who waits longest has the first choice of what the cap allows."""
        self.full_bytes = 0
        """Sent as copies of full blocks."""
        self.partial_bytes = 0
        """Sent as copies of partly filled ones."""
        self.refused = 0
        """Copies that a standby called wrong."""
        self.flushing = False
        """Whether it is to be said when nothing is left to copy."""


class _Channel:
    """A lane's channel to one standby, and what is on its way in it."""

    def __init__(self, standby: NodeInfo, number: int, outlet: Outlet, block_bytes: int) -> None:
        self.standby = standby
        self.number = number
        """What `channels_wanted` was when it was opened."""
        self.outlet = outlet
        self.unanswered: dict[replicas.Tag, tuple[Replica, memoryview]] = {}
        self.buffers = [memoryview(bytearray(block_bytes)) for _ in range(CHANNEL_PLACES)]
        """Host memory that is free for the next copies."""
        self.sent_at = 0.0
        self.closed_at: float | None = None


class Source:
    """See the module's text. One thread takes turns; `lane`, `leave` and `assign` are the main thread's."""

    def __init__(
        self,
        member: Member,
        stage: Stage,
        blocks: KvBlocks,
        bytes_per_second: int,
        report: Callable[[steps.Replicated | steps.Flushed], None],
    ) -> None:
        self._member = member
        self._stage = stage
        self._blocks = blocks
        self._bytes_per_second = bytes_per_second
        self._report = report
        self._lock = threading.Lock()
        self._lanes: dict[PipelineId, LaneReplication] = {}
        self._channels: dict[PipelineId, _Channel] = {}
        self._next_copy_at = 0.0

    # ---- the main thread

    def lane(self, pipeline: PipelineId, table: Sequence[int], queue: ReplicationQueue) -> LaneReplication:
        """Begin to replicate a lane whose block b is at physical block `table[b]`."""
        with self._lock:
            lane = self._lanes[pipeline] = LaneReplication(pipeline, table, queue)
        return lane

    def leave(self, pipeline: PipelineId) -> None:
        """The lane is not served here any more."""
        with self._lock:
            lane = self._lanes.pop(pipeline, None)
        if lane is not None:
            lane.standby = None
            lane.queue.hold(())

    def assign(self, lane: LaneReplication, standby: NodeInfo | None, *, anew: bool = False) -> bool:
        """Replicate the lane to `standby` from now on; None: to nobody. Returns whether that is news.

        `anew`: send what it has once more, over a new channel, since its answers may have been lost.
        """
        if lane.standby == standby and not anew:
            return False
        lane.standby = standby
        lane.channels_wanted += 1
        return True

    # ---- the replication thread

    def turn(self, transfer: Transfer, now: float) -> float:
        """Copy at most one block of each lane; returns the seconds until there may be something to do again."""
        with self._lock:
            lanes = sorted(self._lanes.values(), key=lambda lane: lane.copied_at)
        self._close_abandoned({lane.pipeline for lane in lanes})
        waits = [IDLE_SECONDS]
        for lane in lanes:
            channel = self._channel(lane, transfer, now)
            if channel is not None:
                self._take_answers(lane, channel, now)
                waits.append(self._copy_one(lane, channel, now))
            if lane.flushing and not _is_busy(lane, channel):
                lane.flushing = False
                self._report(steps.Flushed(lane.pipeline, lane.epoch, self._stage))
        return min(waits)

    def _close_abandoned(self, served: set[PipelineId]) -> None:
        for pipeline in self._channels.keys() - served:
            self._channels.pop(pipeline).outlet.close()

    def _channel(self, lane: LaneReplication, transfer: Transfer, now: float) -> _Channel | None:
        """The lane's channel to the standby that it has now, opened if need be; None when there is none."""
        wanted, standby, channel = lane.channels_wanted, lane.standby, self._channels.get(lane.pipeline)
        if channel is not None and channel.standby == standby and channel.number == wanted:
            if channel.closed_at is None:
                return channel
            if now - channel.closed_at < CLOSED_SECONDS:
                return None
        if channel is not None:
            channel.outlet.close()
            del self._channels[lane.pipeline]
        if standby is None:
            return None
        lane.queue.restart()
        channel = _Channel(standby, wanted, transfer.connect(standby.replica_address), self._blocks.block_bytes)
        self._channels[lane.pipeline] = channel
        return channel

    def _copy_one(self, lane: LaneReplication, channel: _Channel, now: float) -> float:
        """Returns the seconds until the next copy of this lane may be made."""
        if channel.closed_at is not None:
            return IDLE_SECONDS
        if channel.unanswered and now - channel.sent_at > UNANSWERED_SECONDS:
            self._give_up(lane, channel)
        if not channel.buffers:
            return BLOCKED_SECONDS
        if now < self._next_copy_at:
            return self._next_copy_at - now
        due = lane.queue.next()
        if due is None:
            return IDLE_SECONDS
        return self._copy(lane, channel, due, now)

    def _copy(self, lane: LaneReplication, channel: _Channel, due: Due, now: float) -> float:
        buffer = channel.buffers.pop()
        due, data = self._read(lane, due, buffer)
        replica = lane.queue.finish(due)
        if replica is None:
            channel.buffers.append(buffer)
            return 0.0
        revalued = lane.queue.revalued(MAX_REVALUED)
        header = replicas.Store(
            pipeline=lane.pipeline,
            epoch=lane.epoch,
            stage=self._stage,
            block=replica.block,
            generation=replica.generation,
            start=due.start,
            filled=replica.filled,
            depth=replica.depth,
            length=len(data),
            checksum=zlib.crc32(data),
            worth=replica.worth,
            revalued=tuple(revalued),
        )
        if not channel.outlet.send(replicas.encode(header), data):
            lane.queue.not_sent(replica)
            channel.buffers.append(buffer)
            return BLOCKED_SECONDS
        lane.queue.told(revalued)
        channel.unanswered[replica.block, replica.generation, replica.filled] = (replica, buffer)
        channel.sent_at = lane.copied_at = now
        if lane.queue.is_full(replica):
            lane.full_bytes += len(data)
        else:
            lane.partial_bytes += len(data)
        pause = len(data) / self._bytes_per_second
        self._next_copy_at = now + pause
        return pause

    def _read(self, lane: LaneReplication, due: Due, buffer: memoryview) -> tuple[Due, memoryview]:
        """Copy what is due, or the whole block where it is all due or cannot be taken apart; what was copied."""
        replica, start = due
        block, tokens = lane.table[replica.block], replica.filled - start
        if self._blocks.token_bytes == 0 or (start == 0 and lane.queue.is_full(replica)):
            self._blocks.read(block, buffer)
            return Due(replica, 0), buffer
        data = buffer[: tokens * self._blocks.token_bytes]
        self._blocks.read_tokens(block, start, replica.filled, data)
        return due, data

    def _give_up(self, lane: LaneReplication, channel: _Channel) -> None:
        """Take back what the standby does not answer; it may still be read, so its buffers are not used again."""
        for replica, _ in channel.unanswered.values():
            lane.queue.not_sent(replica)
        channel.unanswered.clear()
        channel.buffers = [memoryview(bytearray(self._blocks.block_bytes)) for _ in range(CHANNEL_PLACES)]

    def _take_answers(self, lane: LaneReplication, channel: _Channel, now: float) -> None:
        while channel.closed_at is None and (frame := channel.outlet.receive()) is not None:
            try:
                answer = replicas.decode(frame)
            except msgspec.MsgspecError:
                answer = replicas.Closed("the standby's answer makes no sense")
            match answer:
                case replicas.Outcome(stored=stored, dropped=dropped, lacking=lacking):
                    for tag in (*stored, *dropped, *lacking):
                        if tag in channel.unanswered:
                            channel.buffers.append(channel.unanswered.pop(tag)[1])
                    lane.queue.dropped(block for block, _, _ in dropped)
                    lane.queue.lacking(block for block, _, _ in lacking)
                    self._tell(lane, answer)
                case replicas.Closed(reason):
                    self._closed(lane, channel, reason, now)

    def _closed(self, lane: LaneReplication, channel: _Channel, reason: str, now: float) -> None:
        log.error(
            "%s: %s refused a copy of pipeline %d: %s", self._member, channel.standby.member, lane.pipeline, reason
        )
        lane.refused += 1
        channel.closed_at = now

    def _tell(self, lane: LaneReplication, outcome: replicas.Outcome) -> None:
        self._report(
            steps.Replicated(
                pipeline=lane.pipeline,
                stage=self._stage,
                source=self._member,
                standby=outcome.standby,
                stored=outcome.stored,
                dropped=outcome.dropped,
                used_bytes=outcome.used_bytes,
                limit_bytes=outcome.limit_bytes,
                full_bytes=lane.full_bytes,
                partial_bytes=lane.partial_bytes,
                refused=lane.refused,
            )
        )


def _is_busy(lane: LaneReplication, channel: _Channel | None) -> bool:
    """Whether something is on its way to the standby, or will be."""
    if channel is None or channel.closed_at is not None:
        return False
    return not lane.queue.is_empty or bool(channel.unanswered)
