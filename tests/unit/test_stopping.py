"""Standing still, slowing down and cutting off, done to real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kevlarflow.faults import FaultDidNotHappen, KillProcesses, Target, cutting
from kevlarflow.faults.cutting import Cut
from kevlarflow.faults.processes import is_alive, is_stopped
from kevlarflow.faults.stopping import Slowdown, stop, thaw, verify_stopped

SPIN = "print('ready', flush=True)\nwhile True: pass"
CONNECT = """
import socket, sys
def connect():
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    return client
client = connect()
a, b = socket.socketpair()
while client.recv(10):
    client.send(b'x')
a.send(b'pair')
assert b.recv(4) == b'pair'
print('cut', flush=True)
connect().recv(10)
print('cut again', flush=True)
"""
PATIENCE_SECONDS = 20.0


@pytest.fixture
def spinner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def aim(process: subprocess.Popen[str]) -> Target:
    return KillProcesses("it", (process.pid,)).aim({})


def cpu_ticks(process: subprocess.Popen[str]) -> int:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_stopped_process_is_seen_and_can_be_thawed(spinner: subprocess.Popen[str]) -> None:
    target = aim(spinner)
    verify_stopped(stop(target))
    assert is_stopped(target.processes[0])
    assert is_alive(target.processes[0])
    assert thaw(target) == 1
    wait(lambda: not is_stopped(target.processes[0]))


def test_a_process_that_runs_on_voids_the_fault(spinner: subprocess.Popen[str]) -> None:
    struck = stop(aim(spinner))
    verify_stopped(struck)
    thaw(struck.target)
    wait(lambda: not is_stopped(struck.target.processes[0]))
    with pytest.raises(FaultDidNotHappen, match="not seen stopped"):
        verify_stopped(struck, timeout=0.0)


def test_a_corpse_was_not_seen_stopped_and_thaws_without_harm(spinner: subprocess.Popen[str]) -> None:
    struck = stop(aim(spinner))
    spinner.kill()
    spinner.wait()
    with pytest.raises(FaultDidNotHappen, match="not seen stopped"):
        verify_stopped(struck)
    assert thaw(struck.target) == 0


def test_a_slowdown_takes_turns_and_ends(spinner: subprocess.Popen[str]) -> None:
    target = aim(spinner)
    # Turns that are long beside what a busy machine adds to them.
    slowdown = Slowdown(target, share=0.5, period_seconds=0.4)
    verify_stopped(slowdown.start())
    try:
        before = cpu_ticks(spinner)
        wait(lambda: cpu_ticks(spinner) > before)
        wait(lambda: is_stopped(target.processes[0]))
    finally:
        slowdown.close()
    slowdown.verify()
    wait(lambda: not is_stopped(target.processes[0]))
    after = cpu_ticks(spinner)
    wait(lambda: cpu_ticks(spinner) > after + 1)


def test_a_slowdown_that_somebody_else_undoes_did_not_happen(spinner: subprocess.Popen[str]) -> None:
    slowdown = Slowdown(aim(spinner), share=0.2, period_seconds=0.4)
    slowdown.start()
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            spinner.send_signal(signal.SIGCONT)
    finally:
        slowdown.close()
    with pytest.raises(FaultDidNotHappen, match="of the time only"):
        slowdown.verify()


def test_a_slowdown_whose_end_is_interrupted_lets_its_target_run(
    spinner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = aim(spinner)
    slowdown = Slowdown(target, share=0.01, period_seconds=60.0)
    verify_stopped(slowdown.start())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        slowdown.close()
    wait(lambda: not is_stopped(target.processes[0]))


def test_a_slowdown_ends_with_its_target(spinner: subprocess.Popen[str]) -> None:
    slowdown = Slowdown(aim(spinner), share=0.5, period_seconds=0.04)
    slowdown.start()
    spinner.kill()
    spinner.wait()
    began = time.monotonic()
    slowdown.wait(30)
    assert time.monotonic() - began < 10
    slowdown.close()


def test_a_cut_breaks_named_connections_until_it_ends(tmp_path: Path) -> None:
    address = os.path.relpath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, "-c", CONNECT, address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            connection, _ = listener.accept()
            connection.send(b"a")
            assert connection.recv(1) == b"x"
            cut = Cut(aim(process))
            cut.start()
            try:
                assert process.stdout.readline() == "cut\n"
                assert connection.recv(1) == b""
                connection.close()
                again, _ = listener.accept()
                assert process.stdout.readline() == "cut again\n"
                again.close()
                cut.verify()
            finally:
                cut.close()
                process.kill()


def test_a_process_without_connections_cannot_be_cut_off(spinner: subprocess.Popen[str]) -> None:
    with pytest.raises(FaultDidNotHappen, match="no connection"):
        Cut(aim(spinner)).start()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_cut_that_nobody_goes_on_with_did_not_last(
    spinner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([1])

    def cut_once(_: object) -> int:
        for broken in asked:
            return broken
        raise OSError("too many open files")

    monkeypatch.setattr(cutting, "cut", cut_once)
    cut = Cut(aim(spinner))
    cut.start()
    wait(lambda: not any(thread.name == "cut" for thread in threading.enumerate()))
    with pytest.raises(FaultDidNotHappen, match="was not cut off to the end"):
        cut.verify()
    spinner.kill()
    spinner.wait()
    cut.verify()
