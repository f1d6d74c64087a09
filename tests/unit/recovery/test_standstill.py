"""A pipeline that stands still is formed anew: who notices, when, how often, and what it does not cost."""

import msgspec
import pytest

from cluster_driver import Driver, member
from kevlarflow.config import Timeouts
from kevlarflow.recovery import events
from kevlarflow.recovery.events import AssignStandbys, Form
from kevlarflow.recovery.relinking import MOST_RELINKS
from kevlarflow.recovery.standbys import TELL_AGAIN_SECONDS
from kevlarflow.recovery.standstill import FAIR_STEPS, Stillness, Work
from kevlarflow.types import Cause, Epoch, PipelineId, RecoveryState

TIMES = Timeouts(heartbeat_interval_ms=100, still_after_ms=1_000)
NODES = [member("node-0-0"), member("node-0-1")]
OURS, OTHERS = PipelineId(0), PipelineId(1)


def report(still_seconds=1.2, epoch=1):
    return events.EngineReport(OURS, 8, 0, 2, 100, epoch=Epoch(epoch), still_seconds=still_seconds)


def beats(works, seconds=2.0, waits_since=0.8):
    """What is known after each node has beaten for `seconds`; `works` says what a node does, by time.

    The engine has waited for an answer since `waits_since`.
    """
    stillness = Stillness(TIMES, 2)
    for tick in range(round(seconds * 10) + 1):
        for each, work in zip(NODES, works, strict=True):
            stillness.beat(each, work(tick / 10), tick / 10)
        if tick < round(seconds * 10):
            stillness.judge(report(max(0.0, tick / 10 - waits_since)), NODES, (), tick / 10)
    return stillness


def idle(now):
    return Work(None, {OURS: 7})


def test_a_pipeline_stands_still_when_its_engine_waits_and_no_node_is_at_work():
    still = beats([idle, idle]).judge(report(), NODES, (), 2.0)
    assert still == events.PipelineStill(OURS, Epoch(1), 1.2)


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda now: Work(OURS, {OURS: 7}), id="at work"),
        pytest.param(lambda now: Work(None, {OURS: 7 + int(now * 10)}), id="at work between the beats"),
        pytest.param(lambda now: Work(OTHERS, {OURS: 7, OTHERS: 3}), id="in a long step of another pipeline"),
    ],
)
def test_a_node_that_may_come_to_it_yet_is_waited_for(work):
    assert beats([idle, work]).judge(report(), NODES, (), 2.0) is None


def test_a_node_that_only_works_for_others_has_nothing_to_do_for_this_one():
    busy = beats([idle, lambda now: Work(OTHERS, {OURS: 7, OTHERS: int(now * FAIR_STEPS)})])
    assert busy.judge(report(), NODES, (), 2.0) is not None


def test_what_it_did_for_others_before_the_engine_waited_does_not_count():
    """The donor of a lane, in a long step when the order to open it comes, has not been unfair."""
    donor = beats([idle, lambda now: Work(OTHERS, {OURS: 0, OTHERS: min(99, int(now * 124))})])
    assert donor.judge(report(), NODES, (), 2.0) is None


def test_nor_what_came_with_the_order():
    """A dozen messages in an instant, behind the last beat before the engine waits."""
    donor = beats([idle, lambda now: Work(OTHERS, {OURS: 0, OTHERS: 0 if now < 0.85 else 12})])
    assert donor.judge(report(), NODES, (), 2.0) is None


def test_nor_does_what_it_did_while_another_stage_was_at_work_for_the_pipeline():
    """It was in a long step when the stage before was done."""
    before = lambda now: Work(OURS if now < 1.3 else None, {OURS: 7})  # noqa: E731
    busy = beats([before, lambda now: Work(OTHERS, {OURS: 7, OTHERS: min(20, int(now * 16))})], waits_since=0.2)
    assert busy.judge(report(1.8), NODES, (), 2.0) is None


def test_a_node_that_is_about_to_give_its_lane_away_may_be_at_work_for_it():
    """A planned order waits for the steps in flight: the new node has nothing to do until then."""
    newcomer, old = NODES[1], member("node-1-1")
    stillness = beats([idle, idle])
    for tick in range(21):
        stillness.beat(old, Work(OURS, {OURS: 3}), tick / 10)
    assert stillness.judge(report(), NODES, (old,), 2.0) is None
    assert stillness.judge(report(), [NODES[0], newcomer], (), 2.0) is not None
    assert stillness.judge(report(), NODES, (member("node-2-1"),), 2.0) is not None, "nobody hears of that one"


def test_nothing_is_said_of_nodes_that_are_not_heard_or_of_engines_that_do_not_wait():
    stillness = beats([idle, idle])
    assert stillness.judge(report(still_seconds=0.9), NODES, (), 2.0) is None
    assert stillness.judge(report(), [*NODES, None], (), 2.0) is None
    assert stillness.judge(report(), NODES, (), 2.5) is None, "they are silent"
    stillness.forget(NODES[0])
    assert stillness.judge(report(), NODES, (), 2.0) is None


# ---- the cluster


def serving(**options):
    driver = Driver(**options)
    driver.serve()
    return driver


def still(driver, epoch):
    return forms(driver.do(events.PipelineStill(OURS, Epoch(epoch), 1.0)))


def forms(commands):
    return [each for each in commands if isinstance(each, Form)]


def test_it_is_formed_anew_with_the_same_members_and_nobody_is_blamed():
    driver = serving()
    before = driver.cluster.pipelines[0].members[:]
    (order,) = still(driver, epoch=1)
    assert order.cause is Cause.LINK
    assert (order.epoch, order.lost_stages, order.released) == (2, (), ())
    assert [info.member for info in order.nodes] == before
    driver.formed(0, 2)
    (recovery,) = driver.cluster.recoveries
    assert (recovery.cause, recovery.state) == (Cause.LINK, RecoveryState.DONE)
    assert recovery.origin == recovery.target, "no stage has changed its node"
    assert recovery.seconds.detect == pytest.approx(1.0)


def test_each_further_time_has_to_wait_for_twice_as_long():
    driver = serving()
    pauses = []
    for epoch in range(1, MOST_RELINKS + 2):
        asked = driver.now
        orders = still(driver, epoch)
        while not orders:
            driver.now += 0.125
            orders = forms(driver.do(events.Tick()))
        pauses.append(round(driver.now - asked, 1))
        driver.formed(0, epoch + 1)
    assert pauses == [0.0, 1.0, 2.0, 4.0]
    driver.now += 31.0
    assert still(driver, 5)


def test_an_order_that_is_on_its_way_is_not_overtaken():
    driver = serving()
    driver.exited("node-0-1")
    assert still(driver, epoch=1) == []
    assert still(driver, epoch=2)


def test_a_connection_that_broke_is_no_complaint_about_the_node():
    driver = serving()
    failed = events.MemberFailed(OURS, Epoch(1), NODES[1], "", unlinked=True)
    (order,) = forms(driver.do(failed))
    assert order.cause is Cause.LINK
    # It breaks again while the pipeline is being formed: that is a reason to wait, and none to kill.
    commands = driver.do(events.MemberFailed(OURS, Epoch(2), NODES[1], "", unlinked=True))
    driver.now += 1.1
    commands += driver.do(events.Tick())
    assert [each.epoch for each in forms(commands)] == [3]
    assert not any(isinstance(each, events.KillNode) for each in commands)
    assert driver.do(failed) == [], "that was about an old epoch"


def test_standbys_that_did_not_arrive_are_told_again():
    driver = serving(replication=True)
    pipeline = driver.cluster.pipelines[0]
    told = [info.member.node for info in pipeline.standbys]
    seen = [(0, told[0], 10, 10), (1, None, 10, 0)]
    driver.now += TELL_AGAIN_SECONDS
    assert driver.report(0, running=1, epoch=1, coverage=seen) == [AssignStandbys(OURS, pipeline.standbys)]
    assert driver.report(0, running=1, epoch=1, coverage=seen) == [], "that may be under way"
    driver.now += TELL_AGAIN_SECONDS
    assert driver.report(0, running=1, epoch=1, coverage=[(0, told[0], 10, 10), (1, told[1], 10, 0)]) == []


def test_an_order_that_gives_room_back_may_wait_at_its_engine_for_steps_that_are_lost():
    driver = serving()
    pipeline = driver.cluster.pipelines[0]
    assert pipeline.order is not None
    pipeline.epoch = Epoch(2)
    pipeline.order = msgspec.structs.replace(pipeline.order, epoch=pipeline.epoch, cause=Cause.SHARE)
    assert [order.cause for order in still(driver, epoch=1)] == [Cause.LINK]
