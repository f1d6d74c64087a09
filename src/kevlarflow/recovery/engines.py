"""What becomes of engines: introduced, ready, reporting, silent, lost.

An engine that reports hears again what it has missed. One that does not is shown, and killed when that lasts, so that
it is started again. What its pipeline does about it is decided in `recovery.formation`.
"""

from __future__ import annotations

from kevlarflow.recovery import events, formation, standstill, waiting
from kevlarflow.recovery.events import KillEngine
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import NO_EPOCH, Pipeline, subject
from kevlarflow.recovery.transitions import PipelineStep
from kevlarflow.types import Cause, EngineState, Epoch, RecoveryState

RESEND_SECONDS = 1.0
"""How long an order may take to reach its engine before it is sent again."""


def on_attached(grid: Grid, event: events.EngineAttached) -> None:
    """An engine is there: fresh, or still at work, or the same one again."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is None:
        return
    pipeline.epoch = Epoch(max(pipeline.epoch, event.epoch))
    engine = pipeline.engine
    engine.heard_at = grid.now
    again = engine.attached and engine.pid == event.pid
    if again and pipeline.order is not None:
        if event.epoch < pipeline.order.epoch:
            # The order has not reached it. It knows by the epoch should it come twice.
            grid.command(pipeline.order)
        pipeline.reform = pipeline.reform or event.epoch > pipeline.order.epoch
        return
    if again and pipeline.formed and engine.claim is None:
        # Taken over already: asked twice for an introduction, it answers twice.
        return
    if not again:
        if engine.attached or engine.pid != event.pid:
            _detach(grid, pipeline)
        engine.pid = event.pid
        engine.kv_blocks = 0
        engine.state = EngineState.STARTING
        engine.attached = True
        grid.tell(subject(pipeline.id), f"engine {event.pid} attaches in epoch {event.epoch}")
    for member in event.members:
        slot = grid.slots.get(member.node)
        if slot is not None:
            slot.incarnation_floor = max(slot.incarnation_floor, member.incarnation)
    if event.epoch > 0 and len(event.members) == len(pipeline.members):
        engine.claim = event
    else:
        pipeline.cause = Cause.ATTACH if pipeline.served or grid.served else Cause.START


def _detach(grid: Grid, pipeline: Pipeline) -> None:
    """Forget an engine that is gone. Its lanes stay where they are until the next engine can give them up."""
    for stage in list(pipeline.recoveries):
        grid.close_recovery(pipeline, stage, RecoveryState.FAILED)
    pipeline.wait_until = None
    pipeline.losses.clear()
    if not pipeline.engine.attached:
        return
    grid.step_pipeline(pipeline, PipelineStep.DETACH)
    pipeline.leaving |= {member for member in pipeline.members if member is not None}
    pipeline.members = [None] * len(pipeline.members)
    pipeline.forming = pipeline.formed = pipeline.reform = False
    pipeline.relink_at = None
    pipeline.order = None
    pipeline.forget_losses()
    pipeline.parted.clear()
    pipeline.relinked.clear()
    pipeline.relinked_in_vain = 0
    pipeline.moves.clear()
    engine = pipeline.engine
    engine.attached = False
    engine.claim = engine.report = engine.pressed_since = None
    engine.report_is_new = False
    engine.state = EngineState.DEAD


def on_ready(grid: Grid, event: events.EngineReady) -> None:
    """The engine has its scheduler."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is not None and pipeline.engine.attached:
        pipeline.engine.kv_blocks = event.kv_blocks
        pipeline.engine.state = EngineState.READY


def on_report(grid: Grid, event: events.EngineReport) -> None:
    """The engine's load. One that counts KV blocks has its scheduler, even if its saying so was missed."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is None or not pipeline.engine.attached:
        return
    pipeline.engine.report = event
    if event.waiting == 0:
        pipeline.engine.pressed_since = None
    elif pipeline.engine.pressed_since is None:
        pipeline.engine.pressed_since = grid.now
    # It may have been under way when the last order left.
    ordered = pipeline.order.epoch if pipeline.order is not None else event.epoch
    pipeline.engine.report_is_new = event.epoch in (NO_EPOCH, ordered)
    _hear(grid, pipeline, event)
    waiting.note_report(pipeline, event)
    formation.note_report(grid, pipeline, event)
    standstill.note_report(grid, pipeline, event)
    if event.kv_blocks > 0:
        pipeline.engine.kv_blocks = event.kv_blocks
        pipeline.engine.state = EngineState.READY


def _hear(grid: Grid, pipeline: Pipeline, report: events.EngineReport) -> None:
    """The engine speaks. If an order has not reached it after a while, or its answer us, send the order again.

    It knows by the epoch that it comes again, and answers again.
    """
    pipeline.engine.heard_at = grid.now
    if pipeline.engine.state is EngineState.SILENT:
        pipeline.engine.state = EngineState.READY
        grid.narrate(f"the engine of {subject(pipeline.id)} reports again")
    order = pipeline.order
    if order is None or grid.now - pipeline.sent_at < RESEND_SECONDS:
        return
    behind = NO_EPOCH < report.epoch < order.epoch
    unanswered = pipeline.forming and report.epoch == order.epoch and not report.forming
    if behind or unanswered:
        pipeline.sent_at = grid.now
        grid.command(order)


def on_lost(grid: Grid, event: events.EngineLost) -> None:
    """The process is gone. A later one will attach."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is None or pipeline.engine.pid != event.pid or not pipeline.engine.living:
        return
    _detach(grid, pipeline)
    pipeline.engine.state = EngineState.DEAD
    grid.narrate(f"the engine of {subject(pipeline.id)} ended (pid {event.pid}): the requests of all engines are lost")


def look_after(grid: Grid, pipeline: Pipeline, pause: float) -> None:
    """Show an engine that does not report; kill it when that lasts, so that it is started again.

    `pause` is for how many seconds the controller could not listen before.
    """
    engine, timeouts = pipeline.engine, grid.config.timeouts
    # What it has said meanwhile was read just now.
    engine.heard_at = min(grid.now, engine.heard_at + pause)
    if not engine.living or engine.pid is None:
        return
    silence_ms = (grid.now - engine.heard_at) * 1_000
    if silence_ms >= timeouts.engine_silent_after_ms and engine.state is EngineState.READY:
        engine.state = EngineState.SILENT
        grid.narrate(f"the engine of {subject(pipeline.id)} does not report (pid {engine.pid})")
    starting = engine.state is EngineState.STARTING
    if silence_ms >= (1_000 * timeouts.startup_timeout_s if starting else timeouts.engine_lost_after_ms):
        engine.heard_at = grid.now
        grid.narrate(f"the engine of {subject(pipeline.id)} is killed, since it does not report (pid {engine.pid})")
        grid.command(KillEngine(pipeline.id, engine.pid))
