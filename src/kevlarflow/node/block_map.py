"""Which physical block holds which block of which lane, on a node whose KV memory has room for one lane.

Every engine counts its KV blocks from 0 to N - 1, and a node has N of them, whoever they belong to. A healthy node maps
its lane one to one. When another lane comes, both engines keep to a share of their block ids, and the map gives each
of those a physical block; what an engine keeps stays where it is. What copies are kept of here comes first: it gets the
last physical blocks, which the replication thread has backed with memory (`node.replicator`). Block 0 is vLLM's null
block: it is everybody's, and nothing in it is ever read.

A lane that is to get more blocks than are free waits until another one has given up some: its own engine has been told
to, since the controller orders all of them in one go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from kevlarflow.errors import ProtocolViolation

NONE = 0
"""Stands for no physical block."""
NULL = 0
"""vLLM's null block."""


def physical(blocks: Iterable[int], table: Sequence[int]) -> list[int]:
    """The physical blocks of a lane's. Raises `ProtocolViolation` for one that it does not have."""
    blocks = list(blocks)
    found = [table[block] for block in blocks]
    if NONE in found:
        strays = [block for block, place in zip(blocks, found, strict=True) if place == NONE and block != NULL]
        if strays:
            raise ProtocolViolation(f"blocks {strays} are none of this lane's")
    return found


class LaneBlocks:
    """The blocks of one lane. Make one with `BlockMap.add`."""

    def __init__(self, blocks: int) -> None:
        self.table: list[int] = [NONE] * blocks
        """Physical block of each block of the lane, or `NONE`. It is changed in place."""
        self.missing: list[int] = []
        """Blocks that wait for a physical one, in the order in which they get it."""


class BlockMap:
    """See the module's text; `blocks` is N."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._free = set(range(1, blocks))
        self._lanes: list[LaneBlocks] = []

    def add(self) -> LaneBlocks:
        """A lane without blocks."""
        lane = LaneBlocks(self._blocks)
        self._lanes.append(lane)
        return lane

    def remove(self, lane: LaneBlocks) -> None:
        """The lane was left: its blocks are anybody's."""
        self._lanes.remove(lane)
        self._give_up(lane, frozenset())
        self._hand_out()

    def share(self, lane: LaneBlocks, usable: frozenset[int] | None, first: Set[int] = frozenset()) -> None:
        """Let the lane have these blocks, None: all. Those that it has already keep their place.

        Where it does not get them one to one, those of `first` get the last physical blocks that are free.
        """
        wanted = frozenset(range(1, self._blocks)) if usable is None else usable
        self._give_up(lane, wanted)
        lacking = (block for block in wanted if lane.table[block] == NONE)
        lane.missing = sorted(lacking, key=lambda block: (block not in first, block))
        self._hand_out()

    def _give_up(self, lane: LaneBlocks, kept: frozenset[int]) -> None:
        for block, place in enumerate(lane.table):
            if place != NONE and block not in kept:
                self._free.add(place)
                lane.table[block] = NONE

    def _hand_out(self) -> None:
        """Serve whoever can be served in full, in the order in which the lanes came."""
        for lane in self._lanes:
            if len(lane.missing) <= len(self._free):
                self._fill(lane.table, lane.missing)
                lane.missing = []

    def _fill(self, table: list[int], missing: Sequence[int]) -> None:
        """One to one while nobody else has any; later, the last ones first: who keeps blocks keeps low ones."""
        alone = len(self._free) == self._blocks - 1
        chosen = missing if alone else sorted(self._free, reverse=True)
        for block, place in zip(missing, chosen, strict=False):
            table[block] = place
        self._free.difference_update(table)
