"""A step that is scheduled while a stage is lost hits a cached block: the new node computes it, or is not whole."""

from __future__ import annotations

import pytest

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.ledger import Admission, Step
from unit.recovery.test_pipeline import A0, A1, B1, admit, empty, executed, node, prepared, sent, serving

C0 = node("node-2-0", 0)
CACHED = 5


def with_a_prefix_and_a_step():
    """A block is cached that nobody holds any more, and a step is in flight."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, "first", blocks=(CACHED,), tokens=4)), 1.0)
    pipeline.handle(executed(1, 1, first=[7]), 1.0)
    pipeline.handle(p.StepIssued(empty(2, "first")), 1.0)
    pipeline.handle(p.StepIssued(admit(3, "r", blocks=(1, 2))), 1.0)
    return pipeline


def race():
    """Stage 1 was lost while step 4 was scheduled, which hits a block that nobody holds; returns what was due at once.

    The steps are suspect and go out one at a time: neither step 4 nor the chunk for it is among that.
    """
    pipeline = with_a_prefix_and_a_step()
    before = pipeline.formations
    commands = pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.5)
    hits = admit(4, "second", formation=before, computed=4, blocks=(CACHED, 6))
    assert pipeline.handle(p.StepIssued(hits), 1.6) == []
    return pipeline, commands


def hit_in_the_race():
    """The step has its turn; returns the chunk, right before it: it takes blocks that earlier ones may have to read."""
    pipeline, commands = race()
    prepared(pipeline, 2, commands)
    _, chunk, step, *_ = pipeline.handle(executed(2, 3, r=[8]), 2.0)
    assert isinstance(chunk, p.Recompute)
    assert sent([step]) == [4]
    return pipeline, chunk


def issued_while_the_next_forming_waits(order):
    """Step 4 was scheduled before stage 1 was lost, and a whole forming has passed; returns what was due at once."""
    pipeline = with_a_prefix_and_a_step()
    before = pipeline.formations
    prepared(pipeline, 2, pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.5))
    pipeline.handle(order, 2.1)
    hits = admit(4, "second", formation=before, computed=4, blocks=(CACHED, 6))
    return pipeline, pipeline.handle(p.StepIssued(hits), 2.15)


def computed_on_stage_1(commands):
    """Blocks that are computed there."""
    chunks = [each.chunk for each in commands if isinstance(each, p.Recompute)]
    return {block for chunk in chunks if chunk.through == 1 for span in chunk.spans for block in span.blocks}


ORDERS = [
    pytest.param(p.FormationOrdered(3, (C0, B1), lost=True), id="another stage is lost"),
    pytest.param(p.FormationOrdered(3, (A0, B1), anew=True), id="a connection breaks"),
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_chunk_that_is_forgotten_by_the_next_forming_is_computed_again(order):
    pipeline, _ = hit_in_the_race()
    commands = pipeline.handle(order, 2.1)
    commands += pipeline.handle(p.StageJoined(3, 1), 2.2)
    assert CACHED in computed_on_stage_1(commands)
    assert sent(commands) == [4]


@pytest.mark.parametrize("order", ORDERS)
def test_one_that_was_done_is_not(order):
    pipeline, chunk = hit_in_the_race()
    pipeline.handle(p.ChunkRecomputed(2, chunk.sequence), 2.05)
    commands = pipeline.handle(order, 2.1)
    commands += pipeline.handle(p.StageJoined(3, 1), 2.2)
    assert computed_on_stage_1(commands) == set()
    assert sent(commands) == [4]


def test_a_stage_is_not_whole_either_while_the_chunk_waits_for_its_turn():
    pipeline, commands = race()
    prepared(pipeline, 2, commands)
    commands = pipeline.handle(p.FormationOrdered(3, (C0, B1), lost=True), 2.1)
    commands += pipeline.handle(p.StageJoined(3, 1), 2.2)
    assert CACHED in computed_on_stage_1(commands)


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_that_is_issued_while_the_next_forming_waits_has_its_hits_computed(order):
    pipeline, waiting = issued_while_the_next_forming_waits(order)
    assert sent(waiting) == [], "the last stage has yet to say what it has sampled"
    commands = pipeline.handle(p.StageJoined(3, 1), 2.2)
    commands += [each for stage in (0, 1) for each in pipeline.handle(p.StageRestored(3, stage), 2.3)]
    # Steps that may have cost a node go out one at a time.
    commands += pipeline.handle(executed(3, 3, r=[8]), 2.4)
    assert CACHED in computed_on_stage_1(commands)
    assert sent(commands)[-1] == 4


@pytest.mark.parametrize("order", ORDERS)
def test_a_stage_is_not_whole_while_a_step_that_hits_what_it_lacks_waits(order):
    """The order after that plans for what the one before has not come to."""
    pipeline, _ = issued_while_the_next_forming_waits(order)
    commands = pipeline.handle(p.FormationOrdered(4, order.nodes, anew=True), 2.2)
    commands += pipeline.handle(p.StageJoined(4, 1), 2.3)
    commands += [each for stage in (0, 1) for each in pipeline.handle(p.StageRestored(4, stage), 2.3)]
    commands += pipeline.handle(executed(4, 3, r=[8]), 2.4)
    assert CACHED in computed_on_stage_1(commands)


def set_aside(commands):
    return [each.request for command in commands if isinstance(command, p.SetAside) for each in command.requests]


def behind_another(sequence, formation):
    """One request fills block 3, the other one hits it, and the cached block behind it."""
    filling = Admission("filling", tuple(range(9)), (3, 4, 6), 0, None)
    hitting = Admission("hitting", tuple(range(9)), (3, CACHED, 7), 8, None)
    scheduled = {"filling": 9, "hitting": 1}
    return Step(sequence, (filling, hitting), (), scheduled, frozenset(), frozenset(), formation)


def test_who_hits_a_cached_block_behind_one_that_is_filled_in_the_same_step_has_to_wait():
    """It could be computed on the new node only when the step has run, and the step itself reads it."""
    pipeline = with_a_prefix_and_a_step()
    before = pipeline.formations
    prepared(pipeline, 2, pipeline.handle(p.FormationOrdered(2, (A0, B1), lost=True), 1.5))
    commands = pipeline.handle(p.StepIssued(behind_another(4, before)), 2.1)
    commands += pipeline.handle(executed(2, 3, r=[8]), 2.2)
    assert set_aside(commands) == ["hitting"]
    (step,) = [each for each in commands if isinstance(each, p.Execute) and each.sequence == 4]
    assert step.left_out == {"hitting"}


def test_nor_may_it_read_the_block_after_a_later_step_has_taken_it_though_no_stage_is_lost():
    """The first stage may have run that step, and runs the one before again if it has not kept what came of it."""
    pipeline = with_a_prefix_and_a_step()
    now = pipeline.formations
    pipeline.handle(p.StepIssued(behind_another(4, now)), 1.1)
    taking = Admission("taking", tuple(range(4)), (CACHED,), 0, None)
    taken = Step(5, (taking,), (), {"taking": 4}, frozenset(), frozenset({"hitting"}), now)
    pipeline.handle(p.StepIssued(taken), 1.2)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1), anew=True), 1.5)
    commands += pipeline.handle(p.StageJoined(2, 1), 1.6)
    assert set_aside(commands) == ["hitting"]
    assert sent(commands) == [3, 4, 5]
