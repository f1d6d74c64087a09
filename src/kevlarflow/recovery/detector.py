"""Silence: when a node that ought to beat has not been heard of for too long.

This is one of two kinds of evidence. A process that crashes is seen to die by those who watch processes; a
process that is stopped, deadlocked or cut off is only ever seen not to speak. Silence has two thresholds: after
`suspect_after_ms` a node is passed over when a donor is sought, and nothing else happens; after
`confirm_after_ms` it is fenced and its lanes move. One beat in between and it is as if nothing had been.

The detector may itself be starved or stopped. A gap between two checks that is longer than a few beats says nothing
about the nodes, whose beats may be waiting unread; such a gap is not counted as silence.
"""

from __future__ import annotations

from typing import NamedTuple

from kevlarflow.config import Timeouts
from kevlarflow.recovery.events import NodeCleared, NodeSilent, NodeSuspected
from kevlarflow.types import Member

Verdict = NodeSuspected | NodeSilent


class _Listener:
    """What is known of one member."""

    def __init__(self, now: float) -> None:
        self.beat_at = now
        self.excused = 0.0
        self.suspect = False
        self.confirmed = False

    def silence(self, now: float) -> float:
        """Seconds without a beat, without the time in which nobody listened."""
        return now - self.beat_at - self.excused


class Thresholds(NamedTuple):
    """The timeouts that matter here, in seconds."""

    suspect: float
    confirm: float
    gap: float


class Detector:
    """Turns beats, and their absence, into events for the cluster."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._thresholds = Thresholds(
            suspect=timeouts.suspect_after_ms / 1_000,
            confirm=timeouts.confirm_after_ms / 1_000,
            gap=2 * timeouts.heartbeat_interval_ms / 1_000,
        )
        self._listeners: dict[Member, _Listener] = {}
        self._checked_at: float | None = None

    def watch(self, member: Member, now: float) -> None:
        """Expect beats of `member` from now on."""
        self._listeners.setdefault(member, _Listener(now))

    def forget(self, member: Member) -> None:
        """Expect nothing more of `member`."""
        self._listeners.pop(member, None)

    def beat(self, member: Member, now: float) -> list[NodeCleared]:
        """Proof of life. A member that was confirmed silent stays so: it has been declared dead."""
        listener = self._listeners.get(member)
        if listener is None or listener.confirmed:
            return []
        listener.beat_at = now
        listener.excused = 0.0
        if not listener.suspect:
            return []
        listener.suspect = False
        return [NodeCleared(member)]

    def beat_at(self, member: Member) -> float:
        """When `member` last beat; 0.0 when it is not watched."""
        listener = self._listeners.get(member)
        return listener.beat_at if listener else 0.0

    def check(self, now: float) -> list[Verdict]:
        """What the silence since the last check amounts to. To be called after all beats that wait were read."""
        self._excuse(now)
        verdicts: list[Verdict] = []
        for member, listener in self._listeners.items():
            silence = listener.silence(now)
            if silence >= self._thresholds.suspect and not listener.suspect:
                listener.suspect = True
                verdicts.append(NodeSuspected(member, listener.beat_at))
            if silence >= self._thresholds.confirm and not listener.confirmed:
                listener.confirmed = True
                verdicts.append(NodeSilent(member, listener.beat_at))
        return verdicts

    def _excuse(self, now: float) -> None:
        """Take a pause of the detector's own out of every silence."""
        pause = now - self._checked_at if self._checked_at is not None else 0.0
        self._checked_at = now
        if pause <= self._thresholds.gap:
            return
        for listener in self._listeners.values():
            # A member that beat within the pause is only excused from then on.
            listener.excused += min(pause, now - listener.beat_at)
