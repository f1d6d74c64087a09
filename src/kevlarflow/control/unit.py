"""A process that is kept alive: when it is started again after it has died, and when it is given up."""

from __future__ import annotations

from collections.abc import Callable

from kevlarflow.control.process import Process

LONG_LIFE_SECONDS = 60.0
"""The death of a unit that lived longer than this is the first of a row."""
FAILURES_IN_A_ROW = 6
"""Deaths after which a unit is given up."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 10.0


class Unit:
    """One of the processes that the supervisor keeps alive."""

    def __init__(self, name: str, start: Callable[[], Process | None]) -> None:
        self.name = name
        self.start = start
        """Starts it, or returns None while something that it needs is missing."""
        self.process: Process | None = None
        self.started_at = 0.0
        self.due_at = 0.0
        self.failures = 0

    def ensure(self, now: float) -> None:
        """Start the unit if it is missing and its time has come. Raises `OSError` when no process is to be had."""
        if self.process is None and now >= self.due_at:
            try:
                self.process = self.start()
            except OSError:
                self._put_off(now)
                raise
            self.started_at = now

    def bury(self, now: float) -> None:
        """Take note of its death, and decide when it is started again."""
        assert self.process is not None
        self.process.close()
        self.process = None
        if now - self.started_at > LONG_LIFE_SECONDS:
            self.failures = 0
        self._put_off(now)

    def _put_off(self, now: float) -> None:
        self.failures += 1
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self.failures - 2)) if self.failures > 1 else 0.0
        self.due_at = now + pause
