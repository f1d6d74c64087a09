"""Children of the supervisor: when the last of them is gone."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, time
from kevlarflow.control.process import reap_all
children = []
for seconds in {children}:
    if (pid := os.fork()) == 0:
        time.sleep(seconds)
        os._exit(0)
    children.append(pid)
began = time.monotonic()
reap_all({patience})
print(round(time.monotonic() - began, 1), sum(os.path.exists(f"/proc/{{pid}}") for pid in children))
for pid in children:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def seconds_and_left(children: list[float], patience: float) -> tuple[float, int]:
    """How long the wait took, and how many children there are after it."""
    command = [sys.executable, "-c", SCRIPT.format(children=children, patience=patience)]
    seconds, left = subprocess.check_output(command, text=True).split()
    return float(seconds), int(left)


def test_it_waits_until_no_child_is_left() -> None:
    seconds, left = seconds_and_left([0.1, 0.4], patience=60.0)
    assert left == 0
    assert 0.3 <= seconds < 30.0


def test_it_does_not_wait_for_ever() -> None:
    seconds, left = seconds_and_left([60.0], patience=0.3)
    assert left == 1
    assert 0.3 <= seconds < 30.0


def test_without_children_there_is_nothing_to_wait_for() -> None:
    assert seconds_and_left([], patience=60.0)[0] < 30.0
