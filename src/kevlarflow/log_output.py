"""What a process says goes to its log, and whether the disk takes it must be nothing to the process.

On a full disk every write fails. `logging` bears that; `print`, progress bars and the flush before a fork or at the end
raise, in the middle of whatever was to be told. So standard output and standard error become streams that lose what
cannot be written. The same holds for a terminal whose owner has left.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


def lose_what_cannot_be_written() -> None:
    """Make standard output and standard error never raise: for this process, and for all that it forks."""
    sys.stdout, sys.stderr = _stream(STANDARD_OUTPUT), _stream(STANDARD_ERROR)


def _stream(descriptor: int) -> TextIO:
    buffer = io.BufferedWriter(_LossyFile(descriptor))
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class _LossyFile(io.RawIOBase):
    """A descriptor, which stays open whatever becomes of this object."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        return length
