"""The standby's store: replicas of KV blocks in host memory, never more than a given number of bytes.

It is one arena, cut into places of one block each, so that its bytes are bounded by what was mapped and not by what an
allocator makes of it. A place costs memory once a replica was put there.

When it is full it drops what is cheapest to compute again. First what no request holds any more: of that the partly
filled blocks, which serve nobody, and then the full ones, which a later request may hit. Then of the blocks that
requests hold: a request resumes from its leading blocks, so a block deep in its sequence costs only itself, while the
first block takes everything behind it along. Within each of the three the deepest goes first, and among equally deep
ones the oldest. A replica that would be dropped at once is not taken. Requests are never touched.

A lane that has sent nothing for long while others did has no running requests any more, or another standby, which
nobody says here. So none of its replicas counts as held by a request then: they would keep others out for ever. If it
is heard again, they do again.

A copy that goes on from what is here already is put behind it, in place.

The replication thread stores, the main thread reads what it puts back into a lane. While it does so the lane is
pinned: its replicas stay where they are, and no others of that lane are taken.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import threading
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.replication.blocks import KvBlocks
from kevlarflow.replication.memory import map_memory
from kevlarflow.types import PipelineId
from kevlarflow.wire.replicas import Revalued

SILENT_COPIES = 1_000
"""Copies of other lanes after which one is taken to be silent. With running requests it sends one every few tokens."""


class _Entry(NamedTuple):
    replica: Replica
    place: int
    age: int


class NothingToGoOnFrom(Exception):
    """A copy starts behind the first token, and the tokens before it are not here."""


Dropped = tuple[PipelineId, Replica]
_Cost = tuple[Worth, int, int, PipelineId, int]
"""What it would cost to drop a replica, the least first: (worth, minus depth, age), and which: (pipeline, block)."""


class StandbyStore:
    """See the module's text. Each block of a lane has at most one replica: the newest that was stored."""

    def __init__(self, limit_bytes: int, blocks: KvBlocks) -> None:
        self.limit_bytes = limit_bytes
        self._blocks = blocks
        self._block_bytes = blocks.block_bytes
        places = limit_bytes // self._block_bytes
        self._arena = map_memory(places * self._block_bytes)
        self._free = list(reversed(range(places)))
        self._lock = threading.Lock()
        self._entries: dict[tuple[PipelineId, int], _Entry] = {}
        self._order: list[_Cost] = []
        """A heap; some are of replicas that changed since."""
        self._ages = itertools.count()
        self._pinned: set[PipelineId] = set()
        self._count: collections.Counter[PipelineId] = collections.Counter()
        self._copies = 0
        self._heard: dict[PipelineId, int] = {}
        """How many copies had come when the last one of each lane came, but for lanes that are silent."""
        self._silent: set[PipelineId] = set()
        """Lanes that have sent nothing for long."""
        self._aside: dict[PipelineId, list[_Cost]] = {}
        """What was taken out of the order, by lane, while that is pinned."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all replicas."""
        return len(self._entries) * self._block_bytes

    def bytes_of(self, pipeline: PipelineId) -> int:
        """Bytes of one lane's replicas."""
        return self._count[pipeline] * self._block_bytes

    def put(self, pipeline: PipelineId, replica: Replica, data: memoryview, start: int = 0) -> list[Dropped]:
        """Store a replica; returns what had to be dropped for it, itself included when not taken.

        `data` is the whole block if it is as long as that, else tokens `start` to `replica.filled`. Raises
        `NothingToGoOnFrom` when the tokens before `start` are not here; then nothing has changed.
        """
        with self._lock:
            self._copies += 1
            self._heard[pipeline] = self._copies
            if pipeline in self._silent:
                self._silent.discard(pipeline)
                self._order_anew(pipeline)
            if pipeline in self._pinned:
                return [(pipeline, replica)]
            if start > 0:
                self._go_on(pipeline, replica, data, start)
                return []
            self._remove(pipeline, replica.block)
            dropped = [] if self._free else self._make_room(replica)
            if not self._free:
                return [(pipeline, replica)]
            place, age = self._free.pop(), next(self._ages)
            if len(data) == self._block_bytes:
                self._bytes_at(place)[:] = data
            else:
                self._blocks.merge_tokens(data, 0, replica.filled, self._bytes_at(place))
            self._count[pipeline] += 1
            self._enter(pipeline, _Entry(replica, place, age))
            return dropped

    def _enter(self, pipeline: PipelineId, entry: _Entry) -> None:
        replica = entry.replica
        self._entries[pipeline, replica.block] = entry
        heapq.heappush(self._order, self._cost_of(pipeline, entry))
        if len(self._order) > 2 * len(self._entries) + 1_024:
            self._forget_replaced()

    def _cost_of(self, pipeline: PipelineId, entry: _Entry) -> _Cost:
        replica = entry.replica
        return self._worth_of(pipeline, replica), -replica.depth, entry.age, pipeline, replica.block

    def _worth_of(self, pipeline: PipelineId, replica: Replica) -> Worth:
        """As its lane has said, while that is heard of."""
        return Worth.PREFIX if pipeline in self._silent and replica.worth is Worth.REQUEST else replica.worth

    def revalue(self, pipeline: PipelineId, revalued: Iterable[Revalued]) -> None:
        """Replicas that are here are worth something else from now on."""
        with self._lock:
            for block, generation, worth in revalued:
                entry = self._entries.get((pipeline, block))
                if entry is not None and entry.replica.generation == generation:
                    self._enter(pipeline, entry._replace(replica=msgspec.structs.replace(entry.replica, worth=worth)))

    def _go_on(self, pipeline: PipelineId, replica: Replica, data: memoryview, start: int) -> None:
        key = (pipeline, replica.block)
        entry = self._entries.get(key)
        if entry is None or entry.replica.generation != replica.generation or entry.replica.filled < start:
            raise NothingToGoOnFrom
        self._blocks.merge_tokens(data, start, replica.filled, self._bytes_at(entry.place))
        if replica.filled <= entry.replica.filled:
            return
        newer = entry._replace(replica=replica)
        if replica.worth is entry.replica.worth:
            self._entries[key] = newer
        else:
            self._enter(pipeline, newer)

    def find(
        self, pipeline: PipelineId, replicas: Iterable[Replica]
    ) -> tuple[list[tuple[Replica, memoryview]], list[Replica]]:
        """What is here of these contents, which stays as it is while the lane is pinned, and what is not.

        A later copy of the same generation will do: it holds the same tokens and further ones. Those who ask often
        know of an older copy only, since what was stored last is still on its way to them; so the copies come with
        the replicas that they are.
        """
        found, missing = [], []
        with self._lock:
            for replica in replicas:
                entry = self._entries.get((pipeline, replica.block))
                if entry is not None and _serves(entry.replica, replica):
                    found.append((entry.replica, self._bytes_at(entry.place)))
                else:
                    missing.append(replica)
        return found, missing

    def ages(self, pipeline: PipelineId) -> dict[int, int]:
        """By block, which copy of it is here: another number is another copy, and the old one's place is anybody's."""
        with self._lock:
            return {block: entry.age for (owner, block), entry in self._entries.items() if owner == pipeline}

    def pin(self, pipeline: PipelineId) -> None:
        """Keep the lane's replicas where and what they are."""
        with self._lock:
            self._pinned.add(pipeline)

    def unpin(self, pipeline: PipelineId) -> None:
        """The lane's replicas may be replaced and dropped again."""
        with self._lock:
            self._unpin(pipeline)

    def _unpin(self, pipeline: PipelineId) -> None:
        self._pinned.discard(pipeline)
        for each in self._aside.pop(pipeline, ()):
            heapq.heappush(self._order, each)

    def forget(self, pipeline: PipelineId) -> None:
        """Drop everything of a lane: it is served here now, or by somebody else's standby."""
        with self._lock:
            self._unpin(pipeline)
            for owner, block in [key for key in self._entries if key[0] == pipeline]:
                self._remove(owner, block)

    def _bytes_at(self, place: int) -> memoryview:
        return self._arena[place * self._block_bytes : (place + 1) * self._block_bytes]

    def _remove(self, pipeline: PipelineId, block: int) -> None:
        entry = self._entries.pop((pipeline, block), None)
        if entry is not None:
            self._free.append(entry.place)
            self._count[pipeline] -= 1

    def _forget_replaced(self) -> None:
        """Rebuild the order without copies that newer ones have replaced."""
        self._order = [self._cost_of(pipeline, entry) for (pipeline, _), entry in self._entries.items()]
        self._aside.clear()
        heapq.heapify(self._order)

    def _make_room(self, replica: Replica) -> list[Dropped]:
        """Drop the cheapest replica, unless `replica` is cheaper than all that may be dropped."""
        self._devalue_silent()
        dropped: list[Dropped] = []
        while self._order and not dropped:
            worth, depth, age, pipeline, block = cheapest = self._order[0]
            entry = self._entries.get((pipeline, block))
            stands = entry is not None and (entry.age, self._worth_of(pipeline, entry.replica)) == (age, worth)
            if stands and (worth, depth) > (replica.worth, -replica.depth):
                break
            heapq.heappop(self._order)
            if entry is None or not stands:
                continue
            if pipeline in self._pinned:
                # Each one once, however many copies of others come meanwhile.
                self._aside.setdefault(pipeline, []).append(cheapest)
                continue
            self._remove(pipeline, block)
            dropped.append((pipeline, entry.replica))
        return dropped

    def _devalue_silent(self) -> None:
        silent = {lane for lane, heard in self._heard.items() if self._copies - heard > SILENT_COPIES}
        for lane in silent:
            del self._heard[lane]
            self._silent.add(lane)
            self._order_anew(lane)

    def _order_anew(self, pipeline: PipelineId) -> None:
        """Its replicas that requests hold are worth something else from now on."""
        for (owner, _), entry in list(self._entries.items()):
            if owner == pipeline and entry.replica.worth is Worth.REQUEST:
                self._enter(pipeline, entry)


def _serves(stored: Replica, wanted: Replica) -> bool:
    return stored.generation == wanted.generation and stored.filled >= wanted.filled
