"""What is done about members that an engine could not use, though nobody has seen them die.

If one has crashed, that will show in a moment. If it lives, it is tried once more under a new epoch; then its own
pipeline has it replaced, and another pipeline does without it for a while.
"""

from __future__ import annotations

from kevlarflow.recovery import events, nodes, records, standstill
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Pipeline, subject
from kevlarflow.types import Cause, Member, PipelineState

AVOID_SECONDS = 5.0
"""How long a donor that an engine could not use is left out of its plans."""
COMPLAINT_SECONDS = 0.1
"""How long a member that an engine could not use has to be seen to die, before something is done about it."""


def on_member_failed(grid: Grid, event: events.MemberFailed) -> None:
    """An engine could not use a member. If it has crashed we shall see that; so wait for a moment."""
    pipeline = grid.pipeline(event.pipeline)
    if pipeline is None or event.epoch not in (0, pipeline.epoch):
        return
    claim = pipeline.engine.claim
    if claim is not None and event.member in claim.members:
        # It is not known yet whether all of them live; but what they serve has to be formed anew in any case.
        pipeline.reform = True
    if event.member not in pipeline.members:
        return
    if event.unlinked:
        standstill.on_unlinked(grid, event)
        return
    grid.tell(event.member.node, f"{subject(pipeline.id)} could not use it: {event.reason}")
    pipeline.complaints.setdefault(event.member, grid.now + COMPLAINT_SECONDS)


def settle(grid: Grid, pipeline: Pipeline) -> None:
    """Act on complaints about members that turn out to be alive."""
    pipeline.avoided = {each: until for each, until in pipeline.avoided.items() if grid.now < until}
    pipeline.parted = {each: until for each, until in pipeline.parted.items() if grid.now < until}
    for member, due in list(pipeline.complaints.items()):
        if grid.now >= due:
            del pipeline.complaints[member]
            _act_on(grid, pipeline, member)


def _act_on(grid: Grid, pipeline: Pipeline, member: Member) -> None:
    """The first time try it again under a new epoch; then do without it, and if it is its own, replace it."""
    slot = grid.slot_of(member)
    if slot is None or member not in pipeline.members:
        return
    if member not in pipeline.struck:
        pipeline.struck.add(member)
        pipeline.reform = True
        pipeline.news = f"{subject(pipeline.id)} could not use {slot.node}"
        return
    pipeline.struck.discard(member)
    if slot.pipeline == pipeline.id:
        nodes.fence(grid, slot, grid.now, f"could not be used by {subject(pipeline.id)}")
        return
    pipeline.avoided[member] = grid.now + AVOID_SECONDS
    pipeline.members[slot.stage] = None
    pipeline.leaving.add(member)
    pipeline.forming = pipeline.formed = False
    pipeline.news = f"{slot.node} could not help {subject(pipeline.id)}"
    if pipeline.state is not PipelineState.STARTING:
        pipeline.cause = Cause.CRASH
        records.begin(grid, pipeline, slot.stage, Cause.CRASH, slot)
