"""What lost nodes were computing is part of the orders that follow, until the pipeline is formed again."""

from __future__ import annotations

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.types import Computing, Epoch, Loss, PipelineId
from toy_world import pid_of

NOTHING = Computing()


def step_of(pipeline, sequence=5, epoch=1):
    return Computing(PipelineId(pipeline), Epoch(epoch), sequence)


def exited(driver, node, computing, incarnation=1):
    return driver.do(events.NodeExited(member(node, incarnation), driver.now, computing))


def losses(commands):
    return {order.pipeline: order.losses for order in orders(commands)}


def test_the_order_that_follows_a_loss_says_what_the_node_was_computing():
    driver = Driver().serve()
    loss = Loss(member("node-0-1"), step_of(0))
    assert losses(exited(driver, "node-0-1", step_of(0))) == {0: (loss,)}


def test_it_is_said_again_until_the_pipeline_is_formed():
    driver = Driver().serve()
    first = Loss(member("node-0-1"), step_of(0))
    exited(driver, "node-0-1", step_of(0))
    # The donor follows before anybody has been formed.
    both = losses(exited(driver, "node-1-1", NOTHING))
    second = Loss(member("node-1-1"), NOTHING)
    assert both == {0: (first, second), 1: (second,)}
    driver.ready("node-0-1", 2)
    for pipeline in (0, 1):
        driver.formed(pipeline, driver.cluster.pipelines[pipeline].epoch)
    assert losses(exited(driver, "node-0-0", NOTHING))[0] == (Loss(member("node-0-0"), NOTHING),)


def test_of_two_pipelines_on_a_node_the_other_one_hears_that_nothing_of_it_was_computed():
    driver = Driver().serve()
    exited(driver, "node-0-1", NOTHING)
    for pipeline in (0, 1):
        driver.formed(pipeline, driver.cluster.pipelines[pipeline].epoch)
    found = losses(exited(driver, "node-1-1", step_of(1)))
    assert found == {0: (Loss(member("node-1-1"), NOTHING),), 1: (Loss(member("node-1-1"), step_of(1)),)}


def test_a_loss_of_which_nothing_is_known_is_not_listed():
    driver = Driver().serve()
    assert losses(driver.exited("node-0-1"))[0] == ()


def test_a_node_that_hung_is_found_to_have_hung_in_a_step():
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 1.0, "was stuck in a step"))
    assert losses(exited(driver, "node-0-1", step_of(0)))[0] == (Loss(member("node-0-1"), step_of(0)),)


def test_the_next_life_of_the_controller_knows_it_as_well():
    driver = Driver().serve()
    exited(driver, "node-0-1", step_of(0))
    engines = [(each.id, each.engine.pid) for each in driver.cluster.pipelines]
    snapshot = driver.cluster.snapshot()
    # It dies before the order has left: the engine still serves in the epoch before.
    driver.cluster = Cluster(driver.cluster.config)
    driver.do(events.ControllerResumed(snapshot))
    for name in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(name)
    members = (member("node-0-0"), member("node-0-1"))
    pid = dict(engines)[PipelineId(0)]
    found = losses(driver.do(events.EngineAttached(PipelineId(0), pid, Epoch(1), members)))
    assert found[0] == (Loss(member("node-0-1"), step_of(0)),)


def test_what_happened_while_the_controller_was_away_is_known_too():
    driver = Driver().serve()
    snapshot = driver.cluster.snapshot()
    driver.cluster = Cluster(driver.cluster.config)
    driver.do(events.ControllerResumed(snapshot))
    exited(driver, "node-0-1", step_of(0))
    for name in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(name)
    members = (member("node-0-0"), member("node-0-1"))
    driver.attach(0, epoch=1, members=members)
    assert losses(driver.tick(1.0))[0] == (Loss(member("node-0-1"), step_of(0)),)


def test_what_a_node_computed_that_somebody_killed_is_not_held_against_anybody():
    for known in (step_of(0), None):
        driver = Driver().serve()
        killed = events.NodeExited(member("node-0-1"), driver.now, known, "SIGKILL", from_outside=True)
        commands = driver.do(killed)
        assert losses(commands)[0] == (Loss(member("node-0-1"), NOTHING, from_outside=True),)
        pid = pid_of(member("node-0-1"))
        assert lines(commands) == [f"node-0-1 died (pid {pid}: SIGKILL): pipeline 0 borrows node-1-1"]


def test_what_a_node_computed_that_hung_and_that_we_killed_is():
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 1.0, "was stuck in a step"))
    killed = events.NodeExited(member("node-0-1"), driver.now, step_of(0), "SIGKILL", from_outside=True)
    assert losses(driver.do(killed))[0] == (Loss(member("node-0-1"), step_of(0)),)


def resumed(driver):
    """The next life of the controller, before anybody has introduced himself."""
    snapshot = driver.cluster.snapshot()
    driver.cluster = Cluster(driver.cluster.config)
    driver.do(events.ControllerResumed(snapshot))
    return driver


def killed_then(driver):
    """The node of stage 1 is seen to have died of SIGKILL; what is held to have cost it."""
    driver.do(events.NodeExited(member("node-0-1"), driver.now, step_of(0), "SIGKILL", from_outside=True))
    driver.tick(0.2)
    (loss,) = driver.cluster.pipelines[0].losses
    return loss


def test_what_somebody_killed_is_held_against_nobody_by_the_next_life_of_the_controller_either():
    loss = Loss(member("node-0-1"), NOTHING, from_outside=True)
    assert killed_then(resumed(Driver().serve())) == loss
    driver = Driver().serve()
    killed_then(driver)
    assert list(resumed(driver).cluster.pipelines[0].losses) == [loss], "nor does one that is told of it"


def test_what_a_life_of_the_controller_has_killed_for_hanging_is_blamed_by_the_next_ones():
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 1.0, "was stuck in a step"))
    assert killed_then(resumed(resumed(driver))) == Loss(member("node-0-1"), step_of(0))


def test_what_a_node_computed_that_somebody_stopped_is_not_held_against_anybody():
    for seen_to_die in (True, False):
        driver = Driver().serve()
        driver.do(events.NodeSilent(member("node-0-1"), driver.now, "was stopped", from_outside=True))
        if seen_to_die:
            found = losses(exited(driver, "node-0-1", step_of(0)))
        else:
            driver.now += 5.0
            found = losses(driver.do(events.Tick()))
        assert found[0] == (Loss(member("node-0-1"), NOTHING, from_outside=True),)
    # Whoever comes in its place is another one.
    driver.ready("node-0-1", 2)
    assert not driver.cluster.slots["node-0-1"].hurt_from_outside
