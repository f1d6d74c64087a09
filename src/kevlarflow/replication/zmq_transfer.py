"""Copies over ZeroMQ: messages of a few copies each, over Unix sockets in the run folder.

ZeroMQ's own threads move the bytes without Python's lock, and everything sleeps while there is nothing to do. The
high-water marks bound what waits on either side, and a message much longer than it may be cuts its sender off.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import zmq

from kevlarflow.replication.transfer import CHANNEL_PLACES, Arrival

LONGEST_HEADER = 4_096
"""Bytes that a message may have beyond two blocks' worth."""


class ZmqTransfer:
    """`Transfer` over ZeroMQ, at an ``ipc://`` address in a folder that is open to nobody else.

    `block_bytes` is the length of a copy, and `peers` how many nodes may send at a time.
    """

    def __init__(self, address: str, block_bytes: int, peers: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
        self._inbox = self._context.socket(zmq.ROUTER)
        self._inbox.setsockopt(zmq.LINGER, 0)
        self._inbox.setsockopt(zmq.RCVHWM, CHANNEL_PLACES * peers)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, 2 * block_bytes + LONGEST_HEADER)
        self._inbox.bind(address)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)

    def connect(self, address: str) -> ZmqOutlet:
        """See `Transfer.connect`."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, CHANNEL_PLACES)
        socket.connect(address)
        return ZmqOutlet(socket, self._poller)

    def receive(self) -> Arrival | None:
        """See `Transfer.receive`."""
        try:
            frames = self._inbox.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        peer = frames[0].bytes
        if len(frames) != 3:
            return Arrival(peer, b"", memoryview(b""))
        return Arrival(peer, frames[1].bytes, frames[2].buffer)

    def answer(self, peer: bytes, frame: bytes) -> None:
        """See `Transfer.answer`."""
        with contextlib.suppress(zmq.ZMQError):
            self._inbox.send_multipart((peer, frame), zmq.NOBLOCK)

    def wait(self, seconds: float) -> None:
        """See `Transfer.wait`."""
        self._poller.poll(max(0, round(seconds * 1_000)))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def ring(self) -> None:
        """See `Transfer.ring`."""
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """See `Transfer.close`."""
        self._inbox.close(linger=0)
        os.close(self._bell)


class ZmqOutlet:
    """An `Outlet` over a DEALER socket."""

    def __init__(self, socket: zmq.Socket[bytes], poller: zmq.Poller) -> None:
        self._socket = socket
        self._poller = poller
        poller.register(socket, zmq.POLLIN)

    def send(self, header: bytes, data: memoryview) -> bool:
        """See `Outlet.send`."""
        try:
            self._socket.send_multipart((header, data), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> bytes | None:
        """See `Outlet.receive`."""
        try:
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """See `Outlet.close`."""
        self._poller.unregister(self._socket)
        self._socket.close(linger=0)
