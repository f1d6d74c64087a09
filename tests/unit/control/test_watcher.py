"""Seeing processes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kevlarflow.control.watcher import LocalProcessWatcher

PATIENCE_SECONDS = 30.0
FILL = """
import sys, time
memory = bytearray(int(sys.argv[1]))
memory[::4096] = b"x" * len(memory[::4096])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start():
    children: list[subprocess.Popen[bytes]] = []

    def start(size: int = 1) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", FILL, str(size)], stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_what_a_process_waits_for_a_cpu_is_known():
    """Several share one CPU: each waits while the others compute."""
    spin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    children = [subprocess.Popen(["timeout", "20", sys.executable, "-c", spin]) for _ in range(3)]
    watcher: LocalProcessWatcher[int] = LocalProcessWatcher()
    try:
        for child in children:
            spinning = None
            while spinning is None:
                with open(f"/proc/{child.pid}/task/{child.pid}/children", encoding="ascii") as listed:
                    spinning = next(iter(listed.read().split()), None)
            assert watcher.watch(child.pid, [int(spinning)])
        wait_until(lambda: all((watcher.starved_seconds(child.pid) or 0.0) > 0.1 for child in children))
    finally:
        for child in children:
            child.terminate()
            child.wait()
    assert watcher.starved_seconds(-1) is None


def is_gone(pid: int) -> bool:
    """Whether it is a corpse: its memory is freed, its sockets are closed."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def is_seen_to_die_before_it_is_gone(child: subprocess.Popen[bytes]) -> bool:
    watcher: LocalProcessWatcher[str] = LocalProcessWatcher()
    assert watcher.watch("big", [child.pid])
    assert watcher.check(time.monotonic()) == []
    child.send_signal(signal.SIGKILL)
    wait_until(lambda: watcher.check(time.monotonic()))
    was_gone = is_gone(child.pid)
    assert not watcher.watches("big")
    return not was_gone


def test_a_large_process_is_seen_to_die_before_it_is_gone(start):
    # A busy machine may let us look too late, but not each time.
    assert any(is_seen_to_die_before_it_is_gone(start(512 << 20)) for _ in range(10))


def test_each_rank_of_a_node_is_watched(start):
    one, two = start(), start()
    watcher: LocalProcessWatcher[str] = LocalProcessWatcher()
    assert watcher.watch("node", [one.pid, two.pid])
    watcher.check(1.0)
    two.kill()
    two.wait()
    (death,) = watcher.check(2.0)
    assert (death.key, death.pid, death.alive_at) == ("node", two.pid, 1.0)
    assert watcher.watches("node")
    watcher.kill("node", [one.pid, two.pid])
    assert one.wait(5) == -signal.SIGKILL
    (death,) = watcher.check(3.0)
    assert death.pid == one.pid


def test_a_process_that_is_gone_or_somebody_else_is_not_watched(start):
    child = start()
    watcher: LocalProcessWatcher[str] = LocalProcessWatcher()
    assert watcher.watch("node", [child.pid])
    start_times = watcher.start_times()
    assert watcher.watch("again", [child.pid], start_times)
    assert not watcher.watch("other", [child.pid], {child.pid: start_times[child.pid] + 1})
    child.kill()
    child.wait()
    assert not watcher.watch("gone", [child.pid])
    assert {death.key for death in watcher.check(1.0)} == {"node", "again"}
    watcher.kill("gone", [child.pid])


def test_a_stopped_process_is_alive_and_can_be_killed(start):
    child = start()
    watcher: LocalProcessWatcher[str] = LocalProcessWatcher()
    watcher.watch("node", [child.pid])
    assert watcher.check(1.0) == []
    assert watcher.stopped == {}
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: watcher.check(2.0) == [] and watcher.stopped == {"node": 2.0})
    assert watcher.check(3.0) == []
    assert watcher.stopped == {"node": 2.0}
    child.send_signal(signal.SIGCONT)
    wait_until(lambda: watcher.check(4.0) == [] and watcher.stopped == {})
    child.send_signal(signal.SIGSTOP)
    watcher.kill("node", [child.pid])
    wait_until(lambda: watcher.check(5.0))


def test_descriptors_are_given_back(start):
    child = start()
    before = len(os.listdir("/proc/self/fd"))
    watcher: LocalProcessWatcher[str] = LocalProcessWatcher()
    watcher.watch("node", [child.pid])
    watcher.forget("node")
    watcher.forget("node")
    assert len(os.listdir("/proc/self/fd")) == before
