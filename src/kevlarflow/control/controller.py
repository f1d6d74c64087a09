"""The controller's process: the shell around `kevlarflow.recovery.cluster`.

One loop, one thread. Each turn reads what has arrived, looks whether a process has begun to die, and lets time pass;
each of these becomes an event for the cluster, and the commands that come back are carried out at once: a message
to an engine, a request to the zygote, a signal. Nothing here waits for anybody, and nothing here decides.

The controller may be killed and started again at any time. Nodes and engines go on without it; it finds its memory in
the run folder, asks whoever speaks to it for an introduction, and continues where it was.

Run it with ``python -m kevlarflow.control.controller``, with ``KEVLARFLOW_RUN`` naming the run folder.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from kevlarflow import config as configuration
from kevlarflow.config import ServeConfig, without_secrets
from kevlarflow.control.journal import Records, Remembered, unix_offset
from kevlarflow.control.launcher import LauncherClient
from kevlarflow.control.metrics import Metrics
from kevlarflow.control.observers import Observers
from kevlarflow.control.peers import Peers
from kevlarflow.control.relatives import find_relatives
from kevlarflow.control.translate import FromPeer, event_of, order_of
from kevlarflow.control.watcher import LocalProcessWatcher
from kevlarflow.errors import KevlarFlowError
from kevlarflow.log_output import lose_what_cannot_be_written
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.detector import Beat, Detector
from kevlarflow.recovery.events import AnyCommand, AnyEvent
from kevlarflow.recovery.pace import Paces
from kevlarflow.recovery.standstill import Stillness, Work
from kevlarflow.recovery.status import status_document
from kevlarflow.types import Member, PipelineId
from kevlarflow.wire import flight_record, messages
from kevlarflow.wire.channel import Hub, ZmqHub
from kevlarflow.wire.messages import AnyMessage, decode, encode

log = logging.getLogger("kevlarflow.controller")

TICK_SECONDS = 0.05
MESSAGES_PER_TURN = 512
KILL_AGAIN_SECONDS = 2.0
FAREWELL_MS = 500


class EngineProcess(NamedTuple):
    """What an engine's process is watched under."""

    pipeline: PipelineId
    pid: int


class Controller:
    """Turns what happens into events, and commands into deeds."""

    def __init__(
        self, config: ServeConfig, hub: Hub, main_pid: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.clock = clock
        """Monotonic seconds; read after something was seen, so that no record says that it was known before."""
        self.hub = hub
        self.main_pid = main_pid
        self.cluster = Cluster(config, unix_offset())
        self.watcher: LocalProcessWatcher[Member | EngineProcess] = LocalProcessWatcher()
        self.detector = Detector(config.timeouts, self)
        self.paces = Paces(config)
        self.stillness = Stillness(config.timeouts, config.pipelines)
        self.launcher = LauncherClient(config.launcher_path)
        self.observers = Observers(hub, self.cluster)
        self.peers = Peers()
        self.metrics = Metrics()
        self.records = Records(config.run_folder)
        self.dropped = 0
        """Messages that could not be decoded, or that had no business here."""
        self._tick_at = 0.0
        self._ticked_at = clock()
        self._killed: dict[Member, tuple[float, tuple[int, ...]]] = {}
        self._next_ticket = 0
        self._tickets: dict[int, bytes] = {}
        """Who waits for which answer."""
        self._noted_load: dict[PipelineId, tuple[bool, int]] = {}

    # ---- the loop's parts

    def start(self) -> None:
        """Begin a cluster, or take up one that an earlier life of the controller began."""
        now = self.clock()
        remembered = self._recall()
        # People hand journals on.
        facts = {"unix_offset": self.cluster.unix_offset, "config": without_secrets(self.config)}
        self.records.journal.start(now, resumed=remembered is not None, **facts)
        if remembered is None:
            self.handle(events.ClusterBegun(), now)
            return
        snapshot = remembered.snapshot
        self.handle(events.ControllerResumed(snapshot), now)
        for known in snapshot.nodes:
            if known.pids and not self.watcher.watch(known.member, known.pids, remembered.start_times):
                self._bury(known.member, now, now)
            elif self.cluster.awaits_introduction(known.member):
                self.detector.watch(known.member, now)
        for pipeline, pid in snapshot.engines.items():
            if not self.watcher.watch(EngineProcess(pipeline, pid), (pid,), remembered.start_times):
                self.handle(events.EngineLost(pipeline, pid), now)

    def _recall(self) -> Remembered | None:
        """What an earlier life has left; if that cannot be read, who there is. None in the first life."""
        remembered = self.records.memory.recall()
        if remembered is not None and remembered.snapshot.epochs:
            return remembered
        found = find_relatives(self.config.run_folder, os.environ.get(configuration.RUN_ID_VARIABLE, ""))
        # Only a controller has nodes started, so a cluster with nodes has had one.
        return Remembered(found, {}) if remembered is not None or found.nodes else None

    def turn(self, *, messages_wait: bool = True) -> None:
        """Everything that is due: messages, deaths, answers of the launcher, and time."""
        if messages_wait:
            self._read_messages()
        deaths = self.watcher.check(self.clock())
        now = self.clock()
        for death in deaths:
            if isinstance(death.key, EngineProcess):
                self.handle(events.EngineLost(death.key.pipeline, death.pid), now)
            else:
                alive_at = max(death.alive_at, self.detector.beat_at(death.key))
                self._bury(death.key, alive_at, now, death.ending, from_outside=death.from_outside)
        for outcome in self.launcher.pump(now):
            if outcome.pid is None:
                self.handle(events.LaunchFailed(outcome.member, outcome.reason), now)
            else:
                self.handle(events.NodeLaunched(outcome.member, outcome.pid), now)
                self._watch_member(outcome.member, (outcome.pid,), now)
        if now >= self._tick_at:
            self._tick_at = now + TICK_SECONDS
            self._let_time_pass(now)

    def handle(self, event: AnyEvent, now: float) -> None:
        """Give an event to the cluster, do what it asks for, and write it down."""
        commands: list[AnyCommand] = []
        try:
            commands = self.cluster.handle(event, now)
            notable = bool(commands) or self._is_notable(event)
            if notable:
                # Before it is done: the next life must not give a number again that was given out here.
                self.records.memory.keep(Remembered(self.cluster.snapshot(), self.watcher.start_times()))
            for command in commands:
                self._carry_out(command, now)
        except Exception:
            # It must be in the journal above all when it ends this process.
            self.records.journal.add(now, event)
            raise
        if notable:
            self.records.journal.add(now, event)
            self.metrics.observe(self.cluster)
            self.observers.publish_availability(now)

    def stop(self) -> None:
        """Leave alone: whoever ends the cluster ends the nodes, and the next life of the controller needs them."""
        self.hub.close(linger_ms=FAREWELL_MS)
        self.launcher.close()
        self.records.journal.close()

    # ---- events

    def _is_notable(self, event: AnyEvent) -> bool:
        """Whether an event without consequences is worth a line: of reports, only those that change something."""
        if isinstance(event, events.Tick):
            return event.pause > 0
        if not isinstance(event, events.EngineReport):
            return True
        load = (event.running == event.waiting == event.in_flight == 0, event.kv_blocks)
        changed = self._noted_load.get(event.pipeline) != load
        self._noted_load[event.pipeline] = load
        return changed

    def _let_time_pass(self, now: float) -> None:
        # The wall clock of a machine is set now and then.
        self.cluster.unix_offset = unix_offset()
        stopped = self.watcher.stopped.items()
        self.detector.stopped({key: since for key, since in stopped if isinstance(key, Member)}, now)
        for verdict in self.detector.check(now):
            self.handle(verdict, now)
        self.handle(events.Tick.after(now - self._ticked_at), now)
        self._ticked_at = now
        self.observers.answer_pending(now)
        news = self.records.see_to(now)
        if news is not None:
            self._narrate(news, now)
        for member, (due, pids) in list(self._killed.items()):
            if not self.watcher.watches(member):
                del self._killed[member]
            elif now >= due:
                log.warning("%s (pids %s) is still there after SIGKILL", member, pids)
                self._kill(member, pids, now)

    # ---- what the detector asks

    def starved_seconds(self, member: Member) -> float | None:
        """How long a member has waited for a CPU; see `kevlarflow.recovery.detector.Surroundings`."""
        return self.watcher.starved_seconds(member)

    def companions(self, member: Member, pipeline: PipelineId) -> list[Member]:
        """The other members of a pipeline; see `kevlarflow.recovery.detector.Surroundings`."""
        known = self.cluster.pipeline(pipeline)
        return [each for each in known.members if each is not None and each != member] if known is not None else []

    def _bury(
        self, member: Member, alive_at: float, now: float, ending: str = "", *, from_outside: bool = False
    ) -> None:
        computing = flight_record.read(Path(self.config.run_folder), member)
        self.handle(events.NodeExited(member, alive_at, computing, ending, from_outside), now)
        self.detector.forget(member)
        self.paces.forget(member)
        self.stillness.forget(member)
        self.peers.remove_member(member)

    def _watch_member(self, member: Member, pids: tuple[int, ...], now: float) -> None:
        if self.cluster.member_is_current(member) and not self.watcher.watch(member, pids):
            self._bury(member, now, now)

    # ---- messages

    def _read_messages(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            received = self.hub.receive()
            if received is None:
                return
            peer, frame = received
            try:
                message = decode(frame)
            except msgspec.DecodeError:
                self.dropped += 1
                continue
            self._take(peer, message, self.clock())

    def _take(self, peer: bytes, message: AnyMessage, now: float) -> None:
        match message:
            case messages.Heartbeat():
                self._take_beat(peer, message, now)
            case messages.NodeStarting() | messages.NodeReady() | messages.NodeFailed():
                self._take_from_node(peer, message, now)
            case messages.EngineAttached(pipeline=pipeline, pid=pid):
                self.peers.add_engine(pipeline, peer)
                self.handle(event_of(message), now)
                if not self.watcher.watch(EngineProcess(pipeline, pid), (pid,)):
                    self.handle(events.EngineLost(pipeline, pid), now)
            case messages.EngineReady() | messages.EngineReport() | messages.Formed() | messages.MemberFailed():
                self._take_from_engine(peer, message, now)
            case messages.Subscribe():
                self.observers.subscribe(peer, message, now)
            case messages.AskStatus():
                records = {"records": {"lost": self.records.lost, "problem": self.records.problem}}
                document = msgspec.json.encode(status_document(self.cluster, self.main_pid) | records)
                self.hub.send(peer, encode(messages.Status(document)))
            case messages.AskMetrics():
                text = self.metrics.render(self.cluster, self.dropped, self.records.lost)
                self.hub.send(peer, encode(messages.Metrics(text)))
            case messages.DrainNode() | messages.JoinNode():
                self._take_request(peer, message, now)
            case _:
                self.dropped += 1

    def _take_request(self, peer: bytes, request: messages.DrainNode | messages.JoinNode, now: float) -> None:
        ticket = self._next_ticket = self._next_ticket + 1
        self._tickets[ticket] = peer
        if isinstance(request, messages.DrainNode):
            self.handle(events.DrainRequested(request.node, ticket), now)
            return
        self.handle(events.JoinRequested(request.node, request.pid, ticket), now)
        slot = self.cluster.slots.get(request.node)
        if slot is not None and slot.pids == (request.pid,):
            self._watch_member(slot.member, slot.pids, now)

    def _take_beat(self, peer: bytes, heartbeat: messages.Heartbeat, now: float) -> None:
        member = heartbeat.member
        if not self.peers.knows(peer) or not self.cluster.member_is_current(member):
            if self.cluster.member_is_current(member):
                # It lives, over whichever connection; what it does it says when it is known.
                for event in self.detector.beat(member, now, Beat(heard=heartbeat.heard)):
                    self.handle(event, now)
                # It has to hear us as well, which it shows by its introduction: then its beats are answered.
                if heartbeat.number and not self.cluster.awaits_introduction(member):
                    self.detector.answered(member, heartbeat.number, now)
            self._ask_for_introduction(peer, now)
            return
        beat = Beat(
            running_seconds=heartbeat.step_running_seconds,
            pipeline=heartbeat.step_pipeline,
            is_overdue=heartbeat.step_overdue,
            heard=heartbeat.heard,
        )
        for event in self.detector.beat(member, now, beat):
            self.handle(event, now)
        self.stillness.beat(member, Work(heartbeat.step_pipeline, heartbeat.done), now)
        if heartbeat.pace is not None:
            for slow in self.paces.hear(member, self.cluster.slots[member.node].stage, heartbeat.pace, now):
                self.handle(slow, now)
        if heartbeat.number and self._send(peer, messages.BeatHeard(heartbeat.number)):
            self.detector.answered(member, heartbeat.number, now)

    def _take_from_node(
        self, peer: bytes, message: messages.NodeStarting | messages.NodeReady | messages.NodeFailed, now: float
    ) -> None:
        info = message.info if isinstance(message, messages.NodeReady) else None
        member = info.member if info is not None else message.member  # type: ignore[union-attr]
        self.peers.add_member(member, peer)
        self.handle(event_of(message), now)
        if isinstance(message, messages.NodeStarting):
            # Before it is ready it may be busy for long. What was on its way for long may say so of one that is.
            if self.cluster.loads(member):
                self.detector.forget(member)
            self._watch_member(member, message.pids, now)
        elif info is not None:
            self._watch_member(member, info.pids, now)
            if self.cluster.member_is_current(member):
                self.detector.watch(member, now)
        if not self.cluster.member_is_current(member):
            self.peers.remove_member(member)

    def _take_from_engine(self, peer: bytes, message: FromPeer, now: float) -> None:
        pipeline = getattr(message, "pipeline", None)
        if pipeline is None or self.peers.engines.get(pipeline) != peer:
            self._ask_for_introduction(peer, now)
            return
        event = event_of(message)
        self.handle(event, now)
        known = self.cluster.pipeline(pipeline)
        if isinstance(event, events.EngineReport) and known is not None:
            still = self.stillness.judge(event, known.members, known.leaving, now)
            if still is not None:
                self.handle(still, now)

    def _ask_for_introduction(self, peer: bytes, now: float) -> None:
        if self.peers.may_ask(peer, now):
            self.hub.send(peer, encode(messages.Introduce()))

    # ---- commands

    def _carry_out(self, command: AnyCommand, now: float) -> None:
        match command:
            case (
                events.Form(pipeline=pipeline)
                | events.Suspend(pipeline=pipeline)
                | events.AssignStandbys(pipeline=pipeline)
                | events.Hasten(pipeline=pipeline)
            ):
                if not self._send(self.peers.engines.get(pipeline), order_of(command)):
                    log.warning("an order for pipeline %d did not reach its engine", pipeline)
            case events.StartNode(member=member, stage=stage):
                self.launcher.request(member, stage, now + self.config.timeouts.startup_timeout_s)
            case events.KillNode(member=member, pids=pids):
                self._kill(member, pids, now)
            case events.KillEngine(pipeline=pipeline, pid=pid):
                self.watcher.kill(EngineProcess(pipeline, pid), (pid,))
            case events.Retire(member=member):
                self._send(self.peers.members.get(member), messages.Retire())
            case events.Answer(ticket=ticket):
                answer = messages.Answered(command.refusal, command.member, command.stage)
                self._send(self._tickets.pop(ticket, None), answer)
            case events.Narrate(text=text):
                self._narrate(text, now)
            case events.Abort(reason=reason):
                log.error("%s", reason)
                self.observers.abort(reason)

    def _narrate(self, text: str, now: float) -> None:
        log.info("%s", text)
        self.observers.narrate(now + self.cluster.unix_offset, text)

    def _send(self, peer: bytes | None, message: AnyMessage) -> bool:
        return peer is not None and self.hub.send(peer, encode(message))

    def _kill(self, member: Member, pids: tuple[int, ...], now: float) -> None:
        self.watcher.kill(member, pids)
        self._killed[member] = (now + KILL_AGAIN_SECONDS, pids)


# ---- the process


class Bell:
    """Makes signals readable, so that the loop hears of them between two events and never inside one."""

    def __init__(self) -> None:
        self._read_end, self._write_end = socket.socketpair()
        self.descriptor = self._read_end.fileno()
        """Becomes readable when the process is asked to end."""
        self._write_end.setblocking(False)
        signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)


def run(controller: Controller, hub: ZmqHub) -> None:
    """Turn until a signal asks for the end."""
    bell = Bell()
    controller.start()
    interval_ms = controller.config.timeouts.watch_interval_ms
    poller = zmq.Poller()
    poller.register(hub.socket, zmq.POLLIN)
    poller.register(bell.descriptor, zmq.POLLIN)
    ready: dict[object, int] = {}
    while bell.descriptor not in ready:
        controller.turn(messages_wait=hub.socket in ready)
        ready = dict(poller.poll(interval_ms))
    controller.stop()


def main() -> int:
    """Be the controller of the cluster that the environment names."""
    lose_what_cannot_be_written()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = configuration.load()
        hub = ZmqHub(config.controller_address)
    except (KevlarFlowError, OSError, KeyError, msgspec.DecodeError, zmq.ZMQError) as error:
        log.error("the controller cannot start: %s: %s", type(error).__name__, error)
        return 1
    run(Controller(config, hub, main_pid=os.getppid()), hub)
    return 0


if __name__ == "__main__":
    sys.exit(main())
