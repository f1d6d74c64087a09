"""How processes end, and who is to blame for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from kevlarflow.control import endings
from kevlarflow.control.endings import OOM_SECONDS, OomKills
from kevlarflow.control.watcher import LocalProcessWatcher

PATIENCE_SECONDS = 30.0


@pytest.fixture
def vmstat(tmp_path):
    """What the kernel counts, on a machine that has memory enough."""
    file = tmp_path / "vmstat"
    file.write_text("nr_free_pages 7\noom_kill 2\noom_kills_of_another_kind 9\n")
    return file


@pytest.fixture
def watcher(vmstat):
    """One that looks there."""
    watcher = LocalProcessWatcher()
    watcher._oom_kills = OomKills(vmstat)
    return watcher


def death_of(body: str, number: signal.Signals | None = None, watcher=None):
    """What the watcher says of a process that runs `body`, and is sent a signal."""
    script = f"print('ready', flush=True); import os, signal, sys, time; sys.stdin.readline(); {body}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, "-c", script], **pipes)
    child.stdout.readline()
    watcher = watcher or LocalProcessWatcher()
    assert watcher.watch("node", (child.pid,))
    try:
        child.stdin.write(b"go\n")
        child.stdin.flush()
        if number is not None:
            child.send_signal(number)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (deaths := watcher.check(time.monotonic())):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    (death,) = deaths
    return death.ending, death.from_outside


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_killed_is_known_to_have_been(number, watcher):
    assert death_of("time.sleep(600)", number, watcher) == (number.name, True)


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        ("os.abort()", "SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("raise ValueError", "status 1"),
        ("os._exit(3)", "status 3"),
        ("pass", ""),
    ],
)
def test_who_dies_of_what_it_does_was_not_killed_by_anybody(body, ending):
    assert death_of(body) == (ending, False)


def test_the_kernel_ends_nobody_by_another_signal_for_want_of_memory(monkeypatch):
    monkeypatch.setattr(OomKills, "may_have_been", lambda *_: True)
    assert death_of("time.sleep(600)", signal.SIGTERM) == ("SIGTERM", True)
    assert death_of("time.sleep(600)", signal.SIGKILL) == ("SIGKILL", False)


def test_a_kill_while_memory_was_short_is_nobody_elses(vmstat):
    kills = OomKills(vmstat)
    assert not kills.may_have_been(10.0)
    vmstat.write_text("oom_kill 3\n")
    assert kills.may_have_been(20.0)
    assert kills.may_have_been(20.0 + OOM_SECONDS / 2), "it may have killed several"
    assert not kills.may_have_been(20.0 + OOM_SECONDS)


@pytest.mark.parametrize("text", [None, "nr_free_pages 7\n"], ids=["no file", "no count"])
def test_where_the_kernel_does_not_say_it_may_have_been(tmp_path, text):
    file = tmp_path / "vmstat"
    if text is not None:
        file.write_text(text)
    assert OomKills(file).may_have_been(10.0)


def test_a_kill_for_want_of_memory_is_noticed_when_it_happens(vmstat, watcher):
    vmstat.write_text("oom_kill 3\n")
    before = time.monotonic() - 2 * OOM_SECONDS
    assert watcher.check(before) == []
    assert death_of("time.sleep(600)", signal.SIGKILL, watcher) == ("SIGKILL", True), "that was long before"


def test_the_watcher_asks_for_it(vmstat, watcher):
    vmstat.write_text("oom_kill 3\n")
    assert death_of("time.sleep(600)", signal.SIGKILL, watcher) == ("SIGKILL", False)


def test_of_a_nodes_processes_that_one_comes_first_that_may_have_taken_the_others_along(watcher):
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    try:
        assert watcher.watch("node", [each.pid for each in children])
        children[0].kill()
        os.kill(children[1].pid, signal.SIGABRT)
        for child in children:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        deaths = watcher.check(time.monotonic())
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [(death.ending, death.from_outside) for death in deaths] == [("SIGABRT", False), ("SIGKILL", True)]


def test_who_was_reaped_before_anybody_looked_has_ended_in_no_known_way():
    child = subprocess.Popen(["sleep", "600"])
    watcher = LocalProcessWatcher()
    assert watcher.watch("node", [child.pid])
    child.kill()
    child.wait()
    (death,) = watcher.check(time.monotonic())
    assert (death.ending, death.from_outside) == ("", False)


def test_a_number_without_a_name_is_told_as_a_number():
    assert endings.name(34 | 0x80) == endings.name(34) == "SIGRTMIN"
    assert endings.name(40) == "signal 40"
