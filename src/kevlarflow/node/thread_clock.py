"""How a thread's time is spent, as the kernel tells: computing, waiting for a CPU, or asleep."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import NamedTuple, Protocol


class Spent(NamedTuple):
    """How a thread's time is spent. Seconds."""

    at: float
    computing: float
    waiting: float


class Clock(Protocol):
    """What tells how the time of one thread is spent."""

    @property
    def counts_waits(self) -> bool:
        """Whether it tells more than the time."""

    def spent(self) -> Spent:
        """Up to now."""

    def wants_to_run(self) -> bool:
        """Whether the thread runs or waits for a CPU at this moment."""


class ThreadClock:
    """Of the thread that makes it; any thread may read it."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._folder = f"/proc/self/task/{threading.get_native_id()}"
        with contextlib.suppress(OSError):
            self._file = os.open(f"{self._folder}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def counts_waits(self) -> bool:
        """Whether the kernel tells more than the time: otherwise computing and waiting are always 0."""
        return self._file is not None

    def spent(self) -> Spent:
        """Up to now. A wait for a CPU is only counted once it has ended."""
        if self._file is None:
            return Spent(time.monotonic(), 0.0, 0.0)
        computing, waiting, _ = os.pread(self._file, 128, 0).split()
        return Spent(time.monotonic(), int(computing) / 1e9, int(waiting) / 1e9)

    def wants_to_run(self) -> bool:
        """Whether the thread runs or waits for a CPU at this moment."""
        with open(f"{self._folder}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] == b"R"
