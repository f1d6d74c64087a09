"""A place for the logs of a cluster that a command starts for itself: kept when that ends badly, else removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def log_folder(command: str, say: Callable[[str], None]) -> Iterator[Path]:
    """A new folder; after an error it stays, and `say` is told where it is."""
    folder = Path(tempfile.mkdtemp(prefix=f"kevlarflow-{command}-"))
    keep = False
    try:
        yield folder
    except Exception:
        keep = True
        say(f"the cluster's log is kept in {folder}")
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
