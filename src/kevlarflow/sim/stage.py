"""A toy stage: KV memory whose content can be checked, and the bookkeeping of vLLM's V1 model runner: what it knows of
each request, and the order of its batch, which is that of the rows of its activations and depends on the steps before.

The "KV" of position i at stage s is a hash of s and of the tokens up to i. Computing a position reads every slot
before it through the request's block table; a slot that does not hold exactly what it should is a `WrongKv`, the
error that in a real system would be a silently wrong token. The next token is a hash of all tokens before it. It takes
one draw, and a random generator is how many it has made: one that is not where the output is, is a `WrongDraw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kevlarflow.recovery.ledger import LedgerEntry, Step, StepResult
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.sim.errors import WrongBlocks, WrongDraw, WrongKv, WrongTokens

VOCABULARY = 50
GARBAGE = -7
"""What is computed from wrong KV."""
# The hash of a tuple of integers is the same in every process; only that of strings is salted.


def next_token(tokens: Sequence[int]) -> int:
    """What the toy model generates after `tokens`."""
    return hash((-1, *tokens)) % VOCABULARY


@dataclass
class Memory:
    """KV memory of one lane of a node: it survives a re-forming, and is garbage on a new node."""

    stage: int
    block_size: int
    blocks: dict[int, list[int | None]] = field(default_factory=dict)
    usable: frozenset[int] | None = None
    """Blocks that the lane has memory for; None: all."""

    def restrict(self, usable: frozenset[int] | None) -> None:
        """Give the memory of all other blocks away."""
        self.usable = usable
        self.blocks = {block: held for block, held in self.blocks.items() if usable is None or block in usable}

    def write(self, blocks: Sequence[int], start: int, end: int, contents: Sequence[int]) -> None:
        """Store the KV of positions `start` to `end`. Raises `WrongBlocks` where the lane has no memory."""
        size = self.block_size
        for index in range(start // size, -(-end // size)):
            first = index * size
            if self.usable is not None and blocks[index] not in self.usable:
                raise WrongBlocks(f"block {blocks[index]} is not among {sorted(self.usable)}")
            held = self.blocks.setdefault(blocks[index], [None] * size)
            low, high = max(start, first), min(end, first + size)
            held[low - first : high - first] = contents[low:high]

    def check(self, request: str, blocks: Sequence[int], end: int, contents: Sequence[int]) -> None:
        """Read all positions before `end`; raise `WrongKv` unless each holds what it should."""
        for first in range(0, end, self.block_size):
            block = blocks[first // self.block_size]
            expected = contents[first : first + self.block_size]
            if self.blocks.get(block, [])[: len(expected)] != expected:
                raise WrongKv(f"{request} reads block {block} from position {first} at stage {self.stage}: not its KV")

    def read(self, block: int) -> tuple[int | None, ...]:
        """Everything in a block, as a copy; None where nothing was ever written."""
        return tuple(self.blocks.get(block, [None] * self.block_size))

    def place(self, block: int, content: Sequence[int | None]) -> None:
        """Put a copied block in place of whatever is there."""
        self.blocks[block] = list(content)

    def contents(self, tokens: Sequence[int], end: int) -> list[int]:
        """What positions 0 to `end` should hold: each a hash of the stage and all tokens up to it."""
        content = self.stage
        contents = []
        for token in tokens[:end]:
            content = hash((content, token))
            contents.append(content)
        return contents


class LaneMemory(Memory):
    """What one lane sees of a node's memory: its blocks, wherever they are."""

    def __init__(self, physical: Memory) -> None:
        super().__init__(physical.stage, physical.block_size, physical.blocks)
        self.table: Sequence[int] = ()

    def write(self, blocks: Sequence[int], start: int, end: int, contents: Sequence[int]) -> None:
        """See `Memory.write`. Raises `WrongBlocks` where the lane has no memory."""
        mapped = [self.table[block] for block in blocks]
        if 0 in mapped[start // self.block_size : -(-end // self.block_size)]:
            raise WrongBlocks(f"positions {start} to {end} in blocks {blocks}: the lane has {self.table}")
        super().write(mapped, start, end, contents)

    def check(self, request: str, blocks: Sequence[int], end: int, contents: Sequence[int]) -> None:
        """See `Memory.check`."""
        super().check(request, [self.table[block] for block in blocks], end, contents)

    def read(self, block: int) -> tuple[int | None, ...]:
        """See `Memory.read`."""
        return super().read(self.table[block])


@dataclass
class Running:
    """A request as a worker keeps it."""

    tokens: list[int]
    prompt_length: int
    blocks: list[int]
    computed: int
    draws: int = 0
    """How often its random generator was used."""


@dataclass
class ToyStage:
    """A worker: applies the differences that steps carry, and computes. `aborted` requests may read anything."""

    memory: Memory
    is_last: bool
    aborted: set[str]
    requests: dict[str, Running] = field(default_factory=dict)
    batch: list[str | None] = field(default_factory=list)
    """The requests of the last step, in the order of their rows; None is a gap."""
    output: dict[str, list[int]] = field(default_factory=dict)
    """What the last step has passed on, in the order of its rows: the KV of its tokens stands for it."""
    decoded: tuple[int, int] | None = None
    """Size of the last step, as `node.pace.size_of` has it."""

    def use_blocks(self, table: Sequence[int]) -> None:
        """See `LaneRunner.use_blocks`."""
        assert isinstance(self.memory, LaneMemory)
        self.memory.table = table

    def reset(self) -> None:
        """Forget requests, keep KV."""
        self.requests.clear()
        self.batch.clear()

    def restore(self, entries: Sequence[LedgerEntry]) -> None:
        """Rebuild requests."""
        for entry in entries:
            self.requests[entry.request] = Running(
                list(entry.tokens),
                len(entry.prompt),
                list(entry.blocks),
                entry.computed,
                int.from_bytes(entry.generator or b"", "big"),
            )

    def recompute(self, chunk: Chunk) -> None:
        """Write the KV of a chunk."""
        contents = [self.memory.contents(span.tokens, span.end) for span in chunk.spans]
        for span, content in zip(chunk.spans, contents, strict=True):
            self.memory.write(span.blocks, span.start, span.end, content)
        for span, content in zip(chunk.spans, contents, strict=True):
            self.memory.check(span.request, span.blocks, span.end, content)

    def execute(self, step: Step, known_tokens: dict[str, list[int]]) -> StepResult:
        """Run a step; `known_tokens` are all tokens that the scheduler knows of each scheduled request."""
        self._note(step, known_tokens)
        self.decoded = self._size(step)
        self.output = {}
        batch = [request for request in self.batch if request is not None]
        for request in batch:
            self._write(request, step.scheduled[request])
        # A request may read what another one writes in the same step.
        for request in sorted(batch, key=lambda each: each not in self.aborted):
            self._check(request, step.scheduled[request])
        sampled = {request: self._sample(self.requests[request], step.scheduled[request]) for request in batch}
        generators = {r: self.requests[r].draws.to_bytes(4, "big") for r, tokens in sampled.items() if tokens}
        return StepResult(sampled, generators, output=sampled)

    def follow(self, step: Step, known_tokens: dict[str, list[int]]) -> None:
        """See `LaneRunner.follow`.

        What the step has written need not be there any more: a later one may have taken blocks that it had.
        """
        self._note(step, known_tokens)
        self.output = {}
        for request in filter(None, self.batch):
            running, count = self.requests[request], step.scheduled[request]
            running.computed += count
            self.output[request] = self.memory.contents(running.tokens, running.computed)[-count:]

    def _note(self, step: Step, known_tokens: dict[str, list[int]]) -> None:
        for request in step.finished:
            self.requests.pop(request, None)
        for admission in step.admissions:
            self.requests[admission.request] = Running(
                list(admission.prompt), len(admission.prompt), list(admission.blocks), admission.computed
            )
        for going_on in step.continuations:
            running = self.requests[going_on.request]
            running.computed = going_on.computed
            running.blocks = [*([] if going_on.resumed else running.blocks), *going_on.new_blocks]
        self._batch_anew(step)
        for request in step.scheduled:
            running = self.requests[request]
            if not self.is_last:
                running.tokens = list(known_tokens[request])
            elif len(running.tokens) < len(known_tokens[request]):
                raise WrongTokens(f"{request} has {running.tokens} where it is sampled, of {known_tokens[request]}")

    def _batch_anew(self, step: Step) -> None:
        """As `GPUModelRunner._update_states` does it: newcomers fill the gaps, then the last ones do."""
        staying = step.scheduled.keys() - {each.request for each in step.continuations if each.resumed}
        self.batch = [request if request in staying else None for request in self.batch]
        new = [each.request for each in step.admissions] + [each.request for each in step.continuations]
        for request in new:
            if request in self.batch:
                continue
            if None in self.batch:
                self.batch[self.batch.index(None)] = request
            else:
                self.batch.append(request)
        while None in self.batch:
            last = self.batch.pop()
            if last is not None:
                self.batch[self.batch.index(None)] = last

    def _size(self, step: Step) -> tuple[int, int] | None:
        if not step.scheduled or max(step.scheduled.values()) > 1:
            return None
        context = sum([self.requests[request].computed for request in step.scheduled])
        return len(step.scheduled).bit_length(), context.bit_length()

    def _write(self, request: str, count: int) -> None:
        running = self.requests[request]
        end = running.computed + count
        contents = self.memory.contents(running.tokens, end)
        self.memory.write(running.blocks, running.computed, end, contents)
        self.output[request] = contents[running.computed :]

    def _check(self, request: str, count: int) -> None:
        """What a request computes is right if what it reads is; what nobody waits for may be wrong, and so may that."""
        running = self.requests[request]
        start, end = running.computed, running.computed + count
        try:
            self.memory.check(request, running.blocks, end, self.memory.contents(running.tokens, end))
        except WrongKv:
            if request not in self.aborted:
                raise
            self.memory.write(running.blocks, start, end, [GARBAGE] * count)

    def _sample(self, running: Running, count: int) -> list[int]:
        running.computed += count
        if not self.is_last or running.computed < len(running.tokens):
            return []
        outputs = len(running.tokens) - running.prompt_length
        if running.draws != outputs:
            raise WrongDraw(f"a request has {outputs} output tokens, and its random generator made {running.draws}")
        running.draws += 1
        token = next_token(running.tokens)
        running.tokens.append(token)
        return [token]
