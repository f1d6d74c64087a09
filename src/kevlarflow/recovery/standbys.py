"""Who keeps the replicas of a lane: the node that would take it over if its own were lost now.

That is the planner's own answer with the serving node left out, so that the donor of a failure is the standby, with
the KV in its memory. Seen over all lanes of a stage it is a ring. While a lane is borrowed and its own node is back,
that node is the standby, and receives the lane's KV before it takes over.
"""

from __future__ import annotations

from kevlarflow.recovery.events import AssignStandbys
from kevlarflow.recovery.formation import candidates
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline
from kevlarflow.recovery.planner import choose
from kevlarflow.types import NodeInfo, NodeState, Stage

TELL_AGAIN_SECONDS = 1.0
"""How long it may take until a report shows the standbys that an engine was told."""


def assign(grid: Grid, pipeline: Pipeline) -> None:
    """Tell the engine when a standby has changed."""
    if not pipeline.engine.attached or (pipeline.order is None and not pipeline.formed):
        pipeline.standbys = ()
        return
    standbys = tuple(_standby(grid, pipeline, Stage(stage)) for stage in range(len(pipeline.members)))
    # A new engine has none; one that an earlier life of the controller has told may have one that is gone.
    nobody = (None,) * len(standbys) if grid.resumed_at is None else ()
    if standbys != (pipeline.standbys or nobody) or _was_lost(grid, pipeline):
        pipeline.standbys = standbys
        pipeline.standbys_told_at = grid.now
        grid.command(AssignStandbys(pipeline.id, standbys))


def _was_lost(grid: Grid, pipeline: Pipeline) -> bool:
    """Whether the engine's reports go on naming others than it was told a while ago."""
    report = pipeline.engine.report
    if report is None or not pipeline.engine.report_is_new or grid.now - pipeline.standbys_told_at < TELL_AGAIN_SECONDS:
        return False
    told = [info.member if info is not None else None for info in pipeline.standbys]
    return bool(told) and any(row.standby != told[row.stage] for row in report.replication)


def _standby(grid: Grid, pipeline: Pipeline, stage: Stage) -> NodeInfo | None:
    serving = pipeline.members[stage]
    now = pipeline.standbys[stage] if pipeline.standbys else None
    slot = grid.slot_of(now.member) if now is not None else None
    if now and slot and slot.state is NodeState.SUSPECT and slot.living and now.member != serving:
        # It is likely to be only busy, and another one would have to be sent everything again.
        return now
    standby = _choose(grid, pipeline, stage, parted=False)
    return _choose(grid, pipeline, stage, parted=True) if standby is None and pipeline.parted else standby


def _choose(grid: Grid, pipeline: Pipeline, stage: Stage, *, parted: bool) -> NodeInfo | None:
    others = [
        each
        for each in candidates(grid, pipeline, stage, besides=pipeline.members[stage], parted=parted)
        if each.info.replica_address
    ]
    return choose(others, pipeline.id, len(grid.pipelines))
