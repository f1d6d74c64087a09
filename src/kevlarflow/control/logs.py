"""How large the logs of a cluster may grow: they may lie in memory, and a server writes a line for every request.

Whoever writes a log appends to it, and keeps it open for as long as it lives. So a log that is full is emptied in its
place, after its end was copied into the one older file that is kept; what is written in that moment is lost. The
supervisor sees to it, whoever has opened the file. A node has a new log in each of its lives, so there is a bound for
those as well.
"""

from __future__ import annotations

import collections
import contextlib
import os
import stat
from pathlib import Path

MOST_LOG_BYTES = 8 << 20
"""Of a log, and of the older file beside it."""
LIVES_KEPT = 10
"""How many logs of each node are kept: those that were written last, and with them those of all that live."""


def cut(folder: Path, limit: int = MOST_LOG_BYTES) -> None:
    """Keep every log in a folder within its bounds."""
    for log in folder.glob("*.log"):
        with contextlib.suppress(OSError):
            status = log.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size > limit:
                _begin_anew(log, status.st_size - limit, limit)
    _forget_former_lives(folder)


def _begin_anew(log: Path, start: int, size: int) -> None:
    older = _older(log)
    try:
        with log.open("rb") as source, older.open("wb") as copy:
            os.sendfile(copy.fileno(), source.fileno(), start, size)
    except OSError:
        # Where there is no room for both, to have emptied this one makes some.
        older.unlink(missing_ok=True)
    os.truncate(log, 0)


def _forget_former_lives(folder: Path) -> None:
    lives = collections.defaultdict(list)
    for log in folder.glob("node-*.log"):
        with contextlib.suppress(OSError):
            lives[log.stem.rpartition("-")[0]].append((log.stat().st_mtime, log))
    for logs in lives.values():
        for _, log in sorted(logs)[:-LIVES_KEPT]:
            for path in (log, _older(log)):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _older(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")
