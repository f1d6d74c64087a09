"""Those who watch the cluster from outside: the supervisor, the API server, `kevlarflow status`.

A subscriber gets the current availability at once, and afterwards whatever changes. A frame that cannot be delivered
ends the subscription; whoever still lives subscribes again.
"""

from __future__ import annotations

import msgspec

from kevlarflow.recovery.cluster import Cluster
from kevlarflow.wire.channel import Hub
from kevlarflow.wire.messages import AnyMessage, Availability, Fatal, Narration, Subscribe, encode

MAX_SUBSCRIBERS = 64


class Observers:
    """The subscribers, and what they were told last."""

    def __init__(self, hub: Hub, cluster: Cluster) -> None:
        self._hub = hub
        self._cluster = cluster
        self._subscribers: dict[bytes, bool] = {}
        self._told: Availability | None = None
        self._pending: set[bytes] = set()

    def subscribe(self, peer: bytes, wish: Subscribe, now: float) -> None:
        """Add a subscriber, or renew it; the oldest makes room when there are too many."""
        self._subscribers.pop(peer, None)
        while len(self._subscribers) >= MAX_SUBSCRIBERS:
            self._subscribers.pop(next(iter(self._subscribers)))
        self._subscribers[peer] = wish.narration
        if self._cluster.settling(now):
            # A restarted controller has not heard of everybody yet: its no would be a false alarm.
            self._pending.add(peer)
        else:
            self._send(peer, self.availability(now))
        if self._cluster.aborted is not None:
            self._send(peer, Fatal(self._cluster.aborted))

    def availability(self, now: float) -> Availability:
        """Whether at least one pipeline can generate, and if not, why and for how long."""
        cluster = self._cluster
        return Availability(
            serving=cluster.serving,
            started=cluster.served,
            reason=cluster.why_not_serving(),
            retry_after_seconds=0 if cluster.serving else cluster.retry_after_seconds(now),
        )

    def publish_availability(self, now: float) -> None:
        """Tell everybody when it has changed; how long it may last is no news by itself."""
        if self._cluster.settling(now):
            return
        availability = self.availability(now)
        if self._told is None or not _same(availability, self._told):
            self._told = availability
            self._pending.clear()
            self._tell_all(availability)
        self.answer_pending(now)

    def answer_pending(self, now: float) -> None:
        """Answer those who asked when nothing was known yet."""
        if not self._pending or self._cluster.settling(now):
            return
        availability = self.availability(now)
        for peer in self._pending & self._subscribers.keys():
            self._send(peer, availability)
        self._pending.clear()

    def narrate(self, time: float, text: str) -> None:
        """Send a line to those who asked for them. `time` is Unix seconds."""
        for peer, wants_narration in list(self._subscribers.items()):
            if wants_narration:
                self._send(peer, Narration(time, text))

    def abort(self, reason: str) -> None:
        """Tell everybody that the cluster cannot start."""
        self._tell_all(Fatal(reason))

    def _tell_all(self, message: AnyMessage) -> None:
        for peer in list(self._subscribers):
            self._send(peer, message)

    def _send(self, peer: bytes, message: AnyMessage) -> None:
        if not self._hub.send(peer, encode(message)):
            self._subscribers.pop(peer, None)


def _same(one: Availability, other: Availability) -> bool:
    return msgspec.structs.replace(one, retry_after_seconds=0) == msgspec.structs.replace(other, retry_after_seconds=0)
