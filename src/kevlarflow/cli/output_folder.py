"""Where a command puts its report: looked at before anything is measured, so that no hours are lost at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kevlarflow.errors import UsageError


def require_writable(folder: Path) -> None:
    """Make the folder that `--output` names. Raises `UsageError` when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written ({error.strerror}): name another folder") from error
