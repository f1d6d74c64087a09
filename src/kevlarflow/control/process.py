"""A process that the supervisor answers for: started here, or forked by the zygote and known by its id.

Both kinds are watched through a pidfd, which becomes readable when the process ends, whoever its parent is, and
which can never come to mean another process, as an id can.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from kevlarflow.kinship import die_with_parent

LAST_LINES = 200
REAP_POLL_SECONDS = 0.005


class Process:
    """A living process, until `close`."""

    def __init__(self, name: str, pid: int, log: Path) -> None:
        self.name = name
        self.pid = pid
        self.log = log
        self.exit_fd = os.pidfd_open(pid)
        """Readable when the process has ended."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.exit_fd, number)

    def kill_group(self) -> None:
        """Kill whatever this process has left in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of a process that has ended."""
        os.close(self.exit_fd)


def spawn(
    name: str,
    command: Sequence[str],
    environment: dict[str, str],
    log: Path,
    passed: Sequence[int] = (),
    *,
    outlives_us: bool = False,
) -> Process:
    """Start a process in a group of its own: Ctrl-C in the terminal is for the supervisor alone.

    The kernel kills it when we end, unless it is to outlive us.
    """
    parent = os.getpid()
    with _open(log) as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=passed,
            process_group=0,
            preexec_fn=None if outlives_us else lambda: die_with_parent(parent),  # noqa: PLW1509 - two system calls.
        )
    # The supervisor reaps everybody in `reap`, and has no use for this object.
    child.returncode = 0
    try:
        return Process(name, child.pid, log)
    except OSError:
        # Nobody could watch it.
        os.kill(child.pid, signal.SIGKILL)
        raise


def _open(log: Path) -> BinaryIO:
    """The log to append to; a disk that has no room for it costs what would be said, not the process."""
    try:
        return log.open("ab")
    except OSError:
        return open(os.devnull, "ab")


def reap() -> list[tuple[int, int]]:
    """Every child that has ended, adopted ones too, with its exit status: the negative signal number if killed."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append((child[0], os.waitstatus_to_exitcode(child[1])))
    return ended


def reap_all(seconds: float) -> None:
    """Wait until no child is left, adopted ones included; give up after so long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] or time.monotonic() < deadline:
            time.sleep(REAP_POLL_SECONDS)


def last_words(log: Path) -> str:
    """The line of a log that most likely says why its process ended: the last error, or else the last line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return ""
    said = [line for line in lines if line.strip()]
    errors = [line for line in said if "Error" in line.partition(":")[0] or "ERROR" in line or "kevlarflow:" in line]
    return (errors or said or [""])[-1].strip()
