"""Which KV blocks a pipeline may use while its nodes serve several lanes, and which requests have to give way.

A node has KV memory for one lane. When it serves k lanes, each may use 1/k of the blocks: the engine chooses which of
its block ids those are, once for each formation, and each node maps (lane, block id) to a physical block. Blocks that
live requests hold are chosen first, oldest request first; what does not fit any more is *set aside*. A request that is
set aside takes part in no step in flight, gives no token for them, and is preempted before the next schedule.

Setting a request aside has consequences. vLLM caches the blocks of a step when it schedules it, so a later step may
count on a block that now nobody fills: such blocks are *spoilt*, and a request that holds one is set aside as well.
Nothing else is lost: a preempted request is computed again from its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from kevlarflow.recovery.coverage import advance, written_blocks
from kevlarflow.recovery.ledger import Ledger, Step

Tables = Mapping[str, Sequence[int]]
"""Request to block table."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fallout:
    """What follows from setting requests aside."""

    requests: frozenset[str] = frozenset()
    """All that are set aside: those that were to be, and those that hold a spoilt block."""
    spoilt: frozenset[int] = frozenset()
    """Blocks that the scheduler takes for filled, and nobody fills."""


def choose_usable(
    tables: Tables,
    in_flight: Sequence[Step],
    before: frozenset[int] | None,
    blocks: int,
    shares: int,
    recency: Callable[[int], int],
) -> tuple[frozenset[int] | None, frozenset[str]]:
    """The block ids that may be used when `shares` lanes share a node, and the requests that do not fit.

    `tables` are those of the last completed step, oldest request first; `before` is what could be used so far (None:
    every block), `blocks` the number of KV blocks, block 0 included, which is never used. What is left over goes to
    the blocks with the highest `recency`: they are the likeliest to hold a prefix that is wanted again.
    Less than `before` is always a part of it, more always contains it.
    """
    if shares <= 1:
        return None, frozenset()
    room = max(1, (blocks - 1) // shares)
    usable: set[int] = set()
    aside = set()
    for request, needed in _footprints(tables, in_flight).items():
        if before is not None and not needed <= before:
            aside.add(request)
        elif len(usable | needed) <= room:
            usable |= needed
        else:
            aside.add(request)
    known = range(1, blocks) if before is None else before
    spare = sorted(set(known) - usable, key=lambda block: (-recency(block), block))
    if before is not None and len(before) < room:
        spare += sorted(set(range(1, blocks)) - before)
    return frozenset(usable | set(spare[: room - len(usable)])), frozenset(aside)


def _footprints(tables: Tables, in_flight: Sequence[Step]) -> dict[str, set[int]]:
    """Every block that a request has, or has had in a step in flight."""
    current = {request: list(table) for request, table in tables.items()}
    footprints = {request: set(table) for request, table in current.items()}
    for step in in_flight:
        advance(current, step)
        for request in step.scheduled:
            footprints.setdefault(request, set()).update(current[request])
    return footprints


def fallout(
    tables: Tables, steps: Sequence[Step], usable: frozenset[int] | None, known: Fallout, block_size: int
) -> Fallout:
    """What follows when `known` is known, and `steps` have still to run; `tables` as before the first of them."""
    while True:
        more = _spread(tables, steps, usable, known, block_size)
        if more.requests == known.requests:
            return more
        known = Fallout(more.requests, known.spoilt)


def _spread(
    tables: Tables, steps: Sequence[Step], usable: frozenset[int] | None, known: Fallout, block_size: int
) -> Fallout:
    current = {request: list(table) for request, table in tables.items()}
    aside, found, spoilt = known.requests, set(known.requests), set(known.spoilt)
    for step in steps:
        advance(current, step)
        writes = written_blocks(current, step, block_size)
        for request, blocks in writes.items():
            fresh = _fresh(step, request, block_size)
            if request in aside:
                spoilt.update(blocks, fresh)
            else:
                # What is written anew is good again.
                spoilt.difference_update(fresh)
        found |= {request for request in writes if not _sound(current[request], usable, spoilt)}
    return Fallout(frozenset(found), frozenset(spoilt))


def _sound(table: Iterable[int], usable: frozenset[int] | None, spoilt: set[int]) -> bool:
    return spoilt.isdisjoint(table) and (usable is None or usable.issuperset(table))


def _fresh(step: Step, request: str, block_size: int) -> Sequence[int]:
    """Blocks that the step takes for new tokens of one request."""
    for admission in step.admissions:
        if admission.request == request:
            return admission.blocks[admission.computed // block_size :]
    for going_on in step.continuations:
        if going_on.request == request:
            return going_on.new_blocks[going_on.computed // block_size :] if going_on.resumed else going_on.new_blocks
    return ()


def without(step: Step, requests: frozenset[str], block_size: int) -> Step:
    """The step as if the scheduler had not scheduled these requests."""
    if requests.isdisjoint(step.scheduled):
        return step
    return dataclasses.replace(
        step,
        admissions=tuple(each for each in step.admissions if each.request not in requests),
        continuations=tuple(each for each in step.continuations if each.request not in requests),
        scheduled={request: count for request, count in step.scheduled.items() if request not in requests},
        void=step.void.union(*(_fresh(step, request, block_size) for request in requests)),
    )


def tables_of(ledger: Ledger) -> dict[str, Sequence[int]]:
    """Block tables as of the last completed step, oldest request first."""
    return {entry.request: entry.blocks for entry in ledger.entries()}
