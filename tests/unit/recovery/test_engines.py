"""Engines that do not report, and orders that did not arrive."""

from __future__ import annotations

from cluster_driver import Driver, lines, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.engines import RESEND_SECONDS
from kevlarflow.recovery.events import AssignStandbys, KillEngine
from kevlarflow.types import EngineState, PipelineId, RecoveryState

TIMES = Driver().config.timeouts
SILENT = TIMES.engine_silent_after_ms / 1_000
LOST = TIMES.engine_lost_after_ms / 1_000


def pass_time(driver, seconds, reporting=()):
    """Ticks as the controller's, and reports of these pipelines; returns all commands."""
    commands = []
    end = driver.now + seconds
    while driver.now < end - 0.01:
        commands += driver.tick(0.1)
        for pipeline in reporting:
            commands += driver.report(pipeline, running=1)
    return commands


def serving():
    driver = Driver().serve()
    driver.tick()
    return driver


def engine_state(driver, pipeline):
    return driver.cluster.pipelines[pipeline].engine.state


def test_an_engine_that_does_not_report_is_shown_then_killed():
    driver = serving()
    assert pass_time(driver, SILENT - 0.2, reporting=[1]) == []
    said = lines(pass_time(driver, 0.4, reporting=[1]))
    assert said == ["the engine of pipeline 0 does not report (pid 70)"]
    assert engine_state(driver, 0) is EngineState.SILENT
    assert engine_state(driver, 1) is EngineState.READY
    commands = pass_time(driver, LOST - SILENT, reporting=[1])
    assert [each for each in commands if isinstance(each, KillEngine)] == [KillEngine(PipelineId(0), 70)]
    driver.do(events.EngineLost(PipelineId(0), 70))
    assert pass_time(driver, 2 * LOST, reporting=[1]) == []


def test_an_engine_that_reports_again_is_ready_again():
    driver = serving()
    pass_time(driver, SILENT + 0.2, reporting=[1])
    assert lines(driver.report(0, running=1)) == ["the engine of pipeline 0 reports again"]
    assert engine_state(driver, 0) is EngineState.READY
    assert not any(isinstance(each, KillEngine) for each in pass_time(driver, LOST - 0.2, reporting=[1]))


def test_a_pause_of_the_controller_is_no_silence_of_engines():
    driver = serving()
    assert driver.pause(60.0) == []
    assert engine_state(driver, 0) is EngineState.READY


def test_an_engine_that_falls_silent_in_a_pause_of_the_controller_is_killed_in_time():
    driver = serving()
    driver.now += 60.0
    for pipeline in (0, 1):
        driver.report(pipeline, running=1)
    driver.do(events.Tick.after(60.0))
    assert kills(pass_time(driver, LOST - 0.2, reporting=[1])) == []
    assert kills(pass_time(driver, 0.4, reporting=[1])) == [KillEngine(PipelineId(0), 70)]


def test_an_order_that_did_not_arrive_is_sent_again():
    driver = serving()
    (order,) = orders(driver.exited("node-0-1"))
    assert driver.report(0, running=1, epoch=1) == []
    driver.now += RESEND_SECONDS
    assert driver.report(0, running=1, epoch=1) == [order]
    assert driver.report(0, running=1, epoch=1) == []
    driver.now += RESEND_SECONDS
    # It has arrived: what is awaited now is its end.
    assert driver.report(0, running=1, epoch=2, forming=True) == []
    # That has come, and what said so has not.
    assert driver.report(0, running=1, epoch=2) == [order]


def resumed(snapshot):
    driver = Driver()
    driver.now = 200.0
    driver.do(events.ControllerResumed(snapshot))
    return driver


def kills(commands):
    return [each for each in commands if isinstance(each, KillEngine)]


def test_an_engine_that_the_next_life_of_the_controller_never_hears_of_is_killed():
    before = serving()
    driver = resumed(before.cluster.snapshot())
    members = tuple(before.cluster.pipelines[1].members)
    driver.attach(1, epoch=1, members=members)
    assert kills(pass_time(driver, LOST - 0.2, reporting=[1])) == []
    assert kills(pass_time(driver, 0.4, reporting=[1])) == [KillEngine(PipelineId(0), 70)]
    driver.do(events.EngineLost(PipelineId(0), 70))
    assert engine_state(driver, 0) is EngineState.DEAD
    assert kills(pass_time(driver, 2 * LOST, reporting=[1])) == []


def test_the_next_life_of_the_controller_takes_standbys_back_that_are_gone():
    before = serving()
    driver = resumed(before.cluster.snapshot())
    driver.ready("node-0-0")
    driver.ready("node-0-1")
    commands = driver.attach(0, epoch=1, members=tuple(before.cluster.pipelines[0].members))
    assert AssignStandbys(PipelineId(0), (None, None)) in commands


def test_an_engine_that_falls_silent_while_it_starts_is_given_its_time():
    driver = Driver()
    driver.do(events.ClusterBegun())
    for node in driver.cluster.slots:
        driver.ready(node)
    driver.attach(0)
    assert kills(pass_time(driver, 2 * LOST)) == []
    assert kills(pass_time(driver, TIMES.startup_timeout_s - 2 * LOST + 1)) == [KillEngine(PipelineId(0), 70)]


def test_what_an_engine_took_along_did_not_recover_whoever_controls_it_then():
    driver = Driver().serve()
    driver.exited("node-0-1")
    snapshot = driver.cluster.snapshot()
    driver.cluster = Cluster(driver.cluster.config)
    driver.do(events.ControllerResumed(snapshot))
    driver.do(events.EngineLost(PipelineId(0), 70))
    (recovery,) = driver.cluster.recoveries
    assert recovery.state is RecoveryState.FAILED


def test_a_node_that_its_engine_cannot_use_is_said_to_be_that():
    """And not what its predecessor was."""
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now, "was stopped", from_outside=True))
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.ready("node-0-1", 2)
    driver.report(0, epoch=2)
    driver.formed(0, 3)
    said = []
    for _ in range(2):
        epoch = driver.cluster.pipelines[0].epoch
        driver.do(events.MemberFailed(PipelineId(0), epoch, member("node-0-1", 2), "refused"))
        said += lines(driver.tick(0.2))
    said += lines(driver.exited("node-0-1", 2))
    (line,) = [each for each in said if "was killed" in each]
    assert "node-0-1 could not be used by pipeline 0" in line


def test_an_engine_that_does_not_report_to_a_controller_that_breathes_slowly_is_killed_in_the_end():
    driver = serving()
    begun = driver.now
    while not any(isinstance(each, KillEngine) for each in driver.pause(1.05)):
        assert driver.now - begun <= 2 * LOST
