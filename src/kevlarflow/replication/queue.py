"""What of a lane still has to be copied to its standby.

The main thread notes what a step is about to write and what it has written; the replication thread asks for the next
block, and after copying it asks whether the block still holds what it held before: the step after may have given it to
another request. A copy is due when the block is full, or when enough tokens were added since the last one, and it is
of those tokens only: a copy that says where it starts goes on from what the standby has already.

The steps also say which blocks requests hold (`recovery.use`). A copy tells the standby what it is worth, and when that
changes later, a later copy tells it along.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.recovery.use import Use
from kevlarflow.wire.replicas import Revalued

LONG_CONTEXT_TOKENS = 1_024
"""With so many tokens before a block the interval is half of the usual one, with twice as many a third."""


class Due(NamedTuple):
    """A copy to be made: what it makes of the replica, and the first token that the standby lacks."""

    replica: Replica
    start: int

    @property
    def tokens(self) -> int:
        """How many are copied."""
        return self.replica.filled - self.start


class ReplicationQueue:
    """See the module's text. `interval` is tokens between copies of a partly filled block; 0 copies full ones only."""

    def __init__(self, block_size: int, interval: int) -> None:
        self.block_size = block_size
        self._usual_interval = self._interval = interval
        self._lock = threading.Lock()
        self._holds: dict[int, Replica] = {}
        self._sent: dict[int, Replica] = {}
        self._dropped: dict[int, None] = {}
        """Blocks whose earlier copies the standby has not kept: the next one starts from the first token.

        A full block has no next one by itself. It is tried again when there may be room: as many as requests have let
        go of, and all of them when the lane is formed anew or is about to move.
        """
        self._due: dict[int, None] = {}
        self._copying: set[int] = set()
        """Blocks that are being copied, and belong to the same forming of the lane still."""
        self._idle: set[int] = set()
        """Blocks that no request holds."""
        self._touched: dict[int, None] = {}
        """Blocks whose replica may be worth something else than the standby was told."""
        self._forsaken: set[int] = set()
        """Blocks that lost what was sent of them when the lane was formed anew, and that hold nothing since."""

    def begin(self, writes: Iterable[Replica], use: Use) -> None:
        """A step is about to write these: a block that changes its generation holds nothing meanwhile."""
        with self._lock:
            self._idle.difference_update(use.taken)
            self._idle.update(use.released)
            self._touched.update(dict.fromkeys(use.taken + use.released))
            in_use = (block for block in self._dropped if self._was_sent(block) and block not in self._idle)
            self._try_again([*itertools.islice(in_use, len(use.released)), *(self._dropped.keys() & use.taken)])
            for block in use.taken:
                self._note_due(block)
            for replica in writes:
                held = self._holds.get(replica.block)
                if held is not None and held.generation != replica.generation:
                    del self._holds[replica.block]

    def end(self, writes: Iterable[Replica]) -> bool:
        """The step has written these; returns whether something is due now."""
        with self._lock:
            for replica in writes:
                self._note(replica)
            return bool(self._due)

    def hold(self, replicas: Iterable[Replica]) -> bool:
        """The lane was formed anew and holds exactly these; returns whether something is due now."""
        with self._lock:
            self._interval = self._usual_interval
            self._holds.clear()
            self._due.clear()
            self._copying.clear()
            self._idle.clear()
            for replica in replicas:
                self._note(replica)
            self._try_again(self._dropped)
            self._forsaken = {block for block in self._sent if not self._is_held(self._sent[block])}
            self._touched = dict.fromkeys([*self._holds, *self._forsaken])
            return bool(self._due)

    def is_full(self, replica: Replica) -> bool:
        """Whether the replica is of a whole block."""
        return replica.filled == self.block_size

    def restart(self) -> None:
        """There is a new standby, which has nothing."""
        with self._lock:
            self._interval = self._usual_interval
            self._sent.clear()
            self._dropped.clear()
            self._look_for_due()

    def hasten(self) -> bool:
        """The lane is about to move: from now on every token is due at once; returns whether something is due now."""
        with self._lock:
            self._interval = 1
            self._try_again(self._dropped)
            self._look_for_due()
            return bool(self._due)

    def _try_again(self, blocks: Iterable[int]) -> None:
        """The standby may have room by now for these, which it has dropped."""
        for block in [each for each in dict.fromkeys(blocks) if self._was_sent(each)]:
            del self._sent[block]
            self._dropped.pop(block, None)
            self._note_due(block)

    def _look_for_due(self) -> None:
        self._due = dict.fromkeys(block for block, replica in self._holds.items() if self._is_due(replica))

    def _note(self, replica: Replica) -> None:
        self._holds[replica.block] = replica
        self._forsaken.discard(replica.block)
        if replica.worth is not Worth.REQUEST:
            self._idle.add(replica.block)
        self._note_due(replica.block)

    def _note_due(self, block: int) -> None:
        """The block may be due now."""
        replica = self._holds.get(block)
        if replica is not None and self._is_due(replica):
            self._due[block] = None

    def _sent_of(self, replica: Replica) -> int:
        """Tokens of this content that were sent."""
        sent = self._sent.get(replica.block)
        return sent.filled if sent is not None and sent.generation == replica.generation else 0

    def _worth_of(self, replica: Replica) -> Worth:
        if replica.block in self._forsaken:
            return Worth.NOBODY
        if replica.block not in self._idle:
            return Worth.REQUEST
        return Worth.PREFIX if self.is_full(replica) else Worth.NOBODY

    def _is_due(self, replica: Replica) -> bool:
        missing = replica.filled - self._sent_of(replica)
        if missing <= 0 or self._worth_of(replica) is Worth.NOBODY:
            return False
        return self.is_full(replica) or (bool(self._interval) and missing >= self._interval_at(replica.depth))

    def _interval_at(self, depth: int) -> int:
        """A token costs the more to compute again the more come before it: so long contexts are copied more often."""
        return max(1, self._interval // (1 + depth * self.block_size // LONG_CONTEXT_TOKENS))

    def next(self, most_tokens: int | None = None) -> Due | None:
        """The copy to make next, oldest first; it is no longer due. None as well while it has more tokens than that."""
        with self._lock:
            while self._due:
                block = next(iter(self._due))
                due = self._due_of(block)
                if due is not None and most_tokens is not None and due.tokens > most_tokens:
                    return None
                del self._due[block]
                if due is not None:
                    self._copying.add(block)
                    return due
            return None

    def _due_of(self, block: int) -> Due | None:
        replica = self._holds.get(block)
        if replica is None or not self._is_due(replica):
            return None
        return Due(replica, 0 if block in self._dropped else self._sent_of(replica))

    def finish(self, copied: Due) -> Replica | None:
        """What a finished copy is, which then counts as sent; None when the block was given away meanwhile.

        Nor does it count when the lane was formed anew, even if the block holds the same again: what the step that
        took it had overwritten may have been computed again in between.
        """
        replica = copied.replica
        with self._lock:
            if replica.block not in self._copying:
                return None
            self._copying.discard(replica.block)
            held = self._holds.get(replica.block)
            if held is None or held.generation != replica.generation:
                return None
            worth = self._worth_of(replica)
            if replica.worth is not worth:
                replica = msgspec.structs.replace(replica, worth=worth)
            self._sent[replica.block] = replica
            if copied.start == 0:
                self._dropped.pop(replica.block, None)
            return replica

    def revalued(self, limit: int) -> list[Revalued]:
        """Replicas that the standby keeps and that are worth something else than it knows; looks at `limit` blocks."""
        found: list[Revalued] = []
        with self._lock:
            for block in list(itertools.islice(self._touched, limit)):
                kept = self._kept(block)
                worth = self._worth_of(kept) if kept is not None else None
                if kept is not None and worth is not None and kept.worth is not worth:
                    found.append((block, kept.generation, worth))
                else:
                    del self._touched[block]
        return found

    def _kept(self, block: int) -> Replica | None:
        """What was sent of the block's content, or of what it has lost for good, and not dropped."""
        sent = self._sent.get(block)
        if sent is None or block in self._dropped:
            return None
        return sent if block in self._forsaken or self._is_held(sent) else None

    def _was_sent(self, block: int) -> bool:
        """Whether something was sent of what the block holds."""
        return block in self._sent and self._is_held(self._sent[block])

    def _is_held(self, replica: Replica) -> bool:
        held = self._holds.get(replica.block)
        return held is not None and held.generation == replica.generation

    def told(self, revalued: Iterable[Revalued]) -> None:
        """The standby will hear of these."""
        with self._lock:
            for block, generation, worth in revalued:
                sent = self._sent.get(block)
                if sent is not None and sent.generation == generation:
                    self._sent[block] = msgspec.structs.replace(sent, worth=worth)

    def not_sent(self, replica: Replica) -> None:
        """The copy could not be sent after all: it is due again."""
        with self._lock:
            if self._sent.get(replica.block) == replica:
                del self._sent[replica.block]
            held = self._holds.get(replica.block)
            if held is not None:
                self._note(held)

    def dropped(self, contents: Iterable[tuple[int, int]]) -> None:
        """The standby had no room to keep these, each a block and its generation then.

        It gets them again when they are due, from the first token. Something newer may have been sent meanwhile.
        """
        with self._lock:
            for block, generation in contents:
                sent = self._sent.get(block)
                if sent is not None and sent.generation == generation:
                    self._dropped[block] = None

    def lacking(self, blocks: Iterable[int]) -> None:
        """The standby has not what a copy of these went on from: they are due again, from the first token."""
        with self._lock:
            for block in blocks:
                self._sent.pop(block, None)
                self._note_due(block)

    @property
    def held_by_requests(self) -> int:
        """Blocks that hold something, and that requests hold."""
        return len(self._holds.keys() - self._idle)

    @property
    def is_empty(self) -> bool:
        """Whether no copy is due."""
        return not self._due
