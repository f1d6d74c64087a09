"""What a loss is held against: what the node was computing, and, if that is not known, what it may have been."""

import pytest

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.suspicion import MAX_POSSIBLE_COST, POSSIBLE_REASON, REASON
from kevlarflow.types import Computing, Loss
from unit.recovery.test_pipeline import A0, A1, B0, B1, admit, executed, go_on, node, prepared, sent, serving

NOTHING = Computing()


def step(sequence, epoch):
    return Computing(0, epoch, sequence)


def ended(commands):
    """Why requests are ended, by request."""
    asides = [each for command in commands if isinstance(command, p.SetAside) for each in command.requests]
    return {each.request: each.reason for each in asides if each.reason}


def in_flight(*requests):
    """A pipeline with one step in flight for each request."""
    pipeline = serving()
    for number, request in enumerate(requests, start=1):
        pipeline.handle(p.StepIssued(admit(number, request, blocks=(2 * number - 1, 2 * number))), 1.0)
    return pipeline


def lose(pipeline, epoch, nodes, **computing):
    """The node of each named stage is lost and has been computing this, and the pipeline is formed with `nodes`."""
    before = {"first": pipeline.members[0], "last": pipeline.members[1]}
    losses = tuple(Loss(before[stage], each) for stage, each in computing.items())
    return pipeline.handle(p.FormationOrdered(epoch, nodes, lost=True, losses=losses), float(epoch))


def test_a_donor_that_dies_between_two_pieces_of_work_ends_nobody():
    pipeline = in_flight("a", "b")
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), last=step(1, 1)))
    again = lose(pipeline, 3, (A0, A1), last=NOTHING)
    assert ended(again) == {}
    assert sent(again) == [1], "they still run one at a time"


def test_a_step_in_which_two_nodes_were_caught_ends_and_no_other():
    pipeline = in_flight("a", "b")
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), last=step(1, 1)))
    again = lose(pipeline, 3, (A0, A1), last=step(1, 2))
    assert ended(again) == {"a": REASON}
    assert 2 in sent(again)


def test_two_steps_that_cost_a_node_each_go_on():
    pipeline = in_flight("a", "b")
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), last=step(1, 1)))
    pipeline.handle(executed(2, 1, a=[7]), 2.1)
    assert ended(lose(pipeline, 3, (A0, A1), last=step(2, 2))) == {}


@pytest.mark.parametrize("first", [NOTHING, None])
def test_a_loss_of_which_nothing_is_known_is_held_against_all_that_was_in_flight(first):
    pipeline = in_flight("a")
    known = {} if first is None else {"last": first}
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), **known))
    assert ended(lose(pipeline, 3, (A0, A1))) == ({"a": REASON} if first is None else {})


def test_a_request_that_was_in_flight_whenever_a_node_died_ends_in_the_end():
    """It may have killed them a moment after they had computed it."""
    pipeline = in_flight("late")
    for loss in range(1, MAX_POSSIBLE_COST):
        commands = lose(pipeline, loss + 1, (A0, (A1, B1)[loss % 2]), last=NOTHING)
        assert ended(commands) == {}
        prepared(pipeline, loss + 1, commands)
    commands = lose(pipeline, MAX_POSSIBLE_COST + 1, (A0, node("node-2-1", 1)), last=NOTHING)
    assert ended(commands) == {"late": POSSIBLE_REASON}


def from_outside(pipeline, epoch, nodes, stage=1):
    """Somebody kills the node of a stage, and the pipeline is formed with `nodes`."""
    loss = Loss(pipeline.members[stage], NOTHING, from_outside=True)
    return pipeline.handle(p.FormationOrdered(epoch, nodes, lost=True, losses=(loss,)), float(epoch))


def test_all_steps_go_out_at_once_after_somebody_has_killed_a_node():
    pipeline = in_flight("a", "b")
    commands = from_outside(pipeline, 2, (A0, B1))
    assert sent(commands) == [1, 2]
    prepared(pipeline, 2, commands)
    # A node that is lost by itself is held against both, as if nobody had been killed before.
    again = lose(pipeline, 3, (A0, A1), last=step(1, 2))
    assert (sent(again), ended(again)) == ([1], {})


def test_they_do_once_its_replicas_are_in_place():
    pipeline = serving()
    pipeline.handle(p.StandbysAssigned((B0, B1)), 0.5)
    pipeline.handle(p.StepIssued(admit(1, "old", blocks=(5, 6))), 0.6)
    pipeline.handle(executed(1, 1, old=[7]), 0.7)
    replica = Replica(5, 1, 3)
    pipeline.handle(p.ReplicasConfirmed(1, A1.member, B1.member, (replica,)), 0.8)
    pipeline.handle(p.StepIssued(admit(2, "a")), 1.0)
    pipeline.handle(p.StepIssued(admit(3, "b", blocks=(3, 4))), 1.0)
    assert sent(from_outside(pipeline, 2, (A0, B1))) == []
    assert sent(pipeline.handle(p.ReplicasPlaced(2, 1, (replica,)), 2.1)) == [2, 3]


def test_no_request_ends_however_many_nodes_somebody_kills():
    pipeline = in_flight("a", "b")
    for epoch in range(2, 3 * MAX_POSSIBLE_COST):
        commands = from_outside(pipeline, epoch, (A0, (A1, B1)[epoch % 2 == 0]))
        assert (ended(commands), sent(commands)) == ({}, [1, 2])
        prepared(pipeline, epoch, commands)


def test_of_two_nodes_that_are_lost_at_once_the_one_counts_that_nobody_has_killed():
    for other in (NOTHING, step(1, 1)):
        pipeline = in_flight("a", "b")
        losses = (Loss(A1.member, NOTHING, from_outside=True), Loss(A0.member, other))
        commands = pipeline.handle(p.FormationOrdered(2, (B0, B1), lost=True, losses=losses), 2.0)
        assert sent(commands) == [1]


def test_a_node_that_dies_of_a_step_while_one_that_somebody_killed_is_replaced_is_held_against_it():
    """It has not taken the order yet, and nobody can read what it was computing."""
    pipeline = in_flight("deadly")
    from_outside(pipeline, 2, (A0, B1))
    prepared(pipeline, 3, lose(pipeline, 3, (B0, B1)))
    assert ended(lose(pipeline, 4, (A0, B1))) == {"deadly": REASON}


def test_who_comes_for_a_node_that_somebody_killed_is_not_taken_for_it():
    pipeline = in_flight("a")
    pipeline.handle(p.FormationOrdered(2, (A0, A1)), 2.0)
    from_outside(pipeline, 3, (A0, B1))
    # The first who comes has run nothing before it is lost as well, whatever the one before it ran.
    prepared(pipeline, 4, lose(pipeline, 4, (A0, A1)))
    assert ended(lose(pipeline, 5, (A0, B1))) == {}


def test_requests_that_wait_for_a_node_that_somebody_killed_are_no_suspects():
    pipeline = in_flight("a", "b")
    loss = Loss(A1.member, NOTHING, from_outside=True)
    pipeline.handle(p.SuspensionOrdered(2, "no node", True, (1,), (loss,)), 2.0)
    prepared(pipeline, 3, pipeline.handle(p.FormationOrdered(3, (A0, B1), lost=True, losses=(loss,)), 3.0))
    for number, request in ((3, "a"), (4, "b")):
        issue = p.StepIssued(admit(number, request, blocks=(2 * number, 2 * number + 1), formation=9))
        assert sent(pipeline.handle(issue, 3.1)) == [number]


def test_progress_in_between_clears_a_request_of_what_it_may_have_cost():
    pipeline = in_flight("r")
    for epoch in range(2, MAX_POSSIBLE_COST + 1):
        prepared(pipeline, epoch, lose(pipeline, epoch, (A0, (A1, B1)[epoch % 2 == 0]), last=NOTHING))
    pipeline.handle(executed(MAX_POSSIBLE_COST, 1), 9.0)
    pipeline.handle(p.StepIssued(go_on(2, formation=99)), 9.1)
    assert ended(lose(pipeline, MAX_POSSIBLE_COST + 1, (A0, node("node-2-1", 1)), last=NOTHING)) == {}


def test_a_loss_that_is_told_of_again_with_the_next_order_counts_once():
    pipeline = in_flight("a")
    first = Loss(A1.member, step(1, 1))
    pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True, losses=(first,)), 2.0)
    second = (first, Loss(B1.member, NOTHING))
    assert ended(pipeline.handle(p.FormationOrdered(3, (A0, A1), lost=True, losses=second), 3.0)) == {}


def test_a_loss_counts_that_is_told_of_in_an_order_for_another_reason():
    """A controller that was started again does not know yet why the pipeline has to be formed anew."""
    pipeline = in_flight("a")
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), last=step(1, 1)))
    told = (Loss(B1.member, step(1, 2)),)
    assert ended(pipeline.handle(p.FormationOrdered(3, (A0, A1), losses=told), 3.0)) == {"a": REASON}


def test_a_node_that_is_replaced_alive_is_held_against_nobody():
    pipeline = in_flight("a")
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), last=step(1, 1)))
    told = (Loss(A1.member, step(1, 1)),)
    assert ended(pipeline.handle(p.FormationOrdered(3, (B0, B1), losses=told), 3.0)) == {}


def test_a_node_that_still_ran_a_step_as_it_was_is_held_against_whom_has_left_it_since():
    """The first node dies of "deadly" while the order to do without the last one is on its way to it."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "big", blocks=range(1, 25), tokens=96)), 1.0)
    pipeline.handle(executed(1, 1, big=[7]), 1.1)
    pipeline.handle(p.StepIssued(admit(2, "deadly", blocks=(30, 31), tokens=5)), 1.2)
    losses = (Loss(A1.member, NOTHING),)
    pipeline.handle(p.FormationOrdered(2, (A0, B1), shares=2, lost=True, losses=losses), 1.3)
    assert pipeline.in_flight == (), "nobody is left in the step"
    prepared(pipeline, 3, pipeline.handle(lost_first(3, step(2, 1)), 1.4))
    pipeline.handle(p.StepIssued(admit(3, "deadly", blocks=(20, 21), tokens=5, formation=9)), 3.1)
    commands = pipeline.handle(p.FormationOrdered(4, (A0, B1), shares=2, lost=True, losses=lost(B0, step(3, 3))), 4.0)
    assert ended(commands) == {"deadly": REASON}


def lost(info, computing):
    return (Loss(info.member, computing),)


def lost_first(epoch, computing):
    return p.FormationOrdered(epoch, (B0, B1), shares=2, lost=True, losses=lost(A0, computing))


def test_nodes_that_die_computing_a_request_again_are_held_against_it():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "deadly")), 1.0)
    pipeline.handle(executed(1, 1, deadly=[7]), 1.1)
    found = []
    computing = NOTHING
    for epoch, donor in ((2, B1), (3, A1), (4, B1)):
        commands = lose(pipeline, epoch, (A0, donor), last=computing)
        found.append(ended(commands))
        pipeline.handle(p.StageJoined(epoch, 1), float(epoch))
        chunks = [command.sequence for command in commands if isinstance(command, p.Recompute)]
        computing = step(-chunks[0], epoch) if chunks else NOTHING
    assert found == [{}, {}, {"deadly": REASON}]


def test_a_donor_that_dies_before_it_has_begun_to_compute_a_request_again_ends_nobody():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    for epoch, donor in ((2, B1), (3, A1), (4, B1)):
        assert ended(lose(pipeline, epoch, (A0, donor), last=NOTHING)) == {}
        pipeline.handle(p.StageJoined(epoch, 1), float(epoch))


def test_requests_that_wait_for_a_node_are_not_blamed_for_a_donor_that_did_something_else():
    pipeline = in_flight("a")
    prepared(pipeline, 2, lose(pipeline, 2, (A0, B1), last=step(1, 1)))
    losses = (Loss(A1.member, step(1, 1)), Loss(B1.member, NOTHING))
    order = p.SuspensionOrdered(3, "no node", waits=True, lost_stages=(1,), losses=losses)
    assert pipeline.handle(order, 3.0)[:2] == [
        p.SetAside((p.Aside("a", "", known=False),), frozenset({1, 2})),
        p.Deliver(1, frozenset("a")),
    ]


def test_a_node_that_dies_of_a_step_while_the_pipeline_waits_for_another_is_held_against_it():
    pipeline = in_flight("deadly")
    pipeline.handle(p.SuspensionOrdered(2, "no node", True, (1,), lost(A1, NOTHING)), 2.0)
    losses = (*lost(A1, NOTHING), *lost(A0, step(1, 1)))
    prepared(pipeline, 3, pipeline.handle(p.FormationOrdered(3, (B0, B1), lost=True, losses=losses), 3.0))
    pipeline.handle(p.StepIssued(admit(2, "deadly", formation=9)), 3.1)
    assert ended(lose(pipeline, 4, (A0, B1), first=step(2, 3))) == {"deadly": REASON}
