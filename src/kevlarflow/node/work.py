"""What a node does with a piece of work: what it notes before, and what it keeps, answers and passes on after it.

Recovery counts on all of it and on its order, so it is in one place. What it is computed with, and how things are
sent, is the shell's: `node.main` has vLLM and sockets, the simulator's node has toy stages and simulated time, which
passes between `begin` and `end`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from kevlarflow.node.kept import MAX_BYTES
from kevlarflow.node.lane_replicas import LaneReplicas
from kevlarflow.node.lanes import Lane, Work, kept_output
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.types import Stage
from kevlarflow.wire import steps


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """What has come of a step; nothing, of one without tokens."""

    output: Any = None
    """For the next stage."""
    sampled: Any = None
    """For the engine, as it is sent; of the last stage."""
    size: int = 0
    """Bytes of either."""


class Shell(Protocol):
    """What a node computes and sends with."""

    def content(self, work: Work) -> Any:
        """What came along: (entries, held) of `Restore`, the chunk of `Recompute`, (now, later) of `Place`."""

    def execute(self, lane: Lane, work: Work, step: steps.Execute, activations: Any) -> Computed:
        """Run a step."""

    def follow(self, lane: Lane, work: Work, kept: Any) -> tuple[Any, Any]:
        """Take note of a step that was run before; (output to pass on, what to keep of it), given what was kept."""

    def recompute(self, lane: Lane, recompute: steps.Recompute, chunk: Chunk, activations: Any) -> Any | None:
        """Write the KV of a chunk; returns what the next stage needs for it, if there is one."""

    def to_keep(self, lane: Lane, output: Any) -> Any:
        """What `follow` will need of an output: nothing that the next step changes."""

    def pass_on(self, lane: Lane, sequence: int, output: Any) -> None:
        """Send an output to the next stage."""

    def answer(self, lane: Lane, answer: steps.AnyStepMessage, *payload: Any) -> None:
        """Send to the engine that has opened the lane."""


def _nothing() -> None:
    """Of most work everything is done when it is said."""


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What is to be said of a piece of work."""

    answer: steps.AnyStepMessage | None = None
    computed: Computed = Computed()
    kept_again: Any = None
    """Of a step that was passed on as before: what to keep of it."""
    still_to_do: Callable[[], None] = _nothing
    """What was said already, since others need not wait for it; whoever cannot do it then must not go on."""


class Workflow:
    """See the module's text. `clock` gives monotonic seconds."""

    def __init__(
        self,
        stage: Stage,
        block_size: int,
        replicas: LaneReplicas | None,
        shell: Shell,
        clock: Callable[[], float],
    ) -> None:
        self._stage = stage
        self._block_size = block_size
        self._replicas = replicas
        self._shell = shell
        self._clock = clock

    def begin(self, lane: Lane, work: Work, activations: Any) -> Done:
        """Do it."""
        pipeline, epoch = lane.pipeline, lane.epoch
        match work.header:
            case steps.Execute():
                return self._execute(lane, work, work.header, activations)
            case steps.Recompute():
                return self._recompute(lane, work, work.header, activations)
            case steps.Restore():
                entries, held = self._shell.content(work)
                lane.runner.restore(entries)
                if self._replicas:
                    self._replicas.hold(lane, held)
                return Done(steps.Restored(pipeline, epoch, self._stage))
            case steps.Flush():
                if self._replicas:
                    self._replicas.flush(lane, self._clock())
                    return Done()
                return Done(steps.Flushed(pipeline, epoch, self._stage))
            case steps.Place(ahead=ahead):
                return self._place(lane, *self._shell.content(work), ahead=ahead)
            case steps.PlaceRest():
                if self._replicas:
                    self._replicas.place_rest(lane)
                return Done(steps.Placed(pipeline, epoch, self._stage, ()))

    def end(self, lane: Lane, work: Work, done: Done) -> None:
        """Say so. The next stage comes first: it waits for it. What is still to do then is the shell's to begin."""
        header, computed = work.header, done.computed
        if computed.output is not None:
            assert isinstance(header, steps.Execute | steps.Recompute), "other work has no output"
            self._shell.pass_on(lane, header.sequence, computed.output)
        if done.answer is not None:
            self._shell.answer(lane, done.answer, *(() if computed.sampled is None else (computed.sampled,)))
        if isinstance(header, steps.Execute):
            self._keep(lane, work, header, done)
            if self._replicas:
                self._replicas.end(lane, _written(header))

    # ---- steps

    def _execute(self, lane: Lane, work: Work, step: steps.Execute, activations: Any) -> Done:
        if self._replicas:
            self._replicas.begin(lane, _written(step), step.use)
        kept = kept_output(lane, work)
        if kept is not None:
            output, again = self._shell.follow(lane, work, kept)
            return Done(computed=Computed(output), kept_again=again)
        computed = self._shell.execute(lane, work, step, activations)
        has_sampled = computed.sampled is not None
        return Done(steps.Executed(step.pipeline, step.epoch, step.sequence) if has_sampled else None, computed)

    def _keep(self, lane: Lane, work: Work, step: steps.Execute, done: Done) -> None:
        computed = done.computed
        if done.kept_again is not None:
            lane.kept.passed_on(step.sequence, done.kept_again)
        elif computed.sampled is not None:
            lane.kept.sampled(step.epoch, step.sequence, computed.sampled, computed.size)
        elif computed.output is not None and computed.size > MAX_BYTES:
            lane.kept.spoil()
        elif computed.output is not None:
            kept = self._shell.to_keep(lane, computed.output)
            generations = {block: generation for block, generation, *_ in step.writes}
            lane.kept.computed(step.sequence, work.payload[0], kept, computed.size, generations)

    # ---- recovery

    def _recompute(self, lane: Lane, work: Work, recompute: steps.Recompute, activations: Any) -> Done:
        chunk: Chunk = self._shell.content(work)
        lane.kept.recomputed(chunk.written_blocks(self._block_size), recompute.oldest)
        output = self._shell.recompute(lane, recompute, chunk, activations)
        if self._stage == recompute.through:
            return Done(steps.Recomputed(recompute.pipeline, recompute.epoch, recompute.sequence))
        return Done(computed=Computed(output))

    def _place(self, lane: Lane, now: tuple[Replica, ...], later: tuple[Replica, ...], *, ahead: bool) -> Done:
        lane.kept.spoil()
        write = _nothing
        if self._replicas is None:
            missing, fuller = [*now, *later], list[Replica]()
        elif ahead:
            missing, fuller = self._replicas.place_ahead(lane, now)
        else:
            # The engine plans with what there is, and the other stages restore their requests, while this one copies.
            missing, fuller, write = self._replicas.place(lane, now, later)
        placed = steps.Placed(lane.pipeline, lane.epoch, self._stage, _tags(missing), _tags(fuller), ahead)
        return Done(placed, still_to_do=write)


def _written(step: steps.Execute) -> list[Replica]:
    return [Replica(*each) for each in step.writes]


def _tags(replicas: Iterable[Replica]) -> tuple[tuple[int, int, int], ...]:
    return tuple((replica.block, replica.generation, replica.filled) for replica in replicas)
