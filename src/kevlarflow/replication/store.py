"""The standby's store: replicas of KV blocks in host memory, never more than a given number of bytes.

When it is full it drops what is cheapest to compute again. A request resumes from its leading blocks, so a block deep
in its sequence costs only itself, while the first block takes everything behind it along: the deepest goes first, and
among equally deep ones the oldest. A replica that would be dropped at once is not taken. Requests are never touched.

The replication thread stores, the main thread takes; a lock guards both.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import NamedTuple

from kevlarflow.recovery.coverage import Replica
from kevlarflow.types import PipelineId


class _Entry(NamedTuple):
    replica: Replica
    data: bytes | memoryview
    age: int


class StandbyStore:
    """See the module's text. Each block of a lane has at most one replica: the newest that was stored."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._entries: dict[tuple[PipelineId, int], _Entry] = {}
        self._order: list[tuple[int, int, PipelineId, int]] = []
        self._ages = itertools.count()
        self._bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all replicas."""
        return self._bytes

    def put(self, pipeline: PipelineId, replica: Replica, data: bytes | memoryview) -> list[tuple[PipelineId, Replica]]:
        """Store a replica; returns what had to be dropped for it, itself included when it is the cheapest."""
        with self._lock:
            self._remove(pipeline, replica.block)
            age = next(self._ages)
            self._entries[pipeline, replica.block] = _Entry(replica, data, age)
            self._bytes += len(data)
            heapq.heappush(self._order, (-replica.depth, age, pipeline, replica.block))
            if len(self._order) > 2 * len(self._entries) + 1_024:
                self._forget_replaced()
            dropped = []
            while self._bytes > self.limit_bytes:
                dropped.append(self._drop_cheapest())
            return dropped

    def get(self, pipeline: PipelineId, replica: Replica) -> bytes | memoryview | None:
        """The stored copy of exactly this content, or None."""
        with self._lock:
            entry = self._entries.get((pipeline, replica.block))
            return entry.data if entry is not None and entry.replica == replica else None

    def forget(self, pipeline: PipelineId) -> None:
        """Drop everything of a lane: it is served here now, or by somebody else's standby."""
        with self._lock:
            for owner, block in [key for key in self._entries if key[0] == pipeline]:
                self._remove(owner, block)

    def _remove(self, pipeline: PipelineId, block: int) -> None:
        entry = self._entries.pop((pipeline, block), None)
        if entry is not None:
            self._bytes -= len(entry.data)

    def _forget_replaced(self) -> None:
        """Rebuild the order without copies that newer ones have replaced."""
        self._order = [
            (-entry.replica.depth, entry.age, pipeline, block) for (pipeline, block), entry in self._entries.items()
        ]
        heapq.heapify(self._order)

    def _drop_cheapest(self) -> tuple[PipelineId, Replica]:
        while True:
            _, age, pipeline, block = heapq.heappop(self._order)
            entry = self._entries.get((pipeline, block))
            if entry is not None and entry.age == age:
                self._remove(pipeline, block)
                return pipeline, entry.replica
