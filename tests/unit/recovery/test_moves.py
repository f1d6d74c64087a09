"""Lanes that move though nobody died."""

from __future__ import annotations

import pytest

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.events import AssignStandbys, Hasten
from kevlarflow.recovery.moves import HASTEN_LAG_TOKENS, MOST_PATIENCE, MOVE_LAG_TOKENS, PRESSED_SECONDS
from kevlarflow.types import Cause, Epoch, NodeId, PipelineId, Stage

PATIENCE_SECONDS = Driver().config.timeouts.move_patience_ms / 1_000


def borrowing(*, replication: bool = True) -> Driver:
    """Pipeline 0 works on node-1-1, and node-0-1 is back."""
    driver = Driver(replication=replication).serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.report(0, running=8, epoch=2)
    driver.commands = driver.ready("node-0-1", 2)
    return driver


def home(driver: Driver, epoch: int = 3):
    return driver.form(0, epoch, ["node-0-0", "node-0-1#2"], Cause.REJOIN, released=["node-1-1"], lost=[1])


def test_a_node_that_is_back_is_first_made_the_standby():
    driver = borrowing()
    ours = [each for each in driver.commands if isinstance(each, AssignStandbys) and each.pipeline == 0]
    (assignment,) = ours
    assert assignment.standbys[1] == driver.named("node-0-1#2")
    assert orders(driver.commands) == []


def test_the_lane_goes_home_under_load_when_next_to_nothing_is_missing():
    driver = borrowing()
    assert driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, 400)], epoch=2) == []
    hasten = driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, 1_000 - HASTEN_LAG_TOKENS)], epoch=2)
    assert hasten == [Hasten(PipelineId(0), Epoch(2), (Stage(1),))]
    assert driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, 900)], epoch=2) == []
    enough = 1_000 - 8 * MOVE_LAG_TOKENS
    assert orders(driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, enough)], epoch=2)) == [home(driver)]
    assert lines(driver.formed(0, 3)) == ["node-0-1 is back and took its lane of pipeline 0 again"]
    assert driver.cluster.recoveries[-1].cause is Cause.REJOIN


@pytest.mark.parametrize(
    ("coverage", "epoch"),
    [
        pytest.param([(1, "node-0-1", 1_000, 1_000)], 2, id="of the standby's earlier life"),
        pytest.param([(1, "node-1-1", 1_000, 1_000)], 2, id="of another standby"),
        pytest.param([(1, None, 1_000, 1_000)], 2, id="of no standby"),
        pytest.param([(0, "node-0-1#2", 1_000, 1_000)], 2, id="of another stage"),
        pytest.param([(1, "node-0-1#2", 1_000, 1_000)], 1, id="from before the newest order"),
    ],
)
def test_a_report_that_says_nothing_about_the_new_node_moves_nothing(coverage, epoch):
    driver = borrowing()
    assert driver.report(0, 8, coverage=coverage, epoch=epoch) == []


def test_a_quiet_engine_moves_at_once():
    driver = borrowing()
    assert orders(driver.report(0, epoch=2)) == [home(driver)]


def test_a_quiet_report_from_before_the_newest_order_moves_nothing():
    driver = borrowing()
    assert driver.report(0, epoch=1) == []


@pytest.mark.parametrize("replication", [False, True])
def test_a_lane_moves_after_a_bounded_wait_in_any_case(replication):
    driver = borrowing(replication=replication)
    assert orders(driver.tick(PATIENCE_SECONDS - 0.1)) == []
    assert orders(driver.tick(0.1)) == [home(driver)]


def test_nothing_moves_while_the_pipeline_is_being_formed():
    driver = Driver(replication=True).serve()
    driver.exited("node-0-1")
    driver.ready("node-0-1", 2)
    assert orders(driver.tick(2 * PATIENCE_SECONDS)) == []
    # The wait begins once the pipeline serves: until then nothing could be copied.
    driver.formed(0, 2)
    assert orders(driver.tick(PATIENCE_SECONDS - 0.1)) == []
    assert orders(driver.tick(0.1)) == [home(driver)]


def test_a_node_that_is_lost_again_does_not_get_its_lane():
    driver = borrowing()
    driver.exited("node-0-1", 2)
    assert orders(driver.tick(PATIENCE_SECONDS)) == []
    driver.ready("node-0-1", 3)
    assert orders(driver.report(0, 8, coverage=[(1, "node-0-1#2", 1_000, 1_000)], epoch=2)) == []
    (form,) = orders(driver.report(0, 8, coverage=[(1, "node-0-1#3", 1_000, 1_000)], epoch=2))
    assert form.nodes[1].member == member("node-0-1", 3)


def both_back() -> Driver:
    """Pipeline 0 works on the nodes of pipeline 1, and its own are back."""
    driver = Driver(replication=True).serve()
    driver.exited("node-0-0")
    driver.exited("node-0-1")
    driver.formed(0, 3)
    driver.ready("node-0-0", 2)
    driver.ready("node-0-1", 2)
    return driver


def test_stages_move_together():
    driver = both_back()
    first = (0, "node-0-0#2", 1_000, 1_000)
    assert orders(driver.report(0, 8, coverage=[first, (1, "node-0-1#2", 1_000, 200)], epoch=3)) == []
    (form,) = orders(driver.report(0, 8, coverage=[first, (1, "node-0-1#2", 1_000, 1_000)], epoch=3))
    assert form.lost_stages == (Stage(0), Stage(1))


def test_a_loss_during_a_move_is_a_loss():
    driver = borrowing()
    driver.report(0, epoch=2)
    (form,) = orders(driver.exited("node-0-1", 2))
    assert form == driver.form(0, 4, ["node-0-0", "node-1-1"], Cause.CRASH, lost=[1])
    states = [(str(each.cause), str(each.state)) for each in driver.cluster.recoveries]
    assert states == [("crash", "done"), ("rejoin", "failed"), ("crash", "running")]


def test_a_suspect_stays_the_standby():
    driver = Driver(replication=True).serve()
    suspected = driver.suspected("node-1-1")
    assert not any(isinstance(each, AssignStandbys) and each.pipeline == 0 for each in suspected)
    cleared = driver.cleared("node-1-1")
    assert not any(isinstance(each, AssignStandbys) and each.pipeline == 0 for each in cleared)


def test_a_donor_that_dies_while_the_lane_goes_home_does_not_hold_it_up():
    driver = Driver(stages=1).serve()
    driver.exited("node-0-0")
    driver.formed(0, 2)
    driver.ready("node-0-0", 2)
    (home,) = orders(driver.report(0))
    assert home.cause is Cause.REJOIN
    again = orders(driver.exited("node-1-0"))[0]
    assert (again.pipeline, again.cause, again.lost_stages) == (0, Cause.CRASH, (0,))
    assert again.epoch > home.epoch


def lacking(driver: Driver, missing: int, waiting: int = 0):
    """What follows from a report, and from a look at the clock."""
    coverage = [(1, "node-0-1#2", 9_000, 9_000 - missing)]
    return orders([*driver.report(0, 8, waiting, coverage=coverage, epoch=2), *driver.tick()])


def test_a_new_node_that_comes_nearer_all_the_time_is_waited_for():
    driver = borrowing()
    missing, waited = 8_000, 0.0
    while missing > 8 * MOVE_LAG_TOKENS:
        assert lacking(driver, missing) == []
        driver.now += PATIENCE_SECONDS / 2
        waited += PATIENCE_SECONDS / 2
        missing = int(missing * 0.6)
    assert waited > 3 * PATIENCE_SECONDS
    assert lacking(driver, missing) == [home(driver)]


@pytest.mark.parametrize("pipeline", [0, 1])
def test_where_requests_wait_for_room_it_is_not_waited_for_any_longer(pipeline):
    driver = borrowing()
    missing = 8_000
    lacking(driver, missing)
    for _ in range(3):
        driver.now += PATIENCE_SECONDS / 4
        missing = int(missing * 0.8)
        assert lacking(driver, missing) == []
    # One that has just come waits for a moment.
    driver.now += PATIENCE_SECONDS / 4
    assert orders(driver.report(1, 8, waiting=1, epoch=driver.cluster.pipelines[1].epoch)) == []
    assert orders(driver.report(1, 8, epoch=driver.cluster.pipelines[1].epoch)) == []
    waiting = {"running": 8, "waiting": 3, "epoch": driver.cluster.pipelines[pipeline].epoch}
    if pipeline == 0:
        waiting["coverage"] = [(1, "node-0-1#2", 9_000, 6_000)]
    assert orders(driver.report(pipeline, **waiting)) == []
    driver.now += PRESSED_SECONDS
    assert orders(driver.report(pipeline, **waiting)) == []
    assert orders(driver.tick()) == [home(driver)]


def test_one_that_does_not_come_nearer_any_more_is_waited_for_no_longer():
    driver = borrowing()
    lacking(driver, 8_000)
    driver.now += PATIENCE_SECONDS - 1
    assert lacking(driver, 4_000) == []
    # Requests grow, and what is missing with them.
    for missing in (5_000, 3_900, 3_700):
        driver.now += PATIENCE_SECONDS / 4
        assert lacking(driver, missing) == []
    driver.now += PATIENCE_SECONDS / 4
    assert lacking(driver, 3_700) == [home(driver)]


def test_even_one_that_comes_nearer_is_not_waited_for_for_ever():
    driver = borrowing()
    begun, missing = driver.now, 1_000_000
    while not orders([*driver.report(0, 8, coverage=[(1, "node-0-1#2", missing, 0)], epoch=2), *driver.tick()]):
        driver.now += PATIENCE_SECONDS / 2
        missing = int(missing * 0.89)
        assert driver.now - begun <= MOST_PATIENCE * PATIENCE_SECONDS
    assert driver.now - begun == pytest.approx(MOST_PATIENCE * PATIENCE_SECONDS)


def test_a_stage_that_has_all_of_it_waits_for_one_that_comes_nearer():
    driver = both_back()
    begun, missing = driver.now, 8_000
    while missing > 8 * MOVE_LAG_TOKENS:
        rows = [(0, "node-0-0#2", 9_000, 9_000), (1, "node-0-1#2", 9_000, 9_000 - missing)]
        assert orders([*driver.report(0, 8, coverage=rows, epoch=3), *driver.tick()]) == [], driver.now - begun
        driver.now += PATIENCE_SECONDS / 4
        missing = int(missing * 0.8)
    assert driver.now - begun > 4 * PATIENCE_SECONDS


def test_a_pause_of_the_controller_does_not_use_up_the_patience():
    driver = borrowing()
    assert lacking(driver, 8_000) == []
    pause = 2 * PATIENCE_SECONDS
    driver.now += pause
    # What was sent meanwhile is read first.
    assert orders(driver.report(0, 8, coverage=[(1, "node-0-1#2", 9_000, 1_100)], epoch=2)) == []
    assert orders(driver.do(events.Tick.after(pause))) == []
    assert orders(driver.tick(PATIENCE_SECONDS)) == [home(driver)]


def test_a_pause_of_the_controller_makes_nobody_wait_for_room_for_long():
    driver = borrowing()
    for missing in (8_000, 6_400, 5_100):
        assert lacking(driver, missing) == []
        driver.now += PATIENCE_SECONDS / 3
    assert lacking(driver, 4_000) == []
    assert lacking(driver, 4_000, waiting=1) == []
    assert orders(driver.pause(PATIENCE_SECONDS)) == []
    assert lacking(driver, 3_200) == []


def suspicion(driver: Driver) -> None:
    """The new node is silent for a moment, at a time at which nothing would have moved."""
    driver.suspected("node-0-1", 2)
    driver.tick()
    driver.cleared("node-0-1", 2)


def relinking(driver: Driver) -> None:
    """Something was lost on its way, and is sent again."""
    ours = driver.cluster.pipelines[0]
    epoch = ours.epoch
    driver.do(events.PipelineStill(ours.id, epoch, 1.0))
    driver.tick()
    assert ours.epoch > epoch
    driver.formed(0, ours.epoch)


@pytest.mark.parametrize("interrupt", [suspicion, relinking])
def test_what_befalls_it_meanwhile_does_not_begin_the_wait_anew(interrupt):
    driver = borrowing()
    ours = driver.cluster.pipelines[0]
    begun, missing, turn = driver.now, 10_000_000, 0
    while driver.cluster.pipelines[0].members[1] == member("node-1-1"):
        row = (1, "node-0-1#2", missing, 0)
        driver.report(0, 8, coverage=[row], epoch=ours.epoch)
        driver.tick()
        if turn % 10 == 9:
            interrupt(driver)
        driver.now += PATIENCE_SECONDS / 2
        missing, turn = int(missing * 0.89), turn + 1
        assert driver.now - begun <= (MOST_PATIENCE + 1) * PATIENCE_SECONDS
    assert driver.now - begun >= MOST_PATIENCE * PATIENCE_SECONDS


def test_an_engine_that_is_formed_anew_with_the_same_nodes_is_told_again_that_a_lane_is_near():
    driver = borrowing()
    ours = driver.cluster.pipelines[0]
    row = (1, "node-0-1#2", 1_000, 900)
    assert driver.report(0, 8, coverage=[row], epoch=2) == [Hasten(ours.id, Epoch(2), (Stage(1),))]
    relinking(driver)
    epoch = Epoch(ours.epoch)
    assert driver.report(0, 8, coverage=[row], epoch=epoch) == [Hasten(ours.id, epoch, (Stage(1),))]


def test_a_lane_does_not_move_to_a_suspect():
    driver = borrowing()
    lacking(driver, 8_000)
    driver.suspected("node-0-1", 2)
    assert orders(driver.tick(MOST_PATIENCE * PATIENCE_SECONDS)) == []
    assert orders(driver.report(0, epoch=2)) == []
    driver.report(0, 8, epoch=2)
    driver.cleared("node-0-1", 2)
    assert orders(driver.tick()) == [home(driver)]


def test_a_drained_node_waits_for_its_standby_though_requests_wait():
    """Two lanes on one node have less room than two nodes."""
    driver = Driver(replication=True).serve()
    driver.do(events.DrainRequested(NodeId("node-0-1"), 1))
    missing = 8_000
    for _ in range(12):
        row = (1, "node-1-1", 9_000, 9_000 - missing)
        assert orders([*driver.report(0, 8, waiting=1, coverage=[row], epoch=1), *driver.tick()]) == []
        driver.now += PATIENCE_SECONDS / 4
        missing = int(missing * 0.85)


def test_who_shares_its_nodes_with_nobody_does_not_wait_for_room():
    """Then there are only more requests than may run at once."""
    driver = borrowing()
    driver.do(events.EngineLost(PipelineId(1), 71))
    assert (driver.shares[0], driver.cluster.pipelines[0].epoch) == (1, 3)
    missing = 8_000
    for _ in range(12):
        row = (1, "node-0-1#2", 9_000, 9_000 - missing)
        assert orders([*driver.report(0, 8, waiting=1, coverage=[row], epoch=3), *driver.tick()]) == []
        driver.now += PATIENCE_SECONDS / 4
        missing = int(missing * 0.85)


def test_nor_does_a_lane_that_takes_room_elsewhere_where_it_gives_some():
    driver = Driver(pipelines=3, lanes=3, replication=True).serve()
    driver.exited("node-1-1")
    driver.formed(1, 2)
    driver.do(events.DrainRequested(NodeId("node-2-1"), 1))
    assert (driver.shares[2], driver.cluster.pipelines[2].epoch) == (2, 2)
    missing = 8_000
    for _ in range(12):
        for pipeline in (1, 2):
            row = (1, "node-0-1", 9_000, 9_000 - missing)
            assert orders(driver.report(pipeline, 8, waiting=1, coverage=[row], epoch=2)) == []
        assert orders(driver.tick()) == []
        driver.now += PATIENCE_SECONDS / 4
        missing = int(missing * 0.85)
