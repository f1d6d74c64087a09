"""What a pipeline says that its nodes hold, and which replicas it believes: never what was not computed again."""

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import Admission, Step, StepResult
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.recompute import Limits
from kevlarflow.types import Member, NodeInfo


def node(name, stage, incarnation=1):
    return NodeInfo(Member(name, incarnation), stage, "host", 1, (1,), f"ipc://{name}.s", f"ipc://{name}.a", 2, 50)


A0, B0, A1, B1 = node("node-0-0", 0), node("node-1-0", 0), node("node-0-1", 1), node("node-1-1", 1)
FULL = Replica(1, 1, 4)
"""The first block of the request below."""


def form(pipeline, epoch, *nodes, shares=1):
    commands = pipeline.handle(p.FormationOrdered(epoch, nodes, shares=shares), float(epoch))
    for stage in (0, 1):
        commands += pipeline.handle(p.StageJoined(epoch, stage), epoch + 0.1)
    for stage in (0, 1):
        pipeline.handle(p.StageRestored(epoch, stage), epoch + 0.2)
    return commands


def confirm(pipeline, *stored):
    pipeline.handle(p.ReplicasConfirmed(1, A1.member, B1.member, stored), 1.9)


def serving_one_request():
    """A request of 6 tokens in blocks 1 and 2; B1 is the standby of stage 1."""
    pipeline = Pipeline(Limits(max_batched_tokens=64, max_requests=8, block_size=4, stages=2))
    form(pipeline, 1, A0, A1)
    pipeline.handle(p.StandbysAssigned((None, B1)), 1.5)
    admission = Admission("r", tuple(range(6)), (1, 2), 0, None)
    pipeline.handle(p.StepIssued(Step(1, (admission,), (), {"r": 6}, frozenset(), frozenset(), 9)), 1.6)
    pipeline.handle(p.StepExecuted(1, 1, StepResult({"r": [7]}, {})), 1.7)
    assert pipeline.standing is Standing.SERVING
    return pipeline


def ending(sequence):
    return Step(sequence, (), (), {}, frozenset({"r"}), frozenset(), 9)


def test_blocks_of_a_request_that_ends_in_flight_are_not_said_to_be_held():
    pipeline = serving_one_request()
    busy = Admission("s", (1, 2), (3,), 0, None)
    pipeline.handle(p.StepIssued(Step(2, (busy,), (), {"s": 2}, frozenset({"r"}), frozenset(), 9)), 1.8)
    (restore,) = [each for each in form(pipeline, 2, B0, A1) if isinstance(each, p.Restore)]
    assert restore.held == (), "the new node of stage 0 is not told to compute them"


def test_a_prefix_that_was_evicted_is_not_restored_at_the_next_loss():
    pipeline = serving_one_request()
    confirm(pipeline, FULL)
    pipeline.handle(p.StepIssued(ending(2)), 1.8)
    assert form(pipeline, 2, B0, A1)[-1] == p.EvictPrefixCache(), "stage 0 has lost it"
    commands = form(pipeline, 3, B0, B1)
    assert not [each for each in commands if isinstance(each, p.Place)], "the standby of stage 1 still has it"


def test_a_replica_of_what_was_evicted_is_void_even_if_it_is_confirmed_late():
    pipeline = serving_one_request()
    pipeline.handle(p.StepIssued(ending(2)), 1.8)
    form(pipeline, 2, B0, A1)
    confirm(pipeline, FULL)
    assert not [each for each in form(pipeline, 3, B0, B1) if isinstance(each, p.Place)]


def test_a_replica_from_before_an_abandonment_is_void_even_if_it_is_confirmed_late():
    pipeline = serving_one_request()
    pipeline.handle(p.SuspensionOrdered(2, "no node"), 1.8)
    form(pipeline, 3, A0, A1)
    confirm(pipeline, FULL)
    assert not [each for each in form(pipeline, 4, A0, B1) if isinstance(each, p.Place)]


def after_the_first_of_two_losses():
    """A prefix is kept: B1 has taken stage 1 over, and is told to put it in place behind everything else."""
    pipeline = serving_one_request()
    confirm(pipeline, FULL)
    pipeline.handle(p.StepIssued(ending(2)), 1.8)
    pipeline.handle(p.FormationOrdered(2, (A0, B1)), 2.0)
    commands = pipeline.handle(p.ReplicasPlaced(2, 1, ()), 2.1)
    assert p.PlaceRest(1) in commands
    assert commands[-1] == p.EvictPrefixCache(frozenset({1}))
    for stage in (0, 1):
        pipeline.handle(p.StageJoined(2, stage), 2.2)
        pipeline.handle(p.StageRestored(2, stage), 2.3)
    assert pipeline.standing is Standing.SERVING
    return pipeline


def test_a_node_that_has_not_placed_kept_prefixes_yet_has_to_begin_again_at_the_next_loss():
    pipeline = after_the_first_of_two_losses()
    commands = form(pipeline, 3, A0, B1)
    assert p.Place(1, (), (FULL,)) in commands, "its lane was opened again before it came to that"


def test_kept_prefixes_that_are_in_place_stay():
    pipeline = after_the_first_of_two_losses()
    pipeline.handle(p.ReplicasPlaced(2, 1, ()), 2.4)
    commands = form(pipeline, 3, A0, B1)
    assert not [each for each in commands if isinstance(each, (p.Place, p.EvictPrefixCache))]


def test_a_block_that_was_given_up_holds_nothing_when_it_comes_back():
    pipeline = serving_one_request()
    confirm(pipeline, FULL)
    later = Admission("s", tuple(range(10, 14)), (3,), 0, None)
    pipeline.handle(p.StepIssued(Step(2, (later,), (), {"s": 4}, frozenset({"r"}), frozenset(), 9)), 1.9)
    pipeline.handle(p.StepExecuted(1, 2, StepResult({"s": [9]}, {})), 1.91)
    pipeline.handle(p.StepIssued(Step(3, (), (), {}, frozenset({"s"}), frozenset(), 9)), 1.92)
    # With so many lanes on its nodes it keeps one block, the newest; then it has all of them again.
    for epoch, shares in ((2, 25), (3, 1)):
        form(pipeline, epoch, A0, A1, shares=shares)
    commands = form(pipeline, 4, A0, B1)
    assert not [each for each in commands if isinstance(each, p.Place)], "the others have nothing to go with its copy"
    (restore,) = [each for each in commands if isinstance(each, p.Restore)]
    assert restore.held == ()
