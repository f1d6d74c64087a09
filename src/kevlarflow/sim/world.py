"""One pipeline under faults, driven by a seed: the real `recovery.pipeline` between a toy scheduler and toy stages.

Messages travel on queues that keep their order, as the real channels do, and are delivered in drawn order among
queues. Faults are drawn: a node is lost (its successor has empty KV memory), again while the pipeline is still
re-forming, or just between the scheduling of a step and its issue; a step raises on some stage; a node begins or ends
to serve other lanes as well, so that the blocks that may be used become fewer or more; nobody is there in place of a
lost node for a while, and requests wait. After each run every request must have ended with exactly the tokens of a run
without failure, but for those of a step that raised.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable

from kevlarflow.recovery import pipeline_events as core
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.forming import Standing
from kevlarflow.recovery.ledger import Step
from kevlarflow.recovery.pipeline import Pipeline
from kevlarflow.recovery.recompute import Limits
from kevlarflow.recovery.suspicion import MAX_COST, MAX_POSSIBLE_COST, NOT_AGAIN, POSSIBLE_REASON, REASON
from kevlarflow.sim.errors import Stuck, Violation, WrongTokens
from kevlarflow.sim.scheduler import Blocks, Request, ToyScheduler, completed
from kevlarflow.sim.shapes import Shape, draw
from kevlarflow.sim.stage import VOCABULARY, Memory, ToyStage, next_token
from kevlarflow.sim.world_lane import Lane, Standby
from kevlarflow.types import Computing, Epoch, Loss, Member, NodeId, NodeInfo, Stage

MAX_ACTIONS = 20_000
LAGGING_SHARE = 0.1
KILLING_SHARE = 0.5
FIRST_STEP = 1_000_000
"""Far above every epoch, as in reality: see `Generations.mark`."""


def _draw_lag(seed: int) -> random.Random | None:
    """For runs in which much may happen between the scheduling of a step and its issue: what is drawn there."""
    chance = random.Random(f"lag {seed}")
    return chance if chance.random() < LAGGING_SHARE else None


def _draw_killer(seed: int) -> random.Random | None:
    """For runs in which somebody may be known to have killed a lost node: what is drawn there."""
    chance = random.Random(f"killer {seed}")
    return chance if chance.random() < KILLING_SHARE else None


class World:
    """See the module's text."""

    _asked = False
    """Whether the core wants to be formed anew."""

    def __init__(self, seed: int, shape: Shape | None = None) -> None:
        self.rng = random.Random(seed)
        self.lag, self.killer = _draw_lag(seed), _draw_killer(seed)
        self.shape = shape or draw(self.rng)
        shape = self.shape
        self.now = 0.0
        self.pipeline = Pipeline(Limits(shape.budget, 3, shape.block_size, shape.stages))
        blocks = Blocks(shape.blocks, shape.block_size)
        self.scheduler = ToyScheduler(self.rng, blocks, shape.budget, max_running=4, first_step=FIRST_STEP)
        self.scheduled_nothing = False
        """Whether the last step had no tokens."""
        self.aborted: set[str] = set()
        self.incarnations = [0] * shape.stages
        self.lanes = [self._new_lane(Stage(stage)) for stage in range(shape.stages)]
        self.standbys = [self._new_standby(Stage(stage)) for stage in range(shape.stages)]
        self.answers: deque[core.Event] = deque()
        self.steps: dict[int, tuple[Step, dict[str, list[int]]]] = {}
        """All of them: a node that lags behind may still run one that has completed elsewhere."""
        self.expected = self._draw_requests()
        self.losses_left, self.reshares_left = shape.losses, shape.reshares
        self.delivered: deque[int] = deque()
        self.waits_for: deque[int] = deque()
        self.for_scheduler: list[core.EvictPrefixCache | core.SetAside | core.UseBlocks] = []
        """What it has to do before it schedules."""
        self.outputs: dict[int, dict[str, list[int]]] = {}
        """Of the steps that were delivered."""
        self.blamed: dict[str, set[str]] = {}
        """Requests that may end with an error, and with which ones."""
        self.epoch = 0
        """Of the last order."""
        self.lost_idle: list[Loss] = []
        """Lost nodes that were computing nothing, where that is known, and those that somebody has killed."""
        self.shares = 1
        self.resumed = self.set_aside = self.recoveries = self.killed = self.waits = 0
        self._form()
        self._assign()

    def _draw_requests(self) -> dict[str, list[int]]:
        """Prompts that share prefixes; the expected tokens of each."""
        rng, shape = self.rng, self.shape
        longest = (shape.blocks - 1) * shape.block_size - 1
        common = [rng.randrange(VOCABULARY) for _ in range(longest)]
        expected = {}
        for index in range(shape.requests):
            length = rng.randint(1, max(1, min(20, longest // 2)))
            shared = rng.randint(0, length)
            prompt = common[:shared] + [rng.randrange(VOCABULARY) for _ in range(length - shared)]
            outputs = rng.randint(1, max(1, min(10, longest - length)))
            tokens = list(prompt)
            for _ in range(outputs):
                tokens.append(next_token(tokens))
            expected[f"r{index}"] = tokens
            self.scheduler.waiting.append(Request(f"r{index}", prompt, length, outputs))
        return expected

    def _new_lane(self, stage: Stage, info: NodeInfo | None = None) -> Lane:
        if info is None:
            self.incarnations[stage] += 1
            member = Member(NodeId(f"n{stage}"), self.incarnations[stage])
            info = NodeInfo(member, stage, "sim", 1, (1,), "", "", 1, self.shape.blocks)
        toy = ToyStage(Memory(stage, self.shape.block_size), stage == self.shape.stages - 1, self.aborted)
        return Lane(self, info, toy)

    def _new_standby(self, stage: Stage) -> Standby:
        return Standby(self._new_lane(stage).info)

    # ---- running

    def run(self) -> None:
        """Act until every request has ended. Raises a `Violation` for whatever goes wrong."""
        for _ in range(MAX_ACTIONS):
            actions = self._possible()
            if not actions:
                break
            self.now += 0.001
            self.rng.choice(actions)()
        for request in self.scheduler.ended:
            if request.error:
                held = self.recoveries - self.killed
                unknown = self.shape.blames and held >= MAX_COST and request.error == REASON
                excused = unknown or (held >= MAX_POSSIBLE_COST and request.error == POSSIBLE_REASON)
                cause = request.error.removesuffix(f": {NOT_AGAIN}")
                if not excused and cause not in self.blamed.get(request.name, ()):
                    raise WrongTokens(f"{request.name} ended without need: {request.error}")
            elif not request.aborted and request.tokens != self.expected[request.name]:
                raise WrongTokens(f"{request.name}: {request.tokens} instead of {self.expected[request.name]}")
        if len(self.scheduler.ended) < self.shape.requests:
            raise Stuck(f"{len(self.scheduler.ended)} of {self.shape.requests} requests ended")

    def _possible(self) -> list[Callable[[], None]]:
        actions: list[Callable[[], None]] = [lane.work for lane in self.lanes if lane.can_work()]
        if self.answers:
            actions.append(self._answer)
        if self.waits_for and self.delivered and self.delivered[0] == self.waits_for[0]:
            actions.append(self._update)
        elif self._may_schedule and len(self.waits_for) < self.shape.stages:
            actions.append(self._schedule)
        if self.losses_left and self.rng.random() < self.shape.loss_rate:
            actions.append(self._lose)
        if self.reshares_left > 0 and self.rng.random() < self.shape.loss_rate:
            actions.append(functools.partial(self._reshare, self.rng.randint(1, 3)))
        actions += self._remedies()
        if self._asked:
            actions.append(self._form)
        if self.shape.replicates:
            actions += [functools.partial(self._replicate, lane) for lane in self.lanes if self.rng.random() < 0.5]
            if self.rng.random() < 0.05:
                actions.append(self._drop_replica)
        if self.scheduler.running and self.rng.random() < 0.02:
            actions.append(self._abort)
        return actions

    def _remedies(self) -> list[Callable[[], None]]:
        """Replacements have come, where nothing else helps."""
        scheduler = self.scheduler
        lacks_memory = scheduler.held and not (scheduler.running or scheduler.waiting or self.waits_for)
        remedies: list[Callable[[], None]] = []
        if self._waits:
            remedies.append(functools.partial(self._form, lost=True))
        if self.shares > 1 and lacks_memory:
            remedies.append(functools.partial(self._reshare, 1))
        return remedies

    @property
    def _may_schedule(self) -> bool:
        """As vLLM's engine: after a step without tokens it waits for one that is in flight."""
        waits = bool(self.waits_for) and self.scheduled_nothing
        return not waits and (self.scheduler.has_work or bool(self.for_scheduler))

    @property
    def _waits(self) -> bool:
        return self.pipeline.standing is Standing.WAITING

    def _schedule(self) -> None:
        formation, paused = self.pipeline.formations, self._waits
        self._obey()
        step, known = self.scheduler.schedule(formation, paused=paused)
        if self.losses_left and self.rng.random() < self.shape.loss_rate:
            self._lose()
        if self.reshares_left > 0 and self.rng.random() < self.shape.loss_rate:
            self._reshare(self.rng.randint(1, 3))
        while self.answers and self.rng.random() < 0.3:
            self._answer()
        self._go_on_meanwhile()
        self.steps[step.sequence] = (step, known)
        self.scheduled_nothing = not step.scheduled
        if step.scheduled:
            self.waits_for.append(step.sequence)
        self._handle(core.StepIssued(step))

    def _go_on_meanwhile(self) -> None:
        """The engine may be slow to issue a step: nodes work and answer, and more than one order may come."""
        chance = self.lag
        if chance is None or chance.random() > 0.2:
            return
        while chance.random() < 0.98:
            actions = [lane.work for lane in self.lanes if lane.can_work()]
            actions += [self._answer] if self.answers else []
            if chance.random() < 0.03:
                actions = [self._form, functools.partial(self._form, anew=True)]
                actions += [self._lose] if self.losses_left else []
            if actions:
                chance.choice(actions)()

    def _obey(self) -> None:
        """Do what the core tells the scheduler, in the order of the real hook."""
        told, self.for_scheduler = self.for_scheduler, []
        self.set_aside += sum(len(each.requests) for each in told if isinstance(each, core.SetAside))
        self.scheduler.obey(told)

    def _update(self) -> None:
        sequence = self.waits_for.popleft()
        self.delivered.popleft()
        if self.rng.random() < 0.5:
            self._obey()
        self.scheduled_nothing = False
        self.scheduler.update(self.steps[sequence][0], self.outputs.pop(sequence))

    def _abort(self) -> None:
        request = self.rng.choice(self.scheduler.running)
        self.aborted.add(request.name)
        self.scheduler.abort(request)

    def _lose(self) -> None:
        self.losses_left -= 1
        self.recoveries += 1
        stage = Stage(self.rng.randrange(self.shape.stages))
        killed = self.killer is not None and self.killer.random() < 0.5
        self.killed += killed
        if killed or not self.shape.blames:
            # Nodes die between two pieces of work here.
            self.lost_idle.append(Loss(self.lanes[stage].info.member, Computing(), killed))
        if self.rng.random() < 0.7:
            standby = self.standbys[stage]
            self.lanes[stage] = self._new_lane(stage, standby.info)
            self.lanes[stage].store = standby.store
            self.standbys[stage] = self._new_standby(stage)
        else:
            self.lanes[stage] = self._new_lane(stage)
        if self.rng.random() < self.shape.wait_rate:
            self.waits += 1
            self.epoch += 1
            losses = tuple(self.lost_idle)
            self._handle(core.SuspensionOrdered(Epoch(self.epoch), "no node", True, (stage,), losses))
            return
        self._form(lost=True)
        if self.rng.random() < 0.8:
            self._assign()

    def _assign(self) -> None:
        self._handle(core.StandbysAssigned(tuple(standby.info for standby in self.standbys)))

    def _replicate(self, lane: Lane) -> None:
        """Copy some blocks to the standby; the confirmation travels like any answer."""
        standby = self.standbys[lane.info.stage]
        if lane.standby != standby.info.member or not lane.tags:
            return
        held = list(lane.tags.values())
        replicas = tuple(dict.fromkeys(self.rng.choice(held) for _ in range(self.shape.copies)))
        for replica in replicas:
            standby.store[replica.block] = (replica, lane.stage.memory.read(replica.block))
        self._confirm(lane, standby, stored=replicas)

    def _drop_replica(self) -> None:
        lane = self.rng.choice(self.lanes)
        standby = self.standbys[lane.info.stage]
        if standby.store:
            replica, _ = standby.store.pop(self.rng.choice(list(standby.store)))
            self._confirm(lane, standby, dropped=(replica,))

    def _confirm(
        self, lane: Lane, standby: Standby, stored: tuple[Replica, ...] = (), dropped: tuple[Replica, ...] = ()
    ) -> None:
        self.answers.append(
            core.ReplicasConfirmed(lane.info.stage, lane.info.member, standby.info.member, stored, dropped)
        )

    def _reshare(self, shares: int) -> None:
        self.reshares_left -= 1
        self.shares = shares
        self._form(planned=self.rng.random() < 0.5)

    def _form(self, *, planned: bool = False, lost: bool = False, anew: bool = False) -> None:
        self._asked = False
        self.epoch += 1
        nodes = tuple(lane.info for lane in self.lanes)
        self._handle(
            core.FormationOrdered(
                Epoch(self.epoch),
                nodes,
                planned=planned,
                shares=self.shares,
                lost=lost,
                losses=tuple(self.lost_idle) if lost else (),
                anew=anew,
            )
        )

    # ---- channels

    def _handle(self, event: core.Event) -> None:
        commands = self.pipeline.handle(event, self.now)
        for command in commands:
            self._send(command)
        self._asked = self._asked or any(isinstance(command, core.RequestFormation) for command in commands)

    def _send(self, command: core.Command) -> None:
        match command:
            case (
                core.Join(stage, _, _) | core.AssignStandby(stage, _) | core.Place(stage, _, _) | core.PlaceRest(stage)
            ):
                self.lanes[stage].inbox.append((self.pipeline.epoch, command))
            case core.Recompute(_, chunk):
                for lane in self.lanes[: chunk.through + 1]:
                    lane.inbox.append((self.pipeline.epoch, command))
            case core.Restore() | core.Execute():
                for lane in self.lanes:
                    lane.inbox.append((self.pipeline.epoch, command))
            case core.Deliver(sequence, left_out, output):
                self.outputs[sequence] = completed(output, left_out)
                if self.steps[sequence][0].scheduled:
                    self.delivered.append(sequence)
            case core.EvictPrefixCache() | core.SetAside() | core.UseBlocks():
                self.for_scheduler.append(command)
            case core.AbandonEverything(reason):
                raise Violation(f"everything is given up: {reason}")

    def _answer(self) -> None:
        self._handle(self.answers.popleft())
