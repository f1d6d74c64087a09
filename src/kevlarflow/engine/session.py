"""The shell around `recovery.pipeline`: it owns the channels to the nodes and carries out the core's commands.

Two threads use it. vLLM's engine thread issues steps and waits for their results; the attendant
(`engine.attendant`) brings the controller's orders. One lock, the door, guards the core and the channels, and whoever
holds it pumps messages. An order is left in the mailbox and a bell is rung: if the engine thread is waiting for a
step, it hears the bell and carries the order out itself; if it is not (an idle engine), the attendant finds the door
open and does. So recovery needs no traffic, and always runs between two messages, never inside one.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pickle
import threading
import time
from concurrent.futures import Future
from typing import Any

import msgspec

from kevlarflow.engine import translate
from kevlarflow.engine.links import NodeLinks
from kevlarflow.engine.orders import SchedulerOrders
from kevlarflow.errors import StartupFailed
from kevlarflow.recovery import pipeline_events as core
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import Step, StepResult
from kevlarflow.recovery.recompute import Limits
from kevlarflow.recovery.watched import LaneLeft, TimePassed, WatchedPipeline
from kevlarflow.types import Epoch, LaneCoverage, PipelineId, Stage
from kevlarflow.wire import steps
from kevlarflow.wire.answers import event_of
from kevlarflow.wire.commands import NOTHING, execute_header, letters
from kevlarflow.wire.messages import (
    AnyMessage,
    EngineAttached,
    Form,
    Formed,
    Hasten,
    MemberFailed,
    Standbys,
    Suspend,
)
from kevlarflow.wire.orders import formation_ordered, suspension_ordered

log = logging.getLogger("kevlarflow.engine")

MAX_ORDERS = 1_000
"""Orders of the controller that may wait; beyond that the oldest is lost, and a newer one replaces what it said."""
MAX_REPORTS = 1_000
"""What the attendant has yet to tell; beyond that the oldest is lost. The controller asks again for what it misses."""
PUMP_MS = 200
"""How long the engine thread waits for messages before it looks at the time."""
START_UP_PUMP_MS = 100
"""The same while it starts, when it has other things to look at."""
DESCRIBE_AGAIN_SECONDS = 1.0


class StepFuture(Future[Any]):
    """The result of a step; waiting for it pumps the session, so recovery runs on the waiting thread."""

    def __init__(self, session: Session, sequence: int) -> None:
        super().__init__()
        self._session = session
        self._sequence = sequence

    def result(self, timeout: float | None = None) -> Any:
        """The step's `ModelRunnerOutput`, or an `AbandonedOutput`. `timeout` is seconds, None for ever."""
        if not self.done():
            self._session.wait_for(self, timeout)
        return super().result(timeout=0)


class Session:
    """See the module's text."""

    def __init__(self, pipeline: PipelineId, limits: Limits) -> None:
        self.pipeline = pipeline
        self._core = WatchedPipeline(limits)
        self._door = threading.Lock()
        self._mailbox: collections.deque[Form | Suspend | Standbys | Hasten] = collections.deque(maxlen=MAX_ORDERS)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._links = NodeLinks(self._bell)
        self._links.use(())
        self._futures: dict[int, StepFuture] = {}
        self._payloads: dict[int, tuple[bytes, bytes]] = {}
        self._descriptions: dict[Stage, bytes] = {}
        self._read_all_at = 0.0
        """When no message was waiting to be read. What waits unread is nobody's fault but ours."""
        self._orders = SchedulerOrders()
        """What the scheduler has yet to hear."""
        self.shares = 1
        """Lanes that share the KV memory of the busiest node, as the last order said."""
        self._replicated_last: dict[Stage, steps.Replicated] = {}
        self._dropped_replicas: collections.Counter[Stage] = collections.Counter()
        self._lost_requests = 0
        self._last_replication: tuple[LaneCoverage, ...] = ()
        self.reports: collections.deque[AnyMessage] = collections.deque(maxlen=MAX_REPORTS)
        """What the attendant has to tell the controller."""
        self.report_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._introduction = self._introduce()

    # ---- the engine thread

    def begin_scheduling(self) -> tuple[int, SchedulerOrders]:
        """Called before the scheduler makes a step; returns (formation count, what to do first)."""
        with self._door:
            orders, self._orders = self._orders, SchedulerOrders()
            orders.pause = self._core.standing is Standing.WAITING
            orders.end_all = orders.end_all or self.suspended_reason
            return self._core.formations, orders

    def spare_newcomers(self) -> None:
        """The scheduler has nothing left of what it had when it was last told to end everything."""
        with self._door:
            self._orders.end_all = ""

    def issue(self, step: Step, scheduled: Any, grammar: Any) -> StepFuture:
        """Send a step to the pipeline."""
        future = StepFuture(self, step.sequence)
        payload = pickle.dumps(scheduled, pickle.HIGHEST_PROTOCOL)
        grammar_payload = pickle.dumps(grammar, pickle.HIGHEST_PROTOCOL)
        with self._door:
            self._futures[step.sequence] = future
            self._payloads[step.sequence] = (payload, grammar_payload)
            self._take_orders()
            self._handle(core.StepIssued(step))
        return future

    def wait_for(self, future: StepFuture, timeout: float | None) -> None:
        """Pump until `future` is done, or `timeout` seconds have passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._door:
            while not future.done() and (deadline is None or time.monotonic() < deadline):
                self._pump(PUMP_MS)

    def note_lost(self, requests: int) -> None:
        """The scheduler ended this many requests with an error."""
        with self._door:
            self._lost_requests += requests

    @property
    def suspended_reason(self) -> str:
        """Why the pipeline cannot generate; empty when it can."""
        return self._core.reason if self._core.standing is Standing.SUSPENDED else ""

    @property
    def suspended(self) -> bool:
        """Whether it was told that a stage has no node, and has not been formed since."""
        return self._core.standing in (Standing.WAITING, Standing.SUSPENDED)

    @property
    def in_flight(self) -> int:
        """Steps issued and not completed."""
        return len(self._core.in_flight)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._core.epoch

    @property
    def introduction(self) -> EngineAttached:
        """What it serves, all as of one moment: whoever asks has not got the door."""
        return self._introduction

    @property
    def forming(self) -> bool:
        """Whether the nodes have yet to answer in the current epoch."""
        return self._core.standing is Standing.FORMING

    @property
    def awaited(self) -> tuple[Stage, ...]:
        """Stages whose nodes have yet to answer in the current epoch."""
        return self._core.awaited

    @property
    def still_seconds(self) -> float:
        """How long it has waited for its nodes without an answer, as of when all messages were read."""
        return self._core.still_seconds(self._read_all_at)

    # ---- start-up

    def wait_formed(self, timeout: float) -> list[Any]:
        """Wait until the pipeline is formed; returns the unpickled description of each stage.

        Raises `StartupFailed` after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._door:
            while self._core.standing is not Standing.SERVING and time.monotonic() < deadline:
                self._pump(START_UP_PUMP_MS)
            due = 0.0
            while len(self._descriptions) < max(1, len(self._core.nodes)) and time.monotonic() < deadline:
                if time.monotonic() >= due:
                    due = time.monotonic() + DESCRIBE_AGAIN_SECONDS
                    for stage in set(map(Stage, range(len(self._core.nodes)))) - self._descriptions.keys():
                        self._links.send(self._core.nodes[stage], steps.Describe())
                self._pump(START_UP_PUMP_MS)
        if len(self._descriptions) < max(1, len(self._core.nodes)):
            raise StartupFailed(f"pipeline {self.pipeline} was not formed within {timeout:.0f} s: see the nodes' logs")
        return [pickle.loads(description) for _, description in sorted(self._descriptions.items())]

    def close(self) -> None:
        """Give up the lanes and close all channels."""
        with self._door:
            for node in self._core.nodes:
                self._links.send(node, steps.Leave(self.pipeline, self._core.epoch))
            self._links.close()

    # ---- the attendant

    def post(self, order: Form | Suspend | Standbys | Hasten) -> None:
        """Leave an order of the controller and ring the bell."""
        self._mailbox.append(order)
        os.eventfd_write(self._bell, 1)

    def attend(self, patience: float) -> bool:
        """Carry out orders if the engine thread is away; returns whether there is still something to do.

        Waits at most `patience` seconds for the door, and then pumps for about as long.
        """
        if not self._mailbox and self._core.standing is not Standing.FORMING:
            return False
        if self._door.acquire(timeout=patience):
            try:
                self._pump(round(patience * 1_000))
            finally:
                self._door.release()
        return bool(self._mailbox) or self._core.standing is Standing.FORMING

    def glance(self) -> None:
        """Read what waits, if nobody else does."""
        if self._door.acquire(blocking=False):
            try:
                self._pump(0)
            finally:
                self._door.release()

    # ---- behind the door

    def _pump(self, timeout_ms: int) -> None:
        self._take_orders()
        received = self._links.receive(timeout_ms)
        for header, payload in received:
            self._receive(header, payload)
        if not received:
            self._read_all_at = time.monotonic()
        self._handle(TimePassed())
        self._take_orders()

    def _take_orders(self) -> None:
        # The bell first: an order is in the mailbox before the bell is rung for it.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while self._mailbox:
            order = self._mailbox.popleft()
            if isinstance(order, Form):
                formation, self.shares = formation_ordered(order, self.shares), order.shares
                self._handle(formation)
            elif isinstance(order, Suspend):
                self._handle(suspension_ordered(order))
            elif isinstance(order, Hasten):
                self._hasten(order)
            else:
                self._handle(core.StandbysAssigned(order.standbys))

    def _hasten(self, order: Hasten) -> None:
        if order.epoch == self._core.epoch:
            for stage in order.stages:
                self._links.send(self._core.nodes[stage], steps.Hasten(self.pipeline, order.epoch))

    def _receive(self, header: steps.AnyStepMessage, payload: list[bytes]) -> None:
        match header:
            case steps.Executed(epoch=epoch, sequence=sequence):
                if epoch == self._core.epoch and sequence in self._futures:
                    self._handle(core.StepExecuted(epoch, sequence, _result_of(payload[0])))
            case steps.Description(stage):
                self._descriptions[stage] = payload[0]
            case steps.Refused() | steps.Unlinked():
                self._receive_complaint(header)
            case _:
                self._receive_answer(header, payload)

    def _receive_answer(self, header: steps.AnyStepMessage, payload: list[bytes]) -> None:
        results = self._results_of(header, payload) if isinstance(header, steps.Joined) else {}
        event = event_of(header, results)
        if event is None:
            log.warning("%s makes no sense to an engine", type(header).__name__)
            return
        match header:
            case steps.StepFailed(sequence=sequence, stage=stage, reason=reason):
                log.error("step %d failed at stage %d: %s", sequence, stage, reason)
            case steps.Replicated(stage=stage, dropped=dropped):
                self._replicated_last[stage] = header
                self._dropped_replicas[stage] += len(dropped)
            case steps.Left(member=member):
                self._links.part(member)
        self._handle(event)

    def _results_of(self, joined: steps.Joined, payload: list[bytes]) -> dict[tuple[Epoch, int], StepResult]:
        """What came along with `Joined` of steps that are in flight."""
        if joined.epoch != self._core.epoch:
            return {}
        came = zip(joined.results, payload, strict=True)
        return {
            (epoch, sequence): _result_of(packed) for (epoch, sequence), packed in came if sequence in self._futures
        }

    def _receive_complaint(self, header: steps.Refused | steps.Unlinked) -> None:
        newest, _ = self._core.ordered
        if header.epoch != newest:
            return
        if isinstance(header, steps.Refused):
            self._member_failed(header.stage, header.reason)
        else:
            self._member_failed(header.stage, "the connection to it broke", unlinked=True)

    def replication(self) -> tuple[LaneCoverage, ...]:
        """How far the replication of each stage is.

        The engine thread holds the door most of the time, and this is only for people: so it looks without the door,
        and when something changes meanwhile, it says what it said before.
        """
        try:
            self._last_replication = self._replication()
        except (RuntimeError, IndexError, KeyError):
            log.debug("the pipeline changed while its replication was looked at")
        return self._last_replication

    def _replication(self) -> tuple[LaneCoverage, ...]:
        reports = []
        for stage in range(len(self._core.nodes)):
            standby, tokens, covered = self._core.coverage_of(Stage(stage))
            member = standby.member if standby is not None else None
            lane = LaneCoverage(Stage(stage), member, tokens, covered, dropped=self._dropped_replicas[Stage(stage)])
            last = self._replicated_last.get(Stage(stage))
            if last is not None and standby is not None and last.standby == standby.member:
                lane = msgspec.structs.replace(
                    lane,
                    used_bytes=last.used_bytes,
                    limit_bytes=last.limit_bytes,
                    full_bytes=last.full_bytes,
                    partial_bytes=last.partial_bytes,
                    refused=last.refused,
                )
            reports.append(lane)
        return tuple(reports)

    def _handle(self, event: core.Event | LaneLeft | TimePassed) -> None:
        epoch = self._core.epoch
        commands = self._core.handle(event, time.monotonic())
        if self._core.epoch != epoch and self._core.standing is Standing.FORMING:
            self._links.use(self._core.nodes)
        for command in commands:
            self._carry_out(command)
        self._introduction = self._introduce()

    def _introduce(self) -> EngineAttached:
        core = self._core
        facts = (Epoch(core.epoch), core.members, self.shares, self.suspended, self.forming)
        return EngineAttached(self.pipeline, os.getpid(), *facts)

    def _carry_out(self, command: core.Command) -> None:
        match command:
            case core.Execute():
                self._execute(command)
            case core.Deliver(sequence, left_out, output):
                self._finish(sequence, translate.completed(output, left_out))
            case core.Abandon(sequence, reason):
                self._finish(sequence, translate.abandoned(reason))
            case core.AbandonEverything(reason):
                self._orders.end_all = reason
            case core.SetAside() | core.UseBlocks() | core.EvictPrefixCache():
                self._orders.add(command)
            case core.FormationDone(epoch, seconds, requests, tokens):
                lost, self._lost_requests = self._lost_requests, 0
                self._report(Formed(self.pipeline, epoch, seconds, requests, lost, tokens))
            case core.RequestFormation(stage, reason):
                self._member_failed(stage, reason)
            case _:
                self._form(command)

    def _form(self, command: core.FormingCommand) -> None:
        for letter in letters(command, self.pipeline, self._core.epoch, self._core.nodes):
            payload = [] if letter.content is NOTHING else [pickle.dumps(letter.content, pickle.HIGHEST_PROTOCOL)]
            for node in letter.to:
                match command:
                    case core.Leave():
                        self._links.send_farewell(node, letter.header)
                    case core.Prepare():
                        self._links.send_ahead(node, letter.header, *payload)
                    case _:
                        self._links.send(node, letter.header, *payload)

    def _execute(self, command: core.Execute) -> None:
        payload = self._payloads[command.sequence]
        scheduled, grammar = translate.leave_out(payload, command.left_out) if command.left_out else payload
        header = execute_header(command, self.pipeline, self._core.epoch)
        last = len(self._core.nodes) - 1
        for stage, node in enumerate(self._core.nodes):
            self._links.send(node, header, scheduled, grammar if stage == last else _NONE)

    def _finish(self, sequence: int, value: Any) -> None:
        self._payloads.pop(sequence, None)
        self._futures.pop(sequence).set_result(value)

    def _member_failed(self, stage: Stage, reason: str, *, unlinked: bool = False) -> None:
        epoch, nodes = self._core.ordered
        self._report(MemberFailed(self.pipeline, nodes[stage].member, reason, epoch, unlinked))

    def _report(self, message: AnyMessage) -> None:
        self.reports.append(message)
        os.eventfd_write(self.report_bell, 1)


def _result_of(packed: bytes) -> StepResult:
    """Unpack what the last stage says of a step."""
    return translate.result_of(*pickle.loads(packed))


_NONE = pickle.dumps(None)
