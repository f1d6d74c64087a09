"""The cluster as a pure state machine: `Cluster.handle(event, now)` returns the commands that follow.

No socket, clock, thread or process is known here. The controller's shell turns messages, exits of processes
and the passing of time into events, and carries the commands out; the simulator does the same with a toy
world. Both run this code.

Handling an event has two halves. First the fact is noted by the handler of its type (`nodes`, `engines`). Then
every pipeline is reconciled with the facts, in order. After `Abort` nothing is decided any more.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

from kevlarflow.config import ServeConfig
from kevlarflow.recovery import (
    complaints,
    drain,
    engines,
    events,
    formation,
    moves,
    nodes,
    relinking,
    slowness,
    standbys,
    standstill,
    waiting,
)
from kevlarflow.recovery.events import AnyCommand, AnyEvent, KillNode, Snapshot
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.members import subject
from kevlarflow.types import EngineState, Epoch, Member, NodeState, PipelineState, RecoveryState

DEFAULT_START_SECONDS = 10.0
"""What a node takes to start, until one has been seen to."""


def _begin(grid: Grid, event: events.ClusterBegun) -> None:
    """Ask for every node at once: they need nothing of each other."""
    grid.begun = True
    for slot in grid.slots.values():
        nodes.start(grid, slot)


def _resume(grid: Grid, event: events.ControllerResumed) -> None:
    """Take up what an earlier life of the controller knew, and wait a moment for everybody to appear."""
    snapshot = event.snapshot
    grid.begun = True
    grid.resumed_at = grid.now
    grid.served = snapshot.served
    grid.next_recovery = snapshot.next_recovery
    grid.start_seconds.extend(snapshot.start_seconds)
    # Where the numbers used so far are not known: there have been fewer than milliseconds since boot.
    unused = int(1_000 * grid.now)
    for pipeline in grid.pipelines:
        pipeline.epoch = snapshot.epochs.get(pipeline.id, Epoch(unused))
        pipeline.served = snapshot.served
        pipeline.leaving = set(snapshot.lanes.get(pipeline.id, ()))
        waiting.go_on(grid, pipeline, snapshot.waits.get(pipeline.id))
        pipeline.losses.extend(snapshot.losses.get(pipeline.id, ()))
        if pipeline.id in snapshot.engines:
            # Should it not introduce itself, it is stopped, and nobody else would ever end it.
            pipeline.engine.pid = snapshot.engines[pipeline.id]
            pipeline.engine.state = EngineState.SILENT
            pipeline.engine.heard_at = grid.now
    for kept in snapshot.recoveries:
        # A mutable record must not be shared with an event.
        recovery = copy.copy(kept)
        grid.recoveries.append(recovery)
        if recovery.state is RecoveryState.RUNNING:
            grid.pipelines[recovery.pipeline].recoveries[recovery.stage] = recovery
    grid.forgetful = snapshot.forgetful or not snapshot.epochs
    known = {each.member.node: each for each in sorted(snapshot.nodes, key=lambda each: each.member.incarnation)}
    for slot in grid.slots.values():
        slot.incarnation_floor = unused if grid.forgetful else 0
        if slot.node in known:
            nodes.expect(grid, slot, known[slot.node])
        else:
            slot.start_at = grid.now + grid.config.timeouts.settle_ms / 1_000
    for each in snapshot.nodes:
        if each.member not in {earlier.member for earlier in known.values()}:
            # Another member has its place, so it had been declared dead.
            grid.command(KillNode(each.member, each.pids))
    grid.narrate("the controller was started again: it waits for nodes and engines to appear")


def _tick(grid: Grid, event: events.Tick) -> None:
    if event.pause:
        _excuse(grid, event.pause)
    nodes.on_tick(grid, event)
    for pipeline in grid.pipelines:
        engines.look_after(grid, pipeline, event.pause)
        complaints.settle(grid, pipeline)


def _excuse(grid: Grid, pause: float) -> None:
    """Take the time for which the controller stood still out of every wait that it bounds."""
    if grid.resumed_at is not None:
        grid.resumed_at += pause
    nodes.excuse(grid, pause)
    waiting.excuse(grid, pause)
    moves.excuse(grid, pause)


_HANDLERS: dict[type, Callable[[Grid, Any], None]] = {
    events.ClusterBegun: _begin,
    events.ControllerResumed: _resume,
    events.Tick: _tick,
    events.NodeLaunched: nodes.on_launched,
    events.LaunchFailed: nodes.on_launch_failed,
    events.NodeStarting: nodes.on_starting,
    events.NodeReady: nodes.on_ready,
    events.NodeFailed: nodes.on_failed,
    events.NodeExited: nodes.on_exited,
    events.NodeSuspected: nodes.on_suspected,
    events.NodeCleared: nodes.on_cleared,
    events.NodeSilent: nodes.on_silent,
    events.NodeSlow: slowness.on_slow,
    events.EngineAttached: engines.on_attached,
    events.EngineReady: engines.on_ready,
    events.EngineReport: engines.on_report,
    events.EngineLost: engines.on_lost,
    events.PipelineStill: standstill.on_still,
    events.Formed: formation.on_formed,
    events.MemberFailed: complaints.on_member_failed,
    events.DrainRequested: drain.on_drain_requested,
    events.JoinRequested: drain.on_join_requested,
}


class Cluster(Grid):
    """The one door into the state of the cluster."""

    def __init__(self, config: ServeConfig, unix_offset: float = 0.0) -> None:
        """`unix_offset` is Unix seconds minus monotonic seconds: only records for people need it."""
        super().__init__(config, unix_offset)

    def handle(self, event: AnyEvent, now: float) -> list[AnyCommand]:
        """Note what happened at `now`, in monotonic seconds, and return what is to be done about it, in order."""
        if self.aborted is not None:
            return []
        self.now = now
        self.cause = type(event).__name__
        self.passes_deadlines = isinstance(event, events.Tick)
        self.commands, self.ordered = [], set()
        _HANDLERS[type(event)](self, event)
        drain.reconcile(self)
        for pipeline in self.pipelines:
            if self.aborted is None:
                relinking.reconcile(self, pipeline)
                formation.reconcile(self, pipeline)
                moves.reconcile(self, pipeline)
                standbys.assign(self, pipeline)
            if pipeline.news:
                self.narrate(pipeline.news)
                pipeline.news = ""
        for pipeline in self.pipelines:
            if self.aborted is None:
                formation.balance(self, pipeline)
        if self.aborted is None:
            nodes.start_replacements(self)
        return self.commands

    def snapshot(self) -> Snapshot:
        """What the next life of the controller has to know."""
        return Snapshot(
            nodes=tuple(map(nodes.known, self.slots.values())),
            epochs={pipeline.id: Epoch(pipeline.epoch) for pipeline in self.pipelines},
            served=self.served,
            lanes={pipeline.id: tuple(sorted(pipeline.lanes)) for pipeline in self.pipelines},
            recoveries=tuple(map(copy.copy, self.recoveries)),
            next_recovery=self.next_recovery,
            waits={each.id: each.wait_until for each in self.pipelines if each.wait_until is not None},
            start_seconds=tuple(self.start_seconds),
            engines={each.id: each.engine.pid for each in self.pipelines if each.engine.pid and each.engine.living},
            losses={each.id: tuple(each.losses) for each in self.pipelines if each.losses},
            # Once all serve, and nobody is about to leave, there is nothing left that nobody has told of.
            forgetful=self.forgetful
            and any(each.leaving or each.state is not PipelineState.SERVING for each in self.pipelines),
        )

    def awaits_introduction(self, member: Member) -> bool:
        """Whether `member` was ready in an earlier life of the controller, and has yet to say so to this one."""
        slot = self.slot_of(member)
        return slot is not None and slot.was_ready and slot.state is NodeState.STARTING

    def loads(self, member: Member) -> bool:
        """Whether `member` has yet to say that it is ready."""
        slot = self.slot_of(member)
        return slot is not None and slot.state is NodeState.STARTING

    # ---- what observers ask

    @property
    def serving(self) -> bool:
        """Whether at least one pipeline can generate: one that recovers finishes all it has and takes more."""
        return any(each.state in (PipelineState.SERVING, PipelineState.RECOVERING) for each in self.pipelines)

    def settling(self, now: float) -> bool:
        """Whether, after a restart, engines and nodes that serve may have yet to appear."""
        patience = self.config.timeouts.settle_ms / 1_000
        return self.resumed_at is not None and not self.serving and now < self.resumed_at + patience

    def why_not_serving(self) -> str:
        """One line for a client that is turned away; empty while the cluster serves."""
        if self.serving:
            return ""
        parts = []
        for pipeline in self.pipelines:
            if pipeline.state is PipelineState.WAITING and isinstance(pipeline.order, events.Suspend):
                parts.append(pipeline.order.reason)
            else:
                parts.append(f"{subject(pipeline.id)} is {pipeline.state}")
        return "; ".join(parts)

    def retry_after_seconds(self, now: float) -> int:
        """When a node is likely to be ready: what starts have taken, from the one that began first or begins next."""
        typical = statistics.median(self.start_seconds) if self.start_seconds else DEFAULT_START_SECONDS
        starting = [each for each in self.slots.values() if each.state is NodeState.STARTING and not each.was_ready]
        begins = [nodes.awaited_since(self, each) for each in starting]
        begins = begins or [each.start_at for each in self.slots.values() if each.start_at is not None]
        return max(1, round(min(begins, default=now) + typical - now))

    def member_is_current(self, member: Member) -> bool:
        """Whether `member` fills its slot and has not been declared dead."""
        slot = self.slot_of(member)
        return slot is not None and slot.state is not NodeState.DEAD
