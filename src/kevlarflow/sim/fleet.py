"""A whole fleet under faults, driven by a seed: every part of the protocol is the real one, only the world is not.

The controller's core, the engines' cores, the lanes of the nodes, their replication queues and standby stores run as in
production; what is simulated is time, the network, vLLM's scheduler and a model whose KV and tokens can be checked
exactly. First comes the load with all its faults; then the world heals, and everything has to end well within a bound
(`sim.health`), and to go on so: a few more requests are served, and nothing has to be mended.
What must hold (`sim.checks`) is checked whenever something happens that could break it.
"""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Iterable, Iterator

from kevlarflow.config import ServeConfig, Timeouts
from kevlarflow.node.lanes import Header
from kevlarflow.recovery.events import KnownNode, Snapshot
from kevlarflow.recovery.suspicion import MAX_COST
from kevlarflow.sim.blame import Blame
from kevlarflow.sim.checks import FleetChecks
from kevlarflow.sim.clients import Clients
from kevlarflow.sim.controller import REPORT_SECONDS, Controller
from kevlarflow.sim.engine import Engine
from kevlarflow.sim.errors import NoReason, NotFenced, Restless, Stuck, Unbounded
from kevlarflow.sim.health import complaints
from kevlarflow.sim.mischief import Mischief
from kevlarflow.sim.network import By, Network, Process, Timeline
from kevlarflow.sim.node import Node
from kevlarflow.sim.plan import Plan
from kevlarflow.sim.verdicts import Verdicts
from kevlarflow.sim.words import words
from kevlarflow.types import Cause, Epoch, Member, PipelineId, PipelineState, RecoveryId, Stage
from kevlarflow.wire import steps

BOOTED_SECONDS = 100.0
"""Seconds on the monotonic clock when a run begins."""
START_SECONDS = 30.0
"""Within which a fleet without faults serves."""
HEAL_SECONDS = 60.0
"""Within which everything ends well once the faults are over."""
SERVED_SECONDS = 8.0
"""Within which the few requests that come then have ended."""
QUIET_SECONDS = 2.0
"""For so long after that nothing may happen."""
MAX_HELD_MESSAGES = 20_000


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
        self.clients = Clients(self)
        self.checks = FleetChecks(self)
        self.verdicts = Verdicts(self)
        self._costs: collections.Counter[tuple[str, str]] = collections.Counter()
        """Nodes that died of a request, in steps or while it was computed again."""
        self._has_poison = any(each.poisons is not None for each in plan.demands)
        self.blame = Blame()
        self._lives: collections.Counter[PipelineId] = collections.Counter()
        self._pids = 1_000
        self.channels = 0
        """Channels for copies that were ever opened."""

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
            # Shorter than in production, so that less of a run is waiting; heartbeats and what counts them are not.
            timeouts=Timeouts(
                heartbeat_interval_ms=100,
                suspect_after_ms=250,
                confirm_after_ms=600,
                step_floor_ms=201,
                report_interval_ms=100,
                still_after_ms=500,
                parted_ms=9_000,
                engine_silent_after_ms=800,
                engine_lost_after_ms=2_500,
                settle_ms=1_000,
                move_patience_ms=2_000,
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
        self.clients.come(self.plan.demands)
        for fault in self.plan.faults:
            self.timeline.after(fault.at, functools.partial(self.mischief.begin, fault))
        self.timeline.run(begun + self.plan.trouble_seconds)
        self.tell("world", "heals")
        self.mischief.end_all()
        if not self.timeline.run(self.timeline.now + HEAL_SECONDS, self._is_well):
            raise Stuck(f"{HEAL_SECONDS:.0f} s after all faults were over: {'; '.join(self._complaints())}")
        self._stay_well()
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
        if self.clients.open or not self._all_serve():
            return False
        return next(self._complaints(), None) is None

    def _complaints(self) -> Iterator[str]:
        yield from self.clients.complaints()
        yield from complaints(self)

    def _stay_well(self) -> None:
        """A few more requests are served, and everything is well without anything being done about it."""
        self.tell("world", "is well")
        before, known = self._formed_so_far()
        # A connection that broke while nobody used it is noticed, and made anew, by the first who does.
        in_touch = all(node.is_in_touch(lane) for node in self.living_nodes() for lane in node.lanes)
        self.clients.come(self.plan.afterwards)
        if not self.timeline.run(self.timeline.now + SERVED_SECONDS, lambda: not self.clients.open):
            raise Stuck(f"{SERVED_SECONDS:.0f} s after all was well: {'; '.join(self._complaints())}")
        if errors := self.clients.errors_of(self.plan.afterwards):
            raise NoReason(f"all was well, and {'; '.join(errors)}")
        if not in_touch:
            before, known = self._formed_so_far()
        self.timeline.run(self.timeline.now + QUIET_SECONDS)
        after, newest = self._formed_so_far()
        if (after, newest) != (before, known):
            recoveries = self.controller.cluster.recoveries
            causes = [f"{each.cause} of {each.origin}" for each in recoveries if each.id >= known]
            raise Restless(f"all was well, and epochs went from {before} to {after}: {', '.join(causes)}")
        if wrong := list(self._complaints()):
            raise Stuck(f"{QUIET_SECONDS:.0f} s after all was well: {'; '.join(wrong)}")

    def _formed_so_far(self) -> tuple[dict[PipelineId, Epoch], RecoveryId]:
        """The epoch of each pipeline, and the number of the recovery that will be next."""
        cluster = self.controller.cluster
        return {each.id: each.epoch for each in cluster.pipelines}, cluster.next_recovery

    def _count(self) -> None:
        if self.network.held > MAX_HELD_MESSAGES:
            raise Unbounded(f"{self.network.held} messages wait")
        self.counts["events"] += self.timeline.events
        self.counts["messages held up by a partition"] += self.network.held_up
        self.counts["messages that came twice"] += self.network.echoed
        self.checks.rests()
        recoveries = self.controller.cluster.recoveries
        self.counts["recoveries"] += len(recoveries)
        self.counts["lanes moved from slow nodes"] += sum(each.cause is Cause.SLOW for each in recoveries)
        self.counts["preemptions"] += sum(engine.scheduler.preemptions for engine in self.engines)
        self.counts["requests"] += len(self.clients)
        self.counts["requests ended with an error"] += self.clients.errors

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

    def living_node(self, member: Member) -> Node | None:
        """The process of a member; None when it has died, or never was."""
        return self._living.get(member)

    def living_nodes(self) -> list[Node]:
        """All node processes, the stopped ones included."""
        return list(self._living.values())

    def find_relatives(self) -> Snapshot:
        """See `kevlarflow.control.relatives`."""
        nodes = (
            KnownNode(node.member, (node.pid,), ready=True, failed_starts=0, fenced=True)
            for node in self._living.values()
        )
        engines = {engine.pipeline: engine.pid for engine in self.engines if engine.alive}
        return Snapshot(nodes=tuple(nodes), epochs={}, served=True, engines=engines)

    def end_process(self, process: Process, loses_after: float | None = None, *, by: By = By.US) -> None:
        """A node or an engine dies."""
        if not process.alive:
            return
        process.ended_by = by
        self.tell("world", f"{process} dies")
        process.die(self.timeline.now if loses_after is None else loses_after)
        self.counts[f"deaths of a {process.kind}"] += 1
        if isinstance(process, Node):
            self._living.pop(process.member, None)
            if by is not By.SOMEBODY:
                self.blame.note_death(*process.record)
        if isinstance(process, Engine):
            self.clients.lose(process)
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
        it is computed again. A node that the controller is ending already counts as ended by it. Where nobody may read
        what the node has been computing, a death does not count that the engine hears of before it hears that the node
        was ready.
        """
        if self.mischief.over or not self._has_poison:
            return False
        deadly = [name for name, end in computed if self._is_deadly(name, node.stage, end)]
        if not deadly:
            return False
        engine = self.engines[header.pipeline]
        heard = {info.member for info in engine.core.nodes[: node.stage + 1]} <= engine.prepared[header.epoch]
        what = "again" if isinstance(header, steps.Recompute) else "in steps"
        for name in deadly:
            self.counts[f"nodes that a request has cost {what}"] += 1
            if node.killed_at is None:
                self._costs[name, what] += heard or self.plan.reads_records or what == "again"
            if self._costs[name, what] > MAX_COST:
                raise Unbounded(f"{name} has cost {self._costs[name, what]} nodes {what}, the last of them {node}")
        self.tell(node, f"dies of {', '.join(deadly)}")
        self.end_process(node, by=By.ITSELF)
        return True

    def _is_deadly(self, name: str, stage: Stage, end: int) -> bool:
        demand = self.clients.demand_of(name)
        poison = demand.poisons if demand is not None else None
        return poison is not None and poison[0] == stage and poison[1] < end


def run(plan: Plan, *, telling: bool = False) -> Fleet:
    """One run to its end. Raises what is wrong."""
    fleet = Fleet(plan, telling=telling)
    fleet.run()
    return fleet
