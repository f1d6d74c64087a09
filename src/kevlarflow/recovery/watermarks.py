"""What the engine knows of the replicas of its pipeline: who keeps those of each stage, and what they cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kevlarflow.recovery.coverage import Coverage, Generations, Replica, watermark
from kevlarflow.recovery.ledger import LedgerEntry
from kevlarflow.types import Member, NodeInfo, Stage


class Watermarks:
    """The standby of each stage, and its confirmed replicas."""

    def __init__(self, generations: Generations, block_size: int) -> None:
        self._generations = generations
        self._block_size = block_size
        self._standbys: dict[Stage, NodeInfo | None] = {}
        self._coverage: dict[Stage, Coverage] = {}
        self._former: dict[Stage, tuple[Member, Coverage]] = {}
        """Who was the standby before, and what it had confirmed by then; it need not have all of it any more.

        One that takes over has another one named for it at once, and may have to begin again.
        """

    def assign(self, standbys: Sequence[NodeInfo | None]) -> list[Stage]:
        """Take new standbys; returns the stages that have another than before. Those start with nothing covered."""
        changed = []
        for index, standby in enumerate(standbys):
            stage = Stage(index)
            if stage not in self._standbys or self._standbys[stage] != standby:
                before = self._standbys.get(stage)
                if before is not None:
                    self._former[stage] = (before.member, self._coverage[stage])
                self._standbys[stage] = standby
                self._coverage[stage] = Coverage()
                changed.append(stage)
        return changed

    @property
    def stages(self) -> list[Stage]:
        """Stages for which somebody, or nobody, was named."""
        return sorted(self._standbys)

    def standby_for(self, stage: Stage, serving: Member) -> NodeInfo | None:
        """The standby, unless it serves the stage itself now: the controller will name another."""
        return None if self.is_standby(stage, serving) else self._standbys[stage]

    def is_standby(self, stage: Stage, member: Member) -> bool:
        """Whether a member keeps the replicas of a stage."""
        standby = self._standbys.get(stage)
        return standby is not None and standby.member == member

    def confirm(self, stage: Stage, stored: Iterable[Replica], dropped: Iterable[Replica]) -> None:
        """The standby of a stage has stored and dropped these."""
        self._coverage[stage].confirm(stored)
        self._coverage[stage].drop(dropped)

    def drop(self, stage: Stage, member: Member, replicas: Iterable[Replica]) -> None:
        """A member that keeps, or kept, the replicas of a stage does not have these after all."""
        former, coverage = self._former.get(stage, (None, None))
        if self.is_standby(stage, member):
            self._coverage[stage].drop(replicas)
        elif coverage is not None and former == member:
            coverage.drop(replicas)

    def clear(self) -> None:
        """Nothing is known to be covered."""
        self._coverage = {stage: Coverage() for stage in self._coverage}
        self._former.clear()

    def valid(self, stage: Stage) -> dict[int, Replica]:
        """Replicas of what the blocks of the lane hold now."""
        coverage = self._coverage.get(stage)
        return coverage.valid(self._generations) if coverage is not None else {}

    def kept_by(self, member: Member, stage: Stage) -> dict[int, Replica]:
        """Replicas of what the blocks hold now that a member may have, as the stage's standby or as the one before."""
        if self.is_standby(stage, member):
            return self.valid(stage)
        former, coverage = self._former.get(stage, (None, None))
        return coverage.valid(self._generations) if coverage is not None and former == member else {}

    def of(self, stage: Stage, entries: Sequence[LedgerEntry]) -> tuple[NodeInfo | None, int, int]:
        """(standby, computed tokens of these requests, those of them that its replicas cover)."""
        valid = self.valid(stage)
        covered = sum(watermark(entry.blocks, entry.computed, valid, self._block_size) for entry in entries)
        return self._standbys.get(stage), sum(entry.computed for entry in entries), covered
