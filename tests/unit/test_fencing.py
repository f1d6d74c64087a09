"""A node that was only paused goes on after its lanes have moved. Nothing that it still sends may matter to anybody."""

from __future__ import annotations

from cluster_driver import Driver, member, orders
from kevlarflow.recovery import events
from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.events import KillNode, Retire
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.types import NodeId, NodeState, Stage
from unit.node.test_lanes import execute, lanes
from unit.recovery.test_pipeline import A0, A1, B1, LIMITS, admit, executed, sent
from unit.replication.parts import content
from unit.replication.test_standby import DATA, Bench

THAWED, NEW = A1, B1
OLD_EPOCH, NEW_EPOCH = 1, 2


def after_failover() -> Pipeline:
    """A pipeline whose stage 1 has gone to another node while a step was in flight."""
    pipeline = Pipeline(LIMITS)
    pipeline.handle(p.FormationOrdered(OLD_EPOCH, (A0, THAWED)), 0.0)
    for stage in (0, 1):
        pipeline.handle(p.StageJoined(OLD_EPOCH, stage), 0.1)
        pipeline.handle(p.StageRestored(OLD_EPOCH, stage), 0.1)
    pipeline.handle(p.StandbysAssigned((None, NEW)), 0.2)
    pipeline.handle(p.StepIssued(admit(1)), 1.0)
    assert sent(pipeline.handle(p.FormationOrdered(NEW_EPOCH, (A0, NEW)), 2.0)) == [1]
    pipeline.handle(p.StandbysAssigned((None, THAWED)), 2.0)
    return pipeline


def test_its_tokens_reach_no_client():
    pipeline = after_failover()
    assert pipeline.handle(executed(OLD_EPOCH, 1, r=[666]), 2.1) == []
    assert pipeline.handle(executed(NEW_EPOCH, 1, r=[7]), 2.2)[0] == p.Deliver(1)
    assert pipeline.ledger["r"].output == [7]
    # And once more, now that the step is done.
    assert pipeline.handle(executed(OLD_EPOCH, 1, r=[666]), 2.3) == []
    assert pipeline.ledger["r"].output == [7]


def test_its_answers_move_no_recovery_on_and_its_errors_end_no_request():
    pipeline = after_failover()
    for late in (
        p.StageJoined(OLD_EPOCH, Stage(1)),
        p.StageRestored(OLD_EPOCH, Stage(1)),
        p.ReplicasPlaced(OLD_EPOCH, Stage(1), ()),
        p.StepBroken(OLD_EPOCH, 1, Stage(1), "RuntimeError: it thawed in the middle of something"),
    ):
        assert pipeline.handle(late, 2.1) == []
    assert pipeline.in_flight == (1,)


def test_what_was_confirmed_to_it_covers_nothing():
    pipeline = after_failover()
    pipeline.handle(executed(NEW_EPOCH, 1, r=[7]), 2.2)
    late = p.ReplicasConfirmed(Stage(1), THAWED.member, NEW.member, (Replica(1, 1, 3),))
    assert pipeline.handle(late, 2.3) == []
    assert pipeline.coverage_of(Stage(1))[2] == 0


def test_its_activations_enter_no_lane():
    table = lanes()
    table.open(0, OLD_EPOCH)
    table.open(0, NEW_EPOCH)
    table.add_work(execute(1, epoch=NEW_EPOCH))
    assert not table.add_activations(0, OLD_EPOCH, 1, {"of": "the thawed one"})
    assert table.next_work() is None
    table.add_activations(0, NEW_EPOCH, 1, {"of": "the new one"})
    assert table.next_work()[2] == {"of": "the new one"}


def test_its_copies_replace_nothing_on_a_standby():
    bench = Bench()
    bench.send(b"new", b"n" * len(DATA), epoch=NEW_EPOCH)
    bench.send(b"thawed", b"t" * len(DATA), epoch=OLD_EPOCH)
    assert content(bench.store, 0, Replica(1, 1, 4)) == b"n" * len(DATA)
    assert bench.standby.refused == 1


def test_its_copies_are_not_taken_for_what_its_blocks_were_given_to_later():
    bench = Bench()
    # The standby has heard of no newer epoch yet, so it believes the copy to be what its tag says, and no more.
    bench.send(b"thawed", epoch=OLD_EPOCH, generation=1)
    assert content(bench.store, 0, Replica(1, 2, 4)) is None


def test_it_is_no_member_any_more_and_is_sent_away():
    driver = Driver().serve()
    driver.do(events.NodeSilent(member("node-0-1"), driver.now - 1.0, "was stopped"))
    driver.exited("node-0-1")
    before = [list(each.members) for each in driver.cluster.pipelines]
    commands = driver.ready("node-0-1", 1)
    assert Retire(member("node-0-1")) in commands
    assert any(isinstance(each, KillNode) and each.member == member("node-0-1") for each in commands)
    assert orders(commands) == []
    driver.do(events.NodeCleared(member("node-0-1")))
    driver.exited("node-0-1", 1)
    assert [list(each.members) for each in driver.cluster.pipelines] == before
    driver.formed(0, 2)
    driver.tick(1.0)
    slot = driver.cluster.slots[NodeId("node-0-1")]
    assert (slot.incarnation, slot.state) == (2, NodeState.STARTING)
