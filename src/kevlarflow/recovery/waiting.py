"""A stage without any node: its pipeline waits for a replacement, and so do its requests, up to a bound.

The bound begins when the pipeline can no longer be formed, and stops when it generates again. A second stage that is
lost meanwhile, or a replacement that dies as well, does not begin it anew: so no row of replacements that die keeps a
client waiting for ever. While a replacement takes over nobody's request is ended, even if the bound passes.

A pipeline that waits gives back what it has borrowed for its other stages, so that no two of them hold what the other
needs. It is chosen anew with the stage that it waits for.
"""

from __future__ import annotations

from kevlarflow.recovery.events import EngineReport, Suspend
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline, node_id, subject
from kevlarflow.recovery.transitions import PipelineStep
from kevlarflow.types import PipelineState, Stage

HEARING_SECONDS = 1.0
"""After a pause of the controller, once in a wait: in which what was sent to it meanwhile is read."""


def suspend(grid: Grid, pipeline: Pipeline, lacking: list[Stage]) -> None:
    """Order the engine to let its requests wait, or to end them when nothing is left of the bound."""
    bound = grid.config.replacement_wait_s
    if pipeline.wait_until is None:
        pipeline.wait_until, pipeline.wait_was_heard_out = grid.now + bound, False
    left = max(0.0, pipeline.wait_until - grid.now)
    # A tick decides that it is over: the controller may have stood still.
    waits = left > 0 or (bound > 0 and not grid.passes_deadlines)
    stage = lacking[0]
    nodes = [node_id(each.id, stage) for each in grid.pipelines]
    reason = f"no node with room is left for stage {stage} of {subject(pipeline.id)} (of {', '.join(nodes)}); "
    if bound > 0 and not waits:
        reason += f"no replacement was ready within {bound:g} s (--replacement-wait)"
    elif any(not grid.slots[node].hopeless for node in nodes):
        reason += "a replacement is being started"
    else:
        reason += "none could be started again"
    consequence = f"; its requests wait for up to {left:.0f} s" if waits else ": its requests end with an error"
    grid.step_pipeline(pipeline, PipelineStep.SUSPEND)
    pipeline.forming = pipeline.formed = pipeline.reform = False
    pipeline.relink_at = None
    pipeline.engine.report_is_new = False
    pipeline.sent_at = grid.now
    lost = tuple(pipeline.holes)
    _give_back_loans(grid, pipeline)
    epoch, losses = grid.raise_epoch(pipeline), tuple(pipeline.losses)
    pipeline.order = Suspend(pipeline.id, epoch, stage, reason, waits, lost, losses)
    line = f"{reason}{consequence}"
    grid.narrate(f"{pipeline.news}: {line}" if pipeline.news else line)
    pipeline.news = ""
    grid.command(pipeline.order)


def _give_back_loans(grid: Grid, pipeline: Pipeline) -> None:
    for stage, member in enumerate(pipeline.members):
        if member is not None and grid.slots[member.node].pipeline != pipeline.id:
            pipeline.members[stage] = None
            pipeline.leaving.add(member)
            pipeline.given_back.add(member)


def note_report(pipeline: Pipeline, report: EngineReport) -> None:
    """An engine that has heard of its suspension has left its lanes."""
    if isinstance(pipeline.order, Suspend) and report.epoch == pipeline.order.epoch:
        pipeline.leaving -= pipeline.given_back


def bound_has_passed(grid: Grid, pipeline: Pipeline) -> bool:
    """Whether requests still wait for a node though nothing is left of the bound."""
    return grid.passes_deadlines and _lets_wait(pipeline) and grid.now >= (pipeline.wait_until or 0.0)


def excuse(grid: Grid, pause: float) -> None:
    """The controller stood still: nobody was started meanwhile, and who has become ready has yet to be heard."""
    for pipeline in grid.pipelines:
        if pipeline.wait_until is None:
            continue
        pipeline.wait_until += pause
        heard = grid.now + HEARING_SECONDS
        # A short pause leaves next to nothing unread.
        is_long = pause >= HEARING_SECONDS
        if is_long and pipeline.wait_until < heard and not pipeline.wait_was_heard_out:
            pipeline.wait_until, pipeline.wait_was_heard_out = heard, True


def go_on(grid: Grid, pipeline: Pipeline, until: float | None) -> None:
    """An earlier life of the controller has let requests wait until then: but who was ready by then may be heard."""
    settled = grid.now + grid.config.timeouts.settle_ms / 1_000
    pipeline.wait_until = max(until, settled) if until is not None else None


def seconds_left(grid: Grid, pipeline: Pipeline) -> float:
    """How long requests still wait for a node; 0.0 when they do not."""
    return max(0.0, (pipeline.wait_until or 0.0) - grid.now) if _lets_wait(pipeline) else 0.0


def _lets_wait(pipeline: Pipeline) -> bool:
    order = pipeline.order
    return pipeline.state is PipelineState.WAITING and isinstance(order, Suspend) and order.waits
