"""A link that stays broken: the pipeline is formed anew, and in the end without the node at one of its ends."""

from __future__ import annotations

import pytest

from cluster_driver import Driver, lines, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.relinking import MOST_RELINKS
from kevlarflow.recovery.standstill import WELL_SECONDS
from kevlarflow.types import Cause, Epoch, NodeId, PipelineId, RecoveryState, Stage

OURS = PipelineId(0)
PARTED_SECONDS = Driver().config.timeouts.parted_ms / 1_000


def serving(**options):
    driver = Driver(**options)
    driver.serve()
    return driver


def members(driver, pipeline=0):
    return [member.node for member in driver.cluster.pipelines[pipeline].members]


def stand_still(driver, *awaited):
    """The pipeline stands still until it is formed anew; returns what was said then."""
    epoch = driver.cluster.pipelines[0].epoch
    still = events.PipelineStill(OURS, Epoch(epoch), 1.0, tuple(map(Stage, awaited)))
    commands = driver.do(still)
    deadline = driver.now + 60.0
    while not orders(commands):
        assert driver.now < deadline
        driver.now += 0.25
        commands = driver.do(events.Tick())
    return commands


def until_parted(driver, *awaited):
    """It does not help."""
    before = members(driver)
    for _ in range(MOST_RELINKS):
        stand_still(driver, *awaited)
        assert members(driver) == before
    return stand_still(driver, *awaited)


def form(driver):
    driver.formed(0, driver.cluster.pipelines[0].epoch)


def pass_time(driver, seconds):
    driver.now += seconds
    driver.do(events.Tick())


def test_a_pipeline_that_stands_still_has_one_record_until_it_generates():
    driver = serving()
    stand_still(driver, 1)
    stand_still(driver)
    stand_still(driver, 0)
    (recovery,) = driver.cluster.recoveries
    assert (recovery.cause, recovery.state, recovery.stage) == (Cause.LINK, RecoveryState.RUNNING, 1)
    assert (recovery.origin, recovery.target) == ("node-0-1", "node-0-1")
    form(driver)
    assert recovery.state is RecoveryState.DONE


def test_a_recovery_that_stands_still_keeps_its_own_record():
    driver = serving()
    driver.exited("node-0-1")
    stand_still(driver, 1)
    assert [each.cause for each in driver.cluster.recoveries] == [Cause.CRASH]


def test_after_some_times_another_node_serves_in_place_of_the_one_that_does_not_answer():
    driver = serving()
    commands = until_parted(driver, 1)
    assert members(driver) == ["node-0-0", "node-1-1"]
    (order,) = [each for each in orders(commands) if each.pipeline == OURS]
    assert (order.cause, order.lost_stages) == (Cause.LINK, (1,))
    assert [info.member.node for info in order.released] == ["node-0-1"]
    assert any("borrows node-1-1" in line and f"{MOST_RELINKS} times" in line for line in lines(commands))
    form(driver)
    (recovery,) = driver.cluster.recoveries
    assert (recovery.cause, recovery.origin, recovery.target) == (Cause.LINK, "node-0-1", "node-1-1")


def test_the_lane_stays_away_for_a_while_and_for_longer_each_time():
    driver = serving()
    for times in range(3):
        until_parted(driver, 1)
        form(driver)
        pass_time(driver, PARTED_SECONDS * 2**times - 1.0)
        driver.report(0, epoch=driver.cluster.pipelines[0].epoch)
        assert members(driver) == ["node-0-0", "node-1-1"]
        pass_time(driver, 1.0)
        driver.report(0, epoch=driver.cluster.pipelines[0].epoch)
        assert members(driver) == ["node-0-0", "node-0-1"]
        form(driver)


def test_where_all_nodes_answer_the_stages_are_tried_in_turn():
    driver = serving()
    until_parted(driver)
    assert members(driver) == ["node-0-0", "node-1-1"]
    until_parted(driver)
    assert members(driver) == ["node-1-0", "node-1-1"]


def test_where_no_node_answers_each_is_left_out_in_turn_while_there_are_others():
    """The link to each of them may be broken; an engine that nobody hears gains nothing, and goes on asking."""
    driver = serving()
    until_parted(driver, 0, 1)
    assert members(driver) == ["node-1-0", "node-0-1"]
    until_parted(driver, 0, 1)
    assert members(driver) == ["node-1-0", "node-1-1"]
    until_parted(driver, 0, 1)
    assert members(driver) == ["node-1-0", "node-1-1"]


def test_of_several_that_do_not_answer_the_first_is_left_out():
    driver = serving(stages=3)
    until_parted(driver, 1, 2)
    assert members(driver) == ["node-0-0", "node-1-1", "node-0-2"]


@pytest.mark.parametrize("options", [{"pipelines": 1}, {"lanes": 1}], ids=["no other node", "no room"])
def test_without_another_node_it_is_tried_again_with_the_same(options):
    driver = serving(**options)
    until_parted(driver, 1)
    assert members(driver) == ["node-0-0", "node-0-1"]
    form(driver)


def test_another_node_that_comes_later_takes_over_as_soon_as_the_pipeline_stands_still_again():
    driver = serving()
    driver.exited("node-1-1")
    pass_time(driver, 2.0)
    until_parted(driver, 1)
    assert members(driver) == ["node-0-0", "node-0-1"]
    epoch = driver.cluster.pipelines[0].epoch
    assert not orders(driver.do(events.PipelineStill(OURS, Epoch(epoch), 1.0, (Stage(1),)))), "it would wait for long"
    driver.ready("node-1-1", 2)
    assert members(driver) == ["node-0-0", "node-1-1"]


def test_a_pipeline_that_was_well_in_between_has_another_trouble():
    driver = serving()
    for _ in range(2 * MOST_RELINKS):
        stand_still(driver, 1)
        form(driver)
        pass_time(driver, WELL_SECONDS + 1.5)
        assert members(driver) == ["node-0-0", "node-0-1"]


def test_who_was_left_out_is_taken_again_when_there_is_nobody_else():
    driver = serving()
    until_parted(driver, 1)
    form(driver)
    driver.exited("node-1-1")
    assert members(driver) == ["node-0-0", "node-0-1"]


def test_a_fresh_node_in_its_place_takes_the_lane_home():
    driver = serving()
    until_parted(driver, 1)
    form(driver)
    driver.exited("node-0-1")
    driver.ready("node-0-1", 2)
    driver.report(0, epoch=driver.cluster.pipelines[0].epoch)
    assert members(driver) == ["node-0-0", "node-0-1"]


def test_it_is_the_standby_of_its_lane_meanwhile_if_there_is_no_other():
    driver = serving(replication=True)
    until_parted(driver, 1)
    form(driver)
    assert driver.cluster.pipelines[0].standbys[1].member.node == "node-0-1"


def test_a_connection_that_breaks_again_and_again_is_blamed_on_its_node():
    driver = serving()
    for _ in range(MOST_RELINKS + 1):
        epoch, member = driver.cluster.pipelines[0].epoch, driver.cluster.pipelines[0].members[0]
        driver.do(events.MemberFailed(OURS, Epoch(epoch), member, "", unlinked=True))
        pass_time(driver, 5.0)
        form(driver)
    assert members(driver) == ["node-1-0", "node-0-1"]


def still(driver, *awaited):
    """The engine says once that it waits in vain."""
    epoch = driver.cluster.pipelines[0].epoch
    return driver.do(events.PipelineStill(OURS, Epoch(epoch), 1.0, tuple(map(Stage, awaited))))


@pytest.mark.parametrize("answers", [True, False], ids=["its answer comes", "its reports say so"])
def test_a_pipeline_that_goes_on_after_all_is_not_formed_anew(answers):
    driver = serving()
    for _ in range(MOST_RELINKS):
        stand_still(driver, 1)
    if not answers:
        form(driver)
    driver.now += 1.0
    assert not orders(still(driver, 1)), "that has to wait"
    driver.now += 0.1
    if answers:
        form(driver)
    for _ in range(80):
        if not answers:
            assert not orders(driver.report(0, running=8, in_flight=1, epoch=driver.cluster.pipelines[0].epoch))
        driver.now += 0.1
        assert not orders(driver.do(events.Tick()))


def test_a_connection_that_broke_is_made_again_even_if_the_pipeline_has_formed_meanwhile():
    driver = serving()
    stand_still(driver, 1)
    member = driver.cluster.pipelines[0].members[1]
    driver.do(events.MemberFailed(OURS, Epoch(driver.cluster.pipelines[0].epoch), member, "", unlinked=True))
    form(driver)
    driver.now += 1.0
    assert orders(driver.do(events.Tick()))


def test_what_was_in_vain_long_ago_is_another_trouble_even_while_the_pipeline_recovers():
    driver = serving()
    for _ in range(MOST_RELINKS):
        stand_still(driver, 1)
    form(driver)
    pass_time(driver, 3_600.0)
    driver.exited("node-0-0")
    driver.now += 1.0
    still(driver, 1)
    assert members(driver) == ["node-1-0", "node-0-1"]


def test_who_has_answered_meanwhile_is_not_left_out():
    driver = serving()
    for _ in range(MOST_RELINKS):
        stand_still(driver, 0, 1)
    driver.now += 1.0
    assert not orders(still(driver, 0, 1))
    commands = []
    while not orders(commands):
        driver.now += 0.2
        still(driver, 1)
        commands = driver.do(events.Tick())
    assert members(driver) == ["node-0-0", "node-1-1"]


def test_a_node_is_drained_to_one_that_was_left_out_if_there_is_no_other():
    driver = serving()
    until_parted(driver, 1)
    form(driver)
    driver.do(events.DrainRequested(NodeId("node-1-1"), 1))
    for _ in range(5):
        pass_time(driver, 1.0)
        for pipeline in (0, 1):
            driver.report(pipeline, epoch=driver.cluster.pipelines[pipeline].epoch)
            if driver.cluster.pipelines[pipeline].forming:
                driver.formed(pipeline, driver.cluster.pipelines[pipeline].epoch)
    assert members(driver) == ["node-0-0", "node-0-1"]
    assert driver.cluster.slots["node-1-1"].leave_by is not None


def test_an_order_that_is_sent_again_while_another_pipeline_moves_in_says_what_it_said_before():
    driver = serving()
    other = PipelineId(1)
    (first,) = orders(driver.do(events.PipelineStill(other, Epoch(1), 1.0)))
    for _ in range(MOST_RELINKS):
        stand_still(driver, 1)
    ours = Epoch(driver.cluster.pipelines[0].epoch)
    assert orders(driver.do(events.PipelineStill(OURS, ours, 1.0, (Stage(1),)))) == []
    driver.now += 60.0
    # It is said to an engine that has missed it; only the next one can say that there is less room from now on.
    again, moved, shared = orders(driver.report(1, 8, epoch=1))
    assert again == first
    assert (moved.pipeline, moved.shares, members(driver)) == (OURS, 2, ["node-0-0", "node-1-1"])
    assert (shared.pipeline, shared.epoch, shared.shares) == (other, first.epoch + 1, 2)
