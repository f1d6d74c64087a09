"""A node's end of the pipeline in `sim.world`: it does what was sent to it, in order, after the stage before it.

What it is sent, and what it answers, are the commands and events of the core themselves. A step may raise in it; then
it does nothing any more until it is opened again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kevlarflow.recovery import pipeline_events as core
from kevlarflow.recovery.capacity import without
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.ledger import Step, StepResult
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.sim.stage import ToyStage
from kevlarflow.types import Epoch, Member, NodeInfo

if TYPE_CHECKING:
    from kevlarflow.sim.world import World

Content = tuple[int | None, ...]


@dataclass
class Standby:
    """Keeps replicas of one stage; may drop any of them, and tells so late."""

    info: NodeInfo
    store: dict[int, tuple[Replica, Content]] = field(default_factory=dict)


@dataclass
class Lane:
    """A node's end of the pipeline: what was sent to it, in order, and what the stage before has passed on."""

    world: World
    info: NodeInfo
    stage: ToyStage
    epoch: int = 0
    inbox: deque[tuple[int, core.Command]] = field(default_factory=deque)
    activations: set[tuple[int, int]] = field(default_factory=set)
    tags: dict[int, Replica] = field(default_factory=dict)
    """What each block of the lane holds."""
    store: dict[int, tuple[Replica, Content]] = field(default_factory=dict)
    """Replicas that the node kept as the standby of the node before it."""
    rest: dict[int, tuple[Replica, Content]] = field(default_factory=dict)
    standby: Member | None = None
    sampled: dict[tuple[Epoch, int], StepResult] = field(default_factory=dict)
    """At the last stage: every result, by epoch and step."""
    broken: bool = False
    """A step has raised: the lane does nothing until it is opened again."""

    def can_work(self) -> bool:
        """Whether there is something to do, and all that it needs is there."""
        return bool(self.inbox) and (self._head_can_run() or self._joins())

    def _joins(self) -> bool:
        """A node takes a `Join` when it arrives, whatever is queued before it."""
        return any(isinstance(command, core.Join) for _, command in self.inbox)

    def _head_can_run(self) -> bool:
        epoch, command = self.inbox[0]
        needs = self.info.stage > 0 and epoch >= self.epoch
        match command:
            case core.Recompute(sequence, _):
                return not needs or self.broken or (epoch, -sequence) in self.activations
            case core.Execute(sequence, has_tokens):
                return not needs or self.broken or not has_tokens or (epoch, sequence) in self.activations
            case _:
                return True

    def work(self) -> None:
        """Do what is next."""
        if not self._head_can_run():
            while not isinstance(self.inbox[0][1], core.Join):
                self.inbox.popleft()
        epoch, command = self.inbox.popleft()
        if epoch < self.epoch or (self.broken and epoch == self.epoch):
            return
        match command:
            case core.Join(stage, usable):
                self.epoch = epoch
                self.broken = False
                self.stage.memory.restrict(usable)
                self.stage.reset()
                self.tags = {}
                self.rest = {}
                self.activations = {key for key in self.activations if key[0] >= epoch}
                self.world.answers.append(core.StageJoined(Epoch(epoch), stage, dict(self.sampled)))
            case core.AssignStandby() | core.Place() | core.PlaceRest():
                self._work_on_replicas(epoch, command)
            case core.Restore(entries, held):
                self.stage.restore(entries)
                self.tags = {replica.block: replica for replica in held if replica.block not in self.rest}
                self.world.answers.append(core.StageRestored(Epoch(epoch), self.info.stage))
            case core.Recompute(sequence, chunk):
                self._recompute(epoch, sequence, chunk)
            case core.Execute():
                self._execute(epoch, command)

    def _work_on_replicas(self, epoch: int, command: core.AssignStandby | core.Place | core.PlaceRest) -> None:
        match command:
            case core.AssignStandby(_, standby):
                self.standby = standby.member if standby else None
            case core.Place(_, now, later):
                self._place(epoch, now, later)
            case core.PlaceRest():
                for block, (replica, content) in self.rest.items():
                    self.stage.memory.place(block, content)
                    self.tags[block] = replica
                self.rest = {}
                self.world.answers.append(core.ReplicasPlaced(Epoch(epoch), self.info.stage, ()))

    def _place(self, epoch: int, now: tuple[Replica, ...], later: tuple[Replica, ...]) -> None:
        missing = tuple(r for r in (*now, *later) if self.store.get(r.block, (None,))[0] != r)
        for replica in now:
            if replica not in missing:
                self.stage.memory.place(replica.block, self.store[replica.block][1])
                self.world.resumed += 1
        self.rest = {r.block: self.store[r.block] for r in later if r not in missing}
        self.world.answers.append(core.ReplicasPlaced(Epoch(epoch), self.info.stage, missing))

    def _recompute(self, epoch: int, sequence: int, chunk: Chunk) -> None:
        self.stage.recompute(chunk)
        if self.info.stage == chunk.through:
            self.world.answers.append(core.ChunkRecomputed(Epoch(epoch), sequence))
        else:
            self._pass_on((epoch, -sequence))

    def _execute(self, epoch: int, command: core.Execute) -> None:
        sequence, written = command.sequence, command.writes
        scheduled, known = self.world.steps[sequence]
        step = without(scheduled, command.left_out, self.world.shape.block_size)
        if step.scheduled and self.world.rng.random() < self.world.shape.raise_rate:
            self._break(epoch, step)
            return
        self.tags.update((replica.block, Replica(replica.block, replica.generation, 0)) for replica in written)
        result = self.stage.execute(step, known)
        self.tags.update((replica.block, replica) for replica in written)
        if not step.scheduled:
            return
        if self.stage.is_last:
            self.sampled[Epoch(epoch), sequence] = result
            self.world.answers.append(core.StepExecuted(Epoch(epoch), sequence, result))
        else:
            self._pass_on((epoch, sequence))

    def _break(self, epoch: int, step: Step) -> None:
        """The step raises: the lane is of no use in this epoch any more."""
        self.broken = True
        reason = f"step {step.sequence} raised"
        if epoch == self.world.pipeline.epoch:
            for request in step.scheduled:
                self.world.blamed.setdefault(request, set()).add(reason)
        self.world.answers.append(core.StepBroken(Epoch(epoch), step.sequence, self.info.stage, reason))

    def _pass_on(self, key: tuple[int, int]) -> None:
        following = self.world.lanes[self.info.stage + 1]
        if key[0] >= following.epoch:
            following.activations.add(key)
