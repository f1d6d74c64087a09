"""One pipeline as its engine sees it: steps go out in order, results come back, and nodes may change in between.

The executor feeds this state machine events (a step from the scheduler, an answer from a node, an order from the
controller) and carries out the commands that come back. Forming a pipeline and recovering it are one path:

    FormationOrdered ──► Join every stage ──► Recompute what a new stage lacks ──► Restore the ledger
                         ──► issue the steps in flight again ──► FormationDone

All of it is sent in one go, since each channel keeps its order; the answers only tell how far it has come. A newer
order at any point starts the path again under its own epoch, and what is still missing on a stage is remembered by
`_complete_on`: the member that holds the whole KV of the lane. A stage whose member is another one is lost.

A pipeline starts unformed; it is *forming* until the nodes have answered, then *serving*; *suspended* when some
stage has no node, in which case the steps in flight are abandoned and their requests end with the reason.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools

from kevlarflow.errors import IllegalTransition
from kevlarflow.recovery.ledger import Ledger, LedgerEntry, Step, StepResult
from kevlarflow.recovery.recompute import Chunk, Limits, plan, plan_hits
from kevlarflow.types import Epoch, Member, NodeInfo, Phases, Stage


class Phase(enum.StrEnum):
    """Where a pipeline stands; see the module's text."""

    UNFORMED = "unformed"
    FORMING = "forming"
    SERVING = "serving"
    SUSPENDED = "suspended"


# ---- events


@dataclasses.dataclass(frozen=True, slots=True)
class FormationOrdered:
    """The controller wants these nodes, in stage order; `released` nodes keep no lane of this pipeline."""

    epoch: Epoch
    nodes: tuple[NodeInfo, ...]
    released: tuple[NodeInfo, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class SuspensionOrdered:
    """A stage has no node; requests in flight end with `reason`."""

    epoch: Epoch
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class StepIssued:
    """vLLM's scheduler made a step."""

    step: Step


@dataclasses.dataclass(frozen=True, slots=True)
class StageJoined:
    """A node has opened the lane."""

    epoch: Epoch
    stage: Stage


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkRecomputed:
    """A recompute chunk has passed its last stage."""

    epoch: Epoch
    sequence: int


@dataclasses.dataclass(frozen=True, slots=True)
class StageRestored:
    """A node has rebuilt the request state."""

    epoch: Epoch
    stage: Stage


@dataclasses.dataclass(frozen=True, slots=True)
class StepExecuted:
    """The last stage has sampled."""

    epoch: Epoch
    sequence: int
    result: StepResult


@dataclasses.dataclass(frozen=True, slots=True)
class StepBroken:
    """A stage raised an exception in this step: its requests cannot go on, everybody else's can."""

    epoch: Epoch
    sequence: int
    stage: Stage
    reason: str


Event = (
    FormationOrdered | SuspensionOrdered | StepIssued | StageJoined | ChunkRecomputed | StageRestored
    | StepExecuted | StepBroken
)  # fmt: skip


# ---- commands


@dataclasses.dataclass(frozen=True, slots=True)
class Join:
    """Open the lane on the node of `stage`, linked to the next one."""

    stage: Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """Give up the lane on a node that is no longer used."""

    node: NodeInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Recompute:
    """Send a chunk to the stages up to `chunk.through`."""

    sequence: int
    chunk: Chunk


@dataclasses.dataclass(frozen=True, slots=True)
class Restore:
    """Send the ledger to every stage."""

    entries: tuple[LedgerEntry, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Execute:
    """Send a step to every stage."""

    sequence: int
    has_tokens: bool = True
    """False for a step that only says which requests ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deliver:
    """Give vLLM the result of a step."""

    sequence: int


@dataclasses.dataclass(frozen=True, slots=True)
class Abandon:
    """Tell vLLM that a step will never have a result; end its requests with `reason`."""

    sequence: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class EvictPrefixCache:
    """Forget cached blocks that no live request holds: the new node does not have them."""


@dataclasses.dataclass(frozen=True, slots=True)
class FormationDone:
    """The pipeline generates again; what it cost."""

    epoch: Epoch
    seconds: Phases
    requests: int
    recomputed_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class RequestFormation:
    """Ask the controller for a new epoch: a step that failed at `stage` left the nodes in different states."""

    stage: Stage
    reason: str


Command = (
    Join | Leave | Recompute | Restore | Execute | Deliver | Abandon | EvictPrefixCache | FormationDone
    | RequestFormation
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Formation:
    """How far the current forming has come. Times are monotonic seconds."""

    ordered_at: float
    requests: int
    recomputed_tokens: int
    to_join: set[Stage]
    to_restore: set[Stage]
    chunks: set[int]
    first_step: int | None
    """The first step with tokens that was issued again, if any."""
    joined_at: float | None = None
    recomputed_at: float | None = None
    restored_at: float | None = None

    def phases(self, now: float) -> Phases:
        joined = self.joined_at or self.ordered_at
        recomputed = max(joined, self.recomputed_at or joined)
        restored = max(recomputed, self.restored_at or recomputed)
        return Phases(
            relink=joined - self.ordered_at,
            recompute=recomputed - joined,
            restore=restored - recomputed,
            reissue=now - restored,
        )


class Pipeline:
    """The state machine; see the module's text. One door: `handle`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.phase = Phase.UNFORMED
        self.epoch = Epoch(0)
        self.nodes: tuple[NodeInfo, ...] = ()
        self.ledger = Ledger()
        self.reason = ""
        """Why the pipeline is suspended."""
        self.formations = 0
        """How often it was ordered to form; a step that was scheduled under a smaller count is checked again."""
        self._in_flight: collections.OrderedDict[int, Step] = collections.OrderedDict()
        self._hollow: set[int] = set()
        """Steps in flight that were abandoned: they only still tell the ledger which requests ended."""
        self._results: dict[int, StepResult] = {}
        self._complete_on: dict[Stage, Member] = {}
        self._lost_at: dict[int, frozenset[Stage]] = {}
        self._forming: _Formation | None = None
        self._chunk_numbers = itertools.count(1)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Sequence numbers of the steps that were issued and have not completed, in order."""
        return tuple(self._in_flight)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event at monotonic time `now` (seconds); returns what to do, in order.

        Answers of another epoch than the current one are ignored. Raises `IllegalTransition` for a step that
        is issued twice.
        """
        match event:
            case FormationOrdered():
                return self._form(event, now)
            case SuspensionOrdered():
                return self._suspend(event)
            case StepIssued(step):
                return self._issue(step)
            case StageJoined() | ChunkRecomputed() | StageRestored():
                return self._progress(event, now) if event.epoch == self.epoch else []
            case StepExecuted():
                return self._executed(event, now) if event.epoch == self.epoch else []
            case StepBroken():
                return self._broken(event) if event.epoch == self.epoch else []

    # ---- forming

    def _form(self, order: FormationOrdered, now: float) -> list[Command]:
        if order.epoch <= self.epoch:
            return []
        self.epoch, self.nodes, self.reason = order.epoch, order.nodes, ""
        self.phase = Phase.FORMING
        self.formations += 1
        lost = self._note_lost_stages()
        steps = list(self._in_flight.values())
        chunks = {next(self._chunk_numbers): chunk for chunk in plan(self.ledger, steps, lost, self.limits)}
        stages = {Stage(index) for index in range(len(self.nodes))}
        self._forming = _Formation(
            ordered_at=now,
            requests=len(self.ledger),
            recomputed_tokens=sum(chunk.num_tokens for chunk in chunks.values()),
            to_join=set(stages),
            to_restore=set(stages),
            chunks=set(chunks),
            first_step=next((step.sequence for step in steps if step.scheduled), None),
        )
        commands: list[Command] = [Leave(node) for node in order.released]
        commands += [Join(stage) for stage in sorted(stages)]
        commands += [Recompute(number, chunk) for number, chunk in chunks.items()]
        commands.append(Restore(tuple(self.ledger.entries())))
        commands += [_execute(step) for step in steps if step.sequence not in self._hollow]
        if lost:
            commands.append(EvictPrefixCache())
        return commands

    def _note_lost_stages(self) -> frozenset[Stage]:
        lost = frozenset(
            Stage(index) for index, node in enumerate(self.nodes) if self._complete_on.get(Stage(index)) != node.member
        )
        for stage in lost:
            self._complete_on.pop(stage, None)
        self._lost_at[self.formations] = lost
        return lost

    def _progress(self, event: StageJoined | ChunkRecomputed | StageRestored, now: float) -> list[Command]:
        forming = self._forming
        if forming is None:
            return []
        match event:
            case StageJoined(stage=stage):
                forming.to_join.discard(stage)
                if not forming.to_join and forming.joined_at is None:
                    forming.joined_at = now
            case ChunkRecomputed(sequence=sequence):
                forming.chunks.discard(sequence)
                if not forming.chunks and forming.recomputed_at is None:
                    forming.recomputed_at = now
            case StageRestored(stage=stage):
                forming.to_restore.discard(stage)
                if not forming.to_restore and forming.restored_at is None:
                    forming.restored_at = now
        return self._formed(now)

    def _formed(self, now: float) -> list[Command]:
        """Finish forming once every stage has answered and the first step that was issued again is done."""
        forming = self._forming
        if forming is None or forming.to_join or forming.to_restore or forming.chunks:
            return []
        self._complete_on = {Stage(index): node.member for index, node in enumerate(self.nodes)}
        if forming.first_step is not None and forming.first_step in self._in_flight:
            return []
        self._forming = None
        self.phase = Phase.SERVING
        return [FormationDone(self.epoch, forming.phases(now), forming.requests, forming.recomputed_tokens)]

    def _suspend(self, order: SuspensionOrdered) -> list[Command]:
        if order.epoch <= self.epoch:
            return []
        self.epoch = order.epoch
        return self._abandon_all(order.reason)

    # ---- steps

    def _issue(self, step: Step) -> list[Command]:
        if step.sequence in self._in_flight:
            raise IllegalTransition(f"step {step.sequence}", "in flight", "StepIssued")
        if self.phase is Phase.SUSPENDED:
            return [Abandon(step.sequence, self.reason)]
        commands: list[Command] = []
        lost = self._lost_since(step.formation)
        if lost:
            chunks = plan_hits(self.ledger, list(self._in_flight.values()), step, lost, self.limits)
            commands += [Recompute(next(self._chunk_numbers), chunk) for chunk in chunks]
        self._in_flight[step.sequence] = step
        commands.append(_execute(step))
        return commands + self._complete_in_order()

    def _lost_since(self, formation: int) -> frozenset[Stage]:
        """Stages lost by formations that the step's scheduling did not know of; forgets older ones."""
        self._lost_at = {number: lost for number, lost in self._lost_at.items() if number > formation}
        return frozenset().union(*self._lost_at.values())

    def _executed(self, event: StepExecuted, now: float) -> list[Command]:
        if event.sequence not in self._in_flight:
            return []
        self._results[event.sequence] = event.result
        return [*self._complete_in_order(), *self._formed(now)]

    def _complete_in_order(self) -> list[Command]:
        """Fold what has completed, oldest first; a step without tokens completes when its turn comes."""
        commands: list[Command] = []
        while self._in_flight:
            sequence, step = next(iter(self._in_flight.items()))
            if step.scheduled and sequence not in self._results:
                break
            self.ledger.complete(step, self._results.pop(sequence, _NOTHING))
            del self._in_flight[sequence]
            if sequence in self._hollow:
                self._hollow.discard(sequence)
            else:
                commands.append(Deliver(sequence))
        return commands

    def _broken(self, event: StepBroken) -> list[Command]:
        """End the requests of a step that raised, and ask to form anew: the stages disagree on whether it ran.

        When it was recovery work that raised, no live request can be trusted to go on, and all are ended.
        """
        commands: list[Command] = [RequestFormation(event.stage, event.reason)]
        step = self._in_flight.get(event.sequence)
        if step is None:
            return [*self._abandon_all(event.reason), *commands]
        self._hollow.add(event.sequence)
        self._in_flight[event.sequence] = dataclasses.replace(
            step, admissions=(), continuations=(), scheduled={}, finished=step.finished | step.scheduled.keys()
        )
        return [Abandon(event.sequence, event.reason), *commands, *self._complete_in_order()]

    def _abandon_all(self, reason: str) -> list[Command]:
        """End every request with `reason`; nothing is generated until the pipeline is formed again."""
        self.phase, self.reason, self._forming = Phase.SUSPENDED, reason, None
        commands: list[Command] = [Abandon(s, reason) for s in self._in_flight if s not in self._hollow]
        self._in_flight.clear()
        self._hollow.clear()
        self._results.clear()
        self.ledger.clear()
        return commands


def _execute(step: Step) -> Execute:
    return Execute(step.sequence, has_tokens=bool(step.scheduled))


_NOTHING = StepResult(tokens={}, generators={})
