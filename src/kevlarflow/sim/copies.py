"""Replication in the simulator: the real two halves of it, over KV memory and a transfer that are simulated.

`SimReplicator` is `node.replicator` without a thread: it takes its turns as events. Between the moment at which a block
is chosen to be copied and the copy, a step may run, as on a real node.
"""

from __future__ import annotations

import collections
import functools
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from kevlarflow.node.lane_replicas import FLUSH_SECONDS, LaneReplicas
from kevlarflow.node.lanes import Lane
from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.queue import ReplicationQueue
from kevlarflow.replication.source import LaneReplication, Source
from kevlarflow.replication.standby import Bounds, Standby
from kevlarflow.replication.store import StandbyStore
from kevlarflow.replication.transfer import CHANNEL_PLACES, Arrival
from kevlarflow.sim.errors import Unbounded
from kevlarflow.sim.stage import Memory
from kevlarflow.types import NodeInfo, PipelineId
from kevlarflow.wire import steps

if TYPE_CHECKING:
    from kevlarflow.sim.fleet import Fleet
    from kevlarflow.sim.node import Node

SLOT_BYTES = 8
NOTHING = -(1 << 63)
"""Stands for a position that was never written."""
OVERTAKEN = 0.3
"""How often a step runs between the choice of a block and its copy."""
UNLIMITED_BYTES_PER_SECOND = 1 << 40


def content_of(data: memoryview) -> tuple[int | None, ...]:
    """The positions in a block's bytes."""
    return tuple(None if slot == NOTHING else slot for slot in struct.unpack(f"{len(data) // SLOT_BYTES}q", data))


class ToyKv:
    """The KV memory of a node as blocks of bytes; see `replication.blocks`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._slots = struct.Struct(f"{memory.block_size}q")
        self.block_bytes = self._slots.size
        self.token_bytes = SLOT_BYTES
        self.before_read: Callable[[], None] = lambda: None
        """Called when a block was chosen and is about to be copied."""

    def read(self, block: int, into: memoryview) -> None:
        """See `KvBlocks.read`."""
        self.before_read()
        content = self._memory.read(block)
        self._slots.pack_into(into, 0, *[NOTHING if each is None else each for each in content])

    def read_tokens(self, block: int, start: int, end: int, into: memoryview) -> None:
        """See `KvBlocks.read_tokens`."""
        whole = memoryview(bytearray(self.block_bytes))
        self.read(block, whole)
        into[:] = whole[start * SLOT_BYTES : end * SLOT_BYTES]

    def merge_tokens(self, data: memoryview, start: int, end: int, into: memoryview) -> None:
        """See `KvBlocks.merge_tokens`."""
        into[start * SLOT_BYTES : end * SLOT_BYTES] = data

    def write(self, copies: Sequence[tuple[int, memoryview]]) -> None:
        """See `KvBlocks.write`."""
        for block, data in copies:
            self._memory.place(block, content_of(data))

    def populate(self, block: int) -> bool:
        """See `KvBlocks.populate`."""
        return False


class SimTransfer:
    """A node's end of the transfer; see `replication.transfer`."""

    def __init__(self, fleet: Fleet, owner: SimReplicator, node: Node) -> None:
        self.fleet = fleet
        self.owner = owner
        self.node = node
        self.arrived: deque[Arrival] = deque()
        self.outlets: dict[bytes, SimOutlet] = {}
        """Of those who have sent something here."""

    def connect(self, address: str) -> SimOutlet:
        """See `Transfer.connect`."""
        self.fleet.channels += 1
        return SimOutlet(self, address, f"{self.node.name}/{self.fleet.channels}")

    def receive(self) -> Arrival | None:
        """See `Transfer.receive`."""
        return self.arrived.popleft() if self.arrived else None

    def answer(self, peer: bytes, frame: bytes) -> None:
        """See `Transfer.answer`."""
        outlet = self.outlets[peer]
        if outlet.name == peer:
            deliver = functools.partial(outlet.deliver, frame)
            self.fleet.network.send(self.node, outlet.transfer.node, ("outcome", outlet.base), deliver)

    def wait(self, seconds: float) -> None:
        """Turns are events here."""

    def ring(self) -> None:
        """See `Transfer.ring`."""
        self.owner.turn_soon(0.0)

    def close(self) -> None:
        """See `Transfer.close`."""


class SimOutlet:
    """A channel to one standby."""

    def __init__(self, transfer: SimTransfer, address: str, base: str) -> None:
        self.transfer = transfer
        self.base = base
        self._address = address
        self._on_way: collections.Counter[bytes] = collections.Counter()
        self._answers: deque[bytes] = deque()

    @property
    def name(self) -> bytes:
        """What the standby calls it: another name after each break of the connection."""
        target = self.transfer.fleet.node_at(self._address)
        network = self.transfer.fleet.network
        number = network.connection(self.transfer.node, target) if target is not None else 0
        return f"{self.base}/{number}".encode()

    def send(self, header: bytes, data: memoryview) -> bool:
        """See `Outlet.send`."""
        fleet, node = self.transfer.fleet, self.transfer.node
        target = fleet.node_at(self._address)
        name = self.name
        if self._on_way[name] >= CHANNEL_PLACES or target is None or target.replicator is None:
            return False
        self._on_way[name] += 1
        arrive = functools.partial(self._arrive, target.replicator, name, header, memoryview(bytes(data)))
        fleet.network.send(node, target, ("copy", self.base), arrive)
        return True

    def _arrive(self, standby: SimReplicator, name: bytes, header: bytes, data: memoryview) -> None:
        """The standby takes a copy out of the channel; what outlived a break came over the connection after it."""
        self._on_way[name] -= 1
        standby.deliver(Arrival(self.name, header, data), self)

    def deliver(self, frame: bytes) -> None:
        """An answer has arrived."""
        self._answers.append(frame)
        self.transfer.ring()

    def receive(self) -> bytes | None:
        """See `Outlet.receive`."""
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        """See `Outlet.close`."""


class CheckedReplicas(LaneReplicas):
    """The real thing; what it notes and what it puts in place is checked against what was computed."""

    def __init__(self, fleet: Fleet, node: Node, replicator: SimReplicator, kv: ToyKv) -> None:
        super().__init__(replicator, kv)  # type: ignore[arg-type]
        self._fleet = fleet
        self._node = node
        self._store = replicator.store

    def end(self, lane: Lane, writes: Iterable[Replica]) -> None:
        """See `LaneReplicas.end`."""
        writes = tuple(writes)
        self._fleet.checks.note_written(lane, self._node.stage, writes)
        super().end(lane, writes)

    def flush(self, lane: Lane, now: float) -> None:
        """See `LaneReplicas.flush`."""
        super().flush(lane, now)
        self._node.after(FLUSH_SECONDS, self._node.look)

    def place(
        self, lane: Lane, now: Sequence[Replica], later: Sequence[Replica]
    ) -> tuple[list[Replica], list[Replica], Callable[[], None]]:
        """See `LaneReplicas.place`."""
        self._check(lane, [*now, *later])
        return super().place(lane, now, later)

    def place_ahead(self, lane: Lane, wanted: Sequence[Replica]) -> tuple[list[Replica], list[Replica]]:
        """See `LaneReplicas.place_ahead`."""
        self._check(lane, wanted)
        return super().place_ahead(lane, wanted)

    def place_rest(self, lane: Lane) -> None:
        """See `LaneReplicas.place_rest`."""
        for replica, data in lane.rest:
            self._fleet.checks.copy(lane.pipeline, self._node.stage, replica, content_of(data))
        super().place_rest(lane)

    def _check(self, lane: Lane, wanted: Sequence[Replica]) -> None:
        found, _ = self._store.find(lane.pipeline, wanted)
        for replica, data in found:
            self._fleet.checks.copy(lane.pipeline, self._node.stage, replica, content_of(data))


class SimReplicator:
    """See the module's text. The face is that of `node.replicator.Replicator`."""

    def __init__(self, fleet: Fleet, node: Node, kv: ToyKv) -> None:
        shape = fleet.plan.shape
        self._fleet = fleet
        self._node = node
        self._transfer = SimTransfer(fleet, self, node)
        bounds = Bounds(shape.pipelines, shape.blocks, shape.block_size, kv.block_bytes, kv.token_bytes)
        self._block_size, self._interval = shape.block_size, shape.interval
        self.store = StandbyStore(shape.standby_blocks * kv.block_bytes, kv)
        self._standby = Standby(node.member, node.stage, self.store, bounds)
        self._source = Source(node.member, node.stage, kv, UNLIMITED_BYTES_PER_SECOND, self._outcome)
        self._outcomes: deque[steps.Replicated | steps.Flushed] = deque()
        self._turns_at = float("inf")
        kv.before_read = self._let_a_step_run

    # ---- what `LaneReplicas` asks for

    def lane(self, pipeline: PipelineId, table: Sequence[int]) -> LaneReplication:
        """See `Replicator.lane`."""
        queue = ReplicationQueue(self._block_size, self._interval)
        return self._source.lane(pipeline, table, queue)

    def leave(self, pipeline: PipelineId) -> None:
        """See `Replicator.leave`."""
        self._source.leave(pipeline)

    def assign(self, lane: LaneReplication, standby: NodeInfo | None, *, anew: bool = False) -> None:
        """See `Replicator.assign`."""
        if self._source.assign(lane, standby, anew=anew):
            self.ring()

    def ring(self) -> None:
        """See `Replicator.ring`."""
        self.turn_soon(0.0)

    def take_outcomes(self) -> Iterator[steps.Replicated | steps.Flushed]:
        """See `Replicator.take_outcomes`."""
        while self._outcomes:
            yield self._outcomes.popleft()

    # ---- turns

    def turn_soon(self, seconds: float) -> None:
        """Take a turn after so long, or earlier if one is due already."""
        seconds += self._fleet.plan.shape.step * self._fleet.rng.random()
        due = self._fleet.timeline.now + seconds
        if due < self._turns_at:
            self._turns_at = due
            self._node.after(seconds, self._turn)

    def _turn(self) -> None:
        now = self._fleet.timeline.now
        if now < self._turns_at:
            return
        self._turns_at = float("inf")
        wait = self._source.turn(self._transfer, now)
        if wait < 1.0:
            self.turn_soon(wait)

    def _let_a_step_run(self) -> None:
        if self._fleet.rng.random() < OVERTAKEN:
            self._node.hurry()

    def deliver(self, arrival: Arrival, outlet: SimOutlet) -> None:
        """A copy has arrived."""
        self._transfer.outlets[arrival.peer] = outlet
        self._standby.take(arrival, self._transfer)
        if self.store.used_bytes > self.store.limit_bytes:
            raise Unbounded(f"{self._node} keeps {self.store.used_bytes} bytes of {self.store.limit_bytes}")

    def _outcome(self, outcome: steps.Replicated | steps.Flushed) -> None:
        self._outcomes.append(outcome)
        self._fleet.counts["copies answered"] += 1
        self._node.look()
