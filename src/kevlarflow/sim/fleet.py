"""A whole fleet under faults, driven by a seed: every part of the protocol is the real one, only the world is not.

The controller's core, the engines' cores, the lanes of the nodes, their replication queues and standby stores run as in
production; what is simulated is time, the network, vLLM's scheduler and a model whose KV and tokens can be checked
exactly. First comes the load with all its faults; then the world heals, and everything has to end well within a bound.
What must hold is checked whenever something happens that could break it.
"""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kevlarflow.config import ServeConfig, Timeouts
from kevlarflow.node.lanes import Header, Lane
from kevlarflow.recovery import events
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.events import AnyCommand, KnownNode, Snapshot
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.members import Pipeline
from kevlarflow.recovery.suspicion import MAX_COST
from kevlarflow.sim.blame import Blame
from kevlarflow.sim.controller import REPORT_SECONDS, Controller
from kevlarflow.sim.engine import Engine
from kevlarflow.sim.errors import FalseAlarm, Hoarded, NoReason, NotFenced, Stuck, Unbounded, WrongCopy, WrongTokens
from kevlarflow.sim.mischief import Mischief
from kevlarflow.sim.network import Network, Process, Timeline
from kevlarflow.sim.node import Node
from kevlarflow.sim.plan import Demand, Plan
from kevlarflow.sim.scheduler import Request
from kevlarflow.sim.words import words
from kevlarflow.types import Cause, Epoch, Member, NodeState, PipelineId, PipelineState, Stage
from kevlarflow.wire import steps

BOOTED_SECONDS = 100.0
"""Seconds on the monotonic clock when a run begins."""
START_SECONDS = 30.0
"""Within which a fleet without faults serves."""
HEAL_SECONDS = 60.0
"""Within which everything ends well once the faults are over."""
FRONT_RETRY_SECONDS = 0.05
"""After which a client that found no engine asks again."""
LEAVING_SECONDS = 0.4
"""Within which a pipeline that waits has left all its lanes."""
MAX_HELD_MESSAGES = 20_000
AFTERWARDS_SECONDS = 2.0
"""For so long what a node says of its steps may be about a time when it was slow."""
ROUNDING_SECONDS = 1e-6

Content = tuple[int | None, ...]


@dataclass
class Client:
    """What became of a demand."""

    demand: Demand
    request: Request
    engine: Engine | None = None
    ended: bool = False
    error: str = ""


class Fleet:
    """See the module's text. `telling` keeps a story, which costs time."""

    def __init__(self, plan: Plan, *, telling: bool = False) -> None:
        self.plan = plan
        self.telling = telling
        self.log: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.rng = random.Random(f"{plan.seed} world")
        self.timeline = Timeline(BOOTED_SECONDS)
        self.network = Network(self.timeline, self.rng, plan.shape.latency)
        self.controller = Controller(self, self._config())
        self.mischief = Mischief(self)
        self.nodes: dict[Member, Node] = {}
        self._living: dict[Member, Node] = {}
        self._addresses: dict[str, Node] = {}
        self.engines: list[Engine] = []
        self.cancelled: set[str] = set()
        """Requests that nobody wants any more: what they read does not matter."""
        self.clients: dict[str, Client] = {}
        self._open = 0
        self._costs: collections.Counter[tuple[str, str]] = collections.Counter()
        """Nodes that died of a request, in steps or while it was computed again."""
        self.blame = Blame()
        self._lives: collections.Counter[PipelineId] = collections.Counter()
        self._pids = 1_000
        self.channels = 0
        """Channels for copies that were ever opened."""
        self._truth: dict[tuple[PipelineId, Stage, int, int], Content] = {}
        """What each (pipeline, stage, block, generation) holds."""
        self._orders: dict[tuple[PipelineId, Epoch], AnyCommand] = {}
        self._newest: collections.Counter[PipelineId] = collections.Counter()
        self._bereft_at: dict[PipelineId, float] = {}
        """Since when a pipeline has not served for want of a node."""
        self._waits_since: dict[str, float] = {}
        """Since when an engine reports that it waits."""

    def _config(self) -> ServeConfig:
        shape = self.plan.shape
        return ServeConfig(
            model="toy",
            served_model_name="toy",
            host="sim",
            port=0,
            stages=shape.stages,
            pipelines=shape.pipelines,
            kv_cache_memory_bytes=1,
            replacement_wait_s=shape.wait,
            timeouts=Timeouts(
                heartbeat_interval_ms=100,
                suspect_after_ms=250,
                confirm_after_ms=600,
                step_floor_ms=201,
                report_interval_ms=100,
                still_after_ms=500,
                pace_interval_ms=200,
                slow_after_ms=1_200,
                deaf_after_ms=1_000,
                startup_timeout_s=4,
            ),
            run_folder="sim",
        )

    # ---- the run

    def run(self) -> None:
        """Load, faults, healing. Raises a `Violation` (or whatever the real code raises) when something is wrong."""
        self._start()
        begun = self.timeline.now
        for demand in self.plan.demands:
            self.timeline.after(demand.at, functools.partial(self._ask, demand))
            self._open += 1
        for fault in self.plan.faults:
            self.timeline.after(fault.at, functools.partial(self.mischief.begin, fault))
        self.timeline.run(begun + self.plan.trouble_seconds, lambda: False)
        self.tell("world", "heals")
        self.mischief.end_all()
        if not self.timeline.run(self.timeline.now + HEAL_SECONDS, self._is_well):
            raise Stuck(f"{HEAL_SECONDS:.0f} s after all faults were over: {'; '.join(self._complaints())}")
        self._count()

    def _start(self) -> None:
        self.controller.start()
        for pipeline in range(self.plan.shape.pipelines):
            self.start_engine(PipelineId(pipeline))
        if not self.timeline.run(self.timeline.now + START_SECONDS, self._all_serve):
            raise Stuck(f"the fleet does not serve after {START_SECONDS:.0f} s: {'; '.join(self._complaints())}")

    def _all_serve(self) -> bool:
        return all(each.state is PipelineState.SERVING for each in self.controller.cluster.pipelines)

    def _is_well(self) -> bool:
        if self._open or not self._all_serve():
            return False
        return next(self._complaints(), None) is None

    def _complaints(self) -> Iterator[str]:
        """What is not as it should be in the end."""
        yield from (f"{name} has not ended" for name, client in self.clients.items() if not client.ended)
        if self._open > sum(not client.ended for client in self.clients.values()):
            yield "some request found no engine"
        for pipeline in self.controller.cluster.pipelines:
            own = [f"node-{pipeline.id}-{stage}" for stage in range(len(pipeline.members))]
            serving = [member.node if member else "nobody" for member in pipeline.members]
            if pipeline.state is not PipelineState.SERVING or serving != own:
                yield f"pipeline {pipeline.id} is {pipeline.state} with {', '.join(serving)}"
            elif pipeline.leaving:
                yield f"pipeline {pipeline.id} waits for {sorted(pipeline.leaving)} to be left"
        for engine in self.engines:
            if engine.alive and (engine.core.in_flight or engine.in_flight):
                yield f"{engine} has steps {engine.core.in_flight} in flight"
        yield from self._complaints_of_nodes()

    def _complaints_of_nodes(self) -> Iterator[str]:
        for node in self.living_nodes():
            lanes = [lane.pipeline for lane in node.lanes]
            if node.ready and lanes != [int(node.member.node.split("-")[1])]:
                yield f"{node} has lanes {lanes}"
            if node.ails:
                yield f"{node} {node.ails}"
            for lane in node.lanes:
                if lane.replication is not None and lane.replication.queue.held_by_requests:
                    yield f"{node} takes blocks of lane {lane.pipeline} for those of requests, and there are none"

    def _count(self) -> None:
        if self.network.held > MAX_HELD_MESSAGES:
            raise Unbounded(f"{self.network.held} messages wait")
        self.counts["events"] += self.timeline.events
        self._check_rests()
        recoveries = self.controller.cluster.recoveries
        self.counts["recoveries"] += len(recoveries)
        self.counts["lanes moved from slow nodes"] += sum(each.cause is Cause.SLOW for each in recoveries)
        self.counts["preemptions"] += sum(engine.scheduler.preemptions for engine in self.engines)
        self.counts["requests"] += len(self.clients)
        self.counts["requests ended with an error"] += sum(bool(client.error) for client in self.clients.values())

    def tell(self, who: object, what: object, more: object = ()) -> None:
        """Add to the story."""
        if self.telling:
            reply = f" -> {words(more)}" if more else ""
            self.log.append(f"{self.timeline.now - BOOTED_SECONDS:9.4f} {who}: {words(what)}{reply}")

    # ---- processes

    def start_engine(self, pipeline: PipelineId) -> None:
        """The next life of an engine."""
        life = self._lives[pipeline] = self._lives[pipeline] + 1
        engine = Engine(self, pipeline, life, self.next_pid())
        if life == 1:
            self.engines.append(engine)
        else:
            self.engines[pipeline] = engine
        engine.after(self.rng.random() * 0.1, engine.introduce)
        self._report_regularly(engine)

    def _report_regularly(self, engine: Engine) -> None:
        def again() -> None:
            engine.report()
            engine.after(REPORT_SECONDS, again)

        engine.after(0.1 + REPORT_SECONDS * self.rng.random(), again)

    def next_pid(self) -> int:
        """The number of a new process."""
        self._pids += 1
        return self._pids

    def fork(self, member: Member, stage: int, pid: int | None = None) -> Node:
        """A new node process, which begins to load; `pid`: a process that exists already becomes the node."""
        if member in self.nodes:
            raise NotFenced(f"{member} is started a second time")
        node = Node(self, member, Stage(stage), pid or self.next_pid())
        self.nodes[member] = self._living[member] = node
        info = node.info
        for address in (info.step_address, info.activation_address, info.replica_address):
            self._addresses[address] = node
        self.mischief.haunt(node)
        node.introduce()
        node.after(self.plan.shape.start * (0.5 + self.rng.random()), node.become_ready)
        return node

    def node_at(self, address: str) -> Node | None:
        """Who listens there; None at the end of a pipeline."""
        return self._addresses.get(address)

    def living_nodes(self) -> list[Node]:
        """All node processes, the stopped ones included."""
        return list(self._living.values())

    def find_relatives(self) -> Snapshot:
        """See `kevlarflow.control.relatives`."""
        nodes = (KnownNode(node.member, (node.pid,), ready=True, failed_starts=0) for node in self._living.values())
        engines = {engine.pipeline: engine.pid for engine in self.engines if engine.alive}
        return Snapshot(nodes=tuple(nodes), epochs={}, served=True, engines=engines)

    def end_process(self, process: Process, loses_after: float | None = None) -> None:
        """A node or an engine dies."""
        if not process.alive:
            return
        self.tell("world", f"{process} dies")
        process.die(self.timeline.now if loses_after is None else loses_after)
        self.counts[f"deaths of a {process.kind}"] += 1
        if isinstance(process, Node):
            self._living.pop(process.member, None)
            self.blame.note_death(*process.record)
        if isinstance(process, Engine):
            for client in self.clients.values():
                if client.engine is process and not client.ended:
                    self._end(client, "the engine died")
            self.timeline.after(0.2 * self.rng.random(), functools.partial(self._restart_engine, process))
        self.controller.hear_of_death(process)

    def _restart_engine(self, engine: Engine) -> None:
        if self.engines[engine.pipeline] is engine:
            self.start_engine(engine.pipeline)

    def trigger(self, header: steps.AnyStepMessage, node: Node) -> bool:
        """See `Mischief.trigger`."""
        return self.mischief.trigger(header, node)

    def poisons(self, node: Node, header: Header, computed: Iterable[tuple[str, int]]) -> bool:
        """Whether a node dies of a request that it is about to compute. Each may cost two of them, and two more while
        it is computed again. Where nobody may read what the node has been computing, a death does not count that the
        engine hears of before it hears that the node was ready.
        """
        deadly = [name for name, end in computed if self._is_deadly(name, node.stage, end)]
        if not deadly:
            return False
        engine = self.engines[header.pipeline]
        heard = {info.member for info in engine.core.nodes[: node.stage + 1]} <= engine.prepared[header.epoch]
        what = "again" if isinstance(header, steps.Recompute) else "in steps"
        for name in deadly:
            self.counts[f"nodes that a request has cost {what}"] += 1
            self._costs[name, what] += heard or self.plan.reads_records or what == "again"
            if self._costs[name, what] > MAX_COST:
                raise Unbounded(f"{name} has cost {self._costs[name, what]} nodes {what}, the last of them {node}")
        self.tell(node, f"dies of {', '.join(deadly)}")
        self.end_process(node)
        return True

    def _is_deadly(self, name: str, stage: Stage, end: int) -> bool:
        client = self.clients.get(name)
        poison = client.demand.poisons if client is not None else None
        return poison is not None and not self.mischief.over and poison[0] == stage and poison[1] < end

    # ---- clients

    def _ask(self, demand: Demand) -> None:
        """A request arrives at the front, which gives it to an engine, or asks it to come again."""
        count = len(self.engines)
        order = [self.engines[(demand.pipeline + index) % count] for index in range(count)]
        engine = next((each for each in order if each.alive and each.started), None)
        if engine is None:
            self.timeline.after(FRONT_RETRY_SECONDS, functools.partial(self._ask, demand))
            return
        prompt = list(demand.prompt)
        request = Request(demand.name, prompt, len(prompt), len(demand.expected) - len(prompt))
        client = self.clients[demand.name] = Client(demand, request, engine)
        engine.add(request)
        if demand.cancelled_after is not None:
            self.timeline.after(demand.cancelled_after, functools.partial(self._cancel, client))

    def _cancel(self, client: Client) -> None:
        if not client.ended and client.engine is not None:
            self.counts["requests cancelled"] += 1
            self.cancelled.add(client.demand.name)
            self._end(client, "")
            client.engine.abort(client.request)

    def end(self, request: Request, error: str) -> None:
        """The engine has ended a request."""
        client = self.clients[request.name]
        if client.ended:
            return
        if not error and tuple(request.tokens) != client.demand.expected:
            raise WrongTokens(f"{request.name}: {request.tokens} instead of {list(client.demand.expected)}")
        self._end(client, error)

    def _end(self, client: Client, error: str) -> None:
        client.ended, client.error = True, error
        self._open -= 1
        self.tell(client.demand.name, f"ends {error}")

    def check_tokens(self, request: Request) -> None:
        """What a client has so far is what it would have without failure."""
        expected = self.clients[request.name].demand.expected
        if tuple(request.tokens) != expected[: len(request.tokens)]:
            raise WrongTokens(f"{request.name}: {request.tokens} instead of {list(expected)}")

    # ---- what must hold

    def note_written(self, lane: Lane, stage: Stage, written: Iterable[Replica]) -> None:
        """A step has given blocks their content."""
        if self.plan.shape.replicates:
            for replica in written:
                key = (lane.pipeline, stage, replica.block, replica.generation)
                content: Content = lane.runner.memory.read(replica.block)[: replica.filled]  # type: ignore[attr-defined]
                # A node that was stopped may run old steps later than others.
                if len(content) >= len(self._truth.get(key, ())):
                    self._truth[key] = content

    def check_copy(self, pipeline: PipelineId, stage: Stage, copy: Replica, content: Content) -> None:
        """A copy that is put in place is what its tag says."""
        self.counts["blocks restored"] += 1
        truth = self._truth.get((pipeline, stage, copy.block, copy.generation))
        if truth is None or content[: copy.filled] != truth[: copy.filled]:
            raise WrongCopy(f"{copy} of pipeline {pipeline} at stage {stage} is {content}, not {truth}")

    def check_verdict(self, verdict: events.NodeSilent) -> None:
        """Nobody is declared dead without the reason that is given for it."""
        node = self._living.get(verdict.member)
        if node is None:
            return
        self.counts[f"times a node {verdict.what}"] += 1
        # Who was cut off has to hear that it is to introduce itself again.
        unheard = node.deaf and node.cut_at > 0.0
        cut = unheard or self.timeline.now - node.cut_at < self.controller.config.timeouts.confirm_after_ms / 1_000
        reasons = {
            "did not answer": cut or not self.controller.hears(node),
            "was stopped": node.frozen,
            "was stuck in a step": node.thread.hangs,
            "did not hear us": cut or node.deaf or self.network.stops(self.controller, node),
        }
        if not reasons[verdict.what]:
            raise FalseAlarm(f"{node} is declared dead: it {verdict.what}")

    def check_slow(self, node: Node, slow: events.NodeSlow) -> None:
        """Nobody is taken for slow who is not, or was not just now."""
        self.counts["reports of slow nodes"] += 1
        if self.timeline.now > node.speed.slow_until + AFTERWARDS_SECONDS:
            raise FalseAlarm(f"{node} is as fast as its peers: {words(slow)}")

    def _check_rests(self) -> None:
        """A run takes less time than a place is left alone, so its node is replaced for being slow once at most."""
        moved = {
            (each.pipeline, each.stage, each.origin): each
            for each in self.controller.cluster.recoveries
            if each.cause is Cause.SLOW
        }
        total = sum(each.cause is Cause.SLOW for each in self.controller.cluster.recoveries)
        if total > len(moved):
            raise FalseAlarm(f"lanes moved {total} times from slow nodes: {list(moved)}")

    def check_orders(self, commands: Iterable[AnyCommand]) -> None:
        """Over all lives of the controller, an epoch is given to one order, and none is older than one before."""
        for command in commands:
            if isinstance(command, (events.Form, events.Suspend)):
                key = (command.pipeline, command.epoch)
                if self._orders.setdefault(key, command) != command:
                    raise NotFenced(f"epoch {command.epoch} of pipeline {command.pipeline} is given a second time")
                if command.epoch < self._newest[command.pipeline]:
                    raise NotFenced(f"pipeline {command.pipeline} goes back to epoch {command.epoch}")
                self._newest[command.pipeline] = command.epoch
            if isinstance(command, events.Suspend):
                self._check_wait(command)
                self._check_suspension(command)

    def check_left(self, engine: Engine) -> None:
        """No node that hears and works keeps a lane of a pipeline that has waited for a while."""
        since = self._waits_since.setdefault(engine.name, self.timeline.now)
        if engine.core.standing is not Standing.WAITING:
            del self._waits_since[engine.name]
        elif self.timeline.now > since + LEAVING_SECONDS and not self.network.cuts and self.network.slowness == 1.0:
            # What was lost with a connection is said again a while later.
            heard = (each for each in self._living.values() if not self.network.connection(engine, each))
            keepers = [each for each in heard if each.is_well and each.lanes.current(engine.pipeline)]
            if keepers:
                raise Hoarded(f"{engine} waits in epoch {engine.core.epoch}, and has a lane on {keepers[0]}")

    def note_served(self, pipelines: Iterable[Pipeline]) -> None:
        """The controller sees these pipelines so after an event: who serves waits for nobody."""
        for pipeline in pipelines:
            if pipeline.state is PipelineState.SERVING:
                self._bereft_at.pop(pipeline.id, None)

    def _check_wait(self, order: events.Suspend) -> None:
        """Requests end only after all of the bound has passed and no node that took over has led to service."""
        waited = self.timeline.now - self._bereft_at.setdefault(order.pipeline, self.timeline.now)
        if not order.waits and waited < self.plan.shape.wait - ROUNDING_SECONDS:
            raise NoReason(f"pipeline {order.pipeline} gives up after {waited:.3f} s: {order.reason}")

    def _check_suspension(self, order: events.Suspend) -> None:
        """A pipeline is suspended only if no living node of the stage has room for it."""
        cluster = self.controller.cluster
        pipeline = cluster.pipelines[order.pipeline]
        for slot in cluster.slots.values():
            if slot.stage != order.stage or slot.state is not NodeState.READY or slot.fenced_by is not None:
                continue
            others = [each for each in cluster.pipelines if each.id not in (slot.pipeline, order.pipeline)]
            foreign = sum(slot.member in each.lanes for each in others)
            has_room = slot.pipeline == order.pipeline or foreign < self.plan.shape.lanes - 1
            if has_room and slot.member not in pipeline.avoided:
                raise NoReason(f"pipeline {order.pipeline} is suspended though {slot.member} has room: {order.reason}")


def run(plan: Plan, *, telling: bool = False) -> Fleet:
    """One run to its end. Raises what is wrong."""
    fleet = Fleet(plan, telling=telling)
    fleet.run()
    return fleet
