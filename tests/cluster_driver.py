"""A cluster's state machine with a clock, driven by short words."""

from __future__ import annotations

import msgspec

from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import Form, Narrate, Suspend
from kevlarflow.recovery.invariants import Invariants
from kevlarflow.types import Cause, Epoch, LaneCoverage, Member, NodeId, Phases, PipelineId, Stage
from toy_world import make_config, make_info


def member(node: str, incarnation: int = 1) -> Member:
    return Member(NodeId(node), incarnation)


class Driver:
    """A cluster with a clock, and short words for what happens to it."""

    def __init__(
        self,
        stages: int = 2,
        pipelines: int = 2,
        lanes: int = 2,
        *,
        replication: bool = False,
        replacement_wait_s: float = 45.0,
    ) -> None:
        self.config = msgspec.structs.replace(make_config(stages, pipelines), replacement_wait_s=replacement_wait_s)
        self.cluster = Cluster(self.config, unix_offset=1_000_000.0)
        self.invariants = Invariants(self.cluster)
        self.now = 10.0
        self.lanes = lanes
        self.replication = replication
        self.shares = {}
        """Lanes that share the busiest node of each pipeline, as its engine was last told."""

    def do(self, event):
        """Orders that only change how many lanes share a node are answered at once, and stand in `shares` alone."""
        commands = self.cluster.handle(event, self.now)
        self.invariants.check(commands)
        others = []
        for command in commands:
            if isinstance(command, Form):
                self.shares[command.pipeline] = command.shares
            if isinstance(command, Form) and command.cause is Cause.SHARE:
                others += self.formed(command.pipeline, command.epoch)
            else:
                others.append(command)
        return others

    def info(self, node, incarnation=1):
        return make_info(node, incarnation, self.lanes, replication=self.replication)

    def ready(self, node, incarnation=1, epochs=None):
        return self.do(events.NodeReady(self.info(node, incarnation), epochs or {}))

    def attach(self, pipeline, pid=None, epoch=0, members=(), **said):
        return self.do(events.EngineAttached(PipelineId(pipeline), pid or 70 + pipeline, Epoch(epoch), members, **said))

    def engine_ready(self, pipeline):
        return self.do(events.EngineReady(PipelineId(pipeline), 100))

    def formed(self, pipeline, epoch, requests=3, lost=0, tokens=5, seconds=None):
        answer = seconds or Phases(relink=0.01, restore=0.02, recompute=0.03, reissue=0.04)
        return self.do(events.Formed(PipelineId(pipeline), Epoch(epoch), answer, requests, lost, tokens))

    def report(self, pipeline, running=0, waiting=0, in_flight=0, coverage=(), epoch=0, forming=False):
        """`coverage` holds (stage, standby or None, live tokens, covered tokens) for stages that are replicated."""
        rows = tuple(
            LaneCoverage(Stage(stage), self.named(standby).member if standby else None, live, covered, 0, 0)
            for stage, standby, live, covered in coverage
        )
        load = (PipelineId(pipeline), running, waiting, in_flight, 100)
        return self.do(events.EngineReport(*load, replication=rows, epoch=Epoch(epoch), forming=forming))

    def exited(self, node, incarnation=1, alive_at=None):
        when = self.now if alive_at is None else alive_at
        return self.do(events.NodeExited(member(node, incarnation), when))

    def suspected(self, node, incarnation=1):
        return self.do(events.NodeSuspected(member(node, incarnation), self.now - 1.0))

    def cleared(self, node, incarnation=1):
        return self.do(events.NodeCleared(member(node, incarnation)))

    def tick(self, seconds=0.0):
        self.now += seconds
        return self.do(events.Tick())

    def pause(self, seconds):
        """The controller stands still."""
        self.now += seconds
        return self.do(events.Tick.after(seconds))

    def serve(self, start_seconds=0.0):
        """Bring everything up, with nodes that take so long to start."""
        self.do(events.ClusterBegun())
        self.now += start_seconds
        for node in self.cluster.slots:
            self.ready(node)
        for pipeline in self.cluster.pipelines:
            self.attach(pipeline.id)
            self.formed(pipeline.id, 1)
            self.engine_ready(pipeline.id)
        return self

    def restart(self):
        """The same cluster with another life of the controller."""
        snapshot = self.cluster.snapshot()
        self.cluster = Cluster(self.config)
        self.invariants = Invariants(self.cluster)
        self.do(events.ControllerResumed(snapshot))
        return self

    def form(self, pipeline, epoch, nodes, cause, released=(), lost=(), orphans=()):
        return Form(
            pipeline=PipelineId(pipeline),
            epoch=Epoch(epoch),
            nodes=tuple(self.named(node) for node in nodes),
            released=tuple(self.named(node) for node in released),
            cause=cause,
            lost_stages=tuple(Stage(stage) for stage in lost),
            shares=self.shares.get(PipelineId(pipeline), 1),
            orphans=tuple(orphans),
        )

    def named(self, node):
        name, _, incarnation = node.partition("#")
        return self.info(name, int(incarnation or 1))

    def state(self, pipeline):
        return self.cluster.pipelines[pipeline].state


def orders(commands):
    return [command for command in commands if isinstance(command, (Form, Suspend))]


def lines(commands):
    return [command.text for command in commands if isinstance(command, Narrate)]
