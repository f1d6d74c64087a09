"""A node that is slow is emptied when nothing else is going on, replaced, and then left alone for a while."""

from __future__ import annotations

import pytest

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import Retire, StartNode
from kevlarflow.recovery.invariants import Invariants
from kevlarflow.recovery.nodes import STEADY_SECONDS
from kevlarflow.recovery.slowness import REST_SECONDS
from kevlarflow.types import Cause, NodeId, NodeState, Stage

STANDBY_HAS_ALL = [(1, "node-1-1", 1_000, 1_000)]


def slow(driver: Driver, node: str = "node-0-1", incarnation: int = 1):
    return driver.do(events.NodeSlow(member(node, incarnation), 5.25, 12.0))


def state_of(driver: Driver, node: str) -> NodeState:
    return driver.cluster.slots[NodeId(node)].state


def serving(**shape) -> Driver:
    return Driver(replication=True, **shape).serve()


def move(driver: Driver, life: int = 1, epoch: int = 1) -> int:
    """The lane of a node that is found slow goes to its standby and comes home to a fresh node; returns the epoch."""
    slow(driver, incarnation=life)
    driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=epoch)
    driver.formed(0, epoch + 1)
    driver.exited("node-0-1", life)
    driver.ready("node-0-1", life + 1)
    driver.report(0, 8, coverage=[(1, f"node-0-1#{life + 1}", 1_000, 1_000)], epoch=epoch + 1)
    driver.formed(0, epoch + 2)
    return epoch + 2


def test_the_lane_of_a_slow_node_moves_to_its_standby_and_home_to_a_fresh_node():
    driver = serving()
    said = lines(slow(driver))
    assert said == [
        "node-0-1 computes 5.2x slower than its peers for 12 s: it gives the lane of pipeline 0 away, "
        "then a fresh node takes its place"
    ]
    assert state_of(driver, "node-0-1") is NodeState.DRAINING
    (form,) = orders(driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1))
    assert form == driver.form(0, 2, ["node-0-0", "node-1-1"], Cause.SLOW, released=["node-0-1"], lost=[1])
    assert form.cause.is_planned
    assert Retire(member("node-0-1")) in driver.formed(0, 2)
    driver.exited("node-0-1")
    assert StartNode(member("node-0-1", 2), Stage(1)) in driver.tick(STEADY_SECONDS)
    driver.ready("node-0-1", 2)
    (form,) = orders(driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, 1_000)], epoch=2))
    assert form.cause is Cause.REJOIN
    driver.formed(0, 3)
    causes = [(each.cause, each.origin, each.target) for each in driver.cluster.recoveries]
    assert causes == [(Cause.SLOW, "node-0-1", "node-1-1"), (Cause.REJOIN, "node-1-1", "node-0-1")]


@pytest.mark.parametrize(
    "happen",
    [
        pytest.param(lambda driver: driver.exited("node-1-0"), id="a node is lost"),
        pytest.param(lambda driver: driver.suspected("node-1-0"), id="a node is suspect"),
        pytest.param(lambda driver: driver.do(events.DrainRequested(NodeId("node-1-0"), 1)), id="a node drains"),
        pytest.param(lambda driver: slow(driver, "node-1-0"), id="a slow node is emptied already"),
        pytest.param(lambda driver: driver.do(events.EngineLost(0, 70)), id="an engine is gone"),
    ],
)
def test_nothing_is_done_while_something_else_is_going_on(happen):
    driver = serving()
    happen(driver)
    assert lines(slow(driver)) == []
    assert state_of(driver, "node-0-1") is NodeState.READY


def test_nothing_is_done_while_a_lane_is_on_its_way_home():
    driver = serving()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.ready("node-0-1", 2)
    slow(driver, "node-1-0")
    assert state_of(driver, "node-1-0") is NodeState.READY
    driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, 1_000)], epoch=2)
    slow(driver, "node-1-0")
    assert state_of(driver, "node-1-0") is NodeState.READY
    driver.formed(0, 3)
    slow(driver, "node-1-0")
    assert state_of(driver, "node-1-0") is NodeState.DRAINING


@pytest.mark.parametrize("shape", [{"lanes": 1}, {"pipelines": 1}])
def test_a_node_that_nobody_can_stand_in_for_stays(shape):
    driver = serving(**shape)
    assert slow(driver) == []
    assert state_of(driver, "node-0-1") is NodeState.READY


def test_a_place_that_is_empty_on_purpose_does_not_count_as_a_loss():
    driver = serving(pipelines=3)
    driver.do(events.DrainRequested(NodeId("node-2-0"), 1))
    driver.report(2, epoch=1)
    driver.formed(2, 2)
    driver.exited("node-2-0")
    slow(driver)
    assert state_of(driver, "node-0-1") is NodeState.DRAINING


def test_a_slow_node_that_is_suspect_as_well_is_emptied():
    driver = serving()
    driver.suspected("node-0-1")
    slow(driver)
    assert state_of(driver, "node-0-1") is NodeState.DRAINING
    driver.cleared("node-0-1")
    assert state_of(driver, "node-0-1") is NodeState.DRAINING


def test_what_is_said_of_an_earlier_life_says_nothing():
    driver = serving()
    move(driver)
    driver.tick(1_000.0)
    assert slow(driver, incarnation=1) == []


def test_a_place_is_left_alone_for_a_while_and_longer_each_time():
    driver = serving()
    epoch = move(driver)
    driver.tick(REST_SECONDS - 1)
    assert slow(driver, incarnation=2) == []
    # Another one may be moved meanwhile.
    driver.tick(1)
    epoch = move(driver, 2, epoch)
    driver.tick(2 * REST_SECONDS - 1)
    assert slow(driver, incarnation=3) == []
    driver.tick(1)
    assert lines(slow(driver, incarnation=3))


def test_the_rest_of_one_place_is_not_that_of_another():
    driver = serving()
    move(driver)
    assert lines(slow(driver, "node-1-0"))


def test_a_restarted_controller_remembers_whom_it_moved():
    driver = serving()
    move(driver)
    snapshot = driver.cluster.snapshot()
    driver.cluster = Cluster(driver.config)
    driver.invariants = Invariants(driver.cluster)
    driver.do(events.ControllerResumed(snapshot))
    for node in driver.cluster.slots:
        driver.ready(node, 2 if node == "node-0-1" else 1)
    members = {0: ("node-0-0", "node-0-1#2"), 1: ("node-1-0", "node-1-1")}
    for pipeline, nodes in members.items():
        epoch = driver.cluster.pipelines[pipeline].epoch
        driver.attach(pipeline, epoch=epoch, members=tuple(driver.named(node).member for node in nodes))
    assert slow(driver, incarnation=2) == []
    driver.tick(REST_SECONDS)
    assert lines(slow(driver, incarnation=2))


def test_a_slow_node_that_somebody_drains_meanwhile_is_not_replaced():
    driver = serving()
    slow(driver)
    driver.do(events.DrainRequested(NodeId("node-0-1"), 1))
    driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1)
    driver.formed(0, 2)
    assert not any(isinstance(command, StartNode) for command in driver.exited("node-0-1"))


def test_a_slow_node_that_dies_before_it_has_left_is_replaced():
    driver = serving()
    slow(driver)
    driver.exited("node-0-1")
    driver.formed(0, 2)
    assert StartNode(member("node-0-1", 2), Stage(1)) in driver.tick(STEADY_SECONDS)
