"""What a pipeline is told, and what it asks for: the events and commands of `recovery.pipeline`.

Stages and steps are named by number, nodes by what they said of themselves; nothing here does anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.ledger import LedgerEntry, Step, StepResult
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.recovery.use import NO_CHANGE, Use
from kevlarflow.types import Epoch, Loss, Member, NodeInfo, Phases, PipelineId, Stage

# ---- events


@dataclasses.dataclass(frozen=True, slots=True)
class FormationOrdered:
    """The controller wants these nodes, in stage order; `released` nodes keep no lane of this pipeline."""

    epoch: Epoch
    nodes: tuple[NodeInfo, ...]
    released: tuple[NodeInfo, ...] = ()
    planned: bool = False
    """Whether the nodes that serve now are alive, so that steps in flight can complete first."""
    shares: int = 1
    """Lanes that share the KV memory of the busiest of these nodes."""
    orphans: tuple[tuple[PipelineId, Epoch], ...] = ()
    """Lanes without an engine, that those nodes are to give up."""
    lost: bool = False
    """Whether a node was lost: the steps in flight may be to blame."""
    losses: tuple[Loss, ...] = ()
    """What lost nodes were computing, as far as it is known."""
    anew: bool = False
    """Whether messages were lost: standbys are to get every copy once more."""


@dataclasses.dataclass(frozen=True, slots=True)
class SuspensionOrdered:
    """A stage has no node; requests end with `reason`, or wait for the next order."""

    epoch: Epoch
    reason: str
    waits: bool = False
    lost_stages: tuple[Stage, ...] = ()
    losses: tuple[Loss, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class StandbysAssigned:
    """The controller has chosen who keeps the replicas of each stage; None where nobody can."""

    standbys: tuple[NodeInfo | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicasConfirmed:
    """What a standby has stored and dropped of what `source` sent it."""

    stage: Stage
    source: Member
    standby: Member
    stored: tuple[Replica, ...]
    dropped: tuple[Replica, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicasPlaced:
    """A new node has put its replicas into the lane; `missing` it did not have after all. After `PlaceRest` once more.

    `fuller` are replicas that hold more tokens than the pipeline knew of: their confirmations were still on their way.
    """

    epoch: Epoch
    stage: Stage
    missing: tuple[Replica, ...]
    fuller: tuple[Replica, ...] = ()
    ahead: bool = False
    """Whether this answers `Prepare`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageFlushed:
    """The standby of a stage has all that was written there, or cannot be brought to have it soon."""

    epoch: Epoch
    stage: Stage


@dataclasses.dataclass(frozen=True, slots=True)
class StepIssued:
    """vLLM's scheduler made a step."""

    step: Step


@dataclasses.dataclass(frozen=True, slots=True)
class StageJoined:
    """A node has opened the lane."""

    epoch: Epoch
    stage: Stage
    results: Mapping[tuple[Epoch, int], StepResult] = dataclasses.field(default_factory=dict)
    """Of the last stage: what it has sampled before, by the epoch and the number of the step."""


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
    """A stage raised an exception in this step, or in recovery work."""

    epoch: Epoch
    sequence: int
    stage: Stage
    reason: str


Answer = ReplicasPlaced | StageFlushed | StageJoined | ChunkRecomputed | StageRestored | StepExecuted | StepBroken
"""What nodes say under an epoch."""

Event = FormationOrdered | SuspensionOrdered | StandbysAssigned | ReplicasConfirmed | StepIssued | Answer


# ---- commands


@dataclasses.dataclass(frozen=True, slots=True)
class Join:
    """Open the lane on the node of `stage`, linked to the next one, with the blocks that the pipeline may use."""

    stage: Stage
    usable: frozenset[int] | None = None
    """KV blocks; None: all."""
    orphans: tuple[tuple[PipelineId, Epoch], ...] = ()
    """Lanes without an engine, to be given up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prepare:
    """Have the node of `stage` in an order that waits open the lane under `order.epoch`, and put replicas in place."""

    stage: Stage
    order: FormationOrdered
    replicas: tuple[Replica, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Flush:
    """Have the node of `stage` send its standby all that was written, once it has run what it was sent."""

    stage: Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """Give up the lane on a node that is no longer used."""

    node: NodeInfo


@dataclasses.dataclass(frozen=True, slots=True)
class AssignStandby:
    """Tell the node of `stage` where to replicate to; None: nowhere."""

    stage: Stage
    standby: NodeInfo | None
    anew: bool = False
    """Whether it is to get every copy once more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Put replicas into the lane on the node of `stage`: `now`, and those of `later` when `PlaceRest` comes."""

    stage: Stage
    now: tuple[Replica, ...]
    later: tuple[Replica, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceRest:
    """Put the remaining replicas into the lane: cached prefixes that no live request uses."""

    stage: Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Recompute:
    """Send a chunk to the stages up to `chunk.through`."""

    sequence: int
    chunk: Chunk
    oldest: int
    """Of the steps that come again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Restore:
    """Send the ledger to every stage, with the blocks of the lane that hold something."""

    entries: tuple[LedgerEntry, ...]
    held: tuple[Replica, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Execute:
    """Send a step to every stage."""

    sequence: int
    has_tokens: bool = True
    """False for a step that only says which requests ended."""
    writes: tuple[Replica, ...] = ()
    """What each block that the step writes holds after it."""
    left_out: frozenset[str] = frozenset()
    """Requests that the scheduler put into the step and that take no part in it."""
    use: Use = NO_CHANGE
    """What the step changes in the use of blocks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deliver:
    """Give vLLM the result of a step; those in `left_out` have no token."""

    sequence: int
    left_out: frozenset[str] = frozenset()
    output: Any = None
    """The `StepResult.output` that was believed; None of a step that nobody is left in."""


@dataclasses.dataclass(frozen=True, slots=True)
class Abandon:
    """Tell vLLM that a step will never have a result; end its requests with `reason`."""

    sequence: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class AbandonEverything:
    """Tell vLLM's scheduler to end all its requests with `reason`, those that are in no step included."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Aside:
    """A request that is set aside."""

    request: str
    reason: str
    """Why it has to end; empty for one that is to be preempted and goes on later."""
    known: bool
    """Whether the nodes have heard of it; otherwise vLLM has to introduce it again."""


@dataclasses.dataclass(frozen=True, slots=True)
class SetAside:
    """Tell vLLM's scheduler to preempt or end these requests, and to forget cached blocks that nobody fills."""

    requests: tuple[Aside, ...]
    spoilt: frozenset[int]


@dataclasses.dataclass(frozen=True, slots=True)
class UseBlocks:
    """Tell vLLM's scheduler which KV blocks it may give out; None: all."""

    usable: frozenset[int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class EvictPrefixCache:
    """Forget cached blocks that no live request holds, but `keep`: the new node does not have them."""

    keep: frozenset[int] = frozenset()


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


FormingCommand = Join | Prepare | Flush | Leave | AssignStandby | Place | PlaceRest | Recompute | Restore
"""Commands that go to nodes so that the pipeline is formed."""

Command = (
    FormingCommand | Execute | Deliver | Abandon | AbandonEverything | SetAside | UseBlocks | EvictPrefixCache
    | FormationDone | RequestFormation
)  # fmt: skip
