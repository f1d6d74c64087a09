"""What the controller decides about nodes, held against what only the world knows: whom it kills, and does without.

A node may be killed that ails, that could not be heard or reached just now, that does not get ready, does not leave
though it was told to, could not be used twice, or whose place another one has. And a pipeline may be suspended if no
node of the stage could have served it. Both are judged by what is, not by what the controller thinks of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kevlarflow.recovery.complaints import AVOID_SECONDS
from kevlarflow.recovery.events import Suspend
from kevlarflow.sim.errors import FalseAlarm, NoReason
from kevlarflow.types import NodeState

if TYPE_CHECKING:
    from kevlarflow.sim.fleet import Fleet
    from kevlarflow.sim.node import Node

RECENT_SECONDS = 1.0
"""For so long after a trouble is over the controller may not know of that."""
KNOWN_SECONDS = 0.2
"""After which it knows of a node that is ready, and hears and is heard."""
ROUNDING_SECONDS = 1e-6
STRIKES = 2
"""So often a node fails those who use it before it is replaced."""


class Verdicts:
    """See the module's text."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def kill(self, node: Node) -> None:
        """It is about to be sent SIGKILL."""
        if node.killed_at is None:
            if not self._may_be_killed(node):
                raise FalseAlarm(f"{node} is killed, and nothing is wrong with it")
            self._fleet.counts["nodes killed with reason"] += 1
            node.killed_at = self._fleet.timeline.now

    def _may_be_killed(self, node: Node) -> bool:
        fleet, now = self._fleet, self._fleet.timeline.now
        timeouts = fleet.controller.config.timeouts
        slot = fleet.controller.cluster.slots[node.member.node]
        return (
            bool(node.ails)
            or self._was_stopped(node)
            or self._is_cut_off(node, RECENT_SECONDS)
            or slot.incarnation > node.member.incarnation
            or (not node.ready and now - node.born_at >= timeouts.startup_timeout_s)
            or (node.told_to_leave_at is not None and now - node.told_to_leave_at >= timeouts.stop_grace_s)
            or len(node.failed_at) >= STRIKES
        )

    def _was_stopped(self, node: Node) -> bool:
        """Whether it is stopped, or was just now, for long enough."""
        now = self._fleet.timeline.now
        enough = self._fleet.controller.config.timeouts.stopped_after_ms / 1_000 - ROUNDING_SECONDS
        if node.frozen:
            return now - node.frozen_since >= enough
        return node.last_pause >= enough and now - node.thawed_at < RECENT_SECONDS

    def _is_cut_off(self, node: Node, seconds: float) -> bool:
        """Whether it is, or was within so many seconds, cut off from anybody."""
        if any(node in (cut.process, cut.peer) for cut in self._fleet.network.cuts):
            return True
        return self._fleet.timeline.now - max(node.parted_at, node.cut_at) < seconds

    def suspension(self, order: Suspend) -> None:
        """A pipeline is to wait, or to end its requests, for want of a node for a stage."""
        for node in self._fleet.living_nodes():
            if node.stage == order.stage and self._could_serve(node, order):
                raise NoReason(f"pipeline {order.pipeline} is suspended though {node} could serve: {order.reason}")

    def _could_serve(self, node: Node, order: Suspend) -> bool:
        fleet, now = self._fleet, self._fleet.timeline.now
        # Where the network is slow for a while, that a node is ready, or who it is, comes late.
        is_slow = any(each.kind == "delay" for each in fleet.plan.faults)
        is_heard = fleet.controller.cluster.slots[node.member.node].state is not NodeState.STARTING
        patience = KNOWN_SECONDS if is_heard or not is_slow else RECENT_SECONDS
        if not (node.ready and node.is_well) or now - max(node.ready_at, node.left_at) < patience:
            return False
        if node.killed_at is not None or node.told_to_leave_at is not None:
            return False
        failed = any(now - each < AVOID_SECONDS for each in node.failed_at)
        # What was held up while the controller was away, or stopped, it reads in no particular order.
        controller = fleet.controller
        unknown = now - max(controller.started_at, fleet.network.released_at) < KNOWN_SECONDS
        if is_slow and not controller.knows(node):
            # A new life of the controller may miss it when yet another one is lost.
            unknown = unknown or now - controller.started_at < controller.config.timeouts.settle_ms / 1_000
        if failed or unknown or now - node.thawed_at < KNOWN_SECONDS or self._is_cut_off(node, KNOWN_SECONDS):
            return False
        home = int(node.member.node.split("-")[1])
        if home == order.pipeline:
            return True
        pipelines = fleet.controller.cluster.pipelines
        # A pipeline that has just given it back may not have heard of that, and open the lane yet.
        lanes = {lane.pipeline for lane in node.lanes} | {
            each.id for each in pipelines if each.has_lane_on(node.member)
        }
        return len(lanes - {home, order.pipeline}) < fleet.plan.shape.lanes - 1
