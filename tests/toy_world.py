"""A world around the pure cluster: processes that are a word in a table, engines that form when the test says so.

Every event and command passes through JSON on its way, and every invariant is checked after every event. `heal` stops
all faults and lets everybody do what is expected of them, until nothing changes any more.
"""

from __future__ import annotations

import dataclasses
import itertools

import msgspec

from kevlarflow.config import ServeConfig
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import (
    Answer,
    AnyCommand,
    AnyEvent,
    Form,
    KillNode,
    Retire,
    Snapshot,
    StartNode,
    Suspend,
)
from kevlarflow.recovery.invariants import Invariants
from kevlarflow.types import Epoch, Member, NodeId, NodeInfo, Phases, PipelineId, PipelineState, Stage


def make_config(stages: int = 2, pipelines: int = 2) -> ServeConfig:
    return ServeConfig(
        model="/models/none",
        served_model_name="none",
        host="127.0.0.1",
        port=8000,
        stages=stages,
        pipelines=pipelines,
        kv_cache_memory_bytes=1,
        run_folder="/run/8000",
    )


def make_info(node: str, incarnation: int = 1, lanes: int = 2, *, replication: bool = False) -> NodeInfo:
    stage = Stage(int(node.split("-")[2]))
    member = Member(node, incarnation)  # type: ignore[arg-type]
    pid = pid_of(member)
    replicas = f"replicas of {member}" if replication else ""
    return NodeInfo(
        member, stage, "here", pid, (pid,), f"steps of {member}", f"activations of {member}", lanes, 50, replicas
    )


def pid_of(member: Member) -> int:
    _, pipeline, stage = member.node.split("-")
    return 1_000 * member.incarnation + 10 * int(pipeline) + int(stage)


@dataclasses.dataclass
class ToyEngine:
    pid: int
    epoch: Epoch = Epoch(0)  # noqa: RUF009
    members: tuple[Member, ...] = ()
    orders: list[Form | Suspend] = dataclasses.field(default_factory=list)

    def newest_order(self) -> Form | Suspend | None:
        newer = [order for order in self.orders if order.epoch > self.epoch]
        self.orders.clear()
        return max(newer, key=lambda order: order.epoch, default=None)


class ToyWorld:
    def __init__(self, config: ServeConfig, lanes_of_a_node: int = 2) -> None:
        self.config = config
        self.lanes_of_a_node = lanes_of_a_node
        self.now = 100.0
        self.pids = itertools.count(50_000)
        self.processes: dict[Member, str] = {}
        """starting, ready, or dead (and not yet noticed); what was noticed is not here."""
        self.stages: dict[Member, Stage] = {}
        self.engines: dict[PipelineId, ToyEngine | None] = {PipelineId(p): None for p in range(config.pipelines)}
        self.lanes: dict[Member, dict[PipelineId, Epoch]] = {}
        self.told: list[AnyCommand] = []
        self.forgot = False
        """Whether a controller has lost its memory in this history."""
        self.ordered: dict[PipelineId, Epoch] = {}
        self.cluster = Cluster(config)
        self.invariants = Invariants(self.cluster)

    # ---- the way in and out

    def do(self, event: AnyEvent) -> list[AnyCommand]:
        same = msgspec.json.decode(msgspec.json.encode(event), type=AnyEvent)
        assert same == event
        commands = self.cluster.handle(same, self.now)
        assert msgspec.json.decode(msgspec.json.encode(commands), type=list[AnyCommand]) == commands
        self.invariants.check(commands)
        for command in commands:
            self.obey(command)
        return commands

    def obey(self, command: AnyCommand) -> None:
        match command:
            case StartNode(member=member, stage=stage):
                assert member not in self.processes, f"{member} is started twice"
                self.processes[member] = "starting"
                self.stages[member] = stage
            case KillNode(member=member) | Retire(member=member):
                if member in self.processes:
                    self.processes[member] = "dead"
            case Form(pipeline=pipeline, epoch=epoch) | Suspend(pipeline=pipeline, epoch=epoch):
                # No epoch is ever given twice, not even by another life of the controller.
                assert epoch >= self.ordered.get(pipeline, 0)
                self.ordered[pipeline] = epoch
                engine = self.engines[pipeline]
                if engine is not None:
                    engine.orders.append(command)
            case _:
                self.told.append(command)

    # ---- what nodes do

    def those(self, state: str) -> list[Member]:
        return sorted(member for member, it in self.processes.items() if it == state)

    def make_ready(self, member: Member) -> None:
        self.processes[member] = "ready"
        info = make_info(member.node, member.incarnation, self.lanes_of_a_node)
        self.do(events.NodeStarting(member, "here", info.pids))
        self.do(events.NodeReady(info, dict(self.lanes.get(member, {}))))

    def join_by_hand(self, node: str) -> None:
        pid = next(self.pids)
        for command in self.do(events.JoinRequested(NodeId(node), pid, 1)):
            if isinstance(command, Answer) and command.member is not None and command.stage is not None:
                assert command.member not in self.processes, f"{command.member} is there already"
                self.processes[command.member] = "starting"
                self.stages[command.member] = command.stage

    def crash(self, member: Member) -> None:
        self.processes[member] = "dead"

    def notice(self, member: Member) -> None:
        del self.processes[member]
        self.lanes.pop(member, None)
        self.do(events.NodeExited(member, self.now - 0.005))

    # ---- what engines do

    def attach(self, pipeline: PipelineId) -> None:
        engine = self.engines[pipeline] = ToyEngine(next(self.pids))
        self.do(events.EngineAttached(pipeline, engine.pid, Epoch(0), ()))
        self.do(events.EngineReady(pipeline, 100))

    def lose_engine(self, pipeline: PipelineId) -> None:
        engine = self.engines[pipeline]
        assert engine is not None
        self.engines[pipeline] = None
        self.do(events.EngineLost(pipeline, engine.pid))

    def answer(self, pipeline: PipelineId) -> None:
        """Carry the newest order out."""
        engine = self.engines[pipeline]
        order = engine.newest_order() if engine is not None else None
        if engine is None or order is None:
            return
        engine.epoch = order.epoch
        if isinstance(order, Suspend):
            return
        engine.members = tuple(info.member for info in order.nodes)
        for info in order.released:
            self.lanes.get(info.member, {}).pop(pipeline, None)
        alive = all(self.processes.get(member) == "ready" for member in engine.members)
        for member in engine.members:
            if self.processes.get(member) == "ready":
                lanes = self.lanes.setdefault(member, {})
                if len(lanes.keys() | {pipeline}) > self.lanes_of_a_node:
                    assert self.forgot, f"{member} has no memory for {lanes}"
                    self.do(events.MemberFailed(pipeline, order.epoch, member, "no lane is free"))
                    return
                lanes[pipeline] = order.epoch
        if alive:
            self.do(events.Formed(pipeline, order.epoch, Phases(relink=0.01), 3, 0, 5))

    def report(self, pipeline: PipelineId, running: int) -> None:
        if self.engines[pipeline] is not None:
            self.do(events.EngineReport(pipeline, running, 0, running, 100))

    # ---- time and the controller

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.do(events.Tick())

    def restart_controller(self, *, remembers: bool = True) -> None:
        snapshot = msgspec.json.decode(msgspec.json.encode(self.cluster.snapshot()), type=Snapshot)
        if not remembers:
            snapshot = Snapshot(nodes=(), epochs={}, served=True)
            self.forgot = True
        self.now += 0.2
        self.cluster = Cluster(self.config)
        self.invariants = Invariants(self.cluster)
        self.do(events.ControllerResumed(snapshot))
        for known in snapshot.nodes:
            if known.pids and known.member not in self.processes:
                self.do(events.NodeExited(known.member, self.now))
        for member in self.those("starting"):
            self.do(events.NodeStarting(member, "here", (pid_of(member),)))
        for member in self.those("ready"):
            info = make_info(member.node, member.incarnation, self.lanes_of_a_node)
            self.do(events.NodeReady(info, dict(self.lanes.get(member, {}))))
        for pipeline, engine in self.engines.items():
            if engine is not None:
                self.do(events.EngineAttached(pipeline, engine.pid, engine.epoch, engine.members))

    # ---- healing

    @property
    def all_serve_at_home(self) -> bool:
        return all(
            pipeline.state is PipelineState.SERVING
            and all(member and member.node.startswith(f"node-{pipeline.id}-") for member in pipeline.members)
            for pipeline in self.cluster.pipelines
        )

    def _heal_nodes(self) -> None:
        for member in self.those("dead"):
            self.notice(member)
        for member in self.those("starting"):
            self.make_ready(member)
        for member in self.cluster.slots.values():
            if member.state == "suspect" and self.processes.get(member.member) == "ready":
                self.do(events.NodeCleared(member.member))
        for slot in self.cluster.slots.values():
            if slot.vacant:
                self.join_by_hand(slot.node)

    def heal(self, rounds: int = 60) -> None:
        """No more faults: everything has to serve again, each pipeline with its own nodes."""
        for _ in range(rounds):
            self._heal_nodes()
            for pipeline in self.engines:
                if self.engines[pipeline] is None:
                    self.attach(pipeline)
                self.answer(pipeline)
                self.report(pipeline, 0)
            if self.all_serve_at_home:
                return
            self.tick(0.5)
        state = [(each.id, str(each.state), each.members) for each in self.cluster.pipelines]
        slots = [(str(each.member), str(each.state)) for each in self.cluster.slots.values()]
        raise AssertionError(f"the cluster does not heal: {state} {slots} {self.processes}")
