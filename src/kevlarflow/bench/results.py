"""What the experiments yield: plain data, the JSON of a report. Times are seconds.

A round or start whose load was not whole carries the reason in `void`, and counts for nothing. What a system does wrong
after a kill is that kill's outcome.
"""

from __future__ import annotations

import msgspec

from kevlarflow.bench.detection_results import Detection
from kevlarflow.bench.machine import Machine
from kevlarflow.bench.measure import LoadSummary, Pause
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.replication_results import Repeatable, ReplicationCost, Resume, StandbyMemory, Transfers


class Load(msgspec.Struct, frozen=True):
    """One load, measured."""

    summary: LoadSummary
    strangers: float
    """Share of the machine's CPU time that other processes took meanwhile, from 0 to 1."""


class Round(msgspec.Struct):
    """One life of one system in the throughput experiment."""

    number: int
    system: str
    ready_seconds: float | None = None
    loads: list[Load] = msgspec.field(default_factory=list)
    leftovers: list[str] = msgspec.field(default_factory=list)
    """Processes that outlived the system's end, and were killed."""
    void: str | None = None


class Start(msgspec.Struct):
    """One start of one system."""

    number: int
    system: str
    cache: str
    """``cold`` or ``warm``: the folders of compiled code."""
    ready_seconds: float | None = None
    """From the command to the first 200 of /health."""
    first_token_seconds: float | None = None
    """From that 200 to the first token of a first request."""
    strangers: float = 0.0
    leftovers: list[str] = msgspec.field(default_factory=list)
    void: str | None = None


class Kill(msgspec.Struct):
    """One SIGKILL under load."""

    number: int
    pipeline: int
    stage: int
    node: str = ""
    taken_over_by: str = ""
    affected: list[Pause] = msgspec.field(default_factory=list)
    """Streams of the pipeline that lost its node."""
    bystanders: list[Pause] = msgspec.field(default_factory=list)
    """Streams of the other pipelines, one of which lends a node."""
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    recomputed_tokens: int = 0
    rejoin_seconds: float | None = None
    """From the kill until a fresh node had the lane back, under load."""
    rejoin_gap_seconds: float | None = None
    """The longest wait for a token of any stream while the lane moved there."""
    gap_before_rejoin_seconds: float | None = None
    """The longest just before, when nothing but the load went on."""
    lost: list[str] = msgspec.field(default_factory=list)
    """Streams that did not bring all of their tokens, whenever, and why."""
    failure: str | None = None
    """How the recovery or the move home failed, if one did: not in time, recorded as something else than done, or the
    cluster was never whole again."""
    void: str | None = None

    @property
    def harm(self) -> list[str]:
        """What the system has done wrong."""
        lost = [f"{len(self.lost)} streams lost ({self.lost[0]})"] if self.lost else []
        return lost if self.failure is None else [*lost, self.failure]


class Throughput(Repeatable):
    """See `kevlarflow.bench.throughput`."""

    rounds: list[Round] = msgspec.field(default_factory=list)


class Startup(Repeatable):
    """See `kevlarflow.bench.startup`."""

    starts: list[Start] = msgspec.field(default_factory=list)


class Failover(Repeatable):
    """See `kevlarflow.bench.failover`."""

    streams: int
    kills: list[Kill] = msgspec.field(default_factory=list)
    void: str | None = None
    """Why no more kills followed, if so, where that is not the outcome of the last one."""
    earlier_harm: list[str] = msgspec.field(default_factory=list)
    """What the system had done wrong before the kills were made anew: a better run later does not undo it."""

    @property
    def harm(self) -> list[str]:
        """What the system has done wrong after kills, and before them."""
        return [*self.earlier_harm, *(f"kill {kill.number}: {each}" for kill in self.kills for each in kill.harm)]


class Report(msgspec.Struct):
    """Everything that one run of ``kevlarflow bench`` has measured."""

    command: str
    begun: str
    """Local time, ISO 8601."""
    machine: Machine
    recipe: Recipe
    notes: list[str] = msgspec.field(default_factory=list)
    throughput: Throughput | None = None
    startup: Startup | None = None
    failover: Failover | None = None
    detection: Detection | None = None
    resume: Resume | None = None
    replication_cost: ReplicationCost | None = None
    standby_memory: StandbyMemory | None = None
    transfer: Transfers | None = None
