"""Processes as /proc shows them: who lives, who is a corpse, who belongs to a run.

A process id is not an identity, since the kernel hands it out again: the start time beside it makes one.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

_STATE_FIELD = 0
_START_TIME_FIELD = 19
_DEAD_STATES = ("Z", "X", "x")
_STOPPED_STATE = "T"


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process in its one life."""

    pid: int
    start_ticks: int


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this id now; None when it is dead, a zombie included."""
    fields = _stat(pid)
    if fields is None or fields[_STATE_FIELD] in _DEAD_STATES:
        return None
    return ProcessIdentity(pid, int(fields[_START_TIME_FIELD]))


def is_alive(process: ProcessIdentity) -> bool:
    """Whether this very process still runs (or could: a stopped one is alive)."""
    return identify(process.pid) == process


def is_stopped(process: ProcessIdentity) -> bool:
    """Whether this very process is stopped, by SIGSTOP or alike."""
    fields = _stat(process.pid)
    return fields is not None and fields[_STATE_FIELD] == _STOPPED_STATE and is_alive(process)


def with_environment(name: str, value: str) -> list[int]:
    """Ids of the living processes that were started with an environment variable of this value."""
    wanted = f"{name}={value}".encode()
    return [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and identify(int(entry)) is not None and wanted in _environment(int(entry))
    ]


def command_line(pid: int) -> str:
    """How a process was started, for messages."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone"


def _stat(pid: int) -> list[str] | None:
    # The command name stands in parentheses and may hold anything, so the fields count from the last one.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
