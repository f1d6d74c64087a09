"""Lanes that move though nobody died: home to a node that is back, or away from one that has to go.

Such a move is the same forming that a loss calls for, but there is time to choose its moment. The node that a lane is
to move to is its standby already (`kevlarflow.recovery.standbys` names the same one), so the lane's KV arrives there
while requests go on, and the reports of the engine say how much is missing. What is missing at the moment of the move
is recomputed while the streams wait. So a lane is moved in three strides:

    wanted ── little is missing ──► hastened: every token is copied at once ── next to nothing is missing ──► moved

A quiet engine skips both strides, since it has nothing to copy; and `move_patience_ms` after it became possible a
lane moves in any case: without replication that is the only way under load. Where the new node comes nearer all the
time, over a slow link, it is waited for longer, since to compute what it lacks is a pause for all streams; but not if
the lane goes home and requests wait for room, which two pipelines that share a node lack more of. Stages of one
pipeline that want to move wait for one another within that time, because each move is a pause. It does not begin anew
when the new node is silent for a moment, in which nothing moves to it, or when the pipeline is formed once more with
the nodes that it has.
"""

from __future__ import annotations

from kevlarflow.recovery import records
from kevlarflow.recovery.events import Hasten
from kevlarflow.recovery.formation import candidates, form
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Move, Pipeline
from kevlarflow.recovery.planner import choose
from kevlarflow.types import Cause, LaneCoverage, NodeInfo, NodeState, PipelineState, Stage

HASTEN_LAG_TOKENS = 512
"""With no more than this many tokens missing a lane is hastened: the standby then catches up within a second."""
NEARER_SHARE = 0.1
"""A new node that lacks less than before by at least this share has come nearer."""
MOST_PATIENCE = 8
"""So many times as long it is waited for that, at most."""
PRESSED_SECONDS = 1.0
"""After which it is more than a moment that requests wait for room."""
MOVE_LAG_TOKENS = 2
"""For each running request so many tokens may be missing when the lane moves: about one step."""


def reconcile(grid: Grid, pipeline: Pipeline) -> None:
    """Note which lanes of the pipeline are to move; move them when their moment has come."""
    if pipeline.state is not PipelineState.SERVING or not pipeline.formed:
        if pipeline.holes or pipeline.unrestored:
            pipeline.moves.clear()
        return
    _note_wishes(grid, pipeline)
    if not pipeline.moves:
        return
    _note_progress(grid, pipeline)
    _hasten(grid, pipeline)
    movable = {stage: move for stage, move in pipeline.moves.items() if not _is_suspect(grid, move)}
    if movable and _is_the_moment(grid, pipeline, movable):
        _move(grid, pipeline, movable)


def excuse(grid: Grid, pause: float) -> None:
    """The controller stood still: how near new nodes have come, and who still waits for room, has yet to be heard."""
    for pipeline in grid.pipelines:
        for move in pipeline.moves.values():
            move.since = min(grid.now, move.since + pause)
            move.nearer_at = min(grid.now, move.nearer_at + pause)
        if pipeline.engine.pressed_since is not None:
            pipeline.engine.pressed_since = grid.now


def _note_wishes(grid: Grid, pipeline: Pipeline) -> None:
    for stage in map(Stage, range(len(pipeline.members))):
        move = pipeline.moves.get(stage)
        if _is_well(grid, pipeline, stage):
            pipeline.moves.pop(stage, None)
            continue
        if move is not None and _is_suspect(grid, move):
            # It is likely to be only busy: `recovery.standbys` keeps it as well.
            continue
        wish = _wish(grid, pipeline, stage)
        if wish is None:
            pipeline.moves.pop(stage, None)
        elif move is None or move.target != wish[0]:
            target, cause = wish
            pipeline.moves[stage] = Move(target, cause, pipeline.epoch, since=grid.now, nearer_at=grid.now)
        elif move.epoch != pipeline.epoch:
            # It was formed anew, with the same nodes: what is missing then, and that it is near, has to be said again.
            pipeline.moves[stage] = Move(*wish, pipeline.epoch, since=move.since, nearer_at=grid.now)


def _is_well(grid: Grid, pipeline: Pipeline, stage: Stage) -> bool:
    """Whether a lane is where it belongs, or nowhere."""
    member = pipeline.members[stage]
    if member is None:
        return True
    slot = grid.slots[member.node]
    return slot.emptied_for is None and slot.pipeline == pipeline.id


def _is_suspect(grid: Grid, move: Move) -> bool:
    slot = grid.slot_of(move.target.member)
    return slot is not None and slot.state is NodeState.SUSPECT and slot.living


def _wish(grid: Grid, pipeline: Pipeline, stage: Stage) -> tuple[NodeInfo, Cause] | None:
    """Where a lane that is not well where it is should be, and why; None when nobody can have it."""
    member = pipeline.members[stage]
    assert member is not None, "a stage without a node has no lane to move"
    slot = grid.slots[member.node]
    target = choose(candidates(grid, pipeline, stage, besides=member), pipeline.id, len(grid.pipelines))
    if target is None and slot.emptied_for is not None:
        # Who was left out is taken again where there is nobody else.
        others = candidates(grid, pipeline, stage, besides=member, parted=True)
        target = choose(others, pipeline.id, len(grid.pipelines))
    if target is None:
        return None
    if grid.slots[target.member.node].pipeline == pipeline.id:
        return target, Cause.REJOIN
    return (target, slot.emptied_for) if slot.emptied_for is not None else None


def _note_progress(grid: Grid, pipeline: Pipeline) -> None:
    for stage, move in pipeline.moves.items():
        missing = _missing_tokens(pipeline, stage, move)
        if missing is None:
            continue
        if move.fewest_missing is None:
            move.fewest_missing = missing
        elif missing < move.fewest_missing and missing <= (1 - NEARER_SHARE) * move.fewest_missing:
            move.fewest_missing, move.nearer_at = missing, grid.now
        if missing <= _tolerable_tokens(pipeline):
            # It cannot come any nearer, and waits for the others.
            move.nearer_at = grid.now


def _hasten(grid: Grid, pipeline: Pipeline) -> None:
    """Tell the engine of stages whose standbys have nearly caught up."""
    near = []
    for stage, move in pipeline.moves.items():
        missing = _missing_tokens(pipeline, stage, move)
        if not move.hastened and missing is not None and 0 < missing <= HASTEN_LAG_TOKENS:
            move.hastened = True
            near.append(stage)
    if near:
        grid.command(Hasten(pipeline.id, pipeline.epoch, tuple(near)))


def _is_the_moment(grid: Grid, pipeline: Pipeline, movable: dict[Stage, Move]) -> bool:
    """Whether all lanes that want to move can do so with next to no loss, or one of them has waited long enough."""
    if pipeline.engine.quiet or (len(movable) == len(pipeline.moves) and _all_have_arrived(pipeline)):
        return True
    return grid.passes_deadlines and _is_overdue(grid, pipeline, movable)


def _all_have_arrived(pipeline: Pipeline) -> bool:
    lags = [_missing_tokens(pipeline, stage, move) for stage, move in pipeline.moves.items()]
    return all(lag is not None and lag <= _tolerable_tokens(pipeline) for lag in lags)


def _is_overdue(grid: Grid, pipeline: Pipeline, movable: dict[Stage, Move]) -> bool:
    patience = grid.config.timeouts.move_patience_ms / 1_000
    is_pressed = _is_pressed(grid, pipeline)
    for move in movable.values():
        # Only a lane that goes home gives room; any other takes some.
        longest = patience if is_pressed and move.cause is Cause.REJOIN else MOST_PATIENCE * patience
        if grid.now - move.nearer_at >= patience or grid.now - move.since >= longest:
            return True
    return False


def _tolerable_tokens(pipeline: Pipeline) -> int:
    """So many tokens may be missing when a lane moves."""
    report = pipeline.engine.report
    return MOVE_LAG_TOKENS * report.running if report is not None else 0


def _is_pressed(grid: Grid, pipeline: Pipeline) -> bool:
    """Whether requests wait for room, in this pipeline or in one that it shares a node with."""
    if pipeline.shares == 1:
        # They wait because no more may run at once.
        return False
    sharing = [each for each in grid.pipelines if each is pipeline or any(map(each.has_lane_on, pipeline.lanes))]
    since = [each.engine.pressed_since for each in sharing]
    return any(each is not None and grid.now - each >= PRESSED_SECONDS for each in since)


def _missing_tokens(pipeline: Pipeline, stage: Stage, move: Move) -> int | None:
    """Tokens whose KV the lane's new node lacks; None when nobody knows: a report may be older than the standby."""
    lane = _coverage(pipeline, stage)
    if lane is None or lane.standby != move.target.member:
        return None
    return lane.live_tokens - lane.covered_tokens


def _coverage(pipeline: Pipeline, stage: Stage) -> LaneCoverage | None:
    engine = pipeline.engine
    rows = engine.report.replication if engine.report is not None and engine.report_is_new else ()
    return next((row for row in rows if row.stage == stage), None)


def _move(grid: Grid, pipeline: Pipeline, movable: dict[Stage, Move]) -> None:
    """All in one go."""
    chosen = {stage: move.target for stage, move in movable.items()}
    cause = next(iter(movable.values())).cause
    for stage, move in movable.items():
        member = pipeline.members[stage]
        assert member is not None, "a stage without a node has no lane to move"
        records.begin(grid, pipeline, stage, move.cause, grid.slots[member.node])
    pipeline.moves.clear()
    pipeline.cause = cause
    form(grid, pipeline, chosen, cause)
