"""What a controller writes down: every event, for replay, and what its next life has to know.

The journal is a file of JSON lines, each ``{"at": monotonic seconds, "event": {...}}``; a line with "start" in place of
"event" marks a new life of the controller. Fed to a fresh `Cluster` they repeat the run. It is turned over when it is
full, and one older file is kept. The memory is one small file that is replaced as a whole.

Neither may hurt: a disk that is full, slow to appear or read-only costs the record, not the cluster.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from kevlarflow.recovery.events import AnyEvent, Snapshot

MAX_JOURNAL_BYTES = 16 << 20
PAUSE_AFTER_ERROR_SECONDS = 1.0


class Journal:
    """Appends lines to `path`; `lost` counts those that could not be written."""

    def __init__(self, path: str, limit: int = MAX_JOURNAL_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._file: int | None = None
        self._size = 0
        self._retry_at = 0.0
        self._encoder = msgspec.json.Encoder()
        self.lost = 0

    def start(self, now: float, **facts: Any) -> None:
        """Mark the beginning of a life of the controller."""
        self._write(now, {"at": now, "start": facts})

    def add(self, now: float, event: AnyEvent) -> None:
        """Write one event down."""
        self._write(now, {"at": now, "event": event})

    def _write(self, now: float, entry: dict[str, Any]) -> None:
        if now < self._retry_at:
            self.lost += 1
            return
        line = self._encoder.encode(entry) + b"\n"
        try:
            self._make_room(len(line))
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
                self._size = os.fstat(self._file).st_size
            self._size += os.write(self._file, line)
        except OSError:
            self.lost += 1
            self._retry_at = now + PAUSE_AFTER_ERROR_SECONDS
            self.close()

    def _make_room(self, size: int) -> None:
        if self._file is not None and self._size + size > self._limit:
            self.close()
            path = Path(self._path)
            path.replace(path.with_stem(path.stem + ".1"))

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None


class Remembered(msgspec.Struct, frozen=True):
    """The memory's content."""

    snapshot: Snapshot
    start_times: dict[int, int]
    """When each process started, in clock ticks after boot: its number alone may be reused."""


class Memory:
    """What one life of the controller leaves to the next. Its existence says that there was one."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._last = b""
        self.lost = 0

    def recall(self) -> Remembered | None:
        """What was left; None for the first life. What cannot be read is as if nothing was known."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(content, type=Remembered)
        return Remembered(Snapshot(nodes=(), epochs={}, served=True), {})

    def keep(self, remembered: Remembered) -> None:
        """Replace the content, if it has changed."""
        content = msgspec.json.encode(remembered)
        if content == self._last:
            return
        draft = self._path.with_suffix(".new")
        try:
            draft.write_bytes(content)
            draft.replace(self._path)
            self._last = content
        except OSError:
            self.lost += 1


def unix_offset() -> float:
    """Unix seconds minus monotonic seconds."""
    return time.time() - time.monotonic()
