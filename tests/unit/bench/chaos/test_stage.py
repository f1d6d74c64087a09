"""Where a scenario is performed, without a cluster."""

from __future__ import annotations

import io
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kevlarflow.bench.chaos import scenario as scenarios
from kevlarflow.bench.chaos import stage
from kevlarflow.bench.chaos.judge import Observed
from kevlarflow.bench.chaos.show import Screen
from kevlarflow.bench.streams import Address
from kevlarflow.control import guardian
from kevlarflow.errors import UsageError
from kevlarflow.faults.processes import identify

RUNNING = {"pipelines": [{"nodes": ["node-0-0"]}]}


class Server:
    """One that takes long to start: what a terminal shows meanwhile is kept."""

    address = Address("127.0.0.1", 1)

    def __init__(self, terminal: io.StringIO) -> None:
        self._terminal = terminal
        self.shown_before_ready = ""

    def start(self) -> None:
        pass

    def wait_ready(self) -> float:
        self.shown_before_ready = self._terminal.getvalue()
        return 1.0

    def processes(self) -> list[Any]:
        return []

    stop = processes


MAP = """
import mmap, sys, time
file = open(sys.argv[1], "r+b")
kept = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
time.sleep(600)
"""


def test_shared_memory_of_killed_processes_is_left_behind_and_that_of_others_is_not() -> None:
    path = Path(guardian.SHARED_MEMORY) / f"kevlarflow-test-{uuid.uuid4().hex}"
    before = stage.shared_memory()
    path.write_bytes(b"0" * 4096)
    try:
        assert str(path) not in stage.shared_memory_since(stage.shared_memory(), [])
        with subprocess.Popen([sys.executable, "-c", MAP, path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            identity = identify(process.pid)
            assert identity is not None
            assert str(path) not in stage.shared_memory_since(before, [])
            assert str(path) in stage.shared_memory_since(before, [identity])
            process.kill()
        assert str(path) in stage.shared_memory_since(before, [])
        assert str(path) in stage.stop_clean(Server(io.StringIO()), before)  # type: ignore[arg-type]
    finally:
        path.unlink()


def test_a_terminal_shows_that_the_cluster_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    server = Server(terminal)
    monkeypatch.setattr(stage, "make", lambda *_: server)
    monkeypatch.setattr(stage, "_on_cluster", lambda *_: Observed())
    screen = Screen(Console(file=terminal, force_terminal=True), "crash: about it")
    assert stage.on_own_cluster(scenarios.load("crash"), tmp_path, screen).left_behind == []
    assert "crash: about it" in server.shown_before_ready


def test_a_running_cluster_has_to_have_what_a_fault_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ask_status", lambda *_, **__: RUNNING)
    monkeypatch.setattr(stage, "_on_cluster", lambda *_: Observed())
    output = io.StringIO()
    screen = Screen(Console(file=output), "crash: about it")
    with pytest.raises(
        UsageError, match=r"crash: faults\[0\].target: there is no pipeline 0, stage 1 in 1 pipelines of 1"
    ):
        stage.on_running_cluster(scenarios.load("crash"), "crash", 8000, screen)
    stage.on_running_cluster(scenarios.load("controller"), "controller", 8000, screen)
    assert "`cluster` and `left_behind` is not looked at" in output.getvalue()
