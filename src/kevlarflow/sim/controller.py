"""The simulated controller: the real `recovery.cluster` and `recovery.detector` in a shell that can die.

It follows `control.controller`: who speaks is asked for an introduction until it is known, processes are watched, and
what the next life has to know is kept after every event that led to something.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from kevlarflow.config import ServeConfig
from kevlarflow.control.translate import FromPeer, event_of, order_of
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.detector import Beat, Detector
from kevlarflow.recovery.events import AnyCommand, AnyEvent, Snapshot
from kevlarflow.recovery.invariants import Invariants
from kevlarflow.recovery.pace import Paces
from kevlarflow.recovery.standstill import Stillness
from kevlarflow.sim.engine import Engine
from kevlarflow.sim.network import By, Process
from kevlarflow.sim.node import Node
from kevlarflow.types import Member, NodeId, PipelineId
from kevlarflow.wire import messages

if TYPE_CHECKING:
    from kevlarflow.sim.fleet import Fleet

TICK_SECONDS = 0.1
REPORT_SECONDS = 0.2
INTRODUCTION_PAUSE_SECONDS = 0.5
KILL_AGAIN_SECONDS = 0.5
TICKET = 0
"""Whose request it was does not matter here."""
FORK_SECONDS = 0.01
"""What the zygote takes to fork a node and to say so."""


class Controller(Process):
    """See the module's text."""

    kind = "controller"

    def __init__(self, fleet: Fleet, config: ServeConfig) -> None:
        super().__init__(fleet.timeline, "controller")
        self.fleet = fleet
        self.config = config
        self.cluster = Cluster(config)
        self.invariants = Invariants(self.cluster)
        self.detector = Detector(config.timeouts, self)
        self.paces = Paces(config)
        self.stillness = Stillness(config.timeouts, config.pipelines)
        self.snapshot: Snapshot | None = None
        self.life = 0
        self.started_at = 0.0
        self._engines: dict[PipelineId, Engine] = {}
        self._members: dict[Member, Node] = {}
        self._known: set[Process] = set()
        self._asked_at: dict[Process, float] = {}
        self._watched: set[Process] = set()
        self._doom: Callable[[], None] | None = None
        self._ticked_at = 0.0

    # ---- its lives

    def start(self, *, remembers: bool = True) -> None:
        """Begin the cluster, or take up what the life before has left."""
        self.alive = True
        self.life += 1
        self.started_at = self.timeline.now
        self._doom = None
        self._ticked_at = self.timeline.now
        self.cluster = Cluster(self.config)
        self.invariants = Invariants(self.cluster)
        self.detector = Detector(self.config.timeouts, self)
        self.paces = Paces(self.config)
        self.stillness = Stillness(self.config.timeouts, self.config.pipelines)
        self._engines, self._members = {}, {}
        self._known, self._asked_at, self._watched = set(), {}, set()
        if self.snapshot is None:
            self.handle(events.ClusterBegun())
        else:
            snapshot = self.snapshot if remembers else self.fleet.find_relatives()
            self.handle(events.ControllerResumed(snapshot))
            for known in snapshot.nodes:
                if known.pids:
                    self._watch_member(self.fleet.nodes.get(known.member), known.member)
                if self.cluster.awaits_introduction(known.member):
                    self.detector.watch(known.member, self.timeline.now)
            for pipeline, pid in snapshot.engines.items():
                engine = self.fleet.engines[pipeline]
                if engine.pid == pid and engine.alive:
                    self._watched.add(engine)
                else:
                    self.handle(events.EngineLost(pipeline, pid))
        self._every(TICK_SECONDS, self._tick)
        self._every(self.config.timeouts.pace_interval_ms / 1_000, self._hear_paces)
        self.fleet.network.release()

    def _every(self, seconds: float, action: functools.partial[None] | object) -> None:
        assert callable(action)
        life = self.life

        def again() -> None:
            if self.life == life:
                action()
                self.after(seconds, again)

        self.after(seconds, again)

    def _later(self, seconds: float, action: functools.partial[None]) -> None:
        """Do something in this life."""
        life = self.life
        self.after(seconds, lambda: action() if self.life == life else None)

    def handle(self, event: AnyEvent) -> None:
        """Give an event to the cluster, check everything, and do what it asks for."""
        now = self.timeline.now
        commands = self.cluster.handle(event, now)
        # Most reports and ticks lead to nothing.
        is_news = bool(commands) or not isinstance(event, (events.Tick, events.EngineReport))
        if is_news:
            self.fleet.tell("controller", event, commands)
        if is_news or isinstance(event, events.Tick):
            self.invariants.check(commands)
        if is_news:
            self.fleet.checks.orders(commands)
            self.snapshot = self.cluster.snapshot()
        self.fleet.checks.note_served(self.cluster.pipelines)
        doom, done = self._doom, len(commands)
        if doom is not None and commands:
            done = self.fleet.rng.randint(0, done)
        for command in commands[:done]:
            self._carry_out(command)
        if doom is not None and commands:
            doom()

    def doom(self, end: Callable[[], None]) -> None:
        """Let the controller end by `end` the next time that it acts, with only some of it done."""
        self._doom = end

    # ---- time and deaths

    def _tick(self) -> None:
        now = self.timeline.now
        for node in self._heard_nodes():
            self._take_beat(node, now)
        frozen = (node for node in self.fleet.living_nodes() if node.frozen and self.watches(node))
        self.detector.stopped({node.member: node.frozen_since for node in frozen}, now)
        for verdict in self.detector.check(now):
            if isinstance(verdict, events.NodeSilent):
                self.fleet.checks.verdict(verdict)
            self.handle(verdict)
        self.handle(events.Tick.after(now - self._ticked_at))
        self._ticked_at = now

    def _take_beat(self, node: Node, now: float) -> None:
        if node not in self._known or not self.cluster.member_is_current(node.member):
            if self.cluster.member_is_current(node.member):
                for event in self.detector.beat(node.member, now, Beat(heard=node.beat(heard=False).heard)):
                    self.handle(event)
                if not self.cluster.awaits_introduction(node.member):
                    self.detector.answered(node.member, node.beats, now)
            self._ask(node)
            return
        beat = node.beat(heard=not self.fleet.network.stops(self, node))
        self.stillness.beat(node.member, node.work(), now)
        for event in self.detector.beat(node.member, now, beat):
            self.handle(event)
        self.detector.answered(node.member, node.beats, now)

    def _heard_nodes(self) -> list[Node]:
        return [node for node in self.fleet.living_nodes() if self.hears(node)]

    def hears(self, node: Node) -> bool:
        """Whether its beats arrive."""
        return not node.frozen and not self.fleet.network.stops(node, self)

    def knows(self, node: Node) -> bool:
        """Whether it has said who it is."""
        return node in self._known

    def watches(self, node: Node) -> bool:
        """Whether it sees what the kernel says of it."""
        return node in self._watched and not self.fleet.network.parted(node, self)

    def _hear_paces(self) -> None:
        now = self.timeline.now
        for node in self._heard_nodes():
            if node in self._known and self.cluster.member_is_current(node.member):
                for slow in self.paces.hear(node.member, node.stage, node.speed.report(), now):
                    self.fleet.checks.slow(node, slow)
                    self.handle(slow)

    def starved_seconds(self, member: Member) -> float | None:
        """See `recovery.detector.Surroundings`: everybody gets the CPU that it wants."""
        return 0.0

    def companions(self, member: Member, pipeline: PipelineId) -> list[Member]:
        """See `recovery.detector.Surroundings`."""
        known = self.cluster.pipeline(pipeline)
        return [each for each in known.members if each is not None and each != member] if known is not None else []

    def lose_connection(self, process: Process) -> None:
        """The connection to a process has broken: whoever speaks next over another one has to say who it is."""
        self._known.discard(process)
        self._asked_at.pop(process, None)

    def hear_of_death(self, process: Process) -> None:
        """The process has begun to die; it is noticed a moment later, if it is watched from here."""
        if process in self._watched:
            self._later(0.001 + 0.02 * self.fleet.rng.random(), functools.partial(self._notice, process))

    def _notice(self, process: Process) -> None:
        if self.fleet.network.parted(process, self):
            self._later(0.1, functools.partial(self._notice, process))
        elif process in self._watched:
            self._watched.discard(process)
            if isinstance(process, Engine):
                self.handle(events.EngineLost(process.pipeline, process.pid))
            elif isinstance(process, Node):
                was_killed = self.fleet.plan.reads_endings and process.ended_by is not By.ITSELF
                self._bury(process.member, process.died_at, from_outside=was_killed)

    def _bury(self, member: Member, alive_at: float, *, from_outside: bool = False) -> None:
        now = self.timeline.now
        dead = self.fleet.nodes.get(member)
        record = dead.record.computing if dead is not None else None
        slot = self.cluster.slots[member.node]
        may_be_ours = not from_outside or slot.fenced_by is not None or slot.was_fenced
        if dead is not None and dead.ended_by is By.SOMEBODY and may_be_ours:
            self.fleet.blame.note_death(*dead.record)
        alive_at = min(now, max(alive_at, self.detector.beat_at(member)))
        self.handle(events.NodeExited(member, alive_at, record, from_outside=from_outside))
        self.detector.forget(member)
        self.paces.forget(member)
        self.stillness.forget(member)
        node = self._members.pop(member, None)
        if node is not None:
            self._known.discard(node)

    def _watch_member(self, node: Node | None, member: Member) -> None:
        if not self.cluster.member_is_current(member) or (node is not None and node in self._watched):
            return
        if node is None or not node.alive:
            self._bury(member, self.timeline.now)
        else:
            self._watched.add(node)

    # ---- messages

    def take(self, peer: Process, message: messages.AnyMessage) -> None:
        """A message has arrived."""
        match message:
            case messages.NodeStarting() | messages.NodeReady() | messages.NodeFailed():
                assert isinstance(peer, Node)
                self._take_from_node(peer, message)
            case messages.EngineAttached(pipeline=pipeline, pid=pid):
                assert isinstance(peer, Engine)
                self._known.discard(self._engines.get(pipeline, peer))
                self._engines[pipeline] = peer
                self._known.add(peer)
                self.handle(event_of(message))
                if peer.alive:
                    self._watched.add(peer)
                else:
                    self.handle(events.EngineLost(pipeline, pid))
            case messages.EngineReady() | messages.EngineReport() | messages.Formed() | messages.MemberFailed():
                if self._engines.get(message.pipeline) is peer and peer in self._known:
                    self._take_from_engine(message)
                else:
                    self._ask(peer)

    def _take_from_engine(self, message: FromPeer) -> None:
        event = event_of(message)
        self.handle(event)
        if isinstance(event, events.EngineReport):
            known = self.cluster.pipelines[event.pipeline]
            still = self.stillness.judge(event, known.members, known.leaving, self.timeline.now)
            if still is not None:
                self.handle(still)

    def _take_from_node(
        self, node: Node, message: messages.NodeStarting | messages.NodeReady | messages.NodeFailed
    ) -> None:
        member = node.member
        self._members[member] = node
        self._known.add(node)
        self.handle(event_of(message))
        if isinstance(message, messages.NodeStarting) and self.cluster.loads(member):
            self.detector.forget(member)
        if not isinstance(message, messages.NodeFailed):
            self._watch_member(node, member)
        if isinstance(message, messages.NodeReady) and self.cluster.member_is_current(member):
            self.detector.watch(member, self.timeline.now)
        if not self.cluster.member_is_current(member):
            self._members.pop(member, None)
            self._known.discard(node)

    def _ask(self, peer: Process) -> None:
        now = self.timeline.now
        if now - self._asked_at.get(peer, -INTRODUCTION_PAUSE_SECONDS) >= INTRODUCTION_PAUSE_SECONDS:
            self._asked_at[peer] = now
            assert isinstance(peer, (Node, Engine))
            self._send(peer, peer.introduce)

    def _send(self, peer: Process, deliver: object) -> None:
        assert callable(deliver)
        if isinstance(peer, Node) and peer.deaf:
            return
        self.fleet.network.send(self, peer, ("orders", self.life, peer.name), deliver)

    # ---- requests of people

    def drain(self, node: NodeId) -> None:
        """Somebody wants a node to be emptied."""
        if self.alive and not self.frozen:
            self.handle(events.DrainRequested(node, TICKET))

    def join(self, node: NodeId) -> None:
        """Somebody has started a process that is to fill a place; it ends if it may not, or hears nothing."""
        if self.alive and not self.frozen:
            self.handle(events.JoinRequested(node, self.fleet.next_pid(), TICKET))

    # ---- commands

    def _carry_out(self, command: AnyCommand) -> None:
        match command:
            case events.Form() | events.Suspend() | events.AssignStandbys() | events.Hasten():
                engine = self._engines.get(command.pipeline)
                if engine is not None and engine in self._known:
                    self._send(engine, functools.partial(engine.post, order_of(command)))
            case events.StartNode(member=member, stage=stage):
                # The zygote forks even if nobody waits for its answer any more.
                self.timeline.after(
                    FORK_SECONDS * self.fleet.rng.random(), functools.partial(self._fork, member, stage, self.life)
                )
            case events.KillNode(member=member):
                self._kill(member)
            case events.KillEngine(pipeline=pipeline, pid=pid):
                engine = self.fleet.engines[pipeline]
                if engine.pid == pid:
                    self.fleet.end_process(engine)
            case events.Answer(member=Member() as member, stage=int() as stage):
                self._watch_member(self.fleet.fork(member, stage, self.cluster.slots[member.node].pids[0]), member)
            case events.Retire(member=member):
                node = self._members.get(member)
                if node is not None and node in self._known:
                    node.told_to_leave_at = self.timeline.now
                    self.fleet.counts["nodes told to leave"] += 1
                    self._send(node, functools.partial(self.fleet.end_process, node))

    def _fork(self, member: Member, stage: int, life: int) -> None:
        node = self.fleet.fork(member, stage)
        if self.alive and self.life == life:
            self._later(0.0, functools.partial(self._hear_of_fork, node))

    def _hear_of_fork(self, node: Node) -> None:
        self.handle(events.NodeLaunched(node.member, node.pid))
        self._watch_member(node, node.member)

    def _kill(self, member: Member) -> None:
        """SIGKILL, again and again until it is gone; it does not reach what is cut off."""
        node = self.fleet.nodes.get(member)
        if node is None or not node.alive:
            return
        self.fleet.verdicts.kill(node)
        if not node.hard_to_kill and not self.fleet.network.parted(node, self):
            self.timeline.after(0.005 * self.fleet.rng.random(), functools.partial(self.fleet.end_process, node))
        else:
            self._later(KILL_AGAIN_SECONDS, functools.partial(self._kill, member))
