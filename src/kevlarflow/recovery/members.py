"""The nouns that the cluster's state machine keeps: slots, engines and pipelines.

A slot is a place in the grid, `node-<pipeline>-<stage>`; it is filled by one member at a time, each a new incarnation.
A pipeline names, for each stage, the member that serves it: the one in its own slot, a donor's, or none.
"""

from __future__ import annotations

import collections
import dataclasses

from kevlarflow.recovery.events import EngineAttached, EngineReport, Form, Recovery, Suspend
from kevlarflow.types import (
    Cause,
    Computing,
    EngineState,
    Epoch,
    Loss,
    Member,
    NodeId,
    NodeInfo,
    NodeState,
    PipelineId,
    PipelineState,
    Stage,
)

NO_EPOCH = Epoch(0)
MAX_LOSSES = 64
"""Of which a pipeline keeps what the member was computing; there are few between two formations."""
EARLY_DEATHS = 3
"""In a row, by which it is not chance."""
LIVING = (NodeState.READY, NodeState.SUSPECT, NodeState.DRAINING)


def node_id(pipeline: int, stage: int) -> NodeId:
    """Name of the slot of `stage` in `pipeline`."""
    return NodeId(f"node-{pipeline}-{stage}")


def subject(pipeline: PipelineId) -> str:
    """What stories and people call a pipeline."""
    return f"pipeline {pipeline}"


@dataclasses.dataclass
class Slot:
    """A place in the grid and the member that fills it, or last filled it."""

    node: NodeId
    pipeline: PipelineId
    stage: Stage
    incarnation: int = 0
    state: NodeState = NodeState.DEAD
    host: str = ""
    pids: tuple[int, ...] = ()
    info: NodeInfo | None = None
    started_at: float | None = None
    """When the start of the member began; None: nobody knows."""
    incarnation_floor: int = 0
    """The highest incarnation that anybody has spoken of."""
    failed_starts: int = 0
    """In a row."""
    ready_by: float | None = None
    """When a starting member is given up."""
    start_at: float | None = None
    """When the next member is to be started; None while there is one, and when there will be none."""
    gives_way: bool = False
    """Whether it is started sooner than that if no recovery would be disturbed by it."""
    exit_due: float | None = None
    """When the exit of a starting member is believed: until then it may say why."""
    fenced_by: float | None = None
    """When a member that was sent SIGKILL counts as lost, seen to die or not."""
    was_ready: bool = False
    """Whether the member was ready in an earlier life of the controller, and has yet to introduce itself."""
    was_fenced: bool = False
    """Whether an earlier life of the controller may have sent the member SIGKILL; then it never speaks to this one."""
    silent_since: float = 0.0
    """The last proof of life of a member that is being fenced."""
    silent_how: str = "did not answer"
    """Why it is; completes "node-0-1 ..."."""
    hurt_from_outside: bool = False
    """Whether somebody has stopped or killed the member, which no request can bring about."""
    computing: Computing | None = None
    """What a member was doing that was lost, as far as it may be to blame; None: nobody knows."""
    ending: str = ""
    """How the process of a member ended that was lost; empty when nobody knows."""
    emptied_for: Cause | None = None
    """Why its lanes move away, after which it leaves; None when it may stay."""
    stuck_since: float | None = None
    """Since when nobody else could take the lanes of a member that is being emptied."""
    leave_by: float | None = None
    """When a member that was told to leave is killed."""
    vacant: bool = False
    """Whether it was emptied on request: nobody fills it until somebody asks for that too."""
    filled_by_hand: bool = False
    """Whether a member that starts does so because somebody asked for it, in a place that was vacant."""
    ready_at: float = 0.0
    """When the member was first ready, as far as it is known."""
    early_deaths: int = 0
    """Members in a row that died soon after they were ready."""

    def __post_init__(self) -> None:
        self._member = Member(self.node, self.incarnation)

    @property
    def member(self) -> Member:
        """The member that fills the slot, or last filled it: this is asked often."""
        return self._member

    @property
    def living(self) -> bool:
        """Whether the member serves the lanes it has."""
        return self.state in LIVING and self.fenced_by is None

    @property
    def usable(self) -> bool:
        """Whether lanes may be given to the member."""
        return self.state is NodeState.READY and self.exit_due is None and self.fenced_by is None

    @property
    def dies_early(self) -> bool:
        """Whether its members load, and die as soon as they compute."""
        return self.early_deaths >= EARLY_DEATHS

    @property
    def hopeless(self) -> bool:
        """Whether nothing will fill it any more."""
        return self.state is NodeState.DEAD and self.start_at is None

    def renew(self, incarnation: int) -> None:
        """Forget the last member: the next one is `incarnation`."""
        self.incarnation = incarnation
        self._member = Member(self.node, incarnation)
        self.incarnation_floor = max(self.incarnation_floor, incarnation)
        self.host = ""
        self.pids = ()
        self.info = self.started_at = None
        self.ready_by = self.start_at = self.exit_due = self.fenced_by = None
        self.gives_way = self.hurt_from_outside = self.was_ready = self.was_fenced = False
        self.ending = ""
        self.computing = self.emptied_for = self.stuck_since = self.leave_by = None
        self.vacant = self.filled_by_hand = False
        self.ready_at = 0.0


@dataclasses.dataclass
class Engine:
    """The engine of one pipeline."""

    pid: int | None = None
    state: EngineState = EngineState.STARTING
    attached: bool = False
    claim: EngineAttached | None = None
    """What it says to serve already, until it is known whether it can."""
    report: EngineReport | None = None
    """The last one."""
    report_is_new: bool = False
    """Whether it was made under the newest order."""
    heard_at: float = 0.0
    """When it last attached or reported, or since when somebody listened."""
    kv_blocks: int = 0
    pressed_since: float | None = None
    """Since when each of its reports tells of requests that wait, perhaps for room; None: the last one does not."""

    @property
    def living(self) -> bool:
        """Whether it was not seen to end."""
        return self.attached or self.state is EngineState.SILENT

    @property
    def quiet(self) -> bool:
        """Whether it is known to have no request and no step."""
        report = self.report
        return self.report_is_new and report is not None and report.running == report.waiting == report.in_flight == 0


@dataclasses.dataclass
class Move:
    """A lane that is to change its node though both are alive."""

    target: NodeInfo
    cause: Cause
    epoch: Epoch
    """In which it waits. The same nodes may be formed anew meanwhile."""
    since: float
    """When it became possible."""
    nearer_at: float
    """When it did, or its new node last came a good deal nearer to having all KV, or had it."""
    fewest_missing: int | None = None
    """The fewest tokens that the new node was a good deal nearer with; None: nobody has said yet."""
    hastened: bool = False
    """Whether the engine was told that it is near."""


@dataclasses.dataclass
class Pipeline:
    """Who serves which stage, and in which epoch."""

    id: PipelineId
    members: list[Member | None]
    """In stage order; None where a stage has no node. Only living members stand here."""
    state: PipelineState = PipelineState.STARTING
    epoch: Epoch = NO_EPOCH
    """The newest that anybody has seen."""
    cause: Cause = Cause.START
    """Why it is being formed, or was last formed."""
    forming: bool = False
    """Whether a `Form` is unanswered."""
    formed: bool = False
    """Whether the last `Form` was answered and nothing has happened since."""
    formed_at: float = 0.0
    """When it was."""
    served: bool = False
    """Whether it has ever served."""
    engine: Engine = dataclasses.field(default_factory=Engine)
    shares: int = 1
    """Lanes that share the KV memory of its busiest node, as its engine was told."""
    order: Form | Suspend | None = None
    """The last order to the engine."""
    sent_at: float = 0.0
    """When that was sent, or sent again."""
    wait_until: float | None = None
    """When its requests end if it cannot be formed before; None unless a stage has no node."""
    wait_was_heard_out: bool = False
    """Whether that was put off already so that the controller could read who is ready, after it had stood still."""
    standbys: tuple[NodeInfo | None, ...] = ()
    """Who keeps the replicas of each stage, as the engine was told."""
    standbys_told_at: float = 0.0
    relink_at: float | None = None
    """When it must be formed once more, since something was lost on its way."""
    relink_news: str = ""
    """Why."""
    relink_since: float = 0.0
    """Since when it stood still."""
    relink_lasts: bool = False
    """Whether nothing but that helps: a node takes nothing more in this epoch."""
    relink_stages: tuple[Stage, ...] = ()
    """Whose nodes have not answered."""
    relinked: list[float] = dataclasses.field(default_factory=list)
    """When that was done in the last half minute, with the members that it has."""
    relinked_in_vain: int = 0
    """How often, since it was last well for a while."""
    parted: dict[Member, float] = dataclasses.field(default_factory=dict)
    """Members that it was formed without since links to or from them broke again and again, and until when it is."""
    leaving: set[Member] = dataclasses.field(default_factory=set)
    """Living members that may still hold a lane of this pipeline, though it is not used any more."""
    given_back: set[Member] = dataclasses.field(default_factory=set)
    """Members whose lanes its engine leaves because it waits; what they die of may still be a step of this pipeline."""
    unrestored: set[Stage] = dataclasses.field(default_factory=set)
    """Stages whose member has changed since the pipeline last generated."""
    avoided: dict[Member, float] = dataclasses.field(default_factory=dict)
    """Members that its engine could not use, and until when they are left out."""
    complaints: dict[Member, float] = dataclasses.field(default_factory=dict)
    """Members that its engine could not use, and when that is acted upon."""
    struck: set[Member] = dataclasses.field(default_factory=set)
    """Members that were already tried a second time."""
    reform: bool = False
    """Whether it must be formed once more, though no stage has lost its node."""
    recoveries: dict[Stage, Recovery] = dataclasses.field(default_factory=dict)
    """Those that are running."""
    moves: dict[Stage, Move] = dataclasses.field(default_factory=dict)
    """Lanes that are to move as soon as little is left to recompute."""
    losses: collections.deque[Loss] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=MAX_LOSSES))
    """What members were computing that were lost since the pipeline was last formed, as far as it is known."""
    news: str = ""
    """What befell it in this event, for the line that tells what is done about it."""

    @property
    def holes(self) -> list[Stage]:
        """Stages without a member."""
        return [Stage(stage) for stage, member in enumerate(self.members) if member is None]

    @property
    def lanes(self) -> set[Member]:
        """Members on which it has a lane, used or not yet given up."""
        return self.leaving | {member for member in self.members if member is not None}

    def forget_losses(self) -> None:
        """What was lost, given back, or could not be used is made good, or concerns nobody any more."""
        self.given_back.clear()
        self.unrestored.clear()
        self.losses.clear()
        self.avoided.clear()
        self.struck.clear()
        self.complaints.clear()

    def has_lane_on(self, member: Member) -> bool:
        """Whether `member` is among its `lanes`: this is asked often."""
        return member in self.members or member in self.leaving
