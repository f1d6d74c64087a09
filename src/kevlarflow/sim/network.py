"""Virtual time and what travels in it.

The timeline is a heap of things that will happen; nothing else moves the clock. Messages travel on lines, and each line
keeps its order, as a ZeroMQ connection does; between lines anything may overtake. A line delays, and loses only what a
real one loses: what was under way when a process died, at either end, or when the connection broke. A connection that
breaks is made anew at once, but it is another one: whoever listens at its end can tell, and whoever dials cannot. A
process that is stopped or cut off receives nothing until it is back, and then everything, in order. Only what goes to
the controller may also come twice, late: it is told again whatever a new life of it has to know.
"""

from __future__ import annotations

import collections
import enum
import functools
import heapq
import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

Action = Callable[[], None]


class Timeline:
    """The virtual clock, in seconds, and what is still to happen."""

    def __init__(self, start: float) -> None:
        self.now = start
        self.events = 0
        self._heap: list[tuple[float, int, Action]] = []
        self._count = itertools.count()

    def after(self, seconds: float, action: Action) -> None:
        """Let `action` happen `seconds` from now; among equals, in the order in which this was asked."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._count), action))

    def run(self, until: float, enough: Callable[[], bool] | None = None) -> bool:
        """Let things happen until `enough` says so (then True), or until that time has come (then False)."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action = heapq.heappop(heap)
            self.events += 1
            action()
            if enough is not None and enough():
                return True
        self.now = until
        return False


class By(enum.Enum):
    """Who ended a process."""

    ITSELF = enum.auto()
    """What it computed."""
    US = enum.auto()
    """The system under test, whatever for."""
    SOMEBODY = enum.auto()


class Process:
    """Something that can be stopped, go on, and die; it does nothing while it is stopped, and nothing once dead."""

    kind = "process"

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.timeline = timeline
        self.name = name
        self.alive = True
        self.frozen = False
        self.frozen_since = 0.0
        self.thawed_at = float("-inf")
        """When it last went on."""
        self.last_pause = self.longest_pause = 0.0
        """For how long it was stopped and then went on: the last time, and at most."""
        self.died_at = 0.0
        self.ended_by = By.US
        self.loses_after = 0.0
        """What it sent later than this and has not arrived when it dies is lost."""
        self._asleep: list[Action] = []

    def __str__(self) -> str:
        return self.name

    def after(self, seconds: float, action: Action) -> None:
        """Do something later, unless dead by then."""
        self.timeline.after(seconds, functools.partial(self._do, action))

    def _do(self, action: Action) -> None:
        if self.frozen:
            self._asleep.append(action)
        elif self.alive:
            action()

    def die(self, loses_after: float) -> None:
        """End at once."""
        self.alive = self.frozen = False
        self.died_at = self.timeline.now
        self.loses_after = loses_after
        self._asleep.clear()

    def freeze(self) -> None:
        """Stop."""
        self.frozen, self.frozen_since = True, self.timeline.now

    def thaw(self) -> None:
        """Go on with what came due meanwhile."""
        self.frozen = False
        self.thawed_at = self.timeline.now
        self.last_pause = self.timeline.now - self.frozen_since
        self.longest_pause = max(self.longest_pause, self.last_pause)
        asleep, self._asleep = self._asleep, []
        for action in asleep:
            self._do(action)


@dataclass(frozen=True)
class Cut:
    """A partition: what passes between `process` and processes of these kinds is held up."""

    process: Process
    kinds: frozenset[str]
    inward: bool
    outward: bool
    peer: Process | None = None
    """The only one that it is cut off from; None: all of these kinds."""

    def stops(self, source: Process, target: Process) -> bool:
        """Whether a message on this way is held up."""
        if self.inward and target is self.process and self._is_beyond(source):
            return True
        return self.outward and source is self.process and self._is_beyond(target)

    def _is_beyond(self, other: Process) -> bool:
        return other.kind in self.kinds if self.peer is None else other is self.peer


@dataclass(slots=True)
class _Message:
    source: Process
    target: Process
    line: Hashable
    sent_at: float
    deliver: Action


@dataclass
class Network:
    """See the module's text."""

    timeline: Timeline
    rng: random.Random
    latency: float
    """Typical seconds from end to end."""
    slowness: float = 1.0
    echo: float = 0.0
    """How likely a message to the controller comes a second time, late."""
    cuts: list[Cut] = field(default_factory=list)
    sent: int = 0
    held_up: int = 0
    """Messages that a partition has held up."""
    echoed: int = 0
    """Those that came a second time."""
    released_at: float = 0.0
    """When what was held up was last let go."""
    _connections: collections.Counter[tuple[Process, Process]] = field(default_factory=collections.Counter)
    _lost_at: dict[tuple[Process, Process, str], float] = field(default_factory=dict)
    """When what was on its way from one process to another, of one sort, was lost."""
    _arrives: dict[Hashable, float] = field(default_factory=dict)
    _held: dict[Hashable, list[_Message]] = field(default_factory=dict)

    def send(self, source: Process, target: Process, line: Hashable, deliver: Action) -> None:
        """Let `deliver` happen at the target when the message arrives."""
        self.sent += 1
        now = self.timeline.now
        delay = self.latency * self.slowness * (0.1 + 3 * self.rng.random() ** 3)
        arrives = self._arrives[line] = max(now + delay, self._arrives.get(line, 0.0))
        message = _Message(source, target, line, now, deliver)
        self.timeline.after(arrives - now, functools.partial(self._arrive, message))
        if self.echo and target.kind == "controller" and self.rng.random() < self.echo:
            self.echoed += 1
            again = _Message(source, target, ("echo", self.sent), now, deliver)
            self.timeline.after(arrives - now + self.rng.random() * 0.3, functools.partial(self._arrive, again))

    @property
    def held(self) -> int:
        """Messages that wait for a target or for the end of a partition."""
        return sum(map(len, self._held.values()))

    def connection(self, one: Process, other: Process) -> int:
        """The number of the connection between two processes: how often it has broken."""
        return self._connections.get((one, other), 0)

    def sever(self, source: Process, target: Process, sorts: frozenset[str], *, loses: bool, loses_back: bool) -> None:
        """Break the connections between two processes; `sorts` are those of the messages that are lost with them."""
        self._connections[source, target] += 1
        self._connections[target, source] += 1
        for sort in sorts:
            if loses:
                self._lost_at[source, target, sort] = self.timeline.now
            if loses_back:
                self._lost_at[target, source, sort] = self.timeline.now

    def parted(self, one: Process, other: Process) -> bool:
        """Whether nothing passes between two processes in at least one direction."""
        return self.stops(one, other) or self.stops(other, one)

    def stops(self, source: Process, target: Process) -> bool:
        """Whether nothing passes from one process to another."""
        return bool(self.cuts) and any(cut.stops(source, target) for cut in self.cuts)

    def release(self) -> None:
        """A partition has ended, or a process goes on: deliver what waited, in the order of each line."""
        self.released_at = self.timeline.now
        held, self._held = self._held, {}
        for line in held.values():
            for message in line:
                self._arrive(message)

    def _arrive(self, message: _Message) -> None:
        source, target = message.source, message.target
        if self._lost_at and message.sent_at <= self._lost_at.get((source, target, sort_of(message.line)), -1.0):
            return
        if not source.alive and message.sent_at > source.loses_after:
            return
        waits = target.kind == "controller"
        if not target.alive and not waits:
            return
        if waits and message.sent_at <= target.died_at and message.sent_at > target.loses_after:
            return
        stopped = target.frozen or not target.alive or message.line in self._held
        if stopped or self.stops(source, target):
            self.held_up += not stopped
            self._held.setdefault(message.line, []).append(message)
        else:
            message.deliver()


def sort_of(line: Hashable) -> str:
    """What kind of message travels on a line."""
    return str(line[0]) if isinstance(line, tuple) else "steps"
