"""What the next life of the controller makes of a recovery that was under way, and of nodes that had started."""

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.events import Suspend
from kevlarflow.recovery.nodes import STEADY_SECONDS
from kevlarflow.types import PipelineState, RecoveryState


def restarted(driver):
    driver.restart()
    driver.now += 0.2
    return driver


BORROWED = (member("node-0-0"), member("node-1-1"))


def taken_over(*, forming):
    """Pipeline 0 borrows node-1-1; the order is the former life's, and its engine tells of it to the next one."""
    driver = Driver().serve()
    driver.exited("node-0-1")
    restarted(driver)
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    driver.attach(0, 70, 2, BORROWED, shares=2, forming=forming)
    return driver


def test_an_engine_that_is_still_forming_has_not_recovered():
    driver = taken_over(forming=True)
    (recovery,) = driver.cluster.recoveries
    assert (driver.state(0), recovery.state) == (PipelineState.RECOVERING, RecoveryState.RUNNING)
    driver.report(0, running=8, in_flight=1, epoch=2, forming=True)
    assert recovery.state is RecoveryState.RUNNING
    assert "recovered" in lines(driver.formed(0, 2, requests=8, tokens=4_000))[-1]
    assert (recovery.state, recovery.requests, recovery.recomputed_tokens) == (RecoveryState.DONE, 8, 4_000)
    assert driver.state(0) is PipelineState.SERVING


def test_an_engine_whose_answer_came_before_it_was_taken_over_serves_by_its_next_report():
    driver = Driver().serve()
    driver.exited("node-0-1")
    restarted(driver)
    driver.attach(0, 70, 2, BORROWED, shares=2, forming=True)
    driver.formed(0, 2)
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    assert driver.state(0) is PipelineState.RECOVERING
    driver.report(0, running=8, in_flight=1, epoch=2)
    assert driver.state(0) is PipelineState.SERVING
    assert [each.state for each in driver.cluster.recoveries] == [RecoveryState.DONE]


def test_an_engine_that_has_formed_while_nobody_looked_has_recovered():
    driver = taken_over(forming=False)
    assert driver.state(0) is PipelineState.SERVING
    assert [each.state for each in driver.cluster.recoveries] == [RecoveryState.DONE]


def waited(*, forming):
    """Its one pipeline has waited 44 of 45 s when a node took over; the next life finds that lost as well."""
    driver = Driver(pipelines=1).serve()
    driver.exited("node-0-1")
    driver.now += 44.0
    driver.tick()
    driver.ready("node-0-1", 2)
    restarted(driver)
    driver.exited("node-0-1", 2)
    driver.ready("node-0-0")
    said = driver.attach(0, 70, 2, (member("node-0-0"), member("node-0-1", 2)), forming=forming) + driver.tick(0.2)
    (order,) = orders(said)
    assert order.waits
    return driver


def test_a_pipeline_that_has_generated_meanwhile_waits_for_the_whole_time_again():
    driver = waited(forming=False)
    assert not orders(driver.tick(44.0))
    (over,) = orders(driver.tick(1.5))
    assert not over.waits


def test_one_that_was_still_forming_has_waited_all_the_time():
    driver = waited(forming=True)
    # But for a moment in which those may be heard who are ready by now.
    assert not orders(driver.tick(1.5))
    (over,) = orders(driver.tick(driver.config.timeouts.settle_ms / 1_000))
    assert not over.waits


def test_an_introduction_is_no_start():
    driver = Driver().serve(start_seconds=30.0)
    for _ in range(2):
        restarted(driver)
        assert driver.cluster.retry_after_seconds(driver.now) == 30
        for node in driver.cluster.slots:
            driver.ready(node)
    assert driver.cluster.retry_after_seconds(driver.now) == 30


def test_a_node_that_had_started_did_not_die_while_it_was_starting():
    driver = restarted(Driver().serve())
    (line,) = lines(driver.exited("node-0-1") + driver.tick(0.2))
    assert line == "node-0-1 died (pid 1001)"
    assert driver.cluster.slots["node-0-1"].failed_starts == 0


def test_a_node_that_had_started_and_does_not_appear_is_said_to_be_silent():
    driver = restarted(Driver().serve())
    driver.ready("node-1-1")
    said = lines(driver.tick(driver.config.timeouts.engine_lost_after_ms / 1_000))
    assert any(line.startswith("node-0-1 did not introduce itself for ") for line in said)
    assert not any("was not ready" in line for line in said)


def test_a_third_life_knows_as_well_which_nodes_had_started():
    driver = Driver().serve(start_seconds=30.0)
    driver.restart()
    driver.now += 1.0
    driver.restart()
    assert all(driver.cluster.awaits_introduction(slot.member) for slot in driver.cluster.slots.values())
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    assert driver.cluster.retry_after_seconds(driver.now) == 30
    said = lines(driver.tick(driver.config.timeouts.engine_lost_after_ms / 1_000))
    assert any(line.startswith("node-0-1 did not introduce itself for ") for line in said)


def bereft_before_all_have_spoken():
    """A node was lost while there was no controller; the only one that could help has yet to say that it lives."""
    driver = restarted(Driver().serve())
    driver.exited("node-0-1")
    driver.ready("node-0-0")
    assert not orders(driver.attach(0, 70, 1, (member("node-0-0"), member("node-0-1"))))
    assert not orders(driver.tick(0.1))
    return driver


def test_requests_keep_their_kv_until_all_nodes_that_are_known_have_spoken():
    driver = bereft_before_all_have_spoken()
    (order,) = orders(driver.ready("node-1-1") + driver.tick(0.1))
    assert [node.member for node in order.nodes] == [member("node-0-0"), member("node-1-1")]


def test_nobody_waits_for_long_for_a_node_that_does_not_speak():
    driver = bereft_before_all_have_spoken()
    settle = driver.config.timeouts.settle_ms / 1_000
    assert not orders(driver.tick(settle - 0.6))
    (order,) = orders(driver.tick(0.6))
    assert isinstance(order, Suspend)


def test_an_engine_that_introduces_itself_again_has_formed_meanwhile():
    driver = taken_over(forming=True)
    driver.attach(0, 70, 2, BORROWED, shares=2)
    assert driver.state(0) is PipelineState.SERVING
    assert [each.state for each in driver.cluster.recoveries] == [RecoveryState.DONE]


def started_again():
    """A replacement has loaded for 29 s, of the 30 that it takes, when the controller is lost."""
    driver = Driver().serve(start_seconds=30.0)
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.tick(STEADY_SECONDS)
    driver.do(events.NodeLaunched(member("node-0-1", 2), 4_242))
    driver.now += 29.0
    driver.restart()
    return driver


def test_what_a_start_takes_begins_in_the_life_before():
    driver = started_again()
    assert driver.cluster.retry_after_seconds(driver.now) == 1
    driver.now += 1.0
    driver.ready("node-0-1", 2)
    assert set(driver.cluster.start_seconds) == {30.0}


def test_one_that_does_not_get_ready_is_told_to_have_tried_since_the_life_before():
    driver = started_again()
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    for pipeline, members in ((0, BORROWED), (1, (member("node-1-0"), member("node-1-1")))):
        driver.attach(pipeline, epoch=2, members=members, shares=2)
    limit = driver.config.timeouts.startup_timeout_s
    said = []
    for _ in range(int(limit)):
        for pipeline in (0, 1):
            driver.report(pipeline, running=1, epoch=2)
        said += lines(driver.tick(1.0))
    assert f"node-0-1 was not ready after {limit + 29:.0f} s" in said
