"""The cluster's state machine: events in, commands out."""

from __future__ import annotations

import msgspec
import pytest

from cluster_driver import Driver, lines, member, orders
from kevlarflow.errors import IllegalTransition
from kevlarflow.recovery import events
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import Abort, KillNode, Narrate, Retire, StartNode, Suspend
from kevlarflow.recovery.nodes import GIVES_WAY_SECONDS, LONGEST_RETRY_SECONDS, STEADY_SECONDS
from kevlarflow.recovery.status import status_document
from kevlarflow.recovery.transitions import NODE, PIPELINE, NodeStep, PipelineStep, next_node_state
from kevlarflow.types import (
    Cause,
    Epoch,
    NodeId,
    NodeState,
    PipelineId,
    PipelineState,
    RecoveryState,
    Stage,
)
from toy_world import pid_of

# ---- start


def test_all_nodes_are_started_at_once():
    driver = Driver(stages=2, pipelines=1)
    assert driver.do(events.ClusterBegun()) == [
        StartNode(member("node-0-0"), Stage(0)),
        StartNode(member("node-0-1"), Stage(1)),
    ]


def test_a_pipeline_is_formed_when_its_own_nodes_and_engine_are_there():
    driver = Driver()
    driver.do(events.ClusterBegun())
    assert driver.ready("node-1-0") == []
    assert driver.attach(1) == []
    assert driver.ready("node-0-1") == []
    assert driver.ready("node-1-1") == [driver.form(1, 1, ["node-1-0", "node-1-1"], Cause.START)]
    assert driver.formed(1, 1) == []
    assert driver.state(1) is PipelineState.STARTING
    assert lines(driver.engine_ready(1)) == ["pipeline 1 serves with node-1-0, node-1-1"]
    assert driver.state(1) is PipelineState.SERVING
    assert driver.state(0) is PipelineState.STARTING
    assert driver.cluster.serving


def test_a_report_that_counts_blocks_also_says_that_the_engine_is_ready():
    driver = Driver(stages=1, pipelines=1)
    driver.do(events.ClusterBegun())
    driver.ready("node-0-0")
    driver.attach(0)
    driver.formed(0, 1)
    driver.report(0)
    assert driver.state(0) is PipelineState.SERVING


def test_a_node_that_fails_before_the_cluster_has_served_ends_the_start():
    driver = Driver()
    driver.do(events.ClusterBegun())
    commands = driver.do(events.NodeFailed(member("node-0-1"), "no memory for the weights"))
    assert commands == [Abort("node-0-1 failed: no memory for the weights. Its log: /run/8000.logs/node-0-1-1.log")]
    assert driver.ready("node-0-0") == []


def test_a_node_that_cannot_start_ends_the_start_even_if_another_pipeline_was_quicker():
    driver = Driver(stages=1)
    driver.do(events.ClusterBegun())
    driver.ready("node-0-0")
    driver.attach(0)
    driver.formed(0, 1)
    driver.engine_ready(0)
    (abort,) = driver.do(events.NodeFailed(member("node-1-0"), "no memory"))
    assert isinstance(abort, Abort)


def test_a_ready_node_that_dies_before_its_pipeline_has_served_is_replaced_once_another_serves():
    driver = Driver(stages=1)
    driver.do(events.ClusterBegun())
    driver.ready("node-0-0")
    driver.ready("node-1-0")
    driver.attach(0)
    driver.formed(0, 1)
    driver.engine_ready(0)
    driver.exited("node-1-0")
    assert StartNode(member("node-1-0", 2), Stage(0)) in driver.tick(STEADY_SECONDS)


def test_a_node_that_dies_at_start_has_a_moment_to_say_why():
    driver = Driver()
    driver.do(events.ClusterBegun())
    driver.do(events.NodeLaunched(member("node-0-1"), 77))
    assert driver.exited("node-0-1") == []
    commands = driver.do(events.NodeFailed(member("node-0-1"), "no weights"))
    assert commands == [Abort("node-0-1 failed: no weights. Its log: /run/8000.logs/node-0-1-1.log")]


def test_a_node_that_dies_at_start_without_a_word_ends_the_start_too():
    driver = Driver()
    driver.do(events.ClusterBegun())
    driver.do(events.NodeLaunched(member("node-0-1"), 77))
    driver.exited("node-0-1")
    assert driver.tick(0.2) == [
        Abort("node-0-1 died while it was starting (pid 77). Its log: /run/8000.logs/node-0-1-1.log")
    ]


def test_a_node_that_never_gets_ready_ends_the_start():
    driver = Driver()
    driver.do(events.ClusterBegun())
    driver.do(events.NodeLaunched(member("node-0-0"), 77))
    commands = driver.tick(601)
    assert commands[0] == KillNode(member("node-0-0"), (77,))
    assert isinstance(commands[1], Abort)
    assert "node-0-0 was not ready after 601 s" in commands[1].reason


# ---- loss


def test_the_standby_takes_over_and_a_replacement_is_started():
    driver = Driver().serve()
    driver.now += 5
    assert driver.exited("node-0-1", alive_at=driver.now - 0.25) == [
        Narrate(f"node-0-1 died (pid {pid_of(member('node-0-1'))}): pipeline 0 borrows node-1-1"),
        driver.form(0, 2, ["node-0-0", "node-1-1"], Cause.CRASH, lost=[1]),
    ]
    assert driver.state(0) is PipelineState.RECOVERING
    assert driver.cluster.serving
    driver.now += 0.2
    assert driver.formed(0, 2) == [Narrate("pipeline 0 recovered in 450 ms: 3 requests, 5 tokens recomputed")]
    assert driver.state(0) is PipelineState.SERVING
    assert StartNode(member("node-0-1", 2), Stage(1)) in driver.tick(STEADY_SECONDS)
    (recovery,) = driver.cluster.recoveries
    assert recovery.state is RecoveryState.DONE
    assert recovery.time == pytest.approx(1_000_015.0)
    assert recovery.seconds.detect == pytest.approx(0.25)
    # 0.2 s passed from order to answer; the engine accounts for 0.09 s besides its own linking.
    assert recovery.seconds.relink == pytest.approx(0.11)
    assert recovery.seconds.total == pytest.approx(0.45)


def test_answers_to_older_orders_are_ignored():
    driver = Driver().serve()
    driver.exited("node-0-1")
    assert driver.formed(0, 1) == []
    assert driver.state(0) is PipelineState.RECOVERING
    driver.formed(0, 2)
    assert driver.state(0) is PipelineState.SERVING
    assert driver.formed(0, 2) == []


def test_the_nearest_in_the_ring_with_the_fewest_lanes_helps():
    driver = Driver(stages=1, pipelines=3).serve()
    (form,) = orders(driver.exited("node-2-0"))
    assert form == driver.form(2, 2, ["node-0-0"], Cause.CRASH, lost=[0])
    driver.formed(2, 2)
    (form, again) = orders(driver.exited("node-0-0"))
    # Two pipelines lost their node; the one that is left has memory for one of them.
    assert form == driver.form(0, 3, ["node-1-0"], Cause.CRASH, lost=[0])
    assert isinstance(again, Suspend)
    assert again.pipeline == 2


def test_two_losses_of_the_same_stage_are_survived_with_three_pipelines():
    driver = Driver(stages=1, pipelines=3, lanes=3).serve()
    driver.exited("node-2-0")
    driver.formed(2, 2)
    assert orders(driver.exited("node-0-0")) == [
        driver.form(0, 3, ["node-1-0"], Cause.CRASH, lost=[0]),
        driver.form(2, 3, ["node-1-0"], Cause.CRASH, lost=[0]),
    ]


def test_a_loss_during_a_recovery_replaces_its_order():
    driver = Driver(stages=2, pipelines=3).serve()
    driver.exited("node-0-1")
    (form,) = orders(driver.exited("node-0-0"))
    assert form == driver.form(0, 3, ["node-1-0", "node-1-1"], Cause.CRASH, lost=[0, 1])
    driver.formed(0, 3)
    assert [each.state for each in driver.cluster.recoveries] == [RecoveryState.DONE, RecoveryState.DONE]


def test_the_donor_dies_while_it_takes_over():
    driver = Driver(stages=2, pipelines=3).serve()
    driver.exited("node-0-1")
    forms = orders(driver.exited("node-1-1"))
    assert forms == [driver.form(0, 3, ["node-0-0", "node-2-1"], Cause.CRASH, lost=[1]), forms[1]]
    assert isinstance(forms[1], Suspend)
    states = [(each.pipeline, each.stage, each.state) for each in driver.cluster.recoveries]
    assert states == [(0, 1, RecoveryState.FAILED), (0, 1, RecoveryState.RUNNING), (1, 1, RecoveryState.RUNNING)]
    driver.formed(0, 3)
    assert driver.state(0) is PipelineState.SERVING


def test_nobody_is_left():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    commands = driver.exited("node-1-1")
    reason = (
        "no node with room is left for stage 1 of pipeline {} (of node-0-1, node-1-1); a replacement is being started"
    )
    assert orders(commands) == [
        Suspend(PipelineId(0), Epoch(3), Stage(1), reason.format(0), waits=True, lost_stages=(Stage(1),)),
        Suspend(PipelineId(1), Epoch(3), Stage(1), reason.format(1), waits=True, lost_stages=(Stage(1),)),
    ]
    assert not driver.cluster.serving
    assert driver.cluster.why_not_serving() == f"{reason.format(0)}; {reason.format(1)}"
    # The first replacement serves both.
    assert orders(driver.ready("node-1-1", 2)) == [
        driver.form(0, 4, ["node-0-0", "node-1-1#2"], Cause.CRASH, lost=[1]),
        driver.form(1, 4, ["node-1-0", "node-1-1#2"], Cause.CRASH, lost=[1]),
    ]
    driver.now += 1
    driver.formed(0, 4, lost=2)
    driver.formed(1, 4)
    assert [each.state for each in driver.cluster.recoveries] == [RecoveryState.DONE] * 3


def test_a_single_pipeline_waits_for_its_own_node():
    driver = Driver(stages=2, pipelines=1).serve()
    (suspend,) = orders(driver.exited("node-0-0"))
    assert isinstance(suspend, Suspend)
    driver.now += 3
    assert orders(driver.ready("node-0-0", 2)) == [driver.form(0, 3, ["node-0-0#2", "node-0-1"], Cause.CRASH, lost=[0])]
    driver.formed(0, 3)
    (recovery,) = driver.cluster.recoveries
    assert (recovery.origin, recovery.target) == ("node-0-0", "node-0-0")
    assert recovery.seconds.plan == pytest.approx(3.0)


def test_nodes_with_one_lane_lend_nothing():
    driver = Driver(lanes=1).serve()
    (suspend,) = orders(driver.exited("node-0-0"))
    assert isinstance(suspend, Suspend)


def test_a_suspect_is_no_donor_until_it_beats_again():
    driver = Driver().serve()
    driver.do(events.NodeSuspected(member("node-1-0"), driver.now - 1))
    (suspend,) = orders(driver.exited("node-0-0"))
    assert isinstance(suspend, Suspend)
    assert orders(driver.do(events.NodeCleared(member("node-1-0")))) == [
        driver.form(0, 3, ["node-1-0", "node-0-1"], Cause.CRASH, lost=[0])
    ]


# ---- silence


def test_a_silent_node_is_killed_first_and_lost_when_it_is_seen_to_die():
    driver = Driver().serve()
    silent = member("node-0-1")
    driver.do(events.NodeSuspected(silent, driver.now - 1))
    assert driver.do(events.NodeSilent(silent, driver.now - 3)) == [KillNode(silent, (pid_of(silent),))]
    assert driver.do(events.NodeCleared(silent)) == []
    driver.now += 0.1
    (form,) = orders(driver.exited("node-0-1"))
    assert form == driver.form(0, 2, ["node-0-0", "node-1-1"], Cause.HANG, lost=[1])
    (recovery,) = driver.cluster.recoveries
    assert (recovery.cause, recovery.seconds.detect) == (Cause.HANG, pytest.approx(3.1))


def test_a_silent_node_that_cannot_be_killed_is_lost_all_the_same():
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 3))
    patience = driver.config.timeouts.suspect_after_ms / 1_000
    assert driver.tick(patience - 0.1) == []
    (form,) = orders(driver.tick(0.2))
    assert form.cause is Cause.HANG


def test_a_replacement_that_is_stopped_while_it_loads_is_fenced_and_another_started():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.tick(STEADY_SECONDS)
    stopped = member("node-0-1", 2)
    driver.do(events.NodeLaunched(stopped, 77))
    assert driver.do(events.NodeSilent(stopped, driver.now - 0.3, "was stopped")) == [KillNode(stopped, (77,))]
    assert driver.ready("node-0-1", 2) == []  # it had said so before it was stopped
    told = driver.exited("node-0-1", 2)
    assert lines(told)[0].startswith("node-0-1 was stopped for 0.3 s and was killed")
    driver.now += 10
    assert StartNode(member("node-0-1", 3), 1) in driver.tick(0.1)


def test_a_node_that_is_stopped_during_the_first_start_is_no_reason_to_give_up():
    driver = Driver()
    driver.do(events.ClusterBegun())
    driver.do(events.NodeLaunched(member("node-0-1"), 77))
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 0.3, "was stopped"))
    driver.exited("node-0-1")
    assert driver.cluster.aborted is None
    assert StartNode(member("node-0-1", 2), 1) in driver.tick(1.0)


# ---- replacements and rejoin


def started(commands):
    return [each.member for each in commands if isinstance(each, StartNode)]


def test_replacements_give_way_to_every_recovery():
    driver = Driver(pipelines=3).serve()
    assert started(driver.exited("node-0-1")) == []
    assert started(driver.exited("node-1-0")) == []
    first, second = (driver.cluster.pipelines[index] for index in (0, 1))
    assert started(driver.formed(0, first.epoch)) == []
    assert started(driver.formed(1, second.epoch)) == []
    assert started(driver.tick(STEADY_SECONDS)) == [member("node-0-1", 2), member("node-1-0", 2)]


def test_replacements_give_way_until_the_steps_that_were_sent_again_are_over():
    """A pipeline is formed with the first of their results."""
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.now += 0.1
    assert started(driver.formed(0, 2)) == []
    assert started(driver.tick(STEADY_SECONDS - 0.01)) == []
    assert started(driver.tick(0.01)) == [member("node-0-1", 2)]


@pytest.mark.parametrize("before", [0.05, 0.2])
def test_what_has_just_been_formed_does_not_hold_a_replacement_up_for_long(before):
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.now += GIVES_WAY_SECONDS - before
    assert started(driver.formed(0, 2)) == []
    assert started(driver.tick(before)) == [member("node-0-1", 2)]


def test_replacements_do_not_give_way_for_long():
    driver = Driver().serve()
    driver.exited("node-0-1")
    assert started(driver.tick(GIVES_WAY_SECONDS - 0.1)) == []
    assert started(driver.tick(0.2)) == [member("node-0-1", 2)]
    assert started(driver.formed(0, 2)) == []


@pytest.mark.parametrize("pipelines", [1, 2])
def test_a_replacement_that_requests_wait_for_starts_at_once(pipelines):
    """Nobody has room for a second lane, and whoever else there is has just been formed."""
    driver = Driver(pipelines=pipelines, lanes=1).serve()
    assert started(driver.exited("node-0-1")) == [member("node-0-1", 2)]


def test_a_replacement_that_gave_way_is_started_by_the_next_life_of_the_controller():
    driver = Driver().serve()
    driver.exited("node-0-1")
    snapshot = driver.cluster.snapshot()
    driver.cluster = Cluster(driver.config)
    assert started(driver.do(events.ControllerResumed(snapshot))) == [member("node-0-1", 2)]


def test_a_replacement_takes_its_lane_back_at_a_quiet_point():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.report(0, running=2)
    assert orders(driver.ready("node-0-1", 2)) == []
    assert driver.report(0, in_flight=1) == []
    commands = driver.report(0)
    assert commands == [driver.form(0, 3, ["node-0-0", "node-0-1#2"], Cause.REJOIN, released=["node-1-1"], lost=[1])]
    assert lines(driver.formed(0, 3)) == ["node-0-1 is back and took its lane of pipeline 0 again"]
    assert [each.cause for each in driver.cluster.recoveries] == [Cause.CRASH, Cause.REJOIN]
    assert (driver.cluster.recoveries[1].origin, driver.cluster.recoveries[1].target) == ("node-1-1", "node-0-1")


def test_an_idle_pipeline_takes_its_lane_back_as_soon_as_its_node_is_ready():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.report(0)
    (form,) = orders(driver.ready("node-0-1", 2))
    assert form.cause is Cause.REJOIN


def test_a_report_from_before_the_recovery_is_no_quiet_point():
    driver = Driver().serve()
    driver.report(0)
    driver.exited("node-0-1")
    driver.formed(0, 2)
    assert orders(driver.ready("node-0-1", 2)) == []


def test_several_stages_come_back_by_one_order():
    driver = Driver().serve()
    driver.exited("node-0-0")
    driver.exited("node-0-1")
    driver.formed(0, 3)
    driver.ready("node-0-0", 2)
    driver.ready("node-0-1", 2)
    assert orders(driver.report(0)) == [
        driver.form(0, 4, ["node-0-0#2", "node-0-1#2"], Cause.REJOIN, released=["node-1-0", "node-1-1"], lost=[0, 1])
    ]
    assert lines(driver.formed(0, 4)) == ["node-0-0, node-0-1 are back and took their lanes of pipeline 0 again"]


def test_a_lane_counts_as_taken_until_it_has_been_given_up():
    driver = Driver(stages=1, pipelines=3).serve()
    driver.exited("node-0-0")
    driver.formed(0, 2)
    driver.report(0)
    driver.ready("node-0-0", 2)
    # node-1-0 has not left the lane of pipeline 0 yet, so pipeline 2 cannot have it.
    (form, *_) = orders(driver.exited("node-2-0"))
    assert form == driver.form(2, 2, ["node-0-0#2"], Cause.CRASH, lost=[0])


def test_a_replacement_that_does_not_start_is_tried_again_later_and_later():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.tick(STEADY_SECONDS)
    pauses = []
    for incarnation in range(2, 14):
        failed = driver.do(events.NodeFailed(member("node-0-1", incarnation), "no memory"))
        assert "node-0-1 failed: no memory" in lines(failed)[0]
        assert "node-0-1 is started again in" in lines(failed)[-1]
        waited = 0.0
        while not any(isinstance(each, StartNode) for each in driver.tick(0.25)):
            waited += 0.25
            assert waited <= LONGEST_RETRY_SECONDS
        pauses.append(waited)
    assert pauses == sorted(pauses)
    assert pauses[0] < 1 < LONGEST_RETRY_SECONDS - 1 < pauses[-1]


def test_a_member_of_the_past_is_sent_away():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.ready("node-0-1", 2)
    old = driver.info("node-0-1", 1)
    assert driver.do(events.NodeReady(old, {})) == [Retire(old.member), KillNode(old.member, old.pids)]
    assert driver.exited("node-0-1", 1) == []


def test_a_slow_replacement_does_not_stop_the_rest():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.tick(STEADY_SECONDS)
    driver.do(events.NodeLaunched(member("node-0-1", 2), 99))
    commands = driver.tick(601)
    assert commands[0] == KillNode(member("node-0-1", 2), (99,))
    assert driver.state(0) is PipelineState.SERVING


# ---- engines


def test_a_fresh_engine_attaches_to_the_living_nodes_under_a_higher_epoch():
    driver = Driver().serve()
    driver.exited("node-0-1")
    driver.formed(0, 2)
    driver.do(events.EngineLost(PipelineId(0), 70))
    assert driver.state(0) is PipelineState.STARTING
    driver.ready("node-0-1", 2)
    assert orders(driver.attach(0, pid=80)) == [
        driver.form(0, 3, ["node-0-0", "node-0-1#2"], Cause.ATTACH, released=["node-1-1"])
    ]
    driver.formed(0, 3)
    driver.engine_ready(0)
    assert driver.state(0) is PipelineState.SERVING
    assert len(driver.cluster.recoveries) == 1


def test_a_fresh_engine_borrows_when_its_own_node_is_away():
    driver = Driver().serve()
    driver.do(events.EngineLost(PipelineId(0), 70))
    driver.exited("node-0-1")
    assert orders(driver.attach(0, pid=80)) == [driver.form(0, 2, ["node-0-0", "node-1-1"], Cause.ATTACH)]


def test_an_engine_that_missed_its_order_gets_it_again():
    driver = Driver().serve()
    (form,) = orders(driver.exited("node-0-1"))
    members = (member("node-0-0"), member("node-0-1"))
    assert driver.attach(0, pid=70, epoch=1, members=members) == [form]
    driver.formed(0, 2)
    assert driver.attach(0, pid=70, epoch=2, members=(member("node-0-0"), member("node-1-1"))) == []


def test_epochs_that_nodes_have_seen_are_never_used_again():
    driver = Driver(stages=1, pipelines=1)
    driver.do(events.ClusterBegun())
    driver.ready("node-0-0", epochs={PipelineId(0): Epoch(41)})
    (form,) = orders(driver.attach(0))
    assert form.epoch == 42


def test_complaints_lead_to_another_try_then_to_another_node():
    driver = Driver(stages=1, pipelines=3).serve()
    driver.exited("node-0-0")
    complaint = events.MemberFailed(PipelineId(0), Epoch(2), member("node-1-0"), "refused")
    assert driver.do(complaint) == []
    (form,) = orders(driver.tick(0.2))
    assert form == driver.form(0, 3, ["node-1-0"], Cause.CRASH, lost=[0])
    assert driver.do(complaint) == []
    assert driver.tick(0.2) == []
    driver.do(msgspec.structs.replace(complaint, epoch=Epoch(3)))
    (form,) = orders(driver.tick(0.2))
    assert form == driver.form(0, 4, ["node-2-0"], Cause.CRASH, released=["node-1-0"], lost=[0])


def test_an_own_node_that_cannot_be_used_is_replaced():
    driver = Driver().serve()
    for epoch in (1, 2):
        driver.do(events.MemberFailed(PipelineId(0), Epoch(epoch), member("node-0-1"), "refused"))
        commands = driver.tick(0.2)
    assert commands == [KillNode(member("node-0-1"), (pid_of(member("node-0-1")),))]


# ---- the controller's restart


def restarted(driver: Driver) -> Driver:
    later = Driver(driver.config.stages, driver.config.pipelines, driver.lanes)
    later.now = driver.now + 0.5
    later.do(events.ControllerResumed(driver.cluster.snapshot()))
    return later


def test_a_restarted_controller_lets_pipelines_serve_on():
    driver = restarted(Driver().serve())
    assert driver.cluster.settling(driver.now)
    members = (member("node-0-0"), member("node-0-1"))
    driver.attach(0, pid=70, epoch=1, members=members)
    assert driver.state(0) is PipelineState.STARTING
    driver.ready("node-0-0")
    assert orders(driver.ready("node-0-1")) == []
    assert driver.state(0) is PipelineState.SERVING
    assert driver.cluster.pipelines[0].epoch == 1
    assert not driver.cluster.settling(driver.now)


def test_a_restarted_controller_hears_a_complaint_before_it_knows_all_members():
    driver = restarted(Driver().serve())
    driver.attach(0, pid=70, epoch=1, members=(member("node-0-0"), member("node-0-1")))
    driver.ready("node-0-1")
    assert driver.do(events.MemberFailed(PipelineId(0), Epoch(1), member("node-0-1"), "a step has failed")) == []
    assert orders(driver.ready("node-0-0")) == [driver.form(0, 2, ["node-0-0", "node-0-1"], Cause.CRASH)]


def test_a_restarted_controller_recovers_what_lost_a_node_meanwhile():
    driver = restarted(Driver().serve())
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    driver.attach(0, pid=70, epoch=1, members=(member("node-0-0"), member("node-0-1")))
    driver.exited("node-0-1")
    (form,) = orders(driver.tick(0.2))
    assert form == driver.form(0, 2, ["node-0-0", "node-1-1"], Cause.CRASH, lost=[1])
    driver.formed(0, 2)
    assert driver.cluster.recoveries[-1].state is RecoveryState.DONE


def test_a_node_that_does_not_appear_after_a_restart_is_fenced_and_replaced():
    driver = restarted(Driver().serve())
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        driver.ready(node)
    driver.attach(0, pid=70, epoch=1, members=(member("node-0-0"), member("node-0-1")))
    commands = driver.tick(driver.config.timeouts.engine_lost_after_ms / 1_000 + 0.1)
    assert KillNode(member("node-0-1"), (pid_of(member("node-0-1")),)) in commands
    assert [order.nodes[1].member for order in orders(commands)] == [member("node-1-1")]
    assert StartNode(member("node-0-1", 2), Stage(1)) in driver.tick(1.0)


def test_a_node_that_was_about_to_be_killed_when_the_controller_died_is_killed_by_the_next():
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 3.0))
    later = restarted(driver)
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        later.ready(node)
    later.attach(0, pid=70, epoch=1, members=(member("node-0-0"), member("node-0-1")))
    commands = later.tick(later.config.timeouts.engine_lost_after_ms / 1_000 + 0.1)
    assert KillNode(member("node-0-1"), (pid_of(member("node-0-1")),)) in commands
    assert [order.nodes[1].member for order in orders(commands)] == [member("node-1-1")]


def test_numbers_go_on_after_a_restart_even_when_the_last_order_was_lost():
    driver = Driver().serve()
    driver.exited("node-0-1")
    later = restarted(driver)
    for node in ("node-0-0", "node-1-0", "node-1-1"):
        later.ready(node)
    (form,) = orders(later.attach(0, pid=70, epoch=1, members=(member("node-0-0"), member("node-0-1"))))
    assert form.epoch == 3
    later.formed(0, 3)
    assert [(each.id, each.state) for each in later.cluster.recoveries] == [(1, RecoveryState.DONE)]


# ---- what observers see


def test_the_status_document():
    driver = Driver(stages=1).serve()
    driver.exited("node-0-0")
    driver.now += 0.1
    driver.formed(0, 2)
    driver.report(0, running=2, waiting=1)
    document = status_document(driver.cluster, main_pid=5)
    assert msgspec.json.decode(msgspec.json.encode(document)) == document
    assert document["pipelines"] == [
        {"id": 0, "state": "serving", "epoch": 2, "nodes": ["node-1-0"], "waiting_for": None},
        {"id": 1, "state": "serving", "epoch": 2, "nodes": ["node-1-0"], "waiting_for": None},
    ]
    assert document["engines"][0] == {
        "id": "engine-0", "pid": 70, "pipeline": 0, "state": "ready", "running": 2, "waiting": 1, "kv_blocks": 100,
    }  # fmt: skip
    dead, donor = document["nodes"]
    assert (dead["id"], dead["incarnation"], dead["state"], dead["lanes"]) == ("node-0-0", 1, "dead", [])
    assert (donor["state"], donor["lanes"], donor["pids"]) == ("ready", [0, 1], [donor["pid"]])
    (recovery,) = document["recoveries"]
    assert set(recovery) == {
        "id", "state", "time", "pipeline", "stage", "cause", "from", "to", "requests", "lost_requests",
        "recomputed_tokens", "seconds",
    }  # fmt: skip
    assert list(recovery["seconds"]) == ["detect", "plan", "relink", "restore", "recompute", "reissue", "total"]
    driver.tick(STEADY_SECONDS)
    driver.do(events.NodeLaunched(member("node-0-0", 2), 99))
    starting = status_document(driver.cluster, main_pid=5)["nodes"][0]
    assert (starting["incarnation"], starting["state"], starting["pid"]) == (2, "starting", 99)


def test_retry_after_follows_what_starts_have_taken():
    driver = Driver(stages=1, pipelines=1)
    driver.do(events.ClusterBegun())
    assert driver.cluster.retry_after_seconds(driver.now) == 10
    driver.now += 4
    driver.ready("node-0-0")
    driver.attach(0)
    driver.formed(0, 1)
    driver.engine_ready(0)
    driver.exited("node-0-0")
    assert driver.cluster.retry_after_seconds(driver.now + 1) == 3
    assert driver.cluster.retry_after_seconds(driver.now + 60) == 1


def test_retry_after_counts_the_pause_before_the_next_try():
    driver = Driver(stages=1, pipelines=1).serve(start_seconds=4)
    driver.exited("node-0-0")
    for incarnation in range(2, 10):
        driver.tick(1.0)
        driver.do(events.NodeFailed(member("node-0-0", incarnation), "no"))
        driver.tick(100.0)
    driver.do(events.NodeFailed(member("node-0-0", 10), "no"))
    assert driver.cluster.retry_after_seconds(driver.now) == 64
    assert driver.cluster.retry_after_seconds(driver.now + 50) == 14


# ---- tables


def test_an_illegal_transition_carries_the_story():
    driver = Driver().serve()
    with pytest.raises(IllegalTransition) as caught:
        driver.cluster.step_node(driver.cluster.slots[NodeId("node-0-0")], NodeStep.READY)
    assert "starting -> ready (NodeReady)" in caught.value.story
    with pytest.raises(IllegalTransition):
        next_node_state("node-0-0", NodeState.DEAD, NodeStep.CLEAR, "")


def test_every_state_can_be_left_and_reached():
    for table, steps in ((NODE, NodeStep), (PIPELINE, PipelineStep)):
        assert {state for state, _ in table} == set(table.values())
        assert {step for _, step in table} == set(steps)


# ---- shared KV memory


def test_who_shares_a_node_is_told_at_once_and_gets_its_room_back_when_the_other_is_gone():
    driver = Driver(stages=1).serve()
    driver.exited("node-0-0")
    assert driver.shares == {0: 2, 1: 2}
    driver.formed(0, 2)
    driver.ready("node-0-0", 2)
    driver.report(0)
    assert driver.shares == {0: 1, 1: 2}, "the lane is not known to be given up yet"
    driver.formed(0, 3)
    assert driver.shares == {0: 1, 1: 1}


def test_lanes_without_an_engine_need_no_room_and_are_given_up():
    driver = Driver(stages=1).serve()
    driver.do(events.EngineLost(PipelineId(1), 71))
    (form,) = orders(driver.exited("node-0-0"))
    assert (form.shares, form.orphans) == (1, ((PipelineId(1), Epoch(1)),))
    driver.formed(0, 2)
    driver.attach(1, pid=99)
    assert driver.shares == {0: 2, 1: 2}


def test_who_waits_for_room_goes_on_when_the_engine_that_had_it_ends():
    driver = Driver(stages=1).serve()
    driver.exited("node-0-0")
    (form,) = orders(driver.do(events.EngineLost(PipelineId(1), 71)))
    assert (form.epoch, form.shares) == (3, 1)
    assert [pipeline for pipeline, _ in form.orphans] == [1]


def test_an_engine_that_has_not_spoken_since_the_controllers_restart_keeps_its_lanes():
    driver = restarted(Driver(stages=1).serve())
    driver.ready("node-1-0")
    driver.attach(0, pid=70, epoch=1, members=(member("node-0-0"),))
    driver.exited("node-0-0")
    (form,) = orders(driver.tick(0.2))
    assert (form.shares, form.orphans) == (2, ())
