"""Nodes that are emptied on request, and slots that are filled by hand."""

from __future__ import annotations

import pytest

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.events import Answer, KillNode, Retire, StartNode
from kevlarflow.recovery.nodes import STEADY_SECONDS
from kevlarflow.types import Cause, NodeId, NodeState, PipelineId, Stage

STANDBY_HAS_ALL = [(1, "node-1-1", 1_000, 1_000)]


def drain(driver, node, ticket=7):
    commands = driver.do(events.DrainRequested(NodeId(node), ticket))
    (answer,) = [command for command in commands if isinstance(command, Answer)]
    assert answer.ticket == ticket
    driver.commands = commands
    return answer.refusal


def join(driver, node, pid=4_711):
    commands = driver.do(events.JoinRequested(NodeId(node), pid, 8))
    (answer,) = [command for command in commands if isinstance(command, Answer)]
    return answer


def state_of(driver, node):
    return driver.cluster.slots[NodeId(node)].state


def drained():
    """node-0-1 has left on request, under load."""
    driver = Driver(replication=True).serve()
    assert drain(driver, "node-0-1") == ""
    driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1)
    driver.formed(0, 2)
    driver.exited("node-0-1")
    return driver


def test_a_drained_node_gives_its_lane_to_its_standby_then_leaves():
    driver = Driver(replication=True).serve()
    assert drain(driver, "node-0-1") == ""
    assert state_of(driver, "node-0-1") is NodeState.DRAINING
    assert lines(driver.commands) == ["node-0-1 is drained: it gives the lane of pipeline 0 away, then it leaves"]
    assert orders(driver.report(0, 8, coverage=[(1, "node-1-1", 1_000, 100)], epoch=1)) == []
    (form,) = orders(driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1))
    assert form == driver.form(0, 2, ["node-0-0", "node-1-1"], Cause.DRAIN, released=["node-0-1"], lost=[1])
    commands = driver.formed(0, 2)
    assert Retire(member("node-0-1")) in commands
    assert driver.cluster.recoveries[-1].cause is Cause.DRAIN
    commands = driver.exited("node-0-1")
    assert not any(isinstance(command, StartNode) for command in commands)
    assert state_of(driver, "node-0-1") is NodeState.DEAD
    assert orders(driver.tick(1_000.0)) == []
    assert state_of(driver, "node-0-1") is NodeState.DEAD


def test_a_node_that_does_not_leave_is_killed():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1)
    driver.formed(0, 2)
    assert not any(isinstance(command, KillNode) for command in driver.tick(1.0))
    assert any(isinstance(command, KillNode) for command in driver.tick(driver.config.timeouts.stop_grace_s))


def test_a_node_that_did_not_hear_that_it_may_leave_is_told_again():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1)
    assert Retire(member("node-0-1")) not in driver.ready("node-0-1")
    assert driver.formed(0, 2).count(Retire(member("node-0-1"))) == 1
    assert Retire(member("node-0-1")) in driver.ready("node-0-1"), "over another connection"


def test_a_node_that_dies_while_it_drains_is_a_loss_and_stays_away():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    commands = driver.exited("node-0-1")
    (form,) = orders(commands)
    assert form.cause is Cause.CRASH
    assert not any(isinstance(command, StartNode) for command in commands)


def test_a_borrowed_lane_goes_home_when_its_donor_is_drained():
    driver = Driver(replication=True).serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.ready("node-0-1", 2)
    drain(driver, "node-1-1")
    driver.report(0, epoch=2)
    driver.report(1, epoch=2)
    nodes = [[each.node for each in pipeline.members] for pipeline in driver.cluster.pipelines]
    assert nodes == [["node-0-0", "node-0-1"], ["node-1-0", "node-0-1"]]
    assert [each.cause for each in driver.cluster.recoveries][1:] == [Cause.REJOIN, Cause.DRAIN]


@pytest.mark.parametrize(
    ("node", "prepare", "refusal"),
    [
        ("node-7-7", [], "there is no node node-7-7: use one of node-0-0, node-0-1, node-1-0, node-1-1"),
        ("", [], "no node is named: use one of node-0-0, node-0-1, node-1-0, node-1-1"),
        (
            "node-0-1",
            ["node-1-1"],
            "node-0-1 cannot be drained: there is no other node of stage 1 that is ready: wait until one is",
        ),
        ("node-0-1", ["node-0-1"], "node-0-1 cannot be drained: it is starting"),
    ],
)
def test_what_cannot_be_drained_is_refused_with_one_line(node, prepare, refusal):
    driver = Driver().serve()
    for lost in prepare:
        driver.exited(lost)
        driver.formed(0, 2)
        driver.tick(STEADY_SECONDS)
    before = {each.node: each.state for each in driver.cluster.slots.values()}
    assert drain(driver, node) == refusal
    assert {each.node: each.state for each in driver.cluster.slots.values()} == before


def test_where_nodes_have_one_lane_nothing_can_be_drained():
    driver = Driver(lanes=1).serve()
    assert "no other node of stage 1 has room for the lane of pipeline 0" in drain(driver, "node-0-1")


def test_what_has_left_is_not_drained_again_and_who_is_alone_waits_for_another():
    driver = drained()
    assert drain(driver, "node-0-1") == "node-0-1 has left already: `kevlarflow node --join node-0-1` fills its place"
    assert drain(driver, "node-1-1") == (
        "node-1-1 cannot be drained: there is no other node of stage 1: join one first with "
        "`kevlarflow node --join node-0-1`"
    )
    one = Driver(pipelines=1).serve()
    assert drain(one, "node-0-1") == (
        "node-0-1 cannot be drained: stage 1 has no other node: start the cluster with -dp 2 or more"
    )


def test_while_the_cluster_starts_nothing_can_be_drained():
    driver = Driver()
    driver.do(events.ClusterBegun())
    driver.ready("node-0-1")
    assert "wait until it serves" in drain(driver, "node-0-1")


def test_draining_twice_is_draining_once():
    driver = Driver(replication=True).serve()
    assert drain(driver, "node-0-1") == drain(driver, "node-0-1") == ""
    assert len(lines(driver.commands)) == 0


def test_a_draining_node_stays_when_the_one_that_could_have_helped_dies():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    (form,) = orders(driver.exited("node-1-1"))
    # It is the last node of its stage, so it serves both.
    assert [info.member.node for info in form.nodes] == ["node-1-0", "node-0-1"]
    assert state_of(driver, "node-0-1") is NodeState.READY


def test_a_drain_that_cannot_go_on_is_given_up_after_a_while():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.suspected("node-1-1")
    driver.tick(1.0)
    assert state_of(driver, "node-0-1") is NodeState.DRAINING
    said = lines(driver.tick(driver.config.timeouts.move_patience_ms / 1_000))
    assert "node-0-1 stays: no other node of stage 1 has room for the lane of pipeline 0" in said
    assert state_of(driver, "node-0-1") is NodeState.READY


def test_an_empty_place_is_filled_by_hand_and_the_lane_comes_home():
    driver = drained()
    answer = join(driver, "node-0-1")
    assert (answer.refusal, answer.member, answer.stage) == ("", member("node-0-1", 2), Stage(1))
    driver.ready("node-0-1", 2)
    (form,) = orders(driver.report(0, 8, coverage=[(1, "node-0-1#2", 10, 10)], epoch=2))
    assert form.cause is Cause.REJOIN
    driver.formed(0, 3)
    # From now on it is replaced as any other.
    driver.exited("node-0-1", 2)
    driver.formed(0, 4)
    assert StartNode(member("node-0-1", 3), Stage(1)) in driver.tick(STEADY_SECONDS)


@pytest.mark.parametrize("node", ["node-0-0", "node-9-0"])
def test_a_place_that_is_taken_or_unknown_is_refused(node):
    driver = drained()
    answer = join(driver, node)
    assert node in answer.refusal
    assert answer.member is None


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        ([], "which is ready: drain it first, or join in an empty place"),
        (["node-0-0"], "which is starting: wait until it has started, and drain it, or join in an empty place"),
    ],
)
def test_who_wants_a_place_that_is_taken_is_told_what_to_do(lost, advice):
    driver = Driver().serve()
    for node in lost:
        driver.exited(node)
        driver.formed(0, 2)
        driver.tick(STEADY_SECONDS)
    assert join(driver, "node-0-0").refusal.endswith(advice)


def test_a_place_that_was_given_up_or_waits_for_the_next_try_is_filled_by_hand():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.tick(STEADY_SECONDS)
    driver.do(events.LaunchFailed(member("node-0-1", 2), "no launcher"))
    assert join(driver, "node-0-1").member == member("node-0-1", 3)
    assert not any(isinstance(command, StartNode) for command in driver.tick(60.0))


def test_a_restarted_controller_goes_on_draining():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.restart()
    for node in driver.cluster.slots:
        driver.ready(node)
    assert state_of(driver, "node-0-1") is NodeState.DRAINING


def test_a_restarted_controller_leaves_a_drained_place_empty():
    driver = drained().restart()
    driver.tick(60.0)
    assert state_of(driver, "node-0-1") is NodeState.DEAD
    assert join(driver, "node-0-1").member == member("node-0-1", 2)


@pytest.mark.parametrize("pipelines", [1, 2])
def test_the_only_node_of_a_stage_is_not_drained_though_it_has_no_lane(pipelines):
    """Its engine is being started again; with two pipelines the place of the other one is vacant."""
    driver = Driver(pipelines=pipelines).serve()
    if pipelines == 2:
        driver.do(events.DrainRequested(NodeId("node-1-0"), 1))
        driver.report(1, epoch=1)
        driver.formed(1, 2)
        driver.exited("node-1-0")
        assert driver.cluster.slots["node-1-0"].vacant
        driver.do(events.EngineLost(PipelineId(1), 71))
    driver.do(events.EngineLost(PipelineId(0), 70))
    driver.exited("node-0-0")
    driver.tick(1.5)
    driver.ready("node-0-0", 2)
    commands = driver.do(events.DrainRequested(NodeId("node-0-0"), 1))
    (answer,) = [each for each in commands if isinstance(each, Answer)]
    assert answer.refusal
    assert driver.cluster.slots["node-0-0"].state is NodeState.READY


def test_a_drain_is_not_given_up_for_the_time_for_which_the_controller_stood_still():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.suspected("node-1-1")
    # Who was only busy has said so meanwhile, and is read next.
    assert not any("stays" in line for line in lines(driver.pause(60.0)))
    driver.now += 60.0
    assert not any("stays" in line for line in lines(driver.report(0, running=1, epoch=1)))
    driver.cleared("node-1-1")
    driver.tick(60.0)
    assert state_of(driver, "node-0-1") is NodeState.DRAINING


@pytest.mark.parametrize("restarts", [False, True])
def test_an_empty_place_stays_empty_when_what_was_to_fill_it_does_not_get_ready(restarts):
    driver = drained()
    join(driver, "node-0-1")
    if restarts:
        driver.restart()
        for node in ("node-0-0", "node-1-0", "node-1-1"):
            driver.ready(node)
    driver.exited("node-0-1", 2)
    said = driver.tick(1.0)
    assert "the place of node-0-1 stays empty until `kevlarflow node --join node-0-1` fills it" in lines(said)
    assert not any(isinstance(command, StartNode) for command in driver.tick(100.0))
    assert join(driver, "node-0-1").refusal == ""
    # Once it has been ready it is replaced like any other.
    driver.ready("node-0-1", 3)
    commands = driver.exited("node-0-1", 3) + driver.tick(2.0)
    assert any(isinstance(command, StartNode) for command in commands)


def test_a_node_that_was_told_to_leave_is_not_killed_for_a_pause_of_the_controller():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.report(0, 8, coverage=STANDBY_HAS_ALL, epoch=1)
    driver.formed(0, 2)
    grace = driver.config.timeouts.stop_grace_s
    pause = 2.0 * grace
    driver.now += pause
    # Its telling so, and its exit, may have yet to be read.
    assert not any(isinstance(command, KillNode) for command in driver.report(0, 8, epoch=2))
    assert not any(isinstance(command, KillNode) for command in driver.do(events.Tick.after(pause)))
    assert any(isinstance(command, KillNode) for command in driver.tick(grace))


def both_lost_of_stage_0():
    """node-0-1 is being emptied, stage 0 has no node, and pipeline 1 has lost that of stage 1 as well."""
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    for node in ("node-0-0", "node-1-0"):
        driver.exited(node)
    said = lines(driver.exited("node-1-1"))
    return driver, said


def test_a_draining_node_does_not_stay_for_a_pipeline_that_lacks_another_stage_too():
    driver, said = both_lost_of_stage_0()
    assert not any("stays" in line for line in said)
    assert state_of(driver, "node-0-1") is NodeState.DRAINING
    # Once the other one is there it does.
    (form,) = [each for each in orders(driver.ready("node-1-0", 2)) if each.pipeline == 1]
    assert [info.member.node for info in form.nodes] == ["node-1-0", "node-0-1"]
    assert state_of(driver, "node-0-1") is NodeState.READY


def test_a_draining_node_does_not_stay_for_a_pipeline_that_cannot_use_it():
    driver = Driver(replication=True).serve()
    drain(driver, "node-0-1")
    driver.cluster.pipelines[1].avoided[member("node-0-1")] = driver.now + 60.0
    driver.exited("node-1-1")
    assert state_of(driver, "node-0-1") is NodeState.DRAINING
