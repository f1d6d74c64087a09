"""Lanes: who may run what next on a node.

A node serves one pipeline, or more when it helps out; each has a lane, which is a runner, its KV blocks, an epoch, a
queue of work in the order the engine sent it, and the activations that the stage before has sent. Work runs when it is
at the head of its lane, its activations are there, and the lane has all its blocks. Among lanes that can run, the one
that ran longest ago goes first; but what a recovery waits for and no model has to run for goes before all, and is no
turn: clients wait meanwhile, and the other lane loses less than a step.

Epochs fence: a `Join` opens the lane under a newer epoch and forgets everything older, and whatever arrives with an
older epoch is dropped. Activations may overtake the `Join` of their epoch (they come from another node), so newer
ones are kept.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any

from kevlarflow.node.block_map import BlockMap, LaneBlocks
from kevlarflow.node.kept import KeptSteps
from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.source import LaneReplication
from kevlarflow.types import Epoch, PipelineId
from kevlarflow.wire.steps import Execute, Flush, Place, PlaceRest, Recompute, Restore

if TYPE_CHECKING:
    # The simulator runs this module without torch.
    from kevlarflow.node.stage import Activations, LaneRunner

MAX_QUEUED_WORK = 4_096
"""Items of work that a lane holds; an engine has at most S steps and one recovery under way, so this is a bug guard."""
MAX_EARLY_ACTIVATIONS = 4_096
"""Activations that wait for their step."""

Header = Execute | Recompute | Restore | Flush | Place | PlaceRest


@dataclasses.dataclass(slots=True)
class Work:
    """Something an engine asked for, with the engine's address to answer to."""

    engine: bytes
    header: Header
    payload: list[bytes]


@dataclasses.dataclass(slots=True)
class Lane:
    """One pipeline's place on this node."""

    pipeline: PipelineId
    runner: LaneRunner
    blocks: LaneBlocks
    epoch: Epoch
    link: Any = None
    """PUSH socket to the next stage; None at the last."""
    engine: bytes = b""
    """Address of the engine that opened it; a connection that is made anew has another one."""
    replication: LaneReplication | None = None
    kept: KeptSteps = dataclasses.field(default_factory=KeptSteps)
    rest: list[tuple[Replica, memoryview]] = dataclasses.field(default_factory=list)
    """Replicas that `PlaceRest` will put in place."""
    flush_until: float | None = None
    """When `Flush` is answered at the latest; None when it is not awaited."""
    queue: collections.deque[Work] = dataclasses.field(default_factory=collections.deque)
    last_ran: int = 0
    broken: bool = False
    """Work failed, so what follows it would compute nonsense: the lane takes none until it is opened again."""


class Lanes:
    """All lanes of a node; see the module's text. `blocks` is how many KV blocks there are for all of them."""

    def __init__(self, runners: list[LaneRunner], blocks: int, is_first_stage: bool) -> None:
        self._is_first_stage = is_first_stage
        self._free = list(runners)
        self._block_map = BlockMap(blocks)
        self._lanes: dict[PipelineId, Lane] = {}
        self._activations: dict[tuple[PipelineId, Epoch, int], Activations] = {}
        self._turn = 0
        self.epochs: dict[PipelineId, Epoch] = {}
        """The newest epoch seen of each pipeline, lanes that were left included."""

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def current(self, pipeline: PipelineId, epoch: Epoch | None = None) -> Lane | None:
        """The lane of a pipeline, if it is open, and open in `epoch` when one is given."""
        lane = self._lanes.get(pipeline)
        return lane if lane is not None and epoch in (None, lane.epoch) else None

    def open(self, pipeline: PipelineId, epoch: Epoch) -> Lane | None:
        """The lane under a new epoch, emptied; None when no runner is free or the epoch is old."""
        if epoch <= self.epochs.get(pipeline, 0):
            return None
        lane = self._lanes.get(pipeline)
        if lane is None:
            if not self._free:
                return None
            lane = Lane(pipeline, self._free.pop(0), self._block_map.add(), epoch)
            lane.runner.use_blocks(lane.blocks.table)
            self._lanes[pipeline] = lane
        self._fence(lane, epoch)
        return lane

    def share(self, lane: Lane, usable: frozenset[int] | None, first: Set[int] = frozenset()) -> None:
        """Give the lane these KV blocks, None: all; it works once it has them. `first`: see `BlockMap.share`."""
        self._block_map.share(lane.blocks, usable, first)

    def leave(self, pipeline: PipelineId, epoch: Epoch) -> Lane | None:
        """Give the lane up, unless it was opened again under a newer epoch; returns it for its link to be closed."""
        lane = self._lanes.get(pipeline)
        if lane is None:
            # It comes on a channel of its own, and may have overtaken the order to open the lane.
            self.epochs[pipeline] = Epoch(max(epoch, self.epochs.get(pipeline, 0)))
            self._forget_activations(pipeline)
        if lane is None or epoch < lane.epoch:
            return None
        self._fence(lane, epoch)
        del self._lanes[pipeline]
        self._block_map.remove(lane.blocks)
        self._free.append(lane.runner)
        return lane

    def _fence(self, lane: Lane, epoch: Epoch) -> None:
        self.epochs[lane.pipeline] = lane.epoch = epoch
        lane.queue.clear()
        lane.broken = False
        lane.rest.clear()
        lane.flush_until = None
        lane.runner.reset()
        lane.kept.renew()
        if lane.replication is not None:
            # Until the lane is restored nobody knows what its blocks hold. And another thread may be copying one that
            # is about to be given away: it looks once more when it is done.
            lane.replication.queue.hold(())
        self._forget_activations(lane.pipeline)

    def _forget_activations(self, pipeline: PipelineId) -> None:
        """Drop those of older epochs."""
        stale = [key for key in self._activations if key[0] == pipeline and key[1] < self.epochs[pipeline]]
        for key in stale:
            del self._activations[key]

    def add_work(self, work: Work) -> bool:
        """Queue work; False when its epoch is not the lane's, or the queue is full."""
        lane = self._lanes.get(work.header.pipeline)
        if lane is None or lane.broken or work.header.epoch != lane.epoch or len(lane.queue) >= MAX_QUEUED_WORK:
            return False
        lane.queue.append(work)
        return True

    def loses_touch(self, pipeline: PipelineId, epoch: Epoch, engine: bytes) -> bool:
        """Whether a message of the lane's epoch comes over another connection than the order that opened it.

        What was on its way when that broke may be lost. So the lane is broken off: it takes no more work in this epoch.
        """
        lane = self.current(pipeline, epoch)
        if lane is None or engine == lane.engine:
            return False
        self._break_off(lane)
        return True

    def fail(self, lane: Lane) -> None:
        """Its work has failed: drop what is queued, take no more in this epoch, and pass nothing on again."""
        self._break_off(lane)
        lane.kept.spoil()

    @staticmethod
    def _break_off(lane: Lane) -> None:
        lane.broken = True
        lane.queue.clear()

    def add_activations(self, pipeline: PipelineId, epoch: Epoch, sequence: int, tensors: Activations) -> bool:
        """Keep activations until their step comes; False when they are old or too many wait."""
        if epoch < self.epochs.get(pipeline, 0) or len(self._activations) >= MAX_EARLY_ACTIVATIONS:
            return False
        self._activations[pipeline, epoch, sequence] = tensors
        return True

    def next_work(self) -> tuple[Lane, Work, Activations | None] | None:
        """Take the next work that can run, or None."""
        lanes = [lane for lane in self._lanes.values() if lane.queue and not lane.blocks.missing]
        for lane in sorted(lanes, key=lambda lane: (not _is_urgent(lane), lane.last_ran)):
            work = lane.queue[0]
            activations = None
            if self._needs_activations(work):
                activations = self._activations.pop(_key(work.header), None)
                if activations is None:
                    continue
            if not _is_urgent(lane):
                self._turn += 1
                lane.last_ran = self._turn
            lane.queue.popleft()
            return lane, work, activations
        return None

    def _needs_activations(self, work: Work) -> bool:
        match work.header:
            case Execute(has_tokens=has_tokens):
                return has_tokens and not self._is_first_stage
            case Recompute():
                return not self._is_first_stage
            case Restore() | Flush() | Place() | PlaceRest():
                return False


def _is_urgent(lane: Lane) -> bool:
    """Whether a recovery waits for the lane's next work, which takes no step's time."""
    match lane.queue[0].header:
        case Restore():
            return True
        case Place(ahead=ahead):
            return not ahead
        case Execute():
            return kept_output(lane, lane.queue[0]) is not None
        case _:
            return False


def kept_output(lane: Lane, work: Work) -> Any | None:
    """What the lane passed on when this step came before, if it may pass it on again: see `node.kept`."""
    return lane.kept.output(work.header.sequence, work.payload[0]) if isinstance(work.header, Execute) else None


def _key(header: Header) -> tuple[PipelineId, Epoch, int]:
    assert isinstance(header, Execute | Recompute), "others need no activations"
    return header.pipeline, header.epoch, header.sequence
