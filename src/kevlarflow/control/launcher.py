"""Asks the zygote for processes, without ever waiting for it.

The zygote may still be importing, or may just have been started again: then there is no socket to connect to, and
requests wait, each until its deadline. It answers in order, so the oldest unanswered request is the one that an answer
belongs to. When the connection breaks, what was sent and not answered may or may not have happened; it is reported as
failed, and should the process exist after all, it will find its place taken.
"""

from __future__ import annotations

import collections
import contextlib
import socket
from typing import NamedTuple

import msgspec

from kevlarflow.types import Member, Stage
from kevlarflow.wire.messages import Started, StartNode, decode, encode

LARGEST_ANSWER = 4_096
CONNECT_PAUSE_SECONDS = 0.05
MAX_REQUESTS = 10_000


class Outcome(NamedTuple):
    """What became of a request: a process id, or a reason."""

    member: Member
    pid: int | None
    reason: str = ""


class _Request(NamedTuple):
    member: Member
    stage: Stage
    deadline: float


class LauncherClient:
    """`request` takes orders; `pump` carries them on and returns what is known by then."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._connect_at = 0.0
        self._waiting: collections.deque[_Request] = collections.deque()
        self._sent: collections.deque[_Request] = collections.deque()
        self._refused: list[Outcome] = []

    def request(self, member: Member, stage: Stage, deadline: float) -> None:
        """Have `member` started; given up at `deadline`, in monotonic seconds."""
        if len(self._waiting) >= MAX_REQUESTS:
            self._refused.append(Outcome(member, None, "too many processes are waiting to be started"))
            return
        self._waiting.append(_Request(member, stage, deadline))

    @property
    def idle(self) -> bool:
        """Whether nothing is asked for."""
        return not self._waiting and not self._sent

    def pump(self, now: float) -> list[Outcome]:
        """Connect, send and receive as far as possible without waiting."""
        if self.idle and not self._refused:
            return []
        outcomes, self._refused = self._refused, []
        if self._socket is None and now >= self._connect_at:
            self._connect_at = now + CONNECT_PAUSE_SECONDS
            self._connect()
        if self._socket is not None:
            self._send()
            outcomes += self._receive()
        outcomes += self._expire(now)
        return outcomes

    def close(self) -> None:
        """Let go of the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
        else:
            self._socket = connection

    def _send(self) -> None:
        while self._waiting and self._socket is not None:
            request = self._waiting[0]
            try:
                self._socket.send(encode(StartNode(request.member.node, request.member.incarnation, request.stage)))
            except BlockingIOError:
                return
            except OSError:
                # What the zygote has answered before it left can still be read.
                return
            self._sent.append(self._waiting.popleft())

    def _receive(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while self._socket is not None:
            try:
                frame = self._socket.recv(LARGEST_ANSWER)
            except BlockingIOError:
                return outcomes
            except ConnectionResetError:
                # It is reported once, before what was answered earlier.
                continue
            except OSError:
                frame = b""
            answer = None
            with contextlib.suppress(msgspec.DecodeError):
                answer = decode(frame) if frame else None
            if isinstance(answer, Started) and self._sent:
                outcomes.append(Outcome(self._sent.popleft().member, answer.pid))
            else:
                self.close()
                outcomes += [Outcome(each.member, None, "the launcher has gone") for each in self._sent]
                self._sent.clear()
        return outcomes

    def _expire(self, now: float) -> list[Outcome]:
        expired = [each for each in self._waiting if now >= each.deadline]
        if not expired:
            return []
        self._waiting = collections.deque(each for each in self._waiting if now < each.deadline)
        return [Outcome(each.member, None, f"no launcher listens at {self._path}") for each in expired]
