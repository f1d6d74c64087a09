"""What a process says goes to its log, and whether the disk takes it must be nothing to the process.

On a full disk every write fails. `logging` bears that; `print`, progress bars and the flush before a fork or at the end
raise, in the middle of whatever was to be told. So standard output and standard error become streams that lose what
cannot be written. The same holds for a terminal whose owner has left. One that takes nothing for now (Ctrl-S, a reader
that does not read) is not waited for: what is said meanwhile is kept, up to a limit, and said later.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
PIECE_BYTES = 512
"""As many fit, by POSIX, where there is room at all."""
MOST_KEPT_BYTES = 1 << 16
PATIENCE_MS = 100


def lose_what_cannot_be_written() -> None:
    """Make standard output and standard error never raise: for this process, and for all that it forks."""
    sys.stdout, sys.stderr = _stream(STANDARD_OUTPUT), _stream(STANDARD_ERROR)


def _stream(descriptor: int) -> TextIO:
    # It takes everything at once, as a buffered file does, and a flush reaches it.
    file: Any = _LossyFile(descriptor)
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class _LossyFile(io.RawIOBase):
    """A descriptor, which stays open whatever becomes of this object."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._kept = b""
        self._is_stuck = False
        self._lock = threading.RLock()
        # A process that is forked must not wait for a thread that it has not got.
        os.register_at_fork(after_in_child=self._renew_lock)
        self._poller: select.poll | None = None
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._poller = select.poll()
                self._poller.register(descriptor, select.POLLOUT)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        said = bytes(data)
        with self._lock:
            self._kept += said
            self.flush()
            self._kept = self._kept[-MOST_KEPT_BYTES:]
        return len(said)

    def flush(self) -> None:
        """Write what is kept, as far as it is taken."""
        with self._lock:
            try:
                while self._kept and self._takes_more():
                    piece = self._kept if self._poller is None else self._kept[:PIECE_BYTES]
                    self._kept = self._kept[os.write(self._descriptor, piece) :]
            except OSError:
                self._kept = b""

    def _takes_more(self) -> bool:
        """Whether a write would not wait. Who takes nothing for a moment is asked again only later."""
        if self._poller is not None:
            self._is_stuck = not self._poller.poll(0 if self._is_stuck else PATIENCE_MS)
        return not self._is_stuck
