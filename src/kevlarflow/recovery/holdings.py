"""Which blocks of a lane are in use, and what each of them holds once the lane is restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kevlarflow.recovery.coverage import Generations, Replica, Worth, allocated, tables
from kevlarflow.recovery.ledger import Ledger, Step
from kevlarflow.recovery.recompute import read_again


def blocks_in_use(ledger: Ledger, in_flight: Iterable[Step]) -> set[int]:
    """Blocks of live requests, and those that steps in flight count as prefix hits."""
    blocks = {block for entry in ledger.entries() for block in entry.blocks}
    for step in in_flight:
        blocks.update(block for _, table, _ in tables(step) for block in table)
    return blocks


def holdings(
    ledger: Ledger,
    in_flight: Sequence[Step],
    keep: frozenset[int],
    generations: Generations,
    depths: Mapping[int, int],
    block_size: int,
) -> tuple[Replica, ...]:
    """What every node's lane holds once it is restored: blocks of live requests, and the kept prefixes `keep`.

    `depths` says how deep each block was when it was written.
    """
    # What a step in flight has taken bears that step's generation already, and holds its content only after it.
    taken = set[int]().union(*(allocated(step, block_size) for step in in_flight))
    held = {
        block: Replica(block, generations[block], block_size, depths.get(block, 0), Worth.PREFIX)
        for block in keep - taken
    }
    # The blocks of a request that ends in flight are not computed again, so a new node does not hold them.
    for entry in read_again(ledger, in_flight):
        for index, block in enumerate(entry.blocks[: -(-entry.computed // block_size)]):
            if block in taken:
                continue
            filled = min(block_size, entry.computed - index * block_size)
            if block not in held or held[block].filled < filled:
                held[block] = Replica(block, generations[block], filled, depth=index)
    return tuple(held.values())


def filled_everywhere(placed: Iterable[Mapping[int, Replica]]) -> dict[int, int]:
    """Blocks that every lost stage has from a replica, with the tokens that are filled on all of them."""
    stages = list(placed)
    if not stages:
        return {}
    common = set(stages[0]).intersection(*stages[1:])
    return {block: min(replicas[block].filled for replicas in stages) for block in common}
