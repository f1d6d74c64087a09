"""Who is alive in name only: nodes that are silent, stopped, stuck, or deaf.

A process that crashes is seen to die by those who watch processes. This is about all others. There are four kinds of
evidence, and each has two thresholds: a *suspect* is passed over when a donor is sought, and nothing else happens;
a *confirmed* one is fenced (killed), and its lanes move. Evidence that goes away in between leaves no trace.

* *silent*: no beat. The beats come from a thread of its own, so a long step does not silence a node; but a process that
  gets no CPU cannot speak. What its threads have waited for a CPU since the last beat is no silence.
* *stopped*: the kernel says so (SIGSTOP, a debugger). This alone shows
  in a node that still loads and does not beat yet.
* *stuck*: the node itself says that a step is past its deadline (`kevlarflow.node.progress`), and no other node of
  that pipeline is at work, whose slowness could explain it. Of several that are all past their deadlines, the one that
  has been at it longest is explained by no other. A thread that is stuck between two steps waits for no other node.
* *deaf*: it beats, but does not acknowledge what the controller answers: the channel to it is cut.

The detector may itself be starved or stopped. A gap between two checks that is longer than a few beats says nothing
about the nodes, whose beats may be waiting unread; such a gap is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kevlarflow.config import Timeouts
from kevlarflow.recovery.events import NodeCleared, NodeSilent, NodeSuspected
from kevlarflow.types import Member, PipelineId

Verdict = NodeSuspected | NodeSilent | NodeCleared

UNKNOWN_STARVATION_FACTOR = 4
"""Where nobody can say how long a process waited for a CPU, silence has to last this much longer."""


class Beat(NamedTuple):
    """What a beat says besides that the node lives."""

    running_seconds: float = 0.0
    """How long the step that runs has been running, or the loop between two; 0.0: it waits for something to do."""
    pipeline: PipelineId | None = None
    """Whose step it is; None: nobody's."""
    is_overdue: bool = False
    """Whether it is past the deadline that steps of its size have set."""
    heard: int = 0
    """The number of the newest beat that the node has seen answered."""


class Surroundings(Protocol):
    """What the detector has to be told of the world."""

    def starved_seconds(self, member: Member) -> float | None:
        """How long all threads of a member have waited for a CPU, ever; None when nobody can say."""

    def companions(self, member: Member, pipeline: PipelineId) -> Sequence[Member]:
        """The other members of a pipeline."""


class _Listener:
    """What is known of one member."""

    def __init__(self, now: float, *, beats: bool = True) -> None:
        self.beats = beats
        """Whether beats are expected of it."""
        self.beat_at = now
        self.beat = Beat()
        self.excused = 0.0
        self.starved_before: float | None = None
        """What it had been starved when its silence was first looked at."""
        self.stopped_since: float | None = None
        self.seen_from = 0.0
        """Since when there was no pause of the detector's own."""
        self.overdue_since: float | None = None
        self.unheard: tuple[int, float] | None = None
        """The oldest answer that it has not acknowledged, and when it was sent."""
        self.suspect = False
        self.confirmed = False

    def deaf_seconds(self) -> float:
        """How long it has beaten without having heard an answer."""
        return self.beat_at - self.unheard[1] if self.unheard is not None else 0.0


class Evidence(NamedTuple):
    """Why a member may be dead in fact, and since when."""

    what: str
    """Completes "node-0-1 ..."."""
    since: float
    confirmed: bool
    from_outside: bool = False
    """Whether nothing that it computes can have brought it about."""


class Detector:
    """Turns beats, their content and their absence into events for the cluster."""

    def __init__(self, timeouts: Timeouts, surroundings: Surroundings) -> None:
        self._timeouts = timeouts
        self._surroundings = surroundings
        self._gap = 2 * timeouts.heartbeat_interval_ms / 1_000
        self._listeners: dict[Member, _Listener] = {}
        self._checked_at: float | None = None

    def watch(self, member: Member, now: float) -> None:
        """Expect beats of `member` from now on."""
        listener = self._listeners.get(member)
        if listener is None or not (listener.beats or listener.confirmed):
            self._listeners[member] = _Listener(now)

    def forget(self, member: Member) -> None:
        """Expect nothing more of `member`."""
        self._listeners.pop(member, None)

    def beat(self, member: Member, now: float, beat: Beat | None = None) -> list[NodeCleared]:
        """Proof of life. A member that was confirmed stays so: it has been declared dead."""
        listener = self._listeners.get(member)
        if listener is None or listener.confirmed:
            return []
        listener.beat_at = now
        listener.beat = beat or Beat()
        listener.excused = 0.0
        listener.starved_before = None
        if not listener.beat.is_overdue:
            listener.overdue_since = None
        if listener.unheard is not None and listener.beat.heard >= listener.unheard[0]:
            listener.unheard = None
        return self._clear(member, listener, now)

    def answered(self, member: Member, number: int, now: float) -> None:
        """A beat of `member` was answered: a later one has to show that the answer arrived."""
        listener = self._listeners.get(member)
        if listener is not None and listener.unheard is None:
            listener.unheard = (number, now)

    def stopped(self, members: dict[Member, float], now: float) -> None:
        """The members that the kernel shows as stopped, all of them, and since when; not all need be watched yet."""
        for member in members:
            self._listeners.setdefault(member, _Listener(now, beats=False))
        for member, listener in self._listeners.items():
            since = members.get(member)
            listener.stopped_since = max(since, listener.seen_from) if since is not None else None

    def beat_at(self, member: Member) -> float:
        """When `member` last beat; 0.0 when it is not watched."""
        listener = self._listeners.get(member)
        return listener.beat_at if listener else 0.0

    def check(self, now: float) -> list[Verdict]:
        """What the evidence amounts to by now. To be called after all beats that wait were read."""
        self._excuse(now)
        verdicts: list[Verdict] = []
        for member, listener in self._listeners.items():
            if listener.confirmed:
                continue
            evidence = self._evidence(member, listener, now)
            if evidence is None:
                verdicts += self._clear(member, listener, now)
                continue
            if not listener.suspect:
                listener.suspect = True
                verdicts.append(NodeSuspected(member, evidence.since))
            if evidence.confirmed:
                listener.confirmed = True
                verdicts.append(NodeSilent(member, evidence.since, evidence.what, evidence.from_outside))
        return verdicts

    def _clear(self, member: Member, listener: _Listener, now: float) -> list[NodeCleared]:
        if not listener.suspect or self._evidence(member, listener, now) is not None:
            return []
        listener.suspect = False
        return [NodeCleared(member)]

    # ---- evidence

    def _evidence(self, member: Member, listener: _Listener, now: float) -> Evidence | None:
        """The strongest that there is."""
        found = [self._stopped(listener, now)]
        if listener.beats:
            found += [self._stuck(member, listener, now), self._silent(member, listener, now), self._deaf(listener)]
        evidence = [each for each in found if each is not None]
        return max(evidence, key=lambda each: each.confirmed, default=None)

    def _silent(self, member: Member, listener: _Listener, now: float) -> Evidence | None:
        wall = now - listener.beat_at - listener.excused
        if wall < self._gap:
            return None
        starved = self._surroundings.starved_seconds(member)
        factor = 1 if starved is not None else UNKNOWN_STARVATION_FACTOR
        if listener.starved_before is None:
            listener.starved_before = starved
        silence = wall - max(0.0, (starved or 0.0) - (listener.starved_before or 0.0))
        if silence * 1_000 < factor * self._timeouts.suspect_after_ms:
            return None
        confirmed = silence * 1_000 >= factor * self._timeouts.confirm_after_ms
        return Evidence("did not answer", listener.beat_at, confirmed)

    def _stopped(self, listener: _Listener, now: float) -> Evidence | None:
        since = listener.stopped_since
        if since is None:
            return None
        confirmed = (now - since) * 1_000 >= self._timeouts.stopped_after_ms
        return Evidence("was stopped", since, confirmed, from_outside=True)

    def _stuck(self, member: Member, listener: _Listener, now: float) -> Evidence | None:
        beat = listener.beat
        if not beat.is_overdue or (beat.pipeline is not None and self._is_at_work(member, beat.pipeline)):
            listener.overdue_since = None
            return None
        if listener.overdue_since is None:
            listener.overdue_since = now
        confirmed = (listener.beat_at - listener.overdue_since) * 1_000 >= self._timeouts.stuck_after_ms
        where = "in a step" if beat.pipeline is not None else "between two steps"
        return Evidence(f"was stuck {where}", listener.beat_at - beat.running_seconds, confirmed)

    def _is_at_work(self, member: Member, pipeline: PipelineId) -> bool:
        """Whether another node of the pipeline runs one of its steps, and does not hang as well, for less long."""
        mine = self._listeners[member].beat
        others = [self._listeners.get(each) for each in self._surroundings.companions(member, pipeline)]
        at_work = [each.beat for each in others if each is not None and each.beat.pipeline == pipeline]
        return any(not beat.is_overdue or beat.running_seconds > mine.running_seconds for beat in at_work)

    def _deaf(self, listener: _Listener) -> Evidence | None:
        deaf = listener.deaf_seconds()
        if deaf * 1_000 < self._timeouts.confirm_after_ms:
            return None
        return Evidence("did not hear us", listener.beat_at - deaf, deaf * 1_000 >= self._timeouts.deaf_after_ms)

    def _excuse(self, now: float) -> None:
        """Take a pause of the detector's own out of every silence."""
        pause = now - self._checked_at if self._checked_at is not None else 0.0
        self._checked_at = now
        if pause <= self._gap:
            return
        for listener in self._listeners.values():
            # A member that beat within the pause is only excused from then on.
            listener.excused += min(pause, now - listener.beat_at)
            if listener.unheard is not None:
                listener.unheard = (listener.unheard[0], min(now, listener.unheard[1] + pause))
            listener.seen_from = now - self._gap
            if listener.stopped_since is not None:
                listener.stopped_since = max(listener.stopped_since, listener.seen_from)
