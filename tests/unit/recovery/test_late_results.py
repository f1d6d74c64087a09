"""Another stage is lost while the last one samples: what it has sampled counts, once, for what is still in flight."""

from __future__ import annotations

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.ledger import Admission, Continuation, Step, StepResult
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.suspicion import MAX_POSSIBLE_COST
from kevlarflow.types import Computing, Loss
from unit.recovery.test_pipeline import (
    A0,
    A1,
    B0,
    B1,
    admit,
    executed,
    go_on,
    kinds,
    node,
    prepared,
    sent,
    serving,
)


def two_in_flight() -> Pipeline:
    """Steps 1 and 2, of a request each, have been sent in epoch 1."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a", blocks=(1, 2))), 1.0)
    pipeline.handle(p.StepIssued(admit(2, "b", blocks=(3, 4))), 1.0)
    return pipeline


def joined(pipeline, epoch, *, of=1, **results):
    """The last stage has opened the lane, and says along what it sampled for these requests in epoch `of`."""
    numbers = {"a": 1, "b": 2}
    told = {(of, numbers[request]): StepResult({request: [token]}, {}) for request, token in results.items()}
    return pipeline.handle(p.StageJoined(epoch, 1, told), 2.0)


def test_a_step_that_was_sampled_meanwhile_is_over_and_does_not_come_again():
    pipeline = two_in_flight()
    commands = pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.5)
    assert "Restore" not in kinds(commands), "the last stage may have more to say"
    commands = joined(pipeline, 2, a=7)
    assert commands[0] == p.Deliver(1)
    assert sent(commands) == [2]
    (restore,) = [each for each in commands if isinstance(each, p.Restore)]
    assert [(each.request, each.output) for each in restore.entries] == [("a", [7])]
    # The new node of stage 0 has nothing of it.
    (chunk,) = [each.chunk for each in commands if isinstance(each, p.Recompute)]
    assert [(span.request, span.start, span.end) for span in chunk.spans] == [("a", 0, restore.entries[0].computed)]


def test_it_is_said_once():
    pipeline = two_in_flight()
    pipeline.handle(p.FormationOrdered(2, (B0, A1)), 1.5)
    joined(pipeline, 2, a=7)
    assert joined(pipeline, 2, a=7, b=8) == []
    assert pipeline.in_flight == (2,)


def test_replicas_may_be_in_place_before_or_after():
    for placed_first in (True, False):
        pipeline = two_in_flight()
        pipeline.handle(executed(1, 1, a=[7]), 1.1)
        pipeline.handle(p.StandbysAssigned((B0, None)), 1.2)
        pipeline.handle(p.ReplicasConfirmed(0, A0.member, B0.member, (Replica(1, 1, 3),)), 1.3)
        commands = pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.5)
        assert "Place" in kinds(commands)
        if placed_first:
            assert pipeline.handle(p.ReplicasPlaced(2, 0, ()), 2.0) == []
            commands = joined(pipeline, 2, b=8)
        else:
            assert kinds(joined(pipeline, 2, b=8)) == ["Deliver"]
            commands = pipeline.handle(p.ReplicasPlaced(2, 0, ()), 2.0)
        assert "Restore" in kinds(commands)
        assert pipeline.in_flight == ()


def test_what_was_sampled_in_an_epoch_before_that_is_not_believed():
    pipeline = two_in_flight()
    pipeline.handle(p.FormationOrdered(2, (A0, A1)), 1.5)
    joined(pipeline, 2)
    pipeline.handle(p.FormationOrdered(3, (B0, A1)), 1.6)
    # Whoever serves stage 0 since epoch 2 need not have run it.
    assert sent(joined(pipeline, 3, a=7)) == [1, 2]


def test_it_still_counts_if_another_order_comes_before_it_is_heard():
    pipeline = two_in_flight()
    pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.5)
    pipeline.handle(p.FormationOrdered(3, (A0, A1), lost=True), 1.6)
    assert p.Deliver(1) in joined(pipeline, 3, a=7)


def test_a_step_counts_only_behind_those_that_count():
    pipeline = two_in_flight()
    pipeline.handle(p.FormationOrdered(2, (B0, A1)), 1.5)
    assert sent(joined(pipeline, 2, b=8)) == [1, 2]


def test_a_step_that_has_lost_a_request_comes_again():
    pipeline = serving()
    both = admit(1, "big", blocks=range(1, 25), tokens=96)
    new = admit(1, "new", blocks=(30, 31))
    step = p.StepIssued(type(both)(1, both.admissions + new.admissions, (), {**both.scheduled, **new.scheduled},
                                   frozenset(), frozenset(), 1))  # fmt: skip
    pipeline.handle(step, 1.0)
    pipeline.handle(p.FormationOrdered(2, (B0, A1), shares=2, lost=True), 1.5)
    told = {(1, 1): StepResult({"big": [7], "new": [8]}, {})}
    assert sent(pipeline.handle(p.StageJoined(2, 1, told), 2.0)) == [1]


def test_a_step_that_has_lost_everybody_is_over_without_what_it_had_sampled():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "big", blocks=range(1, 31), tokens=120)), 1.0)
    pipeline.handle(p.FormationOrdered(2, (B0, A1), shares=2, lost=True), 1.5)
    told = {(1, 1): StepResult({"big": [7]}, {"big": b"state"}, output="what vLLM would be given")}
    assert p.Deliver(1, frozenset({"big"}), output=None) in pipeline.handle(p.StageJoined(2, 1, told), 2.0)
    assert "big" not in pipeline.ledger


def test_what_was_believed_is_delivered():
    pipeline = two_in_flight()
    pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.5)
    told = {(1, 1): StepResult({"a": [7]}, {}, output="of the old epoch")}
    assert p.Deliver(1, output="of the old epoch") in pipeline.handle(p.StageJoined(2, 1, told), 2.0)


def test_a_new_node_of_the_last_stage_is_not_waited_for():
    pipeline = two_in_flight()
    assert sent(pipeline.handle(p.FormationOrdered(2, (A0, B1)), 1.5)) == [1, 2]


def test_nor_is_one_that_was_sent_nothing():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "a")), 1.0)
    pipeline.handle(executed(1, 1, a=[7]), 1.1)
    assert "Restore" in kinds(pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.5))


def test_a_step_that_is_issued_meanwhile_goes_out_with_the_others():
    pipeline = two_in_flight()
    pipeline.handle(p.FormationOrdered(2, (B0, A1)), 1.5)
    assert pipeline.handle(p.StepIssued(admit(3, "c", blocks=(5, 6), formation=pipeline.formations)), 1.6) == []
    assert sent(joined(pipeline, 2, a=7)) == [2, 3]


# ---- what it changes for the rest of a recovery


def chunk(sequence, computed, *blocks, tokens=4):
    going_on = Continuation("r", False, blocks, computed, 0)
    return Step(sequence, (), (going_on,), {"r": tokens}, frozenset(), frozenset(), 1)


def prompt_in_chunks(*chunks):
    """Its first chunk is done; stage 0 has run `chunks` as well, and its standby has blocks 1 and 2."""
    pipeline = serving()
    first = Admission("r", tuple(range(40)), (1,), 0, None)
    pipeline.handle(p.StepIssued(Step(1, (first,), (), {"r": 4}, frozenset(), frozenset(), 1)), 1.0)
    pipeline.handle(executed(1, 1, r=[]), 1.1)
    pipeline.handle(p.StandbysAssigned((B0, None)), 1.2)
    for each in chunks:
        pipeline.handle(p.StepIssued(each), 1.3)
    copies = (Replica(1, 1, 4), Replica(2, 2, 4))
    pipeline.handle(p.ReplicasConfirmed(0, A0.member, B0.member, copies), 1.4)
    return pipeline


def recover(pipeline):
    """Stage 0 is lost, the last one has sampled step 2; returns which blocks come last, and what is done before."""
    commands = pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 1.5)
    (place,) = [each for each in commands if isinstance(each, p.Place)]
    assert pipeline.handle(p.StageJoined(2, 1, {(1, 2): StepResult({"r": []}, {})}), 1.6) == [p.Deliver(2)]
    commands = pipeline.handle(p.ReplicasPlaced(2, 0, ()), 1.7)
    return {each.block for each in place.later}, commands[: kinds(commands).index("PlaceRest")]


def test_what_it_has_made_part_of_a_request_is_in_place_before_a_step_reads_it():
    later, first = recover(prompt_in_chunks(chunk(2, 4, 2), chunk(3, 8, 9)))
    assert sent(first) == [3]
    assert 2 not in later


def test_and_before_it_is_read_to_compute_what_has_no_replica():
    later, first = recover(prompt_in_chunks(chunk(2, 4, 2, 3, tokens=8)))
    (computed,) = [each.chunk.spans for each in first if isinstance(each, p.Recompute)]
    assert [(span.start, span.end) for span in computed] == [(8, 12)]
    assert 2 not in later


def test_a_request_that_kills_its_node_a_moment_after_each_step_costs_no_more_for_it():
    """What was sampled in time is delivered, but it clears nobody."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "r")), 1.0)
    dead = A0
    for number in range(1, MAX_POSSIBLE_COST + 1):
        donor, loss = node(f"node-{number}-0", 0), Loss(dead.member, Computing())
        commands = pipeline.handle(p.FormationOrdered(number + 1, (donor, A1), lost=True, losses=(loss,)), 2.0)
        if number == MAX_POSSIBLE_COST:
            break
        told = {(number, number): StepResult({"r": [7]}, {})}
        commands = [*commands, *pipeline.handle(p.StageJoined(number + 1, 1, told), 2.1)]
        assert p.Deliver(number) in commands
        prepared(pipeline, number + 1, commands)
        pipeline.handle(p.StepIssued(go_on(number + 1, "r", computed=2 + number, formation=99)), 2.2)
        dead = donor
    (aside,) = [each for command in commands if isinstance(command, p.SetAside) for each in command.requests]
    assert (aside.request, bool(aside.reason)) == ("r", True)
