"""What must hold in a fleet, checked as things happen: copies, verdicts, orders, waits and what pipelines leave.

KV is checked where it is read (`sim.stage`), tokens as they come to a client (`sim.clients`), and requests that end for
what they cost against who died of what (`sim.blame`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kevlarflow.node.lanes import Lane
from kevlarflow.recovery import events
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.events import AnyCommand
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.members import Pipeline
from kevlarflow.sim.errors import FalseAlarm, Hoarded, NoReason, NotFenced, WrongCopy
from kevlarflow.sim.speed import AFTERWARDS_SECONDS
from kevlarflow.sim.words import words
from kevlarflow.types import Cause, Epoch, NodeState, PipelineId, PipelineState, Stage

if TYPE_CHECKING:
    from kevlarflow.sim.engine import Engine
    from kevlarflow.sim.fleet import Fleet
    from kevlarflow.sim.node import Node

LEAVING_SECONDS = 0.4
"""Within which a pipeline that waits has left all its lanes."""
ROUNDING_SECONDS = 1e-6

Content = tuple[int | None, ...]


class FleetChecks:
    """See the module's text. Each raises a `Violation` that says what is wrong."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._truth: dict[tuple[PipelineId, Stage, int, int], Content] = {}
        """What each (pipeline, stage, block, generation) holds."""
        self._orders: dict[tuple[PipelineId, Epoch], AnyCommand] = {}
        self._newest: collections.Counter[PipelineId] = collections.Counter()
        self._bereft_at: dict[PipelineId, float] = {}
        """Since when a pipeline has not served for want of a node."""
        self._waits_since: dict[tuple[str, Epoch], float] = {}
        """Since when an engine reports that it waits."""

    def note_written(self, lane: Lane, stage: Stage, written: Iterable[Replica]) -> None:
        """A step has given blocks their content."""
        if self._fleet.plan.shape.replicates:
            for replica in written:
                key = (lane.pipeline, stage, replica.block, replica.generation)
                content: Content = lane.runner.memory.read(replica.block)[: replica.filled]  # type: ignore[attr-defined]
                # A node that was stopped may run old steps later than others.
                if len(content) >= len(self._truth.get(key, ())):
                    self._truth[key] = content

    def copy(self, pipeline: PipelineId, stage: Stage, copy: Replica, content: Content) -> None:
        """A copy that is put in place is what its tag says."""
        self._fleet.counts["blocks restored"] += 1
        truth = self._truth.get((pipeline, stage, copy.block, copy.generation))
        if truth is None or content[: copy.filled] != truth[: copy.filled]:
            raise WrongCopy(f"{copy} of pipeline {pipeline} at stage {stage} is {content}, not {truth}")

    def verdict(self, verdict: events.NodeSilent) -> None:
        """Nobody is declared dead without the reason that is given for it."""
        fleet, controller = self._fleet, self._fleet.controller
        node = fleet.living_node(verdict.member)
        if node is None:
            return
        fleet.counts[f"times a node {verdict.what}"] += 1
        # Who was cut off has to hear that it is to introduce itself again.
        unheard = node.cut_at > 0.0 and (node.deaf or fleet.network.stops(controller, node))
        # What was held up since may have arrived just now.
        late_at = max(node.cut_at, fleet.network.released_at) if node.cut_at > 0.0 else 0.0
        cut = unheard or fleet.timeline.now - late_at < controller.config.timeouts.confirm_after_ms / 1_000
        reasons = {
            "did not answer": cut or not controller.hears(node),
            "was stopped": node.frozen,
            "was stuck in a step": node.thread.hangs,
            "was stuck between two steps": node.thread.hangs,
            "did not hear us": cut or node.deaf or fleet.network.stops(controller, node),
        }
        if not reasons[verdict.what]:
            raise FalseAlarm(f"{node} is declared dead: it {verdict.what}")

    def slow(self, node: Node, slow: events.NodeSlow) -> None:
        """Nobody is taken for slow who is not, or was not just now."""
        self._fleet.counts["reports of slow nodes"] += 1
        if self._fleet.timeline.now > node.speed.slow_until + AFTERWARDS_SECONDS:
            raise FalseAlarm(f"{node} is as fast as its peers: {words(slow)}")

    def rests(self) -> None:
        """A run takes less time than a place is left alone, so its node is replaced for being slow once at most."""
        recoveries = self._fleet.controller.cluster.recoveries
        moved = {(each.pipeline, each.stage, each.origin): each for each in recoveries if each.cause is Cause.SLOW}
        total = sum(each.cause is Cause.SLOW for each in recoveries)
        if total > len(moved):
            raise FalseAlarm(f"lanes moved {total} times from slow nodes: {list(moved)}")

    def orders(self, commands: Iterable[AnyCommand]) -> None:
        """Over all lives of the controller, an epoch is given to one order, and none is older than one before."""
        for command in commands:
            if isinstance(command, (events.Form, events.Suspend)):
                key = (command.pipeline, command.epoch)
                again = key in self._orders
                if self._orders.setdefault(key, command) != command:
                    raise NotFenced(f"epoch {command.epoch} of pipeline {command.pipeline} is given a second time")
                if command.epoch < self._newest[command.pipeline]:
                    raise NotFenced(f"pipeline {command.pipeline} goes back to epoch {command.epoch}")
                self._newest[command.pipeline] = command.epoch
                # One that is sent again, to whoever may not have had it, was right when it was given.
                if isinstance(command, events.Suspend) and not again:
                    self._check_wait(command)
                    self._check_suspension(command)
                    self._fleet.verdicts.suspension(command)

    def left(self, engine: Engine) -> None:
        """No node that hears and works keeps a lane of a pipeline that has waited for a while."""
        now, network = self._fleet.timeline.now, self._fleet.network
        # One wait is not the next, though nobody looked in between.
        wait = (engine.name, engine.core.epoch)
        since = self._waits_since.setdefault(wait, now)
        if engine.core.standing is not Standing.WAITING:
            del self._waits_since[wait]
        elif now > since + LEAVING_SECONDS and not network.cuts and network.slowness == 1.0:
            # What was lost with a connection is said again a while later.
            heard = (each for each in self._fleet.living_nodes() if not network.connection(engine, each))
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
        waited = self._fleet.timeline.now - self._bereft_at.setdefault(order.pipeline, self._fleet.timeline.now)
        if not order.waits and waited < self._fleet.plan.shape.wait - ROUNDING_SECONDS:
            raise NoReason(f"pipeline {order.pipeline} gives up after {waited:.3f} s: {order.reason}")

    def _check_suspension(self, order: events.Suspend) -> None:
        """A pipeline is suspended only if no living node of the stage has room for it."""
        cluster = self._fleet.controller.cluster
        pipeline = cluster.pipelines[order.pipeline]
        for slot in cluster.slots.values():
            if slot.stage != order.stage or slot.state is not NodeState.READY or slot.fenced_by is not None:
                continue
            others = [each for each in cluster.pipelines if each.id not in (slot.pipeline, order.pipeline)]
            foreign = sum(slot.member in each.lanes for each in others)
            has_room = slot.pipeline == order.pipeline or foreign < self._fleet.plan.shape.lanes - 1
            if has_room and slot.member not in pipeline.avoided:
                raise NoReason(f"pipeline {order.pipeline} is suspended though {slot.member} has room: {order.reason}")
