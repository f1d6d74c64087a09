"""Whether a fleet is well: as the controller has it, as the engines have it, and as it is.

The controller alone could be wrong about it: so each pipeline has to serve in its engine as well, with the nodes and in
the epoch that the controller knows of, and each of these nodes has to have a lane of that epoch. What is still to be
done about something in the past counts as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.members import Pipeline
from kevlarflow.sim.speed import AFTERWARDS_SECONDS
from kevlarflow.types import PipelineState

if TYPE_CHECKING:
    from kevlarflow.sim.fleet import Fleet


def complaints(fleet: Fleet) -> Iterator[str]:
    """What is not as it should be in the end."""
    for pipeline in fleet.controller.cluster.pipelines:
        yield from _of_pipeline(fleet, pipeline)
    yield from _of_nodes(fleet)
    yield from (f"{cut.process} and {cut.peer} cannot reach each other" for cut in fleet.network.cuts)


def _of_pipeline(fleet: Fleet, pipeline: Pipeline) -> Iterator[str]:
    own = [f"node-{pipeline.id}-{stage}" for stage in range(len(pipeline.members))]
    serving = [member.node if member else "nobody" for member in pipeline.members]
    if pipeline.state is not PipelineState.SERVING or serving != own:
        yield f"pipeline {pipeline.id} is {pipeline.state} with {', '.join(serving)}"
        return
    if pipeline.leaving:
        yield f"pipeline {pipeline.id} waits for {sorted(pipeline.leaving)} to be left"
    if pipeline.relink_at is not None or pipeline.reform or pipeline.complaints or pipeline.moves:
        yield f"pipeline {pipeline.id} is about to be formed anew"
    yield from _of_engine(fleet, pipeline)


def _of_engine(fleet: Fleet, pipeline: Pipeline) -> Iterator[str]:
    engine = fleet.engines[pipeline.id]
    core = engine.core
    if not (engine.alive and engine.started):
        yield f"{engine} is {'not ready' if engine.alive else 'dead'}"
    elif engine.frozen:
        yield f"{engine} is stopped"
    elif core.standing is not Standing.SERVING:
        yield f"{engine} is {core.standing}"
    elif (core.epoch, core.members) != (pipeline.epoch, tuple(pipeline.members)):
        members = ", ".join(map(str, core.members))
        yield f"{engine} serves with {members} in epoch {core.epoch}, and should in epoch {pipeline.epoch}"
    elif core.in_flight or engine.in_flight:
        yield f"{engine} has steps {core.in_flight} in flight"
    for member in pipeline.members:
        node = fleet.living_node(member) if member is not None else None
        lane = node.lanes.current(pipeline.id) if node is not None else None
        if lane is None or lane.broken:
            yield f"{member} has {'a broken' if lane is not None else 'no'} lane for pipeline {pipeline.id}"
        elif lane.epoch != pipeline.epoch:
            yield f"{member} has a lane of epoch {lane.epoch}, and should of epoch {pipeline.epoch}"


def _of_nodes(fleet: Fleet) -> Iterator[str]:
    for slot in fleet.controller.cluster.slots.values():
        if not slot.usable:
            yield f"{slot.member} is {slot.state}, for the controller"
    for node in fleet.living_nodes():
        if fleet.timeline.now < node.speed.slow_until + AFTERWARDS_SECONDS:
            yield f"{node} was slow just now"
        lanes = [lane.pipeline for lane in node.lanes]
        if node.ready and lanes != [int(node.member.node.split("-")[1])]:
            yield f"{node} has lanes {lanes}"
        if node.ails:
            yield f"{node} {node.ails}"
        for lane in node.lanes:
            # What was lost with a connection is made good with the next step, and there may be none.
            if lane.replication and node.is_in_touch(lane) and lane.replication.queue.held_by_requests:
                yield f"{node} takes blocks of lane {lane.pipeline} for those of requests, and there are none"
