"""Channels from an engine to the nodes of its pipeline: one DEALER socket a node, opened and closed as nodes change."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import zmq

from kevlarflow.types import Member, NodeInfo
from kevlarflow.wire import steps

log = logging.getLogger("kevlarflow.engine")

FAREWELL_MS = 60_000
"""How long a message to a node that is not used any more may wait for it to listen. One that gets no CPU is not
declared dead, and a lane that it went on having would keep its blocks from others."""
MAX_FAREWELLS = 32
"""Nodes that may have yet to answer that they have left."""
MAX_WAITING_MESSAGES = 10_000
"""High-water mark of each socket, in messages."""


class _Farewell(NamedTuple):
    socket: zmq.Socket[bytes]
    opened_at: float


class NodeLinks:
    """Not thread-safe: the session's door guards it."""

    def __init__(self, bell: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._farewells: dict[Member, _Farewell] = {}
        """Channels to nodes that are not used any more, until they have answered that they have left. Those that have
        died never do: their channels go when the next one is opened and they have had their time."""
        self._bell = bell
        self._poller = zmq.Poller()

    def use(self, nodes: Sequence[NodeInfo]) -> None:
        """Talk to these nodes; channels to others are closed."""
        wanted = {node.step_address for node in nodes}
        for address in self._sockets.keys() - wanted:
            self._sockets.pop(address).close(linger=0)
        for node in nodes:
            self._part(node.member, linger_ms=0)
        self._poll_all()
        for address in wanted:
            self._ensure(address)

    def _ensure(self, address: str) -> zmq.Socket[bytes]:
        """The channel to an address, opened and listened to if need be."""
        if address not in self._sockets:
            self._sockets[address] = self._open(address)
            self._poller.register(self._sockets[address], zmq.POLLIN)
        return self._sockets[address]

    def _poll_all(self) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._bell, zmq.POLLIN)
        for sock in self._open_sockets():
            self._poller.register(sock, zmq.POLLIN)

    def _open_sockets(self) -> list[zmq.Socket[bytes]]:
        return [*self._sockets.values(), *(each.socket for each in self._farewells.values())]

    def _open(self, address: str) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.SNDHWM, MAX_WAITING_MESSAGES)
        sock.setsockopt(zmq.RCVHWM, MAX_WAITING_MESSAGES)
        sock.connect(address)
        return sock

    def close(self) -> None:
        """Close all channels."""
        for sock in self._sockets.values():
            sock.close(linger=0)
        self._sockets.clear()
        for member in list(self._farewells):
            self._part(member, FAREWELL_MS)

    def send(self, node: NodeInfo, header: steps.AnyStepMessage, *payload: bytes) -> None:
        """Send to a node of the pipeline, without waiting."""
        self._send(self._sockets[node.step_address], header, payload)

    def send_ahead(self, node: NodeInfo, header: steps.AnyStepMessage, *payload: bytes) -> None:
        """Send to a node that may become part of the pipeline; its channel stays open until the nodes change."""
        self._send(self._ensure(node.step_address), header, payload)

    def send_farewell(self, node: NodeInfo, header: steps.AnyStepMessage) -> None:
        """Send to a node that is not part of the pipeline any more; until `part` its answer may come."""
        if node.member not in self._farewells:
            self._give_up_farewells()
            sock = self._open(node.step_address)
            sock.setsockopt(zmq.LINGER, FAREWELL_MS)
            self._farewells[node.member] = _Farewell(sock, time.monotonic())
            self._poll_all()
        self._send(self._farewells[node.member].socket, header, ())

    def _give_up_farewells(self) -> None:
        if len(self._farewells) >= MAX_FAREWELLS:
            self._part(next(iter(self._farewells)), FAREWELL_MS)
        latest = time.monotonic() - FAREWELL_MS / 1_000
        for member in [member for member, each in self._farewells.items() if each.opened_at < latest]:
            self._part(member, linger_ms=0)

    def part(self, member: Member) -> None:
        """A node that is not part of the pipeline any more has answered."""
        self._part(member, linger_ms=0)
        self._poll_all()

    def _part(self, member: Member, linger_ms: int) -> None:
        farewell = self._farewells.pop(member, None)
        if farewell is not None:
            farewell.socket.close(linger=linger_ms)

    def _send(self, sock: zmq.Socket[bytes], header: steps.AnyStepMessage, payload: Sequence[bytes]) -> None:
        try:
            sock.send_multipart([steps.encode(header), *payload], zmq.NOBLOCK)
        except zmq.Again:
            log.warning("a message was dropped: %d wait for a node already", MAX_WAITING_MESSAGES)

    def receive(self, timeout_ms: int) -> list[tuple[steps.AnyStepMessage, list[bytes]]]:
        """What has arrived, after waiting at most `timeout_ms` for something (the bell included).

        All of it is read before any of it is handled, which may change the channels.
        """
        received: list[tuple[steps.AnyStepMessage, list[bytes]]] = []
        ready = dict(self._poller.poll(timeout_ms))
        for sock in [sock for sock in self._open_sockets() if sock in ready]:
            while True:
                try:
                    frame, *payload = sock.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                try:
                    header = steps.decode(frame)
                except msgspec.MsgspecError:
                    log.warning("a message of a node makes no sense and was dropped")
                    continue
                received.append((header, payload))
        return received
