"""Where a pipeline stands, and how far its forming has come: which answers are awaited, and when each part was done."""

from __future__ import annotations

import dataclasses
import enum

from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.pipeline_events import ChunkRecomputed, StageJoined, StageRestored
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.types import Epoch, Phases, Stage

MAX_FAILURES = 2
"""How often in a row work that is for no request in particular, such as a `Restore`, may fail before all requests end.
The first failure leads to another try, the second to another node: what fails there as well would fail everywhere."""


class Standing(enum.StrEnum):
    """Where a pipeline stands; see `recovery.pipeline`."""

    UNFORMED = "unformed"
    FORMING = "forming"
    SERVING = "serving"
    WAITING = "waiting"
    SUSPENDED = "suspended"


@dataclasses.dataclass(slots=True)
class Forming:
    """How far the current forming has come. Times are monotonic seconds."""

    ordered_at: float
    requests: int
    to_join: set[Stage]
    to_restore: set[Stage]
    recomputed_tokens: int = 0
    chunks: dict[int, Chunk] = dataclasses.field(default_factory=dict)
    first_step: int | None = None
    """The first step with tokens that was issued again, if any."""
    lost: frozenset[Stage] = frozenset()
    to_place: set[Stage] = dataclasses.field(default_factory=set)
    """Stages whose answer about replicas is awaited; until then nothing is planned and no step goes out."""
    to_hear: Epoch | None = None
    """The epoch in which steps were last sent, until the node of the last stage has said which of them it has sampled.

    It may have been in the middle of one when the order came: until then nothing is planned, nor does a step go out.
    """
    late: dict[int, frozenset[Stage]] = dataclasses.field(default_factory=dict)
    """Steps that came while the plan waited, with the stages that an earlier forming lost and that lack their hits."""
    placed: dict[Stage, dict[int, Replica]] = dataclasses.field(default_factory=dict)
    later: set[int] = dataclasses.field(default_factory=set)
    """Blocks that `PlaceRest` is for."""
    joined_at: float | None = None
    placed_at: float | None = None
    recomputed_at: float | None = None
    restored_at: float | None = None

    @property
    def waits(self) -> bool:
        """Whether the plan has to wait for what a node has yet to say."""
        return bool(self.to_place) or self.to_hear is not None

    @property
    def prepared(self) -> bool:
        """Whether every node has done all that comes before the steps in flight."""
        return not (self.to_place or self.to_join or self.to_restore or self.chunks)

    @property
    def awaited(self) -> tuple[Stage, ...]:
        """Stages whose nodes have yet to answer: those that have not even opened the lane, if there are any."""
        return tuple(sorted(self.to_join or self.to_place or self.to_restore))

    def placed_on(self, stages: set[Stage]) -> dict[Stage, dict[int, Replica]]:
        """What the nodes of these stages have put in place by now."""
        return {
            stage: {block: each for block, each in replicas.items() if block not in self.later}
            for stage, replicas in self.placed.items()
            if stage in stages and stage not in self.to_place
        }

    def may_run(self, stage: Stage) -> bool:
        """Whether the node of a stage may be running steps: it and all before it are prepared."""
        return all(each > stage for each in self.to_restore)

    def next_chunk(self) -> Chunk | None:
        """The oldest chunk that is not known to be done."""
        return self.chunks[min(self.chunks)] if self.chunks else None

    def phases(self, now: float) -> Phases:
        """Where the time went."""
        joined = self.joined_at or self.ordered_at
        placed = max(joined, self.placed_at or joined)
        recomputed = max(placed, self.recomputed_at or placed)
        restored = max(recomputed, self.restored_at or recomputed)
        return Phases(
            relink=joined - self.ordered_at,
            restore=(placed - joined) + (restored - recomputed),
            recompute=recomputed - placed,
            reissue=now - restored,
        )

    def note(self, event: StageJoined | ChunkRecomputed | StageRestored, now: float) -> None:
        """A node has answered."""
        match event:
            case StageJoined(stage=stage):
                self.to_join.discard(stage)
                if not self.to_join and self.joined_at is None:
                    self.joined_at = now
            case ChunkRecomputed(sequence=sequence):
                self.chunks.pop(sequence, None)
                if not self.chunks and self.recomputed_at is None:
                    self.recomputed_at = now
            case StageRestored(stage=stage):
                self.to_restore.discard(stage)
                if not self.to_restore and self.restored_at is None:
                    self.restored_at = now
