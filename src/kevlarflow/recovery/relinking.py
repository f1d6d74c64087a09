"""What is done about a pipeline that stands still: it is formed anew with the nodes it has, or without one of them.

The first times nobody is blamed: what was lost is sent again, over links that are made anew. If that has not helped
`MOST_RELINKS` times in a row, some link stays broken, or breaks again and again, though both ends live.
Then the node at one of its ends gives this lane to another node, for `parted_ms` at first, and twice as long after each
further time. Which link it is need not be known: the engine says which nodes do not answer to it. If all do, work is
lost on its way from stage to stage, and the stages are tried in turn, the first last: one in the middle has two links
to others. If none does, each link may be broken or the engine cut off from everybody; then it costs little to have
tried the others. A node that is left out goes on serving its other lanes, and is taken again when there is nobody else.
"""

from __future__ import annotations

from kevlarflow.recovery import records
from kevlarflow.recovery.formation import candidates, form
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline
from kevlarflow.recovery.planner import choose
from kevlarflow.types import Cause, NodeInfo, PipelineState, Stage

MOST_RELINKS = 3
"""So many times a pipeline is formed anew with the same nodes, without being well for a while in between."""
LONGEST_PARTED_SECONDS = 3_600.0
"""The longest for which a node is left out. What is further back than this is forgotten."""


def reconcile(grid: Grid, pipeline: Pipeline) -> None:
    """Form the pipeline anew if the time for that has come."""
    if pipeline.relink_at is None or pipeline.holes:
        return
    if not pipeline.engine.attached or pipeline.engine.claim is not None:
        return
    stage, instead = _suspects(pipeline)[0], None
    if pipeline.relinked_in_vain >= MOST_RELINKS:
        stage, instead = _find_another_way(grid, pipeline) or (stage, None)
    # Where there was no other node before, one that comes is not kept waiting.
    has_come = instead is not None and pipeline.relinked_in_vain > MOST_RELINKS
    if grid.now < pipeline.relink_at and not has_come:
        return
    pipeline.news = pipeline.relink_news
    if instead is None:
        # What runs already is the same trouble.
        if not pipeline.recoveries:
            _begin_record(grid, pipeline, stage)
        pipeline.relinked.append(grid.now)
        pipeline.relinked_in_vain += 1
        form(grid, pipeline, {}, Cause.LINK)
    else:
        if stage not in pipeline.recoveries:
            _begin_record(grid, pipeline, stage)
        pipeline.news += f", and {pipeline.relinked_in_vain} times shortly before"
        _part(grid, pipeline, stage)
        form(grid, pipeline, {stage: instead}, Cause.LINK)


def _suspects(pipeline: Pipeline) -> list[Stage]:
    """Stages at an end of the broken link, perhaps; the likeliest first."""
    if pipeline.relink_stages:
        return list(pipeline.relink_stages)
    return [*map(Stage, range(1, len(pipeline.members))), Stage(0)]


def _find_another_way(grid: Grid, pipeline: Pipeline) -> tuple[Stage, NodeInfo] | None:
    """A suspect and who could serve in its place; None when there is nobody."""
    suspects = _suspects(pipeline)
    # Who was brought in for this is the last to be blamed.
    parted = {member.node for member in pipeline.parted}
    suspects.sort(key=lambda stage: grid.home(pipeline, stage).node in parted)
    for stage in suspects:
        others = candidates(grid, pipeline, stage, besides=pipeline.members[stage])
        info = choose(others, pipeline.id, len(grid.pipelines))
        if info is not None:
            return stage, info
    return None


def _begin_record(grid: Grid, pipeline: Pipeline, stage: Stage) -> None:
    """For people, who see nothing else of it."""
    member = pipeline.members[stage]
    if pipeline.state is not PipelineState.STARTING and member is not None:
        since = grid.now - pipeline.relink_since
        records.begin(grid, pipeline, stage, Cause.LINK, grid.slots[member.node], detect=since)


def _part(grid: Grid, pipeline: Pipeline, stage: Stage) -> None:
    """Leave out who serves a stage now; after that it is tried again."""
    member = pipeline.members[stage]
    assert member is not None, "a stage without a node has no link"
    pipeline.cause = Cause.LINK
    pipeline.relinked.clear()
    pipeline.relinked_in_vain = 0
    before = sum(
        each.cause is Cause.LINK
        and (each.pipeline, each.origin) == (pipeline.id, member.node)
        and each.target not in (None, each.origin)
        and grid.now - each.decided_at < LONGEST_PARTED_SECONDS
        for each in grid.recoveries
    )
    seconds = grid.config.timeouts.parted_ms / 1_000 * 2**before
    pipeline.parted[member] = grid.now + min(LONGEST_PARTED_SECONDS, seconds)
