"""A place for the logs of a cluster that a command starts for itself: kept when that ends badly, else removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Logs:
    """A folder of logs, while a command works with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.are_kept = False
        """Whether they are worth something afterwards."""


@contextmanager
def log_folder(command: str, say: Callable[[str], None]) -> Iterator[Logs]:
    """A new folder; after an error, or when somebody wants it kept, it stays, and `say` is told where it is."""
    logs = Logs(Path(tempfile.mkdtemp(prefix=f"kevlarflow-{command}-")))
    try:
        yield logs
    except Exception:
        logs.are_kept = True
        raise
    finally:
        if logs.are_kept:
            say(f"the cluster's log is kept in {logs.folder}")
        else:
            shutil.rmtree(logs.folder, ignore_errors=True)
