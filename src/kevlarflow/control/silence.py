"""How long nothing has come from a process that answers every second: whether it is alive in name only.

That the controller ends is seen by its parent, the supervisor. One that hangs, or stays stopped, does not end, and
nodes that die meanwhile would be missed by nobody. It is judged by the rules by which it judges nodes
(`kevlarflow.recovery.detector`): what its threads have waited for a CPU is no silence, and neither is a pause of who
listens, be it a stopped supervisor or a suspended machine. No clock and no process is touched here.
"""

from __future__ import annotations

from collections.abc import Callable

from kevlarflow.recovery.detector import UNKNOWN_STARVATION_FACTOR

FIRST_WORD_FACTOR = 3
"""Who has not spoken yet may still import, and settle, and gets so many times the limit."""
FIRST_LOOK = 0.25
"""After this share of the limit it is looked at how much the process has been starved."""
LONG_PAUSE = 0.5
"""A pause of the listener's own that is longer than this share of the limit is not counted."""


class Silence:
    """Of one process after another. `limit_seconds` is what makes a silence too long."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Listen to another process, which starts now."""
        self._heard_at = self._checked_at = now
        self._has_spoken = self._is_judged = False
        self._forgive()

    def heard(self, now: float) -> None:
        """Something came."""
        self._heard_at = now
        self._has_spoken = True
        self._forgive()

    def _forgive(self) -> None:
        self._excused = 0.0
        self._starved_before: float | None = None

    def is_too_long(self, now: float, starved_seconds: Callable[[], float | None]) -> bool:
        """Judge, after all that waits was heard; true once for each process.

        `starved_seconds` tells how long its threads have waited for a CPU, ever; None when nobody can say.
        """
        pause, self._checked_at = now - self._checked_at, now
        if pause > LONG_PAUSE * self._limit:
            self._excused += min(pause, now - self._heard_at)
        wall = now - self._heard_at - self._excused
        if self._is_judged or wall < FIRST_LOOK * self._limit:
            return False
        starved = starved_seconds()
        if self._starved_before is None:
            self._starved_before = starved
        silence = wall - max(0.0, (starved or 0.0) - (self._starved_before or 0.0))
        patience = self._limit * (1 if self._has_spoken else FIRST_WORD_FACTOR)
        self._is_judged = silence >= patience * (1 if starved is not None else UNKNOWN_STARVATION_FACTOR)
        return self._is_judged
