"""What the experiments about replication yield: plain data. Times are seconds, sizes bytes."""

from __future__ import annotations

import msgspec

from kevlarflow.bench.measure import LoadSummary


class Repeatable(msgspec.Struct, kw_only=True):
    """An experiment that may be gone on with: what is void is measured again."""

    attempts: list[str] = []
    """What was void before that, each in a line: it may have been the system's own doing."""


class Resumption(msgspec.Struct):
    """One kill at one length of contexts."""

    context: int
    """Prompt tokens of each stream."""
    replicated: bool
    streams: int
    number: int = 1
    """Of the round."""
    block_size: int = 0
    """Tokens of a KV block."""
    live_tokens: int = 0
    """Of all streams, at the kill."""
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    recomputed_tokens: int = 0
    longest_pause: float = 0.0
    """At the clients: from the kill to the token that ended the longest wait."""
    restored_bytes: int = 0
    copy_seconds: float = 0.0
    """A plain copy of as many bytes, block by block, from memory to memory, in the same run."""
    step_seconds: float = 0.0
    """Median wait between two tokens of a stream before the kill: what one step takes at this length."""
    void: str | None = None

    @property
    def most_recomputed(self) -> int:
        """With replication, fewer tokens than this and those of the steps in flight are to be computed again."""
        return self.streams * self.block_size


class Resume(Repeatable):
    """See `kevlarflow.bench.resume`."""

    stages: int
    flags: str = ""
    """What the clusters were started with."""
    points: list[Resumption] = msgspec.field(default_factory=list)
    void: str | None = None

    def has(self, context: int, replicated: bool, number: int) -> bool:
        """Whether this was measured already."""
        wanted = (context, replicated, number)
        return any((p.context, p.replicated, p.number) == wanted and p.void is None for p in self.points)


class CostLoad(msgspec.Struct):
    """One load without any failure, with or without replication."""

    number: int
    replicated: bool
    summary: LoadSummary | None = None
    strangers: float = 0.0
    computed_tokens: int = 0
    """Prompt and output tokens, whose KV was written."""
    full_bytes: int = 0
    """Copied as full blocks, on all stages."""
    partial_bytes: int = 0
    """Copied as partly filled blocks."""
    void: str | None = None


class ReplicationCost(Repeatable):
    """See `kevlarflow.bench.replication_cost`."""

    kv_bytes_per_token: float = 0.0
    """On all stages together."""
    loads: list[CostLoad] = msgspec.field(default_factory=list)
    void: str | None = None


class MemorySample(msgspec.Struct, frozen=True):
    """One look at a running cluster."""

    seconds: float
    """Since the load began."""
    standby_bytes: int
    """Of the fullest standby."""
    node_bytes: int
    """Resident memory of the largest node."""
    kv_blocks: int
    """That vLLM's scheduler sees; the least of all engines."""


class StandbyMemory(Repeatable):
    """See `kevlarflow.bench.standby_memory`."""

    minutes: float
    limit_bytes: int = 0
    """Of one standby."""
    stock_kv_blocks: int = 0
    """What stock vLLM's scheduler sees with the same flags."""
    requests: int = 0
    samples: list[MemorySample] = msgspec.field(default_factory=list)
    void: str | None = None


class TransferTime(msgspec.Struct, frozen=True):
    """One way to move a copy to another process, at one size."""

    transfer: str
    size: int
    round_trip_p50: float
    """From handing a copy over to its answer, one at a time."""
    round_trip_p99: float
    bytes_per_second: float
    """With as many on their way as a channel holds."""
    cpu_seconds: float
    """CPU time of both processes for each copy, while one at a time is sent."""


class Transfers(msgspec.Struct):
    """See `kevlarflow.bench.transfers`."""

    times: list[TransferTime] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)
    void: str | None = None


def begin_again(result: Resume | ReplicationCost | StandbyMemory) -> None:
    """An experiment goes on: it is not void any more, but why it was is kept."""
    if result.void is not None:
        result.attempts.append(f"ended early: {result.void}")
        result.void = None
