"""A simulated engine: the real `recovery.pipeline` between a toy of vLLM's scheduler and simulated channels.

It follows `engine.session` and `engine.scheduler`: orders of the controller wait in a mailbox until somebody holds the
door, a step is scheduled first and issued a moment later, and a step without a result ends every request.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict, deque
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from kevlarflow.recovery import pipeline_events as core
from kevlarflow.recovery.capacity import without
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import LedgerEntry, Step
from kevlarflow.recovery.recompute import Limits
from kevlarflow.recovery.suspicion import NOT_AGAIN, POSSIBLE_REASON, REASON
from kevlarflow.recovery.watched import LaneLeft, TimePassed, WatchedPipeline
from kevlarflow.sim.errors import NoReason, NotFenced, Unbounded
from kevlarflow.sim.network import Process
from kevlarflow.sim.scheduler import Blocks, Request, ToyScheduler, completed
from kevlarflow.types import Epoch, LaneCoverage, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import messages, steps
from kevlarflow.wire.answers import event_of
from kevlarflow.wire.commands import NOTHING, execute_header, letters
from kevlarflow.wire.orders import formation_ordered, suspension_ordered

if TYPE_CHECKING:
    from kevlarflow.sim.fleet import Fleet
    from kevlarflow.sim.node import Node

Order = messages.Form | messages.Suspend | messages.Standbys | messages.Hasten

STEPS_OF_A_LIFE = 1_000_000
"""No engine uses a step's number again, not even a later one: see `engine.executor`."""
RECOMPUTED_REQUESTS = 3
MAX_IN_FLIGHT = 64
"""Steps that an engine may have issued and not completed: as many as stages, and what only says who has ended."""


class Engine(Process):
    """The engine of one pipeline, in one of its lives."""

    kind = "engine"

    def __init__(self, fleet: Fleet, pipeline: PipelineId, life: int, pid: int) -> None:
        super().__init__(fleet.timeline, f"engine-{pipeline}#{life}")
        self.fleet = fleet
        self.pipeline = pipeline
        self.life = life
        self.pid = pid
        shape = fleet.plan.shape
        self.core = WatchedPipeline(Limits(shape.budget, RECOMPUTED_REQUESTS, shape.block_size, shape.stages))
        self.scheduler = ToyScheduler(
            fleet.rng,
            Blocks(shape.blocks, shape.block_size),
            shape.budget,
            shape.max_running,
            first_step=life * STEPS_OF_A_LIFE,
        )
        self.started = False
        """Whether it has been formed once, and so has a scheduler."""
        self._may_end: set[str] = set()
        """Requests that a suspension gave it a reason to end: those that it had then, or got before that was done."""
        self.prepared: defaultdict[Epoch, set[Member]] = defaultdict(set)
        """Who has said in which epoch that it will run steps next."""
        self._lines: dict[Member, str] = {}
        """The open channels to nodes."""
        self._mailbox: deque[Order] = deque()
        self._inputs: deque[tuple[str, Request]] = deque()
        self._steps: dict[int, tuple[Step, dict[str, list[int]]]] = {}
        self._finished: dict[int, dict[str, list[int]] | str] = {}
        """Steps whose futures are done: their tokens, or why there are none."""
        self._waits_for: deque[int] = deque()
        self._scheduled: Step | None = None
        """Scheduled, and not issued yet."""
        self._told: list[core.EvictPrefixCache | core.SetAside | core.UseBlocks] = []
        """What the scheduler has to do before its next step."""
        self._abandonment = ""
        self._shares = 1
        self._turn_due = False

    # ---- the controller

    def introduce(self) -> None:
        """Say who it is and what it serves."""
        core = self.core
        suspended = core.standing in (Standing.WAITING, Standing.SUSPENDED)
        facts = (Epoch(core.epoch), core.members, self._shares, suspended, core.standing is Standing.FORMING)
        self._tell(messages.EngineAttached(self.pipeline, self.pid, *facts))

    def _tell(self, message: messages.AnyMessage) -> None:
        controller = self.fleet.controller
        deliver = functools.partial(controller.take, self, message)
        self.fleet.network.send(self, controller, ("control", self.name), deliver)

    def report(self) -> None:
        """Tell its load."""
        self.fleet.checks.left(self)
        self._handle(TimePassed())
        scheduler = self.scheduler
        running, waiting = len(scheduler.running), len(scheduler.waiting) + len(scheduler.held) + len(self._inputs)
        blocks = self.fleet.plan.shape.blocks if self.started else 0
        load = (running, waiting, blocks, len(self.core.in_flight))
        forming, still = self.core.standing is Standing.FORMING, self.core.still_seconds(self._read_all_at)
        epoch, replication = Epoch(self.core.epoch), self._replication()
        awaited = self.core.awaited
        self._tell(messages.EngineReport(self.pipeline, *load, replication, epoch, forming, still, awaited))

    @property
    def _read_all_at(self) -> float:
        """When it had read all that had arrived: what came while it was stopped it reads a moment after it goes on."""
        return self.frozen_since if self.thawed_at == self.timeline.now else self.timeline.now

    def _replication(self) -> tuple[LaneCoverage, ...]:
        reports = []
        for stage in range(len(self.core.nodes)):
            standby, tokens, covered = self.core.coverage_of(Stage(stage))
            reports.append(LaneCoverage(Stage(stage), standby.member if standby else None, tokens, covered))
        return tuple(reports)

    def post(self, order: Order) -> None:
        """Leave an order in the mailbox: it is carried out at once, or when a step is issued, or a little later."""
        self._mailbox.append(order)
        if self.fleet.rng.random() < 0.5:
            self._take_orders()
        else:
            self.after(self.fleet.rng.random() * self.fleet.plan.shape.step * 2, self._take_orders)

    def _take_orders(self) -> None:
        while self._mailbox:
            order = self._mailbox.popleft()
            if isinstance(order, messages.Form):
                formation, self._shares = formation_ordered(order, self._shares), order.shares
                told = {each.member for each in order.losses} & {each.member for each in self.core.nodes}
                if (formation.lost or told) and order.epoch > self.core.epoch:
                    self.fleet.blame.note_order(order, self.core.nodes)
                self._handle(formation)
            elif isinstance(order, messages.Hasten):
                if order.epoch == self.core.epoch:
                    for stage in order.stages:
                        self._send(self.core.nodes[stage], steps.Hasten(self.pipeline, order.epoch))
            elif isinstance(order, messages.Suspend):
                if not order.waits:
                    self._may_end |= {request.name for request in self._everybody()}
                if order.epoch > self.core.epoch:
                    self.fleet.blame.note_order(order, self.core.nodes)
                self._handle(suspension_ordered(order))
                self.fleet.counts["waits for a node"] += self.core.standing is Standing.WAITING
            else:
                self._handle(core.StandbysAssigned(order.standbys))

    def _use(self, nodes: tuple[NodeInfo, ...]) -> None:
        """Channels to nodes that are not used any more are closed; one that is opened anew keeps no order with it."""
        fresh = {each.member: f"{self.name} {self.fleet.network.sent} {each.member}" for each in nodes}
        self._lines = {member: self._lines.get(member, line) for member, line in fresh.items()}

    # ---- the engine thread

    def add(self, request: Request) -> None:
        """A client asks."""
        self.fleet.blame.note_added(request.name, self.pipeline)
        if self.suspended_reason or self._abandonment:
            self._may_end.add(request.name)
        self._inputs.append(("add", request))
        self.poke()

    def abort(self, request: Request) -> None:
        """A client has gone."""
        self._inputs.append(("abort", request))
        self.poke()

    def poke(self) -> None:
        """There may be something to do."""
        if not self._turn_due and self.started:
            self._turn_due = True
            self.after(self.fleet.plan.shape.step * 0.1 * self.fleet.rng.random(), self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._scheduled is not None:
            self._issue(self._scheduled)
        else:
            self._take_inputs()
            choices = []
            if self._waits_for and self._waits_for[0] in self._finished:
                choices.append(self._update)
            if self._may_schedule and len(self._waits_for) < self.fleet.plan.shape.stages:
                choices.append(self._schedule)
            if not choices:
                return
            if not self.fleet.rng.choice(choices)():
                return
        self.poke()

    @property
    def _may_schedule(self) -> bool:
        """An idle engine does not ask its scheduler; requests that are held back make it look for news only."""
        scheduler = self.scheduler
        return scheduler.has_work or bool(scheduler.held and (self._told or self._abandonment))

    def _take_inputs(self) -> None:
        while self._inputs:
            what, request = self._inputs.popleft()
            if what == "add":
                if not self.scheduler.unfinished:
                    self._abandonment = ""
                self.scheduler.waiting.append(request)
            elif self.scheduler.has(request):
                self.scheduler.abort(request)
                self.scheduler.ended.clear()

    def _schedule(self) -> bool:
        reason, self._abandonment = self._abandonment or self.suspended_reason, ""
        if reason:
            self._end_all(reason, {request.name for request in self.scheduler.unfinished})
        told, self._told = self._told, []
        self.scheduler.obey(told)
        self._end_failed()
        paused = self.core.standing is Standing.WAITING
        step, known = self.scheduler.schedule(self.core.formations, paused=paused)
        says_something = bool(step.scheduled or step.finished or step.preempted)
        if not says_something and self.fleet.rng.random() < 0.8:
            return bool(self._waits_for and self._waits_for[0] in self._finished)
        self._steps[step.sequence] = (step, known)
        self._scheduled = step
        return True

    def _end_failed(self) -> None:
        """Requests that were set aside may end with an error, for few reasons only."""
        for request in self.scheduler.ended:
            if request.error in (REASON, POSSIBLE_REASON):
                self.fleet.blame.check(request.name, request.error, self.pipeline)
                self.fleet.counts["requests ended for what they cost"] += 1
            elif not self.fleet.blame.may_end(request.name, request.error.removesuffix(f": {NOT_AGAIN}")):
                raise NoReason(f"{self} ends {request.name}: {request.error}")
            self.fleet.clients.end(request, request.error)
        self.scheduler.ended.clear()

    def _issue(self, step: Step) -> None:
        self._scheduled = None
        self._take_orders()
        if step.scheduled:
            self._waits_for.append(step.sequence)
        self._handle(core.StepIssued(step))
        if len(self.core.in_flight) > MAX_IN_FLIGHT:
            raise Unbounded(f"{self} has {len(self.core.in_flight)} steps in flight")

    def _update(self) -> bool:
        sequence = self._waits_for.popleft()
        step, _ = self._steps.pop(sequence)
        result = self._finished.pop(sequence)
        if isinstance(result, str):
            self._end_all(result, step.scheduled)
            return True
        self.scheduler.update(step, result)
        for request in [*self.scheduler.unfinished, *self.scheduler.ended]:
            if request.name in step.scheduled:
                self.fleet.clients.check_tokens(request)
        for request in self.scheduler.ended:
            self.fleet.clients.end(request, "")
        self.scheduler.ended.clear()
        return True

    def _end_all(self, reason: str, names: Container[str]) -> None:
        scheduler = self.scheduler
        for request in [each for each in scheduler.unfinished if each.name in names]:
            if not reason or request.name not in self._may_end:
                raise NoReason(f"{self} ends {request.name}, which no suspension concerns: {reason}")
            scheduler.abort(request)
            self.fleet.clients.end(request, reason)
        scheduler.ended.clear()

    def _everybody(self) -> list[Request]:
        """Requests that have not ended, those that the scheduler has not seen yet included."""
        return [*self.scheduler.unfinished, *(request for what, request in self._inputs if what == "add")]

    @property
    def suspended_reason(self) -> str:
        """Why it cannot generate; empty when it can."""
        return self.core.reason if self.core.standing is Standing.SUSPENDED else ""

    @property
    def in_flight(self) -> int:
        """Steps that are not over for the scheduler."""
        return len(self._waits_for) + len(self._steps) + len(self._inputs)

    # ---- answers of nodes

    def take(self, source: Node, header: steps.AnyStepMessage, payload: Any) -> None:
        """A message of a node has arrived; channels to nodes that are not used any more are closed."""
        if isinstance(header, steps.Left):
            self._handle(LaneLeft(header.epoch, header.member))
            return
        if source.member not in self._lines:
            return
        if isinstance(header, steps.Flushed):
            self.fleet.trigger(header, source)
            if not self.alive:
                return
        event = self._event_of(header, payload)
        if isinstance(event, core.StageJoined):
            self._hear(source, event)
        elif event is None:
            assert isinstance(header, steps.Refused | steps.Unlinked)
            if header.epoch == self.core.ordered[0]:
                reason = header.reason if isinstance(header, steps.Refused) else ""
                self._member_failed(source.member, reason, unlinked=isinstance(header, steps.Unlinked))
        elif isinstance(event, core.ReplicasConfirmed):
            self._handle(event)
        else:
            self._take_answer(source, event)

    @staticmethod
    def _event_of(header: steps.AnyStepMessage, payload: Any) -> Any:
        if isinstance(header, steps.Executed):
            return core.StepExecuted(header.epoch, header.sequence, payload)
        if isinstance(header, steps.Joined):
            return event_of(header, dict(zip(header.results, payload, strict=True)))
        return event_of(header)

    def _hear(self, source: Node, event: core.StageJoined) -> None:
        """The last stage says along what it has sampled before."""
        before = len(self.core.in_flight)
        self._take_answer(source, event)
        self.fleet.counts["steps heard of late"] += max(0, before - len(self.core.in_flight))

    def _take_answer(self, source: Node, event: Any) -> None:
        """Nothing of an old epoch may have an effect, nor anything of a member that does not serve in this one."""
        current = event.epoch == self.core.epoch
        awaited = current or (event.epoch == self.core.ordered[0] and source.info in self.core.ordered[1])
        if isinstance(event, core.StageRestored):
            self.prepared[event.epoch].add(source.member)
        before, epoch = self.core.in_flight, self.core.epoch
        commands = self.core.handle(event, self.timeline.now)
        if self.core.epoch != epoch and self.core.standing is Standing.FORMING:
            self._use(self.core.nodes)
        if not awaited and (commands or before != self.core.in_flight):
            raise NotFenced(f"{self} believes {event} of {source} in epoch {self.core.epoch}")
        self._carry_out_all(commands)

    # ---- commands of the core

    def _handle(self, event: core.Event | LaneLeft | TimePassed) -> None:
        epoch = self.core.epoch
        commands = self.core.handle(event, self.timeline.now)
        if self.core.epoch != epoch and self.core.standing is Standing.FORMING:
            self._use(self.core.nodes)
        self._carry_out_all(commands)

    def _carry_out_all(self, commands: list[core.Command]) -> None:
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: core.Command) -> None:
        match command:
            case core.Execute(sequence=sequence, left_out=left_out):
                header = execute_header(command, self.pipeline, self.core.epoch)
                self.fleet.counts["steps sent"] += 1
                step, known = self._steps[sequence]
                payload = without(step, left_out, self.fleet.plan.shape.block_size), known
                for node in self.core.nodes:
                    self._send(node, header, payload)
            case core.Deliver(sequence, left_out, output):
                self._finish(sequence, completed(output, left_out))
            case core.Abandon(sequence, reason):
                self._finish(sequence, reason)
            case core.AbandonEverything(reason):
                self._abandonment = reason
                self.fleet.counts["abandonments"] += 1
                self.poke()
            case core.EvictPrefixCache() | core.SetAside() | core.UseBlocks():
                self._told.append(command)
                self.poke()
            case core.FormationDone(epoch, seconds, requests, tokens):
                self._formed(messages.Formed(self.pipeline, epoch, seconds, requests, 0, tokens))
            case core.RequestFormation(stage, reason):
                self._member_failed(self.core.ordered[1][stage].member, reason)
            case _:
                self._form(command)

    def _finish(self, sequence: int, result: dict[str, list[int]] | str) -> None:
        if sequence in self._waits_for:
            self._finished[sequence] = result
        else:
            del self._steps[sequence]
        self.poke()

    def _formed(self, message: messages.Formed) -> None:
        self.fleet.counts["formations"] += 1
        self.fleet.counts["tokens recomputed"] += message.recomputed_tokens
        self.fleet.counts["requests carried over"] += message.requests
        if not self.started:
            self.started = True
            self._tell(messages.EngineReady(self.pipeline, self.fleet.plan.shape.blocks))
        self._tell(message)
        self.poke()

    def _form(self, command: core.FormingCommand) -> None:
        if isinstance(command, core.Prepare):
            self.fleet.counts["lanes prepared"] += 1
        for letter in letters(command, self.pipeline, self.core.epoch, self.core.nodes):
            payload = () if letter.content is NOTHING else letter.content
            if isinstance(command, core.Restore):
                payload = (_as_sent(command.entries), command.held)
            for node in letter.to:
                if isinstance(command, core.Prepare):
                    self._lines.setdefault(node.member, f"{self.name} {self.fleet.network.sent} {node.member}")
                self._send(node, letter.header, payload, once=isinstance(command, core.Leave))

    def _send(self, info: NodeInfo, header: steps.AnyStepMessage, payload: Any = (), *, once: bool = False) -> None:
        """`once`: over a channel of its own, which keeps no order with others."""
        node = self.fleet.node_at(info.step_address)
        if node is not None:
            line = f"once {self.fleet.network.sent}" if once else self._lines[info.member]
            self.fleet.network.send(self, node, line, functools.partial(node.deliver, self, header, payload))

    def _member_failed(self, member: Member, reason: str, *, unlinked: bool = False) -> None:
        self._tell(messages.MemberFailed(self.pipeline, member, reason, self.core.ordered[0], unlinked))


def _as_sent(entries: tuple[LedgerEntry, ...]) -> tuple[LedgerEntry, ...]:
    """What pickling makes of the ledger: a copy that nobody changes any more."""
    return tuple(
        dataclasses.replace(each, prompt=list(each.prompt), output=list(each.output), blocks=list(each.blocks))
        for each in entries
    )
