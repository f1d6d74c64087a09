"""What befalls connections in a simulated fleet: partitions, breaks, and links between two that stay broken."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

from kevlarflow.recovery.members import Pipeline
from kevlarflow.sim.errors import Overlooked
from kevlarflow.sim.network import Cut, Process
from kevlarflow.sim.node import Node
from kevlarflow.sim.plan import Fault

if TYPE_CHECKING:
    from kevlarflow.sim.engine import Engine
    from kevlarflow.sim.fleet import Fleet

CUT_SECONDS = 0.1
"""Between two breaks of connections that break again and again, at most."""
CUT_ONCE = 0.5
"""Cuts of no more strength than this come once."""
LINK_SECONDS = 12.0
"""How long a link between two stays broken: beyond the end of all other faults."""
LONG_FAULT_SECONDS = 1.2
"""For faults that are drawn to last for longer, it does so for twice as long, and a lane goes home over it."""
AVOIDED_SECONDS = 8.0
"""Within which, after that end, a pipeline that could do without such a link does."""
STILL_SECONDS = 1.0
"""Without an answer; a step takes far less."""
CONTROL, STEPS = frozenset({"control", "orders"}), frozenset({"steps", "answers"})
ACTIVATIONS, COPIES = frozenset({"activations"}), frozenset({"copy", "outcome"})


class Connections:
    """See the module's text."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._over = False
        self._links: list[Cut] = []
        """Broken links that outlast the other faults."""

    def trouble(self, fault: Fault, node: Node) -> None:
        """Do to a node's connections what a fault says."""
        match fault.kind:
            case "cut":
                self._cut(fault, node, self._fleet.timeline.now + fault.seconds)
            case "link":
                self._break_link(fault, node)
            case "partition":
                kinds = frozenset(fault.detail.split())
                cut = Cut(node, kinds, inward=fault.strength < 0.7, outward=fault.strength > 0.3)
                self._fleet.network.cuts.append(cut)
                self._fleet.timeline.after(fault.seconds, functools.partial(self._mend, cut))

    def heal(self) -> None:
        """All but the links that outlast the other faults."""
        fleet = self._fleet
        self._over = True
        for cut in fleet.network.cuts:
            self._note_mended(cut)
        fleet.network.cuts[:] = [cut for cut in fleet.network.cuts if cut in self._links]

    def expect_links_avoided(self) -> None:
        """A while from now those that are left have to be done without."""
        fleet = self._fleet
        for cut in fleet.network.cuts:
            fleet.timeline.after(AVOIDED_SECONDS, functools.partial(self._expect_avoided, cut, fleet.controller.life))

    def sever(self, engine: Engine, node: Node) -> None:
        """Break what carries steps between two."""
        self._sever(engine, node, STEPS)

    # ---- links that stay broken

    def _break_link(self, fault: Fault, node: Node) -> None:
        """Of the node with its engine, or with the stage behind it; for long."""
        fleet = self._fleet
        engine = fleet.engines[fault.pipeline]
        serving = [fleet.nodes.get(each.member) for each in engine.core.nodes]
        following = [peer for each, peer in itertools.pairwise(serving) if each is node]
        peer: Process | None = engine if fault.detail == "engine" else next(iter(following), None)
        if peer is None or not peer.alive or node not in serving:
            return
        fleet.counts["links that stay broken"] += 1
        fleet.tell(fault.name, f"no more between {node} and {peer}")
        cut = Cut(node, frozenset(), inward=fault.strength < 0.7, outward=fault.strength > 0.3, peer=peer)
        fleet.network.cuts.append(cut)
        self._links.append(cut)
        seconds = LINK_SECONDS * (1 if fault.seconds < LONG_FAULT_SECONDS else 2)
        fleet.timeline.after(seconds, functools.partial(self._mend, cut))

    def _expect_avoided(self, cut: Cut, life: int) -> None:
        """Nobody's requests wait for a link for ever where other nodes could serve the stages at its ends."""
        fleet, node, peer = self._fleet, cut.process, cut.peer
        controller = fleet.controller
        if cut not in fleet.network.cuts or controller.life != life or not (node.alive and peer and peer.alive):
            return
        if any(each.ails for each in fleet.living_nodes()):
            # A pipeline does not stand still while a node that hangs seems to be at work.
            return
        for pipeline in controller.cluster.pipelines:
            engine = fleet.engines[pipeline.id]
            ends = [end for end in (node, peer) if isinstance(end, Node) and end.member in pipeline.members]
            uses = len(ends) == 2 or (peer is engine and len(ends) == 1)
            still = pipeline.relinked_in_vain > 0 or engine.core.still_seconds(fleet.timeline.now) > STILL_SECONDS
            waits = engine.core.waits and still and not engine.frozen
            if uses and waits and all(self._could_be_spared(pipeline, end) for end in ends):
                raise Overlooked(f"pipeline {pipeline.id} waits for the link between {node} and {peer}")

    def _could_be_spared(self, pipeline: Pipeline, node: Node) -> bool:
        """Whether another node of the stage has room for the lane."""
        grid = self._fleet.controller.cluster
        others = (each for each in grid.stages[node.stage] if each.node != node.member.node)
        lanes = self._fleet.plan.shape.lanes
        return any(
            each.usable and (each.pipeline == pipeline.id or grid.foreign_lanes(each, pipeline.id) < lanes - 1)
            for each in others
        )

    def _mend(self, cut: Cut) -> None:
        if cut in self._fleet.network.cuts:
            self._fleet.network.cuts.remove(cut)
            self._note_mended(cut)
            self._fleet.network.release()

    def _note_mended(self, cut: Cut) -> None:
        for end in (cut.process, cut.peer):
            if isinstance(end, Node):
                end.parted_at = self._fleet.timeline.now

    # ---- connections that break

    def _cut(self, fault: Fault, node: Node, until: float) -> None:
        """Break connections of a node: once, or again and again."""
        if self._over or not node.alive:
            return
        fleet = self._fleet
        everything = fault.detail == "all"
        if everything or fault.detail == "controller":
            self._sever(node, fleet.controller, CONTROL)
            fleet.controller.lose_connection(node)
            node.cut_at = fleet.timeline.now
        if everything or fault.detail == "engine":
            for engine in fleet.engines:
                self._sever(engine, node, STEPS)
        if fault.detail == "engine controller":
            self._sever(fleet.engines[fault.pipeline], fleet.controller, CONTROL)
            fleet.controller.lose_connection(fleet.engines[fault.pipeline])
        sorts = ACTIVATIONS | COPIES if everything else {"activations": ACTIVATIONS, "copies": COPIES}.get(fault.detail)
        for other in fleet.living_nodes() if sorts else ():
            if other is not node:
                self._sever(node, other, sorts or frozenset())
        fleet.counts["connections cut"] += 1
        if fault.strength > CUT_ONCE and fleet.timeline.now < until:
            fleet.timeline.after(CUT_SECONDS * fleet.rng.random(), functools.partial(self._cut, fault, node, until))

    def _sever(self, one: Process, other: Process, sorts: frozenset[str]) -> None:
        rng = self._fleet.rng
        self._fleet.network.sever(one, other, sorts, loses=rng.random() < 0.7, loses_back=rng.random() < 0.7)
