"""A node that was started by hand, in the foreground of somebody's terminal: what it says there, and what Ctrl-C does.

The node itself (`kevlarflow.node.alone`) writes to its log, and hears from its engines and the controller only. Beside
it runs a thread that asks the controller how the node is, says when it is ready, and turns a first Ctrl-C, SIGTERM or
SIGHUP into `kevlarflow drain`: the controller then has the node leave, with status 0. Before it is ready, or for the
second time, a signal ends it at once, which to the cluster is a death like any other. It ends with its cluster, even if
that was killed together with the guardian that would have ended it.

Run it with ``python -m kevlarflow.cli.by_hand NODE INCARNATION STAGE``, with the environment of the cluster.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kevlarflow import config as configuration
from kevlarflow.control.process import last_words
from kevlarflow.control.run_folder import owner_of
from kevlarflow.control.status import ask, ask_status
from kevlarflow.errors import INTERRUPTED, ClusterUnreachable
from kevlarflow.types import Member, NodeId, NodeState
from kevlarflow.wire.messages import Answered, DrainNode

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLUSTER_ENDED = 1
END_AT_ONCE = "a second Ctrl-C ends it at once"


class _ClusterEnded(Exception):
    pass


class Foreground(threading.Thread):
    """See the module's text.

    `bell` is readable when a signal has come, and `cluster`, a descriptor, when the cluster's main process has ended;
    `leave` ends the process.
    """

    def __init__(
        self,
        folder: Path,
        member: Member,
        bell: socket.socket,
        cluster: int,
        say: Callable[[str], None],
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        super().__init__(name="foreground", daemon=True)
        self._folder = folder
        self._member = member
        self._bell = bell
        self._cluster = cluster
        self._say = say
        self._leave = leave
        self._begun_at = time.monotonic()

    def run(self) -> None:
        """Wait until the node is ready, then until somebody wants it to leave; the second time it is ended."""
        try:
            self._attend()
        except _ClusterEnded:
            self._say(f"the cluster has ended, and {self._member.node} with it")
            self._leave(CLUSTER_ENDED)

    def _attend(self) -> None:
        while not self._is_ready():
            if self._rings(LOOK_SECONDS):
                self._say(f"{self._member.node} was not ready yet: it ends at once")
                self._leave(INTERRUPTED)
                return
        seconds = time.monotonic() - self._begun_at
        self._say(
            f"{self._member.node} is ready after {seconds:.1f} s; it stays in the foreground. Ctrl-C drains it: it "
            "gives its work away, then it leaves"
        )
        self._rings(None)
        self._drain()
        self._rings(None)
        self._say(f"{self._member.node} ends at once: its requests are taken over as after a crash")
        self._leave(INTERRUPTED)

    def _rings(self, seconds: float | None) -> bool:
        """Whether a signal comes within the time. Raises `_ClusterEnded`."""
        watched: list[socket.socket | int] = [self._bell, self._cluster]
        readable, _, _ = select.select(watched, [], [], seconds)
        if self._cluster in readable:
            raise _ClusterEnded
        return bool(readable) and bool(self._bell.recv(1))

    def _is_ready(self) -> bool:
        try:
            nodes = ask_status(self._folder, ANSWER_SECONDS)["nodes"]
        except ClusterUnreachable:
            return False
        wanted = (self._member.node, self._member.incarnation, NodeState.READY)
        return any((each["id"], each["incarnation"], each["state"]) == wanted for each in nodes)

    def _drain(self) -> None:
        try:
            refusal = ask(self._folder, DrainNode(self._member.node), Answered, ANSWER_SECONDS).refusal
        except ClusterUnreachable as error:
            refusal = str(error)
        if refusal:
            self._say(f"{refusal}; it stays, and {END_AT_ONCE}")
        else:
            self._say(f"{self._member.node} gives its work away, then it leaves; {END_AT_ONCE}")


def main(arguments: list[str]) -> int:
    """Be the node until it is told to leave. Does not return, but for an error while loading."""
    node, incarnation, _ = arguments
    member = Member(NodeId(node), int(incarnation))
    config = configuration.load()
    say = _terminal()
    folder = Path(config.run_folder)
    try:
        cluster = os.pidfd_open(owner_of(folder) or 0)
    except OSError:
        say(f"the cluster has ended before {node} could start")
        return CLUSTER_ENDED
    Foreground(folder, member, _bell(), cluster, say).start()
    from kevlarflow.node import alone

    try:
        return alone.main(arguments)
    except BaseException as error:
        log = Path(config.log_folder, f"{member.node}-{member.incarnation}.log")
        # Who exits has written down why.
        reason = last_words(log) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        say(f"{node} cannot serve: {reason}; its log: {log}")
        raise


def _terminal() -> Callable[[str], None]:
    """Says a line where standard output goes now: later that is the node's log."""
    terminal = os.dup(sys.stdout.fileno())

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # Whoever was there may have left.
            os.write(terminal, f"{line}\n".encode())

    return say


def _bell() -> socket.socket:
    """Readable as soon as a signal has come, whatever the main thread is busy with."""
    bell, hammer = socket.socketpair()
    hammer.setblocking(False)
    signal.set_wakeup_fd(hammer.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # As `nohup` and scripts want it.
            signal.signal(number, lambda *_: None)
    return bell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
