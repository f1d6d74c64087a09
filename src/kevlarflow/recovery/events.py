"""What can happen to a cluster, and what its state machine can ask for: plain values, nothing else.

Every event and command is immutable and round-trips through JSON under the name of its class, so that the
journal of a production run is a list of these and replays in the simulator. Times are seconds on the
monotonic clock, which all processes of a host share; they are arguments, never read here.
"""

from __future__ import annotations

import msgspec

from kevlarflow.types import (
    Cause,
    Computing,
    Epoch,
    LaneCoverage,
    Loss,
    Member,
    NodeId,
    NodeInfo,
    Phases,
    PipelineId,
    RecoveryId,
    RecoveryState,
    Stage,
)

# ---- what a controller remembers over its own restart


class Recovery(msgspec.Struct):
    """How one stage of one pipeline came by another node, or its links were made anew.

    The only value here that grows: it is a record.
    """

    id: RecoveryId
    pipeline: PipelineId
    stage: Stage
    cause: Cause
    origin: NodeId
    """The node that was lost, or that gives a lane back."""
    time: float
    """Unix seconds at which it was decided."""
    decided_at: float
    state: RecoveryState = RecoveryState.RUNNING
    target: NodeId | None = None
    """The node that takes over; None while there is none."""
    formed_at: float | None = None
    """When the pipeline was last told to form with `target`."""
    requests: int = 0
    lost_requests: int = 0
    recomputed_tokens: int = 0
    seconds: Phases = Phases()


class KnownNode(msgspec.Struct, frozen=True):
    """A member as the snapshot keeps it."""

    member: Member
    pids: tuple[int, ...]
    ready: bool
    failed_starts: int
    emptied_for: Cause | None = None
    vacant: bool = False
    fenced: bool = False
    """Whether we may have sent it SIGKILL."""
    filled_by_hand: bool = False
    """Whether its place is vacant again if it does not get ready."""
    started_at: float | None = None
    """When its start began; None: nobody knows."""


class Snapshot(msgspec.Struct, frozen=True):
    """What the next life of the controller has to know: who exists, and which numbers are used up.

    Without epochs it is all that is left to a controller that has lost its memory: what processes there are.
    """

    nodes: tuple[KnownNode, ...]
    epochs: dict[PipelineId, Epoch]
    served: bool
    lanes: dict[PipelineId, tuple[Member, ...]] = {}
    """Members on which a pipeline has a lane, or has not given it up yet."""
    recoveries: tuple[Recovery, ...] = ()
    next_recovery: RecoveryId = RecoveryId(1)
    waits: dict[PipelineId, float] = {}
    """Pipelines that a stage lacks a node for, and when their requests end."""
    start_seconds: tuple[float, ...] = ()
    engines: dict[PipelineId, int] = {}
    """Pids of the engines that may be at work."""
    losses: dict[PipelineId, tuple[Loss, ...]] = {}
    """What members were computing that were lost since their pipelines were last formed."""
    forgetful: bool = False
    """Whether a life before this one has lost its memory: there may be lanes that nobody has told of."""


# ---- events


class Event(msgspec.Struct, frozen=True, tag=True):
    """Base of every event."""


class ClusterBegun(Event, frozen=True):
    """A new cluster: nothing runs yet."""


class ControllerResumed(Event, frozen=True):
    """The controller was started again; nodes and engines may be alive and serving."""

    snapshot: Snapshot


LONGEST_BREATH_SECONDS = 1.0
"""When more than this passes between two ticks, the controller stood still: nobody is blamed for what is beyond it.

As much as this passes with each tick in any case, so each bound is reached, however slowly the controller breathes.
"""


class Tick(Event, frozen=True):
    """Time has passed: deadlines and retries are looked at."""

    pause: float = 0.0
    """Seconds for which the controller stood still before, beyond a breath; 0.0 when it did not."""

    @classmethod
    def after(cls, seconds: float) -> Tick:
        """The tick so many seconds after the last."""
        return cls(max(0.0, seconds - LONGEST_BREATH_SECONDS))


class NodeLaunched(Event, frozen=True):
    """The launcher has forked the process."""

    member: Member
    pid: int


class LaunchFailed(Event, frozen=True):
    """The launcher could not fork, or has gone before it said whether it did."""

    member: Member
    reason: str


class NodeStarting(Event, frozen=True):
    """The process has begun to load."""

    member: Member
    host: str
    pids: tuple[int, ...]


class NodeReady(Event, frozen=True):
    """The node can join pipelines. `epochs` holds the newest epoch that it has seen on each lane."""

    info: NodeInfo
    epochs: dict[PipelineId, Epoch]


class NodeFailed(Event, frozen=True):
    """The node says why it cannot start, and exits."""

    member: Member
    reason: str


class NodeExited(Event, frozen=True):
    """The node's process has begun to die. `alive_at` is the last proof that it was alive."""

    member: Member
    alive_at: float
    computing: Computing | None = None
    """What it was doing then; None: nobody knows."""
    ending: str = ""
    """How it ended, for people, such as SIGKILL; empty when nobody knows."""
    from_outside: bool = False
    """Whether somebody killed it, which nothing that it computed can bring about."""


class NodeSuspected(Event, frozen=True):
    """Silent for long enough to be no choice as a donor; nothing is moved yet."""

    member: Member
    beat_at: float


class NodeCleared(Event, frozen=True):
    """A suspect has beaten again."""

    member: Member


class NodeSilent(Event, frozen=True):
    """Silent, or of no use in another way, for so long that it is fenced, whatever became of it."""

    member: Member
    beat_at: float
    """Since when: the last proof of life."""
    what: str = "did not answer"
    """Completes "node-0-1 ...", followed by how long."""
    from_outside: bool = False
    """Whether somebody did that to it: then it is not held against what it was computing."""


class NodeSlow(Event, frozen=True):
    """Alive and well, but far slower than its peers for long; said again as long as that lasts."""

    member: Member
    ratio: float
    """Times as long as they it takes for the same work."""
    seconds: float
    """For how long it has done so."""


class EngineAttached(Event, frozen=True):
    """An engine waits for a formation (epoch 0), or still serves in one that an earlier controller made."""

    pipeline: PipelineId
    pid: int
    epoch: Epoch
    members: tuple[Member, ...]
    shares: int = 1
    suspended: bool = False
    """Whether it was told that a stage has no node: then it has to be formed anew, whoever lives."""
    forming: bool = False
    """Whether the nodes have yet to answer in that epoch."""


class EngineReady(Event, frozen=True):
    """The engine has its scheduler."""

    pipeline: PipelineId
    kv_blocks: int


class EngineReport(Event, frozen=True):
    """The engine's load; all three counts zero is a quiet point."""

    pipeline: PipelineId
    running: int
    waiting: int
    in_flight: int
    kv_blocks: int
    replication: tuple[LaneCoverage, ...] = ()
    epoch: Epoch = Epoch(0)
    """The epoch that it serves in, or was last told of; 0: not known."""
    forming: bool = False
    """Whether it has yet to say `Formed` in that epoch."""
    still_seconds: float = 0.0
    """How long it has waited for its nodes without any answer."""
    awaited: tuple[Stage, ...] = ()
    """Stages whose nodes have yet to answer to `Form`."""


class PipelineStill(Event, frozen=True):
    """An engine waits for its nodes, and none of them is at work for it: something was lost on its way."""

    pipeline: PipelineId
    epoch: Epoch
    seconds: float
    awaited: tuple[Stage, ...] = ()
    """Stages whose nodes have yet to answer to `Form`; none when all have."""


class EngineLost(Event, frozen=True):
    """The engine's process has ended, and its requests with it."""

    pipeline: PipelineId
    pid: int


class Formed(Event, frozen=True):
    """The pipeline generates in this epoch."""

    pipeline: PipelineId
    epoch: Epoch
    seconds: Phases
    requests: int
    lost_requests: int
    recomputed_tokens: int


class MemberFailed(Event, frozen=True):
    """An engine could not use a member in this epoch: evidence, not a verdict."""

    pipeline: PipelineId
    epoch: Epoch
    member: Member
    reason: str
    unlinked: bool = False
    """Whether only the connection to it broke."""


class DrainRequested(Event, frozen=True):
    """Somebody wants a node to give its lanes away and leave. `ticket` finds them for the `Answer`."""

    node: NodeId
    ticket: int


class JoinRequested(Event, frozen=True):
    """Somebody has started a process by hand that is to fill an empty slot."""

    node: NodeId
    pid: int
    ticket: int


AnyEvent = (
    ClusterBegun | ControllerResumed | Tick | NodeLaunched | LaunchFailed | NodeStarting | NodeReady | NodeFailed
    | NodeExited | NodeSuspected | NodeCleared | NodeSilent | NodeSlow | EngineAttached | EngineReady | EngineReport
    | EngineLost | PipelineStill | Formed | MemberFailed | DrainRequested | JoinRequested
)  # fmt: skip


# ---- commands


class Command(msgspec.Struct, frozen=True, tag=True):
    """Base of every command."""


class StartNode(Command, frozen=True):
    """Fork this member."""

    member: Member
    stage: Stage


class KillNode(Command, frozen=True):
    """SIGKILL to every process of the member."""

    member: Member
    pids: tuple[int, ...]


class KillEngine(Command, frozen=True):
    """SIGKILL to the process of an engine."""

    pipeline: PipelineId
    pid: int


class Retire(Command, frozen=True):
    """Tell a member that was replaced to leave."""

    member: Member


class Form(Command, frozen=True):
    """Tell an engine which nodes form its pipeline from now on; see the message of the same name."""

    pipeline: PipelineId
    epoch: Epoch
    nodes: tuple[NodeInfo, ...]
    released: tuple[NodeInfo, ...]
    cause: Cause
    lost_stages: tuple[Stage, ...]
    shares: int = 1
    orphans: tuple[tuple[PipelineId, Epoch], ...] = ()
    losses: tuple[Loss, ...] = ()


class Suspend(Command, frozen=True):
    """Tell an engine that a stage has no node."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    reason: str
    waits: bool = False
    """Whether its requests wait for one; otherwise they end with the reason."""
    lost_stages: tuple[Stage, ...] = ()
    """All that have no node now."""
    losses: tuple[Loss, ...] = ()


class AssignStandbys(Command, frozen=True):
    """Tell an engine who keeps the replicas of each stage."""

    pipeline: PipelineId
    standbys: tuple[NodeInfo | None, ...]


class Hasten(Command, frozen=True):
    """Tell an engine that these stages are about to move to their standbys: every token is copied at once."""

    pipeline: PipelineId
    epoch: Epoch
    stages: tuple[Stage, ...]


class Answer(Command, frozen=True):
    """What became of a request: a refusal in one line, or none; and for `JoinRequested` who the process is now."""

    ticket: int
    refusal: str
    member: Member | None = None
    stage: Stage | None = None


class Narrate(Command, frozen=True):
    """One line for people."""

    text: str


class Abort(Command, frozen=True):
    """The cluster cannot start; one line for a person."""

    reason: str


AnyCommand = (
    StartNode | KillNode | KillEngine | Retire | Form | Suspend | AssignStandbys | Hasten | Answer | Narrate | Abort
)  # fmt: skip
