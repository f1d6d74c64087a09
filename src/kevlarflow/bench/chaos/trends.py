"""Whether a process holds more and more: pure functions of samples that were taken while nothing went on.

A process grows while it warms up, and then it should not. So the end is compared with a plateau, the second quarter of
its life, and only if it has lived long enough for quarters to mean something.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

FEWEST_SAMPLES = 8
MEMORY_SHARE = 0.05
"""What memory may have grown by since the plateau."""


class Sample(NamedTuple):
    """What a process holds."""

    memory_bytes: int
    """Resident memory, shared pages included."""
    open_files: int
    threads: int


class Trend(msgspec.Struct, frozen=True):
    """One thing that a process holds, over its life."""

    process: str
    what: str
    samples: int
    plateau: float
    """Median of the second quarter of its samples."""
    end: float
    """Of the last quarter: the median of memory, the least of what is counted."""
    has_grown: bool

    def told(self) -> str:
        """In words."""
        if self.what == "memory":
            return f"{self.process}: memory from {self.plateau / 2**20:,.1f} to {self.end / 2**20:,.1f} MiB"
        return f"{self.process}: {self.what} from {self.plateau:g} to {self.end:g}"


def trends(process: str, samples: Sequence[Sample]) -> list[Trend]:
    """The trends of a process; none when it is too young to have any."""
    if len(samples) < FEWEST_SAMPLES:
        return []
    columns = zip(("memory", "open files", "threads"), zip(*samples, strict=True), strict=True)
    return [trend(process, what, values) for what, values in columns]


def trend(process: str, what: str, values: Sequence[int]) -> Trend:
    """The trend of one thing, from at least `FEWEST_SAMPLES` values."""
    quarter = len(values) // 4
    plateau = float(statistics.median(values[quarter : 2 * quarter]))
    last = values[-quarter:]
    if what == "memory":
        end = float(statistics.median(last))
        return Trend(process, what, len(values), plateau, end, end > plateau * (1 + MEMORY_SHARE))
    # A farewell to a node that has died keeps its socket for a minute; what is lost for good never goes down again.
    end = float(min(last))
    return Trend(process, what, len(values), plateau, end, end > plateau)
