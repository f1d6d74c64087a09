"""What engines and nodes say to one another: steps, recovery work, results; and activations between nodes.

A message is a small typed header, and for some kinds payload frames behind it that only the two ends
understand (a pickled scheduler output, raw tensors). Pickle is safe here for one reason: these sockets live
in the run folder, which only the user who started the cluster can enter (see `control.run_folder`).

Everything carries ``(pipeline, epoch)``. A node drops what is older than the newest epoch that joined the
lane; an engine drops what is not of its own epoch. Order is kept by each connection, so an engine may send
`Join`, `Recompute`, `Restore` and `Execute` in one go without waiting for answers.

A connection may break, and loses what is on its way; ZeroMQ makes a new one, over which the rest comes. What then?

* **Engine to node**: a lane takes work over the connection only that brought its `Join`. Whatever comes over a later
  one is answered by `Unlinked`, and the pipeline is formed anew. If nothing comes any more, the pipeline stands still.
* **Node to engine, and activations**: an answer is missing, and steps complete in order: the pipeline stands still.
* A pipeline that **stands still** is formed anew (`kevlarflow.recovery.standstill`), which sends everything again:
  the lane, the standby, the copies, the ledger and all steps. The exceptions are `Leave`, which is repeated until
  `Left` comes, `Describe`, which is repeated until `Description` comes, `Hasten`: without it a lane moves later, and
  `Flush`: without requests nothing stands still, so its answer is waited for some seconds only (`recovery.ahead`).
"""

from __future__ import annotations

import msgspec

from kevlarflow.recovery.use import NO_CHANGE, Use
from kevlarflow.types import Epoch, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire.decoding import decode_with


class StepMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of every header; the tag on the wire is the class name."""


# ---- engine -> node


class Describe(StepMessage, frozen=True):
    """Ask, once a second until it is answered, for what vLLM wants to know of a worker (KV specs, memory, tasks)."""


class Join(StepMessage, frozen=True):
    """Open the lane in this epoch: forget its requests, keep the KV of the blocks in use, link to the next stage.

    Payload: pickled frozenset of the KV blocks that the engine uses, or None for all.
    """

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    next_address: str
    """Activation address of the next stage; empty at the last stage."""
    orphans: tuple[tuple[PipelineId, Epoch], ...] = ()
    """Pipelines that have no engine: their lanes up to this epoch are to be given up."""


class Leave(StepMessage, frozen=True):
    """The pipeline no longer uses this lane. Sent again until `Left` comes."""

    pipeline: PipelineId
    epoch: Epoch


class AssignStandby(StepMessage, frozen=True):
    """Replicate the lane to this node from now on; None: to nobody."""

    pipeline: PipelineId
    epoch: Epoch
    standby: NodeInfo | None
    anew: bool = False
    """Whether to send it everything once more: what it has confirmed may have been lost."""


class Hasten(StepMessage, frozen=True):
    """The lane is about to move to its standby: copy every token at once, until it is joined again."""

    pipeline: PipelineId
    epoch: Epoch


class Flush(StepMessage, frozen=True):
    """The steps before this were the last of the lane's: have its standby get all that they wrote, and say so."""

    pipeline: PipelineId
    epoch: Epoch


class Place(StepMessage, frozen=True):
    """Put replicas that this node keeps into its lane; payload: pickled (now, later), tuples of `Replica`."""

    pipeline: PipelineId
    epoch: Epoch
    ahead: bool = False
    """Whether the lane is served elsewhere still, so that further copies have to be taken meanwhile."""


class PlaceRest(StepMessage, frozen=True):
    """Put those of `Place.later` into the lane."""

    pipeline: PipelineId
    epoch: Epoch


class Restore(StepMessage, frozen=True):
    """Rebuild request state; payload: pickled (ledger entries, replicas that name what the lane holds)."""

    pipeline: PipelineId
    epoch: Epoch


class Recompute(StepMessage, frozen=True):
    """Run a chunk without sampling; payload: pickled `recovery.recompute.Chunk`. Chunks have negative numbers."""

    pipeline: PipelineId
    epoch: Epoch
    sequence: int
    through: Stage
    """The last stage that has to run it."""
    oldest: int
    """No step before this one comes again."""


class Execute(StepMessage, frozen=True):
    """Run a step; payloads: pickled `SchedulerOutput`, pickled `GrammarOutput` or None."""

    pipeline: PipelineId
    epoch: Epoch
    sequence: int
    has_tokens: bool
    """False for a step that only says which requests ended: it needs no activations and has no answer."""
    writes: tuple[tuple[int, int, int, int], ...]
    """(block, generation, tokens filled, depth) of each block that the step writes, as it is afterwards."""
    use: Use = NO_CHANGE
    """What the step changes in the use of blocks."""


# ---- node -> engine


class Description(StepMessage, frozen=True):
    """Answer to `Describe`; payload: pickled `node.stage.StageDescription`."""

    stage: Stage


class Joined(StepMessage, frozen=True):
    """The lane is open in this epoch; payload: of each of `results`, what `Executed` says of that step."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    results: tuple[tuple[Epoch, int], ...] = ()
    """(epoch, number) of the newest steps that were sampled here. The answers of old epochs themselves are dropped."""


class Left(StepMessage, frozen=True):
    """The node has no lane of this epoch, or of one before."""

    pipeline: PipelineId
    epoch: Epoch
    member: Member


class Placed(StepMessage, frozen=True):
    """Replicas are in place, but for these (block, generation, filled), which the node does not have.

    Answers `Place`, and again `PlaceRest`.
    """

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    missing: tuple[tuple[int, int, int], ...]
    fuller: tuple[tuple[int, int, int], ...] = ()
    """Of the others, those that hold more tokens than were asked for."""
    ahead: bool = False
    """As in the `Place` that this answers."""


class Flushed(StepMessage, frozen=True):
    """The standby has all that it can be brought to have within a moment."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage


class Replicated(StepMessage, frozen=True):
    """What a standby stored and dropped, as the node that sent the copies heard it."""

    pipeline: PipelineId
    stage: Stage
    source: Member
    standby: Member
    stored: tuple[tuple[int, int, int], ...]
    dropped: tuple[tuple[int, int, int], ...]
    used_bytes: int
    """Of this lane's replicas on the standby."""
    limit_bytes: int
    full_bytes: int
    """Sent so far as copies of full blocks."""
    partial_bytes: int
    """Sent so far as copies of partly filled ones."""
    refused: int
    """Copies that a standby called wrong."""


class Restored(StepMessage, frozen=True):
    """Request state is rebuilt."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage


class Refused(StepMessage, frozen=True):
    """The node could not do what was asked: no free lane, or not its stage."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    reason: str


class Unlinked(StepMessage, frozen=True):
    """The connection over which the lane was opened is no more, and what was on its way may be lost."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage


class Recomputed(StepMessage, frozen=True):
    """A recompute chunk is done at the last stage that had to run it."""

    pipeline: PipelineId
    epoch: Epoch
    sequence: int


class Executed(StepMessage, frozen=True):
    """A step is done; payload: pickled `(ModelRunnerOutput, generators)`."""

    pipeline: PipelineId
    epoch: Epoch
    sequence: int


class StepFailed(StepMessage, frozen=True):
    """A step raised a Python exception at this stage."""

    pipeline: PipelineId
    epoch: Epoch
    sequence: int
    stage: Stage
    reason: str


# ---- node -> next node


class Activations(StepMessage, frozen=True):
    """Output of a stage; payload: one raw frame for each tensor."""

    pipeline: PipelineId
    epoch: Epoch
    sequence: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name, dtype, shape) of each frame."""


AnyStepMessage = (
    Describe | Join | Leave | AssignStandby | Hasten | Flush | Place | PlaceRest | Restore | Recompute | Execute
    | Description | Joined | Left | Placed | Flushed | Replicated | Restored | Refused | Unlinked | Recomputed
    | Executed | StepFailed | Activations
)  # fmt: skip

OF_A_LANE = Execute | Recompute | Restore | Flush | Place | PlaceRest | AssignStandby | Hasten
"""What a lane takes over the connection only that brought its `Join`."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyStepMessage] = msgspec.msgpack.Decoder(AnyStepMessage)


def encode(message: AnyStepMessage) -> bytes:
    """The header frame."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyStepMessage:
    """The header in a frame. Raises `msgspec.DecodeError` for anything else."""
    return decode_with(_decoder, frame)
