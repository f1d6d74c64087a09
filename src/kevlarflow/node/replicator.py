"""The replication thread of a node: it copies the node's lanes to their standbys, and stores what others copy here.

The main thread only notes what it wrote and rings; `replication.source` and `replication.standby` do the work, one
turn after another, and sleep in between. What a standby answers goes to the main thread, which passes it on to the
engine. With each replica the thread backs the KV memory that it would be put into: a first write is several times as
expensive as a copy, and would be paid for in the middle of a recovery.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from setproctitle import setthreadtitle

from kevlarflow.config import ServeConfig
from kevlarflow.replication.blocks import KvBlocks
from kevlarflow.replication.queue import ReplicationQueue
from kevlarflow.replication.source import LaneReplication, Source
from kevlarflow.replication.standby import Bounds, Standby
from kevlarflow.replication.store import StandbyStore
from kevlarflow.replication.transfer import Transfer
from kevlarflow.types import Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import steps

log = logging.getLogger("kevlarflow.replication")

MAX_OUTCOMES = 10_000
"""Answers that wait for the main thread."""
MAX_ARRIVALS = 16
"""Messages of others that are stored before it is the turn of this node's own."""
AFTER_FAILURE_SECONDS = 0.1
WHOLE_BLOCK_INTERVAL_TOKENS = 32
"""Where a block can only be copied whole, that is done no more often than after so many tokens."""


class Replicator(threading.Thread):
    """See the module's text."""

    def __init__(
        self,
        config: ServeConfig,
        member: Member,
        stage: Stage,
        blocks: KvBlocks,
        bounds: Bounds,
        transfer: Transfer,
    ) -> None:
        super().__init__(name="replicator", daemon=True)
        self._config = config
        self._member = member
        self._blocks = blocks
        self._bounds = bounds
        self._transfer = transfer
        self._backed: set[int] = set()
        self.store = StandbyStore(config.standby_memory_bytes, blocks)
        self._standby = Standby(member, stage, self.store, bounds)
        self._source = Source(member, stage, blocks, config.replication_bytes_per_second, self._report)
        self.outcomes: deque[steps.Replicated | steps.Flushed] = deque(maxlen=MAX_OUTCOMES)
        self.answered = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when the main thread should look at `outcomes`."""

    # ---- the main thread

    def lane(self, pipeline: PipelineId, table: Sequence[int]) -> LaneReplication:
        """Begin to replicate a lane whose block b is at physical block `table[b]`."""
        interval = self._config.replication_interval_tokens
        if interval and not self._blocks.token_bytes:
            interval = max(interval, WHOLE_BLOCK_INTERVAL_TOKENS)
        queue = ReplicationQueue(self._bounds.block_size, interval)
        return self._source.lane(pipeline, table, queue)

    def leave(self, pipeline: PipelineId) -> None:
        """The lane is not served here any more."""
        self._source.leave(pipeline)
        self.ring()

    def assign(self, lane: LaneReplication, standby: NodeInfo | None, *, anew: bool = False) -> None:
        """Replicate the lane to `standby` from now on; None: to nobody; `anew`: everything once more."""
        if self._source.assign(lane, standby, anew=anew):
            self.ring()

    def ring(self) -> None:
        """Something is due."""
        self._transfer.ring()

    def take_outcomes(self) -> Iterator[steps.Replicated | steps.Flushed]:
        """What the standbys have answered since the last call, and which lanes are flushed."""
        # Whether or not there are any: they may have been taken before it was said that they are there.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.answered)
        while self.outcomes:
            yield self.outcomes.popleft()

    # ---- this thread

    def run(self) -> None:
        """Copy and store for ever."""
        # To the kernel too, so that `top -H` tells this thread from the one that computes.
        setthreadtitle(self.name)
        while True:
            try:
                wait = self._turn()
            except Exception:
                # What went wrong with one copy must not end replication for good.
                log.exception("%s: a turn of replication failed", self._member)
                wait = AFTER_FAILURE_SECONDS
            self._transfer.wait(wait)

    def _turn(self) -> float:
        for _ in range(MAX_ARRIVALS):
            arrival = self._transfer.receive()
            if arrival is None:
                break
            for stored in self._standby.take(arrival, self._transfer):
                self._back(stored.block)
        else:
            self.ring()
        return self._source.turn(self._transfer, time.monotonic())

    def _back(self, block: int) -> None:
        """Back one more of the blocks that a lost lane would get: the last ones are for what is kept of it."""
        if block not in self._backed:
            self._backed.add(block)
            self._blocks.populate(self._bounds.blocks - len(self._backed))

    def _report(self, outcome: steps.Replicated | steps.Flushed) -> None:
        self.outcomes.append(outcome)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.answered, 1)
