import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kevlarflow.bench.evaluation.restarting import Restarting
from kevlarflow.bench.systems import ServerProcess, SystemFailed, free_port

SERVER = Path(__file__).parents[3] / "faulty_server.py"


@pytest.fixture
def restarting(tmp_path):
    def command(port):
        return [sys.executable, str(SERVER), str(port), "well"]

    found = Restarting(ServerProcess("a server", "m", command, {}, tmp_path / "log", free_port()))
    yield found
    found.stop()


def until(ask, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not ask():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_is_killed_is_started_again_at_its_place(restarting):
    restarting.start()
    restarting.server.wait_ready()
    before = restarting.server.processes()
    os.kill(before[0].pid, signal.SIGKILL)
    until(lambda: restarting.lives and restarting.lives[0].ready_at)
    assert restarting.server.processes()[0] not in before
    assert restarting.lives[0].ended_at < restarting.lives[0].ready_at


def test_a_server_that_is_stopped_stays_away(restarting):
    restarting.start()
    restarting.server.wait_ready()
    restarting.stop()
    time.sleep(0.5)  # Five looks of the supervisor.
    assert restarting.server.processes() == []
    assert restarting.lives == []


def test_a_server_that_cannot_start_says_why(tmp_path, restarting):
    restarting.start()
    restarting.server.wait_ready()
    port = restarting.server.address.port
    second = Restarting(ServerProcess("another", "m", lambda _: [sys.executable], {}, tmp_path / "log", port))
    with pytest.raises(SystemFailed, match=f"another cannot start: port {port} is in use"):
        second.start()
