"""``kevlarflow demo`` as a user runs it: its last line, its exit status, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.cluster import KEVLARFLOW
from integration.waiting import until
from kevlarflow.faults.processes import command_line, with_environment

MARK = "KEVLARFLOW_TEST_RUN"
LAST_LINE = re.compile(r"RECOVERED in (\d+) ms, 4 of 4 streams complete, text identical: yes")
DEMO_TIMEOUT_SECONDS = 240.0
LEAVE_TIMEOUT_SECONDS = 60.0


@contextmanager
def demo(folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The demo, running; afterwards no process that it has started may be left."""
    mark = uuid.uuid4().hex
    # It is to hear Ctrl-C, even if these tests run in the background, where that is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [KEVLARFLOW, "demo"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            env={**os.environ, MARK: mark, "TMPDIR": str(folder), **environment},
            start_new_session=True,
        )
    signal.signal(signal.SIGINT, previous)
    try:
        yield process
        left = [command_line(pid) for pid in with_environment(MARK, mark)]
        assert not left, f"left running: {left}"
    finally:
        for pid in with_environment(MARK, mark):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Sockets live in here: their paths must be short.
    return tmp_path_factory.mktemp("d")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_recovers(folder: Path):
    with demo(folder) as process:
        status = process.wait(DEMO_TIMEOUT_SECONDS)
        shown = (folder / "out").read_text()
        assert status == 0, shown + (folder / "err").read_text()
    lines = shown.rstrip("\n").split("\n")
    assert LAST_LINE.fullmatch(lines[-1]), shown
    assert shown.count("RECOVERED") == 1
    assert "kill -9" in shown
    assert (folder / "err").read_text() == ""
    assert not list(folder.glob("kevlarflow-demo-*")), "its folder is left"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "moment"), [(signal.SIGINT, "starting nodes"), (signal.SIGTERM, "is streaming")])
def test_a_demo_that_is_interrupted_takes_everything_along(folder: Path, number: signal.Signals, moment: str):
    with demo(folder) as process:
        until("the moment", lambda: _has_come(folder, moment, process), DEMO_TIMEOUT_SECONDS)
        process.send_signal(number)
        assert process.wait(LEAVE_TIMEOUT_SECONDS) == 130
    assert "RECOVERED" not in (folder / "out").read_text()
    assert "Traceback" not in (folder / "err").read_text()


def _has_come(folder: Path, moment: str, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, (folder / "out").read_text() + (folder / "err").read_text()
    if moment == "is streaming":
        return "without a failure" in (folder / "out").read_text()
    return any(moment in log.read_text() for log in folder.glob("kevlarflow-demo-*/kevlarflow.log"))


@pytest.mark.slow
def test_a_cluster_that_cannot_start_is_one_line(folder: Path):
    base = folder / ("x" * 120)
    base.mkdir()
    with demo(folder, XDG_RUNTIME_DIR=str(base)) as process:
        assert process.wait(LEAVE_TIMEOUT_SECONDS) == 1
    complaint = (folder / "err").read_text().rstrip("\n")
    assert complaint.count("\n") == 0
    assert complaint.startswith("kevlarflow: KevlarFlow ended with exit status 2: ")
    assert "too long for Unix sockets" in complaint
