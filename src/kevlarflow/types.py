"""The glossary as types: the words of ARCHITECTURE.md, each with one meaning.

Everything here is plain data: immutable, comparable, and able to round-trip through JSON, because
the same values travel on the wire, stand in the journal and drive the simulator.
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

NodeId = NewType("NodeId", str)
"""Name of a place in the grid, ``node-<pipeline>-<stage>``; with an incarnation it names a member."""
PipelineId = NewType("PipelineId", int)
"""Index of a pipeline, 0 to R - 1; also the index of its engine, and of its lane on any node."""
Stage = NewType("Stage", int)
"""Index of a stage, 0 to S - 1."""
Epoch = NewType("Epoch", int)
"""Grows with each re-forming of a pipeline; whatever carries an old one is dropped."""
RecoveryId = NewType("RecoveryId", int)


class NodeState(enum.StrEnum):
    """State of a node, as `status` shows it."""

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DEAD = "dead"
    DRAINING = "draining"


class PipelineState(enum.StrEnum):
    """State of a pipeline, as `status` shows it; ``waiting`` means that a stage has no node."""

    STARTING = "starting"
    SERVING = "serving"
    RECOVERING = "recovering"
    WAITING = "waiting"


class EngineState(enum.StrEnum):
    """State of an engine, as `status` shows it."""

    STARTING = "starting"
    READY = "ready"
    SILENT = "silent"
    """It has not reported for a while."""
    DEAD = "dead"


class RecoveryState(enum.StrEnum):
    """State of a recovery, as `status` shows it."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Cause(enum.StrEnum):
    """Why a pipeline was formed."""

    START = "start"
    CRASH = "crash"
    HANG = "hang"
    REJOIN = "rejoin"
    ATTACH = "attach"
    DRAIN = "drain"
    SLOW = "slow"
    """A node was far slower than its peers for long."""
    SHARE = "share"
    LINK = "link"
    """A connection broke, and what was on its way in it is lost; every node may be well, and go on."""

    @property
    def is_planned(self) -> bool:
        """Whether every node was alive: then the pipeline changes its nodes between two steps."""
        return self in (Cause.REJOIN, Cause.DRAIN, Cause.SLOW)


class Member(msgspec.Struct, frozen=True, order=True):
    """A node in one of its lives. A node that was declared dead never comes back as the same member."""

    node: NodeId
    incarnation: int

    def __str__(self) -> str:
        return f"{self.node}#{self.incarnation}"


class NodeInfo(msgspec.Struct, frozen=True):
    """What a node says of itself when it joins."""

    member: Member
    stage: Stage
    host: str
    pid: int
    """The process that holds the weights and computes (rank 0 of the node's T ranks)."""
    pids: tuple[int, ...]
    """One process id for each tensor-parallel rank."""
    step_address: str
    """Where engines send steps."""
    activation_address: str
    """Where the node of the stage before sends activations."""
    lanes: int
    """How many pipelines it can serve at once; they share its KV memory."""
    kv_blocks: int
    """KV blocks that it has memory for, block 0 included, which vLLM never gives out."""
    replica_address: str = ""
    """Where nodes whose standby it is send copies of their KV blocks; empty when it keeps none."""


class Pace(msgspec.Struct, frozen=True):
    """How long a node took for its decode steps of one size: those whose requests and context have the same logarithms.

    Two steps of one size differ in their work by less than a factor of two.
    """

    requests_log2: int
    context_log2: int
    """Of the tokens whose KV the step's requests read, all together."""
    steps: int
    seconds: float
    """Of all these steps: to compute the layers. Sampling and waits for a CPU are left out."""

    @property
    def size(self) -> tuple[int, int]:
        """Only steps of the same size are compared."""
        return (self.requests_log2, self.context_log2)


class LaneCoverage(msgspec.Struct, frozen=True):
    """How much of the live KV of one stage of a pipeline its standby has."""

    stage: Stage
    standby: Member | None
    live_tokens: int
    covered_tokens: int
    used_bytes: int = 0
    """Of this lane's replicas on the standby."""
    limit_bytes: int = 0
    """Of the standby's store, all lanes together."""
    full_bytes: int = 0
    """Sent by the node that serves the lane now, as copies of full blocks."""
    partial_bytes: int = 0
    """Sent by it as copies of partly filled blocks."""
    dropped: int = 0
    """Replicas that the standby has dropped, or not taken, for want of room; since the engine began."""
    refused: int = 0
    """Copies that a standby called wrong."""


class Computing(msgspec.Struct, frozen=True):
    """What a node was computing in the moment in which it was lost; all zero: nothing."""

    pipeline: PipelineId = PipelineId(0)
    epoch: Epoch = Epoch(0)
    """In which it was sent."""
    sequence: int = 0
    """The number of a step, or that of a chunk that is computed again, as a negative number."""


class Loss(msgspec.Struct, frozen=True):
    """A member that a pipeline has lost, and what it was computing for that pipeline."""

    member: Member
    computing: Computing
    """Nothing where it was lost from outside."""
    from_outside: bool = False
    """Whether somebody has stopped or killed it, which is held against no request."""


class Phases(msgspec.Struct, frozen=True):
    """Seconds of each phase of a recovery. `detect` counts from the last proof of life."""

    detect: float = 0.0
    plan: float = 0.0
    relink: float = 0.0
    restore: float = 0.0
    recompute: float = 0.0
    reissue: float = 0.0

    @property
    def total(self) -> float:
        """Seconds from the last proof of life to the first re-issued step's completion."""
        return self.detect + self.plan + self.relink + self.restore + self.recompute + self.reissue


PHASES = (*Phases.__struct_fields__, "total")
"""Names of the phases and of their sum, as `status` shows them."""
