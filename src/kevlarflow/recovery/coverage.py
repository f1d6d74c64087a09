"""What of a lane's KV is safely on its standby, block by block.

The content of a KV block is named by (lane, block id, generation): the generation is the step that allocated the
block, so a block that was given to another request is another content, however similar the bytes. The executor
assigns it when a step is issued, and it is the same when the step is issued again. A standby confirms what it stores
as (block id, generation, tokens filled); here that is held against the block's current generation, and the leading
blocks of a request that are covered make its watermark.

One `Coverage` belongs to one stage of one pipeline, and to one standby: with a new standby it starts empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set

from kevlarflow.recovery.ledger import Step


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """A stored copy of a block: `filled` tokens of it are valid, from the first."""

    block: int
    generation: int
    filled: int
    depth: int = dataclasses.field(default=0, compare=False)
    """Blocks before it in its request's table: the deeper, the cheaper to lose."""


class Generations:
    """The current generation of every block that was ever allocated: at most one entry for each KV block."""

    def __init__(self) -> None:
        self._generation: dict[int, int] = {}

    def __getitem__(self, block: int) -> int:
        return self._generation.get(block, 0)

    def allocate(self, step: Step, block_size: int) -> None:
        """Note the blocks that a step takes for new tokens."""
        for block in allocated(step, block_size):
            self._generation[block] = step.sequence

    def void(self, needed: Set[int], mark: int) -> None:
        """Whatever is not `needed` may be missing on a new node: what was copied of it counts no more.

        `mark` is the generation that such a block has from now on. An epoch will do: epochs of a pipeline are never
        used again either, and steps are numbered from the time of day, far above them.
        """
        for block in self._generation.keys() - needed:
            self._generation[block] = mark

    def of(self, blocks: Iterable[int]) -> dict[int, int]:
        """Generations of these blocks."""
        return {block: self[block] for block in blocks}


def tables(step: Step) -> Iterable[tuple[str, Sequence[int], int]]:
    """(request, block table, tokens of the prefix hit) of what the step admits or resumes."""
    for admission in step.admissions:
        yield admission.request, admission.blocks, admission.computed
    for going_on in step.continuations:
        if going_on.resumed:
            yield going_on.request, going_on.new_blocks, going_on.computed


def allocated(step: Step, block_size: int) -> set[int]:
    """Blocks that the step takes for new tokens; those of a prefix hit keep their content."""
    taken: set[int] = set()
    for _, blocks, hit in tables(step):
        taken.update(blocks[hit // block_size :])
    for going_on in step.continuations:
        if not going_on.resumed:
            taken.update(going_on.new_blocks)
    return taken


class IssuedTables:
    """Block tables as of the last issued step (the ledger's are as of the last completed one)."""

    def __init__(self) -> None:
        self._tables: dict[str, list[int]] = {}

    def clear(self) -> None:
        """Forget all requests."""
        self._tables.clear()

    def issue(self, step: Step, generations: Generations, block_size: int) -> tuple[Replica, ...]:
        """Fold a step in; returns what each block that it writes holds after it."""
        for request in step.finished | step.preempted:
            self._tables.pop(request, None)
        starts: dict[str, int] = {}
        for admission in step.admissions:
            self._tables[admission.request] = list(admission.blocks)
            starts[admission.request] = admission.computed
        for going_on in step.continuations:
            table = self._tables.setdefault(going_on.request, [])
            if going_on.resumed:
                table.clear()
            table.extend(going_on.new_blocks)
            starts[going_on.request] = going_on.computed
        written = []
        for request, count in step.scheduled.items():
            start, end = starts[request], starts[request] + count
            for index in range(start // block_size, -(-end // block_size)):
                block = self._tables[request][index]
                filled = min(block_size, end - index * block_size)
                written.append(Replica(block, generations[block], filled, depth=index))
        return tuple(written)


class Coverage:
    """Confirmed replicas of one stage on its current standby."""

    def __init__(self) -> None:
        self._replicas: dict[int, Replica] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    def confirm(self, replicas: Iterable[Replica]) -> None:
        """The standby has stored these."""
        for replica in replicas:
            self._replicas[replica.block] = replica

    def drop(self, replicas: Iterable[Replica]) -> None:
        """The standby has dropped these, unless it stored something newer since."""
        for replica in replicas:
            if self._replicas.get(replica.block) == replica:
                del self._replicas[replica.block]

    def clear(self) -> None:
        """The standby is gone."""
        self._replicas.clear()

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
