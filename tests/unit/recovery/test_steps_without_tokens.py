"""A step without tokens has no answer to wait for: once the pipeline is formed it is over, whatever follows."""

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import Admission, Step, StepResult
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.recompute import Limits
from kevlarflow.recovery.use import Use
from kevlarflow.types import Member, NodeInfo


def node(name):
    return NodeInfo(Member(name, 1), 0, "host", 1, (1,), f"ipc://{name}.s", f"ipc://{name}.a", 2, 50)


A, B = node("node-0-0"), node("node-1-0")


def answer(pipeline, epoch):
    pipeline.handle(p.StageJoined(epoch, 0), epoch + 0.1)
    return pipeline.handle(p.StageRestored(epoch, 0), epoch + 0.2)


def test_it_is_over_when_the_recovery_that_held_it_back_is_done():
    pipeline = Pipeline(Limits(max_batched_tokens=64, max_requests=8, block_size=4, stages=1))
    pipeline.handle(p.FormationOrdered(1, (A,)), 1.0)
    answer(pipeline, 1)
    pipeline.handle(p.StandbysAssigned((B,)), 1.3)
    admission = Admission("r", (1, 2, 3, 4, 5), (1, 2), 0, None)
    pipeline.handle(p.StepIssued(Step(1, (admission,), (), {"r": 5}, frozenset(), frozenset(), 9)), 1.5)
    pipeline.handle(p.StepExecuted(1, 1, StepResult({"r": [7]}, {})), 1.6)
    pipeline.handle(p.ReplicasConfirmed(0, A.member, B.member, (Replica(1, 1, 4),)), 1.7)
    pipeline.handle(p.FormationOrdered(2, (B,)), 2.0)
    assert pipeline.handle(p.StepIssued(Step(2, (), (), {}, frozenset({"r"}), frozenset(), 9)), 2.0) == []
    commands = pipeline.handle(p.ReplicasPlaced(2, 0, ()), 2.05)
    assert p.Execute(2, has_tokens=False, use=Use(released=(1, 2))) in commands
    assert p.Deliver(2) in commands
    answer(pipeline, 2)
    assert pipeline.in_flight == ()
    assert pipeline.standing is Standing.SERVING
