"""How a process ended, and whether somebody ended it.

The kernel keeps that in ``/proc/<pid>/stat`` from before a process begins to give its memory back, for whoever may
read it: one need not be the parent. A process that fails of what it does dies of another signal, or with a status. Only
the kernel itself, when memory is short, uses SIGKILL for what a process may be to blame for, and it counts how often.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

SENT = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals that a process does not get for what it does."""
OOM_SECONDS = 5.0
"""For so long after the kernel has killed for want of memory, anybody who died of SIGKILL may be the one."""
LOOK_SECONDS = 1.0
VMSTAT = Path("/proc/vmstat")


def name(status: int) -> str:
    """A status as waitpid(2) gives it, for people: ``SIGKILL``, ``status 1``; nothing for a success."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"status {os.WEXITSTATUS(status)}" if status else ""


def was_sent(status: int) -> bool:
    """Whether a process ended because it was sent a signal."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in SENT


class OomKills:
    """Notices that the kernel has killed somebody since memory was short, in a cgroup or on the whole machine."""

    def __init__(self, vmstat: Path = VMSTAT) -> None:
        self._vmstat = vmstat
        self._count = self._read()
        self._changed_at = self._look_at = float("-inf")

    def may_have_been(self, now: float) -> bool:
        """Whether who has just died may have been killed for that; True as well where the kernel does not say."""
        count = self._read()
        if count != self._count:
            self._count, self._changed_at = count, now
        return count is None or now - self._changed_at < OOM_SECONDS

    def look(self, now: float) -> None:
        """Notice when it happens; to be called often."""
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self.may_have_been(now)

    def _read(self) -> int | None:
        try:
            lines = self._vmstat.read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
