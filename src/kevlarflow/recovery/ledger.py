"""The ledger: every live request of one engine as of its last completed step.

vLLM's scheduler tells workers only differences: a request is described once, then each step says which blocks
were added and how many tokens it computes. So a node that joins in mid-stream cannot follow. The ledger folds
the same differences together on the engine's side, one completed step after another, and can at any moment say
what a worker has to know: tokens, blocks, tokens computed, sampler state. Steps that were issued and have not
completed are kept beside it, in order; to recover is to restore the ledger on new nodes and issue them again.

The scheduler's objects are vLLM's, so the executor translates them into `Step` and `StepResult` first; nothing
here knows vLLM. Block lists are copied on the way in, because vLLM goes on appending to its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kevlarflow.errors import ProtocolViolation


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A request as a step first schedules it."""

    request: str
    prompt: Sequence[int]
    blocks: Sequence[int]
    """KV block ids, those of the prefix hit first."""
    computed: int
    """Tokens of the prefix hit; their KV is in the first blocks already."""
    sampling: Any
    """vLLM's sampling parameters; opaque here."""
    prompt_logprobs: bool = False
    """Whether the client asked for log-probabilities of the prompt."""


@dataclasses.dataclass(frozen=True, slots=True)
class Continuation:
    """A known request as a later step schedules it."""

    request: str
    resumed: bool
    """Resumed from preemption: `new_blocks` replaces its blocks; otherwise they are appended."""
    new_blocks: Sequence[int]
    computed: int
    """Tokens computed before this step."""
    outputs: int
    """Output tokens that the scheduler counts before this step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One scheduler output, numbered by the executor."""

    sequence: int
    admissions: tuple[Admission, ...]
    continuations: tuple[Continuation, ...]
    scheduled: Mapping[str, int]
    """Tokens that each request computes in this step."""
    finished: frozenset[str]
    """Requests that ended between the step before and this one."""
    preempted: frozenset[str]
    """Requests that lost all their blocks while this step was scheduled."""
    formation: int = 0
    """How often the pipeline had been formed when the scheduler began this step (see `Pipeline.issue`)."""
    void: frozenset[int] = frozenset()
    """Blocks that the step gave to requests that were set aside since: some stages may have written them."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a completed step adds to the ledger."""

    tokens: Mapping[str, Sequence[int]]
    """Sampled tokens of each request; empty while its prompt is not finished."""
    generators: Mapping[str, bytes]
    """State of the random generator of each seeded request that sampled."""
    output: Any = None
    """What the scheduler is given of it: vLLM's own output, opaque here."""


@dataclasses.dataclass(slots=True)
class LedgerEntry:
    """A live request, as a worker has to know it."""

    request: str
    prompt: list[int]
    output: list[int]
    blocks: list[int]
    computed: int
    """Tokens whose KV is in `blocks`."""
    sampling: Any
    generator: bytes | None = None
    """State of the random generator; None before the first sampled token, or when the request has no seed."""
    prompt_logprobs: bool = False
    """Whether prompt log-probabilities are still owed: they are delivered with the prompt's last chunk."""

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.prompt + self.output


class Ledger:
    """Folds completed steps; see the module's text."""

    def __init__(self) -> None:
        self._entries: dict[str, LedgerEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: str) -> bool:
        return request in self._entries

    def __getitem__(self, request: str) -> LedgerEntry:
        return self._entries[request]

    def entries(self) -> Iterable[LedgerEntry]:
        """Live requests, oldest first."""
        return self._entries.values()

    def copies(self) -> tuple[LedgerEntry, ...]:
        """The entries as they are now, oldest first; what happens later does not change them."""
        return tuple(
            dataclasses.replace(each, prompt=list(each.prompt), output=list(each.output), blocks=list(each.blocks))
            for each in self._entries.values()
        )

    def clear(self) -> None:
        """Forget all requests: they have been ended."""
        self._entries.clear()

    def preempt(self, requests: Iterable[str]) -> None:
        """These lose all their blocks."""
        for request in requests:
            entry = self._entries.get(request)
            if entry is not None:
                entry.blocks, entry.computed = [], 0

    def complete(self, step: Step, result: StepResult) -> None:
        """Fold a completed step. Raises `ProtocolViolation` when it speaks of a request that is not known."""
        self._drop(step)
        for admission in step.admissions:
            self._admit(admission)
        for continuation in step.continuations:
            self._continue(continuation)
        for request, count in step.scheduled.items():
            entry = self._entry(request, step)
            entry.computed += count
            self._sampled(entry, result)

    def _entry(self, request: str, step: Step) -> LedgerEntry:
        try:
            return self._entries[request]
        except KeyError:
            raise ProtocolViolation(
                f"step {step.sequence} schedules {request}, which the ledger does not hold"
            ) from None

    def _drop(self, step: Step) -> None:
        for request in step.finished:
            self._entries.pop(request, None)
        self.preempt(step.preempted)

    def _admit(self, admission: Admission) -> None:
        self._entries[admission.request] = LedgerEntry(
            request=admission.request,
            prompt=list(admission.prompt),
            output=[],
            blocks=list(admission.blocks),
            computed=admission.computed,
            sampling=admission.sampling,
            prompt_logprobs=admission.prompt_logprobs,
        )

    def _continue(self, continuation: Continuation) -> None:
        entry = self._entries.get(continuation.request)
        if entry is None:
            raise ProtocolViolation(f"{continuation.request} goes on, but the ledger does not hold it")
        if continuation.outputs > len(entry.output):
            raise ProtocolViolation(
                f"{continuation.request} goes on behind {continuation.outputs} output tokens, "
                f"but the ledger knows of {len(entry.output)}"
            )
        if continuation.resumed:
            entry.blocks = list(continuation.new_blocks)
        else:
            entry.blocks.extend(continuation.new_blocks)
        entry.computed = continuation.computed
        del entry.output[continuation.outputs :]

    @staticmethod
    def _sampled(entry: LedgerEntry, result: StepResult) -> None:
        tokens = result.tokens.get(entry.request, ())
        entry.output.extend(tokens)
        if tokens:
            entry.prompt_logprobs = False
        entry.generator = result.generators.get(entry.request, entry.generator)
