"""Connections that break though both ends live: the part of a partition that needs no privileges.

The kernel hands us a second handle on another process's socket (`pidfd_getfd`) if we might debug it, which holds for
our own children. Shutting that down ends the connection for both ends. What they connect anew is cut again for as
long as the cut lasts. Listening sockets stay: a partition ends, and then they are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
import time

from kevlarflow.faults.kinds import FaultDidNotHappen, Struck, Target
from kevlarflow.faults.processes import ProcessIdentity, is_alive

_PIDFD_GETFD = 438
CUT_INTERVAL_SECONDS = 0.01

_libc = ctypes.CDLL(None, use_errno=True)


class Cut:
    """Keeps every named connection of a target broken, from `start` to `close`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cut", daemon=True)

    def start(self) -> Struck:
        """Cut, and go on cutting. Raises `FaultDidNotHappen` when there was nothing to cut, or it is not allowed."""
        at = time.monotonic()
        if not sum(map(cut, self._target.processes)):
            raise FaultDidNotHappen(f"{self._target.name} has no connection that could be cut")
        self._thread.start()
        return Struck(self._target, at)

    def verify(self) -> None:
        """Raise `FaultDidNotHappen` when nobody goes on cutting though the target lives; to be asked before `close`."""
        if not self._thread.is_alive() and any(map(is_alive, self._target.processes)):
            raise FaultDidNotHappen(f"{self._target.name} was not cut off to the end")

    def close(self) -> None:
        """Let connections live again."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(CUT_INTERVAL_SECONDS) and any(map(is_alive, self._target.processes)):
            with contextlib.suppress(FaultDidNotHappen):
                for process in self._target.processes:
                    cut(process)


def cut(process: ProcessIdentity) -> int:
    """Break every connection of a process that has a name at either end; return how many were seen to break."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError as error:
        raise FaultDidNotHappen(f"process {process.pid} was gone before its connections were cut") from error
    try:
        return sum(_cut_one(handle, number) for number in _socket_numbers(process.pid))
    finally:
        os.close(handle)


def _socket_numbers(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    found.append(int(name))
    return found


def _cut_one(handle: int, number: int) -> bool:
    copy = _libc.syscall(_PIDFD_GETFD, handle, number, 0)
    if copy < 0:
        problem = ctypes.get_errno()
        if problem == 1:
            raise FaultDidNotHappen("the kernel does not let us cut another process's sockets (pidfd_getfd: EPERM)")
        return False
    with socket.socket(fileno=copy) as connection, contextlib.suppress(OSError):
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        # A pair without names is between threads, or to the parent: no network would carry it.
        if connection.getpeername() or connection.getsockname():
            connection.shutdown(socket.SHUT_RDWR)
            return True
    return False
