"""What becomes of nodes: started, ready, suspect, lost, and started again.

A loss is believed on one of three grounds: the process was seen to die, the node said that it fails, or it was
silent for so long that it was killed first. What the pipelines do about it is not decided here: a lost member
simply no longer stands in any of them.
"""

from __future__ import annotations

from kevlarflow.recovery import events, records
from kevlarflow.recovery.events import Form, KillNode, KnownNode, Retire, StartNode
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import EARLY_DEATHS, LIVING, Pipeline, Slot
from kevlarflow.recovery.transitions import NodeStep
from kevlarflow.types import Cause, Computing, Epoch, Loss, Member, NodeState, PipelineId, PipelineState

RETRY_SECONDS = 0.5
"""Pause after the first failed start; doubled after each further one, up to `LONGEST_RETRY_SECONDS`."""
LONGEST_RETRY_SECONDS = 60.0
GIVES_WAY_SECONDS = 1.0
"""For how long a replacement is not started, at most, because pipelines recover: it would take their CPUs and memory
bandwidth in the moment in which clients wait."""
STEADY_SECONDS = 0.25
"""So long after a pipeline was formed it still counts as one that recovers, for replacements: it says so when the first
of the steps that were sent again is over, and the others run yet."""
EARLY_SECONDS = 60.0
"""A member that dies within this time of being ready, by itself, has died early."""
EXIT_PATIENCE_SECONDS = 0.1
"""How long the reason of a node that died while starting may be under way."""


def log_path(grid: Grid, slot: Slot) -> str:
    """Where a node's output goes."""
    return f"{grid.config.log_folder}/{slot.node}-{slot.incarnation}.log"


def start(grid: Grid, slot: Slot) -> None:
    """Ask for the slot's next member."""
    slot.renew(slot.incarnation_floor + 1)
    grid.step_node(slot, NodeStep.START)
    slot.started_at = grid.now
    slot.ready_by = grid.now + grid.config.timeouts.startup_timeout_s
    grid.command(StartNode(slot.member, slot.stage))


def known(slot: Slot) -> KnownNode:
    """What is to be remembered of a slot: its member, or the number that is used up."""
    if slot.state is NodeState.DEAD:
        nobody = Member(slot.node, slot.incarnation_floor)
        return KnownNode(nobody, (), False, slot.failed_starts, vacant=slot.vacant)
    # One that is being killed has been ready all the same: the next life must not wait for it as if it still loaded.
    ready, fenced = slot.state in LIVING or slot.was_ready, slot.fenced_by is not None or slot.was_fenced
    return KnownNode(
        slot.member,
        slot.pids,
        ready,
        slot.failed_starts,
        slot.emptied_for,
        fenced=fenced,
        filled_by_hand=slot.filled_by_hand,
        started_at=slot.started_at,
    )


def expect(grid: Grid, slot: Slot, earlier: KnownNode) -> None:
    """Wait for a member of the controller's earlier life to introduce itself, but not for long."""
    timeouts = grid.config.timeouts
    slot.renew(earlier.member.incarnation)
    slot.failed_starts = earlier.failed_starts
    slot.vacant = earlier.vacant
    if slot.vacant:
        return
    slot.filled_by_hand = earlier.filled_by_hand
    if not earlier.pids:
        # Whether it was ever forked is not known; if it was, it will find itself replaced.
        start(grid, slot)
        return
    grid.step_node(slot, NodeStep.START)
    slot.pids = earlier.pids
    slot.emptied_for = earlier.emptied_for
    slot.was_ready, slot.was_fenced = earlier.ready, earlier.fenced
    slot.started_at = earlier.started_at
    # Whether it lives its beats show, and those of a node that gets no CPU are not missed so soon.
    patience = timeouts.engine_lost_after_ms / 1_000 if earlier.ready else timeouts.startup_timeout_s
    slot.ready_by = grid.now + patience


def awaited_since(grid: Grid, slot: Slot) -> float:
    """When the start of a member began that is not ready; or since when it is to introduce itself, or to get ready."""
    if slot.started_at is not None and not slot.was_ready:
        return slot.started_at
    return grid.resumed_at if grid.resumed_at is not None else grid.now


# ---- events


def on_launched(grid: Grid, event: events.NodeLaunched) -> None:
    """The process exists."""
    slot = grid.slot_of(event.member)
    if slot is not None and slot.state is NodeState.STARTING and not slot.pids:
        slot.pids = (event.pid,)


def on_launch_failed(grid: Grid, event: events.LaunchFailed) -> None:
    """A start that did not even lead to a process."""
    slot = grid.slot_of(event.member)
    if slot is not None and slot.state is NodeState.STARTING and not slot.pids:
        lose(grid, slot, Cause.CRASH, grid.now, f"could not be started: {event.reason}")


def on_starting(grid: Grid, event: events.NodeStarting) -> None:
    """The process says who it is."""
    slot = _admit(grid, event.member, event.pids)
    if slot is not None and slot.state is NodeState.STARTING:
        slot.pids = event.pids
        slot.host = event.host
        slot.was_fenced = False
        if slot.was_ready:
            # A controller without memory has taken it for one that has started already.
            slot.was_ready = False
            slot.ready_by = grid.now + grid.config.timeouts.startup_timeout_s


def on_ready(grid: Grid, event: events.NodeReady) -> None:
    """The node holds its weights. Said again, it changes nothing but the epochs that are used up.

    It is said again when a connection broke: with that, the word that a drained node may leave can have been lost.
    """
    info = event.info
    for number, epoch in event.epochs.items():
        pipeline = grid.pipeline(PipelineId(number))
        if pipeline is not None:
            pipeline.epoch = Epoch(max(pipeline.epoch, epoch))
    slot = _admit(grid, info.member, info.pids)
    if slot is not None and slot.leave_by is not None and slot.fenced_by is None:
        grid.command(Retire(slot.member))
    if slot is None or slot.state is not NodeState.STARTING or slot.exit_due is not None or slot.fenced_by is not None:
        return
    slot.info = info
    slot.host = info.host
    slot.pids = info.pids
    slot.ready_by = None
    slot.failed_starts = 0
    slot.filled_by_hand = False
    if not slot.was_ready:
        if slot.started_at is not None:
            grid.start_seconds.append(grid.now - slot.started_at)
        slot.ready_at = grid.now
    slot.was_ready = slot.was_fenced = False
    grid.step_node(slot, NodeStep.READY)
    if slot.emptied_for is not None:
        # An earlier life of the controller has begun to empty it.
        grid.step_node(slot, NodeStep.DRAIN)
    if grid.forgetful:
        _presume_lanes(grid, info.member, event.epochs)


def _presume_lanes(grid: Grid, member: Member, epochs: dict[PipelineId, Epoch]) -> None:
    """Suppose that every lane a node has ever had is still there, and have it given up if it is not used."""
    for pipeline in grid.pipelines:
        if pipeline.id in epochs and member not in pipeline.members:
            pipeline.leaving.add(member)


def on_failed(grid: Grid, event: events.NodeFailed) -> None:
    """The node says why it cannot start."""
    slot = grid.slot_of(event.member)
    if slot is not None and slot.state is not NodeState.DEAD:
        lose(grid, slot, Cause.CRASH, grid.now, f"failed: {event.reason}")


def on_exited(grid: Grid, event: events.NodeExited) -> None:
    """The process has begun to die. One that was only starting gets a moment for its reason to arrive."""
    slot = grid.slot_of(event.member)
    if slot is None or slot.state is NodeState.DEAD:
        return
    by_us = slot.fenced_by is not None or slot.was_fenced
    slot.computing = Computing() if event.from_outside and not by_us else event.computing
    slot.hurt_from_outside = slot.hurt_from_outside or (event.from_outside and not by_us)
    slot.ending = event.ending
    if slot.fenced_by is not None:
        _lose_silent(grid, slot)
    elif slot.leave_by is not None:
        lose(grid, slot, Cause.CRASH, grid.now, "has given its lanes away and has left")
    elif slot.state is NodeState.STARTING:
        slot.exit_due = slot.exit_due or grid.now + EXIT_PATIENCE_SECONDS
    else:
        if len(slot.pids) > 1:
            # What is left of its ranks is of no use without the one that died.
            grid.command(KillNode(slot.member, slot.pids))
        lose(grid, slot, Cause.CRASH, event.alive_at, f"died (pid {_pid(slot)}{_how(slot)})")


def on_suspected(grid: Grid, event: events.NodeSuspected) -> None:
    """Too silent to be a donor."""
    slot = grid.slot_of(event.member)
    if slot is not None and slot.state is NodeState.READY:
        grid.step_node(slot, NodeStep.SUSPECT)


def on_cleared(grid: Grid, event: events.NodeCleared) -> None:
    """It was only busy, unless it has been sent SIGKILL by now."""
    slot = grid.slot_of(event.member)
    if slot is not None and slot.state is NodeState.SUSPECT and slot.fenced_by is None:
        grid.step_node(slot, NodeStep.CLEAR)


def on_silent(grid: Grid, event: events.NodeSilent) -> None:
    """Fence it: what has been sent SIGKILL can do nothing more, even if it takes long to vanish."""
    slot = grid.slot_of(event.member)
    if slot is None or slot.state is NodeState.DEAD or slot.fenced_by is not None or slot.exit_due is not None:
        return
    if slot.state is NodeState.READY:
        grid.step_node(slot, NodeStep.SUSPECT)
    slot.hurt_from_outside = event.from_outside
    fence(grid, slot, event.beat_at, event.what)


def fence(grid: Grid, slot: Slot, silent_since: float, what: str) -> None:
    """Kill first; the loss is believed when the process was seen to die, or soon after in any case."""
    slot.silent_since = silent_since
    slot.silent_how = what
    slot.fenced_by = grid.now + grid.config.timeouts.suspect_after_ms / 1_000
    grid.tell(slot.node, f"#{slot.incarnation} is fenced")
    grid.command(KillNode(slot.member, slot.pids))


def excuse(grid: Grid, pause: float) -> None:
    """The controller stood still: give that time to those who have yet to introduce themselves, be spared or leave."""
    for slot in grid.slots.values():
        if slot.ready_by is not None:
            slot.ready_by += pause
        if slot.stuck_since is not None:
            slot.stuck_since = min(grid.now, slot.stuck_since + pause)
        if slot.leave_by is not None:
            slot.leave_by += pause
        if slot.start_at is not None and slot.incarnation == 0:
            # After a loss of memory somebody may be alive in that place.
            slot.start_at += pause


def on_tick(grid: Grid, event: events.Tick) -> None:
    """Deadlines and retries."""
    now = grid.now
    for slot in grid.slots.values():
        if slot.fenced_by is not None and now >= slot.fenced_by:
            _lose_silent(grid, slot)
        elif slot.exit_due is not None and now >= slot.exit_due:
            when = "" if slot.was_ready else " while it was starting"
            lose(grid, slot, Cause.CRASH, now, f"died{when} (pid {_pid(slot)}{_how(slot)})")
        elif slot.ready_by is not None and now >= slot.ready_by:
            if slot.pids:
                grid.command(KillNode(slot.member, slot.pids))
            what = "did not introduce itself for" if slot.was_ready else "was not ready after"
            lose(grid, slot, Cause.HANG, now, f"{what} {now - awaited_since(grid, slot):.0f} s")
        elif slot.start_at is not None and now >= slot.start_at:
            start(grid, slot)


# ---- the loss of a member


def lose(grid: Grid, slot: Slot, cause: Cause, alive_at: float, what: str) -> None:
    """Take the member out of every pipeline, and see to the next one. `what` completes "node-0-1 ..."."""
    member = slot.member
    was_starting = slot.state is NodeState.STARTING and not slot.was_ready
    was_fenced = slot.fenced_by is not None
    grid.step_node(slot, NodeStep.LOSE)
    slot.info = None
    slot.ready_by = slot.exit_due = slot.fenced_by = slot.leave_by = None
    # A node that cannot even start is a mistake to be mended, whether or not another pipeline was quicker.
    cannot_start = was_starting and slot.incarnation == 1 and not all(each.served for each in grid.pipelines)
    if (not grid.served or cannot_start) and not (was_starting and was_fenced):
        grid.abort(f"{slot.node} {what}. Its log: {log_path(grid, slot)}")
        return
    concerned = [each for each in grid.pipelines if _bereave(grid, each, slot, member, cause, alive_at)]
    for pipeline in concerned:
        pipeline.news = f"{slot.node} {what}"
    if not concerned:
        grid.narrate(f"{slot.node} {what}")
    _replace(grid, slot, was_starting)


def _bereave(grid: Grid, pipeline: Pipeline, slot: Slot, member: Member, cause: Cause, alive_at: float) -> bool:
    """Take a lost member out of one pipeline; says whether that leaves a hole."""
    if slot.computing is not None and (pipeline.has_lane_on(member) or member in pipeline.given_back):
        ours = slot.computing.pipeline == pipeline.id
        pipeline.losses.append(Loss(member, slot.computing if ours else Computing(), slot.hurt_from_outside))
    if member in pipeline.leaving and pipeline.forming and pipeline.order is not None:
        # A planned change waits for steps that are in flight there, and they will not complete any more.
        pipeline.reform = pipeline.reform or (isinstance(pipeline.order, Form) and pipeline.order.cause.is_planned)
    pipeline.leaving.discard(member)
    pipeline.avoided.pop(member, None)
    pipeline.parted.pop(member, None)
    pipeline.struck.discard(member)
    pipeline.complaints.pop(member, None)
    if member not in pipeline.members:
        return False
    pipeline.members[slot.stage] = None
    pipeline.forming = pipeline.formed = False
    if pipeline.state is PipelineState.STARTING:
        return True
    pipeline.cause = cause
    records.begin(grid, pipeline, slot.stage, cause, slot, detect=max(0.0, grid.now - alive_at))
    return True


def _replace(grid: Grid, slot: Slot, was_starting: bool) -> None:
    """Start the next member: after a crash when the recovery is over, later and later while it does not even start."""
    if slot.emptied_for is Cause.DRAIN or (was_starting and slot.filled_by_hand):
        slot.vacant = True
        grid.narrate(f"the place of {slot.node} stays empty until `kevlarflow node --join {slot.node}` fills it")
        return
    if not was_starting:
        slot.start_at = grid.now + GIVES_WAY_SECONDS
        slot.gives_way = True
        _back_off(grid, slot)
        return
    slot.failed_starts += 1
    doublings = min(slot.failed_starts - 1, 10)
    pause = min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2**doublings)
    slot.start_at = grid.now + pause
    grid.narrate(f"{slot.node} is started again in {pause:g} s: see {log_path(grid, slot)}")


def _back_off(grid: Grid, slot: Slot) -> None:
    """Where members load and then die again and again each costs clients a pause, so the lane stays away for longer."""
    if grid.now - slot.ready_at >= EARLY_SECONDS:
        slot.early_deaths = 0
        return
    if slot.emptied_for is not None or slot.hurt_from_outside:
        return
    slot.early_deaths += 1
    if slot.dies_early and _has_another(grid, slot):
        doublings = min(slot.early_deaths - EARLY_DEATHS, 10)
        pause = min(LONGEST_RETRY_SECONDS, 2 * GIVES_WAY_SECONDS * 2**doublings)
        slot.start_at = grid.now + pause
        slot.gives_way = False
        grid.narrate(
            f"{slot.node} has died {slot.early_deaths} times in a row, by itself, within {EARLY_SECONDS:.0f} s of "
            f"being ready: it is started again in {pause:g} s, sooner if needed. See {log_path(grid, slot)}"
        )


def start_replacements(grid: Grid) -> None:
    """Start those that gave way to a recovery, unless one is or was just under way, and those that are needed."""
    if any(each.forming and each.state is PipelineState.RECOVERING for each in grid.pipelines):
        return
    steady = all(not each.formed or grid.now >= each.formed_at + STEADY_SECONDS for each in grid.pipelines)
    awaited = {stage for each in grid.pipelines if each.state is PipelineState.WAITING for stage in each.holes}
    for slot in grid.slots.values():
        # One that does not even start is tried later and later, whoever needs it.
        waits = slot.dies_early and slot.start_at is not None and not slot.failed_starts
        is_the_moment = steady or slot.stage in awaited
        if (slot.gives_way and is_the_moment) or (waits and not _has_another(grid, slot)):
            start(grid, slot)


def _has_another(grid: Grid, slot: Slot) -> bool:
    """Whether another node of the stage serves."""
    return any(each.living for each in grid.stages[slot.stage] if each is not slot)


def _lose_silent(grid: Grid, slot: Slot) -> None:
    """Believe the loss of a member that was fenced."""
    if slot.hurt_from_outside:
        slot.computing = Computing()
    silence = grid.now - slot.silent_since
    lose(
        grid,
        slot,
        Cause.HANG,
        slot.silent_since,
        f"{slot.silent_how} for {silence:.1f} s and was killed (pid {_pid(slot)})",
    )


def _admit(grid: Grid, member: Member, pids: tuple[int, ...]) -> Slot | None:
    """The slot of a member that introduces itself, or None when its place is taken: then it must go."""
    slot = grid.slots.get(member.node)
    if slot is None:
        return None
    slot.incarnation_floor = max(slot.incarnation_floor, member.incarnation)
    if slot.incarnation == member.incarnation and slot.state is not NodeState.DEAD:
        return slot
    # After a restart without memory the newcomer may be the newest there is.
    if member.incarnation > slot.incarnation and slot.state is NodeState.DEAD:
        slot.renew(member.incarnation)
        slot.ready_by = grid.now + grid.config.timeouts.startup_timeout_s
        grid.step_node(slot, NodeStep.START)
        return slot
    grid.command(Retire(member))
    grid.command(KillNode(member, pids))
    return None


def _pid(slot: Slot) -> str:
    return ", ".join(map(str, slot.pids)) or "unknown"


def _how(slot: Slot) -> str:
    return f": {slot.ending}" if slot.ending else ""
