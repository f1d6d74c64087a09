"""A step that was scheduled before its request was set aside, and issued after: what it would have filled is not."""

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.ledger import Continuation, Step
from unit.recovery.test_pipeline import A0, A1, admit, executed, prepared, serving


def spoilt(commands):
    return frozenset().union(*(each.spoilt for each in commands if isinstance(each, p.SetAside)))


def continued(sequence, computed, count, *new_blocks):
    going_on = Continuation("r", False, new_blocks, computed, 0)
    return Step(sequence, (), (going_on,), {"r": count}, frozenset(), frozenset(), formation=1)


def with_a_request_that_has_no_room():
    """Six of its tokens are computed, in blocks of four, and a pipeline that has one block has none for it."""
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, blocks=(1, 2), tokens=6)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    commands = pipeline.handle(p.FormationOrdered(2, (A0, A1), shares=25), 1.2)
    assert [each.request for each in asides(commands)] == ["r"]
    prepared(pipeline, 2, commands)
    return pipeline


def asides(commands):
    return [each for command in commands if isinstance(command, p.SetAside) for each in command.requests]


def test_the_block_that_it_would_have_completed_is_spoilt():
    pipeline = with_a_request_that_has_no_room()
    commands = pipeline.handle(p.StepIssued(continued(2, 6, 2)), 2.1)
    assert spoilt(commands) == {2}


def test_so_is_what_the_next_one_would_have_filled():
    pipeline = with_a_request_that_has_no_room()
    pipeline.handle(p.StepIssued(continued(2, 6, 4, 3)), 2.1)
    commands = pipeline.handle(p.StepIssued(continued(3, 10, 4, 4)), 2.2)
    assert spoilt(commands) == {2, 3, 4}


def test_blocks_of_a_step_that_is_given_up_hold_nothing_that_was_copied_before():
    pipeline = serving()
    pipeline.handle(p.StepIssued(admit(1, blocks=(1, 2), tokens=6)), 1.0)
    pipeline.handle(executed(1, 1), 1.1)
    pipeline.handle(p.SuspensionOrdered(2, "no node", waits=False), 1.2)
    (abandoned,) = pipeline.handle(p.StepIssued(admit(2, "s", blocks=(1,), tokens=4)), 1.3)
    assert isinstance(abandoned, p.Abandon)
    assert pipeline._books.generations[1] == 2
