"""Sees local processes begin to die, or stand still.

A process that is killed keeps its sockets open while the kernel takes its memory apart, about 80 ms for each GB;
only then does the other end of a socket notice, and only then does a pidfd become readable. But the kernel marks the
process as exiting before it begins. The mark stands in ``/proc/<pid>/stat``, so reading that every few milliseconds
gives the news early. Reading is cheap: the files stay open, and the one that belongs to the main thread does not sum
over all others.

A process that is stopped breaks no connection at all; but its state stands there, too. And the kernel counts how long
threads waited for a CPU, which tells a process that is starved from one that hangs. How a process ends stands there
too, as soon as the mark does (`control.endings`).

An open file below ``/proc/<pid>`` and a pidfd belong to one process for ever: when its number is given to
another, they say that theirs is gone. So neither sight nor signal can go astray once both are open.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from kevlarflow.control import endings
from kevlarflow.control.endings import OomKills

log = logging.getLogger("kevlarflow.control.watcher")

PF_EXITING = 0x4
STATE, FLAGS, START_TIME, ENDING = 0, 6, 19, 49
"""Positions in `stat` after the name, which may contain anything: see proc_pid_stat(5)."""
GONE = (b"Z", b"X")
STOPPED = (b"T", b"t")
WAITED = 1
"""Position in `schedstat` of the nanoseconds that a thread was ready to run and had no CPU."""
STAT_BYTES = 2_048

Key = TypeVar("Key", bound=Hashable)


class Condition(enum.Enum):
    """What the kernel says of a process."""

    RUNNING = enum.auto()
    """Or asleep, or waiting for a CPU: alive."""
    STOPPED = enum.auto()
    """By SIGSTOP or a debugger: it does nothing, and no connection breaks."""
    DYING = enum.auto()
    """It has begun to exit, or is gone."""


class Process:
    """One process, held by its descriptors."""

    def __init__(self, pid: int) -> None:
        """Raises `OSError` when there is no such process, or when it is not ours."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.getuid():
                raise PermissionError(f"process {pid} belongs to somebody else")
            self._stat = os.open(f"/proc/{pid}/task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self.pidfd)
            raise
        fields = self._fields(START_TIME + 1)
        self.start_time = int(fields[START_TIME]) if fields else 0

    def _fields(self, count: int) -> list[bytes]:
        """The first fields after the name; none when the process is gone."""
        try:
            stat = os.pread(self._stat, STAT_BYTES, 0)
        except OSError:
            return []
        return stat[stat.rfind(b")") + 2 :].split(b" ", count)

    def look(self) -> Condition:
        """What the kernel says of it."""
        fields = self._fields(FLAGS + 1)
        if len(fields) <= FLAGS or fields[STATE] in GONE or int(fields[FLAGS]) & PF_EXITING != 0:
            return Condition.DYING
        return Condition.STOPPED if fields[STATE] in STOPPED else Condition.RUNNING

    def ending(self) -> int | None:
        """How a process ends that is dying, as waitpid(2) would tell its parent; None when it is gone already."""
        fields = self._fields(ENDING + 1)
        return int(fields[ENDING]) if len(fields) > ENDING else None

    def starved_seconds(self) -> float | None:
        """How long its threads together have waited for a CPU, ever; None when the kernel does not say."""
        return starved_seconds(self.pid)

    def kill(self) -> None:
        """SIGKILL, which a stopped process obeys too."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the descriptors."""
        os.close(self._stat)
        os.close(self.pidfd)


def starved_seconds(pid: int) -> float | None:
    """How long the threads of a process together have waited for a CPU, ever; None when the kernel does not say."""
    folder = f"/proc/{pid}/task"
    waited = 0
    try:
        for thread in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                waited += int(Path(f"{folder}/{thread}/schedstat").read_bytes().split()[WAITED])
    except (OSError, ValueError, IndexError):
        return None
    return waited / 1e9 if os.path.exists(f"{folder}/{pid}/schedstat") else None


class Death(NamedTuple, Generic[Key]):
    """What `LocalProcessWatcher.check` reports."""

    key: Key
    pid: int
    alive_at: float
    """Monotonic seconds at which it was last seen alive."""
    ending: str = ""
    """How it ended, for people; empty when nobody knows."""
    from_outside: bool = False
    """Whether somebody killed it, which nothing that it did can bring about."""


class LocalProcessWatcher(Generic[Key]):
    """Watches the processes of nodes and engines, each under a key of the caller's."""

    def __init__(self) -> None:
        self._watched: dict[Key, dict[int, Process]] = {}
        self._checked_at = 0.0
        self._oom_kills = OomKills()
        self.stopped: dict[Key, float] = {}
        """Those of which some process is stopped, and since when (monotonic seconds)."""

    def watch(self, key: Key, pids: Iterable[int], start_times: dict[int, int] | None = None) -> bool:
        """Watch these processes besides those that are watched under `key` already.

        Returns False when one of them is gone, or is not the one that started at the time given for it, in clock
        ticks after boot; that one is not watched.
        """
        processes = self._watched.setdefault(key, {})
        complete = True
        for pid in pids:
            if pid in processes:
                continue
            try:
                process = Process(pid)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                complete = False
                continue
            except OSError as error:
                # It may be well. That it ends is noticed by its silence.
                log.error("process %d cannot be watched: %s", pid, error.strerror)
                continue
            if start_times is not None and start_times.get(pid, process.start_time) != process.start_time:
                process.close()
                complete = False
                continue
            processes[pid] = process
        return complete

    def forget(self, key: Key) -> None:
        """Watch nothing under `key` any more."""
        for process in self._watched.pop(key, {}).values():
            process.close()

    def watches(self, key: Key) -> bool:
        """Whether some process under `key` is still there."""
        return key in self._watched

    def start_times(self) -> dict[int, int]:
        """When each process started, in clock ticks after boot: with the process id a name that is never reused."""
        return {pid: each.start_time for processes in self._watched.values() for pid, each in processes.items()}

    def check(self, now: float) -> list[Death[Key]]:
        """Processes that have begun to die since the last check. Each is reported once and no longer watched."""
        deaths: list[Death[Key]] = []
        stopped = {}
        self._oom_kills.look(now)
        for key, processes in list(self._watched.items()):
            for process in list(processes.values()):
                condition = process.look()
                if condition is Condition.STOPPED:
                    stopped[key] = self.stopped.get(key, now)
                elif condition is Condition.DYING:
                    deaths.append(self._death(key, process, now))
                    del processes[process.pid]
                    process.close()
            if not processes:
                del self._watched[key]
        self._checked_at = now
        self.stopped = stopped
        # Of the processes of one node that one comes first that may have taken the others along.
        return sorted(deaths, key=lambda death: death.from_outside)

    def _death(self, key: Key, process: Process, now: float) -> Death[Key]:
        status = process.ending()
        if status is None:
            return Death(key, process.pid, self._checked_at)
        # The kernel uses no other signal for want of memory.
        memory_was_short = os.WTERMSIG(status) == signal.SIGKILL and self._oom_kills.may_have_been(now)
        from_outside = endings.was_sent(status) and not memory_was_short
        return Death(key, process.pid, self._checked_at, endings.name(status), from_outside)

    def starved_seconds(self, key: Key) -> float | None:
        """How long the processes under `key` have waited for a CPU, ever; None when nobody can say."""
        waited = [process.starved_seconds() for process in self._watched.get(key, {}).values()]
        known = [seconds for seconds in waited if seconds is not None]
        return sum(known) if known and len(known) == len(waited) else None

    def kill(self, key: Key, pids: Iterable[int]) -> None:
        """SIGKILL to these processes: through the descriptor where they are watched, else found by number."""
        processes = self._watched.get(key, {})
        for pid in pids:
            process = processes.get(pid)
            if process is not None:
                process.kill()
                continue
            with contextlib.suppress(OSError):
                stranger = Process(pid)
                stranger.kill()
                stranger.close()
