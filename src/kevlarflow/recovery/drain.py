"""Nodes that are to be emptied: their lanes move away, then they leave; and slots that are filled by hand.

A node that drains serves the lanes it has, and gets no others. `recovery.moves` takes its lanes away, each in its best
moment. When no pipeline has a lane on it any more it is told to leave, and nobody replaces it until somebody asks for
that. If it turns out to be needed, because the others have died meanwhile, and is all that a pipeline lacks, it stays.
"""

from __future__ import annotations

from kevlarflow.recovery import events
from kevlarflow.recovery.events import Answer, KillNode, Retire
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Slot
from kevlarflow.recovery.transitions import NodeStep
from kevlarflow.types import Cause, Member, NodeState, PipelineId

# ---- requests


def on_drain_requested(grid: Grid, event: events.DrainRequested) -> None:
    """Begin to empty a node, or say why not."""
    refusal = _why_not_drained(grid, event)
    slot = grid.slots.get(event.node)
    if slot is not None and not refusal and slot.state is NodeState.READY:
        empty(grid, slot, Cause.DRAIN)
        grid.narrate(f"{slot.node} is drained: it gives {lanes_in_words(grid, slot)} away, then it leaves")
    elif slot is not None and not refusal:
        slot.emptied_for = Cause.DRAIN
    grid.command(Answer(event.ticket, refusal, slot.member if slot is not None and not refusal else None))


def _why_not_drained(grid: Grid, event: events.DrainRequested) -> str:
    slot = grid.slots.get(event.node)
    if slot is None:
        return _unknown(grid, event.node)
    if slot.state is NodeState.DRAINING:
        return ""
    if not grid.served:
        return f"{slot.node} cannot be drained while the cluster is starting: wait until it serves"
    if slot.state is NodeState.DEAD and slot.vacant:
        return f"{slot.node} has left already: `kevlarflow node --join {slot.node}` fills its place"
    if slot.state is not NodeState.READY or not slot.usable:
        return f"{slot.node} cannot be drained: it is {slot.state}"
    if not can_spare(grid, slot):
        return f"{slot.node} cannot be drained: {_why_not_spared(grid, slot)}"
    return ""


def _why_not_spared(grid: Grid, slot: Slot) -> str:
    """Why the others of its stage cannot take what a node has, and what to do."""
    places = [each for each in grid.stages[slot.stage] if each.node != slot.node]
    if any(each.usable for each in places):
        return f"no other node of stage {slot.stage} has room for {lanes_in_words(grid, slot)}"
    if not places:
        return f"stage {slot.stage} has no other node: start the cluster with -dp 2 or more"
    vacant = next((each.node for each in places if each.vacant and each.state is NodeState.DEAD), None)
    alone = f"there is no other node of stage {slot.stage}"
    if vacant is None:
        return f"{alone} that is ready: wait until one is"
    return f"{alone}: join one first with `kevlarflow node --join {vacant}`"


def on_join_requested(grid: Grid, event: events.JoinRequested) -> None:
    """Give an empty slot to a process that was started by hand, or say why not."""
    slot = grid.slots.get(event.node)
    if slot is None:
        grid.command(Answer(event.ticket, _unknown(grid, event.node)))
    elif slot.state is not NodeState.DEAD:
        taken = f"the place {slot.node} is taken by {slot.member}, which is {slot.state}"
        first = {
            NodeState.STARTING: "wait until it has started, and drain it",
            NodeState.DRAINING: "wait until it has left",
        }.get(slot.state, "drain it first")
        grid.command(Answer(event.ticket, f"{taken}: {first}, or join in an empty place"))
    else:
        was_vacant = slot.vacant
        slot.renew(slot.incarnation_floor + 1)
        slot.filled_by_hand = was_vacant
        slot.pids = (event.pid,)
        slot.started_at = grid.now
        slot.ready_by = grid.now + grid.config.timeouts.startup_timeout_s
        grid.step_node(slot, NodeStep.START)
        grid.narrate(f"{slot.node} is started by hand (pid {event.pid})")
        grid.command(Answer(event.ticket, "", slot.member, slot.stage))


def _unknown(grid: Grid, node: str) -> str:
    problem = f"there is no node {node}" if node else "no node is named"
    return f"{problem}: use one of {', '.join(grid.slots)}"


# ---- emptying


def empty(grid: Grid, slot: Slot, cause: Cause) -> None:
    """From now on the lanes of a node move away."""
    grid.step_node(slot, NodeStep.DRAIN)
    slot.emptied_for = cause


def keep(grid: Grid, slot: Slot, why: str) -> None:
    """Let a node stay that was to be emptied."""
    slot.emptied_for = slot.stuck_since = None
    grid.step_node(slot, NodeStep.KEEP)
    grid.narrate(f"{slot.node} stays: {why}")


def reconcile(grid: Grid) -> None:
    """Take the step that is due for each node that is being emptied."""
    for slot in grid.slots.values():
        if slot.state is not NodeState.DRAINING or slot.fenced_by is not None:
            continue
        if slot.leave_by is not None:
            _see_it_leave(grid, slot)
        elif not _lanes(grid, slot.member):
            slot.leave_by = grid.now + grid.config.timeouts.stop_grace_s
            grid.tell(slot.node, f"#{slot.incarnation} is empty and leaves")
            grid.command(Retire(slot.member))
        else:
            _stay_if_needed(grid, slot)


def _see_it_leave(grid: Grid, slot: Slot) -> None:
    assert slot.leave_by is not None, "it was told to leave"
    if grid.passes_deadlines and grid.now >= slot.leave_by:
        slot.leave_by = grid.now + grid.config.timeouts.stop_grace_s
        grid.command(KillNode(slot.member, slot.pids))


def _stay_if_needed(grid: Grid, slot: Slot) -> None:
    """Give up when for some time nobody else could have taken the lanes."""
    if can_spare(grid, slot):
        slot.stuck_since = None
        return
    if slot.stuck_since is None:
        slot.stuck_since = grid.now
    if grid.passes_deadlines and grid.now - slot.stuck_since >= grid.config.timeouts.move_patience_ms / 1_000:
        keep(grid, slot, f"no other node of stage {slot.stage} has room for {lanes_in_words(grid, slot)}")


def can_spare(grid: Grid, slot: Slot) -> bool:
    """Whether the other nodes of the stage have room for all lanes of a node together."""
    member = slot.member
    lanes = {each.id for each in grid.pipelines if member in each.members}
    others = [each for each in grid.stages[slot.stage] if each.usable and each.node != slot.node]
    room = 0
    for other in others:
        # Its own lane always has room on a node.
        lanes.discard(other.pipeline)
        if other.info is not None:
            room += max(0, other.info.lanes - 1 - grid.foreign_lanes(other, other.pipeline))
    return bool(others) and len(lanes) <= room


def _lanes(grid: Grid, member: Member) -> list[PipelineId]:
    """Pipelines that have a lane on a member, used or not yet given up."""
    return [each.id for each in grid.pipelines if each.has_lane_on(member)]


def lanes_in_words(grid: Grid, slot: Slot) -> str:
    """The lanes on a node, for a line that somebody reads."""
    lanes = _lanes(grid, slot.member)
    if len(lanes) == 1:
        return f"the lane of pipeline {lanes[0]}"
    return f"the lanes of pipelines {', '.join(map(str, lanes))}" if lanes else "no lanes"
