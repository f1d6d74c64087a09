"""The state of the cluster: all slots and pipelines, and the few ways in which everybody changes them.

`recovery.cluster` is the door; `recovery.nodes`, `recovery.engines` and `recovery.formation` hold the rules, and others
that these name. They share this: who exists, what was decided so far in this event, and the story of it all.
"""

from __future__ import annotations

import collections

from kevlarflow.config import ServeConfig
from kevlarflow.recovery.events import Abort, AnyCommand, Narrate, Recovery
from kevlarflow.recovery.members import Pipeline, Slot, node_id, subject
from kevlarflow.recovery.story import Story
from kevlarflow.recovery.transitions import NodeStep, PipelineStep, next_node_state, next_pipeline_state
from kevlarflow.types import Epoch, Member, NodeId, NodeInfo, Phases, PipelineId, RecoveryId, RecoveryState, Stage

RECOVERIES_KEPT = 1_000
START_SECONDS_KEPT = 32


class Grid:
    """Slots, pipelines, recoveries and the commands of the event that is being handled."""

    def __init__(self, config: ServeConfig, unix_offset: float = 0.0) -> None:
        self.config = config
        self.unix_offset = unix_offset
        """Unix seconds minus monotonic seconds."""
        self.slots: dict[NodeId, Slot] = {}
        self.pipelines: list[Pipeline] = []
        self.stages: list[list[Slot]] = [[] for _ in range(config.stages)]
        """The slots of each stage."""
        for p in range(config.pipelines):
            self.pipelines.append(Pipeline(PipelineId(p), [None] * config.stages))
            for s in range(config.stages):
                slot = self.slots[node_id(p, s)] = Slot(node_id(p, s), PipelineId(p), Stage(s))
                self.stages[s].append(slot)
        self.begun = False
        self.resumed_at: float | None = None
        """When an earlier life of the controller was taken up."""
        self.forgetful = False
        """Whether that life left no memory but who there is: then lanes may be held that nobody knows of."""
        self.served = False
        self.aborted: str | None = None
        self.recoveries: collections.deque[Recovery] = collections.deque(maxlen=RECOVERIES_KEPT)
        self.ended: collections.deque[Recovery] = collections.deque(maxlen=RECOVERIES_KEPT)
        """Recoveries that ended, for those who count them to take away."""
        self.next_recovery = RecoveryId(1)
        self.start_seconds: collections.deque[float] = collections.deque(maxlen=START_SECONDS_KEPT)
        self.story = Story()
        self.now = 0.0
        self.cause = ""
        self.passes_deadlines = False
        """Whether this event is time itself. With others what would have met a deadline may still wait to be read."""
        self.commands: list[AnyCommand] = []
        self.ordered: set[PipelineId] = set()
        """Pipelines that this event has led to a new `Form` for."""

    # ---- looking

    def slot_of(self, member: Member) -> Slot | None:
        """The slot that `member` fills now; None for a member of the past or of nowhere."""
        slot = self.slots.get(member.node)
        return slot if slot is not None and slot.incarnation == member.incarnation else None

    def info(self, member: Member) -> NodeInfo:
        """What a living member said of itself."""
        info = self.slots[member.node].info
        if info is None or info.member != member:
            raise AssertionError(f"{member} is no living member")
        return info

    def pipeline(self, pipeline: PipelineId) -> Pipeline | None:
        """The pipeline of that number, or None when there is none."""
        return self.pipelines[pipeline] if 0 <= pipeline < len(self.pipelines) else None

    def home(self, pipeline: Pipeline, stage: Stage) -> Slot:
        """The pipeline's own slot for a stage."""
        return self.slots[node_id(pipeline.id, stage)]

    def foreign_lanes(self, slot: Slot, besides: PipelineId) -> int:
        """Lanes of other pipelines on a node, that of `besides` not counted: this is asked often."""
        member, own, lanes = slot.member, slot.pipeline, 0
        for each in self.pipelines:
            if each.id != own and each.id != besides and each.has_lane_on(member):
                lanes += 1
        return lanes

    # ---- changing

    def command(self, command: AnyCommand) -> None:
        """Ask the shell for something."""
        self.commands.append(command)

    def narrate(self, text: str) -> None:
        """Say one line to people."""
        self.command(Narrate(text))

    def tell(self, who: str, event: str) -> None:
        """Add to the story."""
        self.story.add(self.now, who, event, self.cause)

    def step_node(self, slot: Slot, step: NodeStep) -> None:
        """Take a node one transition further."""
        before = slot.state
        slot.state = next_node_state(slot.node, before, step, self.story.tell(slot.node))
        self.tell(slot.node, f"#{slot.incarnation} {before} -> {slot.state}")

    def step_pipeline(self, pipeline: Pipeline, step: PipelineStep) -> None:
        """Take a pipeline one transition further."""
        who = subject(pipeline.id)
        before = pipeline.state
        pipeline.state = next_pipeline_state(who, before, step, self.story.tell(who))
        if pipeline.state is not before:
            self.tell(who, f"{before} -> {pipeline.state}")

    def raise_epoch(self, pipeline: Pipeline) -> Epoch:
        """A number that was never used for this pipeline."""
        pipeline.epoch = Epoch(pipeline.epoch + 1)
        return pipeline.epoch

    def abort(self, reason: str) -> None:
        """Give up the start of the cluster."""
        if self.aborted is None:
            self.aborted = reason
            self.command(Abort(reason))

    # ---- recoveries

    def open_recovery(self, recovery: Recovery) -> None:
        """Begin a record; one that still runs for the same stage has failed, since its node is gone as well."""
        pipeline = self.pipelines[recovery.pipeline]
        self.close_recovery(pipeline, recovery.stage, RecoveryState.FAILED)
        self.next_recovery = RecoveryId(self.next_recovery + 1)
        pipeline.recoveries[recovery.stage] = recovery
        self.recoveries.append(recovery)

    def close_recovery(self, pipeline: Pipeline, stage: Stage, state: RecoveryState) -> Recovery | None:
        """End the record that runs for a stage, if one does."""
        recovery = pipeline.recoveries.pop(stage, None)
        if recovery is None:
            return None
        recovery.state = state
        unaccounted = self.now - (recovery.formed_at or recovery.decided_at)
        seconds = recovery.seconds
        measured = seconds.restore + seconds.recompute + seconds.reissue
        # The way of the order and of the answer is nobody's but the link's.
        relink = max(seconds.relink, unaccounted - measured)
        recovery.seconds = Phases(
            seconds.detect, seconds.plan, relink, seconds.restore, seconds.recompute, seconds.reissue
        )
        self.ended.append(recovery)
        return recovery
