"""What a controller writes down: every event, for replay, and what its next life has to know.

The journal is a file of JSON lines, each ``{"at": monotonic seconds, "event": {...}}``; a line with "start" in place of
"event" marks a new life of the controller. Fed to a fresh `Cluster` they repeat the run. It is turned over when it is
full, and one older file is kept. The memory is one small file that is replaced as a whole.

Neither may hurt: a disk that is full, slow to appear or read-only costs the record, not the cluster. What is missing is
said, though: to a person, in one line; in the journal, by a line with "lost", the number of lines that should stand
there; and a memory that is out of date is emptied, since a controller that believed it would give numbers of members
away a second time, while one that knows nothing asks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from kevlarflow.recovery.events import AnyEvent, Snapshot

MAX_JOURNAL_BYTES = 16 << 20
RETRY_SECONDS = 1.0
FIRST_LOOK_SECONDS = 3.0
"""After the start of a controller: by then those who watch it have said so, and hear what it has to tell."""
CALM_SECONDS = 5.0
"""A disk that is about full takes some lines and others not: good news waits until it has taken all for so long."""


class Journal:
    """Appends lines to `path`; `lost` counts those that could not be written."""

    def __init__(self, path: str, limit: int = MAX_JOURNAL_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._file: int | None = None
        self._size = 0
        self._retry_at = 0.0
        self._encoder = msgspec.json.Encoder()
        self._missing = 0
        """Lines lost since the last that was written."""
        self.lost = 0
        self.problem = ""
        """Why the last line could not be written, in the kernel's words; empty when it was."""

    def start(self, now: float, **facts: Any) -> None:
        """Mark the beginning of a life of the controller."""
        self._write(now, {"at": now, "start": facts})

    def add(self, now: float, event: AnyEvent) -> None:
        """Write one event down."""
        self._write(now, {"at": now, "event": event})

    def _write(self, now: float, entry: dict[str, Any]) -> None:
        if now < self._retry_at or not self._append(now, self._encoder.encode(entry) + b"\n"):
            self.lost += 1
            self._missing += 1

    def retry(self, now: float) -> None:
        """After a failure: write down what is missing, if the disk takes it now."""
        if self.problem and now >= self._retry_at:
            self._append(now, b"")

    def _append(self, now: float, line: bytes) -> bool:
        """Write a line, after one that tells how many are missing before it; returns whether that was possible."""
        if self._missing:
            line = self._encoder.encode({"at": now, "lost": self._missing}) + b"\n" + line
        try:
            self._make_room(len(line))
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
                self._size = os.fstat(self._file).st_size
            self._write_whole(self._file, line)
        except OSError as error:
            self.problem = error.strerror or str(error)
            self._retry_at = now + RETRY_SECONDS
            self.close()
            return False
        self.problem = ""
        self._missing = 0
        return True

    def _write_whole(self, file: int, line: bytes) -> None:
        """A disk may have room for a part of it: half a line would spoil the one that comes after it, too."""
        if os.write(file, line) < len(line):
            os.ftruncate(file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(line)

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
        self._content = b""
        self.lost = 0
        self.problem = ""
        """Why the content could not be replaced, in the kernel's words; empty when it was."""

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
        if content != self._content or self.problem:
            self._content = content
            self._store()

    def retry(self) -> None:
        """After a failure: store the content, if the disk takes it now."""
        if self.problem:
            self._store()

    def _store(self) -> None:
        draft = self._path.with_suffix(".new")
        try:
            draft.write_bytes(self._content)
            draft.replace(self._path)
            self.problem = ""
        except OSError as error:
            self.lost += not self.problem
            self.problem = error.strerror or str(error)
            self._forget(draft)

    def _forget(self, draft: Path) -> None:
        """Leave no content but the fact that there was one: to empty a file takes no room."""
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._path.write_bytes(b"")


class Records:
    """Journal and memory in one folder, and what a person is told when the disk does not take them."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.journal = Journal(os.path.join(folder, "journal.jsonl"))
        self.memory = Memory(os.path.join(folder, "controller.json"))
        self._lost_before = 0
        self._is_told = False
        self._due_at: float | None = None
        self._failed_at = 0.0

    @property
    def lost(self) -> int:
        """Lines and contents that could not be written."""
        return self.journal.lost + self.memory.lost

    @property
    def problem(self) -> str:
        """What is the matter with the disk, in one line for a person; empty when nothing is."""
        reason = self.journal.problem or self.memory.problem
        if not reason:
            return ""
        return f"{self._folder} cannot be written ({reason}): serving goes on, logs and journal do not; make room there"

    def see_to(self, now: float) -> str | None:
        """Try again what has failed; returns a line for a person when that is news."""
        if self._due_at is None:
            self._due_at = now + FIRST_LOOK_SECONDS
        if now < self._due_at:
            return None
        self._due_at = now + RETRY_SECONDS
        self.journal.retry(now)
        self.memory.retry()
        if self.problem:
            self._failed_at = now
            was_told, self._is_told = self._is_told, True
            return None if was_told else self.problem
        # Bad news may have come from an earlier life of the controller.
        is_news = self._is_told or self.journal.lost > self._lost_before
        if not is_news or now - self._failed_at < CALM_SECONDS:
            return None
        self._is_told = False
        lost, self._lost_before = self.journal.lost - self._lost_before, self.journal.lost
        return f"{self._folder} can be written again; lines that the journal lacks: {lost}"


def unix_offset() -> float:
    """Unix seconds minus monotonic seconds."""
    return time.time() - time.monotonic()
