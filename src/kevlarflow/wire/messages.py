"""Every control message, typed. Encoded as MessagePack by `encode`, checked against its type by `decode`.

Three conversations meet at the controller's one ROUTER socket (``controller.sock``):

* a **node** introduces itself, beats, and says when it is ready or why it failed;
* an **engine** attaches, is told which nodes form its pipeline, and reports what that cost;
* an **observer** (supervisor, API server, ``kevlarflow status``) asks once or subscribes.

Steps and activations do not pass here: engines talk to nodes directly (`kevlarflow.wire.steps`).

A connection may break and lose any of these. Whoever speaks over a new one is asked for an introduction, which says
again what `NodeStarting`, `NodeReady` and `EngineAttached` say; beats and their answers, and reports, come again
anyway. Orders (`Form`, `Suspend`, `Standbys`) are sent again until a report of the engine shows that they were taken,
and `Form` until `Formed` has come, which the engine repeats for it; to an engine that was never in an epoch, whose
reports show nothing, the order is sent again when it introduces itself over its new connection. `EngineReady` is known
from reports; without a `MemberFailed` the pipeline stands still, which is noticed; without a `Hasten` a lane moves
later; who introduces itself again is told to `Retire` again, and is killed if it does not hear it. Commands, and
processes started by hand, that hear no `Answered` say so and end.
"""

from __future__ import annotations

import msgspec

from kevlarflow.types import (
    Cause,
    Epoch,
    LaneCoverage,
    Loss,
    Member,
    NodeId,
    NodeInfo,
    Pace,
    Phases,
    PipelineId,
    Stage,
)
from kevlarflow.wire.decoding import decode_with


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of every control message; the tag on the wire is the class name."""


# ---- node -> controller


class NodeStarting(Message, frozen=True):
    """A node process exists and has begun to load. Sent once at start, and again when asked to introduce itself."""

    member: Member
    stage: Stage
    host: str
    pids: tuple[int, ...]


class NodeReady(Message, frozen=True):
    """The node holds its weights and KV memory and can join pipelines; also the answer to `Introduce`."""

    info: NodeInfo
    epochs: dict[PipelineId, Epoch]
    """The newest epoch seen on each lane, so that a restarted controller continues above it."""


class NodeFailed(Message, frozen=True):
    """The node cannot start; it exits after this."""

    member: Member
    reason: str
    """One line for a person."""


class Heartbeat(Message, frozen=True):
    """Proof of life, from a thread of its own. Also carries progress, so that a stuck step can be seen."""

    member: Member
    step_running_seconds: float
    """How long the step now on the device has been running, or the loop between two; 0.0 when it waits for messages."""
    step_pipeline: PipelineId | None = None
    """Whose step it is; None: nobody's."""
    step_overdue: bool = False
    """Whether it is past the deadline that steps of its size have set."""
    number: int = 0
    """Counts the beats of a member."""
    heard: int = 0
    """The number of the newest beat that was answered, as far as the node knows."""
    done: dict[PipelineId, int] = {}
    """Pieces of work that are done, by pipeline."""
    pace: tuple[Pace, ...] | None = None
    """Steps since the last report of them, every `pace_interval_ms`; None in the beats between."""


# ---- controller -> node


class BeatHeard(Message, frozen=True):
    """The answer to a heartbeat, so that a node knows whether it is heard, and we whether it hears."""

    number: int


class Introduce(Message, frozen=True):
    """The controller does not know the sender (it restarted): say who you are."""


class Retire(Message, frozen=True):
    """Leave: exit 0 at once. Sent to a member that was replaced, or has given its lanes away."""


# ---- engine -> controller


class EngineAttached(Message, frozen=True):
    """An engine's executor is there and waits for `Form`; also the answer to `Introduce`."""

    pipeline: PipelineId
    pid: int
    epoch: Epoch
    """The epoch it serves in now; 0 when it has none yet."""
    members: tuple[Member, ...]
    """The members it serves with now, in stage order; empty when it has none yet."""
    shares: int = 1
    """Lanes that share the KV memory of the busiest of them, as far as it knows."""
    suspended: bool = False
    """Whether it was told that a stage has no node, and has not been formed since."""
    forming: bool = False
    """Whether the nodes have yet to answer in that epoch."""


class EngineReport(Message, frozen=True):
    """Load of an engine, several times a second. `running == waiting == 0` is a quiet point."""

    pipeline: PipelineId
    running: int
    waiting: int
    kv_blocks: int
    """KV blocks that vLLM's scheduler has."""
    in_flight: int
    """Steps issued and not completed."""
    replication: tuple[LaneCoverage, ...] = ()
    epoch: Epoch = Epoch(0)
    """The epoch of the newest order that it has taken; 0 when it has none yet."""
    forming: bool = False
    """Whether `Formed` is still to come in this epoch."""
    still_seconds: float = 0.0
    """How long it has waited for its nodes without any answer; 0.0 when it waits for none."""
    awaited: tuple[Stage, ...] = ()
    """Stages whose nodes have yet to answer to `Form`; none of them opens the lane, or all have."""


class EngineReady(Message, frozen=True):
    """The engine has its scheduler and takes requests."""

    pipeline: PipelineId
    kv_blocks: int


class Formed(Message, frozen=True):
    """The pipeline generates in this epoch: the re-issued steps have started to complete."""

    pipeline: PipelineId
    epoch: Epoch
    seconds: Phases
    """Only relink, restore, recompute and reissue are the engine's to fill."""
    requests: int
    """Live requests carried over."""
    lost_requests: int
    recomputed_tokens: int


class MemberFailed(Message, frozen=True):
    """The engine could not use a member (refused, wrong epoch, broken channel): evidence, not a verdict."""

    pipeline: PipelineId
    member: Member
    reason: str
    epoch: Epoch = Epoch(0)
    """The epoch of the `Form` that named the member: a complaint about an older one is void. 0: not known."""
    unlinked: bool = False
    """Whether only the connection to it broke: the pipeline has to be formed anew, and nobody is to blame."""


# ---- controller -> engine


class Form(Message, frozen=True):
    """Serve with these nodes from now on. A newer epoch replaces whatever is under way."""

    pipeline: PipelineId
    epoch: Epoch
    nodes: tuple[NodeInfo, ...]
    """In stage order."""
    released: tuple[NodeInfo, ...]
    """Living nodes whose lane of this pipeline is no longer used: tell them to leave it."""
    cause: Cause
    lost_stages: tuple[Stage, ...]
    """Stages whose node is new to this pipeline and holds no KV of it."""
    shares: int = 1
    """Lanes that share the KV memory of the busiest of these nodes."""
    orphans: tuple[tuple[PipelineId, Epoch], ...] = ()
    """Pipelines that have no engine: the nodes are to give up their lanes, up to this epoch."""
    losses: tuple[Loss, ...] = ()
    """What members were computing that were lost since the pipeline was last formed, as far as it is known."""


class Suspend(Message, frozen=True):
    """A stage has no node: wait for `Form`, and end all requests with this reason unless they are to wait too."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    reason: str
    waits: bool = False
    """Whether requests wait for `Form` as well; another `Suspend` says when they have waited for long enough."""
    lost_stages: tuple[Stage, ...] = ()
    """All that have no node now."""
    losses: tuple[Loss, ...] = ()
    """As in `Form`."""


class Standbys(Message, frozen=True):
    """Who keeps the replicas of each stage from now on, in stage order; None where nobody can."""

    pipeline: PipelineId
    standbys: tuple[NodeInfo | None, ...]


class Hasten(Message, frozen=True):
    """These stages are about to move to their standbys: until the next `Form` copy every token at once."""

    pipeline: PipelineId
    epoch: Epoch
    stages: tuple[Stage, ...]


# ---- people, by way of a command


class DrainNode(Message, frozen=True):
    """Have a node give its lanes away and leave; answered by `Answered`."""

    node: NodeId


class JoinNode(Message, frozen=True):
    """This process is to fill an empty place; answered by `Answered`, which says as whom."""

    node: NodeId
    pid: int


class Answered(Message, frozen=True):
    """What became of a request."""

    refusal: str
    """One line for a person; empty when it was granted."""
    member: Member | None = None
    """Whom it is about."""
    stage: Stage | None = None


# ---- observers


class AskStatus(Message, frozen=True):
    """One question, one `Status`."""


class Status(Message, frozen=True):
    """The contract's status document."""

    document: bytes
    """JSON."""


class AskMetrics(Message, frozen=True):
    """One question, one `Metrics`."""


class Metrics(Message, frozen=True):
    """The controller's metrics, to be appended to those of the API server."""

    exposition: bytes
    """Prometheus text format."""


class Subscribe(Message, frozen=True):
    """From now on send the observer every change of `Availability`, `Narration` and `Fatal`; the current one first.

    A controller that was started again knows no observers: send this again every second or two. Doing so is
    harmless, and is answered with the current `Availability`.
    """

    narration: bool = False


class Availability(Message, frozen=True):
    """Whether at least one pipeline can generate."""

    serving: bool
    started: bool
    """Whether the cluster has ever served: before that a missing node is start-up, not failure."""
    reason: str
    retry_after_seconds: int


class Narration(Message, frozen=True):
    """One line about something that happened, for people."""

    time: float
    text: str


class Fatal(Message, frozen=True):
    """The cluster cannot start; the supervisor prints this one line and exits."""

    reason: str


# ---- controller -> launcher (the zygote's own socket), and back


class StartNode(Message, frozen=True):
    """Fork a node."""

    node: NodeId
    incarnation: int
    stage: Stage


class StartApiServer(Message, frozen=True):
    """Fork the API server with its engines."""


class Started(Message, frozen=True):
    """The process id of what was forked."""

    pid: int


AnyMessage = (
    NodeStarting | NodeReady | NodeFailed | Heartbeat | BeatHeard | Introduce | Retire | EngineAttached
    | EngineReport | EngineReady | Formed | MemberFailed | Form | Suspend | Standbys | Hasten | DrainNode | JoinNode
    | Answered | AskStatus | Status | AskMetrics | Metrics | Subscribe | Availability | Narration | Fatal | StartNode
    | StartApiServer | Started
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """One frame for the wire."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """The message in a frame. Raises `msgspec.DecodeError` (or `ValidationError`) for anything else."""
    return decode_with(_decoder, frame)
