"""Which blocks requests hold: what each step changes in it, and what the nodes are told."""

from kevlarflow.recovery import pipeline_events as p
from kevlarflow.recovery.coverage import Generations, IssuedTables, Replica, Worth
from kevlarflow.recovery.holdings import holdings
from kevlarflow.recovery.ledger import Admission, Continuation, Ledger, Step
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.recompute import Limits
from kevlarflow.recovery.use import NO_CHANGE, Use
from kevlarflow.types import Member, NodeInfo

BLOCK_SIZE = 4


def step(sequence, admitted=(), going_on=(), finished=(), preempted=()):
    """`admitted`: (request, blocks, tokens hit, tokens); `going_on`: (request, new blocks, computed, resumed)."""
    admissions = tuple(Admission(r, range(hit + new), blocks, hit, None) for r, blocks, hit, new in admitted)
    continuations = tuple(Continuation(r, resumed, blocks, computed, 1) for r, blocks, computed, resumed in going_on)
    scheduled = {r: new for r, _, _, new in admitted} | {r: 1 for r, *_ in going_on}
    return Step(sequence, admissions, continuations, scheduled, frozenset(finished), frozenset(preempted), 9)


class Issued:
    def __init__(self):
        self.tables = IssuedTables()
        self.generations = Generations()

    def __call__(self, issued):
        self.generations.allocate(issued, BLOCK_SIZE)
        use = self.tables.issue(issued, self.generations, BLOCK_SIZE).use
        return Use(*map(tuple, map(sorted, use)))


def test_a_request_takes_its_blocks_and_leaves_them_when_it_ends():
    issue = Issued()
    assert issue(step(1, admitted=[("r", (1, 2), 0, 7)])) == Use(taken=(1, 2))
    assert issue(step(2, going_on=[("r", (3,), 8, False)])) == Use(taken=(3,))
    assert issue(step(3, going_on=[("r", (), 9, False)])) == NO_CHANGE
    assert issue(step(4, finished=["r"])) == Use(released=(1, 2, 3))
    assert issue(step(5)) == NO_CHANGE


def test_a_shared_prefix_is_in_use_until_the_last_of_its_requests_ends():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 7)]))
    assert issue(step(2, admitted=[("s", (1, 3), 4, 3)])) == Use(taken=(3,))
    assert issue(step(3, finished=["r"])) == Use(released=(2,))
    assert issue(step(4, finished=["s"])) == Use(released=(1, 3))


def test_a_prefix_that_is_hit_again_is_in_use_again():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 7)]))
    issue(step(2, finished=["r"]))
    assert issue(step(3, admitted=[("s", (1, 3), 4, 3)])) == Use(taken=(1, 3))


def test_a_block_that_goes_from_one_request_to_another_in_one_step_stays_in_use():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 7)]))
    assert issue(step(2, admitted=[("s", (2,), 0, 3)], finished=["r"])) == Use(released=(1,))


def test_a_preempted_request_leaves_its_blocks_and_takes_those_that_it_resumes_with():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 7)]))
    assert issue(step(2, preempted=["r"])) == Use(released=(1, 2))
    assert issue(step(3, going_on=[("r", (1, 5), 4, True)])) == Use(taken=(1, 5))


def test_what_was_set_aside_is_told_with_the_next_step():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 7)]))
    issue.tables.forget(["r", "somebody else"])
    assert issue(step(2)) == Use(released=(1, 2))


def test_after_everything_was_ended_there_is_nothing_to_tell():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 7)]))
    issue.tables.clear()
    assert issue(step(2, admitted=[("s", (2,), 0, 3)])) == Use(taken=(2,))


def test_the_nodes_hear_of_it_with_the_step_and_again_when_it_is_issued_again():
    a, b = (NodeInfo(Member(name, 1), 0, "host", 1, (1,), f"{name}.s", f"{name}.a", 2, 50) for name in "ab")
    pipeline = Pipeline(Limits(max_batched_tokens=64, max_requests=8, block_size=BLOCK_SIZE, stages=1))
    pipeline.handle(p.FormationOrdered(1, (a,)), 1.0)
    pipeline.handle(p.StageJoined(1, 0), 1.1)
    pipeline.handle(p.StageRestored(1, 0), 1.2)
    first = pipeline.handle(p.StepIssued(step(1, admitted=[("r", (1, 2), 0, 7)])), 1.3)
    again = pipeline.handle(p.FormationOrdered(2, (b,)), 2.0)
    for commands in (first, again):
        assert [each.use for each in commands if isinstance(each, p.Execute)] == [Use(taken=(1, 2))]


def test_a_prefix_that_nobody_holds_is_known_as_such_on_a_new_node():
    issue = Issued()
    issue(step(1, admitted=[("r", (1, 2), 0, 8)]))
    held = holdings(Ledger(), (), frozenset({2}), issue.generations, issue.tables.depths, BLOCK_SIZE)
    assert held == (Replica(2, 1, BLOCK_SIZE),)
    assert [(each.depth, each.worth) for each in held] == [(1, Worth.PREFIX)]
