"""How a copy travels: straight from the node that serves a lane to the node that stands by, past every executor.

A `Transfer` is one node's end of it. As a source the node opens an `Outlet` to each of its standbys; as a standby it
receives copies from whoever was told its address, and answers them. Nothing here waits for a peer: what does not fit
into the few places of a channel is not sent, and the sender is told. Headers and answers are small frames that only
the two ends understand; the data is host memory, which is where copies from any device go through.

`kevlarflow.replication.zmq_transfer` is the one that nodes use; the twin in memory serves tests.
"""

from __future__ import annotations

import collections
import threading
from typing import NamedTuple, Protocol

CHANNEL_PLACES = 4
"""Copies on their way in one channel."""


class Arrival(NamedTuple):
    """A copy that has come. `data` is gone when the next one is received."""

    peer: bytes
    header: bytes
    data: memoryview


class Outlet(Protocol):
    """The source's end of a channel to one standby. Used by one thread."""

    def send(self, header: bytes, data: memoryview) -> bool:
        """Send a copy; False when it does not fit. `data` stays as it is until the copy is answered or given up."""

    def receive(self) -> bytes | None:
        """The next answer, or None when nothing waits."""

    def close(self) -> None:
        """Leave; what is on its way may be lost."""


class Transfer(Protocol):
    """One node's end; see the module's text. Used by one thread, but for `ring`."""

    def connect(self, address: str) -> Outlet:
        """A channel to the standby at `address`, whether or not it is there yet."""

    def receive(self) -> Arrival | None:
        """The next copy that has come, or None. What is no copy at all comes with an empty header."""

    def answer(self, peer: bytes, frame: bytes) -> None:
        """Answer a copy; lost when the peer is gone."""

    def wait(self, seconds: float) -> None:
        """Return when a copy or an answer has come, when rung, or after so many seconds."""

    def ring(self) -> None:
        """End the `wait` of the thread that waits. From any thread."""

    def close(self) -> None:
        """Leave for good."""


class MemoryNetwork:
    """What the twins of a test are connected by."""

    def __init__(self) -> None:
        self.ends: dict[str, MemoryTransfer] = {}


class MemoryTransfer:
    """The twin in memory: the same promises, without a socket."""

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self._network = network
        self._address = address
        self._woken = threading.Event()
        self._outlets = 0
        self.arrived: collections.deque[Arrival] = collections.deque()
        self.peers: dict[bytes, MemoryOutlet] = {}
        network.ends[address] = self

    def connect(self, address: str) -> MemoryOutlet:
        """See `Transfer.connect`."""
        self._outlets += 1
        return MemoryOutlet(self._network, address, f"{self._address}/{self._outlets}".encode(), self)

    def receive(self) -> Arrival | None:
        """See `Transfer.receive`."""
        if not self.arrived:
            return None
        arrival = self.arrived.popleft()
        self.peers[arrival.peer].on_way -= 1
        return arrival

    def answer(self, peer: bytes, frame: bytes) -> None:
        """See `Transfer.answer`."""
        outlet = self.peers.get(peer)
        if outlet is not None and not outlet.closed:
            outlet.answers.append(frame)
            outlet.owner.ring()

    def wait(self, seconds: float) -> None:
        """See `Transfer.wait`."""
        self._woken.wait(seconds)
        self._woken.clear()

    def ring(self) -> None:
        """See `Transfer.ring`."""
        self._woken.set()

    def close(self) -> None:
        """See `Transfer.close`."""
        self._network.ends.pop(self._address, None)


class MemoryOutlet:
    """An `Outlet` of the twin."""

    def __init__(self, network: MemoryNetwork, address: str, name: bytes, owner: MemoryTransfer) -> None:
        self._network = network
        self._address = address
        self._name = name
        self.owner = owner
        self.on_way = 0
        self.closed = False
        self.answers: collections.deque[bytes] = collections.deque()

    def send(self, header: bytes, data: memoryview) -> bool:
        """See `Outlet.send`."""
        if self.on_way >= CHANNEL_PLACES:
            return False
        self.on_way += 1
        end = self._network.ends.get(self._address)
        if end is not None:
            end.peers[self._name] = self
            end.arrived.append(Arrival(self._name, header, data))
            end.ring()
        return True

    def receive(self) -> bytes | None:
        """See `Outlet.receive`."""
        return self.answers.popleft() if self.answers else None

    def close(self) -> None:
        """See `Outlet.close`."""
        self.closed = True
