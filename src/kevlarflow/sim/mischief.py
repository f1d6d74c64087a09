"""Carries out the faults of a plan, and ends them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from kevlarflow.node.progress import OVERRUN_FACTOR
from kevlarflow.recovery.forming import Standing
from kevlarflow.sim.connections import Connections
from kevlarflow.sim.engine import Engine
from kevlarflow.sim.errors import Overlooked
from kevlarflow.sim.network import By, Process
from kevlarflow.sim.node import Node
from kevlarflow.sim.plan import AS_IT_LOADS, FOR_GOOD, SLOW_PLACE, Fault
from kevlarflow.types import NodeId, PipelineId
from kevlarflow.wire import steps

if TYPE_CHECKING:
    from kevlarflow.sim.fleet import Fleet

PHASE_OF: dict[type, str] = {
    steps.Join: "join",
    steps.Place: "place",
    steps.Recompute: "recompute",
    steps.Restore: "restore",
    steps.Execute: "reissue",
    steps.Flush: "flush",
    steps.Flushed: "flushed",
}
"""By what a node takes, or an engine."""
PLANNED = ("prepare", "flush", "flushed")
UNRECEIVED_SECONDS = 0.01
"""What a process sent so shortly before its death may be lost."""
NOTICED_SECONDS = 3.0
"""Within which a node that is slow, in a fleet that is busy and otherwise well, has to be on its way out; and one that
is stopped while it loads has to be gone."""
FOUND_SECONDS = 8.0
"""The same for a node that is stopped, hangs or is deaf: a step of a size that was not seen before may sleep for 4 s,
and a controller that was started again waits for a while for what it knows of."""
MAX_FAILED_STARTS = 2
"""Starts of one place that fail in a row: one that is given up would not heal."""
JOIN_SECONDS = 0.5
"""Between two looks for places that have to be filled by hand."""


class Mischief:
    """See the module's text."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._armed: dict[str, list[Fault]] = {}
        self._slow_places: dict[NodeId, float] = {}
        self._stops_as_it_loads = 0
        """How many of the nodes that begin next do not get far."""
        self.over = False
        self._connections = Connections(fleet)
        self._stopped: list[Engine] = []
        """Engines that go on some time."""

    def begin(self, fault: Fault) -> None:
        """Do it."""
        fleet = self._fleet
        if self.over:
            return
        node = self._target(fault)
        fleet.tell(fault.name, f"{fault}: {node}")
        match fault.kind:
            case "crash" | "crash in a phase" | "cut in a phase":
                if fault.detail:
                    self._armed.setdefault(fault.detail, []).append(fault)
                self._crash(node)
            case "engine":
                fleet.end_process(fleet.engines[fault.pipeline], self._loses(), by=By.SOMEBODY)
            case "engine freeze":
                self._freeze_engine(fault)
            case "controller" | "forgetful controller" | "controller freeze":
                self._trouble_controller(fault)
            case "delay":
                fleet.network.slowness = 2 + 20 * fault.strength
                self._later(fault, functools.partial(setattr, fleet.network, "slowness", 1.0))
            case "echo":
                fleet.network.echo = fault.strength
                self._later(fault, functools.partial(setattr, fleet.network, "echo", 0.0))
            case _ if node is not None:
                self._trouble(fault, node)

    def _freeze_engine(self, fault: Fault) -> None:
        """One that is stopped for good has to be killed; before it has attached that is up to those who start it."""
        engine = self._fleet.engines[fault.pipeline]
        known = self._fleet.controller.cluster.pipelines[fault.pipeline].engine
        if engine.alive:
            self._fleet.counts["engines that were stopped"] += 1
            engine.freeze()
            if fault.detail != FOR_GOOD or known.pid != engine.pid:
                self._stopped.append(engine)
                self._later(fault, functools.partial(self._thaw_engine, engine))

    def _trouble_controller(self, fault: Fault) -> None:
        """It dies, or is stopped for a while; a pause of its own is nobody else's silence."""
        controller = self._fleet.controller
        if fault.kind != "controller freeze":
            self._crash_controller(fault)
        elif controller.alive:
            self._fleet.counts["controllers that were stopped"] += 1
            controller.freeze()
            self._later(fault, functools.partial(self._thaw_controller))

    def _thaw_controller(self) -> None:
        """It reads what waits before it looks at the time."""
        controller = self._fleet.controller
        if controller.frozen:
            controller.frozen = False
            self._fleet.network.release()
            controller.thaw()

    def _thaw_engine(self, engine: Engine) -> None:
        if engine.frozen:
            engine.thaw()
            self._fleet.network.release()

    def _trouble(self, fault: Fault, node: Node) -> None:
        match fault.kind:
            case "freeze":
                self._freeze(fault, node)
            case "slow":
                node.speed.slow_down(2 + 30 * fault.strength)
                self._later(fault, functools.partial(self._speed_up, node))
                if fault.detail:
                    self._fleet.timeline.after(NOTICED_SECONDS, functools.partial(self._expect_notice, node))
                if fault.detail == SLOW_PLACE:
                    self._slow_places[node.member.node] = node.speed.factor
            case "raise":
                node.raises = True
            case "stuck":
                node.thread.will_hang = fault.detail
            case "deaf":
                node.deaf = True
            case "drain":
                self._fleet.controller.drain(node.member.node)
                self._later(fault, functools.partial(self._fleet.controller.join, node.member.node))
            case "partition" | "cut" | "link":
                self._connections.trouble(fault, node)

    def _freeze(self, fault: Fault, node: Node) -> None:
        if fault.detail == AS_IT_LOADS:
            self._stops_as_it_loads += 1
            return
        self._fleet.blame.note_hurt(node.member)
        node.freeze()
        node.hard_to_kill = fault.detail == "hard to kill"
        node.stopped = node.stopped or fault.detail == FOR_GOOD
        self._later(fault, functools.partial(self._thaw, node))

    def end_all(self) -> None:
        """Heal everything; whatever would still begin does not."""
        fleet = self._fleet
        self.over = True
        self._armed.clear()
        self._slow_places.clear()
        self._stops_as_it_loads = 0
        fleet.network.slowness, fleet.network.echo = 1.0, 0.0
        self._connections.heal()
        for node in fleet.living_nodes():
            self._speed_up(node)
            node.raises = False
            node.thread.will_hang = ""
            self._thaw(node)
        for engine in self._stopped:
            self._thaw_engine(engine)
        for engine in fleet.engines:
            if not engine.alive:
                fleet.start_engine(engine.pipeline)
        if not fleet.controller.alive:
            fleet.controller.start()
        self._thaw_controller()
        self._fill_vacant_places()
        fleet.network.release()
        fleet.timeline.after(FOUND_SECONDS, self._expect_all_found)
        self._connections.expect_links_avoided()

    def _fill_vacant_places(self) -> None:
        """Somebody starts nodes by hand where others were drained."""
        for slot in self._fleet.controller.cluster.slots.values():
            if slot.vacant:
                self._fleet.controller.join(slot.node)
        self._fleet.timeline.after(JOIN_SECONDS, self._fill_vacant_places)

    def trigger(self, header: steps.AnyStepMessage, node: Node) -> bool:
        """A node takes a message, or its engine takes one of it: the phase in which something was to happen may have
        come.

        Returns whether the node is gone before it could do anything about the message.
        """
        phase = _phase_of(header)
        if phase not in self._armed:
            return False
        pipeline: PipelineId = header.pipeline  # type: ignore[union-attr]
        engine = self._fleet.engines[pipeline]
        if phase == "reissue" and engine.core.standing is not Standing.FORMING:
            return False
        fault = self._armed[phase].pop()
        if not self._armed[phase]:
            del self._armed[phase]
        self._fleet.counts["faults while lanes are prepared"] += phase in PLANNED
        if fault.kind == "cut in a phase":
            self._fleet.tell(fault.name, f"the connection breaks in {type(header).__name__} of {node}")
            self._fleet.counts["cuts in a phase"] += 1
            self._soon(functools.partial(self._connections.sever, engine, node))
            return False
        return self._kill_in_phase(fault, header, node, engine)

    def _kill_in_phase(self, fault: Fault, header: steps.AnyStepMessage, node: Node, engine: Engine) -> bool:
        victim: Process = node
        others = [each for each in self._fleet.living_nodes() if each is not node]
        if fault.strength > 0.9:
            victim = engine
        elif fault.strength > 0.8:
            self._crash_controller(fault)
            return False
        elif fault.strength > 0.5 and others:
            victim = self._fleet.rng.choice(others)
        self._fleet.tell(fault.name, f"{victim} dies in {type(header).__name__} of {node}")
        self._fleet.counts["crashes in a phase"] += 1
        self._soon(functools.partial(self._crash, victim))
        return not node.alive

    # ---- deeds

    def _soon(self, action: functools.partial[None]) -> None:
        """At once, or within a step."""
        if self._fleet.rng.random() < 0.5:
            self._fleet.timeline.after(self._fleet.plan.shape.step * self._fleet.rng.random(), action)
        else:
            action()

    def _target(self, fault: Fault) -> Node | None:
        fleet = self._fleet
        pipeline = fleet.controller.cluster.pipelines[fault.pipeline]
        member = pipeline.members[fault.stage]
        if fault.whose == "standby" and len(pipeline.standbys) > fault.stage:
            standby = pipeline.standbys[fault.stage]
            member = standby.member if standby is not None else None
        if fault.whose != "own" and member is not None and member in fleet.nodes and fleet.nodes[member].alive:
            return fleet.nodes[member]
        own = f"node-{fault.pipeline}-{fault.stage}"
        return next((each for each in fleet.living_nodes() if each.member.node == own), None)

    def _crash(self, victim: Process | None) -> None:
        if victim is None or not victim.alive or self.over:
            return
        if isinstance(victim, Node):
            slot = self._fleet.controller.cluster.slots[victim.member.node]
            if not victim.ready and slot.failed_starts >= MAX_FAILED_STARTS:
                return
            self._fleet.blame.note_hurt(victim.member)
        self._fleet.end_process(victim, self._loses(), by=By.SOMEBODY)

    def _crash_controller(self, fault: Fault) -> None:
        controller = self._fleet.controller
        if not controller.alive:
            return
        if fault.detail == "as it acts":
            controller.doom(functools.partial(self._crash_controller, dataclasses.replace(fault, detail="")))
            return
        self._fleet.counts["controller crashes"] += 1
        controller.die(self._loses())
        remembers = fault.kind != "forgetful controller"
        self._fleet.timeline.after(fault.seconds, functools.partial(self._restart_controller, remembers))

    def _restart_controller(self, remembers: bool) -> None:
        if not self._fleet.controller.alive:
            self._fleet.controller.start(remembers=remembers)

    def _loses(self) -> float:
        """Since when what a dying process has sent, and nobody has received, is lost."""
        fleet = self._fleet
        return fleet.timeline.now - fleet.rng.choice([0.0, 0.0, UNRECEIVED_SECONDS * fleet.rng.random()])

    def haunt(self, node: Node) -> None:
        """A node begins its life: where the place is slow, so is every node in it; and this may be one that stops."""
        if self._stops_as_it_loads:
            self._stops_as_it_loads -= 1
            fleet = self._fleet
            fleet.timeline.after(fleet.plan.shape.start * fleet.rng.random(), functools.partial(self._stop, node))
        if node.member.node in self._slow_places:
            node.speed.slow_down(self._slow_places[node.member.node])

    def _stop(self, node: Node) -> None:
        fleet = self._fleet
        if node.alive and not node.ready:
            fleet.tell(str(node), "is stopped as it loads")
            fleet.counts["nodes stopped as they load"] += 1
            node.stopped = True
            fleet.blame.note_hurt(node.member)
            node.freeze()
            life = fleet.controller.life
            fleet.timeline.after(NOTICED_SECONDS, functools.partial(self._expect_stop_noticed, node, life))

    def _expect_all_found(self) -> None:
        for node in self._fleet.living_nodes():
            # The first step of its size that has stood still, and went on, lets others do so for ten times as long.
            if node.ails and OVERRUN_FACTOR * node.longest_pause < FOUND_SECONDS / 2:
                raise Overlooked(
                    f"{node} {node.ails}, and lives {FOUND_SECONDS:.0f} s after all other faults were over"
                )

    def _expect_stop_noticed(self, node: Node, life: int) -> None:
        """Well before the limit for start-up, by a controller that knew of it and was there all the time."""
        controller = self._fleet.controller
        if node.alive and controller.alive and controller.life == life and controller.watches(node):
            raise Overlooked(f"{node} was stopped as it loaded, and nothing is done about it")

    def _expect_notice(self, node: Node) -> None:
        slot = self._fleet.controller.cluster.slots[node.member.node]
        if slot.member == node.member and slot.emptied_for is None and not self.over:
            raise Overlooked(
                f"{node} is {node.speed.factor:.1f} times slower than it should be, and nothing is done about it"
            )

    def _later(self, fault: Fault, action: functools.partial[None]) -> None:
        self._fleet.timeline.after(fault.seconds, action)

    def _thaw(self, node: Node) -> None:
        node.hard_to_kill = False
        if node.frozen and not node.stopped:
            node.thaw()
            self._fleet.network.release()

    def _speed_up(self, node: Node) -> None:
        node.speed.speed_up(self._fleet.timeline.now)


def _phase_of(header: steps.AnyStepMessage) -> str:
    if isinstance(header, steps.Place) and header.ahead:
        return "prepare"
    return PHASE_OF.get(type(header), "")
