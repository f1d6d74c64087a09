"""What has to be computed again after a stage was lost: a pure plan over the ledger and the steps in flight.

A stage that is new to the pipeline holds none of its KV. Each token below a live request's computed count goes
through the model again, up to the lost stage (stages behind it still hold theirs), in chunks that respect the
scheduler's limits, without sampling. Five cases need more care than that:

* A step in flight may count **prefix hits**: blocks that some finished request filled. The new stage does not hold
  them either, so they are computed as well, once for each block however many requests share it. A hit on a block
  that an earlier step in flight fills is left to that step: it is issued again, first.
* A step in flight may have **given away** blocks of a request that an earlier step in flight still computes (vLLM
  delivers the token of a request that a later step preempts), prefix hits included. Surviving stages may have run the
  later step already, so the request's KV is damaged there too: it is computed from token 0 on all stages.
* What the new node has **restored from replicas** is not computed: each request starts at its watermark.
* A hit may **begin** with blocks that an earlier step in flight fills and **go on** with cached ones. What comes after
  cannot be computed before what comes first, so such a request is none of these plans: see `unreachable_hits`.
* **Prompt log-probabilities** are gathered at the last stage while the prompt is computed. Where they are not
  complete, the request runs through all stages from token 0 and gathers them again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kevlarflow.recovery.coverage import allocated, tables
from kevlarflow.recovery.ledger import Ledger, LedgerEntry, Step
from kevlarflow.types import Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` of one request, computed in one chunk."""

    request: str
    tokens: Sequence[int]
    """All tokens up to `end` at least, so that a worker without history can run the span."""
    blocks: Sequence[int]
    start: int
    end: int
    prompt_logprobs: bool = False
    """Gather prompt log-probabilities of this span at the last stage."""
    sampling: object = None
    """Sampling parameters; only needed to gather prompt log-probabilities."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Spans that run in one forward pass."""

    spans: tuple[Span, ...]
    through: Stage
    """The last stage that has to run it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(span.end - span.start for span in self.spans)

    def written_blocks(self, block_size: int) -> set[int]:
        """KV blocks that it writes into."""
        spans = ((span.start // block_size, -(-span.end // block_size), span.blocks) for span in self.spans)
        return {block for first, end, blocks in spans for block in blocks[first:end]}


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a forward pass may hold, and the shape of the pipeline."""

    max_batched_tokens: int
    max_requests: int
    block_size: int
    """Tokens of a KV block."""
    stages: int


def plan(
    ledger: Ledger,
    in_flight: Sequence[Step],
    lost_stages: Iterable[Stage],
    limits: Limits,
    restored: Mapping[int, int] | None = None,
) -> list[Chunk]:
    """The chunks to run, in order, before the steps in flight are issued again.

    `restored` maps each block that all lost stages have from a replica to its tokens filled. With no lost stage the
    plan is empty but for requests whose KV is damaged or whose prompt log-probabilities are not complete.
    """
    lost = tuple(lost_stages)
    through, last = max(lost, default=None), Stage(limits.stages - 1)
    tokens = _tokens(ledger, in_flight)
    taken = _taken(in_flight, limits.block_size)
    # A replica of a block that was taken in flight is the new owner's, and the step writes it again anyway.
    restored = {block: filled for block, filled in (restored or {}).items() if block not in taken}
    needs = list(_live(ledger, in_flight, taken, through, last))
    for index, step in enumerate(in_flight):
        filled = _taken(in_flight[: index + 1], limits.block_size)
        given_away = _taken(in_flight[index + 1 :], limits.block_size)
        needs += _hits(tokens, step, filled, given_away, through, last, limits.block_size)
    return list(_pack(_without_repeats(needs, restored, through, limits.block_size), limits))


def plan_hits(
    ledger: Ledger,
    in_flight: Sequence[Step],
    step: Step,
    lost_stages: Iterable[Stage],
    limits: Limits,
) -> list[Chunk]:
    """The chunks to run before `step` may be issued, when its prefix hits were counted before a stage was lost.

    Such a step was being scheduled while the pipeline was formed anew, so `plan` did not see it.
    """
    tokens = _tokens(ledger, [*in_flight, step])
    lost = max(lost_stages)
    filled = _taken([step], limits.block_size)
    needs = _hits(tokens, step, filled, set(), lost, lost, limits.block_size)
    return list(_pack(_without_repeats(needs, {}, lost, limits.block_size), limits))


def unreachable_hits(in_flight: Sequence[Step], block_size: int, *, lost: bool) -> set[str]:
    """Requests whose prefix hits in flight have a cached block behind one that a step in flight fills.

    They are to be set aside when a stage is `lost`. With none lost, only those one of whose cached blocks a later step
    has taken: some stage may have run that step already, and all of them run the earlier one again.
    """
    unreachable = set()
    filled: set[int] = set()
    for index, step in enumerate(in_flight):
        filled |= allocated(step, block_size)
        given_away = _taken(in_flight[index + 1 :], block_size)
        for request, blocks, hit in tables(step):
            hits = blocks[: hit // block_size]
            first = next((place for place, block in enumerate(hits) if block in filled), len(hits))
            cached = [block for block in hits[first:] if block not in filled]
            if cached and (lost or not given_away.isdisjoint(cached)):
                unreachable.add(request)
    return unreachable


@dataclasses.dataclass(frozen=True, slots=True)
class _Need:
    """Tokens `start` to `end` that a request must have on the stages up to `through`."""

    span: Span
    through: Stage

    def part(self, start: int, end: int) -> Span:
        """The sub-span; log-probabilities of a prompt need the token behind each position as well."""
        tokens = self.span.tokens if self.span.prompt_logprobs else self.span.tokens[:end]
        return dataclasses.replace(self.span, tokens=tokens, start=start, end=end)


def _live(
    ledger: Ledger, in_flight: Sequence[Step], taken: set[int], lost: Stage | None, last: Stage
) -> Iterator[_Need]:
    """Computed tokens of the live requests: up to the lost stage, or on all stages where they are damaged."""
    for entry in read_again(ledger, in_flight):
        if entry.prompt_logprobs or not taken.isdisjoint(entry.blocks):
            yield _need(entry, last)
        elif lost is not None:
            yield _need(entry, lost)


def read_again(ledger: Ledger, in_flight: Sequence[Step]) -> list[LedgerEntry]:
    """Requests whose KV, as the ledger knows it, is still needed: the others end or start anew in a step in flight.

    One that ends is computed until then, and others may hit what it writes.
    """
    over: set[str] = set()
    computed: set[str] = set()
    for step in in_flight:
        # What is scheduled under the same name in the same step is another request.
        over |= step.finished - computed
        computed |= step.scheduled.keys()
    return [
        entry
        for entry in ledger.entries()
        if entry.computed and entry.request not in over and _uses_its_blocks(entry, in_flight)
    ]


def needed_blocks(ledger: Ledger, in_flight: Sequence[Step], block_size: int) -> set[int]:
    """Blocks whose content every stage has, or will have, once `plan` and the steps in flight were carried out."""
    needed = {block for entry in read_again(ledger, in_flight) for block in entry.blocks}
    hit = (block for step in in_flight for _, blocks, _ in tables(step) for block in blocks)
    return needed.union(hit, _taken(in_flight, block_size))


def _uses_its_blocks(entry: LedgerEntry, in_flight: Sequence[Step]) -> bool:
    """Whether the blocks that the ledger knows are read again: not once a step in flight has preempted it unseen."""
    for step in in_flight:
        if entry.request in step.preempted:
            return False
        if entry.request in step.scheduled:
            return not any(c.resumed for c in step.continuations if c.request == entry.request)
    return True


def _need(entry: LedgerEntry, through: Stage) -> _Need:
    return _Need(
        Span(
            request=entry.request,
            tokens=tuple(entry.prompt if entry.prompt_logprobs else entry.tokens),
            blocks=tuple(entry.blocks),
            start=0,
            end=entry.computed,
            prompt_logprobs=entry.prompt_logprobs,
            sampling=entry.sampling if entry.prompt_logprobs else None,
        ),
        through,
    )


def _taken(in_flight: Sequence[Step], block_size: int) -> set[int]:
    """Blocks that a step in flight took for new tokens: whoever held them before has lost them."""
    taken: set[int] = set()
    return taken.union(*(allocated(step, block_size) for step in in_flight))


def _tokens(ledger: Ledger, in_flight: Sequence[Step]) -> dict[str, Sequence[int]]:
    """Tokens of each request; one that was admitted in flight has its prompt only, whoever had its name before."""
    tokens: dict[str, Sequence[int]] = {entry.request: entry.tokens for entry in ledger.entries()}
    tokens.update((admission.request, admission.prompt) for step in in_flight for admission in step.admissions)
    return tokens


def _hits(
    tokens: Mapping[str, Sequence[int]],
    step: Step,
    filled: set[int],
    given_away: set[int],
    lost: Stage | None,
    last: Stage,
    block_size: int,
) -> Iterator[_Need]:
    """Prefix hits of a step, but for blocks that it or an earlier step in flight fills (`filled`).

    Where a later step has taken one of them (`given_away`), they are damaged on all stages.
    """
    for request, blocks, hit in tables(step):
        held = list(itertools.takewhile(lambda block: block not in filled, blocks[: hit // block_size]))
        through = lost if given_away.isdisjoint(held) else last
        end = len(held) * block_size
        if end and through is not None:
            span = Span(request, tuple(tokens[request][:end]), blocks=tuple(held), start=0, end=end)
            yield _Need(span, through)


def _without_repeats(
    needs: Iterable[_Need], restored: Mapping[int, int], lost: Stage | None, block_size: int
) -> Iterator[_Need]:
    """Skip what is restored, and leading blocks that an earlier need computes: a shared prefix is computed once."""
    computed: dict[int, Stage] = {}
    for need in needs:
        span = need.span
        start = span.start
        if not span.prompt_logprobs:
            for block in span.blocks:
                filled = restored.get(block, 0) if need.through == lost else 0
                if computed.get(block, -1) >= need.through:
                    filled = block_size
                start += filled
                if filled < block_size:
                    break
        for block in span.blocks[: span.end // block_size]:
            computed[block] = max(need.through, computed.get(block, need.through))
        if start < span.end:
            yield _Need(need.part(start, span.end), need.through)


def _pack(needs: Iterable[_Need], limits: Limits) -> Iterator[Chunk]:
    """Cut needs into chunks, in order: a span may read what an earlier span, or the same pass, has written."""
    spans: list[Span] = []
    through = Stage(0)
    room = limits.max_batched_tokens
    for need in needs:
        start = need.span.start
        while start < need.span.end:
            if spans and (need.through != through or len(spans) == limits.max_requests or room == 0):
                yield Chunk(tuple(spans), through)
                spans, room = [], limits.max_batched_tokens
            through = need.through
            end = min(need.span.end, start + room)
            spans.append(need.part(start, end))
            room -= end - start
            start = end
    if spans:
        yield Chunk(tuple(spans), through)
