"""What a node notes before it computes, and what it keeps, answers and passes on behind that."""

from __future__ import annotations

from typing import Any

import pytest

from kevlarflow.node.kept import MAX_BYTES
from kevlarflow.node.lanes import Lane, Lanes, Work
from kevlarflow.node.work import Computed, Workflow
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.recompute import Chunk, Span
from kevlarflow.wire import steps

BLOCK_SIZE = 4


class Runner:
    """Rebuilds nothing."""

    def __init__(self, story: list[Any]) -> None:
        self._story = story

    def reset(self) -> None:
        """Nothing to forget."""

    def use_blocks(self, table: Any) -> None:
        """Never looked up."""

    def restore(self, entries: Any) -> None:
        """What came."""
        self._story.append(("restore", entries))


class Shell:
    """Tells what it was asked for, in order; `computed` is what comes of each step."""

    def __init__(self, story: list[Any]) -> None:
        self._story = story
        self.computed = Computed("output", size=8)

    def content(self, work: Work) -> Any:
        """Nothing is packed."""
        return work.payload

    def execute(self, lane: Lane, work: Work, step: steps.Execute, activations: Any) -> Computed:
        """As if."""
        self._story.append(("execute", step.sequence))
        return self.computed

    def follow(self, lane: Lane, work: Work, kept: Any) -> tuple[Any, Any]:
        """In another order now."""
        self._story.append(("follow", work.header.sequence, kept))  # type: ignore[union-attr]
        return f"{kept} again", f"kept {kept} again"

    def recompute(self, lane: Lane, recompute: steps.Recompute, chunk: Chunk, activations: Any) -> Any:
        """As if."""
        self._story.append(("recompute", recompute.sequence))
        return "chunk's output"

    def to_keep(self, lane: Lane, output: Any) -> Any:
        """Recognizable."""
        return f"kept {output}"

    def pass_on(self, lane: Lane, sequence: int, output: Any) -> None:
        """To the next stage."""
        self._story.append(("pass on", sequence, output))

    def answer(self, lane: Lane, answer: Any, *payload: Any) -> None:
        """To the engine."""
        self._story.append((type(answer).__name__, *payload))


class Replicas:
    """Tells what it was told; it has no replica."""

    def __init__(self, story: list[Any]) -> None:
        self._story = story

    def __getattr__(self, name: str) -> Any:
        def note(lane: Lane, *args: Any) -> tuple[list[Any], list[Any]]:
            self._story.append((f"replicas {name}", *args[:1]))
            return [], []

        return note

    def place(self, lane: Lane, now: Any, later: Any) -> tuple[list[Any], list[Any], Any]:
        """They are found first, and written when that was said."""
        self._story.append(("replicas place", now))
        return [], [], lambda: self._story.append(("replicas write", now))


class Node:
    """A workflow of stage 0 with a lane that was opened in epoch 1."""

    def __init__(self, *, replicates: bool = True) -> None:
        self.story: list[Any] = []
        self.shell = Shell(self.story)
        replicas: Any = Replicas(self.story) if replicates else None
        self.workflow = Workflow(0, BLOCK_SIZE, replicas, self.shell, lambda: 7.0)  # type: ignore[arg-type]
        self._lanes = Lanes([Runner(self.story)], 50, is_first_stage=True)  # type: ignore[list-item]
        self.lane = self.renew(1)

    def renew(self, epoch: int) -> Lane:
        """A new epoch begins."""
        lane = self._lanes.open(0, epoch)  # type: ignore[arg-type]
        assert lane is not None
        return lane

    def do(self, header: Any, *payload: Any) -> list[Any]:
        """All that happens with a piece of work."""
        self.story.clear()
        work = Work(b"engine", header, payload or [b"step"])  # type: ignore[arg-type]
        done = self.workflow.begin(self.lane, work, None)
        self.workflow.end(self.lane, work, done)
        done.still_to_do()
        return list(self.story)

    def step(self, number: int, *writes: tuple[int, int, int, int]) -> list[Any]:
        """A step with tokens comes."""
        return self.do(steps.Execute(0, self.lane.epoch, number, True, writes))  # type: ignore[arg-type]


WRITES = (3, 1, 2, 0)
WRITTEN = [Replica(*WRITES)]


def test_the_next_stage_comes_first_and_replication_hears_of_a_step_before_and_after_it() -> None:
    assert Node().step(1, WRITES) == [
        ("replicas begin", WRITTEN),
        ("execute", 1),
        ("pass on", 1, "output"),
        ("replicas end", WRITTEN),
    ]


def test_a_step_that_comes_again_is_passed_on_in_the_next_epoch_and_the_one_after() -> None:
    node = Node(replicates=False)
    node.step(1)
    node.renew(2)
    assert node.step(1) == [("follow", 1, "kept output"), ("pass on", 1, "kept output again")]
    node.renew(3)
    assert node.step(1)[0] == ("follow", 1, "kept kept output again")


@pytest.mark.parametrize(
    "between",
    [
        steps.Place(0, 2),  # type: ignore[arg-type]
        steps.Place(0, 2, ahead=True),  # type: ignore[arg-type]
    ],
)
def test_what_was_put_in_place_meanwhile_makes_it_compute(between: steps.Place) -> None:
    node = Node()
    node.step(1)
    node.renew(2)
    node.do(between, (), ())
    assert ("execute", 1) in node.step(1)


def test_what_there_is_to_put_in_place_is_told_before_it_is_copied() -> None:
    wanted = tuple(WRITTEN)
    told = Node().do(steps.Place(0, 1), wanted, ())  # type: ignore[arg-type]
    assert told == [("replicas place", wanted), ("Placed",), ("replicas write", wanted)]


def test_so_does_a_chunk_in_a_block_that_a_kept_step_was_given() -> None:
    for block, again in ((3, "execute"), (4, "follow")):
        node = Node(replicates=False)
        node.step(1, WRITES)
        node.renew(2)
        span = Span("r", (1, 2), (block,), 0, 2)
        work = Work(b"engine", steps.Recompute(0, 2, 1, 0, 0), Chunk((span,), through=0))  # type: ignore[arg-type]
        node.workflow.end(node.lane, work, node.workflow.begin(node.lane, work, None))
        assert node.step(1, WRITES)[0][0] == again


def test_an_output_that_is_too_long_to_keep_is_computed_again_and_so_is_what_comes_behind_it() -> None:
    node = Node(replicates=False)
    node.step(1)
    node.shell.computed = Computed("long", size=MAX_BYTES + 1)
    node.step(2)
    node.renew(2)
    assert ("execute", 1) in node.step(1)


def test_what_was_sampled_goes_to_the_engine_and_is_kept() -> None:
    node = Node(replicates=False)
    node.shell.computed = Computed(sampled=b"tokens", size=6)
    assert node.step(1) == [("execute", 1), ("Executed", b"tokens")]
    assert node.lane.kept.results == {(1, 1): b"tokens"}


def test_nobody_hears_of_a_step_without_tokens() -> None:
    node = Node(replicates=False)
    node.shell.computed = Computed()
    assert node.step(1) == [("execute", 1)]


def test_a_chunk_is_answered_by_the_last_stage_that_runs_it_and_passed_on_by_those_before() -> None:
    node = Node(replicates=False)
    for through, expected in ((0, ("Recomputed",)), (1, ("pass on", 5, "chunk's output"))):
        work = Work(b"engine", steps.Recompute(0, 1, 5, through, 0), Chunk((), through))  # type: ignore[arg-type]
        node.story.clear()
        node.workflow.end(node.lane, work, node.workflow.begin(node.lane, work, None))
        assert node.story == [("recompute", 5), expected]


def test_a_lane_that_was_restored_knows_what_it_holds_before_the_engine_hears_of_it() -> None:
    assert Node().do(steps.Restore(0, 1), "entries", WRITTEN) == [  # type: ignore[arg-type]
        ("restore", "entries"),
        ("replicas hold", WRITTEN),
        ("Restored",),
    ]


def test_without_replication_every_replica_is_missing_and_nothing_is_left_to_flush() -> None:
    node = Node(replicates=False)
    assert node.do(steps.Place(0, 1), (WRITTEN[0],), ()) == [("Placed",)]  # type: ignore[arg-type]
    assert node.do(steps.Flush(0, 1)) == [("Flushed",)]  # type: ignore[arg-type]
    assert Node().do(steps.Flush(0, 1)) == [("replicas flush", 7.0)]  # type: ignore[arg-type]
