"""Another order comes while a new node puts replicas in place: what it kept, and what it has in place, still counts."""

from __future__ import annotations

import pytest

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from unit.recovery.test_pipeline import A0, A1, B0, B1, confirm, node, replicating

C0, C1 = node("node-2-0", 0), node("node-2-1", 1)
KEPT = (Replica(1, 1, 4), Replica(2, 1, 2))
"""All of the request's 6 tokens."""


def losing_stage_1():
    """B1 keeps everything and takes over; at once, C1 is to be the next standby."""
    pipeline = replicating()
    confirm(pipeline, *KEPT)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 2.0)
    assert p.Place(1, KEPT, ()) in commands
    pipeline.handle(p.StandbysAssigned((None, C1)), 2.01)
    return pipeline


def computed(commands):
    """(request, from, to) of what is computed again."""
    chunks = [each.chunk for each in commands if isinstance(each, p.Recompute)]
    return [(span.request, span.start, span.end) for chunk in chunks for span in chunk.spans]


@pytest.mark.parametrize("order", [(B0, B1), (A0, B1)], ids=["another stage is lost", "it is formed again"])
def test_what_it_kept_is_asked_for_again_if_it_had_not_come_to_that(order):
    pipeline = losing_stage_1()
    commands = pipeline.handle(p.FormationOrdered(3, order, lost=order[0] is B0), 2.1)
    places = [each for each in commands if isinstance(each, p.Place)]
    if order[0] is B0:
        assert places == [], "nobody keeps anything of stage 0, so all is computed again"
    else:
        assert places == [p.Place(1, KEPT, ())]
        assert computed(pipeline.handle(p.ReplicasPlaced(3, 1, ()), 2.2)) == []


def test_what_is_in_place_is_not_put_there_again():
    pipeline = losing_stage_1()
    pipeline.handle(p.ReplicasPlaced(2, 1, (KEPT[1],)), 2.05)
    commands = pipeline.handle(p.FormationOrdered(3, (A0, B1)), 2.1)
    assert not [each for each in commands if isinstance(each, p.Place)]
    assert computed(commands) == [("r", 4, 6)], "the second block was not there"


def test_two_stages_that_are_lost_one_after_the_other_come_back_from_their_standbys():
    pipeline = replicating()
    pipeline.handle(p.StandbysAssigned((B0, B1)), 1.15)
    confirm(pipeline, *KEPT)
    pipeline.handle(p.ReplicasConfirmed(0, A0.member, B0.member, KEPT), 1.3)
    pipeline.handle(p.FormationOrdered(2, (B0, A1), lost=True), 2.0)
    pipeline.handle(p.StandbysAssigned((C0, B1)), 2.01)
    commands = pipeline.handle(p.FormationOrdered(3, (B0, B1), lost=True), 2.1)
    assert [each for each in commands if isinstance(each, p.Place)] == [p.Place(0, KEPT, ()), p.Place(1, KEPT, ())]
    commands = pipeline.handle(p.ReplicasPlaced(3, 0, ()), 2.2) + pipeline.handle(p.ReplicasPlaced(3, 1, ()), 2.3)
    assert computed(commands) == []
    assert [each.request for command in commands if isinstance(command, p.Restore) for each in command.entries] == ["r"]


def test_what_another_node_kept_that_was_the_standby_before_is_not_asked_of_this_one():
    pipeline = losing_stage_1()
    commands = pipeline.handle(p.FormationOrdered(3, (A0, A1), lost=True), 2.1)
    assert not [each for each in commands if isinstance(each, p.Place)]
    assert computed(commands) == [("r", 0, 6)]
