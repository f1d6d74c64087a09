"""A controller that has lost its memory, and knows only which processes there are."""

from __future__ import annotations

import pytest

from cluster_driver import Driver, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.events import KillEngine, KillNode, KnownNode, Snapshot, StartNode
from kevlarflow.types import Computing, EngineState, Epoch, Loss, PipelineId
from toy_world import pid_of

TIMES = Driver().config.timeouts
SETTLE = TIMES.settle_ms / 1_000
PATIENCE = TIMES.engine_lost_after_ms / 1_000
NODES = ("node-0-0", "node-0-1", "node-1-0", "node-1-1")


def found(*others: KnownNode, engines: dict[PipelineId, int] | None = None) -> Snapshot:
    # As `kevlarflow.control.relatives` has it: whom the life before has sent SIGKILL nobody knows.
    nodes = (
        KnownNode(member(node), (pid_of(member(node)),), ready=True, failed_starts=0, fenced=True) for node in NODES
    )
    return Snapshot(nodes=(*nodes, *others), epochs={}, served=True, engines=engines or {})


def resumed(snapshot: Snapshot):
    driver = Driver()
    driver.now = 200.0
    return driver, driver.do(events.ControllerResumed(snapshot))


def pass_time(driver, seconds):
    commands, end = [], driver.now + seconds
    while driver.now < end - 0.01:
        commands += driver.tick(0.1)
    return commands


def those(kind, commands):
    return [each for each in commands if isinstance(each, kind)]


def test_a_node_that_does_not_introduce_itself_is_killed_and_replaced():
    driver, _ = resumed(found())
    for node in NODES[1:]:
        driver.ready(node)
    assert those(KillNode, pass_time(driver, PATIENCE - 0.2)) == []
    commands = pass_time(driver, 0.4)
    assert those(KillNode, commands) == [KillNode(member("node-0-0"), (pid_of(member("node-0-0")),))]
    (start,) = those(StartNode, commands + pass_time(driver, 2.0))
    # No life before has given this number out.
    assert (start.member.node, start.member.incarnation > 1_000) == ("node-0-0", True)


def test_a_pause_of_the_controller_is_no_silence_of_those_who_have_yet_to_introduce_themselves():
    unheard = Snapshot(nodes=found().nodes[1:], epochs={}, served=True)
    driver, _ = resumed(unheard)
    pass_time(driver, 0.5)
    assert driver.pause(10 * SETTLE) == []
    assert driver.cluster.settling(driver.now)
    for node in NODES:
        assert those(KillNode, driver.ready(node)) == []
    assert those(KillNode, pass_time(driver, SETTLE)) == []


def test_a_pause_of_the_controller_does_not_save_who_stays_silent_after_it():
    driver, _ = resumed(found())
    for node in NODES[1:]:
        driver.ready(node)
    driver.pause(10 * SETTLE)
    assert [each.member for each in those(KillNode, pass_time(driver, PATIENCE + 0.2))] == [member("node-0-0")]


def test_a_node_that_still_loads_is_given_its_time():
    driver, _ = resumed(found())
    for node in NODES[1:]:
        driver.ready(node)
    loading = member("node-0-0")
    driver.do(events.NodeStarting(loading, "here", (pid_of(loading),)))
    assert those(KillNode, pass_time(driver, 2 * PATIENCE)) == []
    assert those(KillNode, pass_time(driver, TIMES.startup_timeout_s)) == [KillNode(loading, (pid_of(loading),))]


def test_a_member_whose_place_another_has_is_killed():
    older, newer = member("node-0-0", 1), member("node-0-0", 7)
    _, commands = resumed(found(KnownNode(newer, (77,), ready=True, failed_starts=0)))
    assert those(KillNode, commands) == [KillNode(older, (pid_of(older),))]


def test_an_engine_that_does_not_report_is_killed():
    driver, _ = resumed(found(engines={PipelineId(1): 71}))
    for node in NODES:
        driver.ready(node)
    commands = pass_time(driver, TIMES.engine_lost_after_ms / 1_000 + 0.1)
    assert those(KillEngine, commands) == [KillEngine(PipelineId(1), 71)]
    assert driver.cluster.pipelines[1].engine.state is EngineState.SILENT


def test_the_life_after_it_knows_that_there_may_be_lanes_of_which_nobody_has_told():
    first, _ = resumed(found())
    second = Driver()
    second.now = 201.0
    second.do(events.ControllerResumed(first.cluster.snapshot()))
    epochs = {PipelineId(0): Epoch(3), PipelineId(1): Epoch(2)}
    second.ready("node-1-1", epochs=epochs)
    assert member("node-1-1") in second.cluster.pipelines[0].leaving, "it may still serve pipeline 0"


def test_once_all_serve_that_is_over():
    serving = Driver().serve()
    serving.cluster.forgetful = True
    assert not serving.cluster.snapshot().forgetful
    serving.exited("node-0-1")
    assert serving.cluster.snapshot().forgetful


def speaks(driver, node, *, starts=False):
    if starts:
        driver.do(events.NodeStarting(member(node), "here", (pid_of(member(node)),)))
    driver.ready(node)


def kill(driver, node):
    """Somebody else does; returns what is said to be lost with it."""
    step = Computing(PipelineId(0), Epoch(1), 5)
    (order,) = orders(driver.do(events.NodeExited(member(node), driver.now, step, "SIGKILL", from_outside=True)))
    return order.losses


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_somebody_who_kills_a_node_that_has_spoken_since_costs_no_request(starts, restarts):
    driver, _ = resumed(found())
    for again in (False, True)[: 1 + restarts]:
        if again:
            driver.restart()
        for node in NODES:
            speaks(driver, node, starts=starts and not again)
        driver.attach(0, epoch=1, members=(member("node-0-0"), member("node-0-1")))
    assert kill(driver, "node-0-1") == (Loss(member("node-0-1"), Computing(), from_outside=True),)


def test_nor_is_one_that_is_killed_while_it_loads_taken_for_killed_by_the_life_before():
    driver, _ = resumed(found())
    driver.do(events.NodeStarting(member("node-0-1"), "here", (pid_of(member("node-0-1")),)))
    driver.do(events.NodeExited(member("node-0-1"), driver.now, None, "SIGKILL", from_outside=True))
    assert driver.cluster.slots["node-0-1"].hurt_from_outside


def test_one_that_has_not_spoken_may_have_been_killed_for_hanging():
    driver, _ = resumed(found())
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    step = Computing(PipelineId(0), Epoch(1), 5)
    driver.do(events.NodeExited(member("node-0-1"), driver.now, step, "SIGKILL", from_outside=True))
    assert driver.cluster.slots["node-0-1"].computing == step


def test_who_does_not_introduce_itself_to_a_controller_that_breathes_slowly_is_killed_in_the_end():
    driver, _ = resumed(found())
    begun = driver.now
    while not any(isinstance(each, KillNode) for each in driver.pause(1.05)):
        assert driver.now - begun <= 2 * PATIENCE


def test_how_long_a_node_has_loaded_that_was_found_nobody_knows():
    driver, _ = resumed(found())
    driver.now += 0.2
    speaks(driver, "node-0-0", starts=True)
    assert list(driver.cluster.start_seconds) == []
