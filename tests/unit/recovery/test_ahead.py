"""A planned change of nodes: what is done before any step waits, and what of it counts."""

import pytest

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.ahead import PREPARE_SECONDS
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.ledger import Admission, Continuation, Step
from kevlarflow.types import Computing, Loss
from unit.recovery.test_pipeline import (
    A0,
    A1,
    B0,
    B1,
    admit,
    confirm,
    executed,
    go_on,
    heard,
    kinds,
    node,
    replicating,
    sent,
    serving,
)
from unit.recovery.test_pipeline import prepared as all_prepared

ORDER = p.FormationOrdered(2, (A0, B1), released=(A1,), planned=True)
KEPT = (Replica(1, 1, 4), Replica(2, 1, 2))


def preparing(*kept):
    """A request of 6 tokens, a step of it in flight, and stage 1 on its way to its standby, which keeps `kept`."""
    pipeline = replicating()
    confirm(pipeline, *kept)
    pipeline.handle(p.StepIssued(go_on(2, computed=6, formation=2, prompt=6)), 1.3)
    return pipeline, pipeline.handle(ORDER, 2.0)


def prepared(pipeline, *missing, fuller=()):
    pipeline.handle(p.StageJoined(2, 1), 2.1)
    return pipeline.handle(p.ReplicasPlaced(2, 1, missing, fuller, ahead=True), 2.1)


def test_a_standby_puts_in_place_what_it_has_while_steps_go_on():
    pipeline, commands = preparing(*KEPT)
    assert commands == [p.Prepare(1, ORDER, KEPT)]
    assert pipeline.handle(executed(1, 2), 2.05) == [p.Deliver(2)]
    assert sent(pipeline.handle(p.StepIssued(go_on(3, computed=7, formation=2, prompt=6)), 2.06)) == [3]
    assert (pipeline.epoch, pipeline.ordered) == (1, (2, (A0, B1)))


def test_steps_are_held_back_once_the_standby_has_what_it_kept():
    pipeline, _ = preparing(*KEPT)
    assert prepared(pipeline) == [p.Flush(1)]
    assert pipeline.handle(executed(1, 2), 2.2) == [p.Deliver(2)]
    assert pipeline.handle(p.StepIssued(go_on(3, computed=7, formation=2, prompt=6)), 2.3) == []


def test_with_everything_in_place_the_nodes_change_without_an_answer_in_between():
    pipeline, _ = preparing(*KEPT)
    prepared(pipeline)
    pipeline.handle(executed(1, 2), 2.2)
    pipeline.handle(p.StepIssued(go_on(3, computed=7, formation=2, prompt=6)), 2.3)
    confirm(pipeline, Replica(2, 1, 3))
    commands = pipeline.handle(p.StageFlushed(1, 1), 2.4)
    # The step in flight has changed the last block: that one alone is placed anew.
    assert p.Place(1, (Replica(2, 1, 3),), ()) in commands
    assert [command.stage for command in commands if isinstance(command, p.Join)] == [0]
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, ()), 2.5)
    assert kinds(commands) == ["Restore", "Execute", "PlaceRest", "EvictPrefixCache"]
    assert sent(commands) == [3]


@pytest.mark.parametrize("last", ["executed", "flushed"])
def test_the_nodes_change_once_the_steps_are_done_and_the_standby_has_been_sent_the_last(last):
    pipeline, _ = preparing(*KEPT)
    prepared(pipeline)
    events = [executed(1, 2), p.StageFlushed(1, 1)]
    first, second = events if last == "flushed" else reversed(events)
    assert "Join" not in kinds(pipeline.handle(first, 2.2))
    assert "Join" in kinds(pipeline.handle(second, 2.3))


def test_an_engine_without_requests_does_not_wait_for_ever_for_an_answer_that_was_lost():
    pipeline, _ = preparing(*KEPT)
    prepared(pipeline)
    pipeline.handle(executed(1, 2), 2.2)
    assert pipeline.handle(ORDER, 2.0 + PREPARE_SECONDS - 0.1) == []
    assert "Join" in kinds(pipeline.handle(ORDER, 2.0 + PREPARE_SECONDS)), "the order has come again"


def test_what_was_not_there_after_all_is_placed_or_computed_later():
    pipeline, _ = preparing(*KEPT)
    prepared(pipeline, Replica(1, 1, 4))
    pipeline.handle(executed(1, 2), 2.2)
    commands = pipeline.handle(p.StageFlushed(1, 1), 2.4)
    assert p.Place(1, (Replica(1, 1, 4),), ()) in commands


def test_a_block_that_was_given_away_meanwhile_is_not_believed():
    pipeline, _ = preparing(*KEPT)
    pipeline.handle(executed(1, 2), 2.05)
    # Another request has taken block 1 since; what was put there ahead is of the first.
    admission = Admission("s", tuple(range(4)), (1,), 0, None)
    taking = Step(3, (admission,), (), {"s": 4}, frozenset({"r"}), frozenset(), 2)
    assert sent(pipeline.handle(p.StepIssued(taking), 2.06)) == [3]
    prepared(pipeline)
    pipeline.handle(executed(1, 3, s=[8]), 2.2)
    commands = pipeline.handle(p.StageFlushed(1, 1), 2.3)
    (chunk,) = [command.chunk for command in commands if isinstance(command, p.Recompute)]
    assert ("s", 0, 4) in [(span.request, span.start, span.end) for span in chunk.spans]


def test_nor_is_its_replica_asked_for_when_the_node_is_lost():
    pipeline = replicating()
    confirm(pipeline, *KEPT)
    admission = Admission("s", tuple(range(4)), (1,), 0, None)
    pipeline.handle(p.StepIssued(Step(2, (admission,), (), {"s": 4}, frozenset({"r"}), frozenset(), 2)), 1.3)
    pipeline.handle(executed(1, 2, s=[8]), 1.4)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 2.0)
    assert not [each for each in commands if isinstance(each, p.Place)], (
        "block 1 is of another request, block 2 of none"
    )


def test_a_loss_replaces_what_was_prepared_and_the_lane_is_left_again():
    pipeline, _ = preparing(*KEPT)
    commands = pipeline.handle(p.FormationOrdered(3, (A0, A1)), 2.1)
    assert p.Leave(B1) in commands
    assert sent(heard(pipeline)) == [2]


def test_a_node_that_cannot_prepare_is_reported_while_steps_go_on():
    pipeline, _ = preparing(*KEPT)
    broken = pipeline.handle(p.StepBroken(2, 0, 1, "no memory"), 2.1)
    assert broken == [p.RequestFormation(1, "no memory")]
    assert pipeline.handle(executed(1, 2), 2.2) == [p.Deliver(2)]


def test_a_node_that_will_share_its_memory_is_not_prepared():
    pipeline = replicating()
    confirm(pipeline, *KEPT)
    pipeline.handle(p.StepIssued(go_on(2, computed=6, formation=2, prompt=6)), 1.3)
    order = p.FormationOrdered(2, (A0, B1), planned=True, shares=2)
    assert pipeline.handle(order, 2.0) == [p.Flush(1)]


def test_a_node_that_is_not_the_standby_is_neither_prepared_nor_flushed_to():
    pipeline = replicating()
    pipeline.handle(p.StepIssued(go_on(2, computed=6, formation=2, prompt=6)), 1.3)
    assert pipeline.handle(p.FormationOrdered(2, (A0, node("node-2-1", 1)), planned=True), 2.0) == []
    assert "Join" in kinds(pipeline.handle(executed(1, 2), 2.1))


def test_a_step_that_fails_meanwhile_changes_the_nodes_at_once():
    pipeline, _ = preparing(*KEPT)
    commands = pipeline.handle(p.StepBroken(1, 2, 0, "it raised"), 2.1)
    # The lane was opened on the new node already, under the same epoch.
    assert [command.stage for command in commands if isinstance(command, p.Join)] == [0]
    assert pipeline.handle(p.ReplicasPlaced(2, 1, (), ahead=True), 2.2) == []


def test_no_step_goes_out_under_the_next_epoch_before_what_it_needs():
    """A step that waits behind a suspect one may go when that has raised; but then the nodes change."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "innocent", blocks=(1,))), 1.0)
    pipeline.handle(executed(1, 1, innocent=[7]), 1.0)
    first = Admission("suspect", tuple(range(8)), (2, 3), 0, None)
    pipeline.handle(p.StepIssued(Step(2, (first,), (), {"suspect": 4}, frozenset(), frozenset(), 1)), 1.0)
    pipeline.handle(p.StepIssued(chunk_of("suspect", 3)), 1.0)
    pipeline.handle(p.StandbysAssigned((None, B1)), 1.1)
    loss = Loss(A0.member, Computing(0, 1, 2))
    commands = pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True, losses=(loss,)), 1.5)
    all_prepared(pipeline, 2, commands)
    pipeline.handle(executed(2, 2, suspect=[]), 2.1)
    waits = go_on(4, "innocent", formation=pipeline.formations)
    assert sent(pipeline.handle(p.StepIssued(waits), 2.2)) == []
    pipeline.handle(p.FormationOrdered(3, (B0, B1), released=(A1,), planned=True), 2.3)
    commands = pipeline.handle(p.StepBroken(2, 3, 0, "boom"), 2.4)
    assert pipeline.epoch == 3
    assert sent(commands) == [4]
    assert kinds(commands).index("Restore") < kinds(commands).index("Execute")


def chunk_of(request, sequence):
    return Step(sequence, (), (Continuation(request, False, (), 4, 0),), {request: 4}, frozenset(), frozenset(), 1)
