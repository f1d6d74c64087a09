"""One pipeline as its engine sees it: steps go out in order, results come back, and nodes may change in between.

The executor feeds this state machine events (a step from the scheduler, an answer from a node, an order from the
controller) and carries out the commands that come back. Forming a pipeline and recovering it are one path:

    FormationOrdered ──► Join every stage ──► Place replicas where a new node is the standby of the lost one
                         ──► Recompute what it still lacks ──► Restore the ledger
                         ──► issue the steps in flight again ──► FormationDone

All of it is sent in one go, since each channel keeps its order; the answers only tell how far it has come. Two are
waited for, because the plan depends on them: which replicas the new node turned out not to have, and what the last
stage, if its node stays, has sampled since. A newer order at any point starts the path again under its own epoch. A
stage whose node does not hold all KV of the lane is lost (`recovery.lost_stages`); `recovery.restoring` knows how its
KV comes back.

A planned change of nodes waits until the new ones are prepared (`recovery.ahead`), then for the steps in flight, which
have living nodes to complete on. Steps that are issued meanwhile are held back and go out to the new nodes. If one of
the old nodes dies before, the order for that replaces this one.

Nodes that serve several lanes share their KV memory among them, so an order also says how many do: see
`recovery.capacity` for the requests that have to give way. A step that raised, or that cost too many nodes, takes
the same way: its requests are set aside, to end with the reason.

A pipeline starts unformed; it is *forming* until the nodes have answered, then *serving*. When some stage has no node
it is *waiting*: all requests are set aside, so that no step is in flight and vLLM's loop goes on, and are computed
again from their tokens once it is formed. After the bound it is *suspended*: they end with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from kevlarflow.errors import IllegalTransition
from kevlarflow.recovery.ahead import Ahead, Plans
from kevlarflow.recovery.books import Books
from kevlarflow.recovery.dispatched import last_words
from kevlarflow.recovery.forming import MAX_FAILURES, Forming, Standing
from kevlarflow.recovery.giving_way import GivingWay
from kevlarflow.recovery.ledger import Ledger, Step
from kevlarflow.recovery.lost_stages import LostStages
from kevlarflow.recovery.pipeline_events import (
    Abandon,
    AbandonEverything,
    Answer,
    AssignStandby,
    ChunkRecomputed,
    Command,
    Deliver,
    Event,
    Execute,
    FormationDone,
    FormationOrdered,
    Join,
    Leave,
    Recompute,
    ReplicasConfirmed,
    ReplicasPlaced,
    RequestFormation,
    StageFlushed,
    StageJoined,
    StageRestored,
    StandbysAssigned,
    StepBroken,
    StepExecuted,
    StepIssued,
    SuspensionOrdered,
)
from kevlarflow.recovery.recompute import Chunk, Limits, plan_hits, unreachable_hits
from kevlarflow.recovery.restoring import Restoring
from kevlarflow.recovery.suspicion import NOT_AGAIN
from kevlarflow.recovery.watermarks import Watermarks
from kevlarflow.types import Epoch, Member, NodeInfo, Stage


class Pipeline:
    """The state machine; see the module's text. One door: `handle`."""

    def __init__(self, limits: Limits) -> None:
        self.standing = Standing.UNFORMED
        self.epoch = Epoch(0)
        self.nodes: tuple[NodeInfo, ...] = ()
        self.reason = ""
        """Why the pipeline is suspended, or last was: a step may come late."""
        self.formations = 0
        """How often it was ordered to form; a step that was scheduled under a smaller count is checked again."""
        self._abandoned_upto = -1
        """Steps that were scheduled under this count of formations or a smaller one are abandoned."""
        self._disagrees = False
        """Whether the nodes disagree on what has run, until they are formed anew."""
        self._lost_stages = LostStages()
        self._failures = 0
        """Of work for no request in particular, in a row."""
        self._forming: Forming | None = None
        self._next_standbys: StandbysAssigned | None = None
        """Standbys that were named after an order that waits, and are to follow it."""
        self._books = Books(limits)
        self._in_flight = self._books.in_flight
        self._watermarks = Watermarks(self._books.generations, limits.block_size)
        self._plans = Plans(self._in_flight, self._watermarks)
        self._giving_way = GivingWay(self._books)
        self._restoring = Restoring(self._books, self._giving_way, self._watermarks)

    @property
    def ledger(self) -> Ledger:
        """Live requests, as of the last completed step."""
        return self._books.ledger

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Sequence numbers of the steps that were issued and have not completed, in order."""
        return self._in_flight.sequences

    @property
    def members(self) -> tuple[Member, ...]:
        """Who serves, in stage order; nobody, when the pipeline has to be formed anew."""
        return () if self._disagrees else tuple(node.member for node in self.nodes)

    @property
    def ordered(self) -> tuple[Epoch, tuple[NodeInfo, ...]]:
        """The epoch and the nodes of the newest order to form, which may wait."""
        waiting = self._plans.waiting
        return (waiting.order.epoch, waiting.order.nodes) if waiting is not None else (self.epoch, self.nodes)

    @property
    def awaited(self) -> tuple[Stage, ...]:
        """Stages whose nodes have yet to answer to the order that is being carried out."""
        forming = self._forming
        return forming.awaited if forming is not None else ()

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event at monotonic time `now` (seconds); returns what to do, in order.

        Answers of another epoch than the current one are ignored, but for those to what is done ahead of the next.
        Raises `IllegalTransition` for a step that is issued twice.
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
            case _:
                return self._answered(event, now)

    def _answered(self, event: Answer, now: float) -> list[Command]:
        if event.epoch == self._plans.epoch:
            return self._plans.answered(event) + self._form_as_planned(now)
        match event:
            case StageFlushed():
                return self._flushed(event, now) if event.epoch == self.epoch else []
            case ReplicasPlaced():
                return self._replicas_placed(event, now) if event.epoch == self.epoch else []
            case StageJoined() | ChunkRecomputed() | StageRestored():
                return self._progress(event, now) if event.epoch == self.epoch else []
            case StepExecuted():
                return self._executed(event, now) if event.epoch == self.epoch else []
            case StepBroken():
                return self._broken(event, now) if event.epoch == self.epoch else []

    # ---- forming

    def _form(self, order: FormationOrdered, now: float) -> list[Command]:
        if order.epoch <= self.epoch:
            return []
        if order.epoch == self._plans.epoch:
            return self._plans.overdue(now) + self._form_as_planned(now)
        busy = self._in_flight.running or len(self.ledger) > 0
        # Steps that the nodes disagree on will not complete.
        if order.planned and busy and self.standing is Standing.SERVING and not self._disagrees:
            return self._plans.make(order, self.nodes, now) + self._form_as_planned(now)
        return self._change_nodes(Ahead(order, now))

    def _change_nodes(self, ahead: Ahead) -> list[Command]:
        """Carry an order out, given what was done ahead of it."""
        order = ahead.order
        self._plans.drop()
        self._disagrees = False
        changed = {after.stage for before, after in zip(self.nodes, order.nodes, strict=False) if before != after}
        stages = {Stage(index) for index in range(len(order.nodes))}
        to_hear = self._to_hear(stages - changed - ahead.joined)
        placed = self._forming.placed_on(stages - changed) if self._forming is not None else {}
        bereft = last_words(self.nodes, self._bereft(order, changed), order.losses)
        doomed = self._in_flight.recall(order.epoch, stages - changed, bereft, self._forming)
        # Whether or not the controller knows of them: one that has lost its memory may not.
        left = {*order.released, *self.nodes, *self._plans.opened} - {*order.nodes}
        self._plans.opened.clear()
        self.epoch, self.nodes = order.epoch, order.nodes
        self._books.generations.mark = order.epoch
        self.standing = Standing.FORMING
        self.formations += 1
        lost = self._lost_stages.find(self.nodes, self.formations)
        blocks = min(node.kv_blocks for node in self.nodes)
        commands = self._giving_way.share(blocks, order.shares, doomed, self.formations)
        self._forming = Forming(
            ordered_at=ahead.came_at,
            requests=len(self.ledger),
            to_join=stages - ahead.joined,
            to_restore=set(stages),
            lost=lost,
            to_hear=to_hear,
        )
        commands += [Leave(node) for node in sorted(left, key=_by_member)]
        commands += [Join(stage, self._giving_way.usable, order.orphans) for stage in sorted(stages - ahead.opened)]
        commands += [
            AssignStandby(stage, self._watermarks.standby_for(stage, self.nodes[stage].member), order.anew)
            for stage in self._watermarks.stages
        ]
        commands += self._restoring.place(self._forming, self.nodes, placed | ahead.placed)
        commands += self._resume(self._forming) if not self._forming.waits else ()
        return commands + self._assign_next_standbys()

    def _to_hear(self, staying: set[Stage]) -> Epoch | None:
        """The epoch in which steps were last sent, if the last stage may have sampled one and the engine not know.

        That was by the nodes of that epoch, so what is believed of it goes with who is known to have its KV.
        """
        if len(self.nodes) - 1 not in staying:
            return None
        if self._in_flight.may_be_sampled:
            return self.epoch
        return self._forming.to_hear if self._forming is not None else None

    def _bereft(self, order: FormationOrdered, changed: set[Stage]) -> set[Stage]:
        """Of the stages that an order gives to others, those whose nodes were lost.

        It may be about something else and tell of a loss along: a controller that was started again does so.
        """
        told = {loss.member for loss in order.losses}
        return {stage for stage in changed if order.lost or self.nodes[stage].member in told}

    def _replicas_placed(self, event: ReplicasPlaced, now: float) -> list[Command]:
        if event.ahead:
            # The nodes have changed without waiting for it.
            return []
        forming = self._forming
        if forming is None or event.stage not in forming.to_place:
            return self._rest_placed(event.stage, now)
        self._restoring.placed(forming, event, self.nodes[event.stage].member)
        if not forming.to_place:
            forming.placed_at = now
        return self._resume(forming) if not forming.waits else []

    def _rest_placed(self, stage: Stage, now: float) -> list[Command]:
        """The second answer of a new node: kept prefixes are in place as well."""
        if not self._lost_stages.rest_placed(stage):
            return []
        self._failures = 0
        if self._forming is None:
            self._lost_stages.make_whole(self.nodes)
        return self._formed(now)

    def _resume(self, forming: Forming) -> list[Command]:
        """All replicas are in place that will be: do the rest, and go on with the steps in flight."""
        commands = self._set_aside_unreachable(forming)
        self._recompute_late_hits(forming)
        self._lost_stages.await_rest(forming.placed)
        commands += self._restoring.resume(forming)
        if forming.lost:
            # A step that is being scheduled now does not know of the eviction yet.
            self.formations += 1
            self._lost_stages.note(forming.lost, self.formations)
        # A step may have lost all its requests.
        return commands + self._complete_in_order()

    def _set_aside_unreachable(self, forming: Forming) -> list[Command]:
        requests = unreachable_hits(list(self._in_flight), self._books.block_size, lost=bool(forming.lost))
        if not requests:
            return []
        commands = self._giving_way.set_aside(dict.fromkeys(requests, ""), self.formations + 1)
        self.formations += bool(commands)
        return commands

    def _progress(self, event: StageJoined | ChunkRecomputed | StageRestored, now: float) -> list[Command]:
        if isinstance(event, ChunkRecomputed):
            self._in_flight.dispatched.done(-event.sequence)
            if self._lost_stages.recomputed(event.sequence) and self.standing is Standing.SERVING:
                self._lost_stages.make_whole(self.nodes)
        if self._forming is None:
            return []
        self._forming.note(event, now)
        commands = self._heard(self._forming, event) if isinstance(event, StageJoined) else []
        return commands + self._formed(now)

    def _heard(self, forming: Forming, event: StageJoined) -> list[Command]:
        """The last stage says what it had sampled: steps that are over by that, and need not come again."""
        if forming.to_hear is None or event.stage != len(self.nodes) - 1:
            return []
        told = {number: result for (epoch, number), result in event.results.items() if epoch == forming.to_hear}
        self._in_flight.executed_before(told)
        commands = self._complete_in_order()
        forming.to_hear = None
        return commands + (self._resume(forming) if not forming.waits else [])

    def _formed(self, now: float) -> list[Command]:
        """Finish forming once every stage has answered and the first step that was issued again is done."""
        forming = self._forming
        if forming is None or self._disagrees or not forming.prepared:
            return []
        self._lost_stages.make_whole(self.nodes)
        if forming.first_step is not None and forming.first_step in self._in_flight:
            return []
        self._forming, self.standing = None, Standing.SERVING
        self._failures = self._failures if self._lost_stages.awaits_rest else 0
        self._in_flight.dispatched.settle()
        done = FormationDone(self.epoch, forming.phases(now), forming.requests, forming.recomputed_tokens)
        # No answer comes to a step without tokens: one that was held back is over now.
        return [*self._complete_in_order(), done]

    def _suspend(self, order: SuspensionOrdered) -> list[Command]:
        if order.epoch <= self.epoch:
            return []
        self.epoch = self._books.generations.mark = order.epoch
        return self._wait(order) if order.waits else self._abandon_all(order.reason)

    def _wait(self, order: SuspensionOrdered) -> list[Command]:
        """Keep all requests until the next order, but nothing in flight: the scheduler gets no tokens for it."""
        lost = last_words(self.nodes, order.lost_stages, order.losses)
        doomed = self._in_flight.recall(order.epoch, set(), lost, self._forming)
        self.standing, self._forming, self._disagrees = Standing.WAITING, None, False
        self._plans.drop()
        everybody = {entry.request for entry in self.ledger.entries()} | self._in_flight.requests
        aside = self._set_aside(dict.fromkeys(everybody, "") | doomed)
        return aside + self._leave_lanes() + self._assign_next_standbys()

    def _leave_lanes(self) -> list[Command]:
        """What the nodes hold is of no use any more: no request has blocks. And others may wait for the memory."""
        self._lost_stages.clear()
        opened = [node for node, epoch in self._plans.opened.items() if epoch < self.epoch]
        return [Leave(node) for node in dict.fromkeys([*self.nodes, *opened])]

    def _set_aside(self, reasons: dict[str, str]) -> list[Command]:
        """An empty reason is for a request that is to go on later."""
        self.formations += 1
        commands = self._giving_way.set_aside(reasons, self.formations)
        return commands + self._complete_in_order()

    # ---- replicas

    def _assign_standbys(self, event: StandbysAssigned) -> list[Command]:
        if self._plans.waiting is not None:
            self._next_standbys = event
            return []
        changed = self._watermarks.assign(event.standbys)
        return [AssignStandby(stage, event.standbys[stage]) for stage in changed] if self.nodes else []

    def _assign_next_standbys(self) -> list[Command]:
        following, self._next_standbys = self._next_standbys, None
        return self._assign_standbys(following) if following is not None else []

    def _confirm(self, event: ReplicasConfirmed) -> list[Command]:
        """Believe a confirmation only of the node that serves the stage, and of the standby that it has now."""
        serves = event.stage < len(self.nodes) and self.nodes[event.stage].member == event.source
        if serves and self._watermarks.is_standby(event.stage, event.standby):
            self._watermarks.confirm(event.stage, event.stored, event.dropped)
        return []

    def coverage_of(self, stage: Stage) -> tuple[NodeInfo | None, int, int]:
        """(standby, tokens of live requests, those of them that its replicas cover)."""
        return self._watermarks.of(stage, list(self.ledger.entries()))

    # ---- steps

    def _issue(self, scheduled: Step) -> list[Command]:
        if scheduled.sequence in self._in_flight:
            raise IllegalTransition(f"step {scheduled.sequence}", "in flight", "StepIssued")
        # Blocks of a request that is set aside, or whose step is given up, change hands all the same.
        self._books.generations.allocate(scheduled, self._books.block_size)
        if self.standing is Standing.SUSPENDED or scheduled.formation <= self._abandoned_upto:
            return [Abandon(scheduled.sequence, self.reason)]
        lost = self._lost_stages.since(scheduled.formation)
        unreachable = unreachable_hits([scheduled], self._books.block_size, lost=True) if lost else set[str]()
        step, commands = self._giving_way.leave_out(scheduled, unreachable, self.formations + 1)
        self.formations += bool(commands)
        left_out = frozenset(scheduled.scheduled) - frozenset(step.scheduled)
        before = list(self._in_flight)
        effects = self._books.tables.issue(step, self._books.generations, self._books.block_size)
        self._in_flight.add(step, effects, left_out, overtakes=bool(lost))
        if self.standing is Standing.WAITING:
            return commands + self._set_aside(dict.fromkeys(step.scheduled, ""))
        if lost:
            self._recompute_hits(step, plan_hits(self.ledger, before, step, lost, self._books.limits), lost)
        if self._forming is not None and self._forming.waits:
            return commands
        return commands + self._due() + self._complete_in_order()

    def _recompute_hits(self, step: Step, chunks: Sequence[Chunk], lost: frozenset[Stage]) -> None:
        """Before a step whose hits these stages do not have. Until they have, they are not whole."""
        if chunks and self._forming is not None and self._forming.waits:
            # What the ledger holds may change until the plan is made, and this is planned along.
            self._forming.late[step.sequence] = lost
            self._lost_stages.lack(lost)
            return
        numbered = self._in_flight.dispatched.add_chunks(chunks)
        self._lost_stages.await_chunks(numbered, lost)
        oldest = min(self._in_flight.sequences)
        self._in_flight.precede(step.sequence, [Recompute(*each, oldest) for each in numbered.items()])

    def _recompute_late_hits(self, forming: Forming) -> None:
        """Those of steps that came while the plan waited, and were scheduled before an earlier loss than this one's."""
        late, forming.late = forming.late, {}
        steps = list(self._in_flight)
        for place, step in enumerate(steps):
            if step.sequence in late:
                lost = late[step.sequence]
                chunks = plan_hits(self.ledger, steps[:place], step, lost, self._books.limits)
                self._recompute_hits(step, chunks, lost)

    def _flushed(self, event: StageFlushed, now: float) -> list[Command]:
        self._plans.flushed(event.stage)
        return self._form_as_planned(now)

    def _executed(self, event: StepExecuted, now: float) -> list[Command]:
        if event.sequence not in self._in_flight:
            return []
        self._in_flight.executed(event.sequence, event.result)
        return [*self._complete_in_order(), *self._formed(now), *self._form_as_planned(now)]

    def _form_as_planned(self, now: float) -> list[Command]:
        """Carry out the order that waited, once only steps are left that were held back for it."""
        ahead = self._plans.due
        return self._change_nodes(ahead) if ahead is not None else []

    def _complete_in_order(self) -> list[Command]:
        """Fold what has completed, oldest first; a step without tokens completes when its turn comes."""
        commands: list[Command] = []
        while (done := self._in_flight.complete()) is not None:
            step, result, left_out = done
            self.ledger.complete(step, result)
            commands.append(Deliver(step.sequence, left_out, result.output))
        return [*commands, *self._due()]

    def _due(self) -> list[Recompute | Execute]:
        """Steps that may go out now: none to nodes that disagree, nor before it is known what comes first."""
        waits = self._disagrees or (self._forming is not None and self._forming.waits)
        return [] if waits else self._in_flight.due()

    def _broken(self, event: StepBroken, now: float) -> list[Command]:
        """End the requests that the failed work was for, and form anew: the stages disagree on what has run.

        Work for all of them ends nobody at first: the controller tries the node once more, and then another one.

        An order that waits for the steps in flight is carried out for it; otherwise the controller is asked for one.
        """
        self._disagrees = True
        ahead, blamed = self._plans.waiting, self._behind(event.sequence)
        self._failures += blamed is None
        if self._failures > MAX_FAILURES:
            commands = self._abandon_all(event.reason, stays=ahead is not None)
        else:
            commands = self._set_aside(dict.fromkeys(blamed or (), f"{event.reason}: {NOT_AGAIN}"))
        if ahead is not None:
            return commands + self._change_nodes(ahead)
        return [*commands, RequestFormation(event.stage, event.reason)]

    def _behind(self, sequence: int) -> Sequence[str] | None:
        """The requests of a step, or of a chunk, whose numbers are negative here; None for other recovery work."""
        if sequence > 0:
            # One without tokens may be over already, and was for nobody.
            return list(self._in_flight[sequence].scheduled) if sequence in self._in_flight else []
        chunk = self._forming.chunks.get(-sequence) if self._forming is not None else None
        return [span.request for span in chunk.spans] if chunk is not None else None

    def _abandon_all(self, reason: str, *, stays: bool = False) -> list[Command]:
        """End every request with `reason`; nothing is generated until the pipeline is formed again.

        With `stays` that is at once, and who is not used any more is told then: a `Leave` would come under the new
        epoch, and in the way of the `Join`. Either way the nodes hold nothing of use.

        Steps that never ran on some stage leave blocks in the prefix cache that were never computed there: so no
        stage counts as complete, and the next formation evicts everything.
        """
        self.standing, self.reason, self._forming = Standing.SUSPENDED, reason, None
        self._plans.drop()
        self._abandoned_upto, self._failures = self.formations, 0
        commands: list[Command] = [Abandon(sequence, reason) for sequence in self._in_flight.sequences]
        self._in_flight.clear()
        self._books.tables.clear()
        self.ledger.clear()
        self._watermarks.clear()
        self._giving_way.clear()
        leaves = self._leave_lanes()
        return [AbandonEverything(reason), *commands, *(leaves if not stays else ()), *self._assign_next_standbys()]


def _by_member(node: NodeInfo) -> Member:
    return node.member
