"""Nodes that are too slow: what is done about the evidence of `kevlarflow.recovery.pace`.

A slow node is emptied as one that drains: its lanes move, planned, to the node that would take them over if it died,
which is the one that has copies of their KV; then it leaves. That is quicker than to wait for a fresh one. Unlike a
drained one it is replaced at once, and the lanes come home to the fresh node.

None of this is urgent, and a wrong verdict must not do harm. So it waits until the fleet is whole and at rest, which
also means that one node at a time is moved; and a place that was judged slow is left alone for a while after that,
longer each time: where fresh nodes are slow as well, the node was not the reason.
"""

from __future__ import annotations

from kevlarflow.recovery import drain, events
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import Slot
from kevlarflow.types import Cause, NodeState, PipelineState

REST_SECONDS = 60.0
"""How long a place is left alone after its node was replaced for being slow; twice as long after each further time."""
LONGEST_REST_SECONDS = 3_600.0
"""The longest of these rests. What is further back than this is forgotten."""


def on_slow(grid: Grid, event: events.NodeSlow) -> None:
    """Begin to empty the node, or let it be for now: it will be said again."""
    slot = grid.slot_of(event.member)
    if slot is None or not _is_at_rest(grid, slot) or not _has_rested(grid, slot):
        return
    if not any(slot.member in each.members for each in grid.pipelines) or not drain.can_spare(grid, slot):
        return
    lanes = drain.lanes_in_words(grid, slot)
    grid.narrate(
        f"{slot.node} computes {event.ratio:.1f}x slower than its peers for {event.seconds:.0f} s: it gives "
        f"{lanes} away, then a fresh node takes its place"
    )
    drain.empty(grid, slot, Cause.SLOW)


def _is_at_rest(grid: Grid, slow: Slot) -> bool:
    """Whether nothing else is being moved, lost, replaced or started; places that are empty on purpose do not count."""
    for pipeline in grid.pipelines:
        busy = pipeline.recoveries or pipeline.moves or pipeline.leaving
        if pipeline.state is not PipelineState.SERVING or not pipeline.formed or busy:
            return False
    others = (each for each in grid.slots.values() if each is not slow and not each.vacant)
    # Evidence that it is alive came with the evidence that it is slow.
    present = slow.state in (NodeState.READY, NodeState.SUSPECT) and slow.fenced_by is None and slow.exit_due is None
    return present and all(each.usable for each in others)


def _has_rested(grid: Grid, slot: Slot) -> bool:
    moved_at = {
        each.decided_at
        for each in grid.recoveries
        if each.cause is Cause.SLOW and each.origin == slot.node and grid.now - each.decided_at < LONGEST_REST_SECONDS
    }
    if not moved_at:
        return True
    rest = min(LONGEST_REST_SECONDS, REST_SECONDS * 2.0 ** (len(moved_at) - 1))
    return grid.now - max(moved_at) >= rest
