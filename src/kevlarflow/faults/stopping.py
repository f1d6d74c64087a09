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
    """Lets a target run for `share` of each period and stands it still for the rest, from `start` to `close`.

    Before each stop ends, /proc is asked whether it took place. A target that leaves ends the slowdown.
    """

    def __init__(self, target: Target, share: float, period_seconds: float) -> None:
        self._target = target
        self._running_seconds = share * period_seconds
        self._still_seconds = period_seconds - self._running_seconds
        self._began_at = self._ended_at = 0.0
        self._seen_still_seconds = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slowdown", daemon=True)

    def start(self) -> Struck:
        """Stop it for the first time and go on from there; that this one is seen is for `verify_stopped`."""
        struck = stop(self._target)
        self._began_at = self._ended_at = time.monotonic()
        self._thread.start()
        return struck

    def wait(self, seconds: float) -> None:
        """Until so many seconds have passed, or the target has left."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Let it run for good."""
        self._closing.set()
        try:
            if self._thread.ident is not None:
                self._thread.join()
        finally:
            # Also when somebody who is tired of waiting interrupts this.
            thaw(self._target)

    def verify(self) -> float:
        """The share of the time for which it was seen standing still. Raises `FaultDidNotHappen` if that is too little.

        Half of what was asked for is enough: on a crowded machine both kinds of turns last longer.
        """
        total = self._ended_at - self._began_at
        seen = self._seen_still_seconds / total if total > 0 else 0.0
        wanted = self._still_seconds / (self._still_seconds + self._running_seconds)
        if seen < wanted / 2:
            raise FaultDidNotHappen(f"{self._target.name} was seen standing still for {seen:.0%} of the time only")
        return seen

    def _run(self) -> None:
        stopped_at = self._began_at
        while not self._closing.wait(self._still_seconds):
            stood_still = all(map(is_stopped, self._target.processes))
            if not thaw(self._target):
                return
            self._ended_at = time.monotonic()
            self._seen_still_seconds += (self._ended_at - stopped_at) if stood_still else 0.0
            if self._closing.wait(self._running_seconds):
                return
            with contextlib.suppress(FaultDidNotHappen):
                stopped_at = stop(self._target).at
