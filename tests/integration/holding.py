"""One thread of a process that stands still while the others go on: a part that does not answer, of a peer that does.

SIGSTOP stops a whole process, and everybody sees that. A debugger can stop a single thread (ptrace(2)), with the same
right by which `kevlarflow.faults.cutting` reaches for sockets. A thread that stood still with a lock, the
interpreter's above all, would stop the others too; so it is stopped where it waits for something to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path

from kevlarflow.faults import FaultDidNotHappen

CONTINUE, DETACH, SEIZE, INTERRUPT = 7, 17, 0x4206, 0x4207
"""Requests of ptrace(2)."""
EVENT_STOP = 128
ANY_THREAD = 0x40000000
"""__WALL of waitpid(2)."""
WAITING = {"7", "271"}
"""poll(2) and ppoll(2) on x86-64, as /proc tells them."""
TRACED = "t"
PAUSE_SECONDS = 0.002
DEADLINE_SECONDS = 20.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class HeldThread:
    """For the length of a block the thread of this name does nothing, or nothing for most of the time.

    `running_seconds` is how long it may run after each `still_seconds`; 0: never.
    """

    def __init__(self, pid: int, name: str, still_seconds: float = 0.1, running_seconds: float = 0.0) -> None:
        self._folder = _thread_folder(pid, name)
        self._thread_id = int(self._folder.name)
        self._still_seconds = still_seconds
        self._running_seconds = running_seconds
        self._closing, self._held = threading.Event(), threading.Event()
        self.times = 0
        """How often the kernel has said that it stands still."""
        self._failure: Exception | None = None
        # The kernel takes requests from the very thread that has begun with them.
        self._tracer = threading.Thread(target=self._trace, name="tracer", daemon=True)

    def __enter__(self) -> HeldThread:
        self._tracer.start()
        self._held.wait(DEADLINE_SECONDS)
        if self._failure is not None or not self._held.is_set():
            raise FaultDidNotHappen(f"thread {self._thread_id} could not be held: {self._failure}")
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._tracer.join()
        if self._failure is not None:
            raise FaultDidNotHappen(f"thread {self._thread_id} was not held to the end: {self._failure}")

    @property
    def is_held(self) -> bool:
        """Whether the kernel says that it stands still."""
        return (self._folder / "stat").read_text().rpartition(")")[2].split()[0] == TRACED

    def _trace(self) -> None:
        try:
            self._request(SEIZE)
            self._stop_where_it_waits()
            self._held.set()
            while not self._closing.wait(self._still_seconds):
                if self._running_seconds:
                    self._request(CONTINUE)
                    self._closing.wait(self._running_seconds)
                    self._stop_where_it_waits()
            self._request(DETACH)
        except (OSError, AssertionError) as failure:
            self._failure = failure
            self._held.set()

    def _stop_where_it_waits(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            self._stop()
            if (self._folder / "syscall").read_text().split()[0] in WAITING:
                self.times += 1
                return
            assert time.monotonic() < deadline, "it never waits for anything"
            self._request(CONTINUE)
            time.sleep(PAUSE_SECONDS)

    def _stop(self) -> None:
        self._request(INTERRUPT)
        while True:
            _, status = os.waitpid(self._thread_id, ANY_THREAD)
            assert os.WIFSTOPPED(status), "it ended"
            if status >> 16 == EVENT_STOP:
                return
            self._request(CONTINUE, os.WSTOPSIG(status))  # A signal, which is the thread's own business.

    def _request(self, request: int, signal: int = 0) -> None:
        if _libc.ptrace(request, self._thread_id, None, signal) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace: {os.strerror(number)}")


def _thread_folder(pid: int, name: str) -> Path:
    """Below /proc."""
    for folder in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().strip() == name:
                return folder
    raise FaultDidNotHappen(f"process {pid} has no thread {name!r}")
