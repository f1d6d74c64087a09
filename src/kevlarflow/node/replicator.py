"""The replication thread of a node: it copies the node's lanes to their standbys, and stores what others copy here.

No step waits for it. The main thread only notes what it wrote (`ReplicationQueue`) and rings a bell; this thread copies
one block at a time, checks afterwards that the block is still what it was, and sends it straight to the standby. A
standby that is slow, stopped or gone costs nothing but coverage: a few copies may be unanswered, then copying stops.
Traffic is capped, so that catching up after a failure does not take the memory bandwidth that decoding needs.

What the standby answers goes to the main thread, which passes it on to the engine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from collections import deque

import msgspec
import zmq

from kevlarflow.config import ServeConfig
from kevlarflow.node.stage import KvBlocks
from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.queue import ReplicationQueue
from kevlarflow.replication.store import StandbyStore
from kevlarflow.types import Epoch, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import replicas, steps

log = logging.getLogger("kevlarflow.replication")

MAX_UNANSWERED = 4
"""Copies on their way to one standby."""
UNANSWERED_SECONDS = 1.0
"""After this long without an answer, copies that are on their way are given up, and others are tried."""
MAX_OUTCOMES = 10_000
"""Answers that wait for the main thread."""


class LaneReplication:
    """What the thread knows of one lane. The main thread changes it between two steps only."""

    def __init__(self, pipeline: PipelineId, first_block: int, queue: ReplicationQueue) -> None:
        self.pipeline = pipeline
        self.first_block = first_block
        self.queue = queue
        self.epoch = Epoch(0)
        self.standby: NodeInfo | None = None
        self.channel: zmq.Socket[bytes] | None = None
        self.unanswered = 0
        self.sent_at = 0.0


class Replicator(threading.Thread):
    """See the module's text."""

    def __init__(self, config: ServeConfig, member: Member, stage: Stage, blocks: KvBlocks, address: str) -> None:
        super().__init__(name="replicator", daemon=True)
        self._config = config
        self._member = member
        self._stage = stage
        self._blocks = blocks
        self.store = StandbyStore(config.standby_memory_bytes)
        self._lanes: dict[PipelineId, LaneReplication] = {}
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = self._context.socket(zmq.ROUTER)
        self._inbox.setsockopt(zmq.LINGER, 0)
        self._inbox.setsockopt(zmq.RCVHWM, MAX_UNANSWERED * config.pipelines)
        self._inbox.bind(address)
        self._bell_in = self._context.socket(zmq.PULL)
        self._bell_in.bind(f"inproc://replicator-{id(self)}")
        self._bell_out = self._context.socket(zmq.PUSH)
        self._bell_out.connect(f"inproc://replicator-{id(self)}")
        self.outcomes: deque[steps.Replicated] = deque(maxlen=MAX_OUTCOMES)
        self.answered = self._context.socket(zmq.PULL)
        """Readable when the main thread should look at `outcomes`."""
        self.answered.bind(f"inproc://replicated-{id(self)}")
        self._answer = self._context.socket(zmq.PUSH)
        self._answer.connect(f"inproc://replicated-{id(self)}")
        self._epochs: dict[PipelineId, Epoch] = {}
        self._refused_peers: set[bytes] = set()
        self.rejected = 0
        """Copies that were refused: wrong stage, epoch, length or checksum."""
        self.copied_bytes = 0
        self._next_copy_at = 0.0

    # ---- the main thread

    def lane(self, pipeline: PipelineId, first_block: int, block_size: int) -> LaneReplication:
        """Begin to replicate a lane."""
        queue = ReplicationQueue(block_size, self._config.replication_interval_tokens)
        with self._lock:
            lane = self._lanes[pipeline] = LaneReplication(pipeline, first_block, queue)
        return lane

    def leave(self, pipeline: PipelineId) -> None:
        """The lane is not served here any more."""
        with self._lock:
            lane = self._lanes.pop(pipeline, None)
            if lane is not None:
                lane.standby = None
                lane.queue.hold(())
        self.ring()

    def assign(self, lane: LaneReplication, standby: NodeInfo | None) -> None:
        """Replicate the lane to `standby` from now on; None: to nobody."""
        if lane.standby == standby:
            return
        with self._lock:
            lane.standby = standby
            lane.channel = self._connect(standby) if standby is not None else None
            lane.unanswered = 0
            lane.queue.restart()
        self.ring()

    def _connect(self, standby: NodeInfo) -> zmq.Socket[bytes]:
        channel = self._context.socket(zmq.DEALER)
        channel.setsockopt(zmq.LINGER, 0)
        channel.setsockopt(zmq.SNDHWM, MAX_UNANSWERED)
        channel.connect(standby.replica_address)
        return channel

    def ring(self) -> None:
        """Something is due."""
        with contextlib.suppress(zmq.Again):
            self._bell_out.send(b"", zmq.NOBLOCK)

    # ---- this thread

    def run(self) -> None:
        """Copy and store for ever."""
        while True:
            try:
                self._turn()
            except Exception:
                # What went wrong with one copy must not end replication for good.
                log.exception("%s: a turn of replication failed", self._member)

    def _turn(self) -> None:
        # The main thread may change a lane's channel at any time: this turn uses the one that it has now.
        with self._lock:
            lanes = [(lane, lane.channel) for lane in self._lanes.values() if lane.channel is not None]
        poller = zmq.Poller()
        for sock in (self._inbox, self._bell_in, *(channel for _, channel in lanes)):
            poller.register(sock, zmq.POLLIN)
        ready = dict(poller.poll(self._wait_ms([lane for lane, _ in lanes])))
        if self._bell_in in ready:
            self._silence_bell()
        if self._inbox in ready:
            self._store_what_came()
        for lane, channel in lanes:
            if channel in ready:
                self._take_outcomes(lane, channel)
            self._copy_one(lane, channel)

    def _wait_ms(self, lanes: list[LaneReplication]) -> int:
        """No wait while something can be copied; a short one while the cap or a silent standby holds it up."""
        if not any(lane.queue.backlog for lane in lanes):
            return 1_000
        if all(lane.unanswered >= MAX_UNANSWERED for lane in lanes if lane.queue.backlog):
            return 100
        return max(0, round((self._next_copy_at - time.monotonic()) * 1_000))

    def _silence_bell(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._bell_in.recv(zmq.NOBLOCK)

    def _copy_one(self, lane: LaneReplication, channel: zmq.Socket[bytes]) -> None:
        now = time.monotonic()
        if lane.unanswered >= MAX_UNANSWERED and now - lane.sent_at > UNANSWERED_SECONDS:
            lane.unanswered = 0
        if lane.unanswered >= MAX_UNANSWERED or now < self._next_copy_at:
            return
        replica = lane.queue.next()
        if replica is None:
            return
        data = self._blocks.read(lane.first_block + replica.block)
        if not lane.queue.still_holds(replica):
            return
        header = replicas.Store(
            pipeline=lane.pipeline,
            epoch=lane.epoch,
            stage=self._stage,
            block=replica.block,
            generation=replica.generation,
            filled=replica.filled,
            depth=replica.depth,
            length=len(data),
            checksum=zlib.crc32(data),
        )
        try:
            channel.send_multipart([replicas.encode(header), data], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            lane.queue.not_sent(replica)
            lane.unanswered = MAX_UNANSWERED
            lane.sent_at = now
            return
        lane.unanswered += 1
        lane.sent_at = now
        self.copied_bytes += len(data)
        self._next_copy_at = now + len(data) / self._config.replication_bytes_per_second

    def _take_outcomes(self, lane: LaneReplication, channel: zmq.Socket[bytes]) -> None:
        while True:
            try:
                outcome = replicas.decode(channel.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.MsgspecError:
                self.rejected += 1
                continue
            if isinstance(outcome, replicas.Outcome):
                lane.unanswered = max(0, lane.unanswered - 1)
                self._report(outcome)

    def _report(self, outcome: replicas.Outcome) -> None:
        self.outcomes.append(
            steps.Replicated(
                outcome.pipeline,
                self._stage,
                self._member,
                outcome.standby,
                outcome.stored,
                outcome.dropped,
                outcome.used_bytes,
                outcome.limit_bytes,
            )
        )
        with contextlib.suppress(zmq.Again):
            self._answer.send(b"", zmq.NOBLOCK)

    # ---- as a standby

    def _store_what_came(self) -> None:
        while True:
            try:
                peer, *frames = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if peer in self._refused_peers:
                continue
            if not self._take(peer, frames):
                self.rejected += 1
                self._refused_peers.add(peer)
                log.error("%s refuses replicas from a peer that sent a wrong one", self._member)

    def _take(self, peer: bytes, frames: list[bytes]) -> bool:
        """Store one copy; False when anything about it is wrong."""
        try:
            header, data = replicas.decode(frames[0]), frames[1]
        except (msgspec.MsgspecError, IndexError):
            return False
        if not isinstance(header, replicas.Store) or header.stage != self._stage:
            return False
        if not len(data) == header.length == self._blocks.block_bytes or zlib.crc32(data) != header.checksum:
            return False
        if header.epoch < self._epochs.get(header.pipeline, 0):
            self.rejected += 1
            return True
        self._epochs[header.pipeline] = header.epoch
        replica = Replica(header.block, header.generation, header.filled, header.depth)
        dropped = self.store.put(header.pipeline, replica, data)
        self._answer_peer(peer, header.pipeline, replica, dropped)
        return True

    def _answer_peer(
        self, peer: bytes, pipeline: PipelineId, replica: Replica, dropped: list[tuple[PipelineId, Replica]]
    ) -> None:
        own = tuple(_tag(each) for owner, each in dropped if owner == pipeline)
        stored = () if _tag(replica) in own else (_tag(replica),)
        outcome = replicas.Outcome(pipeline, self._member, stored, own, self.store.used_bytes, self.store.limit_bytes)
        with contextlib.suppress(zmq.Again):
            self._inbox.send_multipart([peer, replicas.encode(outcome)], zmq.NOBLOCK)


def _tag(replica: Replica) -> tuple[int, int, int]:
    return replica.block, replica.generation, replica.filled
