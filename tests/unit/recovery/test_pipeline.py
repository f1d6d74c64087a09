"""Events in, commands out: what the executor is told to do, in order."""

import pytest

from kevlarflow.errors import IllegalTransition
from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.forming import MAX_FAILURES, Standing
from kevlarflow.recovery.ledger import Admission, Continuation, Step, StepResult
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.recompute import Limits
from kevlarflow.types import Member, NodeInfo

LIMITS = Limits(max_batched_tokens=64, max_requests=8, block_size=4, stages=2)


def node(name, stage, incarnation=1):
    return NodeInfo(Member(name, incarnation), stage, "host", 1, (1,), f"ipc://{name}.s", f"ipc://{name}.a", 2, 50)


A0, A1 = node("node-0-0", 0), node("node-0-1", 1)
B0, B1 = node("node-1-0", 0), node("node-1-1", 1)


def admit(sequence, request="r", formation=1, computed=0, blocks=(1, 2), tokens=3):
    admission = Admission(request, tuple(range(computed + tokens)), tuple(blocks), computed, None)
    return Step(sequence, (admission,), (), {request: tokens}, frozenset(), frozenset(), formation)


def go_on(sequence, request="r", computed=3, formation=1, prompt=3):
    going_on = Continuation(request, False, (), computed, computed - prompt + 1)
    return Step(sequence, (), (going_on,), {request: 1}, frozenset(), frozenset(), formation)


def empty(sequence, *finished):
    return Step(sequence, (), (), {}, frozenset(finished), frozenset(), 1)


def executed(epoch, sequence, **tokens):
    return p.StepExecuted(epoch, sequence, StepResult(tokens or {"r": [7]}, {}))


def serving(nodes=(A0, A1)):
    pipeline = Pipeline(LIMITS)
    pipeline.handle(p.FormationOrdered(1, nodes), 0.0)
    for stage in (0, 1):
        pipeline.handle(p.StageJoined(1, stage), 0.1)
        pipeline.handle(p.StageRestored(1, stage), 0.2)
    assert pipeline.standing is Standing.SERVING
    return pipeline


def heard(pipeline):
    """The node of the last stage, which stays, has opened the lane; it has sampled nothing before."""
    return pipeline.handle(p.StageJoined(pipeline.epoch, 1), 2.0)


def prepared(pipeline, epoch, commands):
    """The nodes have answered all that comes before the steps in flight."""
    commands = list(commands)
    for stage in (0, 1):
        commands += pipeline.handle(p.StageJoined(epoch, stage), 2.0)
    for stage in (0, 1):
        pipeline.handle(p.StageRestored(epoch, stage), 2.0)
    for command in commands:
        if isinstance(command, p.Recompute):
            pipeline.handle(p.ChunkRecomputed(epoch, command.sequence), 2.0)


def sent(commands):
    """Numbers of the steps that are sent, in order."""
    return [command.sequence for command in commands if isinstance(command, p.Execute)]


def ended(commands):
    """Requests that are set aside because they must not run again."""
    asides = [each for command in commands if isinstance(command, p.SetAside) for each in command.requests]
    return [each.request for each in asides if "2 nodes were lost" in each.reason]


def kinds(commands):
    return [type(command).__name__ for command in commands]


def test_forming_joins_and_restores_every_stage():
    pipeline = Pipeline(LIMITS)
    commands = pipeline.handle(p.FormationOrdered(1, (A0, A1)), 0.0)
    assert commands == [p.Join(0), p.Join(1), p.Restore(()), p.EvictPrefixCache()]
    assert pipeline.standing is Standing.FORMING


def test_a_step_goes_out_and_its_result_comes_back():
    pipeline = serving()
    assert sent(pipeline.handle(p.StepIssued(admit(1)), 1.0)) == [1]
    assert pipeline.handle(executed(1, 1), 1.1) == [p.Deliver(1)]
    assert pipeline.ledger["r"].output == [7]


def moving(*steps):
    """A pipeline with steps in flight that was told to move stage 1 to a node that is alive, as the old one is."""
    pipeline = serving()
    for step in steps:
        pipeline.handle(p.StepIssued(step), 1.0)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1), released=(A1,), planned=True), 2.0)
    return pipeline, commands


def test_a_planned_change_waits_for_the_steps_in_flight_and_holds_back_later_ones():
    pipeline, commands = moving(admit(1), admit(2, "s"))
    assert commands == []
    assert pipeline.handle(executed(1, 1), 2.1) == [p.Deliver(1)]
    assert pipeline.handle(p.StepIssued(go_on(3, formation=2)), 2.2) == []
    assert (pipeline.epoch, pipeline.standing) == (1, Standing.SERVING)
    commands = pipeline.handle(executed(1, 2, s=[8]), 2.3)
    assert commands[0] == p.Deliver(2)
    assert kinds(commands[1:]) == [
        "Leave",
        "Join",
        "Join",
        "Recompute",
        "Restore",
        "Execute",
        "EvictPrefixCache",
    ]
    assert sent(commands) == [3]
    assert (pipeline.epoch, pipeline.standing) == (2, Standing.FORMING)


def test_standbys_that_are_named_while_a_planned_change_waits_follow_it():
    pipeline = serving()
    pipeline.handle(p.StandbysAssigned((None, B1)), 0.9)
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    pipeline.handle(p.ReplicasConfirmed(1, A1.member, B1.member, (Replica(1, 1, 3),)), 1.2)
    pipeline.handle(p.StepIssued(go_on(2, formation=2)), 1.3)
    pipeline.handle(p.FormationOrdered(2, (A0, B1), planned=True), 2.0)
    assert pipeline.handle(p.StandbysAssigned((None, A1)), 2.0) == []
    assert pipeline.handle(executed(1, 2), 2.1) == [p.Deliver(2)]
    # The new node is the old standby still, and puts what it has in place.
    assert pipeline.handle(p.ReplicasPlaced(2, 1, (Replica(1, 1, 3),), ahead=True), 2.2) == [p.Flush(1)]
    commands = pipeline.handle(p.StageFlushed(1, 1), 2.3)
    assert p.Place(1, (Replica(1, 1, 3),), ()) in commands
    assert commands[-1] == p.AssignStandby(1, A1)


def test_a_planned_change_of_an_idle_pipeline_happens_at_once():
    pipeline, commands = moving()
    assert kinds(commands) == ["Leave", "Join", "Join", "Restore", "EvictPrefixCache"]
    assert pipeline.epoch == 2


def test_a_loss_replaces_a_planned_change_that_waits():
    pipeline, _ = moving(admit(1))
    pipeline.handle(p.StepIssued(admit(2, "s")), 2.1)
    commands = pipeline.handle(p.FormationOrdered(3, (A0, B1)), 2.2)
    assert sent(commands) == [1, 2]
    assert pipeline.epoch == 3
    # What waited is void: the steps of the new epoch complete and nothing is formed again.
    assert pipeline.handle(executed(3, 1), 2.3) == [p.Deliver(1)]
    assert pipeline.handle(executed(3, 2, s=[8]), 2.4) == [p.Deliver(2)]
    assert pipeline.epoch == 3


def test_a_planned_change_that_comes_twice_happens_once():
    pipeline, _ = moving(admit(1))
    again = p.FormationOrdered(2, (A0, B1), released=(A1,), planned=True)
    assert pipeline.handle(again, 2.1) == []
    assert "Join" in kinds(pipeline.handle(executed(1, 1), 2.2))
    assert pipeline.handle(again, 2.3) == []


def test_a_suspension_replaces_a_planned_change_that_waits():
    pipeline, _ = moving(admit(1))
    commands = pipeline.handle(p.SuspensionOrdered(3, "no node"), 2.1)
    assert kinds(commands) == ["AbandonEverything", "Abandon", "Leave", "Leave"]
    pipeline.handle(p.FormationOrdered(4, (A0, B1)), 2.2)
    assert pipeline.epoch == 4
    assert sent(pipeline.handle(p.StepIssued(admit(2, "s", formation=9)), 2.3)) == [2]


def test_a_loss_recomputes_restores_and_issues_again():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    pipeline.handle(p.StepIssued(go_on(2)), 1.2)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    assert kinds(commands) == ["Leave", "Join", "Join", "Recompute", "Restore", "Execute", "EvictPrefixCache"]
    assert sent(commands) == [2]


def test_the_phases_of_a_recovery_are_measured():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    pipeline.handle(p.StepIssued(go_on(2)), 1.2)
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    for stage in (0, 1):
        pipeline.handle(p.StageJoined(2, stage), 2.1)
    pipeline.handle(p.ChunkRecomputed(2, 1), 2.4)
    for stage in (0, 1):
        pipeline.handle(p.StageRestored(2, stage), 2.5)
    deliver, done = pipeline.handle(executed(2, 2), 2.9)
    assert deliver == p.Deliver(2)
    assert (done.epoch, done.requests, done.recomputed_tokens) == (2, 1, 3)
    seconds = done.seconds
    assert [seconds.relink, seconds.recompute, seconds.restore, seconds.reissue] == pytest.approx([0.1, 0.3, 0.1, 0.4])


def test_answers_of_an_old_epoch_are_not_believed():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    assert pipeline.handle(executed(1, 1), 2.1) == []
    assert pipeline.in_flight == (1,)


def test_an_old_order_is_ignored():
    pipeline = serving()
    assert pipeline.handle(p.FormationOrdered(1, (A0, B1)), 2.0) == []
    assert pipeline.nodes == (A0, A1)


def test_a_loss_while_forming_starts_again_and_forgets_nothing():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    commands = pipeline.handle(p.FormationOrdered(3, (node("node-1-0", 0), B1)), 2.1)
    (chunk,) = [command.chunk for command in commands if isinstance(command, p.Recompute)]
    assert chunk.through == 1, "stage 1 was not complete yet, so it is still lost"


def test_the_same_nodes_again_recompute_nothing():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1)), 2.0)
    assert kinds(commands) == ["Join", "Join", "Restore"]


def test_results_complete_in_order_and_a_step_without_tokens_waits_its_turn():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    assert pipeline.handle(p.StepIssued(empty(2, "z")), 1.0) == [p.Execute(2, has_tokens=False)]
    pipeline.handle(p.StepIssued(admit(3, "b")), 1.0)
    assert pipeline.handle(executed(1, 3, b=[1]), 1.1) == []
    assert pipeline.handle(executed(1, 1, a=[1]), 1.2) == [p.Deliver(1), p.Deliver(2), p.Deliver(3)]


def test_a_step_that_was_scheduled_before_the_loss_has_its_hits_computed():
    pipeline = serving()
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    late = admit(1, formation=1, computed=4)
    assert kinds(pipeline.handle(p.StepIssued(late), 2.1)) == ["Recompute", "Execute"]
    assert kinds(pipeline.handle(p.StepIssued(admit(2, "s", formation=pipeline.formations, computed=4)), 2.2)) == [
        "Execute"
    ]


def test_suspension_abandons_what_is_in_flight_and_what_is_issued_later():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    commands = pipeline.handle(p.SuspensionOrdered(2, "no node"), 2.0)
    # Others may wait for the memory.
    assert commands == [p.AbandonEverything("no node"), p.Abandon(1, "no node"), p.Leave(A0), p.Leave(A1)]
    assert pipeline.handle(p.StepIssued(admit(2)), 2.1) == [p.Abandon(2, "no node")]
    assert len(pipeline.ledger) == 0


def test_a_suspended_pipeline_serves_again_when_it_is_formed():
    pipeline = serving()
    pipeline.handle(p.SuspensionOrdered(2, "no node"), 2.0)
    assert kinds(pipeline.handle(p.FormationOrdered(3, (A0, B1)), 3.0))[-1] == "EvictPrefixCache"
    assert sent(pipeline.handle(p.StepIssued(admit(1, formation=pipeline.formations)), 3.1)) == [1]


def test_a_step_that_raised_ends_its_requests_and_no_others():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(3, 4))), 1.0)
    commands = pipeline.handle(p.StepBroken(1, 1, 0, "boom"), 1.1)
    assert commands == [
        p.SetAside((p.Aside("a", "boom: it is not tried again", known=False),), frozenset({1, 2})),
        p.Deliver(1, frozenset("a")),
        p.RequestFormation(0, "boom"),
    ]
    pipeline.handle(p.FormationOrdered(2, (A0, A1)), 1.2)
    assert sent(heard(pipeline)) == [2]


def test_a_step_that_raises_while_a_move_waits_for_it_does_not_hold_the_move_up():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(3, 4))), 1.0)
    assert pipeline.handle(p.FormationOrdered(2, (A0, B1), planned=True), 1.1) == []
    commands = pipeline.handle(p.StepBroken(1, 1, 0, "boom"), 1.2)
    assert pipeline.epoch == 2
    assert sent(commands) == [2]
    assert "RequestFormation" not in kinds(commands), "the new nodes agree with one another"


def test_a_move_does_not_wait_for_steps_that_nodes_disagree_on():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(3, 4))), 1.0)
    pipeline.handle(p.StepBroken(1, 1, 0, "boom"), 1.1)
    assert sent(pipeline.handle(p.FormationOrdered(2, (A0, B1), planned=True), 1.2)) == [2]


def test_who_counts_on_a_block_of_a_step_that_raised_is_computed_again():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a", blocks=(1, 2))), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(1, 3), computed=4)), 1.0)
    (aside, *_) = pipeline.handle(p.StepBroken(1, 1, 0, "boom"), 1.1)
    assert [(each.request, each.reason) for each in aside.requests] == [("a", "boom: it is not tried again"), ("b", "")]


def test_copies_of_a_step_that_only_some_stages_have_run_are_not_put_in_place():
    pipeline = serving()
    pipeline.handle(p.StandbysAssigned((B0, None)), 1.0)
    pipeline.handle(p.StepIssued(admit(1, "a", blocks=(1,), tokens=4)), 1.0)
    pipeline.handle(p.ReplicasConfirmed(0, A0.member, B0.member, (Replica(1, 1, 4),)), 1.0)
    pipeline.handle(p.StepBroken(1, 1, 1, "boom"), 1.1)
    prepared(pipeline, 2, pipeline.handle(p.FormationOrdered(2, (A0, A1)), 1.2))
    # The scheduler has heard of it and has forgotten the block.
    pipeline.handle(p.StepIssued(Step(2, (), (), {}, frozenset({"a"}), frozenset(), 9)), 2.1)
    commands = pipeline.handle(p.FormationOrdered(3, (B0, A1)), 2.2)
    assert not [each for each in commands if isinstance(each, p.Place)]


def fail_to_prepare(pipeline, times):
    """The `Restore` of each formation raises; returns what the last time leads to."""
    for epoch in range(pipeline.epoch, pipeline.epoch + times):
        commands = pipeline.handle(p.StepBroken(epoch, 0, 0, "boom"), 1.1)
        assert commands[-1] == p.RequestFormation(0, "boom")
        following = pipeline.handle(p.FormationOrdered(epoch + 1, (A0, A1)), 1.2)
        following += heard(pipeline)
    return commands, following


def test_recovery_work_that_raises_once_ends_nobody():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    commands, following = fail_to_prepare(pipeline, MAX_FAILURES)
    assert commands == [p.RequestFormation(0, "boom")]
    assert sent(following) == [1]
    # When it has gone well, it may fail as often again.
    prepared(pipeline, pipeline.epoch, following)
    pipeline.handle(executed(pipeline.epoch, 1, a=[7]), 1.3)
    assert pipeline.standing is Standing.SERVING
    assert fail_to_prepare(pipeline, MAX_FAILURES)[0] == [p.RequestFormation(0, "boom")]


def test_recovery_work_that_raises_wherever_it_is_tried_ends_all():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    commands, following = fail_to_prepare(pipeline, MAX_FAILURES + 1)
    assert commands[:2] == [p.AbandonEverything("boom"), p.Abandon(1, "boom")]
    assert p.EvictPrefixCache() in following


def test_a_step_that_cost_two_nodes_is_not_sent_a_third_time():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a", blocks=(1, 2))), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(3, 4))), 1.0)
    first = pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.1)
    assert sent(first) == [1], "what may be to blame runs alone"
    prepared(pipeline, 2, first)
    second = pipeline.handle(p.FormationOrdered(3, (A0, A1), lost=True), 1.2)
    (aside,) = [each for each in second if isinstance(each, p.SetAside)]
    assert [each.request for each in aside.requests] == ["a"]
    assert "2 nodes were lost" in aside.requests[0].reason
    steps = [(each.sequence, each.has_tokens) for each in second if isinstance(each, p.Execute)]
    assert steps == [(1, False), (2, True)]


def test_a_node_that_dies_before_it_runs_a_step_is_not_held_against_it():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.1)
    third = pipeline.handle(p.FormationOrdered(3, (A0, A1), lost=True), 1.2)
    assert sent(third) == [1]


def test_a_node_that_runs_steps_while_another_still_prepares_is_held_against_them():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.1)
    pipeline.handle(p.StageRestored(2, 0), 1.2)
    assert ended(pipeline.handle(p.FormationOrdered(3, (B0, B1), lost=True), 1.3)) == ["a"]


def test_a_node_that_waits_for_one_before_it_runs_nothing():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.1)
    pipeline.handle(p.StageRestored(2, 1), 1.2)
    assert ended(pipeline.handle(p.FormationOrdered(3, (B0, B1), lost=True), 1.3)) == []


def test_no_step_is_blamed_for_an_order_that_changes_no_node():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(3, 4))), 1.0)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1), lost=True), 1.1)
    prepared(pipeline, 2, commands)
    pipeline.handle(executed(2, 1, a=[7]), 2.1)
    assert ended(pipeline.handle(p.FormationOrdered(3, (A0, A1), lost=True), 2.2)) == []


def test_a_request_that_has_to_give_way_on_the_new_node_stays_suspect():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "big", blocks=range(1, 25), tokens=96)), 1.0)
    pipeline.handle(executed(1, 1, big=[7]), 1.1)
    pipeline.handle(p.StepIssued(admit(2, "deadly", blocks=(30, 31), tokens=5)), 1.2)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1), shares=2, lost=True), 1.3)
    assert p.SetAside((p.Aside("deadly", "", known=False),), frozenset({30, 31})) in commands
    prepared(pipeline, 2, commands)
    # Its first tokens do no harm.
    pipeline.handle(p.StepIssued(admit(3, "deadly", blocks=(24,), formation=9)), 2.1)
    pipeline.handle(executed(2, 3, deadly=[]), 2.2)
    pipeline.handle(p.StepIssued(go_on(4, "big", computed=96, formation=9, prompt=96)), 2.3)
    assert sent(pipeline.handle(p.StepIssued(go_on(5, "deadly", formation=9)), 2.4)) == [], "it runs alone"
    assert sent(pipeline.handle(executed(2, 4, big=[8]), 2.5)) == [5]
    commands = pipeline.handle(p.FormationOrdered(3, (A0, A1), shares=2, lost=True), 2.6)
    assert ended(commands) == ["deadly"]


def test_a_request_that_gave_way_before_the_loss_was_heard_of_is_suspect_as_well():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "big", blocks=range(1, 25), tokens=96)), 1.0)
    pipeline.handle(executed(1, 1, big=[7]), 1.1)
    pipeline.handle(p.StepIssued(admit(2, "deadly", blocks=(30, 31), tokens=5)), 1.2)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1), shares=2), 1.3)
    (aside,) = [each for each in commands if isinstance(each, p.SetAside)]
    assert [each.request for each in aside.requests] == ["deadly"]
    commands = pipeline.handle(p.FormationOrdered(3, (A0, B1), shares=2, lost=True), 1.4)
    assert ended(commands) == []
    prepared(pipeline, 3, commands)
    pipeline.handle(p.StepIssued(admit(3, "deadly", blocks=(24, 25), tokens=5, formation=9)), 2.1)
    commands = pipeline.handle(p.FormationOrdered(4, (A0, A1), shares=2, lost=True), 2.2)
    assert ended(commands) == ["deadly"]


def test_what_ran_before_an_order_that_the_node_has_taken_is_not_to_blame():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "big", blocks=range(1, 25), tokens=96)), 1.0)
    pipeline.handle(executed(1, 1, big=[7]), 1.1)
    pipeline.handle(p.StepIssued(admit(2, "harmless", blocks=(30, 31), tokens=5)), 1.2)
    prepared(pipeline, 2, pipeline.handle(p.FormationOrdered(2, (A0, A1), shares=2), 1.3))
    pipeline.handle(p.FormationOrdered(3, (A0, A1), shares=2), 2.1)
    prepared(pipeline, 4, pipeline.handle(p.FormationOrdered(4, (A0, B1), shares=2, lost=True), 2.2))
    pipeline.handle(p.StepIssued(admit(3, "harmless", blocks=(24, 25), tokens=5, formation=9)), 3.1)
    assert ended(pipeline.handle(p.FormationOrdered(5, (A0, A1), shares=2, lost=True), 3.2)) == []


def test_a_request_that_cost_two_nodes_while_it_was_computed_again_ends():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "deadly")), 1.0)
    pipeline.handle(executed(1, 1, deadly=[7]), 1.1)
    for epoch, donor, doomed in ((2, B1, []), (3, A1, []), (4, B1, ["deadly"])):
        assert ended(pipeline.handle(p.FormationOrdered(epoch, (A0, donor), lost=True), 2.0)) == doomed
        pipeline.handle(p.StageJoined(epoch, 1), 2.1)


def test_a_node_that_is_used_no_more_is_left_though_the_controller_has_forgotten_it():
    pipeline = serving()
    pipeline.handle(p.FormationOrdered(2, (A0, B1), released=(A1,)), 1.0)
    commands = pipeline.handle(p.FormationOrdered(3, (A0, A1)), 1.1)
    assert [each for each in commands if isinstance(each, p.Leave)] == [p.Leave(B1)]


def test_a_loss_that_is_heard_of_after_another_order_is_held_against_what_ran_before():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    first = pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.1)
    prepared(pipeline, 2, first)
    # The second node is dead as well when room is asked for.
    pipeline.handle(p.FormationOrdered(3, (A0, B1), shares=2), 1.2)
    third = pipeline.handle(p.FormationOrdered(4, (A0, A1), lost=True), 1.3)
    (aside,) = [each for each in third if isinstance(each, p.SetAside)]
    assert "2 nodes were lost" in aside.requests[0].reason


def test_two_nodes_that_die_at_once_count_as_one_loss():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.1)
    pipeline.handle(p.FormationOrdered(3, (node("node-1-0", 0), B1), lost=True), 1.1)
    assert sent(heard(pipeline)) == [1]


def test_lanes_that_share_a_node_use_a_part_of_the_blocks():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "old", blocks=range(1, 25), tokens=96)), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "new", blocks=(30, 31))), 1.0)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1), shares=2), 1.1)
    (use,) = [each for each in commands if isinstance(each, p.UseBlocks)]
    assert len(use.usable) == 24
    assert set(range(1, 25)) == use.usable
    (aside,) = [each for each in commands if isinstance(each, p.SetAside)]
    assert aside.requests == (p.Aside("new", "", known=False),)
    assert [each.usable for each in commands if isinstance(each, p.Join)] == [use.usable] * 2
    assert pipeline.handle(p.FormationOrdered(3, (A0, A1)), 1.2)[0] == p.UseBlocks(None)


def test_a_step_that_was_being_scheduled_is_held_against_a_share_that_is_over_again():
    """The scheduler gives up blocks and takes them back one after the other: nobody may hold them in between."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "old", blocks=range(1, 25), tokens=96)), 1.0)
    pipeline.handle(p.FormationOrdered(2, (A0, A1), shares=2), 1.1)
    pipeline.handle(p.FormationOrdered(3, (A0, A1)), 1.2)
    heard(pipeline)
    (aside, *_) = pipeline.handle(p.StepIssued(admit(2, "new", blocks=(30, 31))), 1.3)
    assert aside.requests == (p.Aside("new", "", known=False),)
    later = pipeline.formations
    assert sent(pipeline.handle(p.StepIssued(admit(3, "new", blocks=(30, 31), formation=later)), 1.4)) == [3]


def test_a_step_that_was_scheduled_before_everything_was_abandoned_is_abandoned_too():
    pipeline = serving()
    before = pipeline.formations
    pipeline.handle(p.SuspensionOrdered(2, "no node"), 2.0)
    pipeline.handle(p.FormationOrdered(3, (A0, B1)), 2.1)
    assert pipeline.handle(p.StepIssued(admit(1, formation=before)), 2.2) == [p.Abandon(1, "no node")]
    assert sent(pipeline.handle(p.StepIssued(admit(2, formation=pipeline.formations)), 2.3)) == [2]


def test_released_nodes_are_told():
    pipeline = serving((A0, B1))
    assert p.Leave(B1) in pipeline.handle(p.FormationOrdered(2, (A0, A1), (B1,)), 2.0)


def test_a_step_cannot_be_issued_twice():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    with pytest.raises(IllegalTransition):
        pipeline.handle(p.StepIssued(admit(1)), 1.1)


# ---- replicas


def replicating():
    """Serving one request of 6 tokens in blocks 1 and 2, with B1 as the standby of stage 1."""
    pipeline = serving()
    pipeline.handle(p.StandbysAssigned((None, B1)), 0.5)
    admission = Admission("r", tuple(range(6)), (1, 2), 0, None)
    (execute,) = pipeline.handle(p.StepIssued(Step(1, (admission,), (), {"r": 6}, frozenset(), frozenset(), 1)), 1.0)
    assert execute.writes == (Replica(1, 1, 4), Replica(2, 1, 2))
    pipeline.handle(executed(1, 1), 1.1)
    return pipeline


def confirm(pipeline, *stored, source=A1, standby=B1, dropped=()):
    pipeline.handle(p.ReplicasConfirmed(1, source.member, standby.member, stored, dropped), 1.2)


def test_the_standby_is_told_to_the_node():
    assert serving().handle(p.StandbysAssigned((None, B1)), 0.5) == [p.AssignStandby(0, None), p.AssignStandby(1, B1)]


def test_replicas_are_placed_and_only_the_rest_is_computed():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    assert commands[-1] == p.Place(1, (Replica(1, 1, 4),), ())
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, ()), 2.1)
    (chunk,) = [command.chunk for command in commands if isinstance(command, p.Recompute)]
    assert [(span.start, span.end) for span in chunk.spans] == [(4, 6)]


def test_what_a_standby_has_no_room_for_it_has_no_older_copy_of_either():
    """It had to drop that before, and what it said of it was lost."""
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 3))
    assert pipeline.coverage_of(1)[2] == 3
    confirm(pipeline, dropped=(Replica(1, 1, 4),))
    assert pipeline.coverage_of(1)[2] == 0
    confirm(pipeline, Replica(1, 1, 4), Replica(2, 1, 2))
    confirm(pipeline, dropped=(Replica(2, 1, 1),))
    assert pipeline.coverage_of(1)[2] == 6, "it may have been told late"


def test_what_turns_out_to_be_missing_is_computed():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, (Replica(1, 1, 4),)), 2.1)
    (chunk,) = [command.chunk for command in commands if isinstance(command, p.Recompute)]
    assert chunk.num_tokens == 6


def test_tokens_whose_confirmation_was_on_its_way_are_not_computed():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4), Replica(2, 1, 1))
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    unknown = Replica(3, 1, 4)
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, (), (Replica(2, 1, 2), unknown)), 2.1)
    assert "Recompute" not in kinds(commands)


def test_a_fuller_replica_of_another_content_counts_for_nothing():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4), Replica(2, 1, 1))
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, (), (Replica(2, 7, 2),)), 2.1)
    (chunk,) = [command.chunk for command in commands if isinstance(command, p.Recompute)]
    assert [(span.start, span.end) for span in chunk.spans] == [(4, 6)]


def test_another_node_than_the_standby_has_no_replicas():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    other = node("node-2-1", 1)
    assert "Place" not in kinds(pipeline.handle(p.FormationOrdered(2, (A0, other)), 2.0))


def test_a_replica_of_an_earlier_content_is_not_placed():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 0, 4), Replica(2, 1, 2))
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    assert commands[-1] == p.Place(1, (Replica(2, 1, 2),), ())


def test_a_dropped_replica_does_not_count():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    confirm(pipeline, dropped=(Replica(1, 1, 4),))
    assert "Place" not in kinds(pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0))


def test_confirmations_of_another_source_or_standby_are_not_believed():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4), source=node("node-0-1", 1, incarnation=9))
    confirm(pipeline, Replica(1, 1, 4), standby=node("node-2-1", 1))
    assert pipeline.coverage_of(1) == (B1, 6, 0)


def test_coverage_is_the_watermark_of_live_requests():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4), Replica(2, 1, 1))
    assert pipeline.coverage_of(1) == (B1, 6, 5)


def test_a_new_standby_has_nothing():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    pipeline.handle(p.StandbysAssigned((None, node("node-2-1", 1))), 1.5)
    assert pipeline.coverage_of(1)[2] == 0


def test_replicated_prefixes_of_finished_requests_stay_usable():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    pipeline.handle(p.StepIssued(empty(2, "r")), 1.3)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    assert commands[-1] == p.Place(1, (), (Replica(1, 1, 4),))
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, ()), 2.1)
    assert kinds(commands) == ["Restore", "PlaceRest", "EvictPrefixCache"]
    assert commands[-1].keep == {1}


def test_a_step_that_is_issued_while_replicas_are_awaited_goes_out_behind_them():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    assert pipeline.handle(p.StepIssued(go_on(2, computed=6)), 2.05) == []
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, ()), 2.1)
    assert kinds(commands) == ["Recompute", "Restore", "Execute", "PlaceRest", "EvictPrefixCache"]


def test_nodes_of_an_order_that_waits_do_not_leave_though_all_requests_end_first():
    pipeline = replicating()
    confirm(pipeline, Replica(1, 1, 4))
    for epoch in range(2, 2 + MAX_FAILURES + 1):
        pipeline.handle(p.FormationOrdered(epoch, (A0, B1)), 2.0)
        prepared(pipeline, epoch, pipeline.handle(p.ReplicasPlaced(epoch, 1, ()), 2.1))
        assert pipeline.standing is Standing.SERVING, "kept prefixes may come later"
        if epoch <= MAX_FAILURES + 1:
            pipeline.handle(p.StepBroken(epoch, 0, 1, "boom"), 2.2)
    pipeline.handle(p.StepIssued(go_on(2, computed=6, formation=pipeline.formations)), 2.3)
    pipeline.handle(p.FormationOrdered(epoch + 1, (A0, A1), planned=True), 2.4)
    commands = pipeline.handle(p.StepBroken(epoch, 0, 1, "boom"), 2.5)
    assert p.Abandon(2, "boom") in commands
    # Both would be sent under the new epoch, over two channels.
    assert [command.node for command in commands if isinstance(command, p.Leave)] == [B1]
    assert [command.stage for command in commands if isinstance(command, p.Join)] == [0, 1]


def test_a_block_that_was_taken_in_flight_is_not_said_to_hold_its_content_yet():
    pipeline = replicating()
    pipeline.handle(p.StepIssued(go_on(2, computed=6)), 1.4)
    admission = Admission("s", (7, 8), (2,), 0, None)
    taking = Step(3, (admission,), (), {"s": 2}, frozenset(), frozenset({"r"}), 1)
    pipeline.handle(p.StepIssued(taking), 1.5)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, node("node-2-1", 1))), 2.0)
    (restore,) = [command for command in commands if isinstance(command, p.Restore)]
    assert [replica.block for replica in restore.held] == [1]
