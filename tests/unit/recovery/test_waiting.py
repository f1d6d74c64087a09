"""The pipeline's core while a stage has no node: requests are kept, and nothing is in flight."""

from __future__ import annotations

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import Continuation, Step
from unit.recovery.test_pipeline import A0, B1, admit, empty, executed, go_on, kinds, node, prepared, sent, serving

C1 = node("node-0-1", 1, incarnation=2)


def resume(sequence, request="r", tokens=4, formation=9):
    """A request that was preempted, as vLLM schedules it again: from its first token."""
    again = Continuation(request, True, (5, 6), 0, 1)
    return Step(sequence, (), (again,), {request: tokens}, frozenset(), frozenset(), formation)


def decoding():
    """A pipeline with one request that has a token, and a step for the next in flight."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    pipeline.handle(p.StepIssued(go_on(2)), 1.2)
    return pipeline


def waiting(pipeline, epoch=2):
    return pipeline.handle(p.SuspensionOrdered(epoch, "no node", waits=True, lost_stages=(1,)), 2.0)


def test_what_is_in_flight_is_over_without_tokens_and_the_ledger_stays():
    pipeline = decoding()
    commands = waiting(pipeline)
    # What the nodes hold is of no use, and others may wait for the memory.
    left = [p.Leave(each) for each in pipeline.nodes]
    over = [p.SetAside((p.Aside("r", "", known=True),), frozenset({1})), p.Deliver(2, frozenset("r"))]
    assert commands == [*over, *left]
    assert (pipeline.standing, pipeline.in_flight) == (Standing.WAITING, ())
    assert pipeline.ledger["r"].output == [7]
    assert pipeline.ledger["r"].blocks == []
    # What still comes from nodes that are alive is of an old epoch.
    assert pipeline.handle(executed(1, 2), 2.1) == []


def test_requests_go_on_from_the_ledger_when_the_pipeline_is_formed():
    pipeline = decoding()
    waiting(pipeline)
    commands = pipeline.handle(p.FormationOrdered(3, (A0, C1), lost=True), 9.0)
    assert kinds(commands) == ["Leave", "Join", "Join", "Restore", "EvictPrefixCache"]
    (restore,) = [each for each in commands if isinstance(each, p.Restore)]
    assert [(entry.request, entry.output, entry.computed) for entry in restore.entries] == [("r", [7], 0)]
    prepared(pipeline, 3, commands)
    assert pipeline.standing is Standing.SERVING
    assert sent(pipeline.handle(p.StepIssued(resume(3)), 9.1)) == [3]
    pipeline.handle(executed(3, 3, r=[8]), 9.2)
    assert pipeline.ledger["r"].output == [7, 8]


def test_a_step_that_was_being_scheduled_gives_no_tokens_and_goes_nowhere():
    pipeline = decoding()
    waiting(pipeline)
    commands = pipeline.handle(p.StepIssued(admit(3, "s", blocks=(3, 4))), 2.1)
    assert p.Aside("s", "", known=False) in commands[0].requests
    assert commands[1:] == [p.Deliver(3, frozenset("s"))]
    assert "s" not in pipeline.ledger


def test_a_request_that_is_cancelled_meanwhile_is_forgotten():
    pipeline = decoding()
    waiting(pipeline)
    assert p.Deliver(3) in pipeline.handle(p.StepIssued(empty(3, "r")), 2.1)
    assert len(pipeline.ledger) == 0


def test_when_the_bound_passes_everything_is_abandoned():
    pipeline = decoding()
    waiting(pipeline)
    assert pipeline.handle(p.SuspensionOrdered(3, "too late"), 47.0)[0] == p.AbandonEverything("too late")
    assert pipeline.handle(p.StepIssued(admit(4, formation=9)), 47.1) == [p.Abandon(4, "too late")]
    assert len(pipeline.ledger) == 0


def test_an_order_to_wait_that_is_older_than_what_serves_is_ignored():
    pipeline = decoding()
    pipeline.handle(p.FormationOrdered(3, (A0, B1)), 2.0)
    assert waiting(pipeline, epoch=2) == []
    assert pipeline.standing is Standing.FORMING


def test_a_planned_change_is_given_up():
    pipeline = decoding()
    pipeline.handle(p.FormationOrdered(2, (A0, B1), planned=True), 1.5)
    waiting(pipeline, epoch=3)
    assert pipeline.in_flight == ()
    assert pipeline.epoch == 3


def formed_again(pipeline, epoch, incarnation):
    commands = pipeline.handle(
        p.FormationOrdered(epoch, (A0, node("node-0-1", 1, incarnation)), lost=True), float(epoch)
    )
    prepared(pipeline, epoch, commands)


def test_a_request_that_costs_its_stage_every_node_ends_with_the_second():
    pipeline = decoding()
    waiting(pipeline)
    formed_again(pipeline, 3, incarnation=2)
    # A chunk of its prompt proves nothing.
    pipeline.handle(p.StepIssued(resume(3, tokens=2)), 3.1)
    pipeline.handle(executed(3, 3, r=[]), 3.2)
    pipeline.handle(p.StepIssued(go_on(4, computed=2, formation=9)), 3.3)
    aside = waiting(pipeline, epoch=4)[0].requests
    assert [(each.request, "2 nodes were lost" in each.reason) for each in aside] == [("r", True)]


def test_a_request_that_has_a_token_since_is_not_to_blame():
    pipeline = decoding()
    waiting(pipeline)
    formed_again(pipeline, 3, incarnation=2)
    pipeline.handle(p.StepIssued(resume(3)), 3.1)
    pipeline.handle(executed(3, 3, r=[8]), 3.2)
    pipeline.handle(p.StepIssued(go_on(4, computed=4, formation=9)), 3.3)
    assert waiting(pipeline, epoch=4)[0].requests == (p.Aside("r", "", known=True),)


def test_a_replacement_that_dies_before_it_has_run_anything_blames_nobody():
    pipeline = decoding()
    waiting(pipeline)
    pipeline.handle(p.FormationOrdered(3, (A0, C1), lost=True), 3.0)
    assert waiting(pipeline, epoch=4) == [p.Leave(A0), p.Leave(C1)]
    formed_again(pipeline, 5, incarnation=3)
    assert sent(pipeline.handle(p.StepIssued(resume(3)), 5.1)) == [3]
