"""The memory of a state machine: what happened to whom, and because of what, in the last few thousand entries.

When something is as it should not be, the question is always how it came to be so. Every transition and every
command leaves one entry here; `tell` picks those of one subject.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """One thing that happened."""

    time: float
    subject: str
    event: str
    cause: str
    """The event from outside that was being handled."""

    def __str__(self) -> str:
        return f"{self.time:12.3f} {self.subject}: {self.event} ({self.cause})"


class Story:
    """A bounded log; the oldest entries are forgotten first."""

    def __init__(self, limit: int = 4_000) -> None:
        self._entries: collections.deque[Entry] = collections.deque(maxlen=limit)

    def add(self, time: float, subject: str, event: str, cause: str) -> None:
        """Remember one thing."""
        self._entries.append(Entry(time, subject, event, cause))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def tell(self, subject: str, limit: int = 30) -> str:
        """The last `limit` entries about `subject`, oldest first, one a line."""
        about = [entry for entry in self._entries if entry.subject == subject]
        return "\n".join(map(str, about[-limit:]))
