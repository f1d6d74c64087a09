"""How KV comes back to the stages that have lost it, and request state to all of them.

place  ──► a new node that was the standby of the lost one puts the replicas in place that are in use, those of
           steps in flight included, and says which of them it did not have after all
resume ──► what they do not cover is computed again; every stage rebuilds its requests from the ledger, and is told
           what each block holds now; the steps in flight go out again; kept prefixes, which no request uses
           yet, are put in place last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kevlarflow.recovery.ahead import in_place
from kevlarflow.recovery.books import Books
from kevlarflow.recovery.coverage import Replica, allocated
from kevlarflow.recovery.forming import Forming
from kevlarflow.recovery.giving_way import GivingWay
from kevlarflow.recovery.holdings import blocks_in_use, filled_everywhere, holdings
from kevlarflow.recovery.ledger import Step
from kevlarflow.recovery.pipeline_events import (
    Command,
    EvictPrefixCache,
    Place,
    PlaceRest,
    Recompute,
    ReplicasPlaced,
    Restore,
)
from kevlarflow.recovery.recompute import needed_blocks, plan
from kevlarflow.recovery.watermarks import Watermarks
from kevlarflow.types import Member, NodeInfo, Stage


class Restoring:
    """See the module's text."""

    def __init__(self, books: Books, giving_way: GivingWay, watermarks: Watermarks) -> None:
        self._books = books
        self._giving_way = giving_way
        self._watermarks = watermarks

    # ---- replicas

    def place(
        self, forming: Forming, nodes: Sequence[NodeInfo], ahead: Mapping[Stage, Mapping[int, Replica]]
    ) -> list[Command]:
        """Ask each new node that was the standby of the lost one for its replicas; empty when it needs none.

        What it has put in place `ahead`, or before another order came, it has still, where the blocks are not others'.
        """
        wanted = self._touched(list(self._books.in_flight))
        commands: list[Place] = []
        for stage in sorted(forming.lost):
            valid = self._useful(self._watermarks.kept_by(nodes[stage].member, stage), wanted)
            here = self._useful(self._current(ahead.get(stage, {})), wanted)
            if not valid and not here:
                forming.placed.clear()
                return []
            lacking = [
                each for each in valid.values() if each.block not in here or here[each.block].filled < each.filled
            ]
            now = tuple(replica for replica in lacking if replica.block in wanted)
            later = tuple(replica for replica in lacking if replica.block not in wanted)
            forming.placed[stage] = here | {replica.block: replica for replica in lacking}
            forming.later.update(replica.block for replica in later)
            commands += [Place(stage, now, later)] if lacking else []
        forming.to_place = {command.stage for command in commands}
        return [*commands]

    def _useful(self, replicas: Mapping[int, Replica], wanted: set[int]) -> dict[int, Replica]:
        """Replicas of `wanted` blocks, and of full ones, which may be hit as a prefix."""
        may_use = self._giving_way.may_use(replicas)
        return {b: each for b, each in may_use.items() if b in wanted or each.filled == self._books.block_size}

    def _current(self, replicas: Mapping[int, Replica]) -> dict[int, Replica]:
        """Replicas of blocks that were not given to another request meanwhile."""
        generations = self._books.generations
        current = {block: each for block, each in replicas.items() if each.generation == generations[block]}
        return self._giving_way.may_use(current)

    def placed(self, forming: Forming, answer: ReplicasPlaced, member: Member) -> None:
        """A new node, this member, has put in place what it has of what it was asked for."""
        forming.to_place.discard(answer.stage)
        forming.placed[answer.stage] = in_place(forming.placed[answer.stage], answer)
        self._watermarks.drop(answer.stage, member, answer.missing)

    # ---- all the rest

    def resume(self, forming: Forming) -> list[Command]:
        """Recompute what replicas do not cover, restore the ledger, issue the steps in flight again."""
        books = self._books
        steps = list(books.in_flight)
        restored = filled_everywhere([self._current(replicas) for replicas in forming.placed.values()])
        chunks = plan(books.ledger, steps, forming.lost, books.limits, restored)
        numbered = forming.chunks = books.in_flight.dispatched.add_chunks(chunks)
        forming.recomputed_tokens = sum(chunk.num_tokens for chunk in chunks)
        forming.first_step = next((step.sequence for step in steps if step.scheduled), None)
        # Of blocks that were in use when they were put in place, some may have been of requests that are over since.
        full = {block for block, filled in restored.items() if filled == books.block_size}
        keep = frozenset(full) - blocks_in_use(books.ledger, steps)
        rest: list[Command] = [PlaceRest(stage) for stage in sorted(forming.placed)]
        # A step that was issued since then may hit or overwrite a prefix that nobody used before.
        rest_first = not forming.later.isdisjoint(self._touched(steps))
        commands = [*rest] if rest_first else []
        oldest = min((step.sequence for step in steps), default=0)
        commands += [Recompute(number, chunk, oldest) for number, chunk in numbered.items()]
        held = holdings(books.ledger, steps, keep, books.generations, books.tables.depths, books.block_size)
        commands.append(Restore(books.ledger.copies(), held))
        commands += books.in_flight.due()
        commands += [] if rest_first else rest
        return commands + self._evict(forming, steps, keep)

    def _touched(self, steps: Sequence[Step]) -> set[int]:
        in_use = blocks_in_use(self._books.ledger, steps)
        return in_use.union(*(allocated(step, self._books.block_size) for step in steps))

    def _evict(self, forming: Forming, steps: Sequence[Step], keep: frozenset[int]) -> list[Command]:
        if not forming.lost:
            return []
        # Nobody computes what is evicted on the new node: even a replica that is confirmed late is void.
        self._books.generations.void(set(keep) | needed_blocks(self._books.ledger, steps, self._books.block_size))
        return [EvictPrefixCache(keep)]
