"""How many lanes share the KV memory of a pipeline's nodes: the rule by which capacities shrink and grow back.

A node has KV memory for one lane. While it serves k pipelines, each of them keeps to 1/k of its blocks, and so, since a
pipeline uses the same blocks on all its nodes, does everything behind the busiest one. A pipeline that has to make room
is told at once, in the same breath as the one that moves in; room that is given back is handed out when the lane that
had it is known to be gone.
"""

from __future__ import annotations

from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline
from kevlarflow.types import EngineState, Epoch, PipelineId


def shares(grid: Grid, pipeline: Pipeline) -> int:
    """Lanes on the busiest node of a pipeline, its own included; those without an engine need no room."""
    others = [other for other in grid.pipelines if not _is_orphaned(other)]
    members = [member for member in pipeline.members if member is not None]
    return max([sum([each.has_lane_on(member) for each in others]) for member in members], default=1)


def orphans(grid: Grid, pipeline: Pipeline) -> tuple[tuple[PipelineId, Epoch], ...]:
    """Lanes on its nodes whose engine has gone: nobody else can tell the nodes to give them up."""
    gone = [each for each in grid.pipelines if each is not pipeline and _is_orphaned(each)]
    if not gone:
        return ()
    members = {member for member in pipeline.members if member is not None}
    return tuple((each.id, each.epoch) for each in gone if not members.isdisjoint(each.lanes))


def _is_orphaned(pipeline: Pipeline) -> bool:
    """Whether its engine was seen to end. One that has not spoken since the controller's restart may be at work."""
    return not pipeline.engine.attached and pipeline.engine.state is EngineState.DEAD
