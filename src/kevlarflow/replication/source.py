"""The source's half of replication: copy what is due to the standby of each lane, a message at a time.

A message holds one full block, or the newest tokens of many: what a step has added to all requests of a lane is little
more work than what it has added to one. Of a block whose first tokens the standby has, only those behind them are
copied. A copy is made first and the block looked at again afterwards: only if it still holds what it held is it sent.
No step waits for any of it. A standby that is slow, stopped or gone costs nothing but coverage: a few messages may be
unanswered; then copying stops, and what was not answered in time is due again. Traffic is capped, so that catching up
after a failure does not take the memory bandwidth that decoding needs; that of a lane whose steps wait for it is not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from kevlarflow.replication.blocks import KvBlocks
from kevlarflow.replication.queue import Due, ReplicationQueue
from kevlarflow.replication.transfer import CHANNEL_PLACES, Outlet, Transfer
from kevlarflow.types import Epoch, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import replicas, steps

log = logging.getLogger("kevlarflow.replication")

MAX_COPIES = 64
"""Copies in a message; it is no longer than a block either."""
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
        """When the last message was sent: who waits longest has the first choice of what the cap allows."""
        self.full_bytes = 0
        """Sent as copies of full blocks."""
        self.partial_bytes = 0
        """Sent as copies of partly filled ones."""
        self.refused = 0
        """Messages that a standby called wrong."""
        self.flushing: Epoch | None = None
        """In which epoch it is to be said that nothing is left to copy; None: it is not to be said."""


class _Message(NamedTuple):
    """Copies that go together, as what they make of their replicas, and the memory that they are in."""

    copies: Sequence[Due]
    buffer: memoryview
    length: int
    """Bytes of `buffer` that they take."""
    sent_at: float = 0.0


class _Channel:
    """A lane's channel to one standby, and what is on its way in it."""

    def __init__(self, standby: NodeInfo, number: int, outlet: Outlet, block_bytes: int) -> None:
        self.standby = standby
        self.number = number
        """What `channels_wanted` was when it was opened."""
        self.outlet = outlet
        self.sent = 0
        """Messages so far, which number them."""
        self.unanswered: dict[int, _Message] = {}
        self.buffers = [memoryview(bytearray(block_bytes)) for _ in range(CHANNEL_PLACES)]
        """Host memory that is free for the next messages."""
        self.blocked_until = 0.0
        """When to try again whether it takes a message."""
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
        """Send at most one message of each lane; returns the seconds until there may be something to do again."""
        with self._lock:
            lanes = sorted(self._lanes.values(), key=lambda lane: lane.copied_at)
        self._close_abandoned({lane.pipeline for lane in lanes})
        waits = [IDLE_SECONDS]
        for lane in lanes:
            channel = self._channel(lane, transfer, now)
            if channel is not None:
                self._take_answers(lane, channel, now)
                waits.append(self._copy_some(lane, channel, now))
            flushing = lane.flushing
            if flushing is not None and not _is_busy(lane, channel):
                if lane.flushing == flushing:
                    lane.flushing = None
                # The lane may have been opened anew in this moment.
                self._report(steps.Flushed(lane.pipeline, flushing, self._stage))
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
                _ignore_answers(channel)
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

    def _copy_some(self, lane: LaneReplication, channel: _Channel, now: float) -> float:
        """Returns the seconds until the next copies of this lane may be made."""
        if channel.closed_at is not None:
            return IDLE_SECONDS
        overdue = [n for n, each in channel.unanswered.items() if now - each.sent_at > UNANSWERED_SECONDS]
        self._give_up(lane, channel, overdue)
        if not channel.buffers:
            return BLOCKED_SECONDS
        if now < channel.blocked_until:
            return channel.blocked_until - now
        if now < self._next_copy_at and lane.flushing is None:
            return self._next_copy_at - now
        if lane.queue.is_empty:
            return IDLE_SECONDS
        buffer = channel.buffers.pop()
        try:
            message = self._copy(lane, buffer)
        except Exception:
            channel.buffers.append(buffer)
            # Some of what it held may count as sent.
            lane.queue.restart()
            raise
        if not message.copies:
            # All of it was given away meanwhile.
            channel.buffers.append(message.buffer)
            return 0.0
        return self._send(lane, channel, message, now)

    def _copy(self, lane: LaneReplication, buffer: memoryview) -> _Message:
        """Copy what is due into `buffer`, oldest first and as much as fits."""
        copies: list[Due] = []
        length, room = 0, lane.queue.block_size
        while len(copies) < MAX_COPIES and (due := lane.queue.next(room)) is not None:
            due, size = self._read(lane, due, buffer[length:])
            replica = lane.queue.finish(due)
            if replica is not None:
                copies.append(Due(replica, due.start))
                length += size
                room = (len(buffer) - length) // self._blocks.token_bytes if self._blocks.token_bytes else 0
        return _Message(copies, buffer, length)

    def _send(self, lane: LaneReplication, channel: _Channel, message: _Message, now: float) -> float:
        """Returns the seconds until the next copies of this lane may be made."""
        data = message.buffer[: message.length]
        revalued = lane.queue.revalued(MAX_REVALUED)
        number = channel.sent + 1
        header = replicas.Store(
            number=number,
            pipeline=lane.pipeline,
            epoch=lane.epoch,
            stage=self._stage,
            copies=tuple(map(_as_sent, message.copies)),
            length=message.length,
            revalued=tuple(revalued),
        )
        if not channel.outlet.send(replicas.seal(header, data), data):
            for copy in message.copies:
                lane.queue.not_sent(copy.replica)
            channel.buffers.append(message.buffer)
            channel.blocked_until = now + BLOCKED_SECONDS
            return BLOCKED_SECONDS
        lane.queue.told(revalued)
        channel.sent, channel.unanswered[number] = number, message._replace(sent_at=now)
        lane.copied_at = now
        self._count(lane, message)
        pause = message.length / self._bytes_per_second
        self._next_copy_at = now + pause
        return pause

    def _count(self, lane: LaneReplication, message: _Message) -> None:
        full = sum(self._bytes_of(copy) for copy in message.copies if lane.queue.is_full(copy.replica))
        lane.full_bytes += full
        lane.partial_bytes += message.length - full

    def _bytes_of(self, copy: Due) -> int:
        return copy.tokens * self._blocks.token_bytes if copy.start else self._blocks.block_bytes

    def _read(self, lane: LaneReplication, due: Due, into: memoryview) -> tuple[Due, int]:
        """Copy what is due, or the whole block where it is all due or cannot be taken apart; what, and its bytes."""
        replica, start = due
        block = lane.table[replica.block]
        if self._blocks.token_bytes == 0 or (start == 0 and lane.queue.is_full(replica)):
            self._blocks.read(block, into[: self._blocks.block_bytes])
            return Due(replica, 0), self._blocks.block_bytes
        size = due.tokens * self._blocks.token_bytes
        self._blocks.read_tokens(block, start, replica.filled, into[:size])
        return due, size

    def _give_up(self, lane: LaneReplication, channel: _Channel, numbers: Sequence[int]) -> None:
        """Take back what the standby does not answer; it may still be read, so its buffers are not used again."""
        for number in numbers:
            for copy in channel.unanswered.pop(number).copies:
                lane.queue.not_sent(copy.replica)
            channel.buffers.append(memoryview(bytearray(self._blocks.block_bytes)))

    def _take_answers(self, lane: LaneReplication, channel: _Channel, now: float) -> None:
        while channel.closed_at is None and (frame := channel.outlet.receive()) is not None:
            try:
                answer = replicas.decode(frame)
            except msgspec.MsgspecError:
                answer = replicas.Closed("the standby's answer makes no sense")
            match answer:
                case replicas.Outcome(number=number, dropped=dropped, lacking=lacking):
                    message = channel.unanswered.pop(number, None)
                    if message is not None:
                        channel.buffers.append(message.buffer)
                    # Answers keep the order of what they answer: these were lost, or their answers were.
                    self._give_up(lane, channel, [each for each in channel.unanswered if each < number])
                    lane.queue.dropped((block, generation) for block, generation, _ in dropped)
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


def _as_sent(copy: Due) -> replicas.Copy:
    replica, start = copy
    return replicas.Copy(
        replica.block, replica.generation, start, replica.filled, depth=replica.depth, worth=replica.worth
    )


def _ignore_answers(channel: _Channel) -> None:
    """Nobody waits for them any more, but unread they would wake the thread again and again."""
    while channel.outlet.receive() is not None:
        pass


def _is_busy(lane: LaneReplication, channel: _Channel | None) -> bool:
    """Whether something is on its way to the standby, or will be."""
    if channel is None or channel.closed_at is not None:
        return False
    return not lane.queue.is_empty or bool(channel.unanswered)
