"""What a pipeline's core knows of time: since when it waits, and what it has to say again."""

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import Admission, Step, StepResult
from kevlarflow.recovery.recompute import Limits
from kevlarflow.recovery.watched import GIVE_UP_SECONDS, LaneLeft, TimePassed, WatchedPipeline
from kevlarflow.types import Member, NodeInfo


def node(name, stage):
    return NodeInfo(Member(name, 1), stage, "host", 1, (1,), f"ipc://{name}.s", f"ipc://{name}.a", 2, 50)


A0, A1, B1 = node("node-0-0", 0), node("node-0-1", 1), node("node-1-1", 1)


def answer(pipeline, epoch, now):
    commands = []
    for stage in (0, 1):
        commands += pipeline.handle(p.StageJoined(epoch, stage), now)
        commands += pipeline.handle(p.StageRestored(epoch, stage), now)
    return commands


def serving():
    pipeline = WatchedPipeline(Limits(max_batched_tokens=64, max_requests=8, block_size=4, stages=2))
    pipeline.handle(p.FormationOrdered(1, (A0, A1)), 0.0)
    answer(pipeline, 1, 0.0)
    return pipeline


def admit(sequence, request):
    admission = Admission(request, (1, 2, 3), (sequence,), 0, None)
    return p.StepIssued(Step(sequence, (admission,), (), {request: 3}, frozenset(), frozenset(), 1))


def executed(epoch, sequence, request):
    return p.StepExecuted(epoch, sequence, StepResult({request: [7]}, {}))


def test_it_waits_from_the_first_step_that_is_sent_until_the_last_one_is_answered():
    pipeline = serving()
    assert pipeline.still_seconds(5.0) == 0.0
    pipeline.handle(admit(10, "r"), 6.0)
    pipeline.handle(admit(11, "s"), 7.0)
    assert pipeline.still_seconds(8.0) == 2.0
    pipeline.handle(executed(0, 10, "r"), 8.0)
    assert pipeline.still_seconds(8.0) == 2.0, "that is an answer of an old epoch"
    pipeline.handle(executed(1, 10, "r"), 8.5)
    assert pipeline.still_seconds(9.0) == 0.5
    pipeline.handle(executed(1, 11, "s"), 9.0)
    assert pipeline.still_seconds(20.0) == 0.0


def test_an_order_that_comes_again_is_no_answer_while_nodes_are_silent():
    pipeline = serving()
    order = p.FormationOrdered(2, (A0, A1))
    pipeline.handle(order, 3.0)
    pipeline.handle(order, 4.0)
    assert pipeline.standing is Standing.FORMING
    assert pipeline.still_seconds(5.0) == 2.0


def test_an_order_that_comes_again_is_answered_again():
    pipeline = serving()
    order = p.FormationOrdered(2, (A0, A1))
    pipeline.handle(order, 3.0)
    (done,) = [each for each in answer(pipeline, 2, 3.5) if isinstance(each, p.FormationDone)]
    assert pipeline.handle(order, 5.0) == [done]
    assert pipeline.handle(p.FormationOrdered(1, (A0, A1)), 5.0) == []


def test_leave_is_said_until_the_node_has_left():
    pipeline = serving()
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1), released=(A1,)), 3.0)
    assert p.Leave(A1) in commands
    assert pipeline.handle(TimePassed(), 3.9) == []
    assert pipeline.handle(TimePassed(), 4.0) == [p.Leave(A1)]
    assert pipeline.handle(TimePassed(), 4.5) == []
    pipeline.handle(LaneLeft(1, A1.member), 4.6)
    assert pipeline.handle(TimePassed(), 5.0) == [p.Leave(A1)], "that was about an older lane"
    pipeline.handle(LaneLeft(2, A1.member), 5.1)
    assert pipeline.handle(TimePassed(), 7.0) == []


def test_a_node_that_serves_again_is_not_told_to_leave_and_one_that_is_gone_not_for_ever():
    pipeline = serving()
    pipeline.handle(p.FormationOrdered(2, (A0, B1), released=(A1,)), 3.0)
    pipeline.handle(p.FormationOrdered(3, (A0, A1), released=(B1,)), 3.5)
    assert pipeline.handle(TimePassed(), 5.0) == [p.Leave(B1)]
    assert pipeline.handle(TimePassed(), 3.5 + GIVE_UP_SECONDS) == []


def test_after_messages_were_lost_standbys_get_everything_once_more():
    pipeline = serving()
    pipeline.handle(p.StandbysAssigned((None, B1)), 1.0)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1), anew=True), 2.0)
    assert p.AssignStandby(1, B1, anew=True) in commands
    commands = pipeline.handle(p.FormationOrdered(3, (A0, A1)), 3.0)
    assert p.AssignStandby(1, B1, anew=False) in commands
