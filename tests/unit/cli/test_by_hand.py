from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kevlarflow.cli.by_hand import Foreground
from kevlarflow.types import Member, NodeId
from kevlarflow.wire.channel import ZmqHub
from kevlarflow.wire.messages import Answered, AskStatus, DrainNode, Status, decode, encode

ME = Member(NodeId("node-0-1"), 2)
PATIENCE_SECONDS = 30.0


class Controller:
    """Says that the node is in a state, and answers a request to drain it."""

    def __init__(self, folder: Path) -> None:
        self.state = "starting"
        self.refusal = ""
        self.drained: list[str] = []
        self._closing = threading.Event()
        self._hub = ZmqHub(f"ipc://{folder / 'controller.sock'}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing.wait(0.01):
            while received := self._hub.receive():
                peer, frame = received
                match decode(frame):
                    case AskStatus():
                        nodes = [{"id": ME.node, "incarnation": ME.incarnation, "state": self.state}]
                        self._hub.send(peer, encode(Status(json.dumps({"nodes": nodes}).encode())))
                    case DrainNode(node=node):
                        self.drained.append(node)
                        self._hub.send(peer, encode(Answered(self.refusal)))
        self._hub.close()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


class Terminal:
    """A node in the foreground, what its node's person hears, and a process that stands for its cluster."""

    def __init__(self, folder: Path) -> None:
        self.said: queue.Queue[str] = queue.Queue()
        self.left: queue.Queue[int] = queue.Queue()
        bell, self.signals = socket.socketpair()
        self.cluster = subprocess.Popen(["sleep", "600"])
        pidfd = os.pidfd_open(self.cluster.pid)
        Foreground(folder, ME, bell, pidfd, self.said.put, self.left.put).start()

    def hears(self) -> str:
        return self.said.get(timeout=PATIENCE_SECONDS)

    def close(self) -> None:
        self.cluster.kill()
        self.cluster.wait()


@pytest.fixture
def terminal(tmp_path: Path, controller: Controller) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = Controller(tmp_path)
    yield controller
    controller.close()


def test_a_node_that_is_ready_says_so_and_ctrl_c_drains_it(controller: Controller, terminal: Terminal) -> None:
    controller.state = "ready"
    assert "is ready after" in terminal.hears()
    terminal.signals.send(b"\2")
    assert terminal.hears() == "node-0-1 gives its work away, then it leaves; a second Ctrl-C ends it at once"
    assert controller.drained == ["node-0-1"]
    assert terminal.left.empty()
    terminal.signals.send(b"\2")
    assert "ends at once" in terminal.hears()
    assert terminal.left.get(timeout=PATIENCE_SECONDS) == 130


def test_a_node_that_cannot_be_drained_stays_and_says_why(controller: Controller, terminal: Terminal) -> None:
    controller.state, controller.refusal = "ready", "node-0-1 cannot be drained: it is alone"
    terminal.hears()
    terminal.signals.send(b"\2")
    assert terminal.hears() == "node-0-1 cannot be drained: it is alone; it stays, and a second Ctrl-C ends it at once"
    assert terminal.left.empty()


@pytest.mark.parametrize("state", ["ready", "starting"])
def test_a_node_ends_with_its_cluster_even_without_a_guardian(
    state: str, controller: Controller, terminal: Terminal
) -> None:
    controller.state = state
    if state == "ready":
        assert "is ready after" in terminal.hears()
    terminal.cluster.kill()
    assert terminal.hears() == "the cluster has ended, and node-0-1 with it"
    assert terminal.left.get(timeout=PATIENCE_SECONDS) == 1


def test_a_node_that_is_not_ready_ends_at_once(controller: Controller, terminal: Terminal) -> None:
    terminal.signals.send(b"\2")
    assert terminal.hears() == "node-0-1 was not ready yet: it ends at once"
    assert terminal.left.get(timeout=PATIENCE_SECONDS) == 130
    assert controller.drained == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_heard_while_the_main_thread_is_busy_and_end_nothing(number: signal.Signals) -> None:
    script = (
        "import os, select, threading; from kevlarflow.cli import by_hand\n"
        "bell = by_hand._bell()\n"
        "heard = lambda: (select.select([bell], [], []), os.write(1, b'heard'), os._exit(0))\n"
        "threading.Thread(target=heard).start()\n"
        "os.write(1, b'go')\n"
        "threading.Event().wait()\n"
    )

    def hear_it() -> None:
        # Whoever runs the tests in the background may have it ignored.
        signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=hear_it) as process:  # noqa: PLW1509
        assert process.stdout is not None
        assert process.stdout.read(2) == b"go"
        process.send_signal(number)
        assert process.stdout.read() == b"heard"
    assert process.returncode == 0
