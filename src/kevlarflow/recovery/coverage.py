"""What of a lane's KV is safely on its standby, block by block.

The content of a KV block is named by (lane, block id, generation): the generation is the step that allocated the
block, so a block that was given to another request is another content, however similar the bytes. The executor
assigns it when a step is issued, and it is the same when the step is issued again. A standby confirms what it stores
as (block id, generation, tokens filled); here that is held against the block's current generation, and the leading
blocks of a request that are covered make its watermark.

One `Coverage` belongs to one stage of one pipeline, and to one standby: with a new standby it starts empty.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import msgspec

from kevlarflow.recovery.ledger import Step
from kevlarflow.recovery.use import Holders, Use


class Worth(enum.IntEnum):
    """Whom a replica could save from computing its tokens again."""

    NOBODY = 0
    """No request holds the block, and it is not full: not even the prefix cache can use it."""
    PREFIX = 1
    """No request holds the block: a later one that begins with the same tokens, at most."""
    REQUEST = 2
    """A request that holds the block now."""


class Replica(msgspec.Struct, frozen=True, eq=False):
    """A stored copy of a block: `filled` tokens of it are valid, from the first.

    A recovery makes, sends and compares thousands, which a dataclass makes three times as slow.
    """

    block: int
    generation: int
    filled: int
    depth: int = 0
    """Blocks before it in its request's table: the deeper, the cheaper to lose."""
    worth: Worth = Worth.REQUEST

    def __eq__(self, other: object) -> bool:
        """What it is worth, and how deep it lies, changes without it."""
        if not isinstance(other, Replica):
            return NotImplemented
        return (self.block, self.generation, self.filled) == (other.block, other.generation, other.filled)

    def __ne__(self, other: object) -> bool:
        """Of a struct it would ask who it is."""
        return not self == other

    def __hash__(self) -> int:
        return hash((self.block, self.generation, self.filled))


class Generations:
    """The current generation of every block that was ever allocated: at most one entry for each KV block."""

    def __init__(self) -> None:
        self._generation: dict[int, int] = {}
        self.mark = 0
        """The generation of blocks that hold nothing: the epoch. Epochs of a pipeline are never used again either, and
        steps are numbered from the time of day, far above them."""

    def __getitem__(self, block: int) -> int:
        return self._generation.get(block, 0)

    def allocate(self, step: Step, block_size: int) -> None:
        """Note the blocks that a step takes for new tokens."""
        for block in allocated(step, block_size):
            self._generation[block] = step.sequence

    def void(self, needed: Set[int]) -> None:
        """Whatever is not `needed` may be missing on a new node: what was copied of it counts no more."""
        self.forget(self._generation.keys() - needed)

    def forget(self, blocks: Iterable[int]) -> None:
        """Some stages may not have these, whatever others have copied of them."""
        self._generation.update(dict.fromkeys(blocks, self.mark))


def tables(step: Step) -> Iterable[tuple[str, Sequence[int], int]]:
    """(request, block table, tokens of the prefix hit) of what the step admits or resumes."""
    for admission in step.admissions:
        yield admission.request, admission.blocks, admission.computed
    for going_on in step.continuations:
        if going_on.resumed:
            yield going_on.request, going_on.new_blocks, going_on.computed


def allocated(step: Step, block_size: int) -> set[int]:
    """Blocks that the step takes for new tokens; those of a prefix hit keep their content."""
    taken = set(step.void)
    for _, blocks, hit in tables(step):
        taken.update(blocks[hit // block_size :])
    for going_on in step.continuations:
        if not going_on.resumed:
            taken.update(going_on.new_blocks)
    return taken


def advance(tables: dict[str, list[int]], step: Step) -> None:
    """Fold a step into block tables, in place."""
    for request in step.finished | step.preempted:
        tables.pop(request, None)
    for admission in step.admissions:
        tables[admission.request] = list(admission.blocks)
    for going_on in step.continuations:
        table = tables.setdefault(going_on.request, [])
        if going_on.resumed:
            table.clear()
        table.extend(going_on.new_blocks)


def written_blocks(tables: Mapping[str, Sequence[int]], step: Step, block_size: int) -> dict[str, Sequence[int]]:
    """Blocks that each request of a step writes, given the tables as of that step."""
    starts = starts_of(step)
    return {
        request: tables[request][starts[request] // block_size : -(-(starts[request] + count) // block_size)]
        for request, count in step.scheduled.items()
    }


def starts_of(step: Step) -> dict[str, int]:
    """Tokens that each request has computed before the step."""
    starts = {admission.request: admission.computed for admission in step.admissions}
    starts.update((going_on.request, going_on.computed) for going_on in step.continuations)
    return starts


class Effects(NamedTuple):
    """What a step does to the KV blocks of the lane."""

    writes: dict[str, tuple[Replica, ...]]
    """By request, what each block that the step writes holds after it."""
    use: Use


class IssuedTables:
    """Block tables as of the last issued step (the ledger's are as of the last completed one)."""

    def __init__(self) -> None:
        self.tables: dict[str, list[int]] = {}
        self.depths: dict[int, int] = {}
        """How deep each block was when it was last written."""
        self._holders = Holders()

    def clear(self) -> None:
        """Forget all requests."""
        self.tables.clear()
        self._holders.clear()

    def forget(self, requests: Iterable[str]) -> None:
        """These have lost their blocks."""
        for request in requests:
            self._holders.release(self.tables.pop(request, ()))

    def issue(self, step: Step, generations: Generations, block_size: int) -> Effects:
        """Fold a step in."""
        self._advance(step)
        writes = self._written(step, generations, block_size)
        self.depths.update((replica.block, replica.depth) for each in writes.values() for replica in each)
        return Effects(writes, self._holders.change())

    def _advance(self, step: Step) -> None:
        admitted = {admission.request for admission in step.admissions}
        resumed = {going_on.request for going_on in step.continuations if going_on.resumed}
        for request in step.finished | step.preempted | admitted | resumed:
            self._holders.release(self.tables.get(request, ()))
        advance(self.tables, step)
        for admission in step.admissions:
            self._holders.take(admission.blocks)
        for going_on in step.continuations:
            self._holders.take(going_on.new_blocks)

    def _written(self, step: Step, generations: Generations, block_size: int) -> dict[str, tuple[Replica, ...]]:
        starts = starts_of(step)
        written = {}
        for request, blocks in written_blocks(self.tables, step, block_size).items():
            first, end = starts[request] // block_size, starts[request] + step.scheduled[request]
            written[request] = tuple(
                Replica(block, generations[block], min(block_size, end - depth * block_size), depth)
                for depth, block in enumerate(blocks, first)
            )
        return written


class Coverage:
    """Confirmed replicas of one stage on its current standby."""

    def __init__(self) -> None:
        self._replicas: dict[int, Replica] = {}

    def confirm(self, replicas: Iterable[Replica]) -> None:
        """The standby has stored these."""
        for replica in replicas:
            self._replicas[replica.block] = replica

    def drop(self, replicas: Iterable[Replica]) -> None:
        """The standby has dropped these, unless it stored something newer since."""
        for replica in replicas:
            held = self._replicas.get(replica.block)
            # It may have dropped an older one before, and what it said of that was lost.
            if held is not None and held.generation == replica.generation and held.filled <= replica.filled:
                del self._replicas[replica.block]

    def valid(self, generations: Generations) -> dict[int, Replica]:
        """Replicas of the blocks' current content."""
        return {b: r for b, r in self._replicas.items() if r.generation == generations[b]}


def watermark(blocks: Sequence[int], computed: int, valid: Mapping[int, Replica], block_size: int) -> int:
    """Leading tokens of a request, at most `computed`, whose KV is covered."""
    covered = 0
    for block in blocks:
        replica = valid.get(block)
        if replica is None:
            break
        covered += replica.filled
        if replica.filled < block_size:
            break
    return min(covered, computed)
