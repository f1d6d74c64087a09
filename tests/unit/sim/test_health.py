"""A fleet is well only if engines and nodes are what the controller takes them for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kevlarflow.recovery.forming import Standing
from kevlarflow.sim import fleet, plan
from kevlarflow.sim.engine import Engine
from kevlarflow.sim.fleet import Fleet
from kevlarflow.sim.health import complaints
from kevlarflow.sim.network import Cut
from kevlarflow.sim.node import Node
from kevlarflow.types import Epoch, Member, NodeId, NodeState


def engine(run: Fleet) -> Engine:
    return run.engines[0]


def node(run: Fleet) -> Node:
    return run.nodes[engine(run).core.members[0]]


def new_lane(run: Fleet) -> None:
    pipeline = run.engines[0].pipeline
    node(run).lanes.open(pipeline, Epoch(engine(run).core.epoch + 1))


def test_a_run_ends_well() -> None:
    assert list(complaints(fleet.run(plan.draw(0)))) == []


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda run: engine(run).die(0.0), "engine-0#1 is dead"),
        (lambda run: setattr(engine(run), "started", False), "engine-0#1 is not ready"),
        (lambda run: engine(run).freeze(), "engine-0#1 is stopped"),
        (lambda run: setattr(engine(run).core, "standing", Standing.FORMING), "engine-0#1 is forming"),
        (lambda run: setattr(engine(run).core, "epoch", 1_000), "in epoch 1000, and should in epoch "),
        (lambda run: setattr(engine(run).core, "_disagrees", True), "engine-0#1 serves with "),
        (lambda run: run.end_process(node(run)), "has no lane for pipeline 0"),
        (lambda run: node(run).lanes.fail(next(iter(node(run).lanes))), "has a broken lane for pipeline 0"),
        (new_lane, "has a lane of epoch "),
        (lambda run: setattr(node(run), "deaf", True), "is deaf"),
        (lambda run: node(run).speed.slow_down(3.0), "was slow just now"),
        (lambda run: run.network.cuts.append(Cut(node(run), frozenset(), True, True)), "cannot reach each other"),
        (lambda run: setattr(run.controller.cluster.slots["node-0-0"], "state", NodeState.SUSPECT), "is suspect"),
        (
            lambda run: run.controller.cluster.pipelines[0].leaving.add(Member(NodeId("node-9-9"), 1)),
            "waits for [Member",
        ),
        (lambda run: setattr(run.controller.cluster.pipelines[0], "relink_at", 1e9), "is about to be formed anew"),
    ],
)
def test_what_is_wrong_is_told(damage: Callable[[Fleet], None], complaint: str) -> None:
    run = fleet.run(plan.draw(0))
    damage(run)
    assert any(complaint in each for each in complaints(run)), list(complaints(run))
