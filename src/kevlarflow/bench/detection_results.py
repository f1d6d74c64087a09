"""What the experiment about detection yields: plain data. Times are seconds."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec

Kind = Literal["crash", "hang"]
KINDS: tuple[Kind, ...] = ("crash", "hang")


class Stretch(msgspec.Struct):
    """Some time under load, from which nothing was left out."""

    seconds: float = 0.0
    hog_seconds: float = 0.0
    """CPU time that the hogs got."""
    other_seconds: float = 0.0
    """CPU time of processes that are neither the cluster, nor hogs, nor the harness."""
    idle_seconds: float = 0.0
    """CPU time that nobody took."""
    requests: int = 0
    """Those that ended."""
    long_requests: int = 0
    """Of these, those with a long prompt."""
    tokens: int = 0
    lost: list[str] = msgspec.field(default_factory=list)
    """Requests that did not bring what was asked for, and why."""
    different: list[str] = msgspec.field(default_factory=list)
    """Requests that brought another text than the first one with the same prompt."""
    alarms: list[str] = msgspec.field(default_factory=list)
    """What the cluster held against processes that nobody had hurt."""
    suspicions: list[str] = msgspec.field(default_factory=list)
    """How an alarm begins: nodes that were suspect, engines that did not report for a while."""


class Fault(msgspec.Struct):
    """One crash or hang."""

    number: int
    kind: Kind
    node: str = ""
    proof: str = ""
    detected_seconds: float | None = None
    """From the signal until the controller had decided that the node is lost; None: it never did."""
    back_seconds: float | None = None
    """Until every lane was at home again."""
    void: str | None = None


class Life(msgspec.Struct):
    """One cluster, from its start to its end."""

    calm: Stretch = msgspec.field(default_factory=Stretch)
    """Without a fault."""
    struck: Stretch = msgspec.field(default_factory=Stretch)
    """From then on, with faults one after the other."""
    faults: list[Fault] = msgspec.field(default_factory=list)
    void: str | None = None
    """Why it ended before its time; what it has shown until then counts."""
    has_journal: bool = True
    """Whether what the cluster noted is all there. Otherwise nobody knows its alarms, and its minutes do not count."""


class Detection(msgspec.Struct):
    """See `kevlarflow.bench.detection`."""

    clients: int
    long_clients: int
    """Of these, the ones with long prompts."""
    long_tokens: int
    """Of a long prompt."""
    hogs: int
    minutes: float
    """Without a fault, that were asked for."""
    flags: str = ""
    """What the clusters were started with."""
    lives: list[Life] = msgspec.field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        """Those that happened."""
        return [fault for life in self.lives for fault in life.faults if fault.void is None]

    @property
    def void(self) -> str | None:
        """What the last cluster has left undone, and why: it ended before its time, or a fault did not happen."""
        last = self.lives[-1] if self.lives else Life()
        return last.void or next((fault.void for fault in last.faults if fault.void is not None), None)

    def calm_seconds(self) -> float:
        """Watched so far without a fault."""
        return sum(life.calm.seconds for life in self.lives if life.has_journal)

    def missing(self, kills: int) -> list[Kind]:
        """The faults that are still to be made for `kills` of each kind, the kinds in turns."""
        left = [[kind] * max(0, kills - sum(each.kind == kind for each in self.faults)) for kind in KINDS]
        return [kind for pair in itertools.zip_longest(*left) for kind in pair if kind is not None]
