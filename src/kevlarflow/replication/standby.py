"""The standby's half of replication: judge each message of copies that comes, store them, and say what became of them.

Nothing about a message is believed. One that is wrong in any point is dropped and counted, and its channel is closed:
the peer is told, and not heard again. Stored content is named by its tag alone; the epoch only says who may write.
"""

from __future__ import annotations

import collections
import logging
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
        """Messages that were wrong."""

    def take(self, arrival: Arrival, transfer: Transfer) -> list[Replica]:
        """Judge, store and answer one message; returns what was stored."""
        if arrival.peer in self._closed:
            return []
        message = self._judge(arrival)
        if isinstance(message, str):
            self._close(arrival.peer, message, transfer)
            return []
        pipeline, peer = message.pipeline, arrival.peer
        self._epochs[pipeline], self._sources[pipeline] = message.epoch, peer
        self._store.revalue(pipeline, message.revalued)
        kept, dropped, lacking = self._keep(message, arrival.data)
        self._say(peer, pipeline, transfer, message.number, stored=kept, dropped=dropped, lacking=lacking)
        for other in {owner for owner, _ in dropped if owner != pipeline and owner in self._sources}:
            self._say(self._sources[other], other, transfer, dropped=dropped)
        return kept

    def _keep(self, message: replicas.Store, data: memoryview) -> tuple[list[Replica], list[Dropped], list[Replica]]:
        """What of a message is here now, what had to go for it, and what had nothing to go on from."""
        pipeline, begin = message.pipeline, 0
        taken, dropped, lacking = list[Replica](), list[Dropped](), list[Replica]()
        for copy in message.copies:
            end = begin + self._bounds.length(copy.start, copy.filled)
            replica = Replica(copy.block, copy.generation, copy.filled, copy.depth, copy.worth)
            try:
                lost = self._store.put(pipeline, replica, data[begin:end], copy.start)
                if (pipeline, replica) not in lost:
                    # What had to go for an earlier copy of this message is here again.
                    dropped = [each for each in dropped if each != (pipeline, replica)]
                dropped += lost
                taken.append(replica)
            except NothingToGoOnFrom:
                lacking.append(replica)
            begin = end
        # One copy of a message may have had to make room for the next.
        return [replica for replica in taken if (pipeline, replica) not in dropped], dropped, lacking

    def _judge(self, arrival: Arrival) -> replicas.Store | str:
        """The message's header, or what is wrong with the message."""
        try:
            message = replicas.decode(arrival.header)
        except msgspec.MsgspecError:
            return "no copy of a block"
        if not isinstance(message, replicas.Store) or not message.copies:
            return "no copy of a block"
        wrong = self._wrong_lane(message) or next(filter(None, map(self._wrong_tag, message.copies)), "")
        if wrong:
            return wrong
        expected = sum(self._bounds.length(copy.start, copy.filled) for copy in message.copies)
        if not len(arrival.data) == message.length == expected:
            return f"{len(arrival.data)} bytes, said to be {message.length}, where {expected} are right"
        known = self._epochs.get(message.pipeline, 0)
        if message.epoch < known:
            return f"epoch {message.epoch} of pipeline {message.pipeline}, which is at {known}"
        if not replicas.is_intact(message, arrival.data):
            return "wrong checksum"
        return message

    def _wrong_lane(self, message: replicas.Store) -> str:
        if message.stage != self._stage:
            return f"stage {message.stage} for a standby of stage {self._stage}"
        if not 0 <= message.pipeline < self._bounds.pipelines:
            return f"pipeline {message.pipeline} of {self._bounds.pipelines}"
        return ""

    def _wrong_tag(self, copy: replicas.Copy) -> str:
        bounds = self._bounds
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
        number: int = 0,
        *,
        stored: Sequence[Replica] = (),
        dropped: Sequence[Dropped] = (),
        lacking: Sequence[Replica] = (),
    ) -> None:
        outcome = replicas.Outcome(
            number=number,
            pipeline=pipeline,
            standby=self._member,
            stored=tuple(map(_tag, stored)),
            dropped=tuple(_tag(replica) for owner, replica in dropped if owner == pipeline),
            lacking=tuple(map(_tag, lacking)),
            used_bytes=self._store.bytes_of(pipeline),
            limit_bytes=self._store.limit_bytes,
        )
        transfer.answer(peer, replicas.encode(outcome))


def _tag(replica: Replica) -> replicas.Tag:
    return replica.block, replica.generation, replica.filled
