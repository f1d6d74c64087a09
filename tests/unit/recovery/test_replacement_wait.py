"""A stage without any node: requests wait for a replacement up to a bound, and end with an error after it."""

from __future__ import annotations

import msgspec
import pytest

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import LONGEST_BREATH_SECONDS, Form, Snapshot, Suspend
from kevlarflow.recovery.invariants import Invariants, Violated
from kevlarflow.recovery.status import status_document
from kevlarflow.types import Cause, Epoch, PipelineId, PipelineState, Stage
from toy_world import pid_of

BOUND = 45.0
LEFT = "no node with room is left for stage 0 of pipeline 0 (of node-0-0)"


def bereft(wait: float = BOUND) -> Driver:
    """A single pipeline that has just lost the only node of stage 0, at 10 s."""
    driver = Driver(pipelines=1, replacement_wait_s=wait).serve()
    driver.lost = driver.exited("node-0-0")
    return driver


def waits(pipeline: int, epoch: int, reason: str) -> Suspend:
    return Suspend(PipelineId(pipeline), Epoch(epoch), Stage(0), reason, waits=True, lost_stages=(Stage(0),))


def test_requests_are_told_to_wait_and_people_for_how_long():
    driver = bereft()
    reason = f"{LEFT}; a replacement is being started"
    assert orders(driver.lost) == [waits(0, 2, reason)]
    died = f"node-0-0 died (pid {pid_of(member('node-0-0'))})"
    assert lines(driver.lost) == [f"{died}: {reason}; its requests wait for up to 45 s"]


def test_a_replacement_within_the_bound_takes_over_and_stops_it():
    driver = bereft()
    driver.now += BOUND - 1
    assert orders(driver.ready("node-0-0", 2)) == [driver.form(0, 3, ["node-0-0#2", "node-0-1"], Cause.CRASH, lost=[0])]
    driver.formed(0, 3)
    assert orders(driver.tick(BOUND)) == []
    # The next time it waits, all of the bound counts.
    (again,) = orders(driver.exited("node-0-0", 2))
    assert again.waits
    assert orders(driver.tick(BOUND - 1)) == []
    (over,) = orders(driver.tick(1))
    assert not over.waits


def test_when_the_bound_passes_requests_end_and_the_error_says_why():
    driver = bereft()
    assert orders(driver.tick(BOUND - 0.1)) == []
    commands = driver.tick(0.1)
    reason = f"{LEFT}; no replacement was ready within 45 s (--replacement-wait)"
    assert orders(commands) == [Suspend(PipelineId(0), Epoch(3), Stage(0), reason, lost_stages=(Stage(0),))]
    assert lines(commands) == [f"{reason}: its requests end with an error"]
    assert driver.cluster.why_not_serving() == reason
    # Once is enough; service comes back all the same.
    assert orders(driver.tick(BOUND)) == []
    assert [type(order) for order in orders(driver.ready("node-0-0", 2))] == [Form]
    driver.formed(0, 4)
    assert driver.state(0) is PipelineState.SERVING


def test_without_a_bound_requests_end_at_once():
    driver = bereft(wait=0.0)
    reason = f"{LEFT}; a replacement is being started"
    assert orders(driver.lost) == [Suspend(PipelineId(0), Epoch(2), Stage(0), reason, lost_stages=(Stage(0),))]
    assert orders(driver.tick(1)) == []


def test_a_replacement_that_dies_again_does_not_prolong_the_wait():
    driver = bereft()
    driver.now += 20
    driver.ready("node-0-0", 2)
    (again,) = orders(driver.exited("node-0-0", 2))
    assert again.waits
    assert status_document(driver.cluster, 1)["pipelines"][0]["waiting_for"] == {"stages": [0], "seconds_left": 25.0}
    assert orders(driver.tick(24)) == []
    (over,) = orders(driver.tick(1))
    assert not over.waits


def test_nobody_is_ended_while_a_replacement_takes_over():
    driver = bereft()
    driver.now += BOUND - 1
    driver.ready("node-0-0", 2)
    assert orders(driver.tick(5)) == []
    # It dies as well, and nothing is left of the bound.
    (order,) = orders(driver.exited("node-0-0", 2))
    assert order.waits
    (over,) = orders(driver.tick(0.1))
    assert not over.waits


def test_a_second_stage_that_is_lost_meanwhile_is_awaited_within_the_same_bound():
    driver = bereft()
    driver.now += 30
    assert orders(driver.exited("node-0-1")) == []
    assert status_document(driver.cluster, 1)["pipelines"][0]["waiting_for"] == {
        "stages": [0, 1],
        "seconds_left": 15.0,
    }
    assert orders(driver.ready("node-0-0", 2)) == []
    (over,) = orders(driver.tick(15))
    assert not over.waits
    assert over.reason.startswith("no node with room is left for stage 1")


def test_an_engine_that_dies_while_it_waits_leaves_nothing_to_end():
    driver = bereft()
    driver.do(events.EngineLost(PipelineId(0), 70))
    assert orders(driver.tick(BOUND)) == []
    driver.attach(0, pid=71)
    assert orders(driver.tick(BOUND)) == []
    assert orders(driver.ready("node-0-0", 2)) != []


def resumed(driver: Driver, snapshot: Snapshot) -> None:
    """The next life of the controller, as far as nodes are concerned."""
    driver.cluster = Cluster(driver.config)
    driver.invariants = Invariants(driver.cluster)
    driver.do(events.ControllerResumed(msgspec.json.decode(msgspec.json.encode(snapshot), type=Snapshot)))
    driver.ready("node-0-1")


def test_the_next_life_of_the_controller_keeps_to_the_bound():
    driver = bereft()
    driver.now += 30
    resumed(driver, driver.cluster.snapshot())
    claim = (member("node-0-0"), member("node-0-1"))
    (order,) = orders(driver.do(events.EngineAttached(PipelineId(0), 70, Epoch(2), claim, suspended=True)))
    assert order.waits
    assert orders(driver.tick(14)) == []
    (over,) = orders(driver.tick(1))
    assert not over.waits


def test_an_engine_that_waits_is_formed_anew_even_with_the_nodes_that_it_names():
    driver = Driver(pipelines=1).serve()
    resumed(driver, driver.cluster.snapshot())
    driver.ready("node-0-0")
    claim = (member("node-0-0"), member("node-0-1"))
    (order,) = orders(driver.do(events.EngineAttached(PipelineId(0), 70, Epoch(1), claim, suspended=True)))
    assert isinstance(order, Form)
    assert driver.state(0) is PipelineState.RECOVERING


def crowded() -> Driver:
    """Pipeline 0 borrows stage 0 of pipeline 1, whose node has no more lanes, and waits for a node of stage 1."""
    driver = Driver(pipelines=3).serve()
    for node, pipeline in (("node-0-0", 0), ("node-1-1", 1)):
        (order,) = orders(driver.exited(node))
        driver.formed(pipeline, order.epoch)
    (order,) = orders(driver.exited("node-0-1"))
    assert isinstance(order, Suspend)
    assert (order.stage, order.lost_stages) == (Stage(1), (Stage(1),))
    return driver


def test_a_pipeline_that_waits_gives_back_what_it_has_borrowed():
    driver = crowded()
    epoch = driver.cluster.pipelines[0].epoch
    # Its engine has not left the lane yet, so nobody else can have it.
    (order,) = orders(driver.exited("node-2-0"))
    assert isinstance(order, Suspend)
    (order,) = orders([*driver.report(0, running=1, epoch=epoch), *driver.tick()])
    assert (order.pipeline, [info.member.node for info in order.nodes]) == (2, ["node-1-0", "node-2-1"])


def test_a_pipeline_that_waits_tells_only_of_stages_that_nobody_could_serve():
    driver = crowded()
    driver.report(0, running=1, epoch=driver.cluster.pipelines[0].epoch)
    row = status_document(driver.cluster, 1)["pipelines"][0]
    assert (row["nodes"], row["waiting_for"]["stages"]) == ([None, None], [1])
    # What it has given back it takes again when the other stage has a node.
    (order,) = orders(driver.ready("node-0-1", 2))
    assert [info.member.node for info in order.nodes] == ["node-1-0", "node-0-1"]


def test_the_status_tells_who_waits_and_how_long_still():
    driver = bereft()
    driver.tick(12.3)
    (row,) = status_document(driver.cluster, 1)["pipelines"]
    assert row["state"] == "waiting"
    assert row["waiting_for"] == {"stages": [0], "seconds_left": pytest.approx(32.7)}
    driver.tick(BOUND)
    (row,) = status_document(driver.cluster, 1)["pipelines"]
    assert row["waiting_for"] == {"stages": [0], "seconds_left": 0.0}
    driver.ready("node-0-0", 2)
    driver.formed(0, 4)
    (row,) = status_document(driver.cluster, 1)["pipelines"]
    assert row["waiting_for"] is None


def test_a_bound_that_nobody_keeps_to_is_a_violation():
    driver = bereft()
    pipeline = driver.cluster.pipelines[0]
    driver.cluster.now = pipeline.wait_until = 99.0
    driver.cluster.passes_deadlines = True
    with pytest.raises(Violated, match="lets its requests wait beyond the bound"):
        driver.invariants.check([])
    driver = Driver(pipelines=1).serve()
    driver.cluster.pipelines[0].wait_until = 99.0
    with pytest.raises(Violated, match="serves, and its bound runs on"):
        driver.invariants.check([])


def test_a_controller_that_was_stopped_over_the_end_of_the_bound_reads_first_who_is_ready():
    driver = bereft()
    driver.tick(BOUND - 5)
    driver.now += 10
    assert orders(driver.report(0, running=1, epoch=2)) == []
    assert orders(driver.do(events.Tick(pause=10))) == []
    driver = bereft()
    driver.tick(BOUND - LONGEST_BREATH_SECONDS / 2)
    # The first turn after a pause may find nothing to read yet.
    assert orders(driver.pause(10)) == []
    driver.now += 0.1
    assert [type(order) for order in orders(driver.ready("node-0-0", 2))] == [Form]


def test_the_time_for_which_the_controller_stood_still_is_none_of_the_bound():
    driver = bereft()
    driver.pause(10 + LONGEST_BREATH_SECONDS)
    assert orders(driver.tick(BOUND - LONGEST_BREATH_SECONDS - 1)) == []
    (over,) = orders(driver.tick(1))
    assert not over.waits


def test_a_controller_that_is_started_again_after_the_bound_hears_first_who_is_ready():
    driver = bereft()
    driver.tick(1)
    driver.do(events.NodeLaunched(member("node-0-0", 2), 4_242))
    driver.now += BOUND
    driver.restart()
    driver.ready("node-0-1")
    members = (member("node-0-0"), member("node-0-1"))
    (order,) = orders(driver.attach(0, epoch=2, members=members, suspended=True))
    assert order.waits
    assert orders(driver.tick(0.5)) == []
    assert [type(order) for order in orders(driver.ready("node-0-0", 2))] == [Form]


def test_a_replacement_that_dies_while_the_controller_stands_still_leaves_the_rest_of_the_bound():
    driver = bereft()
    driver.tick(BOUND - 5)
    driver.ready("node-0-0", 2)
    driver.now += 8
    (order,) = orders(driver.exited("node-0-0", 2))
    assert order.waits
    assert orders(driver.do(events.Tick(pause=8))) == []
    assert orders(driver.tick(4)) == []
    (over,) = orders(driver.tick(1))
    assert not over.waits


@pytest.mark.parametrize("breath", [LONGEST_BREATH_SECONDS + 0.05, 3 * LONGEST_BREATH_SECONDS])
def test_the_bound_passes_for_a_controller_that_breathes_slowly_all_the_time(breath):
    driver = bereft()
    begun = driver.now
    while not (ended := orders(driver.pause(breath))):
        assert driver.now - begun <= (BOUND + 2) * breath / LONGEST_BREATH_SECONDS
    assert not ended[0].waits


def test_it_does_so_though_the_controller_stands_still_now_and_then():
    driver = bereft()
    begun = driver.now
    while not orders([*driver.pause(1.5), *driver.tick(0.1)]):
        assert driver.now - begun <= 2 * BOUND
