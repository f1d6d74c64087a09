"""A node's last words, from a process that exits as soon as they are said."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from kevlarflow import config as configuration
from kevlarflow.config import ServeConfig
from kevlarflow.types import Member, NodeId
from kevlarflow.wire.messages import NodeFailed, decode
from toy_world import make_config

DEADLINE_SECONDS = 60.0
FAILING = """
import os, sys
from kevlarflow import config as configuration
from kevlarflow.node import heartbeat
from kevlarflow.node.pace import PaceMeter
from kevlarflow.node.progress import Progress
from kevlarflow.types import Member, NodeId, Stage
from kevlarflow.wire.messages import NodeStarting

heartbeat.LINGER_MS = int(sys.argv[2])
starting = NodeStarting(Member(NodeId("node-0-0"), 3), Stage(0), "here", (os.getpid(),))
thread = heartbeat.HeartbeatThread(configuration.load(sys.argv[1]), starting, Progress(60.0), PaceMeter(), dict)
thread.start()
print("fails", flush=True)
thread.say_failed("no such weights")
os._exit(1)
"""


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    made = msgspec.structs.replace(make_config(), run_folder=str(tmp_path))
    configuration.save(made)
    return made


@contextmanager
def failing(config: ServeConfig, linger_ms: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is just saying so."""
    command = [sys.executable, "-c", FAILING, config.run_folder, str(linger_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "fails\n"
            yield process
        finally:
            process.kill()


def test_why_a_node_failed_is_heard_by_a_controller_that_comes_a_moment_later(config: ServeConfig) -> None:
    with failing(config, linger_ms=30_000) as process, zmq.Context() as context:
        time.sleep(0.1)  # Long enough for the process to have exited, had it not waited.
        controller = context.socket(zmq.ROUTER)
        controller.setsockopt(zmq.LINGER, 0)
        controller.bind(config.controller_address)
        assert process.wait(DEADLINE_SECONDS) == 1
        heard = []
        # What has been sent is here, or in the memory of the kernel; nobody is left to send more.
        while controller.poll(1_000):
            heard.append(decode(controller.recv_multipart()[1]))
        controller.close()
    assert NodeFailed(Member(NodeId("node-0-0"), 3), "no such weights") in heard


def test_a_node_that_failed_exits_though_no_controller_comes(config: ServeConfig) -> None:
    with failing(config, linger_ms=100) as process:
        assert process.wait(DEADLINE_SECONDS) == 1
