"""A simulated node: the real `node.lanes`, `node.work` and `node.lane_replicas`, over toy stages.

It follows `node.main` message by message: one thread that takes what has arrived, then runs one piece of work. Beside
it, replication copies one block at a time (`sim.copies`), and its copies may be overtaken by a step.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kevlarflow.node.lanes import Header, Lane, Lanes, Work, kept_output
from kevlarflow.node.work import Computed, Done, Workflow
from kevlarflow.recovery import standstill
from kevlarflow.recovery.detector import Beat
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.sim.blame import DRAWN_ERROR
from kevlarflow.sim.copies import CheckedReplicas, SimReplicator, ToyKv
from kevlarflow.sim.errors import NotFenced, Unbounded, WrongKv
from kevlarflow.sim.network import Process
from kevlarflow.sim.speed import Speed
from kevlarflow.sim.stage import LaneMemory, Memory, ToyStage
from kevlarflow.sim.thread import ASLEEP, BETWEEN_WORK, COMPUTING, IN_A_MESSAGE, Thread
from kevlarflow.types import Computing, Epoch, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import messages, steps

if TYPE_CHECKING:
    # The simulator runs without torch.
    from kevlarflow.node.stage import LaneRunner
    from kevlarflow.sim.engine import Engine
    from kevlarflow.sim.fleet import Fleet

MAX_QUEUED = 300
"""Work, or activations, that a toy run could ever have waiting on one node."""


class Record(NamedTuple):
    """What a node has written down to be computing (`wire.flight_record`), and the requests of that."""

    computing: Computing = Computing()
    requests: frozenset[str] = frozenset()


class Line(NamedTuple):
    """Whom to answer, and over which of the connections that there have been."""

    engine: Engine
    number: int
    name: bytes
    """What the node calls it."""


class Node(Process):
    """One member. `ready` is whether it has loaded."""

    kind = "node"
    cut_at = 0.0
    """When its connection to the controller last broke."""
    parted_at = float("-inf")
    """When it could last not reach somebody for a while."""
    left_at = float("-inf")
    """When it last gave up a lane."""
    ready_at = float("inf")
    told_to_leave_at: float | None = None
    killed_at: float | None = None
    """When SIGKILL was first meant for it."""
    stopped = False
    """Whether it was frozen for good."""
    hard_to_kill = False
    raises = False
    """Whether its next piece of work fails."""
    deaf = False
    """Whether it hears nothing of the controller, for good."""
    _works_for: PipelineId | None = None

    def __init__(self, fleet: Fleet, member: Member, stage: Stage, pid: int) -> None:
        super().__init__(fleet.timeline, str(member))
        self.fleet = fleet
        self.member = member
        self.stage = stage
        self.pid = pid
        self.ready = False
        self.born_at = fleet.timeline.now
        self.failed_at: list[float] = []
        """When somebody could not use it."""
        self.speed = Speed()
        self.beats = self._heard = 0
        self.thread = Thread(fleet.timeline, fleet.controller.config.timeouts.step_floor_ms / 1_000)
        self.record = Record()
        shape = fleet.plan.shape
        self.info = NodeInfo(
            member,
            stage,
            "sim",
            pid,
            (pid,),
            f"steps {member}",
            f"activations {member}",
            shape.lanes,
            shape.blocks,
            f"replicas {member}" if shape.replicates else "",
        )
        self._is_last = stage == shape.stages - 1
        memory = Memory(stage, shape.block_size)
        runners = [ToyStage(LaneMemory(memory), self._is_last, fleet.clients.cancelled) for _ in range(shape.lanes)]
        self.lanes = Lanes(cast("list[LaneRunner]", runners), shape.blocks, is_first_stage=stage == 0)
        self.replicator: SimReplicator | None = None
        self.replicas: CheckedReplicas | None = None
        if shape.replicates:
            kv = ToyKv(memory)
            self.replicator = SimReplicator(fleet, self, kv)
            self.replicas = CheckedReplicas(fleet, self, self.replicator, kv)
        self._workflow = Workflow(stage, shape.block_size, self.replicas, self, lambda: self.timeline.now)
        self._next_addresses: dict[PipelineId, str] = {}
        self._engines: dict[PipelineId, Line] = {}
        self._inbox: deque[tuple[Line, steps.AnyStepMessage, Any]] = deque()
        self._busy = False
        self._finishing: Callable[[], None] | None = None
        """What ends the work that runs."""
        self._works = 0
        self._done: Counter[PipelineId] = Counter()

    @property
    def ails(self) -> str:
        """What it has for good, and has to be found out; completes "node-0-1#1 ..."."""
        return "is stopped" if self.stopped else "hangs" if self.thread.hangs else "is deaf" if self.deaf else ""

    @property
    def is_well(self) -> bool:
        """Whether it does at once what it is told."""
        return not self.frozen and not self.ails and self.speed.factor == 1.0

    # ---- what it says to the controller

    def introduce(self) -> None:
        """Say who it is."""
        if self.ready:
            self._tell(messages.NodeReady(self.info, dict(self.lanes.epochs)))
        else:
            self._tell(messages.NodeStarting(self.member, self.stage, "sim", (self.pid,)))

    def work(self) -> standstill.Work:
        """What its beats say of its work."""
        return standstill.Work(self._works_for if self._busy else None, dict(self._done))

    def become_ready(self) -> None:
        """Its weights are loaded."""
        self.ready, self.ready_at = True, self.timeline.now
        self.introduce()

    def beat(self, *, heard: bool) -> Beat:
        """Its next heartbeat, of a thread that never hangs; `heard`: whether the answers so far have arrived."""
        if heard and not self.deaf:
            self._heard = self.beats
        self.beats += 1
        step = self.thread.look()
        return Beat(step.running_seconds, step.pipeline, step.is_overdue, self._heard)

    def _tell(self, message: messages.AnyMessage) -> None:
        controller = self.fleet.controller
        self._send(controller, ("control", self.name), functools.partial(controller.take, self, message))

    def _send(self, target: Process, line: Hashable, deliver: Any) -> None:
        self.fleet.network.send(self, target, line, deliver)

    # ---- coming in

    def deliver(self, engine: Engine, header: steps.AnyStepMessage, payload: Any) -> None:
        """A message of an engine has arrived."""
        number = self.fleet.network.connection(engine, self)
        self._inbox.append((Line(engine, number, f"{engine.name}/{number}".encode()), header, payload))
        self.look()

    def deliver_activations(self, pipeline: PipelineId, epoch: Epoch, sequence: int, rows: tuple[str, ...]) -> None:
        """The stage before is done with a step; `rows` are its requests, in the order of their activations."""
        self.lanes.add_activations(pipeline, epoch, sequence, {"epoch": epoch, "rows": rows})
        self.look()

    def look(self) -> None:
        """Take what has arrived, then run what can run; nothing of it in the middle of other work."""
        if self._busy or self.thread.hangs:
            return
        self.thread.wake()
        if self.thread.hangs_in((BETWEEN_WORK,)):
            return
        for outcome in self.replicas.outcomes() if self.replicas is not None else ():
            lane = self.lanes.current(outcome.pipeline)
            if lane is not None:
                self._answer(self._engines[lane.pipeline], outcome)
                if isinstance(outcome, steps.Flushed) and outcome.epoch == lane.epoch:
                    lane.flush_until = None
        self._say_flushed()
        while self._inbox and self.alive and not self.thread.hangs:
            self._take(*self._inbox.popleft())
        ready = self.lanes.next_work() if self.alive and not self.thread.hangs else None
        if ready is not None:
            self._begin(*ready)
        elif not self.thread.hangs:
            self.thread.rest()

    def _take(self, engine: Line, header: steps.AnyStepMessage, payload: Any) -> None:
        if self.fleet.trigger(header, self):
            return
        if isinstance(header, steps.OF_A_LANE) and self.lanes.loses_touch(header.pipeline, header.epoch, engine.name):
            self._answer(engine, steps.Unlinked(header.pipeline, header.epoch, self.stage))
            return
        if isinstance(header, Header):
            self._queue(engine, header, payload)
            return
        self.fleet.tell(self, header, payload)
        assert isinstance(header, steps.Join | steps.Leave | steps.AssignStandby | steps.Hasten), header
        self.thread.begin(header.pipeline)
        if self.thread.hangs_in((IN_A_MESSAGE,)):
            return
        match header:
            case steps.Join():
                self._join(engine, header, payload)
            case steps.Leave(pipeline, epoch):
                self._leave(pipeline, epoch)
                self._answer(engine, steps.Left(pipeline, epoch, self.member))
            case _:
                self._take_about_replicas(header)
        self.thread.end()

    def _take_about_replicas(self, header: steps.AssignStandby | steps.Hasten) -> None:
        lane = self.lanes.current(header.pipeline, header.epoch)
        if lane is None or self.replicas is None:
            return
        if isinstance(header, steps.AssignStandby):
            self.replicas.assign(lane, header.standby, anew=header.anew)
        else:
            self.replicas.hasten(lane)

    def _queue(self, engine: Line, header: Header, payload: Any) -> None:
        self.lanes.add_work(Work(engine.name, header, payload))
        lane = self.lanes.current(header.pipeline)
        if lane is not None and len(lane.queue) > MAX_QUEUED:
            raise Unbounded(f"{self} has {len(lane.queue)} pieces of work queued in lane {lane.pipeline}")

    def _leave(self, pipeline: PipelineId, epoch: Epoch) -> None:
        left = self.lanes.leave(pipeline, epoch)
        self.left_at = self.timeline.now
        if left is not None and self.replicas is not None:
            self.replicas.close(left)

    def _join(self, engine: Line, join: steps.Join, usable: frozenset[int] | None) -> None:
        for orphan in join.orphans:
            self._leave(*orphan)
        lane = self.lanes.open(join.pipeline, join.epoch) if join.stage == self.stage else None
        if lane is None:
            self.failed_at.append(self.timeline.now)
            self._answer(engine, steps.Refused(join.pipeline, join.epoch, join.stage, f"{self} has no lane"))
            return
        lane.engine = engine.name
        self._engines[lane.pipeline] = engine
        self._next_addresses[lane.pipeline] = join.next_address
        if self.replicas is not None:
            self.replicas.open(lane)
        self.lanes.share(lane, usable, self.replicas.kept(lane) if self.replicas is not None else frozenset())
        tables = {each.pipeline: [block for block in each.blocks.table if block] for each in self.lanes}
        if len(set().union(*tables.values())) < sum(map(len, tables.values())):
            raise NotFenced(f"{self} has blocks that are two lanes': {tables}")
        results = lane.kept.results
        joined = steps.Joined(join.pipeline, join.epoch, join.stage, tuple(results))
        self._answer(engine, joined, tuple(results.values()))

    # ---- running

    def _begin(self, lane: Lane, work: Work, activations: Any) -> None:
        header = work.header
        if work.engine != lane.engine or header.epoch != lane.epoch:
            raise NotFenced(f"{self} runs {header} of {work.engine!r} in a lane that {lane.engine!r} holds: {lane}")
        if activations is not None and activations["epoch"] != header.epoch:
            raise NotFenced(f"{self} runs {header} with activations of epoch {activations['epoch']}")
        self._busy = True
        self._works_for = header.pipeline
        self._done[header.pipeline] += 1
        self.speed.begin(self.timeline.now)
        self.thread.begin(header.pipeline, _size(work))
        self.fleet.tell(self, header, work.payload if not isinstance(header, steps.Execute) else ())
        again = kept_output(lane, work) is not None
        computes = False
        if isinstance(header, (steps.Execute, steps.Recompute)) and not again:
            computes = True
            self.record = Record(Computing(header.pipeline, header.epoch, header.sequence), _requests(work))
        poisoned = computes and self.fleet.poisons(self, header, _computed(work, self.stage))
        ways = (ASLEEP, COMPUTING) if computes and isinstance(header, steps.Execute) else (ASLEEP,)
        if poisoned or self.thread.hangs_in(ways):
            return
        shape = self.fleet.plan.shape
        self.fleet.counts["pieces of work that were slow"] += self.speed.factor > 1.0
        seconds = shape.step * self.speed.factor * (0.2 + self.fleet.rng.random())
        if self.raises:
            self.raises = False
            self._end_after(seconds, functools.partial(self._fail, self._engines[lane.pipeline], lane, work))
            return
        done = self._workflow.begin(lane, work, activations)
        self._check_rows(lane, header, activations)
        self._end_after(0.0 if again else seconds, functools.partial(self._finish, lane, work, done))

    def _end_after(self, seconds: float, finish: Callable[[], None]) -> None:
        self._works += 1
        self._finishing = finish
        self.after(seconds, functools.partial(self._end, self._works))

    def _end(self, work: int) -> None:
        finish = self._finishing
        if finish is not None and work == self._works:
            self._finishing = None
            # Before anybody hears that it is done.
            self.record = Record()
            finish()
            self.thread.end()
            self._busy = False
            self.look()

    def hurry(self) -> None:
        """End the work that runs now, and begin the next: another thread of the node is in the middle of something."""
        self.speed.cut_short()
        self._end(self._works)

    def _check_rows(self, lane: Lane, header: Header, activations: Any) -> None:
        """Nothing but their order says whose the rows of activations are."""
        rows = tuple(lane.runner.output)  # type: ignore[attr-defined]
        if isinstance(header, steps.Execute) and activations is not None and activations["rows"] != rows:
            raise WrongKv(f"{self} takes {activations['rows']} for {rows}: {header}")

    def _finish(self, lane: Lane, work: Work, done: Done) -> None:
        if isinstance(work.header, steps.Execute) and done.kept_again is None:
            self.speed.end(lane.runner.decoded, self.timeline.now)  # type: ignore[attr-defined]
        self._workflow.end(lane, work, done)
        if self.alive:
            done.still_to_do()

    def _fail(self, engine: Line, lane: Lane, work: Work) -> None:
        header = work.header
        self.lanes.fail(lane)
        self.failed_at.append(self.timeline.now)
        self.fleet.counts["pieces of work that raised"] += 1
        sequence = 0
        if isinstance(header, steps.Execute | steps.Recompute):
            sequence = header.sequence
            self.fleet.blame.note_raised(_requests(work))
        self._answer(engine, steps.StepFailed(header.pipeline, header.epoch, sequence, self.stage, DRAWN_ERROR))

    # ---- what the workflow computes with: see `node.work.Shell`

    def content(self, work: Work) -> Any:
        """What came along; nothing is packed here."""
        return work.payload

    def execute(self, lane: Lane, work: Work, step: steps.Execute, activations: Any) -> Computed:
        """Run a step on the toy stage."""
        runner: Any = lane.runner
        sampled = runner.execute(*work.payload)
        if not step.has_tokens:
            return Computed()
        size = self.fleet.plan.output_bytes
        return Computed(sampled=sampled, size=size) if self._is_last else Computed(runner.output, size=size)

    def follow(self, lane: Lane, work: Work, kept: Any) -> tuple[Any, Any]:
        """Take note of a step. Raises `WrongKv` if computing it again would not give what was kept."""
        runner: Any = lane.runner
        runner.follow(*work.payload)
        if runner.output != kept:
            raise WrongKv(f"{self} passes on {kept} for {work.header}, which gives {runner.output}")
        self.fleet.counts["steps passed on"] += 1
        return runner.output, runner.output

    def recompute(self, lane: Lane, recompute: steps.Recompute, chunk: Chunk, activations: Any) -> Any:
        """Write the toy KV of a chunk; the next stage gets no rows that could be in a wrong order."""
        runner: Any = lane.runner
        runner.recompute(chunk)
        return {}

    def to_keep(self, lane: Lane, output: Any) -> Any:
        """An output is made anew for each step."""
        return output

    def pass_on(self, lane: Lane, sequence: int, output: dict[str, list[int]]) -> None:
        """Send whose rows they are, in order."""
        target = self.fleet.node_at(self._next_addresses[lane.pipeline])
        if target is not None:
            deliver = functools.partial(target.deliver_activations, lane.pipeline, lane.epoch, sequence, tuple(output))
            self._send(target, ("activations", self.name, lane.pipeline, lane.epoch), deliver)

    def answer(self, lane: Lane, answer: steps.AnyStepMessage, *payload: Any) -> None:
        """Send to the lane's engine."""
        self._answer(self._engines[lane.pipeline], answer, *payload)

    def is_in_touch(self, lane: Lane) -> bool:
        """Whether what the lane's engine has sent is here, or on its way: its connection has not broken since."""
        line = self._engines[lane.pipeline]
        return line.number == self.fleet.network.connection(line.engine, self)

    def _answer(self, line: Line, header: steps.AnyStepMessage, payload: Any = None) -> None:
        """An answer over a connection that is no more goes nowhere."""
        engine = line.engine
        if line.number == self.fleet.network.connection(engine, self):
            deliver = functools.partial(engine.take, self, header, payload)
            self._send(engine, ("answers", self.name, engine.name), deliver)

    # ---- replicas

    def _say_flushed(self) -> None:
        for lane in self.lanes:
            if lane.flush_until is not None and self.timeline.now >= lane.flush_until:
                lane.flush_until = None
                self._answer(self._engines[lane.pipeline], steps.Flushed(lane.pipeline, lane.epoch, self.stage))


def _size(work: Work) -> int | None:
    """Tokens of a step; None for other work."""
    payload: Any = work.payload
    return sum(payload[0].scheduled.values()) if isinstance(work.header, steps.Execute) else None


def _requests(work: Work) -> frozenset[str]:
    """Those that take part in a step or a chunk."""
    payload: Any = work.payload
    if isinstance(work.header, steps.Recompute):
        return frozenset(span.request for span in payload.spans)
    return frozenset(payload[0].scheduled)


def _computed(work: Work, stage: Stage) -> Iterator[tuple[str, int]]:
    """(request, end) of whatever is computed for good at a stage: the request's tokens up to `end`."""
    payload: Any = work.payload
    if isinstance(work.header, steps.Recompute) and work.header.through == stage:
        yield from ((span.request, span.end) for span in payload.spans)
    elif isinstance(work.header, steps.Execute):
        step = payload[0]
        for each in (*step.admissions, *step.continuations):
            yield each.request, each.computed + step.scheduled[each.request]
