"""Who dies with whom, and who inherits whose children: what Linux offers to a family of processes.

A process that has called `die_with_parent` is killed by the kernel in the moment that its parent ends, however that
comes about and whatever it is doing then. This needs nobody's help and nobody's time, so it holds even when whoever
was to clean up is killed as well. It is about the parent, though, not about the forefathers: a process that is to
share the fate of its grandparent has to become its child first, which is what `fork_for_parent` does.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable

TITLE = "kevlarflow: "
"""How the title of each of our processes begins; what follows names it, such as node-0-1-2 or engine-0."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_PID_BYTES = 32

# Loaded now, because between fork and exec there is not much that one may do.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when its parent ends, and leave at once if `parent` has gone.

    The parent is, to the kernel, the thread that forked. A fork does not inherit this; an exec keeps it.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def forks_die_with_us() -> None:
    """Have all that the main thread forks from now on die with it, and what they fork with them.

    Other threads' forks are left alone: the kernel would kill them when the thread ends.
    """
    parent = 0

    def remember() -> None:
        nonlocal parent
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0

    def follow() -> None:
        if parent:
            die_with_parent(parent)

    os.register_at_fork(before=remember, after_in_child=follow)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def fork_for_parent(body: Callable[[], object]) -> int:
    """Fork a process that is not our child but our parent's, which has called `adopt_orphans`; return its id.

    It runs `body`, which must not return, and dies with that parent: our own end is nothing to it. In between stands
    a process that forks it and ends. Only for a process with one thread. Raises `OSError` when it cannot fork.
    """
    grandparent = os.getppid()
    told, tell = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            os.close(told)
            _fork_and_leave(grandparent, tell, body)
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        pid = pipe.read(_PID_BYTES)
    os.waitpid(between, 0)
    if not pid:
        raise OSError("a process could not be forked: is there enough memory, and are more processes allowed?")
    return int(pid)


def _fork_and_leave(grandparent: int, tell: int, body: Callable[[], object]) -> None:
    myself = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid != 0:
        os.write(tell, str(pid).encode())
        os._exit(0)
    os.close(tell)
    # Readable once its process has ended, and by then its children have their new parent.
    select.select([myself], [], [])
    os.close(myself)
    die_with_parent(grandparent)
    body()


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
