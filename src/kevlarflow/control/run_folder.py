"""The private place of one cluster on this machine, and the lock that makes it the only one on its port.

Next to the run folder ``<base>/<port>`` (sockets, configuration: gone when the cluster is gone) stand
``<base>/<port>.lock`` and ``<base>/<port>.logs``. Logs of a run in which something went wrong stay, until the next
run on the port or until there are many of them; a run without incident takes its logs along. Supervisor and guardian
hold the lock through one shared open file, so it is free only when the last trace of a cluster is removed: the file
itself is the last thing that goes. A folder whose lock is free belongs to a cluster that died together with its
guardian: it is swept here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
import uuid
from pathlib import Path

from kevlarflow.control import guardian
from kevlarflow.errors import UsageError

RUN_ID_FILE = guardian.RUN_ID_FILE
LONGEST_SOCKET_PATH = 107
"""Bytes of a Unix socket's path, a limit of the kernel."""
LONGEST_SOCKET_NAME = 40
"""Bytes of the longest name that anyone gives to a socket in the folder; vLLM uses UUIDs."""
LOGS_KEPT = 10
"""How many ports' logs of ended runs stay."""
PREDECESSOR_SECONDS = 10.0
"""How long to wait while the guardian of a cluster that has just died still sweeps."""


class RunFolder:
    """The run folder of `port`, made and locked. `guard_arguments` hands it over to the guardian."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.lock_path = folder.with_suffix(".lock")
        self.log_path = folder.with_suffix(".logs")
        if len(os.fsencode(folder)) + 1 + LONGEST_SOCKET_NAME > LONGEST_SOCKET_PATH:
            raise UsageError(f"{folder} is too long for Unix sockets: set XDG_RUNTIME_DIR to a shorter folder")
        make_private(folder.parent)
        self._base = _kept_from_ageing(folder.parent)
        self.lock = self._take_lock()
        self.run_id = uuid.uuid4().hex
        with contextlib.ExitStack() as undone:
            # Nobody else can undo what is made here before there is a `RunFolder`.
            undone.callback(self.give_back)
            self._remove_predecessor()
            undone.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            (folder / "tmp").mkdir(mode=0o700)
            (folder / RUN_ID_FILE).write_text(self.run_id)
            self._keep_former_logs()
            self._prune_logs()
            undone.callback(shutil.rmtree, self.log_path, ignore_errors=True)
            self.log_path.mkdir(mode=0o700)
            undone.pop_all()

    def guard_arguments(self, lifeline: int) -> list[str]:
        """Arguments with which the guardian watches over this folder."""
        return [str(self.path), self.run_id, str(lifeline), str(self.lock_path), str(os.getpid())]

    def sweep(self) -> None:
        """Do the guardian's work, when there is none."""
        guardian.sweep(str(self.path), self.run_id)

    def remove_logs(self) -> None:
        """Remove this run's logs."""
        if guardian.is_of_run(str(self.path), self.run_id):
            shutil.rmtree(self.log_path, ignore_errors=True)

    def give_back(self) -> None:
        """Let the next cluster have the port, with its folder and its logs. Nothing of ours may be left to do."""
        guardian.remove_lock(str(self.lock_path), os.getpid())

    def _keep_former_logs(self) -> None:
        """Logs that are still there are of a run that failed: who starts it again at once wants to read them later."""
        before = self.log_path.with_name(f"{self.path.name}-before.logs")
        if self.log_path.exists():
            shutil.rmtree(before, ignore_errors=True)
            self.log_path.rename(before)

    def _prune_logs(self) -> None:
        ended = [logs for logs in self.path.parent.glob("*.logs") if not logs.with_suffix(".lock").exists()]
        for logs in sorted(ended, key=_modified_at)[:-LOGS_KEPT]:
            shutil.rmtree(logs, ignore_errors=True)

    def _take_lock(self) -> int:
        deadline = time.monotonic() + PREDECESSOR_SECONDS
        while True:
            lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(lock, 32, 0).decode() or "unknown"
                os.close(lock)
                self._refuse_if_alive(owner, deadline)
                time.sleep(0.05)
                continue
            # Its last owner may have unlinked the file between open and lock; then the lock means nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.lock_path)):
                    self._sign(lock)
                    return lock
            os.close(lock)

    def _sign(self, lock: int) -> None:
        """Say in the lock whose it is; where there is no room even for that, it goes again."""
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        except BaseException:
            guardian.remove_file(str(self.lock_path))
            raise

    def _refuse_if_alive(self, owner: str, deadline: float) -> None:
        if _runs(owner) or time.monotonic() > deadline:
            raise UsageError(
                f"port {self.path.name} is taken by another kevlarflow (main process {owner}): "
                "end that one, or choose another port with --port"
            )

    def _remove_predecessor(self) -> None:
        if not self.path.exists():
            return
        with contextlib.suppress(OSError):
            guardian.sweep(str(self.path), (self.path / RUN_ID_FILE).read_text())
        shutil.rmtree(self.path, ignore_errors=True)


def owner_of(folder: Path) -> int | None:
    """The main process of the cluster that has a run folder, ready or not; None when there is no cluster."""
    owner = _named_owner(folder)
    return int(owner) if owner is not None and _runs(owner) else None


def await_predecessor(folder: Path) -> None:
    """Wait while the guardian of a cluster that has died still removes what that had, its port among it."""
    deadline = time.monotonic() + PREDECESSOR_SECONDS
    while (owner := _named_owner(folder)) is not None and not _runs(owner) and time.monotonic() < deadline:
        time.sleep(0.05)


def _named_owner(folder: Path) -> str | None:
    """Who is said to have a run folder that somebody has locked; None when nobody has."""
    try:
        lock = os.open(folder.with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        # Whoever wants to take it at this moment tries again.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 32, 0).decode()
    else:
        return None
    finally:
        os.close(lock)


def _runs(pid: str) -> bool:
    """Whether a process is there and has not ended, reaped or not."""
    return pid.isdecimal() and bool(guardian.birth(int(pid)))


def _kept_from_ageing(folder: Path) -> int:
    """Keep a folder and all below it from ageing while the descriptor that is returned is open.

    Where the folder is in /tmp, systemd-tmpfiles removes what nobody has used for days, such as the configuration,
    which only restarts read; but nothing below a locked folder. Whoever else has it locked is just going through it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    # Not every file system has locks.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # Somebody else prunes too.


def make_private(folder: Path) -> None:
    """Make a folder that is ours alone, or refuse the one that is there and is not."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    if problem := why_not_private(folder):
        raise UsageError(problem)


def why_not_private(folder: Path) -> str:
    """What keeps a folder from being ours alone, and what to do; empty when nothing does."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return f"{folder} is not a folder of yours: set XDG_RUNTIME_DIR to a private folder"
    if status.st_mode & 0o077:
        return f"{folder} is open to other users: run chmod 700 {folder}"
    return ""
