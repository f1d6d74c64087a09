"""One pipeline as its engine sees it: steps go out in order, results come back, and nodes may change in between.

The executor feeds this state machine events (a step from the scheduler, an answer from a node, an order from the
controller) and carries out the commands that come back. Forming a pipeline and recovering it are one path:

    FormationOrdered ──► Join every stage ──► Place replicas where a new node is the standby of the lost one
                         ──► Recompute what it still lacks ──► Restore the ledger
                         ──► issue the steps in flight again ──► FormationDone

All of it is sent in one go, since each channel keeps its order; the answers only tell how far it has come. Only one
is waited for: which replicas the new node turned out not to have, because the plan depends on it. A newer order at
any point starts the path again under its own epoch, and what is still missing on a stage is remembered by
`_complete_on`: the member that holds the whole KV of the lane. A stage whose member is another one is lost.

A planned change of nodes waits for the steps in flight, which have living nodes to complete on. Steps that are issued
meanwhile are held back and go out to the new nodes. If one of the old nodes dies before, the order for that replaces
this one.

A pipeline starts unformed; it is *forming* until the nodes have answered, then *serving*; *suspended* when some
stage has no node, in which case the steps in flight are abandoned and their requests end with the reason.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterable, Mapping

from kevlarflow.errors import IllegalTransition
from kevlarflow.recovery.coverage import Coverage, Generations, IssuedTables, Replica, allocated, tables, watermark
from kevlarflow.recovery.ledger import Ledger, Step, StepResult
from kevlarflow.recovery.pipeline_events import (
    Abandon,
    AbandonEverything,
    AssignStandby,
    ChunkRecomputed,
    Command,
    Deliver,
    Event,
    EvictPrefixCache,
    Execute,
    FormationDone,
    FormationOrdered,
    Join,
    Leave,
    Place,
    PlaceRest,
    Recompute,
    ReplicasConfirmed,
    ReplicasPlaced,
    RequestFormation,
    Restore,
    StageJoined,
    StageRestored,
    StandbysAssigned,
    StepBroken,
    StepExecuted,
    StepIssued,
    SuspensionOrdered,
)
from kevlarflow.recovery.recompute import Limits, needed_blocks, plan, plan_hits, read_again
from kevlarflow.types import Epoch, Member, NodeInfo, Phases, Stage


class Phase(enum.StrEnum):
    """Where a pipeline stands; see the module's text."""

    UNFORMED = "unformed"
    FORMING = "forming"
    SERVING = "serving"
    SUSPENDED = "suspended"


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
    lost: frozenset[Stage] = frozenset()
    to_place: set[Stage] = dataclasses.field(default_factory=set)
    """Stages whose answer about replicas is awaited; until then nothing is planned and no step goes out."""
    issued_meanwhile: bool = False
    """Whether a step was issued while replicas were awaited."""
    placed: dict[Stage, dict[int, Replica]] = dataclasses.field(default_factory=dict)
    joined_at: float | None = None
    placed_at: float | None = None
    recomputed_at: float | None = None
    restored_at: float | None = None

    def phases(self, now: float) -> Phases:
        joined = self.joined_at or self.ordered_at
        placed = max(joined, self.placed_at or joined)
        recomputed = max(placed, self.recomputed_at or placed)
        restored = max(recomputed, self.restored_at or recomputed)
        return Phases(
            relink=joined - self.ordered_at,
            restore=(placed - joined) + (restored - recomputed),
            recompute=recomputed - placed,
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
        self._abandoned_upto = -1
        """Steps that were scheduled under this count of formations or a smaller one are abandoned."""
        self._results: dict[int, StepResult] = {}
        self._complete_on: dict[Stage, Member] = {}
        self._resting: set[Stage] = set()
        """New stages that have yet to put kept prefixes in place: until they have, they are not complete."""
        self._lost_at: dict[int, frozenset[Stage]] = {}
        self._forming: _Formation | None = None
        self._planned: FormationOrdered | None = None
        """An order that waits for the steps in flight."""
        self._held_back: set[int] = set()
        """Steps that wait for that order."""
        self._next_standbys: StandbysAssigned | None = None
        """Standbys that were named after that order, and are to follow it."""
        self._chunk_numbers = itertools.count(1)
        self._generations = Generations()
        self._tables = IssuedTables()
        self._writes: dict[int, tuple[Replica, ...]] = {}
        self._standbys: dict[Stage, NodeInfo | None] = {}
        self._coverage: dict[Stage, Coverage] = {}

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
            case StandbysAssigned():
                return self._assign_standbys(event)
            case ReplicasConfirmed():
                return self._confirm(event)
            case ReplicasPlaced():
                return self._replicas_placed(event, now) if event.epoch == self.epoch else []
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
        if order.planned and self.phase is Phase.SERVING and self._in_flight.keys() - self._held_back:
            self._planned = order
            return []
        self._planned = None
        self._held_back.clear()
        self.epoch, self.nodes, self.reason = order.epoch, order.nodes, ""
        self.phase = Phase.FORMING
        self.formations += 1
        lost = self._note_lost_stages()
        self._resting.clear()
        stages = {Stage(index) for index in range(len(self.nodes))}
        self._forming = _Formation(
            ordered_at=now,
            requests=len(self.ledger),
            recomputed_tokens=0,
            to_join=set(stages),
            to_restore=set(stages),
            chunks=set(),
            first_step=None,
            lost=lost,
        )
        commands: list[Command] = [Leave(node) for node in order.released]
        commands += [Join(stage) for stage in sorted(stages)]
        commands += [AssignStandby(stage, self._standby_of(stage)) for stage in sorted(self._standbys)]
        commands += self._place(self._forming) or self._resume(self._forming)
        return commands + self._assign_next_standbys()

    def _place(self, forming: _Formation) -> list[Command]:
        """Ask each new node that was the standby of the lost one for its replicas; empty when there are none."""
        wanted = self._blocks_in_use()
        commands: list[Command] = []
        for stage in sorted(forming.lost):
            valid = self._coverage[stage].valid(self._generations) if self._was_standby(stage) else {}
            if not valid:
                forming.placed.clear()
                return []
            now = tuple(replica for block, replica in valid.items() if block in wanted)
            full = [replica for replica in valid.values() if replica.filled == self.limits.block_size]
            later = tuple(replica for replica in full if replica.block not in wanted)
            forming.placed[stage] = {replica.block: replica for replica in (*now, *later)}
            commands.append(Place(stage, now, later))
        forming.to_place = set(forming.placed)
        return commands

    def _standby_of(self, stage: Stage) -> NodeInfo | None:
        """The standby, unless it serves the stage itself now: the controller will name another."""
        return None if self._was_standby(stage) else self._standbys[stage]

    def _was_standby(self, stage: Stage) -> bool:
        standby = self._standbys.get(stage)
        return standby is not None and standby.member == self.nodes[stage].member

    def _blocks_in_use(self) -> set[int]:
        """Blocks of live requests, and those that steps in flight count as prefix hits."""
        blocks = {block for entry in self.ledger.entries() for block in entry.blocks}
        for step in self._in_flight.values():
            blocks.update(block for _, table, _ in tables(step) for block in table)
        return blocks

    def _replicas_placed(self, event: ReplicasPlaced, now: float) -> list[Command]:
        forming = self._forming
        if forming is None or event.stage not in forming.to_place:
            return self._rest_placed(event.stage, now)
        forming.to_place.discard(event.stage)
        for replica in event.missing:
            forming.placed[event.stage].pop(replica.block, None)
        self._coverage[event.stage].drop(event.missing)
        if forming.to_place:
            return []
        forming.placed_at = now
        return self._resume(forming)

    def _rest_placed(self, stage: Stage, now: float) -> list[Command]:
        """The second answer of a new node: kept prefixes are in place as well."""
        if stage not in self._resting:
            return []
        self._resting.discard(stage)
        if self._forming is None:
            self._complete_on[stage] = self.nodes[stage].member
        return self._formed(now)

    def _resume(self, forming: _Formation) -> list[Command]:
        """Recompute what replicas do not cover, restore the ledger, issue the steps in flight again."""
        steps = list(self._in_flight.values())
        restored = _held_everywhere([self._current(replicas) for replicas in forming.placed.values()])
        chunks = plan(self.ledger, steps, forming.lost, self.limits, restored)
        numbered = {next(self._chunk_numbers): chunk for chunk in chunks}
        forming.recomputed_tokens = sum(chunk.num_tokens for chunk in chunks)
        forming.chunks = set(numbered)
        forming.first_step = next((step.sequence for step in steps if step.scheduled), None)
        keep = frozenset(restored) - self._blocks_in_use()
        self._resting = set(forming.placed)
        rest: list[Command] = [PlaceRest(stage) for stage in sorted(forming.placed)]
        # A step that was issued while replicas were awaited may hit or overwrite a prefix that nobody used before.
        commands: list[Command] = list(rest) if forming.issued_meanwhile else []
        commands += [Recompute(number, chunk) for number, chunk in numbered.items()]
        commands.append(Restore(tuple(self.ledger.entries()), self._held(keep)))
        commands += [self._execute(step) for step in steps]
        commands += [] if forming.issued_meanwhile else rest
        if forming.lost:
            commands.append(EvictPrefixCache(keep))
            # Nobody computes what is evicted on the new node: even a replica that is confirmed late is void.
            self._generations.void(set(keep) | needed_blocks(self.ledger, steps, self.limits.block_size), self.epoch)
            # A step that is being scheduled now does not know of the eviction yet.
            self.formations += 1
            self._lost_at[self.formations] = forming.lost
        return commands

    def _current(self, replicas: Mapping[int, Replica]) -> dict[int, Replica]:
        """Replicas of blocks that were not given to another request meanwhile."""
        return {block: each for block, each in replicas.items() if each.generation == self._generations[block]}

    def _held(self, keep: frozenset[int]) -> tuple[Replica, ...]:
        """What every node's lane holds once it is restored: blocks of live requests, and kept prefixes."""
        size = self.limits.block_size
        # What a step in flight has taken bears that step's generation already, and holds its content only after it.
        taken = set[int]().union(*(allocated(step, size) for step in self._in_flight.values()))
        held = {block: Replica(block, self._generations[block], size) for block in keep - taken}
        # The blocks of a request that ends in flight are not computed again, so a new node does not hold them.
        for entry in read_again(self.ledger, list(self._in_flight.values())):
            for index, block in enumerate(entry.blocks[: -(-entry.computed // size)]):
                if block in taken:
                    continue
                filled = min(size, entry.computed - index * size)
                if block not in held or held[block].filled < filled:
                    held[block] = Replica(block, self._generations[block], filled, depth=index)
        return tuple(held.values())

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
        if forming is None or forming.to_place or forming.to_join or forming.to_restore or forming.chunks:
            return []
        nodes = ((Stage(index), node) for index, node in enumerate(self.nodes))
        self._complete_on = {stage: node.member for stage, node in nodes if stage not in self._resting}
        if forming.first_step is not None and forming.first_step in self._in_flight:
            return []
        self._forming = None
        self.phase = Phase.SERVING
        done = FormationDone(self.epoch, forming.phases(now), forming.requests, forming.recomputed_tokens)
        # No answer comes to a step without tokens: one that was held back is over now.
        return [*self._complete_in_order(), done]

    def _suspend(self, order: SuspensionOrdered) -> list[Command]:
        if order.epoch <= self.epoch:
            return []
        self.epoch = order.epoch
        return self._abandon_all(order.reason)

    # ---- replicas

    def _assign_standbys(self, event: StandbysAssigned) -> list[Command]:
        """A stage with another standby than before starts with nothing covered."""
        if self._planned is not None:
            self._next_standbys = event
            return []
        commands: list[Command] = []
        for index, standby in enumerate(event.standbys):
            stage = Stage(index)
            if stage in self._standbys and self._standbys[stage] == standby:
                continue
            self._standbys[stage] = standby
            self._coverage[stage] = Coverage()
            if self.nodes:
                commands.append(AssignStandby(stage, standby))
        return commands

    def _assign_next_standbys(self) -> list[Command]:
        following, self._next_standbys = self._next_standbys, None
        return self._assign_standbys(following) if following is not None else []

    def _confirm(self, event: ReplicasConfirmed) -> list[Command]:
        """Believe a confirmation only of the node that serves the stage, and of the standby that it has now."""
        standby = self._standbys.get(event.stage)
        serves = event.stage < len(self.nodes) and self.nodes[event.stage].member == event.source
        if serves and standby is not None and standby.member == event.standby:
            coverage = self._coverage[event.stage]
            coverage.confirm(event.stored)
            coverage.drop(event.dropped)
        return []

    def coverage_of(self, stage: Stage) -> tuple[NodeInfo | None, int, int]:
        """(standby, tokens of live requests, those of them that its replicas cover)."""
        valid = self._coverage[stage].valid(self._generations) if stage in self._coverage else {}
        size = self.limits.block_size
        entries = list(self.ledger.entries())
        covered = sum(watermark(entry.blocks, entry.computed, valid, size) for entry in entries)
        return self._standbys.get(stage), sum(entry.computed for entry in entries), covered

    # ---- steps

    def _issue(self, step: Step) -> list[Command]:
        if step.sequence in self._in_flight:
            raise IllegalTransition(f"step {step.sequence}", "in flight", "StepIssued")
        if self.phase is Phase.SUSPENDED or step.formation <= self._abandoned_upto:
            return [Abandon(step.sequence, self.reason)]
        commands: list[Command] = []
        self._generations.allocate(step, self.limits.block_size)
        self._writes[step.sequence] = self._tables.issue(step, self._generations, self.limits.block_size)
        if self._forming is not None and self._forming.to_place:
            self._in_flight[step.sequence] = step
            self._forming.issued_meanwhile = True
            return []
        lost = self._lost_since(step.formation)
        if self._planned is not None and not lost:
            self._in_flight[step.sequence] = step
            self._held_back.add(step.sequence)
            return []
        if lost:
            chunks = plan_hits(self.ledger, list(self._in_flight.values()), step, lost, self.limits)
            commands += [Recompute(next(self._chunk_numbers), chunk) for chunk in chunks]
        self._in_flight[step.sequence] = step
        commands.append(self._execute(step))
        return commands + self._complete_in_order()

    def _lost_since(self, formation: int) -> frozenset[Stage]:
        """Stages lost by formations that the step's scheduling did not know of; forgets older ones."""
        self._lost_at = {number: lost for number, lost in self._lost_at.items() if number > formation}
        return frozenset().union(*self._lost_at.values())

    def _execute(self, step: Step) -> Execute:
        return Execute(step.sequence, has_tokens=bool(step.scheduled), writes=self._writes[step.sequence])

    def _executed(self, event: StepExecuted, now: float) -> list[Command]:
        if event.sequence not in self._in_flight:
            return []
        self._results[event.sequence] = event.result
        return [*self._complete_in_order(), *self._formed(now), *self._form_as_planned(now)]

    def _form_as_planned(self, now: float) -> list[Command]:
        """Carry out the order that waited, once only steps are left that were held back for it."""
        if self._planned is None or self._in_flight.keys() - self._held_back:
            return []
        return self._form(self._planned, now)

    def _complete_in_order(self) -> list[Command]:
        """Fold what has completed, oldest first; a step without tokens completes when its turn comes."""
        commands: list[Command] = []
        while self._in_flight:
            sequence, step = next(iter(self._in_flight.items()))
            if step.scheduled and sequence not in self._results:
                break
            self.ledger.complete(step, self._results.pop(sequence, _NOTHING))
            del self._in_flight[sequence]
            self._writes.pop(sequence, None)
            commands.append(Deliver(sequence))
        return commands

    def _broken(self, event: StepBroken) -> list[Command]:
        """End every request, and ask to form anew.

        The stages disagree on whether the step ran, and vLLM has cached the blocks that it was to fill: requests of
        other steps may count on them already. So none can be trusted to go on, nor any cached block.
        """
        return [*self._abandon_all(event.reason), RequestFormation(event.stage, event.reason)]

    def _abandon_all(self, reason: str) -> list[Command]:
        """End every request with `reason`; nothing is generated until the pipeline is formed again.

        Steps that never ran on some stage leave blocks in the prefix cache that were never computed there: so no
        stage counts as complete, and the next formation evicts everything.
        """
        self.phase, self.reason, self._forming = Phase.SUSPENDED, reason, None
        self._abandoned_upto = self.formations
        self._planned = None
        self._held_back.clear()
        commands: list[Command] = [Abandon(sequence, reason) for sequence in self._in_flight]
        self._in_flight.clear()
        self._writes.clear()
        self._tables.clear()
        self._results.clear()
        self.ledger.clear()
        self._complete_on.clear()
        self._resting.clear()
        self._coverage = {stage: Coverage() for stage in self._coverage}
        return [AbandonEverything(reason), *commands, *self._assign_next_standbys()]


def _held_everywhere(placed: Iterable[Mapping[int, Replica]]) -> dict[int, int]:
    """Blocks that every lost stage has from a replica, with the tokens that are filled on all of them."""
    stages = list(placed)
    if not stages:
        return {}
    common = set(stages[0]).intersection(*stages[1:])
    return {block: min(replicas[block].filled for replicas in stages) for block in common}


_NOTHING = StepResult(tokens={}, generators={})
