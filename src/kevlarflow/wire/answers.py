"""What an answer of a node means to the core of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping

from kevlarflow.recovery import pipeline_events as core
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.ledger import StepResult
from kevlarflow.recovery.watched import LaneLeft
from kevlarflow.types import Epoch
from kevlarflow.wire import steps


def event_of(
    header: steps.AnyStepMessage, results: Mapping[tuple[Epoch, int], StepResult] | None = None
) -> core.Answer | core.ReplicasConfirmed | LaneLeft | None:
    """The core's event; None for a message that is none by itself, such as a step's result, which is in its payload.

    `results` are those that came along with `Joined`.
    """
    match header:
        case steps.Replicated(stage=stage, source=source, standby=standby, stored=stored, dropped=dropped):
            return core.ReplicasConfirmed(stage, source, standby, _replicas(stored), _replicas(dropped))
        case steps.Joined(epoch=epoch, stage=stage):
            return core.StageJoined(epoch, stage, results or {})
        case steps.Recomputed(epoch=epoch, sequence=sequence):
            return core.ChunkRecomputed(epoch, -sequence)
        case steps.Restored(epoch=epoch, stage=stage):
            return core.StageRestored(epoch, stage)
        case steps.Placed(epoch=epoch, stage=stage, missing=missing, fuller=fuller, ahead=ahead):
            return core.ReplicasPlaced(epoch, stage, _replicas(missing), _replicas(fuller), ahead)
        case steps.Flushed(epoch=epoch, stage=stage):
            return core.StageFlushed(epoch, stage)
        case steps.StepFailed(epoch=epoch, sequence=sequence, stage=stage, reason=reason):
            return core.StepBroken(epoch, sequence, stage, reason)
        case steps.Left(epoch=epoch, member=member):
            return LaneLeft(epoch, member)
    return None


def _replicas(tags: tuple[tuple[int, int, int], ...]) -> tuple[Replica, ...]:
    return tuple(Replica(*tag) for tag in tags)
