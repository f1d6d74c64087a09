"""Processes that stand still for a while: stopped, thawed again, or slowed down by both in turn.

A stopped process breaks no connection and frees no memory, which is what makes it a different fault from a dead one.
Who stops a process has to thaw it: each of these can be undone at any time, and undoing a corpse does no harm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from kevlarflow.faults.kinds import (
    VERIFY_INTERVAL_SECONDS,
    VERIFY_TIMEOUT_SECONDS,
    FaultDidNotHappen,
    Struck,
    Target,
    strike,
)
from kevlarflow.faults.processes import is_alive, is_stopped


def stop(target: Target) -> Struck:
    """SIGSTOP to every process of the target, which must all be alive."""
    return strike(target, signal.SIGSTOP)


def verify_stopped(struck: Struck, timeout: float = VERIFY_TIMEOUT_SECONDS) -> float:
    """Wait until /proc has shown each process stopped; return the seconds that took since the signal."""
    deadline = struck.at + timeout
    running = list(struck.target.processes)
    while running := [process for process in running if not is_stopped(process)]:
        if time.monotonic() >= deadline or not all(map(is_alive, running)):
            raise FaultDidNotHappen(f"{struck.target.name}: {[each.pid for each in running]} were not seen stopped")
        time.sleep(VERIFY_INTERVAL_SECONDS)
    return time.monotonic() - struck.at


def thaw(target: Target) -> int:
    """SIGCONT to every process of the target that is still there; return how many those were."""
    thawed = 0
    for process in target.processes:
        with contextlib.suppress(ProcessLookupError):
            if is_alive(process):
                os.kill(process.pid, signal.SIGCONT)
                thawed += 1
    return thawed


class Slowdown:
    """Lets a target run for `share` of each period and stands it still for the rest, from `start` to `close`."""

    def __init__(self, target: Target, share: float, period_seconds: float) -> None:
        self._target = target
        self._running_seconds = share * period_seconds
        self._still_seconds = period_seconds - self._running_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slowdown", daemon=True)

    def start(self) -> Struck:
        """Stop it for the first time and go on from there; that this one is seen is for `verify_stopped`."""
        struck = stop(self._target)
        self._thread.start()
        return struck

    def close(self) -> None:
        """Let it run for good."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        thaw(self._target)

    def _run(self) -> None:
        while not self._closing.wait(self._still_seconds) and thaw(self._target):
            if self._closing.wait(self._running_seconds):
                return
            with contextlib.suppress(FaultDidNotHappen):
                stop(self._target)
