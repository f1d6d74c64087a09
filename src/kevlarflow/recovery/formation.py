"""What becomes of pipelines: formed, served, bereaved, formed again.

The events only record facts. Then `reconcile` compares, for one pipeline, what is with what could be, and takes at
most one step: adopt what an engine serves already, or fill the stages that have no node. (`recovery.moves` sees to
lanes that move though nobody died.) Because it looks at levels and not at edges, it does not matter in which order
things happened, nor whether several happened at once: a second loss during a recovery is simply the next
comparison, and its order, with a higher epoch, replaces the one that is under way.
"""

from __future__ import annotations

import msgspec

from kevlarflow.recovery import drain, events, records, shares, waiting
from kevlarflow.recovery.events import Form
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline, subject
from kevlarflow.recovery.planner import Candidate, choose
from kevlarflow.recovery.transitions import PipelineStep
from kevlarflow.types import (
    Cause,
    EngineState,
    Member,
    NodeInfo,
    NodeState,
    PipelineState,
    Stage,
)


def on_formed(grid: Grid, event: events.Formed) -> None:
    """The answer to the newest order; answers to older ones say nothing about what is now."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is None or not pipeline.forming or event.epoch != pipeline.epoch:
        return
    _note_formed(grid, pipeline, event)


def note_report(grid: Grid, pipeline: Pipeline, report: events.EngineReport) -> None:
    """An engine that was forming when it was taken over has formed, and its saying so came too soon to be heard."""
    is_over = pipeline.forming and pipeline.order is None and not report.forming
    if is_over and report.epoch == pipeline.epoch and not pipeline.holes:
        _note_formed(grid, pipeline, None)


def _note_formed(grid: Grid, pipeline: Pipeline, answer: events.Formed | None) -> None:
    pipeline.forming = False
    pipeline.formed = True
    pipeline.formed_at = grid.now
    if not pipeline.relink_lasts:
        pipeline.relink_at = None
    pipeline.wait_until = None
    if isinstance(pipeline.order, Form):
        pipeline.leaving -= {info.member for info in pipeline.order.released}
    pipeline.forget_losses()
    grid.tell(subject(pipeline.id), f"formed in epoch {pipeline.epoch}")
    records.finish(grid, pipeline, answer)


# ---- comparing what is with what could be


def reconcile(grid: Grid, pipeline: Pipeline) -> None:
    """Take the one step that is due for this pipeline, if any."""
    if not pipeline.engine.attached:
        return
    if pipeline.engine.claim is not None and not _adopt(grid, pipeline, pipeline.engine.claim):
        return
    _serve_if_formed(grid, pipeline)
    holes = pipeline.holes
    if holes:
        _fill(grid, pipeline, holes)
    elif pipeline.reform or (pipeline.formed and _living(grid, pipeline.leaving)):
        form(grid, pipeline, {}, Cause.ATTACH if pipeline.state is PipelineState.STARTING else Cause.CRASH)


def _serve_if_formed(grid: Grid, pipeline: Pipeline) -> None:
    """A pipeline serves once its nodes generate and its engine schedules."""
    if not pipeline.formed or pipeline.engine.state not in (EngineState.READY, EngineState.SILENT):
        return
    if pipeline.state not in (PipelineState.STARTING, PipelineState.RECOVERING):
        return
    if pipeline.state is PipelineState.STARTING:
        names = ", ".join(member.node for member in pipeline.members if member is not None)
        grid.narrate(f"{subject(pipeline.id)} serves with {names}")
    grid.step_pipeline(pipeline, PipelineStep.SERVE)
    pipeline.served = grid.served = True


def _adopt(grid: Grid, pipeline: Pipeline, claim: events.EngineAttached) -> bool:
    """Take over what an engine serves, when all its members are known to be alive or not.

    Returns False as long as one of them has yet to introduce itself, or a node that could take over from one that is
    lost: should the requests have to wait for one, that costs them their KV.
    """
    if any(_awaited(grid, member) for member in claim.members):
        return False
    slots = [grid.slot_of(member) for member in claim.members]
    gone = [Stage(stage) for stage, slot in enumerate(slots) if slot is None or not slot.living]
    if any(_helper_is_awaited(grid, pipeline, stage) for stage in gone):
        return False
    pipeline.engine.claim = None
    pipeline.engine.state = EngineState.READY
    pipeline.served = grid.served = True
    pipeline.members = [
        slot.member if slot is not None and slot.living and slot.stage == stage else None
        for stage, slot in enumerate(slots)
    ]
    # It may have been taken over before, while it was forming still.
    pipeline.forming, pipeline.formed = False, True
    pipeline.shares = claim.shares
    pipeline.leaving -= {member for member in pipeline.members if member is not None}
    grid.step_pipeline(pipeline, PipelineStep.SERVE)
    holes = pipeline.holes
    for stage in holes:
        pipeline.formed = False
        pipeline.cause = Cause.CRASH
        origin = grid.slots.get(claim.members[stage].node) or grid.home(pipeline, stage)
        if stage not in pipeline.recoveries:
            records.begin(grid, pipeline, stage, Cause.CRASH, origin)
    # Someone has seen a newer epoch: what the engine sends would be refused.
    pipeline.reform = pipeline.reform or claim.suspended or claim.epoch < pipeline.epoch
    if not claim.suspended and not claim.forming:
        # It has generated, whatever has happened since.
        pipeline.wait_until = None
    if claim.forming and not holes and not pipeline.reform:
        pipeline.forming, pipeline.formed = True, False
        grid.step_pipeline(pipeline, PipelineStep.FORM)
    elif not holes:
        records.finish(grid, pipeline, None)
    return True


def _awaited(grid: Grid, member: Member) -> bool:
    """Whether a member may yet introduce itself after a restart of the controller."""
    slot = grid.slots.get(member.node)
    if slot is None:
        return False
    unheard = slot.incarnation == 0 and slot.start_at is not None
    expected = slot.incarnation == member.incarnation and slot.state is NodeState.STARTING
    return unheard or expected


def _helper_is_awaited(grid: Grid, pipeline: Pipeline, stage: Stage) -> bool:
    """Whether nobody that is known to be ready can serve a stage, and after a restart somebody may yet appear."""
    if choose(candidates(grid, pipeline, stage, parted=True), pipeline.id, len(grid.pipelines)) is not None:
        return False
    settles_at = (grid.resumed_at or 0.0) + grid.config.timeouts.settle_ms / 1_000
    starting = (slot for slot in grid.stages[stage] if slot.state is NodeState.STARTING)
    return grid.now < settles_at and any(slot.was_ready for slot in starting)


def _fill(grid: Grid, pipeline: Pipeline, holes: list[Stage]) -> None:
    """Form with a node for each empty stage; if one cannot be had, tell the engine to wait, or to wait no longer."""
    chosen: dict[Stage, NodeInfo] = {}
    kept: dict[Stage, NodeInfo] = {}
    lacking: list[Stage] = []
    for stage in holes:
        slot = grid.home(pipeline, stage)
        if not pipeline.served and slot.state is NodeState.STARTING:
            # It has no request to save: its own node is worth waiting for.
            return
        if (info := _choose(grid, pipeline, stage)) is not None:
            chosen[stage] = info
        elif (info := _choose_draining(grid, pipeline, stage)) is not None:
            kept[stage] = info
        else:
            lacking.append(stage)
    if not lacking:
        for info in kept.values():
            drain.keep(grid, grid.slots[info.member.node], "it is needed")
        form(grid, pipeline, chosen | kept, pipeline.cause)
    elif pipeline.state in (PipelineState.SERVING, PipelineState.RECOVERING) or waiting.bound_has_passed(
        grid, pipeline
    ):
        waiting.suspend(grid, pipeline, lacking)


def _choose(grid: Grid, pipeline: Pipeline, stage: Stage) -> NodeInfo | None:
    """Who is to serve a stage that has lost its node."""
    count = len(grid.pipelines)
    info = choose(candidates(grid, pipeline, stage), pipeline.id, count)
    return info or choose(candidates(grid, pipeline, stage, parted=True), pipeline.id, count)


def _choose_draining(grid: Grid, pipeline: Pipeline, stage: Stage) -> NodeInfo | None:
    """Who could do so if it were not emptied: it stays if there is nobody else, and no other stage lacks a node."""
    slots = [each for each in grid.stages[stage] if each.state is NodeState.DRAINING and each.leave_by is None]
    others = [
        Candidate(slot.info, slot.pipeline, grid.foreign_lanes(slot, pipeline.id))
        for slot in slots
        if slot.living and slot.info is not None and slot.member not in pipeline.avoided
    ]
    return choose(others, pipeline.id, len(grid.pipelines))


def stages_without_candidates(grid: Grid, pipeline: Pipeline) -> list[Stage]:
    """Those of its holes that nobody could fill now."""
    return [
        each
        for each in pipeline.holes
        if _choose(grid, pipeline, each) is None and _choose_draining(grid, pipeline, each) is None
    ]


def candidates(
    grid: Grid, pipeline: Pipeline, stage: Stage, *, besides: Member | None = None, parted: bool = False
) -> list[Candidate]:
    """The ready nodes of a stage that the pipeline has no reason to avoid, but for `besides`.

    `parted`: with those whose links broke.
    """
    avoided = pipeline.avoided if parted or not pipeline.parted else pipeline.avoided | pipeline.parted
    return [
        Candidate(slot.info, slot.pipeline, grid.foreign_lanes(slot, pipeline.id))
        for slot in grid.stages[stage]
        if (member := slot.member) != besides and slot.usable and slot.info is not None and member not in avoided
    ]


def balance(grid: Grid, pipeline: Pipeline) -> None:
    """Form a pipeline anew whose share has changed, or that waits for the blocks of a lane without an engine."""
    if not (pipeline.forming or pipeline.formed) or pipeline.holes or not pipeline.engine.attached:
        return
    share, orphans = shares.shares(grid, pipeline), shares.orphans(grid, pipeline)
    order = pipeline.order
    waits = pipeline.forming and isinstance(order, Form) and not set(orphans) <= set(order.orphans)
    if not waits and share == pipeline.shares:
        return
    if isinstance(order, Form) and pipeline.id in grid.ordered:
        # Somebody else has moved in the same moment: this is not on its way yet. One that is sent again may be.
        pipeline.shares = share
        pipeline.order = msgspec.structs.replace(order, shares=share, orphans=orphans)
        grid.commands[grid.commands.index(order)] = pipeline.order
    else:
        cause = order.cause if pipeline.forming and isinstance(order, Form) else Cause.SHARE
        form(grid, pipeline, {}, cause)


# ---- orders to engines


def form(grid: Grid, pipeline: Pipeline, chosen: dict[Stage, NodeInfo], cause: Cause) -> None:
    """Order the pipeline to go on with `chosen` in place of what those stages had, under a new epoch."""
    for stage, info in chosen.items():
        before = pipeline.members[stage]
        if before is not None:
            pipeline.leaving.add(before)
        pipeline.members[stage] = info.member
        pipeline.unrestored.add(stage)
    if pipeline.state is PipelineState.STARTING:
        pipeline.unrestored.clear()
    members = [member for member in pipeline.members if member is not None]
    pipeline.leaving = {each for each in pipeline.leaving - set(members) if grid.slot_of(each) is not None}
    released = sorted(_living(grid, pipeline.leaving))
    grid.step_pipeline(pipeline, PipelineStep.FORM)
    pipeline.forming = True
    pipeline.formed = pipeline.reform = False
    pipeline.relink_at = None
    pipeline.engine.report_is_new = False
    pipeline.sent_at = grid.now
    pipeline.shares = shares.shares(grid, pipeline)
    pipeline.order = Form(
        pipeline=pipeline.id,
        epoch=grid.raise_epoch(pipeline),
        nodes=tuple(map(grid.info, members)),
        released=tuple(map(grid.info, released)),
        cause=cause,
        lost_stages=tuple(sorted(pipeline.unrestored)),
        shares=pipeline.shares,
        orphans=shares.orphans(grid, pipeline),
        losses=tuple(pipeline.losses),
    )
    records.plan(grid, pipeline)
    _tell_of_loans(grid, pipeline, chosen, cause)
    grid.tell(subject(pipeline.id), f"is told to form in epoch {pipeline.epoch}: {', '.join(map(str, members))}")
    grid.ordered.add(pipeline.id)
    grid.command(pipeline.order)


def _tell_of_loans(grid: Grid, pipeline: Pipeline, chosen: dict[Stage, NodeInfo], cause: Cause) -> None:
    """Say in one line what happened and who helps out."""
    if cause is Cause.START or cause.is_planned:
        return
    borrowed = [info.member.node for info in chosen.values() if grid.slots[info.member.node].pipeline != pipeline.id]
    own = [info.member.node for info in chosen.values() if grid.slots[info.member.node].pipeline == pipeline.id]
    deeds = []
    if borrowed:
        deeds.append(f"borrows {', '.join(borrowed)}")
    if own and cause is not Cause.ATTACH:
        deeds.append(f"goes on with {', '.join(own)}")
    if deeds or pipeline.news:
        deed = f"{subject(pipeline.id)} {' and '.join(deeds) or 'is formed again'}"
        grid.narrate(f"{pipeline.news}: {deed}" if pipeline.news else deed)
    pipeline.news = ""


def _living(grid: Grid, members: set[Member]) -> set[Member]:
    return {member for member in members if (slot := grid.slot_of(member)) is not None and slot.living}
