"""The records of recoveries: begun with a loss or a rejoin, planned with an order, finished with its answer.

Each record is about one stage of one pipeline. Stages that come back by one order are finished by one answer.
"""

from __future__ import annotations

from kevlarflow.recovery import events
from kevlarflow.recovery.events import Recovery
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline, Slot, subject
from kevlarflow.types import Cause, Phases, RecoveryState, Stage


def begin(grid: Grid, pipeline: Pipeline, stage: Stage, cause: Cause, origin: Slot, *, detect: float = 0.0) -> None:
    """Begin a record. `detect` is the seconds from the last proof of life of `origin` until now."""
    grid.open_recovery(
        Recovery(
            id=grid.next_recovery,
            pipeline=pipeline.id,
            stage=stage,
            cause=cause,
            origin=origin.node,
            time=grid.now + grid.unix_offset,
            decided_at=grid.now,
            seconds=Phases(detect=detect),
        )
    )


def plan(grid: Grid, pipeline: Pipeline) -> None:
    """Note in the running records who takes over, and how long it took to find one."""
    for stage, recovery in pipeline.recoveries.items():
        member = pipeline.members[stage]
        recovery.target = member.node if member is not None else None
        recovery.formed_at = grid.now
        recovery.seconds = Phases(detect=recovery.seconds.detect, plan=grid.now - recovery.decided_at)


def finish(grid: Grid, pipeline: Pipeline, answer: events.Formed | None) -> None:
    """End all running records of a pipeline that generates again.

    Stages that came back by one order share its requests and tokens: each record names them all.
    Without an answer, after a restart of the controller, what the recovery cost is not known.
    """
    ended = []
    for stage in list(pipeline.recoveries):
        recovery = pipeline.recoveries[stage]
        if answer is not None:
            recovery.requests = answer.requests
            recovery.lost_requests = answer.lost_requests
            recovery.recomputed_tokens = answer.recomputed_tokens
            recovery.seconds = Phases(
                detect=recovery.seconds.detect,
                plan=recovery.seconds.plan,
                relink=answer.seconds.relink,
                restore=answer.seconds.restore,
                recompute=answer.seconds.recompute,
                reissue=answer.seconds.reissue,
            )
        ended.append(recovery)
        grid.close_recovery(pipeline, stage, RecoveryState.DONE)
    rejoined = [each.target for each in ended if each.cause is Cause.REJOIN and each.target]
    if rejoined:
        verb, lane = ("is", "its lane") if len(rejoined) == 1 else ("are", "their lanes")
        grid.narrate(f"{', '.join(rejoined)} {verb} back and took {lane} of {subject(pipeline.id)} again")
    crashed = [each for each in ended if not each.cause.is_planned]
    if crashed:
        slowest = max(each.seconds.total for each in crashed)
        last = crashed[-1]
        lost = f", {last.lost_requests:,} lost" if last.lost_requests else ""
        grid.narrate(
            f"{subject(pipeline.id)} recovered in {slowest * 1_000:,.0f} ms: "
            f"{last.requests:,} request{'s' * (last.requests != 1)}{lost}, "
            f"{last.recomputed_tokens:,} token{'s' * (last.recomputed_tokens != 1)} recomputed"
        )
