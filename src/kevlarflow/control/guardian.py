"""The last one out: when the supervisor is gone, for whatever reason, nothing of the cluster may stay.

A process cannot clean up after its own ``kill -9``, so a second one does it for the supervisor. It holds the
read end of a pipe whose only write end is the supervisor's: end of file means that the supervisor has left.
Then it kills whatever belongs to the run, frees the shared memory that those processes had, removes the run
folder, and gives back the lock on the port. A supervisor that ends in peace closes its end as well, but has more to
do afterwards: while it lives the lock is its own, or the next cluster would be on the port before it has finished.

Who belongs to the run is read from ``/proc/<pid>/environ``: the supervisor starts every child with an
environment that names the run folder and carries a random id, and a fork keeps the environment that its
ancestor was executed with. This also finds orphans, strangers to any process tree, and stopped processes. Who is found
is waited for by its number: a process that ends gives its memory back first, environment included, and may keep its
sockets for a good part of a second after that.

The guardian must survive what kills the others, and must cost nothing. So it imports the standard library
only, and is started by its path (``python -I -S guardian.py``), in a process group of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator

RUN_FOLDER_VARIABLE = "KEVLARFLOW_RUN"
RUN_ID_VARIABLE = "KEVLARFLOW_RUN_ID"
RUN_ID_FILE = "run-id"
SHARED_MEMORY = "/dev/shm/"
STATE, FLAGS, START_TIME = 0, 6, 19
"""Positions in `fields_of`: see proc_pid_stat(5)."""
GONE = (b"Z", b"X", b"x")
PF_EXITING = 0x4

ROUNDS = 200
"""How often the process table is searched at most. A killed process is gone after a few."""
PAUSE_SECONDS = 0.05


def main(arguments: list[str]) -> int:
    """Wait for the lifeline's end, then sweep: ``guardian.py RUN_FOLDER RUN_ID LIFELINE_FD LOCK_PATH SUPERVISOR``."""
    run_folder, run_id, lifeline, lock_path, supervisor = arguments
    while os.read(int(lifeline), 1):
        pass
    left = sweep(run_folder, run_id)
    # The lock on the port is held through an inherited descriptor until this process ends; its file goes first.
    if not is_living_parent(int(supervisor)):
        remove_lock(lock_path, int(supervisor))
    return 1 if left else 0


def is_living_parent(pid: int) -> bool:
    """Whether the process that started us has not begun to end: only then did it close the lifeline on purpose."""
    # The mark is there before descriptors are closed. While it is our parent its number is given to nobody else.
    return not is_ending(pid) and os.getppid() == pid


def is_ending(pid: int) -> bool:
    """Whether a process is gone, or marked by the kernel as exiting."""
    fields = fields_of(pid)
    return not fields or fields[STATE] in GONE or bool(int(fields[FLAGS]) & PF_EXITING)


def remove_lock(path: str, owner: int) -> None:
    """Unlink the lock of a supervisor, unless that was done and another one has put its own there."""
    if read(path) == str(owner).encode():
        remove_file(path)


def sweep(run_folder: str, run_id: str, spared: frozenset[int] = frozenset()) -> list[int]:
    """Kill every process of the run, free its shared memory, remove its folder; return who could not be killed."""
    spared |= {os.getpid()}
    shared: set[str] = set()
    births: dict[int, str] = {}
    left: list[int] = []
    for _ in range(ROUNDS):
        found = [pid for pid in processes_of(run_folder, run_id) if pid not in spared]
        births |= {pid: birth(pid) for pid in found}
        left = [pid for pid, born in births.items() if born and birth(pid) == born]
        if not left:
            break
        for pid in found:
            shared |= shared_memory_of(pid)
            kill(pid)
        time.sleep(PAUSE_SECONDS)
    for path in shared - shared_memory_in_use():
        remove_file(path)
    if is_of_run(run_folder, run_id):
        shutil.rmtree(run_folder, ignore_errors=True)
    return left


def is_of_run(run_folder: str, run_id: str) -> bool:
    """Whether a run folder is not that of another run, which came when somebody had removed our lock."""
    return read(os.path.join(run_folder, RUN_ID_FILE)) in (b"", run_id.encode())


def processes_of(run_folder: str, run_id: str) -> Iterator[int]:
    """Yield the living processes that were started with the environment of this run."""
    folder = os.fsencode(f"{RUN_FOLDER_VARIABLE}={run_folder}")
    identity = os.fsencode(f"{RUN_ID_VARIABLE}={run_id}")
    for pid in all_processes():
        environment = read(f"/proc/{pid}/environ").split(b"\0")
        # A process that is ending, or only waiting to be reaped, has an empty environment.
        if folder in environment and identity in environment:
            yield pid


def birth(pid: int) -> str:
    """Return when a living process started, in ticks of the kernel; nothing of one that only waits to be reaped."""
    fields = fields_of(pid)
    return fields[START_TIME].decode() if fields and fields[STATE] not in GONE else ""


def fields_of(pid: int) -> list[bytes]:
    """Return what /proc/<pid>/stat says after the name, which is in brackets and may hold anything."""
    return read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def all_processes() -> list[int]:
    """Return every process id in this namespace."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def shared_memory_of(pid: int) -> set[str]:
    """Return the named shared memory that a process has mapped."""
    paths = set()
    for line in os.fsdecode(read(f"/proc/{pid}/maps")).splitlines():
        _, slash, rest = line.partition(SHARED_MEMORY)
        if slash:
            paths.add(SHARED_MEMORY + rest.removesuffix(" (deleted)"))
    return paths


def shared_memory_in_use() -> set[str]:
    """Return the named shared memory that some living process still has mapped."""
    return set().union(*(shared_memory_of(pid) for pid in all_processes()))


def kill(pid: int) -> None:
    """Send SIGKILL, which a stopped process obeys too."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def read(path: str) -> bytes:
    """Return the content of a file of /proc, or nothing when its process is gone or another user's."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def remove_file(path: str) -> None:
    """Unlink a file that may be gone already."""
    with contextlib.suppress(OSError):
        os.unlink(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
