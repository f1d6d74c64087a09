"""The standby's half of replication: judge each copy that comes, store it, and say what became of it.

Nothing about a copy is believed. One that is wrong in any point is dropped and counted, and its channel is closed: the
peer is told, and not heard again. Stored content is named by its tag alone; the epoch only says who may write.
"""

from __future__ import annotations

import collections
import logging
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.store import Dropped, NothingToGoOnFrom, StandbyStore
from kevlarflow.replication.transfer import Arrival, Transfer
from kevlarflow.types import Epoch, Member, PipelineId, Stage
from kevlarflow.wire import replicas

log = logging.getLogger("kevlarflow.replication")

MAX_CLOSED = 10_000
"""Closed channels that are remembered."""


class Bounds(NamedTuple):
    """What a tag may be."""

    pipelines: int
    blocks: int
    """Of one lane."""
    block_size: int
    """Tokens of a block."""
    block_bytes: int
    token_bytes: int
    """Of each token in a block; 0 where a block is copied as a whole."""

    def length(self, start: int, filled: int) -> int:
        """Bytes of a copy of these tokens."""
        if self.token_bytes and (start, filled) != (0, self.block_size):
            return (filled - start) * self.token_bytes
        return self.block_bytes


class Standby:
    """See the module's text. Used by the replication thread."""

    def __init__(self, member: Member, stage: Stage, store: StandbyStore, bounds: Bounds) -> None:
        self._member = member
        self._stage = stage
        self._store = store
        self._bounds = bounds
        self._epochs: dict[PipelineId, Epoch] = {}
        self._sources: dict[PipelineId, bytes] = {}
        """Who has sent the newest copy of each lane."""
        self._closed: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.refused = 0
        """Copies that were wrong."""

    def take(self, arrival: Arrival, transfer: Transfer) -> Replica | None:
        """Judge, store and answer one copy; returns what was stored."""
        if arrival.peer in self._closed:
            return None
        copy = self._judge(arrival)
        if isinstance(copy, str):
            self._close(arrival.peer, copy, transfer)
            return None
        pipeline, peer = copy.pipeline, arrival.peer
        self._epochs[pipeline], self._sources[pipeline] = copy.epoch, peer
        self._store.revalue(pipeline, copy.revalued)
        replica = Replica(copy.block, copy.generation, copy.filled, copy.depth, copy.worth)
        try:
            dropped = self._store.put(pipeline, replica, arrival.data, copy.start)
        except NothingToGoOnFrom:
            self._say(peer, pipeline, transfer, lacking=(_tag(replica),))
            return None
        stored = () if (pipeline, replica) in dropped else (_tag(replica),)
        self._say(peer, pipeline, transfer, stored=stored, dropped=dropped)
        for other in {owner for owner, _ in dropped if owner != pipeline and owner in self._sources}:
            self._say(self._sources[other], other, transfer, dropped=dropped)
        return replica if stored else None

    def _judge(self, arrival: Arrival) -> replicas.Store | str:
        """The copy's header, or what is wrong with the copy."""
        try:
            copy = replicas.decode(arrival.header)
        except msgspec.MsgspecError:
            return "no copy of a block"
        if not isinstance(copy, replicas.Store):
            return "no copy of a block"
        wrong = self._wrong_tag(copy)
        if wrong:
            return wrong
        expected = self._bounds.length(copy.start, copy.filled)
        if not len(arrival.data) == copy.length == expected:
            return f"{len(arrival.data)} bytes, said to be {copy.length}, where {expected} are right"
        if copy.epoch < self._epochs.get(copy.pipeline, 0):
            return f"epoch {copy.epoch} of pipeline {copy.pipeline}, which is at {self._epochs[copy.pipeline]}"
        if zlib.crc32(arrival.data) != copy.checksum:
            return "wrong checksum"
        return copy

    def _wrong_tag(self, copy: replicas.Store) -> str:
        bounds = self._bounds
        if copy.stage != self._stage:
            return f"stage {copy.stage} for a standby of stage {self._stage}"
        if not 0 <= copy.pipeline < bounds.pipelines:
            return f"pipeline {copy.pipeline} of {bounds.pipelines}"
        if not (0 <= copy.block < bounds.blocks and 0 <= copy.start < copy.filled <= bounds.block_size):
            return f"block {copy.block} of {bounds.blocks}, tokens {copy.start} to {copy.filled} of {bounds.block_size}"
        if copy.start and not bounds.token_bytes:
            return f"tokens from {copy.start} on, where blocks are copied as a whole"
        if copy.generation < 0 or not 0 <= copy.depth < bounds.blocks:
            return f"generation {copy.generation}, depth {copy.depth}"
        return ""

    def _close(self, peer: bytes, reason: str, transfer: Transfer) -> None:
        self.refused += 1
        self._closed[peer] = None
        if len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)
        log.error("%s refuses a copy and closes the channel (%d so far): %s", self._member, self.refused, reason)
        transfer.answer(peer, replicas.encode(replicas.Closed(reason)))

    def _say(
        self,
        peer: bytes,
        pipeline: PipelineId,
        transfer: Transfer,
        stored: tuple[replicas.Tag, ...] = (),
        dropped: Sequence[Dropped] = (),
        lacking: tuple[replicas.Tag, ...] = (),
    ) -> None:
        outcome = replicas.Outcome(
            pipeline=pipeline,
            standby=self._member,
            stored=stored,
            dropped=tuple(_tag(replica) for owner, replica in dropped if owner == pipeline),
            lacking=lacking,
            used_bytes=self._store.bytes_of(pipeline),
            limit_bytes=self._store.limit_bytes,
        )
        transfer.answer(peer, replicas.encode(outcome))


def _tag(replica: Replica) -> replicas.Tag:
    return replica.block, replica.generation, replica.filled
