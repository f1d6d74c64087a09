"""Channels: one hub, many peers, whole frames, no waiting.

The controller is a hub; nodes, engines and observers are its peers. A hub sees from whom a frame comes and
answers by that name; a frame to a peer that is gone, or that does not read, is dropped and the sender is told.
Nothing here knows what is in a frame.

The transport is ZeroMQ over Unix sockets in the run folder, which only the user of the cluster can enter. Its twin
in memory serves tests: the same promises, without a socket.
"""

from __future__ import annotations

import collections
import itertools
import os
from pathlib import Path
from typing import Protocol

import zmq

from kevlarflow.errors import UsageError

MAX_WAITING_FRAMES = 10_000
"""High-water mark of each queue, in frames."""
MAX_FRAME_BYTES = 4 << 20
"""A peer that sends more than this is cut off."""


class Hub(Protocol):
    """The end that many peers talk to."""

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, frame), or None when nothing waits."""

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Queue a frame for a peer; False when it is gone or does not read."""

    def close(self, linger_ms: int = 0) -> None:
        """Leave; what is queued gets `linger_ms` to be sent."""


class ZmqHub:
    """A ROUTER socket. `address` is ``ipc://`` and a path in a folder that is open to nobody else."""

    def __init__(self, address: str) -> None:
        path = Path(address.removeprefix("ipc://"))
        require_private(path.parent)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        limit(self.socket)
        # Without this, a frame to a peer that has gone vanishes without a word.
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        path.unlink(missing_ok=True)
        self.socket.bind(address)

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, frame), or None. Messages of more than one frame are malformed: their frame is empty."""
        try:
            peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return (peer, frames[0]) if len(frames) == 1 else (peer, b"")

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Queue a frame for a peer; False when it is gone or does not read."""
        try:
            self.socket.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Leave; what is queued gets `linger_ms` to be sent."""
        self.socket.close(linger=linger_ms)
        self._context.term()


class MemoryHub:
    """The twin of `ZmqHub` for tests; `connect` makes its peers."""

    def __init__(self) -> None:
        self._arrived: collections.deque[tuple[bytes, bytes]] = collections.deque()
        self._peers: dict[bytes, MemoryPeer] = {}
        self._names = itertools.count(1)

    def connect(self) -> MemoryPeer:
        """A new peer."""
        peer = MemoryPeer(b"peer %d" % next(self._names), self._arrived)
        self._peers[peer.name] = peer
        return peer

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, frame), or None when nothing waits."""
        return self._arrived.popleft() if self._arrived else None

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Queue a frame for a peer; False when it is gone or does not read."""
        receiver = self._peers.get(peer)
        if receiver is None or receiver.closed or len(receiver.arrived) >= MAX_WAITING_FRAMES:
            return False
        receiver.arrived.append(frame)
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Leave."""
        self._peers.clear()


class MemoryPeer:
    """A peer of a `MemoryHub`."""

    def __init__(self, name: bytes, hub: collections.deque[tuple[bytes, bytes]]) -> None:
        self.name = name
        self.arrived: collections.deque[bytes] = collections.deque()
        self.closed = False
        self._hub = hub

    def send(self, frame: bytes) -> bool:
        """Queue a frame for the hub; False when it does not read."""
        if len(self._hub) >= MAX_WAITING_FRAMES:
            return False
        self._hub.append((self.name, frame))
        return True

    def receive(self) -> bytes | None:
        """The next frame, or None when nothing waits."""
        return self.arrived.popleft() if self.arrived else None

    def close(self) -> None:
        """Leave: the hub's frames no longer arrive."""
        self.closed = True


def limit(socket: zmq.Socket[bytes]) -> None:
    """Bound a socket's queues and frames, and let it close at once."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MAX_WAITING_FRAMES)
    socket.setsockopt(zmq.RCVHWM, MAX_WAITING_FRAMES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)


def require_private(folder: Path) -> None:
    """Raise `UsageError` when others could enter the folder that keeps them from our sockets."""
    status = os.stat(folder)
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(f"{folder} is open to others: run chmod 700 {folder}, or set XDG_RUNTIME_DIR")
